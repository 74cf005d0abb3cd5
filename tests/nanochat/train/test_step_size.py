"""Every preset runs with any number of processes: its steps are shared among them, or the nearest that can be."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import pytest

from nanochat.checkpoint import CheckpointStore
from nanochat.cli import parse
from nanochat.data.pretraining import TokenStream
from nanochat.data.shards import Shards
from nanochat.gpt import GPTConfig
from nanochat.options.data import GenerateOptions
from nanochat.options.presets import PRESETS
from nanochat.options.train import TrainBaseOptions, TrainMidOptions, TrainSftOptions
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.report.sections import read_section
from nanochat.synthetic.generate import generate
from nanochat.train import plan
from nanochat.train.memory import predict_run, rows_that_fit
from nanochat.train.plan import shared, step_size
from tests.conftest import nanochat
from tests.nanochat.models import CARDS, on_card

STAGES = {"base": TrainBaseOptions, "mid": TrainMidOptions, "sft": TrainSftOptions}


def store_of(paths: Paths, stage: str, cpu, processes: int) -> CheckpointStore:
    return CheckpointStore(paths.checkpoints(stage), replace(cpu, world_size=processes))


@pytest.mark.parametrize("processes", range(1, 17))
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_serves_any_number_of_processes(preset, stage, processes, tmp_path, cpu, capsys):
    options = parse(STAGES[stage], f"train {stage}", ["--preset", preset])
    length = parse(TrainBaseOptions, "train base", ["--preset", preset]).context_length if stage != "sft" else 1
    wanted = options.examples_per_step if stage == "sft" else options.total_batch_size
    most = options.device_batch_size or 32
    size = step_size(options, stage, length, store_of(Paths(tmp_path), stage, cpu, processes), most)
    assert size.total == size.rows * size.accumulation * length * processes
    assert 1 <= size.rows <= most
    multiple = length * processes
    assert abs(size.total - wanted) <= max(1, size.accumulation / 2) * multiple
    if wanted % multiple == 0 and processes in (1, 2, 4, 8, 16):
        assert size.total == wanted
    said = capsys.readouterr().out
    assert said == "" if size.total == wanted else f"steps of {size.total:,}" in said and f"the {wanted:,} of" in said
    # a device is not left with a handful of rows where it could take many
    assert size.rows >= min(most, round(wanted / multiple)) / 2


def test_one_process_takes_a_preset_as_it_is():
    assert shared(4096, 16, 256, 1) == (16, 1, 4096) and shared(524288, 32, 2048, 8) == (32, 1, 524288)
    assert shared(4096, 16, 256, 2) == (8, 1, 4096)  # as many rows as it takes
    assert shared(4096, 16, 256, 3) == (5, 1, 3840)  # 15 rows are nearer to 16 than 18


def test_what_the_user_says_is_kept_or_refused(tmp_path, cpu):
    def size(*arguments: str, processes: int):
        options = parse(TrainBaseOptions, "train base", ["--preset", "cpu", *arguments])
        return step_size(options, "base", 256, store_of(Paths(tmp_path), "base", cpu, processes))

    assert size("--device-batch-size", "4", processes=3) == (4, 1, 3072)
    assert size("--total-batch-size", "12288", processes=3) == (16, 1, 12288)
    assert size("--total-batch-size", "768", processes=3) == (1, 1, 768)
    with pytest.raises(UserError, match="nearest valid totals are 3840 or 4608$"):
        size("--total-batch-size", "4000", processes=3)
    assert size("--total-batch-size", "4608", processes=3) == (6, 1, 4608)
    with pytest.raises(UserError, match="nearest valid totals are 3072 or 6144$"):
        size("--total-batch-size", "4000", "--device-batch-size", "4", processes=3)
    with pytest.raises(
        UserError, match="2 processes with 7 rows at a time cannot share; give a .* that divides 8, or --total"
    ):
        size("--device-batch-size", "7", processes=2)


@pytest.mark.parametrize("preset", ["d20", "d26", "d32"])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("card", CARDS)
def test_a_step_has_as_many_tokens_on_every_card(card, processes, preset, tmp_path, monkeypatch):
    runtime = on_card(monkeypatch, card, processes)
    options = parse(TrainBaseOptions, "train base", ["--preset", preset])
    model = GPTConfig.from_depth(options.depth, 65536)
    most = rows_that_fit(model, runtime, "auto")
    size = step_size(options, "base", 2048, CheckpointStore(tmp_path, runtime), most)
    assert size.total == 524_288 and 1 <= size.rows <= most
    assert predict_run(model, size.rows, runtime, "graph").fits(runtime.memory)
    if preset == "d20":
        assert size.rows == (16 if "40 GB" in card else 32)


@pytest.mark.parametrize("gate", [None, 4, 32])
def test_rows_are_chosen_for_what_the_gate_chose(gate, monkeypatch, tmp_path):
    """An operation as its reference needs more memory, and the gate serves no more rows than it was made for."""
    runtime = on_card(monkeypatch, "A100 40 GB")
    options = parse(TrainBaseOptions, "train base", ["--preset", "d20"])
    model, store = GPTConfig.from_depth(20, 65536), CheckpointStore(tmp_path, runtime)
    chosen = replace(model, impl=replace(model.impl, relu2_mlp="reference")) if gate else model
    monkeypatch.setattr(plan, "take_gate", lambda *_: (chosen, None))
    monkeypatch.setattr(plan, "gate_rows", lambda _: gate)
    taken, _, size = plan.gated_step_size(options, "base", Paths(tmp_path), model, store)
    fits = rows_that_fit(chosen, runtime, "auto")
    assert taken == chosen and size.total == 524_288 and size.rows <= min(fits, gate or fits)
    assert (fits < rows_that_fit(model, runtime, "auto")) == bool(gate)


def test_a_number_of_rows_that_is_given_wins(monkeypatch, tmp_path):
    runtime = on_card(monkeypatch, "A100 40 GB")
    options = parse(TrainBaseOptions, "train base", ["--preset", "d20", "--device-batch-size", "64"])
    most = rows_that_fit(GPTConfig.from_depth(20, 65536), runtime, "auto", options.device_batch_size)
    assert step_size(options, "base", 2048, CheckpointStore(tmp_path, runtime), most) == (64, 4, 524_288)


def test_a_model_that_does_not_fit_is_named_with_the_remedies(monkeypatch):
    runtime = on_card(monkeypatch, "A100 40 GB")
    large = GPTConfig.from_depth(40, 65536)
    wanted = "depth 40 with one row of 2048 tokens needs about .* GB, .* A100 40 GB has 42.3 GB; give --recompute attention mlp, "
    with pytest.raises(UserError, match=wanted):
        rows_that_fit(large, runtime, "auto")
    with pytest.raises(
        UserError, match="give a smaller --depth or --context-length, .* --device-batch-size 1 to try it"
    ):
        rows_that_fit(replace(large, recompute=("attention", "mlp")), runtime, "auto")
    assert rows_that_fit(large, runtime, "auto", given=1) == 1


def test_a_resumed_run_keeps_the_rows_that_another_card_chose(monkeypatch, tmp_path):
    monkeypatch.setattr(CheckpointStore, "newest_settings", lambda store: {"step_size": 524_288, "rows": 16})

    def size(card: str, *arguments: str, depth: int = 20):
        runtime = on_card(monkeypatch, card, 8)
        options = parse(TrainBaseOptions, "train base", ["--preset", "d20", *arguments])
        most = rows_that_fit(GPTConfig.from_depth(depth, 65536), runtime, "auto", options.device_batch_size)
        return step_size(options, "base", 2048, CheckpointStore(tmp_path, runtime), most)

    assert size("A100 40 GB") == size("H200 141 GB") == (16, 2, 524_288)
    assert size("H200 141 GB", "--device-batch-size", "32") == (32, 1, 524_288)
    with pytest.raises(
        UserError, match="has micro-batches of 16 rows, and 11 fit on A100 40 GB.* give --device-batch-size 8$"
    ):
        size("A100 40 GB", depth=26)


@pytest.mark.parametrize(("saved", "expected"), [(2, (2, 2, 128)), (None, (4, 1, 128)), (64, (4, 1, 128))])
def test_the_rows_of_a_checkpoint(trained_base, tmp_path, cpu, saved, expected):
    """They are kept; one of an earlier version has none."""
    checkpoints = shutil.copytree(Paths(trained_base).checkpoints("base"), tmp_path / "base")
    path = max(checkpoints.glob("step_*")) / "meta.json"
    meta = json.loads(path.read_text())
    assert meta.pop("rows") == 4
    path.write_text(json.dumps(meta if saved is None else meta | {"rows": saved}))
    options = parse(TrainBaseOptions, "train base", ["--total-batch-size", "128"])
    assert step_size(options, "base", 32, CheckpointStore(checkpoints, cpu), most=1000) == expected
    path.write_text(json.dumps(meta | {"rows": "x"}))
    with pytest.raises(UserError, match=r"meta.json\['rows'\] is 'x'"):
        step_size(options, "base", 32, CheckpointStore(checkpoints, cpu), most=1000)


@pytest.mark.parametrize("name", ["step_size", "total_batch_size"])
def test_rows_that_do_not_divide_the_steps_of_a_resumed_run(tmp_path, cpu, monkeypatch, name):
    """As after an error of memory, whose remedy is a smaller --device-batch-size; also of a run of an earlier version."""
    monkeypatch.setattr(CheckpointStore, "newest_settings", lambda store: {name: 524288})

    def size(rows: int):
        options = parse(TrainBaseOptions, "train base", ["--preset", "d20", "--device-batch-size", str(rows)])
        return step_size(options, "base", 2048, store_of(Paths(tmp_path), "base", cpu, 8))

    assert size(16) == (16, 2, 524288)
    wanted = "8 processes with 12 rows at a time cannot share; resume it with a --device-batch-size that divides 32,"
    with pytest.raises(UserError, match=wanted):
        size(12)


@pytest.mark.parametrize("settings", [None, [], {"step_size": "x"}, {"total_batch_size": [1]}], ids=str)
def test_settings_of_another_shape_are_named(trained_base, tmp_path, cpu, settings):
    """The size of the steps is read before the checkpoint is loaded."""
    checkpoints = shutil.copytree(Paths(trained_base).checkpoints("base"), tmp_path / "base")
    meta = max(checkpoints.glob("step_*")) / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"settings": settings}))
    with pytest.raises(UserError, match=str(checkpoints)):
        step_size(
            parse(TrainBaseOptions, "train base", ["--preset", "tiny"]), "base", 32, CheckpointStore(checkpoints, cpu)
        )


def test_the_generated_data_feed_sixteen_processes(tmp_path, tokenizer):
    options = GenerateOptions(shards=1, chats=1, questions=1, problems=1, identity=1, words=40, tests=1)
    generate(options, Paths(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        for split in ("train", "val"):
            streams = [TokenStream(Shards.of(Paths(tmp_path), split), tokenizer, rank, 16, pool) for rank in range(16)]
            firsts = [next(islice(stream.batches(1, 64), 1)).inputs.tolist() for stream in streams]
            assert len({str(first) for first in firsts}) == 16


FEW = {
    "base": "--num-iterations 6 --eval-tokens 512 --eval-every -1 --save-every 3",
    "mid": "--smoltalk 40 --mmlu 20 --gsm8k 20 --simple-spelling 10 --spelling-bee 10 --eval-rows 8",
    "sft": "--arc-easy 20 --arc-challenge 20 --gsm8k 10 --smoltalk 20 --identity 10 --simple-spelling 5 --spelling-bee 5",
}


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.long)])
def test_two_and_three_processes_train_all_stages_of_a_preset(base, processes):
    """After three, one goes on with the same steps, and two cannot."""
    for stage, arguments in FEW.items():
        command = ("train", stage, "--preset", "tiny", "--run-name", "default", "--device", "cpu", *arguments.split())
        done = nanochat(base, *command, processes=processes)
        assert done.returncode == 0, done.stderr
        assert ("steps of" in done.stdout.replace("6 steps of", "")) == (processes == 3)
        assert read_section(Paths(base), stage)["processes"] == processes
    if processes == 2:
        return
    (Paths(base).checkpoints("base") / "step_000006").rename(base / "moved")
    command = ("train", "base", "--preset", "tiny", "--run-name", "default", "--device", "cpu", *FEW["base"].split())
    refused = nanochat(base, *command, processes=2)
    assert refused.returncode == 1
    assert (
        "have 1920 tokens, which 2 processes cannot share; resume it with 1 or 3 or 5 or 15 processes" in refused.stderr
    )
    resumed = nanochat(base, *command)
    assert resumed.returncode == 0 and "resuming base at step 3" in resumed.stdout, resumed.stderr
    assert "6 steps of 1,920 tokens" in resumed.stdout
    assert (
        "steps of 1,920 tokens, as in the run that is resumed" in resumed.stdout
        and "cannot share" not in resumed.stdout
    )
