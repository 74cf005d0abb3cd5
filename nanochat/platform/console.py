"""Output to the user while a command runs: lines, and a progress bar with the time left."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Output:
    """Standard output, whose errors can be kept from ending the work that is under way.

    error: why it cannot be written, while that is so: a full disk behind a log, a closed terminal, a pipe that nobody reads.
    """

    def __init__(self) -> None:
        self.error: OSError | None = None
        self._may_fail = self._told = False
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by the caller: no other file may get its number
                setattr(sys, name, open(os.devnull, "w"))

    @contextmanager
    def may_fail(self) -> Iterator[None]:
        """While the block runs, an error is told on stderr once, and raised nowhere."""
        self._may_fail, before = True, self._may_fail
        try:
            yield
        finally:
            self._may_fail = before
            if self.error and not before:  # what is still buffered would fail once more when the process ends
                with suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
                    os.dup2(nothing.fileno(), self.fileno())

    def write(self, text: str) -> int:
        known = text.encode(self.encoding, "replace").decode(
            self.encoding
        )  # a terminal of latin-1 has no dashes or arrows
        self._try(lambda: self._stream.write(known))
        return len(text)

    def flush(self) -> None:
        if self._try(self._stream.flush):
            self.error = None

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return self._stream.encoding or "utf-8"

    @property
    def _stream(self):
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # a progress bar puts a proxy in its place

    def _try(self, action: Callable) -> bool:
        try:
            action()
        except OSError as error:
            if not self._may_fail:
                raise
            self.error = error
            if not self._told:
                self._told = True
                with suppress(OSError):
                    print(
                        f"nanochat: cannot write the output ({error.strerror}); the work goes on",
                        file=sys.stderr,
                        flush=True,
                    )
            return False
        return True


output = Output()
console = Console(file=output, highlight=False, soft_wrap=True)


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
