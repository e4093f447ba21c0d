"""The one encoder that every attention is measured in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import Dropout, Linear


class SelfAttention(nn.Module):
    """Projections and head split around an attention: (B, N, E) -> (B, N, E)."""

    def __init__(self, width: int, heads: int, attention: nn.Module):
        super().__init__()
        self.heads, self.attention = heads, attention
        # An attention that ignores q and k gets no parameters for them.
        self.to_qkv = Linear(width, (3 if attention.reads_qk else 1) * width)
        self.to_out = Linear(width, width)

    def forward(self, x_BNE, mask_BN, rotation=None):
        """`rotation`: (cos, sin) of `rotary`, applied to q and k where the attention reads them."""
        B, N, E = x_BNE.shape
        parts = self.to_qkv(x_BNE).view(B, N, -1, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        q_BHND, k_BHND, v_BHND = parts if len(parts) == 3 else (parts[0],) * 3
        if rotation is not None and self.attention.reads_qk:
            q_BHND, k_BHND = rotate(q_BHND, *rotation), rotate(k_BHND, *rotation)
        out_BHND = self.attention(q_BHND, k_BHND, v_BHND, mask_BN)
        return self.to_out(out_BHND.transpose(1, 2).reshape(B, N, E))


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + FFN(norm(x)) with GELU  (arXiv 2002.04745, fig. 1b)."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float, attention: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixer = SelfAttention(width, heads, attention)
        self.up, self.down = Linear(width, ffn), Linear(ffn, width)
        self.dropout = Dropout(dropout)

    def forward(self, x_BNE, mask_BN, rotation=None):
        x_BNE = x_BNE + self.dropout(self.mixer(self.norm1(x_BNE), mask_BN, rotation))
        hidden_BNF = self.dropout(F.gelu(self.up(self.norm2(x_BNE))))
        return x_BNE + self.dropout(self.down(hidden_BNF))


class Encoder(nn.Module):
    """Token ids (B, N) and their mask -> one vector per sequence (B, E).

    Mean pooling averages the real tokens only; "cls" prepends a learned token and returns its output.
    `build_attention(layer, max_len)` returns the attention of one layer; everything else is the same for all.
    Positions: "learned" and "sinusoidal" are added to the embeddings; "rotary" turns q and k in every layer
    (arXiv 2104.09864); "alibi" adds a distance to the logits (arXiv 2108.12409), where a method has logits.
    Raises ValueError when N exceeds max_len, heads do not divide width, rotary meets an odd head width, or an
    attention cannot add ALiBi.
    """

    def __init__(
        self,
        build_attention: Callable[[int, int], nn.Module],
        *,
        vocab: int,
        max_len: int,
        layers: int,
        width: int,
        heads: int,
        ffn: int,
        dropout: float,
        positions: Literal["learned", "sinusoidal", "rotary", "alibi"] = "learned",
        pooling: Literal["mean", "cls"] = "mean",
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"encoder width {width} is not a multiple of {heads} heads")
        self.positions, self.pooling, self.heads = positions, pooling, heads
        self.embed = nn.Embedding(vocab, width)
        if positions == "learned":
            self.positions_NE = nn.Parameter(torch.randn(max_len, width))
        self._measure(max_len)
        if pooling == "cls":
            self.cls_E = nn.Parameter(torch.randn(width))
        attentions = [build_attention(layer, max_len + (pooling == "cls")) for layer in range(layers)]
        for attention in attentions[1:]:
            attention.tie(attentions[0])
        if positions == "alibi":
            for attention in attentions:
                attention.add_alibi(2.0 ** (-8 / heads * torch.arange(1, heads + 1)))
        self.blocks = nn.ModuleList(Block(width, heads, ffn, dropout, a) for a in attentions)
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def _measure(self, max_len: int) -> None:
        """Positions of up to `max_len` tokens, as far as they are computed."""
        self.max_len, (_, width), tables = max_len, self.embed.weight.shape, {}
        if self.positions == "sinusoidal":
            tables["positions_NE"] = sinusoids(max_len, width)
        elif self.positions == "rotary":
            tables["cos_ND"], tables["sin_ND"] = rotary(max_len + (self.pooling == "cls"), width // self.heads)
        for name, table in tables.items():
            self.register_buffer(name, table.to(self.embed.weight), persistent=False)

    def lengthen(self, max_len: int) -> None:
        """Take up to `max_len` tokens from now on, with the weights as they are. ValueError where these end at the
        length that they were made for."""
        if self.positions == "learned":
            raise ValueError(f"learned positions end at {self.max_len:,} tokens")
        if any(attention.fixed_length for attention in self.attentions):
            raise ValueError(f"the attention has a fixed length of {self.max_len:,} tokens")
        self._measure(max_len)

    @property
    def attentions(self) -> list[nn.Module]:
        """The attention of each layer."""
        return [block.mixer.attention for block in self.blocks]

    def forward(
        self, tokens_BN: torch.Tensor, mask_BN: torch.Tensor | None = None, asked_BK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pooled features (B, E). `mask_BN` is True at real tokens; None means no padding.

        With `asked_BK`, places of K tokens: logits of what stands there, (B, K, vocab), by the embeddings themselves,
        logit_v = x . e_v / sqrt(E)  (tied as in arXiv 1608.05859), so that masked reconstruction adds no parameter.
        """
        B, N = tokens_BN.shape
        if N > self.max_len:
            raise ValueError(f"sequence of {N} tokens exceeds the model's max_len {self.max_len}")
        x_BNE = self.embed(tokens_BN)
        if self.positions in ("learned", "sinusoidal"):
            x_BNE = x_BNE + self.positions_NE[:N]
        x_BNE = self.dropout(x_BNE)
        if self.pooling == "cls":
            x_BNE = torch.cat([self.cls_E.expand(B, 1, -1), x_BNE], 1)
            mask_BN = mask_BN if mask_BN is None else F.pad(mask_BN, (1, 0), value=True)
        length, rotation = x_BNE.shape[1], None
        if self.positions == "rotary":
            rotation = self.cos_ND[:length], self.sin_ND[:length]
        for block in self.blocks:
            x_BNE = block(x_BNE, mask_BN, rotation)
        x_BNE = self.norm(x_BNE)
        if asked_BK is not None:
            places_BK1 = asked_BK[..., None] + (self.pooling == "cls")
            x_BKE = x_BNE.gather(1, places_BK1.expand(-1, -1, x_BNE.shape[-1]))
            return F.linear(x_BKE, self.embed.weight) * x_BNE.shape[-1] ** -0.5
        return x_BNE[:, 0] if self.pooling == "cls" else masked_mean(x_BNE, mask_BN)


def masked_mean(x_BNE: torch.Tensor, mask_BN: torch.Tensor | None) -> torch.Tensor:
    """Mean over real tokens, (B, E): the divisor is the number of real tokens, not N. An empty row gives 0."""
    if mask_BN is None:
        return x_BNE.mean(1)
    return x_BNE.masked_fill(~mask_BN[..., None], 0).sum(1) / mask_BN.sum(1, keepdim=True).clamp(min=1)


def sinusoids(max_len: int, width: int) -> torch.Tensor:
    """Fixed positions (max_len, width): sin and cos of n / 10000^(2i/width)  (arXiv 1706.03762, section 3.5)."""
    angles = torch.arange(max_len)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]


def rotary(max_len: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (max_len, dim) of n / 10000^(2i/dim), each twice  (arXiv 2104.09864, eq. 34).

    Raises ValueError for an odd `dim`: coordinates turn in pairs.
    """
    if dim % 2:
        raise ValueError(f"rotary positions need an even head width; got {dim}")
    angles = torch.arange(max_len)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles_ND = torch.cat([angles, angles], -1)
    return angles_ND.cos(), angles_ND.sin()


def rotate(x_BHND: torch.Tensor, cos_ND: torch.Tensor, sin_ND: torch.Tensor) -> torch.Tensor:
    """Turns coordinate i against i + D/2 by the angle of its position: q.k then depends on n - m alone."""
    first, second = x_BHND.chunk(2, -1)
    return (x_BHND * cos_ND + torch.cat([-second, first], -1) * sin_ND).to(x_BHND.dtype)
