import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest
import torch

from nanochat.cli import COMMANDS, main, parse
from nanochat.gpt import GPTConfig
from nanochat.options.evaluate import EvaluateBaseOptions
from nanochat.options.presets import PRESETS, PresetOptions
from nanochat.options.ranges import Between
from nanochat.options.train import TrainBaseOptions, TrainMidOptions, TrainRlOptions, TrainSftOptions
from nanochat.platform.errors import UserError
from nanochat.train.plan import horizon, shared


def test_d20_has_the_numbers_of_the_original_model():
    config = parse(TrainBaseOptions, "train base", ["--preset", "d20"])
    shape = GPTConfig.from_depth(config.depth, 65536, config.context_length)
    assert (shape.width, shape.n_head, shape.head_width) == (1280, 10, 128)
    assert shape.num_parameters == 560_988_160
    assert f"{shape.flops_per_token:.4e}" == "3.4918e+09"
    steps = horizon(config, shape)
    assert steps == 21_400
    assert steps * config.total_batch_size == 11_219_763_200
    assert f"{steps * config.total_batch_size * shape.flops_per_token:.3e}" == "3.918e+19"


def test_only_pretraining_clips_the_gradient_by_default_and_only_training_limits_core():
    stages = {"base": TrainBaseOptions, "mid": TrainMidOptions, "sft": TrainSftOptions, "rl": TrainRlOptions}
    assert {name: options().optimizer.grad_clip for name, options in stages.items()} == {
        "base": 1.0,
        "mid": 0.0,
        "sft": 0.0,
        "rl": 0.0,
    }
    chosen = parse(TrainSftOptions, "train sft", ["--grad-clip", "0.5"]).optimizer
    assert (chosen.grad_clip, chosen.matrix_lr) == (0.5, 0.02)
    assert (TrainBaseOptions().core_metric_max_per_task, EvaluateBaseOptions().core_max_per_task) == (500, -1)


@pytest.mark.parametrize(("depth", "millions"), [(4, 36.7), (26, 1_081), (32, 1_879)])
def test_other_depths(depth, millions):
    shape = GPTConfig.from_depth(depth, 65536)
    assert shape.num_parameters / 1e6 == pytest.approx(millions, rel=2e-3)
    assert shape.head_width == 128


@pytest.mark.parametrize("preset", ["d20", "d26", "d32"])
def test_gpu_presets_leave_the_rows_to_the_gpu(preset):
    for kind, command in ((TrainBaseOptions, "train base"), (TrainMidOptions, "train mid")):
        config = parse(kind, command, ["--preset", preset])
        assert config.device_batch_size == 0 and config.total_batch_size == 524_288


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_up_to_eight_gpus_share_the_steps_of_the_preset_gpu_in_whole_micro_batches(processes):
    for stage, kind, unit in (
        ("base", TrainBaseOptions, 1024),
        ("mid", TrainMidOptions, 1024),
        ("sft", TrainSftOptions, 1),
    ):
        config = parse(kind, f"train {stage}", ["--preset", "gpu"])
        total = config.examples_per_step if stage == "sft" else config.total_batch_size
        size = shared(total, config.device_batch_size, unit, processes)
        assert size.total == total and size.rows == config.device_batch_size and size.accumulation * processes == 8


def test_presets_fit_their_commands_and_options_win_over_them():
    for preset, commands in PRESETS.items():
        for name in commands:
            kind = COMMANDS[name].load_options()
            assert issubclass(kind, PresetOptions)
            assert parse(kind, name, ["--preset", preset]).preset == preset
    config = parse(TrainBaseOptions, "train base", ["--depth", "7", "--preset=cpu", "--save-every", "9"])
    assert (config.depth, config.run.save_every) == (7, 9)
    assert config.total_batch_size == PRESETS["cpu"]["train base"]["total_batch_size"]
    with pytest.raises(UserError, match="unknown preset 'd99'; there are: tiny, cpu, gpu, d20, d26, d32"):
        parse(TrainBaseOptions, "train base", ["--preset", "d99"])


def test_the_first_horizon_set_counts():
    shape = GPTConfig.from_depth(4, 1024)
    assert horizon(TrainBaseOptions(num_iterations=5, target_flops=1e18), shape) == 5
    flops = 10.2 * 524288 * shape.flops_per_token
    assert horizon(TrainBaseOptions(target_flops=flops), shape) == 10
    with pytest.raises(UserError, match="less than one step"):
        horizon(TrainBaseOptions(target_flops=1.0), shape)
    with pytest.raises(UserError, match="set one of"):
        horizon(TrainBaseOptions(target_param_data_ratio=0), shape)


def parts_of(options: object) -> list[object]:
    """Options, and the options that are nested in them."""
    return [options, *(part for f in fields(options) if is_dataclass(part := getattr(options, f.name)))]


def numbers() -> Iterator[tuple[str, str, object]]:
    """The command, the name and the type of each option that is a number; once for all commands that share it."""
    seen = set()
    for name, command in COMMANDS.items():
        for part in parts_of(command.load_options()()):
            for field, option in get_type_hints(type(part), include_extras=True).items():
                if re.search(r"\b(int|float)\b", str(option)) and (field, str(option)) not in seen:
                    seen.add((field, str(option)))
                    yield name, field, option


@pytest.mark.parametrize(("name", "field", "option"), list(numbers()))
def test_every_number_has_a_range_and_what_is_beyond_it_gives_one_line(name, field, option):
    [allowed] = [limits for limits in option.__metadata__ if isinstance(limits, Between)]
    kind, flag = COMMANDS[name].load_options(), f"--{field.replace('_', '-')}"
    for value in ("0", "-1", "nan", "1e400", str(10**20), ""):
        try:
            options = parse(kind, name, [flag, value])
        except UserError as error:
            assert "\n" not in str(error) and flag in str(error), (flag, value, error)
            continue
        [taken] = [getattr(part, field) for part in parts_of(options) if hasattr(part, field)]
        assert math.isfinite(taken) and float(value) == taken and taken in allowed, (flag, value)


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    for allocate in (lambda _: torch.empty(2**52), lambda _: bytearray(2**62)):
        monkeypatch.setattr("nanochat.cli._dispatch", allocate)
        with pytest.raises(SystemExit) as exit:
            main(["trace"])
        assert exit.value.code == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "not enough memory (" in error and "take fewer rows at a time" in error
