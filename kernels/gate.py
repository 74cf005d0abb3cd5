"""The gate: on the GPU where training will run, at its shapes, every operation is validated and timed, and the choice kept.

An implementation that fails, or is further from the oracle than kernels/oracle.py allows, is not chosen. Of the others the fastest is,
or the one of the launch table if it is hardly slower; the model's references are compiled as they are in training. Where one
implementation serves only some calls, "auto" is judged too, which takes another for the rest. Every row of every result and gradient
is compared, a chunk of rows at a time. `read` rejects a file of another machine, of other versions, or of other kernels.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from time import perf_counter
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from nanochat_kernels import configs, dispatch, timing
from nanochat_kernels.architecture import TRITON_INSTALLED, triton
from nanochat_kernels.operation import Operation, RunShape, Trial
from nanochat_kernels.oracle import evaluate, over_budget

CHUNK = 2**26  # elements of the largest tensor that a chunk of rows makes in float64
ROUNDS = 15
AUTO_TOLERANCE = 1.05  # two measurements of the same work differ by less
TABLE_TOLERANCE = 1.02  # the launch table chose in the model, where memory and determinism count too
REMEDY = "make it again with: nanochat kernels gate, and the --preset of the run, or remove it"
OUT_OF_MEMORY = "out of memory at these shapes"


class GateError(ValueError):
    """A gate file that cannot be read, or that was made for another device, version, shape or set of kernels; or trials that do
    not fit into the memory."""


def call(trial: Trial, function: Callable, *inputs) -> tuple[Tensor, ...]:
    """Return all results at the inputs. Inputs that the trial's operation changes in place are copied, and are the first results."""
    inputs = [x.clone() if i in trial.in_place else x for i, x in enumerate(inputs)]
    results = function(*inputs)
    changed = tuple(inputs[i] for i in trial.in_place)
    return changed + tuple(x for x in (results if isinstance(results, tuple) else (results,)) if x is not None)


def disagreement(trial: Trial, function: Callable, reference: Callable) -> str | None:
    """What is wrong with an implementation at the shape of the trial, or None.

    Raises torch.OutOfMemoryError where the comparison does not fit into the memory, for which the implementation is not to blame.
    """
    upstream, wrt = ([], ()) if trial.judge else (upstream_of(trial, reference), trial.differentiable)
    try:
        found = evaluate(partial(call, trial, function), trial.inputs, upstream, wrt)
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    return (
        trial.judge(tuple(found)) if trial.judge else compared(trial, found, upstream, partial(call, trial, reference))
    )


def compared(trial: Trial, found: Sequence[Tensor], upstream: Sequence[Tensor], true_by: Callable) -> str | None:
    """What is wrong with results and gradients, compared with those of `true_by`, or None."""
    results, gradients = found[: len(upstream)], found[len(upstream) :]
    sums: dict[int, list[Tensor]] = {}  # of gradients of inputs that all rows share: the oracle's and the baseline's
    for rows in chunks(trial, results):
        inputs = [x[rows] if i in trial.rowwise else x for i, x in enumerate(trial.inputs)]
        above = [x[rows] for x in upstream]
        oracle = evaluate(true_by, [in_float64(x) for x in inputs], [x.double() for x in above], trial.differentiable)
        baseline = evaluate(true_by, inputs, above, trial.differentiable)
        apart = trial.apart(tuple(inputs)) if trial.apart else {}
        for number, (true, plain) in enumerate(zip(oracle, baseline, strict=True)):
            shared = number >= len(upstream) and trial.differentiable[number - len(upstream)] not in trial.rowwise
            if shared:
                parts = [true.double(), plain.double()]
                before = sums.get(number)
                sums[number] = [a.add_(b) for a, b in zip(before, parts, strict=True)] if before else parts
                continue
            absolute = len(trial.in_place) <= number < len(upstream)
            epsilon = trial.epsilon * (1.0 if absolute else true.abs())
            epsilon += trial.cancellation * (number >= len(upstream))
            wrong = over_budget(found[number][rows], true, plain, epsilon, apart.get(number), trial.fewest_rows)
            if wrong:
                where = "" if rows is ... else f", rows {rows.start} to {rows.stop - 1}"
                return f"{name_of(number, trial, upstream)}{where}: {wrong}"
    for number, (true, plain) in sums.items():
        gradient = gradients[number - len(upstream)]
        wrong = over_budget(gradient, true, plain.to(gradient.dtype), trial.epsilon * true.abs())
        if wrong:
            return f"{name_of(number, trial, upstream)}: {wrong}"
    return None


def name_of(number: int, trial: Trial, upstream: Sequence) -> str:
    results = len(upstream)
    return f"result {number}" if number < results else f"gradient of input {trial.differentiable[number - results]}"


def in_float64(x):
    if isinstance(x, torch.dtype):  # the dtype of a result
        return torch.float64
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def upstream_of(trial: Trial, function: Callable) -> list[Tensor]:
    """Upstream gradients of all results, the same each time."""
    with torch.no_grad():
        results = call(trial, function, *(x.to("meta") if isinstance(x, Tensor) else x for x in trial.inputs))
    device = trial.inputs[0].device
    generator = torch.Generator(device).manual_seed(0)
    upstream = [torch.ones(x.shape, dtype=x.dtype, device=device) for x in results]
    return upstream if trial.is_loss else [x.normal_(generator=generator) for x in upstream]


def chunks(trial: Trial, results: Sequence[Tensor]) -> Iterator[slice | EllipsisType]:
    """Slices of the first axis of all rowwise inputs and results; `...`, which is everything, where no input is rowwise."""
    if not trial.rowwise:
        yield ...
        return
    rows = len(trial.inputs[trial.rowwise[0]])
    tensors = {i: x for i, x in enumerate(trial.inputs) if isinstance(x, Tensor)}
    row_size = max(x[0].numel() for x in (*(trial.inputs[i] for i in trial.rowwise), *results))
    # an intermediate result may be as wide as any input is long: logits have an element for each row of the head's weight
    row_size = max(row_size, *(n for i, x in tensors.items() for n in x.shape[int(i in trial.rowwise) :]), 1)
    row_size = max(row_size, trial.row_elements)
    step = max(1, CHUNK // row_size)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def milliseconds(trial: Trial, implementations: Mapping[str, Callable], reference: Callable) -> dict[str, float]:
    """Median time of each, forward and backward, taking turns; on a GPU without launches, which training hides or captures."""
    upstream = upstream_of(trial, reference) if trial.differentiable else []

    def variant(function: Callable) -> Callable[[int], object]:
        inputs = [x.clone() if i in trial.in_place else x for i, x in enumerate(trial.inputs)]
        return lambda _: evaluate(function, inputs, upstream, trial.differentiable)

    def without_nones(function: Callable) -> Callable:
        return lambda *inputs: tuple(x for x in as_tuple(function(*inputs)) if x is not None)

    variants = {name: variant(without_nones(function)) for name, function in implementations.items()}
    if trial.inputs[0].is_cuda:
        variants = {name: timing.Graph(run) for name, run in variants.items()}
        return {name: median(samples) for name, samples in timing.interleaved(variants, ROUNDS).items()}
    times = {}
    for name, run in variants.items():  # interpreted kernels, whose times say nothing
        started = perf_counter()
        run(0)
        times[name] = 1e3 * (perf_counter() - started)
    return times


def times_that_work(
    trial: Trial, implementations: Mapping[str, Callable], reference: Callable, failures: dict[str, str]
) -> dict[str, float]:
    """`milliseconds` by turns, or one implementation after the other where that fails, as where all together do not fit into the GPU's
    memory. What fails by itself is left out, and added to the failures with the reason."""
    try:
        return milliseconds(trial, implementations, reference)
    except Exception as error:  # whatever a kernel fails with on this machine, the run continues without it
        if len(implementations) == 1:
            failures |= {name: failures.get(name, reason_of(error)) for name in implementations}
            return {}
    times: dict[str, float] = {}
    for name, function in implementations.items():
        if trial.inputs[0].is_cuda:
            torch.cuda.empty_cache()
        times |= times_that_work(trial, {name: function}, reference, failures)
    return times


def reason_of(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def as_tuple(results) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def examine_operation(
    operation: Operation, shape: RunShape, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The choice for one operation: impl, why, milliseconds, and what is wrong ("faults") by implementation; "preferred" is what the
    launch table of the device, or of the one that the interpreter stands for, names.

    Raises GateError where a trial's inputs, or their comparison in float64, do not fit into the memory: nothing is known then.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # the same result each time; not the seed of the upstream gradients, which would then equal the inputs
        torch.manual_seed(1)
        try:
            ms, failures, partial_support = tried(operation, operation.trials(shape, device, dtype))
            if partial_support:
                by_auto, wrong, _ = tried(operation, operation.trials(shape, device, dtype), ("auto",))
                ms, failures = by_auto | ms, failures | wrong
        except torch.OutOfMemoryError as error:
            raise GateError(
                f"{operation.name} could not be judged at {shape.rows} rows of {shape.tokens} tokens: its inputs and the "
                "comparison with the reference in float64 do not fit into the memory; end other programs that use this device, "
                "or judge fewer rows with: nanochat kernels gate --device-batch-size"
            ) from error
    why = ", ".join(f"{name} {time:.3f} ms" for name, time in sorted(ms.items(), key=lambda item: item[1]))
    why += "".join(f"; {name}: {wrong}" for name, wrong in failures.items())
    preferred = dispatch.preference(operation.name, device.index)[0]
    return {"impl": fastest(ms, preferred), "why": why, "ms": ms, "faults": failures, "preferred": preferred}


def fastest(ms: dict[str, float], preferred: str | None) -> str:
    """The implementation with the shortest time; "auto" also where it is hardly slower, because it serves every call as it should, and
    the preferred one where it is hardly slower than another fused one."""
    best = min(ms, key=ms.__getitem__, default="reference")
    if "auto" in ms and ms["auto"] <= AUTO_TOLERANCE * ms[best]:
        return "auto"
    if best != "reference" and preferred in ms and ms[preferred] <= TABLE_TOLERANCE * ms[best]:
        return preferred
    return best


def tried(
    operation: Operation, trials: Iterable[Trial], names: Iterable[str] = ()
) -> tuple[dict[str, float], dict[str, str], bool]:
    """(milliseconds over all timed trials of the implementations that are right, what is wrong with the others, whether one of these
    serves only some of the trials). names: the implementations, by default all."""
    ms: dict[str, float] = {}
    failures: dict[str, str] = {}
    right, refused = set(), set()
    for trial in trials:
        correct = {"reference": trial.timed_reference or operation.reference}
        for name in names or operation.implementations:
            function = partial(operation.function, impl=name)
            try:
                wrong = disagreement(trial, function, operation.reference) if trial.judged else failures.get(name)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a kernel fails with on this machine, the run continues without it
                wrong = reason_of(error)
                if isinstance(error, dispatch.KernelRequestError):
                    refused.add(name)
            if wrong:
                failures.setdefault(name, wrong)
            else:
                correct[name] = function
                right.add(name)
        on_gpu = trial.inputs[0].is_cuda
        if trial.timed:
            if on_gpu and trial.differentiable:  # the model is compiled, the optimizer is not
                correct["reference"] = torch.compile(operation.reference, dynamic=False)
            for name, time in times_that_work(trial, correct, operation.reference, failures).items():
                ms[name] = ms.get(name, 0.0) + time
        if on_gpu:
            torch.cuda.empty_cache()
    ms = {name: time for name, time in ms.items() if name not in failures}
    return ms, failures, not right.isdisjoint(refused)


def fastest_fused(choice: dict[str, Any]) -> str:
    """The fastest implementation of an operation's choice that is not its reference, where one is right."""
    return fastest({name: time for name, time in choice["ms"].items() if name != "reference"}, choice.get("preferred"))


def examine(shape: RunShape, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """(operation, its choice), one after the other; those that have a reference alone at the end."""
    only_reference = {"impl": "reference", "why": "there is no other implementation", "ms": {}, "faults": {}}
    for operation in sorted(dispatch.operations().values(), key=lambda operation: not operation.implementations):
        has_trials = operation.implementations and operation.trials
        yield operation.name, examine_operation(operation, shape, device, dtype) if has_trials else only_reference


def identity(shape: RunShape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a gate file is valid for."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__ if TRITON_INSTALLED else None,
            "ptxas": ptxas_version() if TRITON_INSTALLED else None,
        },
        "kernels": sources_hash(),
        "shape": asdict(shape),
        "dtype": configs.dtype_name(dtype),
    }


def ptxas_version() -> str:
    """Of the assembler that Triton uses, in full: some builds are known to miscompile."""
    report = subprocess.run([triton.knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"V(\d[\d.]+)", report.stdout)
    return found.group(1) if found else report.stdout.strip()


def sources_hash() -> str:
    """Of the sources of this package and its launch tables."""
    digest = sha256()
    for path in sorted(
        (*Path(__file__).parent.glob("*.py"), *configs.FOLDER.glob("*.py"), *configs.FOLDER.glob("*.json"))
    ):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write(path: Path, valid_for: dict[str, Any], operations: dict[str, dict[str, Any]], **more) -> None:
    """The file, whole or not at all. more: what the caller keeps in it besides; it must be JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = valid_for | {"operations": operations} | more
    configs.replace_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read(path: Path, valid_for: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The choice for each operation, as examine_operation makes it, and what the caller of `write` keeps in the file besides.

    Raises GateError when the file cannot be read, was made for another device, version, shape or set of kernels (naming both), or
    names an operation or an implementation that does not exist.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        operations = {
            name: {
                "impl": str(entry["impl"]),
                "why": str(entry.get("why", "")),
                "ms": {impl: float(ms) for impl, ms in dict(entry.get("ms", {})).items()},
                "faults": dict(entry.get("faults", {})),
            }
            for name, entry in found["operations"].items()
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise GateError(f"{path} is not a gate file ({error!r}); {REMEDY}") from error
    for name, wanted in valid_for.items():
        made = found.get(name)
        rows = made.get("rows") if name == "shape" and isinstance(made, dict) else None
        if isinstance(rows, int) and rows >= wanted["rows"]:
            made = made | {"rows": wanted["rows"]}  # fewer rows are served by what serves more
        if made != wanted:
            raise GateError(f"{path} was made for another {name}: {found.get(name)}, here it is {wanted}; {REMEDY}")
    for name, entry in operations.items():
        operation = dispatch.operations().get(name)
        if operation is None or entry["impl"] not in ("auto", "reference", *operation.implementations):
            raise GateError(f"{path} chooses {entry['impl']} for {name}, which does not exist here; {REMEDY}")
    return operations, {name: value for name, value in found.items() if name not in valid_for and name != "operations"}
