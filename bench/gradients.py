"""Are the gradients of a whole step within the error budget of the compute dtype? Forward and backward of all micro-steps, added up.

The plain operations in float64, one row at a time, are the oracle, and those in the compute dtype are the baseline, whose error sets
the budget of every parameter (kernels/oracle.py). The variant runs as in training, in a graph with sums in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from rich.table import Table
from torch import Tensor

from bench.measure import header
from bench.variants import Training, parse
from nanochat.data.batches import Batch
from nanochat.gpt import GPTConfig
from nanochat.options.ranges import AtLeast
from nanochat.platform.console import say, show_table
from nanochat.platform.distributed import start_runtime
from nanochat.platform.files import write_json
from nanochat.train.timing import random_batch
from nanochat_kernels.oracle import over_budget

PLAIN = "eager:reference"
SHOWN = 12  # parameters in the table, of which the variant's error is the largest beside the baseline's


@dataclass(frozen=True)
class GradientsConfig:
    """Compare the gradients of a step with those of the plain operations in float64."""

    depth: Annotated[int, AtLeast(1)] = 20
    """blocks of the model"""
    rows: Annotated[int, AtLeast(1)] = 4
    """rows of a micro-batch"""
    tokens: Annotated[int, AtLeast(1)] = 2048
    """tokens per row"""
    micro_steps: Annotated[int, AtLeast(1)] = 4
    """micro-steps of the step"""
    vocab_size: Annotated[int, AtLeast(1)] = 65536
    """size of the vocabulary"""
    variant: str = "fused"
    """what is judged: fused, or EXECUTION:IMPL"""
    device: str = "cuda"
    """cuda, or cpu to try the command out"""
    json: Path | None = None
    """file for the errors of every parameter"""


def gradients_of(
    text: str, shape: GPTConfig, batches: list[Batch], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The gradient of every parameter, in float32 on the host, of the mean loss of the batches."""
    training = Training(text, shape, device, dtype)
    # a graph is captured in the second pass, and replayed from the third on
    for _ in range(3 if parse(text).execution == "graph" else 1):
        for group in training.optimizer.groups:
            group.gradients.zero_()
        for batch in batches:
            training.micro_step(batch, 1 / len(batches))
    training.optimizer.synchronize()
    found = {name: parameter.grad.cpu().clone() for name, parameter in training.model.named_parameters()}
    del training
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def compare(
    found: dict[str, Tensor], oracle: dict[str, Tensor], baseline: dict[str, Tensor], device: torch.device
) -> Iterator[dict]:
    """Yield for each parameter the errors of the variant and of the baseline relative to the oracle's norm, and what is over budget."""
    for name, true in oracle.items():
        true, mine, plain = (x.to(device).double() for x in (true, found[name], baseline[name]))
        size = float(true.norm())
        wrong = over_budget(mine.float(), true, plain.float())
        errors = [float((x - true).norm()) / size if size else float(x.norm()) for x in (mine, plain)]
        yield {"parameter": name, "norm": size, "error": errors[0], "baseline_error": errors[1], "over_budget": wrong}


def gradients(config: GradientsConfig, command: str) -> bool:
    """Compute, compare, print and write the file; returns whether every parameter is within its budget."""
    with start_runtime(config.device) as runtime:
        made = header(command, runtime.device.type == "cuda")
        shape = GPTConfig.from_depth(config.depth, config.vocab_size, config.tokens)
        torch.manual_seed(0)
        batches = [random_batch(shape, config.rows) for _ in range(config.micro_steps)]
        rows = [
            Batch(batch.inputs[i : i + 1], batch.targets[i : i + 1], ())
            for batch in batches
            for i in range(config.rows)
        ]
        device, dtype = runtime.device, runtime.compute_dtype
        oracle = gradients_of(PLAIN, shape, rows, device, torch.float64)
        baseline = gradients_of(PLAIN, shape, batches, device, dtype)
        found = gradients_of(config.variant, shape, batches, device, dtype)
        made["rows"] = list(compare(found, oracle, baseline, device))
        ordered = sorted(made["rows"], key=lambda row: row["error"] / max(row["baseline_error"], 1e-30), reverse=True)
        table = Table("parameter", "relative error", "plain", "ratio", "over budget", box=None)
        for row in ordered[:SHOWN]:
            ratio = row["error"] / max(row["baseline_error"], 1e-30)
            table.add_row(
                row["parameter"], f"{row['error']:.2e}", f"{row['baseline_error']:.2e}", f"{ratio:.2f}",
                row["over_budget"] or "",
            )  # fmt: skip
        show_table(table)
        wrong = sum(bool(row["over_budget"]) for row in made["rows"])
        say(f"{wrong} of {len(made['rows'])} gradients are over the budget of {config.variant}")
        if config.json:
            write_json(config.json, made)
    return not wrong
