import time

import pytest

from nanochat.inference.sandbox import run_python


def test_a_program_that_ends_well():
    outcome = run_python("import math\nprint(math.sqrt(16))\nopen('scratch.txt', 'w').write('fine')")
    assert outcome.ok and outcome.output == "4.0\n"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("raise SystemExit(3)", ""),
        ("x = 'a' * 10**9", "MemoryError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "not allowed"),
        ("import subprocess\nsubprocess.run(['true'])", "not allowed"),
        ("import os\nos.fork()", "not allowed"),
        ("import os\nos.system('true')", "not allowed"),
        ("open('/tmp/nanochat-sandbox-escape', 'w')", "not allowed"),
        ("import os\nos.open('/tmp/nanochat-sandbox-escape', os.O_CREAT | os.O_WRONLY)", "not allowed"),
        ("import os\nos.remove('/tmp/nanochat-sandbox-escape')", "not allowed"),
        ("import ctypes\nctypes.CDLL(None)", "not allowed"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_what_fails_or_is_refused(program, reason):
    outcome = run_python(program)
    assert not outcome.ok and reason in outcome.output


def test_an_endless_program_is_killed():
    started = time.perf_counter()
    outcome = run_python("while True: pass", timeout=1.0)
    assert not outcome.ok and "ran past 1 s" in outcome.reason
    assert time.perf_counter() - started < 5


def test_output_without_end_is_bounded():
    outcome = run_python("while True: print('x' * 1000)", timeout=3.0)
    assert not outcome.ok and len(outcome.output) <= 4096
