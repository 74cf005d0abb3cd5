"""The kernels as a library that is compiled ahead of time: CMake builds it, CTest tests it, and Python launches from it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat.platform.distributed import use_kernel_library
from nanochat.platform.errors import UserError
from nanochat_kernels import architecture, dispatch, export, library
from nanochat_kernels.triton_helpers import triton
from tests import forked
from tests.conftest import environment
from tests.native import references

ROOT = Path(__file__).resolve().parents[2]
MISSING = [tool for tool in ("cmake", "ninja", "g++") if not shutil.which(tool)]
if "cmake" not in MISSING:
    found = re.search(r"(\d+)\.(\d+)", subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout)
    MISSING += ["cmake 3.24"] if not found or tuple(map(int, found.groups())) < (3, 24) else []
needs_cmake = pytest.mark.skipif(
    bool(MISSING) or sys.platform != "linux",
    reason=f"needs Linux and {', '.join(MISSING)}: apt-get install cmake ninja-build g++ clang-format-14",
)


def build_and_test(preset: str, *more: str) -> str:
    """Configure, build and test a preset of CMakePresets.json; returns what CTest printed."""
    for command in (
        ["cmake", "--preset", preset, f"-DPython3_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", "--preset", preset],
        ["ctest", "--preset", preset, *more],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(None))
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@needs_cmake
@pytest.mark.long
def test_three_kernels_with_sanitizers():
    assert "100% tests passed" in build_and_test("cpu")


@needs_cmake
@pytest.mark.long
@pytest.mark.parametrize("number", ["80", "90"])
def test_one_architecture(tmp_path, number):
    """As in the presets a100 and hopper: what the tests check of the other one is skipped."""
    options = f"-DNANOCHAT_CUDA_ARCHS={number}", "-DNANOCHAT_KERNELS=row_rstd", "-DNANOCHAT_SANITIZE="
    for command in (
        ["cmake", "--preset", "cpu", "-B", tmp_path, *options, f"-DPython3_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", tmp_path],
        ["ctest", "--test-dir", tmp_path, "--label-exclude", "gpu|python", "--output-on-failure"],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(None))
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "100% tests passed" in done.stdout


@pytest.mark.parametrize(
    ("major", "of_library", "wanted"),
    [
        (8, None, "sm80"), (9, None, "sm90"), (10, None, "sm90"), (9, {"sm80", "sm90"}, "sm90"), (9, {"sm80"}, "sm80"),
        (10, {"sm80", "sm90"}, "sm80"), (8, {"sm90"}, "sm80"),
    ],
)  # fmt: skip
def test_a_gpu_takes_the_code_that_the_library_has(monkeypatch, major, of_library, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, 0))
    try:
        architecture.take_code_of_library(of_library)
        assert architecture.architecture(0) == wanted
    finally:
        architecture.take_code_of_library(None)


@needs_cmake
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_kernels_of_training():
    """Also that training, evaluation and generation with d12, d20, d26 and d32 need no other code than the library has."""
    assert "100% tests passed" in build_and_test("training", "--label-exclude", "python", "--parallel", "2")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_models_need_no_other_code_than_the_library_has():
    """Training, evaluation and generation, also with tokens that are no multiples of 16, and with rows that do not fill a tile."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.native.launches", "uncovered"],
        cwd=ROOT, capture_output=True, text=True, env=environment(None),
    )  # fmt: skip
    assert done.returncode == 0 and "all launches are covered" in done.stdout, done.stdout[:2000] + done.stderr[-2000:]


@needs_cmake
def test_a_python_without_triton_is_named(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", f"-DPython3_EXECUTABLE={python}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(None, PYTHONPATH=""))
    assert done.returncode != 0 and "cannot import torch and triton, which compile the kernels" in done.stderr.replace(
        "\n  ", " "
    )


@needs_cmake
def test_an_unknown_architecture_is_named(tmp_path):
    command = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        tmp_path,
        "-DNANOCHAT_CUDA_ARCHS=75;80",
        f"-DPython3_EXECUTABLE={sys.executable}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(None))
    assert done.returncode != 0 and 'NANOCHAT_CUDA_ARCHS is "75;80", wanted 80, 90 or both' in " ".join(
        done.stderr.split()
    )


def test_the_library_of_training_has_the_dtypes_of_training():
    """Also of Newton-Schulz, which is in float16, and whose sizes depend on no batch."""
    names = "row_rstd", "matrix_product"
    places = {name: [place for place, _ in export.inspect.recorded("sm90", (name,), True)] for name in names}
    found = {name: {place.dtype for place in places[name]} for name in names}
    assert found == {"row_rstd": {torch.bfloat16}, "matrix_product": {torch.float16}}
    assert any(map(export.trains, places["row_rstd"])) and not any(map(export.trains, places["matrix_product"]))
    all_of_them = {place.dtype for place, _ in export.inspect.recorded("sm90", ("row_rstd",))}
    assert all_of_them == {torch.bfloat16, torch.float16, torch.float32}


def test_every_kernel_has_cases_and_a_reference_in_cpp():
    """The test of the library of training checks this too, and the numbers; this one notices a forgotten kernel without CMake."""
    names = {kernel.name for kernel in dispatch.tunable_kernels()}
    for name in architecture.ARCHITECTURES:
        without = names - {case.kernel for case in references.cases(name)}
        assert not without, (
            f"add small shapes of {', '.join(sorted(without))} to OWN in tests/native/cases.py, for {name}"
        )
    text = (ROOT / "tests" / "native" / "reference_test.cpp").read_text("utf-8")
    known = set(re.findall(r'^    \{"(\w+)", ', text, re.MULTILINE))
    assert known == names, (
        f"{', '.join(sorted(known ^ names))}: each kernel of the launch tables, and no other name, needs a reference in one of "
        "tests/native/references_*.h and its line in kReferences of tests/native/reference_test.cpp"
    )


def test_what_is_not_the_library_is_rejected(tmp_path):
    with pytest.raises(
        library.LibraryError, match=r"libnanochat_kernels\.so is not the library .* build it with CMake"
    ):
        library.use(tmp_path)
    not_one = tmp_path / "lib" / "libnanochat_kernels.so"
    not_one.parent.mkdir()
    not_one.write_text("not a library")
    with pytest.raises(UserError, match=f"NANOCHAT_AOT={tmp_path}: .*lib/libnanochat_kernels.so is not the library"):
        use_kernel_library(tmp_path)
    assert library.in_use() is None


def test_a_library_of_another_version_is_rejected(tmp_path, monkeypatch):
    other = type("Dll", (), {"nk_version": staticmethod(lambda: 7)})
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: other)
    with pytest.raises(library.LibraryError, match="has version 7 of the C interface, wanted 1; build it again"):
        library.use(tmp_path)


def test_arguments_are_packed():
    x = torch.zeros(4, dtype=torch.bfloat16)
    cap = triton.language.constexpr(15.0)
    packed, fixed, alive = library.pack((x, 7, None, 0.5, (x[1:], cap, -1)))
    assert fixed == (15.0,) and not alive
    pointer, half = x.data_ptr(), 0x3FE0000000000000
    wanted = [(1, 1, pointer), (2, 0, 7), (0, 0, 0), (3, 0, half), (1, 1, pointer + 2), (2, 0, -1)]
    assert packed == b"".join(library.struct.pack("iiq", *words) for words in wanted)


def test_constants_among_the_arguments_and_devices_have_kernels_of_their_own(monkeypatch):
    asked, found = [], object.__new__(library.Library)
    found.kernels, found.find = {}, lambda name, number, to: asked.append((name.decode(), number)) or library.OK
    monkeypatch.setattr(library, "identity", lambda kernel, constants, fixed: str(fixed))
    monkeypatch.setattr(library, "architecture", lambda index: architecture.ARCHITECTURES[index])
    for fixed, index in (((15.0,), 0), ((30.0,), 0), ((15.0,), 1), ((15.0,), 0)):
        found.kernel(library, {"BLOCK": 1}, fixed, torch.device("cuda", index))
    assert asked == [("(15.0,)", 80), ("(30.0,)", 80), ("(15.0,)", 90)]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"global_scratch_size": 8}, "f of name needs global_scratch_size"),
        ({"profile_scratch_size": 8}, "f of name needs profile_scratch_size"),
        ({"launch_cooperative_grid": True}, "f of name needs launch_cooperative_grid"),
        ({"launch_pdl": True}, "f of name needs launch_pdl"),
        ({"num_ctas": 2}, "f of name runs in clusters of 2 blocks"),
    ],
)
def test_code_that_the_launcher_cannot_launch_is_rejected(monkeypatch, tmp_path, metadata, message):
    compiled = SimpleNamespace(metadata=SimpleNamespace(**{"name": "f", "num_ctas": 1, **metadata}))
    monkeypatch.setattr(export.inspect, "launch_at", lambda place, architecture: None)
    monkeypatch.setattr(export.inspect, "compile_launch", lambda launch, architecture: compiled)
    with pytest.raises(export.CannotExport, match=message):
        export.export_launch(export.Place("name", torch.bfloat16, (64,), "", 0), "sm80", tmp_path)


NAMES = """
import importlib
from nanochat_kernels import library
product, mlp, norm = (importlib.import_module(f"nanochat_kernels.{n}") for n in ("matrix_product", "relu2_mlp", "rms_norm"))
if FIRST: norm.forward_kernel.cache_key, product.dot.cache_key, mlp.relu2_epilogue.cache_key
kernel, epilogue = product.product_kernel, mlp.relu2_epilogue
names = [
    library.identity(kernel, {"BLOCK": 1, "EPILOGUE": epilogue}),
    library.identity(kernel, {"BLOCK": 2, "EPILOGUE": epilogue}),
    library.identity(kernel, {"BLOCK": 1, "EPILOGUE": mlp.relu2_backward_epilogue}),
    library.identity(kernel, {"BLOCK": 1, "EPILOGUE": epilogue}, (15.0,)),
    library.identity(norm.forward_kernel, {"BLOCK": 1, "EPILOGUE": epilogue}),
]
assert library.identity(kernel, {"EPILOGUE": epilogue, "BLOCK": 1}) == names[0]
functions = list(library.functions_of(kernel, {"EPILOGUE": epilogue}))
dot, called = "nanochat_kernels.triton_helpers.dot", "nanochat_kernels.matrix_product.product_kernel"
assert functions.index(dot) < functions.index(called) and "nanochat_kernels.relu2_mlp.relu2_epilogue" in functions
assert library.fixed_globals(product.dot) == [("_INTERPRETED", "constexpr[False]")], library.fixed_globals(product.dot)
product.dot._unsafe_update_src(product.dot.src + "    # changed\\n")
names.append(library.identity(kernel, {"BLOCK": 1, "EPILOGUE": epilogue}))
print(names)
"""


def test_a_kernel_is_known_by_its_sources_and_constants():
    """In any process, whatever it launched before: Triton's own key differs."""
    found = []
    for first in ("True", "False"):
        done = forked.run("-c", NAMES.replace("FIRST", first), cwd=ROOT, env=environment(None))
        assert done.returncode == 0, done.stderr
        found.append(eval(done.stdout))
    assert found[0] == found[1] and len(set(found[0])) == len(found[0]) == 6


def test_code_with_other_parameters_is_rejected():
    """So that a version of Triton that passes arguments in another way is noticed when the library is built."""
    ptx = ".entry kernel(\n.param .u64 .ptr .global .align 1 a,\n.param .u32 b,\n.param .u64 c, .param .u64 d\n)"
    wanted = [{"kind": "pointer"}, {"kind": "constant"}, {"kind": "integer32"}]
    export.check_signature(ptx, wanted)
    with pytest.raises(
        export.CannotExport, match="the code takes u64 u32 u64 u64, but the launcher passes u64 u64 u64"
    ):
        export.check_signature(ptx, wanted[:1])
    matrix = {"kind": "matrix", "block_size": [64, 64]}
    described = ".entry kernel(.param .align 64 .b8 a[128], .param .u32 b, .param .u32 c"
    described += "".join(f", .param .u64 {name}" for name in "defg") + ")"
    export.check_signature(described, [matrix])


def test_the_check_finds_defects_and_missing_code(tmp_path):
    variant = {"code": "code", "bytes": {"cubin": 3, "ptx": 2}, "defects": []}
    kernel = {"function": "f", "constants": {}, "variants": [variant]}
    part = {
        "kernels": {"id": kernel},
        "entries": [{"id": "id", "kernel": "name", "dtype": "float32", "shape": "64", "flags": "plain"}],
    }
    (tmp_path / "sm80").mkdir()
    (tmp_path / "sm80" / "code.cubin").write_bytes(b"123")

    def check() -> str:
        (tmp_path / "manifest.json").write_text(json.dumps({"architectures": {"sm80": part}}))
        return export.check(tmp_path)

    with pytest.raises(export.CannotExport, match=r"code\.ptx is missing or has not 2 bytes"):
        check()
    (tmp_path / "sm80" / "code.ptx").write_bytes(b"12")
    assert check() == "sm80: 1 launches of 1 kernels in 1 variants of code"
    variant["defects"] = ["8 bytes spilled"]
    with pytest.raises(
        export.CannotExport, match="1 defects, the first is sm80 name float32 64 plain, f: 8 bytes spilled"
    ):
        check()


def test_what_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(export.CannotExport, match="architectures 80 and 90, not for 75"):
        export.export_all(["75", "90"], tmp_path)
    with pytest.raises(export.CannotExport, match="no kernel is called nothing; there are .*rms_norm_forward"):
        export.export_all(["80"], tmp_path, ("nothing",))
