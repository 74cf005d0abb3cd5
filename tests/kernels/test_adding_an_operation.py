"""A new operation needs one file and no other change: list, inspect, the gate, the benchmark and dispatch find it."""

import sys
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import copy_packages, environment

ROOT = Path(__file__).resolve().parents[2]
TOY = '''"""doubled(x) = 2·x, element by element. Backward: dx = 2·dy."""

import torch
from torch import Tensor

from nanochat_kernels.checks import check_float
from nanochat_kernels.dispatch import choose
from nanochat_kernels.operation import Benchmark, Implementation, Kernel, Operation, Trial
from nanochat_kernels.triton_helpers import KernelFunction, cdiv, derivative, differentiable, launch
from nanochat_kernels.triton_helpers import tl, triton, triton_unsupported_reason

BLOCK = 1024


@triton.jit
def doubled_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=mask), mask=mask)


def launch_doubled(x: Tensor, parameters: dict[str, int] | None = None) -> Tensor:
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        constants = parameters or {"BLOCK": BLOCK, "num_warps": 4}
        launch(doubled_kernel, (cdiv(x.numel(), constants["BLOCK"]),), x.device, x, y, x.numel(), **constants)
    return y


class Backward(KernelFunction):
    forward = staticmethod(launch_doubled)


class Doubled(KernelFunction):
    forward = staticmethod(launch_doubled)

    @staticmethod
    def backward(ctx, dy):
        return derivative(Backward, dy)


def doubled(x: Tensor, *, impl: str = "auto") -> Tensor:
    """2·x."""
    check_float("doubled", x=x)
    return choose(DOUBLED, impl, x)(x)


def run(x: Tensor) -> Tensor:
    return differentiable(Doubled, x)


def reference(x: Tensor) -> Tensor:
    return x + x


def launches(key, dtype, device):
    x = torch.empty(key, dtype=dtype, device=device)
    return {"only": lambda parameters: launch_doubled(x, parameters)}


def trials(shape, device, dtype):
    yield Trial((torch.randn(shape.rows * shape.tokens, shape.width, device=device, dtype=dtype),), (0,), (0,))


DOUBLED = Operation(
    "doubled", doubled, reference, {"triton": Implementation(run, triton_unsupported_reason)},
    (Kernel("doubled", (torch.bfloat16,), ((4096,),), ({"BLOCK": BLOCK, "num_warps": 4},), launches),),
    trials,
    Benchmark(
        ("wide",), lambda shape, dtype, device: (torch.randn(4096, 4096, device=device, dtype=dtype),), (0,),
        elements=lambda arguments, part: 2 * arguments[0].numel(),
        flops=lambda arguments, part, variant: arguments[0].numel(),
    ),
)
OPERATIONS = (DOUBLED,)
'''
GATE = """
import torch, nanochat_kernels as kernels
from nanochat_kernels import gate
from nanochat_kernels.operation import RunShape
shape = RunShape(rows=2, tokens=8, width=32, heads=2, kv_heads=1, vocab=64, depth=1)
choice = gate.examine_operation(kernels.operations()["doubled"], shape, torch.device("cpu"), torch.float32)
print(choice["faults"], sorted(choice["ms"]))
x = torch.ones(3, requires_grad=True)
kernels.doubled(x, impl="triton").sum().backward()
print(x.grad.tolist())
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the packages with the toy operation in it."""
    root = tmp_path_factory.mktemp("tree")
    copy_packages(root)
    (root / "kernels" / "toy.py").write_text(TOY, "utf-8")
    return root


def run(tree: Path, *arguments: str, **changes: str) -> str:
    env = environment(None, PYTHONPATH=str(tree), NANOCHAT_BASE_DIR=str(tree / "base"), **changes)
    done = forked.run(*arguments, cwd=tree, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_list(tree):
    assert any(
        line.split()[:2] == ["doubled", "triton,"]
        for line in run(tree, "-m", "nanochat", "kernels", "list").splitlines()
    )


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
def test_inspect(tree, architecture):
    out = run(tree, "-m", "nanochat", "kernels", "inspect", "--arch", architecture, "--kernel", "doubled")
    assert "doubled_kernel" in out and "1 launches compile" in out


def test_gate_and_call(tree):
    assert run(tree, "-c", GATE, TRITON_INTERPRET="1").split("\n")[:2] == [
        "{} ['reference', 'triton']",
        "[2.0, 2.0, 2.0]",
    ]


def test_bench(tree):
    assert any(line.split()[:2] == ["doubled", "wide"] for line in run(tree, "-m", "bench", "--list").splitlines())
