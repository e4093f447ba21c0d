"""DARKFormer: random features whose covariance Sigma = G^T G is learned."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from models.base import option
from models.features.aligned import AlignedAttention, AlignedConfig, naive_aligned
from models.features.projections import power, ridged, variance_optimal


@dataclass(frozen=True, kw_only=True)
class Config(AlignedConfig):
    """Options of the data-aware random kernel."""

    init: Literal["identity", "whitening", "aligned"] = option(
        "identity",
        "where G starts: identity; whitening = the inverse root covariance of q and k, their mean norm kept; "
        "aligned = the identity times the temperature of target_norm, learned from there; needs align",
        later=True,
    )
    rank: int = option(0, "rows of G, at most the head width; 0 = the head width", later=True)
    share_heads: bool = option(False, "one G for all heads", later=True)
    proposal: Literal["isotropic", "variance_optimal"] = option(
        "isotropic",
        "distribution of the projections; variance_optimal = theorem 3.2 on the data calibrated with",
        later=True,
    )


class Attention(AlignedAttention):
    """Unbiased estimate of the kernel exp(scale q^T Sigma k), normalised, Sigma = G^T G (arXiv 2603.04127).

    The engine with ak_j = sqrt(scale) w_j, which attends to G k, aq_j = G^T ak_j, and key bias -scale |G k|^2 / 2.
    The paper calls the geometry matrix M; M here is the number of features. G, one D x D matrix per head,
    starts at the identity: DARKFormer then is Performer. With `align`, G acts on aligned q and k.
    8 B H N M D + 2 B H N D^2 operations, O(N + M) memory. Raises ValueError for a rank beyond the head width.
    """

    Config = Config

    def __init__(self, config, **shape):
        if not 0 <= config.rank <= shape["head_dim"]:
            raise ValueError(f"rank must be 0 to the head width {shape['head_dim']}; got {config.rank}")
        if config.init == "aligned" and (config.align == "none" or not config.target_norm):
            raise ValueError(
                "init=aligned needs align=centre or align=balance, and a target_norm above 0; "
                f"got align={config.align}, target_norm={config.target_norm}"
            )
        adapts = config.init != "identity" or config.proposal != "isotropic"
        # With init=aligned, G starts at the temperature and learns it: T has none then.
        super().__init__(config, adapts=adapts, cools=config.init != "aligned", **shape)
        # (H, R, D), R <= D; the name is that of the weights that exist.
        G_RD = torch.eye(self.feature_dim, self.head_dim)
        self.G_HDD = nn.Parameter(G_RD.repeat(1 if config.share_heads else self.heads, 1, 1))
        if config.proposal == "variance_optimal":
            self.register_buffer("root_HRR", torch.eye(self.feature_dim).repeat(self.heads, 1, 1))
            self.b_HM = torch.zeros(self.heads, config.num_features)

    @property
    def feature_dim(self):
        return self.config.rank or self.head_dim

    def fit(self, Lambda_HDD):
        heads = self.G_HDD.shape[0]
        shared_HDD = Lambda_HDD.mean(0, keepdim=True) if heads == 1 else Lambda_HDD
        if self.config.init == "aligned":
            self.G_HDD.copy_(self.temperature(2 * shared_HDD) * torch.eye(self.feature_dim, self.head_dim))
        elif self.config.init == "whitening":
            self.G_HDD.copy_(whitening(shared_HDD, self.feature_dim))
        if self.config.proposal == "variance_optimal":
            G_HRD = self.G_HDD.detach().cpu().double()
            name = f"{self.name}, layer {self.layer}"
            self.root_HRR.copy_(variance_optimal(G_HRD @ Lambda_HDD @ G_HRD.mT, name))

    def draw(self):
        z_HMR = self.gaussian(int(self.redraws))
        if self.config.proposal == "isotropic":
            return z_HMR, None
        root_HRR = self.root_HRR.to(z_HMR)
        w_HMR = z_HMR @ root_HRR
        # b = log N(w; 0, I) / N(w; 0, Sigma*), with w = Sigma*^1/2 z
        log_det_H1 = torch.linalg.eigvalsh(root_HRR).log().sum(-1, keepdim=True)
        return w_HMR, (z_HMR.square().sum(-1) - w_HMR.square().sum(-1)) / 2 + log_det_H1


def whitening(Lambda_HDD: torch.Tensor, rank: int) -> torch.Tensor:
    """c Lambda^-1/2, (H, rank, D), on the `rank` largest eigenvectors; c keeps the mean of |x|^2, x of covariance
    Lambda, so that only the directions are evened out and the temperature stays."""
    Lambda_HDD = ridged(Lambda_HDD)
    trace_H11 = Lambda_HDD.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    if rank == Lambda_HDD.shape[-1]:
        root_HRD = power(Lambda_HDD, -0.5)
    else:
        values, vectors = torch.linalg.eigh(Lambda_HDD)
        root_HRD = vectors[..., -rank:].mT / values[:, -rank:, None].sqrt()
    return (trace_H11 / rank).sqrt() * root_HRD


def naive_darkformer(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """phi(x) = M^-1/2 exp(w.G x~ - |G x~|^2 / 2), feature vectors written out."""
    return naive_aligned(attention, q, k, v, mask_BN, scale, causal)
