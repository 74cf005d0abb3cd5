"""Time the engine on this GPU: python -m bench.engine --depth 20 --batches 1 8 64 256

A variant is WAY:IMPL: replay decodes from a CUDA graph, eager launches every kernel; IMPL is the implementation of attention, of
which reference is torch's. Weights and tokens are random, not zero. For each batch the variants take turns in one process, with
one cache, because several would not fit.
    first   from the call to the first token of all rows, whose prompts fill the cache: prefill, head and sampling
    token   from one token of all rows to the next, of which host is what the step's kernels, from a graph without a pause, do not take
    MBU     bytes of weights, keys and values that a token needs, per second, of what a copy moves per second on this GPU
"""

import gc
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import torch
import tyro

from bench.measure import COPY_BYTES, header
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.cache import KVCache
from nanochat.inference.decoder import Decoder
from nanochat.inference.sampling import Sampler
from nanochat.options.model import Implementations
from nanochat.platform.distributed import start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat.train.timing import trained_model
from nanochat_kernels.timing import Graph, interleaved


@dataclass(frozen=True)
class EngineConfig:
    """Time prefill and decoding, variant by variant."""

    depth: int = 20
    """blocks of the model"""
    batches: tuple[int, ...] = (1, 8, 64, 256)
    """rows that are decoded together"""
    cached: int = 2000
    """tokens of each prompt"""
    steps: int = 24
    """tokens to decode in each turn"""
    turns: int = 3
    """turns of each variant"""
    top_k: int = 50
    """tokens to sample from; 0 takes the most likely one"""
    vocab_size: int = 65536
    """size of the vocabulary"""
    variants: tuple[str, ...] = ("replay:triton", "replay:reference", "eager:reference")
    """variants to time, as WAY:IMPL"""
    json: Path | None = None
    """file for every sample"""


class Run:
    """A variant at a batch: `prefill` fills the cache with prompts, `decode` decodes some tokens. Variants share the cache's memory."""

    def __init__(self, variant: str, model: GPT, memory: KVCache, config: EngineConfig):
        way, _, impl = variant.partition(":")
        if way not in ("replay", "eager"):
            raise UserError(f"{variant}: the way is replay or eager, and then an implementation of attention")
        for block in model.blocks:
            block.attention.config = replace(model.config, impl=Implementations(attention=impl))
        self.model, self.rows, self.config, self.impl = model, len(memory.lengths), config, impl
        replay, device, rows = way == "replay", model.device, self.rows
        cache = KVCache(memory.keys, memory.values, torch.zeros_like(memory.lengths), replay)
        sampler = Sampler(rows, config.vocab_size, 1.0 if config.top_k else 0.0, config.top_k or None, device)
        self.decoder = Decoder(model, cache, sampler, replay)
        self.decoder.generator = torch.Generator(device).manual_seed(0)
        self.prompts = torch.randint(config.vocab_size, (rows, config.cached), device=device)
        self.filled = 0
        self.tokens: list[int] = []

    def prefill(self) -> float:
        """Return the milliseconds to the first token."""
        self.use()
        torch.cuda.synchronize()
        started = time.perf_counter()
        cache = self.decoder.cache.every(1)
        hidden = self.model.hidden(self.prompts, cache)
        cache.advance(self.config.cached, self.config.cached)
        self.decoder.cache.repeat(1, self.config.cached)
        self.tokens = self.decoder.choose(self.model.logits(hidden[:, -1]))
        self.filled = self.config.cached
        return 1e3 * (time.perf_counter() - started)

    def decode(self, steps: int) -> list[float]:
        """Return the milliseconds of each token."""
        self.use()
        torch.cuda.synchronize()
        found = []
        for _ in range(steps):
            started = time.perf_counter()
            self.filled += 1
            self.tokens = self.decoder(self.tokens, [1] * self.rows, self.filled)  # waits for the GPU
            found.append(1e3 * (time.perf_counter() - started))
        return found

    def gpu(self) -> float:
        """Return the milliseconds that the kernels of a step take after each other: the last token again, which no row keeps."""
        self.use()
        self.decoder.given[1].zero_()
        step = Graph(lambda _: self.decoder.step.work())
        step(0)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for number in range(self.config.steps):
            step(number)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / self.config.steps

    def use(self) -> None:
        """Let the model, which all variants share, attend by this variant's implementation."""
        for block in self.model.blocks:
            block.attention.config = replace(self.model.config, impl=Implementations(attention=self.impl))


def bytes_of_token(model: GPT, rows: int, filled: int) -> float:
    """Return the bytes that a decoded token of all rows needs: the matrices once, and the keys and values of every row."""
    config = model.config
    matrices = config.num_parameters - config.vocab_size * config.width
    cached = 2 * config.depth * rows * filled * config.n_kv_head * config.head_width
    return model.compute_dtype.itemsize * (matrices + cached)


def measure(model: GPT, rows: int, config: EngineConfig, copy_rate: float) -> list[dict]:
    """Return a row of results for each variant, or one that says why it has none."""
    runs, found = {}, {name: {"variant": name, "rows": rows} for name in config.variants}
    capacity, memory = config.cached + max(config.steps, 4) + 1, None
    for name in config.variants:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            memory = memory or KVCache.create(model.config, rows, capacity, model.device, model.compute_dtype)
            runs[name] = Run(name, model, memory, config)
            runs[name].prefill()
            runs[name].decode(4)  # compiles, and captures the graph
            found[name] |= {"first_ms": [], "token_ms": []}
        except (torch.OutOfMemoryError, ValueError) as error:
            found[name]["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            runs.pop(name, None)
    names = list(runs)
    for turn in range(config.turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else ():
            found[name]["first_ms"].append(runs[name].prefill())
            found[name]["token_ms"] += runs[name].decode(config.steps)[2:]
    for name in names:
        row = found[name]
        ms = median(row["token_ms"])
        moved = bytes_of_token(model, rows, config.cached + config.steps // 2)
        row |= {
            "gpu_ms": runs[name].gpu(),
            "tokens_per_second": 1e3 * rows / ms,
            "mbu": moved / (1e-3 * ms) / copy_rate,
        }
    return list(found.values())


def report(rows: list[dict]) -> None:
    for row in rows:
        name = f"{row['rows']:>4} rows  {row['variant']:<18}"
        if "note" in row:
            print(f"{name} {row['note']}", flush=True)
            continue
        low, ms, high = quantiles(row["token_ms"], n=4)
        print(
            f"{name} first {median(row['first_ms']):9.2f} ms  token {ms:8.3f} ms ({low:.3f} to {high:.3f})  "
            f"host {ms - row['gpu_ms']:7.3f}  {row['tokens_per_second']:9,.0f} tokens/s  MBU {100 * row['mbu']:5.1f} %",
            flush=True,
        )


def bytes_copied_per_second(device: torch.device) -> float:
    """Return how many bytes a copy reads and writes per second."""
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPY_BYTES / median(interleaved({"copy": lambda _: target.copy_(source)}, 15)["copy"]) * 1e3


def main(config: EngineConfig) -> None:
    with start_runtime("cuda") as runtime, torch.inference_mode():
        found = header(f"python -m bench.engine {' '.join(sys.argv[1:])}".strip())
        copy_rate = found["copy_bytes_per_second"] = bytes_copied_per_second(runtime.device)
        shape = GPTConfig.from_depth(config.depth, config.vocab_size)
        model = trained_model(shape, runtime.device, torch.bfloat16)
        model.keep_copies()
        for rows in config.batches:
            results = measure(model, rows, config, copy_rate)
            report(results)
            found["rows"] += results
            if config.json:  # after each batch, so that an interrupted run keeps its results
                write_json(config.json, found)


if __name__ == "__main__":
    try:
        main(tyro.cli(EngineConfig))
    except UserError as error:  # no GPU here
        sys.exit(f"bench.engine: {error}")
