"""Random draws that are renewed during training."""

from __future__ import annotations

import torch

from models.base import AttentionBase


class Redrawn(AttentionBase):
    """Holds random draws w_HMD in a buffer and renews them every `config.redraw_every` training steps (0 = never),
    never in evaluation. They are a function of (seed, layer, number of redraws), saved with the model and the same
    on every rank.
    """

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        if config.redraw_every < 0:
            raise ValueError(f"redraw_every must be 0 (never) or more; got {config.redraw_every}")
        self.register_buffer("redraws", torch.zeros((), dtype=torch.int64))

    def _draw(self) -> torch.Tensor:
        """w_HMD for the present number of redraws."""
        raise NotImplementedError

    def _redraw(self) -> None:
        self.w_HMD.copy_(self._draw())

    def before_step(self, step):
        redraw = step // self.config.redraw_every if self.config.redraw_every else 0
        if redraw != int(self.redraws):
            self.redraws.fill_(redraw)
            self._redraw()
