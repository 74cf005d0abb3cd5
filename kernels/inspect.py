"""What the compiler makes of every kernel with every committed launch configuration, for an architecture not at hand.

No GPU is needed: Triton compiles for a named target, its assembler reports registers and memory, and the PTX shows which
instructions are used. An A100 (sm80) has 163 KiB of shared memory a block and neither TMA nor wgmma; an H100 227 KiB.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import configs
from kernels.configs import Kernel
from kernels.dispatch import tunable_kernels
from kernels.triton_helpers import INSTALLED, INTERPRETED, triton

SHARED_MEMORY_LIMIT = {"sm80": 163 * 1024, "sm90": 227 * 1024}  # bytes a block
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MATRIX = ("mma.sync", "wgmma")
NOT_ON_SM80 = ("wgmma", "cp.async.bulk")


@dataclass(frozen=True)
class Compiled:
    """One kernel with one configuration: registers a thread, spilled and shared bytes, instructions, what is wrong."""

    kernel: str
    dtype: str
    size: int
    parameters: dict[str, int]
    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]
    faults: tuple[str, ...]


def compile_kernel(kernel: Kernel, architecture: str, size: int, dtype: torch.dtype, parameters: dict[str, int]):
    """The compiled kernel of Triton (asm, metadata) for `architecture`. Raises RuntimeError where Triton cannot compile."""
    if not INSTALLED:
        raise RuntimeError("Triton is not installed (pip install triton; it exists for Linux)")
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    types, constants = kernel.arguments(size, dtype, parameters)
    options = {name: value for name, value in parameters.items() if name.islower()}
    names = kernel.function.arg_names
    constants = {n: v for n, v in (parameters | constants).items() if n in names}
    signature = {n: "constexpr" if n in constants else types[n].replace("T", SHORT[dtype]) for n in names}
    # what a launch with aligned tensors and sizes divisible by 16 is specialised to
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types and n != "offset"}
    source = triton.compiler.ASTSource(kernel.function, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", int(architecture[2:]), 32)
    return triton.compile(source, target=target, options=options)


def inspect_kernel(
    kernel: Kernel, architecture: str, size: int, dtype: torch.dtype, parameters: dict[str, int]
) -> Compiled:
    compiled = compile_kernel(kernel, architecture, size, dtype, parameters)
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, spilled = resources(compiled.asm["cubin"])
    faults = []
    if spilled:
        faults.append(f"{spilled} bytes spilled")
    if shared > SHARED_MEMORY_LIMIT[architecture]:
        faults.append(f"{shared} bytes of shared memory, {SHARED_MEMORY_LIMIT[architecture]} exist")
    if architecture == "sm80":
        faults += [f"{name} does not exist on sm_80" for name in NOT_ON_SM80 if name in ptx]
    wanted = (*MATRIX, "cp.async.bulk", "cp.async.c")
    instructions = tuple(name.removesuffix(".c") for name in wanted if name in ptx)
    short = SHORT[dtype]
    return Compiled(
        kernel.name, short, size, parameters, registers, spilled, shared, instructions, tuple(faults)
    )  # fmt: skip


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack, which these kernels have only for spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run([tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def inspect_all(architecture: str) -> Iterator[Compiled]:
    """Every kernel with every configuration of the committed table."""
    launch = configs.table(architecture)["launch"]
    for kernel in tunable_kernels():
        for dtype in kernel.dtypes:
            for size, parameters in launch[kernel.name][str(dtype).removeprefix("torch.")].items():
                yield inspect_kernel(kernel, architecture, int(size), dtype, parameters)


def forced_architecture() -> str | None:
    """The architecture that TRITON_OVERRIDE_ARCH compiles for instead of the device's own."""
    return triton.knobs.runtime.override_arch if INSTALLED else None


def run_ptx_of(architecture: str) -> None:
    """From now on compile for `architecture` and hand its PTX to the driver, which translates it for the device here.

    PTX runs on every newer GPU: so the code an A100 gets is validated on an H100 or H200. Its speed says nothing of an A100.
    """

    def stages(backend=None, stages=None, options=None, language=None, capability=None):
        if stages is None:  # asked for what distinguishes this pipeline in the cache
            return f"ptx-of-{architecture}", f"ptx-of-{architecture}"
        stages["cubin"] = lambda ptx, metadata: ptx.encode() + b"\0"
        return None

    triton.knobs.runtime.override_arch = architecture
    triton.knobs.runtime.add_stages_inspection_hook = stages
    configs.clear()
