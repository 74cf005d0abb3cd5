"""The gate: what is wrong is not chosen, and what is fastest is."""

import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from nanochat.inference.engine import STEP_ROWS
from nanochat_kernels import configs, dispatch, gate, reference
from nanochat_kernels.dispatch import operations
from nanochat_kernels.operation import DECODED_ROWS, Implementation, RunShape, Trial
from tests.kernels.harness import DEVICE, GPU, in_layout

PLANTED_FAULTS = {
    "only the first rows compared": ("gate", "range(0, rows, step)", "range(0, min(rows, step), step)",
     "test_what_is_wrong_is_not_chosen"),
    "gradients of shared inputs not compared": ("gate", "(true, plain) in sums.items():", "(true, plain) in ():",
     "test_what_is_wrong_is_not_chosen"),
    "only the first result compared": ("gate", "changed + tuple(x for x in (results", "changed + tuple(x for x in (results[:1]",
     "test_what_is_wrong_is_not_chosen"),
    "a comparison that does not fit counts against the implementation": (
     "gate", "            except torch.OutOfMemoryError:\n                raise\n", "",
     "test_a_comparison_that_does_not_fit_does_not_count_against_the_implementation"),
}  # fmt: skip
SHAPE = RunShape(rows=8, tokens=256, width=256, heads=2, kv_heads=1, vocab=1024, depth=2) if GPU else RunShape(
    rows=2, tokens=8, width=32, heads=2, kv_heads=1, vocab=64, depth=1
)  # fmt: skip
OPERATIONS = operations()


@pytest.fixture(autouse=not GPU)
def few_decoded_rows(monkeypatch):
    """Rows of the trials of decoding that an interpreter computes in seconds."""
    for name, module in list(sys.modules.items()):
        if name.startswith("nanochat_kernels.") and hasattr(module, "DECODED_ROWS"):
            monkeypatch.setattr(module, "DECODED_ROWS", 4)


def test_decoding_is_judged_with_the_rows_of_a_step():
    assert STEP_ROWS["cuda"][0] == DECODED_ROWS


WHERE = (torch.device(DEVICE), torch.bfloat16)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of each tensor, the last one shorter, also of these small ones; dispatch remembers nothing of another test.

    The inputs are the same whatever ran before: in few small rows, one draw in many makes the worst of them exceed its budget.
    """
    torch.manual_seed(1)  # 0 is that of the upstream gradients, which would equal the inputs
    monkeypatch.setattr(gate, "CHUNK", 2**16 - 1 if GPU else 2**8 - 1)
    configs.clear()
    yield
    configs.clear()


def examined(monkeypatch, name: str, run=None) -> dict:
    """What the gate says of an operation; `run` in place of its fused implementation, which is said to be the faster one."""
    operation = operations()[name]
    if run:
        ms = lambda trial, able, _: {name: 1.0 if name == "triton" else 2.0 for name in able}  # noqa: E731
        monkeypatch.setattr(gate, "milliseconds", ms)
        monkeypatch.setattr(dispatch, "named", lambda operation, impl: Implementation(run))
    return gate.examine_operation(operation, SHAPE, *WHERE)


def test_all_operations_have_a_choice(monkeypatch):
    monkeypatch.setattr(gate, "examine_operation", lambda *_: {"impl": "triton"})
    found = dict(gate.examine(SHAPE, *WHERE))
    assert found.keys() == operations().keys() and found["linear"]["why"] == "there is no other implementation"


def test_the_inputs_are_the_same_each_time_and_random_numbers_of_others_continue(monkeypatch):
    before, given = torch.get_rng_state(), []
    monkeypatch.setattr(gate, "disagreement", lambda trial, *_: given.append(trial.inputs[0]))
    for _ in range(2):
        gate.examine_operation(operations()["rms_norm"], SHAPE, *WHERE)
        torch.rand(1)
    assert len(given) == 2 and torch.equal(*given)
    torch.set_rng_state(before)
    expected = torch.rand(2)
    torch.set_rng_state(before)
    gate.examine_operation(operations()["rms_norm"], SHAPE, *WHERE)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("fits", "chosen"), [({"triton"}, "triton"), ({"reference"}, "reference"), (set(), "reference")]
)
def test_what_does_not_fit_into_memory_is_not_chosen(monkeypatch, fits, chosen):
    """All implementations together do not fit; each is timed by itself then."""

    def milliseconds(trial, implementations, reference):
        if len(implementations) > 1 or not fits.issuperset(implementations):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dict.fromkeys(implementations, 1.0)

    monkeypatch.setattr(gate, "milliseconds", milliseconds)
    choice = gate.examine_operation(operations()["rms_norm"], SHAPE, *WHERE)
    assert choice["impl"] == chosen and choice["ms"].keys() == fits
    assert choice["faults"] == dict.fromkeys({"triton", "reference"} - fits, "out of memory at these shapes")


def test_a_trial_that_is_only_timed_counts_for_what_was_right_before(monkeypatch):
    """As the head's mean over all rows, which cannot be compared in chunks."""
    operation = operations()["rms_norm"]
    [judged, *_] = operation.trials(SHAPE, *WHERE)
    right = Implementation(reference.rms_norm)
    wrong = Implementation(lambda x: 2 * reference.rms_norm(x))
    monkeypatch.setattr(dispatch, "named", lambda operation, impl: {"right": right, "wrong": wrong}[impl])
    monkeypatch.setattr(gate, "milliseconds", lambda trial, able, _: dict.fromkeys(able, 1.0 if trial.judged else 2.0))
    for trials, faulty in (
        ((judged, replace(judged, judged=False)), {"wrong"}),
        ((replace(judged, judged=False),), set()),
    ):
        given = replace(
            operation, implementations={"right": right, "wrong": wrong}, trials=lambda *_, found=trials: found
        )
        choice = gate.examine_operation(given, SHAPE, *WHERE)
        assert choice["faults"].keys() == faulty
        assert choice["ms"]["right"] == sum(1.0 if trial.judged else 2.0 for trial in trials)


def test_the_head_is_timed_as_training_calls_it():
    """A mean: without a reduction the fused head computes its forward product twice."""
    timed = [trial for trial in operations()["linear_cross_entropy"].trials(SHAPE, *WHERE) if trial.timed]
    assert [(trial.inputs[5], len(trial.inputs[0])) for trial in timed] == [("mean", SHAPE.rows * SHAPE.tokens)]


def test_the_reference_of_newton_schulz_is_timed_one_matrix_after_the_other(monkeypatch):
    """As the plain optimizer calls it; a compiled batch would be faster."""
    timed = []
    monkeypatch.setattr(gate, "milliseconds", lambda trial, able, _: timed.append((trial, able)) or {"reference": 1.0})
    monkeypatch.setattr(gate, "disagreement", lambda *_: None)
    gate.examine_operation(OPERATIONS["newton_schulz"], SHAPE, *WHERE)
    for trial, able in timed:
        seen = []
        monkeypatch.setattr(reference, "newton_schulz", lambda x, seen=seen: seen.append(x.shape) or x)
        able["reference"](*trial.inputs)
        assert seen == [trial.inputs[0].shape[1:]] * len(trial.inputs[0])
    assert len(timed) == 3


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_implementation_that_runs_out_of_memory_is_not_chosen(monkeypatch):
    choice = examined(monkeypatch, "rms_norm", out_of_memory)
    assert choice["impl"] == "reference" and choice["faults"] == {"triton": "out of memory at these shapes"}


@pytest.mark.parametrize("name", ["in_float64", "over_budget", "upstream_of"])
def test_a_comparison_that_does_not_fit_does_not_count_against_the_implementation(monkeypatch, name):
    monkeypatch.setattr(gate, name, out_of_memory)
    with pytest.raises(gate.GateError, match=r"rms_norm could not be judged .* do not fit .* gate --device-batch-size"):
        examined(monkeypatch, "rms_norm")


def test_a_chunk_is_of_rows_also_where_another_input_is_as_long():
    """As the head's weight at 65,536 tokens: what is computed of a row is as wide as the vocabulary."""
    x, weight, targets = torch.ones(64, 4), torch.ones(64, 4), torch.ones(64, dtype=torch.int64)
    trial = Trial((x, weight, targets), (0, 2), (0, 1))
    largest = max(rows.stop - rows.start for rows in gate.chunks(trial, [x[:, 0]]))
    assert largest == min(64, gate.CHUNK // 64)


@pytest.mark.parametrize("error", [RuntimeError("no such instruction"), torch.OutOfMemoryError("CUDA out of memory")])
def test_what_fails_while_it_is_timed_is_not_chosen(monkeypatch, error):
    """The others are timed."""

    def milliseconds(trial, implementations, reference):
        if "triton" in implementations:
            raise error
        return dict.fromkeys(implementations, 1.0)

    monkeypatch.setattr(gate, "milliseconds", milliseconds)
    choice = gate.examine_operation(operations()["rms_norm"], SHAPE, *WHERE)
    assert choice["impl"] == "reference" and choice["ms"] == {"reference": 1.0}
    assert choice["faults"] == {"triton": gate.reason_of(error)}


def test_the_gradients_of_few_keys_are_compared_in_groups_of_the_size_that_the_trial_says(monkeypatch):
    seen = []
    over_budget = gate.over_budget
    monkeypatch.setattr(gate, "over_budget", lambda *a: seen.append(a[5:]) or over_budget(*a))
    gate.examine_operation(OPERATIONS["attention"], replace(SHAPE, **LARGER["attention"]), *WHERE)
    assert (32,) in seen


@pytest.mark.parametrize("part", ["judge", "trials"])
def test_a_judge_or_inputs_that_do_not_fit_do_not_count_against_the_implementation(monkeypatch, part):
    operation = OPERATIONS["newton_schulz"]
    judged = [replace(trial, judge=out_of_memory) for trial in operation.trials(SHAPE, *WHERE)]
    trials = out_of_memory if part == "trials" else lambda *_: judged
    with pytest.raises(gate.GateError, match="newton_schulz could not be judged"):
        gate.examine_operation(replace(operation, trials=trials), SHAPE, *WHERE)


def test_the_fastest_is_chosen(monkeypatch):
    choice = examined(monkeypatch, "rms_norm", reference.rms_norm)
    assert choice["impl"] == "triton" and "triton 1.000 ms, reference 2.000 ms" in choice["why"]


@pytest.mark.parametrize(
    ("auto_ms", "auto_is_right", "chosen"), [(1.02, True, "auto"), (1.02, False, "whole"), (1.6, True, "whole")]
)
def test_auto_is_chosen_where_the_fastest_serves_only_some_calls(monkeypatch, auto_ms, auto_is_right, chosen):
    """As flash serves training and refuses the pages of decoding: on an A100 auto takes flash for one, Triton's for the other."""

    def function(x, impl):
        if impl == "partial" and len(x) == 4:
            raise dispatch.KernelRequestError("no so few rows")
        return (1.0 if impl != "auto" or auto_is_right else 2.0) * reference.rms_norm(x)

    [given, *_] = operations()["rms_norm"].trials(SHAPE, *WHERE)
    trials = given, replace(given, inputs=(given.inputs[0].flatten(0, -2)[:4],), timed=False)
    times = {"partial": 1.0, "whole": 1.5, "auto": auto_ms, "reference": 2.0}
    monkeypatch.setattr(gate, "milliseconds", lambda trial, able, _: {name: times[name] for name in able})
    operation = replace(
        operations()["rms_norm"], function=function, trials=lambda *_: trials,
        implementations=dict.fromkeys(("partial", "whole"), Implementation(reference.rms_norm)),
    )  # fmt: skip
    choice = gate.examine_operation(operation, SHAPE, *WHERE)
    assert choice["impl"] == gate.fastest_fused(choice) == chosen
    times["partial"], times["whole"] = 1.5, 1.51  # and the launch table's is preferred
    monkeypatch.setattr(dispatch, "preference", lambda name, device: ("whole", "") if name == operation.name else None)
    choice = gate.examine_operation(replace(operation, trials=lambda *_: trials[:1]), SHAPE, *WHERE)
    assert choice["impl"] == "whole" == choice["preferred"]


@pytest.mark.parametrize(
    ("ms", "chosen"),
    [
        ({"stored": 51.4, "chunks": 52.2, "reference": 66.0}, "chunks"),  # the same within the noise
        ({"stored": 51.4, "chunks": 52.6, "reference": 66.0}, "stored"),
        ({"stored": 51.4, "reference": 66.0}, "stored"),  # the preferred one is wrong here
        ({"stored": 52.0, "chunks": 51.9, "reference": 51.8}, "reference"),
        ({"stored": 51.4, "chunks": 52.2, "auto": 53.0, "reference": 66.0}, "auto"),
    ],
)
def test_the_launch_tables_choice_is_kept_where_another_is_hardly_faster(ms, chosen):
    """It was made by what the model takes, also in memory."""
    assert gate.fastest(ms, "chunks") == chosen
    fused = {name: time for name, time in ms.items() if name != "reference"}
    assert gate.fastest_fused({"ms": ms, "preferred": "chunks"}) == gate.fastest(fused, "chunks")


def test_auto_is_not_judged_where_the_fastest_serves_all_calls(monkeypatch):
    assert examined(monkeypatch, "rms_norm", reference.rms_norm)["ms"].keys() == {"triton", "reference"}


class Doubled(torch.autograd.Function):
    """The identity, with a gradient that is too large by a factor of two."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def changed(function, change):
    """`function` with a change to its results, which gets a tuple of copies and works in place."""

    def run(*inputs):
        results = function(*inputs)
        copies = tuple(x.clone() for x in (results if isinstance(results, tuple) else (results,)))
        change(copies)
        return copies if isinstance(results, tuple) else copies[0]

    return run


def zero(*index):
    """The first result is 0 there."""
    return lambda results: results[0].__setitem__(index, 0.0)


def doubled_weight_gradient(hidden, weight, *rest):
    return reference.linear_cross_entropy(hidden, Doubled.apply(weight), *rest[:5])


def overwritten_buffer(x, w_up, w_down, residual=None, rstd=None, up_gradient=None, down_gradient=None, *_):
    if up_gradient is not None:
        up_gradient.zero_()
    return OPERATIONS["relu2_mlp"].reference(x, w_up, w_down, residual, rstd, up_gradient, down_gradient)


def unweighted_mean(x, weight, targets, softcap, ignore_index, reduction, loss_weight, buffer):
    return OPERATIONS["linear_cross_entropy"].reference(
        x, weight, targets, softcap, ignore_index, reduction, None, buffer
    )


def only_one_matrix(x, *_):
    out = torch.zeros_like(x)
    out[0] = reference.newton_schulz(x[:1].float())[0].to(x.dtype)
    return out


def nan_in_the_second_result(x, update):
    total, y = reference.add_rms_norm(x, update)
    return total, torch.where(torch.arange(y.numel(), device=y.device).view_as(y) == y.numel() - 1, torch.nan, y)


WRONG = {
    "a factor": ("rms_norm", lambda x: 1.02 * reference.rms_norm(x), "error .*, reference .*, budget"),
    "an exception": ("rms_norm", lambda x: 1 / 0, "ZeroDivisionError: division by zero"),
    "results exchanged": ("add_rms_norm", lambda x, u: reference.add_rms_norm(x, u)[::-1], "error"),
    "an update of the wrong sign": ("apply_update", lambda w, u, *_: w.add_(u.float()), "error"),
    "weight gradient doubled": ("linear_cross_entropy", doubled_weight_gradient, "gradient of input 1: .* error"),
    "first rows zero": ("qk_norm_rope", changed(reference.qk_norm_rope, zero(slice(0, 1))), "result 0, rows 0 to"),
    "last row zero": ("rms_norm", changed(reference.rms_norm, zero(-1)), "result 0, rows [1-9].* error"),
    "a row in the middle zero": ("rms_norm", changed(reference.rms_norm, zero(SHAPE.rows * SHAPE.tokens // 2)), "error"),
    "a buffer that is overwritten": ("relu2_mlp", overwritten_buffer, "result 0: .* error"),
    "a loss without its weight": ("linear_cross_entropy", unweighted_mean, "error"),
    "all matrices but one zero": ("newton_schulz", only_one_matrix, "."),
    "NaN in the second result": ("add_rms_norm", nan_in_the_second_result, "result 1, .* NaN in only one"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_not_chosen(monkeypatch, name):
    operation, run, message = WRONG[name]
    choice = examined(monkeypatch, operation, run)
    assert choice["impl"] == "reference" and re.search(message, choice["faults"]["triton"]), choice["faults"]
    assert (
        re.match(r"reference \d\.000 ms; ", choice["why"])
        and f"; triton: {choice['faults']['triton']}" in choice["why"]
    )


# sizes at which a product has a tile of heads, and rstd so many rows that no error is small by luck
LARGER = {
    name: {"tokens": 48, "width": 64}
    for name in ("qkv_projection", "output_projection", "relu2_mlp", "attention", "self_attention")
}


FUSED = [name for name, operation in operations().items() if operation.implementations]


@pytest.mark.parametrize("name", FUSED)
def test_every_operation_is_judged(monkeypatch, name):
    operation = operations()[name]
    if not GPU and name in LARGER:
        monkeypatch.setattr(gate, "CHUNK", 2**15)
    shape = SHAPE if GPU else replace(SHAPE, **LARGER.get(name, {}))
    choice = gate.examine_operation(operation, shape, *WHERE)
    unable = set()
    for trial in operation.trials(shape, *WHERE):
        for name in operation.implementations:
            try:
                operation.function(*trial.inputs, impl=name)
            except dispatch.KernelRequestError:
                unable.add(name)
    assert choice["faults"].keys() == unable <= {"cudnn", "flash", "efficient"}
    judged = {*operation.implementations, "reference"} - unable
    assert judged <= choice["ms"].keys() <= judged | {"auto"}
    assert choice["impl"] in (min(choice["ms"], key=choice["ms"].get), "auto")


@pytest.mark.parametrize("name", FUSED)
def test_strides_of_inputs_do_not_matter(monkeypatch, name):
    """Every input of every operation may be a view, with gaps between its rows or transposed, or is refused.

    test_newton_schulz.py has its own test of that, because those results are not compared with a reference.
    """
    operation = operations()[name]
    monkeypatch.setattr(gate, "CHUNK", 2**20)
    shape = SHAPE if GPU else replace(SHAPE, **LARGER.get(name, {}))
    for trial in operation.trials(shape, *WHERE):
        views = [
            in_layout(x, ("strided", "transposed")[i % 2], i)
            if isinstance(x, torch.Tensor) and x.dim() and i not in trial.in_place
            else x
            for i, x in enumerate(trial.inputs)
        ]
        for impl in operation.implementations if trial.judge is None and trial.judged else ():
            function = partial(operation.function, impl=impl)
            try:
                assert gate.disagreement(replace(trial, inputs=tuple(views)), function, operation.reference) is None, (
                    impl
                )
            except dispatch.KernelRequestError as error:
                if "contiguous" not in str(
                    error
                ):  # else the strides are not the reason: it refuses the inputs themselves
                    with pytest.raises(dispatch.KernelRequestError):
                        gate.disagreement(trial, function, operation.reference)
