"""Predicts the GPU memory of a training run from its sizes, and chooses the micro-batch that fits.

    static       weights, gradients and optimizer state in float32, and the matrices once more in the compute dtype
    saved        what forward keeps for backward, up to the loss: for each block and each token
                     x, queries, keys and values, attention's output, x again after attention, h = relu(z)²
                 in the compute dtype, and one float32 factor for each row and head; `recompute` leaves parts of it out
    working      what lives beside it at the worst moment: the head's chunk of exponentials, or a block's gradients
    update       the buffers of Newton-Schulz, or with several processes those of the exchange
    evaluation   a forward pass that keeps nothing

Graphs keep their memory: that of the micro-step (saved and working) and of the update is not free in an evaluation. The sum of all
is therefore what PyTorch's allocator reserves; other executions need less. bench/memory.py compares it with measurements.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

from nanochat.gpt import GPTConfig
from nanochat.options.model import Implementations
from nanochat.options.train import Execution
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.train.micro_step import choose_execution
from nanochat_kernels import configs, fused_cross_entropy

# bytes for each token, block and channel, and for each token and word of the vocabulary, of a model of plain operations; "eager"
# is what autograd saves and the gradient of logits, "compile" was measured (d12, d20, d26 in bench/results/h200/training_step.json)
PLAIN = {"eager": (44, 12), "compile": (36.2, 2)}
# without attention, of which torch's kernels save the same
BLOCK = ("rms_norm", "self_attention", "qkv_projection", "output_projection", "relu2_mlp")
OUTSIDE = 1.5e9  # bytes of the CUDA context, NCCL and the libraries, which PyTorch's allocator does not know
FRAGMENTS = 0.04  # of what is predicted: gaps between blocks of the allocator, and what is not counted
MOST_ROWS = 32  # that are chosen: of 2,048 tokens, they keep any GPU busy


@dataclass(frozen=True)
class Memory:
    """Bytes of a training run on each GPU."""

    static: float
    saved: float
    working: float
    update: float
    evaluation: float

    @property
    def micro_step(self) -> float:
        """The peak of allocated memory in a micro-step, which the bench measures (peak_gb)."""
        return self.static + self.saved + self.working

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def fits(self, available: float) -> bool:
        """Whether a GPU with so many bytes can train the run."""
        return self.total * (1 + FRAGMENTS) + OUTSIDE <= available


def predict(
    config: GPTConfig, rows: int, processes: int = 1, execution: str = "graph", architecture: str = "sm90"
) -> Memory:
    """The memory of a run in bfloat16 with micro-batches of `rows` rows.

    architecture: sm80 or sm90, whose launch table says what "auto" takes. If one operation of a block is the reference, all count
    as references.
    """
    tokens, width, vocabulary = rows * config.context_length, config.width, config.vocab_size
    impl = Implementations(**{name: _taken(config.impl, name, architecture) for name in vars(config.impl)})
    embeddings, matrices = 2 * vocabulary * width, config.num_parameters - 2 * vocabulary * width
    static = 8 * config.num_parameters + (4 * matrices + 8 * embeddings) / processes + 2 * (matrices + embeddings // 2)
    update = max(_orthogonalization(count, *shape) for shape, count in _groups(config).items()) / processes
    if processes > 1:  # each rank's part of the gradient, and the gathered rows and updates
        static += 4 * config.num_parameters / processes
        update += 4 * embeddings + 2 * matrices
    if any(getattr(impl, name) == "reference" for name in BLOCK):
        of_block, of_word = PLAIN["compile" if execution == "compile" else "eager"]
        saved, working = tokens * (config.depth * width * of_block + vocabulary * of_word), 0.0
    else:
        head, chunk = _head(impl.linear_cross_entropy, tokens, width, vocabulary)
        # the normed last state and its gradient; tokens, targets, losses and factors
        saved = tokens * (config.depth * saved_per_token(config) + 2 * 2 * width + 28) + head
        working = max(chunk, tokens * width * 2 * (10 if "mlp" in config.recompute else 6))
        if execution == "compile":  # autograd's gradient of the head, in both dtypes
            working += 6 * vocabulary * width
    hidden = 2 * 7 * width  # x before and after attention, and h or queries, keys and values
    logits = min(2 * vocabulary * tokens, fused_cross_entropy.CHUNK_BYTES)
    evaluation = max(tokens * hidden, tokens * 2 * 2 * width + logits)
    return Memory(static, saved, working, update, evaluation)


def predict_run(model: GPTConfig, rows: int, runtime: Runtime, execution: str, processes: int = 0) -> Memory:
    """`predict` for this process's GPU, and by default the processes that there are."""
    architecture = configs.architecture(runtime.device.index or 0)
    return predict(model, rows, processes or runtime.world_size, execution, architecture)


def largest_rows(predicted: Callable[[int], Memory], available: float, most: int = MOST_ROWS) -> int:
    """The rows of the largest micro-batch, of at most `most` rows, that fits into `available` bytes; 0: not even one fits.

    predicted: the memory of a run by the rows of its micro-batches.
    """
    return next((rows for rows in range(most, 0, -1) if predicted(rows).fits(available)), 0)


def rows_that_fit(
    model: GPTConfig, runtime: Runtime, requested: Execution, given: int = 0, processes: int = 0, most: int = MOST_ROWS,
    micro_step_ms: dict[str, float] | None = None,
) -> int:  # fmt: skip
    """The rows of a micro-batch: those that are given, else as many of `most` as fit into the memory of every process's GPU.

    requested: the option --execution. processes: by default those that there are. micro_step_ms: the gate's times, by which training
    chooses the execution; the model then has the gate's implementations. Raises UserError if not even one row fits. Where the memory
    is not known, all do.
    """
    if given or runtime.memory is None:
        return given or most
    execution, _ = choose_execution(requested, runtime.device, model.impl, micro_step_ms)
    available = min(runtime.gather(runtime.memory))

    def predicted(rows: int) -> Memory:
        return predict_run(model, rows, runtime, execution, processes)

    if rows := largest_rows(predicted, available, most):
        return rows
    more = "" if model.recompute or execution == "compile" else "--recompute attention mlp, "
    raise UserError(
        f"a model of depth {model.depth} with one row of {model.context_length} tokens needs about {predicted(1).total / 1e9:.1f} GB, "
        f"and {OUTSIDE / 1e9:.1f} GB for CUDA, and {runtime.device_name} has {available / 1e9:.1f} GB; give {more}a smaller --depth or "
        "--context-length, more processes, or --device-batch-size 1 to try it all the same"
    )


def saved_per_token(config: GPTConfig) -> int:
    """Bytes that a block of fused operations keeps for each token, in bfloat16: 20 for each channel, and some for factors."""
    width, heads, kv_heads = config.width, config.n_head, config.n_kv_head
    x, row_factor = 2 * width, 4
    attention = 2 * (2 * heads + 2 * kv_heads) * config.head_width + 4 * (2 * heads + kv_heads)
    h = 2 * 4 * width
    kept = 2 * (x + row_factor)
    return kept + ("attention" not in config.recompute) * attention + ("mlp" not in config.recompute) * h


def _head(impl: str, tokens: int, width: int, vocabulary: int) -> tuple[float, float]:
    """Bytes that the head saves for backward, and those that it needs beside them in forward."""
    if impl == "fused":  # the weight's gradient; a chunk of exponentials and of scaled rows
        rows = fused_cross_entropy.chunk_rows(tokens, vocabulary, 2)
        return 4 * vocabulary * width, 2 * rows * (vocabulary + width)
    if impl == "reference":
        return PLAIN["eager"][1] * tokens * vocabulary, 0.0
    return 2 * tokens * vocabulary, 0.0  # the logits


def _taken(impl: Implementations, name: str, architecture: str) -> str:
    """The implementation that an option stands for."""
    chosen = getattr(impl, name)
    if chosen != "auto":
        return chosen
    choice = configs.table(architecture)["auto"].get(name)
    return choice["impl"] if choice else "auto"


def _groups(config: GPTConfig) -> dict[tuple[int, int], int]:
    """The number of matrices of each shape, which Muon orthogonalizes together."""
    width, kv_width, hidden = config.width, config.n_kv_head * config.head_width, 4 * config.width
    groups: dict[tuple[int, int], int] = {}
    shapes = (width, width), (width, width), (kv_width, width), (kv_width, width), (hidden, width), (width, hidden)
    for shape in shapes:
        groups[shape] = groups.get(shape, 0) + config.depth
    return groups


def _orthogonalization(count: int, m: int, n: int) -> float:
    """Bytes of Newton-Schulz: the momentum, its scaled copy and the next iterate, and two to four Gram matrices."""
    small, large = sorted((m, n))
    return 2 * count * (3 * m * n + (2 if small == large else 4) * small * small)
