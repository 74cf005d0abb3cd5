"""Time the engine: python -m bench.engine --measure steps users evaluation

    steps       on this GPU, with random weights and tokens that are not zero. A variant is WAY:IMPL: replay runs passes from a CUDA
                graph, eager launches every kernel; IMPL is the implementation of attention, of which reference is a product of
                plain PyTorch for each page (reference.paged_attention), not torch's attention.
                For each batch the variants take turns in one process, with one cache, because several would not fit.
                first   from the call to the first token of all rows, whose prompts fill the cache; and that time over the time of a
                        forward pass of training, with its loss and without gradients, for as many tokens, 16 rows at a time
                token   from one token of all rows to the next (p50, with quartiles, and p99), of which host is what the passes'
                        kernels, from a graph without a pause, do not take
                MBU     bytes of weights, keys and values that a token needs, per second, of what a copy moves per second
    users       tokens per second of so many users with a question each, together and one after the other
    evaluation  seconds for the word problems of a run, all given to the engine at once, in batches of which each waits for its last
                row, and one at a time; the answers must be equal

Users and evaluation are measured with the fine-tuned model of a run, on any device.
"""

import gc
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import tyro

from bench.measure import COPY_BYTES, header
from nanochat.checkpoint import load_model
from nanochat.evaluate.chat import TASKS
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.cache import KVCache
from nanochat.inference.decoder import PAGES, TOKEN
from nanochat.inference.engine import PAGE, Engine
from nanochat.options.model import Implementations
from nanochat.platform.distributed import start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat.platform.paths import base_paths
from nanochat.tokenizer.chat_format import render_prompt
from nanochat.train.timing import trained_model
from nanochat_kernels.timing import Graph, interleaved

FORWARD_ROWS = 16


@dataclass(frozen=True)
class EngineConfig:
    """Time the engine: its passes, many users at once, and an evaluation."""

    measure: tuple[Literal["steps", "users", "evaluation"], ...] = ("steps",)
    """what to time"""
    depth: int = 20
    """blocks of the model of steps"""
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
    run_name: str = "cpu"
    """run whose model serves users and evaluation"""
    users: tuple[int, ...] = (1, 8, 64)
    """users at the same time"""
    answer: int = 64
    """tokens of each answer"""
    items: int = 128
    """word problems"""
    device: str = "auto"
    """cuda, cpu or auto, for users and evaluation"""
    json: Path | None = None
    """file for every sample"""


class Run:
    """A variant at a batch: `prefill` fills the cache with prompts, `decode` decodes some tokens. Variants share the cache."""

    def __init__(self, variant: str, model: GPT, cache: KVCache, rows: int, config: EngineConfig):
        way, _, impl = variant.partition(":")
        if way not in ("replay", "eager"):
            raise UserError(f"{variant}: the way is replay or eager, and then an implementation of attention")
        self.model, self.rows, self.config, self.impl = model, rows, config, impl
        self.use()
        no_tokenizer = SimpleNamespace(special=lambda _: -1, bos=-1)  # answers do not end, and call no calculator
        self.engine = Engine(model, no_tokenizer, way == "replay")
        self.decoder = self.engine.decoder
        self.engine.cache = self.decoder.cache = cache
        self.pages = -(-(config.cached + max(config.steps, 4) + 3) // cache.page)
        self.prompts = torch.randint(config.vocab_size, (rows, config.cached)).tolist()

    def prefill(self) -> float:
        """Return the milliseconds to the first token."""
        self.use()
        torch.cuda.synchronize()
        started, page, chunks, rows = time.perf_counter(), self.decoder.cache.page, [], []
        for number, prompt in enumerate(self.prompts):
            row = self.engine.row(prompt, self.engine.positions, top_k=self.config.top_k or 1)
            row.pages = list(range(1 + number * self.pages, 1 + (number + 1) * self.pages))
            row.numbers[PAGES : PAGES + self.pages] = row.pages
            starts = range(0, len(prompt) - 1, page)
            chunks += [(prompt[s : min(s + page, len(prompt) - 1)], s, row.pages) for s in starts]
            row.numbers[TOKEN], row.length = prompt[-1], len(prompt) - 1
            rows.append(row)
        self.decoder.prefill(chunks)
        self.engine.running, self.engine.ahead = rows, None
        self.engine.step()
        return 1e3 * (time.perf_counter() - started)

    def decode(self, steps: int) -> list[float]:
        """Return the milliseconds of each token."""
        self.use()
        torch.cuda.synchronize()
        self.engine.step()  # what it waits for began before the clock
        found = []
        for _ in range(steps):
            started = time.perf_counter()
            self.engine.step()  # waits for the tokens
            found.append(1e3 * (time.perf_counter() - started))
        return found

    def gpu(self) -> float:
        """Return the milliseconds that the kernels of a step take after each other: those of its passes, with the last rows again."""
        self.use()
        [work] = [found[0].work for key, found in self.decoder.passes.items() if key[0] == "decode"]
        step = Graph(lambda _: work())
        step(0)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for number in range(self.config.steps):
            step(number)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / self.config.steps * -(-self.rows // self.decoder.size_for(self.rows, "rows"))

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


def forward_ms(model: GPT, rows: int, tokens: int) -> float:
    """Return the milliseconds of a forward pass of training for `rows` rows, FORWARD_ROWS at a time."""
    for block in model.blocks:  # not the attention of the variant before
        block.attention.config = model.config
    part = min(rows, FORWARD_ROWS)
    given = torch.randint(model.config.vocab_size, (part, tokens), device=model.device)
    samples = interleaved({"forward": Graph(lambda _: model(given, given))}, 5)["forward"]
    return median(samples) * rows / part


def measure(model: GPT, rows: int, config: EngineConfig, copy_rate: float) -> list[dict]:
    """Return a row of results for each variant, or one that says why it has none."""
    runs, found = {}, {name: {"variant": name, "rows": rows} for name in config.variants}
    cache = KVCache(model.config, PAGE[model.device.type], model.device, model.compute_dtype)
    for name in config.variants:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            run = Run(name, model, cache, rows, config)
            if cache.pages.count < rows * run.pages:
                cache.extend(rows * run.pages)
            for _ in range(3):  # compiles, and captures the graphs of the passes
                run.prefill()
            run.decode(4)
            runs[name] = run
            found[name] |= {"first_ms": [], "token_ms": []}
        except (torch.OutOfMemoryError, ValueError) as error:
            found[name]["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    names = list(runs)
    forward = None
    with suppress(torch.OutOfMemoryError):  # beside a large cache
        forward = forward_ms(model, rows, config.cached)
    for turn in range(config.turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else ():
            found[name]["first_ms"].append(runs[name].prefill())
            found[name]["token_ms"] += runs[name].decode(config.steps)[2:]
    for name in names:
        row = found[name]
        ms = median(row["token_ms"])
        moved = bytes_of_token(model, rows, config.cached + config.steps // 2)
        row |= {
            "forward_ms": forward,
            "token_ms_p50": ms,
            "token_ms_p99": float(np.percentile(row["token_ms"], 99)),
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
        forward = f" ({median(row['first_ms']) / row['forward_ms']:.2f} × forward)" if row["forward_ms"] else ""
        print(
            f"{name} first {median(row['first_ms']):9.2f} ms{forward}  "
            f"token {ms:8.3f} ms ({low:.3f} to {high:.3f}, p99 {row['token_ms_p99']:.3f})  host {ms - row['gpu_ms']:7.3f}  "
            f"{row['tokens_per_second']:9,.0f} tokens/s  MBU {100 * row['mbu']:5.1f} %",
            flush=True,
        )


def bytes_copied_per_second(device: torch.device) -> float:
    """Return how many bytes a copy reads and writes per second."""
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPY_BYTES / median(interleaved({"copy": lambda _: target.copy_(source)}, 15)["copy"]) * 1e3


def measure_users(engine: Engine, prompts: list[list[int]], config: EngineConfig) -> list[dict]:
    """Return tokens per second for each number of users. Answers do not end early, so that all have the same length."""
    stops, engine.stops = engine.stops, set()
    found = []
    for users in config.users:
        asked = [prompts[number % len(prompts)] for number in range(users)]
        ways = {"together": [asked], "one after the other": [[prompt] for prompt in asked]}
        row = {"users": users} | {way: [] for way in ways}
        for turn in range(config.turns + 1):
            for way, groups in ways.items():
                started = time.perf_counter()
                for group in groups:
                    engine.generate(group, config.answer, temperature=0.8, top_k=config.top_k or 1, seed=turn)
                if turn:  # the first one compiles, and captures graphs
                    row[way].append(users * config.answer / (time.perf_counter() - started))
        found.append(row | {"load": os.getloadavg()[0]})
        rates = [median(row[way]) for way in ways]
        print(
            f"{users:>4} users  {rates[0]:9,.0f} tokens/s together, {rates[1]:9,.0f} one after the other, "
            f"{rates[0] / rates[1]:5.1f} ×  (load {os.getloadavg()[0]:.1f})",
            flush=True,
        )
    engine.stops = stops
    return found


def measure_evaluation(engine: Engine, prompts: list[list[int]], config: EngineConfig) -> list[dict]:
    """Return the seconds of each way to answer the prompts."""
    found, answers = [], {}
    for name, size in (("at once", len(prompts)), ("in batches", engine.rows), ("one at a time", 1)):
        started, answers[name] = time.perf_counter(), []
        for first in range(0, len(prompts), size):
            answers[name] += engine.generate(prompts[first : first + size], 2 * config.answer, temperature=0.0)
        found.append({"way": name, "seconds": time.perf_counter() - started, "load": os.getloadavg()[0]})
        print(f"{len(prompts)} word problems {name}: {found[-1]['seconds']:.2f} s (load {found[-1]['load']:.1f})")
        assert answers[name] == answers["at once"], f"the answers {name} differ from those at once"
    return found


def main(config: EngineConfig) -> None:
    with start_runtime(config.device if "steps" not in config.measure else "cuda") as runtime, torch.inference_mode():
        on_gpu = runtime.device.type == "cuda"
        found = header(f"python -m bench.engine {' '.join(sys.argv[1:])}".strip(), on_gpu)
        if "steps" in config.measure:
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
        if {"users", "evaluation"} & set(config.measure):
            paths = base_paths(True).of_run(config.run_name)
            model, tokenizer, _ = load_model(paths, "sft", runtime)
            task = TASKS["GSM8K"](paths)
            prompts = [render_prompt(tokenizer, task[number]) for number in range(min(config.items, len(task)))]
            for name, measured in (("users", measure_users), ("evaluation", measure_evaluation)):
                if name in config.measure:
                    found[name] = measured(Engine(model, tokenizer), prompts, config)
        if config.json:
            write_json(config.json, found)


if __name__ == "__main__":
    try:
        main(tyro.cli(EngineConfig))
    except UserError as error:  # no GPU here
        sys.exit(f"bench.engine: {error}")
