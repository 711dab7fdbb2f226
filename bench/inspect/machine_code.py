"""Reading machine code: opcodes, the main loop, and what kinds of instructions it is made of.

Takes SASS as `nvdisasm -c` prints it. A loop is what lies between a backward branch and its target;
the main loop is the innermost one around the matrix instructions, or, where there are none, the
longest innermost one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = (
    *("matrix", "TMA", "asynchronous copy", "shared", "global", "local"),
    *("float", "integer", "control", "other"),
)
"""What `kind` answers: "shared" includes tensor memory, "local" is what spills, "integer" is
addresses and the moving about of registers."""

# The first that fits; bare opcodes.
_RULES = [
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\w*MMA$", "matrix"),
        (r"UTMA|UBLK", "TMA"),
        (r"LDGSTS$|LDGDEPBAR$", "asynchronous copy"),
        (r"(LDS|STS|LDSM|STSM|ATOMS|LDT|LDTM|STT|STTM|UTCCP|UTCSHIFT)$", "shared"),
        (r"(LDL|STL)$", "local"),
        (r"(LDG|STG|LD|ST|ATOM|ATOMG|RED|REDG)$", "global"),
        (
            r"(BRA|BRX|BRXU|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|BAR|BARRIER|SYNCS|WARPGROUP|DEPBAR"
            r"|WARPSYNC|MEMBAR|FENCE|ERRBAR|NANOSLEEP|YIELD|VOTE|VOTEU|ELECT|PREEXIT|ACQBULK|KILL"
            r"|BPT|USETMAXREG|UTCBAR|UTCATOMSWS|UCGABAR\w*)$",
            "control",
        ),
        (r"(FLO|UFLO|NOP|CCTL|LDC|ULDC|LDCU|UTCMXQMMA)$", "other"),
        (r"[FHD][A-Z]+\d?$|MUFU$|[UI]?[IF]2[IF]P?$|F2FP$|UF[A-Z0-9]+$", "float"),
        (r"U?(I|V)[A-Z]+\d?$|U?(LEA|LOP3|SHF|PRMT|SEL|MOV|PLOP3|BMSK|SGXT|POPC|BREV)$", "integer"),
        (r"(S2R|S2UR|CS2R|R2UR|R2P|P2R|UP2UR|UR2UP|CS2UR|MOVM|SHFL|REDUX|CREDUX)$", "integer"),
    )
]


@dataclass(frozen=True, slots=True)
class Loop:
    """Opcodes in order; `found` is False where there is no loop and the whole kernel stands."""

    opcodes: tuple[str, ...]
    found: bool

    @property
    def mix(self) -> dict[str, int]:
        """How many instructions of each kind, the kinds that are there."""
        counts = Counter(kind(opcode) for opcode in self.opcodes)
        return {name: counts[name] for name in KINDS if counts[name]}


def opcodes(code: str) -> list[str]:
    """The opcodes in order, bare of modifiers."""
    return [match[1] for line in code.splitlines() if (match := _INSTRUCTION.match(line))]


def kind(opcode: str) -> str:
    """What an instruction does, one of KINDS."""
    return next((name for rule, name in _RULES if rule.match(opcode)), "other")


def is_matrix(opcode: str) -> bool:
    """Whether it multiplies on tensor cores."""
    return kind(opcode) == "matrix"


def main_loop(code: str) -> Loop:
    """The loop where the kernel spends its time."""
    loops = _innermost(code.splitlines())
    around = [body for body in loops if any(map(is_matrix, body))]
    if around:
        busiest = max(around, key=_products)
        return Loop(tuple(busiest), True)
    whole = opcodes(code)
    # A matrix product outside of any loop is worth more than a loop that only copies.
    if loops and not any(map(is_matrix, whole)):
        longest = max(loops, key=len)
        return Loop(tuple(longest), True)
    return Loop(tuple(whole), False)


def _products(body: Sequence[str]) -> int:
    return sum(map(is_matrix, body))


# "        /*0070*/              @!P0 IMAD.MOV.U32 R1, ..."
_INSTRUCTION = re.compile(r"\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?\w+\s+)?([A-Z][A-Z0-9]+)")
_LABEL = re.compile(r"(\.L\w+):")
_BRANCH = re.compile(r"\s.*\bBRA\b.*`\((\.L\w+)\)")


def _innermost(lines: Sequence[str]) -> list[list[str]]:
    """The opcodes of each loop that no shorter one cuts, without loops that only wait.

    Waiting for a barrier is a tiny loop of its own, and code moved out of line branches back into
    the loop that it left, which looks like a longer loop across it.
    """
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    jumps = ((i, _BRANCH.match(line)) for i, line in enumerate(lines))
    spans = [(labels.get(jump[1], end), end) for end, jump in jumps if jump]
    kept: list[tuple[int, int]] = []
    bodies = []
    for start, end in sorted(spans, key=lambda span: span[1] - span[0]):
        body = opcodes("\n".join(lines[start : end + 1]))
        apart = all(end < other_start or other_end < start for other_start, other_end in kept)
        if start < end and apart and any(kind(o) not in ("control", "integer") for o in body):
            kept.append((start, end))
            bodies.append(body)
    return bodies
