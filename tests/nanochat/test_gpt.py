import math
from dataclasses import fields, replace

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.options.model import Implementations
from nanochat.platform.errors import UserError
from nanochat_kernels.qkv_projection import as_one
from tests.nanochat.models import perturbed

CONFIG = GPTConfig.from_depth(2, 300, 32)


def test_the_first_loss_is_that_of_guessing():
    model = GPT.create(CONFIG)
    tokens = torch.randint(300, (2, 32))
    assert model(tokens, tokens).item() == pytest.approx(math.log(300), abs=1e-6)


@pytest.mark.parametrize("depth", range(1, 9))
def test_parameters_are_counted_right_and_heads_fit(depth):
    for n_kv_head in (None, 1):
        config = GPTConfig.from_depth(depth, 300, 32, n_kv_head)
        model = GPT(config)
        assert sum(p.numel() for p in model.parameters()) == config.num_parameters
        assert config.head_width <= 128 and config.width == 64 * depth


def test_initial_spread():
    model = GPT.create(GPTConfig.from_depth(4, 2000, 32))
    block = model.blocks[1]
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert block.attention.query.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert block.mlp.expand.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    for zero in (model.head, block.attention.project, block.mlp.project):
        assert not zero.weight.any()


def test_seeds_and_only_seeds_decide_the_weights():
    a, b, c = GPT.create(CONFIG), GPT.create(CONFIG), GPT.create(CONFIG, seed=7)
    assert torch.equal(a.embedding.weight, b.embedding.weight)
    assert not torch.equal(a.embedding.weight, c.embedding.weight)


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_a_later_token_changes_nothing_before_it(n_kv_head):
    model = perturbed(replace(CONFIG, n_head=2, n_kv_head=n_kv_head))
    tokens = torch.randint(300, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 300
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before[:, 12:], after[:, 12:])


def test_loss_of_each_token_and_ignored_targets():
    model = perturbed(CONFIG)
    tokens = torch.randint(300, (2, 16))
    targets = tokens.roll(-1, 1)
    targets[:, 10:] = -1
    losses = model(tokens, targets, reduction="none")
    assert losses.shape == (2, 16) and not losses[:, 10:].any()
    logits = model(tokens)
    assert logits.abs().max() <= 15
    expected = torch.nn.functional.cross_entropy(logits[:, :10].flatten(0, 1), targets[:, :10].flatten())
    torch.testing.assert_close(losses[:, :10].mean(), expected)
    torch.testing.assert_close(model(tokens, targets), expected)


def test_the_reference_is_selectable_for_each_operation_and_others_are_refused():
    tokens = torch.randint(300, (1, 8))
    operations = [field.name for field in fields(Implementations) if field.name != "optimizer"]
    expected = perturbed(CONFIG)(tokens, tokens)
    for name in operations:
        chosen = replace(CONFIG, impl=Implementations(**{name: "reference"}))
        torch.testing.assert_close(perturbed(chosen)(tokens, tokens), expected)
        with pytest.raises(ValueError, match=f"{name}: impl='nonsense' does not exist"):
            perturbed(replace(CONFIG, impl=Implementations(**{name: "nonsense"})))(tokens, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 3}, "3 heads do not divide the width 128"),
        ({"n_head": 128}, "into even head widths"),
        ({"n_head": 2, "n_kv_head": 3}, r"n_kv_head 3 does not divide n_head 2; choose one of \[1, 2\]"),
        ({"vocab_size": 0}, "at least 1"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **change)


def test_too_many_tokens_are_refused():
    with pytest.raises(UserError, match="385 tokens exceed the 384 positions"):
        GPT.create(CONFIG)(torch.zeros(1, 385, dtype=torch.int64))


def test_copies_of_queries_keys_and_values_lie_in_one_memory():
    """Without an optimizer too, else every token would join the three weights again."""
    model = GPT(replace(CONFIG, n_kv_head=1), torch.bfloat16)
    model.keep_copies()
    attention = model.blocks[0].attention
    layers = (attention.query, attention.key, attention.value)
    one = as_one(*(layer.copy for layer in layers))
    assert one is not None
    assert torch.equal(one, torch.cat([layer.weight.detach().bfloat16() for layer in layers]))
