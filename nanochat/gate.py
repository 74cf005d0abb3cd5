"""The choice of `nanochat kernels gate`, and how training takes it."""

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
    return gate.RunShape(
        rows, model.context_length, model.width, model.n_head, model.n_kv_head, model.vocab_size, model.depth
    )  # fmt: skip


def take_gate(paths: Paths, model: GPTConfig, rows: int, runtime: Runtime) -> GPTConfig:
    """The model with the gate's choice in place of every "auto", where there is a gate file; says so.

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
    """The model with a choice in place of every "auto"."""
    taken = {name: impl for name, impl in chosen.items() if getattr(model.impl, name) == "auto"}
    return replace(model, impl=replace(model.impl, **taken))


def measured_executions(paths: Paths, impl: Implementations) -> dict[str, float] | None:
    """Milliseconds of a micro-step by execution, where the gate measured it with these implementations. For a gate file that
    `take_gate` has accepted."""
    if not paths.gate.exists():
        return None
    found = json.loads(paths.gate.read_text("utf-8")).get("micro_step", {})
    return found.get("ms") if found.get("impl") == asdict(impl) else None


def chosen_implementations(choices: dict[str, str]) -> dict[str, str]:
    """A choice for each field of Implementations. One that serves several operations takes a fused implementation only where the
    gate chose it for all of them; a field of which the gate says nothing is left out."""
    chosen = {}
    for field in fields(Implementations):
        of_field = {choices.get(operation) for operation in Implementations.operations(field.name)}
        if None not in of_field:
            chosen[field.name] = of_field.pop() if len(of_field) == 1 else "reference"
    return chosen
