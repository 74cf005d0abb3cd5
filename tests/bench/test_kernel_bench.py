"""The benchmark's own logic, on made-up results: comparison, report, command line, agreement of variants."""

import json
from pathlib import Path

import pytest
import torch

import bench.__main__
from bench import cases, measure, products
from bench.compare import compare, load
from bench.report import write_report
from nanochat.platform.errors import UserError
from nanochat_kernels import reference
from nanochat_kernels.operation import Benchmark, Operation
from tests import forked
from tests.conftest import environment

ROOT = Path(__file__).resolve().parents[2]


def row(impl="triton", ms=1.0, copy=4000.0, spread=0.01, **more):
    return {
        "op": "rms_norm", "shape": "d20", "mode": "fwd", "dtype": "bfloat16", "impl": impl, "ms": ms, "copy_gbps": copy,
        "quartiles_ms": [ms * (1 - spread), ms * (1 + spread)], "samples_ms": [ms] * 5, "bytes": 1, "gbps": 3000.0,
        "percent_of_copy": 75.0, "ratio_to": {}, "launch_us": 20.0, "transient_mb": 0.1,
        "flops": 3.0, "tflops": 1.0, "dense_tflops": 1.0, **more,
    }  # fmt: skip


def result(path: Path, *rows: dict) -> Path:
    header = {
        "command": "python -m bench",
        "commit": "abc",
        "date": "today",
        "device": "a GPU",
        "product_tflops": 700.0,
    }
    path.write_text(json.dumps({**header, "versions": {"torch": "2"}, "rows": list(rows)}))
    return path


@pytest.mark.parametrize(
    ("after", "slower"),
    [
        (row(ms=1.02), 0),  # within 3 %
        (row(ms=1.10), 1),
        (row(ms=1.10, spread=0.10), 0),  # within the noise
        (row(ms=1.10, copy=3600.0), 0),  # the whole GPU was slower
        (row(ms=0.50), 0),
    ],
)
def test_compare(tmp_path, after, slower):
    before, after = result(tmp_path / "a.json", row()), result(tmp_path / "b.json", after)
    assert compare(before, after) == slower
    done = forked.run("-m", "bench", "compare", str(before), str(after), cwd=ROOT, env=environment(None))
    assert done.returncode == slower and ("SLOWER" in done.stdout) == bool(slower), done.stdout + done.stderr


def test_compare_rejects_files_that_are_not_results_or_share_no_case(tmp_path):
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(UserError, match=r"c\.json is not a result of python -m bench"):
        load(tmp_path / "c.json")
    one, other = result(tmp_path / "a.json", row()), result(tmp_path / "b.json", row(shape="d12"))
    with pytest.raises(UserError, match="no case in common"):
        compare(one, other)


def test_report(tmp_path):
    rows = [
        row(ratio_to={"eager": 0.5, "compile": 0.9}),
        row("eager", 2.0, ratio_to={"triton": 2.0}),
        {**row("compile"), "ms": None, "note": "out of memory"},
    ]
    html = write_report((result(tmp_path / "a.json", *rows),), tmp_path / "out")
    text, page = (tmp_path / "out/report.md").read_text(), html.read_text()
    assert "| d20 fwd bfloat16 | eager | 2.0000 |" in text and "| 0.500 |" in text
    assert page.count("data:image/png;base64,") == 2 and "<table>" in page
    for name in ("ratios.png", "roofline.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "adamw"], "--op adamw has no benchmark"),
        (["--shape", "d99"], "--shape must be among"),
        (["--mode", "sideways"], "--mode must be among fwd, bwd, both"),
        (["--dtype", "int8"], "--dtype must be bfloat16, float16 or float32"),
        (["report", "missing.json"], "missing.json is not a result"),
    ],
)
def test_command_line_refuses(arguments, message):
    done = forked.run("-m", "bench", *arguments, cwd=ROOT, env=environment(None))
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_each_example_of_the_help_is_a_line():
    done = forked.run("-m", "bench", "--help", cwd=ROOT, env=environment(None))
    examples = [line for line in done.stdout.splitlines() if line.startswith("python -m bench")]
    wanted = [line for line in (bench.__main__.__doc__ or "").splitlines() if line.startswith("python -m bench")]
    assert examples == wanted and all(line.count("python -m bench") == 1 for line in examples), done.stdout


def test_list_names_every_operation_and_its_baselines():
    done = forked.run("-m", "bench", "--list", cwd=ROOT, env=environment(None))
    assert done.returncode == 0, done.stderr
    for name, operation in cases.measured().items():
        (line,) = (line for line in done.stdout.splitlines() if line.split()[0] == name)
        assert all(word in line for word in (*operation.benchmark.shapes, *operation.benchmark.modes))


def norm_case(monkeypatch, mode, **baselines):
    """A small benchmark of rms_norm on the CPU, against baselines made for the test."""
    benchmark = Benchmark(
        shapes=("small",),
        inputs=lambda shape, dtype, device: (torch.randn(4, 32, dtype=dtype, device=device),),
        differentiable=(0,),
        elements=lambda arguments, part: 2 * arguments[0].numel(),
        flops=lambda arguments, part, variant: 3 * arguments[0].numel(),
        baselines={name: lambda made=function: made for name, function in baselines.items()},
    )
    operation = Operation("rms_norm", reference.rms_norm, reference.rms_norm, benchmark=benchmark)
    monkeypatch.setattr(cases, "measured", lambda: {"rms_norm": operation})
    return cases.case("rms_norm", "small", mode, torch.float32, ("eager", *baselines), device="cpu")


def changes_its_input(x):
    y = reference.rms_norm(x.clone())
    x.data.fill_(7.0)  # as a kernel does it: unseen by autograd
    return y


def run(case, name, number=0):
    if name in case.prepare:
        case.prepare[name](number)
    return case.variants[name](number)


@pytest.mark.parametrize("mode", ["fwd", "both"])
def test_a_baseline_that_changes_its_inputs_spoils_nothing(monkeypatch, mode):
    case = norm_case(monkeypatch, mode, rude=changes_its_input)
    expected = run(case, "eager")
    for _ in range(2):  # its inputs are restored, and nobody else's were touched
        assert cases.disagreement(run(case, "rude"), expected, case.tolerance) is None
    assert cases.disagreement(run(case, "eager"), expected, 0.0) is None


@pytest.mark.parametrize("mode", ["fwd", "bwd", "both"])
def test_variants_that_disagree_are_seen(monkeypatch, mode):
    case = norm_case(monkeypatch, mode, wrong=lambda x: 1.01 * reference.rms_norm(x), right=reference.rms_norm)
    expected = run(case, "eager")
    assert "1.0% of its norm" in cases.disagreement(run(case, "wrong"), expected, case.tolerance)
    assert cases.disagreement(run(case, "right"), expected, case.tolerance) is None
    assert case.bytes == {"fwd": 1, "bwd": 1, "both": 2}[mode] * 2 * 4 * 32 * 4


@pytest.mark.parametrize("is_loss", [True, False])
@pytest.mark.parametrize("loss", [torch.sum, lambda x: x.sum(1)], ids=["a number", "one per row"])
def test_only_the_record_says_that_a_result_is_a_loss(is_loss, loss):
    benchmark = Benchmark((), lambda *_: (), (0,), lambda *_: 0.0, lambda *_: 0.0, is_loss=is_loss)
    _, (gradient,) = cases.Runner(loss, [(torch.zeros(3, 4),)], benchmark, "both")(0)
    assert (gradient == 1).all() == is_loss


def test_what_disagrees_or_fails_is_not_timed(monkeypatch):
    monkeypatch.setattr(measure, "launch_microseconds", lambda run: 1.0)
    monkeypatch.setattr(measure, "transient_bytes", lambda run: 1e6)
    found = {"wrong": lambda x: 1.01 * reference.rms_norm(x), "broken": lambda x: 1 / 0, "right": reference.rms_norm}
    notes, extra = measure.check(norm_case(monkeypatch, "both", **found))
    assert set(extra) == {"eager", "right"} and extra["right"] == {"launch_us": 1.0, "transient_mb": 1.0}
    assert "of its norm" in notes["wrong"] and notes["broken"] == "ZeroDivisionError: division by zero"


def test_nan_and_another_shape_are_disagreement():
    x = torch.ones(3)
    assert cases.disagreement(x, x, 0.0) is None
    assert cases.disagreement(torch.full((3,), torch.nan), x, 1.0)
    assert "has shape" in cases.disagreement(torch.ones(4), x, 1.0)


def test_a_wrong_matrix_of_a_batch_is_seen():
    """Not hidden by the norm of the others."""
    x = torch.randn(100, 4, 4)
    wrong = x.clone()
    wrong[50] = 0.0
    assert "tensor 50 differs" in cases.disagreement([wrong], [x], 0.1)


def test_products_are_chosen_by_name_width_and_rows():
    chosen = products.products(products.ProductsConfig(only=("relu2_mlp_up",), width=(768,), rows=(1024,)))
    assert [(kernel.name, key) for kernel, key in chosen] == [("relu2_mlp_up", (1024, 3072, 768))]
    with pytest.raises(UserError, match="no product has these names.* the products are .*relu2_mlp_up"):
        products.products(products.ProductsConfig(only=("relu",)))


def test_every_variant_is_called_as_the_record_says():
    """The benchmark of an operation with more results than the model uses drops them, in compiled variants too."""
    benchmark = Benchmark(
        ("one",), lambda *_: (torch.ones(2),), (0,), lambda *_: 1.0, lambda *_: 1.0,
        call=lambda function, x: function(x, 3.0)[0],
    )  # fmt: skip
    operation = Operation("op", lambda x, y, impl: (x * y, None), lambda x, y: (x * y, None), benchmark=benchmark)
    assert torch.equal(cases.functions(operation)["eager"](torch.ones(2)), torch.full((2,), 3.0))
