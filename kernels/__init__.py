"""Fused operations of the GPT, each a public function such as nanochat_kernels.rms_norm.

Every function takes impl="auto" or the name of an implementation; `nanochat kernels list` prints the names. The module in which an
operation is defined has its name too: importlib.import_module("nanochat_kernels.rms_norm") returns the module.
"""

from nanochat_kernels.dispatch import KernelRequestError, check_request, operations
from nanochat_kernels.ranges import named
from nanochat_kernels.reference import ROPE_BASE, SOFTCAP
from nanochat_kernels.sample_tokens import MOST_CANDIDATES

# the public function of every operation, under the operation's name, by which profiles know its calls
globals().update({name: named(name, is_operation=True)(record.function) for name, record in operations().items()})

__all__ = [
    "MOST_CANDIDATES", "ROPE_BASE", "SOFTCAP", "KernelRequestError", "check_request", "operations", *operations()
]  # fmt: skip
