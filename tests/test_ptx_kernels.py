"""The kernels' own tests on compiled PTX, in a process of its own: this one interprets its kernels."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[1]
FILES = [*sorted(map(str, ROOT.glob("tests/test_kernels_*.py"))), str(ROOT / "tests" / "test_local_lstsq.py")]
KERNELS = 14
# Together these tests launch every kernel, for each type of number and with tensor cores.
SOME = (
    "test_rows_that_are_not_contiguous_are_read_in_place_or_copied",
    "test_banks_in_half_precision_are_taken_as_they_are_rounded",
    "test_any_strides",
    "test_blocks_of_many_classes",
    "(test_every_option_and_shape and kind4)",
    "test_losses_of_any_number_of_elements",
    "test_gradients_of_weights_and_shares_are_the_references",
    "(test_memory_orders_need_no_copy and triton)",
    "test_statistics_of_any_number_of_elements",
    "(test_half_precision_is_read_and_computed_in_float32 and triton)",
    "(test_equals_the_reference and dims3-True)",
    "test_dropout_is_the_same_in_the_backward_pass",
    "test_a_scan_of_any_number_of_elements",
)


def run_on_ptx(*arguments, seconds):
    """Run the tests, of which none may fail and no launch may have a finding. Return the kernels launched."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "findings: none" in done.stdout
    return set(re.findall(r"^ +\d+ (\w+_kernel)$", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("target", ["ptx", "ptx:90"])
def test_a_part_of_the_kernels_tests_on_compiled_code(target):
    """Warps run out of step, so a missing barrier would show too."""
    kernels = run_on_ptx("--device", target, "--ptx-order", "descending", "-k", " or ".join(SOME), seconds=1500)
    assert len(kernels) == KERNELS


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    # With the noise of seed 2, ex2 flushes 2^-126.
    [(), ("--ptx-order", "ascending"), ("--ptx-order", "descending"), ("--ptx-noise", "2")],
    ids=["together", "ascending", "descending", "noise"],
)
@pytest.mark.parametrize("target", ["ptx", "ptx:90"])
def test_all_of_the_kernels_tests_on_compiled_code(target, options):
    assert len(run_on_ptx("--device", target, *options, seconds=7200)) == KERNELS
