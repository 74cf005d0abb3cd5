import pytest

from nanochat.cli import COMMANDS, parse
from nanochat.gpt import GPTConfig
from nanochat.options.evaluate import EvaluateBaseOptions
from nanochat.options.presets import PRESETS, PresetOptions
from nanochat.options.train import TrainBaseOptions, TrainMidOptions, TrainSftOptions
from nanochat.platform.errors import UserError
from nanochat.speedrun.preflight import most_rows
from nanochat.train.plan import accumulation_steps, horizon


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
    stages = {"base": TrainBaseOptions, "mid": TrainMidOptions, "sft": TrainSftOptions}
    assert {name: options().optimizer.grad_clip for name, options in stages.items()} == {
        "base": 1.0,
        "mid": 0.0,
        "sft": 0.0,
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
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_gpu_presets_fit_any_usual_number_of_processes(preset, processes):
    config = parse(TrainBaseOptions, "train base", ["--preset", preset])
    rows = config.device_batch_size
    assert accumulation_steps(config.total_batch_size, rows, config.context_length, processes, "tokens") >= 1


@pytest.mark.parametrize(("preset", "rows"), [("d20", 32), ("d26", 16), ("d32", 8), ("cpu", 32)])
def test_one_gate_serves_every_stage_and_on_a_gpu_none_takes_more_rows_than_pretraining(preset, rows):
    assert most_rows(preset) == rows
    if preset != "cpu":
        assert parse(TrainBaseOptions, "train base", ["--preset", preset]).device_batch_size == rows
        mid = parse(TrainMidOptions, "train mid", ["--preset", preset])
        assert accumulation_steps(mid.total_batch_size, mid.device_batch_size, 2048, 8, "tokens") >= 1


def test_presets_fit_their_commands_and_options_win_over_them():
    for preset, commands in PRESETS.items():
        for name in commands:
            kind = COMMANDS[name].load_options()
            assert issubclass(kind, PresetOptions)
            assert parse(kind, name, ["--preset", preset]).preset == preset
    config = parse(TrainBaseOptions, "train base", ["--depth", "7", "--preset=cpu", "--save-every", "9"])
    assert (config.depth, config.run.save_every) == (7, 9)
    assert config.total_batch_size == PRESETS["cpu"]["train base"]["total_batch_size"]
    with pytest.raises(UserError, match="unknown preset 'd99'; there are: tiny, cpu, d20, d26, d32"):
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
