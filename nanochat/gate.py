"""The choice of `nanochat kernels gate`, and how training takes it."""

import kernels.gate
from nanochat.console import say
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.paths import Paths
from nanochat.runtime import Runtime


def run_shape(model: GPTConfig, rows: int) -> kernels.gate.RunShape:
    return kernels.gate.RunShape(
        rows, model.context_length, model.width, model.n_head, model.n_kv_head, model.vocab_size, model.depth
    )  # fmt: skip


def take_gate(paths: Paths, model: GPTConfig, rows: int, runtime: Runtime) -> None:
    """What training does first: take the choice of the gate where there is one, and say so.

    Raises UserError when it was made on another device, with other versions or for another shape.
    """
    if not paths.gate.exists():
        return
    try:
        line = kernels.gate.apply(
            paths.gate, kernels.gate.identity(run_shape(model, rows), runtime.device, runtime.compute_dtype)
        )
    except kernels.gate.GateError as error:
        raise UserError(str(error)) from error
    if runtime.primary:
        say(line)
