"""Time training on this GPU: micro-steps, whole steps and the optimizer's update, fused and as a user would run it instead.

Variants take turns in one process, or, where they do not fit into the memory together, one after the other in every round. Tokens
and weights are random, not zero. Micro-steps and steps follow each other as in training, whose only wait is for the loss of a
step; host time is the time to launch the work on an idle device.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, TypeVar

import torch
from rich.table import Table

from bench.first_step import first_steps
from bench.measure import header
from bench.parity import loss_differences
from bench.variants import NAMES, Training, ablations, parse
from nanochat.data.batches import Batch
from nanochat.gpt import GPTConfig
from nanochat.options.ranges import AtLeast
from nanochat.platform.console import say, show_table
from nanochat.platform.distributed import Runtime, start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat.train.timing import milliseconds, random_batch, synchronize

T = TypeVar("T")
WARM_UP = 4  # calls before the first sample: graphs are captured in the second to fourth


@dataclass(frozen=True)
class TrainConfig:
    """Time micro-steps and whole optimizer steps, variant by variant."""

    depth: Annotated[tuple[int, ...], AtLeast(1)] = (20,)
    """blocks of the models"""
    rows: Annotated[tuple[int, ...], AtLeast(1)] = (16,)
    """rows of a micro-batch"""
    tokens: Annotated[tuple[int, ...], AtLeast(1)] = (2048,)
    """tokens per row"""
    measure: tuple[str, ...] = ("micro", "1", "8")
    """what is timed: micro (forward and backward of a micro-batch), a number (a whole step of so many micro-steps), update (what
    follows the last micro-step)"""
    variants: tuple[str, ...] = tuple(NAMES)
    """variants to time: fused, plain, compiled, peers, max-autotune, or EXECUTION:IMPL; the first is compared with the others"""
    ablate: bool = False
    """compare the first variant with those in which one operation is its reference"""
    loss_steps: Annotated[int, AtLeast(0)] = 0
    """training steps on the embedded data after which the losses of the variants are compared; 0: none"""
    first_step: bool = False
    """time the start of a run too, each variant in processes of its own, with empty and with warm caches"""
    rounds: Annotated[int, AtLeast(1)] = 7
    """samples of each variant"""
    seconds: Annotated[float, AtLeast(0)] = 0.25
    """length of a sample, in which the work is repeated as often as it fits, at least twice (a whole step: once)"""
    vocab_size: Annotated[int, AtLeast(1)] = 65536
    """size of the vocabulary"""
    layers: Annotated[int, AtLeast(0)] = 0
    """number of blocks, if it differs from --depth, which still sets the width; 0: as many as --depth"""
    device: str = "cuda"
    """cuda, or cpu to try the command out"""
    json: Path | None = None
    """file for every sample"""

    @property
    def all_variants(self) -> tuple[str, ...]:
        return tuple(ablations(self.variants[0])) if self.ablate else self.variants


class Subject:
    """A variant at a shape, warmed up, and what was noticed while it was."""

    def __init__(self, text: str, shape: GPTConfig, batch: Batch, runtime: Runtime):
        self.device, self.batch = runtime.device, batch
        on_gpu, before = self.device.type == "cuda", 0
        free(self.device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        self.training = Training(text, shape, self.device, runtime.compute_dtype)
        for _ in range(WARM_UP):
            self.work("1")()
        synchronize(self.device)
        self.facts = {
            "peak_gb": (torch.cuda.max_memory_allocated() - before) / 1e9 if on_gpu else None,
            "start_s": time.perf_counter() - started,
            "loss": self.training.micro_step.loss.item(),
        }

    def prepare(self) -> None:
        """Run once untimed, so that the allocator's cache has the blocks that this variant needs."""
        self.work("micro")()
        synchronize(self.device)

    def work(self, what: str) -> Callable[[], None]:
        if what == "micro":
            return partial(self.training.micro_step, self.batch, 0.125)
        if what == "update":
            return self.training.update
        return partial(self.training.step, self.batch, int(what))

    def milliseconds(self, what: str, count: int) -> float:
        prepare = self.training.fill_gradients if what == "update" else None
        return milliseconds(self.work(what), count, self.device, prepare)

    def host_milliseconds(self, what: str) -> float | None:
        """The time to launch the work on an idle device; None for a whole step, which waits for the device."""
        if what.isdecimal():
            return None
        times = []
        for _ in range(5):
            self.training.fill_gradients()
            synchronize(self.device)
            started = time.perf_counter()
            self.work(what)()
            times.append(1e3 * (time.perf_counter() - started))
        synchronize(self.device)
        return median(times)


class Subjects:
    """The variants at one shape: all kept if they fit into the memory together, else each built again whenever it is asked for."""

    def __init__(self, make: Callable[[str], Subject], device: torch.device):
        self.make, self.device = make, device
        self.kept: dict[str, Subject] = {}
        self.together = True
        self.notes: dict[str, str] = {}  # why a variant cannot be measured

    def use(self, text: str, function: Callable[[Subject], T]) -> T | None:
        """Call a function with a ready variant; None with a note if this fails, or does not fit into the memory even alone."""
        if text in self.notes:
            return None
        subject = None
        if not self.kept:  # nothing that runs needs what was compiled before
            torch._dynamo.reset()
            free(self.device)
        try:
            subject = self.kept.get(text) or self.make(text)
            if self.together:
                self.kept[text] = subject
            subject.prepare()
            before = refills(self.device)
            result = function(subject)
            if refills(self.device) == before or set(self.kept) <= {text}:
                return result
            note = "memory so short that the allocator gave its cache back while the work was timed"
        except torch.OutOfMemoryError as error:
            note = f"out of memory: {str(error).splitlines()[0][:120]}"
        except Exception as error:  # whatever a baseline fails with on this machine, the others are measured
            self.kept.pop(text, None)
            self.notes[text] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            return None
        others, subject = set(self.kept) - {text}, None
        self.kept.clear()
        if not others:
            self.notes[text] = note
            return None
        self.together = False
        result = self.use(text, function)
        self.together = text in self.notes  # if it does not fit even alone, the others may fit together
        if not self.together:
            say(
                f"the variants do not fit into the memory together: each is built again for every sample from {text} on"
            )
        return result


def refills(device: torch.device) -> int:
    """How often torch's allocator has given its cache back to the GPU because it needed other blocks, which takes long."""
    return torch.cuda.memory_stats()["num_alloc_retries"] if device.type == "cuda" else 0


def free(device: torch.device) -> None:
    synchronize(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class Record:
    """What is known of a variant: facts, and by what is measured the repetitions of a sample, host times and samples in ms."""

    facts: dict
    counts: dict[str, int] = field(default_factory=dict)
    host: dict[str, float | None] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)


def first_look(subject: Subject, text: str, config: TrainConfig) -> Record:
    """Measure what takes no turns, and how often the work fits into a sample."""
    record = Record(subject.facts)
    for what in config.measure:
        least = 1 if what.isdecimal() else 2
        record.counts[what] = max(least, int(1e3 * config.seconds / subject.milliseconds(what, least)))
        record.host[what], record.samples[what] = subject.host_milliseconds(what), []
    say(f"{text}: ready after {subject.facts['start_s']:.1f} s")
    return record


def samples_of(subject: Subject, record: Record) -> dict[str, float]:
    return {what: subject.milliseconds(what, count) for what, count in record.counts.items()}


def measure(shape: GPTConfig, rows: int, config: TrainConfig, runtime: Runtime) -> Iterator[dict]:
    """Yield a row of results for everything that is measured and each variant; one that cannot run has a note in place of times."""
    texts, batch = config.all_variants, random_batch(shape, rows)
    subjects = Subjects(lambda text: Subject(text, shape, batch, runtime), runtime.device)
    records = {text: subjects.use(text, partial(first_look, text=text, config=config)) for text in texts}
    for number in range(config.rounds):
        for turn in range(len(texts)):
            text = texts[(turn + number) % len(texts)]
            for what, ms in (subjects.use(text, partial(samples_of, record=records[text])) or {}).items():
                records[text].samples[what].append(ms)
    how = "together" if subjects.together else "built again for every sample"
    for what in config.measure:
        medians = {text: median(records[text].samples[what]) for text in texts if text not in subjects.notes}
        for text in texts:
            row = {
                "variant": text, "definition": NAMES.get(text, text), "measured": what,
                "depth": shape.width // 64 if config.layers else shape.depth, "width": shape.width, "rows": rows,
                "tokens": shape.context_length,
            }  # fmt: skip
            if text in medians:
                numbers = numbers_of(records[text], what, rows * shape.context_length, shape.flops_per_token, runtime)
                ratios = {other: medians[text] / ms for other, ms in medians.items() if other != text}
                yield row | numbers | {"ratio_to": ratios, "by_turns": how}
            else:
                yield row | {"ms": None, "note": subjects.notes[text]}


def numbers_of(record: Record, what: str, tokens: int, flops_per_token: float, runtime: Runtime) -> dict:
    """The numbers of a variant in one measurement. tokens: of a micro-step."""
    samples = record.samples[what]
    ms = median(samples)
    low, _, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    rate = None if what == "update" else 1e3 * tokens * (int(what) if what.isdecimal() else 1) / ms
    return {
        "ms": ms,
        "quartiles_ms": [low, high],
        "tokens_per_second": rate,
        "mfu": rate * flops_per_token / runtime.peak_flops if rate and runtime.peak_flops else None,
        "host_ms": record.host[what],
        **record.facts,
        "samples_ms": samples,
    }


def tables(rows: list[dict]) -> Iterator[Table]:
    """Yield a table for everything that was measured at a shape."""
    for what in dict.fromkeys(row["measured"] for row in rows):
        of_this = [row for row in rows if row["measured"] == what]
        first = of_this[0]
        titles = {"micro": "micro-step", "update": "update", "1": "step of 1 micro-step"}
        title = titles.get(what, f"step of {what} micro-steps")
        table = Table(
            title=f"{title} of d{first['depth']}, {first['rows']} × {first['tokens']}", box=None, title_justify="left"
        )
        speed = f"speed of {first['variant']} ÷ its"
        for name in ("variant", "ms", "quartiles", "tokens/s", "MFU", speed, "host ms", "GB", "start s"):
            table.add_column(name, justify="left" if name == "variant" else "right")
        for row in of_this:
            if row["ms"]:
                table.add_row(*cells(row, first))
        yield table


def cells(row: dict, first: dict) -> list[str]:
    low, high = row["quartiles_ms"]
    ratio = f"{1 / first['ratio_to'][row['variant']]:.3f}" if first["ms"] and row is not first else ""
    return [
        row["variant"],
        f"{row['ms']:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "",
        f"{row['mfu']:.1%}" if row["mfu"] else "",
        ratio,
        f"{row['host_ms']:.2f}" if row["host_ms"] is not None else "",
        f"{row['peak_gb']:.1f}" if row["peak_gb"] is not None else "",
        f"{row['start_s']:.1f}",
    ]


def train(config: TrainConfig, command: str) -> None:
    """Measure every shape, print the tables and write the file. Raises UserError for what cannot be measured."""
    for text in config.variants:
        parse(text)
    unknown = [
        what for what in config.measure if what not in ("micro", "update") and not (what.isdecimal() and int(what))
    ]
    if unknown or not config.measure:
        raise UserError(
            f"--measure takes micro, update or a number of micro-steps, got {' '.join(unknown) or 'nothing'}"
        )
    texts = config.all_variants
    if not texts or len(set(texts)) < len(texts):
        raise UserError(f"--variants must name at least one variant, each once, got {' '.join(texts) or 'none'}")
    # torch.compile must not give up after its eighth model or shape and run eagerly
    limits = torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True)
    with limits, start_runtime(config.device) as runtime:
        found = header(command, runtime.device.type == "cuda")

        def keep() -> None:  # after each part, so that an interrupted run keeps its results
            if config.json:
                write_json(config.json, found)

        for depth, rows, tokens in product(config.depth, config.rows, config.tokens):
            shape = GPTConfig.from_depth(depth, config.vocab_size, tokens)
            results = list(measure(replace(shape, depth=config.layers or depth), rows, config, runtime))
            for table in tables(results):
                show_table(table)
            for note in dict.fromkeys(f"{row['variant']}: {row['note']}" for row in results if not row["ms"]):
                say(note)
            found["rows"] += results
            keep()
        if config.loss_steps:
            found["loss_differences"] = loss_differences(texts, config.depth[0], config.loss_steps, runtime)
            keep()
        if config.first_step:
            found["first_steps"] = list(first_steps(texts, config))
            keep()
