"""The random-feature family: what its methods share around the engine.

With x~ = sqrt(scale) x, Sigma = G^T G and w_j ~ N(0, I), positive random features

    phi_j(x) = M^-1/2 exp( w_j . G x~  -  1/2 |G x~|^2 ),    E[phi(q).phi(k)] = exp(q~^T Sigma k~)

(Choromanski et al., arXiv 2009.14794, Lemma 1; G = I there) give normalised attention that is exactly the two
softmaxes of engine.py with aq_j = ak_j = sqrt(scale) G^T w_j and key bias -1/2 |G k~|^2; the |q|^2 term cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from models.base import AttentionBase, option, require
from models.features.engine import attend
from models.features.gemm import NEVER
from models.features.projections import gaussian


class Maps(NamedTuple):
    """What makes a method of the family: the projections and biases of its two softmaxes, in fp32 at least."""

    aq_HMD: torch.Tensor
    ak_HMD: torch.Tensor
    key_bias_BHN: torch.Tensor
    feature_bias_HM: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Options of every method of the family."""

    num_features: int = option(64, "random features M per head", budget=True)
    orthogonal: bool = option(True, "draw the projections in orthogonal blocks")


class FeatureAttention(AttentionBase):
    """Base of the family: `maps` into the engine, the recurrent step, costs. `config` is a FeatureConfig."""

    random = True
    linear_memory = True
    causal = True
    recurrent = True

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        require(config, num_features=1)

    def maps(self, k_BHND: torch.Tensor, scale: float) -> Maps:
        """The method: called outside of autocast with keys in fp32 at least."""
        raise NotImplementedError

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        return attend(q_BHND, k_BHND, v_BHND, *self._maps(k_BHND, scale), mask_BN, causal=causal)

    def _maps(self, k_BHND, scale):
        with torch.autocast(k_BHND.device.type, enabled=False):
            return self.maps(k_BHND.to(torch.promote_types(k_BHND.dtype, torch.float32)), scale)

    def step(self, q_BHD, k_BHD, v_BHD, state=None, mask_B=None, *, scale=None):
        """State: L (B, H, M) and Y (B, H, M, D) of engine.py over the tokens so far."""
        scale = self.head_dim**-0.5 if scale is None else scale
        aq_HMD, ak_HMD, key_bias_BH1, feature_bias_HM = self._maps(k_BHD[:, :, None], scale)
        q_BHD1, k_BHD1, v_BH1D = (
            q_BHD.to(aq_HMD)[..., None],
            k_BHD.to(aq_HMD)[..., None],
            v_BHD.to(aq_HMD)[:, :, None],
        )
        l_BHM = (ak_HMD @ k_BHD1)[..., 0] + key_bias_BH1
        if mask_B is not None:
            l_BHM = l_BHM.masked_fill(~mask_B[:, None, None], NEVER)
        if state is None:
            state = torch.full_like(l_BHM, NEVER), torch.zeros_like(l_BHM)[..., None] * v_BH1D
        L_BHM = torch.logaddexp(state[0], l_BHM)
        Y_BHMD = (state[0] - L_BHM).exp()[..., None] * state[1] + (l_BHM - L_BHM).exp()[..., None] * v_BH1D
        r_BHM = (aq_HMD @ q_BHD1)[..., 0] + L_BHM
        if feature_bias_HM is not None:
            r_BHM = r_BHM + feature_bias_HM
        out_BHD = (r_BHM.softmax(-1)[..., None, :] @ Y_BHMD)[..., 0, :]
        seen_BH1 = L_BHM.amax(-1, keepdim=True) > NEVER / 2
        return out_BHD.where(seen_BH1, 0).to(v_BHD.dtype), (L_BHM, Y_BHMD)

    def flops(self, B, H, N, D):
        return 8 * B * H * N * self.config.num_features * D

    def state_bytes(self, N):
        M = self.config.num_features
        return (
            4 * self.heads * M * (self.head_dim + 1)
        )  # Y and L: the weights are recomputed, a chunk at a time

    @property
    def feature_dim(self) -> int:
        """Width of the vectors that the projections are drawn for."""
        return self.head_dim

    def gaussian(self, redraw: int = 0, *, pool: int = 1) -> torch.Tensor:
        """`pool` times as many projections as there are features, (H, pool M, feature_dim)."""
        size = self.heads, pool * self.config.num_features, self.feature_dim
        key = {"seed": self.seed, "layer": self.layer, "redraw": redraw}
        return gaussian(*size, orthogonal=self.config.orthogonal, **key)


def naive_phi(w_HMD, x_BHND):
    """exp(w.x - |x|^2 / 2) / M^1/2, (B, H, N, M): positive random features of scaled vectors x."""
    dot_BHNM = torch.einsum("hmd,bhnd->bhnm", w_HMD, x_BHND)
    return torch.exp(dot_BHNM - x_BHND.square().sum(-1, keepdim=True) / 2) / w_HMD.shape[1] ** 0.5
