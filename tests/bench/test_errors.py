"""`python -m bench errors`, with a small operation on the CPU."""

import json

import pytest
import torch

from bench import errors
from nanochat.platform.errors import UserError
from nanochat_kernels.dispatch import KernelRequestError
from nanochat_kernels.operation import Benchmark, Implementation, Operation


def squared(x, y):
    return x * x * y, x + y


def function(x, y, impl):
    if impl == "refuses":
        raise KernelRequestError("it cannot")
    return 1.1 * squared(x, y)[0], x + y


OPERATION = Operation(
    "squared", function, squared, {name: Implementation(squared) for name in ("wrong", "refuses")},
    benchmark=Benchmark(
        ("small",), lambda shape, dtype, device: tuple(torch.empty(30, 20, dtype=dtype, device=device).normal_() for _ in range(2)),
        (0,), lambda *_: 1, lambda *_: 1, bounds={"a part": lambda x, y: x},
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(errors, "measured", lambda: {"squared": OPERATION})


def test_errors_of_every_variant(tmp_path, capsys):
    """That of bfloat16's rounding, and of a factor of 1.1; a variant that refuses the call has no row, nor has a part."""
    config = errors.ErrorsConfig(
        ("squared",), "small", ("wrong", "refuses", "eager", "a part"), 3, "cpu", tmp_path / "errors.json"
    )
    errors.errors(config, "a test")
    rows = {row["impl"]: row["errors"] for row in json.loads(config.json.read_text())["rows"]}
    assert set(rows) == {"wrong", "eager"} and list(rows["eager"]) == ["result 0", "result 1", "gradient of input 0"]
    assert all(2**-11 < error < 2**-8 for error in rows["eager"].values())
    assert 0.095 < rows["wrong"]["result 0"] < 0.105 and rows["wrong"]["result 1"] == rows["eager"]["result 1"]
    assert "wrong" in capsys.readouterr().out


@pytest.mark.parametrize(("op", "shape"), [("cubed", "small"), ("squared", "d20")])
def test_what_there_is_no_benchmark_of(op, shape):
    with pytest.raises(UserError, match=f"no benchmark of {op} with the shape {shape}.*--list"):
        errors.errors(errors.ErrorsConfig((op,), shape, device="cpu"), "a test")
