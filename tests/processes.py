"""What tests of several processes share."""

import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing as mp


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(worker: Callable, processes: int, *arguments) -> None:
    """Call worker(rank, processes, port, *arguments) in so many processes: forks of one that has imported what takes seconds."""
    multiprocessing.set_forkserver_preload(["torch.distributed.checkpoint", "tests.nanochat.models"])
    arguments = (processes, free_port(), *arguments)
    mp.start_processes(worker, arguments, nprocs=processes, start_method="forkserver")


def workers(launcher: int) -> list[int]:
    """The processes that a launcher started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        if lines.get("PPid") == str(launcher):
            found.append(int(lines["Pid"]))
    return sorted(found)
