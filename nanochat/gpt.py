"""The GPT: RoPE + QK-norm attention, squared-ReLU MLP, RMSNorm without weights, softcapped logits, no biases.

Notation: B batch, T tokens, C width, H query heads, G key/value heads, D head width, V vocabulary, S positions of a cache.
Weights are float32, and every operation computes in `compute_dtype`. Vaswani et al. 2017, Radford et al. 2019 (GPT-2).
"""

import math
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import nanochat_kernels as kernels
from nanochat.options.model import LONGEST_CONTEXT, Implementations, Recompute
from nanochat.platform.errors import UserError

# the tables cover this many context lengths, so that a chat can grow longer than the training context
ROPE_CONTEXTS = 10


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model, the implementation of each operation, and the parts of a block that backward computes again.

    Raises UserError for sizes that do not fit together.
    """

    depth: int
    width: int
    n_head: int
    n_kv_head: int
    vocab_size: int
    context_length: int = 2048
    impl: Implementations = field(default_factory=Implementations, compare=False)
    recompute: tuple[Recompute, ...] = field(default=(), compare=False)

    def __post_init__(self):
        if min(self.depth, self.width, self.n_head, self.n_kv_head, self.vocab_size, self.context_length) < 1:
            raise UserError(f"every size of a model must be at least 1, got {self.to_dict()}")
        if self.context_length > LONGEST_CONTEXT:
            raise UserError(f"a context of {self.context_length} tokens is longer than {LONGEST_CONTEXT}")
        if self.width % self.n_head or self.head_width % 2:
            raise UserError(f"{self.n_head} heads do not divide the width {self.width} into even head widths")
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}; choose one of "
                f"{[g for g in range(1, self.n_head + 1) if self.n_head % g == 0]}"
            )

    @classmethod
    def from_depth(
        cls, depth: int, vocab_size: int, context_length: int = 2048, n_kv_head: int | None = None, **options
    ) -> "GPTConfig":
        """Derive the sizes of a model from its depth; `options` are further fields of the configuration.

        The width is 64·depth. The number of heads is the smallest that divides the width into heads of at most 128. Without
        n_kv_head there are as many key/value heads as query heads.
        """
        if depth < 1:
            raise UserError(f"the depth of a model must be at least 1, got {depth}")
        width = 64 * depth
        n_head = next(n for n in range(max(1, -(-width // 128)), width + 1) if width % n == 0)
        return cls(depth, width, n_head, n_kv_head or n_head, vocab_size, context_length, **options)

    @property
    def head_width(self) -> int:
        return self.width // self.n_head

    @property
    def num_parameters(self) -> int:
        """All weights, with the embedding and the head."""
        kv_share = self.n_kv_head / self.n_head
        # query and projection; key and value; the two matrices of the MLP
        block = self.width**2 * (2 + 2 * kv_share + 8)
        return int(self.depth * block) + 2 * self.vocab_size * self.width

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward for one token: 6 per parameter outside of the embedding, and 12·L·H·D·T for attention.

        Chowdhery et al. 2022 (PaLM), appendix B.
        """
        products = 6 * (self.num_parameters - self.vocab_size * self.width)
        return products + 12 * self.depth * self.width * self.context_length

    def to_dict(self) -> dict[str, int]:
        """The sizes, as a checkpoint stores them; implementations are chosen again when it is loaded."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.compare}


class Cache(Protocol):
    """What the model needs from a key/value cache; nanochat/inference/cache.py implements it."""

    lengths: Tensor  # (B,) tokens of each row before this forward pass

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Store k and v (B, T, G, D) of a layer; return its keys and values in pages (N, P, G, D), each row's number of them (B,), and
        its pages (B, n)."""


class ComputeWithCopy(torch.autograd.Function):
    """Returns the copy of a weight in another dtype; backward gives the gradient to the weight."""

    @staticmethod
    def forward(ctx, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


class Linear(nn.Linear):
    """x·weightᵀ in x's dtype, for x (…, width).

    The optimizer owns the storage of the weight. It may also set `copy`, the weight in the compute dtype, which saves a cast in
    every pass, and `gradient`, a float32 buffer to which backward adds the weight's gradient instead of returning it.
    """

    def __init__(self, width: int, out: int):
        super().__init__(width, out, bias=False)
        self.register_buffer("copy", None, persistent=False)
        self.gradient: Tensor | None = None

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The weight in `dtype`, and the buffer that backward adds its gradient to (None: autograd handles the gradient)."""
        has_copy = self.copy is not None and self.copy.dtype == dtype
        if self.gradient is not None and self.weight.requires_grad:
            return self.copy if has_copy else self.weight.detach().to(dtype), self.gradient
        return ComputeWithCopy.apply(self.weight, self.copy) if has_copy else self.weight.to(dtype), None

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, *self.operands(x.dtype))


class RowsAddingGradient(torch.autograd.Function):
    """Returns rows of an embedding; backward adds their gradient to a float32 buffer in place."""

    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor, gradient: Tensor) -> Tensor:
        # not saved_for_backward, which forbids that other calls change it before this one's backward
        ctx.gradient = gradient
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[None, None, None]:
        # index_put_ sorts the tokens and adds in that order, repeatably; index_add_ would add in any order
        ctx.gradient.index_put_(ctx.saved_tensors, dy.to(ctx.gradient.dtype), accumulate=True)
        return None, None, None


class Embedding(nn.Embedding):
    """Rows of the weight, in its dtype, for tokens (…). The optimizer may set `gradient`, as for `Linear`."""

    gradient: Tensor | None = None

    def reset_parameters(self) -> None:
        """Nothing: GPT.create initialises. torch's own would import torch._dynamo on the meta device, which takes seconds."""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.gradient is not None:
            return RowsAddingGradient.apply(self.weight, tokens, self.gradient)
        return F.embedding(tokens, self.weight)


class Attention(nn.Module):
    """x + W·attention(norm(x)): causal attention with rotary positions, queries and keys normalised over the head."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        kv_width = config.n_kv_head * config.head_width
        self.query = Linear(config.width, config.width)
        self.key = Linear(config.width, kv_width)
        self.value = Linear(config.width, kv_width)
        self.project = Linear(config.width, config.width)

    def forward(
        self, x: Tensor, rstd: Tensor | None, cos: Tensor, sin: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        impl = self.config.impl
        operands = (layer.operands(x.dtype) for layer in (self.query, self.key, self.value))
        weights, gradients = zip(*operands, strict=True)
        # norm, product, rotation, QK-norm and attention; the last result is x itself
        if cache is None:
            out, x = kernels.self_attention(
                x, *weights, cos, sin, rstd, *gradients,
                impl=impl.self_attention, qkv_impl=impl.qkv_projection, attention_impl=impl.attention,
            )  # fmt: skip
        else:
            q, k, v, x = kernels.qkv_projection(
                x, *weights, cos, sin, cache.lengths, rstd, *gradients, impl=impl.qkv_projection
            )
            k, v, lengths, pages = cache.append(self.layer, k, v)
            # the scores of normalised heads are at most √D
            out = kernels.attention(q, k, v, lengths, bound=math.sqrt(q.size(3)), pages=pages, impl=impl.attention)
        weight, gradient = self.project.operands(x.dtype)
        return kernels.output_projection(out.flatten(2), weight, x, gradient, impl=impl.output_projection)


class MLP(nn.Module):
    """x + relu(norm(x)·W₁ᵀ)²·W₂ᵀ with a hidden width of 4·C. So et al. 2021 (Primer)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.impl, self.recompute = config.impl.relu2_mlp, "mlp" in config.recompute
        self.expand = Linear(config.width, 4 * config.width)
        self.project = Linear(4 * config.width, config.width)

    def forward(self, x: Tensor, rstd: Tensor | None) -> tuple[Tensor, Tensor]:
        (w_up, up_gradient), (w_down, down_gradient) = self.expand.operands(x.dtype), self.project.operands(x.dtype)
        return kernels.relu2_mlp(x, w_up, w_down, x, rstd, up_gradient, down_gradient, self.recompute, impl=self.impl)


class Block(nn.Module):
    """Attention and MLP, each of which adds to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention, self.mlp = Attention(config, layer), MLP(config)
        self.recompute_attention = "attention" in config.recompute

    def forward(
        self, x: Tensor, rstd: Tensor | None, cos: Tensor, sin: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Take the residual stream x (B, T, C), and return it after the block.

        rstd (B, T) is passed along because each norm is folded into the product after it: of the norm only this factor of each row
        is computed, by the operation that made x. None means that it is not known.
        """
        inputs = x, rstd, cos, sin, cache
        if self.recompute_attention and torch.is_grad_enabled():
            # saves its inputs alone; the same kernels run again in backward, which changes no bit and can be captured
            return self.mlp(*checkpoint(self.attention, *inputs, use_reentrant=False, preserve_rng_state=False))
        return self.mlp(*self.attention(*inputs))


class GPT(nn.Module):
    """The language model: tokens → embedding → blocks → head. `GPT.create` makes one with initial weights."""

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        for option in fields(config.impl):
            for operation in Implementations.operations(option.name):
                kernels.check_request(operation, getattr(config.impl, option.name))
        self.config, self.compute_dtype = config, compute_dtype
        self.embedding = Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.head = Linear(config.width, config.vocab_size)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos.to(compute_dtype), persistent=False)
        self.register_buffer("sin", sin.to(compute_dtype), persistent=False)

    @classmethod
    def create(
        cls,
        config: GPTConfig,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        seed: int = 42,
    ) -> "GPT":
        """A model on the device with initial weights, which the seed determines.

        Head and output projections start at zero, so that the first loss is ln V. The others are normal with standard deviation
        √(1/fan_in)·min(1, √(fan_out/fan_in)), and 1 for the embedding. Yang et al. 2023 (spectral condition).
        """
        with torch.device("meta"):  # weights are allocated once, on the device
            model = cls(config, compute_dtype)
        model.to_empty(device=device)
        cos, sin = rope_tables(config)
        model.cos.copy_(cos)  # buffers too were made on the meta device
        model.sin.copy_(sin)
        generator = torch.Generator(device=device).manual_seed(seed)
        zero = {"head.weight"} | {
            f"blocks.{i}.{part}.project.weight" for i in range(config.depth) for part in ("attention", "mlp")
        }
        for name, parameter in model.named_parameters():
            fan_out, fan_in = parameter.shape
            std = 1.0 if name == "embedding.weight" else fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5)
            if name in zero:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std, generator=generator)
        return model

    def keep_copies(self) -> None:
        """Store a copy of each matrix in the compute dtype, so that no forward pass has to cast it.

        For a model that is not trained: an optimizer makes copies of its own and updates them.
        """
        if self.compute_dtype != torch.float32:
            for layer in self.modules():
                if isinstance(layer, Linear):
                    layer.copy = layer.weight.detach().to(self.compute_dtype)
            for block in self.blocks:
                # one after the other in memory, so that their product need not join them for every token
                layers = (block.attention.query, block.attention.key, block.attention.value)
                joined = torch.cat([layer.copy for layer in layers])
                parts = joined.split([layer.out_features for layer in layers])
                for layer, part in zip(layers, parts, strict=True):
                    layer.copy = part

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The normalised last hidden state (B, T, C), in the compute dtype, for tokens (B, T) int64.

        With a cache, the tokens continue its rows. Raises UserError for more tokens than the model has positions.
        """
        if tokens.size(1) > self.positions:
            raise UserError(f"{tokens.size(1)} tokens exceed the {self.positions} positions of the model")
        x = self.embedding(tokens).to(self.compute_dtype)
        x, rstd = kernels.rms_norm(x, impl=self.config.impl.rms_norm), None
        for block in self.blocks:
            x, rstd = block(x, rstd, self.cos, self.sin, cache)
        return kernels.rms_norm(x, impl=self.config.impl.rms_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """The softcapped logits (…, V), in float32, for hidden states (…, C)."""
        if torch.is_grad_enabled():  # the fused operation has no gradient
            return kernels.SOFTCAP * torch.tanh(self.head(hidden).float() / kernels.SOFTCAP)
        plain = self.config.impl.linear_cross_entropy == "reference"
        weight, _ = self.head.operands(hidden.dtype)
        return kernels.softcapped_logits(hidden, weight, impl="reference" if plain else "auto")

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        cache: Cache | None = None,
        loss_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss in nats for tokens and targets (B, T); without targets, the logits (B, T, V).

        Targets of −1 are ignored. reduction: "mean" gives a scalar, "none" the loss of each token (B, T). loss_weight: on the
        device, in float32, a scalar or one weight per token (B, T), which multiplies the losses before the mean, and so the gradients.
        """
        hidden = self.hidden(tokens, cache)
        if targets is None:
            return self.logits(hidden)
        weight, gradient = self.head.operands(hidden.dtype)
        loss = kernels.linear_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            targets.flatten(),
            kernels.SOFTCAP,
            reduction=reduction,
            loss_weight=loss_weight.flatten() if loss_weight is not None and loss_weight.dim() else loss_weight,
            weight_gradient=gradient,
            impl=self.config.impl.linear_cross_entropy,
        )
        return loss if reduction == "mean" else loss.view_as(targets)

    @property
    def positions(self) -> int:
        """The most tokens that a row can have."""
        return self.cos.size(0)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device


def rope_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (positions, D/2) of position·ROPE_BASE^(−2i/D), in float32 on the CPU. Su et al. 2021 (RoFormer).

    There are 10·context positions, and more up to a multiple of what a chunk of a prompt has.
    """
    channels = torch.arange(0, config.head_width, 2, dtype=torch.float32, device="cpu")
    positions = torch.arange(-(-ROPE_CONTEXTS * config.context_length // 128) * 128, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, kernels.ROPE_BASE ** (-channels / config.head_width))
    return angles.cos(), angles.sin()
