"""The machine a run happens on: device, threads, memory, environment."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lra.options import UsageError


def pick_device(name: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu; a device that is not there is an error, never a fallback."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if available[n])
    if not available.get(name):
        here = ", ".join(n for n, there in available.items() if there)
        raise UsageError(f"device {name!r} is not available on this machine; there is {here}")
    return torch.device(name)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware as stored in records; no host or user name."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:(.*)$", info.read_text("utf-8") if info.exists() else "", re.MULTILINE)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


class PeakMemory:
    """Peak bytes above what was in use when the meter was started: device memory on cuda, else resident memory.
    `read()` returns None where the system cannot tell (resident peaks need Linux's /proc, and leave to write there)."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
            return
        with contextlib.suppress(OSError):  # not there, or refused
            Path("/proc/self/clear_refs").write_text("5", "utf-8")  # resets the high-water mark, see proc(5)
            self.start = _status("VmRSS")

    def read(self) -> int | None:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.start
        return None if self.start is None else max(0, _status("VmHWM") - self.start)


def _status(field: str, pid: int | str = "self") -> int:
    if found := re.search(rf"^{field}:\s*(\d+)", Path(f"/proc/{pid}/status").read_text("utf-8"), re.MULTILINE):
        return int(found[1]) * 1024
    raise OSError(f"/proc/{pid}/status has no {field}")


def peak_resident(pid: int) -> int:
    """Most bytes a process has held; 0 once it ended, and where the system cannot tell."""
    try:
        return _status("VmHWM", pid)
    except OSError:
        return 0


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synchronize(device: torch.device) -> None:
    """Wait for the device, before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def set_threads(threads: int) -> None:
    """CPU threads of matrix products; 0 leaves PyTorch's choice. Raises UsageError for more than there are cores."""
    if threads > cores():
        raise UsageError(f"--threads {threads}: this process may use {cores()} CPU cores; give at most {cores()}")
    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


class StopSignals:
    """While entered, SIGINT and SIGTERM only set `requested`; a second SIGINT interrupts at once."""

    def __enter__(self):
        self.requested, self._before = False, {}
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                self._before[name] = signal.signal(name, self._request)
        return self

    def _request(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_):
        for name, handler in self._before.items():
            signal.signal(name, handler)


if __name__ == "__main__":  # run_all.sh asks which preset suits this machine
    print("smoke" if pick_device("auto").type == "cpu" else "paper")
