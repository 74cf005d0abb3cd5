"""The ways to run a training step that `python -m bench train` compares, each as EXECUTION:IMPL or by a name that stands for it.

EXECUTION is graph, compile or eager, as in training, or a mode of torch.compile such as max-autotune. IMPL is the implementation of
every operation, and others for some may follow: graph:auto,attention=cudnn. Two of these are not the program's own:
    linear_cross_entropy=liger   the loss of Liger-Kernel, after the (compiled) model
    optimizer=compiled           the plain formulas, compiled on batches of all matrices of a shape; on a GPU replayed from a graph
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

import nanochat_kernels as kernels
from nanochat.data.batches import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.model import Implementations
from nanochat.parameter_groups import ADAM_BETAS, ADAM_EPS, MatrixGroup, RowGroup
from nanochat.platform.cuda_graphs import Replayed
from nanochat.platform.errors import UserError
from nanochat.train.micro_step import MicroStep
from nanochat.train.timing import trained_model
from nanochat_kernels import reference

NAMES = {
    "fused": "graph:auto",
    "plain": "eager:reference",
    "compiled": "compile:reference,optimizer=compiled",
    "peers": "compile:reference,self_attention=parts,attention=cudnn,linear_cross_entropy=liger,optimizer=compiled",
    "max-autotune": "max-autotune:reference,optimizer=compiled",
}
EXECUTIONS = ("graph", "compile", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile
OPTIONS = tuple(field.name for field in fields(Implementations))
RATE, MOMENTUM = 1e-3, 0.95  # a learning rate that leaves the weights random


@dataclass(frozen=True)
class Variant:
    """What a variant's text says."""

    execution: str
    impl: Implementations
    liger_loss: bool = False
    compiled_optimizer: bool = False


def parse(text: str) -> Variant:
    """Return the variant that a name or EXECUTION:IMPL[,OPERATION=IMPL]… stands for. Raises UserError if it is none."""
    execution, _, impl = NAMES.get(text, text).partition(":")
    if execution not in (*EXECUTIONS, *MODES) or not impl:
        names = ", ".join(NAMES)
        raise UserError(
            f"{text} is no variant; name one of {names}, or EXECUTION:IMPL with one of {', '.join((*EXECUTIONS, *MODES))}, "
            "such as graph:auto,attention=cudnn"
        )
    of_all, *others = impl.split(",")
    chosen = dict.fromkeys(OPTIONS, of_all)
    for other in others:
        operation, _, of_operation = other.partition("=")
        if operation not in OPTIONS or not of_operation:
            raise UserError(f"{text}: {other} is not OPERATION=IMPL with one of {', '.join(OPTIONS)}")
        chosen[operation] = of_operation
    liger = chosen["linear_cross_entropy"] == "liger"
    compiled = chosen["optimizer"] == "compiled"
    if liger and execution == "graph":
        raise UserError(
            f"{text}: Liger-Kernel's loss cannot be captured in a graph; name compile or eager as the execution"
        )
    plain = {"linear_cross_entropy": liger, "optimizer": compiled}
    chosen |= {operation: "reference" for operation, replaced in plain.items() if replaced}
    return Variant(execution, Implementations(**chosen), liger, compiled)


def ablations(base: str = "fused") -> list[str]:
    """Return a variant, and for each operation the variant in which that one alone is its reference."""
    return [base, *(f"{NAMES.get(base, base)},{option}=reference" for option in OPTIONS)]


class PlainOptimizer:
    """The reference formulas on the groups of an optimizer, each group compiled as one batch, replayed from a graph on a GPU.

    A call is `synchronize` and `update` of MuonAdamW on one process.
    """

    def __init__(self, optimizer: MuonAdamW, replay: bool = True):
        self.optimizer = optimizer
        self.muon, self.adamw = (torch.compile(f, dynamic=False) for f in (self._muon, self._adamw))
        replay = replay and optimizer.groups[0].weights.is_cuda
        self.work = Replayed(self._step, torch.cuda.graph_pool_handle() if replay else None, warm_up=3)

    def _muon(self, group: MatrixGroup, clip, momentum, rate) -> None:
        direction, _ = reference.nesterov_momentum(
            group.gradients, group.state["momentum"], clip, momentum, self.optimizer.update_dtype
        )
        factor = group.lr * math.sqrt(max(1, group.item_shape[0] / group.item_shape[1]))
        reference.apply_update(group.weights, reference.newton_schulz(direction), rate, factor, group.copies)

    def _adamw(self, group: RowGroup, clip, rate, biases) -> None:
        reference.adamw(
            group.weights, group.gradients, group.state["mean"], group.state["variance"], clip, rate, biases,
            group.lr, ADAM_BETAS, ADAM_EPS, group.copies,
        )  # fmt: skip

    @torch.no_grad()
    def _step(self) -> None:
        optimizer, schedule = self.optimizer, self.optimizer.schedule
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.gradients) for g in optimizer.groups]))
        schedule.clip.copy_((optimizer.options.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        for group in optimizer.matrix_groups:
            self.muon(group, schedule.clip, schedule.momentum, schedule.rate)
        for group in optimizer.row_groups:
            self.adamw(group, schedule.clip, schedule.rate, schedule.biases)
        for group in optimizer.groups:
            group.gradients.zero_()

    def __call__(self, rate: float, momentum: float) -> None:
        for group in self.optimizer.groups:
            group.collect()
        self.optimizer.begin_step(rate, momentum)
        self.work()


class Training:
    """A variant, ready to train: its model with random weights, which are not zero, its micro-step and its optimizer.

    replay: whether CUDA graphs are replayed, as in training, or their work is launched each time.
    """

    def __init__(self, text: str, shape: GPTConfig, device: torch.device, dtype: torch.dtype, replay: bool = True):
        variant = parse(text)
        self.model = trained_model(replace(shape, impl=variant.impl), device, dtype)
        self.optimizer = MuonAdamW(self.model, graphs=replay)
        if variant.compiled_optimizer and self.optimizer.world_size > 1:
            raise UserError(
                f"{text}: optimizer=compiled is for one process, and there are {self.optimizer.world_size}; name compile:reference, "
                "whose optimizer shares its work among processes"
            )
        own = variant.execution in EXECUTIONS
        execution = variant.execution if own and not variant.liger_loss else "eager"
        self.micro_step = MicroStep(self.model, self.optimizer, execution, one_length=True)
        if not replay:
            self.micro_step.pool = None
        compiled = partial(torch.compile, dynamic=False, mode=None if own else variant.execution)
        if variant.liger_loss:
            hidden = self.model.hidden if variant.execution == "eager" else compiled(self.model.hidden)
            self.micro_step.forward = partial(liger_loss, liger(), self.model, hidden)
        elif not own:
            self.micro_step.forward = compiled(self.model)
        self.plain = PlainOptimizer(self.optimizer, replay) if variant.compiled_optimizer else None

    def step(self, batch: Batch, micro_steps: int) -> None:
        """A whole step, which waits for the loss before it changes the weights, as training does."""
        self.micro_step.loss.zero_()
        for number in range(micro_steps):
            self.micro_step(batch, 1 / micro_steps, last=number + 1 == micro_steps)
        self.update(wait=True)

    def update(self, wait: bool = False) -> None:
        """All that follows the last micro-step of a step."""
        loss = self.micro_step.loss
        if self.plain:
            if wait:
                loss.item()
            self.plain(RATE, MOMENTUM)
            return
        norm = self.optimizer.synchronize()
        if wait:
            torch.stack([loss, norm]).tolist()
        self.optimizer.update(RATE, MOMENTUM)

    def fill_gradients(self) -> None:
        """Put random numbers in place of the gradients, with which an update takes as long as in training."""
        for group in self.optimizer.groups:
            group.gradients.normal_(std=1e-3)


def liger() -> Callable:
    """Return Liger-Kernel's product and cross entropy. Raises UserError if the package is missing."""
    found = kernels.operations()["linear_cross_entropy"].benchmark.baselines["liger"]()
    if found is None:
        raise UserError("liger_kernel is not installed; install it with: pip install -e '.[peers]'")
    return found


def liger_loss(loss: Callable, model: GPT, hidden: Callable, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of tokens and targets (B, T), from the hidden states of a model."""
    x = hidden(tokens).flatten(0, 1)
    weight = model.head.operands(x.dtype)[0]
    return loss(x, weight, targets.flatten(), kernels.SOFTCAP, -1, "mean", 1.0)
