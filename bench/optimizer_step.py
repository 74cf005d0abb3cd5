"""Time a whole optimizer step on this GPU: python -m bench.optimizer_step --depth 20 --json build/optimizer_step.json

Variants: the fused step replayed from CUDA graphs as in training, and launched; the plain formulas compiled by torch.compile on
batches of all matrices of a shape, launched and replayed; and the plain loop over matrices. The gradients are random. GPU time is
measured with a cold cache and variants that take turns. Host time is the time to launch a step on an idle GPU.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
import tyro

from bench.measure import header
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import ADAM_BETAS, ADAM_EPS, MatrixGroup, MuonAdamW, RowGroup
from nanochat.options.model import Implementations
from nanochat.platform.cuda_graphs import Replayed
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat_kernels import reference
from nanochat_kernels.timing import interleaved


@dataclass(frozen=True)
class OptimizerStepConfig:
    """Time the optimizer: the fused step, and the plain formulas compiled on batches."""

    depth: int = 20
    """blocks of the model"""
    vocab_size: int = 65536
    """size of the vocabulary"""
    rounds: int = 15
    """samples of each variant"""
    variants: tuple[str, ...] = ("graph", "launched", "compiled", "compiled_graph", "loop")
    """variants to time"""
    json: Path | None = None
    """file for every sample"""


class CompiledPlain:
    """The reference formulas on the groups of an optimizer, each group compiled as one batch."""

    def __init__(self, optimizer: MuonAdamW, graph: bool):
        self.optimizer = optimizer
        self.muon, self.adamw = (torch.compile(f, dynamic=False) for f in (self._muon, self._adamw))
        self.work = Replayed(self._step, torch.cuda.graph_pool_handle() if graph else None, warm_up=3)

    def _muon(self, group: MatrixGroup, clip, momentum, rate) -> None:
        direction, _ = reference.nesterov_momentum(
            group.gradients, group.state["momentum"], clip, momentum, torch.bfloat16
        )
        factor = group.lr * math.sqrt(max(1, group.item_shape[0] / group.item_shape[1]))
        reference.apply_update(group.weights, reference.newton_schulz(direction), rate, factor, group.copies)

    def _adamw(self, group: RowGroup, clip, rate, biases) -> None:
        reference.adamw(
            group.weights, group.gradients, group.state["mean"], group.state["variance"], clip, rate, biases,
            group.lr, ADAM_BETAS, ADAM_EPS, group.copies,
        )  # fmt: skip

    @torch.no_grad()
    def _step(self) -> None:
        optimizer, schedule = self.optimizer, self.optimizer.schedule
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.gradients) for g in optimizer.groups]))
        schedule.clip.copy_((optimizer.options.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        for group in optimizer.matrix_groups:
            self.muon(group, schedule.clip, schedule.momentum, schedule.rate)
        for group in optimizer.row_groups:
            self.adamw(group, schedule.clip, schedule.rate, schedule.biases)
        for group in optimizer.groups:
            group.gradients.zero_()

    def __call__(self) -> None:
        self.optimizer.begin_step(1.0, 0.95)
        self.work()


def prepare(name: str, config: OptimizerStepConfig) -> tuple[MuonAdamW, Callable[[], None]]:
    impl = "triton" if name in ("graph", "launched") else "reference"
    shape = GPTConfig.from_depth(config.depth, config.vocab_size, impl=Implementations(optimizer=impl))
    optimizer = MuonAdamW(GPT.create(shape, "cuda", torch.bfloat16), graphs=name == "graph")
    if name.startswith("compiled"):
        return optimizer, CompiledPlain(optimizer, name == "compiled_graph")

    def step() -> None:
        optimizer.synchronize()
        optimizer.update(1.0, 0.95)

    return optimizer, step


def main(config: OptimizerStepConfig) -> None:
    found = header(f"python -m bench.optimizer_step {' '.join(sys.argv[1:])}".strip())
    variants = {name: prepare(name, config) for name in config.variants}

    def fill(optimizer: MuonAdamW) -> None:
        for group in optimizer.groups:
            group.gradients.normal_(std=1e-3)

    for optimizer, step in variants.values():
        for _ in range(5):
            fill(optimizer)
            step()
    samples = interleaved(
        {name: lambda _, s=step: s() for name, (_, step) in variants.items()},
        config.rounds,
        {name: lambda _, o=optimizer: fill(o) for name, (optimizer, _) in variants.items()},
    )
    for name, (optimizer, step) in variants.items():
        host = []
        for _ in range(config.rounds):
            fill(optimizer)
            torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            host.append((time.perf_counter() - started) * 1e3)
        ms, (low, _, high) = median(samples[name]), quantiles(samples[name], n=4)
        ratio = {other: ms / median(values) for other, values in samples.items() if other != name}
        row = {"depth": config.depth, "variant": name, "ms": ms, "quartiles_ms": [low, high], "host_ms": median(host)}
        found["rows"].append(row | {"ratio_to": ratio, "samples_ms": samples[name]})
        print(f"{name:15} {ms:8.2f} ms ({low:.2f} to {high:.2f}), host {median(host):.2f} ms  {ratio}", flush=True)
    if config.json:
        write_json(config.json, found)


if __name__ == "__main__":
    try:
        main(tyro.cli(OptimizerStepConfig))
    except UserError as error:  # no GPU here
        sys.exit(f"bench.optimizer_step: {error}")
