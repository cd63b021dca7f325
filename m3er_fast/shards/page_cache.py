"""The page cache: what it cannot keep for the next run anyway is not left in it."""

from __future__ import annotations

import os

from m3er_fast.shards.plan import Plan, Shard


def outgrows_page_cache(plan: Plan) -> bool:
    """Whether a corpus on this machine's own filesystem takes more than half of the memory.

    Read once, it would push out what other processes have there; and filling memory with it took a tenth of the time
    of scoring it (docs/scoring.md).
    """
    if not plan.corpus.is_local or not hasattr(os, "posix_fadvise"):
        return False
    return sum(shard.size for shard in plan.shards) > 0.5 * _memory_bytes()


def drop_from_page_cache(shard: Shard) -> None:
    """Let go of the pages of a local file that was read; if it was taken away meanwhile, they are gone with it."""
    try:
        descriptor = os.open(shard.path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
