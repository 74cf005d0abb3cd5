"""How every kernel is judged, on a GPU and, through Triton's interpreter, on a CPU: by kernels/oracle.py, for each result
and each gradient. Memory that is handed out uninitialised holds NaN meanwhile."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from nanochat_kernels.operation import Kernel
from nanochat_kernels.oracle import evaluate, evaluate_each, misplaced, over_budget
from tests.kernels.int64 import narrow_offsets

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# tiles of matrix products that an interpreted small matrix has several of
SMALL_TILES = {
    "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "PROGRAMS": 1, "TMA": 0, "num_warps": 1, "num_stages": 2,
}  # fmt: skip

# a failing example is not made smaller: it is small, and an interpreted kernel takes its time
property_test = settings(max_examples=100 if GPU else 15, phases=(Phase.explicit, Phase.generate))
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, layout: str = "contiguous") -> Tensor:
    """Normal numbers; layout "columns" is every second column of a wider tensor, "slice" the middle of one,
    "transposed" has its first and last axes exchanged in memory."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "columns":
        made = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]
    elif layout == "slice":
        made = torch.randn(*shape[:-1], shape[-1] + 6, generator=generator)[..., 3:-3]
    elif layout == "transposed":
        made = torch.randn(*reversed(shape), generator=generator).permute(*reversed(range(len(shape))))
    else:
        made = torch.randn(shape, generator=generator)
    strides, size = made.stride(), made.untyped_storage().nbytes() // made.element_size()
    base = torch.empty(size, dtype=dtype, device=DEVICE)  # keeps the layout on the device
    view = base.as_strided(made.shape, strides, made.storage_offset())
    return view.copy_(made)


layouts = st.sampled_from(("contiguous", "columns", "slice", "transposed"))


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def in_layout(x: Tensor, layout: str, number: int = 0) -> Tensor:
    """A copy of x with the strides that an upstream gradient may have. "strided": longer rows in memory, by an amount that
    depends on `number`; "transposed": two axes exchanged, of which the last is one only where there are no more than two."""
    if layout == "strided":
        extra = 6 + 2 * number
        wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1] if x.dim() == 1 else x.shape[-1] + extra))
        view = wide[::2] if x.dim() == 1 else wide[..., 3 : x.shape[-1] + 3]
    elif x.dim() > 2:
        view = torch.empty_like(x.transpose(-2, -3), memory_format=torch.contiguous_format).transpose(-2, -3)
    else:
        view = torch.empty_like(x.t(), memory_format=torch.contiguous_format).t()
    return view.copy_(x)


def check(
    kernel: Callable,
    reference: Callable,
    inputs: Sequence,
    wrt: Sequence[int] = (),
    seed: int = 0,
    epsilon: float = 0.0,
    apart: Mapping[int, Tensor] | None = None,
) -> None:
    """The kernel against the oracle, against itself run again, and with strided and transposed upstream gradients.

    epsilon: error that an operation states in its docstring and may add, absolute in each result, relative in gradients.
    apart: number of a result or, counted on, of a gradient → mask of elements that are judged apart from the others.
    """
    inputs, apart = list(inputs), apart or {}
    shapes = as_tuple(reference(*inputs))
    upstream = upstream_of(shapes, seed) if wrt else [torch.empty(0) for _ in shapes]
    upstreams = [upstream]
    if wrt and any(x.dim() and x.numel() for x in upstream):
        upstreams += [
            [in_layout(x, layout, i) if x.dim() else x for i, x in enumerate(upstream)]
            for layout in ("strided", "transposed")
        ]
    with poisoned():
        found = evaluate_each(kernel, inputs, upstreams, wrt)
        again = evaluate(kernel, inputs, upstream, wrt)
    exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    oracle = evaluate(reference, exact, [x.double() for x in upstream], wrt)
    baselines = evaluate_each(
        reference, inputs, upstreams, wrt
    )  # a product's kernel depends on strides, and its rounding too
    for number, (a, b, true, other) in enumerate(zip(found[0], again, oracle, baselines[0], strict=True)):
        name = f"result {number}" if number < len(shapes) else f"gradient {number - len(shapes)}"
        assert a.dtype == other.dtype and a.shape == other.shape, f"{name}: {a.dtype} {tuple(a.shape)}"
        assert same(a, b), f"{name} differs when repeated"
        more = epsilon if number < len(shapes) else epsilon * true.abs()
        wrong = over_budget(a, true, other, more, apart.get(number))
        assert not wrong, f"{name}: {wrong}"
        for layout, those, others in zip(("strided", "transposed"), found[1:], baselines[1:], strict=False):
            wrong = number >= len(shapes) and over_budget(those[number], true, others[number], more, apart.get(number))
            assert not wrong, f"{name} with {layout} upstream gradients: {wrong}"


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def upstream_of(outputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Random upstream gradients of results."""
    return [randn(*x.shape, dtype=x.dtype, seed=seed + 7 + i) for i, x in enumerate(outputs)]


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equal, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))


def floating(inputs: Sequence) -> list[int]:
    """The inputs, by number, that are floating-point tensors."""
    return [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]


def check_nonfinite(
    kernel: Callable, reference: Callable, inputs: Sequence, wrt: Sequence[int], only: Sequence[int] | None = None
) -> None:
    """NaN and infinities in one input after the other (`only` these), and in each upstream gradient, propagate as they do in
    the reference: to the same elements of results, and to the same rows of gradients."""

    def compare(what: str, inputs: Sequence, upstream: Sequence[Tensor]) -> None:
        found, expected = (evaluate(function, inputs, upstream, wrt) for function in (kernel, reference))
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            if number < len(upstream):
                wrong = misplaced(a, b)
                assert not wrong, f"{what}: result {number}: {wrong}"
            else:
                rows = [~x.isfinite().reshape(-1, x.shape[-1]).all(1) for x in (a, b)]
                assert torch.equal(*rows), f"{what}: gradient {number - len(upstream)}: other rows are not finite"

    upstream = upstream_of(as_tuple(reference(*inputs)))
    for value in (float("nan"), float("inf"), float("-inf")):
        for i in floating(inputs) if only is None else only:
            changed = [planted(x, value) if i == j else x for j, x in enumerate(inputs)]
            compare(f"{value} in input {i}", changed, upstream)
        for i in range(len(upstream) if wrt else 0):
            changed = [planted(x, value) if i == j else x for j, x in enumerate(upstream)]
            compare(f"{value} upstream of result {i}", inputs, changed)


def planted(x: Tensor, value: float) -> Tensor:
    """x with one element, near its middle, replaced."""
    x = x.clone()
    x[tuple(size // 2 for size in x.shape)] = value
    return x


def check_second_derivative_raises(kernel: Callable, inputs: Sequence, wrt: Sequence[int]) -> None:
    """create_graph=True must not silently drop a term."""
    inputs = [x.detach().requires_grad_(i in wrt) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)]
    outputs = as_tuple(kernel(*inputs))
    upstream = [x.requires_grad_() for x in upstream_of(outputs)]
    with pytest.raises(RuntimeError, match="second derivative|impl='reference'|differentiable once"):
        gradients = torch.autograd.grad(outputs, [inputs[i] for i in wrt], upstream, create_graph=True)
        sum(x.float().square().sum() for x in gradients).backward()


def check_jvp_raises(kernel: Callable, inputs: Sequence, wrt: Sequence[int]) -> None:
    """A derivative in forward mode raises; it must not be 0."""

    def function(*changed):
        every = list(inputs)
        for i, x in zip(wrt, changed, strict=True):
            every[i] = x
        return kernel(*every)

    primals = tuple(inputs[i] for i in wrt)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(function, primals, tuple(torch.ones_like(x) for x in primals))


def check_vmap(kernel: Callable, inputs: Sequence, mapped: Sequence[int], wrt: Sequence[int] = ()) -> None:
    """torch.vmap over a new first axis of the inputs numbered in `mapped`: bit for bit what a loop gives, gradients too."""
    stacked = [torch.stack([x, x.flip(0), x]) if i in mapped else x for i, x in enumerate(inputs)]
    in_dims = tuple(0 if i in mapped else None for i in range(len(inputs)))

    def loop(*arguments):
        def one(i: int) -> tuple[Tensor, ...]:
            return as_tuple(kernel(*(x if dim is None else x[i] for x, dim in zip(arguments, in_dims, strict=True))))

        return tuple(torch.stack(parts) for parts in zip(*map(one, range(3)), strict=True))

    vmapped = torch.vmap(kernel, in_dims=in_dims)
    upstream = upstream_of(loop(*stacked))
    for a, b in zip(evaluate(vmapped, stacked, upstream, wrt), evaluate(loop, stacked, upstream, wrt), strict=True):
        assert same(a, b), "vmap differs from a loop"


def check_autocast(kernel: Callable, reference: Callable, inputs: Sequence, wrt: Sequence[int] = ()) -> None:
    """Under autocast the results have the reference's dtypes and errors, also when the inputs' dtypes are mixed."""
    numbers = floating(inputs)
    choices = [{}, dict.fromkeys(numbers, torch.float32), dict.fromkeys(numbers, torch.bfloat16)]
    choices += [{i: dtype} for i in numbers for dtype in (torch.float32, torch.bfloat16) if len(numbers) > 1]

    def under_autocast(function: Callable) -> Callable:
        def run(*arguments):
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                return function(*arguments)

        return run

    for dtypes_of in choices:
        cast = [x.to(dtypes_of.get(i, x.dtype)) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)]
        expected = as_tuple(under_autocast(reference)(*cast))
        upstream = upstream_of(expected)
        exact = [x.double() if i in numbers else x for i, x in enumerate(cast)]
        oracle = evaluate(reference, exact, [x.double() for x in upstream], wrt)
        found, baseline = (evaluate(under_autocast(f), cast, upstream, wrt) for f in (kernel, reference))
        for number, (a, true, b) in enumerate(zip(found, oracle, baseline, strict=True)):
            assert a.dtype == b.dtype, f"{dtypes_of}: number {number} is {a.dtype}, the reference's {b.dtype}"
            wrong = over_budget(a, true, b)
            assert not wrong, f"{dtypes_of}: number {number}: {wrong}"


def assert_64_bit_offsets(kernel: Kernel) -> None:
    """No launch of the kernel computes an address from the number of a program in 32 bits; needs no GPU."""
    found = narrow_offsets(kernel.name)
    assert not found, found


def check_other_device(kernel: Callable, inputs: Sequence, wrt: Sequence[int] = ()) -> None:
    """Tensors on cuda:1 while cuda:0 is current: as on cuda:0. Needs two GPUs (skipped where there are not)."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    upstream = upstream_of(as_tuple(kernel(*inputs)))
    found = []
    for index in (0, 1):
        there = [x.to(f"cuda:{index}") if isinstance(x, Tensor) else x for x in inputs]
        assert torch.cuda.current_device() == 0
        found.append(evaluate(kernel, there, [x.to(f"cuda:{index}") for x in upstream], wrt))
        torch.cuda.synchronize(index)
    for a, b in zip(*found, strict=True):
        assert b.device == torch.device("cuda", 1) and same(a, b.to(a.device)), "cuda:1 differs from cuda:0"


def check_compiled(kernel: Callable, inputs: Sequence, wrt: Sequence[int], units: float = 0.0) -> None:
    """Compiled without a graph break, the kernel gives what it gives eagerly, bit for bit; used twice in the graph.

    units: rounding units of the largest element by which they may differ, for operations with torch's own sums and products
    around the kernels, whose order Inductor changes.

    On a GPU only: interpreted kernels cannot be traced. What Dynamo traces is checked without one by test_dispatch.py.
    """
    if not GPU:
        pytest.skip("interpreted kernels cannot be compiled")

    def twice(*args):
        first, second = kernel(*args), kernel(*(-x if i in wrt else x for i, x in enumerate(args)))
        return (*first, *second) if isinstance(first, tuple) else (first, second)

    shapes = twice(*inputs)
    upstream = [randn(*x.shape, dtype=x.dtype, seed=i) for i, x in enumerate(shapes)]
    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, dynamic=False)
    for a, b in zip(
        evaluate(compiled, inputs, upstream, wrt), evaluate(twice, inputs, upstream, wrt), strict=True
    ):  # fmt: skip
        largest = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        allowed = units * torch.finfo(a.dtype).eps * float(b.abs().max()) if units else 0.0
        assert largest <= allowed, f"compiled and eager differ by {largest:.3e}"


def check_graph_replay(kernel: Callable, inputs: Sequence, wrt: Sequence[int]) -> None:
    """Captured in a CUDA graph, forward and backward, and replayed on other data: as without the graph."""
    still = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    outputs = kernel(*still)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [randn(*x.shape, dtype=x.dtype, seed=i) for i, x in enumerate(outputs)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        evaluate(kernel, still, upstream, wrt)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(kernel, still, upstream, wrt)
    for x in still:
        if isinstance(x, Tensor) and x.is_floating_point():
            x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, evaluate(kernel, still, upstream, wrt), strict=True):
        assert torch.equal(a, b)
