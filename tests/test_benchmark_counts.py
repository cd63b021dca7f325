"""Counts of kernels without a GPU, and the least times that follow from them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.counts.__main__ import table, with_bounds, write_page
from benchmarks.counts.bounds import DEVICES, Bound, Device, Launch, bound, total

ROOT = Path(__file__).parents[1]
NOTHING = Launch("k", 1, 128, *[0] * 12)
# One cycle per nanosecond; products take a second per 1e12 operations.
PLAIN = Device(80, 10, 2e12, 100, 1e12, 2e12, 1e11)


def copied(programs, columns):
    """Counts of a kernel that copies rows of float32, 128 threads each."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy_kernel(x_ptr, y_ptr, COLUMNS: tl.constexpr):
        at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(y_ptr + at, tl.load(x_ptr + at))

    import torch

    from benchmarks.counts.counting import CountingDriver

    driver = CountingDriver(80)
    driver.take_the_place_of_a_gpu()
    x, y = torch.randn(programs * columns), torch.zeros(programs * columns)

    def twice():
        for _ in range(2):
            copy_kernel[(programs,)](x, y, columns, num_warps=4)

    launches = driver.count(twice)
    assert torch.equal(x, y)
    return [launch._asdict() for launch in launches]


def test_each_launch_is_counted_by_itself():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "3", "512"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (Launch(**launch) for launch in json.loads(done.stdout))
    assert first == second
    # 512 numbers of four bytes are 64 sectors; each thread moves 16 bytes at once.
    assert first[:3] == ("copy_kernel", 3, 128)
    assert (first.load_sectors, first.store_sectors, first.distinct_sectors) == (3 * 64, 3 * 64, 2 * 3 * 64)
    assert (first.barriers, first.shared_wavefronts, first.special, first.tf32_flops) == (0, 0, 0, 0)
    assert 3 * 4 * 4 <= first.instructions <= 3 * 4 * 40
    assert first.instructions == 3 * first.most_instructions


@pytest.mark.parametrize(
    ("counts", "seconds", "resource"),
    [
        ({"programs": 10, "instructions": 4000}, 100e-9, "issue"),
        ({"programs": 11, "instructions": 4400}, 200e-9, "issue"),  # one multiprocessor runs two
        ({"programs": 10, "instructions": 4000, "most_instructions": 800}, 200e-9, "issue"),
        ({"programs": 2, "shared_wavefronts": 300, "most_wavefronts": 200}, 200e-9, "shared memory"),
        ({"programs": 1, "special": 100}, 200e-9, "special functions"),
        ({"programs": 1, "shared_wavefronts": 300}, 300e-9, "shared memory"),
        ({"programs": 5, "tf32_flops": 1000}, 2e-9, "tensor cores"),  # half of the device
        ({"programs": 10, "bf16_flops": 1000}, 0.5e-9, "tensor cores"),
        ({"programs": 1, "load_sectors": 480, "store_sectors": 160}, 4e-9, "L2"),
        ({"programs": 1, "distinct_sectors": 100, "load_sectors": 100}, 32e-9, "DRAM"),
    ],
)
def test_the_bound_is_that_of_the_scarcest_resource(counts, seconds, resource):
    found = bound(NOTHING._replace(**counts), PLAIN)
    assert found.seconds == pytest.approx(seconds)
    assert found.resource == resource


def test_the_clocks_that_the_datasheets_imply():
    assert DEVICES["A100"].clock == pytest.approx(1.41e9, rel=0.01)
    assert DEVICES["H100"].clock == DEVICES["H200"].clock == pytest.approx(1.98e9, rel=0.01)


def test_launches_add_up_and_the_page_gets_the_table(tmp_path):
    assert total([Bound(1.0, "issue"), Bound(2.0, "L2")]) == Bound(3.0, "L2")
    launch = NOTHING._replace(programs=4, instructions=800, barriers=8, load_sectors=3, distinct_sectors=2)
    row = {"operation": "loss", "call": "tiny", "target": 80, "unit": "logit", "units": 100, "ideal_bytes": 64}
    row = with_bounds(row | {"launches": [launch._asdict()] * 2})
    assert list(row["bounds"]) == ["A100"]
    lines = table([row])
    assert lines[-1] == "| `loss`, tiny | 80 | 2 | 4, 4 | 512 per logit | 3.00 | 2.00 |  | 2, 2 | A100 0.07 (issue) |"
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- Written by python -m benchmarks.counts: begin -->\nold\n"
        "<!-- Written by python -m benchmarks.counts: end -->\nafter\n"
    )
    write_page(page, lines)
    assert "old" not in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert lines[-1] in page.read_text()
    page.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the lines"):
        write_page(page, lines)


if __name__ == "__main__":
    print(json.dumps(copied(*map(int, sys.argv[1:]))))
