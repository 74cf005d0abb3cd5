"""How training uses the implementations that `nanochat kernels gate` has chosen."""

import json
from dataclasses import asdict, fields, replace

from nanochat.gpt import GPTConfig
from nanochat.options.model import Implementations
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat_kernels import gate


def run_shape(model: GPTConfig, rows: int) -> gate.RunShape:
    """The sizes that the gate validates and times operations at; rows: of a micro-batch."""
    return gate.RunShape(
        rows, model.context_length, model.width, model.n_head, model.n_kv_head, model.vocab_size, model.depth
    )  # fmt: skip


def take_gate(paths: Paths, model: GPTConfig, rows: int, runtime: Runtime) -> GPTConfig:
    """Replace every "auto" in a model's implementations by the gate's choice, if there is a gate file, and print the choice.

    Raises UserError when the file was made on another device, with other versions or kernels, or for another shape.
    """
    if not paths.gate.exists():
        return model
    valid_for = gate.identity(run_shape(model, rows), runtime.device, runtime.compute_dtype)
    try:
        chosen = chosen_implementations(gate.read(paths.gate, valid_for))
    except gate.GateError as error:
        raise UserError(str(error)) from error
    if runtime.primary:
        fused = [name for name, impl in chosen.items() if impl != "reference"]
        say(f"kernels: the gate of {paths.gate} chose fused {', '.join(fused) or 'nothing'}")
    return with_choices(model, chosen)


def with_choices(model: GPTConfig, chosen: dict[str, str]) -> GPTConfig:
    """Replace every "auto" in a model's implementations by the choice for it."""
    automatic = {name: impl for name, impl in chosen.items() if getattr(model.impl, name) == "auto"}
    return replace(model, impl=replace(model.impl, **automatic))


def measured_executions(paths: Paths, impl: Implementations) -> dict[str, float] | None:
    """The gate's times of a micro-step, in milliseconds by execution; None if it has none for these implementations.

    The gate file must be one that `take_gate` has accepted.
    """
    if not paths.gate.exists():
        return None
    measured = json.loads(paths.gate.read_text("utf-8")).get("micro_step", {"impl": None})
    try:
        return dict(measured["ms"]) if measured["impl"] == asdict(impl) else None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{paths.gate} is not a gate file (micro_step: {error!r}); {gate.REMEDY}") from error


def chosen_implementations(choices: dict[str, str]) -> dict[str, str]:
    """The gate's choices by operation, as choices for the fields of Implementations.

    A field that stands for several operations gets a fused implementation only when the gate chose the same one for all of them,
    else the reference. A field with an operation that the gate did not judge is left out.
    """
    chosen = {}
    for field in fields(Implementations):
        names = {choices.get(operation) for operation in Implementations.operations(field.name)}
        if None not in names:
            chosen[field.name] = names.pop() if len(names) == 1 else "reference"
    return chosen
