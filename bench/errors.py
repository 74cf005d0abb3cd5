"""How far are results and gradients from float64? Every variant of an operation, its reference and other libraries, on random inputs.

The plain operation in float64, on the same inputs in the compute dtype, is the oracle. An error is the norm of a difference, divided
by the norm of what it should be; of several draws the root of the mean square.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from rich.table import Table
from torch import Tensor

from bench.cases import functions, measured
from bench.measure import header
from nanochat.options.ranges import AtLeast
from nanochat.platform.console import say, show_table
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat_kernels.dispatch import KernelRequestError
from nanochat_kernels.gate import in_float64, upstream_of
from nanochat_kernels.operation import Operation, Trial
from nanochat_kernels.oracle import evaluate


@dataclass(frozen=True)
class ErrorsConfig:
    """Print the errors of results and gradients relative to float64, for every variant."""

    op: tuple[str, ...] = ("linear_cross_entropy",)
    """these operations"""
    shape: str = "d20/8192"
    """name of the inputs, as `python -m bench --list` shows it"""
    impl: tuple[str, ...] = ()
    """only these variants"""
    draws: Annotated[int, AtLeast(1)] = 4
    """inputs that are drawn"""
    device: str = "cuda"
    """cuda, or cpu to try the command out"""
    json: Path | None = None
    """file for every error"""


def errors(config: ErrorsConfig, command: str) -> None:
    """Compute, print and write the file."""
    device = torch.device(config.device)
    made = header(command, device.type == "cuda")
    for name in config.op:
        operation = measured().get(name)
        if operation is None or config.shape not in operation.benchmark.shapes:
            shapes = f"; its shapes: {', '.join(operation.benchmark.shapes)}" if operation else ""
            raise UserError(
                f"there is no benchmark of {name} with the shape {config.shape}{shapes}; see python -m bench --list"
            )
        rows = list(errors_of(operation, config, device))
        made["rows"] += rows
        table = Table("variant", *rows[0]["errors"], title=f"{name} {config.shape}", title_justify="left", box=None)
        for row in rows:
            table.add_row(row["impl"], *(f"{error:.2e}" for error in row["errors"].values()))
        show_table(table)
    if config.json:
        write_json(config.json, made)
        say(f"wrote {config.json}")


def errors_of(operation: Operation, config: ErrorsConfig, device: torch.device) -> Iterator[dict]:
    """Yield for each variant that serves the call its errors, by the name of the result."""
    benchmark, variants, squares = operation.benchmark, functions(operation), {}
    for draw in range(config.draws):
        torch.manual_seed(draw)
        inputs = benchmark.inputs(config.shape, torch.bfloat16, device)
        trial = Trial(inputs, differentiable=benchmark.differentiable, is_loss=benchmark.is_loss)
        upstream = upstream_of(trial, variants["eager"])
        above = [x.double() for x in upstream]
        oracle = evaluate(variants["eager"], [in_float64(x) for x in inputs], above, trial.differentiable)
        for impl, function in variants.items():
            if impl in benchmark.bounds or (config.impl and impl not in config.impl):
                continue
            given = [x.clone() if isinstance(x, Tensor) else x for x in inputs]  # a library may overwrite them
            try:
                found = evaluate(function, given, upstream, trial.differentiable)
            except KernelRequestError:
                continue
            errors = [float((a.double() - b).norm() / b.norm()) ** 2 for a, b in zip(found, oracle, strict=True)]
            squares.setdefault(impl, []).append(errors)
    names = [f"result {i}" for i in range(len(upstream))]
    names += [f"gradient of input {i}" for i in benchmark.differentiable]
    for impl, drawn in squares.items():
        means = [(sum(each) / len(each)) ** 0.5 for each in zip(*drawn, strict=True)]
        yield {
            "op": operation.name,
            "shape": config.shape,
            "impl": impl,
            "errors": dict(zip(names, means, strict=True)),
        }
