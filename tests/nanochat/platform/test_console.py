"""Output into a pipe is not cut, because other programs and files take it; how far a work is; durations in two forms."""

import os
import pty
import re
import signal
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


def on_a_terminal(script: str, kind: str = "xterm", status: int = 0, stderr: int | None = None) -> str:
    """What a script shows on a terminal of a kind, 80 columns wide, until it ends with a status; stderr: a file to have instead."""
    master, slave = pty.openpty()
    variables = environment(None, COLUMNS="80", TERM=kind, PYTHONIOENCODING="utf-8")
    errors = slave if stderr is None else stderr
    process = subprocess.Popen([sys.executable, "-c", script], env=variables, stdout=slave, stderr=errors)
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
    assert process.wait() == status, seen.decode()
    return seen.decode()


def test_on_a_terminal_there_is_one_live_display_which_fits_and_goes():
    text = on_a_terminal(NESTED)
    assert "step 19/20 | loss 1.2345 | 0:51 left" in text and "600 of 2,400, 0:00 left" in text
    assert "Traceback" not in text and text.count("a line") == 1
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert max(len(line) for line in re.split(r"[\r\n]+", shown)) <= 80
    assert shown.rstrip().endswith("the end")


def test_errors_reach_whoever_reads_them_while_there_is_a_display(tmp_path):
    """As the speedrun does, which shows them and repeats the last one at its end."""
    script = "import sys\nfrom nanochat.platform.console import progress\n"
    script += "with progress('train base', 1):\n    print('nanochat: error: lost', file=sys.stderr)\n"
    assert on_a_terminal(script).count("nanochat: error: lost") == 1
    with (tmp_path / "errors").open("w") as errors:
        assert "lost" not in on_a_terminal(script, stderr=errors.fileno())
    assert (tmp_path / "errors").read_text() == "nanochat: error: lost\n"


KILLED = """
import os, signal
from nanochat.platform.console import progress
from nanochat.train import trainer
trainer.SAME_REQUEST = -1.0
with trainer.Interrupt().handling(), progress("train base", 1):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_second_signal_leaves_the_terminal_its_cursor():
    text = on_a_terminal(KILLED, status=-signal.SIGTERM)
    assert "ending at once, without saving" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_lines_are_said_where_no_display_can_be_drawn():
    """On a dumb terminal, and in a file that FORCE_COLOR gives colours to."""
    script = "from nanochat.platform import console\nconsole.LINE_SECONDS = 0.0\n"
    script += "with console.progress('read', 2) as advance:\n    advance(state='half')\n"
    assert on_a_terminal(script, "dumb") == "read: half\r\n"
    env = environment(None, FORCE_COLOR="1", TERM="xterm")
    assert subprocess.run([sys.executable, "-c", script], env=env, capture_output=True).stdout == b"read: half\n"


def test_nothing_is_left_to_do_of_more_than_was_estimated(monkeypatch, capsys):
    monkeypatch.setattr("nanochat.platform.console.LINE_SECONDS", 0.0)
    with progress("fetch (MB)", 100) as advance:
        advance(105)
    assert capsys.readouterr().out == "fetch (MB): 105 of 100, 0:00 left\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_what_the_encoding_of_the_output_lacks_is_replaced(encoding):
    """As PYTHONIOENCODING or the locale of a site says; an error would end training at its first step."""
    script = "from nanochat.platform.console import progress, say\nsay('5 steps – é → 6')\n"
    script += "with progress('bar', 2) as advance:\n    advance()\n"
    env = environment(None, PYTHONIOENCODING=encoding)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True)
    assert done.returncode == 0 and done.stdout == "5 steps – é → 6\n".encode(encoding, "replace"), done.stderr
