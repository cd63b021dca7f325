"""Faults planted in small kernels: the emulator reports each, and nothing in the same kernels without the fault."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from ptx import machine
from ptx.findings import RefusedError
from ptx_problems import THREADS, run

U32 = np.uint32
LOAD = "ld.global.b32 	%r10, [%rd3];\n"
EXCHANGE = LOAD + (
    "st.shared.b32 [%r2], %r10;\nBARRIER\nld.shared.b32 %r11, [%r3];\nst.global.b32 [%rd4], %r11;\n"
)  # through shared memory, between the warps


@pytest.mark.parametrize("order", machine.ORDERS)
def test_a_dropped_barrier_is_reported(order):
    findings, y = run(EXCHANGE.replace("BARRIER", "bar.sync 0;"), order=order)
    assert not findings
    np.testing.assert_array_equal(y, (np.arange(THREADS) + 32) % 64)
    findings, y = run(EXCHANGE.replace("BARRIER", ""), order=order)
    assert "race: read after another's write" in findings.kinds()
    assert (y == (np.arange(THREADS) + 32) % 64).all() == (order == "together")  # out of step, it also shows


@pytest.mark.parametrize("order", machine.ORDERS)
def test_a_barrier_too_few_in_a_loop_is_reported(order):
    """Each warp reads what the other wrote in the same round, and then writes the next round's."""
    loop = (
        "mov.b32 %r20, 0;\n$L__loop:\n"
        "st.shared.b32 [%r2], %r20;\nbar.sync 0;\nld.shared.b32 %r11, [%r3];\nLAST\n"
        "add.s32 %r20, %r20, 1;\nsetp.lt.s32 %p1, %r20, 3;\n@%p1 bra $L__loop;\n"
        "st.global.b32 [%rd4], %r11;\n"
    )
    findings, y = run(loop.replace("LAST", "bar.sync 0;"), order=order)
    assert not findings
    assert (y.view(U32) == 2).all()
    findings, _ = run(loop.replace("LAST", ""), order=order)
    assert any(kind.startswith("race: ") for kind in findings.kinds())


def test_bounds_and_alignment_are_reported_with_the_instruction():
    findings, _ = run("ld.global.b32 %r10, [%rd3 + 4];\n")
    (line,) = findings.report()
    assert line.startswith("planted: global access out of bounds, byte 256 of 256 bytes of x (1 lanes), at: ld.global")
    findings, _ = run("st.global.b32 [%rd4], %r1;\n", size=4 * THREADS - 1)
    assert findings.kinds() == {"global access out of bounds"}
    findings, _ = run("ld.global.v2.b32 {%r10, %r11}, [%rd3];\n", size=4 * THREADS + 4)
    (line,) = findings.report()
    assert line.startswith("planted: misaligned global access, 4 bytes past a multiple of 8 (32 lanes)")


def test_lanes_without_the_predicate_access_nothing():
    inside = "setp.lt.u32 %p1, %r1, 60;\n"
    findings, y = run(inside + "@%p1 ld.global.b32 %r10, [%rd3 + 16];\n@%p1 st.global.b32 [%rd4], %r10;\n")
    assert not findings
    np.testing.assert_array_equal(y, np.where(np.arange(64) < 60, np.arange(64) + 4, 0))
    findings, _ = run("ld.global.b32 %r10, [%rd3 + 16];\n")
    assert "(4 lanes)" in findings.report()[0]


def test_ctas_that_write_one_place_are_reported():
    body = "mov.u32 %r20, %ctaid.x;\nst.global.b32 [%rd4], %r20;\n"
    assert not run(body)[0]
    (line,) = run(body, grid=(3, 1, 1))[0].report()
    assert line.startswith("planted: race: different values to one place in one instruction, y")


def test_a_large_grid_may_run_at_its_ends_only():
    body = "mov.u32 %r20, %ctaid.x;\nsetp.eq.u32 %p1, %r1, %r20;\n@%p1 st.global.b32 [%rd4], 1;\n"
    findings, y = run(body, grid=(20, 1, 1), ends=3)
    assert not findings
    assert np.flatnonzero(y).tolist() == [0, 1, 2, 17, 18, 19]


def test_shared_memory_is_checked():
    assert run("ld.shared.b32 %r10, [%r2];\n")[0].kinds() == {"shared memory read that is never written"}
    assert run("st.shared.b32 [%r2 + 1000], %r1;\n")[0].kinds() == {"shared access out of bounds"}
    assert run("st.shared.b32 [%r2 + 2], %r1;\n")[0].kinds() == {"misaligned shared access"}


COPY = (
    "shl.b32 %r20, %r1, 4;\ncvt.u64.u32 %rd6, %r20;\nadd.s64 %rd7, %rd1, %rd6;\nsetp.lt.u32 %p1, %r1, 16;\n"
    "@%p1 cp.async.cg.shared.global [%r20], [%rd7], 0x10;\nCOMMIT\nWAIT\nBARRIER\n"
    "ld.shared.b32 %r10, [%r2];\nst.global.b32 [%rd4], %r10;\n"
)


def copied(commit="cp.async.commit_group;", wait="cp.async.wait_group 0;", barrier="bar.sync 0;", order="together"):
    return run(COPY.replace("COMMIT", commit).replace("WAIT", wait).replace("BARRIER", barrier), order=order)


@pytest.mark.parametrize("order", machine.ORDERS)
def test_asynchronous_copies_need_group_wait_and_barrier(order):
    findings, y = copied(order=order)
    assert not findings
    np.testing.assert_array_equal(y, np.arange(THREADS))
    assert copied(commit="", order=order)[0]
    assert copied(wait="", order=order)[0]
    assert copied(wait="cp.async.wait_group 1;", order=order)[0]
    assert copied(barrier="", order=order)[0]


def test_a_barrier_that_some_lanes_miss_is_reported():
    body = "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $L__end;\nbar.sync 0;\n$L__end:\n"
    assert run(body)[0].kinds() == {"lanes of a CTA at different barriers, or at their end"}


@pytest.mark.parametrize(
    "instruction",
    ["atom.global.add.f32 %r10, [%rd3], %r10", "red.global.add.f32 [%rd3], %r10", "tcgen05.wait::ld.sync.aligned",
     "add.sat.f32 %r10, %r10, %r10", "brev.b32 %r10, %r10", "fma.rz.f32 %r10, %r10, %r10, %r10"],
)  # fmt: skip
def test_unknown_instructions_and_atomics_are_refused_by_name(instruction):
    with pytest.raises(RefusedError, match=rf"planted: unknown instruction, at: {instruction.split()[0]}"):
        run(f"{instruction};\n")


def test_a_warp_that_has_parted_executes_no_instruction_of_whole_warps():
    body = (
        "setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L__end;\nshfl.sync.bfly.b32 %r10, %r1, 1, 31, -1;\n"
        "st.global.b32 [%rd4], %r10;\n$L__end:\n"
    )
    with pytest.raises(RefusedError, match="a part of a warp"):
        run(body)


# --- faults in the source of a Triton kernel, compiled and launched as a user's are -----------------------------------

TRITON = """
import json, torch, triton, triton.language as tl
from ptx.driver import EmulatedDriver
from ptx.machine import Options

@triton.jit
def turn(x_ptr, y_ptr, BARRIER: tl.constexpr):
    cell = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(x_ptr + cell, tl.load(y_ptr + cell) + 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + cell, tl.load(x_ptr + (cell + 160) % 1024))

@triton.jit
def double(x_ptr, y_ptr, n, MASK: tl.constexpr, SHIFT: tl.constexpr):
    place = tl.program_id(0) * SHIFT + tl.arange(0, 128)
    mask = place < n if MASK else place >= 0
    tl.store(y_ptr + place, tl.load(x_ptr + place, mask=mask) * 2, mask=mask)

@triton.jit
def atomic(x_ptr):
    tl.atomic_add(x_ptr + tl.arange(0, 128), 1.0)

def kinds(launch):
    launch()
    return sorted({line.split(": ", 1)[1].split(",")[0].split(" (")[0] for line in driver.take_findings()})

results = {}
driver = EmulatedDriver(80)
triton.runtime.driver.set_active(driver)
for order in ("together", "ascending", "descending"):
    driver.options = Options(order=order)
    for barrier in (True, False):
        x, y = torch.zeros(32, 32), torch.randn(32, 32)
        wanted = (y + 1).roll(-5, 0)
        found = kinds(lambda: turn[(1,)](x, y, barrier, num_warps=4))
        results[f"{order}, {'with' if barrier else 'without'} barrier"] = [torch.equal(y, wanted), found]
driver.options = Options()
x, y = torch.randn(200), torch.zeros(200)
found = kinds(lambda: double[(2,)](x, y, 200, True, 128))
results["masked"] = [torch.equal(y, 2 * x), found]
results["unmasked"] = kinds(lambda: double[(2,)](x, y, 200, False, 128))
results["in place"] = kinds(lambda: double[(2,)](x, x, 200, True, 64))
try:
    atomic[(1,)](x)
except Exception as error:
    results["atomic"] = str(error)
print(json.dumps(results))
"""


def test_faults_of_triton_kernels_are_reported(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "planted.py").write_text(TRITON)
    tests = pathlib.Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, tmp_path / "planted.py"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for order in machine.ORDERS:
        assert results[f"{order}, with barrier"] == [True, []]
        right, found = results[f"{order}, without barrier"]
        assert "race: read after another's write" in found
        assert right == (order == "together")
    assert results["masked"] == [True, []]
    assert results["unmasked"] == ["global access out of bounds"]
    assert "race: write after another's read" in results["in place"]
    assert results["atomic"].startswith("atomic: unknown instruction, at: ")
    assert "atom.global" in results["atomic"]
