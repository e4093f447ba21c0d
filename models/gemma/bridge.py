"""The bridge: any causal attention of models/attention inside a pretrained Gemma of transformers.

`attach` does three things to a loaded model:

* It puts a `Socket` with a kernel on each chosen layer. It cannot do so while the model is loaded: a module made inside
  `from_pretrained` starts on the meta device, and its buffers come out as garbage.
* It switches the model to the function `attention` below. A layer without a socket keeps exact attention, with its
  window and its soft cap.
* It writes what it attached into `config.lra_attention`, so that saved.load can attach it again. Nothing else in the
  config changes.

The switch takes two registrations. transformers gives an attention without a mask function no mask at all. The mask
function here is that of flash attention, which passes the padding mask (B, S) on; this file adds causality and windows.

Shapes: queries (B, H, L, D); keys and values (B, H / groups, S, D), rotated and normalised; S >= L while decoding.
S counts keys, L queries; the other letters are those of models/base.py. What layers keep between passes is in cache.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from models.base import AttentionBase
from models.gemma.cache import Handed, prepare

NAME = "lra"
CHUNK = 256  # queries of a layer with a window whose logits exist at a time
BEFORE = "_lra_before"  # attribute of a model: the attention it had before `attach`, and the hook on its decoder
Tap = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], None]


class Socket(nn.Module):
    """A kernel on one layer. While `exact` is set, the layer attends exactly. `tap` gets q, k, v, mask, scale."""

    def __init__(self, kernel: AttentionBase, *, ignore_window: bool, ignore_softcap: bool):
        super().__init__()
        self.kernel, self.ignore_window, self.ignore_softcap = kernel, ignore_window, ignore_softcap
        self.exact = False
        self.tap: Tap | None = None


def text_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a Gemma causal language model. Raises ValueError for anything else."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if layers is None or not re.fullmatch(r"gemma\d?(_text)?", kind):
        raise ValueError(f"model type {kind!r} has no Gemma text layers to plug into: use a Gemma 1, 2 or 3 text model")
    return layers


def select_layers(model: nn.Module, choice: str) -> list[int]:
    """Indices, 0 = first: `all`, `full` (layers without a sliding window), or a list such as 0,5,11."""
    layers = text_layers(model)
    if choice == "all":
        return list(range(len(layers)))
    if choice == "full":
        return [i for i, layer in enumerate(layers) if getattr(layer.self_attn, "sliding_window", None) is None]
    try:
        chosen = sorted({int(part) for part in choice.split(",")})
    except ValueError:
        raise ValueError(f"layers {choice!r}: give all, full, or indices such as 0,5,11") from None
    if wrong := [i for i in chosen if not 0 <= i < len(layers)]:
        raise ValueError(f"layer {wrong[0]} does not exist: the model has layers 0 to {len(layers) - 1}")
    return chosen


def attach(
    model: nn.Module, build: Callable, layers: Sequence[int], *, ignore_window: bool | None = None, ignore_softcap=False
) -> list[Socket]:
    """Put `build(layer=, heads=, head_dim=, max_len=)` on each of `layers`; returns the sockets in order.

    `ignore_window`: a replaced window layer sees all earlier tokens. None: only where the kernel is not exact (no
    random-feature method has a window).

    Raises TypeError for a `build` that cannot be called, such as a name, and ValueError for
    * a kernel without a causal form, or with a window longer than the model has positions,
    * a soft-capped model (Gemma 2: tanh is no exponential kernel), unless the kernel is exact or `ignore_softcap`,
    * a model with bidirectional attention, attention dropout or no attention interface.
    """
    if not callable(build):
        way_out = f"functools.partial(lra.registry.build_attention, {build!r})"
        raise TypeError(f"attach takes a function that makes an attention, such as {way_out}; got {build!r}")
    found, config = text_layers(model), model.config
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError("this model attends in both directions; the bridge is for causal ones")
    if getattr(config, "attention_dropout", 0.0):
        raise ValueError(f"attention_dropout {config.attention_dropout} is not supported: set it to 0")
    before = config._attn_implementation
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    try:
        model.set_attn_implementation(NAME)
    except (AttributeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{type(model).__name__} has no attention interface: {error}") from None
    if config._attn_implementation != NAME:
        raise ValueError(f"{type(model).__name__} has no attention interface: transformers 5 Gemma models do")
    if not hasattr(model, BEFORE):
        setattr(model, BEFORE, (before, model.model.register_forward_pre_hook(prepare, with_kwargs=True)))
    attached, cap = [], getattr(config, "attn_logit_softcapping", None)
    for index in layers:
        module = found[index].self_attn
        heads = module.q_proj.out_features // module.head_dim
        kernel = build(layer=index, heads=heads, head_dim=module.head_dim, max_len=config.max_position_embeddings)
        if not kernel.causal:
            raise ValueError(f"{kernel.name} has no causal form, and Gemma is causal")
        if (window := getattr(kernel.config, "window", 0)) > config.max_position_embeddings:
            raise ValueError(f"window {window} exceeds the {config.max_position_embeddings} positions of the model")
        if cap and not kernel.exact and not ignore_softcap:
            refused = f"this model caps its attention logits at {cap:g}, which {kernel.name} cannot express"
            raise ValueError(f"{refused}: use --ignore-softcap to replace them without the cap")
        ignored = (not kernel.exact) if ignore_window is None else ignore_window
        socket = Socket(kernel, ignore_window=ignored, ignore_softcap=ignore_softcap)
        module.socket = socket.to(module.q_proj.weight.device).train(model.training)
        if attached:
            kernel.tie(attached[0].kernel)
        attached.append(socket)
    config.lra_attention = _description(model)
    return attached


def detach(model: nn.Module) -> None:
    """Take all sockets away: the model and its config are again what was loaded, but for what was trained."""
    for layer in text_layers(model):
        if hasattr(layer.self_attn, "socket"):
            del layer.self_attn.socket
    if hasattr(model, BEFORE):
        implementation, hook = getattr(model, BEFORE)
        hook.remove()
        model.set_attn_implementation(implementation)
        delattr(model, BEFORE)
    vars(model.config).pop("lra_attention", None)


def sockets(model: nn.Module) -> dict[int, Socket]:
    """Layer index to socket."""
    layers = enumerate(text_layers(model))
    return {i: layer.self_attn.socket for i, layer in layers if hasattr(layer.self_attn, "socket")}


@contextmanager
def exact_attention(model: nn.Module) -> Iterator[None]:
    """While entered, every layer attends exactly, those with a kernel too."""
    before = {socket: socket.exact for socket in sockets(model).values()}
    try:
        for socket in before:
            socket.exact = True
        yield
    finally:
        for socket, value in before.items():
            socket.exact = value


@contextmanager
def below_known(model: nn.Module, known: dict, key: Any) -> Iterator[None]:
    """While entered, the layers below the first socket run once for a key, whatever is in the sockets; `known` has what
    they gave. A key stands for one input."""
    below = text_layers(model)[: min(sockets(model), default=0)]
    for layer in below if key in known else ():
        layer.forward = lambda hidden_BNE, **_: known[key]
    for layer in () if key in known else below[-1:]:
        layer.forward = lambda *x, run=layer.forward, **more: known.setdefault(key, run(*x, **more))
    try:
        yield
    finally:
        for layer in below:
            vars(layer).pop("forward", None)


def calibrate(model: nn.Module, tokens_BN: torch.Tensor) -> None:
    """Fit every kernel to its layer's queries and keys in the exact model on these tokens."""

    def fit(kernel):
        return lambda q, k, v, mask, scale: kernel.calibrate(q, k, mask, scale=scale)

    watch(model, tokens_BN, {i: fit(s.kernel) for i, s in sockets(model).items()})


@torch.no_grad()
def watch(model: nn.Module, tokens_BN: torch.Tensor, taps: dict[int, Tap]) -> None:
    """Run the exact model without its output layer; call each layer's tap with the layer's q, k, v, mask, scale."""
    plugged = sockets(model)
    try:
        for index, tap in taps.items():
            plugged[index].tap = tap
        with exact_attention(model):
            model.model(input_ids=tokens_BN, use_cache=False)
    finally:
        for index in taps:
            plugged[index].tap = None


def attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **_):
    """What transformers calls in every layer. Returns (output (B, L, H, D), None: no attention weights)."""
    state, key = (key.layer, key.keys) if isinstance(key, Handed) else (None, key)
    (B, H, L, D), K = query.shape, key.shape[2]
    S, scale = K if state is None else state.tokens, D**-0.5 if scaling is None else scaling
    if attention_mask is not None:
        mask_BK = attention_mask[:, -K:]  # a state wants to know of new tokens alone
        if mask_BK.shape != (B, K) or state is None and attention_mask.shape[1] != K:
            way_out = "use a dynamic cache and a two-dimensional attention_mask"
            raise ValueError(f"the bridge takes a padding mask (B, {S}), not {tuple(attention_mask.shape)}; {way_out}")
        attention_mask = mask_BK
    k_BHKD, v_BHKD = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    socket: Socket | None = getattr(module, "socket", None)
    if socket is not None and socket.tap is not None:
        socket.tap(query, k_BHKD, v_BHKD, attention_mask, scale)
    window, cap = sliding_window, softcap
    if socket is not None and not socket.exact:
        check_window(socket, window, S)
        window = None if socket.ignore_window or (window or S) >= S else window
        cap = None if socket.ignore_softcap else cap
    limited = not (window is None and cap is None and L == S)
    if socket is None or socket.exact or (socket.kernel.exact and limited):
        return exact(query, k_BHKD, v_BHKD, attention_mask, scale, window, cap).transpose(1, 2), None
    if state is not None:
        return state.attend(query, k_BHKD, v_BHKD, attention_mask, scale).transpose(1, 2), None
    if L < S:
        raise ValueError(f"{socket.kernel.name} cannot decode from cached keys alone: use_cache=False")
    out_BHLD = socket.kernel(query, k_BHKD, v_BHKD, attention_mask, causal=True, scale=scale)
    return out_BHLD.transpose(1, 2), None


def check_window(socket: Socket, window: int | None, tokens: int) -> None:
    """Raise ValueError if the socket keeps a window that is shorter than the tokens, and its kernel has no windows."""
    if not (socket.ignore_window or socket.kernel.exact or window is None or window >= tokens):
        way_out = f"ignore the window, or use at most {window} tokens"
        raise ValueError(f"{socket.kernel.name} cannot keep a window of {window} over {tokens} tokens: {way_out}")


def exact(q_BHLD, k_BHSD, v_BHSD, mask_BS, scale: float, window: int | None, softcap: float | None) -> torch.Tensor:
    """Causal softmax attention of the last L of S tokens, each over the last `window` tokens up to itself.

    With `softcap` c the logits are c tanh(scale q.k / c) (Gemma 2, arXiv 2408.00118). A padding token attends to
    itself: its output is finite, and nothing reads it.
    """
    L, S = q_BHLD.shape[2], k_BHSD.shape[2]
    if mask_BS is None and softcap is None and (window is None or window >= S) and L in (1, S):
        return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, scale=scale, is_causal=L == S)
    if window is not None and window < S and L > CHUNK:  # a chunk of queries sees few keys
        parts = []
        for start in range(0, L, CHUNK):
            near = slice(max(0, S - L + start - window + 1), S - L + min(start + CHUNK, L))
            q, k, v = q_BHLD[:, :, start : start + CHUNK], k_BHSD[:, :, near], v_BHSD[:, :, near]
            parts.append(exact(q, k, v, None if mask_BS is None else mask_BS[:, near], scale, window, softcap))
        return torch.cat(parts, 2)
    key_S = torch.arange(S, device=q_BHLD.device)
    query_L1 = key_S[S - L :, None]
    seen = key_S <= query_L1
    if window is not None:
        seen = seen & (key_S > query_L1 - window)
    if mask_BS is not None:
        seen = seen & (mask_BS[:, None, None, :] | (key_S == query_L1))
    if softcap is None:
        return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, attn_mask=seen, scale=scale)
    logits = softcap * torch.tanh(q_BHLD @ k_BHSD.transpose(-1, -2) * (scale / softcap))
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(v_BHSD.dtype) @ v_BHSD


def _description(model: nn.Module) -> list[dict[str, Any]]:
    """What is attached, as JSON: attention, options and layers; the layers of an entry share all that is in it."""
    groups: list[dict[str, Any]] = []
    for index, socket in sockets(model).items():
        kernel = socket.kernel
        facts = {"attention": kernel.name, "options": asdict(kernel.config)}
        facts |= {"seed": kernel.seed, "max_len": kernel.max_len}
        facts |= {name: getattr(socket, name) for name in ("ignore_window", "ignore_softcap")}
        if not groups or groups[-1] | {"layers": None} != facts | {"layers": None}:
            groups.append(facts | {"layers": []})
        groups[-1]["layers"].append(index)
    return groups
