"""The random-feature family: what its methods share around the engine.

With x~ = sqrt(scale) x, Sigma = G^T G and w_j ~ N(0, I), positive random features

    phi_j(x) = M^-1/2 exp( w_j . G x~  -  1/2 |G x~|^2 ),    E[phi(q).phi(k)] = exp(q~^T Sigma k~)

(Choromanski et al., arXiv 2009.14794, Lemma 1; G = I there) give normalised attention that is exactly the two
softmaxes of _engine.py with aq_j = ak_j = sqrt(scale) G^T w_j and key bias -1/2 |G k~|^2; the |q|^2 term cancels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch

from models.attention._engine import attend
from models.attention._products import NEVER
from models.attention.base import AttentionBase, option


class Maps(NamedTuple):
    """What makes a method of the family: the projections and biases of its two softmaxes, in fp32 at least."""

    aq_HMD: torch.Tensor
    ak_HMD: torch.Tensor
    key_bias_BHN: torch.Tensor
    feature_bias_HM: torch.Tensor | None = None


def gaussian(heads: int, features: int, dim: int, *, orthogonal: bool, seed: int, layer: int, redraw: int):
    """Projections w_HMD with rows N(0, I), a pure function of the arguments, drawn in float64 on the CPU.

    `orthogonal`: in blocks of `dim`, rows are Haar-distributed directions times independent chi(dim) norms;
    each row is still N(0, I), but rows of a block are orthogonal (arXiv 2009.14794, section 2.4). QR alone is
    not Haar: the sign of diag(R) has to be moved into Q (Mezzadri 2007, arXiv math-ph/0609050).
    """
    key = hashlib.sha256(f"gaussian {seed} {layer} {redraw}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if not orthogonal:
        return normal(heads, features, dim).float()
    blocks = -(-features // dim)
    q, r = torch.linalg.qr(normal(heads, blocks, dim, dim))
    haar = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    norms_HM1 = normal(heads, features, dim).norm(dim=-1, keepdim=True)
    return (haar.transpose(-1, -2).reshape(heads, blocks * dim, dim)[:, :features] * norms_HM1).float()


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Options every method of the family has."""

    num_features: int = option(64, "random features M per head", budget=True)
    orthogonal: bool = option(True, "draw the projections in orthogonal blocks")
    redraw_every: int = option(0, "training steps between redraws of the projections; 0 = never")


class RandomFeatureAttention(AttentionBase):
    """Base of the family: holds the projections and redraws them during training, never in evaluation.

    `config` is a FeatureConfig. Projections are buffers, saved with the model
    and identical on every rank: a function of (seed, layer, number of redraws).
    """

    random = True
    linear = True
    causal = True
    recurrent = True

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        if config.num_features < 1:
            raise ValueError(f"num_features must be at least 1; got {config.num_features}")
        if config.redraw_every < 0:
            raise ValueError(f"redraw_every must be 0 (never) or more; got {config.redraw_every}")
        self.register_buffer("redraws", torch.zeros((), dtype=torch.int64))
        self.register_buffer("w_HMD", self._draw(0))

    def _draw(self, redraw: int) -> torch.Tensor:
        return gaussian(
            self.heads,
            self.config.num_features,
            self.head_dim,
            orthogonal=self.config.orthogonal,
            seed=self.seed,
            layer=self.layer,
            redraw=redraw,
        )

    def before_step(self, step):
        redraw = step // self.config.redraw_every if self.config.redraw_every else 0
        if redraw != int(self.redraws):
            self.redraws.fill_(redraw)
            self.w_HMD.copy_(self._draw(redraw))

    def maps(self, k_BHND: torch.Tensor, scale: float) -> Maps:
        """The method: called outside of autocast with keys in fp32 at least."""
        raise NotImplementedError

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        return attend(q_BHND, k_BHND, v_BHND, *self._maps(k_BHND, scale), mask_BN, causal=causal)

    def _maps(self, k_BHND, scale):
        with torch.autocast(k_BHND.device.type, enabled=False):
            return self.maps(k_BHND.to(torch.promote_types(k_BHND.dtype, torch.float32)), scale)

    def step(self, q_BHD, k_BHD, v_BHD, state=None, mask_B=None, *, scale=None):
        """State: L (B, H, M) and Y (B, H, M, D) of _engine.py over the tokens so far."""
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


def naive_features(q, k, v, w_HMD, geometry_HDD, mask_BN, scale, causal=False):
    """The textbook form: feature vectors, then (phi(q) . sum phi(k) v) / (phi(q) . sum phi(k)).

    `geometry_HDD` is G; all in the dtype of q.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def phi(x_BHND):
        y_BHND = scale**0.5 * torch.einsum("hed,bhnd->bhne", geometry_HDD, x_BHND)
        dot_BHNM = torch.einsum("hmd,bhnd->bhnm", w_HMD, y_BHND)
        return torch.exp(dot_BHNM - y_BHND.square().sum(-1, keepdim=True) / 2) / w_HMD.shape[1] ** 0.5

    phi_q, phi_k = phi(q), phi(k)
    if mask_BN is not None:
        phi_k = phi_k * mask_BN[:, None, :, None]
    kernel_BHNN = phi_q @ phi_k.transpose(-1, -2)
    if causal:
        kernel_BHNN = kernel_BHNN.tril()
    total_BHN1 = kernel_BHNN.sum(-1, keepdim=True)
    return kernel_BHNN @ v / torch.where(total_BHN1 == 0, 1, total_BHN1)
