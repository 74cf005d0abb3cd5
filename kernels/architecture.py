"""Whose code and launch parameters a CUDA device takes: sm80 (A100) or sm90 (H100, H200)."""

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

# what tensors that are not on a CUDA device take: the interpreter's, and those without data that inspect records launches on
without_device: ContextVar[str] = ContextVar("architecture without a device", default=ARCHITECTURES[0])


@lru_cache
def architecture(device_index: int | None) -> str:
    """The architecture of a CUDA device (None: no CUDA device, as under the interpreter): the nearest that has tables."""
    if device_index is None:
        return without_device.get()
    major, _ = torch.cuda.get_device_capability(device_index)
    return forced_architecture() or ("sm90" if major >= 9 else "sm80")


def forced_architecture() -> str | None:
    """The architecture that TRITON_OVERRIDE_ARCH or run_ptx_of compiles for in place of the device's own."""
    return triton.knobs.runtime.override_arch if TRITON_INSTALLED else None


def run_ptx_of(name: str) -> None:
    """From now on compile for `name` and hand its PTX to the driver, which translates it for the device here.

    PTX runs on every newer GPU, so the code that an A100 runs is validated on an H100 or H200. Its speed is not an A100's.
    Call it before the first kernel is launched.
    """

    def stages(backend=None, stages=None, options=None, language=None, capability=None):
        if stages is None:  # asked for what distinguishes this pipeline in the cache
            return f"ptx-of-{name}", f"ptx-of-{name}"
        stages["cubin"] = lambda ptx, metadata: ptx.encode() + b"\0"
        return None

    triton.knobs.runtime.override_arch = name
    triton.knobs.runtime.add_stages_inspection_hook = stages
    architecture.cache_clear()
