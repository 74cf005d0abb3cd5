"""Muon for the matrices of the blocks, AdamW for embedding and head; one process or many.

**Storage.** The optimizer owns the storage of weights and gradients. It collects parameters in groups: a `MatrixGroup` holds
the matrices of one shape, a `RowGroup` the rows of the embedding or of the head. A group has one buffer of weights and one of
gradients, and the model's parameters and their `.grad` become views of these buffers. Two further attributes of the model's
layers can be views of a group's buffers: `layer.copy` of a `Linear` layer, the weight in the compute dtype, and
`layer.gradient`, to which backward adds the weight's gradient. A group is therefore one batch for each kernel and one message
for each exchange between ranks.

**A step.** The gradient of each group is reduce-scattered: each rank receives the mean gradient of the items (matrices or rows)
that it owns. The gradients are clipped by their global norm, which is known once all of them have arrived. Each rank updates
the items that it owns; their optimizer state, in float32, exists only on that rank. The new rows and then Muon's updates are
all-gathered while the next group is orthogonalized.

No part of a step waits for the host, and everything that changes from step to step is a tensor on the device. A whole step can
therefore be captured in a CUDA graph; with `graphs`, the work between exchanges is replayed from such graphs.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

import nanochat_kernels as kernels
from nanochat.gpt import GPT, Embedding, Linear
from nanochat.options.train import OptimizerOptions
from nanochat.platform.cuda_graphs import Replayed
from nanochat_kernels import ranges

ADAM_BETAS, ADAM_EPS = (0.8, 0.95), 1e-10
NEWTON_SCHULZ_STEPS = 5  # each multiplies small singular values by 3.4445, all five by 485

# torch 2.13 renamed these and warns at the old names
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Schedule:
    """The factors that change from step to step: float32 tensors on the device, so that a captured graph reads new values."""

    clip: Tensor  # scalar: factor that brings the norm of the gradient to the limit or below
    rate: Tensor  # scalar: multiplier of all learning rates
    momentum: Tensor  # scalar: momentum of Muon
    biases: Tensor  # (2,): 1 − β₁ᵗ and 1 − β₂ᵗ of AdamW at step t

    @classmethod
    def on(cls, device: torch.device) -> "Schedule":
        values = torch.ones(5, device=device)
        return cls(values[0], values[1], values[2], values[3:])


class Group(ABC):
    """Parameters of one kind, as items of one shape in one buffer.

    Rank r owns `counts[r]` of the items. Every rank has equally many slots in the buffer, max(counts), because the collectives
    exchange equal parts; slots without an item stay zero.
    """

    state_names: tuple[str, ...]

    def __init__(
        self, name: str, parameters: list[Tensor], item_shape: torch.Size, lr: float, counts: list[int], rank: int
    ):
        self.name, self.parameters, self.item_shape, self.lr = name, parameters, item_shape, lr
        self.items, self.per_rank, self.owned = sum(counts), max(counts), counts[rank]
        self.first = sum(counts[:rank])  # number of this rank's first item
        self.owned_slots = slice(rank * self.per_rank, rank * self.per_rank + self.owned)
        self.slots = [r * self.per_rank + i for r, count in enumerate(counts) for i in range(count)]  # of each item
        size = (self.per_rank * len(counts), *item_shape)
        self.weights = torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device)
        self.gradients = torch.zeros_like(self.weights)
        # this rank's slots of the gradient after the exchange; with one rank, the gradient itself
        self.reduced = self.gradients if len(counts) == 1 else torch.zeros_like(self.weights[: self.per_rank])
        self.gradient_views = self.views(self.gradients)
        for parameter, view, gradient in zip(parameters, self.views(self.weights), self.gradient_views, strict=True):
            parameter.data = view.copy_(parameter.data)
            parameter.grad = gradient
        self.copies: Tensor | None = None
        self.gradients_in_place = False  # backward adds to the buffer of gradients and does not touch `.grad`
        self.state = {
            name: torch.zeros(self.owned, *item_shape, device=self.weights.device) for name in self.state_names
        }

    @abstractmethod
    def views(self, buffer: Tensor) -> list[Tensor]:
        """The view of a buffer that belongs to each parameter."""

    @property
    def owned_gradient(self) -> Tensor:
        """The mean gradient of the items that this rank owns, after the exchange."""
        return self.reduced[: self.owned]

    def keep_copies(self, layers: list[Linear], dtype: torch.dtype) -> None:
        """Give the layers a copy of their weights in the compute dtype, which every update renews."""
        self.copies = self.weights.to(dtype)
        for layer, view in zip(layers, self.views(self.copies), strict=True):
            layer.copy = view

    def keep_gradients(self, layers: list[Linear] | list[Embedding]) -> None:
        """Have the layers add their gradients to this group's buffer in backward, in float32, instead of returning them."""
        self.gradients_in_place = True
        for layer, view in zip(layers, self.gradient_views, strict=True):
            layer.gradient = view

    def set_weights(self, weights: Tensor) -> None:
        """Replace the weights, and their copies in the compute dtype."""
        if weights is not self.weights:
            self.weights.copy_(weights)
        if self.copies is not None:
            self.copies.copy_(weights)

    def collect(self) -> None:
        """Copy every gradient into the buffer that is not there already; a parameter without a gradient counts as zero."""
        for parameter, view in zip(self.parameters, self.gradient_views, strict=True):
            if parameter.grad is not None and parameter.grad.data_ptr() != view.data_ptr():
                view.copy_(parameter.grad)
            elif parameter.grad is None and not self.gradients_in_place:
                view.zero_()
            parameter.grad = view

    @abstractmethod
    def named_state(self) -> Iterator[tuple[str, Tensor, int | None]]:
        """The state that this rank holds, as (name, tensor, rows of the whole): None where the tensor is the whole."""


class MatrixGroup(Group):
    """The matrices of one shape, (n, M, N), which Muon updates. An item is a matrix."""

    state_names = ("momentum",)

    def __init__(self, name: str, parameters: list[Tensor], lr: float, counts: list[int], rank: int):
        super().__init__(name, parameters, parameters[0].shape, lr, counts, rank)

    def views(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[slot] for slot in self.slots]

    def direction(self, schedule: Schedule, dtype: torch.dtype, impl: str) -> Tensor:
        """Muon's update of the owned matrices, (owned, M, N): their Nesterov momentum, orthogonalized in `dtype`."""
        nesterov, squares = kernels.nesterov_momentum(
            self.owned_gradient, self.state["momentum"], schedule.clip, schedule.momentum, dtype, impl=impl
        )
        if impl == "reference":  # one matrix after the other, as Muon is usually written
            parts = [kernels.newton_schulz(x, NEWTON_SCHULZ_STEPS, impl=impl) for x in nesterov]
            return torch.stack(parts) if parts else nesterov
        return kernels.newton_schulz(nesterov, NEWTON_SCHULZ_STEPS, squares=squares, impl=impl)

    def apply(self, update: Tensor, schedule: Schedule, impl: str) -> None:
        """Subtract the updates (n, M, N) of all matrices, scaled by the learning rate."""
        # an orthogonal matrix with M > N scales the root mean square of its input by √(N/M), which the factor undoes
        factor = self.lr * math.sqrt(max(1, self.item_shape[0] / self.item_shape[1]))
        kernels.apply_update(self.weights, update.contiguous(), schedule.rate, factor, self.copies, impl=impl)

    def named_state(self) -> Iterator[tuple[str, Tensor, int | None]]:
        for name, tensor in self.state.items():
            for i, matrix in enumerate(tensor, self.first):
                yield f"{self.name}.{name}.{i}", matrix, None


class RowGroup(Group):
    """The rows of the embedding or of the head, (V, C), which AdamW updates. An item is a row."""

    state_names = ("mean", "variance")

    def __init__(self, name: str, parameter: Tensor, lr: float, counts: list[int], rank: int):
        super().__init__(name, [parameter], parameter.shape[1:], lr, counts, rank)

    def views(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[: self.items]]

    def update(self, schedule: Schedule, impl: str) -> Tensor:
        """Update the owned rows in place, and return them."""
        weights = self.weights[self.owned_slots]
        kernels.adamw(
            weights, self.owned_gradient, self.state["mean"], self.state["variance"], schedule.clip, schedule.rate,
            schedule.biases, self.lr, ADAM_BETAS, ADAM_EPS, None if self.copies is None else self.copies[self.owned_slots],
            impl=impl,
        )  # fmt: skip
        return weights

    def named_state(self) -> Iterator[tuple[str, Tensor, int | None]]:
        for name, tensor in self.state.items():
            yield f"{self.name}.{name}", tensor, self.items


class MuonAdamW:
    """The optimizer of a GPT, whose parameters it moves into buffers of its own (see the top of this file).

    After the backward passes of a step, call `synchronize()` on every rank; it returns the global gradient norm, a float32
    scalar tensor. Then call `update(...)`. graphs: on CUDA with fused kernels, replay the work from CUDA graphs.
    Keller Jordan et al. 2024 (Muon), Loshchilov and Hutter 2019 (AdamW).
    """

    def __init__(self, model: GPT, options: OptimizerOptions | None = None, graphs: bool = True):
        self.options = options or OptimizerOptions()
        self.impl = model.config.impl.optimizer
        self.steps = 0
        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        # bf16 halves the time of the products on a GPU; a CPU is no faster with it
        self.update_dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
        self.schedule = Schedule.on(model.device)
        self.matrix_groups = self._make_matrix_groups(model)
        self.row_groups = self._make_row_groups(model)
        self.groups: list[Group] = [*self.matrix_groups, *self.row_groups]
        for layer in model.modules():
            if isinstance(layer, Linear | Embedding):
                layer.gradient = None  # left by an optimizer that the model had before
        for group, layers in self._layers(model):
            if model.compute_dtype != torch.float32:
                group.keep_copies(layers, model.compute_dtype)
        graphs = graphs and model.device.type == "cuda" and self.impl != "reference"
        pool = torch.cuda.graph_pool_handle() if graphs else None
        self._global_square_sum = Replayed(self._square_norm, pool)
        self._row_updates = [Replayed(partial(g.update, self.schedule, self.impl), pool) for g in self.row_groups]
        self._directions = [
            Replayed(partial(g.direction, self.schedule, self.update_dtype, self.impl), pool)
            for g in self.matrix_groups
        ]
        self._update_on_one_rank = Replayed(self._update_all, pool)

    def _make_matrix_groups(self, model: GPT) -> list[MatrixGroup]:
        by_shape = defaultdict(list)
        for parameter in model.blocks.parameters():
            by_shape[tuple(parameter.shape)].append(parameter)
        counts = assign_matrices({shape: len(parameters) for shape, parameters in by_shape.items()}, self.world_size)
        return [
            MatrixGroup(f"muon-{m}x{n}", parameters, self.options.matrix_lr, counts[m, n], self.rank)
            for (m, n), parameters in sorted(by_shape.items())
        ]

    def _make_row_groups(self, model: GPT) -> list[RowGroup]:
        groups, width_scale = [], (model.config.width / 768) ** -0.5  # the learning rates are given for width 768
        for name, lr in (("embedding", self.options.embedding_lr), ("head", self.options.head_lr)):
            parameter = getattr(model, name).weight
            rows = -(-parameter.size(0) // self.world_size)  # equal runs, so that a rank's rows are contiguous
            counts = [min(rows, max(0, parameter.size(0) - r * rows)) for r in range(self.world_size)]
            groups.append(RowGroup(f"adamw-{name}", parameter, lr * width_scale, counts, self.rank))
        return groups

    def _layers(self, model: GPT) -> Iterator[tuple[Group, list[Linear]]]:
        """The groups of `Linear` layers, each with its layers."""
        layers = {layer.weight: layer for layer in model.modules() if isinstance(layer, Linear)}
        for group in self.groups:
            if group.parameters[0] in layers:
                yield group, [layers[parameter] for parameter in group.parameters]

    def keep_gradients(self, model: GPT) -> None:
        """From now on, have the model's backward add all gradients to the groups' buffers, in float32 and in place.

        This saves autograd's own pass over them. For code that calls backward once for each forward, as training does.
        """
        for group, layers in self._layers(model):
            group.keep_gradients(layers)
        embedding = next(group for group in self.row_groups if group.parameters[0] is model.embedding.weight)
        embedding.keep_gradients([model.embedding])

    @ranges.named("synchronize gradients")
    @torch.no_grad()
    def synchronize(self) -> Tensor:
        """Average the gradients over ranks, keep those of the owned items, and return the global norm, a float32 scalar."""
        for group in self.groups:
            group.collect()
        if self.world_size == 1:
            squares = self._global_square_sum()
        else:
            pending = [
                _reduce_scatter(group.reduced, group.gradients, op=dist.ReduceOp.AVG, async_op=True)
                for group in self.groups
            ]
            parts = []
            for group, work in zip(self.groups, pending, strict=True):  # one group is summed while the next arrives
                work.wait()
                parts.append(square_sum(group.owned_gradient))
            squares = torch.stack(parts).sum()
            dist.all_reduce(squares)
        norm = squares.sqrt()
        if self.options.grad_clip > 0:
            self.schedule.clip.copy_((self.options.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _square_norm(self) -> Tensor:
        return torch.stack([square_sum(group.reduced) for group in self.groups]).sum()

    @ranges.named("update weights")
    @torch.no_grad()
    def update(self, lr_multiplier: float, momentum: float) -> None:
        """Update the weights with the synchronized gradient, then set the gradient to zero."""
        self.begin_step(lr_multiplier, momentum)
        self.update_weights()

    def begin_step(self, lr_multiplier: float, momentum: float) -> None:
        """Write the schedule of the step to the device, outside of any graph that `update_weights` is captured in."""
        self.steps += 1
        self.schedule.rate.fill_(lr_multiplier)
        self.schedule.momentum.fill_(momentum)
        for bias, beta in zip(self.schedule.biases, ADAM_BETAS, strict=True):
            bias.fill_(1 - beta**self.steps)

    @torch.no_grad()
    def update_weights(self) -> None:
        """The part of `update` that can be captured in a CUDA graph: everything after `begin_step`."""
        if self.world_size == 1:
            self._update_on_one_rank()
        else:
            # the rows are updated quickly: they are exchanged while the matrices are orthogonalized
            rows = [
                (g, *self._gather(g, update())) for g, update in zip(self.row_groups, self._row_updates, strict=True)
            ]
            matrices = [
                (g, *self._gather(g, direction()))
                for g, direction in zip(self.matrix_groups, self._directions, strict=True)
            ]
            for group, weights, work in rows:
                work.wait()
                group.set_weights(weights)
            for group, update, work in matrices:
                work.wait()
                group.apply(update, self.schedule, self.impl)
        for group in self.groups:
            group.gradients.zero_()

    @torch.no_grad()
    def refresh(self) -> None:
        """Renew the copies in the compute dtype, after something other than a step has changed the weights."""
        for group in self.groups:
            group.set_weights(group.weights)

    def _update_all(self) -> None:
        for group in self.matrix_groups:
            group.apply(group.direction(self.schedule, self.update_dtype, self.impl), self.schedule, self.impl)
        for group in self.row_groups:
            group.update(self.schedule, self.impl)

    def _gather(self, group: Group, part: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to gather the parts of all ranks; returns the whole buffer and the work to wait for before it is read."""
        padded = part.new_zeros(group.per_rank, *group.item_shape)
        padded[: group.owned] = part
        full = part.new_empty(group.weights.shape)
        return full, _all_gather(full, padded, async_op=True)

    def named_state(self) -> Iterator[tuple[str, Tensor, int | None]]:
        """The state that this rank holds, as (name, tensor, rows of the whole), for a checkpoint.

        The momentum of a matrix is whole, which None says; of an embedding's state, the tensor has the rows that the rank owns.
        """
        for group in self.groups:
            yield from group.named_state()


def square_sum(x: Tensor) -> Tensor:
    """The sum of squares of all elements, a scalar."""
    if x.device.type == "cuda":
        return torch.linalg.vector_norm(x).square()  # reads x once, where square and sum write and read a second tensor
    return x.square().sum()  # on a CPU torch sums pairwise here, which is more accurate than its norm


def assign_matrices(groups: dict[tuple[int, int], int], world_size: int) -> dict[tuple[int, int], list[int]]:
    """Balance the matrices over ranks: shape → how many of them each rank orthogonalizes. groups: shape → number of matrices.

    The counts of two ranks differ by at most one; the ranks with the least work so far take one more. The work for a matrix is
    min(M, N)²·max(M, N), that of a product of Newton-Schulz.
    """
    load = [0] * world_size
    counts = {}
    for (m, n), items in sorted(groups.items(), key=lambda item: (-(min(item[0]) ** 2) * max(item[0]), item[0])):
        base, remaining = divmod(items, world_size)
        least_loaded = sorted(range(world_size), key=lambda r: (load[r], r))[:remaining]
        counts[m, n] = [base + (r in least_loaded) for r in range(world_size)]
        load = [before + count * min(m, n) ** 2 * max(m, n) for before, count in zip(load, counts[m, n], strict=True)]
    return counts
