"""Measures the time of a micro-step in each execution, for the gate and for bench/training_step.py."""

import gc
from collections.abc import Mapping
from statistics import median

import torch

from nanochat.data.batches import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.platform.console import say
from nanochat.train.micro_step import MicroStep

SAMPLES, SECONDS = 5, 0.25  # number of samples, and the length of each


def trained_model(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> GPT:
    """A model with random weights in place of the zeros of a new model, with which a GPU would use less power and less time."""
    model = GPT.create(config, device, dtype)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5 * parameter.size(1) ** -0.5, generator=generator)
    return model


def random_batch(config: GPTConfig, rows: int) -> Batch:
    """A batch of random tokens, as long as the model's context."""
    tokens = torch.randint(config.vocab_size, (rows, config.context_length + 1))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), ())


def milliseconds(step: MicroStep, batch: Batch, count: int) -> float:
    """The mean time of `count` micro-steps on the GPU, started one after another without waiting for the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        step(batch, 0.125)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count


def time_executions(
    configs: Mapping[str, GPTConfig], rows: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """The median milliseconds of a micro-step of `rows` rows, by execution, each with its model.

    One that runs out of memory is left out.
    """
    times = {}
    for execution, config in configs.items():
        try:
            times[execution] = _time(execution, config, rows, device, dtype)
        except torch.OutOfMemoryError as error:
            say(f"micro-steps: {execution} does not fit ({str(error).splitlines()[0]})")
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return times


def _time(execution: str, config: GPTConfig, rows: int, device: torch.device, dtype: torch.dtype) -> float:
    model, batch = trained_model(config, device, dtype), random_batch(config, rows)
    step = MicroStep(model, MuonAdamW(model), execution, one_length=True)
    for _ in range(4):
        step(batch, 0.125)
    count = max(2, int(1e3 * SECONDS / milliseconds(step, batch, 2)))
    return median(milliseconds(step, batch, count) for _ in range(SAMPLES))
