"""python -m bench memory: which micro-batches fit on which card."""

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.memory import CARDS, VARIANTS, MemoryConfig, model_of
from nanochat.platform.errors import UserError
from nanochat.train.memory import predict


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "memory.json"
    main(["memory", "--json", str(path)])
    return {(row["depth"], row["variant"], row["card"]): row for row in json.loads(path.read_text())["rows"]}


def test_the_largest_micro_batch_fits_and_one_more_row_does_not(found):
    assert len(found) == 4 * len(VARIANTS) * len(CARDS)
    for (depth, variant, card), row in found.items():
        architecture, gib = CARDS[card]
        model, options = model_of(depth, variant, MemoryConfig()), (8, VARIANTS[variant][0], architecture)
        fits = [predict(model, row["rows"] + more, *options).fits(gib * 2**30) for more in (0, 1)]
        assert fits == [True, row["rows"] == 256]


def test_d20_trains_on_every_card_and_recomputation_makes_room(found):
    for card in CARDS:
        rows = [found[20, variant, card]["rows"] for variant in VARIANTS]
        assert rows[0] >= 16 and rows == sorted(rows[:3]) + rows[3:] and rows[3] < rows[0]
        for variant in VARIANTS:
            micro_batches, rows_of_each = found[20, variant, card]["step"]
            assert micro_batches * rows_of_each * 2048 * 8 == 524_288
    assert found[20, "fused", "A100 40 GB"]["step"] == [2, 16]


def test_the_readme_says_how_many_rows_fit(found):
    """Every row of its table; the margin for CUDA and for gaps, evaluation and what backward computes again all count in it."""
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    table = readme[readme.index("| rows that fit |") :].split("\n\n")[0].splitlines()
    cards, rows = [cell.strip() for cell in table[0].strip("|").split("|")[1:]], table[2:]
    assert cards == list(CARDS) and len(rows) >= 9
    for row in rows:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        depth, _, variant = name.replace("`", "").partition(", ")
        variant = {"": "fused", "compiled plain model": "plain, compiled"}.get(variant, f"fused, {variant}")
        for card, cell in zip(cards, cells, strict=True):
            fits = found[int(depth[1:]), variant, card]["rows"]
            assert cell == ("256 or more" if fits == 256 else str(fits)), (name, card)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_measuring_needs_a_gpu():
    with pytest.raises(UserError, match="this machine has none"):
        main(["memory", "--measure"])
