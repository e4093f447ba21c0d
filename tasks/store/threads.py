"""Many small pieces of work on threads, with a progress bar."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

CHUNK = 64  # items per unit of work


def in_chunks(work: Callable[[int, int], None], count: int, workers: int, what: str) -> None:
    """Call work(start, end) on chunks of 0..count; the bar, in units of `what`, appears after two seconds."""
    from tqdm import tqdm

    starts = range(0, count, CHUNK)
    ends = [min(start + CHUNK, count) for start in starts]
    bar = tqdm(total=count, unit=f" {what}", delay=2, disable=None, leave=False)  # None: not a terminal
    with bar, ThreadPoolExecutor(workers) as pool:
        for start, end, _ in zip(starts, ends, pool.map(work, starts, ends), strict=True):
            bar.update(end - start)
