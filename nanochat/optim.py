"""Muon for the matrices of the blocks, AdamW for embedding and head; one process or many.

Parameters are gathered in groups whose items can be dealt out to ranks: the matrices of one shape (an item is a matrix),
or the rows of an embedding (an item is a row). A step reduce-scatters each group's gradient, so that a rank holds the
mean gradient of the items it owns, clips by the global norm, updates its items with optimizer state that exists only
there, and all-gathers the updates, which every rank subtracts from its weights. State is float32.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import kernels
from nanochat.gpt import GPT

# torch 2.13 renamed these and warns at the old names
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates of the three kinds of weights and the gradient's limit."""

    matrix_lr: float = 0.02
    """learning rate of Muon, for the matrices of the blocks"""
    embedding_lr: float = 0.2
    """learning rate of AdamW for the embedding, at width 768 (scaled by (width/768)^-1/2)"""
    head_lr: float = 0.004
    """learning rate of AdamW for the head, at width 768 (scaled by (width/768)^-1/2)"""
    grad_clip: float = 1.0
    """largest global norm of the gradient; 0 leaves it as it is"""


class Group:
    """Parameters updated alike, cut into items that are dealt out to ranks in equal runs (the last may be shorter)."""

    def __init__(self, name: str, parameters: list[Tensor], lr: float, rank: int, world_size: int):
        self.name, self.parameters, self.lr = name, parameters, lr
        self.stacked = name.startswith("muon")
        self.item_shape = parameters[0].shape if self.stacked else parameters[0].shape[1:]
        self.items = len(parameters) if self.stacked else parameters[0].size(0)
        self.per_rank = -(-self.items // world_size)
        self.first = min(rank * self.per_rank, self.items)
        self.owned = min(self.first + self.per_rank, self.items) - self.first
        self.padded = self.per_rank * world_size
        self.state: dict[str, Tensor] = {}
        self.gradient: Tensor | None = None  # (owned, *item_shape), between synchronize and update

    def full_gradient(self) -> Tensor:
        """(padded, *item_shape) float32; a parameter without a gradient counts as zero."""
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        full = torch.stack(grads) if self.stacked else grads[0]
        if self.padded > self.items:
            full = torch.cat([full, full.new_zeros(self.padded - self.items, *self.item_shape)])
        return full.contiguous()

    def apply(self, update: Tensor) -> None:
        """Subtract an update (≥ items, *item_shape) from the weights."""
        if self.stacked:
            for parameter, part in zip(self.parameters, update, strict=False):
                parameter.sub_(part)
        else:
            self.parameters[0].sub_(update[: self.items])


class MuonAdamW:
    """The optimizer of a GPT.

    Call `synchronize()` after the backward pass of a step (on every rank; it returns the global gradient norm, a
    float32 scalar tensor), then `update(...)`. Keller Jordan et al. 2024 (Muon), Loshchilov and Hutter 2019 (AdamW).
    """

    ADAM_BETAS, ADAM_EPS, NEWTON_SCHULZ_STEPS = (0.8, 0.95), 1e-10, 5

    def __init__(self, model: GPT, config: OptimizerConfig | None = None):
        self.config = config or OptimizerConfig()
        self.impl = model.config.impl.newton_schulz
        self.steps = 0
        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        # bf16 halves the products on a GPU; a CPU is no faster with it
        self.update_dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
        by_shape = defaultdict(list)
        for parameter in model.blocks.parameters():
            by_shape[tuple(parameter.shape)].append(parameter)
        width_scale = (model.config.width / 768) ** -0.5
        deal = {"rank": self.rank, "world_size": self.world_size}
        self.groups = [
            Group(f"muon-{m}x{n}", parameters, self.config.matrix_lr, **deal)
            for (m, n), parameters in sorted(by_shape.items())
        ]
        for name, lr in (("embedding", self.config.embedding_lr), ("head", self.config.head_lr)):
            parameter = getattr(model, name).weight
            self.groups.append(Group(f"adamw-{name}", [parameter], lr * width_scale, **deal))
        for group in self.groups:
            names = ("momentum",) if group.stacked else ("mean", "variance")
            shape = (group.owned, *group.item_shape)
            group.state = {n: torch.zeros(shape, device=model.device) for n in names}

    @torch.no_grad()
    def synchronize(self) -> Tensor:
        """Average the gradient over ranks, keep the owned share of it, and return its global norm."""
        pending = []
        for group in self.groups:
            full = group.full_gradient()
            if self.world_size == 1:
                group.gradient = full
                continue
            share = full.new_empty(group.per_rank, *group.item_shape)
            pending.append(_reduce_scatter(share, full, op=dist.ReduceOp.AVG, async_op=True))
            group.gradient = share[: group.owned]
        for work in pending:
            work.wait()
        squares = torch.stack([group.gradient.float().square().sum() for group in self.groups]).sum()
        if self.world_size > 1:
            dist.all_reduce(squares)
        self.norm = squares.sqrt()
        return self.norm

    @torch.no_grad()
    def update(self, lr_multiplier: float, momentum: float) -> None:
        """Move the weights by the synchronised gradient and forget it."""
        self.steps += 1
        clip = (self.config.grad_clip / (self.norm + 1e-6)).clamp(max=1.0) if self.config.grad_clip > 0 else None
        gathers = []
        for group in self.groups:
            gradient = group.gradient if clip is None else group.gradient.mul_(clip)
            update = self._muon(group, gradient, momentum) if group.stacked else self._adamw(group, gradient)
            gathers.append(self._gather(group, update))
            group.gradient = None
        for group, (update, work) in zip(self.groups, gathers, strict=True):
            if work is not None:
                work.wait()
            scale = math.sqrt(max(1, group.item_shape[0] / group.item_shape[1])) if group.stacked else 1.0
            group.apply(update.mul_(group.lr * lr_multiplier * scale))
            for parameter in group.parameters:
                parameter.grad = None

    def _gather(self, group: Group, update: Tensor) -> tuple[Tensor, dist.Work | None]:
        if self.world_size == 1:
            return update, None
        if group.owned < group.per_rank:
            update = torch.cat([update, update.new_zeros(group.per_rank - group.owned, *group.item_shape)])
        full = update.new_empty(group.padded, *group.item_shape)
        return full, _all_gather(full, update.contiguous(), async_op=True)

    def _muon(self, group: Group, gradient: Tensor, momentum: float) -> Tensor:
        buffer = group.state["momentum"]
        buffer.lerp_(gradient, 1 - momentum)
        nesterov = gradient.lerp(buffer, momentum).to(self.update_dtype)
        return kernels.newton_schulz(nesterov, self.NEWTON_SCHULZ_STEPS, impl=self.impl).contiguous()

    def _adamw(self, group: Group, gradient: Tensor) -> Tensor:
        mean, variance = group.state["mean"], group.state["variance"]
        beta1, beta2 = self.ADAM_BETAS
        mean.lerp_(gradient, 1 - beta1)
        variance.lerp_(gradient.square(), 1 - beta2)
        bias1, bias2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        return (mean / bias1) / ((variance / bias2).sqrt() + self.ADAM_EPS)

    def named_state(self) -> Iterator[tuple[str, Tensor, int, int]]:
        """(name, owned share, first owned item, number of items) of every state tensor, for a checkpoint."""
        for group in self.groups:
            for name, tensor in group.state.items():
                yield f"{group.name}.{name}", tensor, group.first, group.items


def muon_momentum(step: int) -> float:
    """0.85 rising to 0.95 over the first 300 steps."""
    return 0.85 + 0.1 * min(step / 300, 1.0)
