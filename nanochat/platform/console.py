"""Output to the user while a command runs: lines, and a progress bar with the time left."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Print a line as it is, without markup."""
    console.print(line, markup=False)


def show_table(table: Table) -> None:
    """Print a table: as wide as the terminal, or whole lines into a pipe or a file, which are not cut to 80 columns."""
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def format_duration(seconds: float, clock: bool = False) -> str:
    """A duration as text: "2 h 5 min", "1 min 1 s" or "7 s"; with clock, "2:05:00" or "1:01", cut to whole seconds."""
    minutes, seconds = divmod(int(seconds) if clock else round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if clock:
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


@contextmanager
def progress_bar(description: str, total: float | None, quiet: bool = False) -> Iterator:
    """Show a progress bar in a terminal, unless quiet; gives the block advance(amount=1, completed=None, total=None)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed, left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task(description, total=total)

        def advance(amount: float = 1, completed: float | None = None, total: float | None = None) -> None:
            values = {"completed": completed, "total": total}
            update = {key: value for key, value in values.items() if value is not None}
            progress.update(task, **(update if completed is not None else {**update, "advance": amount}))

        yield advance
