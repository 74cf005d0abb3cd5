"""A process that hangs or dies: the others say so within the timeout, and the run goes on from its last save."""

import os
import signal
import subprocess
import time

import pytest
import torch

from nanochat.platform.paths import Paths
from nanochat.train.metrics import read_metrics
from tests.conftest import TINY_BASE, command, environment, nanochat
from tests.processes import workers

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=two_gpus)])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_the_others_say_so_and_the_run_goes_on(base, number, device):
    paths = Paths(base)
    arguments = ("train", "base", *TINY_BASE, "--total-batch-size", "256", "--device", device, "--execution", "eager")
    timeout = (
        "8" if device == "cpu" else "20"
    )  # a GPU's kernels are made first, by one process sooner than by the other
    process = subprocess.Popen(
        command(*arguments, processes=2), env=environment(base, NANOCHAT_TIMEOUT=timeout), stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    while len([m for m in read_metrics(paths.metrics("base")) if "loss" in m]) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    started = time.monotonic()
    os.kill(workers(process.pid)[-1], number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - started < 90
    if number == signal.SIGSTOP:
        assert (
            "nanochat: error: process" in errors
            and f"did not answer for {timeout} s" in errors
            and "last checkpoint" in errors
        )
    again = nanochat(base, *arguments, processes=2)
    assert again.returncode == 0 and "resuming base at step" in again.stdout, again.stderr
    steps = [m["step"] for m in read_metrics(paths.metrics("base")) if "loss" in m]
    assert steps == list(range(24))
