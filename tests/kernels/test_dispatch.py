"""Which implementation serves a call, where launch parameters come from, and what the compiler makes of every kernel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import configs, dispatch, tune
from kernels.configs import LaunchTableError, launch_parameters
from kernels.dispatch import Implementation, KernelRequestError, choose
from tests.conftest import environment, nanochat
from tests.kernels.harness import DEVICE, GPU

ROOT = Path(__file__).resolve().parents[2]
FUSED = [name for name in dispatch.ROOMS if "triton" in dispatch.room(name).IMPLEMENTATIONS[name]]


def test_auto_takes_the_reference_off_cuda_and_triton_on_it():
    x = torch.ones(2, 8, device=DEVICE)
    name, why = dispatch.automatic("rms_norm", dispatch.room("rms_norm").IMPLEMENTATIONS["rms_norm"], x)
    assert (name == "triton") == GPU and why


def test_explicit_never_falls_back():
    implementations = {
        "fast": Implementation(lambda x: "fast", lambda x: "x is too odd"),
        "reference": Implementation(lambda x: "reference"),
    }
    x = torch.ones(1)
    with pytest.raises(KernelRequestError, match=r"thing: impl='fast' cannot serve this call: x is too odd"):
        choose("thing", "fast", implementations, x)
    with pytest.raises(KernelRequestError, match="impl='other' does not exist; choose one of auto, fast, reference"):
        choose("thing", "other", implementations, x)
    assert choose("thing", "reference", implementations, x)(x) == "reference"


def test_auto_on_cuda_follows_the_table_and_passes_over_what_cannot_serve(monkeypatch):
    class OnCuda:
        device = torch.device("cuda", 0)

    implementations = {
        "fast": Implementation(lambda x: "fast", lambda x: "x is too odd"),
        "reference": Implementation(lambda x: "reference"),
    }
    able = {**implementations, "fast": Implementation(lambda x: "fast")}
    monkeypatch.setattr(dispatch, "preferred", lambda *_: ("fast", "measured"))
    assert dispatch.automatic("thing", able, OnCuda()) == ("fast", "measured")
    assert dispatch.automatic("thing", implementations, OnCuda()) == ("reference", "x is too odd")
    monkeypatch.setattr(dispatch, "preferred", lambda *_: ("reference", "the other lost"))
    assert dispatch.automatic("thing", able, OnCuda()) == ("reference", "the other lost")


def test_without_triton_the_reference_serves_and_the_request_is_refused():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "x = torch.ones(2, 8)\n"
        "assert kernels.rms_norm(x).shape == x.shape\n"
        "try: kernels.rms_norm(x, impl='triton')\n"
        "except kernels.KernelRequestError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment(None))
    assert "Triton is not installed" in done.stdout, done.stderr


@pytest.mark.skipif(GPU, reason="a CPU without the interpreter")
def test_a_cpu_tensor_without_the_interpreter_is_refused():
    code = "import torch, kernels\nkernels.rms_norm(torch.ones(2, 8), impl='triton')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment(None))
    assert "take CUDA tensors, got one on cpu" in done.stderr


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_tables_are_whole(architecture):
    table = configs.table(architecture)
    for kernel in dispatch.tunable_kernels():
        for dtype in kernel.dtypes:
            classes = table["launch"][kernel.name][str(dtype).removeprefix("torch.")]
            assert set(classes) == {str(size) for size in kernel.sizes}
            assert all(set(parameters) == set(kernel.space[0]) for parameters in classes.values())
    for operation, choice in table["auto"].items():
        assert choice["impl"] in dispatch.room(operation).IMPLEMENTATIONS[operation] and choice["why"]
    assert set(table["auto"]) == set(FUSED) and {"measured_on", "versions", "command"} <= table.keys()


def test_the_nearest_shape_class_serves():
    classes = configs.table("sm80")["launch"]["rms_norm_forward"]["float32"]
    cpu = torch.device("cpu")
    assert launch_parameters("rms_norm_forward", cpu, torch.float32, 1280) == classes["1280"]
    assert launch_parameters("rms_norm_forward", cpu, torch.float32, 1400) == classes["1280"]
    assert launch_parameters("rms_norm_forward", cpu, torch.float32, 1) == classes["256"]
    with pytest.raises(LaunchTableError, match="no_kernel"):
        launch_parameters("no_kernel", cpu, torch.float32, 1)


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


def test_tuning_writes_a_table_that_reads_back(tmp_path, monkeypatch):
    before = configs.table("sm90")
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    tune.write("sm90", before)
    try:
        assert configs.table("sm90") == before and json.loads((tmp_path / "sm90.json").read_text()) == before
        assert [path.name for path in tmp_path.iterdir()] == ["sm90.json"]
    finally:
        monkeypatch.undo()
        configs.clear()


@pytest.mark.skipif(GPU, reason="there is a GPU to tune on")
def test_tuning_needs_a_gpu(base):
    done = nanochat(base, "kernels", "tune")
    assert done.returncode == 1 and "measured on a GPU, and there is none here" in done.stderr


def test_list(base):
    done = nanochat(base, "kernels", "list")
    assert done.returncode == 0 and all(name in done.stdout for name in dispatch.ROOMS)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_inspect(base, architecture):
    """Every committed configuration compiles without spills, within shared memory, with that architecture's instructions."""
    done = nanochat(base, "kernels", "inspect", "--arch", architecture)
    assert done.returncode == 0 and "without a fault" in done.stdout, done.stdout[-2000:] + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_inspect_fails_on_spills(base):
    """A tile of 16,384 columns in the registers of one warp."""
    code = (
        "import torch; from kernels import inspect, dispatch\n"
        "kernel = next(k for k in dispatch.tunable_kernels() if k.name == 'rms_norm_backward')\n"
        "found = inspect.inspect_kernel(kernel, 'sm80', 16_384, torch.float32, {'ROWS': 1, 'num_warps': 1})\n"
        "print(found.spilled, found.faults)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment(None))
    assert "bytes spilled" in done.stdout, done.stderr


def test_public_functions_are_the_operations():
    assert set(dispatch.ROOMS) <= set(kernels.__all__)
