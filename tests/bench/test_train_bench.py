"""`python -m bench train`, `parity` and `gradients`, with tiny models on the CPU: what they count, compare and conclude."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench import gradients, parity, train
from bench.first_step import first_steps
from bench.variants import NAMES, OPTIONS, Training, ablations, parse
from nanochat.gpt import GPTConfig
from nanochat.options.model import Implementations
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.train.timing import random_batch
from tests import forked
from tests.conftest import environment

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels that are interpreted on a CPU")
ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
RUNTIME = Runtime(0, 1, CPU, torch.float32)
SHAPE = GPTConfig.from_depth(1, 301, 32)
TINY = train.TrainConfig(
    depth=(1,), rows=(2,), tokens=(32,), vocab_size=301, rounds=3, seconds=1e-3, device="cpu", measure=("micro", "3"),
    variants=("fused", "plain"),
)  # fmt: skip


def test_names_stand_for_what_a_user_would_run():
    assert parse("fused").impl == Implementations() and parse("fused").execution == "graph"
    assert set(vars(parse("plain").impl).values()) == {"reference"} and parse("plain").execution == "eager"
    assert parse("compiled").compiled_optimizer and parse("compiled").impl.optimizer == "reference"
    peers = parse("peers")
    assert peers.liger_loss and (peers.impl.attention, peers.impl.self_attention) == ("cudnn", "parts")
    assert parse("max-autotune").execution == "max-autotune"
    assert parse("graph:auto,attention=cudnn").impl == Implementations(attention="cudnn")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "fast is no variant; name one of fused, plain, .* such as graph:auto,attention=cudnn"),
        ("graph", "graph is no variant"),
        ("later:auto", "EXECUTION:IMPL with one of graph, compile, eager, default"),
        ("graph:auto,norm=triton", "norm=triton is not OPERATION=IMPL with one of rms_norm"),
        ("graph:auto,rms_norm", "rms_norm is not OPERATION=IMPL"),
        ("graph:auto,linear_cross_entropy=liger", "Liger-Kernel's loss cannot be captured"),
    ],
)
def test_what_is_no_variant(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_an_ablation_swaps_each_operation_alone():
    base, *others = (parse(text).impl for text in ablations())
    assert [replace(base, **{option: "reference"}) for option in OPTIONS] == others


def test_the_compiled_optimizer_is_the_plain_one():
    """Two steps of two micro-steps move the weights as the optimizer that training has."""
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):
        plain, compiled = (
            Training(text, SHAPE, CPU, torch.float32) for text in ("plain", "eager:reference,optimizer=compiled")
        )
        torch.manual_seed(0)
        batches = [random_batch(SHAPE, 2) for _ in range(2)]
        before = [p.detach().clone() for p in plain.model.parameters()]
        for training in (plain, compiled):
            for batch in batches:
                training.step(batch, 2)
    assert plain.micro_step.loss.item() == pytest.approx(compiled.micro_step.loss.item(), rel=1e-5)
    for a, b, start in zip(plain.model.parameters(), compiled.model.parameters(), before, strict=True):
        a, b = a.detach(), b.detach()
        assert not torch.equal(a, start)
        torch.testing.assert_close(a - start, b - start, rtol=1e-2, atol=1e-3 * float((a - start).abs().max()))


def test_rows_count_tokens_and_compare_variants():
    rows = list(train.measure(SHAPE, 2, TINY, RUNTIME))
    assert [(row["measured"], row["variant"]) for row in rows] == [
        ("micro", "fused"), ("micro", "plain"), ("3", "fused"), ("3", "plain"),
    ]  # fmt: skip
    for row in rows:
        tokens = 2 * 32 * (3 if row["measured"] == "3" else 1)
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["ms"])
        assert len(row["samples_ms"]) == 3 and row["definition"] == NAMES[row["variant"]]
        assert (row["host_ms"] is None) == (row["measured"] == "3")
    assert rows[0]["ratio_to"]["plain"] == pytest.approx(rows[0]["ms"] / rows[1]["ms"])
    assert rows[0]["loss"] == rows[1]["loss"]
    (first, second) = train.tables(rows)
    assert (first.title, second.title) == ("micro-step of d1, 2 × 32", "step of 3 micro-steps of d1, 2 × 32")


def test_the_mfu_is_of_the_peak_of_the_device():
    record = train.Record({}, host={"2": None}, samples={"2": [40.0, 50.0, 60.0]})
    found = train.numbers_of(record, "2", 64, 1e6, SimpleNamespace(peak_flops=4e9))
    assert found["tokens_per_second"] == pytest.approx(2560) and found["mfu"] == pytest.approx(0.64)
    assert train.numbers_of(record, "2", 64, 1e6, SimpleNamespace(peak_flops=None))["mfu"] is None


def test_every_timed_update_has_gradients_of_its_own(monkeypatch):
    """An update sets them to zero, and one of zeros takes less time."""
    subject, filled, updated = train.Subject("plain", SHAPE, random_batch(SHAPE, 2), RUNTIME), [], []
    update = subject.training.update

    def checked_update() -> None:
        updated.append(all(group.gradients.any() for group in subject.training.optimizer.groups))
        update()

    monkeypatch.setattr(subject.training, "update", checked_update)
    subject.milliseconds("update", 3)
    assert updated == [True] * 3
    monkeypatch.setattr(subject.training, "fill_gradients", lambda: filled.append(1))
    subject.milliseconds("micro", 3)
    assert not filled


@pytest.mark.parametrize("text", ["plain", "eager:reference,optimizer=compiled"])
def test_a_step_waits_for_the_loss_before_it_changes_the_weights(monkeypatch, text):
    """As training does, which logs it."""
    training, read = Training(text, SHAPE, CPU, torch.float32), []
    change = "plain" if training.plain else "optimizer.update"
    owner = training if training.plain else training.optimizer
    monkeypatch.setattr(owner, change.split(".")[-1], lambda *_: read.append("weights"))
    for name in ("item", "tolist"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, f=original: read.append("loss") or f(x))
    training.step(random_batch(SHAPE, 2), 1)
    assert read == ["loss", "weights"]
    read.clear()
    training.update()
    assert read == ["weights"]


def test_a_variant_that_fails_has_a_note_and_the_others_are_measured(monkeypatch):
    monkeypatch.setattr("bench.variants.kernels.operations", lambda: no_liger)
    no_liger = {"linear_cross_entropy": SimpleNamespace(benchmark=SimpleNamespace(baselines={"liger": lambda: None}))}
    text = "eager:reference,linear_cross_entropy=liger"
    config = replace(TINY, variants=("plain", text), measure=("update",))
    plain, peers = train.measure(SHAPE, 2, config, RUNTIME)
    assert plain["ms"] > 0 and plain["tokens_per_second"] is None and peers["ms"] is None
    assert "liger_kernel is not installed; install it with: pip install -e '.[peers]'" in peers["note"]


def test_the_loss_of_another_library_takes_the_place_of_the_model_s(monkeypatch):
    def loss(x, weight, targets, softcap, ignore_index, reduction, loss_weight):
        logits = softcap * torch.tanh((x @ weight.T).float() / softcap)
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction) * loss_weight

    monkeypatch.setattr("bench.variants.liger", lambda: loss)
    texts = ("plain", "eager:reference,linear_cross_entropy=liger")
    plain, other = (Training(text, SHAPE, CPU, torch.float32) for text in texts)
    batch = random_batch(SHAPE, 2)
    for training in (plain, other):
        training.micro_step(batch, 0.5)
    assert plain.micro_step.loss.item() == pytest.approx(other.micro_step.loss.item(), rel=1e-5)
    for a, b in zip(plain.optimizer.groups, other.optimizer.groups, strict=True):
        torch.testing.assert_close(a.gradients, b.gradients, rtol=1e-3, atol=1e-5)


class Named(str):
    """Stands for a variant that is ready to run."""

    def prepare(self) -> None:
        pass


def subjects(memory: int, sizes: dict[str, int]) -> train.Subjects:
    """Variants of these sizes on a device with that much memory."""

    def make(text: str) -> Named:
        if sizes[text] + sum(sizes[kept] for kept in found.kept) > memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return Named(text)

    found = train.Subjects(make, CPU)
    return found


def test_variants_that_fit_together_are_kept():
    found = subjects(10, {"a": 4, "b": 5})
    for _ in range(2):
        assert [found.use(text, str.upper) for text in "ab"] == ["A", "B"]
    assert found.together and set(found.kept) == {"a", "b"} and not found.notes


def test_variants_that_fit_one_by_one_are_built_again():
    found = subjects(10, {"a": 6, "b": 7})
    for _ in range(2):
        assert [found.use(text, str.upper) for text in "ab"] == ["A", "B"]
    assert not found.together and not found.kept and not found.notes


def test_a_variant_too_large_even_alone_does_not_part_the_others():
    found = subjects(10, {"a": 4, "huge": 11, "b": 5})
    for _ in range(2):
        assert [found.use(text, str.upper) for text in ("a", "huge", "b")] == ["A", None, "B"]
    assert found.together and set(found.kept) == {"a", "b"}
    assert found.notes == {"huge": "out of memory: CUDA out of memory. Tried to allocate"}


def test_memory_that_runs_out_while_a_variant_works():
    found, free = subjects(10, {"a": 4, "b": 5}), iter([False, True])

    def work(text: str) -> str:
        if text == "b" and not next(free):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return text

    assert [found.use(text, work) for text in "ab"] == ["a", "b"] and not found.together and not found.notes


def test_what_was_timed_while_memory_was_short_is_timed_again_alone(monkeypatch):
    """Of a variant that is alone it counts: there is no more memory for it."""
    found, count, calls = subjects(10, {"a": 4, "b": 5}), itertools.count(), []
    monkeypatch.setattr(train, "refills", lambda device: next(count))
    assert [found.use(text, calls.append) for text in "ab"] == [None, None]
    assert calls == ["a", "b", "b"] and not found.together and not found.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--variants", "fast"], "fast is no variant"),
        (["train", "--measure", "0"], "--measure takes micro, update or a number of micro-steps, got 0"),
        (["train", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["train", "--device", "abacus"], "device 'abacus' is not available; choose one of auto, "),
        (["parity", "--rows", "6"], "--rows must be a multiple of 4"),
        (["parity", "--steps", "2"], "--steps must be at least 3"),
        (
            ["parity", "--device", "cpu", "--variant", "compiled"],
            "compiled is a baseline that `nanochat train base` does not run",
        ),
    ],
)
def test_bad_options(arguments, message):
    done = forked.run("-m", "bench", *arguments, cwd=ROOT, env=environment(None))
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_command_writes_what_it_measured(tmp_path):
    options = "--depth 1 --rows 1 --tokens 16 --vocab-size 301 --rounds 1 --seconds 0.001 --measure 1 --variants plain"
    path = tmp_path / "train.json"
    command = ["-m", "bench", "train", *options.split(), "--device", "cpu", "--json", str(path)]
    done = forked.run(*command, cwd=ROOT, env=environment(None))
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    (row,) = found["rows"]
    assert found["device"] == "cpu" and row["variant"] == "plain" and row["ms"] > 0 and "plain" in done.stdout


def test_first_steps():
    cold, warm = first_steps(("plain",), replace(TINY, tokens=(16,)))
    assert (cold["caches"], warm["caches"]) == ("cold", "warm")
    assert len(cold["steps_s"]) == 4 and 0 < sum(warm["steps_s"]) < warm["process_s"]
    (failed,) = first_steps(("fast",), TINY)
    assert "fast is no variant" in failed["note"]


def test_the_band_is_what_plain_runs_differ_by():
    plain = [[1.0] * 6, [1.0, 1.0, 1.1, 1.1, 1.2, 1.2], [1.0] * 6]
    assert parity.differences(plain[0], plain[1]) == pytest.approx([0.0, 0.1, 0.2])
    parts = parity.band(plain, [1.0, 1.0, 1.05, 1.05, 1.6, 1.6])
    assert [part["within"] for part in parts] == [True, True, False]
    far = parity.band(plain, [1.0, 1.0, 1.05, 1.05, 1.6, 1.6], beside=[9.0] * 6)
    assert [part["within"] for part in far] == [True, True, False] and far[2]["beside"] == pytest.approx(
        [8.0, 7.8, 8.0]
    )
    shown = [parity.table(parity.ParityConfig(), found).columns for found in (parts, far)]
    assert [column.header for column in shown[1] if column.header not in [other.header for other in shown[0]]] == [
        "compiled from them"
    ]
    with pytest.raises(ValueError, match="runs of 2 and 3 steps"):
        parity.differences([1.0, 2.0], [1.0, 2.0, 3.0])


def test_numbers_of_evaluations():
    one = {"val_bpb": 1.0, "CORE": 0.5, "tasks": {"world": 0.5}, "name": "d4"}
    assert not parity.unequal(one, one | {"val_bpb": 1.0005, "CORE": 0.505, "name": "d5"})
    assert parity.unequal(one, one | {"val_bpb": 1.002}) == ["val_bpb 1.00000 and 1.00200"]
    assert parity.unequal(one, one | {"tasks": {"world": 0.6}}) == ["tasks: world 0.50000 and 0.60000"]
    assert parity.unequal(one, one | {"CORE": float("nan")})


@interpreted
def test_parity_of_a_fused_operation(tmp_path):
    """All of it with RMSNorm's kernel, which rounds in another way than the plain operation."""
    config = parity.ParityConfig(
        depth=1, steps=6, rows=4, tokens=16, vocab_size=300, shards=1, eval_tokens=256, core_items=4, device="cpu",
        variant="eager:reference,rms_norm=triton", json=tmp_path / "parity.json",
    )  # fmt: skip
    parity.parity(config, "a test")
    found = json.loads(config.json.read_text())
    assert found["unequal"] == [] and len(found["losses"]) == 4
    runs = list(found["losses"].values())
    assert all(len(run) == 6 and run == pytest.approx(runs[0], abs=1e-3) for run in runs) and runs[0] != runs[3]
    assert all(part["within"] == (sum(part["found"]) / 3 <= max(part["plain"])) for part in found["parts"])


def test_loss_differences_of_variants():
    plain, same, baseline = parity.loss_differences(("plain", "plain", "compiled"), 1, 3, RUNTIME)
    assert plain["difference"] == same["difference"] == 0.0 and plain["loss"] == same["loss"] > 1
    assert "does not run" in baseline["note"]


@interpreted
def test_gradients_are_judged_by_the_plain_ones(tmp_path):
    config = gradients.GradientsConfig(
        depth=1, rows=2, tokens=16, micro_steps=2, vocab_size=301, device="cpu", json=tmp_path / "gradients.json",
        variant="eager:reference,rms_norm=triton",
    )  # fmt: skip
    assert gradients.gradients(config, "a test")
    rows = json.loads(config.json.read_text())["rows"]
    assert len(rows) == 8 and all(0 < row["error"] < 1e-5 for row in rows)


@pytest.mark.parametrize(("text", "passes"), [("plain", 1), (gradients.PLAIN, 1), ("fused", 3)])
def test_gradients_of_a_graph_are_those_of_a_replay(monkeypatch, text, passes):
    """Its first two passes run and are captured; only the third is what training repeats."""
    batches, calls = [random_batch(SHAPE, 2)] * 2, []

    class Counted(Training):
        def __init__(self, text, *arguments):
            super().__init__("plain", *arguments)
            run = self.micro_step
            self.micro_step = lambda *given: calls.append(given[1]) or run(*given)

    monkeypatch.setattr(gradients, "Training", Counted)
    found = gradients.gradients_of(text, SHAPE, batches, CPU, torch.float32)
    assert calls == [0.5] * 2 * passes
    monkeypatch.setattr(gradients, "Training", Training)
    once = gradients.gradients_of(gradients.PLAIN, SHAPE, batches, CPU, torch.float32)
    assert all(torch.equal(found[name], once[name]) for name in once)


def test_a_gradient_that_is_off_is_over_budget():
    torch.manual_seed(0)
    batches = [random_batch(SHAPE, 2)]
    oracle, plain = (
        gradients.gradients_of("plain", SHAPE, batches, CPU, dtype) for dtype in (torch.float64, torch.float32)
    )
    wrong = {name: x * (1 + 1e-4) if name == "head.weight" else x for name, x in plain.items()}
    over = {row["parameter"] for row in gradients.compare(wrong, oracle, plain, CPU) if row["over_budget"]}
    assert over == {"head.weight"}
