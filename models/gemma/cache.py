"""Caches of transformers beneath exchanged attention: which are right, and what they must keep."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def keep_keys(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Before each pass of the decoder: its cache holds the keys of earlier tokens and no empty places.

    Where a kernel ignores windows, every layer of the cache keeps every key: one mask serves all layers of a kind.
    Raises ValueError for a cache that cannot do so.
    """
    cache = kwargs.get("past_key_values")
    ignored = any(hasattr(x.self_attn, "socket") and x.self_attn.socket.ignore_window for x in decoder.layers)
    if cache is None:
        used = decoder.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        fresh = ignored and used and not decoder.training
        return (args, kwargs | {"past_key_values": DynamicCache()}) if fresh else None
    kinds = {type(cache), *map(type, getattr(cache, "layers", ()))}
    others = sorted(kind.__name__ for kind in kinds - {DynamicCache, DynamicLayer, DynamicSlidingWindowLayer})
    if others or cache.offloading:
        names = ", ".join(others) or "one that is offloaded"
        raise ValueError(f"the bridge decodes from a DynamicCache or with use_cache=False; got {names}")
    for i, layer in enumerate(cache.layers if ignored else ()):
        if type(layer) is DynamicSlidingWindowLayer:
            if layer.is_initialized:
                raise ValueError("this cache has dropped keys beyond a window: start with an empty one after `attach`")
            cache.layers[i] = DynamicLayer()
    return None
