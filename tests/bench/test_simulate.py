"""python -m bench simulate: units, monotonicity, and agreement with what was measured and published."""

import json

import numpy as np
import pytest

from bench.__main__ import main
from bench.simulate import (
    BEST_PRODUCT,
    CARDS,
    CONTEXT,
    INPUTS,
    PUBLISHED,
    RESULTS,
    STEP_TOKENS,
    TRAFFIC,
    VARIANTS,
    VOCABULARY,
    Card,
    Efficiency,
    draw,
    fit,
    hopper_attention,
    quantiles,
    shares,
    step_parts,
    total,
    update_seconds,
    work,
)
from nanochat.gpt import GPTConfig
from nanochat.platform.errors import UserError

D20 = GPTConfig.from_depth(20, VOCABULARY, CONTEXT)
FITS = {variant: fit(variant) for variant in VARIANTS}
EIGHT = CARDS["A100 80 GB"], (1, 32), 8


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulate") / "a100.json"
    main(["simulate", "--json", str(path)])
    return json.loads(path.read_text())


def seconds(
    variant: str = "fused", card: Card = EIGHT[0], share=EIGHT[1], gpus: int = 8, model=D20, **known: float
) -> float:
    """A step with the middle of every input."""
    given = {name: np.array([(input_.low + input_.high) / 2]) for name, input_ in INPUTS.items()}
    given |= {f"error of {variant}": np.zeros(1)} | {name: np.array([value]) for name, value in known.items()}
    return float(total(step_parts(variant, model, card, share, gpus, FITS[variant], given))[0])


def test_work_is_in_flops_and_bytes():
    """The products are those of the count that the MFU is computed from, and attention's causal scores a third of it."""
    w = work(TRAFFIC["fused"], D20, 1)
    full_attention = 12 * D20.depth * D20.width * CONTEXT  # of a token, forward and backward, with all scores
    assert (w.products / CONTEXT + full_attention) == pytest.approx(D20.flops_per_token)
    assert 3.5 * w.attention / CONTEXT == pytest.approx(full_attention * 7 / 12)
    two = work(TRAFFIC["fused"], D20, 2)
    assert (two.products, two.attention) == (2 * w.products, 2 * w.attention)
    assert two.bytes - w.bytes == CONTEXT * (42 * 20 * 1280 + 4 * VOCABULARY)


def test_the_attention_of_hopper_is_that_of_the_bench():
    forward, backward = hopper_attention()
    assert 500e12 < forward < 600e12 and 400e12 < backward < 480e12


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_reproduces_what_h100_and_h200_measured(variant):
    found = FITS[variant]
    assert len(found.rows) >= 10 and {row["card"] for row in found.rows} == (
        {"H100", "H200"} if variant == "plain" else {"H200"}
    )
    assert 0.5 < found.products < 0.8 and 0.3 < found.memory < 0.9
    assert found.deviation < 0.02 and found.largest < 0.035
    for row in found.rows:
        assert row["model_ms"] == pytest.approx(row["ms"], rel=found.largest + 1e-9)


@pytest.mark.parametrize(("card", "other", "largest"), [("H100", "H200", 0.04), ("H200", "H100", 0.02)])
def test_a_card_that_was_left_out_is_predicted_from_the_other(found, card, other, largest):
    """The plain model, of which both cards have rows: the fit to one card predicts those of the other."""
    left_out, forward, backward = fit("plain", card), *hopper_attention()
    assert {row["card"] for row in left_out.rows} == {card} and left_out.largest < largest
    assert found["largest_error_of_plain_on_a_card_left_out"][card] == left_out.largest
    assert left_out.products != FITS["plain"].products
    assert len(left_out.rows) + len(fit("plain", other).rows) == len(FITS["plain"].rows)
    for row in left_out.rows:
        w = work(TRAFFIC["plain"], GPTConfig.from_depth(row["depth"], VOCABULARY, row["tokens"]), row["rows"])
        seconds = w.products / (CARDS[card].peak * left_out.products) + w.bytes / (
            CARDS[card].bandwidth * left_out.memory
        )
        seconds += w.attention / forward + 2.5 * w.attention / backward
        assert row["model_ms"] == pytest.approx(1e3 * seconds)
        assert abs(row["model_ms"] / row["ms"] - 1) <= left_out.largest + 1e-9


def test_more_of_anything_that_is_good_makes_a_step_shorter():
    base = seconds()
    for name in ("products", "attention", "memory", "bus"):
        assert seconds(**{name: INPUTS[name].high}) < base < seconds(**{name: INPUTS[name].low})
    for name in ("epilogues", "update", "open_reduce", "open_gather", "rest"):
        assert seconds(**{name: INPUTS[name].low}) < base < seconds(**{name: INPUTS[name].high})
    assert seconds(card=CARDS["A100 40 GB"]) > base > seconds(card=Card(400e12, 3_000e9))
    assert seconds(gpus=4, share=(2, 32)) > 1.9 * base and seconds(share=(2, 16)) > base
    assert seconds(model=GPTConfig.from_depth(26, VOCABULARY, CONTEXT)) > 1.5 * base


def test_one_gpu_exchanges_nothing():
    given = draw(10)
    alone = step_parts("fused", D20, EIGHT[0], (8, 32), 1, FITS["fused"], given)
    assert not alone["exchange"].any() and all((part >= 0).all() for part in alone.values())
    assert update_seconds("fused", D20) < update_seconds("plain", D20)


def test_no_part_is_faster_than_the_datasheet_allows():
    given = draw(1000)
    for variant in VARIANTS:
        w, parts = work(TRAFFIC[variant], D20, 32), step_parts(variant, D20, *EIGHT, FITS[variant], given)
        limit = 1 - 5 * FITS[variant].deviation
        assert (parts["products"] > limit * w.products / 312e12).all() and (
            parts["other passes"] > limit * w.bytes / 2039e9
        ).all()
    best = FITS["plain"].products * BEST_PRODUCT["A100"] / BEST_PRODUCT["H100"] * INPUTS["products"].high
    assert best < 0.91  # of the peak


def test_weighted_percentiles():
    values = np.arange(100.0)
    assert quantiles(values, np.ones(100)) == [4.0, 49.0, 94.0]
    assert quantiles(values, (values < 10).astype(float)) == [0.0, 4.0, 9.0]


def test_shares_are_those_that_fit_into_the_memory():
    assert shares(20, 8)["A100 80 GB", "fused"] == (1, 32) and shares(20, 8)["A100 40 GB", "fused"] == (2, 16)
    for micro_steps, rows in shares(26, 4).values():
        assert micro_steps * rows * CONTEXT * 4 == STEP_TOKENS
    with pytest.raises(UserError, match="3 GPUs cannot share .* give --gpus 1, 2, 4 or 8"):
        shares(20, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["simulate", "--depth", "80"],
            "not a row of a model of depth 80 fits on 8 A100s of 80 GB; give a smaller --depth",
        ),
        (["simulate", "--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["memory", "--processes", "0"], "--processes must be at least 1, got 0"),
        (["memory", "--depth", "12", "0"], "--depth must be at least 1, got 0"),
        (["gradients", "--device", "cpu", "--rows", "0"], "--rows must be at least 1, got 0"),
        (["gradients", "--device", "cpu", "--micro-steps", "0"], "--micro-steps must be at least 1, got 0"),
    ],
)
def test_what_is_out_of_range_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_the_published_step_is_within_the_stated_interval(found):
    low, _, high = found["published"]["predicted_without_it"]
    assert low < PUBLISHED["tokens_per_second"] < high
    narrow = found["published"]["predicted_with_it"]
    assert narrow[0] < PUBLISHED["tokens_per_second"] < narrow[2] and narrow[2] - narrow[0] < high - low


def test_predictions_are_consistent(found):
    rows = {(row["card"], row["variant"]): row for row in found["predictions"]}
    assert len(rows) == 4
    for row in rows.values():
        low, middle, high = row["tokens_per_second"]
        assert low < middle < high and row["step_ms"][1] == pytest.approx(1e3 * STEP_TOKENS / middle)
        tokens = 21_400 * STEP_TOKENS  # of the original run
        assert row["base_hours"][1] == pytest.approx(tokens / middle / 3600, rel=1e-3)
        assert sum(row["parts_ms"].values()) == pytest.approx(row["step_ms"][1], rel=0.01)
        assert 0 <= row["probability_of_aim"] <= 1
    for card in ("A100 80 GB", "A100 40 GB"):
        fused, plain = (rows[card, variant]["tokens_per_second"][1] for variant in ("fused", "plain"))
        assert fused > plain
    ideas = found["fused_tokens_per_second_with_ideas"]
    assert ideas["all of these"] == max(ideas.values()) and ideas["nothing changed"] == min(ideas.values())
    assert set(found["inputs"]) == set(INPUTS) and all(given["why"] for given in found["inputs"].values())


def test_the_committed_prediction_is_what_the_command_computes(found):
    committed = json.loads((RESULTS / "simulation" / "a100x8_d20.json").read_text())
    for row, again in zip(committed["predictions"], found["predictions"], strict=True):
        assert row["tokens_per_second"] == pytest.approx(again["tokens_per_second"], rel=1e-6)
    assert committed["what"] == found["what"]


def test_a_fit_of_made_up_cards_gives_their_efficiencies_back(monkeypatch):
    """Rows that are computed from known efficiencies, without an error."""
    forward, backward = hopper_attention()

    def made_up(variant):
        for card in ("H100", "H200"):
            for depth in (12, 20, 26):
                w = work(TRAFFIC[variant], GPTConfig.from_depth(depth, VOCABULARY, CONTEXT), 8)
                time = w.products / (CARDS[card].peak * 0.7) + w.bytes / (CARDS[card].bandwidth * 0.5)
                time += w.attention / forward + 2.5 * w.attention / backward
                yield card, {"file": "made up", "depth": depth, "rows": 8, "tokens": CONTEXT, "ms": 1e3 * time}

    monkeypatch.setattr("bench.simulate.measured", made_up)
    again: Efficiency = fit("plain")
    assert again.products == pytest.approx(0.7) and again.memory == pytest.approx(0.5) and again.largest < 1e-9
