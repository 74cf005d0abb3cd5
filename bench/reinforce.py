"""Time reinforcement learning: python -m bench.reinforce --depth 20

A sample is an answer. A step samples answers, as many and as long as `nanochat train rl` does with the same preset, and updates the
weights by them. With random weights (--depth) every answer has the maximum of tokens and the reward 0: the update computes all that it
computes in training, but its gradients are zeros. Nothing is written to the run.
"""

import os
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import tyro

from bench.measure import header
from bench.random_run import run_to_measure
from nanochat.checkpoint import create_model, find_checkpoint
from nanochat.gate import take_gate
from nanochat.gpt import GPTConfig
from nanochat.inference.engine import Engine
from nanochat.optim import MuonAdamW
from nanochat.options.presets import PresetName, with_preset
from nanochat.options.ranges import AtLeast, check_ranges
from nanochat.options.train import TrainRlOptions
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime, start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat.platform.paths import Paths
from nanochat.tasks import GSM8K
from nanochat.train.micro_step import MicroStep, choose_execution
from nanochat.train.reinforce import Rollouts
from nanochat.train.schedules import full_momentum
from nanochat.train.timing import synchronize


@dataclass(frozen=True)
class ReinforceConfig:
    """Time the steps of reinforcement learning on one device: their sampling alone, and with the update."""

    run_name: str = "cpu"
    """run whose fine-tuned model is trained"""
    preset: PresetName | Literal[""] = ""
    """preset whose options of `nanochat train rl` are taken; by default the command's own defaults"""
    depth: Annotated[int, AtLeast(0)] = 0
    """blocks of a model with random weights that is trained in place of the run's; 0: the run's"""
    vocab_size: int = 65536
    """size of the vocabulary of the model with random weights"""
    steps: Annotated[int, AtLeast(1)] = 3
    """steps that are timed, after one that is not"""
    device: str = "auto"
    """cuda, cpu or auto"""
    json: Path | None = None
    """file for the results"""


def steps_of(paths: Paths, options: TrainRlOptions, count: int, runtime: Runtime) -> list[dict]:
    """Return of each step after the first one the seconds of its sampling and of all of it, its samples and their mean tokens."""
    path, tokenizer, meta = find_checkpoint(paths, options.source, runtime)
    shape, micro_step_ms = take_gate(
        paths, GPTConfig(**meta["config"], impl=options.impl), options.device_batch_size, runtime
    )
    execution, _ = choose_execution(options.run.execution, runtime.device, shape.impl, micro_step_ms)
    model = create_model(path, shape, runtime, meta)
    optimizer = MuonAdamW(model, options.optimizer)
    micro_step = MicroStep(model, optimizer, execution, one_length=False)
    rollouts = Rollouts(Engine(model, tokenizer), GSM8K(paths, "train"), options, options.examples_per_step, runtime)
    batches, found = rollouts.batches(0), []
    for step in range(count + 1):
        started = time.perf_counter()
        micro_batches = list(islice(batches, rollouts.micro_batches))
        targets = [int((batch.targets != -1).sum()) for batch in micro_batches]
        if not sum(targets):
            raise UserError(f"all answers of step {step} are empty, so that there is nothing to learn from them")
        for number, batch in enumerate(micro_batches, 1):
            micro_step(batch, targets[number - 1] / sum(targets), last=number == len(micro_batches))
        optimizer.synchronize()
        optimizer.update(options.init_lr_fraction, full_momentum(step))
        synchronize(runtime.device)
        samples = len(rollouts.rewards)
        found.append(
            {
                "step": step,
                "samples": samples,
                "sampling_s": rollouts.seconds,
                "step_s": time.perf_counter() - started,
                "answer_tokens": rollouts.tokens / samples,
                "load": os.getloadavg()[0],
            }
        )
    return found[1:]  # the first one compiles, and captures graphs


def main(config: ReinforceConfig) -> None:
    check_ranges(config)
    options = with_preset(TrainRlOptions(), "train rl", config.preset)
    with (
        run_to_measure(config.run_name, config.depth, config.vocab_size) as paths,
        start_runtime(config.device) as runtime,
    ):
        found = header(f"python -m bench.reinforce {' '.join(sys.argv[1:])}".strip(), runtime.device.type == "cuda")
        found["rows"] = rows = steps_of(paths, options, config.steps, runtime)
        rates = {name: median(row["samples"] / row[f"{name}_s"] for row in rows) for name in ("sampling", "step")}
        found["samples_per_second"] = rates
        tokens = median(row["answer_tokens"] for row in rows)
        say(
            f"steps of {options.examples_per_step} questions with {options.num_samples} answers each, of {tokens:,.1f} tokens: "
            f"{rates['sampling']:,.1f} samples/s while sampling ({rates['sampling'] * tokens:,.0f} tokens/s), "
            f"{rates['step']:,.1f} samples/s with the update"
        )
        if config.json:
            write_json(config.json, found)


if __name__ == "__main__":
    try:
        main(tyro.cli(ReinforceConfig))
    except UserError as error:
        sys.exit(f"bench.reinforce: {error}")
