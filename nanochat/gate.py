"""How training, evaluation and chat use the implementations that `nanochat kernels gate` has chosen."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import NamedTuple

from nanochat.gpt import GPTConfig
from nanochat.options.model import Implementations
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.platform.shapes import check_shape
from nanochat_kernels import configs, gate, library


class Choice(NamedTuple):
    """An implementation, and the times and faults that it was chosen by."""

    impl: str
    why: str


def run_shape(model: GPTConfig, rows: int) -> gate.RunShape:
    """The sizes that the gate validates and times operations at; rows: of a micro-batch."""
    return gate.RunShape(
        rows, model.context_length, model.width, model.n_head, model.n_kv_head, model.vocab_size, model.depth
    )  # fmt: skip


def take_gate(
    paths: Paths, model: GPTConfig, rows: int, runtime: Runtime, deterministic: bool = False
) -> tuple[GPTConfig, dict[str, float] | None]:
    """Replace every "auto" in a model's implementations by the gate's choice, if there is a gate file, and print the choice.

    Kernels are launched with the parameters that the gate found from now on.

    deterministic: on CUDA take attention that repeats bit for bit, whatever the gate chose.

    Returns the new configuration and the gate's times of its micro-step, in milliseconds by execution; None if the gate has not
    timed these implementations. Raises UserError when the file was made on another device, with other versions or kernels, or for
    another shape, and when no attention repeats: another is named, or the gate found Triton's wrong.
    """
    deterministic, named = deterministic and runtime.device.type == "cuda", model.impl.self_attention
    if deterministic:
        model = replace(model, impl=model.impl.repeatable())
    if not paths.gate.exists():
        configs.take_parameters({})
        return model, None
    try:
        operations, more = gate.read(paths.gate, _identity(model, rows, runtime))
    except gate.GateError as error:
        raise UserError(str(error)) from error
    if deterministic:
        wrong, joint = (
            operations.get(name, {"faults": {}})["faults"].get("triton") for name in ("attention", "self_attention")
        )
        wrong = wrong or (joint if named == "triton" else None)
        if wrong:
            raise UserError(
                f"--deterministic needs Triton's attention, which {paths.gate} rejects: {wrong}; leave --deterministic out"
            )
        if joint:  # the parts repeat too
            model = replace(model, impl=replace(model.impl, self_attention="parts"))
    choices = choose_implementations(operations)
    if runtime.primary:
        more_words = "; attention is Triton's, for --deterministic" if deterministic else ""
        say(f"kernels: the gate of {paths.gate} chose {described(choices)}{more_words}")
    _take_parameters(paths, more, runtime)
    model = with_choices(model, choices)
    timed = more.get("micro_step", {"impl": None, "ms": {}})
    try:
        check_shape(timed, {"impl": object, "ms": {str: float}}, "micro_step")
    except UserError as error:
        raise UserError(f"{paths.gate} is not a gate file ({error}); {gate.REMEDY}") from error
    return model, dict(timed["ms"]) if timed["impl"] == asdict(model.impl) else None


def without_rejected(paths: Paths, model: GPTConfig, runtime: Runtime) -> GPTConfig:
    """Replace every "auto" that might take what the gate found wrong by the gate's choice, for a model that is evaluated or chats.

    What was right and only slower in training than its compiled reference stays, because nothing is compiled here. A file of another
    device or version, as with a run that was copied from a cluster, is not taken, and the log says so.
    """
    if not paths.gate.exists():
        configs.take_parameters({})
        return model
    try:
        operations, more = gate.read(paths.gate, _identity(model, 1, runtime))
    except gate.GateError as error:
        if runtime.primary:
            say(f"kernels: chosen without the gate: {str(error).removesuffix(f'; {gate.REMEDY}')}")
        configs.take_parameters({})
        return model
    _take_parameters(paths, more, runtime)

    def rejected(operation: str) -> bool:
        return bool(operations[operation]["faults"]) and "auto" not in operations[operation]["ms"]

    choices = choose_implementations(operations)
    return with_choices(
        model,
        {name: choice for name, choice in choices.items() if any(map(rejected, Implementations.operations(name)))},
    )


def _take_parameters(paths: Paths, more: dict, runtime: Runtime) -> None:
    """Launch kernels with the parameters that the gate found on this GPU. Raises UserError for a file in which they are damaged."""
    tuned = more.get("tuned", {})
    try:
        check_shape(tuned, {str: {str: {str: {str: {str: int}}}}}, "tuned")
    except UserError as error:
        raise UserError(f"{paths.gate} is not a gate file ({error}); {gate.REMEDY}") from error
    configs.take_parameters({} if library.in_use() else tuned)
    if library.in_use() and tuned and runtime.primary:
        say("kernels: the library has its own launch parameters, and those that the gate found are not used")


def _identity(model: GPTConfig, rows: int, runtime: Runtime) -> dict:
    return gate.identity(run_shape(model, rows), runtime.device, runtime.compute_dtype)


def gate_rows(paths: Paths) -> int | None:
    """The rows of the largest micro-batch that the gate file serves, once take_gate has accepted it; None without a file."""
    return json.loads(paths.gate.read_text("utf-8"))["shape"]["rows"] if paths.gate.exists() else None


def check_gate_rows(paths: Paths, rows: int) -> None:
    """Raise UserError if there is a gate file, and it was made for smaller micro-batches than those of `rows` rows."""
    made = gate_rows(paths)
    if made is not None and made < rows:
        raise UserError(
            f"{paths.gate} was made for micro-batches of up to {made} rows, and here they have {rows}; make it again with: nanochat "
            f"kernels gate --device-batch-size {rows}, and the --preset of the run, or remove it"
        )


def with_choices(model: GPTConfig, choices: Mapping[str, Choice]) -> GPTConfig:
    """Replace every "auto" in a model's implementations by the choice for it."""
    automatic = {name: choice.impl for name, choice in choices.items() if getattr(model.impl, name) == "auto"}
    return replace(model, impl=replace(model.impl, **automatic))


def choose_implementations(operations: Mapping[str, Mapping]) -> dict[str, Choice]:
    """The gate's choices by operation, as choices for the fields of Implementations.

    A field that stands for several operations gets what is right for all of them and takes the shortest time for all together, which
    is their reference where nothing else is. A field with an operation that the gate did not judge is left out.
    """
    chosen = {}
    for field in fields(Implementations):
        entries = {name: operations.get(name) for name in Implementations.operations(field.name)}
        if None not in entries.values():
            chosen[field.name] = _choice_for_all(entries)
    return chosen


def _choice_for_all(entries: dict[str, Mapping]) -> Choice:
    if len(entries) == 1:
        [entry] = entries.values()
        return Choice(entry["impl"], entry["why"])
    able = set.intersection(*(set(entry["ms"]) for entry in entries.values()))
    ms = {impl: sum(entry["ms"][impl] for entry in entries.values()) for impl in sorted(able)}
    faults = [f"{name}, {impl}: {wrong}" for name, entry in entries.items() for impl, wrong in entry["faults"].items()]
    times = ", ".join(f"{impl} {time:.3f} ms" for impl, time in sorted(ms.items(), key=lambda item: item[1]))
    best = min(ms, key=lambda impl: (ms[impl], impl == "reference"), default="reference")
    return Choice(best, "; ".join(filter(None, (times, *faults))))


def described(choices: Mapping[str, Choice]) -> str:
    """The fused operations, and why others are not."""
    # the parts of an operation are chosen on their own
    fused = [name for name, choice in choices.items() if choice.impl not in ("reference", "parts")]
    plain = [f"{name} ({choice.why})" for name, choice in choices.items() if choice.impl == "reference"]
    text = f"fused {', '.join(fused)}" if fused else "no fused operation"
    return text + (f"; as their reference: {', '.join(plain)}" if plain else "")
