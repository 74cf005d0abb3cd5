"""The next token of each row of logits, drawn from the most likely ones or from all, and log-probabilities: two launches.

The first one reads the logits and stores, for each group of GROUP tokens, its largest logit and Σ exp(logit − largest). The most
likely tokens are in the groups with the largest of these, as many groups as tokens are wanted: every token of another group is less
likely than one token in each of these. So the second launch ranks the groups, and then the tokens of the best ones.

The score of a token is (logit − largest logit)/temperature + Gumbel noise, and the largest score is chosen. Numbers are compared as
integers that order them, followed by the token, so that no two are equal; sums are of integers. Therefore results depend neither on
launch parameters nor on other rows. Gumbel 1954; Maddison et al. 2014; Wellons 2018 (the random numbers).

Notation: R rows, V vocabulary.
"""

from functools import partial

import torch
from torch import Tensor

from nanochat_kernels import reference
from nanochat_kernels.checks import check_device, check_integers, check_shape
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.dispatch import choose
from nanochat_kernels.operation import DECODED_ROWS, VOCABULARY, Benchmark, Implementation, Kernel, Operation, Trial
from nanochat_kernels.triton_helpers import (
    cdiv,
    launch,
    needs_gradient,
    power_of_2,
    tl,
    triton,
    triton_unsupported_reason,
)

GROUP = 32  # tokens: near √(V/candidates), which makes both rankings of the second launch equally long
MOST_CANDIDATES, LARGEST_VOCABULARY = 256, 2**17  # beyond, a ranking takes more registers than a program has


@triton.jit
def ordered(x, mask):
    """Integers in the order of float32 numbers, of which NaN is the largest, and a smaller one where mask is false."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # −0 becomes 0
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return tl.where(mask, tl.where(x == x, bits, 0x7FFFFFFF), -(2**31))


@triton.jit
def number(order):
    """The float32 number of an integer that `ordered` returns."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def packed(order, index):
    """Integers that compare by `order` and then, the smaller one first, by index."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - index)


@triton.jit
def index_of(key):
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def order_of(key):
    return (key >> 32).to(tl.int32)


@triton.jit
def largest_parts(x_ptr, size, spans, SPAN: tl.constexpr, PART: tl.constexpr, COUNT: tl.constexpr):
    """The keys of the COUNT parts of PART numbers with the largest numbers, of those that some spans of SPAN numbers consist of.

    They are in descending order. If there are fewer parts, all are returned, in any order.
    """
    ALL: tl.constexpr = spans.shape[0] * SPAN // PART
    index = spans[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    order = ordered(tl.load(x_ptr + index, mask=index < size, other=0.0), index < size)
    if PART > 1:
        order = tl.max(tl.reshape(order, [spans.shape[0], SPAN // PART, PART]), 2)
    keys = packed(order, spans[:, None] * (SPAN // PART) + tl.arange(0, SPAN // PART)[None, :])
    keys = tl.reshape(keys, [ALL])
    if COUNT == 1:
        keys = tl.max(keys, 0, keep_dims=True)
    elif ALL >= COUNT:
        keys = tl.topk(keys, COUNT)
    return keys


@triton.jit
def largest(x_ptr, size, spans, SPAN: tl.constexpr, COUNT: tl.constexpr):
    """The keys of the COUNT largest numbers in some spans of SPAN numbers, as largest_parts returns them."""
    PART: tl.constexpr = 8  # of 2048 numbers, 256 parts and 512 numbers are sorted for the largest 64
    if COUNT > 1 and spans.shape[0] * SPAN > COUNT * PART:
        spans = index_of(largest_parts(x_ptr, size, spans, SPAN, PART, COUNT))
        keys = largest_parts(x_ptr, size, spans, PART, 1, COUNT)
    else:
        keys = largest_parts(x_ptr, size, spans, SPAN, 1, COUNT)
    return keys


@triton.jit
def finite_or_0(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def share(x, base):
    """exp(x − base), 0 where x is NaN or exceeds base."""
    return tl.where(x <= base, tl.exp(x - base), 0.0)


@triton.jit
def mixed(x):
    """A pseudorandom number for each uint32 number: lowbias32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_random(keys_ptr, keys_stride, key_stride, steps_ptr, steps_stride, row):
    """The uint32 number that the random numbers of a row's tokens are made from."""
    first = tl.load(keys_ptr + row * keys_stride).to(tl.uint32)
    second = tl.load(keys_ptr + row * keys_stride + key_stride).to(tl.uint32)
    return mixed(mixed(mixed(first) ^ second) ^ tl.load(steps_ptr + row * steps_stride).to(tl.uint32))


@triton.jit
def scores(x, base, temperature, random, token):
    """(x − base)/temperature − ln(−ln u) with a random u in (0, 1) of each token."""
    u = ((mixed(mixed(token.to(tl.uint32)) ^ random) >> 9).to(tl.float32) + 0.5) * 2.0**-23
    return tl.div_rn(x - base, temperature) - tl.log(-tl.log(u))


@triton.jit
def token_groups_kernel(
    logits_ptr, logits_stride, keys_ptr, keys_stride, key_stride, steps_ptr, steps_stride, temperature_ptr, temperature_stride,
    maxima_ptr, sums_ptr, best_ptr, vocabulary, groups,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, ANY_ALL: tl.constexpr,
):  # fmt: skip
    """The largest logit and the sum of exponentials of each of GROUPS groups of a row; with ANY_ALL also its best token by score."""
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = token < vocabulary
    x = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=-float("inf"))
    order = tl.max(ordered(x, inside), 1)
    base = finite_or_0(number(order))[:, None]
    total = tl.sum((share(x, base) * 2.0**25 + 0.5).to(tl.int32), 1)  # at most 2³⁰
    tl.store(maxima_ptr + row * groups + group, number(order), mask=group < groups)
    tl.store(sums_ptr + row * groups + group, total, mask=group < groups)
    if ANY_ALL:
        random = row_random(keys_ptr, keys_stride, key_stride, steps_ptr, steps_stride, row)
        temperature = tl.load(temperature_ptr + row * temperature_stride)
        key = packed(ordered(scores(x, base, temperature, random, token), inside), token)
        tl.store(best_ptr + row * groups + group, tl.max(key, 1), mask=group < groups)


@triton.jit(do_not_specialize=["candidates", "alternatives"])
def token_choice_kernel(
    logits_ptr, logits_stride, keys_ptr, keys_stride, key_stride, steps_ptr, steps_stride, temperature_ptr, temperature_stride,
    top_k_ptr, top_k_stride, maxima_ptr, sums_ptr, best_ptr, tokens_ptr, logprobs_ptr, vocabulary, groups, candidates, alternatives,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, CANDIDATES: tl.constexpr, ANY_ALL: tl.constexpr,
):  # fmt: skip
    """The choice of one row, its most likely tokens, and their log-probabilities."""
    row = tl.program_id(0).to(tl.int64)
    random = row_random(keys_ptr, keys_stride, key_stride, steps_ptr, steps_stride, row)
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    top_k = tl.load(top_k_ptr + row * top_k_stride)
    logits_ptr += row * logits_stride
    maxima_ptr += row * groups
    group = tl.arange(0, GROUPS)
    maxima = tl.load(maxima_ptr + group, mask=group < groups, other=-float("inf"))
    sums = tl.load(sums_ptr + row * groups + group, mask=group < groups, other=0)
    highest = number(tl.max(ordered(maxima, group < groups), 0))
    # sums of at most 1, times 2²⁵, become integers times 2⁴⁰
    total = tl.sum((sums.to(tl.float32) * share(maxima, finite_or_0(highest)) * 2.0**15).to(tl.int64), 0)
    lse = tl.where(tl.abs(highest) < float("inf"), highest + tl.log(total.to(tl.float32) * 2.0**-40), highest)

    keys = largest(maxima_ptr, groups, tl.zeros([1], tl.int64), GROUPS, CANDIDATES)
    keys = largest(logits_ptr, vocabulary, index_of(keys), GROUP, CANDIDATES)
    value, ranked = number(order_of(keys)), index_of(keys)
    rank = tl.arange(0, CANDIDATES)
    drawn = (rank < top_k) & (rank < candidates)
    choice = index_of(tl.max(packed(ordered(scores(value, highest, temperature, random, ranked), drawn), rank), 0))
    chosen = tl.sum(tl.where(rank == choice, ranked, 0), 0)
    if ANY_ALL:
        key = tl.load(best_ptr + row * groups + group, mask=group < groups, other=0)
        score = number(order_of(key)) + tl.div_rn(maxima - highest, temperature)
        key = tl.max(packed(ordered(score, group < groups), index_of(key)), 0)
        chosen = tl.where((top_k == 0) & (highest == highest), index_of(key), chosen)
    first = row * (alternatives + 1)
    tl.store(tokens_ptr + first, chosen)
    tl.store(logprobs_ptr + first, tl.load(logits_ptr + chosen) - lse)
    tl.store(tokens_ptr + first + 1 + rank, ranked, mask=rank < alternatives)
    tl.store(logprobs_ptr + first + 1 + rank, value - lse, mask=rank < alternatives)


def with_strides(*tensors: Tensor) -> list:
    """Return the arguments of a kernel for each tensor: it, and its strides."""
    return [argument for x in tensors for argument in (x, *x.stride())]


def launch_groups(
    logits: Tensor, keys: Tensor, steps: Tensor, temperature: Tensor, any_all: bool, parameters: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return the largest logit of each group, the sums, and with any_all the best tokens with their scores."""
    rows, vocabulary = logits.shape
    groups = cdiv(vocabulary, GROUP)
    parameters = dict(
        parameters or launch_parameters("sample_tokens_groups", logits.device, logits.dtype, (rows, vocabulary))
    )
    maxima = torch.empty(rows, groups, dtype=torch.float32, device=logits.device)
    sums = torch.empty(rows, groups, dtype=torch.int32, device=logits.device)
    best = torch.empty(rows, groups, dtype=torch.int64, device=logits.device) if any_all else None
    launch(
        token_groups_kernel, (cdiv(groups, parameters["GROUPS"]), rows), logits.device,
        logits, logits.stride(0), *with_strides(keys, steps, temperature), maxima, sums, best, vocabulary, groups,
        GROUP=GROUP, ANY_ALL=any_all, **parameters,
    )  # fmt: skip
    return maxima, sums, best


def launch_choice(
    logits: Tensor, keys: Tensor, steps: Tensor, top_k: Tensor, temperature: Tensor, candidates: int, alternatives: int,
    maxima: Tensor, sums: Tensor, best: Tensor | None, parameters: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (rows, vocabulary), groups = logits.shape, maxima.size(1)
    parameters = dict(
        parameters or launch_parameters("sample_tokens_choice", logits.device, logits.dtype, (vocabulary, candidates))
    )
    tokens = torch.empty(rows, 1 + alternatives, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, 1 + alternatives, dtype=torch.float32, device=logits.device)
    launch(
        token_choice_kernel, (rows,), logits.device,
        logits, logits.stride(0), *with_strides(keys, steps, temperature, top_k), maxima, sums, best, tokens, logprobs,
        vocabulary, groups, candidates, alternatives,
        GROUPS=power_of_2(groups), GROUP=GROUP, CANDIDATES=power_of_2(candidates), ANY_ALL=best is not None, **parameters,
    )  # fmt: skip
    return tokens, logprobs


def run(
    logits: Tensor, keys: Tensor, steps: Tensor, top_k: Tensor, temperature: Tensor, candidates: int, any_all: bool, alternatives: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not len(logits):
        return logits.new_empty(0, 1 + alternatives, dtype=torch.int64), logits.new_empty(0, 1 + alternatives)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    of_groups = launch_groups(logits, keys, steps, temperature, any_all)
    return launch_choice(logits, keys, steps, top_k, temperature, candidates, alternatives, *of_groups)


def unsupported_reason(
    logits: Tensor, keys: Tensor, steps: Tensor, top_k: Tensor, temperature: Tensor, candidates: int, *_
) -> str | None:
    if needs_gradient(logits, temperature):
        return "it computes no gradient; call it under torch.no_grad()"
    if candidates > MOST_CANDIDATES:
        return f"it ranks at most {MOST_CANDIDATES} candidates, got {candidates}"
    if logits.size(1) > LARGEST_VOCABULARY:
        return f"it takes a vocabulary of at most {LARGEST_VOCABULARY:,} tokens, got {logits.size(1):,}"
    if len(logits) > 65_535:
        return f"{len(logits):,} rows exceed the 65,535 of one launch; split them"
    return triton_unsupported_reason(logits)


def sample_tokens(
    logits: Tensor, keys: Tensor, steps: Tensor, top_k: Tensor, temperature: Tensor, candidates: int, any_all: bool = False,
    alternatives: int = 0, *, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (R, 1 + alternatives) the next token of each row, followed by its most likely ones, best first; and the natural
    logarithms of their probabilities at temperature 1, float32.

    logits (R, V) float32. keys (R, 2) int64 and steps (R,) integers, all below 2³²: what the random numbers are made from. top_k
    (R,) integers: each row draws among as many of its most likely tokens; 1 takes the most likely one, 0 draws among all.
    temperature (R,) float32, positive. candidates: the largest top_k or more, and no fewer than alternatives; any_all: a row has
    top_k 0.
    Of equal logits the smaller token comes first, and NaN before all numbers; a row with NaN or +inf takes its first token in that
    order.
    The values of tensors are not checked: with a top_k above candidates a token is drawn from the candidates, and negative steps
    give other noise in one implementation than in the other.
    A row's results depend neither on other rows nor on candidates and any_all. The noise of both implementations may differ by
    rounding, and with it, rarely, the choice.
    Raises ValueError for mismatched shapes or devices, or counts out of range, TypeError for wrong dtypes, and KernelRequestError
    (a ValueError) if the implementation named by impl does not support the call.
    """
    check_shape("sample_tokens", "logits", logits, "R", "V")
    rows, vocabulary = logits.shape
    check_shape("sample_tokens", "keys", keys, rows, 2)
    check_shape("sample_tokens", "temperature", temperature, rows)
    check_device("sample_tokens", logits=logits, keys=keys, temperature=temperature)
    dtypes = {"logits": torch.float32, "keys": torch.int64, "temperature": torch.float32}
    for (name, dtype), x in zip(dtypes.items(), (logits, keys, temperature), strict=True):
        if x.dtype != dtype:
            raise TypeError(f"sample_tokens: {name} must be {dtype}, got {x.dtype}")
    check_integers("sample_tokens", logits, "steps", steps, rows)
    check_integers("sample_tokens", logits, "top_k", top_k, rows)
    if not 1 <= candidates <= vocabulary:
        raise ValueError(f"sample_tokens: candidates must be 1 to {vocabulary}, the vocabulary, got {candidates}")
    if not 0 <= alternatives <= candidates:
        raise ValueError(f"sample_tokens: alternatives must be 0 to {candidates}, the candidates, got {alternatives}")
    arguments = logits, keys, steps, top_k, temperature, candidates, any_all, alternatives
    return choose(SAMPLE_TOKENS, impl, *arguments)(*arguments)


def inputs(
    rows: int, vocabulary: int, device: torch.device, candidates: int = 64, any_all: bool = False, alternatives: int = 20
) -> tuple:  # fmt: skip
    """Return random logits, and the rest as columns of one tensor, as the engine gives it."""
    candidates = min(candidates, vocabulary)
    logits = torch.empty(rows, vocabulary, device=device).normal_(std=3.0)
    given = torch.zeros(rows, 9, dtype=torch.int64, device=device)
    given[:, 0], given[:, 1:3] = torch.arange(rows, device=device), torch.randint(2**32, (rows, 2), device=device)
    given[:, 3] = torch.arange(rows, device=device) % candidates + (0 if any_all else 1)
    temperature = given[:, 4:5].view(torch.float32)[:, 0].fill_(0.8)
    counts = candidates, any_all, min(alternatives, candidates)
    return logits, given[:, 1:3], given[:, 0], given[:, 3], temperature, *counts


def launches_of_groups(key, dtype: torch.dtype, device: torch.device):
    logits, keys, steps, _, temperature, *_ = inputs(*key, device)
    return {
        name: partial(launch_groups, logits, keys, steps, temperature, any_all)
        for name, any_all in (("top-k", False), ("whole vocabulary", True))
    }


def launches_of_choice(key, dtype: torch.dtype, device: torch.device):
    logits, keys, steps, top_k, temperature, candidates, _, alternatives = inputs(16, key[0], device, key[1])
    given = logits, keys, steps, top_k, temperature, candidates, alternatives
    return {
        name: partial(launch_choice, *given, *launch_groups(logits, keys, steps, temperature, any_all))
        for name, any_all in (("top-k", False), ("whole vocabulary", True))
    }


KERNELS = (
    Kernel(
        "sample_tokens_groups", (torch.float32,), ((1, VOCABULARY), (64, VOCABULARY)),
        tuple({"GROUPS": groups, "num_warps": warps} for groups in (16, 32, 64, 128) for warps in (2, 4, 8)),
        launches_of_groups, ((3, 1001), (2, LARGEST_VOCABULARY)),
    ),
    Kernel(
        "sample_tokens_choice", (torch.float32,), tuple((VOCABULARY, candidates) for candidates in (1, 64, MOST_CANDIDATES)),
        tuple({"num_warps": warps} for warps in (4, 8, 16)), launches_of_choice,
        ((VOCABULARY, 128), (1001, 40), (LARGEST_VOCABULARY, MOST_CANDIDATES)),
    ),
)  # fmt: skip


def judge(given: tuple, results: tuple[Tensor, ...]) -> str | None:
    """Say what is wrong with results, or None. A choice may differ where the scores of both tokens are equal but for rounding.

    The largest logit of each row must be finite.
    """
    logits, keys, steps, top_k, temperature, candidates, *_ = given
    tokens, logprobs = results
    wanted, _ = reference.sample_tokens(*given)
    ranked, _ = reference.sample_tokens(*given[:-1], candidates)
    exact, both = logits.double(), torch.stack([tokens[:, 0], wanted[:, 0]], 1)
    highest = exact.amax(1, keepdim=True)
    score = (exact.gather(1, both) - highest) / temperature[:, None] + reference.gumbel_noise(keys, steps, both)
    likely = score[:, 0] >= score[:, 1] - 1e-5 * (1 + score[:, 1].abs())
    rank = torch.arange(1, 1 + candidates, device=logits.device)
    allowed = ((ranked[:, 1:] == tokens[:, :1]) & (rank <= top_k[:, None].clamp(min=1))).any(1) | (top_k == 0)
    true = exact.gather(1, tokens) - exact.logsumexp(1, keepdim=True)
    near = (logprobs - true).abs() <= 1e-6 * (4 + highest.abs() + true.abs().nan_to_num(posinf=0.0))
    wrong = {
        "ranked tokens": (tokens[:, 1:] != wanted[:, 1:]).any(1),
        "chosen token": ~(likely & allowed),
        "log-probabilities": ~(near | (logprobs == true)).all(1),
    }
    for name, rows in wrong.items():
        for row in rows.nonzero().flatten().tolist()[:1]:
            found = f"{tokens[row, :8].tolist()} with {logprobs[row, :8].tolist()}"
            return f"{name} of row {row}: {found}, wanted {wanted[row, :8].tolist()} with {true[row, :8].tolist()}"
    return None


def trials(shape, device: torch.device, dtype: torch.dtype):
    for any_all in (False, True):
        given = inputs(DECODED_ROWS, shape.vocab, device, any_all=any_all)
        yield Trial(given, judge=partial(judge, given))


SAMPLE_TOKENS = Operation(
    "sample_tokens", sample_tokens, reference.sample_tokens, {"triton": Implementation(run, unsupported_reason)}, KERNELS, trials,
    Benchmark(
        ("1", "64"), lambda shape, dtype, device: inputs(int(shape), VOCABULARY, device),
        # in elements of 2 bytes
        (), lambda arguments, part: 2 * arguments[0].numel(), lambda arguments, part, variant: 0, modes=("fwd",),
    ),
)  # fmt: skip
OPERATIONS = (SAMPLE_TOKENS,)
