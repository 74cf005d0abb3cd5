"""Plots of the metrics that training writes: loss or reward, measurements on held-out data, and throughput.

A plot is as wide as a telephone, and its SVG has colours for a light and for a dark page.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws to files and needs no display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanochat.platform.files import write_atomically
from nanochat.platform.paths import Paths
from nanochat.train.metrics import read_metrics

STAGES = {"base": "pretraining", "mid": "midtraining", "sft": "fine-tuning", "rl": "reinforcement learning"}
# what a stage learns by, and what it measures on held-out data, by their names in the metrics
CURVES = {stage: ("loss", "val_bpb") for stage in STAGES} | {"sft": ("loss", "val_loss"), "rl": ("reward", "pass@1")}
LABELS = {
    "loss": "loss (nats per token)",
    "val_bpb": "validation\n(bits per byte)",
    "val_loss": "validation\n(nats per token)",
    "reward": "mean reward",
    "pass@1": "validation\n(pass@1)",
}
# what is drawn in a colour of the light page is shown in that of the dark one there
PAPER, INK, GRID, BLUE, PALE, RED = "#ffffff", "#22252a", "#d5dae2", "#1f4e8c", "#b9cde8", "#c0392b"
DARK = {PAPER: "#15181c", INK: "#dfe3e8", GRID: "#363c45", BLUE: "#8ab4f0", PALE: "#3d5575", RED: "#f0857a"}
LOOK = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": GRID, "grid.color": GRID, "axes.grid": True, "font.size": 9,
    "legend.facecolor": PAPER, "legend.edgecolor": GRID, "svg.fonttype": "none", "svg.hashsalt": "nanochat",
}  # fmt: skip
WIDTH, HEIGHT = 4.0, 2.6  # inches of 96 pixels
MOST_POINTS = 1000  # of a curve


def plot_metrics(paths: Paths, directory: Path) -> dict[str, list[Path]]:
    """Write a plot of loss, or of reward, and one of throughput for each stage that has metrics; returns their paths by title."""
    plots: dict[str, list[Path]] = {"Loss": [], "Reward": [], "Throughput": []}
    with plt.rc_context(LOOK):
        for stage, name in STAGES.items():
            learned, below = CURVES[stage]
            records = read_metrics(paths.metrics(stage), learned, "tokens_per_second")
            if not records:
                continue
            curve = _learning(name, records, learned, read_metrics(paths.metrics(stage), below), below)
            for title, figure in ((learned.capitalize(), curve), ("Throughput", _throughput(name, records))):
                path = directory / f"{title.lower()}-{stage}.svg"
                write_atomically(path, svg_of(figure))
                plots[title].append(path)
                plt.close(figure)
    return {title: files for title, files in plots.items() if files}


def _learning(name: str, records: list[dict], learned: str, measured: list[dict], below: str) -> Figure:
    """A plot of the loss or the reward of each step, and below it one of a measurement on held-out data, whose unit differs.

    learned: the name of the loss or the reward in the records. below: the name of the measurement.
    """
    ratios = [1, 0.5] if measured else [1]
    size = WIDTH, HEIGHT * sum(ratios)
    figure, rows = plt.subplots(
        len(ratios), 1, figsize=size, squeeze=False, sharex=True, layout="constrained", height_ratios=ratios
    )
    axes = rows[:, 0]
    _curves(axes[0], records, learned)
    axes[0].set(title=name, ylabel=LABELS[learned])
    if measured:
        axes[1].plot([r["step"] for r in measured], [r[below] for r in measured], "o", color=RED, markersize=4)
        for record in (measured[0], measured[-1]):
            axes[1].annotate(
                f"{record[below]:.2f}", (record["step"], record[below]), (0, 5), ha="center", fontsize=8,
                textcoords="offset points",
            )  # fmt: skip
        axes[1].set(ylabel=LABELS[below])
        axes[1].margins(x=0.08)
        axes[1].set_ylim(0, 1.35 * (max(r[below] for r in measured) or 1))
    axes[-1].set_xlabel("step")
    return figure


def _throughput(name: str, records: list[dict]) -> Figure:
    figure, axis = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    _curves(axis, records, "tokens_per_second")
    axis.set(title=name, xlabel="step", ylabel="tokens per second")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    return figure


def _curves(axis: Axes, records: list[dict], name: str) -> None:
    """Draw what was measured at each step, and the mean of the steps around it."""
    steps, values, every = [r["step"] for r in records], [r[name] for r in records], -(-len(records) // MOST_POINTS)
    axis.plot(steps[::every], values[::every], color=PALE, linewidth=1, label="each step")
    axis.plot(steps[::every], centred_mean(values)[::every], color=BLUE, linewidth=1.5, label="mean around it")
    axis.legend(fontsize=8)


def centred_mean(values: Sequence[float]) -> np.ndarray:
    """For each value the mean of those around it, as many before it as after it, so that it lags behind nowhere."""
    count = len(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(count)
    half = np.minimum(np.minimum(index, count - 1 - index), max(1, count // 40))
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def svg_of(figure: Figure) -> str:
    """The picture with its colours as variables, which have other values on a dark page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    start, tag, drawing = file.getvalue().partition("<svg ")
    for color in DARK:
        drawing = drawing.replace(color, f"var({_variable(color)})")
    opening, end, shapes = drawing.partition(">")
    light = "; ".join(f"{_variable(color)}: {color}" for color in DARK)
    dark = "; ".join(f"{_variable(color)}: {shown}" for color, shown in DARK.items())
    style = f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }} text {{ font-family: sans-serif }}"
    return f"{start}{tag}{opening}{end}<style>{style}</style>{shapes}"


def _variable(color: str) -> str:
    return f"--color-{color[1:]}"
