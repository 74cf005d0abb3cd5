"""Builds the report from the sections and metrics that the stages have written."""

import os
import platform
import subprocess
from pathlib import Path

import torch

from nanochat import __version__
from nanochat.evaluate.chat import TASKS
from nanochat.options.report import ReportOptions
from nanochat.platform.console import format_duration, say
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_atomically
from nanochat.platform.paths import Paths
from nanochat.report.page import html_page
from nanochat.report.plots import plot_metrics
from nanochat.report.sections import TITLES, read_section
from nanochat.train.metrics import read_metrics

CHANCE = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25}


def build_report(options: ReportOptions, paths: Paths) -> dict[str, str]:
    """`nanochat report`: write report.md and report.html; returns their paths. Raises UserError when no stage has finished."""
    sections = {stage: read_section(paths, stage) for stage in TITLES}
    if not any(sections.values()):
        raise UserError(f"nothing to report in {paths.report}; run stages first: nanochat speedrun --preset cpu")
    paths.report.mkdir(parents=True, exist_ok=True)
    plots = plot_metrics(paths, paths.report)
    parts = [_header(options, sections), _final_table(sections, paths)]
    for title, plot in plots.items():
        parts.append(f"## {title}\n\n![{title}]({plot.name})\n")
    for stage, title in TITLES.items():
        parts.append(_section(title, stage, sections[stage]))
    text = "\n".join(parts)
    markdown, html = paths.report / "report.md", paths.report / "report.html"
    write_atomically(markdown, text)
    write_atomically(html, html_page("nanochat report", text, plots.values()))
    say(f"report: {markdown} and {html}")
    return {"markdown": str(markdown), "html": str(html)}


def _header(options: ReportOptions, sections: dict) -> str:
    seconds = sum(section["seconds"] for section in sections.values() if section)
    lines = [
        "# nanochat report",
        "",
        f"- commit: {_commit()}",
        f"- hardware: {hardware()}",
        f"- software: nanochat {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"- wall clock of all stages: {format_duration(seconds)}",
    ]
    if options.price_per_hour > 0:
        cost = options.price_per_hour * seconds / 3600
        lines.append(f"- cost: {options.price_per_hour:g} an hour, {cost:.2f} for this run")
    missing = [title for stage, title in TITLES.items() if not sections[stage]]
    if missing:
        lines.append(f"- stages that have not run: {', '.join(missing)}")
    return "\n".join(lines) + "\n"


def _final_table(sections: dict, paths: Paths) -> str:
    columns = {"base": ("base", "base-eval"), "mid": ("mid", "mid-eval"), "sft": ("sft", "sft-eval")}
    results: dict[str, dict] = {}
    for column, stages in columns.items():
        results[column] = {}
        for stage in stages:
            results[column] |= sections[stage]["results"] if sections[stage] else {}
    for column in columns:
        measured = [record["val_bpb"] for record in read_metrics(paths.metrics(column), "val_bpb")]
        if measured:
            results[column]["first_bpb"] = measured[0]
    metrics = {
        "first_bpb": "bits per byte (first evaluation)",
        "val_bpb": "bits per byte (validation)",
        "unigram_bpb": "bits per byte (unigram model)",
    }
    tasks = {name: name for part in results.values() for name in part if name.startswith("world_")}
    metrics |= tasks | {"CORE": "CORE"} | {name: name for name in TASKS} | {"ChatCORE": "ChatCORE"}
    lines = ["## Results", "", "| metric | chance | base | mid | sft |", "|---|---|---|---|---|"]
    for key, title in metrics.items():
        found = [results[column].get(key) for column in columns]
        values = [value if isinstance(value, int | float) else None for value in found]
        if any(value is not None for value in values):
            chance = {"world_choice": 0.25, "world_schema": 0.5, **CHANCE}.get(key)
            cells = [f"{value:.4f}" if value is not None else "–" for value in [chance, *values]]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _section(title: str, stage: str, section: dict | None) -> str:
    if section is None:
        return f"## {title}\n\nThis stage ({stage}) has not run.\n"
    lines = [f"## {title}", "", f"Finished {section['finished']} after {format_duration(section['seconds'])}"]
    lines[-1] += f", {section['processes']} process(es)." if section["processes"] > 1 else "."
    for heading, values in (("setting", section["settings"]), ("result", section["results"])):
        rows = list(_flat(values))
        if rows:
            lines += ["", f"| {heading} | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + "\n"


def _flat(values: dict, prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:,.4f}" if 1e-3 <= abs(value) < 1e7 else f"{value:.4g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{name}", f"{value:,}"
        else:
            quoted = isinstance(value, list)  # strings in a list are quoted, to tell one from the next
            shown = ", ".join(repr(v) if isinstance(v, str) else str(v) for v in value) if quoted else value
            yield f"{prefix}{name}", str(shown).replace("|", "\\|").replace("\n", "⏎")


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"


def hardware() -> str:
    """The names of the GPUs with their number, or the name of the processor with its number of cores."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{model}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
