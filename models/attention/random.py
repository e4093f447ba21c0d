"""Random attention: weights that no input has a say in, a floor."""

from dataclasses import dataclass

import torch

from models.attention import softmax
from models.base import AttentionBase
from models.features.projections import gaussian


@dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


class Attention(softmax.Attention):
    """out_i = sum_n softmax_n(scale a_i.b_n) v_n with a_i, b_n ~ N(0, I) drawn once for each head and position.

    The name is that of a floor in arXiv 2603.04127; the definition is this suite's: softmax attention, its
    queries and keys replaced by fixed draws, so that the logits have variance 1 at the default scale and are
    uncorrelated between pairs of positions. Like `constant` it shows what the values and the rest of the model
    do without attention, but with weights that differ from query to query.
    The draws are buffers that follow (seed, layer); position n beyond max_len takes those of n mod max_len.
    Cost and memory of softmax, whose fused kernel it uses. No ALiBi: a floor has no say in distances either.
    """

    Config = Config
    exact, random = False, True
    reads_qk = False
    add_alibi = AttentionBase.add_alibi

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        draws = gaussian(
            self.heads, 2 * self.max_len, self.head_dim, orthogonal=False, seed=self.seed, layer=self.layer, redraw=0
        )
        self.register_buffer("draws_2HND", torch.stack(draws.chunk(2, dim=1)))

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        position_N = torch.arange(v_BHND.shape[2], device=v_BHND.device) % self.max_len
        q, k = self.draws_2HND[:, None, :, position_N].to(v_BHND.dtype).expand(2, *v_BHND.shape)
        return super().attend(q, k, v_BHND, mask_BN, scale, causal)

    def state_bytes(self, N):
        return super().state_bytes(N) + 4 * 2 * self.heads * N * self.head_dim


def naive_random(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """The equation above with the N x N matrix written out; q and k are not read."""
    a, b = attention.draws_2HND.to(v.dtype)[:, None, :, torch.arange(v.shape[2]) % attention.max_len]
    return softmax.naive_softmax(attention, a, b, v, mask_BN, scale=scale, causal=causal)
