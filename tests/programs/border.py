"""Programs of which a part is outside of what is compiled, from some line after the head on."""

import re
from collections.abc import Sequence
from types import CodeType

OUTSIDE = {
    "eager": ("@uncompiled",),
    "eager_no_grad": ("@uncompiled", "@torch.no_grad()"),
    "compiled": (),
}
"""What the part after the border is decorated with; none is a function that is compiled apart."""

BREAK = "torch._dynamo.graph_break()"

_HEAD = re.compile(r" +z\d+ = ")
_AT_LEVEL = re.compile(r"    \S")
_GOES_ON = re.compile(r" +(\)|else|elif|except|finally)")


def places(lines: Sequence[str]) -> list[int]:
    """Between which lines a border may be, by the number of the line that follows."""
    head = next((n for n, line in enumerate(lines) if _HEAD.match(line)), len(lines))
    return [
        number
        for number in range(head + 1, len(lines))
        if _AT_LEVEL.match(lines[number]) and not _GOES_ON.match(lines[number])
    ]


def with_border(lines: Sequence[str], place: int, outside: str) -> list[str]:
    """The program with its lines from ``place`` on outside of what is compiled."""
    before, after = list(lines[:place]), list(lines[place:])
    if not OUTSIDE[outside]:
        return [*before, f"    {BREAK}", *after]
    function = _code(before)
    known = {*function.co_varnames, *function.co_cellvars}
    needed = ", ".join(sorted(known & _names(_code(["def f():", *after]))))
    decorated = [*OUTSIDE[outside], f"def outside({needed}):"]
    return [*before, f"    return outside({needed})", *decorated, *after]


def has_border(source: str) -> bool:
    """Whether a part of the program is outside."""
    return BREAK in source or "def outside(" in source


def _code(lines: Sequence[str]) -> CodeType:
    module = compile("\n".join(lines) + "\n", "<part of a program>", "exec")
    return next(part for part in module.co_consts if isinstance(part, CodeType))


def _names(code: CodeType) -> set[str]:
    """All that ``code`` and the functions in it read or write, attributes among them."""
    names = {*code.co_names, *code.co_varnames, *code.co_cellvars}
    return names.union(*(_names(part) for part in code.co_consts if isinstance(part, CodeType)))
