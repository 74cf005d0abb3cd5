"""Draw what `python -m bench train` measured: tokens per second and memory of every variant, at each setting of some files.

python -m bench picture bench/results/h200/train_*.json --out bench/results/h200/train.svg
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import tyro
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nanochat.platform.console import say
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_atomically
from nanochat.report.plots import BLUE, INK, LOOK, PALE, svg_of

WIDTH, BAR = 8.4, 0.26  # inches: of the picture, and the height of a bar
COLORS = BLUE, PALE, "#c0862b", "#3c8d8a", "#a4508b"
NAMES = {
    "fused": "nanochat",
    "compiled": "torch.compile",
    "plain": "plain PyTorch",
    "peers": "torch.compile, Liger's loss",
}


@dataclass(frozen=True)
class PictureConfig:
    """Draw tokens per second and peak memory from results of python -m bench train, of one kind of GPU."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files that python -m bench train wrote"""
    out: Path = Path("build/train.svg")
    """SVG file"""


def read(paths: tuple[Path, ...]) -> tuple[str, list[dict]]:
    """The GPU and the rows of all files. UserError for a file that bench train did not write, or another GPU."""
    devices, rows = {}, []
    for path in paths:
        try:
            found = json.loads(path.read_text("utf-8"))
            made = [row | {"setting": setting(row)} for row in found["rows"] if row.get("samples_ms")]
            rows += [
                row | {name: row[name] for name in ("tokens_per_second", "peak_gb", "variant", "ms")} for row in made
            ]
            devices[found["device"]] = path
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result of `python -m bench train` ({error!r})") from error
    if not rows:
        raise UserError("there is nothing to draw: give JSON files that `python -m bench train` wrote")
    if len(devices) > 1:
        raise UserError(f"all files must be of one kind of GPU, got {', '.join(map(str, devices))}")
    return next(iter(devices)), rows


def setting(row: dict) -> str:
    """What was measured, such as "d20, 16 × 2,048"."""
    what = f"d{row['depth']}, {row['rows']} × {row['tokens']:,} tokens"
    return what if row["measured"] == "micro" else f"{what},\na step of {row['measured']} and the update"


def shown(value: float) -> str:
    if value < 1000:
        return f"{value:.1f}".removesuffix(".0")
    return f"{value / 1000:,.0f}K"


def bars(axes: Axes, rows: list[dict], settings: list[str], variants: list[str], key: str, title: str) -> None:
    """A bar for each setting and variant; the first variant's is compared with each other's."""
    found = {(row["setting"], row["variant"]): row for row in rows}
    for place, name in enumerate(settings):
        for number, variant in enumerate(variants):
            row = found.get((name, variant))
            if row is None or row[key] is None:
                continue
            y = place + (number - (len(variants) - 1) / 2) * BAR
            value, spread = row[key], None
            if key == "tokens_per_second":
                low, _, high = quantiles(row["samples_ms"], n=4) if len(row["samples_ms"]) > 1 else (row["ms"],) * 3
                scale = value * median(row["samples_ms"])
                spread = [[value - scale / high], [scale / low - value]]
            axes.barh(y, value, height=0.9 * BAR, color=color_of(number), xerr=spread, ecolor=INK, capsize=2)
            first = found.get((name, variants[0]))
            ratio = (
                f" ({NAMES.get(variants[0], variants[0])} {first[key] / value:.2f} ×)"
                if number and first and first[key]
                else ""
            )
            label = f"{shown(value)}{ratio}"
            axes.annotate(label, (value, y), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axes.set_xlim(0, 1.8 * max(row[key] for row in rows if row[key] is not None))
    axes.set_ylim(len(settings) - 0.4, -0.6)
    axes.set_yticks(range(len(settings)), settings)
    axes.set_xlabel(title)
    axes.grid(axis="y", visible=False)


def color_of(number: int) -> Any:
    """The colour of a variant, by its number."""
    return COLORS[number] if number < len(COLORS) else plt.get_cmap("tab20")(number)


def figure_of(device: str, rows: list[dict]) -> Figure:
    """Panels of what was measured: tokens per second, or of updates alone milliseconds; and memory, which a CPU does not tell."""
    settings, variants = (list(dict.fromkeys(row[name] for row in rows)) for name in ("setting", "variant"))
    has = {key: any(row[key] is not None for row in rows) for key in ("tokens_per_second", "peak_gb")}
    panels = [("tokens_per_second", "tokens per second") if has["tokens_per_second"] else ("ms", "milliseconds")]
    panels += [("peak_gb", "peak memory, GB")] * has["peak_gb"]
    height = 1.2 + len(settings) * (0.25 + 1.1 * BAR * len(variants))
    widths = (3, 2)[: len(panels)]
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(WIDTH, height), sharey=True, width_ratios=widths, layout="constrained", squeeze=False
    )
    for axes, panel in zip(all_axes[0], panels, strict=True):
        bars(axes, rows, settings, variants, *panel)
    handles = [Patch(color=color_of(number), label=NAMES.get(name, name)) for number, name in enumerate(variants)]
    figure.legend(handles=handles, loc="outside upper right", ncols=min(len(handles), 4), frameon=False)
    figure.suptitle(f"Training on one {device}", x=0.01, ha="left", fontsize=10)
    return figure


def picture(config: PictureConfig, command: str) -> None:
    """Write the picture."""
    device, rows = read(config.results)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(LOOK | {"axes.axisbelow": True}):
        figure = figure_of(device, rows)
        write_atomically(config.out, svg_of(figure))
    plt.close(figure)
    say(f"wrote {config.out}")
