"""Output into a pipe is not cut, because other programs and files take it; durations are shown in two forms."""

import subprocess
import sys

import pytest
from rich.table import Table

from nanochat.platform.console import console, format_duration, show_table
from tests.conftest import environment


def test_a_table_in_a_pipe_is_not_cut_to_the_width_of_a_terminal():
    table = Table("name", "reason", box=None)
    table.add_row("a" * 60, "b" * 100)
    with console.capture() as captured:
        show_table(table)
    assert "a" * 60 in captured.get() and "b" * 100 in captured.get()


def test_durations_are_shown_as_words_or_as_a_clock():
    assert [format_duration(seconds) for seconds in (6.6, 61, 7500)] == ["7 s", "1 min 1 s", "2 h 5 min"]
    assert [format_duration(seconds, clock=True) for seconds in (6.6, 61, 7500)] == ["0:06", "1:01", "2:05:00"]


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_what_the_encoding_of_the_output_lacks_is_replaced(encoding):
    """As PYTHONIOENCODING or the locale of a site says; an error would end training at its first step."""
    script = "from nanochat.platform.console import progress_bar, say\nsay('5 steps – é → 6')\n"
    script += "with progress_bar('bar', 2) as advance:\n    advance()\n"
    env = environment(None, PYTHONIOENCODING=encoding)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True)
    assert done.returncode == 0 and done.stdout == "5 steps – é → 6\n".encode(encoding, "replace"), done.stderr
