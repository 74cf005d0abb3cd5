"""Times of GPU work that can be compared: events around each call, a cold L2 cache, variants taking turns."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

FLUSH_BYTES = 2**30  # read before each call: 20 × the L2 of an H200, and long enough to hide a launch of 400 µs


def interleaved(
    variants: Mapping[str, Callable[[int], object]],
    rounds: int,
    prepare: Mapping[str, Callable[[int], None]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of GPU time of each variant, `rounds` samples each, after three calls that do not count.

    A variant is called with the number of the round, so that it can take another set of inputs each time. The cache is
    emptied by reading, which leaves nothing to be written back during the call; while that read runs the call is
    launched, so the launch is not in the number (see launch_microseconds). `prepare` runs before, untimed.
    """
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda").normal_()
    events = {name: [] for name in variants}
    names = list(variants)
    for number in range(-3, rounds):
        for turn in range(len(names)):
            name = names[(turn + number) % len(names)]
            if prepare and name in prepare:
                prepare[name](number)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.sum(), flush.sum()
            start.record()
            variants[name](number)
            end.record()
            if number >= 0:
                events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


class Graph:
    """A call replayed from a CUDA graph, which is captured the first time; so no launch is in its time."""

    def __init__(self, run: Callable[[int], object]):
        self.run, self.graph = run, None

    def __call__(self, number: int) -> object:
        if self.graph is None:
            side = torch.cuda.Stream()  # where autograd's accumulation may settle before it is captured
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.run(number), self.run(number)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.run(number)
        self.graph.replay()
        return self.result


def launch_microseconds(run: Callable[[int], object], rounds: int = 30) -> float:
    """Median time of the processor to hand one call to an idle GPU, in µs."""
    times = []
    for number in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(number)
        times.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return 1e6 * median(times)


def transient_bytes(run: Callable[[int], object]) -> int:
    """Memory that a call takes at its peak beyond what it returns."""
    run(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = run(1)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - held
