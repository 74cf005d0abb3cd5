"""`python -m bench profile`: what it makes of traces, of NVIDIA's profilers, and its page; without a GPU, with made-up kernels."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import nanochat_kernels as kernels
from bench import nsight, profile, profile_page, profile_plots, trace
from bench.trace import BACKWARD, FORWARD, OPTIMIZER, OTHER, Work, gaps, named_by_order, read_trace
from nanochat.platform.errors import UserError
from tests import forked
from tests.conftest import environment

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = {"rms_norm", "relu2_mlp", "adamw"}
MAIN, AUTOGRAD, STREAM = 1, 2, 7  # threads, and a stream


def event(name, kind, start, duration, thread=MAIN, **arguments) -> dict:
    arguments = {key.replace("_", " "): value for key, value in arguments.items()}
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": duration, "tid": thread, "args": arguments}


def launched(
    name: str, start: float, gpu_start: float, duration: float, number: int, thread: int = MAIN, how="cuLaunchKernelEx"
):
    """A launch on the host, and its kernel."""
    kind = "cuda_runtime" if how.startswith("cuda") else "cuda_driver"
    return [
        event(how, kind, start, 1, thread, correlation=number),
        event(name, "kernel", gpu_start, duration, STREAM, correlation=number),
    ]


def step_on_gpu() -> dict:
    """A step that a GPU launches: two operations forward and backward, a gradient's copy, and an update."""
    return {
        "traceEvents": [
            event("profiled step 0", "user_annotation", 0, 1000),
            event("micro-step", "user_annotation", 10, 600),
            event("aten::embedding", "cpu_op", 20, 5, Sequence_number=5),
            *launched("gather", 21, 120, 10, 1, how="cudaLaunchKernel"),
            event("layer 0", "user_annotation", 30, 100),
            event("rms_norm", "user_annotation", 31, 30),
            event("RMSNorm", "cpu_op", 32, 20, Sequence_number=6),
            *launched("norm_kernel", 35, 140, 20, 2),
            event("relu2_mlp", "user_annotation", 70, 50),
            event("aten::empty", "cpu_op", 71, 1, Sequence_number=7),  # makes no node
            event("MLP", "cpu_op", 75, 30, Sequence_number=7),
            *launched("product_kernel", 80, 160, 100, 3),
            # the node with number 6 was made in rms_norm, although relu2_mlp began with that number too
            event(f"{trace.EVALUATED}MLPBackward", "cpu_op", 200, 100, AUTOGRAD, Sequence_number=7),
            event("aten::mul", "cpu_op", 205, 40, AUTOGRAD, Sequence_number=8),
            *launched("product_kernel", 210, 270, 150, 4, AUTOGRAD),
            event(f"{trace.EVALUATED}RMSNormBackward", "cpu_op", 310, 50, AUTOGRAD, Sequence_number=6),
            *launched("norm_gradient", 320, 430, 30, 5, AUTOGRAD),
            event(f"{trace.EVALUATED}torch::autograd::AccumulateGrad", "cpu_op", 370, 20, AUTOGRAD),
            *launched("add", 372, 460, 10, 6, AUTOGRAD),
            event("update weights", "user_annotation", 620, 200),
            event("adamw", "user_annotation", 630, 50),
            *launched("adamw_kernel", 640, 700, 60, 7),
            event("aten::zero_", "cpu_op", 700, 10),
            *launched("fill", 701, 760, 5, 8),
            *launched("elsewhere", 1100, 1200, 5, 9),
            {"ph": "i", "name": "[memory]", "ts": 30, "args": {"Total Allocated": 5e6, "Device Type": 1}},
            {"ph": "i", "name": "[memory]", "ts": 20, "args": {"Total Allocated": 2e6, "Device Type": 1}},
            {"ph": "i", "name": "[memory]", "ts": 25, "args": {"Total Allocated": 9e9, "Device Type": 0}},
        ]
    }


def test_a_kernel_belongs_to_the_operation_that_launched_it_or_whose_gradient_it_computes():
    read = read_trace(step_on_gpu(), OPERATIONS)
    assert read.on_gpu and [(w.name, w.operation, w.phase, w.step) for w in read.work] == [
        ("gather", "embedding", FORWARD, 0),
        ("norm_kernel", "rms_norm", FORWARD, 0),
        ("product_kernel", "relu2_mlp", FORWARD, 0),
        ("product_kernel", "relu2_mlp", BACKWARD, 0),
        ("norm_gradient", "rms_norm", BACKWARD, 0),
        ("add", "torch::autograd::AccumulateGrad", BACKWARD, 0),
        ("adamw_kernel", "adamw", OPTIMIZER, 0),
        ("fill", "zero_", OPTIMIZER, 0),
        ("elsewhere", "cuLaunchKernelEx", OTHER, -1),
    ]
    assert read.memory == [(20.0, 2e6), (30.0, 5e6)] and read.steps == 1
    assert read.phases == [(FORWARD, 10.0, 200.0), (BACKWARD, 200.0, 610.0), (OPTIMIZER, 620.0, 820.0)]
    assert profile.by_operation(read.work, 1)["relu2_mlp", BACKWARD] == pytest.approx(0.15)
    product, *_ = profile.by_kernel(read.work, 1)
    assert (product["name"], product["calls"], product["owners"]) == (
        "product_kernel", 2, ["relu2_mlp backward", "relu2_mlp forward"],
    )  # fmt: skip


def replayed(*names: str) -> list[Work]:
    """Kernels of a graph, 10 µs each with 2 µs between them."""
    return [Work(name, 12.0 * i, 12.0 * i + 10, 10.0, "", FORWARD, 0) for i, name in enumerate(names)]


def test_kernels_of_a_graph_take_their_operations_by_order():
    content = step_on_gpu()
    known = [work for work in read_trace(content, OPERATIONS).work if work.step == 0]
    found = named_by_order(known, replayed(*(work.name for work in known)))
    assert [(w.operation, w.phase) for w in found] == [(w.operation, w.phase) for w in known]
    # one is missing, one is new, and one of a known name has no partner
    names = [
        "gather",
        "norm_kernel",
        "new",
        "product_kernel",
        "product_kernel",
        "norm_gradient",
        "adamw_kernel",
        "fill",
        "gather",
    ]
    found = {i: work for i, work in enumerate(named_by_order(known, replayed(*names)))}
    assert (found[3].phase, found[4].phase, found[5].operation) == (FORWARD, BACKWARD, "rms_norm")
    assert found[2].operation == "unknown" and found[8].operation == "embedding"
    given = replace(replayed("gather")[0], operation="copy_")
    assert named_by_order(known, [given]) == [given]


def test_the_work_of_a_graph_has_no_operation_of_its_own():
    content = {"traceEvents": [
        event("profiled step 1", "user_annotation", 0, 100),
        event("micro-step", "user_annotation", 1, 90),
        *launched("norm_kernel", 10, 20, 5, 1, how="cudaGraphLaunch"),
    ]}  # fmt: skip
    (work,) = read_trace(content, OPERATIONS).work
    assert (work.operation, work.phase, work.step) == ("", FORWARD, 1)


def test_gaps_are_the_times_in_which_nothing_runs():
    a, b, c = replayed("a", "b", "c")
    long = replace(a, name="long", end=20.0)
    assert [gap for gap, _, _ in gaps([a, b, c])] == [2.0, 2.0]
    ((gap, before, after),) = gaps([long, b, c])  # b runs beside the long one, and ends after it
    assert (gap, before.name, after.name) == (2.0, "b", "c")


def test_on_a_cpu_an_operator_has_the_time_that_no_other_one_within_it_takes():
    content = {"traceEvents": [
        event("profiled step 0", "user_annotation", 0, 100),
        event("update weights", "user_annotation", 0, 90),
        event("aten::outer", "cpu_op", 10, 50),
        event("adamw", "user_annotation", 20, 30),
        event("aten::inner", "cpu_op", 25, 20),
        event("aten::copy_", "cpu_op", 30, 15),
    ]}  # fmt: skip
    read = read_trace(content, OPERATIONS)
    assert not read.on_gpu and [(w.name, w.busy, w.operation) for w in read.work] == [
        ("aten::outer", 30.0, "outer"), ("aten::inner", 5.0, "adamw"), ("aten::copy_", 15.0, "adamw"),
    ]  # fmt: skip


def ncu_row(*cells: str) -> str:
    return ",".join(f'"{cell}"' for cell in cells)


NCU = "\n".join(
    [
        "==PROF== Connected to process 1",
        ncu_row("ID", "Process ID", "Kernel Name", *nsight.METRICS),
        ncu_row("", "", "", "ns", "byte", "%", "%", "%", "register/thread"),
        ncu_row("0", "1", "norm_kernel", "1,000", "2,000", "10", "90", "85", "40"),
        ncu_row("1", "1", "norm_kernel", "3,000", "4,000", "20", "80", "85", "40"),
        ncu_row("2", "1", "void cutlass::Kernel2<a<b>>(int)", "9,000", "4,000", "95", "30", "", "255"),
        "==PROF== Disconnected from process 1",
    ]
)
NSYS = """Processing [steps.sqlite] with [cuda_gpu_kern_sum.py]...

Time (%),Total Time (ns),Instances,Avg (ns),Name
75.0,3000000,2,1500000,"product_kernel, wide"
25.0,1000000,4,250000,norm_kernel

"""


def tool(folder: Path, name: str, output: str, status: int = 0) -> None:
    """A stand-in for a profiler, which notes its arguments, prints and ends with a status."""
    path = folder / name
    (folder / f"{name}.out").write_text(output)
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/{name}.log\ncat {folder}/{name}.out\nexit {status}\n')
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return folder


def test_nsight_compute(tools):
    tool(tools, "ncu", NCU)
    norm, product = nsight.compute({"depth": 4, "layers": 0}, ["norm_kernel", "void cutlass::Kernel2<a<b>>(int)"])
    assert (norm.launches, norm.values["ns"], norm.values["bytes"], norm.percent_of_roofline) == (
        2,
        2000.0,
        3000.0,
        85.0,
    )
    assert product.percent_of_roofline == 95.0 and "dram_percent" not in product.values
    log = (tools / "ncu.log").read_text()
    assert "--kernel-name=regex:^(Kernel2|norm_kernel)$" in log and "--depth 4 --layers 1 --steps 1 --launched" in log


def test_nsight_systems(tools, tmp_path):
    tool(tools, "nsys", NSYS)
    found = nsight.systems({"depth": 4}, tmp_path)
    first, second = found["cuda_gpu_kern_sum"]
    assert first["Name"] == "product_kernel, wide" and second["Instances"] == "4" and set(found) == set(nsight.REPORTS)
    log = (tools / "nsys.log").read_text()
    assert "--cuda-graph-trace=node" in log and "-m bench.profiled_steps --depth 4" in log and "--launched" not in log


def test_without_the_tools_or_when_they_fail_the_page_goes_without_them(tools, tmp_path, capsys):
    assert nsight.systems({}, tmp_path) == {} and nsight.compute({}, ["a"]) == []
    tool(tools, "ncu", "==ERROR== The user may not access the performance counters\n", 1)
    assert nsight.compute({}, ["a"]) == []
    said = " ".join(capsys.readouterr().out.split())
    assert "nsys is not on the PATH" in said and "ncu failed (==ERROR== The user may not access" in said


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void at::native::vectorized_elementwise_kernel<4, f<int>>(int)", "vectorized_elementwise_kernel"),
        ("_norm_kernel", "_norm_kernel"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD"),
        ("(anonymous)", "(anonymous)"),
    ],
)
def test_base_names(kernel, name):
    assert nsight.base_name(kernel) == name


def test_the_command_writes_a_page(tmp_path):
    """On this CPU: every part of the page, from a real trace of a small model."""
    options = "--depth 2 --rows 2 --tokens 32 --vocab-size 301 --micro-steps 2 --steps 2 --device cpu"
    done = forked.run(
        "-m", "bench", "profile", *options.split(), "--out", str(tmp_path), cwd=ROOT, env=environment(None)
    )
    assert done.returncode == 0, done.stderr
    found, page = json.loads((tmp_path / "profile.json").read_text()), (tmp_path / "profile.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and '.png"' not in page
    for title in ("Time by operation", "Distance to the roofline", "Launch gaps", "Memory over time", "Operators"):
        assert f"<h2>{title}</h2>" in page
    rows = {(row["operation"], row["phase"]): row for row in found["operations"]}
    for operation in ("self_attention", "output_projection", "relu2_mlp", "rms_norm", "linear_cross_entropy"):
        forward, backward = rows[operation, FORWARD], rows[operation, BACKWARD]
        assert forward["ms"] > 0 and backward["ms"] > 0 and forward["floor_ms"] > 0
        assert forward["calls"] == {"rms_norm": 4, "linear_cross_entropy": 2}.get(operation, 4)
    assert rows["newton_schulz", OPTIMIZER]["flops"] > 0 and rows["adamw", OPTIMIZER]["bytes"] > 0
    mlp = rows["relu2_mlp", FORWARD]  # two products of each of two layers in each of two micro-steps
    assert mlp["flops"] == 4 * 2 * (2 * 64 * 128 * 512) and rows["relu2_mlp", BACKWARD]["flops"] == 2 * mlp["flops"]
    products = [row for row in found["kernels"] if row["name"] in ("aten::mm", "aten::bmm", "aten::addmm_")]
    owners = {owner.split()[0] for row in products for owner in row["owners"]}
    assert products and owners <= set(kernels.operations()), owners
    assert found["steps"]["launched"]["busy_ms"] <= 1.001 * found["steps"]["launched"]["ms"]


def test_phases_of_an_operation_that_computes_gradients_early_have_one_floor():
    """As the head; the parts stay in the table, without a share of a roofline that is not theirs."""

    def row(operation: str, phase: str, ms: float, floor_ms: float) -> dict:
        return {
            "operation": operation,
            "phase": phase,
            "ms": ms,
            "floor_ms": floor_ms,
            "bytes": 1e9,
            "flops": 1e12,
            "calls": 1.0,
        }

    rows = [
        row("head", FORWARD, 26.0, 7.0),
        row("head", BACKWARD, 0.5, 14.0),
        row("mlp", FORWARD, 4.0, 3.0),
        row("mlp", BACKWARD, 9.0, 8.0),
    ]
    found = {"operations": rows}
    joined, *others = profile_plots.with_floor(found)
    assert (joined["phase"], joined["ms"], joined["floor_ms"], joined["flops"]) == (
        "forward and backward",
        26.5,
        21.0,
        2e12,
    )
    assert others == rows[2:]
    lines = [line for line in profile_page.operations_table(found).splitlines() if "head" in line]
    assert len(lines) == 3 and ["%" in line.rsplit("|", 2)[1] for line in lines] == [False, False, True]


def test_a_page_with_replayed_steps_and_nsight(tools, tmp_path):
    """What only a GPU has, from made-up traces."""
    tool(tools, "ncu", NCU)
    tool(tools, "nsys", NSYS)
    known = read_trace(step_on_gpu(), OPERATIONS)
    replay = replace(known, work=named_by_order(known.work, replayed(*(work.name for work in known.work[:-1]))))
    need = profile.Need(1e6, 1e9, 2, 0.09)
    measured = nsight.compute({}, ["norm_kernel"])
    found = {
        "command": "a test", "commit": "abc", "date": "today", "device": "a GPU", "versions": {"torch": "2"},
        "options": {"depth": 2, "micro_steps": 1, "rows": 2, "tokens": 32, "variant": "fused"}, "tokens": 64,
        "flops_per_token": 1e6, "datasheet_flops": 1e12, "bandwidth": 1e12, "peak_flops": 1e13,
        "operations": profile._rows(profile.by_operation(known.work, 1), {("relu2_mlp", BACKWARD): need}, 1),
        "kernels": profile.by_kernel(known.work, 1),
        "nsight_compute": [vars(one) | {"percent_of_roofline": one.percent_of_roofline} for one in measured],
        "nsight_systems": nsight.systems({}, tmp_path),
    }  # fmt: skip
    page = profile.write_page(found, known, replay, tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "<td>replayed</td>" in page and "Kernels by Nsight Compute" in page and "product_kernel, wide" in page
    assert found["steps"]["replayed"]["gap_ms"] == pytest.approx(7 * 2 / 1e3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps and --micro-steps must be at least 1, got 0 and 1"),
        (["--variant", "fast"], "fast is no variant"),
        (["--device", "abacus"], "device 'abacus' is not available"),
    ],
)
def test_bad_options(options, message):
    done = forked.run("-m", "bench", "profile", *options, cwd=ROOT, env=environment(None))
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_profile_of_a_gpu_without_kernels_is_refused(monkeypatch):
    class Steps:
        training = type("T", (), {"model": type("M", (), {"blocks": ()})})

        def __init__(self, *_):
            pass

        def run(self) -> None:
            pass

    monkeypatch.setattr(profile, "ProfiledSteps", Steps)
    runtime = type("R", (), {"device": type("D", (), {"type": "cuda"}), "compute_dtype": None})
    with pytest.raises(UserError, match="torch.profiler recorded no kernel"):
        profile.recorded_steps(profile.ProfiledStepsConfig(), runtime, None)
