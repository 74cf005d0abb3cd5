"""What `python -m bench simulate` takes from others: datasheets, traffic by count, and what is published about A100s."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU by its datasheet: dense bf16 FLOP/s, and bytes/s of its memory."""

    peak: float
    bandwidth: float


CARDS = {
    "H100": Card(989e12, 3_350e9),
    "H200": Card(989e12, 4_800e9),
    "A100 80 GB": Card(312e12, 2_039e9),
    "A100 40 GB": Card(312e12, 1_555e9),
}
# bytes of passes that products do not hide: a channel of a token and block, a word of the vocabulary and token, a parameter
TRAFFIC = {
    # norms with residuals 32, rotation and QK-norm 20, relu² and its derivative 40, sums of gradients 4; the loss reads and writes
    # logits; gradients of weights are made in bfloat16 and added in float32
    "plain": (96, 8, 12),
    # second operands of epilogues 20, attention's products of out and its gradient 4, the pass that undoes rotation and norm 18; the
    # loss reads logits and writes their gradient; gradients of weights are added in float32
    "fused": (42, 4, 8),
}
PUBLISHED_STEPS = 529_882, 529_000, 528_029, 528_202, 527_379, 526_671, 525_967  # tokens/s of steps 4 to 10
PUBLISHED = {
    "tokens_per_second": sum(PUBLISHED_STEPS) / len(PUBLISHED_STEPS),
    "deviation": 0.02,  # relative: that code has an optimizer of its own, and the clock falls as the cards get warm
    "what": "d20, plain model compiled, 8 × A100-SXM4, 32 × 2,048 tokens each: 989.4 to 996.8 ms a step",
    "source": "https://github.com/karpathy/nanochat/pull/147",
}


@dataclass(frozen=True)
class Input:
    """A number that is not known exactly: anything from low to high is equally likely."""

    low: float
    high: float
    why: str


INPUTS = {
    "products": Input(
        1.0, 1.27,
        "efficiency of an A100's products in a step, over that of Hopper's times 0.869/0.801, the parts of the peak that their best "
        "products reach (stas00/ml-engineering, compute/accelerator); 1.27 is 0.90 of the peak, as if power limited nothing",
    ),
    "attention": Input(
        0.95, 1.15,
        "rate of FlashAttention-2, over 180 TFLOP/s forward and 141 backward, which an A100 PCIe reached; SXM is faster",
    ),
    "memory": Input(
        1.0, 1.45,
        "efficiency of the other passes, over that on Hopper, where instructions bind them in part; at most 0.9 of the bandwidth",
    ),
    "epilogues": Input(
        0.98, 1.12,
        "time of an A100's products with epilogues over torch's, relative to that on Hopper: sm_80's PTX took 1.07 to 1.20 × CUTLASS's "
        "time (h200/products_sm80_ptx.json) where sm_90's takes 0.99 to 1.14 × (h200/products.json)",
    ),
    "update": Input(
        2.0, 2.92,
        "time of the optimizer's update over an H100's: between the ratio of bandwidths, 1.64, and that of best products, 2.92",
    ),
    "bus": Input(
        200e9, 235e9, "bytes/s of NCCL's collectives on eight A100s with NVLink of 600 GB/s (NVIDIA/nccl-tests, issue 149: 200 GB/s)"
    ),
    "open_reduce": Input(0.3, 1.0, "part of the time of reduce-scatter that nothing hides"),
    "open_gather": Input(0.2, 0.8, "part of the time of all-gather that the orthogonalization does not hide"),
    "rest": Input(0.0, 3e-3, "seconds of a step in which the GPU waits for the host"),
}  # fmt: skip
FLASH = 180e12, 141e12  # FLOP/s forward and backward on an A100 PCIe, causal, heads of 128, 2,048 tokens
BEST_PRODUCT = {"A100": 0.869, "H100": 0.801}  # of the peak
MOST_OF_BANDWIDTH = 0.9
