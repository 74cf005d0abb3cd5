"""The layout of Hugging Face's kernels hub, loaded with its library `kernels` from a local folder, offline."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_kernels import hub
from tests.conftest import environment

ROOT = Path(__file__).resolve().parents[2]


def test_imports_become_relative():
    text = "from nanochat_kernels import configs\n    from nanochat_kernels.checks import check_float\n# nanochat_kernels.rms_norm\n"
    assert hub.relative_imports(text, 0) == (
        "from . import configs\n    from .checks import check_float\n# nanochat_kernels.rms_norm\n"
    )
    assert hub.relative_imports(text, 1).startswith("from .. import configs\n    from ..checks import check_float")


def test_each_variant_is_complete(tmp_path):
    """What stood in its folder is gone, and what else is in the folder of builds is not."""
    kept, old = tmp_path / "build" / "mine" / "x", tmp_path / "build" / "torch-cpu" / "old.py"
    for path in (kept, old):
        path.parent.mkdir(parents=True)
        path.touch()
    hub.write_hub(tmp_path)
    assert kept.is_file() and not old.exists()
    shutil.rmtree(kept.parent)
    names = {path.name for path in (tmp_path / "build").iterdir()}
    assert names == {"torch-cuda", "torch-cpu"}
    for name in names:
        variant = tmp_path / "build" / name
        assert (variant / "configs" / "sm80.json").is_file() and (variant / "rms_norm.py").is_file()
        absolute = [path for path in variant.rglob("*.py") if "from nanochat_kernels" in path.read_text("utf-8")]
        assert not absolute
        metadata = json.loads((variant / "metadata.json").read_text("utf-8"))
        assert metadata["backend"]["type"] == name.removeprefix("torch-") and metadata["id"].isidentifier()


LOAD = """
import importlib, sys
from pathlib import Path
import torch
found = importlib.import_module("kernels").get_local_kernel(Path(sys.argv[1]))
assert "nanochat_kernels" not in sys.modules and found.__name__.startswith("_nanochat_kernels_"), found.__name__
x = torch.randn(3, 64, requires_grad=True)
y = found.rms_norm(x)
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (64,), eps=torch.finfo(torch.float32).eps))
y.sum().backward()
assert x.grad is not None and set(found.operations()) > {"attention", "relu2_mlp", "newton_schulz"}
matrices = torch.randn(2, 16, 16)
assert found.newton_schulz(matrices).shape == matrices.shape
ours = importlib.import_module("nanochat_kernels")  # beside the installed package
torch.testing.assert_close(ours.rms_norm(x), y)
print("loaded", len(found.operations()))
"""


def test_it_can_be_a_part_of_another_package(tmp_path):
    hub.write_hub(tmp_path)
    shutil.copytree(tmp_path / "build" / "torch-cpu", tmp_path / "other" / "kernels")
    (tmp_path / "other" / "__init__.py").touch()
    code = "import torch, other.kernels as k; print(k.rms_norm(torch.ones(2, 4)).shape, hasattr(torch.ops, 'other_kernels'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "torch.Size([2, 4]) True\n", done.stderr


def test_the_library_loads_it(tmp_path):
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's library kernels is not installed: pip install 'kernels>=0.17'")
    hub.write_hub(tmp_path)
    env = environment(None, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path).resolve() != ROOT]
    env["PYTHONPATH"] = os.pathsep.join(paths)  # there, kernels/ is this package
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.startswith("loaded"), done.stdout + done.stderr
