"""Where in the user's code a node comes from."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in .*(?:\n[ \t]+(?P<code>.*))?')
_TORCH, _OURS = (
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])
)


@dataclass(frozen=True)
class Place:
    """A line of the user's code."""

    file: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" `{self.code}`" if self.code else "")


def place_of(node: Node) -> Place | None:
    """Find the innermost line of the user's that made ``node``; None if Dynamo knew none."""
    return place_in(node.stack_trace or "")


def place_in(stack_trace: str) -> Place | None:
    """Find the innermost line of the user's in ``stack_trace``; None if it has no lines."""
    # Not from where ``explain`` calls what it explains.
    frames = [f for f in _FRAME.finditer(stack_trace) if not f["file"].startswith(_OURS)]
    users = [frame for frame in frames if not frame["file"].startswith(_TORCH)]
    if not frames:
        return None
    frame = (users or frames)[-1]
    return Place(frame["file"], int(frame["line"]), (frame["code"] or "").strip())


def at(node: Node) -> str:
    """Say where ``node`` comes from, to follow its name in a sentence; "" if nobody knows."""
    place = place_of(node)
    return f" at {place}" if place else ""
