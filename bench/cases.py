"""Benchmark cases, built from the operations' records, each with all its variants ready to run.

A variant takes the number of the round, which selects its set of inputs, and returns the operation's results.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import nanochat_kernels as kernels
from nanochat_kernels.configs import dtype_name
from nanochat_kernels.operation import Benchmark, Operation

MODES = ("fwd", "bwd", "both")
SETS_BYTES = 2**31  # below this size there are two sets of inputs, so that no variant finds its inputs in a cache

# allowed difference between the results of two variants, relative to the norm of each tensor: several roundings of the dtype
TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 2**-12}


@dataclass
class Case:
    """One operation at one shape in one mode, ready to run.

    bytes: the least number of bytes that must be read and written. flops: the operations that a variant executes; "eager" stands
    for the plain algorithm. prepare: by variant, restores inputs that it changes; called before each call, untimed.
    uncompared: variants that compute only a part.
    """

    operation: str
    shape: str
    mode: str
    dtype: str
    bytes: float
    variants: dict[str, Callable[[int], object]]
    flops: Callable[[str], float]
    tolerance: float
    prepare: dict[str, Callable[[int], None]] = field(default_factory=dict)
    uncompared: tuple[str, ...] = ()


def measured() -> dict[str, Operation]:
    """Return the operations that have a benchmark, by name."""
    return {name: operation for name, operation in kernels.operations().items() if operation.benchmark}


def functions(operation: Operation) -> dict[str, Callable]:
    """Return all functions that compute an operation, by name: the fused implementations, the reference run eagerly and compiled,
    and the baselines that are installed. All take the same arguments."""
    torch._dynamo.reset()  # else torch.compile stops compiling a function at its eighth shape
    call = operation.benchmark.call
    found = {name: partial(call, partial(operation.function, impl=name)) for name in operation.implementations}
    found["eager"] = partial(call, operation.reference)
    # compiled with the call, so that results which it drops are not computed
    plain = partial(operation.benchmark.call, operation.reference)
    found["compile"] = torch.compile(plain, dynamic=False)
    found["max-autotune"] = torch.compile(plain, dynamic=False, mode="max-autotune-no-cudagraphs")
    made = {name: make() for name, make in operation.benchmark.baselines.items()}
    return found | {name: function for name, function in made.items() if function} | dict(operation.benchmark.bounds)


def case(
    name: str,
    shape: str,
    mode: str,
    dtype: torch.dtype = torch.bfloat16,
    only: tuple[str, ...] = (),
    device: str = "cuda",
) -> Case:
    """Build a case with its inputs on the device. only: the names of the variants to include; empty for all."""
    operation = measured()[name]
    benchmark = operation.benchmark
    inputs = partial(benchmark.inputs, shape, dtype, torch.device(device))
    sets = [inputs()]
    if sum(x.nbytes for x in sets[0] if isinstance(x, Tensor)) < SETS_BYTES:
        sets.append(inputs())
    parts = ("fwd", "bwd") if mode == "both" else (mode,)
    made = Case(
        name, shape, mode, dtype_name(dtype),
        bytes=sum(benchmark.elements(sets[0], part) for part in parts) * dtype.itemsize,
        variants={},
        flops=lambda variant: sum(benchmark.flops(sets[0], part, variant) for part in parts),
        tolerance=TOLERANCE[dtype], uncompared=tuple(benchmark.bounds),
    )  # fmt: skip
    if benchmark.variants:
        whole = benchmark.variants(sets[0])
        made.variants = {n: partial(_without_number, run) for n, run in whole.items() if not only or n in only}
        made.tolerance = 0.1  # an algorithm of many steps, each of which magnifies the rounding errors of those before
        return made
    for variant, function in functions(operation).items():
        if only and variant not in only:
            continue
        own = sets
        if variant in benchmark.baselines:  # a baseline may overwrite its inputs
            own = [tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments) for arguments in sets]
            if mode != "bwd":  # in mode bwd the inputs are saved tensors of the forward pass, which must not change
                made.prepare[variant] = partial(_restore, own, sets)
        made.variants[variant] = Runner(function, own, benchmark, mode)
    return made


def _without_number(run: Callable[[], object], number: int) -> object:
    return run()


def _restore(own: list[tuple], sets: list[tuple], number: int) -> None:
    for mine, original in zip(own[number % len(own)], sets[number % len(sets)], strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(original)


class Runner:
    """One variant, called with the number of the round: a forward pass, a backward pass through a kept graph, or both."""

    def __init__(self, function: Callable, sets: list[tuple], benchmark: Benchmark, mode: str):
        self.function, self.sets, self.mode = function, sets, mode
        self.differentiable, self.is_loss = benchmark.differentiable, benchmark.is_loss
        self.upstream: list[Tensor] | None = None
        self.graphs: dict[int, tuple] = {}

    def __call__(self, number: int) -> object:
        index = number % len(self.sets)
        if self.mode == "fwd":
            with torch.no_grad():
                return self.function(*self.sets[index])
        if self.mode == "both":
            outputs, leaves = self.forward(index)
            return outputs, torch.autograd.grad(outputs, leaves, self.upstream_of(outputs))
        if index not in self.graphs:
            self.graphs[index] = self.forward(index)
        outputs, leaves = self.graphs[index]
        return torch.autograd.grad(outputs, leaves, self.upstream_of(outputs), retain_graph=True)

    def forward(self, index: int) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        inputs = list(self.sets[index])
        for i in self.differentiable:
            inputs[i] = inputs[i].detach().requires_grad_()
        outputs = self.function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,), [inputs[i] for i in self.differentiable]

    def upstream_of(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the upstream gradients, the same for every call of a variant and every variant; 1 for a loss."""
        if self.upstream is None:
            generator = torch.Generator(outputs[0].device).manual_seed(0)
            made = [torch.ones_like(x) for x in outputs]
            self.upstream = made if self.is_loss else [x.normal_(generator=generator) for x in made]
        return self.upstream


def tensors(results: object) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples and lists of results, and the matrices of a batch one by one."""
    if isinstance(results, Tensor):
        results = results.detach()
        yield from results if results.dim() == 3 else (results,)
    elif results is not None:
        for part in results:
            yield from tensors(part)


def disagreement(results: object, expected: object, tolerance: float) -> str | None:
    """Return how a variant's results differ from the expected ones, relative to each tensor's norm, or None within the tolerance."""
    pairs = list(zip(tensors(results), tensors(expected), strict=True))
    for number, (a, b) in enumerate(pairs):
        if a.shape != b.shape:
            return f"tensor {number} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        error = size = 0.0
        for part, other in zip(a.flatten().split(2**26), b.flatten().split(2**26), strict=True):
            other = other.to(part.device).float()
            error += float((part.float() - other).square().sum(dtype=torch.float64))
            size += float(other.square().sum(dtype=torch.float64))
        if not error <= tolerance**2 * size:
            relative = (error / size) ** 0.5 if size else float("inf")
            return f"tensor {number} differs from the reference's by {relative:.1%} of its norm"
    return None


def variant_names(benchmark: Benchmark, implementations: Mapping[str, object]) -> list[str]:
    """Return the names of an operation's variants for `--list`; variants of its own exist only once its inputs do."""
    if benchmark.variants:
        return ["its own"]
    return [*implementations, "eager", "compile", "max-autotune", *benchmark.baselines, *benchmark.bounds]
