"""Call a function in several processes of this machine, as torchrun would start them, each on a GPU of its own.

The processes are forks of one that has imported this package, which takes half a minute on some machines, and has not touched a GPU.
"""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

import torch

from nanochat.platform.distributed import Runtime, start_runtime

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["bench.eight"])  # which imports whatever runs in them


class Ranks:
    """Processes that call function(runtime, *arguments) together, on the GPUs from number `first` on.

    function: one of a module; it returns a dictionary that can be pickled. limit: seconds after which they are killed.
    """

    def __init__(
        self, function: Callable[..., dict], *arguments, processes: int, device: str, limit: float, first: int = 0
    ):  # fmt: skip
        self.limit, self.deadline = limit, time.monotonic() + limit
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes: dict[Connection, int] = {}  # of those that have not answered → rank
        self.processes = []
        for rank in range(processes):
            variables = {
                "RANK": rank, "LOCAL_RANK": first + rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "bench",
            }  # fmt: skip
            ours, theirs = FORKS.Pipe(duplex=False)
            process = FORKS.Process(target=_answer, args=(theirs, variables, device, function, arguments), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends with the process
            self.pipes[ours] = rank
            self.processes.append(process)

    def results(self) -> list[dict]:
        """What each process returned, in order of rank; or one dictionary whose "note" says why there is no result.

        The first process that fails ends the others.
        """
        found: dict[int, dict] = {}
        try:
            while self.pipes:
                ready = wait(list(self.pipes), max(0.0, self.deadline - time.monotonic()))
                if not ready:
                    return [{"note": f"no result after {self.limit:.0f} s"}]
                for pipe in ready:
                    rank = self.pipes.pop(pipe)
                    try:
                        found[rank] = pipe.recv()
                    except EOFError:
                        self.processes[rank].join()
                        return [{"note": f"process {rank} ended with status {self.processes[rank].exitcode}"}]
                    if "note" in found[rank]:
                        return [found[rank]]
            for process in self.processes:
                process.join(10)
            return [found[rank] for rank in sorted(found)]
        finally:
            for process in self.processes:
                process.kill()
                process.join()


def _answer(pipe: Connection, variables: dict, device: str, function: Callable[..., dict], arguments: tuple) -> None:
    """What a process does: send what the function returns, or a note with its error."""
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)  # as torchrun has it
    try:
        with start_runtime(device) as runtime:
            pipe.send(function(runtime, *arguments))  # before the group ends, which may hang
    except Exception as error:  # whatever it is, the parent reports it
        first = next(iter(str(error).splitlines()), "")
        pipe.send({"note": f"{type(error).__name__}: {first[:300]}"})


def call(function: Callable[[Runtime], dict], *arguments, device: str, limit: float = 300) -> dict:
    """What function(runtime, *arguments) returns in a process of its own, which leaves no context on the GPU behind."""
    return Ranks(function, *arguments, processes=1, device=device, limit=limit).results()[0]
