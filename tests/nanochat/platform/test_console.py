"""Output into a pipe is not cut, because other programs and files take it; how far a work is; durations in two forms."""

import os
import pty
import re
import subprocess
import sys

import pytest
from rich.table import Table

from nanochat.platform.console import console, format_duration, progress, show_table
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


def test_without_a_terminal_a_work_says_a_line_every_few_seconds(monkeypatch, capsys):
    clock = iter(range(1000))
    monkeypatch.setattr("nanochat.platform.console.time.monotonic", lambda: next(clock))
    with progress("read", 20) as advance, progress("not seen", 20, quiet=True) as advance_quietly:
        for step in range(1, 13):
            advance(state=f"step {step} [it is no markup]" if step > 6 else "")
            advance_quietly()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "read: 3 of 20, 0:34 left",
        "read: 6 of 20, 0:28 left",
        *(f"read: step {n} [it is no markup]" for n in (9, 12)),
    ]


NESTED = """
import time
from nanochat.platform.console import progress, say
with progress("train base", 1) as advance:
    for step in range(20):
        advance(completed=step / 20, state=f"step {step}/20 | loss 1.2345 | 0:51 left | 22,261 tokens/s | learning rate × 1.00")
    time.sleep(0.2)
    with progress("evaluate", 2400) as advance_evaluation:
        advance_evaluation(600)
        time.sleep(0.2)
    say("a line")
print("the end")
"""


def test_on_a_terminal_there_is_one_live_display_which_fits_and_goes(tmp_path):
    master, slave = pty.openpty()
    variables = environment(None, COLUMNS="80", TERM="xterm", PYTHONIOENCODING="utf-8")
    process = subprocess.Popen([sys.executable, "-c", NESTED], env=variables, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # the end, on Linux
            break
        if not piece:
            break
        seen += piece
    os.close(master)
    assert process.wait() == 0, seen.decode()
    text = seen.decode()
    assert "step 19/20 | loss 1.2345 | 0:51 left" in text and "600 of 2,400, 0:00 left" in text
    assert "Traceback" not in text and text.count("a line") == 1
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert max(len(line) for line in re.split(r"[\r\n]+", shown)) <= 80
    assert shown.rstrip().endswith("the end")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_what_the_encoding_of_the_output_lacks_is_replaced(encoding):
    """As PYTHONIOENCODING or the locale of a site says; an error would end training at its first step."""
    script = "from nanochat.platform.console import progress, say\nsay('5 steps – é → 6')\n"
    script += "with progress('bar', 2) as advance:\n    advance()\n"
    env = environment(None, PYTHONIOENCODING=encoding)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True)
    assert done.returncode == 0 and done.stdout == "5 steps – é → 6\n".encode(encoding, "replace"), done.stderr
