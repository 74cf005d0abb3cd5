"""Fused operations of the GPT: nanochat_kernels.rms_norm and so on, one file each.

Each takes impl="auto" or a name that `nanochat kernels list` shows.
"""

from nanochat_kernels.dispatch import KernelRequestError, check_request, operations

# the public function of every operation, under the operation's name
globals().update({operation.name: operation.function for operation in operations().values()})

__all__ = ["KernelRequestError", "check_request", "operations", *operations()]
