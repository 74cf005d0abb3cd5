"""Comparable timings of GPU work: events around each call, a cold L2 cache, and variants that take turns."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

# bytes read before each call: 20 × the L2 cache of an H200, and long enough to hide a launch of 400 µs
FLUSH_BYTES = 2**30


def interleaved(
    variants: Mapping[str, Callable[[int], object]],
    rounds: int,
    prepare: Mapping[str, Callable[[int], None]] | None = None,
) -> dict[str, list[float]]:
    """Return `rounds` samples of GPU time in milliseconds for each variant, after three warm-up calls.

    A variant is called with the number of the round, so that it can use different inputs each time. Reading a large buffer
    empties the cache: reads, unlike writes, leave nothing to write back during the call. The host launches the call while that
    read runs, so that launch time is not included (see launch_microseconds). `prepare` runs before each call, untimed.
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
            flush.sum()
            flush.sum()
            start.record()
            variants[name](number)
            end.record()
            if number >= 0:
                events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


class Graph:
    """A call that is captured in a CUDA graph the first time and then replayed, so that its timing contains no launches."""

    def __init__(self, run: Callable[[int], object]):
        self.run, self.graph = run, None

    def __call__(self, number: int) -> object:
        if self.graph is None:
            warm_up = torch.cuda.Stream()  # torch requires warm-up on a side stream before it captures autograd
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):
                self.run(number)
                self.run(number)
            torch.cuda.current_stream().wait_stream(warm_up)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.run(number)
        self.graph.replay()
        return self.result


def sustained(
    variants: Mapping[str, Callable[[int], object]], seconds: float = 0.2, rounds: int = 3
) -> dict[str, list[float]]:
    """Return `rounds` samples of GPU time in milliseconds for each variant, running without a pause as in training.

    A GPU that computes products all the time reaches its power limit and lowers its clock, so that a variant that takes less power
    may be faster than one that is faster after a pause. A sample runs a variant for `seconds`, of which the first half warms up.
    """
    graphs = {name: Graph(run) for name, run in variants.items()}
    counts = {}
    for name, graph in graphs.items():
        graph(0)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            graph(0)
        end.record()
        torch.cuda.synchronize()
        counts[name] = max(2, int(1e3 * seconds / 2 / (start.elapsed_time(end) / 3)))
    samples = {name: [] for name in variants}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for number in range(2 * counts[name]):
                if number == counts[name]:
                    start.record()
                graph(0)
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end) / counts[name])
    return samples


def launch_microseconds(run: Callable[[int], object], rounds: int = 30) -> float:
    """Return the median host time in µs to launch one call on an idle GPU."""
    times = []
    for number in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(number)
        times.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return 1e6 * median(times)


def transient_bytes(run: Callable[[int], object]) -> int:
    """Return the peak memory of a call in bytes, without the memory of its results."""
    run(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = run(1)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()  # includes the results
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - allocated
