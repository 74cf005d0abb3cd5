"""`python -m bench eight` with two processes on a CPU, and what it concludes from the records of training."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import eight
from bench.__main__ import main
from bench.killed_run import KilledRun, children, end, processor_seconds, ranks_of, runs, steps_of
from bench.scaling import batches
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="times a CPU")
ON_CPU = ("--device", "cpu", "--gpus", "2")


def write_records(paths: Paths, stage: str, records: list[dict]) -> None:
    paths.metrics(stage).parent.mkdir(parents=True, exist_ok=True)
    paths.metrics(stage).write_text("".join(json.dumps(record) + "\n" for record in records))


def step(number: int, **more: float) -> dict:
    return {"step": number, "loss": 1.0, "dt": 0.5, "tokens_per_second": 100.0, "progress": 0.1} | more


@pytest.mark.long
def test_evaluation_and_loaders_of_two_processes(tmp_path):
    out = tmp_path / "eight"
    sizes = "--evaluated-depth 1 --vocab-size 1200 --items 5 --max-tokens 4 --batches 2".split()
    out.mkdir()
    rows = [{"gpus": 2, "depth": 20, "variant": "fused", "tokens_per_second": 3000.0}]
    (out / "scaling.json").write_text(json.dumps({"rows": rows}))
    main(["eight", *ON_CPU, "--parts", "evaluate", "loader", "--out", str(out), *sizes])
    found = json.loads((out / "evaluate.json").read_text())
    two, one = found["rows"]
    assert (two["gpus"], one["gpus"]) == (2, 1) and two["right"] == one["right"] and found["differences"] == {}
    assert {"MMLU", "SpellingBee", "world_choice"} <= two["right"].keys() == two["items"].keys()
    assert set(two["items"].values()) <= {4, 5}  # so many questions were made for MMLU
    assert found["speed_up"]["chat"] == pytest.approx(one["chat_s"] / two["chat_s"])
    found = json.loads((out / "loader.json").read_text())
    assert len(found["rows"]) == 2 and found["a_gpu_takes"] == {"d20": 1500.0}
    assert found["slowest_tokens_per_second"] == min(row["tokens_per_second"] for row in found["rows"]) > 1000


def test_scaling_has_the_first_depth_on_all_numbers_of_gpus(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(eight, "call", lambda *_, **__: {"gpus": 8})
    monkeypatch.setattr(eight, "measured", lambda *found: asked.append(found))
    main(["eight", "--parts", "scaling", "--out", str(tmp_path)])
    ((cases, options, _),) = asked
    assert options.together and options.json == tmp_path / "scaling.json" and 0 < options.limit <= 480
    together = [[(c.depth, c.variant, c.gpus, c.rows) for c, _ in batch] for batch in batches(cases, 8)]
    assert together == [
        [(20, "fused", 8, 16)],
        [(20, "compile:reference", 8, 16)],
        [(26, "fused", 8, 16)],
        [(32, "fused", 8, 8)],
        [(20, "fused", 4, 16), (20, "compile:reference", 4, 16)],
        [
            (20, "fused", 2, 16), (20, "compile:reference", 2, 16), (20, "fused", 1, 16), (20, "compile:reference", 1, 16),
            (26, "fused", 1, 16), (32, "fused", 1, 8),
        ],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "9"], "--gpus 9: this machine has 8 GPUs"),
        (["--kill", "tokenizer"], "--kill tokenizer: choose from base, base-eval, mid"),
        (["--depth", "20"], "--rows has 3 numbers and --depth 1"),
    ],
)
def test_options_that_cannot_be_measured(options, message, monkeypatch):
    monkeypatch.setattr(eight, "call", lambda *_, **__: {"gpus": 8})
    with pytest.raises(UserError, match=message):
        main(["eight", *options])


def test_records_show_missing_and_double_steps_and_lost_seconds(tmp_path):
    paths = Paths(tmp_path)
    kept = [step(0, data_s=0.1), step(1, data_s=0.3), {"step": 2, "val_bpb": 0.7, "evaluate_s": 2.0, "save_s": 1.0}]
    write_records(paths, "base", [*kept, step(2, data_s=0.2), step(3, data_s=0.0), {"step": 4, "save_s": 3.0}])
    found = steps_of(paths, "base")
    assert (found["steps"], found["missing"], found["double"]) == (4, [], [])
    assert found["seconds_of_1000_steps"] == pytest.approx(
        {"data_s": 150.0, "evaluate_s": 500.0, "save_s": 1000.0, "log_s": None}
    )
    assert found["newest_results"] == kept[2]
    write_records(paths, "base", [*kept, step(4), step(4), step(6)])
    found = steps_of(paths, "base")
    assert (found["missing"], found["double"]) == ([2, 3, 5], [4])
    assert steps_of(paths, "base", 4)["missing"] == [5] and steps_of(paths, "mid")["steps"] == 0


def test_a_training_process_is_killed_between_two_saves_and_an_evaluation_after_its_time(tmp_path):
    run = KilledRun(Paths(tmp_path), "tiny", 2, "cpu", tmp_path, time.monotonic() + 60)  # saves every 20 steps
    write_records(run.paths, "mid", [step(number) for number in range(29)])
    assert not run.due("mid", 100.0, 5.0)
    write_records(run.paths, "mid", [step(number) for number in range(30)])
    assert run.due("mid", 0.0, 5.0)
    write_records(run.paths, "sft", [step(0), step(1, progress=0.7)])  # it may end before the second save
    assert run.due("sft", 0.0, 5.0) and not run.due("base", 100.0, 5.0)
    assert run.due("mid-eval", 5.0, 5.0) and not run.due("mid-eval", 4.9, 5.0)


def test_the_stage_that_runs_is_the_last_one_that_the_log_names(tmp_path):
    log = tmp_path / "log"
    before = "[4/10] base: nanochat train base --preset tiny\n"
    log.write_text(before + "[1/10] data: finished before, skipped\n[5/10] base-eval: nanochat evaluate base\nstep 1\n")
    assert runs(log, len(before), "base-eval") and not runs(log, len(before), "base")
    assert not runs(log, log.stat().st_size, "base-eval")


def test_processes_of_a_launcher_of_a_launcher():
    """As the speedrun starts torchrun, and torchrun the processes of a stage."""
    wait = [sys.executable, "-c", "input()"]
    sleep = f"import subprocess; [p.wait() for p in [subprocess.Popen({wait!r}, stdin=0) for _ in range(2)]]"
    outer = f"import subprocess; subprocess.Popen([{sys.executable!r}, '-c', {sleep!r}], stdin=0).wait()"
    process = subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while not (ranks := ranks_of(process.pid, 2)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(ranks) == 2 and process.pid in children(os.getpid())
        assert ranks_of(process.pid, 3) == []
    finally:
        process.stdin.close()
    process.wait(30)
    assert children(process.pid) == [] and not end(process) and processor_seconds(process.pid) == 0
    taken, mine = processor_seconds(os.getpid()), time.process_time()
    assert taken == pytest.approx(mine, abs=1)


@pytest.mark.long
def test_a_speedrun_in_which_processes_are_killed_and_its_checkpoint_with_fewer(tmp_path):
    options = ["eight", *ON_CPU, "--preset", "tiny", "--out", str(tmp_path), "--evaluation-seconds", "1.5"]
    main([*options, "--parts", "speedrun", "--kill", "base", "base-eval", "--last", "base-eval"])
    main([*options, "--parts", "speedrun", "fewer", "--kill", "base", "sft"])  # the call before has killed one of base
    found = json.loads((tmp_path / "speedrun.json").read_text())
    assert [(s["stage"], s["killed"]) for s in found["starts"]] == [
        ("base", True), ("base-eval", True), ("", False), ("sft", True), ("", False),
    ]  # fmt: skip
    assert [s["status"] for s in found["starts"]] == [1, 1, 0, 1, 0] and found["done"]
    assert found["training"].keys() == {"base", "mid", "sft"}
    for stage in found["training"].values():
        assert stage["steps"] > 20 and stage["missing"] == [] == stage["double"]
    [row] = json.loads((tmp_path / "fewer.json").read_text())["rows"]
    assert (row["from_gpus"], row["gpus"], row["from_step"], row["status"], row["steps_again"]) == (2, 1, 580, 0, 20)
    assert row["missing"] == [] == row["double"]
    assert row["mean_loss"] == pytest.approx(row["mean_loss_of_all_gpus"], abs=0.2)
