"""`bench attention`: time and memory of one attention against length, beside fused softmax and public packages."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
from tqdm import tqdm

from lra import registry
from lra.bench.base import alone, compare, finish, megabytes, milliseconds, short, table, whole_numbers
from lra.bench.peers import PEERS, PYPI, build_peer, contenders
from lra.machine import set_threads
from lra.options import UsageError
from models.base import AttentionBase

UNFUSED = "softmax unfused"
OWN = (
    f"softmax,{UNFUSED},softmax bf16,softmax causal,performer,performer bf16,performer causal,darkformer,"
    "linformer,linear,nystrom,local,reformer,s4d"
)
DEFAULT = (*OWN.split(","), *(PYPI + name for name in PEERS))
MATRICES = 3  # N x N matrices that UNFUSED holds at once, forward and backward
MEMORY_LIMIT = 6e9  # bytes of them beyond which it is left out


class Unfused(AttentionBase):
    """Softmax attention with the N x N matrix in memory, as tables of 2020 measured it."""

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        return (scale * q_BHND @ k_BHND.mT).softmax(-1) @ v_BHND


def bench_attention(args: Namespace) -> None:
    """`bench attention`: measure, print and write."""
    set_threads(args.threads)
    lengths = sorted(N for (N,) in whole_numbers("--lengths", args.lengths, "512"))
    names = contenders(args.attentions, DEFAULT)
    sizes = {"B": args.batch, "H": args.heads, "D": args.head_dim, "M": args.features}
    for name in names:  # one that cannot be built is an error before anything is measured
        contender(name, **short(sizes))
    points = []
    with tqdm(total=len(lengths) * len(names) * (args.rounds + 1), disable=None, unit="run") as bar:
        for N in lengths:
            large = 4.0 * MATRICES * args.batch * args.heads * N**2 > MEMORY_LIMIT
            fits = [name for name in names if name != UNFUSED or not large]
            points += compare("lra.bench.attention", fits, sizes | {"N": N}, args.rounds, bar.update)
    text = f"""# Time and memory of one attention

`{{command}}`: forward and backward, B {args.batch}, H {args.heads}, D {args.head_dim}, and M {args.features} \
features, landmarks, projected positions or window tokens; fp32 unless named; no padding. Each in a process of its \
own, taking turns; median of {args.rounds} rounds.

Milliseconds, and in brackets how many times as fast as fused softmax in the same round (median).

{table(points, lambda p: f"N {p['N']:,}", milliseconds)}
Peak memory in MB above an idle process that holds q, k, v and the gradient of the output. Unfused softmax is left \
out where its N x N matrices would not fit {MEMORY_LIMIT / 1e9:g} GB.

{table(points, lambda p: f"N {p['N']:,}", megabytes)}"""
    finish(args.results, "attention", "attention", {"points": points}, text)


def contender(name: str, B: int, H: int, N: int, D: int, M: int) -> Callable[[], None]:
    """One forward and backward of `name` on standard normal q, k, v (gradients of all, and of its parameters).

    A name is that of an attention, or PYPI and that of a package, followed by "unfused", "causal" or "bf16".
    M: features, landmarks, projected positions or window.
    """
    base, *how = name.split(" ")
    if unknown_words := set(how) - {"unfused", "causal", "bf16"}:
        raise UsageError(f"{name!r}: {', '.join(unknown_words)} is none of unfused, causal, bf16")
    sizes = {"heads": H, "head_dim": D, "max_len": N}
    if name == UNFUSED:
        attention = Unfused(None, **sizes)
    elif base.startswith(PYPI):
        attention = build_peer(base.removeprefix(PYPI), **sizes, size=M)
    else:
        attention = registry.build_attention(base, **sizes, **registry.budget_options(base, M))
    if "causal" in how and not attention.causal:
        raise UsageError(f"{base} has no causal form")
    dtype = torch.bfloat16 if "bf16" in how else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(B, H, N, D, generator=generator).to(dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run() -> None:
        attention.zero_grad(set_to_none=True)
        for x in leaves:
            x.grad = None
        attention(*leaves, causal="causal" in how).backward(g)

    return run


if __name__ == "__main__":
    alone(contender)
