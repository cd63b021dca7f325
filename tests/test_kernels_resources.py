"""Every kernel with every tile of its table, compiled for several generations of GPU, without a GPU.

Spills, stack frames and loads of one element at a time make a kernel several times slower, and no result shows it.
``python tests/test_kernels_resources.py`` prints the table.
"""

import collections
import concurrent.futures
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

TARGETS = (80, 90, 100)
MODULES = tuple(
    f"m3er_fast.kernels.{name}"
    for name in ("loss", "check_statistics", "sequence_statistics", "local_lstsq", "memory_scan")
)


# --- in a process of its own: this one interprets its kernels ---------------------------------------------------------


def compile_one(specialization, capability):
    """Registers, stack and instructions of a compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = specialization.kernel
    names = kernel.arg_names
    types = dict.fromkeys(specialization.constants, "constexpr") | dict(specialization.types)
    aligned = {}
    for name in specialization.aligned:
        place = names.index(name)
        paths = [(place, i) for i in range(len(types[name]))] if isinstance(types[name], tuple) else [(place,)]
        aligned |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(
        kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in specialization.constants.items()},
        aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(specialization.options))
    cuobjdump = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    operations = collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", code))
    return {
        "kernel": kernel.fn.__name__,
        "label": specialization.label,
        "target": capability,
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "spills": sum(number for name, number in operations.items() if name.startswith(("STL", "LDL"))),
        "loads": {name: number for name, number in operations.items() if name.startswith(("LDG.", "LDGSTS."))},
        "products": {name: number for name, number in operations.items() if name.startswith(("HMMA", "HGMMA", "UTC"))},
        "instructions": sum(operations.values()),
        "vectorized": specialization.vectorized,
        "half": any("16" in str(kind) for kind in specialization.types.values()),
    }


def load_bytes(name):
    """Bytes that one load instruction loads per thread."""
    parts = name.split(".")
    if "U8" in parts or "S8" in parts:
        return 1
    if "U16" in parts or "S16" in parts:
        return 2
    return next((int(part) // 8 for part in parts if part in ("64", "128")), 4)


def faults(row):
    """Faults of a kernel's machine code, in words."""
    found = []
    if row["stack"] or row["spills"]:
        found.append(f"{row['stack']} bytes of stack, {row['spills']} spills")
    if row["vectorized"]:
        # A wide load loads several elements. A sample's mask and weights are loaded singly, but are few.
        least = 4 if row["half"] else 8
        moved = {name: load_bytes(name) * number for name, number in row["loads"].items()}
        wide = sum(size for name, size in moved.items() if load_bytes(name) >= least)
        if 2 * wide < sum(moved.values()):
            found.append(f"loads of one element at a time: {row['loads']}")
    return found


def specializations():
    for module in MODULES:
        yield from importlib.import_module(module).specializations()


def work_through(share, target):
    """Rows of every second compilation, from number ``share`` on."""
    every = [one for one in specializations() if target in one.targets]
    return [compile_one(one, target) for one in every[share::2]]


# --- in the test process ----------------------------------------------------------------------------------------------


def run_apart(*arguments):
    """The JSON that this file prints as a program, in which kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(pathlib.Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as cache:
        environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": root}
        done = subprocess.run(
            [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def compile_all(target):
    """Rows of all kernels, compiled by two processes."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        halves = pool.map(run_apart, ("--share",) * 2, (str(target),) * 2, ("0", "1"))
    return [row for half in halves for row in half]


@pytest.mark.parametrize("target", [80, 90, pytest.param(100, marks=pytest.mark.slow)])
def test_no_kernel_spills_or_loads_one_element_at_a_time(target):
    pytest.importorskip("triton")
    rows = compile_all(target)
    print_table(rows)
    assert len({row["kernel"] for row in rows}) == 14
    wrong = {f"{row['kernel']} {row['label']}": faults(row) for row in rows if faults(row)}
    assert not wrong


def test_the_checker_sees_spills_and_narrow_loads():
    spilling, narrow, fine = run_apart("--self-test")
    assert "spills" in faults(spilling)[0]
    assert "one element" in faults(narrow)[0]
    assert not faults(fine)


def print_table(rows):
    print(f"\n{'kernel':32s} {'specialization':44s} sm  regs stack spills shared  instr  loads")
    for row in rows:
        loads = " ".join(f"{name.removeprefix('LDG')}:{number}" for name, number in row["loads"].items())
        print(
            f"{row['kernel']:32s} {row['label']:44s} {row['target']:3d} {row['registers']:4d} {row['stack']:5d} "
            f"{row['spills']:6d} {row['shared']:6d} {row['instructions']:6d}  {loads}"
        )


def self_test_rows():
    """Rows of a kernel that must spill, of one that loads single elements, and of one that does neither."""
    import triton
    import triton.language as tl

    from m3er_fast.kernels._specialization import Specialization

    @triton.jit
    def sort_kernel(x_ptr, STRIDE: tl.constexpr):
        i = tl.arange(0, 1024)
        tl.store(x_ptr + i, tl.sort(tl.load(x_ptr + i * STRIDE)))

    @triton.jit
    def copy_kernel(x_ptr, STRIDE: tl.constexpr):
        i = tl.arange(0, 4096)
        tl.store(x_ptr + i, tl.load(x_ptr + i * STRIDE) + 1.0)

    def one(kernel, stride, **options):
        options = {"num_warps": 1, **options}
        return Specialization("", kernel, {"x_ptr": "*fp32"}, {"STRIDE": stride}, frozenset({"x_ptr"}), options)

    cases = (one(sort_kernel, 1, maxnreg=32), one(copy_kernel, 3, num_warps=8), one(copy_kernel, 1, num_warps=8))
    return [compile_one(case, 90) for case in cases]


if __name__ == "__main__":
    if "--share" in sys.argv:
        target, share = map(int, sys.argv[2:])
        print(json.dumps(work_through(share, target)))
    elif "--self-test" in sys.argv:
        print(json.dumps(self_test_rows()))
    else:
        print_table([row for target in TARGETS for row in compile_all(target)])
