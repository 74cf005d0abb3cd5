"""The table of `nanochat trace` shows the tensors of the model's own forward pass."""

import re
from dataclasses import replace

import pytest
import torch
from rich.text import Text

from nanochat.gpt import GPTConfig
from nanochat.tools.trace import REFERENCES, narrow, observed_forward
from tests.conftest import assert_fails_with, nanochat
from tests.nanochat.models import perturbed


def test_trace_shows_every_operation(tmp_path):
    result = nanochat(tmp_path, "trace", "--markdown", str(tmp_path / "trace.md"))
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "trace.md").read_text()
    for operation in ("embedding", "block 0 query", "block 1 attention", "block 1 relu²", "softcap", "cross entropy"):
        assert operation in text and operation in result.stdout
    columns = [line.count("|") for line in text.splitlines()]
    assert set(columns) == {9}


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_the_rows_are_observed_in_the_models_own_pass(n_kv_head):
    model = perturbed(replace(GPTConfig.from_depth(2, 300, 32, impl=REFERENCES), n_head=2, n_kv_head=n_kv_head))
    tokens = torch.randint(300, (2, 17))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    rows = {row.operation: row for row in observed_forward(model, inputs, targets)}
    assert len(rows) == 7 + 13 * 2 and all(row.meaning for row in rows.values())
    assert rows["cross entropy"].mean == pytest.approx(model(inputs, targets).item(), rel=1e-6)
    assert rows["softcap"].std == pytest.approx(model(inputs).std(correction=0).item(), rel=1e-5)
    assert rows["embedding"].shape == rows["final rms_norm"].shape == "2×16×128"
    assert rows["block 1 key"].shape == rows["block 1 rotation and norm of k"].shape == f"2×16×{n_kv_head}×64"
    assert rows["block 0 attention"].shape == "2×16×2×64" and rows["head"].shape == "2×16×300"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    with torch.no_grad():
        model.blocks[1].mlp.expand.weight.zero_()  # from there on the tensors change, and none before
    changed = {row.operation: row for row in observed_forward(model, inputs, targets)}
    names = list(rows)
    first = names.index("block 1 relu²")
    assert all(changed[name] == rows[name] for name in names[:first])
    assert all(changed[name] != rows[name] for name in names[first:])


def test_a_trained_model_reads_a_prompt(trained_base):
    result = nanochat(trained_base, "trace", "--stage", "base", "--prompt", "Tilda lives in")
    assert result.returncode == 0, result.stderr
    assert "base, step 24, reads 'T" in result.stdout and re.search("most likely after it: ['\"]", result.stdout)
    assert "final rms_norm" in result.stdout and "1×" in result.stdout
    assert_fails_with(nanochat(trained_base, "trace", "--prompt", "Tilda"), "--prompt needs --stage base, mid or sft")


@pytest.mark.parametrize("width", [80, 100])
def test_a_narrow_terminal_shows_every_word_and_number(width):
    rows = observed_forward(
        perturbed(GPTConfig.from_depth(12, 512, 64, impl=REFERENCES)), *torch.randint(512, (2, 4, 64))
    )
    lines = [Text.from_markup(line).plain for line in narrow(rows, width)]
    assert all(len(line) <= width for line in lines)
    words = " ".join(" ".join(lines).split())
    assert all(row.operation in words and row.meaning in words and row.shape in words for row in rows)


def test_an_operation_that_the_pass_does_not_take_is_an_error():
    model = perturbed(GPTConfig.from_depth(1, 300, 32, impl=REFERENCES))
    model.blocks[0].mlp.forward = lambda x, rstd: (x, rstd)
    tokens = torch.randint(300, (2, 16))
    with pytest.raises(RuntimeError, match="the forward pass has no .*rms_norm 2"):
        observed_forward(model, tokens, tokens)
    assert not any(module._forward_hooks for module in model.modules())
