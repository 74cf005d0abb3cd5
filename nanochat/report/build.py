"""Builds the report from the sections and metrics that the stages have written.

These may hold any text, such as an option or an answer of the model: it is escaped where it becomes markdown.
"""

import os
import platform
import subprocess
from pathlib import Path

import torch

from nanochat import __version__
from nanochat.evaluate.chat import BENCHMARKS, shown_name
from nanochat.options.evaluate import SAMPLES
from nanochat.options.report import ReportOptions
from nanochat.platform.console import format_duration, say
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_atomically
from nanochat.platform.paths import TRAINING_STAGES, Paths
from nanochat.platform.shapes import is_number
from nanochat.report.page import Folded, escaped, html_page
from nanochat.report.plots import plot_metrics
from nanochat.report.sections import OPTIONAL, TITLES, read_samples, read_section
from nanochat.train.metrics import read_metrics

CHANCE = {"world_choice": 0.25, "world_schema": 0.5, "ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25}
NOT_SET = -1  # the value of an option that is not set


def build_report(options: ReportOptions, paths: Paths) -> dict[str, str]:
    """`nanochat report`: write report.md and report.html; returns their paths. Raises UserError when no stage has finished."""
    sections = {stage: section for stage in TITLES if (section := read_section(paths, stage))}
    if not sections:
        raise UserError(f"nothing to report in {paths.report}; run stages first: nanochat speedrun --preset cpu")
    paths.report.mkdir(parents=True, exist_ok=True)
    plots = plot_metrics(paths, paths.report)
    parts: list[str | Folded] = [
        f"# nanochat: the run {escaped(paths.run_name)}\n\n{_what_was_trained(sections)}\n",
        _conversation(paths),
        _final_table(sections, paths),
    ]
    for title, files in plots.items():
        shown = " ".join(f"![{title} of {path.stem.partition('-')[2]}]({path.name})" for path in files)
        parts.append(f"## {title}\n\n{shown}\n")
    titles = {stage: title for stage, title in TITLES.items() if stage in sections or stage not in OPTIONAL}
    parts += [_stages(options, sections, titles), "## Settings and results of each stage\n"]
    for stage, title in titles.items():
        parts += _section(title, stage, sections.get(stage))
    markdown, html = paths.report / "report.md", paths.report / "report.html"
    write_atomically(markdown, "\n".join(str(part) for part in parts if part))
    pictures = [path for files in plots.values() for path in files]
    write_atomically(html, html_page(f"nanochat: {paths.run_name}", parts, pictures))
    say(f"report: {markdown} and {html}")
    return {"markdown": str(markdown), "html": str(html)}


def _what_was_trained(sections: dict[str, dict]) -> str:
    """A sentence about the model and its training, and what the names of embedded tasks stand for."""

    def fact(stage: str, part: str, name: str) -> str:
        value = sections.get(stage, {}).get(part, {}).get(name)
        return f"{value:,}" if isinstance(value, int) else "?"

    embedded = _embedded(sections)
    steps = []
    if "base" in sections:
        steps.append(
            f"pretrained on {fact('base', 'results', 'tokens')} tokens of {'embedded text' if embedded else 'text'}"
        )
    for stage, done in (("mid", "midtrained"), ("sft", "fine-tuned")):
        if stage in sections:
            steps.append(f"{done} on {fact(stage, 'results', 'conversations')} conversations")
    if "rl" in sections:
        steps.append(f"trained by rewards on {fact('rl', 'results', 'questions')} word problems")
    text = ""
    if steps:
        model = f"A language model of {fact('base', 'results', 'parameters')} parameters "
        model += f"(depth {fact('base', 'settings', 'depth')}, context of {fact('base', 'settings', 'context_length')} tokens)"
        text = f"{model}, {' and '.join(', '.join(steps).rsplit(', ', 1))}."
    if embedded:
        text += (
            "\n\n> The data are embedded: nanochat invented a small world, and texts and questions about it. A **stand-in** has the "
            "layout of the benchmark that it is named after, and far easier questions: its number is not that of the benchmark."
        )
    return text


def _embedded(sections: dict[str, dict]) -> bool:
    return any(section["embedded"] for section in sections.values())


def _conversation(paths: Paths) -> str:
    """Questions, and the answers of the last model that was evaluated."""
    said = []
    for name, text in read_samples(paths):
        # a backslash keeps the end of a line
        lines = "\\\n".join(escaped(line) for line in text.splitlines() if line.strip())
        said.append(f"**{escaped(name)}:** {lines}\n")
    return "\n".join(["## A conversation\n", *said]) if said else ""


def _final_table(sections: dict[str, dict], paths: Paths) -> str:
    columns = {name: (name, f"{name}-eval") for name in (*TRAINING_STAGES, "hf")}
    columns = {name: part for name, part in columns.items() if not {*part} & {*OPTIONAL} or {*part} & {*sections}}
    results: dict[str, dict] = {}
    for column, stages in columns.items():
        results[column] = {}
        for stage in stages:
            results[column] |= sections[stage]["results"] if stage in sections else {}
        measured = [record["val_bpb"] for record in read_metrics(paths.metrics(column), "val_bpb")]
        if measured:
            results[column]["first_bpb"] = measured[0]
    metrics = {
        "first_bpb": "bits per byte (first evaluation)",
        "val_bpb": "bits per byte (validation; mid: of conversations)",
        "unigram_bpb": "bits per byte (unigram model)",
    }
    metrics |= {name: name for part in results.values() for name in part if name.startswith("world_")}
    metrics |= {name: shown_name(name, _embedded(sections)) for name in BENCHMARKS}
    problems = shown_name("GSM8K", _embedded(sections))
    metrics |= {name: f"{problems}, {name}" for part in results.values() for name in part if name.startswith("pass@")}
    lines = ["## Results", "", f"| metric | chance | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for key, title in metrics.items():
        found = [results[column].get(key) for column in columns]
        values = [value if is_number(value) else None for value in found]
        if any(value is not None for value in values):
            chance = CHANCE.get(key)
            cells = [f"{value:.4f}" if value is not None else "–" for value in [chance, *values]]
            lines.append(f"| {escaped(title)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _stages(options: ReportOptions, sections: dict[str, dict], titles: dict[str, str]) -> str:
    """When the stages finished and what they cost, and with what they were run."""
    lines = ["## Time and cost", "", "| stage | took | finished |", "|---|---|---|"]
    for stage, title in titles.items():
        if stage in sections:
            section = sections[stage]
            took = format_duration(section["seconds"])
            took += f" in {section['processes']} processes" if section["processes"] > 1 else ""
            lines.append(f"| {title} | {took} | {escaped(section['finished'])} |")
        else:
            lines.append(f"| {title} | has not run | – |")
    seconds = sum(section["seconds"] for section in sections.values())
    software = f"nanochat {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    lines += [
        "",
        f"- all stages together: {format_duration(seconds)}",
        f"- hardware: {escaped(hardware())}",
        f"- software: commit {escaped(_commit())}, {escaped(software)}",
    ]
    if options.price_per_hour > 0:
        cost = options.price_per_hour * seconds / 3600
        lines.append(f"- cost: {options.price_per_hour:g} an hour, {cost:.2f} for this run")
    return "\n".join(lines) + "\n"


def _section(title: str, stage: str, section: dict | None) -> list[str | Folded]:
    if section is None:
        return [f"### {title}\n\nThis stage ({stage}) has not run.\n"]
    lines = []
    for heading, values in (("result", section["results"]), ("setting", section["settings"])):
        named = [(shown_name(name, section["embedded"]), value) for name, value in _flat(values) if name != SAMPLES]
        rows = [f"| {escaped(name)} | {escaped(value)} |" for name, value in named]
        if rows:
            lines += [f"| {heading} | value |", "|---|---|", *rows, ""]
    return [f"### {title}\n", *([Folded("results and settings", "\n".join(lines))] if lines else [])]


def _flat(values: dict, prefix: str = ""):
    """Names and values as text, those of nested dictionaries too; without what is not set."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value in (None, "", [], NOT_SET):
            continue
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:,.4f}" if 1e-3 <= abs(value) < 1e7 else f"{value:.4g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{name}", f"{value:,}"
        else:
            quoted = isinstance(value, list)  # strings in a list are quoted, to tell one from the next
            yield (
                f"{prefix}{name}",
                ", ".join(repr(v) if isinstance(v, str) else str(v) for v in value) if quoted else value,
            )


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
