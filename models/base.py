"""What an attention is, and how to write one.

A file models/attention/<name>.py exports three things; the command line, the tables and the tests then find it by name:

    Config          frozen dataclass with keyword-only fields, each an `option` with a help text
    Attention       subclass of AttentionBase with `Config = Config`, true traits, and a docstring that cites a source
    naive_<name>    float64 reference (attention, q, k, v, mask_BN=None, *, scale=None) -> out, written for reading;
                    where the method is causal, with one more keyword `causal=False`

For example, attention by the angle between a query and a key:

    @dataclass(frozen=True, kw_only=True)
    class Config:
        sharpness: float = option(10.0, "factor of the cosine")

    class Attention(AttentionBase):
        '''out_i = sum_n softmax_n(sharpness cos(q_i, k_n)) v_n  (Henry et al., arXiv 2010.04245).'''
        Config = Config
        linear_memory = True

        def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
            q, k = F.normalize(q_BHND, dim=-1), F.normalize(k_BHND, dim=-1)
            seen = None if mask_BN is None else mask_BN[:, None, None, :] | ~real_rows(mask_BN)
            out = F.scaled_dot_product_attention(q, k, v_BHND, attn_mask=seen, scale=self.config.sharpness)
            return out if mask_BN is None else out.masked_fill(~real_rows(mask_BN), 0)

        def flops(self, B, H, N, D):
            return 4 * B * H * N * N * D

        def state_bytes(self, N):
            return 4 * self.heads * N * (2 * self.head_dim + 1)  # q and k of length 1, and a log-sum-exp per query

What must hold, and `python -m tests.models.contract NAME` checks (NAME also `package.module:Class`, with its folder in
PYTHONPATH and its reference `naive_<class in lower case>` beside it):

  * Sums, norms and exponentials are in fp32 at least. So `attend` gets q, k, v in fp32 at least, outside of autocast,
    and its result goes back to the type of v; a method with `half = True` gets them as they are.
  * `mask_BN` is True at real tokens. Padding, and whatever stands there (in k and v NaN too), changes nothing at them.
  * A row without a real token gives zeros and finite gradients. A softmax over nothing is NaN, and so is its gradient.
  * A result never depends on N, the padded length of this batch. What needs a length takes `max_len`.
  * `fixed_length = True`: the method cannot take more than max_len tokens. Learned positions are one reason for it.
  * Rows of a batch do not see each other. A causal output at token i does not see tokens after i, not even by rounding.
  * Random draws are buffers made in the constructor from (seed, layer), and are saved with the model.

Projections, heads, residual, dropout and positions belong to the encoder.

Shape suffixes, used on every tensor of models/:

    B batch    T towers    N tokens    E model width    H heads    D head width    F FFN width
    M random features    K keys instead of N (Linformer's projected length, a window)    C classes
    Q queries instead of N    J blocks of a sequence    L tokens of a block
    S states of a channel, in conjugate pairs; tokens of a sample
    R rows of G (DARKFormer)    P candidates of a pool
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn


def option(default: Any, help: str, *, budget: bool = False, later: bool = False) -> Any:
    """A documented field of a Config.

    `budget`: the default comes from the task's recipe, so that every method with an approximation size gets the same.
    `later`: the option is younger than committed records. At its default it changes nothing and is not stored with a
    run, so that old runs keep their identity.
    """
    return dataclasses.field(default=default, metadata={"help": help, "budget": budget, "later": later})


def require(config: Any, **least: int) -> None:
    """Raises ValueError for an option of `config` that is below its least value."""
    for name, value in least.items():
        if getattr(config, name) < value:
            raise ValueError(f"{name} must be at least {value}; got {getattr(config, name)}")


class AttentionBase(nn.Module):
    """(q, k, v, mask) -> out, all (B, H, N, D). The traits below are claims, and the contract tests check each."""

    Config: ClassVar[type]
    exact: ClassVar[bool] = False  # equals softmax attention
    random: ClassVar[bool] = False  # draws randomness; converges to its stated kernel
    causal: ClassVar[bool] = False  # has a causal form: token i sees tokens up to i alone
    recurrent: ClassVar[bool] = False  # causal, with a state of constant size: has `step`
    linear_memory: ClassVar[bool] = False  # memory grows no faster than N
    fixed_length: ClassVar[bool] = False  # N may not exceed max_len
    reads_qk: ClassVar[bool] = True  # False: output depends on v alone, and the encoder passes v for q and k
    adapts: ClassVar[bool] = False  # keeps a sample of its training data in buffers, which all ranks must share
    half: ClassVar[bool] = False  # takes half precision as it comes, under autocast too, and sums in fp32 itself

    def __init__(self, config: Any, *, heads: int, head_dim: int, max_len: int, seed: int = 0, layer: int = 0):
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
        if mask_BN is not None:  # 0 times a number that is not finite is not 0
            padding_B1N1 = ~mask_BN[:, None, :, None]
            k_BHND, v_BHND = k_BHND.masked_fill(padding_B1N1, 0), v_BHND.masked_fill(padding_B1N1, 0)
        if self.half:
            return self.attend(q_BHND, k_BHND, v_BHND, mask_BN, scale, causal)
        with torch.autocast(v_BHND.device.type, enabled=False):
            q, k, v = (x.to(wide(x.dtype)) for x in (q_BHND, k_BHND, v_BHND))
            return self.attend(q, k, v, mask_BN, scale, causal).to(v_BHND.dtype)

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale: float, causal: bool) -> torch.Tensor:
        """The method itself, on checked inputs, k and v 0 at padding; `causal` is True only where the trait is."""
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

        `state` is what the step before returned, None at the first token. Its size does not grow. A token that
        `mask_B` marks as padding leaves the state as it was. Only where the trait `recurrent` is True.
        """
        raise ValueError(f"{self.name} has no recurrent form")

    @torch.no_grad()
    def state_after(
        self,
        k_BHND: torch.Tensor,
        v_BHND: torch.Tensor,
        mask_BN: torch.Tensor | None = None,
        *,
        scale: float | None = None,
    ) -> Any:
        """The state of `step` after these first tokens of a sequence, without gradients. ValueError as in `step`."""
        scale = self.head_dim**-0.5 if scale is None else scale
        mask_BN = torch.ones_like(k_BHND[:, 0, :, 0], dtype=torch.bool) if mask_BN is None else mask_BN
        k, v = (x.masked_fill(~mask_BN[:, None, :, None], 0) for x in (k_BHND, v_BHND))
        with torch.autocast(v.device.type, enabled=False):
            return self.gather(*(x if self.half else x.to(wide(x.dtype)) for x in (k, v)), mask_BN, scale)

    def gather(self, k_BHND, v_BHND, mask_BN, scale: float) -> Any:
        """`state_after`, on k and v 0 at padding: token by token here, in one pass where a method defines it."""
        state = None
        for k_BHD, v_BHD, real_B in zip(k_BHND.unbind(2), v_BHND.unbind(2), mask_BN.unbind(1), strict=True):
            _, state = self.step(k_BHD, k_BHD, v_BHD, state, real_B, scale=scale)
        return state

    def flops(self, B: int, H: int, N: int, D: int) -> int:
        """Floating-point operations of the matrix products of one forward pass; a multiply-add counts as two."""
        raise NotImplementedError

    def state_bytes(self, N: int) -> int:
        """fp32 bytes of intermediates that one forward pass needs per batch element, beyond q, k, v and out."""
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


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def real_rows(mask_BN: torch.Tensor) -> torch.Tensor:
    """(B, 1, 1, 1) bool: True where a row has at least one real token."""
    return mask_BN.any(-1)[:, None, None, None]


def real_first(mask_BN: torch.Tensor) -> torch.Tensor:
    """Indices (B, N) that bring the real tokens of each row to the front, in their order; `argsort` brings back."""
    return mask_BN.argsort(dim=1, descending=True, stable=True)


def take(x_BHND: torch.Tensor, index_BN: torch.Tensor) -> torch.Tensor:
    """The tokens of each row in the order of `index`, or those of them that it names."""
    return x_BHND.gather(2, index_BN[:, None, :, None].expand(-1, x_BHND.shape[1], -1, x_BHND.shape[3]))


def packed(attend: Callable, mask_BN: torch.Tensor | None, *tensors_BHND: torch.Tensor) -> torch.Tensor:
    """attend(*tensors, mask) of rows whose real tokens come first, in their order, brought back into place.

    Padding is then the future of a causal method, and passes no time between two tokens. Rows without a real token
    become 0.
    """
    if mask_BN is None:
        return attend(*tensors_BHND, None)
    order_BN = real_first(mask_BN)
    out_BHND = attend(*(take(x, order_BN) for x in tensors_BHND), mask_BN.gather(1, order_BN))
    return take(out_BHND, order_BN.argsort(1)).masked_fill(~real_rows(mask_BN), 0)


def alibi(slopes_H: torch.Tensor, N: int) -> torch.Tensor:
    """-slope_h |i - n|, (H, N, N)  (Press et al., arXiv 2108.12409; both directions for an encoder)."""
    n_N = torch.arange(N, device=slopes_H.device)
    return -slopes_H[:, None, None] * (n_N[:, None] - n_N).abs()


def naive_average(
    kernel_BHNN: torch.Tensor, v_BHND: torch.Tensor, mask_BN: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """For references: sum_n kernel_in v_n / sum_n kernel_in over the keys n that i may see; 0 where there is none."""
    if mask_BN is not None:
        kernel_BHNN = kernel_BHNN * mask_BN[:, None, None, :]
    if causal:
        kernel_BHNN = kernel_BHNN.tril()
    total_BHN1 = kernel_BHNN.sum(-1, keepdim=True)
    return kernel_BHNN @ v_BHND / torch.where(total_BHN1 == 0, 1, total_BHN1)
