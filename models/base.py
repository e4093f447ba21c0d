"""The attention contract.

Shape suffixes, used on every tensor of models/:

    B batch    T towers    N tokens    E model width    H heads    D head width    F FFN width
    M random features    K keys instead of N (Linformer's projected length, a window)    C classes
    J chunks of a sequence    L tokens of a chunk    S states of a channel, in conjugate pairs; tokens of a sample
    R rows of G (DARKFormer)    P candidates of a pool

`mask_BN` is True at real tokens. Padding never changes a result at real tokens, and a row without any real
token gives zeros. Projections, head split, residual, dropout and positions belong to the encoder.

A file models/attention/<name>.py exports

    Config          frozen, keyword-only dataclass of `option`s
    Attention       subclass of AttentionBase with `Config = Config`
    naive_<name>    float64 reference (attention, q, k, v, mask_BN=None, *, scale=None) -> out, no cleverness;
                    with `causal=False` as one more keyword where the method is causal
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn


def option(default: Any, help: str, *, budget: bool = False, later: bool = False) -> Any:
    """A documented Config field. `budget=True`: its default comes from the task's recipe, so that every
    method with an approximation size gets the same one. `later=True`: added when there were results already; at
    its default it changes nothing, and stays out of a run's identity, so that they keep theirs."""
    return dataclasses.field(default=default, metadata={"help": help, "budget": budget, "later": later})


class AttentionBase(nn.Module):
    """What every attention is: (q, k, v, mask) -> out, all (B, H, N, D), plus declared traits.

    Traits are claims, and the contract tests hold each class to its own:
    """

    Config: ClassVar[type]
    exact: ClassVar[bool] = False  # equals softmax attention
    random: ClassVar[bool] = False  # draws randomness; converges to its stated kernel
    causal: ClassVar[bool] = False  # can be asked for causal evaluation: token i sees tokens up to i alone
    recurrent: ClassVar[bool] = False  # causal, with a state of constant size: has `step`
    linear: ClassVar[bool] = False  # memory grows no faster than N
    fixed_length: ClassVar[bool] = False  # has parameters per position: N may not exceed max_len
    adapts: ClassVar[bool] = False  # keeps something of the data it is trained on in its buffers
    reads_qk: ClassVar[bool] = True  # False: output depends on v alone, and the encoder passes v for q and k

    def __init__(
        self, config: Any, *, heads: int, head_dim: int, max_len: int, seed: int = 0, layer: int = 0
    ):
        """`max_len` in tokens; `seed` and `layer` seed whatever the method draws at random."""
        super().__init__()
        self.config, self.heads, self.head_dim = config, heads, head_dim
        self.max_len, self.seed, self.layer = max_len, seed, layer

    def forward(
        self,
        q_BHND: torch.Tensor,
        k_BHND: torch.Tensor,
        v_BHND: torch.Tensor,
        mask_BN: torch.Tensor | None = None,
        *,
        causal: bool = False,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attention output, (B, H, N, D), in the dtype of v or of autocast. `scale` multiplies q.k, None = D**-0.5.

        Raises ValueError for wrong shapes or mask types, for `causal` where the method has none, and for
        sequences beyond max_len where the method is `fixed_length`.
        """
        self._check(q_BHND, k_BHND, v_BHND, mask_BN, causal)
        scale = self.head_dim**-0.5 if scale is None else scale
        return self.attend(q_BHND, k_BHND, v_BHND, mask_BN, scale, causal)

    def attend(
        self,
        q_BHND: torch.Tensor,
        k_BHND: torch.Tensor,
        v_BHND: torch.Tensor,
        mask_BN: torch.Tensor | None,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        """The method itself, on checked inputs; `causal` is never True where the trait is not."""
        raise NotImplementedError

    def step(
        self,
        q_BHD: torch.Tensor,
        k_BHD: torch.Tensor,
        v_BHD: torch.Tensor,
        state: Any = None,
        mask_B: torch.Tensor | None = None,
        *,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """One more token of the causal form: its output (B, H, D), and the state after it.

        `state` is what the step before returned, None at the first token; its size does not grow. A token that
        `mask_B` calls padding leaves the state as it was. Only where the trait `recurrent` is True.
        """
        raise ValueError(f"{self.name} has no recurrent form")

    def flops(self, B: int, H: int, N: int, D: int) -> int:
        """Floating-point operations of one forward pass, a multiply-add counted as two."""
        raise NotImplementedError

    def state_bytes(self, N: int) -> int:
        """fp32 bytes of intermediates one forward pass needs per batch element, beyond q, k, v and out."""
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """Called by the trainer before optimizer step `step` = 0, 1, ...; redraws random projections."""

    def tie(self, first: AttentionBase) -> None:
        """Called on the attentions of layers 1, 2, ... with that of layer 0, to share parameters with it."""

    def calibrate(
        self,
        q_BHND: torch.Tensor,
        k_BHND: torch.Tensor,
        mask_BN: torch.Tensor | None = None,
        *,
        scale: float | None = None,
    ) -> None:
        """Fit what the method takes from data (means, alignments, proposals) to queries and keys of a model."""

    def add_alibi(self, slopes_H: torch.Tensor) -> None:
        """Add -slopes_h |i - n| to the logit of every pair from now on (ALiBi, arXiv 2108.12409).

        Raises ValueError where the method has no logits of pairs to add to.
        """
        raise ValueError(f"{self.name} cannot add ALiBi: it never forms the logits of pairs of tokens")

    @property
    def name(self) -> str:
        """The name of its file, for messages."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def _check(self, q, k, v, mask, causal) -> None:
        name = self.name
        if causal and not self.causal:
            raise ValueError(f"{name} has no causal form")
        expected = (q.shape[0], self.heads, q.shape[2], self.head_dim) if q.dim() == 4 else None
        if expected is None or not (q.shape == k.shape == v.shape == expected):
            raise ValueError(
                f"{name}: q, k, v must all be (B, {self.heads}, N, {self.head_dim}); "
                f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (q.shape[0], q.shape[2])):
            raise ValueError(
                f"{name}: mask must be bool (B, N) = ({q.shape[0]}, {q.shape[2]}), True at real tokens; "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        if self.fixed_length and q.shape[2] > self.max_len:
            raise ValueError(f"{name}: {q.shape[2]} tokens exceed max_len {self.max_len}")


def naive_average(
    kernel_BHNN: torch.Tensor, v_BHND: torch.Tensor, mask_BN: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """For references: sum_n kernel_in v_n / sum_n kernel_in over the keys n that i may see, 0 where there is none."""
    if mask_BN is not None:
        kernel_BHNN = kernel_BHNN * mask_BN[:, None, None, :]
    if causal:
        kernel_BHNN = kernel_BHNN.tril()
    total_BHN1 = kernel_BHNN.sum(-1, keepdim=True)
    return kernel_BHNN @ v_BHND / torch.where(total_BHN1 == 0, 1, total_BHN1)


def real_rows(mask_BN: torch.Tensor) -> torch.Tensor:
    """(B, 1, 1, 1) bool: True where a row has at least one real token."""
    return mask_BN.any(-1)[:, None, None, None]
