"""The picture of what `python -m bench train` measured."""

import json
import re

import pytest

from bench.picture import PictureConfig, picture
from nanochat.platform.errors import UserError


def result(variant: str, ms: float, measured: str = "micro", **more) -> dict:
    return {
        "variant": variant, "measured": measured, "depth": 4, "rows": 2, "tokens": 1024, "ms": ms, "samples_ms": [ms, 1.1 * ms, ms],
        "tokens_per_second": 2_048_000 / ms, "peak_gb": ms / 10,
    } | more  # fmt: skip


def written(path, rows: list[dict], device: str = "a GPU"):
    path.write_text(json.dumps({"device": device, "rows": rows}))
    return path


def texts(svg: str) -> list[str]:
    return [re.sub("<[^>]*>", "", text).strip() for text in re.findall("<text.*?</text>", svg, re.DOTALL)]


def test_rates_memory_and_ratios_are_drawn(tmp_path):
    one = written(
        tmp_path / "one.json", [result("fused", 10.0), result("compiled", 15.0), result("peers", 1.0, samples_ms=[])]
    )
    two = written(tmp_path / "two.json", [result("fused", 20.0, "8"), result("compiled", 20.0, "8", peak_gb=None)])
    out = tmp_path / "made" / "train.svg"
    picture(PictureConfig((one, two), out), "")
    found = texts(out.read_text("utf-8"))
    assert {"205K", "137K (nanochat 1.50 ×)", "1.5 (nanochat 0.67 ×)", "102K (nanochat 1.00 ×)"} <= set(found)
    assert {"d4, 2 × 1,024 tokens", "Training on one a GPU", "nanochat", "torch.compile"} <= set(found)
    assert not any("Liger" in text for text in found)  # it was not measured


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "is no result"), ('{"rows": []}', "is no result"), ('{"device": "x", "rows": []}', "nothing to draw")],
)
def test_what_cannot_be_drawn_is_said(tmp_path, content, reason):
    path = tmp_path / "found.json"
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        picture(PictureConfig((path,), tmp_path / "train.svg"), "")
    assert not (tmp_path / "train.svg").exists()


def test_results_of_two_kinds_of_gpu_are_not_drawn_together(tmp_path):
    paths = tuple(written(tmp_path / f"{name}.json", [result("fused", 10.0)], name) for name in ("A", "B"))
    with pytest.raises(UserError, match="one kind of GPU, got A, B"):
        picture(PictureConfig(paths, tmp_path / "train.svg"), "")
