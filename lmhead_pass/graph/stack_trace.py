"""Where in the user's code a node comes from."""

import os
import re
from dataclasses import dataclass

import torch
from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in .*(?:\n[ \t]+(?P<code>.*))?')
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True)
class Place:
    """A line of the user's code."""

    file: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" `{self.code}`" if self.code else "")


def place_of(node: Node) -> Place | None:
    """Find the innermost line outside of torch that made ``node``; None if Dynamo knew none."""
    return place_in(node.stack_trace or "")


def place_in(stack_trace: str) -> Place | None:
    """Find the innermost line outside of torch in ``stack_trace``; None if it has no lines."""
    frames = list(_FRAME.finditer(stack_trace))
    users = [frame for frame in frames if not frame["file"].startswith(_TORCH)]
    if not frames:
        return None
    frame = (users or frames)[-1]
    return Place(frame["file"], int(frame["line"]), (frame["code"] or "").strip())


def at(node: Node) -> str:
    """Say where ``node`` comes from, to follow its name in a sentence; "" if nobody knows."""
    place = place_of(node)
    return f" at {place}" if place else ""
