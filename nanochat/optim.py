"""Muon for the matrices of the blocks, AdamW for embedding and head; one process or many.

**Storage.** The optimizer owns the storage of weights and gradients. It collects parameters in groups: a `MatrixGroup` holds
the matrices of one shape, a `RowGroup` the rows of the embedding or of the head. A group has one buffer of weights and one of
gradients, and the model's parameters and their `.grad` become views of these buffers. Two further attributes of the model's
layers can be views of a group's buffers: `layer.copy` of a `Linear` layer, the weight in the compute dtype, and
`layer.gradient`, to which backward adds the weight's gradient. A group is therefore one batch for each kernel, and few messages
between ranks.

**A step.** The gradients are reduce-scattered in chunks: each rank receives the mean gradient of the items (matrices or rows)
that it owns. Inside of `exchanging` a chunk is on its way as soon as backward has passed the blocks that it belongs to; the others
follow in `synchronize`. The gradients are clipped by their global norm, which is known once all of them have arrived. Each rank
updates the items that it owns; their optimizer state, in float32, exists only on that rank. The new rows and then Muon's updates
are all-gathered while the next group is orthogonalized.

No part of a step waits for the host, and everything that changes from step to step is a tensor on the device. A whole step can
therefore be captured in a CUDA graph; with `graphs`, the work between exchanges is replayed from such graphs.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.gpt import GPT, Embedding, Linear
from nanochat.options.train import OptimizerOptions
from nanochat.parameter_groups import ADAM_BETAS, Group, MatrixGroup, RowGroup, Schedule
from nanochat.platform.cuda_graphs import Replayed
from nanochat_kernels import ranges

# torch 2.13 renamed it and warns at the old name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class MuonAdamW:
    """The optimizer of a GPT, whose parameters it moves into buffers of its own (see the top of this file).

    After the backward passes of a step, call `synchronize()` on every rank; it returns the global gradient norm, a float32
    scalar tensor. Then call `update(...)`. graphs: on CUDA with fused kernels, replay the work from CUDA graphs.
    alone: there is no other process, whatever torch.distributed says.
    Keller Jordan et al. 2024 (Muon), Loshchilov and Hutter 2019 (AdamW).
    """

    def __init__(
        self, model: GPT, options: OptimizerOptions | None = None, graphs: bool = True, alone: bool = False
    ):  # fmt: skip
        self.options = options or OptimizerOptions()
        self.impl = model.config.impl.optimizer
        self.steps = 0
        self.exchanged = (
            False  # whether `exchanging` has exchanged the gradients: each micro-step sets it, which may replay a graph
        )
        distributed = dist.is_initialized() and not alone
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        # bf16 halves the time of the products on a GPU; a CPU is no faster with it
        self.update_dtype = torch.bfloat16 if model.device.type in ("cuda", "meta") else torch.float32
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
        shifts = assign_matrices({shape: len(parameters) for shape, parameters in by_shape.items()}, self.world_size)
        ranks = self.rank, self.world_size
        return [
            MatrixGroup(f"muon-{m}x{n}", parameters, self.options.matrix_lr, shifts[m, n], ranks)
            for (m, n), parameters in sorted(by_shape.items())
        ]

    def _make_row_groups(self, model: GPT) -> list[RowGroup]:
        groups, width_scale = [], (model.config.width / 768) ** -0.5  # the learning rates are given for width 768
        for name, lr in (("embedding", self.options.embedding_lr), ("head", self.options.head_lr)):
            parameter, ranks = getattr(model, name).weight, (self.rank, self.world_size)
            groups.append(RowGroup(f"adamw-{name}", parameter, lr * width_scale, ranks, self.options.weight_decay))
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

    @contextmanager
    def exchanging(self, model: GPT) -> Iterator[None]:
        """Exchange the gradients while the block computes the last ones of a step; they have arrived when it ends.

        For one forward and backward pass with `keep_gradients`. In backward the gradient of a block's input comes after those of
        the block's weights, and that of the last block's result after the head's. With one process there is nothing to exchange.
        """
        if self.world_size == 1:
            yield
            return
        ready = defaultdict(list)  # number of a block → chunks that are complete after its backward
        block_of = {p: number for number, block in enumerate(model.blocks) for p in block.parameters()}
        for group in self.matrix_groups:
            for chunk in range(len(group.chunks)):
                first = max(0, chunk * self.world_size - group.shift)  # item, that of the lowest block
                ready[block_of[group.parameters[first]]].append((group, chunk))
        head = next(group for group in self.row_groups if group.parameters[0] is model.head.weight)

        def exchange_with_gradient_of(x: Tensor, chunks: list[tuple[Group, int]]) -> None:
            def exchange(_: Tensor) -> None:
                for group, chunk in chunks:
                    group.exchange(chunk)

            x.register_hook(exchange)

        hooks = [
            block.register_forward_pre_hook(
                lambda _, inputs, number=number: exchange_with_gradient_of(inputs[0], ready[number])
            )
            for number, block in enumerate(model.blocks)
        ]
        hooks.append(
            model.blocks[-1].register_forward_hook(
                lambda _, inputs, outputs: exchange_with_gradient_of(outputs[0], [(head, 0)])
            )
        )
        try:
            yield
            self._exchange_rest()
            for group in self.groups:
                group.arrive()
        finally:
            for hook in hooks:
                hook.remove()
            for group in self.groups:  # after an error: the next pass has other gradients
                group.exchanges.clear()

    def _exchange_rest(self) -> None:
        """Start to exchange the gradients that are not on their way."""
        for group in self.groups:
            for chunk in range(len(group.chunks)):
                group.exchange(chunk)

    @ranges.named("synchronize gradients")
    @torch.no_grad()
    def synchronize(self) -> Tensor:
        """Average the gradients over ranks, keep those of the owned items, and return the global norm, a float32 scalar."""
        for group in self.groups:
            group.collect()
        if self.world_size == 1:
            squares = self._global_square_sum()
        else:
            if not self.exchanged:
                self._exchange_rest()
            parts = []
            for group in self.groups:  # one group is summed while the next arrives
                group.arrive()
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
            for group, weights, works in rows:
                wait_for(works)
                group.set_weights(weights)
            for group, update, works in matrices:
                wait_for(works)
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

    def _gather(self, group: Group, part: Tensor) -> tuple[Tensor, list[dist.Work]]:
        """Start to gather the owned items of all ranks; returns the whole buffer and the work to wait for before it is read."""
        padded, full = part.new_zeros(group.reduced.shape), part.new_empty(group.chunks.shape)
        padded.flatten(0, 1)[group.owned_slots] = part
        works = [_all_gather(a.flatten(0, 1), b, async_op=True) for a, b in zip(full, padded, strict=True)]
        return full.view_as(group.weights), works

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


def wait_for(works: list[dist.Work]) -> None:
    """Wait for exchanges between ranks, or on a GPU let the work that follows wait."""
    for work in works:
        work.wait()


def assign_matrices(groups: dict[tuple[int, int], int], world_size: int) -> dict[tuple[int, int], int]:
    """Balance the matrices over ranks: shape → shift, so that rank r orthogonalizes the matrices i with (i + shift) mod
    world_size = r. groups: shape → number of matrices.

    The counts of two ranks differ by at most one, and the ranks from `shift` on have one more: neighbours with the least work so
    far. The work for a matrix is min(M, N)²·max(M, N), that of a product of Newton-Schulz.
    """
    load = [0] * world_size
    shifts = {}
    for (m, n), items in sorted(groups.items(), key=lambda item: (-(min(item[0]) ** 2) * max(item[0]), item[0])):
        rest = items % world_size  # so many ranks have one more
        shift = min(
            range(world_size - rest + 1 if rest else 1), key=lambda first: max(load[first : first + rest] or [0])
        )
        for i in range(items):
            load[(i + shift) % world_size] += min(m, n) ** 2 * max(m, n)
        shifts[m, n] = shift
    return shifts
