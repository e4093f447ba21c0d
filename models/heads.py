"""Heads, and the classifier that joins one to the encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Classify(nn.Module):
    """One sequence: (B, 1, E) -> logits (B, C) through a hidden layer of width `hidden`."""

    def __init__(self, width: int, hidden: int, classes: int):
        super().__init__()
        self.up, self.out = nn.Linear(width, hidden), nn.Linear(hidden, classes)

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        """Logits (B, C)."""
        return self.out(F.gelu(self.up(x_BTE.flatten(1))))


class Match(Classify):
    """A pair: (B, 2, E) -> logits (B, C) from [x1, x2, x1*x2, x1-x2]  (arXiv 2011.04006, section 2.2)."""

    def __init__(self, width: int, hidden: int, classes: int):
        super().__init__(4 * width, hidden, classes)

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        """Logits (B, C)."""
        x1_BE, x2_BE = x_BTE.unbind(1)
        return super().forward(torch.cat([x1_BE, x2_BE, x1_BE * x2_BE, x1_BE - x2_BE], -1))


class Classifier(nn.Module):
    """Encoder applied to each tower with shared weights, then a head: ids (B, T, N) -> logits (B, C)."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(
        self, tokens_BTN: torch.Tensor, mask_BTN: torch.Tensor | None = None, asked_BTK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (B, C); `mask_BTN` True at real tokens, None = no padding. With `asked_BTK`, places of tokens: logits
        of what stands there, (B, T K, vocab), and no head."""
        B, T, _ = tokens_BTN.shape
        rows = [part if part is None else part.flatten(0, 1) for part in (tokens_BTN, mask_BTN, asked_BTK)]
        out = self.encoder(*rows)
        return self.head(out.view(B, T, -1)) if asked_BTK is None else out.view(B, -1, out.shape[-1])
