"""Time training steps on several GPUs of this machine: python -m bench scaling --depth 20 --gpus 1 2 4 8

For each number of processes torchrun starts them; each computes as many rows as one alone, so that perfect scaling keeps the time of a
step. Tokens and weights are random, not zero, and steps follow each other as in training, which waits for the loss of each. The
slowest process counts. Of a step:
    micro      the micro-steps alone, without any exchange
    exchange   the gradients' exchange alone, with nothing beside it
    update     the exchange of the norm, the update of the owned parameters, and the gathering of all
    late       a step that exchanges the gradients after its last micro-step, in place of during it
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import tyro
from rich.table import Table

from bench.measure import header
from bench.variants import Training
from nanochat.gpt import GPTConfig
from nanochat.platform.console import say, show_table
from nanochat.platform.distributed import Runtime, start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat.train.timing import random_batch, synchronize

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 4  # steps before the first sample: graphs are captured in the second to fourth
COLUMNS = (
    "depth", "variant", "gpus", "step_ms", "late_ms", "micro_ms", "exchange_ms", "update_ms", "tokens_per_second", "mfu",
    "efficiency", "peak_gb",
)  # fmt: skip
OPTIONS = ("rows", "tokens", "micro_steps", "rounds", "steps", "vocab_size", "layers", "device")  # of each process


@dataclass(frozen=True)
class ScalingConfig:
    """Time steps on several GPUs, against one."""

    depth: tuple[int, ...] = (20,)
    """blocks of the models"""
    gpus: tuple[int, ...] = (1, 2)
    """numbers of processes, one on each GPU"""
    rows: int = 16
    """rows of a micro-batch"""
    tokens: int = 2048
    """tokens per row"""
    micro_steps: int = 1
    """micro-steps of a step"""
    variants: tuple[str, ...] = ("fused",)
    """variants to time, as in python -m bench train"""
    rounds: int = 5
    """samples"""
    steps: int = 6
    """steps of a sample"""
    vocab_size: int = 65536
    """size of the vocabulary"""
    layers: int = 0
    """number of blocks, if it differs from --depth, which still sets the width; 0: as many as --depth"""
    device: str = "cuda"
    """cuda, or cpu to try the command out"""
    json: Path | None = None
    """file for every sample"""


@dataclass(frozen=True)
class ProcessConfig:
    """Time the steps of one variant in this process, one of those of torchrun; the first one prints the result as JSON."""

    variant: str
    depth: int
    rows: int
    tokens: int
    micro_steps: int
    rounds: int
    steps: int
    vocab_size: int
    layers: int
    device: str


def scaling(config: ScalingConfig, command: str) -> None:
    """Start the processes of every depth, variant and number of GPUs, and print and write what they measure."""
    found = header(command, config.device == "cuda")
    for depth in config.depth:
        for variant in config.variants:
            alone = None
            for gpus in config.gpus:
                row = {"depth": depth, "variant": variant, "gpus": gpus, "rows_per_gpu": config.rows} | started(
                    config, depth, variant, gpus
                )
                if "note" not in row:
                    alone = alone or (gpus, row["tokens_per_second"])
                    row["efficiency"] = row["tokens_per_second"] / gpus / (alone[1] / alone[0])
                said = row.get("note") or f"{row['step_ms']:.2f} ms a step"
                say(f"d{depth} {variant} on {gpus}: {said}")
                found["rows"].append(row)
                if config.json:  # after each row, so that an interrupted run keeps its results
                    write_json(config.json, found)
    table = Table(*COLUMNS, box=None)
    for row in found["rows"]:
        table.add_row(*(shown(row.get(column, "")) for column in COLUMNS))
    show_table(table)


def shown(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def started(config: ScalingConfig, depth: int, variant: str, gpus: int) -> dict:
    """Return what `gpus` processes measure, or a note that says why they measured nothing."""
    options = {name: getattr(config, name) for name in OPTIONS} | {"variant": variant, "depth": depth}
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    done = subprocess.run([*torchrun, "-m", "bench.scaling", *arguments], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line or "error:" in line]
        return {"note": (lines or done.stderr.splitlines() or ["no message"])[0][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(config: ProcessConfig, runtime: Runtime) -> dict:
    """Return the medians of what this process and the others measure, and every sample of a step."""
    shape = GPTConfig.from_depth(config.depth, config.vocab_size, config.tokens)
    if config.layers:
        shape = GPTConfig(**shape.to_dict() | {"depth": config.layers})
    batch, micro_steps = random_batch(shape, config.rows), config.micro_steps
    training = Training(config.variant, shape, runtime.device, runtime.compute_dtype)
    exchanges = training.micro_step.exchanges

    def step(overlap: bool) -> None:
        training.micro_step.exchanges = exchanges and overlap
        training.step(batch, micro_steps)

    def micro() -> None:
        for _ in range(micro_steps):
            training.micro_step(batch, 1 / micro_steps)

    def exchange() -> None:
        if runtime.world_size > 1:
            training.optimizer.synchronize()

    def update() -> None:
        training.optimizer.exchanged = True
        training.update()

    parts: dict[str, Callable[[], None]] = {
        "step": lambda: step(True), "late": lambda: step(False), "micro": micro, "exchange": exchange, "update": update,
    }  # fmt: skip
    for _ in range(WARM_UP):
        for part in parts.values():
            training.fill_gradients()
            part()
    synchronize(runtime.device)
    samples: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(config.rounds):
        for name, part in parts.items():
            training.fill_gradients()
            synchronize(runtime.device)
            if runtime.world_size > 1:
                dist.barrier()
            synchronize(runtime.device)
            start = time.perf_counter()
            for _ in range(config.steps):
                part()
            synchronize(runtime.device)
            seconds = (time.perf_counter() - start) / config.steps
            samples[name].append(1e3 * max(runtime.gather(seconds)))
    found = {f"{name}_ms": median(values) for name, values in samples.items()}
    tokens = config.rows * config.tokens * micro_steps * runtime.world_size
    rate = 1e3 * tokens / found["step_ms"]
    peak = runtime.peak_flops
    return found | {
        "tokens_per_second": rate,
        "mfu": shape.flops_per_token * rate / (peak * runtime.world_size) if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if runtime.device.type == "cuda" else None,
        "samples": samples,
    }


def main(config: ProcessConfig) -> None:
    with start_runtime(config.device) as runtime:
        found = measure(config, runtime)
        if runtime.primary:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(ProcessConfig))
    except UserError as error:
        sys.exit(f"error: {error}")
