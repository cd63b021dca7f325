"""Counts of the PTX emulator, on accesses whose cost is known."""

import numpy as np
import pytest
from ptx.counters import Counters, Traffic

LANE = np.arange(32)


def counted(space, address, size, lanes=LANE):
    counters = Counters()
    counters.start(1, 32)
    counters.count_access(space, "load", address.astype(np.uint64 if space == "global" else np.uint32), lanes, size, 0)
    assert counters.of_busiest_cta("wavefronts") == (counters.traffic(space, "load").moved if space == "shared" else 0)
    return counters.traffic(space, "load")


@pytest.mark.parametrize(
    ("address", "size", "wavefronts", "ideal"),
    [
        (4 * LANE, 4, 1, 1),
        (0 * LANE, 4, 1, 1),  # one word for all
        (2 * LANE, 2, 1, 1),
        (8 * LANE, 4, 2, 1),  # every second bank
        (128 * LANE, 4, 32, 1),  # one bank
        (132 * LANE, 4, 1, 1),  # rows of 33 words
        (8 * LANE, 8, 2, 2),
        (16 * LANE, 16, 4, 4),
        (32 * LANE, 16, 8, 4),
        (128 * LANE, 16, 32, 4),
    ],
)
def test_wavefronts_of_shared_memory(address, size, wavefronts, ideal):
    assert counted("shared", address, size) == Traffic(1, 32 * size, wavefronts, ideal)


@pytest.mark.parametrize(
    ("address", "size", "sectors", "ideal"),
    [
        (4096 + 4 * LANE, 4, 4, 4),
        (4100 + 4 * LANE, 4, 5, 4),  # a word past the start of a sector
        (64 * LANE, 4, 32, 4),
        (0 * LANE, 4, 1, 4),
        (16 * LANE, 16, 16, 16),
    ],
)
def test_sectors_of_global_memory(address, size, sectors, ideal):
    assert counted("global", address, size) == Traffic(1, 32 * size, sectors, ideal)


def test_each_warp_moves_its_own_sectors_and_distinct_ones_are_counted_once():
    counters = Counters()
    for _ in range(2):
        counters.count_access("global", "store", np.tile(4 * LANE, 2).astype(np.uint64), np.arange(64), 4, 7)
    assert counters.traffic("global", "store") == Traffic(4, 512, 16, 16)
    assert counters.traffic_by_instruction("global", "store") == {7: Traffic(4, 512, 16, 16)}
    assert counters.distinct_sectors("store") == 4
    assert counters.distinct_sectors("load") == 0


def test_the_busiest_program():
    counters = Counters()
    for conflicts in (4, 2):  # wavefronts per access: of one warp and of two, each of another program
        counters.start(2, 64)
        address = (4 * conflicts * LANE).astype(np.uint32)
        counters.count_access("shared", "load", np.tile(address, 3), np.arange(32, 128), 4, 0)
    assert counters.of_busiest_cta("wavefronts") == 2 * 4
