"""What is measured beside our attentions, behind their contract: public packages, and formulations without a kernel of
their own. No run needs them.

A contender has a name: "performer causal", "performer M64", "pypi:performer-pytorch bf16". Words behind the first:

    M64        64 features, landmarks, projected positions or window tokens
    hybrid     exact attention within blocks of WINDOW tokens and to the neighbouring blocks (random features alone)
    plain      the definition of performer or darkformer, the logits in memory and gradients by autograd
    unfused    softmax with the N x N matrix in memory, as tables of 2020 measured it

None of these takes a mask or has a causal form. Of a package the attention alone is measured, on given q, k, v.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Collection, Sequence
from importlib import metadata

from torch import nn

from lra import registry
from lra.options import UsageError, unknown
from lra.records.measured import BASELINE
from models.attention import darkformer, performer
from models.base import AttentionBase
from models.features.family import FeatureAttention

PYPI = "pypi:"  # before the name of a package where attentions are named
INSTALL = "pip install -r requirements-dev.txt"
WINDOW = 128  # of a hybrid
SIZE = r"M[1-9]\d*"  # the word that sets an approximation size
PEERS = ("performer-pytorch", "darkformer-pytorch")


class Plain:
    """A method of OURS, written out: features attend to keys, queries attend to features."""

    causal = False

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        a_HMD, mapped_BHND = scale**0.5 * self.w_HMD.to(q_BHND.dtype), k_BHND
        if self.G_HDD is not None:
            a_HMD, mapped_BHND = a_HMD @ self.G_HDD, k_BHND @ self.G_HDD.mT
        key_bias_BH1N = -scale / 2 * mapped_BHND.square().sum(-1)[:, :, None]
        logits_BHMN = a_HMD @ k_BHND.mT + key_bias_BH1N
        Y_BHMD = logits_BHMN.softmax(-1) @ v_BHND
        return (q_BHND @ a_HMD.mT + logits_BHMN.logsumexp(-1)[:, :, None]).softmax(-1) @ Y_BHMD


class PlainPerformer(Plain, performer.Attention):
    """softmax_j(a_j.q + L_j) Y_j with a_j drawn."""


class PlainDarkformer(Plain, darkformer.Attention):
    """The same with a_j = G^T w_j, G learned."""


PLAIN = {"performer": PlainPerformer, "darkformer": PlainDarkformer}
OURS = tuple(PLAIN)  # what the packages have too


class Unfused(AttentionBase):
    """Softmax attention, the same way."""

    half = True

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        return (scale * q_BHND @ k_BHND.mT).softmax(-1) @ v_BHND


class Peer(AttentionBase):
    """`inner(q, k, v) -> out` of a package, all (B, H, N, D)."""

    half = True

    def __init__(self, inner: nn.Module, **shape):
        super().__init__(None, **shape)
        self.inner = inner

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        return self.inner(q_BHND, k_BHND, v_BHND)


def contenders(text: str | None, default: Sequence[str]) -> list[str]:
    """The comma-separated names of a benchmark, or its default, without packages that are not installed, which are
    named on stderr. Raises UsageError where BASELINE is missing."""
    names = text.split(",") if text else list(default)
    if BASELINE not in names:
        raise UsageError(f"--attentions needs {BASELINE}: every ratio is taken to it; got {text}")
    if missing := [n for n in names if n.startswith(PYPI) and version(n) is None]:
        print(f"left out, not installed: {', '.join(missing)} ({INSTALL})", file=sys.stderr)
    return [n for n in names if n not in missing]


def build(name: str, M: int, how: Collection[str] = (), **shape: int) -> tuple[AttentionBase, set[str]]:
    """A contender, and the words behind its name, of which those in `how` are for the caller. `M`: its approximation
    size where the name has none. Raises UsageError for a word that does not fit, and for an absent package."""
    base, *words = name.split(" ")
    package = base.removeprefix(PYPI) if base.startswith(PYPI) else None
    known = {*how, *({"softmax": ["unfused"]}.get(base, ["plain"] if base in OURS else []))}
    if not package and "plain" not in words and issubclass(registry.attention_class(base), FeatureAttention):
        known.add("hybrid")
    sizes = [word for word in words if re.fullmatch(SIZE, word)]
    if wrong := sorted(set(words) - known - set(sizes)):
        raise UsageError(f"{name!r}: {', '.join(wrong)} is none of {', '.join(sorted(known))}, M64")
    M = int(sizes[-1][1:]) if sizes else M
    if "unfused" in words:
        return Unfused(None, **shape), set(words)
    if "plain" in words:
        return PLAIN[base](PLAIN[base].Config(num_features=M), **shape), set(words)
    if package:
        return build_peer(package, size=M, **shape), set(words)
    options = registry.budget_options(base, M) | ({"window": WINDOW} if "hybrid" in words else {})
    return registry.build_attention(base, **shape, **options), set(words)


def rivals(name: str, names: Sequence[str]) -> dict[str, list[str]]:
    """What a method of OURS is set against, by kind: those of the names that do the same as `name`."""
    base, *words = name.split(" ")
    same, found = set(words) - {"hybrid"}, {}
    if base not in OURS or "plain" in words:
        return {}
    for other in names:
        method, *more = other.split(" ")
        does, less = set(more), set(words) - set(more)
        if method == BASELINE and does == {word for word in same if not re.fullmatch(SIZE, word)}:
            kind = "fused exact attention"
        elif method == base and does == same | {"plain"}:
            kind = "plain formulation"
        elif method.startswith(PYPI) and does == same:
            kind = "the better package"
        elif method == base and does < set(words) and less <= {"causal", "bf16"}:
            kind = f"itself without {' '.join(sorted(less))}"
        else:
            continue
        found.setdefault(kind, []).append(other)
    return found


def version(name: str) -> str | None:
    """The version of the package behind "pypi:PACKAGE ...", or None when it is not installed; None for others."""
    if not name.startswith(PYPI):
        return None
    package = name.removeprefix(PYPI).partition(" ")[0]
    if package not in PEERS:
        raise unknown("peer", package, list(PEERS))
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def build_peer(package: str, *, size: int, **shape: int) -> Peer:
    """The attention of a package, with `size` random features. Raises UsageError where it is not installed."""
    if version(PYPI + package) is None:
        raise UsageError(f"{package} is not installed: {INSTALL}")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # at import, inside packages of 2020
        if package == "performer-pytorch":
            from performer_pytorch.performer_pytorch import FastAttention

            return Peer(FastAttention(shape["head_dim"], size), **shape)
        from darkformer_pytorch.attention import DarkformerKernelAttention

        return Peer(DarkformerKernelAttention(shape["head_dim"], shape["heads"], num_features=size), **shape)
