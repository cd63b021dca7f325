"""Small kernels in PTX, launched in the emulator."""

import numpy as np
from ptx import machine
from ptx.memory import Tensors
from ptx.translator import Program

THREADS = 64  # two warps

# x and y in %rd1 and %rd2; the thread in %r1; its bytes in shared memory in %r2, and those of the other warp in %r3;
# its element of x and y in %rd3 and %rd4.
KERNEL = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry planted(
	.param .u64 .ptr .global .align 16 planted_x,
	.param .u64 .ptr .global .align 16 planted_y
)
.reqntid 64
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<40>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [planted_x];
	ld.param.b64 	%rd2, [planted_y];
	mov.u32 	%r1, %tid.x;
	shl.b32 	%r2, %r1, 2;
	xor.b32 	%r3, %r2, 128;
	cvt.u64.u32 	%rd5, %r2;
	add.s64 	%rd3, %rd1, %rd5;
	add.s64 	%rd4, %rd2, %rd5;
BODY
	ret;
}
"""


def run(body, grid=(1, 1, 1), size=4 * THREADS, shared=1024, **options):
    """Findings of a kernel's launch over two tensors of ``size`` bytes, and what is then in y."""
    program = Program(KERNEL.replace("BODY", body))
    x, y = np.arange(THREADS, dtype=np.float32), np.zeros(THREADS, np.float32)
    tensors = Tensors(4)
    parameters = [int(tensors.add(t.ctypes.data, size, name)) for t, name in ((x, "x"), (y, "y"))]
    machine.launch(program, grid, parameters, tensors, shared, machine.Options(**options))
    return program.findings, y
