"""Which barriers of the compiled kernels the emulator misses when one of them is dropped.

``PYTHONPATH=.:tests python -m ptx.barriers [80 | 90]`` drops each barrier in turn and prints a table. A barrier whose
absence is not noticed is redundant in the code at hand: it stands beside the barriers of a layout conversion, or
between stages of a pipeline, which have buffers of their own.
"""

import itertools
import sys

import torch
from scan_problems import problem as scan_problem
from sequence_problems import problem as sequence_problem

from m3er_fast.functional import (
    CheckProjections,
    check_statistics,
    fusion_loss,
    local_least_squares,
    memory_scan,
    sequence_statistics,
)
from ptx.driver import EmulatedDriver
from ptx.findings import RefusedError
from ptx.machine import Options


def _random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _loss():
    logits = _random(3, 70, 6).requires_grad_()
    fusion_loss(logits, torch.arange(70) % 6, backend="triton").backward()


def _local_lstsq():
    neighbors = torch.arange(2 * 32).reshape(2, 32)
    local_least_squares(_random(2, 40), _random(64, 40), [_random(64, 4)], neighbors, backend="triton")


def _check_statistics():
    d, k = (140, 70), 6
    projections = CheckProjections(
        [_random(n) for n in d], [_random(k, d[0])], [_random(k)], [_random(k, d[1])], [_random(k)],
        [_random(n, n).triu() for n in d], [_random(k).abs()], [torch.linspace(0, 0.9, k)], True,
    )  # fmt: skip
    check_statistics([_random(70, n) for n in d], projections, backend="triton")


def _sequence_statistics():
    sequence_statistics(*sequence_problem(0, features=40), backend="triton")


def _memory_scan():
    features, weights = scan_problem((3, 2), 3, 3, dtype=torch.float32, sizes=(16,) * 5)
    hidden, memory = memory_scan(features, torch.tensor([3, 1, 2]), weights, backend="triton")
    (hidden.square().sum() + memory.sum()).backward()


CASES = (_loss, _local_lstsq, _check_statistics, _sequence_statistics, _memory_scan)


def is_noticed(driver, case):
    """Whether a run shows a fault, in either order of the warps."""
    for order in ("together", "descending"):
        driver.options = Options(order)
        try:
            case()
        except RefusedError:
            return True
        finally:
            findings = driver.take_findings()
        if findings:
            return True
    return False


def missed_barriers(target):
    """Yield for every kernel how many barriers the cases pass, and those whose absence goes unnoticed."""
    driver = EmulatedDriver(target)
    driver.take_the_place_of_a_gpu()
    for case in CASES:
        known = len(driver.programs)
        passed = set()
        case()
        programs = driver.programs[known:]
        for code in itertools.chain(*map(_barriers, programs)):
            code.run = _recorded(code.run, passed, code.block)
        if is_noticed(driver, case):
            raise RuntimeError(f"{case.__name__}: the kernels are faulty as they are")
        for program in programs:
            barriers = [code for code in _barriers(program) if code.block in passed]
            missed = [code for code in barriers if not _is_noticed_without(code, driver, case)]
            yield program.name, len(barriers), [program.kernel.lines[code.block.end.at] for code in missed]


def _is_noticed_without(code, driver, case):
    code.block.kind = "fall"
    try:
        return is_noticed(driver, case)
    finally:
        code.block.kind = "barrier"


def _barriers(program):
    return [code for code in program.codes if code.block.kind == "barrier"]


def _recorded(run, passed, block):
    def recorded(*arguments):
        passed.add(block)
        return run(*arguments)

    return recorded


if __name__ == "__main__":
    for kernel, barriers, missed in missed_barriers(int(sys.argv[1]) if len(sys.argv) > 1 else 80):
        print(f"{kernel}: {barriers} barriers, {len(missed)} missed")
        for line, group in itertools.groupby(sorted(missed)):
            print(f"  {len(list(group))} times {line}")
