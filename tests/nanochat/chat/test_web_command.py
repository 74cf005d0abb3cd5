"""`nanochat web` as a command: how it ends, what it leaves behind, and what is told before it serves."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from nanochat.chat import engine_process
from nanochat.chat.web import devices
from nanochat.inference.decoder import Decoder
from nanochat.options.chat import WebOptions
from nanochat.options.model import Implementations
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths, steps_in
from tests.conftest import assert_fails_with, command, environment, nanochat


@pytest.fixture
def started(trained_base, tmp_path):
    """A server in a process of its own, which leads a group of processes, and its address; its temporary files are in tmp_path."""
    process = subprocess.Popen(
        command("web", "--port", "0", "--device", "cpu", "--seconds-to-end", "20"),
        env=environment(trained_base) | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    line = process.stdout.readline()
    assert "http://127.0.0.1:" in line, line + process.stderr.read()
    yield process, int(line.rpartition(" ;")[0].rpartition(":")[2])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_process_loads_what_the_options_say(trained_base, monkeypatch):
    """The step that the server chose, and not a newer one; implementations, rows, and what is prepared for requests without options."""
    paths, prepared = Paths(trained_base), []
    steps = steps_in(paths.checkpoints("sft"))
    monkeypatch.setattr(Decoder, "prepare", lambda self, *given: prepared.append(given))
    options = WebOptions(device="cpu", rows=3, top_k=7, impl=Implementations(attention="reference"))
    engine = engine_process.load(paths, options, max(steps), torch.device("cpu"))()
    assert engine.rows == 3 and prepared == [(3, 7)] and engine.cache.pages.keep
    assert engine.model.config.impl.attention == "reference"
    with pytest.raises(UserError, match=f"step {max(steps) + 1} of sft"):
        engine_process.load(paths, options, max(steps) + 1, torch.device("cpu"))


@contextlib.contextmanager
def asking(port: int):
    """A connection to which an answer comes, and the first of it."""
    body = json.dumps(
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 300, "temperature": 2, "top_k": 200}
    ).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            f"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        yield connection, connection.recv(1000)


def left(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            found += [int(path.parent.name)] if int(its_group) == group and state != "Z" else []
    return found


def wait_for_the_end_of_all(process: subprocess.Popen) -> None:
    """Until no process of the group is left."""
    deadline = time.monotonic() + 20
    while processes := left(process.pid):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_answer_comes_to_its_end_when_the_server_is_asked_to_end(started, number):
    """By Ctrl-C, which all of its processes get, or by SIGTERM, which it gets alone."""
    process, port = started
    with asking(port) as (connection, answer):
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        answer += b"".join(iter(lambda: connection.recv(4096), b""))
    assert b'data: {"finish": "' in answer
    assert process.wait(30) == 0, process.stderr.read()
    assert process.stdout.read().endswith("ended\n") and process.stderr.read() == ""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    wait_for_the_end_of_all(process)


def test_a_second_signal_ends_the_server_at_once(started, tmp_path):
    """Without waiting for answers, and without leaving files behind."""
    process, port = started
    with contextlib.ExitStack() as stack:
        talks = [stack.enter_context(asking(port)) for _ in range(8)]
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(ConnectionError):
            while True:  # until the signal has come
                socket.create_connection(("127.0.0.1", port)).close()
        process.send_signal(signal.SIGINT)
        answers = [answer + b"".join(iter(partial(connection.recv, 4096), b"")) for connection, answer in talks]
    assert process.wait(10) == 130 and not all(b'data: {"finish": "' in answer for answer in answers)
    wait_for_the_end_of_all(process)
    assert process.stderr.read() == "" and list(tmp_path.iterdir()) == []


def test_no_process_outlives_a_server_that_is_killed(started):
    """Also when nothing is generated, so that no worker writes to the server."""
    process, _ = started
    assert len(left(process.pid)) >= 3  # the server, the one that forks, and the worker
    process.kill()
    process.wait()
    wait_for_the_end_of_all(process)
    assert process.stderr.read() == ""


def test_a_model_that_cannot_be_loaded_is_one_line(trained_base, tmp_path):
    """Whether the server finds it, or the process of a worker."""
    assert_fails_with(
        nanochat(trained_base, "web", "--port", "0", "--device", "cpu", "--source", "rl"), "no checkpoint"
    )
    shutil.copytree(trained_base, tmp_path / "base")
    for weights in tmp_path.glob("base/**/sft/*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    result = nanochat(tmp_path / "base", "web", "--port", "0", "--device", "cpu")
    assert_fails_with(result, "model.safetensors")


def test_each_gpu_gets_a_worker(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [str(device) for device in devices("cuda", 0)] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [str(device) for device in devices("cuda", 1)] == ["cuda:0"]
    with pytest.raises(UserError, match="--gpus 4: this machine has 3"):
        devices("cuda", 4)
    assert WebOptions().host == "127.0.0.1"


def test_a_port_that_is_taken(trained_base):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_fails_with(
            nanochat(trained_base, "web", "--port", port, "--device", "cpu"), f"127.0.0.1:{port}", "--port"
        )


def test_a_missing_package_is_named(trained_base, tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError('none', name='uvicorn')")
    result = nanochat(trained_base, "web", "--port", "0", PYTHONPATH=str(tmp_path))
    assert_fails_with(result, "uvicorn", "pip install 'nanochat[web]'")
