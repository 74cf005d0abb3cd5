"""Output to the user while a command runs: lines, and how far it is, with the time left."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
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
        # a terminal of latin-1 has no dashes or arrows
        known = text.encode(self.encoding, "replace").decode(self.encoding)
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


# the one live display of a terminal, with a line for each work under way: an evaluation within training, for example
display = Progress(
    TextColumn("{task.description}", markup=False),
    BarColumn(bar_width=12),
    TextColumn("{task.fields[state]}", markup=False),
    console=console,
    transient=True,
    redirect_stderr=sys.stderr.isatty(),  # what is written there would else break the display; elsewhere it is to arrive as it is
)
LINE_SECONDS = 5.0  # between two lines about a work, where there is no terminal


@contextmanager
def progress(description: str, total: float, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Show how far some work is, unless quiet: in the display of a terminal, and elsewhere by a line every few seconds.

    Gives the block advance(amount=1, completed=None, state=""). state: what there is to say, by default how much of `total` is
    done and how long the rest takes.
    """
    # for rich a file is a terminal where FORCE_COLOR is set; on a dumb one nothing can be drawn
    live = console.is_terminal and output.isatty() and not console.is_dumb_terminal and not quiet
    task = display.add_task(description, total=total, state="", visible=live)
    if live:
        display.start()
    started = last = time.monotonic()
    done = 0.0

    def advance(amount: float = 1, completed: float | None = None, state: str = "") -> None:
        nonlocal done, last
        done, now = done + amount if completed is None else completed, time.monotonic()
        if not state and done:
            rest = max(0.0, total - done)  # `total` may be an estimate
            left = format_duration((now - started) * rest / done, clock=True)
            state = f"{done:,.0f} of {total:,.0f}, {left} left"
        display.update(task, completed=done, state=state)
        if not (quiet or live) and now - last >= LINE_SECONDS:
            last = now
            say(f"{description}: {state}")

    try:
        yield advance
    finally:
        display.remove_task(task)
        if live and not any(other.visible for other in display.tasks):
            display.stop()
