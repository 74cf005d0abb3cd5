"""Time training steps on several GPUs of this machine: python -m bench scaling --depth 20 --gpus 1 2 4 8

Each process computes as many rows as one alone, so that perfect scaling keeps the time of a step. Tokens and weights are random,
not zero, and steps follow each other as in training, which waits for the loss of each. The slowest process counts. Of a step:
    micro      the micro-steps alone, without any exchange
    exchange   the gradients' exchange alone, with nothing beside it
    update     all that follows the exchange: the norm, the update of the owned parameters, and the gathering of all
    early      a step that exchanges the gradients during its last micro-step, if that is replayed on several GPUs
    late       one that exchanges them after it; training does the one or the other (micro_step.EXCHANGES_EARLY)
Efficiency is the rate of a GPU over its rate with the fewest GPUs that were measured.
"""

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from rich.table import Table

from bench.measure import header
from bench.ranks import Ranks, call
from bench.variants import Training, parse
from nanochat.gpt import GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.platform.console import say, show_table
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import read_shape, write_json
from nanochat.train.timing import milliseconds, random_batch

ROW_LIMIT = 240  # seconds for the processes of a row of the result
WARM_UP = 4  # steps before the first sample: graphs are captured in the second to fourth
COLUMNS = (
    "depth", "variant", "gpus", "step_ms", "early_ms", "late_ms", "micro_ms", "exchange_ms", "update_ms", "tokens_per_second", "mfu",
    "efficiency", "peak_gb",
)  # fmt: skip


@dataclass(frozen=True)
class ScalingConfig:
    """Time steps on several GPUs, against those on the fewest."""

    depth: tuple[int, ...] = (20,)
    """blocks of the models"""
    gpus: tuple[int, ...] = (1, 2)
    """numbers of processes, one on each GPU"""
    rows: int = 16
    """rows of a micro-batch"""
    tokens: int = 2048
    """tokens per row"""
    micro_steps: int = 1
    """micro-steps of a step"""
    variants: tuple[str, ...] = ("fused",)
    """variants to time, as in python -m bench train; for several GPUs compile:reference is the compiled plain model"""
    rounds: int = 5
    """samples"""
    steps: int = 6
    """steps of a sample"""
    vocab_size: int = 65536
    """size of the vocabulary"""
    layers: int = 0
    """number of blocks, if it differs from --depth, which still sets the width; 0: as many as --depth"""
    together: bool = False
    """measure at the same time what fits on different GPUs, such as 4, 2 and 1 of eight; more GPUs come first"""
    limit: float = 540
    """seconds for all rows; what there is no time for, another call with the same file measures"""
    device: str = "cuda"
    """cuda, or cpu to try the command out"""
    json: Path | None = None
    """file for every sample; rows that it has from an earlier call with the same options are kept and not measured again"""


@dataclass(frozen=True)
class Case:
    """What is measured in one row of the result: a variant at a shape, on a number of GPUs."""

    depth: int
    variant: str
    gpus: int
    rows: int  # of a micro-batch on each GPU
    tokens: int
    micro_steps: int
    rounds: int
    steps: int
    vocab_size: int
    layers: int


def scaling(config: ScalingConfig, command: str) -> None:
    """Measure every depth, variant and number of GPUs, and print and write what was found. Raises UserError for options that cannot
    be measured, and for a file of another machine."""
    measured(cases(config), config, command)


def cases(config: ScalingConfig) -> list[Case]:
    """Every depth, variant and number of GPUs of the options, in this order. Raises UserError for an unknown variant."""
    for variant in config.variants:
        parse(variant)
    shared = {field.name: getattr(config, field.name) for field in fields(Case)[3:]}
    return [Case(*one, **shared) for one in product(config.depth, config.variants, config.gpus)]


def measured(chosen: list[Case], config: ScalingConfig, command: str) -> None:
    """Measure these cases as the other options say: together, limit, device and json."""
    ends = time.monotonic() + config.limit
    found = call(describe, command, device=config.device)
    if "note" in found:
        raise UserError(f"this machine cannot be described: {found['note']}")
    most = max(case.gpus for case in chosen)
    available = found["gpus"] or most
    if most > available:
        raise UserError(f"--gpus {most}: this machine has {available}; give at most so many")
    if config.json and config.json.exists():
        found["rows"] = earlier(config.json, found)
    missing = [case for case in chosen if not any(asdict(case).items() <= row.items() for row in found["rows"])]
    for batch in batches(missing, available if config.together else 0):
        if (left := min(ROW_LIMIT, ends - time.monotonic())) < 0:
            say(f"no time is left for {' and '.join(name(case) for case, _ in batch)}")
            continue
        running = [
            Ranks(measure, case, processes=case.gpus, device=config.device, limit=left, first=first) for case, first in batch
        ]  # fmt: skip
        for (case, _), ranks in zip(batch, running, strict=True):
            row = asdict(case) | ranks.results()[0]
            said = row.get("note") or f"{row['step_ms']:.2f} ms a step"
            say(f"{name(case)}: {said}")
            found["rows"] = with_efficiency([*found["rows"], row])
            if config.json:  # after each row, so that an interrupted run keeps its results
                write_json(config.json, found)
    show_table(table(found["rows"]))


def name(case: Case) -> str:
    return f"d{case.depth} {case.variant} on {case.gpus}"


def describe(runtime: Runtime, command: str) -> dict:
    """The header of the result, with the number of GPUs and how they are joined: NV18 stands for 18 NVLinks, SYS for the processor's
    bus, as nvidia-smi says."""
    on_gpu = runtime.device.type == "cuda"
    gpus = torch.cuda.device_count() if on_gpu else 0
    peers = gpus > 1 and all(torch.cuda.can_device_access_peer(0, other) for other in range(1, gpus))
    return header(command, on_gpu) | {"gpus": gpus, "peer_access": peers, "links": links() if gpus > 1 else []}


def links() -> list[str]:
    """The kinds of links between GPUs in nvidia-smi's table of them; none where this program is missing."""
    try:
        shown = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return link_kinds(shown)


def link_kinds(shown: str) -> list[str]:
    """The kinds of links in the table that nvidia-smi topo -m printed: its lines GPU0, GPU1, … have a column for each of these."""
    lines = [line.split() for line in shown.splitlines()]
    rows = [words for words in lines if words and words[0].startswith("GPU") and "X" in words]
    return sorted({kind for words in rows for kind in words[1 : 1 + len(rows)]} - {"X"})


def earlier(path: Path, found: dict) -> list[dict]:
    """The rows that an earlier call measured. Raises UserError if the file is not of this machine and commit."""
    before = read_shape(path, {"device": str, "gpus": int, "commit": str, "rows": [{"depth": int, "gpus": int}]})
    for key in ("device", "gpus", "commit"):
        if before[key] != found[key]:
            raise UserError(
                f"{path} was measured with {key} {before[key]}, and this is {found[key]}; give another --json, or move it away"
            )
    return [row for row in before["rows"] if "note" not in row]


def batches(cases: Iterable[Case], gpus: int) -> Iterator[list[tuple[Case, int]]]:
    """Cases that are measured at the same time, each with its first GPU: those that fit on so many GPUs, or with 0 one after
    another."""
    batch, used = [], 0
    for case in sorted(cases, key=lambda case: -case.gpus) if gpus else cases:
        if batch and used + case.gpus > gpus:
            yield batch
            batch, used = [], 0
        batch.append((case, used))
        used += case.gpus
    if batch:
        yield batch


def with_efficiency(rows: list[dict]) -> list[dict]:
    """The rows, those that were measured with `efficiency` against the fewest GPUs of their depth and variant, `against`."""
    found = []
    for row in rows:
        alike = [other for other in rows if "note" not in other and _alike(other) == _alike(row)]
        if "note" not in row:
            least = min(alike, key=lambda other: other["gpus"])
            rate, of_least = (r["tokens_per_second"] / r["gpus"] for r in (row, least))
            row = row | {"efficiency": rate / of_least, "against": least["gpus"]}
        found.append(row)
    return found


def _alike(row: dict) -> tuple:
    return tuple(
        row.get(name) for name in ("depth", "variant", "rows", "tokens", "micro_steps", "vocab_size", "layers")
    )


def table(rows: list[dict]) -> Table:
    shown = Table(*COLUMNS, box=None)
    for row in rows:
        cells = {column: _cell(row.get(column)) for column in COLUMNS}
        if "note" in row:
            cells["step_ms"] = "none"  # the reason was said when it failed, and is in the file
        else:
            cells["efficiency"] += f" of {row['against']}"
        shown.add_row(*cells.values())
    return shown


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def measure(runtime: Runtime, case: Case) -> dict:
    """Return the medians of what this process and the others measure, and every sample of a step."""
    shape = GPTConfig.from_depth(case.depth, case.vocab_size, case.tokens)
    if case.layers:
        shape = GPTConfig(**shape.to_dict() | {"depth": case.layers})
    batch, micro_steps = random_batch(shape, case.rows), case.micro_steps
    training = Training(case.variant, shape, runtime.device, runtime.compute_dtype)
    chosen, can_be_early = training.micro_step.exchanges, training.micro_step.can_exchange

    def step(early: bool) -> None:
        training.micro_step.exchanges = early
        training.step(batch, micro_steps)

    def micro() -> None:
        for _ in range(micro_steps):
            training.micro_step(batch, 1 / micro_steps)

    def update() -> None:
        training.optimizer.exchanged = True
        training.update()

    parts: dict[
        str, tuple[Callable[[], None], Callable[[], None] | None]
    ] = {  # each with what comes before it, untimed
        **({"early": (partial(step, True), None)} if can_be_early else {}),
        "late": (partial(step, False), None),
        "micro": (micro, None),
        "exchange": (partial(exchange, training.optimizer), training.fill_gradients),
        "update": (update, training.fill_gradients),
    }
    for _ in range(WARM_UP):
        for part, prepare in parts.values():
            (prepare or training.fill_gradients)()
            part()
    samples: dict[str, list[float]] = {name: [] for name in parts}
    names = list(parts)
    for turn in range(case.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            part, prepare = parts[name]
            training.fill_gradients()
            runtime.barrier()
            samples[name].append(max(runtime.gather(milliseconds(part, case.steps, runtime.device, prepare))))
    samples["step"] = samples["early" if chosen else "late"]
    found = {f"{name}_ms": median(values) for name, values in samples.items()}
    tokens = case.rows * case.tokens * micro_steps * runtime.world_size
    rate = 1e3 * tokens / found["step_ms"]
    peak = runtime.peak_flops
    return found | {
        "tokens_per_second": rate,
        "mfu": shape.flops_per_token * rate / (peak * runtime.world_size) if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if runtime.device.type == "cuda" else None,
        "samples": samples,
    }


def exchange(optimizer: MuonAdamW) -> None:
    """Exchange the gradients, and nothing else of `synchronize`. With one process there is nothing to exchange."""
    if optimizer.world_size > 1:
        optimizer._exchange_rest()
        for group in optimizer.groups:
            group.arrive()
