"""Measures the time of a micro-step in each execution, for the gate, and of any work of training, for `python -m bench train`."""

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch

from nanochat.data.batches import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.platform.console import say
from nanochat.train.micro_step import MicroStep
from nanochat_kernels import gate

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


def milliseconds(
    run: Callable[[], object], count: int, device: torch.device, prepare: Callable[[], object] | None = None
) -> float:
    """The mean time of `count` calls on a device, started one after another without waiting for it.

    prepare: called before each of them, untimed; the host launches a call while the device prepares.
    """
    spans = []
    synchronize(device)
    for calls in [1] * count if prepare else [count]:
        if prepare:
            prepare()
        start = _moment(device)
        for _ in range(calls):
            run()
        spans.append((start, _moment(device)))
    synchronize(device)
    if device.type == "cuda":
        return sum(start.elapsed_time(end) for start, end in spans) / count
    return 1e3 * sum(end - start for start, end in spans) / count


def _moment(device: torch.device) -> torch.cuda.Event | float:
    """An event that a GPU reaches after the work so far, or else the time in seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its work; other devices have done it when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_executions(
    configs: Mapping[str, GPTConfig], rows: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """The median milliseconds of a micro-step of `rows` rows, by execution, each with its model.

    One that fails, as without memory or without a C compiler, is left out.
    """
    times = {}
    for execution, config in configs.items():
        try:
            times[execution] = _time(execution, config, rows, device, dtype)
        except Exception as error:  # whatever it fails with on this machine, the run continues without it
            say(f"micro-steps: {execution} is left out ({gate.reason_of(error)})")
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return times


def _time(execution: str, config: GPTConfig, rows: int, device: torch.device, dtype: torch.dtype) -> float:
    model, batch = trained_model(config, device, dtype), random_batch(config, rows)
    step = partial(MicroStep(model, MuonAdamW(model), execution, one_length=True), batch, 0.125)
    for _ in range(4):
        step()
    count = max(2, int(1e3 * SECONDS / milliseconds(step, 2, device)))
    return median(milliseconds(step, count, device) for _ in range(SAMPLES))
