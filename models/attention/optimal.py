"""Random features sampled by the optimal policy for the data seen."""

from dataclasses import dataclass

import torch

from models.base import option, require
from models.features.aligned import AlignedAttention, AlignedConfig, naive_aligned
from models.features.projections import generator, optimal_resample


@dataclass(frozen=True, kw_only=True)
class Config(AlignedConfig):
    """Options of optimal sampling."""

    pool: int = option(8, "candidates per feature that each resampling chooses from")


class Attention(AlignedAttention):
    """Performer's kernel with w ~ psi*(w) in proportion to N(w; 0, I) (E_q phi(q; w)^2 E_k phi(k; w)^2)^1/2.

    The policy of least variance for given data (arXiv 2406.18802), by resampling: M of `pool` M Gaussian
    candidates, in proportion to the root taken over queries and keys seen, weighted back by b_j = log p/psi.
    Resampled every `redraw_every` steps on the step before; Gaussian until the first calibration. Unbiased
    for any pool, given which the weights are exact; its variance is least for a large one. 8 B H N M D
    operations, O(N + M) memory.
    """

    Config = Config

    def __init__(self, config, **shape):
        require(config, pool=1)
        super().__init__(config, adapts=True, resamples=True, **shape)
        self.b_HM = torch.zeros(self.heads, config.num_features)

    @torch.no_grad()
    def draw(self):
        redraw = int(self.redraws)
        if not self.calibrated:
            return self.gaussian(redraw), None
        pool_HPD = self.gaussian(redraw, pool=self.config.pool).double()
        root_scale = self.seen_scale.cpu() ** 0.5
        q_HSD, k_HSD = (
            root_scale * self.aligned(seen[None].double(), side)[0].cpu()
            for seen, side in ((self.seen_q_HSD, "q"), (self.seen_k_HSD, "k"))
        )
        source = generator("resample", self.seed, self.layer, redraw)
        return optimal_resample(pool_HPD, q_HSD, k_HSD, self.config.num_features, source)


def naive_optimal(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """Feature vectors written out, the queries' times the importance weights."""
    return naive_aligned(attention, q, k, v, mask_BN, scale, causal)
