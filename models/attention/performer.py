"""Performer: softmax attention through positive orthogonal random features (FAVOR+)."""

from dataclasses import dataclass

from models.features.aligned import AlignedAttention, AlignedConfig, naive_aligned


@dataclass(frozen=True, kw_only=True)
class Config(AlignedConfig):
    """Options of FAVOR+."""


class Attention(AlignedAttention):
    """Unbiased estimate of the kernel exp(scale q.k), normalised (Choromanski et al., arXiv 2009.14794).

    The engine with a_j = sqrt(scale) w_j and key bias -scale |k|^2 / 2. Our w_j are the paper's omega_j; our M
    its m. The paper has no `align` (see models/features/aligned.py). 8 B H N M D operations, O(N + M) memory.
    """

    Config = Config


def naive_performer(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """Equations 5-7 of the paper, feature vectors written out."""
    return naive_aligned(attention, q, k, v, mask_BN, scale, causal)
