"""Attention's Gluon kernels of sm_90: compiled without a GPU, and on a Hopper GPU against the kernels for every call."""

import importlib
import math

import pytest
import torch
from torch.nn import functional

import nanochat_kernels as kernels
from nanochat_kernels import configs
from nanochat_kernels.oracle import over_budget
from nanochat_kernels.triton_helpers import recorded_launches
from tests.kernels.harness import SM90, poisoned, randn, without_interpreter
from tests.kernels.test_attention import inputs, plain

LAUNCHES = importlib.import_module("nanochat_kernels.attention_launches")
HOPPER = importlib.import_module("nanochat_kernels.hopper_attention")
KERNELS = {
    kernel.name.removeprefix("attention_"): kernel for kernel in LAUNCHES.KERNELS if kernel.name != "attention_decode"
}
hopper = pytest.mark.skipif(not SM90, reason="the kernels run on sm_90 only")

COMPILE = """
import torch
from nanochat_kernels import configs, inspect
from nanochat_kernels.attention_launches import KERNELS

with configs.tables_of("sm90"):
    for kernel in KERNELS:
        configurations = [p for p in kernel.space if "STAGES" in p and p["GROUP"] == 8]
        for number, parameters in enumerate(configurations):
            for key in kernel.keys[:2] if number == len(configurations) - 1 else kernel.keys[1:2]:
                for flags, launches in inspect.record(kernel, key, torch.bfloat16, parameters).items():
                    ptx = inspect.compile_launch(launches[0], "sm90").asm["ptx"]
                    found = inspect.inspect_launch(launches[0], "sm90", inspect.Place(kernel.name, torch.bfloat16, key, flags, 0))
                    wanted = ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg.inc", "mbarrier.try_wait")
                    print(found.kernel, [x for x in wanted if x not in ptx], found.defects)
"""


def test_they_compile_to_the_instructions_of_sm_90():
    """Tensor cores of sm_90, asynchronous copies, registers handed between groups of warps; nothing is spilled. Needs no GPU."""
    lines = without_interpreter(COMPILE).splitlines()
    assert len(lines) == 18 and all(line.endswith(" [] ()") for line in lines), lines
    assert {line.split()[0] for line in lines} == {
        "hopper_attention_kernel", "query_gradient_on_hopper", "key_gradients_on_hopper",
    }  # fmt: skip


def padded(q, before: int, after: int):
    """Return q in memory with so many elements in front of each row of its heads and behind it."""
    return functional.pad(q.flatten(2), (before, after))[..., before : before + q[0, 0].numel()].unflatten(
        2, q.shape[2:]
    )


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (lambda q: q, True),
        (lambda q: q[:, :200], False),  # no whole tiles
        (lambda q: q[:, :128], False),  # gaps between rows of the batch
        (lambda q: q[:1, :128], True),
        (lambda q: q[..., :32], False),
        (lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), False),
        (lambda q: q.repeat(1, 1, 1, 2)[..., ::2], False),
        (lambda q: q[:0], False),
        (lambda q: q[:, :0], False),
        (lambda q: torch.cat([q, q], 2)[:, :, 1:3], True),
        (lambda q: padded(q, 0, 8), True),
        (lambda q: padded(q, 0, 4), False),  # rows begin at 8 bytes past a multiple of 16
        (lambda q: padded(q, 8, 8), True),
        (lambda q: padded(q, 4, 4), False),  # the first row does
    ],
)
def test_which_calls_they_take(change, taken):
    q = change(torch.zeros(2, 256, 2, 64, dtype=torch.bfloat16))
    assert HOPPER.takes(q, q) == taken


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_forward_kernel_needs_a_bound_that_is_narrow_enough(dtype, width):
    """It has no maximum to fall back on. The gradients need none: they take any call of whole sequences."""
    root = math.sqrt(width)
    for bound, is_narrow in (
        (None, False),
        (root, dtype == torch.bfloat16 or width == 64),
        (root - 2, True),
        (40.0, False),
    ):
        with configs.tables_of("sm90"), recorded_launches() as launches:
            q, k, v = (x.requires_grad_() for x in LAUNCHES.inputs(2, 256, 2, 2, width, dtype, torch.device("meta")))
            kernels.attention(q, k, v, bound=bound, impl="triton").sum().backward()
        names = [launch.kernel.fn.__name__ for launch in launches]
        assert names[0] == ("hopper_attention_kernel" if is_narrow else "forward_kernel"), (bound, names)
        assert names[2] == "key_gradients_on_hopper"


def test_parameters_for_whole_sequences_are_refused_for_others():
    q = torch.zeros(1, 200, 2, 64, dtype=torch.bfloat16)
    parameters = KERNELS["forward"].space[-1]
    with pytest.raises(ValueError, match="for whole sequences on sm_90"):
        LAUNCHES.forward(q, q, q, None, None, 8.0, True, parameters)


def configurations(name: str) -> list[dict[str, int]]:
    return [p for p in KERNELS[name].space if "STAGES" in p]


def whole(batch: int, blocks: int, groups: int, share: int, width: int, dtype: torch.dtype):
    q, k, v = inputs(batch, 128 * blocks, 128 * blocks, groups, share, width, dtype)
    assert HOPPER.takes(q, k, v)
    return q, k, v, randn(*q.shape, dtype=dtype, seed=9)


# one tile; more tiles than programs; grouped heads
shapes = pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 5, 2, 1), (2, 16, 10, 1), (2, 3, 2, 4), (40, 8, 1, 2)], ids=str
)
widths = pytest.mark.parametrize("width", [64, 128])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@hopper
@shapes
@widths
@dtypes
@pytest.mark.parametrize("parameters", configurations("forward"), ids=str)
def test_forward(shape, width, dtype, parameters):
    q, k, v, _ = whole(*shape, width, dtype)
    bound = min(math.sqrt(width), 10.0)  # a wider one is too wide for float16; no score of random heads is near it
    with poisoned():
        runs = [LAUNCHES.forward(q, k, v, None, None, bound, True, parameters) for _ in range(3)]
    oracle, baseline = plain(q.double(), k.double(), v.double()), plain(q, k, v)
    for number in range(2):
        assert not over_budget(runs[0][number], oracle[number], baseline[number], 2**-22)
        assert all(torch.equal(runs[0][number], run[number]) for run in runs)


@hopper
@shapes
@widths
@dtypes
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("number", range(len(configurations("query_gradient"))))
def test_gradients(shape, width, dtype, projected, number):
    """Every gradient is that of the kernels for any call, within their own error."""
    q, k, v, dout = whole(*shape, width, dtype)
    rows, heads, groups = q.size(0) * q.size(1), q.size(2), k.size(2)
    out, lse = LAUNCHES.forward(q, k, v, None, None, math.sqrt(width), True, KERNELS["forward"].space[0])
    dlse = torch.randn_like(lse)
    projection = None
    sums = []
    results = []
    for parameters in ("plain", "hopper", "hopper"):
        chosen = [
            KERNELS[name].space[0] if parameters == "plain" else configurations(name)[number]
            for name in ("query_gradient", "key_gradients")
        ]
        with poisoned():
            if projected:
                generator = torch.Generator(q.device).manual_seed(1)
                frequencies = torch.rand(width // 2, device=q.device, generator=generator)
                angles = torch.arange(q.size(1) + 3, device=q.device)[:, None] * frequencies
                factors = [torch.rand(n, rows, device=q.device, generator=generator) + 0.5 for n in (1, heads + groups)]
                sums.append(torch.empty(heads + 2 * groups, rows, device=q.device))
                projection = factors[0][0], factors[1], angles.cos().to(dtype), angles.sin().to(dtype), sums[-1], 3
                dq = dk = dv = torch.empty(*q.shape[:2], heads + 2 * groups, width, device=q.device, dtype=dtype)
            else:
                dq, dk, dv = (torch.empty(x.shape, device=q.device, dtype=dtype) for x in (q, k, v))
            delta = LAUNCHES.query_gradient(q, k, v, out, dout, lse, dlse, None, None, dq, projection, chosen[0])
            LAUNCHES.key_gradients(q, k, v, dout, lse, delta, None, None, dk, dv, projection, chosen[1])
        results.append((delta, dq, dk, dv, *sums[-1:]))
    for expected, found, again in zip(*results, strict=True):
        assert torch.equal(found, again) and found.isfinite().all()
        assert (found.float() - expected.float()).norm() <= 0.01 * expected.float().norm()


# faults that a test must catch without a GPU: see test_planted_faults.py
H = "hopper_attention"
PLANTED_FAULTS = {
    "rows at any stride": (H, "and x.stride(1) % 8 == 0 and", "and", "test_which_calls_they_take"),
    "rows that begin anywhere": (H, "and x.data_ptr() % 16 == 0", "", "test_which_calls_they_take"),
    "gaps between rows of the batch": (H, "x.stride(0) == tokens * x.stride(1)", "True", "test_which_calls_they_take"),
    "no maximum without a bound": ("attention_launches", 'constants["BOUNDED"] and hopper_attention', "hopper_attention",
     "test_the_forward_kernel_needs_a_bound_that_is_narrow_enough"),
}  # fmt: skip
