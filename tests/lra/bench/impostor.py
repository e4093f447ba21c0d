"""Contenders that fail when they run, for tests/lra/bench/test_measured_twice.py."""

import os
import signal


def contender(name, **_):
    """`softmax` ends with its setting of the allocator as its last words; `dies` is killed."""

    def run():
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError(f"tunables {os.environ['GLIBC_TUNABLES']}")

    return {"run": run}
