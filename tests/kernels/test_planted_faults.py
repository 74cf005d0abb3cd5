"""The tests are tested: each fault below, planted in a copy of the kernels, must make a test fail (pytest --plant)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

ROOT = Path(__file__).resolve().parents[2]
# room, what stands there, what is planted
FAULTS = {
    "eps dropped": ("rms_norm", "/ WIDTH + EPS)", "/ WIDTH)"),
    "mean over the padded width": ("rms_norm", "axis=1) / WIDTH + EPS", "axis=1) / BLOCK + EPS"),
    "last row of the tile missed": ("rms_norm", "inside = (row < rows)", "inside = (row < rows - 1)"),
    "stride ignored": ("rms_norm", "x + row[:, None] * x_stride", "x + row[:, None] * WIDTH"),
    "sum not rounded before the norm": (
        "rms_norm",
        "tile = cast(tile.to(tl.float32) + more.to(tl.float32), tile.dtype)",
        "tile = tile.to(tl.float32) + more.to(tl.float32)",
    ),
    "rstd dropped in backward": ("rms_norm", "out = r[:, None] * (grad", "out = (grad"),
    "projection dropped": ("rms_norm", "(grad - normed * along[:, None])", "grad"),
    "gradient of the sum dropped": ("rms_norm", "backward_op(dy, dtotal, *ctx", "backward_op(dy, None, *ctx"),
    "one gradient for two inputs": ("rms_norm", "    return grad, grad, None\n", "    return grad, None, None\n"),
    "wrong sign in the rotation": ("qk_norm_rope", "x1 * c + x2 * s", "x1 * c - x2 * s"),
    "turned back the wrong way": ("qk_norm_rope", "cast(o1 * c - o2 * s", "cast(o1 * c + o2 * s"),
    "halves exchanged": ("qk_norm_rope", "tl.store(to + HALF, cast(o2 * r", "tl.store(to + HALF, cast(o1 * r"),
    "norm before the rotation's mask": ("qk_norm_rope", "/ (2 * HALF) + EPS", "/ HALF + EPS"),
    "offset ignored": ("qk_norm_rope", "position = t.to(tl.int64) + offset", "position = t.to(tl.int64)"),
    "offset of the wrong row": ("qk_norm_rope", "tl.load(offsets + batch)", "tl.load(offsets)"),
    "last tile of tokens not masked": (
        "qk_norm_rope",
        "(t < tokens)[:, None] & (channel",
        "(t < TOKENS)[:, None] & (channel",
    ),
    "head stride of q for k": (
        "qk_norm_rope",
        "k_heads, k_batch, k_token, k_head,",
        "k_heads, k_batch, k_token, q_head,",
    ),
    "position outside read": ("qk_norm_rope", "(position >= 0) & (position < positions)", "(position >= 0)"),
    "derivative of the cap dropped": ("softcap_cross_entropy", "pack(e * (w - w * w), f", "pack(e, f"),
    "target's one dropped": ("softcap_cross_entropy", "value = -others", "value = exact"),
    "ignored targets counted": ("softcap_cross_entropy", "(targets != ignore_index).sum()", "(targets != -7).sum()"),
    "ignored rows keep a gradient": ("softcap_cross_entropy", "== ignore_index, 0.0, factor)", "== -7, 0.0, factor)"),
    "last chunk not masked": ("softcap_cross_entropy", "e = tl.where(2 * pair < width - i * CHUNK, e, 0.0)", "e = e"),
    "no mask on the second read's sum": (
        "softcap_cross_entropy",
        "tl.where(at < width, exponential(weight_of(z, CAP), CAP), 0.0)",
        "exponential(weight_of(z, CAP), CAP)",
    ),
    "odd column of the last chunk not masked": (
        "softcap_cross_entropy",
        "f = tl.where(2 * pair + 1 < width - i * CHUNK, f, 0.0)",
        "f = f",
    ),
    "a row's share used for the row before": ("softcap_cross_entropy", "        held = read\n", ""),
    "last row not written": (
        "softcap_cross_entropy",
        "    for i in tl.static_range(CHUNKS):\n        store",
        "    for i in tl.static_range(0):\n        store",
    ),
    "mirrored tile not stored": (
        "matrix_product",
        "            tl.store(out + mirrored, value)\n        else",
        "        else",
    ),
    "tile row of the triangle wrong": ("matrix_product", "rest // (group + 1) * BM", "rest // (group + 2) * BM"),
    "diagonal not added": ("matrix_product", "== c[None, :], gamma, 0.0)", "== c[None, :], 0.0, 0.0)"),
    "product's last columns not masked": (
        "matrix_product",
        "(r < rows)[:, None] & (c < columns)[None, :], other",
        "(r < rows)[:, None], other",
    ),
    "matrix of the batch confused": ("matrix_product", "matrix.to(tl.int64) * m * n", "matrix.to(tl.int64) * m * m"),
    "coefficients exchanged": ("newton_schulz", "alpha=c, beta=b, y_transposed", "alpha=b, beta=c, y_transposed"),
    "no step's own factor": (
        "newton_schulz",
        "small = together(together(step, small), step)",
        "small = together(step, small)",
    ),
    "restart forgotten": (
        "newton_schulz",
        "            factor, small = None, gram_of(x, tall)\n",
        "            small = gram_of(x, tall)\n",
    ),
    "norm of the batch, not the matrix": ("newton_schulz", "partial + matrix * PARTS + tl", "partial + tl"),
    "momentum not stored": ("optimizer_step", "        tl.store(momentum + here, m, mask=at < size)\n", ""),
    "Nesterov's look ahead dropped": ("optimizer_step", "g + decay * (m - g)", "m"),
    "clip dropped": (
        "optimizer_step",
        "mask=at < size, other=0.0).to(tl.float32) * c",
        "mask=at < size, other=0.0).to(tl.float32)",
    ),
    "second bias of AdamW for the first": ("optimizer_step", "(m / tl.load(bias1))", "(m / tl.load(bias2))"),
    "exponent of the packing off by one": ("softcap_cross_entropy", "(1 << TOP)", "(2 << TOP)"),
    "packing cut off, not rounded": ("softcap_cross_entropy", "((64 + TOP) << 23) - (1 << 12)", "((64 + TOP) << 23)"),
    "upstream gradient ignored": ("softcap_cross_entropy", "if factor != 1.0:", "if factor == 1.0:"),
    "logits overwritten": (
        "softcap_cross_entropy",
        "    scale = losses\n",
        "    scale = losses\n    gradient = logits.detach()\n",
    ),
    "explicit request falls back": ("dispatch", "    if refusal:\n        raise", "    if False:\n        raise"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fault" in metafunc.fixturenames:
        metafunc.parametrize("fault", FAULTS if metafunc.config.getoption("--plant") else [])


def test_fault_is_caught(fault, tmp_path):
    room, sound, faulty = FAULTS[fault]
    for folder in ("kernels", "tests", "nanochat"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "kernels" / f"{room}.py"
    text = path.read_text("utf-8")
    assert sound in text, f"{room}.py no longer holds what this fault replaces: {sound}"
    path.write_text(text.replace(sound, faulty), "utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/kernels/test_{room}.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(None))
    # 1: tests failed; negative: a stray access killed the process, which nobody overlooks either
    assert done.returncode == 1 or done.returncode < 0, (
        f"no test failed with: {fault}\n{done.stdout[-1500:]}{done.stderr[-500:]}"
    )


@pytest.mark.parametrize("name", FAULTS)
def test_fault_can_be_planted(name):
    """What a fault replaces is still there: else --plant would test nothing."""
    room, sound, faulty = FAULTS[name]
    text = (ROOT / "kernels" / f"{room}.py").read_text("utf-8")
    assert sound in text and faulty != sound
