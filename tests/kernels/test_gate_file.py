"""The gate's file: what is read is what was written, and a file of another machine or other kernels is rejected."""

import json
import re
from dataclasses import replace

import pytest
import torch

import nanochat_kernels as kernels
from nanochat_kernels import gate
from tests.kernels.harness import DEVICE
from tests.kernels.test_gate import SHAPE

PLANTED_FAULTS = {
    "hash of the sources not compared": ("gate", '"kernels": sources_hash()', '"kernels": ""',
     "test_the_hash_is_of_sources_and_tables"),
}  # fmt: skip
WHERE = (torch.device(DEVICE), torch.bfloat16)


def written(tmp_path, choices=None, **changes):
    path, valid = tmp_path / "gate.json", gate.identity(SHAPE, *WHERE)
    choices = choices or {"rms_norm": {"impl": "triton", "why": "it was faster"}, "adamw": {"impl": "reference"}}
    gate.write(path, valid | changes, choices)
    return path, valid


def test_the_choice_is_read(tmp_path):
    path, valid = written(tmp_path)
    operations, more = gate.read(path, valid)
    assert {name: entry["impl"] for name, entry in operations.items()} == {"rms_norm": "triton", "adamw": "reference"}
    assert operations["rms_norm"] == {"impl": "triton", "why": "it was faster", "ms": {}, "faults": {}} and more == {}
    fewer = gate.identity(replace(SHAPE, rows=1), *WHERE)
    assert gate.read(path, fewer) == gate.read(path, valid)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "NVIDIA A100-SXM4-80GB"),
        ("versions", {"torch": "1.0", "triton": "1.0", "ptxas": "1.0"}),
        ("kernels", "0123456789abcdef"),
        ("shape", {"rows": 1}),
        ("dtype", "float16"),
    ],
)
def test_another_machine_or_shape_is_rejected(tmp_path, name, value):
    path, valid = written(tmp_path, **{name: value})
    with pytest.raises(gate.GateError, match=f"made for another {name}: .*here it is .*nanochat kernels gate"):
        gate.read(path, valid)


def test_the_hash_is_of_sources_and_tables(tmp_path, monkeypatch):
    package = tmp_path / "kernels"
    (package / "configs").mkdir(parents=True)
    monkeypatch.setattr(gate, "__file__", str(package / "gate.py"))
    monkeypatch.setattr(gate.configs, "FOLDER", package / "configs")
    hashes = {gate.sources_hash()}
    for path in ("some.py", "configs/sm80.json", "some.py"):
        with (package / path).open("a") as file:
            file.write("text")
        hashes.add(gate.sources_hash())
        assert gate.identity(SHAPE, *WHERE)["kernels"] == gate.sources_hash()
    assert len(hashes) == 4


def test_a_gate_is_of_one_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert gate.identity(SHAPE, WHERE[0], dtype)["dtype"] == str(dtype).removeprefix("torch.")


def test_the_assembler_is_named():
    pytest.importorskip("triton")
    assert re.fullmatch(r"\d+\.\d+\.\d+", gate.identity(SHAPE, *WHERE)["versions"]["ptxas"])


def test_more_rows_than_were_judged_are_rejected(tmp_path):
    path, _ = written(tmp_path)
    with pytest.raises(gate.GateError, match="another shape"):
        gate.read(path, gate.identity(replace(SHAPE, rows=SHAPE.rows + 1), *WHERE))


@pytest.mark.parametrize("choices", [{"rms_norm": {"impl": "cuda"}}, {"relu3": {"impl": "triton"}}])
def test_an_implementation_that_vanished_is_rejected(tmp_path, choices):
    path, valid = written(tmp_path, choices)
    with pytest.raises(gate.GateError, match="which does not exist here; make it again with: nanochat kernels gate"):
        gate.read(path, valid)


@pytest.mark.parametrize("text", ["", "{}", "[1]", json.dumps({"operations": {"rms_norm": "triton"}})])
def test_what_is_not_a_gate_file_is_rejected(tmp_path, text):
    path = tmp_path / "gate.json"
    path.write_text(text)
    with pytest.raises(gate.GateError, match="is not a gate file"):
        gate.read(path, gate.identity(SHAPE, *WHERE))
    assert kernels.rms_norm(torch.ones(2, 4)).shape == (2, 4)
