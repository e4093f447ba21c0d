"""Queries and keys that `variance` measures on: synthetic Gaussians, tensors of a trained run, tensors of a file."""

from __future__ import annotations

import itertools
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lra.leaderboard.consistency import Places
from lra.leaderboard.rerun import saved_model
from lra.options import UsageError, unknown
from lra.records import schema
from lra.records.record import read_record
from lra.training import checkpoint
from lra.training.batches import collate, example_lengths
from lra.training.evaluate import capture
from lra.training.trainer import validation_split
from models.features.projections import generator, moments

KINDS = ("matched", "skewed")
HEADS = 2  # of synthetic data: independent samples
EXAMPLES = 4  # of the validation split, for --run
# Options of synthetic data alone, and their defaults; `trace` where no `largest` is given.
GAUSSIAN = {"dim": 64, "condition": "1,10,100,1000", "trace": "1.5", "largest": None, "kinds": "matched,skewed"}
GAUSSIAN |= {"shift": 3.0, "tokens": 256}


class Case(NamedTuple):
    """Queries and keys to estimate attention on.

    eigenvalues_HD: t of the closed forms (section 3), the eigenvalues of Lambda for scaled queries and keys; where the
        distribution is not known, of the second moments of the sample.
    facts: for the report. One curve may join the cases of a group. gaussian: whether q~ and k~ are N(0, Lambda).
    """

    q_BHND: torch.Tensor
    k_BHND: torch.Tensor
    v_BHND: torch.Tensor
    mask_BN: torch.Tensor | None
    eigenvalues_HD: torch.Tensor
    facts: dict[str, Any]


def cases(args: Namespace) -> list[Case]:
    """What the options of `variance` ask for. Raises UsageError, one line, for bad input."""
    sources = {"--synthetic": args.synthetic, "--run": args.run_of, "--tensors": args.tensors}
    given = [option for option, value in sources.items() if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other: give one source")
    options = {name: getattr(args, name) for name in GAUSSIAN if getattr(args, name) is not None}
    if args.run_of or args.tensors:
        for option in options:
            raise UsageError(f"--{option} is an option of synthetic data: leave it out with {given[0]}")
        return _captured(args) if args.run_of else [_from_file(args.tensors, args.seed)]
    if args.trace and args.largest:
        raise UsageError("--trace and --largest both set the scale: give one")
    options = GAUSSIAN | options
    by = "largest" if args.largest else "trace"
    scales, conditions = ([float(x) for x in options[name].split(",")] for name in (by, "condition"))
    kinds = options["kinds"].split(",")
    for kind in set(kinds) - set(KINDS):
        raise unknown("kind of synthetic data", kind, KINDS)
    sizes = {name: options[name] for name in ("shift", "tokens")} | {"seed": args.seed}
    grid = itertools.product(kinds, scales, conditions)
    return [synthetic(kind, options["dim"], condition, **{by: scale}, **sizes) for kind, scale, condition in grid]


def synthetic(kind: str, dim: int, condition: float, *, trace=0.0, largest=0.0, shift=3.0, tokens=256, seed=0) -> Case:
    """Gaussian q and k, (1, HEADS, tokens, dim), whose eigenvalues fall geometrically over `condition`.

    matched: q~ and k~ are N(0, Lambda), as in section 3, with the `trace` or the `largest` eigenvalue given.
    skewed: keys have the eigenvalues in the opposite order, and both means have length `shift` (before scaling).
    """
    matched = kind == "matched"
    t_D = condition ** -torch.linspace(0, 1, dim).double()
    t_D *= largest or trace / t_D.sum()
    source = generator("variance", kind, dim, condition, seed)
    q, k, v = torch.randn(3, 1, HEADS, tokens, dim, generator=source, dtype=torch.float64)
    root_D = t_D.sqrt() * dim**0.25  # features see q~ = D^-1/4 q
    q, k = q * root_D, k * (root_D if matched else root_D.flip(0))
    if not matched:
        q[..., 0] += shift
        k[..., 0] += shift
    group = f"{kind}, " + (f"largest {largest:g}" if largest else f"trace {trace:g}")
    facts = {"name": f"{group}, condition {condition:g}", "group": group, "gaussian": matched}
    facts |= {"condition": condition, "trace": float(t_D.sum()), "shift": 0.0 if matched else shift}
    t_HD = t_D[None] if matched else second_moments(q, k, None)
    return Case(q.float(), k.float(), v.float(), None, t_HD, facts)


def second_moments(q_BHND: torch.Tensor, k_BHND: torch.Tensor, mask_BN: torch.Tensor | None) -> torch.Tensor:
    """Eigenvalues (H, D), descending, of the mean second moment of scaled queries and keys."""
    total = 0
    for x_BHND in (q_BHND, k_BHND):
        mean_HD, cov_HDD = moments(x_BHND, mask_BN)
        total = total + cov_HDD + mean_HD[..., None] * mean_HD[:, None]
    scale = q_BHND.shape[-1] ** -0.5
    return torch.linalg.eigvalsh(scale * total / 2).flip(-1).clamp(min=0)


def measured(name: str, q, k, v, mask: torch.Tensor | None, seed: int) -> Case:
    """A case from tensors of a model. Without values, standard normal ones are drawn."""
    if v is None:
        v = torch.randn(q.shape, generator=generator("variance values", seed))
    q, k, v = (x.detach().cpu().float() for x in (q, k, v))
    t_HD = second_moments(q, k, mask)
    condition = float((t_HD[:, 0] / t_HD[:, -1].clamp(min=1e-12)).max())
    facts = {"name": name, "group": "layers", "gaussian": False, "condition": condition}
    return Case(q, k, v, mask, t_HD, facts | {"trace": float(t_HD.sum(-1).mean())})


def _captured(args: Namespace) -> list[Case]:
    """q, k and v of each layer of a trained run, on the first EXAMPLES of its validation data."""
    places, path = Places(args.results, args.data, args.runs, "cpu", args.trust), args.run_of
    if path.is_dir():
        _, state = checkpoint.load(path / "model.safetensors")
        wanted = f"*/*/{state['digest'][:16]}/seed{state['seed']}.json"
        path = next((places.results / "records").glob(wanted), None)
        if path is None:
            raise UsageError(f"no record below {places.results} has the weights of {args.run_of}: give --results")
    record = read_record(path)
    try:
        schema.check(record)
        run, prepared, model = saved_model(path, record, places)
    except (schema.Rejected, schema.Unchecked) as error:
        raise UsageError(f"{path}: {error}") from error
    if not model.encoder.attentions[0].reads_qk:
        raise UsageError(f"{path}: {run.attention} reads no queries and keys")
    split = prepared.splits[validation_split(run)]
    longest = int(example_lengths(split, run.meta.towers)[:EXAMPLES].max())
    batch = collate(split, run.meta.towers, np.arange(min(EXAMPLES, len(split.labels))), longest)
    names = f"{run.meta.name}, {run.attention}, layer"
    layers = enumerate(capture(model, batch))
    return [measured(f"{names} {layer}", *tensors, args.seed) for layer, (_, tensors, _) in layers]


def _from_file(path: Path, seed: int) -> Case:
    """q, k (B, H, N, D) and, where they are there, v and mask (B, N), from a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name in ("q", "k", "v", "mask")}
    except FileNotFoundError:
        raise UsageError(f"no file at {path}") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a safetensors file: {error}") from None
    if missing := [name for name in ("q", "k") if name not in tensors]:
        raise UsageError(f"{path} has no tensor {' and '.join(missing)}")
    q, mask = tensors["q"], tensors.pop("mask", None)
    for name, x in tensors.items():
        if x.dim() != 4 or x.shape != q.shape or not x.is_floating_point():
            raise UsageError(f"{path}: {name} must be float (B, H, N, D), as q; got {x.dtype} {tuple(x.shape)}")
        if not x.isfinite().all():
            raise UsageError(f"{path}: {name} has values that are not finite")
    B, _, N, _ = q.shape
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (B, N)):
        given = f"{mask.dtype} {tuple(mask.shape)}"
        raise UsageError(f"{path}: mask must be bool (B, N) = ({B}, {N}); got {given}")
    if not q.numel() or (B * N if mask is None else int(mask.sum())) < 2:
        raise UsageError(f"{path}: covariances need at least 2 real tokens; q is {tuple(q.shape)}")
    return measured(path.stem, q, tensors["k"], tensors.get("v"), mask, seed)
