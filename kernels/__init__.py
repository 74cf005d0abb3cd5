"""Fused operations of the GPT. Each public function takes impl="auto" or the name of an implementation."""

from kernels.attention import attention
from kernels.dispatch import KernelRequestError, check_request
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.newton_schulz import newton_schulz
from kernels.optimizer_step import adamw, apply_update, nesterov_momentum
from kernels.qk_norm_rope import qk_norm_rope
from kernels.relu2_mlp import relu2_mlp
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.softcap_cross_entropy import softcap_cross_entropy

__all__ = [
    "KernelRequestError",
    "adamw",
    "add_rms_norm",
    "apply_update",
    "attention",
    "check_request",
    "linear_cross_entropy",
    "nesterov_momentum",
    "newton_schulz",
    "qk_norm_rope",
    "relu2_mlp",
    "rms_norm",
    "softcap_cross_entropy",
]
