"""Every epilogue of the matrix products with NaN, infinities and numbers near the limits, by each kernel that has it.

What a product in torch and a pass over it give is what the kernels must give, also that of sm_90, which no interpreter runs. That the
pass is right is tested with each operation.
"""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanochat_kernels import oracle, product_configurations
from nanochat_kernels.linear import scaled_rows
from tests.kernels.harness import DEVICE, GPU, SM90, poisoned, randn

FOLDED = importlib.import_module("nanochat_kernels.folded_norm")
HEAD = importlib.import_module("nanochat_kernels.fused_cross_entropy")
MLP = importlib.import_module("nanochat_kernels.relu2_mlp")
QKV = importlib.import_module("nanochat_kernels.qkv_projection")
SPACE, BY_TORCH = product_configurations.SPACE, product_configurations.BY_TORCH
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
INTERPRETED = product_configurations.configuration(64, 128, 32, 64, 0, 0, 4, 1)
KERNELS = [p for p in SPACE if "TORCH" not in p and ("STAGES" not in p or SM90)] if GPU else [INTERPRETED]
ROWS, WIDTH, WIDE = 300, 72, 384  # x (ROWS, WIDTH), results (ROWS, WIDE): six heads of 64
CAP = 15.0


def special(x: Tensor, first: int) -> Tensor:
    """Put NaN, infinities and numbers near the limits into one row each, from row `first` on."""
    x[first, 3], x[first + 1, 4], x[first + 2, 5], x[first + 3] = torch.nan, torch.inf, -torch.inf, 0.0
    x[first + 4] *= 1e-15
    x[first + 5] *= 1e15
    return x


def factors(first: int) -> Tensor:
    found = randn(ROWS, dtype=torch.float32, seed=7).abs() + 0.5
    found[first : first + 4] = torch.tensor([torch.nan, torch.inf, 0.0, 1e-20])
    return found


def matrices() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, a weight (WIDE, WIDTH) with NaN and an infinity in a row each, and two matrices of the result's shape."""
    x, first, second = (
        special(randn(ROWS, n, dtype=torch.bfloat16, seed=n + at), at)
        for n, at in ((WIDTH, 10), (WIDE, 100), (WIDE, 200))
    )
    weight = randn(WIDE, WIDTH, dtype=torch.bfloat16, seed=1) / WIDTH**0.5
    weight[WIDE - 64, 0], weight[65, 1] = torch.nan, torch.inf
    return x, weight, first, second


def rows_scaled(parameters):
    x, weight, *_ = matrices()
    return (scaled_rows("any", x, weight, factors(40), y_transposed=True, parameters=parameters),)


def residual(parameters):
    x, weight, first, _ = matrices()
    weight[[WIDE - 64, 65]] = 0.0  # otherwise no row has a finite rstd
    return FOLDED.add_residual("any", x, weight, first, parameters)


def norm_backward(parameters):
    dz, weight, x, dy = matrices()
    weight = weight.t().contiguous()
    return (FOLDED.input_gradient("any", dz, weight, x, factors(40), dy, parameters),)


def relu2(parameters):
    x, weight, *_ = matrices()
    return (MLP.up(x, weight, factors(40), parameters),)


def relu2_backward(parameters):
    dy, weight, h, _ = matrices()
    weight[[WIDE - 64, 65]] = 0.0
    return MLP.hidden_gradient(dy, weight.t().contiguous(), h.abs(), factors(40), parameters)


def heads(parameters):
    x, weight, *_ = matrices()
    cos, sin = QKV.tables(ROWS, 64, torch.bfloat16, torch.device(DEVICE))
    found, rstd = QKV.heads_of(x.view(2, ROWS // 2, WIDTH), weight, factors(40), cos, sin, 7, None, 4, 1, parameters)
    return found.view(ROWS, WIDE), rstd.t()


def heads_of_whole_tiles(parameters):
    """As training calls them: every sequence reads the same rows of the tables."""
    x, weight, *_ = matrices()
    cos, sin = QKV.tables(ROWS, 64, torch.bfloat16, torch.device(DEVICE))
    found, rstd = QKV.heads_of(x[None, :256], weight, factors(40)[:256], cos, sin, 7, None, 4, 1, parameters)
    return found.view(256, WIDE), rstd.t()


def exponentials(parameters):
    x, weight, *_ = matrices()
    weight[[WIDE - 64, 65]] = 0.0
    targets = torch.arange(ROWS, device=DEVICE)
    targets[50:54] = torch.tensor([-100, -1, WIDE, 2**40])
    out = torch.empty(ROWS, WIDE, dtype=x.dtype, device=DEVICE)
    sums, logits = HEAD.exponentials(x, weight, targets, CAP, out, True, parameters)
    known = (targets >= 0) & (targets < WIDE)
    return out, sums.sum(0), torch.where(known, logits, 0.0)


CALLS = (rows_scaled, residual, norm_backward, relu2, relu2_backward, heads, heads_of_whole_tiles, exponentials)


@pytest.mark.parametrize("parameters", KERNELS, ids=lambda p: "-".join(map(str, p.values())))
@pytest.mark.parametrize("call", CALLS)
def test_special_values(call: Callable, parameters):
    with poisoned():
        expected, found, again = call(BY_TORCH), call(parameters), call(parameters)
    for each in zip(expected, found, again, strict=True):
        wanted, result, same = (t.reshape(len(t), -1) for t in each)
        assert torch.equal(result.nan_to_num(1.0), same.nan_to_num(1.0))
        assert not oracle.misplaced(result, wanted.double())
        finite = wanted.isfinite()
        # torch rounds a product to bfloat16 before the epilogue
        difference, size = (torch.where(finite, t, 0.0).double() for t in (result - wanted, wanted))
        allowed = 2**-7 * size.norm(dim=-1)
        if size.size(1) == 1:  # a sum over the row, whose terms cancel
            allowed = 4 * allowed.clamp(min=float(allowed.median()))
        assert bool((difference.norm(dim=-1) <= allowed + 1e-30).all())
        assert finite.any() and (call is relu2 or not finite.all())


# faults that the test must catch on sm_90: see test_planted_faults.py
FACTOR, SQUARES, TARGET = "* factor * factor", "gl.sum(o1 * o1 + o2 * o2, axis=1)", "target[:, None]"
SIDES = f" = left == {TARGET}, left + 1 == {TARGET}\n        target_logits = gl"
FAULTS = {
    "relu2_mlp": {
        "relu2 drops NaN": ("relu = gl.where(z < 0.0, 0.0, z)", "relu = gl.where(z > 0.0, z, 0.0)"),
        "negative hidden activations squared": ("relu = gl.where(z < 0.0, 0.0, z)", "relu = z"),
        "gradient of relu2 where relu is 0": ("gl.where(h == 0.0, 0.0, 2.0 * dh)", "2.0 * dh"),
        "derivative of relu2 without the root": ("dh * gl.sqrt(h) * rstd[:, None]", "dh * h * rstd[:, None]"),
        "row sums of dz and z halved": ("gl.sum(dh * h, axis=1)", "gl.sum(0.5 * dh * h, axis=1)"),
    },
    "folded_norm": {
        "residual dropped": ("sums += residual.load(sums.type.layout).to(gl.float32)", "pass"),
        "squares of twice the row": ("gl.where(inside[None, :], as_float, 0.0)", "gl.where(inside[None, :], 2.0 * as_float, 0.0)"),
        "norm not closed": ("gl.float32) * coefficient[:, None]", "gl.float32) * 0.0 * coefficient[:, None]"),
        "gradient of the residual dropped": ("sums += dy.load(sums.type.layout).to(gl.float32)", "pass"),
    },
    "qkv_projection_kernels": {
        "rotation backwards": ("c = first.slice", "c = -first.slice"),
        "head's rstd without the row's factor": (f"{SQUARES} {FACTOR}\n        head_rstd = 1.0", f"{SQUARES}\n        head_rstd = 1.0"),
        "values normed": ("column < normed:\n        r = hopper", "column < 2 * normed:\n        r = hopper"),
    },
    "fused_cross_entropy_kernels": {
        "target's exponential kept": ("gl.where(is_left, 0.0, e) + gl.where(is_right, 0.0, f)", "e + f"),
        "target's logit of its neighbour": (f"is_left, is_right{SIDES}", f"is_right, is_left{SIDES}"),
    },
    "hopper_product": {"factor of the rows dropped": ("sums *= load_rows(arguments[0], sums, row, m)[:, None]", "pass")},
}  # fmt: skip
PLANTED_ON_HOPPER = {
    name: (file, *texts, "test_special_values") for file, faults in FAULTS.items() for name, texts in faults.items()
}
