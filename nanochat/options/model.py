"""The choice of an implementation for each fused operation of a model and its optimizer, what backward may compute again, and the
longest context."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from nanochat.platform.errors import UserError

LONGEST_CONTEXT = 1_000_000  # tokens; the tables of positions cover ten times as many
Recompute = Literal["attention", "mlp"]  # parts of a block


@dataclass(frozen=True)
class Implementations:
    """The implementation of each fused operation: auto, reference, or another that `nanochat kernels list` shows."""

    rms_norm: str = "auto"
    """RMSNorm of the embedding and before the head"""
    self_attention: str = "auto"
    """all of attention but its last projection, without a cache; parts: by the two options below, as also if one is given"""
    qkv_projection: str = "auto"
    """norm, queries, keys and values, rotation, norm of queries and keys"""
    attention: str = "auto"
    """causal attention"""
    output_projection: str = "auto"
    """projection after attention, residual addition"""
    relu2_mlp: str = "auto"
    """norm, squared-ReLU MLP, residual addition"""
    linear_cross_entropy: str = "auto"
    """head, softcap and cross entropy"""
    optimizer: str = "auto"
    """Muon's momentum, orthogonalisation and update, and AdamW"""

    # the operations that an option stands for, if it is not the one of the same name
    OPERATIONS: ClassVar[dict[str, tuple[str, ...]]] = {
        "optimizer": ("newton_schulz", "nesterov_momentum", "apply_update", "adamw"),
    }

    def repeatable(self) -> "Implementations":
        """These with attention that repeats bit for bit on CUDA: Triton's, because the backward of torch's adds in any order.

        Raises UserError where another one is named.
        """
        for name in ("self_attention", "attention"):
            impl = getattr(self, name)
            if impl not in ("auto", "triton", "parts"):
                raise UserError(
                    f"--impl.{name} {impl} is torch's attention, whose gradients do not repeat bit for bit on CUDA; leave it out, "
                    "name triton, or leave out --deterministic"
                )
        joint = "parts" if {self.attention, self.qkv_projection} != {"auto"} else "triton"
        return replace(
            self, attention="triton", self_attention=joint if self.self_attention == "auto" else self.self_attention
        )

    @classmethod
    def operations(cls, option: str) -> tuple[str, ...]:
        """The names of the operations whose implementation an option chooses."""
        return cls.OPERATIONS.get(option, (option,))
