"""Multiplicative fusion loss and class costs: value and gradient in one pass over the logits.

Four kernels share the work. Which one runs depends on how many classes the cost of a sample needs:

* one class against the rest, of few classes or of many: ``narrow`` and ``wide`` in ``_loss_labels``;
* every class, for targets over classes, a margin and the class costs: ``_loss_classes``;
* no other class, for yes/no questions: ``_loss_questions``.

Each program adds up its own samples, and the partial sums are added in a fixed order, never by atomics: equal inputs
give equal bits. A mean needs its divisor before a gradient is written: where it is the sum of label weights, every
program adds up all of them, or a first kernel does if there are many. A small batch needs only one program.

Dimension legend: M modalities, B samples, C classes, ROWS numbers that a program handles at a time, PARTS partial sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3er_fast.kernels._loss_classes import fusion_loss_classes_fwd_kernel
from m3er_fast.kernels._loss_inputs import RUNTIME, label_weight
from m3er_fast.kernels._loss_labels import fusion_loss_narrow_fwd_kernel, fusion_loss_wide_fwd_kernel
from m3er_fast.kernels._loss_questions import fusion_loss_questions_fwd_kernel
from m3er_fast.kernels._operators import operator, schema_of
from m3er_fast.kernels._specialization import TRITON_TYPE, Specialization
from m3er_fast.operands import LossFactors, LossOptions

# Programs of the kernel that adds up label weights. Every program of the main kernel reads their sums.
_PARTS = 128
# A batch with at most this many logits and samples gets one program, which leaves no sums to add up in a further
# launch. A logit takes about 40 instructions: 2^14 keep one multiprocessor busy for 5,000 cycles.
SOLO_LOGITS = 2**14
SOLO_SAMPLES = 1024
# Up to this many reads of labels by all programs together, which the L2 cache serves within a microsecond, each program
# adds up all label weights. Beyond, a launch before the main one is cheaper.
OWN_LABEL_READS = 2**19
# Labels that a program adds up at a time: many, so that their loads are under way together.
_LABELS = 1024
# Each program of the main kernel starts by reading the sums of the label weights: beyond this number, programs take
# several blocks each.
_MOST_PROGRAMS = 4096


# --- Sums of label weights; the incoming gradient ---


@triton.jit(do_not_specialize=RUNTIME)
def fusion_loss_weight_kernel(
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (C,) float32
    part_ptr,  # (PARTS,) float32
    N,
    ignore_index,
    C: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    LABELS: tl.constexpr,
):
    """Add up the weights of the labels that are not ignored, in PARTS parts."""
    total = label_weight(
        target_ptr, class_weight_ptr, N, tl.program_id(0), tl.num_programs(0), ignore_index, C, HAS_CLASS_WEIGHT, LABELS
    )
    tl.store(part_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=RUNTIME)
def fusion_loss_bwd_kernel(
    gradient_ptr,  # (N,)
    incoming_ptr,  # ()
    N,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Multiply the gradient by the incoming one, in place; an incoming 1, as of a model's last loss, moves nothing."""
    incoming = tl.load(incoming_ptr).to(tl.float32)
    if incoming != 1.0:
        number = N.to(tl.int64)
        if EVEN:
            number = tl.multiple_of(number, 16)
        i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        gradient = tl.load(gradient_ptr + i, mask=i < number, other=0.0).to(tl.float32)
        tl.store(gradient_ptr + i, (gradient * incoming).to(gradient_ptr.dtype.element_ty), mask=i < number)


# --- Launching ---


class Tile(NamedTuple):
    """Samples (or questions) and classes that a program holds at once, its warps, and the most registers per thread.

    Without this ceiling the assembler spills a few registers to fit more programs on a multiprocessor.
    """

    rows: int
    columns: int
    warps: int
    registers: int


# For the kernels that run over a flat array: label weights to add up, and gradients to scale.
_FLAT = Tile(2048, 1, 4, 64)
TargetMode = Literal["label", "answer", "share", "none"]  # "none": class costs only
Kind = Literal["narrow", "wide", "classes", "questions"]
_KERNELS: dict[Kind, Any] = {
    "narrow": fusion_loss_narrow_fwd_kernel,
    "wide": fusion_loss_wide_fwd_kernel,
    "classes": fusion_loss_classes_fwd_kernel,
    "questions": fusion_loss_questions_fwd_kernel,
}


def kind_of(modalities: int, classes: int, *, activation: str, every_class: bool) -> Kind:
    """Return which kernel computes: every class takes part under a margin and with targets over classes."""
    if activation == "sigmoid":
        return "questions"
    if every_class:
        return "classes"
    # All logits of a sample, and as many powers of e, have to fit into the registers of one thread.
    return "narrow" if classes <= 16 and modalities * triton.next_power_of_2(classes) <= 64 else "wide"


def tile_for(kind: Kind, modalities: int, classes: int, *, solo: bool = False) -> Tile:
    """Return the tile for these sizes; ``solo`` if one program computes the whole batch."""
    columns = triton.next_power_of_2(classes)
    logits = modalities * columns  # of one sample
    if kind == "narrow":  # one thread per sample
        if not solo:
            return Tile(128, columns, 4, 104 if logits <= 24 and classes % 2 == 0 else 128 if logits <= 32 else 255)
        return Tile(512, columns, 16, 128) if logits <= 32 else Tile(256, columns, 8, 255)
    if kind == "questions":
        return Tile(512, 1, 4, 168) if modalities <= 4 else Tile(256, 1, 4, 255)
    if kind == "wide":
        size, warps, registers = (1024, 4, 128) if modalities <= 4 else (512, 4, 168)
        if columns <= 128:  # several samples per program, each with many numbers beside its row of logits
            size, registers = size // 2, 168 if modalities <= 4 else 255
        if classes > 1024:
            size, warps, registers = (2048, 8, 128) if modalities <= 4 else (1024, 4, 168)
    else:  # "classes": four numbers per logit of the tile are alive at once
        size, warps, registers = (
            (1024, 4, 255) if modalities <= 2 else (512, 8, 255) if modalities <= 4 else (256, 8, 255)
        )
    columns = min(columns, size)
    return Tile(size // columns, columns, warps, registers)


def _forward(
    logits: Tensor, target: Tensor | None, factors: LossFactors, options: LossOptions, *, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of the logits (empty if not wanted); without a target, the class costs."""
    modalities, batch, classes = logits.shape
    mode = _target_mode(target)
    result, gradient = _outputs(logits, target, options, with_gradient=with_gradient)
    if not batch:
        return result.zero_(), gradient
    every_class = mode in ("none", "share") or options.margin is not None
    kind = kind_of(modalities, classes, activation=options.activation, every_class=every_class)
    summed = mode != "none" and options.reduction != "none"
    solo = summed and batch <= SOLO_SAMPLES and logits.numel() <= SOLO_LOGITS
    tile = tile_for(kind, modalities, classes, solo=solo and batch > 128)
    blocks = triton.cdiv(batch * classes if kind == "questions" else batch, tile.rows)
    programs = 1 if solo else min(blocks, _MOST_PROGRAMS)
    losses = result if not summed or solo else result.new_empty(programs)
    weighted = options.reduction == "mean" and mode in ("label", "answer")
    needs_weights = weighted and target is not None and target.numel() * programs > OWN_LABEL_READS
    parts = result.new_empty(_PARTS if needs_weights else 0)
    given = {name: factor is not None for name, factor in factors._asdict().items()}
    # Every argument of a kernel needs a tensor. The logits stand in for those that it does not read.
    labels = logits if target is None else target.contiguous()
    class_weight, modality_weight = (
        logits if factor is None else factor.to(torch.float32).contiguous()
        for factor in (factors.class_weight, factors.modality_weight)
    )
    available = logits if factors.available is None else factors.available
    outputs = [losses, result, gradient] if kind == "classes" else [losses, gradient]
    numbers = [batch, triton.cdiv(blocks, programs), *logits.stride(), *available.stride()[:2], float(options.beta)]
    if kind in ("classes", "questions"):
        numbers.append(float(options.margin or 0.0))
    # Triton launches on the current device, which need not be the tensors' device.
    with torch.cuda.device_of(logits):
        if needs_weights:
            fusion_loss_weight_kernel[(_PARTS,)](
                labels,
                class_weight,
                parts,
                labels.numel(),
                options.ignore_index,
                **_weight_constants(
                    classes,
                    mode,
                    labels.numel(),
                    has_class_weight=given["class_weight"] and options.activation == "softmax",
                ),
                **_compile_options(_FLAT),
            )
        _KERNELS[kind][(programs,)](
            logits,
            labels,
            class_weight,
            modality_weight,
            available,
            parts,
            *outputs,
            *numbers,
            options.ignore_index,
            **_constants(
                kind,
                tile,
                options,
                given,
                modalities,
                classes,
                mode=mode,
                dense=logits.stride()[1:] == (classes, 1),
                even=batch * classes % 16 == 0,
                labels=_LABELS if weighted and not needs_weights else 0,
                gradient=with_gradient,
            ),
            **_compile_options(tile),
        )
    return losses.sum() if losses is not result else result, gradient


def _target_mode(target: Tensor | None) -> TargetMode:
    if target is None:
        return "none"
    return "share" if target.is_floating_point() else "label" if target.ndim == 1 else "answer"


def _outputs(
    logits: Tensor, target: Tensor | None, options: LossOptions, *, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return empty tensors for the loss and the gradient.

    The gradient of float16 logits is float32: that of a mean is too small for float16 before a loss scale is applied.
    """
    _, batch, classes = logits.shape
    if target is None:
        shape: tuple[int, ...] = (batch, classes)
    elif options.reduction != "none":
        shape = ()
    else:
        shape = (batch, classes) if options.activation == "sigmoid" else (batch,)
    dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(logits.shape if with_gradient else (0,), dtype=dtype),
    )


def _weight_constants(classes: int, mode: TargetMode, labels: int, *, has_class_weight: bool) -> dict[str, Any]:
    # Answers are counted, whatever their value: the main kernel looks at the value.
    return {
        "C": 2**31 - 1 if mode == "answer" else classes,
        "HAS_CLASS_WEIGHT": has_class_weight,
        # No more than each program's share, or its threads would work through labels that there are not.
        "LABELS": min(_LABELS, max(128, triton.next_power_of_2(triton.cdiv(labels, _PARTS)))),
    }


def _constants(
    kind: Kind,
    tile: Tile,
    options: LossOptions,
    given: Mapping[str, bool],
    modalities: int,
    classes: int,
    *,
    mode: TargetMode,
    dense: bool,
    even: bool,
    labels: int,
    gradient: bool,
) -> dict[str, Any]:
    """Return the compile-time arguments of a kernel; ``given`` names the factors that there are."""
    constants: dict[str, Any] = {
        "M": modalities,
        "C": classes,
        "VARIANT": options.variant,
        "DETACH": options.detach_weight,
        "REDUCTION": options.reduction,
        **{f"HAS_{name.upper()}": is_given for name, is_given in given.items()},
        "DENSE": dense,
        "LABELS": labels,
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
    # One stage: loads are issued together anyway, and staging each through shared memory would cost a barrier.
    return {"num_warps": tile.warps, "maxnreg": tile.registers, "num_stages": 1, "enable_fp_fusion": True}


# --- The operators and their gradients ---


def _fusion_loss(logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *records, with_gradient = arguments
    return _forward(logits, target, *_records(records), with_gradient=with_gradient)


def _fusion_loss_fake(logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *records, with_gradient = arguments
    return _outputs(logits, target, _records(records)[1], with_gradient=with_gradient)


def _records(arguments: Sequence[Any]) -> tuple[LossFactors, LossOptions]:
    factors = len(LossFactors._fields)
    return LossFactors(*arguments[:factors]), LossOptions(*arguments[factors:])


# Autocast changes nothing: logits of any type are computed in float32.
fusion_loss_op = operator(
    "fusion_loss",
    schema=f"(Tensor logits, Tensor target, {schema_of(LossFactors)}, {schema_of(LossOptions)}, bool with_gradient)"
    " -> (Tensor, Tensor)",
)(_fusion_loss)
fusion_loss_op.register_fake(_fusion_loss_fake)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, *others = inputs
    _, gradient = output
    ctx.save_for_backward(gradient)
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    ctx.logits_dtype = logits.dtype
    ctx.without_gradient = [None] * len(others)


def _fusion_loss_backward(ctx: Any, incoming: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if incoming is None:
        return None, *ctx.without_gradient
    if torch.is_grad_enabled():
        raise RuntimeError("the operator m3er_fast::fusion_loss has no second derivative: use backend 'torch'")
    (gradient,) = ctx.saved_tensors  # (M, B, C), while the loss is (), (B,) or (B, C)
    scaled = gradient * (incoming[:, None] if incoming.ndim == 1 else incoming)
    return scaled.to(ctx.logits_dtype), *ctx.without_gradient


fusion_loss_op.register_autograd(_fusion_loss_backward, setup_context=_save_gradient)


def loss_and_gradient(
    logits: Tensor, target: Tensor, factors: LossFactors, options: LossOptions, *, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss of checked arguments and the gradient of the logits, which is empty if not wanted.

    The logits are float16, bfloat16 or float32. The operator computes the same, but its dispatcher takes longer than
    the kernel on a small batch.
    """
    return _forward(logits, target, factors, options, with_gradient=with_gradient)


def scale_(gradient: Tensor, incoming: Tensor) -> Tensor:
    """Multiply the gradient by a number (), in place; an incoming 1, as of a model's last loss, moves nothing."""
    number = gradient.numel()
    if number:
        with torch.cuda.device_of(gradient):
            fusion_loss_bwd_kernel[(triton.cdiv(number, _FLAT.rows),)](
                gradient, incoming, number, EVEN=number % 16 == 0, ROWS=_FLAT.rows, **_compile_options(_FLAT)
            )
    return gradient


def fusion_loss(logits: Tensor, target: Tensor, factors: LossFactors, options: LossOptions) -> Tensor:
    """Return the loss by the operator, for the compiler's graph."""
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    loss: Tensor = fusion_loss_op(logits, target, *factors, *options, with_gradient)[0]
    return loss


@operator("class_costs")
def class_costs_op(logits: Tensor, modality_weight: Tensor | None, available: Tensor | None, beta: float) -> Tensor:
    """Return the class costs (B, C)."""
    factors = LossFactors(None, modality_weight, available)
    return _forward(logits, None, factors, _cost_options(beta), with_gradient=False)[0]


@class_costs_op.register_fake
def _class_costs_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[1:], dtype=torch.float32)


@operator("class_costs_backward")
def class_costs_backward_op(
    incoming: Tensor, logits: Tensor, modality_weight: Tensor | None, available: Tensor | None, beta: float
) -> Tensor:
    """Return the gradient of Σ_y incoming(y) c(y), which is the gradient of a loss with the target ``incoming``."""
    factors = LossFactors(None, modality_weight, available)
    return _forward(logits, incoming, factors, _cost_options(beta), with_gradient=True)[1].to(logits.dtype)


@class_costs_backward_op.register_fake
def _class_costs_backward_fake(_: Tensor, logits: Tensor, *__: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _cost_options(beta: float) -> LossOptions:
    return LossOptions(variant="original", beta=beta, detach_weight=False, reduction="sum")


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.beta = inputs
    ctx.save_for_backward(*tensors)


def _class_costs_backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    return class_costs_backward_op(incoming, *ctx.saved_tensors, ctx.beta), None, None, None


class_costs_op.register_autograd(_class_costs_backward, setup_context=_save_inputs)


def class_costs(logits: Tensor, *, beta: float, modality_weight: Tensor | None, available: Tensor | None) -> Tensor:
    """Return Liu's cost of every class; :func:`m3er_fast.functional.class_costs` documents it.

    The arguments are checked, and the logits float16, bfloat16 or float32.
    """
    costs: Tensor = class_costs_op(logits, modality_weight, available, beta)
    return costs


# --- How the kernels are compiled ---


def specializations() -> Iterator[Specialization]:
    """Yield every tile of the table, with the options that need most registers, and with the plainest ones."""
    plain = LossOptions()
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
    modes: tuple[TargetMode, ...] = ("label", "answer", "share")
    for mode in modes:
        yield _specialization("questions", 3, 6, torch.float32, questions, mode, full=True)
    yield _specialization("questions", 8, 6, torch.float32, questions, "answer", full=True)
    yield _specialization("questions", 3, 6, torch.bfloat16, questions, "share")
    yield Specialization(
        "labels",
        fusion_loss_weight_kernel,
        {"target_ptr": "*i64", "class_weight_ptr": "*fp32", "part_ptr": "*fp32", "N": "i32", "ignore_index": "i32"},
        _weight_constants(6, "label", 2**20, has_class_weight=False),
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
    options: LossOptions,
    mode: TargetMode,
    *,
    full: bool = False,
    solo: bool = False,
) -> Specialization:
    """Return how a kernel is compiled for dense logits; ``full`` if every factor is given."""
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
            dict.fromkeys(LossFactors._fields, full),
            modalities,
            classes,
            mode=mode,
            dense=True,
            even=True,
            labels=_LABELS if full and mode in ("label", "answer") else 0,
            gradient=mode != "none",
        ),
        frozenset({*pointers, "stride_m"}),
        _compile_options(tile),
        # Rows with an odd number of classes start at any multiple of one element. With many modalities and every class,
        # a thread holds one logit of each, because registers are short.
        vectorized=kind == "questions" or (classes % 2 == 0 and not (kind == "classes" and modalities > 4)),
    )
