"""The gate: on the GPU where training will run, at its shapes, every operation validated and timed, and the choice kept.

An implementation that fails, or is further from the oracle than kernels/oracle.py allows, is not chosen; of the others the
fastest is, the model's references compiled as they are in training. What follows reads the file and refuses one of another machine.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

import kernels
from kernels import configs, dispatch, reference, timing
from kernels.oracle import evaluate, over_budget
from kernels.triton_helpers import INSTALLED, triton

CHECKED = 64  # rows at either end of a tensor that are compared with float64
LOGITS = 2**30  # elements of logits at most; a longer batch goes through the head in chunks
ROUNDS = 15


@dataclass(frozen=True)
class RunShape:
    """What a training run asks of the operations: rows of tokens at once, and the model's sizes."""

    rows: int
    tokens: int
    width: int
    heads: int
    kv_heads: int
    vocab: int
    depth: int


@dataclass(frozen=True)
class Trial:
    """An operation with the inputs of the run. The inputs numbered in `rowwise`, and all results, have a row for each of
    theirs, and rows do not mix: so a few of them, and of their gradients, can be compared. judge replaces that comparison."""

    operation: str
    inputs: tuple
    rowwise: tuple[int, ...]
    wrt: tuple[int, ...]
    judge: Callable[[Callable], str | None] | None = None


class GateError(ValueError):
    """A gate file that is none, or of another device, version or shape."""


def trials(shape: RunShape, device: torch.device, dtype: torch.dtype) -> Iterator[Trial]:
    """Every operation that has more than the reference."""
    positions, head = shape.rows * shape.tokens, shape.width // shape.heads

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, device=device, dtype=dtype).normal_()

    yield Trial("rms_norm", (normal(positions, shape.width),), (0,), (0,))
    yield Trial("add_rms_norm", (normal(positions, shape.width), normal(positions, shape.width)), (0, 1), (0, 1))
    angles = torch.arange(shape.tokens)[:, None] * 10000.0 ** (-torch.arange(0, head, 2) / head)
    tables = [table.to(device, dtype) for table in (angles.cos(), angles.sin())]
    q, k = (normal(shape.rows, shape.tokens, heads, head) for heads in (shape.heads, shape.kv_heads))
    yield Trial("qk_norm_rope", (q, k, *tables), (0, 1), (0, 1))
    rows = min(positions, max(1, LOGITS // shape.vocab))
    targets = torch.randint(shape.vocab, (rows,), device=device)
    how = (targets, 15.0, -1, "none")
    yield Trial("softcap_cross_entropy", (normal(rows, shape.vocab).mul_(3.0), *how), (0, 1), (0,))
    hidden, weight = normal(rows, shape.width), normal(shape.vocab, shape.width).mul_(3 * shape.width**-0.5)
    yield Trial("linear_cross_entropy", (hidden, weight, *how), (0, 2), (0, 1))
    half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    for count, height in ((4 * shape.depth, shape.width), (shape.depth, 4 * shape.width)):
        matrices = normal(count, height, shape.width, dtype=half)
        yield Trial("newton_schulz", (matrices,), (0,), (), partial(_orthogonal, matrices))
    yield from _optimizer_trials(shape, normal, half, device)


def _optimizer_trials(shape: RunShape, normal: Callable, half: torch.dtype, device: torch.device) -> Iterator[Trial]:
    """These change their arguments: each call works on copies, and gives them back."""
    one, biases = torch.ones((), device=device), torch.tensor([0.2, 0.05], device=device)
    size = (min(shape.depth, 4), shape.width, shape.width)
    float32 = partial(normal, dtype=torch.float32)
    yield Trial("nesterov_momentum", (float32(*size), float32(*size), one * 0.5, one * 0.9, half), (0, 1), ())
    yield Trial("apply_update", (float32(*size), normal(*size, dtype=half), one, 0.02), (0, 1), ())
    state = (float32(*size), float32(*size), float32(*size), float32(*size).abs())
    yield Trial("adamw", (*state, one, one, biases, 0.01, (0.8, 0.95), 1e-10), (0, 1, 2, 3), ())


def _orthogonal(matrices: Tensor, found: Tensor) -> str | None:
    """The direction that the reference gives in float64, of a matrix as wide as the run's."""
    true = reference.newton_schulz(matrices[:1].double())
    cosine = float(torch.nn.functional.cosine_similarity(true.flatten(), found[:1].double().flatten(), dim=0))
    return None if cosine >= 0.999 else f"cosine {cosine:.4f} to float64, wanted 0.999"


IN_PLACE = {"nesterov_momentum": (1,), "apply_update": (0,), "adamw": (0, 2, 3)}


def call(operation: str, function: Callable, *inputs):
    """The operation; of one that works in place, the tensors that it changed and the first result, on copies."""
    changed = IN_PLACE.get(operation)
    if not changed:
        return function(*inputs)
    inputs = [x.clone() if i in changed else x for i, x in enumerate(inputs)]
    result = function(*inputs)
    return (*(inputs[i] for i in changed), *(result[:1] if isinstance(result, tuple) else ()))


def fault(trial: Trial, function: Callable) -> str | None:
    """What is wrong with an implementation at the run's shape, or None."""
    plain = partial(call, trial.operation, getattr(reference, trial.operation))
    mine = partial(call, trial.operation, function)
    with torch.random.fork_rng(devices=[trial.inputs[0].device] if trial.inputs[0].is_cuda else []):
        torch.manual_seed(0)
        probe = mine(*(x.detach() if isinstance(x, Tensor) else x for x in trial.inputs))
        results = probe if isinstance(probe, tuple) else (probe,)
        upstream = [torch.randn_like(x) for x in results] if trial.wrt else []
    found = evaluate(mine, trial.inputs, upstream, trial.wrt)
    if trial.judge:
        return trial.judge(found[0])
    for part in (slice(0, CHECKED), slice(-CHECKED, None)) if trial.inputs[0].dim() < 3 else (slice(-1, None),):
        few = [x[part] if i in trial.rowwise else x for i, x in enumerate(trial.inputs)]
        above = [x[part] for x in upstream]
        wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in few]
        wide = [torch.float64 if isinstance(x, torch.dtype) else x for x in wide]
        oracle = evaluate(plain, wide, [x.double() for x in above], trial.wrt)
        compared = [True] * len(results) + [i in trial.rowwise for i in trial.wrt]
        every = zip(found, oracle, evaluate(plain, few, above, trial.wrt), strict=True)
        for one, true, rival in compress(every, compared):
            # a cross entropy states cap·2⁻²³ as its own
            wrong = over_budget(one[part], true, rival, 15.0 * 2**-23 * true.numel() ** 0.5 * (one.dim() == 1))
            if wrong:
                return wrong
    return None


def milliseconds(trial: Trial, implementations: dict[str, Callable]) -> dict[str, float]:
    """Median time of each, forward and backward, taking turns; on a GPU without launches, which training hides or captures."""
    results = call(trial.operation, getattr(reference, trial.operation), *trial.inputs)
    upstream = (
        [torch.randn_like(x) for x in (results if isinstance(results, tuple) else (results,))] if trial.wrt else []
    )

    def once(function: Callable, _) -> list[Tensor]:
        return evaluate(partial(call, trial.operation, function), trial.inputs, upstream, trial.wrt)

    variants = {name: partial(once, function) for name, function in implementations.items()}
    if trial.inputs[0].is_cuda:
        variants = {name: timing.Graph(run) for name, run in variants.items()}
        return {name: median(samples) for name, samples in timing.interleaved(variants, ROUNDS).items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(3):
        for name, run in variants.items():
            started = perf_counter()
            run(number)
            times[name].append(1e3 * (perf_counter() - started))
    return {name: median(samples) for name, samples in times.items()}


def examine(shape: RunShape, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, dict]]:
    """(operation, its choice, why, milliseconds and faults), one after the other; those with a reference alone at the end."""
    found: dict[str, dict] = {}
    for trial in trials(shape, device, dtype):
        implementations = dispatch.room(trial.operation).IMPLEMENTATIONS[trial.operation]
        public = getattr(kernels, trial.operation)
        faults, able = {}, {"reference": getattr(reference, trial.operation)}
        for name in implementations:
            if name == "reference":
                continue
            function = partial(public, impl=name)
            try:
                wrong = fault(trial, function)
            except Exception as error:  # whatever a kernel fails with on this machine, the run goes on without it
                wrong = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            if wrong:
                faults[name] = wrong
            else:
                able[name] = function
        if trial.inputs[0].is_cuda and trial.wrt:  # the model is compiled, the optimizer is not
            able["reference"] = torch.compile(able["reference"], dynamic=False)
        ms = milliseconds(trial, able)
        before = found.get(trial.operation, {"ms": {}, "faults": {}})
        ms = {name: time + before["ms"].get(name, 0.0) for name, time in ms.items() if not before["faults"].get(name)}
        faults |= before["faults"]
        best = min((name for name in ms if name not in faults), key=ms.__getitem__)
        why = ", ".join(f"{name} {time:.3f} ms" for name, time in sorted(ms.items(), key=lambda item: item[1]))
        why += "".join(f"; {name}: {wrong}" for name, wrong in faults.items())
        found[trial.operation] = {"impl": best, "why": why, "ms": ms, "faults": faults}
        if trial.inputs[0].is_cuda:
            torch.cuda.empty_cache()
    yield from found.items()
    for operation in dispatch.ROOMS:
        if operation not in found:
            yield operation, {"impl": "reference", "why": "nothing else is there", "ms": {}, "faults": {}}


def identity(shape: RunShape, device: torch.device, dtype: torch.dtype) -> dict:
    """What a gate file is valid for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {"torch": torch.__version__, "triton": triton.__version__ if INSTALLED else None}
    return {"device": name, "versions": versions, "shape": asdict(shape), "dtype": str(dtype).removeprefix("torch.")}


def write(path: Path, valid_for: dict, operations: dict[str, dict]) -> None:
    """The file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(
        json.dumps(valid_for | {"operations": operations}, indent=1, ensure_ascii=False) + "\n", "utf-8"
    )
    temporary.replace(path)


def apply(path: Path, valid_for: dict) -> str:
    """From now on impl="auto" takes what the gate chose; returns a line that says so.

    Raises GateError when the file cannot be read or was made for another device, version or shape, naming both.
    """
    remedy = "make it anew with: nanochat kernels gate, or remove it"
    try:
        found = json.loads(path.read_text("utf-8"))
        choices = {name: (entry["impl"], entry["why"]) for name, entry in found["operations"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise GateError(f"{path} is no gate file ({error}); {remedy}") from error
    for name, wanted in valid_for.items():
        made = found.get(name)
        if name == "shape" and isinstance(made, dict) and made.get("rows", 0) >= wanted["rows"]:
            made = made | {"rows": wanted["rows"]}  # fewer rows are served by what serves more
        if made != wanted:
            raise GateError(f"{path} was made for another {name}: {found.get(name)}, here it is {wanted}; {remedy}")
    configs.choices.clear()
    configs.choices.update(choices)
    taken = [name for name, (impl, _) in choices.items() if impl != "reference"]
    return f"kernels: the gate of {path} chose fused {', '.join(taken) or 'nothing'}"
