"""The record at the end of each operation's file, and the parts that it is made of.

Dispatch, `kernels list`, inspect, tune, the gate, the benchmark and the tests learn all they know about an operation from its
record. A new operation is one file with a record, and one test.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanochat_kernels.oracle import FEWEST_ROWS

VOCABULARY = 65_536
"""of the models"""
MODEL_WIDTHS = {"d12": 768, "d20": 1280, "d26": 1664, "d32": 2048}
"""the models at whose widths operations are measured and compiled ahead of time"""
TUNED_WIDTHS = (768, 1280, 2048)
"""the widths that launch tables have entries for"""
MORE_WIDTHS = (1664,)
"""the other widths of models, which take the nearest entry"""
BENCHMARK_TOKENS = 32 * 2048
"""tokens of a micro-batch in benchmarks"""
DECODED_ROWS = 64
"""rows of a step of decoding in the engine, with which the gate judges it"""
Key = tuple[int | str, ...]
"""the shape class of an entry in a launch table: sizes, for which the nearest class is taken, and words, which must be equal"""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    run takes the operation's arguments after they have been checked. unsupported_reason takes the same arguments and returns one
    sentence that says why the implementation cannot run, or None if it can. plan, if given, takes the same arguments and returns
    a first argument for run. It must depend on the signature of the call only, because it is cached (see plan.cached_call).
    """

    run: Callable
    unsupported_reason: Callable[..., str | None] = lambda *arguments: None
    plan: Callable | None = None

    def prepared(self, *arguments) -> Callable:
        """Return the function that computes the operation for arguments with the same signature."""
        return self.run if self.plan is None else partial(self.run, self.plan(*arguments))


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel with its own launch parameters, for tune and inspect."""

    name: str
    """its name in the launch tables"""
    dtypes: tuple[torch.dtype, ...]
    keys: tuple[Key, ...]
    """the shape classes in the tables"""
    space: tuple[dict[str, int], ...]
    """the launch parameters that tune tries"""
    launches: Callable[[Key, torch.dtype, torch.device], Mapping[str, Callable[[dict[str, int] | None], Any]]]
    """(key, dtype, device) → by name, a function for every set of flags, which launches the kernel at a production shape of
    this class. It takes launch parameters, or None for those of the table. tune times the first one; inspect records all of
    them on the meta device (triton_helpers.recorded_launches)."""
    more_keys: tuple[Key, ...] = ()
    """further shapes, such as the widest row and ragged sizes, that inspect compiles with the parameters of the nearest class"""
    few_rows: bool = False
    """a matrix product of so few rows that reading the weight is what takes its time"""
    trained_in: tuple[torch.dtype, ...] = ()
    """of a kernel that only the optimizer launches, with sizes that depend on no batch: the dtypes there. Other kernels are launched in
    bfloat16 by training and the engine, or in float32 if they do not take that."""

    @property
    def training_dtypes(self) -> tuple[torch.dtype, ...]:
        return self.trained_in or (torch.bfloat16 if torch.bfloat16 in self.dtypes else torch.float32,)

    @property
    def is_compute_bound(self) -> bool:
        """Whether its time is that of matrix products, in tiles of BLOCK_M rows. tune times such kernels without pauses."""
        return not self.few_rows and any("BLOCK_M" in parameters for parameters in self.space)


@dataclass(frozen=True)
class RunShape:
    """The shapes of a training run: rows and tokens of a micro-batch, and the sizes of the model."""

    rows: int
    tokens: int
    width: int
    heads: int
    kv_heads: int
    vocab: int
    depth: int


@dataclass(frozen=True)
class Trial:
    """The inputs on which the gate validates and times an operation.

    rowwise: the indices of inputs that have one row for each row of every result, where row i of the results depends only on row
    i of these inputs. The gate compares results and gradients in chunks of rows, and sums the gradients of other inputs over the
    chunks. in_place: the indices of inputs that the operation changes, in backward too; they count as results.
    judged: whether the results are compared. timed: whether the trial's time counts for the choice. is_loss: the upstream gradient
    is 1, as for a loss in training; otherwise upstream gradients are random.
    """

    inputs: tuple
    rowwise: tuple[int, ...] = ()
    differentiable: tuple[int, ...] = ()
    in_place: tuple[int, ...] = ()
    timed: bool = True
    judged: bool = True
    row_elements: int = 0
    """elements of the largest intermediate result of the reference for one row, if inputs and results do not show it"""
    is_loss: bool = False
    epsilon: float = 0.0
    """error that the operation documents and may add to each element of a result"""
    cancellation: float = 0.0
    """absolute error that each element of a gradient may have besides, where terms of a sum in float32 cancel"""
    fewest_rows: int = FEWEST_ROWS
    """rows of a group of similar magnitude whose errors are compared together; see oracle.over_budget"""
    apart: Callable[[tuple], Mapping[int, Tensor]] | None = None
    """(inputs, or a chunk of their rows) → masks of elements that are compared separately because their magnitude differs, such as
    the gradient of the target's logit. A key is the number of a result or, counting on, of the gradient of a rowwise input."""
    judge: Callable[[tuple[Tensor, ...]], str | None] | None = None
    """(all results) → what is wrong, or None; replaces the comparison with the reference in float64"""
    timed_reference: Callable | None = None
    """the reference as training calls it, where that is another way, for its time"""


@dataclass(frozen=True)
class Benchmark:
    """How `python -m bench` measures an operation."""

    shapes: tuple[str, ...]
    """names such as d20, which `inputs` takes"""
    inputs: Callable[[str, torch.dtype, torch.device], tuple]
    """(shape, dtype, device) → one set of arguments of the public function"""
    differentiable: tuple[int, ...]
    """indices of the arguments whose gradients the modes bwd and both compute"""
    elements: Callable[[tuple, str], float]
    """(arguments, "fwd" or "bwd") → the least number of elements that must be read and written"""
    flops: Callable[[tuple, str, str], float]
    """(arguments, "fwd" or "bwd", variant) → floating-point operations that the variant executes"""
    modes: tuple[str, ...] = ("fwd", "bwd", "both")
    baselines: Mapping[str, Callable[[], Callable | None]] = field(default_factory=dict)
    """name → a function that returns another library's implementation, or None if the library is not installed"""
    bounds: Mapping[str, Callable] = field(default_factory=dict)
    """name → a function of the same arguments that computes only a part, such as the products; its results are not compared"""
    call: Callable = lambda function, *arguments: function(*arguments)
    """(function, *arguments) → the results to compute gradients of; calls one of the variants as the model does"""
    variants: Callable[[tuple], Mapping[str, Callable[[], Any]]] | None = None
    """(arguments) → all variants by name; replaces the usual ones for an operation that is not measured as one call"""
    is_loss: bool = False
    """the upstream gradient is 1, as for a loss in training; otherwise upstream gradients are random"""


@dataclass(frozen=True, eq=False)
class Operation:
    """A fused operation. `reference` defines it; `implementations` are the fused ones, the fastest first."""

    name: str
    function: Callable
    """the public function, which takes impl="auto" or the name of an implementation"""
    reference: Callable
    implementations: Mapping[str, Implementation] = field(default_factory=dict)
    kernels: tuple[Kernel, ...] = ()
    trials: Callable[[RunShape, torch.device, torch.dtype], Iterator[Trial]] | None = None
    """(shape, device, dtype) → the gate's trials; required for an operation with implementations"""
    benchmark: Benchmark | None = None
    fused_by_torch: bool = False
    """the reference is one of torch's fused kernels, which a compiler would not make faster"""
