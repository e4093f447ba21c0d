"""An attention made for tests: every token takes the value of the token before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.base import AttentionBase, option


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the shift."""

    by: int = option(1, "tokens to look back")


class Attention(AttentionBase):
    """out_n = v_(n - by), cyclic over the batch's width."""

    Config = Config
    linear_memory = True

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        """The shifted values."""
        return torch.roll(v_BHND, self.config.by, 2)


class Broken(Attention):
    """An attention with a bug that only running it shows."""

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        """Raises."""
        raise RuntimeError("broken on purpose")
