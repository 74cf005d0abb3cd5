"""Predict the step of training on eight A100s from the roofline, with efficiencies that were measured, and say how sure it is.

The time of a micro-step is taken to be
    products / (peak · e₁)  +  attention / its rate  +  bytes of the other passes / (bandwidth · e₂).
e₁ and e₂ are fitted for each variant to the micro-steps that an H100 and an H200 took (bench/results; of the fused variant those of
the H200, because the others are older than its present code). The two cards have the same peak and different bandwidths, which tells
e₁ and e₂ apart. For an A100 both are scaled by what is published about it, within ranges
(INPUTS); the optimizer's update and the exchange of gradients are added. Every number in a range is drawn at random, all variants with
the same draw. A draw counts the more, the nearer its plain compiled model is to the published step of eight A100s (PUBLISHED).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from bench.memory import MemoryConfig, fitting
from nanochat.gpt import GPTConfig
from nanochat.platform.console import say, show_table
from nanochat.platform.errors import UserError
from nanochat.platform.files import read_shape, write_json

RESULTS = Path(__file__).parent / "results"
VOCABULARY, CONTEXT, STEP_TOKENS = 65_536, 2_048, 524_288
DRAWS, SEED = 40_000, 0
AIM = 580_000  # tokens/s that the project wants to reach


@dataclass(frozen=True)
class Card:
    """A GPU by its datasheet: dense bf16 FLOP/s, and bytes/s of its memory."""

    peak: float
    bandwidth: float


CARDS = {
    "H100": Card(989e12, 3_350e9),
    "H200": Card(989e12, 4_800e9),
    "A100 80 GB": Card(312e12, 2_039e9),
    "A100 40 GB": Card(312e12, 1_555e9),
}
# bytes of passes that products do not hide: a channel of a token and block, a word of the vocabulary and token, a parameter
TRAFFIC = {
    # norms with residuals 32, rotation and QK-norm 20, relu² and its derivative 40, sums of gradients 4; the loss reads and writes
    # logits; gradients of weights are made in bfloat16 and added in float32
    "plain": (96, 8, 12),
    # second operands of epilogues 20, attention's products of out and its gradient 4, the pass that undoes rotation and norm 18; the
    # loss reads logits and writes their gradient; gradients of weights are added in float32
    "fused": (42, 4, 8),
}
VARIANTS = {"plain": "compile:reference", "fused": "graph:auto"}
# the files that have the present code of a variant; the fused rows of h100/ are older than the fused products
MEASURED = {
    "plain": ("h100/training_step.json", "h200/training_step.json", "h200/training_step_attention.json"),
    "fused": ("h200/training_step.json", "h200/training_step_attention.json"),
}
# what would change the fused step on an A100: its traffic, and inputs that are then known
IDEAS: dict[str, tuple[tuple[int, int, int], dict[str, float]]] = {
    "attention's backward pass undoes rotation and norm, at FlashAttention-2's speed": ((24, 4, 8), {}),
    "the head stores no logits, as on sm_90": ((42, 0, 8), {}),
    "the exchange is hidden": (TRAFFIC["fused"], {"open_reduce": 0.0, "open_gather": 0.0}),
    "epilogues cost as little as on Hopper": (TRAFFIC["fused"], {"epilogues": 1.0}),
    "all of these": ((24, 0, 8), {"open_reduce": 0.0, "open_gather": 0.0, "epilogues": 1.0}),
}
PUBLISHED_STEPS = 529_882, 529_000, 528_029, 528_202, 527_379, 526_671, 525_967  # tokens/s of steps 4 to 10
PUBLISHED = {
    "tokens_per_second": sum(PUBLISHED_STEPS) / len(PUBLISHED_STEPS),
    "deviation": 0.02,  # relative: that code has an optimizer of its own, and the clock falls as the cards get warm
    "what": "d20, plain model compiled, 8 × A100-SXM4, 32 × 2,048 tokens each: 989.4 to 996.8 ms a step",
    "source": "https://github.com/karpathy/nanochat/pull/147",
}


@dataclass(frozen=True)
class Input:
    """A number that is not known exactly: anything from low to high is equally likely."""

    low: float
    high: float
    why: str


INPUTS = {
    "products": Input(
        1.0, 1.27,
        "efficiency of an A100's products in a step, over that of Hopper's times 0.869/0.801, the parts of the peak that their best "
        "products reach (stas00/ml-engineering, compute/accelerator); 1.27 is 0.90 of the peak, as if power limited nothing",
    ),
    "attention": Input(
        0.95, 1.15,
        "rate of FlashAttention-2, over 180 TFLOP/s forward and 141 backward, which an A100 PCIe reached; SXM is faster",
    ),
    "memory": Input(
        1.0, 1.45,
        "efficiency of the other passes, over that on Hopper, where instructions bind them in part; at most 0.9 of the bandwidth",
    ),
    "epilogues": Input(
        0.98, 1.12,
        "time of an A100's products with epilogues over torch's, relative to that on Hopper: sm_80's PTX took 1.07 to 1.20 × CUTLASS's "
        "time (h200/products_sm80_ptx.json) where sm_90's takes 0.99 to 1.14 × (h200/products.json)",
    ),
    "update": Input(
        2.0, 2.92,
        "time of the optimizer's update over an H100's: between the ratio of bandwidths, 1.64, and that of best products, 2.92",
    ),
    "bus": Input(
        200e9, 235e9, "bytes/s of NCCL's collectives on eight A100s with NVLink of 600 GB/s (NVIDIA/nccl-tests, issue 149: 200 GB/s)"
    ),
    "open_reduce": Input(0.3, 1.0, "part of the time of reduce-scatter that nothing hides"),
    "open_gather": Input(0.2, 0.8, "part of the time of all-gather that the orthogonalization does not hide"),
    "rest": Input(0.0, 3e-3, "seconds of a step in which the GPU waits for the host"),
}  # fmt: skip
FLASH = 180e12, 141e12  # FLOP/s forward and backward on an A100 PCIe, causal, heads of 128, 2,048 tokens
BEST_PRODUCT = {"A100": 0.869, "H100": 0.801}  # of the peak
MOST_OF_BANDWIDTH = 0.9


@dataclass(frozen=True)
class SimulateConfig:
    """Predict tokens per second and hours of pretraining on A100s, for the plain compiled model and the fused one."""

    depth: int = 20
    """blocks of the model"""
    gpus: int = 8
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
    for name in MEASURED[variant]:
        content = read_shape(RESULTS / name, shape)
        card = next((card for card in ("H100", "H200") if card in content["device"]), None)
        if card is None:
            raise UserError(f"{RESULTS / name} is of {content['device']}, wanted an H100 or an H200")
        for row in content["rows"]:
            long = "ms" in row and row["rows"] * row["tokens"] >= 8192 and row["host_ms"] < 0.8 * row["ms"]
            if row["variant"] == VARIANTS[variant] and row["depth"] >= 12 and long:
                yield card, row | {"file": name}


def fit(variant: str) -> Efficiency:
    """The efficiencies with the least squared relative error over all measured micro-steps of both cards."""
    forward, backward = hopper_attention()
    lines, rows = [], []
    for name, row in measured(variant):
        card, model = CARDS[name], GPTConfig.from_depth(row["depth"], VOCABULARY, row["tokens"])
        w, seconds = work(TRAFFIC[variant], model, row["rows"]), row["ms"] * 1e-3
        attention = w.attention / forward + 2.5 * w.attention / backward
        lines.append((w.products / card.peak / seconds, w.bytes / card.bandwidth / seconds, 1 - attention / seconds))
        rows.append({"card": name} | {key: row[key] for key in ("file", "depth", "rows", "tokens", "ms")})
    matrix = np.array(lines)
    inverse, *_ = np.linalg.lstsq(matrix[:, :2], matrix[:, 2], rcond=None)
    errors = matrix[:, :2] @ inverse - matrix[:, 2]
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
    from bench import cost  # which takes Input from here

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
