"""The state of a hybrid that decodes: far keys as the features see them, near keys and sinks as they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import real_first, take
from models.features.blocks import State, joined, state_of
from models.features.flash import NEVER


class Memory(NamedTuple):
    """Of the real tokens so far: the last 2 W and the first S keys and values, and how many tokens there were."""

    far: State
    k_BHKD: Tensor
    v_BHKD: Tensor
    sink_k_BHSD: Tensor
    sink_v_BHSD: Tensor
    count_B: Tensor


def empty(maps, v_BH1D: Tensor, window: int, sinks: int) -> Memory:
    """Before the first token."""
    B, H, _, D = v_BH1D.shape
    near, first = v_BH1D.new_zeros(B, H, 2 * window, D), v_BH1D.new_zeros(B, H, sinks, D)
    L_BHM = v_BH1D.new_full((B, *maps.feature_bias_HM.shape), NEVER)
    far = State(L_BHM, torch.zeros_like(L_BHM)[..., None] * v_BH1D)
    return Memory(far, near, near, first, first, torch.zeros(B, dtype=torch.int64, device=v_BH1D.device))


def of(far: State | None, k_BHND: Tensor, v_BHND: Tensor, mask_BN: Tensor, ring: int, sinks: int) -> Memory:
    """After all of these tokens: the last `ring` and the first `sinks` real ones."""
    last_BK, first_BS = mask_BN.argsort(dim=1, stable=True)[:, -ring:], real_first(mask_BN)[:, :sinks]
    near = (F.pad(take(x, last_BK), (0, 0, ring - last_BK.shape[1], 0)) for x in (k_BHND, v_BHND))
    first = (F.pad(take(x, first_BS), (0, 0, 0, sinks - first_BS.shape[1])) for x in (k_BHND, v_BHND))
    return Memory(far, *near, *first, mask_BN.sum(1))


def absorbed(memory: Memory, real_B: Tensor, window: int, sinks: int, maps_of) -> Memory:
    """Before a token that starts a block: the block before last becomes part of the far keys, but for the sinks."""
    full_B = real_B & (memory.count_B % window == 0) & (memory.count_B >= 2 * window)
    if full_B.device.type == "cpu" and not full_B.any():  # a GPU would have to wait for the answer
        return memory
    k, v = memory.k_BHKD[:, :, :window], memory.v_BHKD[:, :, :window]
    place_BK = memory.count_B[:, None] - 2 * window + torch.arange(window, device=k.device)
    maps = maps_of(k)
    hidden_B1K = (~full_B[:, None] | (place_BK < sinks))[:, None]
    block = state_of(maps.ak_HMD, maps.x_BHND, v, maps.key_bias_BHN.masked_fill(hidden_B1K, NEVER))
    return memory._replace(far=joined(memory.far, block))


def near_keys(memory: Memory, k_BH1D: Tensor, v_BH1D: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and biases (B, H, K) of what the next token sees exactly: sinks, own block, block before, itself."""
    block_B1 = (memory.count_B // window)[:, None]
    sink_S, near_K = (torch.arange(x.shape[2], device=x.device) for x in (memory.sink_k_BHSD, memory.k_BHKD))
    place_BK = memory.count_B[:, None] - 2 * window + near_K
    seen_BK = (place_BK >= 0) & (place_BK >= (block_B1 - 1) * window)
    seen_BS = (block_B1 >= 2).expand(-1, len(sink_S))
    seen = torch.cat([seen_BS, seen_BK, torch.ones_like(block_B1, dtype=torch.bool)], 1)[:, None]
    bias_BHK = k_BH1D.new_zeros(()).where(seen, NEVER).expand(-1, k_BH1D.shape[1], -1)
    keys = torch.cat([memory.sink_k_BHSD, memory.k_BHKD, k_BH1D], 2)
    return keys, torch.cat([memory.sink_v_BHSD, memory.v_BHKD, v_BH1D], 2), bias_BHK


def extended(memory: Memory, k_BH1D: Tensor, v_BH1D: Tensor, real_B: Tensor) -> Memory:
    """After one more token, where it is real."""
    real = real_B[:, None, None, None]
    sink_S = torch.arange(memory.sink_k_BHSD.shape[2], device=real.device)
    here = real & (sink_S == memory.count_B[:, None])[:, None, :, None]
    ring = (torch.where(real, torch.cat([old, new], 2)[:, :, 1:], old)
            for old, new in ((memory.k_BHKD, k_BH1D), (memory.v_BHKD, v_BH1D)))  # fmt: skip
    first = (torch.where(here, new, old)
             for old, new in ((memory.sink_k_BHSD, k_BH1D), (memory.sink_v_BHSD, v_BH1D)))  # fmt: skip
    return Memory(memory.far, *ring, *first, memory.count_B + real_B)
