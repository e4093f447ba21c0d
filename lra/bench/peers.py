"""Attentions of public packages behind the contract of this suite, to be measured beside ours. No run needs them.

A wrapper computes the package's attention alone, on given q, k, v: projections that the package builds in become the
identity. No wrapper takes a mask or has a causal form.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata

import torch
from torch import nn

from lra.options import UsageError, unknown
from lra.records.measured import BASELINE
from models.base import AttentionBase

PYPI = "pypi:"  # before the name of a package where attentions are named
INSTALL = "pip install -r requirements-dev.txt"


class Peer(AttentionBase):
    """`inner(q, k, v) -> out` of a package, all (B, H, N, D)."""

    def __init__(self, inner: nn.Module, **shape):
        super().__init__(None, **shape)
        self.inner = inner

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        return self.inner(q_BHND, k_BHND, v_BHND)


class _Function(nn.Module):
    """A function as a module; `inner`: a module that it uses."""

    def __init__(self, function, inner=None):
        super().__init__()
        self.function, self.inner = function, inner

    def forward(self, *x):
        return self.function(*x)


def _merged(module: nn.Module, call) -> nn.Module:
    """`call(module, q, k, v)` on (B, N, H D): heads are merged before it and split after it."""

    def forward(*qkv):
        B, H, N, D = qkv[0].shape
        merged = [x.transpose(1, 2).reshape(B, N, H * D) for x in qkv]
        return call(module, *merged).view(B, N, H, D).transpose(1, 2)

    return _Function(forward, module)


def _performer(heads, head_dim, max_len, size):
    from performer_pytorch.performer_pytorch import FastAttention

    return FastAttention(head_dim, size)


def _darkformer(heads, head_dim, max_len, size):
    from darkformer_pytorch.attention import DarkformerKernelAttention

    return DarkformerKernelAttention(head_dim, heads, num_features=size)


def _linformer(heads, head_dim, max_len, size):
    from linformer.linformer import LinformerSelfAttention

    module = LinformerSelfAttention(heads * head_dim, max_len, k=size, heads=heads)
    module.to_q, module.to_out = nn.Identity(), nn.Identity()
    module.to_k, module.to_v = (_Function(lambda x, half=half: x.chunk(2, -1)[half]) for half in (0, 1))
    return _merged(module, lambda m, q, k, v: m(q, context=torch.cat([k, v], -1)))


def _nystrom(heads, head_dim, max_len, size):
    from nystrom_attention import NystromAttention

    # Without its convolution, whose gradient in oneDNN is wrong on some CPUs (LOG.md).
    module = NystromAttention(heads * head_dim, dim_head=head_dim, heads=heads, num_landmarks=size, residual=False)
    module.to_qkv, module.to_out = nn.Identity(), nn.Identity()
    return _merged(module, lambda m, *qkv: m(torch.cat(qkv, -1)))


PEERS = {  # package -> builder
    "performer-pytorch": _performer,
    "darkformer-pytorch": _darkformer,
    "linformer": _linformer,
    "nystrom-attention": _nystrom,
}


def contenders(text: str | None, default: Sequence[str]) -> list[str]:
    """The comma-separated names of a benchmark, or its default, without packages that are not installed. Those are
    named on stderr. Raises UsageError where BASELINE is missing."""
    names = text.split(",") if text else list(default)
    if BASELINE not in names:
        raise UsageError(f"--attentions needs {BASELINE}: every ratio is taken to it; got {text}")
    if missing := [n for n in names if n.startswith(PYPI) and version(n.removeprefix(PYPI)) is None]:
        print(f"left out, not installed: {', '.join(missing)} ({INSTALL})", file=sys.stderr)
    return [n for n in names if n not in missing]


def version(package: str) -> str | None:
    """The version of a package, or None when it is not installed. A word such as "bf16" may follow its name."""
    package = package.partition(" ")[0]
    if package not in PEERS:
        raise unknown("peer", package, list(PEERS))
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def build_peer(package: str, *, heads: int, head_dim: int, max_len: int, size: int) -> Peer:
    """The attention of a package, with `size` random features, projected positions or landmarks.

    Raises UsageError when the package is not installed.
    """
    if version(package) is None:
        raise UsageError(f"{package} is not installed: {INSTALL}")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # at import, inside packages of 2020
        inner = PEERS[package](heads, head_dim, max_len, size)
    return Peer(inner, heads=heads, head_dim=head_dim, max_len=max_len)
