"""What each fused operation does to a compiled training step: python -m bench.ablation --depth 20 --layers 8 --json build/ablation.json

Models with every operation plain, with one fused, and with what auto takes, in one process; forward and backward follow
each other without waiting for the host, and the models take turns.
"""

import json
import statistics
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import tyro

from bench.gpu_step import elapsed
from bench.measure import header
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, Implementations
from nanochat.optim import MuonAdamW
from nanochat.runtime import start_runtime

ONE_BY_ONE = ("rms_norm", "qk_norm_rope", "linear_cross_entropy")


@dataclass(frozen=True)
class AblationConfig:
    """Time forward and backward of models that differ in one operation."""

    depth: int = 20
    """whose width"""
    layers: int = 8
    """blocks of the models, which are all held at once"""
    vocab_size: int = 65536
    """tokens of the vocabulary"""
    rows: int = 16
    """rows of 2048 tokens at once"""
    rounds: int = 15
    """samples of each model, two steps each"""
    json: Path | None = None
    """write every sample here"""


def main(config: AblationConfig) -> None:
    found = header(f"python -m bench.ablation {' '.join(sys.argv[1:])}".strip())
    operations = [field.name for field in fields(Implementations)]
    plain = Implementations(**dict.fromkeys(operations, "reference"))
    variants = {"reference": plain} | {name: replace(plain, **{name: "auto"}) for name in ONE_BY_ONE}
    variants["auto"] = Implementations()
    steps = {}
    with start_runtime("cuda") as runtime:
        shape = replace(GPTConfig.from_depth(config.depth, config.vocab_size), depth=config.layers)
        tokens = torch.randint(config.vocab_size, (config.rows, shape.context_length + 1), device=runtime.device)
        for name, impl in variants.items():
            model = GPT.create(replace(shape, impl=impl), runtime.device, runtime.compute_dtype)
            MuonAdamW(model)  # whose buffers and copies the model works with
            forward = torch.compile(model, dynamic=False)

            def step(forward=forward) -> None:
                forward(tokens[:, :-1], tokens[:, 1:]).backward()

            step(), step()
            steps[name] = step
        samples: dict[str, list[float]] = {name: [] for name in steps}
        names = list(steps)
        for number in range(config.rounds):
            for turn in range(len(names)):
                name = names[(turn + number) % len(names)]
                steps[name]()
                samples[name].append(statistics.mean(elapsed(steps[name], 2)))
    rival = statistics.median(samples["reference"])
    for name, values in samples.items():
        ms, (low, _, high) = statistics.median(values), statistics.quantiles(values, n=4)
        row = {"fused": name, "ms": ms, "quartiles_ms": [low, high], "ratio_to_reference": ms / rival}
        found["rows"].append(row | {"samples_ms": values})
        print(f"{name:22} {ms:8.2f} ms ({low:.2f} to {high:.2f}), {ms / rival:.3f} × reference", flush=True)
    if config.json:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    try:
        main(tyro.cli(AblationConfig))
    except UserError as error:  # no GPU here
        sys.exit(f"bench.ablation: {error}")
