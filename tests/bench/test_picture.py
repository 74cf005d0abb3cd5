"""The picture of what `python -m bench train` measured."""

import json
import re

import pytest
from matplotlib.colors import to_hex

from bench.picture import PictureConfig, color_of, picture
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


def drawn(tmp_path, rows: list[dict]) -> tuple[set[str], str]:
    out = tmp_path / "train.svg"
    picture(PictureConfig((written(tmp_path / "found.json", rows),), out), "")
    return set(texts(out.read_text("utf-8"))), out.read_text("utf-8")


def test_an_ablation_of_many_variants_is_drawn_each_in_its_colour(tmp_path):
    names = [f"graph:auto,{number}=reference" for number in range(9)]
    found, _ = drawn(tmp_path, [result(name, 10.0 + number) for number, name in enumerate(names)])
    assert set(names) <= found
    assert len({to_hex(color_of(number)) for number in range(9)}) == 9


def test_results_of_updates_alone_and_of_a_cpu_are_drawn(tmp_path):
    update = {"measured": "update", "tokens_per_second": None}
    found, _ = drawn(tmp_path, [result("fused", 10.0, **update), result("compiled", 15.0, **update)])
    assert {"milliseconds", "peak memory, GB", "15 (nanochat 0.67 ×)"} <= found
    found, _ = drawn(tmp_path, [result("fused", 10.0, peak_gb=None), result("plain", 20.0, peak_gb=None)])
    assert "tokens per second" in found and "peak memory, GB" not in found


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
