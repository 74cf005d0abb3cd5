"""`nanochat web`: a process with the model for each GPU, and the server, which has no model, until the user ends it."""

import gc
import ipaddress
import signal
import socket
import sys
import threading
from functools import partial
from multiprocessing import forkserver, util

from nanochat.options.chat import WebOptions
from nanochat.platform.console import say
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.platform.signals import handled


def web(options: WebOptions, paths: Paths) -> None:
    """Serve the newest model of a stage. Raises UserError when the address cannot be listened on."""
    listener = listen(options.host, options.port)
    if sys.platform == "linux":
        forkserver.set_forkserver_preload(["nanochat.chat.engine_process"])
        util.abstract_sockets_supported = False  # before Python 3.10.9 every user of the machine could connect to one
        try:
            with handled(signal.SIG_IGN):  # which it inherits: a terminal's signals are for the server
                forkserver.ensure_running()  # it imports torch while this process does
        except OSError as error:
            raise UserError(
                f"no process of a worker can be started ({error}); set TMPDIR to a folder with a short path"
            )
    try:
        from nanochat.chat.app import Service, create_app
        from nanochat.chat.connections import make_server, most_connections
    except ModuleNotFoundError as error:
        raise UserError(f"nanochat web needs the package {error.name}; install it with: pip install 'nanochat[web]'")
    from nanochat.chat.worker import Worker

    tokenizer, loads = models(paths, options)
    workers: list[Worker] = []
    try:
        for name, load in loads.items():
            workers.append(Worker(name, load, options.queue))
        for worker in workers:
            worker.wait()
        name = f"{paths.run_name}-{options.source}"
        address, port = listener.getsockname()[:2]
        hosts = hosts_of(address, options.host)
        service = Service(workers, tokenizer, name, options.temperature, options.top_k, options.max_tokens, hosts)
        server = make_server(create_app(service), most_connections(), options.seconds_to_end)
        gc.freeze()  # a collection that looks through all of torch would stop the answers
        # not in the main thread, where uvicorn would end the process by the signal that asked for it
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server", daemon=True)

        def end(*_) -> None:
            if service.ending:
                raise SystemExit(130)
            service.ending = server.should_exit = True

        with handled(end):
            thread.start()
            say(f"nanochat ({name} on {', '.join(loads)}): http://{address}:{port} ; Ctrl-C ends it")
            while thread.is_alive():
                thread.join(0.2)
    finally:
        for worker in workers:
            worker.end()
        for worker in workers:
            worker.join(5)
    say("ended")


def models(paths: Paths, options: WebOptions) -> tuple:
    """The tokenizer, and of each device, by its name, what loads the model in a worker's process. Raises UserError."""
    from nanochat.chat import engine_process
    from nanochat.checkpoint import find_checkpoint
    from nanochat.platform.distributed import Runtime, compute_dtype, pick_device

    kind = pick_device(options.device)
    found = devices(kind, options.gpus)
    _, tokenizer, meta = find_checkpoint(paths, options.source, Runtime(0, 1, found[0], compute_dtype(kind)))
    return tokenizer, {
        str(device): partial(engine_process.load, paths, options, meta["step"], device) for device in found
    }


def devices(kind: str, gpus: int) -> list:
    """The devices, of a kind, that get a worker each. Raises UserError for more GPUs than there are."""
    import torch

    if kind != "cuda":
        return [torch.device(kind)]
    there = torch.cuda.device_count()
    if gpus > there:
        raise UserError(f"--gpus {gpus}: this machine has {there}")
    return [torch.device("cuda", number) for number in range(gpus or there)]


def hosts_of(address: str, host: str) -> frozenset[str] | None:
    """The names by which clients may call a server that listens on `address`, given as `host`: None, any, if other machines can."""
    if not ipaddress.ip_address(address).is_loopback:
        return None
    return frozenset({"localhost", "127.0.0.1", "::1", address, host.lower()})


def listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)  # clients may come before the server is ready
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port} ({reason}); choose another --host or --port")
