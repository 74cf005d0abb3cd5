"""Tokens/s and peak memory of training on the GPU here, eager and compiled, by implementation.

python -m bench.gpu_step --depth 20 --rows 16      prints a line of JSON for each
Micro-steps follow each other as in training, without waiting for the host; then whole steps of eight of them are timed.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise, product

import torch
import tyro

from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, Implementations
from nanochat.optim import MuonAdamW
from nanochat.runtime import start_runtime

MICRO_STEPS = 8  # of a step


@dataclass(frozen=True)
class GpuStepConfig:
    """Time forward + backward and the optimizer of a model on a GPU, its operations taken from `impl`."""

    depth: int = 20
    """blocks"""
    vocab_size: int = 65536
    """tokens of the vocabulary"""
    rows: int = 16
    """rows of 2048 tokens at once"""
    impl: tuple[str, ...] = ("reference", "auto")
    """implementations of every operation, one after the other"""
    compiled: tuple[bool, ...] = (False, True)
    """without and with torch.compile"""
    repeats: int = 10
    """timed micro-steps and updates; the median counts"""


def elapsed(work: Callable[[], None], times: int) -> list[float]:
    """Milliseconds of each of several calls, one after the other, on the GPU."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def main(config: GpuStepConfig) -> None:
    with start_runtime("cuda") as runtime:
        for impl, compiled in product(config.impl, config.compiled):
            chosen = Implementations(**{f.name: impl for f in fields(Implementations)})
            shape = GPTConfig.from_depth(config.depth, config.vocab_size, impl=chosen)
            model = GPT.create(shape, runtime.device, runtime.compute_dtype)
            forward = torch.compile(model, dynamic=False) if compiled else model
            optimizer = MuonAdamW(model)
            tokens = torch.randint(config.vocab_size, (config.rows, shape.context_length + 1), device=runtime.device)
            torch.cuda.reset_peak_memory_stats()
            losses = []

            def micro_step(forward=forward, tokens=tokens, losses=losses) -> None:
                loss = forward(tokens[:, :-1], tokens[:, 1:])
                loss.backward()
                losses.append(loss.detach())

            def update(optimizer=optimizer) -> None:
                optimizer.synchronize()
                optimizer.update(1.0, 0.9)

            for _ in range(3):
                micro_step(), update()
            micro = elapsed(micro_step, config.repeats)
            updates = elapsed(update, config.repeats)
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(MICRO_STEPS):
                micro_step()
            update()
            torch.cuda.synchronize()
            whole = time.perf_counter() - started
            times = sorted(micro)
            rate = tokens[:, 1:].numel() / statistics.median(times) * 1e3
            row = {
                "device": runtime.device_name,
                "depth": config.depth,
                "rows": config.rows,
                "impl": impl,
                "compiled": compiled,
                "micro_step_ms": statistics.median(times),
                "spread_ms": [times[0], times[-1]],
                "tokens_per_second": rate,
                "mfu": rate * shape.flops_per_token / runtime.peak_flops if runtime.peak_flops else None,
                "optimizer_ms": statistics.median(updates),
                "step_of_8_ms": whole * 1e3,
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                "first_loss": losses[0].item(),
                "last_loss": losses[-1].item(),
                "torch": torch.__version__,
            }
            print(json.dumps(row), flush=True)
            del model, forward, optimizer, micro_step, update
            torch.cuda.empty_cache()


if __name__ == "__main__":
    try:
        main(tyro.cli(GpuStepConfig))
    except UserError as error:  # no GPU here
        sys.exit(f"bench.gpu_step: {error}")
