"""Times of micro-steps: what they are of, and what happens where one cannot be measured."""

from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from nanochat.train import timing
from tests.nanochat.models import SMALL

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory\nTried"), RuntimeError("Failed to find C compiler\nPlease")]
)
def test_an_execution_that_fails_is_left_out_and_named(monkeypatch, capsys, error):
    """The gate would otherwise end without a file after minutes of work."""

    def time(execution, *_):
        if execution == "compile":
            raise error
        return 2.5

    monkeypatch.setattr(timing, "_time", time)
    found = timing.time_executions({"graph": SMALL, "compile": SMALL}, 2, CPU, torch.float32)
    assert found == {"graph": 2.5}
    said = capsys.readouterr().out
    assert "compile is left out" in said and ("memory" in said or "Failed to find C compiler)" in said)


def test_the_time_is_the_mean_of_one_call(monkeypatch):
    clock = count(step=0.5)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert timing.milliseconds(lambda: None, 4, CPU) == 500 / 4
    prepared = []
    assert timing.milliseconds(lambda: None, 4, CPU, lambda: prepared.append(1)) == 500 and len(prepared) == 4


def test_a_micro_step_is_run_and_its_median_time_taken(monkeypatch):
    """After four untimed calls: the number of calls of a sample is that of a quarter of a second."""
    samples, calls = iter([100.0, 5.0, 1.0, 3.0, 2.0, 4.0]), []

    def milliseconds(step, count, device):
        step()
        calls.append(count)
        return next(samples)

    steps = []
    original = timing.MicroStep.__call__
    monkeypatch.setattr(timing.MicroStep, "__call__", lambda *a: steps.append(1) or original(*a))
    monkeypatch.setattr(timing, "milliseconds", milliseconds)
    assert partial(timing._time, "eager", SMALL, 2)(CPU, torch.float32) == 3.0
    assert calls == [2, 2, 2, 2, 2, 2] and len(steps) == 4 + 6
