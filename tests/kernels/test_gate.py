"""The gate: what is wrong is not chosen, what is fastest is, and a file of another machine is refused."""

import json
from dataclasses import replace

import pytest
import torch

import kernels
from kernels import configs, dispatch, gate, reference
from kernels.dispatch import Implementation
from tests.kernels.harness import DEVICE, GPU

SHAPE = gate.RunShape(rows=8, tokens=256, width=256, heads=2, kv_heads=1, vocab=1024, depth=2) if GPU else gate.RunShape(
    rows=2, tokens=8, width=32, heads=2, kv_heads=1, vocab=64, depth=2
)  # fmt: skip
WHERE = (torch.device(DEVICE), torch.bfloat16)


@pytest.fixture(autouse=True)
def no_choice_left():
    yield
    configs.choices.clear()


def put(monkeypatch, operation: str, run) -> None:
    """Have `triton` of an operation be something else."""
    table = dispatch.room(operation).IMPLEMENTATIONS
    monkeypatch.setitem(table, operation, table[operation] | {"triton": Implementation(run)})


def only(monkeypatch, *operations: str) -> None:
    every = gate.trials
    monkeypatch.setattr(gate, "trials", lambda *where: (t for t in every(*where) if t.operation in operations))


def test_every_operation_is_judged():
    found = dict(gate.examine(SHAPE, *WHERE))
    assert found.keys() == dispatch.ROOMS.keys()
    for operation, choice in found.items():
        assert choice["faults"] == {}, f"{operation}: {choice['faults']}"
        assert choice["impl"] in choice["ms"] or choice["why"] == "nothing else is there"
        if not GPU:  # an interpreted kernel is slower than anything
            assert choice["impl"] == "reference"


def test_the_fastest_is_chosen(monkeypatch):
    only(monkeypatch, "rms_norm")
    monkeypatch.setattr(gate, "milliseconds", lambda trial, able: {n: 1.0 if n == "triton" else 2.0 for n in able})
    found = dict(gate.examine(SHAPE, *WHERE))
    assert found["rms_norm"]["impl"] == "triton" and "triton 1.000 ms, reference 2.000 ms" in found["rms_norm"]["why"]


@pytest.mark.parametrize(
    ("operation", "run", "named"),
    [
        ("rms_norm", lambda x: 1.02 * reference.rms_norm(x), "error .*, reference .*, budget"),
        ("rms_norm", lambda x: 1 / 0, "ZeroDivisionError: division by zero"),
        ("add_rms_norm", lambda x, u: (reference.rms_norm(x + u), x + u), "error"),
        ("newton_schulz", lambda x, *_: x, "cosine"),
        ("apply_update", lambda w, u, rate, factor, copy: w.add_(u * factor), "error"),
    ],
)
def test_what_is_wrong_is_not_chosen(monkeypatch, operation, run, named):
    only(monkeypatch, operation)
    put(monkeypatch, operation, run)
    monkeypatch.setattr(gate, "milliseconds", lambda trial, able: {n: 1.0 if n == "triton" else 2.0 for n in able})
    choice = dict(gate.examine(SHAPE, *WHERE))[operation]
    assert choice["impl"] == "reference"
    assert pytest.importorskip("re").search(named, choice["faults"]["triton"])


def written(tmp_path, **changes):
    path, valid = tmp_path / "gate.json", gate.identity(SHAPE, *WHERE)
    choices = {"rms_norm": {"impl": "triton", "why": "it was faster"}, "adamw": {"impl": "reference", "why": "so"}}
    gate.write(path, valid | changes, choices)
    return path, valid


def test_the_choice_is_taken(tmp_path):
    path, valid = written(tmp_path)
    assert "chose fused rms_norm" in gate.apply(path, valid)
    assert dispatch.preferred("rms_norm", None) == ("triton", "it was faster")
    assert dispatch.preferred("adamw", None) == ("reference", "so")
    fewer = gate.identity(replace(SHAPE, rows=1), *WHERE)
    gate.apply(path, fewer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "NVIDIA A100-SXM4-80GB"),
        ("versions", {"torch": "1.0", "triton": "1.0"}),
        ("shape", {"rows": 1}),
        ("dtype", "float16"),
    ],
)
def test_another_machine_or_shape_is_refused(tmp_path, name, value):
    path, valid = written(tmp_path, **{name: value})
    with pytest.raises(gate.GateError, match=f"made for another {name}: .*here it is .*nanochat kernels gate"):
        gate.apply(path, valid)
    assert configs.choices == {}


def test_more_rows_than_were_judged_are_refused(tmp_path):
    path, _ = written(tmp_path)
    with pytest.raises(gate.GateError, match="another shape"):
        gate.apply(path, gate.identity(replace(SHAPE, rows=SHAPE.rows + 1), *WHERE))


@pytest.mark.parametrize("text", ["", "{}", "[1]", json.dumps({"operations": {"rms_norm": "triton"}})])
def test_what_is_no_gate_file_is_refused(tmp_path, text):
    path = tmp_path / "gate.json"
    path.write_text(text)
    with pytest.raises(gate.GateError, match="is no gate file"):
        gate.apply(path, gate.identity(SHAPE, *WHERE))
    assert kernels.rms_norm(torch.ones(2, 4)).shape == (2, 4)
