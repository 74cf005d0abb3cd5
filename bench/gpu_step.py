"""Tokens/s and peak memory of one training step on the GPU here, eager and compiled, by implementation.

python -m bench.gpu_step --depth 20 --rows 16      prints a line of JSON for each
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass, fields
from itertools import product

import torch
import tyro

from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, Implementations
from nanochat.optim import MuonAdamW
from nanochat.runtime import start_runtime


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
    """timed steps; the median counts"""


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
            micro, update, losses = [], [], []
            for _ in range(3 + config.repeats):
                torch.cuda.synchronize()
                started = time.perf_counter()
                loss = forward(tokens[:, :-1], tokens[:, 1:])
                loss.backward()
                torch.cuda.synchronize()
                middle = time.perf_counter()
                optimizer.synchronize()
                optimizer.update(1.0, 0.9)
                torch.cuda.synchronize()
                micro.append(middle - started), update.append(time.perf_counter() - middle), losses.append(loss.item())
            times = sorted(micro[3:])
            rate = tokens[:, 1:].numel() / statistics.median(times)
            row = {
                "device": runtime.device_name,
                "depth": config.depth,
                "rows": config.rows,
                "impl": impl,
                "compiled": compiled,
                "micro_step_ms": statistics.median(times) * 1e3,
                "spread_ms": [times[0] * 1e3, times[-1] * 1e3],
                "tokens_per_second": rate,
                "mfu": rate * shape.flops_per_token / runtime.peak_flops if runtime.peak_flops else None,
                "optimizer_ms": statistics.median(update[3:]) * 1e3,
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "torch": torch.__version__,
            }
            print(json.dumps(row), flush=True)
            del model, forward, optimizer, loss
            torch.cuda.empty_cache()


if __name__ == "__main__":
    try:
        main(tyro.cli(GpuStepConfig))
    except UserError as error:  # no GPU here
        sys.exit(f"bench.gpu_step: {error}")
