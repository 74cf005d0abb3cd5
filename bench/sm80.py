"""An A100's code without an A100: python -m bench.sm80 table, and on an H100 or H200 python -m bench.sm80 run

table    compiles each kernel for sm_80, without a GPU, at the sizes of d20: registers, spills, shared memory, occupancy on an A100,
         bytes, FLOPs, and the least time that an A100 can need for them. With the results of `run` also the part of that which the
         kernel is expected to reach.
run      runs sm_80's PTX of every kernel on this GPU: first the tests of the kernels, then each kernel by turns with a copy of as many
         bytes and with FlashAttention-2, which is sm_80 code too. These are not an A100's times.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.measure import header, need_gpu
from nanochat.platform.errors import UserError
from nanochat.platform.files import read_json, write_json
from nanochat_kernels import configs, dispatch, inspect
from nanochat_kernels.architecture import run_ptx_of
from nanochat_kernels.operation import Kernel, Key
from nanochat_kernels.timing import interleaved
from nanochat_kernels.triton_helpers import Launch, multiprocessors

# an A100-SXM4-80GB, from NVIDIA's white paper
FLOPS, BANDWIDTH = 312e12, 2039e9  # dense bf16 FLOP/s, bytes/s
REGISTERS, SHARED, WARPS, BLOCKS, MULTIPROCESSORS = 65_536, 164 * 1024, 64, 32, 108  # of a multiprocessor; of the GPU
SHARED_RESERVED = 1024  # bytes of each block
ON_META = multiprocessors(inspect.META)  # what a launch that is recorded takes for the number of multiprocessors
# FlashAttention-2 on an A100, causal, 2,048 tokens, heads of 128: FLOP/s forward (Dao 2023)
FLASH_ON_A100 = 180e12
# parameters that a kernel reads and writes, there or elsewhere; every other tensor is read or written
READ_AND_WRITTEN = {
    "momentum_kernel": ("momentum_ptr",), "update_kernel": ("weight_ptr",), "on_chip_kernel": ("logits_ptr",),
    "adamw_kernel": ("weight_ptr", "mean_ptr", "variance_ptr"), "cache_append_kernel": ("k_ptr", "v_ptr"),
}  # fmt: skip
# no more of the cache than k_ptr and v_ptr have; a few groups of logits
HARDLY_TOUCHED = {"cache_append_kernel": ("keys_ptr", "values_ptr"), "token_choice_kernel": ("logits_ptr",)}
ONE_ELEMENT_A_ROW = {"targets_kernel": "gradient_ptr", "rows_kernel": "gradient_ptr"}
# products of a head's keys with its queries, each 2·T²/2·D FLOPs because half of the keys are in the future
ATTENTION_PRODUCTS = {"attention_forward": 2, "attention_query_gradient": 3, "attention_key_gradients": 4}


@dataclass(frozen=True)
class TableConfig:
    """Write the table of every kernel on an A100. Needs no GPU."""

    results: Path | None = None
    """what `run` wrote; adds the measured and the expected columns"""
    out: Path = Path("build/sm80.md")
    kernel: tuple[str, ...] = ()
    """only these kernels of the launch tables"""


@dataclass(frozen=True)
class RunConfig:
    """Test and time sm_80's PTX on this GPU."""

    json: Path = Path("build/sm80.json")
    tests: bool = True
    """run tests/kernels --sm80 before; a failure ends the run"""
    library: Path | None = None
    """take the code from this libnanochat_kernels.so, for the tests too"""
    rounds: int = 15
    kernel: tuple[str, ...] = ()
    """only these kernels of the launch tables"""


@dataclass(frozen=True)
class Row:
    """A launch of a kernel: what an A100 has for it, and the least that it must move and compute."""

    kernel: str
    function: str
    shape: str
    dtype: str
    registers: int
    spilled: int
    shared: int
    warps: int
    occupancy: float
    """warps that fit on a multiprocessor, as a part of 64"""
    limit: str
    """what they are limited by"""
    waves: float | None
    """blocks of the launch for each that fits on the GPU; None for a launch of as many blocks as there are multiprocessors"""
    bytes: int
    flops: float

    @property
    def floor_ms(self) -> float:
        return 1e3 * max(self.bytes / BANDWIDTH, self.flops / FLOPS)

    @property
    def bound(self) -> str:
        return "memory" if self.bytes / BANDWIDTH >= self.flops / FLOPS else "compute"


def occupancy(registers: int, shared: int, warps: int) -> tuple[int, str]:
    """Return how many blocks of a kernel fit on a multiprocessor of an A100, and what limits them.

    registers: of a thread. They are allocated for a warp in units of 256, and for warps in groups of four; shared memory in units
    of 128 bytes.
    """
    of_a_warp = -(-max(registers, 1) * 32 // 256) * 256
    memory = -(-(shared + SHARED_RESERVED) // 128) * 128
    limits = {
        "warps": WARPS // warps,
        "blocks": BLOCKS,
        "shared memory": SHARED // memory,
        "registers": REGISTERS // of_a_warp // 4 * 4 // warps,
    }
    least = min(limits.values())
    return least, ", ".join(name for name, limit in limits.items() if limit == least)


def key_of(kernel: Kernel) -> Key:
    """Return the shape class that is d20's in training, or the largest."""
    for wanted in ((1280, 5120), (128,), (65_536,), ()):
        found = [key for key in kernel.keys if not wanted or set(wanted) & set(key)]
        if found:
            return max(found, key=lambda key: sum(x for x in key if isinstance(x, int)))
    raise UserError(f"{kernel.name} has no shape classes")


def named_arguments(launch: Launch) -> Iterator[tuple[str, Any]]:
    """Yield the arguments of a launch with their names, those in tuples too."""
    for name, value in zip(launch.kernel.arg_names, launch.arguments, strict=False):
        for x in value if isinstance(value, tuple) else (value,):
            yield name, getattr(x, "base", x)


def bytes_of(launch: Launch) -> int:
    """Return the bytes of all tensors of a launch, once for each, and twice for those that it reads and writes."""
    twice = READ_AND_WRITTEN.get(launch.kernel.__name__, ())
    found: dict[int, int] = {}
    for name, x in named_arguments(launch):
        if isinstance(x, Tensor) and name not in HARDLY_TOUCHED.get(launch.kernel.__name__, ()):
            if name == ONE_ELEMENT_A_ROW.get(launch.kernel.__name__) and x.dim() == 2:
                x = x[:, 0]
            size = x.numel() * x.element_size() * (2 if name in twice else 1)
            found[id(x)] = max(found.get(id(x), 0), size)
    return sum(found.values())


def flops_of(kernel: Kernel, launch: Launch, key: Key) -> float:
    """Return the floating-point operations of a launch on tensor cores; 0 for a kernel that has none."""
    given = dict(named_arguments(launch))
    if launch.kernel.__name__ in ("product_kernel", "hopper_kernel"):
        constants = launch.constants
        tile = constants["BLOCK_M"] * constants["BLOCK_N"]
        return 2.0 * given["k"] * given["total"] * tile
    if kernel.name in ATTENTION_PRODUCTS:
        width, tokens, heads = key[0], given["tokens"], given["heads"]
        return ATTENTION_PRODUCTS[kernel.name] * given["rows"] * heads * width * float(tokens) ** 2
    return 0.0


def chosen(only: tuple[str, ...]) -> list[tuple[Kernel, Key, torch.dtype]]:
    kernels = list(dispatch.tunable_kernels())
    if set(only) - {kernel.name for kernel in kernels}:
        raise UserError(f"--kernel must be among {', '.join(kernel.name for kernel in kernels)}, got {', '.join(only)}")
    return [(kernel, key_of(kernel), kernel.dtypes[0]) for kernel in kernels if not only or kernel.name in only]


def rows(only: tuple[str, ...]) -> Iterator[Row]:
    """Yield a row for each launch that every kernel makes with its first set of flags."""
    for kernel, key, dtype in chosen(only):
        with configs.tables_of("sm80"):
            launches = next(iter(inspect.record(kernel, key, dtype).values()))
            for launch in launches:
                compiled = inspect.compile_launch(launch, "sm80")
                registers, spilled = inspect.resources(compiled.asm["cubin"])
                shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
                blocks, limit = occupancy(registers, shared, warps)
                programs = math.prod(launch.grid)
                waves = programs / max(1, blocks * MULTIPROCESSORS) if programs > ON_META else None
                yield Row(
                    kernel.name, launch.kernel.__name__, configs.format_key(key), configs.dtype_name(dtype), registers,
                    spilled, shared, warps, blocks * warps / WARPS, limit, waves,
                    bytes_of(launch), flops_of(kernel, launch, key),
                )  # fmt: skip


def expected(of_kernel: list[Row], measured: dict[str, Any]) -> float:
    """Return the part of its roofline that a kernel is expected to reach on an A100.

    If memory bounds it, the part of the copy's rate that it reached here. If products do, FlashAttention-2's part of an A100's peak,
    times how much faster than FlashAttention-2 the kernel computed here.
    """
    memory = sum(row.bytes for row in of_kernel) / BANDWIDTH >= sum(row.flops for row in of_kernel) / FLOPS
    if memory:
        return min(1.0, measured["copy_ms"] / measured["ms"])  # what lies in the cache is faster than the copy
    return FLASH_ON_A100 / FLOPS * measured["tflops"] / measured["flash_tflops"]


def table(config: TableConfig) -> None:
    results = read_json(config.results)["rows"] if config.results else []
    measured = {row["kernel"]: row for row in results}
    found = list(rows(config.kernel))
    lines = [
        "# Every kernel on an A100, without an A100",
        "",
        f"`python -m bench.sm80 {' '.join(sys.argv[1:])}`: compiled for sm_80, d20's sizes, first set of flags. Floor: the least time",
        f"for these bytes at {BANDWIDTH / 1e9:.0f} GB/s or these FLOPs at {FLOPS / 1e12:.0f} TFLOP/s. Expected: "
        + ("an estimate from the times of this code on another GPU." if results else "needs the results of `run`."),
        "",
        "| kernel | function | shape | dtype | registers | spilled B | shared B | warps | occupancy | limited by | waves "
        "| MB | GFLOP | floor, ms | bound | expected |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        same = [other for other in found if other.kernel == row.kernel]
        part = f"{100 * expected(same, measured[row.kernel]):.0f} %" if row.kernel in measured else ""
        waves = "persistent" if row.waves is None else f"{row.waves:.1f}"
        lines.append(
            f"| {row.kernel} | {row.function} | {row.shape} | {row.dtype} | {row.registers} | {row.spilled} | {row.shared} "
            f"| {row.warps} | {100 * row.occupancy:.0f} % | {row.limit} | {waves} | {row.bytes / 1e6:.1f} "
            f"| {row.flops / 1e9:.1f} | {row.floor_ms:.3f} | {row.bound} | {part} |"
        )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text("\n".join(lines) + "\n", "utf-8")
    write_json(config.out.with_suffix(".rows.json"), {"rows": [asdict(row) for row in found]})
    print(f"wrote {config.out}: {len(found)} launches of {len({row.kernel for row in found})} kernels")


def flash_tflops(rounds: int) -> float:
    """Return the TFLOP/s of FlashAttention-2's forward pass at d20's sizes, causal."""
    q, k, v = (torch.randn(32, 10, 2048, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def flash(number: int) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return 2 * q.numel() * 2048 / median(interleaved({"flash": flash}, rounds)["flash"]) / 1e9


def time_kernel(kernel: Kernel, key: Key, dtype: torch.dtype, config: RunConfig) -> dict[str, Any]:
    """Time the launches of a kernel's first set of flags, by turns with a copy that moves as many bytes, and FlashAttention-2."""
    with configs.tables_of("sm80"):
        launches = next(iter(inspect.record(kernel, key, dtype).values()))
        flops = sum(flops_of(kernel, launch, key) for launch in launches)
    moved = sum(map(bytes_of, launches))
    launch = next(iter(kernel.launches(key, dtype, torch.device("cuda", torch.cuda.current_device())).values()))
    source = torch.empty(max(moved // 2, 1), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    variants = {"kernel": lambda number: launch(None), "copy": lambda number: target.copy_(source)}
    samples = interleaved(variants, config.rounds)
    ms = median(samples["kernel"])
    return {
        "kernel": kernel.name, "shape": configs.format_key(key), "dtype": configs.dtype_name(dtype), "ms": ms,
        "copy_ms": median(samples["copy"]), "bytes": moved, "flops": flops, "tflops": flops / ms / 1e9,
        "flash_tflops": flash_tflops(config.rounds) if flops else None, "samples_ms": samples,
    }  # fmt: skip


def run(config: RunConfig) -> None:
    need_gpu()
    if torch.cuda.get_device_capability() < (9, 0):
        raise UserError(f"sm_80's code is {torch.cuda.get_device_name()}'s own; `run` is for an H100 or H200")
    if config.tests:
        with_library = ["--library", str(config.library)] if config.library else []
        command = [sys.executable, "-m", "pytest", "tests/kernels", "--sm80", "-p", "no:cacheprovider", *with_library]
        if subprocess.run(command, cwd=Path(__file__).resolve().parents[1]).returncode:
            raise UserError("a test of the kernels failed with sm_80's PTX; see above")
    run_ptx_of("sm80")
    if config.library:
        from nanochat_kernels import library

        library.use(config.library)
    found = header(f"python -m bench.sm80 {' '.join(sys.argv[1:])}")
    found["note"] = "sm_80's PTX, translated by the driver; not an A100's times"
    for kernel, key, dtype in chosen(config.kernel):
        row = time_kernel(kernel, key, dtype, config)
        found["rows"].append(row)
        rate = f", {row['tflops']:.0f} TFLOP/s (FlashAttention-2: {row['flash_tflops']:.0f})" if row["flops"] else ""
        print(
            f"{kernel.name:36} {row['shape']:20} {row['ms']:8.3f} ms, copy {row['copy_ms']:8.3f} ms{rate}", flush=True
        )
        write_json(config.json, found)  # after each kernel, so that an interrupted run keeps its results
        torch.cuda.empty_cache()


def main() -> None:
    config = tyro.cli(
        Annotated[TableConfig, tyro.conf.subcommand("table")] | Annotated[RunConfig, tyro.conf.subcommand("run")],
        description=__doc__,
        prog="python -m bench.sm80",
    )
    table(config) if isinstance(config, TableConfig) else run(config)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"bench.sm80: {error}")
