"""Two results side by side: what became slower by more than 3 % and the noise."""

import json
from pathlib import Path

from rich.table import Table

from nanochat.platform.console import console, say
from nanochat.platform.errors import UserError

THRESHOLD = 0.03
KEY = ("op", "shape", "mode", "dtype", "impl")


def load(path: Path) -> dict[tuple, dict]:
    """Measured rows of a result by what they measure. Raises UserError for a file that is none."""
    try:
        rows = json.loads(path.read_text("utf-8"))["rows"]
        return {tuple(row[key] for key in KEY): row for row in rows if row["ms"] is not None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of python -m bench ({error!r}); write one with --json") from error


def change(before: dict, after: dict) -> tuple[float, float]:
    """Relative change of the time and its noise: half the quartiles' distance of both, as fractions, in quadrature.

    Times are taken against the copy of their own run, since a GPU's clocks move all times of a run together.
    """
    relative = after["ms"] * after["copy_gbps"] / (before["ms"] * before["copy_gbps"]) - 1
    spreads = [(row["quartiles_ms"][1] - row["quartiles_ms"][0]) / 2 / row["ms"] for row in (before, after)]
    return relative, sum(spread**2 for spread in spreads) ** 0.5


def compare(before: Path, after: Path) -> int:
    """Print every case of both files; returns how many became slower."""
    old, new = load(before), load(after)
    shared = [key for key in old if key in new]
    if not shared:
        raise UserError(f"{before} and {after} have no case in common")
    table = Table(*KEY, "before ms", "after ms", "change", "noise", "", box=None)
    slower = 0
    for key in shared:
        relative, noise = change(old[key], new[key])
        worse = relative > THRESHOLD + noise
        slower += worse
        verdict = "SLOWER" if worse else "faster" if relative < -THRESHOLD - noise else ""
        table.add_row(
            *key, f"{old[key]['ms']:.4f}", f"{new[key]['ms']:.4f}", f"{relative:+.1%}", f"{noise:.1%}", verdict
        )
    console.print(table)
    only = len(old) + len(new) - 2 * len(shared)
    say(
        f"{slower} of {len(shared)} cases slower by more than {THRESHOLD:.0%} and the noise"
        + (f"; {only} in one file only" if only else "")
    )
    return slower
