"""Machine code of a compiled kernel: its loops, and what overwrites a running product's operands.

On Hopper a product (HGMMA) runs asynchronously and may read its left operand from registers. Until
the wait (WARPGROUP.DEPBAR) that covers its group, nothing may write to them. Neither Triton nor the
assembler holds to that in every version (prologues.product), so that the tests scan for it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*);")
_BRANCH = re.compile(r"\bBRA\b.*?`\((\.L_x_\d+)\)")
_PREDICATE = re.compile(r"@!?U?P\w+\s+")
# A destination in registers: the first operand, or the second after a predicate.
_DESTINATION = re.compile(r"\S+\s+(?:U?P[\dT], )?R(\d+)\b")
_OPERAND_REGISTERS = 4  # of a product's left operand, per thread


class Loop(NamedTuple):
    """A backward branch and its target, as indices of instructions: first and last of the body."""

    first: int
    last: int


@dataclass(frozen=True)
class Code:
    """A kernel's instructions in their order, without predicates, and its innermost-first loops."""

    instructions: Sequence[str]
    loops: Sequence[Loop]

    def body(self, loop: Loop) -> Sequence[str]:
        """A loop's instructions."""
        return self.instructions[loop.first : loop.last + 1]

    def products(self, loop: Loop) -> int:
        """The asynchronous products in a loop's body."""
        return sum(line.startswith("HGMMA") for line in self.body(loop))


def parse(listing: str) -> Code:
    """The code of a listing as nvdisasm prints it."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(_PREDICATE.sub("", found.group(1), count=1))
            branch = _BRANCH.search(instructions[-1])
            if branch and branch.group(1) in labels:
                loops.append(Loop(labels[branch.group(1)], len(instructions) - 1))
    return Code(instructions, loops)


def disassemble(cubin: bytes, nvdisasm: str) -> Code:
    """The code of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvdisasm, "-c", file.name]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _execution(code: Code) -> Iterator[str]:
    """The instructions in an order of execution that goes through each loop with products twice."""
    again = {loop.last: loop.first for loop in code.loops if code.products(loop)}
    i = 0
    while i < len(code.instructions):
        yield code.instructions[i]
        i = again.pop(i, i + 1)


def _left_operand(operands: str) -> int | None:
    """The first register of a product's left operand; None where that is in shared memory."""
    left = re.fullmatch(r"R(\d+)", operands.split(",")[1].strip())
    return int(left.group(1)) if left else None


def reads_registers(code: Code) -> bool:
    """Whether a product takes its left operand from registers."""
    return any(
        line.startswith("HGMMA") and _left_operand(line.partition(" ")[2]) is not None
        for line in code.instructions
    )


def _width(operation: str) -> int:
    """How many registers an operation writes, at most."""
    if operation.startswith("LDSM") or ".128" in operation:
        return 4
    is_double = ".64" in operation or "WIDE" in operation or operation.startswith("D")
    return 2 if is_double else 1


def hazards(code: Code) -> list[str]:
    """The writes to an operand register of a product that may still be reading it."""
    found: list[str] = []
    groups: list[dict[int, str]] = []  # per committed group: a register, and who reads it
    current: dict[int, str] = {}
    for line in _execution(code):
        operation, _, operands = line.partition(" ")
        if operation.startswith("HGMMA"):
            first = _left_operand(operands)
            if first is not None:
                current |= dict.fromkeys(range(first, first + _OPERAND_REGISTERS), line)
            if "gsb0" in line:
                groups.append(current)
                current = {}
        elif operation.startswith("WARPGROUP.DEPBAR"):
            pending = int(operands.split(",")[1], 16)
            groups = groups[len(groups) - pending :] if pending else []
        elif target := _DESTINATION.match(line):
            first = int(target.group(1))
            for register in range(first, first + _width(operation)):
                readers = [g[register] for g in (*groups, current) if register in g]
                found += [f"{line} while {reader}" for reader in readers]
    return found
