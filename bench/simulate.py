"""Predict the step of training on eight A100s from the roofline, with efficiencies that were measured, and say how sure it is.

The time of a micro-step is taken to be
    products / (peak · e₁)  +  attention / its rate  +  bytes of the other passes / (bandwidth · e₂).
e₁ and e₂ are fitted for each variant to the micro-steps that an H100 and an H200 took (bench/results; of the fused variant the H200
alone, in the form that an A100's launch table takes). The two cards have the same peak and different bandwidths, which tells e₁ and
e₂ apart; the plain model is also predicted on each card from the other one alone. For an A100 both are scaled by what is published
about it, within ranges (INPUTS); the optimizer's update and the exchange of gradients are added. Every number in a range is drawn at
random, all variants with the same draw. A draw counts the more, the nearer its plain compiled model is to the published step of eight
A100s (PUBLISHED).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from rich.table import Table

from bench import cost
from bench.memory import MemoryConfig, fitting
from bench.simulation_inputs import (
    BEST_PRODUCT,
    CARDS,
    FLASH,
    INPUTS,
    MOST_OF_BANDWIDTH,
    PUBLISHED,
    TRAFFIC,
    Card,
    Input,
)
from nanochat.gpt import GPTConfig
from nanochat.options.ranges import AtLeast
from nanochat.platform.console import say, show_table
from nanochat.platform.errors import UserError
from nanochat.platform.files import read_shape, write_json

RESULTS = Path(__file__).parent / "results"
VOCABULARY, CONTEXT, STEP_TOKENS = 65_536, 2_048, 524_288
DRAWS, SEED = 40_000, 0
AIM = 580_000  # tokens/s that the project wants to reach


VARIANTS = "plain", "fused"
# the variant in each file that passes over memory as TRAFFIC says: attention apart from its projection, logits stored
MEASURED = {
    "plain": dict.fromkeys(
        ("h100/training_step.json", "h200/training_step.json", "h200/training_step_attention.json"), "compile:reference"
    ),
    "fused": {
        "h200/training_step.json": "graph:auto",
        "h200/training_step_attention.json": "graph:auto,self_attention=parts,linear_cross_entropy=triton",
    },
}
# what would change the fused step on an A100: its traffic, and inputs that are then known
IDEAS: dict[str, tuple[tuple[int, int, int], dict[str, float]]] = {
    "attention's backward pass undoes rotation and norm, at FlashAttention-2's speed": ((24, 4, 8), {}),
    "the head stores no logits, as on sm_90": ((42, 0, 8), {}),
    "the exchange is hidden": (TRAFFIC["fused"], {"open_reduce": 0.0, "open_gather": 0.0}),
    "epilogues cost as little as on Hopper": (TRAFFIC["fused"], {"epilogues": 1.0}),
    "all of these": ((24, 0, 8), {"open_reduce": 0.0, "open_gather": 0.0, "epilogues": 1.0}),
}


@dataclass(frozen=True)
class SimulateConfig:
    """Predict tokens per second and hours of pretraining on A100s, for the plain compiled model and the fused one."""

    depth: Annotated[int, AtLeast(1)] = 20
    """blocks of the model"""
    gpus: Annotated[int, AtLeast(1)] = 8
    """A100s in one machine"""
    measured: Path | None = None
    """file of `python -m bench scaling` with d20 on 1 and more GPUs: adds hours and dollars of the speedrun there and on A100s"""
    price_per_hour: float = 0.0
    """dollars for an hour of the machine that was measured; 0: not known"""
    a100_price_per_hour: float = 0.0
    """dollars for an hour of eight A100s; 0: not known"""
    json: Path | None = None
    """file for the inputs, the comparison with what was measured, and the predictions"""


@dataclass(frozen=True)
class Work:
    """What a micro-step computes and moves on one GPU."""

    products: float  # FLOPs of matrix products
    attention: float  # FLOPs of attention's forward pass; backward has 2.5 times as many
    bytes: float  # of passes beside them


def work(traffic: tuple[int, int, int], model: GPTConfig, rows: int) -> Work:
    """The work of forward and backward for `rows` rows of the model's context. Products: 6 FLOPs a parameter outside the embedding."""
    tokens, block = rows * model.context_length, model.depth * model.width
    of_channel, of_word, of_parameter = traffic
    return Work(
        6.0 * tokens * (model.num_parameters - model.vocab_size * model.width),
        2.0 * tokens * model.context_length * block,  # causal: half of the scores
        float(tokens * (of_channel * block + of_word * model.vocab_size) + of_parameter * model.num_parameters),
    )


@dataclass(frozen=True)
class Efficiency:
    """Fitted parts of the peak and of the bandwidth, and how well they reproduce what was measured."""

    products: float
    memory: float
    deviation: float  # root mean square of model/measured − 1
    largest: float  # of |model/measured − 1|
    rows: list[dict]


def hopper_attention() -> tuple[float, float]:
    """FLOP/s of cuDNN's attention forward and backward at d20, from bench/results/h200/attention.json."""
    found = {}
    for row in json.loads((RESULTS / "h200" / "attention.json").read_text("utf-8"))["rows"]:
        if (row["shape"], row["impl"]) == ("d20", "cudnn"):
            found[row["mode"]] = row["flops"], row["ms"] * 1e-3
    (forward, seconds), (both, both_seconds) = found["fwd"], found["both"]
    return forward / seconds, (both - forward) / (both_seconds - seconds)


def measured(variant: str) -> Iterator[tuple[str, dict]]:
    """(card, row) of each measured micro-step of the variant that is long enough not to wait for the host. Raises UserError for files
    of another form."""
    shape = {"device": str, "rows": [{"variant": str, "depth": int, "rows": int, "tokens": int}]}
    for name, text in MEASURED[variant].items():
        content = read_shape(RESULTS / name, shape)
        card = next((card for card in ("H100", "H200") if card in content["device"]), None)
        if card is None:
            raise UserError(f"{RESULTS / name} is of {content['device']}, wanted an H100 or an H200")
        for row in content["rows"]:
            long = "ms" in row and row["rows"] * row["tokens"] >= 8192 and row["host_ms"] < 0.8 * row["ms"]
            if row["variant"] == text and row["depth"] >= 12 and long:
                yield card, row | {"file": name}


def fit(variant: str, without: str = "") -> Efficiency:
    """The efficiencies with the least squared relative error over all measured micro-steps of both cards.

    without: a card whose micro-steps are left out, and which rows and errors are then of.
    """
    forward, backward = hopper_attention()
    lines, rows = [], []
    for name, row in measured(variant):
        card, model = CARDS[name], GPTConfig.from_depth(row["depth"], VOCABULARY, row["tokens"])
        w, seconds = work(TRAFFIC[variant], model, row["rows"]), row["ms"] * 1e-3
        attention = w.attention / forward + 2.5 * w.attention / backward
        lines.append((w.products / card.peak / seconds, w.bytes / card.bandwidth / seconds, 1 - attention / seconds))
        rows.append({"card": name} | {key: row[key] for key in ("file", "depth", "rows", "tokens", "ms")})
    matrix, judged = np.array(lines), np.array([not without or row["card"] == without for row in rows])
    fitted = matrix[~judged] if without else matrix
    inverse, *_ = np.linalg.lstsq(fitted[:, :2], fitted[:, 2], rcond=None)
    errors = (matrix[:, :2] @ inverse - matrix[:, 2])[judged]
    rows = [row for row, shown in zip(rows, judged, strict=True) if shown]
    for row, error in zip(rows, errors, strict=True):
        row["model_ms"] = row["ms"] * (1 + float(error))
    products, memory = (1 / inverse).tolist()
    return Efficiency(products, memory, float(np.sqrt(np.mean(errors**2))), float(np.abs(errors).max()), rows)


def draw(count: int = DRAWS, inputs: dict[str, Input] = INPUTS) -> dict[str, np.ndarray]:
    """`count` random values of each input, and of the relative error of the model for each variant."""
    generator = np.random.default_rng(SEED)
    drawn = {name: generator.uniform(given.low, given.high, count) for name, given in inputs.items()}
    return drawn | {f"error of {variant}": generator.standard_normal(count) for variant in VARIANTS}


def update_seconds(variant: str, model: GPTConfig) -> float:
    """The optimizer's update of the whole model on one H100: that of d20 as measured, others by the FLOPs of Newton-Schulz."""
    rows = json.loads((RESULTS / "h100" / "optimizer_step.json").read_text("utf-8"))["rows"]
    name = {"plain": "compiled", "fused": "graph"}[variant]
    [row] = [row for row in rows if row["variant"] == name]
    base = GPTConfig.from_depth(row["depth"], VOCABULARY)
    return row["ms"] * 1e-3 * (model.depth * model.width**3) / (base.depth * base.width**3)


def shares(depth: int, gpus: int) -> dict[tuple[str, str], tuple[int, int]]:
    """(micro-batches of a step, their rows) on each GPU, by card and variant, as far as the memory allows (bench/memory.py)."""
    names = {"plain, compiled": "plain", "fused": "fused"}
    found = {}
    for row in fitting(MemoryConfig(depth=(depth,), processes=gpus)):
        if row["variant"] in names and row["step"]:
            micro_steps, rows = row["step"]
            if micro_steps * rows * CONTEXT * gpus != STEP_TOKENS:
                raise UserError(f"{gpus} GPUs cannot share a step of {STEP_TOKENS:,} tokens; give --gpus 1, 2, 4 or 8")
            found[row["card"], names[row["variant"]]] = micro_steps, rows
    if ("A100 80 GB", "fused") not in found:
        raise UserError(f"not a row of a model of depth {depth} fits on {gpus} A100s of 80 GB; give a smaller --depth")
    return found


def step_parts(
    variant: str, model: GPTConfig, card: Card, share: tuple[int, int], gpus: int, efficiency: Efficiency,
    given: dict[str, np.ndarray], traffic: tuple[int, int, int] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Seconds of each part of an optimizer step of 524,288 tokens, for every draw. share: micro-batches on each GPU, and their rows."""
    micro_steps, rows = share
    w = work(traffic or TRAFFIC[variant], model, rows)
    products = efficiency.products * BEST_PRODUCT["A100"] / BEST_PRODUCT["H100"] * given["products"]
    memory = np.minimum(efficiency.memory * given["memory"], MOST_OF_BANDWIDTH) * card.bandwidth
    slower = given["epilogues"] if variant == "fused" else 1.0
    flash = w.attention / FLASH[0] + 2.5 * w.attention / FLASH[1]
    embeddings = 2 * model.vocab_size * model.width
    exchanged = (gpus - 1) / gpus / given["bus"]
    # reduce-scatter of float32 gradients; all-gather of new rows in float32 and of updates in bfloat16
    reduce, gather = 4 * model.num_parameters * exchanged, (2 * model.num_parameters + 2 * embeddings) * exchanged
    # every GPU adds the updates to all weights, copies them and sets the gradient to zero
    everywhere = 16 * model.num_parameters / memory
    error = 1 + efficiency.deviation * given[f"error of {variant}"]
    return {
        "products": micro_steps * error * slower * w.products / (card.peak * products),
        "attention": micro_steps * error * flash / given["attention"],
        "other passes": micro_steps * error * w.bytes / memory,
        "update": given["update"] * update_seconds(variant, model) / gpus + everywhere,
        "exchange": given["open_reduce"] * reduce + given["open_gather"] * gather,
        "waiting": given["rest"],
    }


def total(parts: dict[str, np.ndarray]) -> np.ndarray:
    """Seconds of the whole step, for every draw."""
    return np.sum(np.broadcast_arrays(*parts.values()), axis=0)


def quantiles(values: np.ndarray, weights: np.ndarray) -> list[float]:
    """The 5th, 50th and 95th percentile of weighted values."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    return [float(values[order][np.searchsorted(share, part)]) for part in (0.05, 0.5, 0.95)]


def closeness(tokens_per_second: np.ndarray) -> np.ndarray:
    """How well draws agree with the published step: the density of a normal distribution."""
    wanted = PUBLISHED["tokens_per_second"]
    return np.exp(-0.5 * ((tokens_per_second / wanted - 1) / PUBLISHED["deviation"]) ** 2)


def predict(depth: int, gpus: int, inputs: dict[str, Input] = INPUTS) -> dict:
    """Everything that the command prints: fits, agreement with the published step, predictions and what they depend on."""
    fits, given = {variant: fit(variant) for variant in VARIANTS}, draw(inputs=inputs)

    def parts_of(variant: str, depth: int, card: str, gpus: int, given: dict, traffic=None) -> dict[str, np.ndarray]:
        model = GPTConfig.from_depth(depth, VOCABULARY, CONTEXT)
        share = shares(depth, gpus)[card, variant]
        return step_parts(variant, model, CARDS[card], share, gpus, fits[variant], given, traffic)

    plain = STEP_TOKENS / total(parts_of("plain", 20, "A100 80 GB", 8, given))
    equal, weights = np.ones_like(plain), closeness(plain)
    steps, predictions = 20 * GPTConfig.from_depth(depth, VOCABULARY).num_parameters // STEP_TOKENS, []
    for card, variant in ((card, variant) for card in ("A100 80 GB", "A100 40 GB") for variant in VARIANTS):
        if (card, variant) not in shares(depth, gpus):
            continue
        parts = parts_of(variant, depth, card, gpus, given)
        rates = STEP_TOKENS / total(parts)
        low, middle, high = quantiles(rates, weights)
        predictions.append(
            {
                "card": card, "variant": variant, "gpus": gpus, "depth": depth,
                "micro_batches_and_rows": shares(depth, gpus)[card, variant],
                "tokens_per_second": [low, middle, high],
                "step_ms": [1e3 * STEP_TOKENS / rate for rate in (high, middle, low)],
                "base_hours": [steps * STEP_TOKENS / rate / 3600 for rate in (high, middle, low)],
                "probability_of_aim": float(weights[rates >= AIM].sum() / weights.sum()),
                "parts_ms": {name: 1e3 * float((part * weights).sum() / weights.sum()) for name, part in parts.items()},
            }
        )  # fmt: skip
    middles = {name: np.array([quantiles(values, weights)[1]]) for name, values in given.items()}

    def fused(changes: dict[str, float], traffic=None) -> float:
        known = middles | {name: np.array([value]) for name, value in changes.items()}
        return STEP_TOKENS / float(total(parts_of("fused", depth, "A100 80 GB", gpus, known, traffic))[0])

    depends = {name: [fused({name: end}) for end in (input_.low, input_.high)] for name, input_ in inputs.items()}
    ideas = {"nothing changed": fused({})} | {name: fused(known, traffic) for name, (traffic, known) in IDEAS.items()}
    return {
        "aim_tokens_per_second": AIM,
        "inputs": {name: asdict(input_) for name, input_ in inputs.items()},
        "fits": {variant: asdict(found) for variant, found in fits.items()},
        "largest_error_of_plain_on_a_card_left_out": {card: fit("plain", card).largest for card in ("H100", "H200")},
        "published": PUBLISHED | {
            "predicted_without_it": quantiles(plain, equal), "predicted_with_it": quantiles(plain, weights)
        },
        "predictions": predictions,
        "fused_tokens_per_second_at_ends_of_inputs": depends,
        "fused_tokens_per_second_with_ideas": ideas,
    }  # fmt: skip


def show(found: dict) -> None:
    for variant, fitted in found["fits"].items():
        table = Table("card", "model", "rows × tokens", "measured", "model", "ratio", box=None)
        for row in fitted["rows"]:
            ratio = row["model_ms"] / row["ms"]
            shape = f"{row['rows']} × {row['tokens']}"
            table.add_row(
                row["card"], f"d{row['depth']}", shape, f"{row['ms']:.1f} ms", f"{row['model_ms']:.1f} ms", f"{ratio:.3f}"
            )  # fmt: skip
        say(
            f"{variant}: products at {100 * fitted['products']:.1f} % of the peak, other passes at {100 * fitted['memory']:.1f} % of "
            f"the bandwidth; error {100 * fitted['deviation']:.1f} % (root mean square), at most {100 * fitted['largest']:.1f} %"
        )
        show_table(table)
    for card, error in found["largest_error_of_plain_on_a_card_left_out"].items():
        say(f"plain on the {card}, fitted to the other card alone: at most {100 * error:.1f} % off")
    published = found["published"]
    say(f"published: {published['tokens_per_second']:,.0f} tokens/s ({published['what']})")
    for key, text in (("predicted_without_it", "without"), ("predicted_with_it", "with")):
        low, middle, high = published[key]
        say(f"  the model {text} that number: {middle:,.0f} tokens/s (5 to 95 %: {low:,.0f} to {high:,.0f})")
    table = Table("", "variant", "step", "tokens/s (5 to 95 %)", "hours of steps", f"≥ {AIM:,}", box=None)
    for row in found["predictions"]:
        (low, middle, high), hours = row["tokens_per_second"], row["base_hours"]
        table.add_row(
            f"{row['gpus']} × {row['card']}", row["variant"], f"{row['step_ms'][1]:.0f} ms",
            f"{middle:,.0f} ({low:,.0f} to {high:,.0f})", f"{hours[1]:.2f} ({hours[0]:.2f} to {hours[2]:.2f})",
            f"{100 * row['probability_of_aim']:.0f} %",
        )  # fmt: skip
    show_table(table)
    names = list(found["predictions"][0]["parts_ms"])
    table = Table("ms of a step", "variant", *names, box=None)
    for row in found["predictions"]:
        table.add_row(row["card"], row["variant"], *(f"{row['parts_ms'][name]:.0f}" for name in names))
    show_table(table)
    table = Table("input", "from", "to", "fused tokens/s at its low end", "at its high end", box=None)
    ends = found["fused_tokens_per_second_at_ends_of_inputs"]
    for name, (low, high) in sorted(ends.items(), key=lambda item: -abs(item[1][1] - item[1][0])):
        given = found["inputs"][name]
        table.add_row(name, f"{given['low']:g}", f"{given['high']:g}", f"{low:,.0f}", f"{high:,.0f}")
    show_table(table)
    table = Table("what would change the fused step", "tokens/s, with the middle of every input", box=None)
    for name, rate in found["fused_tokens_per_second_with_ideas"].items():
        table.add_row(name, f"{rate:,.0f}")
    show_table(table)


def simulate(config: SimulateConfig, command: str) -> None:
    rows = cost.measured_rows(config.measured) if config.measured else []
    found = {"command": command, "what": " ".join((__doc__ or "").split())}
    found |= predict(config.depth, config.gpus, INPUTS | (cost.narrowed(rows) if rows else {}))
    show(found)
    if rows:
        simulated = [row for row in found["predictions"] if row["variant"] == "fused"]
        machines = [cost.machine(rows[-1], config.price_per_hour)]
        machines += [cost.simulated(row, config.a100_price_per_hour) for row in simulated]
        found["runs"] = [cost.run_of(one) for one in machines]
        found["assumed"] = {name: asdict(given) for name, given in cost.ASSUMED.items()}
        show_table(cost.show_cost(found["runs"]))
    if config.json:
        write_json(config.json, found)
