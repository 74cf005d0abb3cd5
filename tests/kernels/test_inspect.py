"""nanochat kernels inspect: every launch is compiled without a GPU, and what is wrong with it is seen."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat_kernels import dispatch, inspect
from nanochat_kernels.architecture import ARCHITECTURES
from nanochat_kernels.configs import dtype_name
from tests import forked
from tests.conftest import environment, nanochat

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inspect(architecture):
    """Launches compile without spills, fit in shared memory and use only the architecture's instructions.

    Those of two heavy kernels in all their dtypes; all kernels are checked by test_library.py, in the dtypes of training.
    """
    kernels = ("--kernel", "qkv_projection", "attention_forward")
    command = [sys.executable, "-m", "nanochat", "kernels", "inspect", "--arch", architecture, *kernels]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(None))
    assert done.returncode == 0 and "without a defect" in done.stdout, done.stdout[-2000:] + done.stderr


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_launch_is_inspected(architecture):
    """inspect covers each kernel of the tables in each of its dtypes. Two kernels that share all of their code are asked one by one."""
    code = (
        "from nanochat_kernels import configs, dispatch, inspect\n"
        f"places = [p for k in dispatch.tunable_kernels() for p in inspect.places({architecture!r}, (k.name,))]\n"
        "print(sorted({(p.kernel, configs.dtype_name(p.dtype)) for p in places}))"
    )
    done = forked.run("-c", code, cwd=ROOT, env=environment(None))
    wanted = sorted(
        {(kernel.name, dtype_name(dtype)) for kernel in dispatch.tunable_kernels() for dtype in kernel.dtypes}
    )
    assert done.stdout.strip() == str(wanted), done.stdout + done.stderr


def test_inspect_rejects_an_unknown_kernel(base):
    done = nanochat(base, "kernels", "inspect", "--kernel", "no_kernel")
    assert done.returncode == 1 and "no kernel is called no_kernel; there are" in done.stderr


def inspected(architecture: str, launch: str, first: str = "") -> str:
    """Inspect a launch in a process that does not interpret kernels, and return what it prints."""
    code = (
        "import torch, importlib; from nanochat_kernels import inspect\n"
        "from nanochat_kernels.triton_helpers import recorded_launches\n"
        "norm = importlib.import_module('nanochat_kernels.rms_norm')\n"
        "def launch(width, parameters=None):\n"
        "    x = torch.empty(64, width, device='meta')\n"
        "    norm.forward_plan(x, parameters=parameters)(x, None)\n"
        f"{first}\n"
        f"with recorded_launches() as launches: {launch}\n"
        "place = inspect.Place('name', torch.float32, (1,), 'flags', 0)\n"
        f"print(inspect.inspect_launch(launches[0], {architecture!r}, place))"
    )
    done = forked.run("-c", code, cwd=ROOT, env=environment(None))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_inspect_sees_machine_code_of_an_architecture_that_is_run_as_ptx():
    """As `nanochat kernels tune` does after its first launch of sm80's code on an H100."""
    ptx = "architecture = importlib.import_module('nanochat_kernels.architecture'); architecture.run_ptx_of('sm80'); "
    assert "defects=()" in inspected("sm80", "launch(1024)", first=ptx)


def test_inspect_sees_spills():
    """A tile of 16,384 columns does not fit in the registers of one warp."""
    one_warp = "launch(16_384, {'ROWS': 1, 'num_warps': 1})"
    assert "bytes spilled" in inspected("sm80", one_warp)
    assert "defects=()" in inspected("sm80", "launch(16_384)")


def test_a_recorded_launch_is_specialised_like_a_real_one():
    """A recorded launch is specialised for arguments that are 1 or divisible by 16, as a real launch is."""
    code = (
        "import torch, importlib; from nanochat_kernels import inspect\n"
        "from nanochat_kernels.triton_helpers import recorded_launches\n"
        "norm = importlib.import_module('nanochat_kernels.rms_norm')\n"
        "x = torch.empty(1, 24, device='meta', dtype=torch.bfloat16)\n"
        "with recorded_launches() as launches: norm.forward_plan(x)(x, None)\n"
        "source, options = inspect.specialize(launches[0], 'sm80')\n"
        "print([source.signature[n] for n in ('x_ptr', 'rstd_ptr', 'rows', 'x_stride', 'WIDTH')], options['num_warps'])"
    )
    done = forked.run("-c", code, cwd=ROOT, env=environment(None))
    assert "['*bf16', '*fp32', 'constexpr', 'i32', 'constexpr']" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("checked_with", "spilled", "is_defect"), [("", 8, True), ("other", 8, False), ("other", 40, True)]
)
def test_a_few_bytes_are_a_defect_for_the_version_that_the_tables_were_checked_with(
    monkeypatch, checked_with, spilled, is_defect
):  # fmt: skip
    """Every version begins with "", and none with "other"."""
    monkeypatch.setattr(inspect, "TABLES_CHECKED_WITH", checked_with)
    monkeypatch.setattr(inspect, "resources", lambda cubin: (255, spilled))
    compiled = SimpleNamespace(asm={"ptx": "", "cubin": b""}, metadata=SimpleNamespace(shared=0, num_stages=1))
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="kernel"))
    place = inspect.Place("kernel", torch.float32, (1,), "flags", 0)
    found = inspect.inspect_code(compiled, inspect.Launch(kernel, (), {}, (1,)), "sm90", place)
    assert found.defects == ((f"{spilled} bytes spilled",) if is_defect else ())
