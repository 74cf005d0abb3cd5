"""What is measured: for each operation its shapes, inputs, rivals, and the bytes that it cannot do without.

A variant takes the number of a round and returns what the operation returns; rounds take turns with sets of inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import kernels
from kernels import reference
from kernels.timing import Graph
from nanochat.optim import deal

MODES = ("fwd", "bwd", "both")
# the cross entropy makes its gradient in the forward pass; an orthogonalisation has none
MODES_OF = {"softcap_cross_entropy": ("fwd", "both"), "newton_schulz": ("fwd",)}
TOKENS = 32 * 2048
MODELS = {"d12": 768, "d20": 1280, "d32": 2048}  # width; heads of 128


@dataclass
class Case:
    """One operation at one shape in one mode, ready to run. `bytes`: read and written at the least. `flops`: of a variant,
    where products make up the time; "dense" are those of the plain algorithm, without symmetry."""

    operation: str
    shape: str
    mode: str
    dtype: str
    bytes: int
    variants: dict[str, Callable[[int], object]]
    prepare: dict[str, Callable[[int], None]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)


def liger():
    """Liger-Kernel's operations, or None where the optional package is missing."""
    try:
        from liger_kernel import ops
    except ImportError:
        return None
    return ops


def operation_variants(operation: str) -> dict[str, Callable]:
    """Implementations by name, all taking the same inputs: ours, eager, compiled, and Liger's where it has the operation."""
    torch._dynamo.reset()  # else the eighth shape of a function is no longer compiled
    plain = getattr(reference, operation)
    fused = partial(getattr(kernels, operation), impl="triton")
    variants = {"triton": fused, "eager": plain, "compile": torch.compile(plain, dynamic=False)}
    ops = liger()
    if ops is None:
        return variants
    eps = reference.EPS

    def norm(x: Tensor) -> Tensor:
        return ops.LigerRMSNormFunction.apply(x, None, eps, 0.0, "llama", False, None)

    if operation == "rms_norm":
        variants["liger"] = norm
    elif operation == "qk_norm_rope":

        def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            q, k = ops.LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return norm(q.transpose(1, 2).contiguous()), norm(k.transpose(1, 2).contiguous())

        variants["liger"] = rope
    elif operation == "softcap_cross_entropy":

        def entropy(logits: Tensor, targets: Tensor) -> Tensor:
            apply = ops.LigerCrossEntropyFunction.apply
            return apply(logits, targets, None, -1, 0.0, 0.0, "mean", 15.0, False)[0]

        variants["liger"] = entropy
    return variants


def case(
    operation: str, shape: str, mode: str, dtype: torch.dtype = torch.bfloat16, impls: tuple[str, ...] = ()
) -> Case:
    """Build the inputs on the GPU. Raises ValueError for a mode that the operation does not have."""
    if mode not in MODES_OF.get(operation, MODES):
        raise ValueError(f"{operation} is measured in {', '.join(MODES_OF[operation])}, not in {mode}")
    if operation == "newton_schulz":
        return _newton_schulz_case(shape, dtype, impls)
    build = {
        "rms_norm": _norm_inputs,
        "add_rms_norm": _norm_inputs,
        "qk_norm_rope": _rope_inputs,
        "softcap_cross_entropy": _entropy_inputs,
    }[operation]
    sets, differentiable = build(operation, shape, dtype)
    variants = {n: f for n, f in operation_variants(operation).items() if not impls or n in impls}
    made = Case(operation, shape, mode, str(dtype).removeprefix("torch."), 0, {})
    size = sum(x.nbytes for x in sets[0][:differentiable])
    forward, backward = (passes / differentiable for passes in PASSES[operation])
    if operation == "qk_norm_rope":  # q and k, each with its own passes
        forward, backward = PASSES[operation]
    made.bytes = int(size * {"fwd": forward, "bwd": backward, "both": forward + backward}[mode])
    for name, function in variants.items():
        own = sets
        if name == "liger" and operation == "softcap_cross_entropy":  # it writes the gradient over the logits
            own = [[x.clone() if i == 0 else x for i, x in enumerate(inputs)] for inputs in sets]
            made.prepare[name] = partial(_restore, own, sets)
        made.variants[name] = _runner(function, own, differentiable, mode)
    return made


def _restore(own: list[list[Tensor]], sets: list[list[Tensor]], number: int) -> None:
    own[number % len(own)][0].copy_(sets[number % len(sets)][0])


def _runner(function: Callable, sets: list[list[Tensor]], differentiable: int, mode: str) -> Callable[[int], object]:
    if mode == "fwd":

        def forward(number: int):
            with torch.no_grad():
                return function(*sets[number % len(sets)])

        return forward

    def prepared(inputs: list[Tensor]) -> list[Tensor]:
        return [x.detach().requires_grad_() if i < differentiable else x for i, x in enumerate(inputs)]

    def results(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    upstream = [torch.randn_like(x) if x.dim() else torch.ones_like(x) for x in results(sets[0])]
    if mode == "both":

        def both(number: int):
            inputs = prepared(sets[number % len(sets)])
            outputs = results(inputs)
            return outputs, torch.autograd.grad(outputs, inputs[:differentiable], upstream)

        return both
    graphs = []
    for inputs in map(prepared, sets):
        graphs.append((results(inputs), inputs[:differentiable]))

    def backward(number: int):
        outputs, inputs = graphs[number % len(graphs)]
        return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)

    return backward


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype).normal_()


def _norm_inputs(operation: str, shape: str, dtype: torch.dtype) -> tuple[list[list[Tensor]], int]:
    count = 2 if operation == "add_rms_norm" else 1
    return [[_normal(TOKENS, MODELS[shape], dtype=dtype) for _ in range(count)] for _ in range(2)], count


def _rope_inputs(operation: str, shape: str, dtype: torch.dtype) -> tuple[list[list[Tensor]], int]:
    heads = MODELS[shape] // 128
    angles = torch.arange(2048)[:, None] * 10000.0 ** (-torch.arange(0, 128, 2) / 128)
    tables = [angles.cos().to("cuda", dtype), angles.sin().to("cuda", dtype)]
    return [[*(_normal(32, 2048, heads, 128, dtype=dtype) for _ in range(2)), *tables] for _ in range(2)], 2


def _entropy_inputs(operation: str, shape: str, dtype: torch.dtype) -> tuple[list[list[Tensor]], int]:
    rows = {"d20": TOKENS, "chunk": TOKENS // 8}[shape]
    logits = _normal(rows, 65_536, dtype=dtype).mul_(3.0)
    return [[logits, torch.randint(65_536, (rows,), device="cuda")]], 1


def _newton_schulz_case(shape: str, dtype: torch.dtype, impls: tuple[str, ...]) -> Case:
    """All matrices of a model in one go, or, as "d20/8", what the busiest of eight ranks owns of them: 4 square ones a layer,
    one 4 times as long and one 4 times as wide. "graph" replays ours from a CUDA graph, as training does."""
    depth, _, ranks = shape[1:].partition("/")
    depth, width = int(depth), 64 * int(depth)
    owned = deal({(width, width): 4 * depth, (4 * width, width): depth, (width, 4 * width): depth}, int(ranks or 1))

    def multiply_adds(rank: int) -> int:
        return sum(counts[rank] * min(size) ** 2 * max(size) for size, counts in owned.items())

    rank = max(range(int(ranks or 1)), key=multiply_adds)
    sizes = [(counts[rank], *size) for size, counts in owned.items()]
    groups = [_normal(*size, dtype=dtype) for size in sizes]
    torch._dynamo.reset()
    compiled = torch.compile(reference.newton_schulz, dynamic=False)

    def ours(number: int):
        return [kernels.newton_schulz(x, impl="triton") for x in groups]

    def batched(number: int):
        return [compiled(x) for x in groups]

    variants = {
        "triton": ours,
        "graph": Graph(ours),
        "standard": lambda _: [kernels.newton_schulz(x, algorithm="standard", impl="triton") for x in groups],
        "eager": lambda _: [[reference.newton_schulz(matrix) for matrix in x] for x in groups],
        "compile": batched,
        "compile_graph": Graph(batched),
        "loop": lambda _: [[compiled(matrix) for matrix in x] for x in groups],
    }
    variants = {name: run for name, run in variants.items() if not impls or name in impls}
    flops = {name: 0.0 for name in ("dense", "standard", "triton")}
    for count, *sides in sizes:
        m, n = sorted(sides)
        flops["dense"] += count * 5 * (4 * m * m * n + 2 * m**3)
        flops["standard"] += count * 5 * (3 * m * m * n + m**3)
        gram = 2 * m * m * n + 14 * m**3 + 4 * m * m * n  # two of R, fourteen small products, two of Q·X
        flops["triton"] += count * (5 * (3 * m * m * n + m**3) if m == n else gram)
    flops["graph"] = flops["triton"]
    size = 2 * sum(x.nbytes for x in groups)
    return Case("newton_schulz", shape, "fwd", str(dtype).removeprefix("torch."), size, variants, flops=flops)


# floating-point operations an element of the first differentiable input, forward and backward, as the formulas count
FLOPS = {"rms_norm": (3, 6), "add_rms_norm": (4, 7), "qk_norm_rope": (6, 9), "softcap_cross_entropy": (8, 7)}
# elements moved an element computed: (forward, backward)
PASSES = {"rms_norm": (2, 3), "add_rms_norm": (4, 4), "qk_norm_rope": (2, 3), "softcap_cross_entropy": (1, 1)}


def flops_per_byte(operation: str, mode: str, dtype: str) -> float:
    """Arithmetic intensity, for a roofline."""
    parts = {"fwd": slice(0, 1), "bwd": slice(1, 2), "both": slice(0, 2)}[mode]
    return sum(FLOPS[operation][parts]) / sum(PASSES[operation][parts]) / (4 if dtype == "float32" else 2)


SHAPES = {
    "rms_norm": tuple(MODELS),
    "add_rms_norm": tuple(MODELS),
    "qk_norm_rope": tuple(MODELS),
    # every depth has the vocabulary 65,536: all tokens of a micro-batch, and an eighth of them, as a chunked head has
    "softcap_cross_entropy": ("d20", "chunk"),
    "newton_schulz": ("d4", "d12", "d20", "d20/8", "d32"),
}
