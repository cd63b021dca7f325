"""Minutes of checks on compiled PTX: tensors beyond 2^31 elements, and barriers that are dropped."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]


def output_of(*arguments, seconds):
    """Output of Python in a process of its own: this one interprets its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("target", ["80", "90"])
def test_tensors_of_more_than_two_giga_elements(target):
    lines = output_of("-m", "ptx.large", target, seconds=3600).split("\n")
    assert len(lines[::2]) >= 5
    assert {line.strip() for line in lines[1::2]} == {"right"}


@pytest.mark.parametrize("target", ["80", "90"])
def test_the_absence_of_most_barriers_is_noticed(target):
    """The others stand between stages of a pipeline, which have buffers of their own, or beside other barriers."""
    rows = re.findall(r"(\w+): (\d+) barriers, (\d+) missed", output_of("-m", "ptx.barriers", target, seconds=3600))
    assert {"local_lstsq_fwd_kernel", "memory_scan_cells_fwd_kernel"} <= {kernel for kernel, *_ in rows}
    for kernel, barriers, missed in rows:
        assert int(missed) <= int(barriers) / 3, kernel
