"""What replaced layers keep of earlier tokens: the state of their kernel, of constant size, in a cache of transformers.

`prepare` runs before each pass of the decoder, whoever made its cache. Of a DynamicCache

    a layer whose kernel has `step`     becomes a KernelState: the first pass is parallel, later tokens are steps
    a layer of another kernel           keeps all keys, windows or not, where the kernel ignores windows
    a layer without a kernel            stays as it is: the keys of its window, or all

and every other kind of cache is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from models.base import AttentionBase

EMPTY = "start with an empty one, made after `attach`"


class KernelState(CacheLayerMixin):
    """A layer of a cache: the state of one kernel after `tokens` tokens. No gradient reaches the tokens in it."""

    is_sliding = False

    def __init__(self, kernel: AttentionBase):
        super().__init__()
        self.owner = weakref.ref(kernel)  # which a copy of the cache shares
        self.state, self.tokens = None, 0

    def attend(self, q_BHLD, k_BHLD, v_BHLD, mask_BL: Tensor | None, scale: float) -> Tensor:
        """Outputs of the L tokens that `update` has counted last, which become part of the state."""
        kernel, qkv = self.owner(), (q_BHLD, k_BHLD, v_BHLD)
        if self.state is None:
            self.state = kernel.state_after(k_BHLD, v_BHLD, mask_BL, scale=scale)
            return kernel(*qkv, mask_BL, causal=True, scale=scale)
        outs = []
        for i in range(q_BHLD.shape[2]):
            real_B = None if mask_BL is None else mask_BL[:, i]
            out_BHD, self.state = kernel.step(*(x[:, :, i] for x in qkv), self.state, real_B, scale=scale)
            outs.append(out_BHD)
        return torch.stack(outs, 2)

    # What transformers calls

    def lazy_initialization(self, key_states, value_states):
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        self.is_initialized = True
        self.tokens += key_states.shape[2]
        return Handed(self, key_states), value_states

    def get_mask_sizes(self, query_length):
        return self.tokens + query_length, 0

    def get_seq_length(self):
        return self.tokens

    def get_max_length(self):
        return -1

    def reset(self):
        self.state, self.tokens, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx):
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        self._rows(lambda x: x[indices, ...])

    def crop(self, tokens_to_remove):
        if tokens_to_remove:
            way_out = "no assisted decoding, or use_cache=False"
            raise ValueError(f"the state of {self.owner().name} cannot take tokens back: {way_out}")

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = tree_map_only(Tensor, change, self.state)


class Handed:
    """Keys of new tokens on their way from a KernelState to bridge.attention. Exact attention cannot use them."""

    def __init__(self, layer: KernelState, keys: Tensor):
        self.layer, self.keys = layer, keys

    def __getattr__(self, name: str):
        raise ValueError(f"this cache holds the state of a kernel that is no longer there: {EMPTY}")


def prepare(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """A forward pre-hook: the cache of the pass, given or to be made, as above. ValueError where it cannot be."""
    plugged = {i: x.self_attn.socket for i, x in enumerate(decoder.layers) if hasattr(x.self_attn, "socket")}
    cache = kwargs.get("past_key_values")
    if cache is None:
        used = decoder.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if not used or not plugged or decoder.training:
            return None
        cache = DynamicCache(config=decoder.config)
        kwargs = kwargs | {"past_key_values": cache}
    kinds = {type(cache), *map(type, getattr(cache, "layers", ()))}
    known = {DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, KernelState}
    others = sorted(kind.__name__ for kind in kinds - known)
    if others or cache.offloading:
        names = ", ".join(others) or "one that is offloaded"
        raise ValueError(f"the bridge decodes from a DynamicCache or with use_cache=False; got {names}")
    # A cache without a config makes its layers as late as they are needed.
    cache.layers += [DynamicLayer() for _ in range(len(cache.layers), len(decoder.layers))]
    replaced = {i: socket for i, socket in plugged.items() if not socket.exact}
    stepping = {i: socket.kernel for i, socket in replaced.items() if socket.kernel.recurrent}
    # One mask serves all layers of a kind: where one of them sees beyond its window, all keep every key.
    beyond = any(s.ignore_window and i not in stepping for i, s in replaced.items())
    for i, layer in enumerate(cache.layers):
        kernel, sliding = stepping.get(i), type(layer) is DynamicSlidingWindowLayer
        if layer.is_initialized:
            if (layer.owner() if type(layer) is KernelState else None) is not kernel:
                raise ValueError(f"layer {i} of this cache holds what another attention left there: {EMPTY}")
            if sliding and beyond:
                raise ValueError(f"layer {i} of this cache has dropped keys beyond its window: {EMPTY}")
        elif kernel is not None:
            cache.layers[i] = KernelState(kernel)
        elif type(layer) is KernelState or sliding and beyond:
            cache.layers[i] = DynamicLayer()
    return args, kwargs
