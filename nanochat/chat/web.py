"""`nanochat web`: load the model once for each GPU, and serve until the user ends it."""

import ipaddress
import os
import socket
import threading
from dataclasses import replace
from functools import partial

import torch

from nanochat.chat.worker import Worker
from nanochat.checkpoint import load_model
from nanochat.inference.engine import Engine
from nanochat.options.chat import WebOptions
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime, start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.platform.signals import handled


def web(options: WebOptions, paths: Paths) -> None:
    """Serve the newest model of a stage. Raises UserError when the address cannot be listened on."""
    try:
        from nanochat.chat.app import Service, create_app
        from nanochat.chat.connections import make_server, most_connections
    except ModuleNotFoundError as error:
        raise UserError(f"nanochat web needs the package {error.name}; install it with: pip install 'nanochat[web]'")
    listener = listen(options.host, options.port)
    with start_runtime(options.device) as runtime:
        workers = []
        for device in devices(runtime, options.gpus):
            model, tokenizer, _ = load_model(paths, options.source, replace(runtime, device=device), options.impl)
            make_engine = partial(Engine, model, tokenizer, rows=options.rows, frozen=True)
            workers.append(Worker(str(device), make_engine, options.queue))
    name = f"{paths.run_name}-{options.source}"
    hosts = hosts_of(listener.getsockname()[0], options.host)
    service = Service(workers, name, options.temperature, options.top_k, options.max_tokens, hosts)
    server = make_server(create_app(service), most_connections(), options.seconds_to_end)
    for worker in workers:
        worker.start()
    # not in the main thread, where uvicorn would end the process by the signal that asked for it
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")

    def end(*_) -> None:
        if service.ending:
            os._exit(130)
        service.ending = server.should_exit = True

    with handled(end):
        thread.start()
        host, port = listener.getsockname()[:2]
        say(
            f"nanochat ({name} on {', '.join(worker.name for worker in workers)}): http://{host}:{port} ; Ctrl-C ends it"
        )
        while thread.is_alive():
            thread.join(0.2)
    for worker in workers:
        worker.join(5)
    say("ended")


def devices(runtime: Runtime, gpus: int) -> list[torch.device]:
    """The devices that get a worker each. Raises UserError for more GPUs than there are."""
    if runtime.device.type != "cuda":
        return [runtime.device]
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
