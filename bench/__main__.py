"""python -m bench: time the fused operations on this GPU. Without a command it times them one by one, against baselines.

report and compare: write a report of such results, or compare two of them. train: time micro-steps and whole steps of training.
picture: draw what train measured.
parity and gradients: does fused training learn what plain training learns, and are the gradients of a step precise enough?
errors: how far the results and gradients of an operation are from float64, beside those of other libraries.
scaling: time steps on several GPUs. profile: one page about where the time and the memory of a step go.
memory: the largest micro-batch that fits on a card. simulate: predict the step of training on eight A100s.
eight: what several GPUs of one machine do together, from steps to the whole speedrun with processes that are killed.

python -m bench --list
python -m bench --op rms_norm --shape d20 --mode both --json build/rms_norm.json
python -m bench report build/*.json --out build/report
python -m bench compare before.json after.json
python -m bench train --depth 20 --first-step --json build/train.json
python -m bench picture build/train.json
python -m bench scaling --depth 20 --gpus 1 2
python -m bench parity --depth 4 --steps 1000
python -m bench gradients --depth 20
python -m bench errors --op linear_cross_entropy --shape d20/8192
python -m bench profile --depth 20 --out build/profile
python -m bench memory
python -m bench simulate
python -m bench eight --parts loader evaluate
"""

import csv
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from bench.cases import MODES, measured, variant_names
from nanochat.options.ranges import check_ranges
from nanochat.platform.console import console, say
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json

DESCRIPTION = "\n\n".join(line for line in __doc__.splitlines() if line)  # the help joins the lines of a paragraph
VERBS = (
    "report",
    "compare",
    "train",
    "picture",
    "scaling",
    "parity",
    "gradients",
    "errors",
    "profile",
    "memory",
    "simulate",
    "eight",
)
COLUMNS = (
    "op",
    "shape",
    "mode",
    "dtype",
    "impl",
    "ms",
    "gbps",
    "percent_of_copy",
    "launch_us",
    "transient_mb",
    "tflops",
    "dense_tflops",
)


@dataclass(frozen=True)
class RunConfig:
    """Time operations against eager PyTorch, torch.compile and the other libraries that are installed."""

    list: bool = False
    """print the operations with their shapes, modes and variants, and measure nothing"""
    op: tuple[str, ...] = ()
    """only these operations"""
    impl: tuple[str, ...] = ()
    """only these variants: triton, eager, compile, max-autotune, or the name of a baseline"""
    shape: tuple[str, ...] = ()
    """only these shapes"""
    mode: tuple[str, ...] = MODES
    """fwd, bwd, both"""
    dtype: str = "bfloat16"
    """bfloat16, float16 or float32"""
    rounds: int = 40
    """samples of each variant"""
    json: Path | None = None
    """file for every sample"""
    csv: Path | None = None
    """file for the table"""
    profile: bool = False
    """run each variant once inside an NVTX range, between cudaProfilerStart and Stop, instead of timing it: for
    nsys profile --capture-range=cudaProfilerApi, or ncu --nvtx"""


@dataclass(frozen=True)
class ReportConfig:
    """Write results as markdown, HTML and PNG: ratios to the baselines, and a roofline with every kernel on it."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files that python -m bench wrote"""
    out: Path = Path("build/report")
    """folder of the report"""


@dataclass(frozen=True)
class CompareConfig:
    """Print the cases that became slower by more than 3 % plus the noise; exit status 1 if there are any."""

    before: Annotated[Path, tyro.conf.Positional]
    after: Annotated[Path, tyro.conf.Positional]


def run(config: RunConfig, command: str) -> None:
    import torch

    from bench.cases import case
    from bench.measure import header, measure, need_gpu

    if config.list:
        return _list()
    wanted = [
        (op, shape, mode)
        for op in config.op or measured()
        for shape in _shapes(op, config)
        for mode in _modes(op, config)
    ]
    dtype = getattr(torch, config.dtype, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UserError(f"--dtype must be bfloat16, float16 or float32, got {config.dtype}")
    need_gpu()
    if config.profile:
        return _profile([case(*one, dtype, config.impl) for one in wanted])
    found = header(command)
    for one in wanted:
        rows = list(measure(case(*one, dtype, config.impl), config.rounds))
        found["rows"] += rows
        console.print(_table(rows))
        torch.cuda.empty_cache()
        if config.json:  # after each case, so that an interrupted run keeps its results
            write_json(config.json, found)
    if config.csv:
        lines = [[row.get(column, "") for column in COLUMNS] for row in found["rows"]]
        config.csv.parent.mkdir(parents=True, exist_ok=True)
        with config.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *lines])


def _list() -> None:
    table = Table("operation", "shapes", "modes", "variants", box=None)
    for name, operation in measured().items():
        benchmark = operation.benchmark
        variants = variant_names(benchmark, operation.implementations)
        table.add_row(name, ", ".join(benchmark.shapes), ", ".join(benchmark.modes), ", ".join(variants))
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def _shapes(op: str, config: RunConfig) -> Iterable[str]:
    if op not in measured():
        raise UserError(f"--op {op} has no benchmark; choose one of {', '.join(measured())}")
    known = {shape for operation in measured().values() for shape in operation.benchmark.shapes}
    if set(config.shape) - known:
        raise UserError(f"--shape must be among {', '.join(sorted(known))}, got {', '.join(config.shape)}")
    return [shape for shape in measured()[op].benchmark.shapes if not config.shape or shape in config.shape]


def _modes(op: str, config: RunConfig) -> Iterable[str]:
    if set(config.mode) - set(MODES):
        raise UserError(f"--mode must be among {', '.join(MODES)}, got {', '.join(config.mode)}")
    return [mode for mode in config.mode if mode in measured()[op].benchmark.modes]


def _profile(cases: list) -> None:
    import torch

    from nanochat_kernels.ranges import recorded, span

    for case in cases:
        for variant in case.variants.values():  # compile first
            variant(0)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for case in cases:
        for name, variant in case.variants.items():
            with recorded(), span(f"{case.operation} {case.shape} {case.mode} {name}"):
                variant(0)
                torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    say(f"ran {sum(len(case.variants) for case in cases)} variants, each in an NVTX range with its name")


def _table(rows: list[dict]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first['op']} {first['shape']} {first['mode']} {first['dtype']}", box=None, title_justify="left"
    )
    for name in (
        "impl",
        "ms",
        "quartiles",
        "GB/s",
        "% of copy",
        "TFLOP/s",
        "triton's time ÷ its time",
        "launch µs",
        "transient MB",
    ):
        table.add_column(name, justify="left" if name == "impl" else "right")
    for row in rows:
        if row["ms"] is None:
            table.add_row(row["impl"], row["note"])
            continue
        low, high = row["quartiles_ms"]
        ratio = next((r["ratio_to"].get(row["impl"]) for r in rows if r["impl"] == "triton" and r["ms"]), None)
        table.add_row(
            row["impl"], f"{row['ms']:.4f}", f"{low:.4f}-{high:.4f}", f"{row['gbps']:.0f}",
            f"{row['percent_of_copy']:.1f}", f"{row['tflops']:.0f}" if "tflops" in row else "",
            f"{ratio:.3f}" if ratio else "", f"{row['launch_us']:.0f}", f"{row['transient_mb']:.1f}",
        )  # fmt: skip
    return table


def main(arguments: list[str]) -> None:
    command = f"python -m bench {shlex.join(arguments)}".strip()
    verb, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in VERBS else (None, arguments)
    if verb is None:
        return run(tyro.cli(RunConfig, args=rest, prog="python -m bench", description=DESCRIPTION), command)
    module = import_module(f"bench.{verb}")
    options = {"report": ReportConfig, "compare": CompareConfig}.get(verb) or getattr(module, f"{verb.title()}Config")
    config = tyro.cli(options, args=rest, prog=f"python -m bench {verb}")
    check_ranges(config)
    if verb == "report":
        say(f"wrote {module.write_report(config.results, config.out)}")
    elif verb == "compare":
        sys.exit(1 if module.compare(config.before, config.after) else 0)
    elif getattr(module, verb)(config, command) is False:  # parity and gradients: not as they must be
        sys.exit(1)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError, ValueError) as error:
        sys.exit(f"bench: error: {error}")
