"""The script of continuous integration fails where tests of the library would be skipped."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("slurmctld", "cmake", "ninja", "g++", "clang-format-14", "chromium")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="continuous integration runs on Linux")


@pytest.mark.parametrize(
    ("cmake", "without", "message"),
    [
        ("3.24.0", "clang-format-14", "clang-format-14 is missing; install clang-format-14"),
        ("3.24.0", "g++", "g++ is missing; install g++"),
        ("3.9.6", "", "cmake is 3.9.6, wanted 3.24 or newer"),
        ("3.24.0", "", ""),
        ("4.1.2", "", ""),
    ],
)
def test_missing_tools(tmp_path, cmake, without, message):
    """`make` is a stand-in too, so that the script ends after its checks; without apt-get nothing is installed."""
    for name in ("bash", "dirname", "id", "grep", "sort", "head"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for name in {*TOOLS, "make"} - {without}:
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} version {cmake}\n")
        (tmp_path / name).chmod(0o755)
    run = [str(tmp_path / "bash"), ROOT / ".ci" / "run"]
    done = subprocess.run(run, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert (done.returncode, message in done.stderr) == (int(bool(message)), True), done.stdout + done.stderr
    assert bool(message) != ("make version" in done.stdout)
