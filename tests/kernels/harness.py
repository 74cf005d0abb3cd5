"""How every kernel is judged, on a GPU and, through Triton's interpreter, on a CPU: by kernels/oracle.py, for each result
and each gradient. Memory that is handed out uninitialised holds NaN meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.oracle import evaluate, over_budget

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# tiles of matrix products that an interpreted small matrix has several of
SMALL = {"BM": 16, "BN": 32, "BK": 16, "PROGRAMS": 1, "TMA": 0, "num_warps": 1, "num_stages": 2}

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


def check(
    kernel: Callable,
    reference: Callable,
    inputs: Sequence,
    wrt: Sequence[int] = (),
    seed: int = 0,
    epsilon: float = 0.0,
) -> None:
    """The kernel against the oracle, and against itself run again. epsilon: error that an operation states in its
    docstring and may add, absolute in each result, relative in gradients."""
    inputs = list(inputs)
    shapes = reference(*inputs)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    upstream = [
        randn(*x.shape, dtype=x.dtype, seed=seed + 7 + i) if wrt else torch.empty(0) for i, x in enumerate(shapes)
    ]
    with poisoned():
        found = evaluate(kernel, inputs, upstream, wrt)
        again = evaluate(kernel, inputs, upstream, wrt)
    exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    oracle = evaluate(reference, exact, [x.double() for x in upstream], wrt)
    rival = evaluate(reference, inputs, upstream, wrt)
    for number, (a, b, true, other) in enumerate(zip(found, again, oracle, rival, strict=True)):
        assert a.dtype == other.dtype and a.shape == other.shape, f"result {number}: {a.dtype} {tuple(a.shape)}"
        assert torch.equal(a, b), f"result {number} differs when repeated"
        is_result = number < len(shapes)
        more = epsilon * (a.numel() ** 0.5 if is_result else float(true.norm()))
        wrong = over_budget(a, true, other, more)
        assert not wrong, f"{f'result {number}' if is_result else f'gradient {number - len(shapes)}'}: {wrong}"


def check_compiled(kernel: Callable, inputs: Sequence, wrt: Sequence[int]) -> None:
    """Compiled without a graph break, the kernel gives what it gives eagerly, bit for bit; used twice in the graph."""

    def twice(*args):
        first, second = kernel(*args), kernel(*(-x if i in wrt else x for i, x in enumerate(args)))
        return (*first, *second) if isinstance(first, tuple) else (first, second)

    shapes = twice(*inputs)
    upstream = [randn(*x.shape, dtype=x.dtype, seed=i) for i, x in enumerate(shapes)]
    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="inductor" if GPU else "aot_eager", dynamic=False)
    for a, b in zip(
        evaluate(compiled, inputs, upstream, wrt), evaluate(twice, inputs, upstream, wrt), strict=True
    ):  # fmt: skip
        assert torch.equal(a, b), f"compiled and eager differ by {(a.double() - b.double()).abs().max():.3e}"


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
