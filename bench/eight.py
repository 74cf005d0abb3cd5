"""What eight GPUs of one machine do, or as many as there are, in parts that each fit into minutes: python -m bench eight --parts loader

scaling    steps on 1, 2, 4, … GPUs: d20 fused and compiled, then d26 and d32 fused
speedrun   `nanochat speedrun` with a process on each GPU; in each stage of --kill one process is killed, and the command starts again
fewer      a checkpoint of that run's pretraining, resumed on half and on a quarter of the GPUs at the same time
evaluate   CORE and chat tasks with a process on each GPU and with one: right answers, and the speed-up
loader     tokens/s of each of as many loaders as GPUs that read local parquet files at once, beside what the GPUs take

A speedrun in which all six stages are killed starts Python 35 times. Each part writes --out/<part>.json. A part that does not end
within its --limit is interrupted, and the same command goes on with it: scaling and speedrun keep what they have in --out, also
the run. Training's own records tell how much time a thousand steps lose.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from bench.killed_run import KILLED, KilledRun
from bench.random_run import DATA, prose_run, random_run
from bench.ranks import Ranks, call
from bench.scaling import Case, ScalingConfig, cases, describe, measured
from nanochat.checkpoint import load_model
from nanochat.data.pretraining import TokenStream
from nanochat.data.shards import Shards
from nanochat.evaluate.chat import TASKS, chat_scores
from nanochat.evaluate.core import core_scores, load_bundle
from nanochat.options.evaluate import ChatTaskOptions
from nanochat.options.presets import PresetName
from nanochat.options.train import RunOptions
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import read_json, write_json
from nanochat.platform.paths import Paths
from nanochat.tokenizer.bpe import Tokenizer

Part = Literal["scaling", "speedrun", "fewer", "evaluate", "loader"]
LOADED_ROWS, LOADED_TOKENS = 32, 2048  # of a batch


@dataclass(frozen=True)
class EightConfig:
    """Measure what several GPUs do together, in parts."""

    parts: tuple[Part, ...] = get_args(Part)
    """scaling, speedrun, fewer, evaluate, loader"""
    gpus: int = 0
    """number of GPUs and of processes; 0: all that there are"""
    limit: float = 400
    """seconds for each part, without those of starting and ending, which may be 150"""
    out: Path = Path("build/eight")
    """folder for a file of each part, for the log of the speedrun, and for its base directory"""
    depth: tuple[int, ...] = (20, 26, 32)
    """scaling: blocks of the models: the first on all numbers of GPUs and beside the compiled plain model, the others on 1 and all"""
    rows: tuple[int, ...] = (16, 16, 8)
    """scaling: rows of a micro-batch for each of them"""
    preset: PresetName = "gpu"
    """speedrun, fewer: a preset with embedded data"""
    kill: tuple[str, ...] = KILLED
    """speedrun: stages in which a process is killed; a training stage between two saves, an evaluation after --evaluation-seconds"""
    evaluation_seconds: float = 8
    """speedrun: seconds of a processor that a process of an evaluation has taken when it is killed"""
    last: str = "report"
    """speedrun: stage to end with"""
    evaluated_depth: int = 20
    """evaluate: blocks of a model with random weights; 0: the model of the speedrun"""
    items: int = 200
    """evaluate: most items of each task"""
    max_tokens: int = 128
    """evaluate: tokens of an answer"""
    vocab_size: int = 65536
    """scaling, evaluate: size of the vocabulary"""
    tokens: int = 2048
    """scaling: tokens per row"""
    batches: int = 100
    """loader: batches of 32 × 2,048 tokens that each process makes"""
    device: str = "cuda"
    """cuda, or cpu to try the command out"""


@dataclass(frozen=True)
class Bench:
    """What all parts need."""

    config: EightConfig
    command: str
    gpus: int
    deadline: float

    @property
    def left(self) -> float:
        """Seconds until the part has to end."""
        return max(0.0, self.deadline - time.monotonic())

    def ranks(self, function, *arguments, processes: int, device: str) -> list[dict]:
        return Ranks(function, *arguments, processes=processes, device=device, limit=self.left).results()


def eight(config: EightConfig, command: str) -> None:
    """Run the parts and write a file for each. Raises UserError for options that cannot be measured."""
    unknown = [name for name in config.kill if name not in KILLED]
    if unknown:
        raise UserError(f"--kill {unknown[0]}: choose from {', '.join(KILLED)}")
    if not config.depth or len(config.rows) != len(config.depth):
        raise UserError(
            f"--rows has {len(config.rows)} numbers and --depth {len(config.depth)}; give at least one, and one for each depth"
        )
    header = call(describe, command, device=config.device)
    if "note" in header:
        raise UserError(f"this machine cannot be described: {header['note']}")
    gpus = config.gpus or header["gpus"]
    if gpus < 1 or (config.device == "cuda" and gpus > header["gpus"]):
        raise UserError(
            f"--gpus {gpus}: this machine has {header['gpus']} GPUs; give at least 1 and no more than it has"
        )
    for part in config.parts:
        started = time.monotonic()
        bench = Bench(config, command, gpus, started + config.limit)
        path = config.out / f"{part}.json"
        if part == "scaling":
            scale(bench, path)
        else:
            found = PARTS[part](bench)
            write_json(path, header | {"gpus": gpus, "seconds": time.monotonic() - started} | found)
        say(f"{part}: {time.monotonic() - started:.0f} s, {path}")


def scale(bench: Bench, path: Path) -> None:
    """Time steps, those of most GPUs first. What there is no time for is measured by the next call."""
    config = bench.config
    powers = [n for n in (1, 2, 4, 8, 16) if n < bench.gpus]
    shared = ScalingConfig(
        tokens=config.tokens,
        vocab_size=config.vocab_size,
        together=True,
        limit=bench.left,
        device=config.device,
        json=path,
    )
    chosen: list[Case] = []
    for number, (depth, rows) in enumerate(zip(config.depth, config.rows, strict=True)):
        variants = ("fused", "compile:reference") if number == 0 else ("fused",)
        counts = [*powers, bench.gpus] if number == 0 else sorted({1, bench.gpus})
        chosen += cases(replace(shared, depth=(depth,), gpus=tuple(counts), rows=rows, variants=variants))
    measured(chosen, shared, bench.command)


def killed_run(bench: Bench) -> KilledRun:
    config = bench.config
    paths = Paths(config.out.absolute() / "base", config.preset)
    return KilledRun(paths, config.preset, bench.gpus, config.device, config.out, bench.deadline)


def speedrun(bench: Bench) -> dict:
    """The whole speedrun, with a process killed in each stage that is to be killed."""
    config = bench.config
    return killed_run(bench).speedrun(config.kill, config.evaluation_seconds, config.last)


def fewer(bench: Bench) -> dict:
    """Pretraining resumed on half and on a quarter of the GPUs."""
    return killed_run(bench).fewer([n for n in (bench.gpus // 2, bench.gpus // 4) if n])


def evaluate(bench: Bench) -> dict:
    """CORE and chat tasks of a fine-tuned model, by all GPUs and by one."""
    config, rows = bench.config, []
    data = replace(DATA, questions=4 * config.items, tests=config.items)
    depth = config.evaluated_depth
    run = random_run(depth, config.vocab_size, data) if depth else nullcontext(killed_run(bench).paths)
    with run as paths:
        for count in sorted({bench.gpus, 1}, reverse=True):
            limits = config.items, config.max_tokens
            found = bench.ranks(evaluate_rank, paths, *limits, processes=count, device=config.device)[0]
            rows.append({"gpus": count, "depth": depth} | found)
            said = found.get("note") or f"CORE {found['core_s']:.1f} s, chat {found['chat_s']:.1f} s"
            say(f"evaluation on {count}: {said}")
    if any("note" in row for row in rows) or len(rows) == 1:
        return {"rows": rows}
    (many, one), kinds = rows, ("core", "chat")
    differences = {
        task: [many["right"][task], right] for task, right in one["right"].items() if many["right"][task] != right
    }
    return {
        "rows": rows,
        "differences": differences,
        "speed_up": {kind: one[f"{kind}_s"] / many[f"{kind}_s"] for kind in kinds},
    }


def evaluate_rank(runtime: Runtime, paths: Paths, items: int, max_tokens: int) -> dict:
    """Right answers of each task, and seconds, after a first evaluation that compiles kernels."""
    model, tokenizer, _ = load_model(paths, "sft", runtime)
    bundle, options = load_bundle(paths.eval_bundle), ChatTaskOptions(max_per_task=items, max_tokens=max_tokens)

    def core(most: int) -> list:
        return core_scores(model, tokenizer, bundle, runtime, most)

    def chat(most: int) -> list:
        return chat_scores(model, tokenizer, paths, runtime, replace(options, max_per_task=most), tuple(TASKS))[0]

    sizes = {task.label: len(task.items) for task in bundle} | {name: len(make(paths)) for name, make in TASKS.items()}
    found: dict = {"right": {}, "items": {task: min(size, items) for task, size in sizes.items()}}
    for name, run in (("core", core), ("chat", chat)):
        run(items)
        runtime.barrier()
        started = time.perf_counter()
        scores = run(items)
        runtime.barrier()
        found[f"{name}_s"] = time.perf_counter() - started
        found["right"] |= {score.task: round(score.accuracy * found["items"][score.task]) for score in scores}
    return found


def load(bench: Bench) -> dict:
    """Loaders of all GPUs at once, and the tokens/s that one GPU takes, where scaling measured it."""
    with prose_run(shards=1 + -(-bench.gpus // 4)) as paths:
        ranks = bench.ranks(load_rank, paths, bench.config.batches, processes=bench.gpus, device="cpu")
    if "note" in ranks[0]:
        return {"rows": ranks}
    rates = [row["tokens_per_second"] for row in ranks]
    measured = read_json(bench.config.out / "scaling.json", {"rows": [{"gpus": int, "depth": int}]}) or {"rows": []}
    takes = {
        f"d{row['depth']}": row["tokens_per_second"] / row["gpus"]
        for row in measured["rows"]
        if row["variant"] == "fused" and row["gpus"] == bench.gpus and "note" not in row
    }
    say(
        f"each loader gives {min(rates):,.0f} to {max(rates):,.0f} tokens/s; a GPU takes {takes or 'what scaling measures'}"
    )
    return {"cores": os.cpu_count(), "rows": ranks, "slowest_tokens_per_second": min(rates), "a_gpu_takes": takes}


def load_rank(runtime: Runtime, paths: Paths, batches: int) -> dict:
    """Tokens a second of this process's loader while all others load too."""
    tokenizer = Tokenizer.load(paths.tokenizer)
    with ThreadPoolExecutor(RunOptions().loader_threads) as pool:
        stream = TokenStream(Shards.of(paths, "train"), tokenizer, runtime.rank, runtime.world_size, pool)
        made: Iterator = stream.batches(LOADED_ROWS, LOADED_TOKENS)
        next(made)
        runtime.barrier()
        started, processor = time.perf_counter(), time.process_time()
        tokens = sum(batch.inputs.numel() for batch in islice(made, batches))
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
    return {"tokens_per_second": tokens / seconds, "tokens_per_processor_second": tokens / processor}


PARTS = {"speedrun": speedrun, "fewer": fewer, "evaluate": evaluate, "loader": load}
