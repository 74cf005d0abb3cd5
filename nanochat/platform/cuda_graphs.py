"""Replays work on tensors at fixed addresses from a CUDA graph: the host launches one graph instead of every kernel."""

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 2  # calls of a work that are not replayed yet
_capture_lock = threading.Lock()  # a process may capture one graph at a time


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """The stream on which graphs of a device are captured: torch's own one is on the device of the first capture in the process."""
    return torch.cuda.Stream(device)


def _raise_first_out_of_memory(error: BaseException) -> None:
    """Raise the torch.OutOfMemoryError that led to this error, if one did: ending the capture that it broke fails in another way."""
    seen = error.__context__
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError):
            raise seen from None
        seen = seen.__context__


class Replayed:
    """A function that runs `work`, from a CUDA graph if possible; it returns what the work returns.

    The first `warm_up` calls run the work itself, because kernels are compiled and libraries are loaded then. The next call
    captures a CUDA graph with memory from `pool`, and from then on the graph is replayed. Without a pool every call runs the work.
    Inside of another capture the work is run, and becomes part of that graph. Graphs with the same pool share their memory: the
    result of one is valid until the next one is replayed. The work must be on the thread's current device.
    """

    def __init__(self, work: Callable[[], Tensor | None], pool: tuple | None, warm_up: int = WARM_UP):
        self.work, self.pool, self.warm_up = work, pool, warm_up
        self.warmed_up = 0  # calls that have run the work
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Tensor | None = None

    def __call__(self) -> Tensor | None:
        if self.pool is None or self.warmed_up < self.warm_up or torch.cuda.is_current_stream_capturing():
            result = self.work()
            self.warmed_up += 1  # not when the work failed: it would be captured without a warm-up
            return result
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with _capture_lock:
                    stream = _capture_stream(torch.cuda.current_device())
                    # thread_local: NCCL's watchdog and the loader's threads may call CUDA during the capture
                    with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                        self.result = self.work()
            except Exception as error:
                _raise_first_out_of_memory(error)
                raise
            self.graph = graph  # only when complete: a capture that runs out of memory is repeated by the next call
        self.graph.replay()
        return self.result
