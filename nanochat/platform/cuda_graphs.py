"""Work on tensors that stay where they are, replayed from a CUDA graph: the host hands over one graph, not every kernel."""

from collections.abc import Callable

import torch
from torch import Tensor


class Replayed:
    """Calls of `work`: the first `warm_up` run it, for kernels are compiled and libraries loaded then; the next one captures
    a CUDA graph in `pool`, and from there on the graph is replayed. Without a pool every call runs the work.

    Inside of another capture the work is run, so that it becomes part of that. Graphs with one pool share their memory: what
    one returns is valid until the next is replayed.
    """

    def __init__(self, work: Callable[[], Tensor | None], pool: tuple | None, warm_up: int = 2):
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
            # thread_local: NCCL's watchdog and the loader's threads may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.result = self.work()
            self.graph = graph  # only when whole: a capture that ran out of memory is tried again
        self.graph.replay()
        return self.result
