"""The text of a kernel in PTX, read into instructions and basic blocks."""

import graphlib
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ptx.findings import RefusedError

_LABEL = re.compile(r"([\w$]+):\s*(.*)", re.DOTALL)
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_TABLE = re.compile(r"([\w$]+):\s*\.branchtargets\s+([^;]*);")
_KINDS = {"bra": "jump", "brx": "switch", "ret": "exit", "exit": "exit", "bar": "barrier", "barrier": "barrier"}
_SHARED_ACCESS = re.compile(r"\b(?:ld|st)\.(?:volatile\.)?shared\b[\w.:]*\.[busf](8|16|32|64)\b")


class Instruction(NamedTuple):
    """One instruction: ``@guard opcode operands``."""

    at: int  # its number in the kernel
    opcode: str
    operands: list
    guard: str | None  # the predicate register that decides which lanes execute it
    negated: bool  # whether those without the predicate do

    @property
    def name(self):
        return self.opcode.split(".")[0]

    @property
    def modifiers(self):
        return self.opcode.split(".")[1:]


@dataclass(eq=False)
class Block:
    """Instructions that are executed one after another, and how they end."""

    instructions: list = field(default_factory=list)
    kind: str = "fall"  # or "jump", "switch", "exit", "barrier"
    end: Instruction | None = None  # the jump, switch, exit or barrier
    target: int | None = None  # the block that a jump leads to
    targets: list = field(default_factory=list)  # those that a switch leads to, by the value of its register
    next: int = 0  # the block that follows

    @property
    def successors(self):
        if self.kind == "exit":
            return [self.next] if self.end.guard else []
        if self.kind == "jump":
            return [self.target, self.next] if self.end.guard else [self.target]
        if self.kind == "switch":
            return self.targets
        return [self.next]


@dataclass
class Kernel:
    """What the text says of a kernel."""

    name: str
    threads: int
    parameters: dict  # name -> number
    register_types: dict  # prefix of registers -> "pred" or bits
    symbols: dict  # name -> address in shared memory
    blocks: list
    lines: list  # text and source of every instruction
    smallest_access: int  # bytes of the smallest access to shared memory, at most 4


def parse(text):
    """The only kernel of a PTX text."""
    entry = re.search(r"\.entry\s+(\w+)\((.*?)\)(.*?)^\{(.*?)^\}", text, re.DOTALL | re.MULTILINE)
    name, parameters, directives, body = entry.groups()
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives)
    shared = re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[", text)
    if len(shared) > 1 or ".local" in body:
        raise RefusedError(f"{name}: several shared arrays, or a stack")
    blocks, lines = _blocks(name, body)
    return Kernel(
        name,
        int(np.prod([int(n) for n in threads.groups() if n])),
        {p.split()[-1]: number for number, p in enumerate(filter(None, map(str.strip, parameters.split(","))))},
        {p: t if t == "pred" else int(t[1:]) for t, p in re.findall(r"\.reg\s+\.(\w+)\s+%([a-z]+)<", body)},
        dict.fromkeys(shared, 0),
        blocks,
        lines,
        min([32, *(int(m[1]) for m in map(_SHARED_ACCESS.search, lines) if m)]) // 8,
    )


def split_operands(text):
    """Operands between commas; braces and brackets hold theirs together."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def _blocks(kernel, body):
    """Basic blocks in the order in which lanes execute them, and the text of every instruction."""
    blocks, labels, lines, source = [Block()], {}, [], ""
    tables = {name: split_operands(targets) for name, targets in _TABLE.findall(body)}
    body = _TABLE.sub("", body)

    def begin():
        if blocks[-1].instructions or blocks[-1].kind != "fall":
            blocks.append(Block())

    for line in body.split("\n"):
        code, _, comment = line.partition("//")
        code = code.strip()
        if code.startswith(".loc"):
            source = comment.split("@")[0].strip()
        label = _LABEL.fullmatch(code)
        if label and not label[1].startswith(("$L__tmp", "$L__func")):
            begin()
            labels[label[1]] = len(blocks) - 1
        for statement in (label[2] if label else code).split(";"):
            if not statement.strip() or statement.strip().startswith("."):
                continue
            read = _STATEMENT.fullmatch(statement.strip())
            if read is None:
                raise RefusedError(f"{kernel}: cannot read {statement.strip()!r}")
            negated, guard, opcode, operands = read.groups()
            instruction = Instruction(len(lines), opcode, split_operands(operands), guard, bool(negated))
            lines.append(f"{' '.join(statement.split())} [{source}]")
            kind = _KINDS.get(instruction.name, "fall")
            if kind == "fall" or "warp" in instruction.modifiers:
                blocks[-1].instructions.append(instruction)
                continue
            if kind == "barrier" and (guard or operands != "0" or "sync" not in instruction.modifiers):
                raise RefusedError(f"{kernel}: unknown barrier, at: {lines[-1]}")
            if kind == "switch" and guard:
                raise RefusedError(f"{kernel}: a switch under a guard, at: {lines[-1]}")
            blocks[-1].kind, blocks[-1].end = kind, instruction
            blocks.append(Block())
    for number, block in enumerate(blocks):
        block.next = number + 1
        if block.kind == "jump":
            block.target = labels[block.end.operands[0]]
        if block.kind == "switch":
            block.targets = [labels[label] for label in tables[block.end.operands[1]]]
    return _in_order(blocks), lines


def _in_order(blocks):
    """Blocks so that the one where paths meet comes after these paths, and what follows a loop after the loop.

    Diverged lanes of the first block go first, so that they meet the others again as on a GPU. The compiler's own
    order would let some run ahead.
    """
    edges = {n: {s for s in block.successors if s < len(blocks)} for n, block in enumerate(blocks)}
    reached, new = {0}, [0]
    while new:
        found = edges[new.pop()] - reached
        reached |= found
        new += found
    order = list(_topological(reached, edges))
    place = {number: n for n, number in enumerate(order)}
    for block in blocks:
        block.next = place.get(block.next, len(order))
        block.target = place.get(block.target)
        block.targets = [place.get(target) for target in block.targets]
    return [blocks[n] for n in order]


def _topological(nodes, edges):
    """Some nodes of a graph, each before its successors; a loop's nodes together, its head first."""
    numbers = {node: n for n, node in enumerate(nodes)}
    pairs = [(numbers[a], numbers[b]) for a in nodes for b in edges[a] if b in numbers]
    graph = coo_array((np.ones(len(pairs)), np.reshape(pairs, (-1, 2)).T), shape=(len(nodes),) * 2)
    _, part_of = connected_components(graph, connection="strong")
    parts, before = {}, {}
    for node, n in numbers.items():
        parts.setdefault(part_of[n], set()).add(node)
        before.setdefault(part_of[n], set())
    for a, b in pairs:
        if part_of[a] != part_of[b]:
            before[part_of[b]].add(part_of[a])
    for part in graphlib.TopologicalSorter(before).static_order():
        loop = parts[part]
        if len(loop) == 1:
            yield from loop
            continue
        entered = {b for a, successors in edges.items() if a not in loop for b in successors & loop}
        head = min(entered or loop)
        yield head
        yield from _topological(loop - {head}, edges)
