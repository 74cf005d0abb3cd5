"""A process that hangs or dies: the others say so within the timeout, and the run resumes from its last save."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch

from nanochat.platform.distributed import lost_another_process, start_runtime
from nanochat.platform.paths import Paths
from nanochat.train.metrics import read_metrics
from tests.conftest import TINY_BASE, command, environment, nanochat
from tests.processes import workers

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=two_gpus)])
@pytest.mark.parametrize("number", [pytest.param(signal.SIGSTOP, marks=pytest.mark.long), signal.SIGKILL])
def test_the_others_report_it_and_the_run_resumes(base, number, device):
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
    steps = read_metrics(paths.metrics("base"), "loss")
    assert [m["step"] for m in steps] == list(range(24))
    for m in steps:  # of both processes
        assert m["tokens"] == 256 * (m["step"] + 1) and m["tokens_per_second"] * m["dt"] == pytest.approx(256)


def test_what_a_graph_belongs_to_is_gone_before_the_processes_part(monkeypatch):
    """NCCL waits for the end of every graph that was captured with it, also of one that only a cycle of references keeps."""

    class Captured:
        pass

    alive = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("nanochat.platform.distributed.end_with_parent", lambda _: None)
    for name, result in (("init_process_group", None), ("get_rank", 0), ("get_world_size", 1)):
        monkeypatch.setattr(torch.distributed, name, lambda *_, result=result, **__: result)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: alive.append(captured() is not None))
    gc.disable()
    try:
        with start_runtime("cpu"):
            graph = Captured()
            graph.itself, captured = graph, weakref.ref(graph)
            del graph
    finally:
        gc.enable()
    assert alive == [False]


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


# A function that gloo's thread calls when a collective is complete stands for what that thread does by itself: it releases the
# tensor, for which it needs the GIL. In the second process it is still at it when the process has done its work.
LATE = """
import atexit, sys, threading, time
from pathlib import Path
import torch
import torch.distributed as dist

finished, kept = [], []

def reduce_with_a_late_thread(runtime, seconds):
    began, registered = threading.Event(), Path(__file__).with_name("registered")

    def busy(_):
        began.set()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.001)
        finished.append(True)

    while runtime.rank == 0 and not registered.exists():
        time.sleep(0.01)
    work = dist.all_reduce(torch.ones(1), async_op=True)
    if runtime.rank == 1:
        work.get_future().then(busy)
        registered.touch()
        began.wait()
    else:
        work.wait()

"""


def run_late(tmp_path, ending: str) -> subprocess.CompletedProcess:
    """Run LATE and then `ending` in two processes."""
    script = tmp_path / "late.py"
    script.write_text(LATE + ending)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # by itself torchrun starts Python with -u; with a buffer a process must flush what it has printed
    program, env = ["--no-python", sys.executable, script], environment(tmp_path, PYTHONUNBUFFERED="")
    return subprocess.run([*launcher, *program], capture_output=True, text=True, timeout=120, env=env)


def test_the_threads_of_gloo_end_with_the_runtime(tmp_path):
    run = run_late(
        tmp_path,
        """
from nanochat.platform.distributed import start_runtime
with start_runtime("cpu") as runtime:
    import torch._dynamo, torch.distributed.checkpoint  # as models and checkpoints do
    reduce_with_a_late_thread(runtime, seconds=1)
assert runtime.rank == 0 or finished, "gloo's thread still runs"
""",
    )
    assert run.returncode == 0, run.stderr


def test_a_process_that_has_done_its_work_ends_with_status_0_whatever_threads_run(tmp_path):
    run = run_late(
        tmp_path,
        """
import nanochat.evaluate.chat
from nanochat.cli import main
def evaluate(options, runtime):
    kept.append(dist.group.WORLD)  # as a runtime on GPUs keeps its group for control
    atexit.register(print, "exit function of", runtime.rank)
    print("done")
    reduce_with_a_late_thread(runtime, seconds=1000)
    return {}
nanochat.evaluate.chat.evaluate_chat = evaluate
main(["evaluate", "chat", "--device", "cpu"])
""",
    )
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == ["done", "done", "exit function of 0", "exit function of 1"]
