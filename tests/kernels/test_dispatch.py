"""The choice of an implementation, the launch tables, tuning, inspection and torch.compile."""

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nanochat_kernels as kernels
from nanochat_kernels import configs, dispatch
from nanochat_kernels.architecture import ARCHITECTURES
from nanochat_kernels.configs import LaunchTableError, dtype_name, format_key, launch_parameters
from nanochat_kernels.dispatch import KernelRequestError, choose, operations
from nanochat_kernels.operation import Implementation, Operation, RunShape
from tests import forked
from tests.conftest import environment, nanochat
from tests.kernels.harness import DEVICE, GPU

PLANTED_FAULTS = {
    "explicit request falls back": (
        "dispatch",
        "    if reason:\n        raise",
        "    if False:\n        raise",
        "test_explicit_never_falls_back",
    ),
    "nearest shape class by plain distance": (
        "configs/__init__",
        "abs(log2(a) - log2(max(b, 1)))",
        "abs(a - b)",
        "test_the_nearest_class_is_by_ratio_and_words_must_be_equal",
    ),
}
ROOT = Path(__file__).resolve().parents[2]
FUSED = [operation for operation in operations().values() if operation.implementations]
linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")


def test_auto_takes_the_reference_off_cuda_and_triton_on_it():
    name, why = dispatch.automatic(operations()["rms_norm"], torch.ones(2, 8, device=DEVICE))
    assert (name == "triton") == GPU and why


def thing(**implementations: Implementation) -> Operation:
    return Operation("thing", print, lambda x: "reference", implementations)


SUPPORTED = thing(fast=Implementation(lambda x: "fast"))
UNSUPPORTED = thing(fast=Implementation(lambda x: "fast", lambda x: "x is too odd"))


def test_explicit_never_falls_back():
    x = torch.ones(1)
    with pytest.raises(KernelRequestError, match=r"thing: impl='fast' does not support this call: x is too odd"):
        choose(UNSUPPORTED, "fast", x)
    with pytest.raises(KernelRequestError, match="impl='other' does not exist; choose one of auto, fast, reference"):
        choose(UNSUPPORTED, "other", x)
    assert choose(UNSUPPORTED, "reference", x)(x) == "reference" and choose(SUPPORTED, "fast", x)(x) == "fast"


def test_a_repeated_call_uses_the_cached_plan():
    """Check, choice and plan run once for calls with one signature, and again for another signature or after the tables change."""
    made = []

    def plan(x, factor):
        made.append("plan")
        return factor * x.size(-1)

    operation = Operation(
        "thing", print, print, {"fast": Implementation(lambda plan, x, factor: (plan, x.sum().item()), plan=plan)}
    )

    def call(x, factor=2):
        return dispatch.serve(operation, "fast", check, x, factor)

    def check(x, factor):
        made.append("check")

    x = torch.ones(2, 8)
    for number in (1.0, 2.0, 3.0):
        assert call(number * x) == (16, number * 16)
    assert made == ["check", "plan"]
    others = (
        lambda: call(x, 3), lambda: call(x[:, :5]), lambda: call(x.t()), lambda: call(x.double()),
        lambda: call(x.clone().requires_grad_()), lambda: torch.no_grad()(call)(x),
        lambda: torch.autocast("cpu", torch.bfloat16)(call)(x), configs.clear,
    )  # fmt: skip
    for other in others:
        made.clear()
        other()
        assert made == ([] if other is configs.clear else ["check", "plan"])
    call(x)
    assert made == ["check", "plan"]


def test_auto_on_cuda_follows_the_table_and_skips_what_does_not_support_the_call(monkeypatch):
    class OnCuda:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(dispatch, "preference", lambda *_: ("fast", "measured"))
    assert dispatch.automatic(SUPPORTED, OnCuda()) == ("fast", "measured")
    assert dispatch.automatic(UNSUPPORTED, OnCuda()) == ("reference", "x is too odd")
    other = replace(UNSUPPORTED, implementations={**UNSUPPORTED.implementations, "slow": Implementation(torch.relu)})
    assert dispatch.automatic(other, OnCuda()) == ("slow", "x is too odd")
    monkeypatch.setattr(dispatch, "preference", lambda *_: ("reference", "the other lost"))
    assert dispatch.automatic(SUPPORTED, OnCuda()) == ("reference", "the other lost")


def test_without_triton_the_reference_serves_and_a_request_raises():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, nanochat_kernels as kernels\n"
        "x = torch.ones(2, 8)\n"
        "assert kernels.rms_norm(x).shape == x.shape\n"
        "try: kernels.rms_norm(x, impl='triton')\n"
        "except kernels.KernelRequestError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment(None))
    assert "Triton is not installed" in done.stdout, done.stderr


@pytest.mark.skipif(GPU, reason="a CPU without the interpreter")
def test_a_cpu_tensor_without_the_interpreter_raises():
    code = "import torch, nanochat_kernels as kernels\nkernels.rms_norm(torch.ones(2, 8), impl='triton')"
    done = forked.run("-c", code, cwd=ROOT, env=environment(None))
    assert "take CUDA tensors, got one on cpu" in done.stderr


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tables_are_complete(architecture):
    table = configs.table(architecture)
    for kernel in dispatch.tunable_kernels():
        for dtype in kernel.dtypes:
            classes = table["launch"][kernel.name][dtype_name(dtype)]
            assert set(classes) == {format_key(key) for key in kernel.keys}, f"{kernel.name} {dtype}"
            # a product that torch computes has fewer
            assert all(set(parameters) in map(set, kernel.space) for parameters in classes.values())
    for name, choice in table["auto"].items():
        assert choice["impl"] in (*operations()[name].implementations, "reference") and choice["why"]
    assert set(table["launch"]) == {kernel.name for kernel in dispatch.tunable_kernels()}
    assert set(table["auto"]) == {operation.name for operation in FUSED}
    assert {"measured_on", "versions", "command"} <= table.keys()


def test_records_are_complete():
    names = [kernel.name for operation in FUSED for kernel in operation.kernels]
    assert len(set(map(id, (k for o in FUSED for k in o.kernels)))) == len(set(names)), "two kernels have one name"
    for operation in FUSED:
        assert operation.kernels and operation.trials and callable(operation.reference), operation.name
        assert inspect.unwrap(getattr(kernels, operation.name)) is operation.function
    assert set(operations()) <= set(kernels.__all__)


def test_the_nearest_shape_class_serves():
    classes = configs.table("sm80")["launch"]["rms_norm_forward"]["float32"]
    cpu = torch.device("cpu")
    for width, nearest in ((1280, "1280"), (1400, "1280"), (1, "256"), (10**6, "8192")):
        assert launch_parameters("rms_norm_forward", cpu, torch.float32, (width,)) == classes[nearest]
    with pytest.raises(LaunchTableError, match="no_kernel"):
        launch_parameters("no_kernel", cpu, torch.float32, (1,))


def test_the_nearest_class_is_by_ratio_and_words_must_be_equal(monkeypatch):
    """4,400 is nearer to 2,048 by difference and nearer to 8,192 by ratio."""
    classes = {"2048xplain": {"A": 1}, "8192xplain": {"A": 2}, "4400xmasked": {"A": 3}, "4400": {"A": 4}}
    monkeypatch.setattr(configs, "table", lambda name: {"launch": {"some": {"float32": classes}}})
    found = configs.parameters_in("sm80", "some", torch.float32, (4400, "plain"))
    assert found == {"A": 2}
    assert configs.parameters_in("sm80", "some", torch.float32, (1, "masked")) == {"A": 3}
    assert configs.parameters_in("sm80", "some", torch.float32, (1,)) == {"A": 4}
    with pytest.raises(LaunchTableError, match="no class like 1xother"):
        configs.parameters_in("sm80", "some", torch.float32, (1, "other"))


@pytest.mark.parametrize("text", ["", "[]", '{"launch": {}}'])
def test_a_broken_table_is_named(tmp_path, monkeypatch, text):
    (tmp_path / "sm80.json").write_text(text)
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.clear()
    try:
        with pytest.raises(LaunchTableError, match=r"sm80\.json.*nanochat kernels tune"):
            configs.table("sm80")
    finally:
        configs.clear()


def test_list(base):
    done = nanochat(base, "kernels", "list")
    assert done.returncode == 0 and all(name in done.stdout for name in operations())


TRACE = """
import logging, sys
from dataclasses import replace
import torch.utils._triton as triton_of_torch
triton_of_torch.has_triton = lambda: True
triton_of_torch.has_triton_experimental_host_tma = lambda: False
triton_of_torch.has_triton_tensor_descriptor_host_tma = lambda: False
import torch
import triton
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
import nanochat_kernels as kernels
from nanochat_kernels.operation import RunShape

class Driver:  # torch asks for the target when it looks for the arguments that a kernel changes
    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 80, 32)

    def get_current_device(self):
        return 0

triton.runtime.driver.set_active(Driver())
logging.disable(logging.WARNING)
shape = RunShape(rows=2, tokens=8, width=64, heads=2, kv_heads=1, vocab=256, depth=1)
graphs = []

def keep(graph, example):
    graphs.append(graph)
    return graph.forward

# accept a CPU tensor: the kernels are traced and never executed
supported = lambda *_: None
kernels.dispatch.named = lambda operation, impl: replace(
    operation.implementations[impl], unsupported_reason=supported
)

def trace(operation):
    trial = next(operation.trials(shape, torch.device("cpu"), torch.float32))

    def run(*inputs):
        results = operation.function(*inputs, impl="triton")
        return results if isinstance(results, tuple) else (results,)

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [
            torch.empty_like(x).requires_grad_(i in trial.differentiable) if isinstance(x, torch.Tensor) else x
            for i, x in enumerate(trial.inputs)
        ]
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
        results = torch.compile(run, fullgraph=True, backend=backend, dynamic=False)(*inputs)
        if trial.differentiable:
            sum(x.float().sum() for x in results if x is not None).backward()

for name in sys.argv[1:]:
    graphs.clear()
    trace(kernels.operations()[name])
    for graph in graphs:
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        print(name, sum("triton_kernel_wrapper" in x for x in targets), [x for x in targets if "nanochat" in x])
"""
# newton_schulz may be opaque to Inductor; the optimizer's operations change their arguments and are not compiled
NOT_TRACED = ("newton_schulz", "nesterov_momentum", "apply_update", "adamw")
# products and attention, which Inductor could not fuse anyway, in forward and in backward; the norm of their input is not among them
OPAQUE = {
    "softcapped_logits": (["softcapped_logits_forward"], []),
    "relu2_mlp": (["relu2_mlp_forward"], ["relu2_mlp_backward"]),
    "output_projection": (["output_projection_forward"], []),
    "qkv_projection": (["qkv_projection_forward"], ["qkv_projection_backward"]),
    "attention": (["attention_forward"], ["attention_backward"]),
    "self_attention": (["qkv_projection_forward", "attention_forward"], ["self_attention_backward"]),
}


TRACED = [operation.name for operation in FUSED if operation.name not in NOT_TRACED]


@pytest.fixture(scope="module")
def traced() -> str:
    """What one process, whose imports take longest, prints of all graphs."""
    code = [sys.executable, "-c", TRACE, *TRACED]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, env=environment(None))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@linux
@pytest.mark.parametrize("name", TRACED)
def test_torch_compile_sees_the_kernels(name, traced):
    """Forward and backward are traced without a graph break, and only products and attention are opaque to Inductor. Needs no GPU."""
    graphs = [line.split(maxsplit=2)[1:] for line in traced.splitlines() if line.startswith(f"{name} ")]
    backward = next(operations()[name].trials(*TINY)).differentiable
    assert len(graphs) == (2 if backward else 1), traced
    products = [[f"nanochat_kernels.{x}.default" for x in found] for found in OPAQUE.get(name, ([], []))]
    assert [opaque for _, opaque in graphs] == [str(x) for x in products[: len(graphs)]], traced
    assert int(graphs[0][0]) > 0 or name in ("output_projection", "attention", "softcapped_logits"), traced


TINY = (
    RunShape(rows=2, tokens=8, width=64, heads=2, kv_heads=1, vocab=256, depth=1),
    torch.device("cpu"),
    torch.float32,
)
