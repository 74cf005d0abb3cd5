"""Time a whole optimizer step on the GPU here: python -m bench.optimizer_step --depth 20 --json build/optimizer_step.json

Random gradients; GPU time with a cold cache, variants taking turns; host time is the processor's to hand a step over.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
import tyro

from bench.measure import header
from kernels.timing import interleaved
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, Implementations
from nanochat.optim import MuonAdamW


@dataclass(frozen=True)
class OptimizerStepConfig:
    """Time the optimizer with fused kernels replayed from graphs, without graphs, and plainly, matrix by matrix."""

    depth: int = 20
    """blocks"""
    vocab_size: int = 65536
    """tokens of the vocabulary"""
    rounds: int = 15
    """samples of each variant"""
    json: Path | None = None
    """write every sample here"""


def main(config: OptimizerStepConfig) -> None:
    found = header(f"python -m bench.optimizer_step {' '.join(sys.argv[1:])}".strip())
    optimizers = {}
    for name, impl in {"graph": "triton", "eager": "triton", "reference": "reference"}.items():
        shape = GPTConfig.from_depth(config.depth, config.vocab_size, impl=Implementations(newton_schulz=impl))
        model = GPT.create(shape, "cuda", torch.bfloat16)
        optimizers[name] = MuonAdamW(model, graphs=name == "graph")

    def fill(optimizer: MuonAdamW) -> None:
        for group in optimizer.groups:
            group.gradients.normal_(std=1e-3)

    def step(optimizer: MuonAdamW) -> None:
        optimizer.synchronize()
        optimizer.update(1.0, 0.95)

    prepare = {name: lambda _, o=o: fill(o) for name, o in optimizers.items()}
    variants = {name: lambda _, o=o: step(o) for name, o in optimizers.items()}
    for name, optimizer in optimizers.items():
        for _ in range(4):
            prepare[name](0), step(optimizer)
    samples = interleaved(variants, config.rounds, prepare)
    for name, optimizer in optimizers.items():
        host = []
        for _ in range(config.rounds):
            fill(optimizer)
            torch.cuda.synchronize()
            started = time.perf_counter()
            step(optimizer)
            host.append((time.perf_counter() - started) * 1e3)
        ms, (low, _, high) = median(samples[name]), quantiles(samples[name], n=4)
        ratio = {rival: ms / median(values) for rival, values in samples.items() if rival != name}
        row = {"depth": config.depth, "impl": name, "ms": ms, "quartiles_ms": [low, high], "host_ms": median(host)}
        found["rows"].append(row | {"ratio_to": ratio, "samples_ms": samples[name]})
        print(f"{name:10} {ms:8.2f} ms ({low:.2f} to {high:.2f}), host {median(host):.2f} ms", flush=True)
    if config.json:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    try:
        main(tyro.cli(OptimizerStepConfig))
    except UserError as error:  # no GPU here
        sys.exit(f"bench.optimizer_step: {error}")
