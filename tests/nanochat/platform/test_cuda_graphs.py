"""Replaying: how often the work runs, is captured and replayed. A stand-in takes the place of CUDA graphs."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from nanochat.platform import cuda_graphs
from nanochat.platform.cuda_graphs import Replayed


class Recorder:
    """Stands in for torch.cuda's graphs: a capture runs the work without effect, as on a GPU, where nothing is computed then."""

    def __init__(self, monkeypatch):
        self.replays, self.capturing, self.fail, self.streams = 0, False, False, []
        recorder = self

        class Graph:
            def replay(self):
                recorder.replays += 1

        @contextmanager
        def graph(graph, **options):
            assert not recorder.capturing, "one capture at a time"
            recorder.capturing = True
            recorder.streams.append(options["stream"])
            try:
                if recorder.fail:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                yield
            finally:
                recorder.capturing = False

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: int(threading.current_thread().name[-1] == "1"))
        monkeypatch.setattr(cuda_graphs, "_capture_stream", lambda device: f"stream of {device}")


def test_every_call_counts_once(monkeypatch):
    """Warm-up calls run the work, every later one is a replay: the call that captures is replayed too."""
    recorder, ran = Recorder(monkeypatch), []
    replayed = Replayed(lambda: ran.append(recorder.capturing), pool=(0, 1), warm_up=2)
    for _ in range(5):
        replayed()
    assert ran == [False, False, True] and recorder.replays == 3


def test_a_capture_or_a_warm_up_that_fails_is_tried_again(monkeypatch):
    recorder, ran = Recorder(monkeypatch), []

    def work():
        if len(ran) == 0:
            ran.append("failed")
            raise torch.OutOfMemoryError("CUDA out of memory")
        ran.append("ran")

    replayed = Replayed(work, pool=(0, 1), warm_up=1)
    with pytest.raises(torch.OutOfMemoryError):
        replayed()
    replayed()
    assert ran == ["failed", "ran"] and replayed.graph is None  # the second call is the warm-up
    recorder.fail = True
    with pytest.raises(torch.OutOfMemoryError):
        replayed()
    recorder.fail = False
    replayed()
    assert recorder.replays == 1 and replayed.graph is not None


def test_out_of_memory_in_a_capture_is_what_is_raised(monkeypatch):
    """On a GPU the end of a capture that ran out of memory raises an error of its own, which would hide the cause."""

    class Broken:
        def __init__(self, graph, **options):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *exc):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def work():
        if work.calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        work.calls += 1

    work.calls = 0
    Recorder(monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph", Broken)
    replayed = Replayed(work, pool=(0, 1), warm_up=1)
    replayed()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        replayed()
    assert replayed.graph is None


def test_without_a_pool_the_work_always_runs():
    ran = []
    replayed = Replayed(lambda: ran.append(1), pool=None)
    for _ in range(4):
        replayed()
    assert len(ran) == 4


def test_threads_capture_one_after_the_other_each_on_a_stream_of_its_device(monkeypatch):
    recorder, together = Recorder(monkeypatch), threading.Barrier(2)

    def work():
        if recorder.capturing:
            time.sleep(0.05)

    def capture():
        replayed = Replayed(work, pool=(0, 1), warm_up=0)
        together.wait(10)
        replayed()

    with ThreadPoolExecutor(2, thread_name_prefix="device") as pool:
        for found in [pool.submit(capture) for _ in range(2)]:
            found.result()
    assert sorted(recorder.streams) == ["stream of 0", "stream of 1"] and recorder.replays == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_threads_of_two_gpus_capture_at_the_same_time():
    together = threading.Barrier(2)

    def count(device: int) -> list[float]:
        torch.cuda.set_device(device)
        x = torch.zeros(1000, device=device)
        replayed = Replayed(lambda: x.add_(1).sum(), torch.cuda.graph_pool_handle(), warm_up=1)
        found = []
        for _ in range(4):
            together.wait(30)
            found.append(replayed().item())
        assert cuda_graphs._capture_stream(device).device.index == device
        return found

    with ThreadPoolExecutor(2) as pool:
        for found in [pool.submit(count, device) for device in range(2)]:
            assert found.result() == [1000.0, 2000.0, 3000.0, 4000.0]
