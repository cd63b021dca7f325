"""The page cache of the operating system: files that it could not keep until the next run are not left in it."""

from __future__ import annotations

import os
from pathlib import Path

from m3er_fast.shards.plan import Plan, Shard


def outgrows_page_cache(plan: Plan) -> bool:
    """Return whether a corpus on a local filesystem takes more than half of the memory.

    Reading it would evict the pages of other processes, and filling memory with it took a tenth of the time of scoring
    (docs/decisions.md).
    """
    if not plan.corpus.is_local or not hasattr(os, "posix_fadvise"):
        return False
    return sum(shard.size for shard in plan.shards) > 0.5 * memory_bytes()


def drop_from_page_cache(shard: Shard) -> None:
    """Drop the pages of a local file that was read; a file that has been deleted has none."""
    try:
        descriptor = os.open(shard.path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def memory_bytes() -> int:
    """Return the size of this machine's memory, or of what a container may take of it."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # not in a container, or one without a limit, which reads "max"
        return size
