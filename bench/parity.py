"""Does fused training learn what plain training learns? Both train from one seed on the same embedded data, by `nanochat train base`.

Rounding differs between them, and training magnifies it. So plain training runs several times: with micro-batches of all rows, of a
half and of a quarter of them, which add the same gradients in another order. The mean differences of their losses in each third of the
run are the band: that of the fused run from them must be no larger than the largest of theirs. On a GPU a compiled plain run, in which
roundings differ too, is shown beside it and judges nothing. The fused run's final weights must evaluate to the same numbers with fused
and with plain operations.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Annotated

from rich.table import Table

from bench.measure import header
from bench.variants import EXECUTIONS, OPTIONS, parse
from nanochat.evaluate.base import evaluate_base
from nanochat.options.data import GenerateOptions
from nanochat.options.evaluate import EvaluateBaseOptions
from nanochat.options.model import Implementations
from nanochat.options.ranges import AtLeast
from nanochat.options.tokenizer import TokenizerTrainOptions
from nanochat.options.train import RunOptions, TrainBaseOptions
from nanochat.platform.console import say, show_table
from nanochat.platform.distributed import Runtime, start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import json_lines, write_json
from nanochat.platform.paths import Paths
from nanochat.synthetic.generate import generate
from nanochat.tokenizer.training import train_tokenizer
from nanochat.train.pretrain import pretrain

PLAIN = Implementations(**dict.fromkeys(OPTIONS, "reference"))
COMPILED = "plain, compiled"
PARTS = ("first third", "second third", "last third")
BITS, ACCURACY = 1e-3, 1e-2  # how far evaluations of the same weights may differ: bits per byte; accuracies and CORE


@dataclass(frozen=True)
class ParityConfig:
    """Compare the losses of fused and of plain training, and evaluations of the same weights."""

    depth: Annotated[int, AtLeast(1)] = 4
    """blocks of the model"""
    steps: Annotated[int, AtLeast(3)] = 1000
    """training steps of each run"""
    rows: int = 16
    """rows of a step, a multiple of 4"""
    tokens: Annotated[int, AtLeast(1)] = 512
    """tokens per row"""
    vocab_size: Annotated[int, AtLeast(1)] = 4096
    """size of the vocabulary, which is learned from the embedded text"""
    variant: str = "fused"
    """what is compared with plain training: fused, or EXECUTION:IMPL"""
    shards: Annotated[int, AtLeast(1)] = 4
    """shards of the embedded text, of 4,096 documents each"""
    eval_tokens: Annotated[int, AtLeast(1)] = 131072
    """tokens of each split on which bits per byte are measured"""
    core_items: Annotated[int, AtLeast(1)] = 100
    """items of each CORE task"""
    device: str = "cuda"
    """cuda, or cpu to try the command out"""
    json: Path | None = None
    """file for every loss"""


class EmbeddedRuns:
    """Trainings on one set of embedded data, with one tokenizer, each in a run of its own."""

    def __init__(self, config: ParityConfig, folder: Path, runtime: Runtime):
        self.config, self.runtime, self.paths = config, runtime, Paths(folder)
        self.data = self.paths.of_run("data")
        generate(GenerateOptions(shards=config.shards, tests=config.core_items), self.data)
        train_tokenizer(TokenizerTrainOptions(vocab_size=config.vocab_size), self.data)

    @contextmanager
    def trained(self, impl: Implementations, execution: str, micro_rows: int) -> Iterator[tuple[Paths, list[float]]]:
        """Train, and give the block the run's paths and the loss of every step; the run is removed after the block."""
        config, paths = self.config, self.paths.of_run("trained")
        for name in ("embedded", "tokenizer"):
            shutil.copytree(self.data.run / name, paths.run / name)
        options = TrainBaseOptions(
            run_name=paths.run_name, depth=config.depth, context_length=config.tokens, num_iterations=config.steps,
            device_batch_size=micro_rows, total_batch_size=config.rows * config.tokens, eval_every=-1, core_metric_every=-1,
            sample_every=-1, impl=impl, run=RunOptions(device=self.runtime.device.type, execution=execution, save_every=0),
        )  # fmt: skip
        try:
            pretrain(options, paths, self.runtime)
            records = [record for _, record in json_lines(paths.metrics("base"))]
            yield paths, [record["loss"] for record in records if "loss" in record]
        finally:
            shutil.rmtree(paths.run)

    def losses(self, impl: Implementations, execution: str, micro_rows: int) -> list[float]:
        """Train; returns the loss of every step."""
        with self.trained(impl, execution, micro_rows) as (_, losses):
            return losses


def differences(one: list[float], other: list[float]) -> list[float]:
    """The mean difference between two runs' losses in each third of the steps."""
    if len(one) != len(other):
        raise ValueError(f"runs of {len(one)} and {len(other)} steps cannot be compared")
    gaps = [abs(a - b) for a, b in zip(one, other, strict=True)]
    cuts = [round(len(gaps) * i / 3) for i in range(4)]
    return [mean(gaps[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def band(plain: list[list[float]], found: list[float], beside: list[float] | None = None) -> list[dict]:
    """For each third of the steps: the differences among plain runs, those of the run that is judged from them, the verdict, and
    the differences of a run from them that is only shown beside."""
    among = [differences(a, b) for a, b in combinations(plain, 2)]
    from_them, of_beside = ([differences(run, other) for other in plain] if run else [] for run in (found, beside))
    return [
        {
            "steps": PARTS[part],
            "plain": [pair[part] for pair in among],
            "found": [pair[part] for pair in from_them],
            "beside": [pair[part] for pair in of_beside],
            "within": mean(pair[part] for pair in from_them) <= max(pair[part] for pair in among),
        }
        for part in range(3)
    ]


def unequal(one: dict, other: dict) -> list[str]:
    """The names of the evaluation's numbers that differ between two results, also those within "tasks"."""
    wrong = []
    for name, value in one.items():
        if isinstance(value, dict):
            wrong += [f"{name}: {inner}" for inner in unequal(value, other[name])]
        elif isinstance(value, float) and not abs(value - other[name]) <= (BITS if name.endswith("bpb") else ACCURACY):
            wrong.append(f"{name} {value:.5f} and {other[name]:.5f}")
    return wrong


def execution_of(text: str, runtime: Runtime) -> str:
    """The execution of a variant's training, for which a device without CUDA graphs takes its default. UserError for a baseline."""
    variant = parse(text)
    if variant.execution not in EXECUTIONS or variant.liger_loss or variant.compiled_optimizer:
        raise UserError(
            f"{text} is a baseline that `nanochat train base` does not run; its execution is graph, compile or eager"
        )
    return variant.execution if runtime.device.type == "cuda" else "auto"


def parity(config: ParityConfig, command: str) -> bool:
    """Train, compare, print the verdict and write the file; returns whether all is within the band.

    Raises UserError for bad options.
    """
    if config.rows < 4 or config.rows % 4:
        raise UserError(
            f"--rows must be a multiple of 4, because micro-batches have a half and a quarter of them, got {config.rows}"
        )
    with start_runtime(config.device) as runtime, TemporaryDirectory() as folder:
        found = header(command, runtime.device.type == "cuda")
        execution, impl = execution_of(config.variant, runtime), parse(config.variant).impl
        runs = EmbeddedRuns(config, Path(folder), runtime)
        on_gpu = runtime.device.type == "cuda"
        plain = {f"plain, micro-batches of {n}": n for n in (config.rows, config.rows // 2, config.rows // 4)}
        losses = {name: runs.losses(PLAIN, "graph" if on_gpu else "auto", n) for name, n in plain.items()}
        if on_gpu:
            losses[COMPILED] = runs.losses(PLAIN, "compile", config.rows)
        with runs.trained(impl, execution, config.rows) as (paths, losses[config.variant]):
            evaluations = {}
            for name, chosen in ((config.variant, impl), ("plain", PLAIN)):
                options = EvaluateBaseOptions(
                    run_name=paths.run_name, tokens=config.eval_tokens, batch_size=config.rows, device=config.device,
                    impl=chosen,
                )  # fmt: skip
                evaluations[name] = evaluate_base(options, paths, runtime)
        parts = band([losses[name] for name in plain], losses[config.variant], losses.get(COMPILED))
        wrong = unequal(*evaluations.values())
        found |= {"parts": parts, "evaluations": evaluations, "unequal": wrong, "losses": losses}
        del found["rows"]
        show_table(table(config, parts))
        say(f"evaluations of the same weights: {'differ: ' + '; '.join(wrong) if wrong else 'equal'}")
        if config.json:
            write_json(config.json, found)
    return not wrong and all(part["within"] for part in parts)


def table(config: ParityConfig, parts: list[dict]) -> Table:
    columns = {"plain": "between plain runs", "found": f"{config.variant} from them", "beside": "compiled from them"}
    shown = {key: title for key, title in columns.items() if parts[0][key]}
    made = Table(
        "mean difference of the loss", *shown.values(), "within the band", box=None,
        title=f"d{config.depth}, {config.steps} steps of {config.rows} × {config.tokens} tokens", title_justify="left",
    )  # fmt: skip
    for part in parts:
        cells = (", ".join(f"{x:.5f}" for x in part[key]) for key in shown)
        made.add_row(part["steps"], *cells, "yes" if part["within"] else "NO")
    return made


def loss_differences(texts: tuple[str, ...], depth: int, steps: int, runtime: Runtime) -> list[dict]:
    """Train each variant for some steps on the same data; returns for each its last loss, and the mean difference from the first
    variant over the last tenth of the steps. A baseline that `nanochat train base` does not run has a note instead."""
    config, found, first = ParityConfig(depth=depth, steps=steps), [], None
    with TemporaryDirectory() as folder:
        runs = EmbeddedRuns(config, Path(folder), runtime)
        for text in texts:
            try:
                execution = execution_of(text, runtime)
            except UserError as error:
                found.append({"variant": text, "note": str(error)})
                continue
            losses = runs.losses(parse(text).impl, execution, config.rows)
            first = first or losses
            last = max(1, steps // 10)
            gap = mean(abs(a - b) for a, b in zip(losses[-last:], first[-last:], strict=True))
            found.append({"variant": text, "steps": steps, "loss": losses[-1], "difference": gap})
            say(f"{text}: loss {losses[-1]:.4f} after {steps} steps, mean difference {gap:.4f} over the last {last}")
    return found
