"""The options of `nanochat train base|mid|sft|rl`: the model and its data, the optimizer, and how the stage runs."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from nanochat.options.model import LONGEST_CONTEXT, Implementations, Recompute
from nanochat.options.presets import PresetOptions
from nanochat.options.ranges import AnyInteger, AtLeast, Between, OrNegative, SomeOrAll

Every = OrNegative(meaning="never")  # 0: only at the end
Execution = Literal["auto", "graph", "compile", "eager"]
SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


@dataclass(frozen=True)
class OptimizerOptions:
    """Learning rates of the three kinds of weights, weight decay, and the limit of the gradient norm."""

    matrix_lr: Annotated[float, AtLeast(0)] = 0.02
    """learning rate of Muon, for the matrices of the blocks"""
    embedding_lr: Annotated[float, AtLeast(0)] = 0.2
    """learning rate of AdamW for the embedding, at width 768 (scaled by (width/768)^-1/2)"""
    head_lr: Annotated[float, AtLeast(0)] = 0.004
    """learning rate of AdamW for the head, at width 768 (scaled by (width/768)^-1/2)"""
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    """weight decay of AdamW: a step shrinks embedding and head by this share of their learning rate"""
    grad_clip: Annotated[float, AtLeast(0)] = 1.0
    """maximum global norm of the gradient; 0 does not clip"""


@dataclass(frozen=True)
class RunOptions:
    """How a training stage runs. None of these options changes what is learned."""

    device: str = "auto"
    """auto (cuda if available, else cpu), cuda, cpu or mps"""
    execution: Execution = "auto"
    """how a micro-step runs: graph (replayed from a CUDA graph), compile (torch.compile) or eager. auto: on CUDA the one that
    `kernels gate` measured to be faster; without a gate file, graph if all operations are fused, else compile; elsewhere eager"""
    recompute: tuple[Recompute, ...] = ()
    """parts of each block that backward computes again in place of keeping them, for less memory: attention, mlp or both"""
    save_every: Annotated[int, AtLeast(0)] = 1000
    """steps between checkpoints; 0 saves only at the end and on a signal"""
    keep_checkpoints: Annotated[int, AtLeast(1)] = 2
    """number of newest checkpoints to keep"""
    deterministic: bool = False
    """on CUDA, use only operations that repeat bit for bit, Triton's attention among them, which may be slower; a CPU always repeats"""
    loader_threads: Annotated[int, Between(1, 1024)] = 4
    """threads that tokenise"""
    nvtx: bool = False
    """record the stage, steps, micro-steps, layers, operations and phases of the optimizer as NVTX ranges, for `nsys profile`"""
    wandb_run: str = ""
    """name of a wandb run; empty: none"""
    wandb_mode: Literal["offline", "online"] = "offline"
    """where its metrics go: to files that are sent later, or to the server"""


@dataclass(frozen=True)
class TrainOptions(PresetOptions):
    """The options that all training stages share."""

    optimizer: Annotated[OptimizerOptions, tyro.conf.arg(name="")] = field(default_factory=OptimizerOptions)
    impl: Implementations = field(default_factory=Implementations)
    run: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)

    @property
    def device(self) -> str:
        return self.run.device


@dataclass(frozen=True)
class TrainBaseOptions(TrainOptions):
    """Pretrain a model on text."""

    depth: Annotated[int, Between(1, 1000)] = 20
    """number of blocks; the width is 64 times as large"""
    context_length: Annotated[int, Between(1, LONGEST_CONTEXT)] = 2048
    """tokens per row"""
    n_kv_head: Annotated[int | None, Between(1, 1000)] = None
    """key/value heads; by default as many as query heads"""
    num_iterations: Annotated[int, OrNegative(meaning="not set")] = -1
    """training steps; the first positive one of num_iterations, target_flops and target_param_data_ratio sets their number"""
    target_flops: Annotated[float, OrNegative(meaning="not set")] = -1.0
    """FLOPs of the whole training stage"""
    target_param_data_ratio: Annotated[float, OrNegative(meaning="not set")] = 20.0
    """tokens to train on per parameter of the model"""
    device_batch_size: Annotated[int, Between(0, 1_000_000)] = 0
    """rows per micro-batch and process; 0: as many as fit into the GPU's memory, at most 32, or on resuming those of before. A number
    of the preset is the largest, and processes that share a step may take fewer"""
    total_batch_size: Annotated[int, AtLeast(1)] = 524288
    """tokens per step, over all processes and accumulation; in place of a preset's, the nearest number that the processes can share"""
    warmup_ratio: Annotated[float, Between(0, 1)] = 0.0
    """share of training at the beginning over which the learning rate rises from 0"""
    warmdown_ratio: Annotated[float, Between(0, 1)] = 0.2
    """share of training at the end over which the learning rate falls"""
    final_lr_fraction: Annotated[float, AtLeast(0)] = 0.0
    """learning rate at the end, as a share of the optimizer's"""
    eval_every: Annotated[int, Every] = 250
    """steps between measurements of validation bits per byte; 0: only at the end"""
    eval_tokens: Annotated[int, AtLeast(1)] = 20 * 524288
    """tokens for each of these measurements"""
    core_metric_every: Annotated[int, Every] = 2000
    """steps between evaluations of CORE; 0: only at the end"""
    core_metric_max_per_task: Annotated[int, SomeOrAll()] = 500
    """maximum number of items of each CORE task"""
    sample_every: Annotated[int, Every] = 2000
    """steps between samples of text; 0: only at the end"""
    sample_prompts: tuple[str, ...] = SAMPLE_PROMPTS
    """texts for the samples to continue"""
    seed: Annotated[int, AnyInteger()] = 42
    """seed of the initial weights"""


Unclipped = Annotated[OptimizerOptions, tyro.conf.arg(name="")]  # only base clips the gradient by default


@dataclass(frozen=True)
class TrainMidOptions(TrainOptions):
    """Midtrain the base model on conversations."""

    optimizer: Unclipped = field(default_factory=lambda: OptimizerOptions(grad_clip=0.0))
    device_batch_size: Annotated[int, Between(0, 1_000_000)] = 0
    """rows per micro-batch and process; 0: as many as fit into the GPU's memory, at most 32, or on resuming those of before. A number
    of the preset is the largest, and processes that share a step may take fewer"""
    total_batch_size: Annotated[int, AtLeast(1)] = 524288
    """tokens per step, over all processes and accumulation; in place of a preset's, the nearest number that the processes can share"""
    smoltalk: Annotated[int, OrNegative()] = -1
    """general conversations"""
    mmlu: Annotated[int, OrNegative()] = -1
    """multiple-choice questions"""
    gsm8k: Annotated[int, OrNegative()] = -1
    """word problems"""
    identity_repeats: Annotated[int, AtLeast(0)] = 2
    """number of times that the identity conversations are used"""
    simple_spelling: Annotated[int, AtLeast(0)] = 200_000
    """words to spell"""
    spelling_bee: Annotated[int, AtLeast(0)] = 80_000
    """letters to count"""
    custom_json: tuple[str, ...] = ()
    """files of further conversations, a JSON array of messages on each line; a file that is given twice is used twice"""
    num_iterations: Annotated[int, OrNegative(meaning="one epoch")] = -1
    """training steps at most"""
    init_lr_fraction: Annotated[float, AtLeast(0)] = 1.0
    """learning rate at the start, as a share of the optimizer's"""
    warmdown_ratio: Annotated[float, Between(0, 1)] = 0.2
    """share of training at the end over which the learning rate falls to 0"""
    eval_every: Annotated[int, Every] = 150
    """steps between measurements of bits per byte on held-out conversations; 0: only at the end"""
    eval_rows: Annotated[int, OrNegative()] = -1
    """held-out general conversations for each of these measurements, beside questions and word problems"""


@dataclass(frozen=True)
class TrainSftOptions(TrainOptions):
    """Fine-tune the midtrained model, or the base model, on conversations."""

    source: Literal["base", "mid"] = "mid"
    """training stage whose newest checkpoint training begins with"""
    optimizer: Unclipped = field(default_factory=lambda: OptimizerOptions(grad_clip=0.0))
    device_batch_size: Annotated[int, Between(1, 1_000_000)] = 4
    """conversations per micro-batch and process; a preset's number is the largest, and processes that share a step may take fewer"""
    examples_per_step: Annotated[int, AtLeast(1)] = 32
    """conversations per step, over all processes and accumulation; in place of a preset's, the nearest number that the processes can
    share"""
    arc_easy: Annotated[int, OrNegative()] = -1
    """easy multiple-choice questions"""
    arc_challenge: Annotated[int, OrNegative()] = -1
    """hard multiple-choice questions"""
    mmlu: Annotated[int, OrNegative()] = 0
    """further multiple-choice questions"""
    gsm8k: Annotated[int, OrNegative()] = -1
    """word problems"""
    smoltalk: Annotated[int, OrNegative()] = 10_000
    """general conversations"""
    identity: Annotated[int, OrNegative()] = 1000
    """conversations about the model itself"""
    simple_spelling: Annotated[int, AtLeast(0)] = 300
    """words to spell"""
    spelling_bee: Annotated[int, AtLeast(0)] = 300
    """letters to count"""
    custom_json: tuple[str, ...] = ()
    """files of further conversations, a JSON array of messages on each line; a file that is given twice is used twice"""
    num_epochs: Annotated[int, AtLeast(1)] = 1
    """number of times that each conversation is used, all in one shuffled order"""
    num_iterations: Annotated[int, OrNegative(meaning="all epochs")] = -1
    """training steps at most"""
    init_lr_fraction: Annotated[float, AtLeast(0)] = 0.02
    """learning rate at the start, as a share of the optimizer's; it falls linearly to 0"""
    eval_every: Annotated[int, Every] = 100
    """steps between measurements of the loss on held-out general conversations; 0: only at the end"""
    eval_rows: Annotated[int, OrNegative()] = 3200
    """conversations for each of these measurements"""
    chat_metric_every: Annotated[int, Every] = 200
    """steps between measurements of accuracy in multiple choice (ARC-Easy, MMLU); 0: only at the end"""
    chat_metric_max_per_task: Annotated[int, SomeOrAll()] = 1024
    """maximum number of items of each of these tasks"""


@dataclass(frozen=True)
class TrainRlOptions(TrainOptions):
    """Train a chat model with reinforcement learning on GSM8K: it answers word problems, and what led to right answers becomes
    likelier."""

    source: Literal["mid", "sft"] = "sft"
    """training stage whose newest checkpoint training begins with"""
    optimizer: Unclipped = field(default_factory=lambda: OptimizerOptions(grad_clip=0.0))
    device_batch_size: Annotated[int, Between(1, 1_000_000)] = 8
    """answers per micro-batch and process"""
    examples_per_step: Annotated[int, AtLeast(1)] = 16
    """questions per step, over all processes; in place of a preset's, the nearest number that the processes can share"""
    gsm8k: Annotated[int, OrNegative()] = -1
    """questions"""
    num_samples: Annotated[int, AtLeast(2)] = 16
    """answers to each question, whose mean reward is the baseline"""
    sample_rows: Annotated[int, Between(1, 1_000_000)] = 256
    """answers that a process generates at the same time, each with a cache for its prompt and itself"""
    max_tokens: Annotated[int, AtLeast(1)] = 256
    """maximum number of tokens in an answer"""
    temperature: Annotated[float, AtLeast(0)] = 1.0
    """temperature of the sampling, above 0; at 1 answers come from the distribution that is trained, but for the tail that top-k cuts
    off"""
    top_k: Annotated[int, AtLeast(1)] = 50
    """sample from this many of the most likely tokens, more than 1"""
    num_epochs: Annotated[int, AtLeast(1)] = 1
    """number of times that each question is asked"""
    init_lr_fraction: Annotated[float, AtLeast(0)] = 0.05
    """learning rate at the start, as a share of the optimizer's; it falls linearly to 0"""
    eval_every: Annotated[int, Every] = 60
    """steps between measurements of pass@k on the test split: the share of questions that k answers solve; 0: only at the end"""
    eval_examples: Annotated[int, SomeOrAll()] = 400
    """questions for each of these measurements"""
    eval_samples: Annotated[int, AtLeast(1)] = 8
    """answers to each of these questions, and the largest k"""
    seed: Annotated[int, AnyInteger()] = 42
    """seed of the answers"""
