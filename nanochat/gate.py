"""How training uses the implementations that `nanochat kernels gate` has chosen."""

import json
from dataclasses import asdict, fields, replace

from nanochat.gpt import GPTConfig
from nanochat.options.model import Implementations
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.platform.shapes import check_shape
from nanochat_kernels import gate


def run_shape(model: GPTConfig, rows: int) -> gate.RunShape:
    """The sizes that the gate validates and times operations at; rows: of a micro-batch."""
    return gate.RunShape(
        rows, model.context_length, model.width, model.n_head, model.n_kv_head, model.vocab_size, model.depth
    )  # fmt: skip


def take_gate(
    paths: Paths, model: GPTConfig, rows: int, runtime: Runtime, deterministic: bool = False
) -> tuple[GPTConfig, dict[str, float] | None]:
    """Replace every "auto" in a model's implementations by the gate's choice, if there is a gate file, and print the choice.

    deterministic: on CUDA take attention that repeats bit for bit, whatever the gate chose.

    Returns the new configuration and the gate's times of its micro-step, in milliseconds by execution; None if the gate has not
    timed these implementations. Raises UserError when the file was made on another device, with other versions or kernels, or for
    another shape, and when no attention repeats: another is named, or the gate found Triton's wrong.
    """
    deterministic = deterministic and runtime.device.type == "cuda"
    if deterministic:
        model = replace(model, impl=model.impl.repeatable())
    if not paths.gate.exists():
        return model, None
    valid_for = gate.identity(run_shape(model, rows), runtime.device, runtime.compute_dtype)
    try:
        choices, faults, more = gate.read(paths.gate, valid_for)
    except gate.GateError as error:
        raise UserError(str(error)) from error
    wrong = faults.get("attention", {}).get("triton")
    if deterministic and wrong:
        raise UserError(
            f"--deterministic needs Triton's attention, which {paths.gate} rejects: {wrong}; leave --deterministic out"
        )
    chosen = chosen_implementations(choices)
    if runtime.primary:
        # the parts of an operation are chosen on their own
        fused = [name for name, impl in chosen.items() if impl not in ("reference", "parts")]
        say(f"kernels: the gate of {paths.gate} chose fused {', '.join(fused) or 'nothing'}")
    model = with_choices(model, chosen)
    timed = more.get("micro_step", {"impl": None, "ms": {}})
    try:
        check_shape(timed, {"impl": object, "ms": {str: float}}, "micro_step")
    except UserError as error:
        raise UserError(f"{paths.gate} is not a gate file ({error}); {gate.REMEDY}") from error
    return model, dict(timed["ms"]) if timed["impl"] == asdict(model.impl) else None


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


def with_choices(model: GPTConfig, chosen: dict[str, str]) -> GPTConfig:
    """Replace every "auto" in a model's implementations by the choice for it."""
    automatic = {name: impl for name, impl in chosen.items() if getattr(model.impl, name) == "auto"}
    return replace(model, impl=replace(model.impl, **automatic))


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
