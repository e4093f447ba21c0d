"""`bench attention`: time and memory of one attention against length, beside fused softmax and public packages."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch

from lra.bench.base import Column, both, finish, twice, whole_numbers
from lra.bench.peers import PEERS, PYPI, WINDOW, build, contenders
from lra.machine import set_threads
from lra.options import UsageError

UNFUSED = "softmax unfused"
DEFAULT = (
    *("softmax", "softmax causal", "performer", "performer bf16", "performer causal", "performer hybrid"),
    *("performer hybrid causal", "darkformer", "performer plain", "darkformer plain"),
    *(PYPI + package for package in PEERS),
    *("linformer", "linear", "nystrom", "local", "reformer", "s4d"),
)
MEMORY = {"B": 1, "N": 16384}  # where memory is measured, and no time
QUADRATIC = 4096  # tokens beyond which UNFUSED is left out


def bench_attention(args: Namespace) -> None:
    """`bench attention`: measure, print and write."""
    set_threads(args.threads)
    lengths = sorted(N for (N,) in whole_numbers("--lengths", args.lengths, "512"))
    names, sizes = contenders(args.attentions, DEFAULT), {"B": args.batch, "H": args.heads, "D": args.head_dim}
    facts = [sizes | {"N": N, "M": args.features} for N in lengths]
    columns = [Column(f, args.rounds, [n for n in names if n != UNFUSED or f["N"] <= QUADRATIC]) for f in facts]
    if args.memory == "yes":
        columns.append(Column(facts[0] | MEMORY, 0, [name for name in names if name != UNFUSED]))
    measured = twice("lra.bench.attention", columns)
    text = f"""# Time and memory of one attention

`{{command}}`: forward and backward, B {args.batch}, H {args.heads}, D {args.head_dim}, and M {args.features} \
features, landmarks, projected positions or window tokens; fp32 unless named; no padding. hybrid: exact within \
blocks of {WINDOW} tokens and to the neighbouring ones, features beyond. plain: the definition in a few \
lines, with autograd. Each in a process of its own, taking turns; {args.rounds} rounds.
{both(measured, lambda p: f"N {p['N']:,}" + (f", B {p['B']}" if "rounds" not in p else ""), lambda points: "")}"""
    timed = {setting: [p for p in points if "rounds" in p] for setting, points in measured.items()}
    memory = {setting: [p for p in points if "rounds" not in p] for setting, points in measured.items()}
    lists = {"points": timed["tuned"], "as_found": timed["as_found"], "memory": memory}
    finish(args.results, "attention", "attention", lists, text)


def contender(name: str, B: int, H: int, N: int, D: int, M: int, device: str = "cpu") -> dict[str, Callable[[], None]]:
    """One forward and backward of `name` on standard normal q, k, v (gradients of all, and of its parameters). A name
    is one of lra/bench/peers.py, "causal" or "bf16" among its words."""
    attention, words = build(name, M, ("causal", "bf16"), heads=H, head_dim=D, max_len=N)
    if "causal" in words and not attention.causal:
        raise UsageError(f"{name.replace(' causal', '')} has no causal form")
    dtype = torch.bfloat16 if "bf16" in words else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(B, H, N, D, generator=generator).to(device, dtype) for _ in range(4))
    attention, leaves = attention.to(device), [x.requires_grad_() for x in (q, k, v)]

    def run() -> None:
        attention.zero_grad(set_to_none=True)
        for x in leaves:
            x.grad = None
        attention(*leaves, causal="causal" in words).backward(g)

    return {"run": run}
