"""The architecture that a CUDA device takes its code and launch parameters from: sm80 (A100) or sm90 (H100, H200)."""

from contextvars import ContextVar
from functools import lru_cache

import torch

try:
    import triton

    TRITON_INSTALLED = True
except ImportError:  # macOS
    triton = None
    TRITON_INSTALLED = False

ARCHITECTURES = ("sm80", "sm90")

# the architecture for tensors that are not on a CUDA device: interpreted kernels run on CPU tensors, inspect uses meta tensors
without_device: ContextVar[str] = ContextVar("architecture without a device", default=ARCHITECTURES[0])


_of_library: frozenset[str] | None = None


def take_code_of_library(architectures: frozenset[str] | None) -> None:
    """Choose from now on among the architectures that a library has code for, or for None among all, whose code Triton compiles."""
    global _of_library
    _of_library = architectures
    architecture.cache_clear()


@lru_cache
def architecture(device_index: int | None) -> str:
    """Return the nearest architecture with launch tables for a CUDA device. None stands for no CUDA device, as in the interpreter.

    From a library an H100 or H200 takes sm80's code if there is none for sm90, and so does every newer GPU, which runs its PTX.
    """
    if device_index is None:
        return without_device.get()
    major, _ = torch.cuda.get_device_capability(device_index)
    has_code = major >= 9 if _of_library is None else major == 9 and "sm90" in _of_library
    return forced_architecture() or ("sm90" if has_code else "sm80")


def forced_architecture() -> str | None:
    """Return the architecture that TRITON_OVERRIDE_ARCH or run_ptx_of sets in place of the device's own, or None."""
    return triton.knobs.runtime.override_arch if TRITON_INSTALLED else None


def run_ptx_of(name: str) -> None:
    """Compile all kernels for the architecture `name` from now on; the driver translates the PTX for the device.

    PTX runs on every newer GPU, so that an H100 or H200 can validate the code of an A100. The timings are not an A100's.
    Call this before the first launch.
    """

    def stages(backend=None, stages=None, options=None, language=None, capability=None):
        if stages is None:  # Triton asks for the key of this pipeline in its cache
            return f"ptx-of-{name}", f"ptx-of-{name}"
        stages["cubin"] = lambda ptx, metadata: ptx.encode() + b"\0"
        return None

    triton.knobs.runtime.override_arch = name
    triton.knobs.runtime.add_stages_inspection_hook = stages
    architecture.cache_clear()
