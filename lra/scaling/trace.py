"""What a training step does, counted without doing it: operations, FLOPs, bytes read and written, live memory.

The step of trainer.py runs on tensors that have shapes but no numbers, and a dispatch mode sees each of its
operations: forward, backward, optimizer. So every attention is counted, one from outside too, and no formula can
fall behind the code.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lra.training.config import Run
from lra.training.optim import build_optimizer
from lra.training.trainer import update
from tasks.base import Batch

# What an operation's bytes cost depends on what is done with them. `tiles` are the N x N weights of a fused
# attention: written and read in pieces that never leave the cache.
KINDS = ("product", "attention", "tiles", "exponential", "random", "indexed", "plain")
FUSED = "_scaled_dot_product_flash_attention_for_cpu"
NAMES = {
    "product": "mm addmm bmm baddbmm _linear_pointwise",
    "attention": f"{FUSED} {FUSED}_backward",
    "exponential": "exp exp_ _softmax _log_softmax gelu gelu_backward log logsumexp cos sin pow sigmoid tanh",
    "random": "bernoulli_ native_dropout random_ rand randn randint randperm uniform_ normal_",
    "indexed": "index gather scatter scatter_add scatter_add_ index_put index_put_ index_select embedding "
    "embedding_dense_backward sort argsort cumsum searchsorted topk unfold_backward",
}
KIND = {name: kind for kind, names in NAMES.items() for name in names.split()}
PASSES = (
    4,
    10,
)  # over the tiles: logits and weights written and read; backward both again and three gradients


class Uncountable(Exception):
    """A step that cannot be taken without numbers; one line that says why."""


@dataclass(frozen=True)
class Work:
    """One training step: for each of its operations, in order, kind, FLOPs and bytes; and its memory in bytes.

    `forward` of the operations are the forward pass. `held` is what lives between steps once there has been
    one: parameters, gradients, optimizer, buffers. `peak` is the most that lives at any time.
    """

    kinds: np.ndarray  # indices of KINDS
    flops: np.ndarray
    bytes: np.ndarray
    tiles: np.ndarray  # bytes of tiles
    forward: int
    held: int
    peak: int

    def totals(self, forward: bool = False) -> np.ndarray:
        """Number of operations, FLOPs, then bytes of each of KINDS; of the forward pass alone if asked."""
        part = slice(0, self.forward if forward else None)
        by_kind = np.bincount(self.kinds[part], self.bytes[part], len(KINDS))
        by_kind[KINDS.index("tiles")] = self.tiles[part].sum()
        return np.array([len(self.kinds[part]), self.flops[part].sum(), *by_kind])


def trace(
    run: Run, *, batch: int, width: int, padded: bool, precision: str = "fp32", gpu: bool = False
) -> Work:
    """The work of one step on `batch` examples of `width` tokens, some of them padding if `padded`.

    `gpu`: as on a device with kernels for everything, where methods take larger chunks; no GPU is needed.
    Raises Uncountable.
    """
    model = run.build_model().train()
    device = torch.device("meta" if gpu else "cpu")
    optim = replace(run.recipe.train, accumulate=1)
    shape = batch, run.meta.towers, width
    with ExitStack() as stack:
        # Tensors without numbers are no reason to clip gradients one by one.
        stack.enter_context(patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True))
        if gpu:  # PyTorch has no autocast for its meta device
            no_context, never = (lambda *_, **__: nullcontext()), (lambda *_: False)
            stack.enter_context(patch.multiple(torch, autocast=no_context, is_autocast_enabled=never))
        stack.enter_context(_Fused() if gpu else FakeTensorMode())
        counted = stack.enter_context(_Counting())
        _without_numbers(model, device)
        optimizer = build_optimizer(model, optim)
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        mask = torch.ones(shape, dtype=torch.bool, device=device) if padded else None
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        if gpu:
            _one_kernel(optimizer, counted)
        counted.rows.clear()
        model.register_forward_hook(lambda *_: counted.mark())
        try:
            update(model, optimizer, Batch(tokens, mask, labels), optim, precision)
        except Exception as error:  # code from outside may read numbers, or fail as it will in training
            raise Uncountable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    kinds, flops, moved, tiles = np.array(counted.rows, dtype=np.float64).T
    return Work(kinds.astype(int), flops, moved, tiles, counted.forward, counted.now, counted.peak)


class _Counting(TorchDispatchMode):
    """While entered, notes every operation, and how many bytes of tensors made inside are alive."""

    def __init__(self):
        super().__init__()
        self.rows: list[tuple[int, float, float, float]] = []
        self.alive: dict[int, weakref.ref] = {}
        self.now = self.peak = self.forward = 0

    def mark(self) -> None:
        self.forward = len(self.rows)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = _tensors(out)
        if (made or not func._schema.returns) and not func.is_view:
            name = func._overloadpacket.__name__
            moved = sum(t.numel() * t.element_size() for t in _tensors((args, kwargs)) + made)
            flops = _flops(func._overloadpacket, args, kwargs or {}, out)
            tiles = 0
            if KIND.get(name) == "attention":
                q, k = _queries_keys(name, args)
                tiles = (
                    PASSES[name.endswith("backward")] * q.element_size() * q.shape[:-1].numel() * k.shape[-2]
                )
            self.rows.append((KINDS.index(KIND.get(name, "plain")), flops, moved, tiles))
        for tensor in made:
            self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self._release(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _release(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size


class _Fused(TorchFunctionMode):
    """Tensors of the meta device, where PyTorch would write the N x N matrix, get the fused attention."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        mask = kwargs.pop("attn_mask", None)
        mask = mask if mask is None or mask.is_floating_point() else mask.to(args[0].dtype)
        dropout, causal = kwargs.pop("dropout_p", 0.0), kwargs.pop("is_causal", False)
        return getattr(torch.ops.aten, FUSED)(*args, dropout, causal, attn_mask=mask, **kwargs)[0]


def _one_kernel(optimizer: torch.optim.Optimizer, counted: _Counting) -> None:
    """Make its step what the fused AdamW of a GPU is: parameter, gradient and two moments read, three written."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moved = 7 * sum(p.numel() * p.element_size() for p in parameters)
    optimizer.step = lambda: counted.rows.append((KINDS.index("plain"), 0, moved, 0))
    optimizer.moments = [torch.empty_like(p) for p in parameters for _ in range(2)]


def _tensors(tree) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _queries_keys(name: str, args: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    first = int(name.endswith("backward"))  # there the gradient comes before them
    return args[first], args[first + 1]


def _flops(packet, args: tuple, kwargs: dict, out) -> int:
    """A multiply-add is two; only products count, as everywhere where FLOPs are counted."""
    name = packet.__name__
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    if name == "_linear_pointwise":
        return 2 * args[0].numel() * args[1].shape[0]
    if KIND.get(name) == "attention":
        q, k = _queries_keys(name, args)
        return (10 if name.endswith("backward") else 4) * q.numel() * k.shape[-2]
    return 0


def _without_numbers(model: nn.Module, device: torch.device) -> None:
    """Replace parameters and buffers by tensors of the same shapes, those that are shared by shared ones."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None:
                    if id(old) not in made:
                        new = torch.empty(old.shape, dtype=old.dtype, device=device)
                        is_parameter = isinstance(old, nn.Parameter)
                        made[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                    table[name] = made[id(old)]
