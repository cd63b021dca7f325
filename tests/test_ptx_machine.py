"""How the PTX emulator runs lanes that part, warps that exchange, and instructions with several meanings."""

import numpy as np
import pytest
from ptx import machine
from ptx.findings import RefusedError
from ptx_problems import THREADS, run

LANE = np.arange(THREADS)
STORE = "st.global.b32 [%rd4], %r10;\n"


def results(body, **options):
    """What the lanes store, as integers."""
    findings, y = run(body, **options)
    assert not findings
    return y.view(np.int32)


@pytest.mark.parametrize("order", machine.ORDERS)
def test_lanes_that_loop_for_different_times_meet_after_the_loop(order):
    """Else the sum over the warp would be refused."""
    loop = (
        "rem.u32 %r20, %r1, 5;\nmov.b32 %r10, 1;\n"
        "$L__loop:\nshl.b32 %r10, %r10, 1;\nsub.s32 %r20, %r20, 1;\nsetp.ge.s32 %p1, %r20, 0;\n@%p1 bra $L__loop;\n"
    )
    total = "".join(
        f"shfl.sync.bfly.b32 %r11, %r10, {distance}, 31, -1;\nadd.s32 %r10, %r10, %r11;\n"
        for distance in (1, 2, 4, 8, 16)
    )
    assert results(loop + STORE, order=order).tolist() == (2 << LANE % 5).tolist()
    wanted = (2 << LANE % 5).reshape(-1, 32).sum(axis=1)
    assert results(loop + total + STORE, order=order).tolist() == np.repeat(wanted, 32).tolist()


def test_branches_within_a_loop_meet_before_its_next_round():
    """Odd lanes add 3 and even lanes add 5, in a block that the text puts after the loop; then the warp exchanges."""
    body = (
        "and.b32 %r20, %r1, 1;\nsetp.eq.b32 %p1, %r20, 1;\nmov.b32 %r10, 0;\nmov.b32 %r21, 0;\n"
        "$L__loop:\n@%p1 bra $L__odd;\nadd.s32 %r10, %r10, 5;\n"
        "$L__meet:\nshfl.sync.bfly.b32 %r10, %r10, 1, 31, -1;\nadd.s32 %r21, %r21, 1;\n"
        "setp.lt.s32 %p2, %r21, 3;\n@%p2 bra $L__loop;\nbra.uni $L__done;\n"
        "$L__odd:\nadd.s32 %r10, %r10, 3;\nbra.uni $L__meet;\n$L__done:\n"
    )
    assert results(body + STORE).tolist() == np.where(LANE % 2, 5 + 3 + 5, 3 + 5 + 3).tolist()


def test_a_switch_leads_each_lane_to_its_own_case_and_all_meet_again():
    cases = "".join(f"$L__case{n}:\nmov.b32 %r10, {10 + n};\nbra.uni $L__meet;\n" for n in range(3))
    body = (
        "rem.u32 %r20, %r1, 4;\n"
        "$L_brx_0: .branchtargets\n\t$L__case0,\n\t$L__case2,\n\t$L__case1,\n\t$L__case2;\nbrx.idx %r20, $L_brx_0;\n"
        f"{cases}$L__meet:\nshfl.sync.bfly.b32 %r10, %r10, 1, 31, -1;\n"
    )
    assert results(body + STORE).tolist() == np.array([10, 12, 11, 12])[(LANE ^ 1) % 4].tolist()


def test_a_switch_under_a_guard_is_refused():
    body = "$L_brx_0: .branchtargets $L__end;\nsetp.gt.u32 %p1, %r1, 20;\n@%p1 brx.idx %r1, $L_brx_0;\n$L__end:\n"
    with pytest.raises(RefusedError, match=r"a switch under a guard"):
        run(body)


def test_lanes_that_have_ended_store_nothing():
    body = "setp.gt.u32 %p1, %r1, 20;\n@%p1 ret;\nmov.b32 %r10, 7;\n"
    assert results(body + STORE).tolist() == np.where(LANE > 20, 0, 7).tolist()


def test_what_needs_a_whole_warp_is_refused_in_a_part_of_it():
    body = "setp.gt.u32 %p1, %r1, 20;\n@%p1 bra $L__end;\nshfl.sync.bfly.b32 %r10, %r1, 1, 31, -1;\n$L__end:\n"
    with pytest.raises(RefusedError, match=r"a part of a warp.*shfl"):
        run(body)


def shuffled(mode, lane, distance, c):
    """By PTX's definition."""
    bound, kept = c & 31, c >> 8
    last = lane & kept | bound & ~kept
    source = {"idx": lane & kept | distance & ~kept, "bfly": lane ^ distance,
              "up": lane - distance, "down": lane + distance}[mode]  # fmt: skip
    inside = source >= last if mode == "up" else source <= last
    return source if inside else lane


@pytest.mark.parametrize("segments", [0x0000, 0x1800, 0x1E00])
@pytest.mark.parametrize("mode", ["idx", "bfly", "up", "down"])
def test_shuffles(mode, segments):
    for distance in (0, 1, 3, 8, 31):
        c = segments | (0 if mode == "up" else 31)
        got = results(f"shfl.sync.{mode}.b32 %r10, %r1, {distance}, {c}, -1;\n" + STORE)
        wanted = [warp + shuffled(mode, lane, distance, c) for warp in (0, 32) for lane in range(32)]
        assert got.tolist() == wanted


def test_reductions_of_a_warp():
    body = "mov.b32 %r20, -1;\nsub.s32 %r21, %r1, 40;\nredux.sync.{}.s32 %r10, %r21, %r20;\n"
    assert results(body.format("min") + STORE).tolist() == [-40] * 32 + [-8] * 32
    assert results(body.format("max") + STORE).tolist() == [-9] * 32 + [23] * 32
    with pytest.raises(RefusedError, match="a part of a warp"):
        run(body.format("max").replace("-1", "0xFFFF"))


@pytest.mark.parametrize(
    ("comparison", "less", "equal", "greater", "unordered"),
    [
        ("eq", 0, 1, 0, 0), ("ne", 1, 0, 1, 0), ("lt", 1, 0, 0, 0), ("le", 1, 1, 0, 0), ("gt", 0, 0, 1, 0),
        ("ge", 0, 1, 1, 0), ("equ", 0, 1, 0, 1), ("neu", 1, 0, 1, 1), ("ltu", 1, 0, 0, 1), ("leu", 1, 1, 0, 1),
        ("gtu", 0, 0, 1, 1), ("geu", 0, 1, 1, 1), ("num", 1, 1, 1, 0), ("nan", 0, 0, 0, 1),
    ],
)  # fmt: skip
def test_comparisons_of_floats(comparison, less, equal, greater, unordered):
    one, two, nan = "0f3F800000", "0f40000000", "0f7FC00000"
    for a, b, wanted in ((one, two, less), (two, two, equal), (two, one, greater), (nan, one, unordered)):
        body = f"mov.b32 %r20, {a};\nsetp.{comparison}.f32 %p1, %r20, {b};\nselp.b32 %r10, 1, 0, %p1;\n"
        assert results(body + STORE).tolist() == [wanted] * THREADS


def test_predicates_are_combined():
    body = "setp.lt.u32 %p1, %r1, 40;\nsetp.gt.and.u32 %p2, %r1, 10, {}%p1;\nselp.b32 %r10, 1, 0, %p2;\n"
    assert results(body.format("") + STORE).tolist() == ((LANE > 10) & (LANE < 40)).tolist()
    assert results(body.format("!") + STORE).tolist() == ((LANE > 10) & (LANE >= 40)).tolist()


@pytest.mark.parametrize("letter", "us")
def test_narrow_numbers_are_widened_with_their_sign(letter):
    """x holds 0.0, 1.0, 2.0 …; the last byte of 2.0 and -2.0 is 0x40 and 0xC0."""
    body = (
        "ld.global.b32 %r20, [%rd3];\nor.b32 %r20, %r20, 0x80000000;\nst.shared.b32 [%r2], %r20;\n"
        f"ld.shared.{letter}8 %r10, [%r2 + 3];\n"
    )
    last = (np.arange(THREADS, dtype=np.float32).view(np.uint32) | 0x80000000) >> 24
    assert results(body + STORE).tolist() == (last if letter == "u" else last.astype(np.int8)).tolist()


def test_parts_of_registers():
    """The halves of a register change places."""
    body = (
        "mul.lo.u32 %r20, %r1, 65537;\nadd.u32 %r20, %r20, 5;\n"
        "mov.b32 {%rs1, %rs2}, %r20;\nmov.b32 %r10, {%rs2, %rs1};\n"
    )
    assert results(body + STORE).tolist() == (LANE | LANE + 5 << 16).tolist()


def test_places_in_the_grid():
    """Each CTA of a grid of 2 · 3 · 2 stores its place in its own element."""
    body = (
        "mov.u32 %r20, %ctaid.x;\nmov.u32 %r21, %ctaid.y;\nmov.u32 %r22, %ctaid.z;\nmov.u32 %r23, %nctaid.x;\n"
        "mov.u32 %r24, %nctaid.y;\nmad.lo.s32 %r25, %r22, %r24, %r21;\nmad.lo.s32 %r25, %r25, %r23, %r20;\n"
        "setp.eq.u32 %p1, %r1, %r25;\nmul.lo.u32 %r10, %r22, 100;\nmad.lo.u32 %r10, %r21, 10, %r10;\n"
        "add.u32 %r10, %r10, %r20;\n@%p1 st.global.b32 [%rd4], %r10;\n"
    )
    wanted = [100 * z + 10 * y + x for z in range(2) for y in range(3) for x in range(2)]
    assert results(body, grid=(2, 3, 2)).tolist() == wanted + [0] * (THREADS - 12)
