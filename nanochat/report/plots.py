"""Plots of the metrics that training writes: loss, validation bits per byte and throughput."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files and needs no display

from matplotlib import pyplot as plt

from nanochat.platform.paths import Paths
from nanochat.train.metrics import read_metrics

STAGES = {"base": "pretraining", "mid": "midtraining", "sft": "fine-tuning"}
BLUE, PALE, RED = "#1f4e8c", "#b9cde8", "#c0392b"


def plot_metrics(paths: Paths, directory: Path) -> dict[str, Path]:
    """Write loss.png and throughput.png for the stages that have metrics; returns their paths by title."""
    shown = ("loss", "smoothed_loss", "tokens_per_second")
    metrics = {stage: read_metrics(paths.metrics(stage), *shown) for stage in STAGES}
    metrics = {stage: records for stage, records in metrics.items() if records}
    if not metrics:
        return {}
    measured = {stage: read_metrics(paths.metrics(stage), "val_bpb") for stage in metrics}
    figure, axes = plt.subplots(1, len(metrics), figsize=(5 * len(metrics), 3.6), squeeze=False, layout="constrained")
    for axis, (stage, records) in zip(axes[0], metrics.items(), strict=True):
        steps = [r["step"] for r in records]
        axis.plot(steps, [r["loss"] for r in records], color=PALE, linewidth=1, label="loss")
        axis.plot(steps, [r["smoothed_loss"] for r in records], color=BLUE, linewidth=1.8, label="smoothed")
        axis.set(title=STAGES[stage], xlabel="step", ylabel="nats per token")
        axis.grid(alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        if measured[stage]:
            other = axis.twinx()
            points = [(r["step"], r["val_bpb"]) for r in measured[stage]]
            [line] = other.plot(*zip(*points, strict=True), "o-", color=RED, markersize=4, linewidth=1)
            other.set_ylabel("validation bits per byte", color=RED)
            other.set_ylim(bottom=0)
            handles, labels = [*handles, line], [*labels, "validation"]
        axis.legend(handles, labels, loc="upper right", fontsize=8)
    loss = directory / "loss.png"
    figure.savefig(loss, dpi=110)
    plt.close(figure)

    figure, axes = plt.subplots(1, len(metrics), figsize=(5 * len(metrics), 3), squeeze=False, layout="constrained")
    for axis, (stage, records) in zip(axes[0], metrics.items(), strict=True):
        axis.plot([r["step"] for r in records], [r["tokens_per_second"] for r in records], color=BLUE, linewidth=1)
        axis.set(title=STAGES[stage], xlabel="step", ylabel="tokens per second")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    throughput = directory / "throughput.png"
    figure.savefig(throughput, dpi=110)
    plt.close(figure)
    return {"Loss": loss, "Throughput": throughput}
