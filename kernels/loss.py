"""Multiplicative fusion loss and class costs: value and gradient in one pass over the logits.

Four kernels share the work, by what a cost needs of a sample:

* one class against the others, of few classes or of many: ``narrow`` and ``wide`` in ``_fusion_labels``;
* every class, for targets over classes, a margin and the class costs: ``_fusion_classes``;
* nothing of the other classes, for yes/no questions: ``_fusion_questions``.

Sums are taken program by program and then in a fixed order, never by atomics, so that equal inputs give equal bits. A
mean must know its divisor before it writes a gradient: for labels a first kernel adds up their weights, or the one
program that a small batch needs does.

Dimension legend: M modalities, B samples, C classes, ROWS numbers that a program takes at a time, PARTS partial sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3er_fast.kernels._loss_classes import fusion_loss_classes_fwd_kernel
from m3er_fast.kernels._loss_inputs import RUNTIME, label_weight
from m3er_fast.kernels._loss_labels import fusion_loss_narrow_fwd_kernel, fusion_loss_wide_fwd_kernel
from m3er_fast.kernels._loss_questions import fusion_loss_questions_fwd_kernel
from m3er_fast.kernels._target import TRITON_TYPE, Specialization, Work

# Programs of the kernel that adds up label weights; their sums are read by every program of the main kernel.
_PARTS = 128
# Up to this many logits and samples one program does everything, in one launch: a second would take longer than that.
_SOLO_LOGITS = 2**18
_SOLO_SAMPLES = 8192
# Each program of the main kernel starts by reading those sums: more programs than this share blocks instead.
_MOST_PROGRAMS = 4096


# --- Sums of label weights; the incoming gradient ---


@triton.jit(do_not_specialize=RUNTIME)
def fusion_loss_weight_kernel(
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (C,) float32
    part_ptr,  # (PARTS,) float32
    N,
    blocks,
    ignore_index,
    C: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Weights of the labels that count, added up in PARTS parts."""
    total = label_weight(target_ptr, class_weight_ptr, N, blocks, ignore_index, C, HAS_CLASS_WEIGHT, ROWS)
    tl.store(part_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=RUNTIME)
def fusion_loss_bwd_kernel(
    gradient_ptr,  # (N,)
    incoming_ptr,  # ()
    N,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradient times the incoming gradient, in place; where that is 1, as it is for the last loss, nothing is moved."""
    incoming = tl.load(incoming_ptr).to(tl.float32)
    if incoming != 1.0:
        number = N.to(tl.int64)
        if EVEN:
            number = tl.multiple_of(number, 16)
        i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        gradient = tl.load(gradient_ptr + i, mask=i < number, other=0.0).to(tl.float32)
        tl.store(gradient_ptr + i, (gradient * incoming).to(gradient_ptr.dtype.element_ty), mask=i < number)


# --- Launching ---


class Options(NamedTuple):
    """The settings of :func:`m3er_fast.functional.fusion_loss`."""

    variant: str
    beta: float
    detach_weight: bool
    activation: str
    margin: float | None
    ignore_index: int
    reduction: str


class Tile(NamedTuple):
    """Samples (or questions) and classes that a program holds at once, its warps, and registers a thread may take.

    Without a ceiling of its own choice the assembler spills a few registers to fit more programs on a multiprocessor.
    """

    rows: int
    columns: int
    warps: int
    registers: int


# Label weights that a program adds up at a time, and numbers of a gradient that one scales.
_FLAT = Tile(2048, 1, 4, 64)
Kind = Literal["narrow", "wide", "classes", "questions"]
_KERNELS: dict[Kind, Any] = {
    "narrow": fusion_loss_narrow_fwd_kernel,
    "wide": fusion_loss_wide_fwd_kernel,
    "classes": fusion_loss_classes_fwd_kernel,
    "questions": fusion_loss_questions_fwd_kernel,
}


def kind_of(modalities: int, classes: int, *, activation: str, every_class: bool) -> Kind:
    """Which kernel serves: every class takes part under a margin and with targets over classes."""
    if activation == "sigmoid":
        return "questions"
    if every_class:
        return "classes"
    # All logits of a sample, and as many powers of e, have to fit into the registers of one thread.
    return "narrow" if classes <= 16 and modalities * triton.next_power_of_2(classes) <= 64 else "wide"


def tile_for(kind: Kind, modalities: int, classes: int, *, solo: bool = False) -> Tile:
    """The table of tile sizes, by feature sizes only; ``solo`` where one program does all of a batch."""
    columns = triton.next_power_of_2(classes)
    held = modalities * columns
    if kind == "narrow":  # a sample a thread
        if not solo:
            return Tile(128, columns, 4, 104 if held <= 24 and classes % 2 == 0 else 128 if held <= 32 else 255)
        return Tile(512, columns, 16, 128) if held <= 32 else Tile(256, columns, 8, 255)
    if kind == "questions":
        return Tile(512, 1, 4, 168) if modalities <= 4 else Tile(256, 1, 4, 255)
    if kind == "wide":
        size, warps, registers = (1024, 4, 128) if modalities <= 4 else (512, 4, 168)
        if columns <= 128:  # several samples a program, whose own numbers are many beside a row's
            size, registers = size // 2, 168 if modalities <= 4 else 255
        if classes > 1024:
            size, warps, registers = (2048, 8, 128) if modalities <= 4 else (1024, 4, 168)
    else:  # "classes": four numbers for every logit of the tile are alive at once
        size, warps, registers = (
            (1024, 4, 255) if modalities <= 2 else (512, 8, 255) if modalities <= 4 else (256, 8, 255)
        )
    columns = min(columns, size)
    return Tile(size // columns, columns, warps, registers)


def _forward(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    modality_weight: Tensor | None,
    available: Tensor | None,
    options: Options,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of the logits (empty if not wanted); without a target the class costs instead."""
    modalities, batch, classes = logits.shape
    mode = _target_mode(target)
    result = logits.new_empty(_result_shape(logits, target, options), dtype=torch.float32)
    gradient = logits.new_empty(logits.shape if with_gradient else (0,), dtype=_gradient_dtype(logits))
    if not batch:
        return result.zero_(), gradient
    sigmoid = options.activation == "sigmoid"
    every_class = mode in ("none", "share") or options.margin is not None
    kind = kind_of(modalities, classes, activation=options.activation, every_class=every_class)
    summed = mode != "none" and options.reduction != "none"
    solo = summed and batch <= _SOLO_SAMPLES and logits.numel() <= _SOLO_LOGITS
    tile = tile_for(kind, modalities, classes, solo=solo and batch > 128)
    blocks = triton.cdiv(batch * classes if sigmoid else batch, tile.rows)
    programs = 1 if solo else min(blocks, _MOST_PROGRAMS)
    losses = result if not summed or solo else result.new_empty(programs)
    parts = result.new_empty(_PARTS if options.reduction == "mean" and not solo and mode in ("label", "answer") else 0)
    # What a kernel does not read it is given all the same: any tensor will do.
    labels = logits if target is None else target.contiguous()
    weights = logits if class_weight is None else class_weight.to(torch.float32).contiguous()
    factors = logits if modality_weight is None else modality_weight.to(torch.float32).contiguous()
    mask = logits if available is None else available
    constants = _constants(
        kind,
        tile,
        options,
        modalities,
        classes,
        mode=mode,
        has_class_weight=class_weight is not None,
        has_modality_weight=modality_weight is not None,
        has_available=available is not None,
        dense=logits.stride()[1:] == (classes, 1),
        even=batch * classes % 16 == 0,
        solo=solo,
        gradient=with_gradient,
    )
    outputs = [losses, result, gradient] if kind == "classes" else [losses, gradient]
    numbers: list[float] = [
        batch,
        triton.cdiv(blocks, programs),
        *logits.stride(),
        *mask.stride()[:2],
        float(options.beta),
    ]
    if kind in ("classes", "questions"):
        numbers.append(float(options.margin or 0.0))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(logits):
        if parts.numel():
            fusion_loss_weight_kernel[(_PARTS,)](
                labels,
                weights,
                parts,
                labels.numel(),
                triton.cdiv(labels.numel(), _PARTS * _FLAT.rows),
                options.ignore_index,
                **_weight_constants(classes, mode, has_class_weight=class_weight is not None and not sigmoid),
                **_compile_options(_FLAT),
            )
        _KERNELS[kind][(programs,)](
            logits,
            labels,
            weights,
            factors,
            mask,
            parts,
            *outputs,
            *numbers,
            options.ignore_index,
            **constants,
            **_compile_options(tile),
        )
    return losses.sum() if losses is not result else result, gradient


def _target_mode(target: Tensor | None) -> str:
    if target is None:
        return "none"
    return "share" if target.is_floating_point() else "label" if target.ndim == 1 else "answer"


def _result_shape(logits: Tensor, target: Tensor | None, options: Options) -> tuple[int, ...]:
    _, batch, classes = logits.shape
    if target is None:
        return (batch, classes)
    if options.reduction != "none":
        return ()
    return (batch, classes) if options.activation == "sigmoid" else (batch,)


def _gradient_dtype(logits: Tensor) -> torch.dtype:
    """The logits' own, but for float16: a mean's gradient is too small for it before the loss scale is applied."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def _weight_constants(classes: int, mode: str, *, has_class_weight: bool) -> dict[str, Any]:
    # Answers are counted, whatever they are: the main kernel judges them.
    return {
        "C": 2**31 - 1 if mode == "answer" else classes,
        "HAS_CLASS_WEIGHT": has_class_weight,
        "ROWS": _FLAT.rows,
    }


def _constants(
    kind: Kind,
    tile: Tile,
    options: Options,
    modalities: int,
    classes: int,
    *,
    mode: str,
    has_class_weight: bool,
    has_modality_weight: bool,
    has_available: bool,
    dense: bool,
    even: bool,
    solo: bool,
    gradient: bool,
) -> dict[str, Any]:
    """Compile-time arguments of a kernel."""
    constants: dict[str, Any] = {
        "M": modalities,
        "C": classes,
        "VARIANT": options.variant,
        "DETACH": options.detach_weight,
        "REDUCTION": options.reduction,
        "HAS_CLASS_WEIGHT": has_class_weight,
        "HAS_MODALITY_WEIGHT": has_modality_weight,
        "HAS_AVAILABLE": has_available,
        "DENSE": dense,
        "SOLO": solo,
        "GRADIENT": gradient,
        "PARTS": _PARTS,
        "ROWS": tile.rows,
    }
    if kind != "questions":
        constants["COLUMNS"] = tile.columns
    if kind == "narrow":
        constants["LOG_COLUMNS"] = int(math.log2(tile.columns))
    if kind in ("classes", "questions"):
        constants |= {"TARGET": mode, "HAS_MARGIN": options.margin is not None}
    if kind == "questions":
        constants["EVEN"] = even
    return constants


def _compile_options(tile: Tile) -> dict[str, Any]:
    # One stage: loads are issued together as it is, and staging them through shared memory costs a barrier each.
    return {"num_warps": tile.warps, "maxnreg": tile.registers, "num_stages": 1, "enable_fp_fusion": True}


# --- The ops and their gradients ---


@torch.library.custom_op("m3er_fast::fusion_loss", mutates_args=())
def fusion_loss_op(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    modality_weight: Tensor | None,
    available: Tensor | None,
    variant: str,
    beta: float,
    detach_weight: bool,
    activation: str,
    margin: float | None,
    ignore_index: int,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and its gradient. Autocast changes nothing: logits of any type are computed in float32."""
    options = Options(variant, beta, detach_weight, activation, margin, ignore_index, reduction)
    return _forward(logits, target, class_weight, modality_weight, available, options, with_gradient=with_gradient)


@fusion_loss_op.register_fake
def _fusion_loss_fake(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    modality_weight: Tensor | None,
    available: Tensor | None,
    variant: str,
    beta: float,
    detach_weight: bool,
    activation: str,
    margin: float | None,
    ignore_index: int,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    options = Options(variant, beta, detach_weight, activation, margin, ignore_index, reduction)
    return (
        logits.new_empty(_result_shape(logits, target, options), dtype=torch.float32),
        logits.new_empty(logits.shape if with_gradient else (0,), dtype=_gradient_dtype(logits)),
    )


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.logits_dtype = inputs[0].dtype


def _fusion_loss_backward(ctx: Any, incoming: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if incoming is None:
        return (None,) * 13
    if torch.is_grad_enabled():
        raise RuntimeError("the operator m3er_fast::fusion_loss has no second derivative: use backend 'torch'")
    (gradient,) = ctx.saved_tensors  # (M, B, C), while the loss is (), (B,) or (B, C)
    scaled = gradient * (incoming[:, None] if incoming.ndim == 1 else incoming)
    return (scaled.to(ctx.logits_dtype), *[None] * 12)


fusion_loss_op.register_autograd(_fusion_loss_backward, setup_context=_save_gradient)


def loss_and_gradient(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    modality_weight: Tensor | None,
    available: Tensor | None,
    settings: Mapping[str, Any],
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The op without the dispatcher, which takes longer than the kernel on a small batch: loss, and gradient or (0,).

    Arguments are checked, and those of :func:`m3er_fast.functional.fusion_loss`; logits float16, bfloat16 or float32.
    """
    options = Options(**settings)
    return _forward(logits, target, class_weight, modality_weight, available, options, with_gradient=with_gradient)


def scale_(gradient: Tensor, incoming: Tensor) -> Tensor:
    """The gradient times a number (), in place; where that is 1, as it is for the last loss, nothing is moved."""
    number = gradient.numel()
    if number:
        with torch.cuda.device_of(gradient):
            fusion_loss_bwd_kernel[(triton.cdiv(number, _FLAT.rows),)](
                gradient, incoming, number, EVEN=number % 16 == 0, ROWS=_FLAT.rows, **_compile_options(_FLAT)
            )
    return gradient


def fusion_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None,
    modality_weight: Tensor | None,
    available: Tensor | None,
    **settings: Any,
) -> Tensor:
    """The same by the op, for the compiler's graph."""
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    options = Options(**settings)
    loss: Tensor = fusion_loss_op(logits, target, class_weight, modality_weight, available, *options, with_gradient)[0]
    return loss


@torch.library.custom_op("m3er_fast::class_costs", mutates_args=())
def class_costs_op(logits: Tensor, modality_weight: Tensor | None, available: Tensor | None, beta: float) -> Tensor:
    """Class costs (B, C)."""
    return _forward(logits, None, None, modality_weight, available, _cost_options(beta), with_gradient=False)[0]


@class_costs_op.register_fake
def _class_costs_fake(logits: Tensor, modality_weight: Tensor | None, available: Tensor | None, beta: float) -> Tensor:
    return logits.new_empty(logits.shape[1:], dtype=torch.float32)


@torch.library.custom_op("m3er_fast::class_costs_backward", mutates_args=())
def class_costs_backward_op(
    incoming: Tensor, logits: Tensor, modality_weight: Tensor | None, available: Tensor | None, beta: float
) -> Tensor:
    """Gradient of Σ_y incoming(y) c(y): that of a loss whose target is the incoming gradient."""
    gradient = _forward(logits, incoming, None, modality_weight, available, _cost_options(beta), with_gradient=True)[1]
    return gradient.to(logits.dtype)


@class_costs_backward_op.register_fake
def _class_costs_backward_fake(
    incoming: Tensor, logits: Tensor, modality_weight: Tensor | None, available: Tensor | None, beta: float
) -> Tensor:
    return logits.new_empty(logits.shape)


def _cost_options(beta: float) -> Options:
    return Options("original", beta, False, "softmax", None, -100, "sum")


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, modality_weight, available, beta = inputs
    ctx.save_for_backward(logits, modality_weight, available)
    ctx.beta = beta


def _class_costs_backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    logits, modality_weight, available = ctx.saved_tensors
    return class_costs_backward_op(incoming, logits, modality_weight, available, ctx.beta), None, None, None


class_costs_op.register_autograd(_class_costs_backward, setup_context=_save_logits)


def class_costs(logits: Tensor, *, beta: float, modality_weight: Tensor | None, available: Tensor | None) -> Tensor:
    """:func:`m3er_fast.functional.class_costs` of checked arguments, float16, bfloat16 or float32 logits."""
    costs: Tensor = class_costs_op(logits, modality_weight, available, beta)
    return costs


# --- What the ops must move and how their kernels are compiled ---


def work(modalities: int, batch: int, classes: int, dtype: torch.dtype, *, with_gradient: bool = True) -> Work:
    """The least that loss and gradient of labels must do: read logits and labels once, write the gradient once.

    About 30 operations a logit: two comparisons, an exponential, a sum, a product, and its share of the sample's own.
    """
    logits = modalities * batch * classes
    moved = logits * dtype.itemsize + batch * 8
    if with_gradient:
        moved += logits * torch.promote_types(dtype, torch.bfloat16).itemsize
    return Work(moved, 30 * logits)


def specializations() -> Iterator[Specialization]:
    """Every tile of the table, with the options that need most registers, and the plainest ones."""
    plain = Options("m3er", 1.0, True, "softmax", None, -100, "mean")
    heavy = plain._replace(variant="original", detach_weight=False)
    both = (torch.float32, torch.bfloat16)
    for modalities, classes in ((1, 1), (3, 6), (3, 7), (3, 16), (4, 16), (8, 8)):
        yield _specialization("narrow", modalities, classes, torch.float32, heavy, "label", full=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield _specialization("narrow", 3, 6, dtype, plain, "label")
    for modalities, classes in ((3, 6), (8, 8)):
        yield _specialization("narrow", modalities, classes, torch.float32, heavy, "label", full=True, solo=True)
    few = [(modalities, classes) for modalities in (4, 8) for classes in (20, 30, 50, 100)]
    for modalities, classes in (*few, (8, 12), (3, 131072), (8, 131072)):
        yield _specialization("wide", modalities, classes, torch.float32, heavy, "label", full=True)
    for dtype in both:
        yield _specialization("wide", 3, 1024, dtype, plain, "label")
    yield _specialization("wide", 3, 1024, torch.float32, heavy, "label", full=True, solo=True)
    margin = heavy._replace(margin=0.1)
    for modalities, classes in ((1, 6), (3, 6), (4, 1024), (8, 1024)):
        yield _specialization("classes", modalities, classes, torch.float32, margin, "label", full=True)
    yield _specialization("classes", 3, 6, torch.float32, heavy._replace(reduction="sum"), "none")
    for modalities in (3, 4):
        yield _specialization("classes", modalities, 1024, torch.bfloat16, margin, "share", full=True)
    questions = margin._replace(activation="sigmoid")
    for mode in ("label", "answer", "share"):
        yield _specialization("questions", 3, 6, torch.float32, questions, mode, full=True)
    yield _specialization("questions", 8, 6, torch.float32, questions, "answer", full=True)
    yield _specialization("questions", 3, 6, torch.bfloat16, questions, "share")
    yield Specialization(
        "labels",
        fusion_loss_weight_kernel,
        {"target_ptr": "*i64", "class_weight_ptr": "*fp32", "part_ptr": "*fp32", "N": "i32"}
        | {"blocks": "i32", "ignore_index": "i32"},
        _weight_constants(6, "label", has_class_weight=False),
        frozenset({"target_ptr", "class_weight_ptr", "part_ptr"}),
        _compile_options(_FLAT),
    )
    for dtype in both:
        yield Specialization(
            f"{TRITON_TYPE[dtype]}",
            fusion_loss_bwd_kernel,
            {"gradient_ptr": f"*{TRITON_TYPE[dtype]}", "incoming_ptr": "*fp32", "N": "i32"},
            {"EVEN": True, "ROWS": _FLAT.rows},
            frozenset({"gradient_ptr", "incoming_ptr"}),
            _compile_options(_FLAT),
        )


def _specialization(
    kind: Kind,
    modalities: int,
    classes: int,
    dtype: torch.dtype,
    options: Options,
    mode: str,
    *,
    full: bool = False,
    solo: bool = False,
) -> Specialization:
    """A dense problem; ``full`` has every optional argument."""
    tile = tile_for(kind, modalities, classes, solo=solo)
    logits = TRITON_TYPE[dtype]
    pointers = {
        "logits_ptr": f"*{logits}",
        "target_ptr": "*fp32" if mode == "share" else "*i64",
        "class_weight_ptr": "*fp32",
        "modality_weight_ptr": "*fp32",
        "available_ptr": "*i1",
        "part_ptr": "*fp32",
        "loss_ptr": "*fp32",
    }
    if kind == "classes":
        pointers["cost_ptr"] = "*fp32"
    pointers["gradient_ptr"] = "*fp32" if dtype == torch.float16 else f"*{logits}"
    numbers = {"B": "i32", "blocks": "i32", "stride_m": "i32", "stride_b": "i32", "stride_c": "i32"}
    numbers |= {"available_stride_b": "i32", "available_stride_m": "i32", "beta": "fp32"}
    if kind in ("classes", "questions"):
        numbers["margin"] = "fp32"
    return Specialization(
        f"M={modalities} C={classes} {logits} {options.variant}{' ' + mode if mode != 'label' else ''}"
        f"{' full' if full else ''}{' solo' if solo else ''}",
        _KERNELS[kind],
        pointers | numbers | {"ignore_index": "i32"},
        _constants(
            kind,
            tile,
            options,
            modalities,
            classes,
            mode=mode,
            has_class_weight=full,
            has_modality_weight=full,
            has_available=full,
            dense=True,
            even=True,
            solo=solo,
            gradient=mode != "none",
        ),
        frozenset({*pointers, "stride_m"}),
        _compile_options(tile),
        # Rows of an odd number of classes start at any multiple of one element; and of many modalities, with every
        # class, a thread holds one logit each, for lack of registers.
        vectorized=kind == "questions" or (classes % 2 == 0 and not (kind == "classes" and modalities > 4)),
    )
