"""Compare two results and mark the cases that became slower by more than 3 % plus the noise."""

from pathlib import Path

from rich.table import Table

from nanochat.platform.console import console, say
from nanochat.platform.errors import UserError
from nanochat.platform.files import read_shape
from nanochat.platform.shapes import check_shape

THRESHOLD = 0.03
KEY = ("op", "shape", "mode", "dtype", "impl")


HEADER = {"command": str, "commit": str, "date": str, "device": str, "product_tflops": float, "versions": {str: object}}
RESULT = HEADER | {"rows": [dict.fromkeys(KEY, str) | {"ms": object}]}
NUMBERS = ("ms", "copy_gbps", "bytes", "gbps", "percent_of_copy", "launch_us", "transient_mb")
# of a row that has times
MEASURED = dict.fromkeys(NUMBERS, float) | {"quartiles_ms": [float], "ratio_to": {str: float}}


def read_result(path: Path) -> dict:
    """Return a result as `python -m bench --json` writes it. Raises UserError if the file is none."""
    try:
        result = read_shape(path, RESULT)
        for number, row in enumerate(result["rows"]):
            if row["ms"] is not None:
                check_shape(row, MEASURED, f"{path}['rows'][{number}]")
    except UserError as error:
        raise UserError(f"{path} is not a result of python -m bench ({error}); write one with --json") from error
    return result


def load(path: Path) -> dict[tuple, dict]:
    """Return the measured rows of a result by the case that they measure. Raises UserError if the file is not a result."""
    return {tuple(row[key] for key in KEY): row for row in read_result(path)["rows"] if row["ms"] is not None}


def change(before: dict, after: dict) -> tuple[float, float]:
    """Return the relative change of the time and its noise: half the interquartile range of both, relative, in quadrature.

    Times are measured against the copy in their own run, because a GPU's clock rate changes all times of a run together.
    """
    relative = after["ms"] * after["copy_gbps"] / (before["ms"] * before["copy_gbps"]) - 1
    spreads = [(row["quartiles_ms"][1] - row["quartiles_ms"][0]) / 2 / row["ms"] for row in (before, after)]
    return relative, sum(spread**2 for spread in spreads) ** 0.5


def compare(before: Path, after: Path) -> int:
    """Print the cases that are in both files and return how many became slower."""
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
        f"{slower} of {len(shared)} cases slower by more than {THRESHOLD:.0%} plus the noise"
        + (f"; {only} in one file only" if only else "")
    )
    return slower
