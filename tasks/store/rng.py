"""Counter-seeded random numbers for the generators, the same on every platform and in any order.

Example i of seed s owns the stream `stream(s, i)`, so any worker can make any example. The generator is
SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195): 64-bit integer arithmetic only.
"""

from collections.abc import Callable

import numpy as np
from numba import njit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S11, _S27, _S30, _S31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)


def kernel(function: Callable) -> Callable:
    """Compile a function by numba, once: kept beside its source, in the user's cache or in NUMBA_CACHE_DIR.

    Where none of them can be written to, each process compiles for itself.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no place for a cache
        return njit(nogil=True)(function)


@kernel
def _mix(z):
    z = (z ^ (z >> _S30)) * _MIX1
    z = (z ^ (z >> _S27)) * _MIX2
    return z ^ (z >> _S31)


@kernel
def stream(seed, index):
    """State of the stream of example `index` under `seed`: a uint64 array of one element, advanced in place."""
    state = np.empty(1, np.uint64)
    state[0] = _mix(_mix(np.uint64(seed) + _GOLDEN) ^ (np.uint64(index) * _MIX2 + _GOLDEN))
    return state


@kernel
def uniform(state):
    """Next float64 in [0, 1), 53 random bits."""
    state[0] += _GOLDEN
    return np.float64(_mix(state[0]) >> _S11) * (1.0 / 9007199254740992.0)


@kernel
def below(state, n):
    """Next integer in 0..n-1."""
    return np.int64(uniform(state) * n)
