"""The choice of an implementation for each fused operation of a model and its optimizer."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Implementations:
    """The implementation of each fused operation: auto, reference, or another that `nanochat kernels list` shows."""

    rms_norm: str = "auto"
    """RMSNorm, alone and after the residual addition"""
    qk_norm_rope: str = "auto"
    """rotation and norm of queries and keys"""
    attention: str = "auto"
    """causal attention"""
    relu2_mlp: str = "auto"
    """squared-ReLU MLP"""
    linear_cross_entropy: str = "auto"
    """head, softcap and cross entropy"""
    optimizer: str = "auto"
    """Muon's momentum, orthogonalisation and update, and AdamW"""

    # the operations that an option stands for, if it is not the one of the same name
    OPERATIONS: ClassVar[dict[str, tuple[str, ...]]] = {
        "rms_norm": ("rms_norm", "add_rms_norm"),
        "optimizer": ("newton_schulz", "nesterov_momentum", "apply_update", "adamw"),
    }

    @classmethod
    def operations(cls, option: str) -> tuple[str, ...]:
        """The names of the operations whose implementation an option chooses."""
        return cls.OPERATIONS.get(option, (option,))
