"""A process that hangs or dies: the others say so within the timeout, and the run goes on from its last save."""

import os
import signal
import subprocess
import time

import pytest
import torch

from nanochat.platform.distributed import lost_another_process
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
    # a GPU's kernels are made first, by one process sooner than by the other
    timeout = "8" if device == "cpu" else "20"
    process = subprocess.Popen(
        command(*arguments, processes=2), env=environment(base, NANOCHAT_TIMEOUT=timeout), stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    while len([m for m in read_metrics(paths.metrics("base")) if "loss" in m]) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    started, victim = time.monotonic(), workers(process.pid)[-1]
    os.kill(victim, number)
    if number == signal.SIGSTOP:
        told = next(line for line in process.stderr if "nanochat: error: process" in line)
        assert f"did not answer for {timeout} s" in told and "last checkpoint" in told
        # torchrun would wait 30 s before it kills a process that does not end
        os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - started < 90
    again = nanochat(base, *arguments, processes=2)
    assert again.returncode == 0 and "resuming base at step" in again.stdout, again.stderr
    steps = [m["step"] for m in read_metrics(paths.metrics("base")) if "loss" in m]
    assert steps == list(range(24))


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:30821",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:446] Read error [127.0.0.1]:5912: Connection reset by peer",
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "NCCL error in: ProcessGroupNCCL.cpp:3384, remote process exited or there was a network error, NCCL version 2.27.5",
        "NCCL communicator was aborted on rank 0. Original reason for failure was: [PG 0] Watchdog caught collective operation "
        "timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 12000 milliseconds before timing out.",
        "NCCL timed out",
    ],
)
def test_messages_of_a_lost_process(message):
    assert lost_another_process(RuntimeError(message))


@pytest.mark.parametrize(
    "message",
    [
        "Peer certificate cannot be authenticated with given CA certificates",
        "CUDA error: peer access is not supported between these two devices",
        "HTTPSConnectionPool(host='huggingface.co', port=443): Read timed out. (read timeout=10)",
        "[Errno 111] Connection refused",
        "[Errno 32] Broken pipe",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        "NCCL error in: ProcessGroupNCCL.cpp:77, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.5",
    ],
)
def test_other_errors_do_not_blame_another_process(message):
    assert not lost_another_process(RuntimeError(message))
