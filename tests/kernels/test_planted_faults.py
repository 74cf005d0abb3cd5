"""Test the tests: each planted fault in a copy of the kernels must make a test fail. Run with pytest --plant.

Every tests/kernels/test_*.py may list PLANTED_FAULTS: name → (file of kernels/ without its suffix, correct text, faulty text,
the test in that module which must fail). PLANTED_ON_HOPPER: those in code that runs on sm_90 only.
"""

import importlib
import os
import subprocess
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import copy_packages, environment
from tests.kernels.harness import SM90

LONGEST = 180  # seconds: a sound test takes a tenth of it
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "-m", "")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODULES = [path.stem for path in sorted(HERE.glob("test_*.py")) if path.stem != Path(__file__).stem]


def listed(where: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return (test module, name) → fault."""
    return {
        (module, name): fault
        for module in MODULES
        for name, fault in getattr(importlib.import_module(f"tests.kernels.{module}"), where, {}).items()
    }


ON_HOPPER = {(module, f"{name} (sm_90)"): fault for (module, name), fault in listed("PLANTED_ON_HOPPER").items()}
FAULTS = listed("PLANTED_FAULTS") | ON_HOPPER


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "planted" in metafunc.fixturenames:
        planted = FAULTS if metafunc.config.getoption("--plant") else {}
        metafunc.parametrize("planted", planted, ids=lambda key: f"{key[0]}: {key[1]}")


def run_in_copy(directory: Path, module: str, test: str, file: str = "", sound: str = "", faulty: str = ""):
    """Run a test in a copy of the packages, of which one file is changed."""
    copy_packages(directory)
    if file:
        path = directory / "kernels" / f"{file}.py"
        path.write_text(path.read_text("utf-8").replace(sound, faulty), "utf-8")
    # the copy must also serve the processes that tests start; Triton is imported before the tests' conftest sets its mode
    mode = {"TRITON_INTERPRET": "1"} if "TRITON_INTERPRET" in os.environ else {}
    env = environment(None, PYTHONPATH=str(directory), ONLY_STATED_EXAMPLES="1", **mode)
    node = f"tests/kernels/{module}.py::{test}"
    return forked.run("-m", "pytest", *OPTIONS, node, cwd=directory, env=env, timeout=LONGEST)


def test_fault_is_caught(planted, tmp_path):
    if planted in ON_HOPPER and not SM90:
        pytest.skip("in code that runs on sm_90 only")
    file, sound, faulty, test = FAULTS[planted]
    try:
        done = run_in_copy(tmp_path, planted[0], test, file, sound, faulty)
    except subprocess.TimeoutExpired:
        return  # a stray write may also make the process run for ever
    # 1: tests failed; negative: a stray memory access killed the process, which counts as well
    assert done.returncode == 1 or done.returncode < 0, (
        f"{planted[0]}.{test} does not fail with: {planted[1]}\n{done.stdout[-1500:]}{done.stderr[-500:]}"
    )


def test_copy_without_a_fault_passes(tmp_path, request):
    if not request.config.getoption("--plant"):
        pytest.skip("for --plant")
    done = run_in_copy(tmp_path, "test_rms_norm", "test_derivatives_that_do_not_exist_raise")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("key", FAULTS, ids=lambda key: f"{key[0]}: {key[1]}")
def test_fault_can_be_planted(key):
    """The text that a fault replaces exists, and so does the test that must fail; otherwise --plant would test nothing."""
    file, sound, faulty, test = FAULTS[key]
    assert sound in (ROOT / "kernels" / f"{file}.py").read_text("utf-8") and faulty != sound
    assert hasattr(importlib.import_module(f"tests.kernels.{key[0]}"), test)


def test_every_kernel_file_has_planted_faults():
    """Every file with an operation and kernels is the target of a planted fault."""
    from nanochat_kernels.dispatch import operations

    files = {o.function.__module__.removeprefix("nanochat_kernels.") for o in operations().values() if o.kernels}
    assert files <= {file for file, *_ in FAULTS.values()}
