"""Kernels of a step that are compiled side by side, before the first step launches them."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from nanochat.gpt import GPTConfig
from nanochat.options.model import Implementations
from nanochat.train import micro_step
from nanochat_kernels import ahead
from tests.kernels.harness import GPU, without_interpreter

STEP = """
from dataclasses import replace
import torch
from nanochat.gpt import GPT, GPTConfig
from nanochat.train.micro_step import MicroStep, compile_ahead, step_on_meta
from nanochat_kernels import ahead, configs
config = GPTConfig.from_depth(8, 4096, 512)
"""


def test_a_recorded_step_takes_the_kernels_that_a_gpu_takes():
    """Those of auto, without a GPU, for the optimizer too."""
    names = without_interpreter(
        STEP
        + "with configs.tables_of('sm90'): found = ahead.launches_of(lambda: step_on_meta(config, torch.bfloat16, 4, 512))\n"
        + "print(*sorted({launch.kernel.__name__ for launch in found}))"
    ).split()
    expected = {
        "hopper_kernel",
        "hopper_attention_kernel",
        "rows_kernel",
        "momentum_kernel",
        "adamw_kernel",
        "product_kernel",
    }
    assert expected <= set(names), names


def test_more_blocks_need_no_other_code():
    """Two blocks are recorded in place of all, and rows of one length before others: no launch has integers for which Triton would
    compile another kernel."""
    code = (
        STEP
        + """
def specialized(x):
    if isinstance(x, tuple):
        return tuple(map(specialized, x))
    return (x == 1, x % 16 == 0, x >= 2**31) if isinstance(x, int) else str(getattr(x, "dtype", type(x)))
def keys(config, length=512):
    with configs.tables_of("sm90"):
        found = ahead.launches_of(lambda: step_on_meta(config, torch.bfloat16, 4, length))
    return {
        (launch.kernel.__name__, *sorted(map(str, launch.constants.items())),
         *(None if param.do_not_specialize else specialized(x) for param, x in zip(launch.kernel.params, launch.arguments)))
        for launch in found
    }
few = keys(replace(config, depth=2))
print(len(few), sorted((keys(config) | keys(config, 384)) - few))
"""
    )
    count, more = without_interpreter(code).strip().split(" ", 1)
    assert int(count) > 20 and more == "[]", (count, more)


@pytest.mark.parametrize("error", [None, ValueError("out of memory")])
def test_each_kernel_is_loaded_once_on_the_device(monkeypatch, error):
    """One that does not compile or fits nowhere is left to its launch; that another one cannot be loaded is raised."""
    devices, loaded = [], []

    @contextmanager
    def on(device):
        devices.append(device)
        yield
        devices.pop()

    class Compiled:
        def __init__(self, fails: Exception | None = None):
            self.fails = fails

        def result(self, ignore_errors):
            return None if isinstance(self.fails, SyntaxError) and ignore_errors else self

        @property
        def run(self):
            loaded.append((self, devices[-1]))
            if self.fails:
                raise self.fails

    monkeypatch.setattr(torch.cuda, "device", on)
    first, *others = [
        Compiled(fails) for fails in (None, SyntaxError(), ahead.triton.OutOfResources(9, 8, "shared"), error)
    ]
    given = [SimpleNamespace(warmup=lambda *_, kernel=kernel, **__: kernel) for kernel in (first, first, *others)]
    launches = [(kernel, (), {}, (1,)) for kernel in given]
    with pytest.raises(ValueError, match="out of memory") if error else nullcontext():
        ahead.compile_side_by_side(launches, "its device")
    assert {kernel for kernel, _ in loaded} == {first, *others[1:]} and len(loaded) == 3
    assert {device for _, device in loaded} == {"its device"}


@pytest.mark.skipif(not GPU, reason="kernels are compiled for a GPU")
def test_kernels_compiled_ahead_are_those_of_the_step(tmp_path):
    """After compile_ahead a step compiles nothing more."""
    code = (
        STEP
        + f"""
import os
from pathlib import Path
os.environ["TRITON_CACHE_DIR"] = {str(tmp_path)!r}
compiled = lambda: {{str(path.relative_to({str(tmp_path)!r})) for path in Path({str(tmp_path)!r}).rglob("*.*")}}
from nanochat.data.batches import Batch
from nanochat.optim import MuonAdamW
model = GPT.create(config, "cuda", torch.bfloat16)
compile_ahead(model, 4, 512, False)
before = compiled()
optimizer = MuonAdamW(model)
step = MicroStep(model, optimizer, "graph", one_length=True)
tokens = torch.randint(4096, (4, 512))
step(Batch(tokens, tokens, ()), 1.0)
optimizer.synchronize()
optimizer.update(1.0, 0.95)
torch.cuda.synchronize()
print(len(before), sorted(compiled() - before))
"""
    )
    ahead, more = without_interpreter(code).strip().split(" ", 1)
    assert int(ahead) > 100 and more == "[]", (ahead, more)


def test_what_a_step_without_data_cannot_do_is_said(monkeypatch, capsys):
    """Training goes on, and compiles one kernel after the other."""

    def compile_launches_of(step, device, processes):
        with ahead.configs.tables_of("sm90"):
            ahead.launches_of(step)

    monkeypatch.setattr(micro_step.ahead, "compile_launches_of", compile_launches_of)
    for norm in ("auto", "nonsense"):
        config = GPTConfig.from_depth(2, 301, 256, impl=Implementations(rms_norm=norm))
        model = SimpleNamespace(device=torch.device("cuda"), config=config, compute_dtype=torch.bfloat16)
        micro_step.compile_ahead(model, 2, 256, False)
        assert ("one after the other" in capsys.readouterr().out) == (norm == "nonsense")


@pytest.mark.parametrize(
    ("named", "by_triton"),
    [({"self_attention": "flash"}, False), ({"self_attention": "parts", "attention": "auto"}, False),
     ({"self_attention": "parts", "attention": "cudnn"}, False), ({"self_attention": "parts", "attention": "triton"}, True)],
)  # fmt: skip
def test_a_recorded_step_has_the_attention_that_an_a100_takes(named, by_triton):
    """torch's by name too, which runs on a GPU only; auto takes flash where the gate chose the parts of self_attention."""
    names = without_interpreter(
        "from nanochat.options.model import Implementations\n"
        + STEP
        + f"config = replace(config, impl=Implementations(**{named}))\n"
        + "with configs.tables_of('sm80'): found = ahead.launches_of(lambda: step_on_meta(config, torch.bfloat16, 4, 512))\n"
        + "print(*sorted({launch.kernel.__name__ for launch in found}))"
    ).split()
    assert ("key_gradients_kernel" in names) == by_triton and "adamw_kernel" in names, names
