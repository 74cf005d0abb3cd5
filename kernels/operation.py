"""What an operation says about itself: the record at the end of its file, and the parts that a record is made of.

Dispatch, `kernels list`, inspect, tune, the gate, the benchmark and the completeness tests read these records and know
nothing of an operation besides. A new operation is one file with a record, and one test.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

Key = tuple[int | str, ...]
"""a shape class of a launch table: sizes, of which the nearest serves, and words for flags, which must be equal"""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    run takes the checked arguments of the operation. unsupported_reason, given the same arguments, says in one sentence
    why it cannot run, or returns None. plan, given the same, returns what run takes ahead of them: whatever calls with alike
    arguments have in common (see plan.planned).
    """

    run: Callable
    unsupported_reason: Callable[..., str | None] = lambda *arguments: None
    plan: Callable | None = None

    def prepared(self, *arguments) -> Callable:
        """What computes the operation for arguments like these."""
        return self.run if self.plan is None else partial(self.run, self.plan(*arguments))


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel with launch parameters of its own, as tune and inspect see it."""

    name: str
    """its name in the launch tables"""
    dtypes: tuple[torch.dtype, ...]
    keys: tuple[Key, ...]
    """shape classes that the tables hold"""
    space: tuple[dict[str, int], ...]
    """launch parameters that tune tries"""
    launches: Callable[[Key, torch.dtype, torch.device], Mapping[str, Callable[[dict[str, int] | None], Any]]]
    """(key, dtype, device) → every flag set that can be launched at a production shape of this class, by name. Each is called
    with launch parameters, or None for those of the table. The first one is timed by tune; inspect records all of them on
    the meta device (triton_helpers.recorded_launches)."""
    more_keys: tuple[Key, ...] = ()
    """shapes beyond the classes, such as the widest row and ragged sizes, that inspect compiles with the nearest class"""


@dataclass(frozen=True)
class RunShape:
    """What a training run asks of the operations: rows of tokens at once, and the sizes of the model."""

    rows: int
    tokens: int
    width: int
    heads: int
    kv_heads: int
    vocab: int
    depth: int


@dataclass(frozen=True)
class Trial:
    """The inputs that the gate judges and times an operation with.

    rowwise: the inputs, by number, that have a row for each row of every result, where rows do not depend on one another; so
    results and their gradients can be compared a chunk of rows at a time. Gradients of other inputs are summed over chunks.
    in_place: the inputs that the operation changes, in its backward pass too; they count as results.
    timed: whether the time of the trial counts for the choice.
    is_loss: the upstream gradient is 1, as a loss has it in training; else upstream gradients are random.
    """

    inputs: tuple
    rowwise: tuple[int, ...] = ()
    differentiable: tuple[int, ...] = ()
    in_place: tuple[int, ...] = ()
    timed: bool = True
    is_loss: bool = False
    epsilon: float = 0.0
    """error that the operation states in its docstring and may add to each element of a result"""
    apart: Callable[[tuple], Mapping[int, Tensor]] | None = None
    """(inputs, or a chunk of their rows) → masks of elements that are judged apart from the others, because they are of another
    magnitude, such as a target's own of a vocabulary; by number of a result or, counted on, of a rowwise input's gradient"""
    judge: Callable[[tuple[Tensor, ...]], str | None] | None = None
    """replaces the comparison with the reference in float64: (all results) → what is wrong, or None"""


@dataclass(frozen=True)
class Benchmark:
    """How `python -m bench` measures an operation."""

    shapes: tuple[str, ...]
    """names such as d20; `inputs` knows what they stand for"""
    inputs: Callable[[str, torch.dtype, torch.device], tuple]
    """(shape, dtype, device) → one set of arguments of the public function"""
    differentiable: tuple[int, ...]
    """arguments, by number, whose gradient the modes bwd and both make"""
    elements: Callable[[tuple, str], float]
    """(arguments, "fwd" or "bwd") → elements that must be read or written at the least"""
    flops: Callable[[tuple, str, str], float]
    """(arguments, "fwd" or "bwd", variant) → floating-point operations that the variant executes"""
    modes: tuple[str, ...] = ("fwd", "bwd", "both")
    baselines: Mapping[str, Callable[[], Callable | None]] = field(default_factory=dict)
    """name → a function that returns what takes the arguments in another library, or None where it is not installed"""
    variants: Callable[[tuple], Mapping[str, Callable[[], Any]]] | None = None
    """(arguments) → all variants by name, for an operation that is not measured as one call; replaces the usual ones"""


@dataclass(frozen=True, eq=False)
class Operation:
    """A fused operation. `reference` defines it; `implementations` holds the others, the fastest first."""

    name: str
    function: Callable
    """the public function, which takes impl="auto" or the name of an implementation"""
    reference: Callable
    implementations: Mapping[str, Implementation] = field(default_factory=dict)
    kernels: tuple[Kernel, ...] = ()
    trials: Callable[[RunShape, torch.device, torch.dtype], Iterator[Trial]] | None = None
    """(shape, device, dtype) → what the gate tries; every operation with more than a reference has it"""
    benchmark: Benchmark | None = None
