"""PTX as Python: a function over NumPy arrays for every basic block of a kernel.

A function takes the registers, arrays of one entry per lane, and the lanes that execute the block. It returns the
predicate of the jump at its end. Registers are kept as unsigned bits; within a block every form of a register that is
needed, such as its bits as float32, has a local name. An unknown instruction, or a known one with an unknown modifier,
is refused by name.
"""

import re
from dataclasses import dataclass

import numpy as np

from ptx import integers, numerics
from ptx.findings import Findings, RefusedError
from ptx.parser import Block, parse

# What the functions may call, and the names of NumPy's types in them.
_TYPES = {
    **{"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64},
    **{"S8": np.int8, "S16": np.int16, "S32": np.int32, "S64": np.int64},
    **{"F32": np.float32, "F64": np.float64},
}
_NAMES = {"np": np, "integers": integers, "numerics": numerics, **_TYPES}

_TYPE = re.compile(r"pred|[busf]\d+|bf16|tf32|[bu]?f16x2|bf16x2")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_SPECIAL = re.compile(r"%((?:tid|ctaid|ntid|nctaid)\.[xyz]|laneid|warpid)")
_REGISTER = re.compile(r"%([a-z]+)\d+")


@dataclass
class Code:
    """A block as the machine runs it."""

    run: object  # the function
    block: Block
    reads: list  # numbers of the registers that it reads, and that it leaves behind
    writes: list


class Program:
    """A compiled kernel, ready to run."""

    def __init__(self, text):
        self.kernel = kernel = parse(text)
        self.name, self.threads = kernel.name, kernel.threads
        self.findings = Findings(kernel.name, kernel.lines)
        registers, constants = _Registers(kernel), _Constants()
        writers = [_Writer(block, kernel, registers, constants, self.findings) for block in kernel.blocks]
        live = set().union(*(writer.inherited for writer in writers))
        source = "\n".join(writer.function(f"block_{n}", live) for n, writer in enumerate(writers))
        names = _NAMES | constants.values
        exec(compile(source, f"<{kernel.name}>", "exec"), names)
        self.codes = [
            Code(
                names[f"block_{n}"],
                writer.block,
                sorted(registers.numbers[r] for r in writer.inherited),
                sorted(registers.numbers[r] for r in writer.written & live),
            )
            for n, writer in enumerate(writers)
        ]
        self.register_types = [bool if t == "pred" else _TYPES[f"U{t}"] for t in registers.types]
        self.has_groups = any(i.name == "wgmma" for block in kernel.blocks for i in block.instructions)


class _Registers:
    """The registers of a kernel: numbers, and types as declared."""

    def __init__(self, kernel):
        self._declared = kernel.register_types
        self.numbers, self.types = {}, []

    def type(self, name):
        if name not in self.numbers:
            self.numbers[name] = len(self.types)
            self.types.append(self._declared[_REGISTER.fullmatch(name)[1]])
        return self.types[self.numbers[name]]


class _Constants:
    """Numbers in the text, as NumPy scalars with a name."""

    def __init__(self):
        self.values, self._names = {}, {}

    def name(self, bits, kind):
        if (bits, kind) not in self._names:
            self._names[bits, kind] = f"K{len(self.values)}"
            number = _TYPES[f"U{_bits(kind)}"](bits & (1 << _bits(kind)) - 1)
            self.values[self._names[bits, kind]] = number.view(_TYPES[kind.upper()])
        return self._names[bits, kind]


def _bits(kind):
    return int(kind[1:])


def _plain(kind):
    """The kind of number that a PTX type is handled as: bits and packed formats are unsigned numbers."""
    if kind in ("pred", "f32", "f64") or kind[0] in "us":
        return kind
    sizes = {"tf32": "u32", "f16": "u16", "bf16": "u16", "f16x2": "u32", "bf16x2": "u32"}
    return sizes.get(kind) or "u" + kind[1:]


_HALVES = {"bf16": "bf16", "f16": "f16", "bf16x2": "bf16", "f16x2": "f16"}  # also two in a register
_HANDLERS = {}


def _instruction(*names, allowed=""):
    """Register a function that writes these instructions, which may have the ``allowed`` modifiers beside types."""

    def register(function):
        for name in names:
            _HANDLERS[name] = function, frozenset(allowed.split())
        return function

    return register


class _Writer:
    """Writes the function of one block."""

    def __init__(self, block, kernel, registers, constants, findings):
        self.block, self.kernel, self.constants = block, kernel, constants
        self._registers = registers
        self._lines = []
        self._forms = {}  # register -> {kind: local name}, while these names hold its value
        self.inherited, self.written = set(), set()  # registers read before they are written, and written
        for instruction in block.instructions:
            self._write_instruction(instruction, findings)
        self._result = "None"
        if block.kind in ("jump", "exit"):
            self._result = self.guard(block.end)
        if block.kind == "switch":
            self._result = self.read(block.end.operands[0], "u32")

    def _write_instruction(self, instruction, findings):
        handler, allowed = _HANDLERS.get(instruction.name, (_unknown, frozenset()))
        self.types = [m for m in instruction.modifiers if _TYPE.fullmatch(m)]
        self.has = set(instruction.modifiers) - set(self.types)
        unknown = {m for m in self.has - allowed if not m.startswith(("L1::", "L2::"))}
        self.kind = _plain(self.types[-1]) if self.types else None
        try:
            (_unknown if unknown else handler)(self, instruction)
        except RefusedError as error:
            findings.refuse(instruction.at, str(error))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            findings.refuse(instruction.at, f"instruction not understood ({error!r})")

    def function(self, name, live):
        """The source of the function, which leaves the ``live`` registers behind."""
        loads = [f"{self._local(r, self._stored(r))} = R[{self._registers.numbers[r]}]" for r in sorted(self.inherited)]
        left = {register: self._form(register, self._stored(register)) for register in sorted(self.written & live)}
        stores = [f"R[{self._registers.numbers[register]}] = {form}" for register, form in left.items()]
        body = [*loads, *self._lines, *stores, f"return {self._result}"]
        return f"def {name}(R, T):\n" + "".join(f"    {line}\n" for line in body)

    # -- registers

    def _stored(self, register):
        """The kind as which a register is kept between blocks."""
        declared = self._registers.type(register)
        return declared if declared == "pred" else f"u{declared}"

    @staticmethod
    def _local(register, kind):
        return f"{register[1:]}_{kind}"

    def _form(self, register, kind):
        """The local name of a register as a number of its own width."""
        stored = self._stored(register)
        if register not in self._forms:
            self.inherited.add(register)
            self._forms[register] = {stored: self._local(register, stored)}
        forms = self._forms[register]
        if kind not in forms:
            forms[kind] = self._local(register, kind)
            self.line(f"{forms[kind]} = {next(iter(forms.values()))}.view({kind.upper()})")
        return forms[kind]

    def line(self, text):
        self._lines.append(text)

    def read(self, text, kind):
        """An expression of an operand as a number of ``kind``: an array, or a NumPy scalar for a constant."""
        if text.startswith("!"):
            return f"~{self.read(text[1:], kind)}"
        special = _SPECIAL.fullmatch(text)
        if special:
            name = f"T.{special[1].replace('.', '_')}"
            return name if kind == "u32" else f"{name}.astype({kind.upper()})"
        if text.startswith("%"):
            declared = self._registers.type(text)
            if kind == "pred" or declared == _bits(kind):
                return self._form(text, kind)
            return f"{self._form(text, self._stored(text))}.astype({kind.upper()})"
        if kind == "pred":
            return "np.True_" if int(text, 0) else "np.False_"
        if text in self.kernel.symbols:
            bits = self.kernel.symbols[text]
        else:
            bits = int(text[2:], 16) if text[:2].lower() in ("0f", "0d") else int(text.rstrip("U"), 0)
        return self.constants.name(bits, kind)

    def array(self, text, kind):
        """An operand as an array, also if it is a constant."""
        value = self.read(text, kind)
        return f"T.full({value})" if not text.startswith("%") else value

    def guard(self, instruction):
        """The lanes that execute an instruction: an expression, None for all."""
        if instruction.guard is None:
            return "None"
        return ("~" if instruction.negated else "") + self.read(instruction.guard, "pred")

    def put(self, register, expression, kind, instruction):
        """Write an expression of ``kind`` into a register, which may be wider."""
        if register == "_":
            return
        declared = self._registers.type(register)
        if kind != "pred" and _bits(kind) < declared:
            letter = "s" if kind[0] == "s" else "u"
            expression, kind = f"({expression}).astype({letter.upper()}{declared})", f"{letter}{declared}"
        if instruction.guard:
            old = self._form(register, kind)
            expression = f"np.where({self.guard(instruction)}, {expression}, {old})"
        name = self._local(register, kind)
        self.line(f"{name} = {expression}")
        self._forms[register] = {kind: name}
        self.written.add(register)

    def flushed(self, expression):
        return f"numerics.ftz({expression})" if "ftz" in self.has else expression

    def address(self, text, bits):
        base, offset = _ADDRESS.fullmatch(text).groups()
        kind = f"u{bits}"
        if not base.startswith("%"):
            place = self.kernel.symbols[base] + int(offset or "0", 0)
            return f"T.full({self.constants.name(place, kind)})"
        value = self.read(base, kind)
        distance = int(offset or "0", 0)
        return f"{value} + {self.constants.name(distance, kind)}" if distance else value


def _names(text):
    """Registers in braces, or the only one."""
    return [name.strip() for name in text.strip("{} ").split(",")]


def _unknown(w, i):
    raise RefusedError("unknown instruction")


def _refuse_unless(condition, message="unknown instruction"):
    if not condition:
        raise RefusedError(message)


# --- moves and logic --------------------------------------------------------------------------------------------------


@_instruction("mov")
def _mov(w, i):
    to, source = i.operands
    if to.startswith("{"):
        parts = _names(to)
        bits = _bits(w.kind) // len(parts)
        whole = w.read(source, w.kind)
        for n, part in enumerate(parts):
            w.put(part, f"({whole} >> {w.constants.name(n * bits, w.kind)}).astype(U{bits})", f"u{bits}", i)
    elif source.startswith("{"):
        parts = _names(source)
        bits = _bits(w.kind) // len(parts)
        w.put(to, " | ".join(
            f"{w.array(part, f'u{bits}')}.astype({w.kind.upper()}) << {w.constants.name(n * bits, w.kind)}"
            for n, part in enumerate(parts)
        ), w.kind, i)  # fmt: skip
    else:
        w.put(to, w.array(source, w.kind), w.kind, i)


@_instruction("and", "or", "xor")
def _logic(w, i):
    to, a, b = i.operands
    sign = {"and": "&", "or": "|", "xor": "^"}[i.name]
    w.put(to, f"{w.read(a, w.kind)} {sign} {w.read(b, w.kind)}", w.kind, i)


@_instruction("not")
def _not(w, i):
    w.put(i.operands[0], f"~{w.read(i.operands[1], w.kind)}", w.kind, i)


@_instruction("selp")
def _selp(w, i):
    to, a, b, predicate = i.operands
    w.put(to, f"np.where({w.read(predicate, 'pred')}, {w.read(a, w.kind)}, {w.read(b, w.kind)})", w.kind, i)


_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
                "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # fmt: skip
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
_OPPOSITE = {"eq": "!=", "ne": "==", "lt": ">=", "le": ">", "gt": "<=", "ge": "<"}


@_instruction("setp", allowed="ftz and or xor num nan " + " ".join((*_COMPARISONS, *_UNORDERED)))
def _setp(w, i):
    to, a, b, *combined = i.operands
    comparison = i.modifiers[0]
    a, b = (w.flushed(w.read(x, w.kind)) for x in (a, b))
    if comparison in ("num", "nan"):
        result = f"({a} == {a}) & ({b} == {b})"
        result = f"~({result})" if comparison == "nan" else result
    elif comparison in _UNORDERED and comparison != "neu":
        ordered = _UNORDERED[comparison]
        result = f"~(({a} < {b}) | ({a} > {b}))" if ordered == "eq" else f"~({a} {_OPPOSITE[ordered]} {b})"
    elif comparison == "ne" and w.kind[0] == "f":
        result = f"({a} < {b}) | ({a} > {b})"
    else:
        result = f"{a} {_COMPARISONS[_UNORDERED.get(comparison, comparison)]} {b}"
    if combined:
        sign = {"and": "&", "or": "|", "xor": "^"}[i.modifiers[1]]
        result = f"({result}) {sign} {w.read(combined[0], 'pred')}"
    first, *second = to.split("|")
    _refuse_unless(not second)
    w.put(first, result, "pred", i)


# --- arithmetic -------------------------------------------------------------------------------------------------------

_SIGNS = {"add": "+", "sub": "-", "mul": "*"}


@_instruction("add", "sub", "mul", allowed="rn ftz lo hi wide")
def _add(w, i):
    to, a, b = i.operands
    if w.kind[0] == "f":
        _refuse_unless(w.types[-1] in ("f32", "f64"))
        a, b = (w.flushed(w.read(x, w.kind)) for x in (a, b))
        w.put(to, w.flushed(f"{a} {_SIGNS[i.name]} {b}"), w.kind, i)
        return
    _refuse_unless(w.types[-1][0] in "us")
    if i.name == "mul":
        w.put(to, *_product(w, a, b), i)
    else:
        kind = "u" + w.kind[1:]
        w.put(to, f"{w.read(a, kind)} {_SIGNS[i.name]} {w.read(b, kind)}", kind, i)


def _product(w, a, b):
    """Expression and kind of a product of integers."""
    if "wide" in w.has:
        wide = f"{w.kind[0]}{2 * _bits(w.kind)}"
        return " * ".join(f"{w.read(x, w.kind)}.astype({wide.upper()})" for x in (a, b)), wide
    if "hi" in w.has:
        return f"integers.high_product({w.read(a, w.kind)}, {w.read(b, w.kind)})", w.kind
    kind = "u" + w.kind[1:]
    return f"{w.read(a, kind)} * {w.read(b, kind)}", kind


@_instruction("fma", "mad", allowed="rn ftz lo hi wide")
def _mad(w, i):
    to, a, b, c = i.operands
    if w.kind[0] == "f":
        _refuse_unless(w.types[-1] == "f32")
        a, b, c = (w.flushed(w.read(x, w.kind)) for x in (a, b, c))
        w.put(to, w.flushed(f"numerics.fma({a}, {b}, {c})"), w.kind, i)
        return
    _refuse_unless(w.types[-1][0] in "us")
    product, kind = _product(w, a, b)
    w.put(to, f"{product} + {w.read(c, kind)}", kind, i)


@_instruction("max", "min", allowed="NaN ftz")
def _max(w, i):
    to, a, b = i.operands
    a, b = w.flushed(w.read(a, w.kind)), w.flushed(w.read(b, w.kind))
    name = f"{i.name}imum"
    _refuse_unless(w.types[-1] == "f32" or w.types[-1][0] in "us")
    w.put(to, f"numerics.{name}({a}, {b}, {'NaN' in w.has})" if w.kind == "f32" else f"np.{name}({a}, {b})", w.kind, i)


@_instruction("abs", "neg", allowed="ftz")
def _abs(w, i):
    to, a = i.operands
    if w.types[-1] in _HALVES:
        sign = w.constants.name(0x80008000, w.kind)
        bits = w.read(a, w.kind)
        w.put(to, f"{bits} & ~{sign}" if i.name == "abs" else f"{bits} ^ {sign}", w.kind, i)
        return
    _refuse_unless(w.types[-1] in ("f32", "f64") or w.types[-1][0] == "s")
    w.put(to, w.flushed(f"np.{'abs' if i.name == 'abs' else 'negative'}({w.read(a, w.kind)})"), w.kind, i)


@_instruction("copysign")
def _copysign(w, i):
    to, sign, value = i.operands
    w.put(to, f"np.copysign({w.read(value, w.kind)}, {w.read(sign, w.kind)})", w.kind, i)


@_instruction("ex2", "lg2", "rsqrt", "sin", "cos", "rcp", "sqrt", "tanh", allowed="approx ftz rn")
def _function(w, i):
    to, a = i.operands
    _refuse_unless(w.types[-1] == "f32")
    if "rn" in w.has:
        _refuse_unless(i.name in ("rcp", "sqrt"))
        w.put(to, w.flushed(f"numerics.{i.name}_rn({w.flushed(w.read(a, w.kind))})"), w.kind, i)
        return
    flag = "" if i.name == "tanh" else f", {'ftz' in w.has}"
    w.put(to, f"T.approximations.{i.name}({w.read(a, w.kind)}{flag})", w.kind, i)


@_instruction("div", "rem", allowed="full approx rn ftz")
def _div(w, i):
    to, a, b = i.operands
    if w.kind[0] != "f":
        name = "quotient" if i.name == "div" else "remainder"
        w.put(to, f"integers.{name}({w.array(a, w.kind)}, {w.read(b, w.kind)})", w.kind, i)
        return
    _refuse_unless(w.types[-1] == "f32")
    a, b = w.read(a, w.kind), w.read(b, w.kind)
    if "rn" in w.has:
        w.put(to, w.flushed(f"numerics.div_rn({w.flushed(a)}, {w.flushed(b)})"), w.kind, i)
    else:
        name = "div_full" if "full" in w.has else "div_approx"
        w.put(to, f"T.approximations.{name}({a}, {b}, {'ftz' in w.has})", w.kind, i)


@_instruction("shl", "shr")
def _shift(w, i):
    to, a, distance = i.operands
    kind = w.kind if i.name == "shr" else "u" + w.kind[1:]
    if not distance.startswith("%") and int(distance, 0) < _bits(kind):
        sign = "<<" if i.name == "shl" else ">>"
        w.put(to, f"{w.read(a, kind)} {sign} {w.constants.name(int(distance, 0), kind)}", kind, i)
    else:
        name = "shift_left" if i.name == "shl" else "shift_right"
        w.put(to, f"integers.{name}({w.array(a, kind)}, {w.read(distance, 'u32')})", kind, i)


@_instruction("bfe")
def _bfe(w, i):
    to, a, position, length = i.operands
    fields = f"{w.read(position, 'u32')}, {w.read(length, 'u32')}"
    w.put(to, f"integers.extract({w.array(a, w.kind)}, {fields})", w.kind, i)


@_instruction("bfi")
def _bfi(w, i):
    to, field, a, position, length = i.operands
    fields = f"{w.read(position, 'u32')}, {w.read(length, 'u32')}"
    w.put(to, f"integers.insert({w.array(field, w.kind)}, {w.array(a, w.kind)}, {fields})", w.kind, i)


@_instruction("popc")
def _popc(w, i):
    w.put(i.operands[0], f"integers.count_ones({w.array(i.operands[1], w.kind)})", "u32", i)


@_instruction("prmt")
def _prmt(w, i):
    to, *operands = i.operands
    w.put(to, f"integers.permute({', '.join(w.array(x, 'u32') for x in operands)})", "u32", i)


@_instruction("lop3")
def _lop3(w, i):
    to, *operands, table = i.operands
    values = ", ".join(w.array(x, "u32") for x in operands)
    w.put(to, f"integers.lookup({values}, {int(table, 0)})", "u32", i)


# --- conversions ------------------------------------------------------------------------------------------------------


@_instruction("cvt", allowed="rn rz rna rni rzi rmi rpi ftz")
def _cvt(w, i):
    register, *operands = i.operands
    to, of = w.types
    rounding = next((m for m in i.modifiers if m in ("rn", "rz", "rna", "rni", "rzi", "rmi", "rpi")), "rn")
    values = [w.read(x, _plain(of)) for x in operands]
    if of == "f32":
        values = [w.flushed(x) for x in values]
    (first,), kind = values[:1], _plain(to)
    if to == "tf32":
        result = f"numerics.to_tf32({w.read(operands[0], 'u32')}, {rounding!r})"
    elif to in _HALVES and of == "f32":
        halves = [f"numerics.to_{_HALVES[to]}({x}, {rounding!r})" for x in values]
        result = halves[0] if len(halves) == 1 else f"numerics.pack({halves[1]}, {halves[0]})"
    elif of in ("bf16", "f16") and to == "f32":
        result = f"numerics.from_{of}({first})"
    elif of == to == "f32":
        result = f"numerics.integral({first}, {rounding!r})" if rounding in ("rni", "rzi", "rmi", "rpi") else first
    elif {of, to} == {"f32", "f64"}:
        _refuse_unless(rounding == "rn")
        result = f"{first}.astype({to.upper()})"
    elif kind[0] == "f":
        _refuse_unless(of[0] in "us")
        result = f"numerics.from_integer({first}, {to.upper()}, {rounding!r})"
    elif of in ("f32", "f64"):
        result = f"numerics.to_integer({first}, {kind.upper()}, {rounding!r})"
    else:
        _refuse_unless(of[0] in "usb" and to[0] in "usb" and of[1:].isdigit())
        result = f"{first}.astype({kind.upper()})"
    w.put(register, result, kind, i)


# --- memory -----------------------------------------------------------------------------------------------------------

_SPACES = "global shared shared::cta volatile nc v2 v4 v8"


def _space(w):
    """ "global" or "shared", and the bits of its addresses."""
    if "global" in w.has:
        return "global", 64
    _refuse_unless(w.has & {"shared", "shared::cta"})
    return "shared", 32


def _accessed(w):
    """Width of the numbers that are accessed, in bytes."""
    return _bits(_plain(w.types[-1])) // 8


@_instruction("ld", allowed="param " + _SPACES)
def _ld(w, i):
    to, place = i.operands[:2]
    letter = "s" if w.kind[0] == "s" else "u"
    kind = f"{letter}{_bits(w.kind)}"
    if "param" in w.has:
        name, offset = _ADDRESS.fullmatch(place).groups()
        _refuse_unless(not offset)
        w.put(to, f"T.parameter({w.kernel.parameters[name]}, {kind.upper()})", kind, i)
        return
    space, bits = _space(w)
    registers = _names(to)
    address = w.address(place, bits)
    w.line(f"m = T.load_{space}({address}, {_accessed(w)}, {len(registers)}, {w.guard(i)}, {i.at})")
    for n, register in enumerate(registers):
        w.put(register, f"m[{n}]" + (f".view({kind.upper()})" if letter == "s" else ""), kind, i)


@_instruction("st", allowed=_SPACES)
def _st(w, i):
    place, values = i.operands[:2]
    space, bits = _space(w)
    numbers = ", ".join(w.array(x, f"u{_bits(w.kind)}") for x in _names(values))
    w.line(f"T.store_{space}({w.address(place, bits)}, [{numbers}], {_accessed(w)}, {w.guard(i)}, {i.at})")


@_instruction("ldmatrix", allowed="sync aligned m8n8 x1 x2 x4 trans shared")
def _ldmatrix(w, i):
    to, place = i.operands
    _refuse_unless(i.guard is None and w.types == ["b16"])
    registers = _names(to)
    w.line(f"m = T.load_matrices({w.address(place, 32)}, {len(registers)}, {'trans' in w.has}, {i.at})")
    for n, register in enumerate(registers):
        w.put(register, f"m[{n}]", "u32", i)


@_instruction("stmatrix", allowed="sync aligned m8n8 x1 x2 x4 trans shared")
def _stmatrix(w, i):
    place, values = i.operands
    _refuse_unless(i.guard is None and w.types == ["b16"])
    numbers = ", ".join(w.array(x, "u32") for x in _names(values))
    w.line(f"T.store_matrices({w.address(place, 32)}, [{numbers}], {'trans' in w.has}, {i.at})")


@_instruction("cp", allowed="async ca cg shared shared::cta global commit_group wait_group wait_all")
def _cp(w, i):
    if w.has & {"commit_group", "wait_all"}:
        w.line("T.commit_copies()")
    if w.has & {"wait_group", "wait_all"}:
        w.line(f"T.wait_for_copies({int(i.operands[0], 0) if i.operands else 0})")
    if "global" in w.has:
        to, source, size = i.operands[:3]
        bytes_ = w.array(i.operands[3], "u32") if len(i.operands) > 3 else "None"
        addresses = f"{w.address(to, 32)}, {w.address(source, 64)}"
        w.line(f"T.copy_async({addresses}, {int(size, 0)}, {bytes_}, {w.guard(i)}, {i.at})")


@_instruction("createpolicy", allowed="fractional")
def _createpolicy(w, i):
    w.put(i.operands[0], f"T.full({w.constants.name(0, 'u64')})", "u64", i)


@_instruction("fence", allowed="proxy async shared::cta")
def _no_effect(w, i):
    """Copies and products are done at once, and memory is in order: nothing to wait for."""


# --- warps ------------------------------------------------------------------------------------------------------------


@_instruction("bar", allowed="warp sync")
def _bar(w, i):
    w.line(f"T.require_whole_warps({i.at})")


@_instruction("shfl", allowed="sync bfly idx up down")
def _shfl(w, i):
    to, value, b, c, members = i.operands
    _refuse_unless(members == "-1" and i.guard is None and "|" not in to)
    w.put(to, f"T.shuffle({i.modifiers[1]!r}, {w.array(value, 'u32')}, {w.read(b, 'u32')}, {int(c, 0)}, {i.at})",
          "u32", i)  # fmt: skip


@_instruction("redux", allowed="sync add min max and or xor")
def _redux(w, i):
    to, value, members = i.operands
    _refuse_unless(i.guard is None)
    inputs = f"{w.array(value, w.kind)}, {w.array(members, 'u32')}"
    w.put(to, f"T.reduce({i.modifiers[1]!r}, {inputs}, {i.at})", w.kind, i)


@_instruction("mma", allowed="sync aligned m16n8k4 m16n8k8 m16n8k16 row col")
def _mma(w, i):
    d, a, b, c = map(_names, i.operands)
    _refuse_unless(i.guard is None and i.modifiers[3:5] == ["row", "col"])
    of_d, kind, of_b, of_c = w.types
    _refuse_unless(of_d == of_c == "f32" and of_b == kind and kind in ("tf32", "bf16", "f16"))
    inputs = ", ".join("[" + ", ".join(w.array(x, "u32") for x in group) + "]" for group in (a, b, c))
    w.line(f"m = T.multiply({inputs}, {kind!r}, {i.at})")
    for n, register in enumerate(d):
        w.put(register, f"m[{n}]", "u32", i)


_WGMMA_SHAPES = " ".join(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16))


@_instruction("wgmma", allowed="fence commit_group wait_group mma_async sync aligned " + _WGMMA_SHAPES)
def _wgmma(w, i):
    if "mma_async" not in w.has:
        return  # done at once: nothing to wait for
    d, a, b, scale, *flags = i.operands
    of_d, kind, of_b = w.types
    registers = _names(d)
    _refuse_unless(i.guard is None and of_d == "f32" and of_b == kind and kind in ("tf32", "bf16", "f16"))
    _refuse_unless(flags[:2] == ["1", "1"])  # factors of A and B
    _refuse_unless("1" not in flags[2:], "a transposed matrix in shared memory")
    rows = "[" + ", ".join(w.array(x, "u32") for x in _names(a)) + "]" if a.startswith("{") else w.read(a, "u64")
    sums = "[" + ", ".join(w.array(x, "u32") for x in registers) + "]"
    inputs = f"{rows}, {w.read(b, 'u64')}, {sums}, {w.read(scale, 'pred')}"
    w.line(f"m = T.multiply_group({inputs}, {kind!r}, {i.at})")
    for n, register in enumerate(registers):
        w.put(register, f"m[{n}]", "u32", i)
