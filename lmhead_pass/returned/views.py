"""Views of returned logits that are returned beside them: how each is made, as a text.

A compiled function hands out tensors and constants alone. The views are taken of the lazy logits
once it has run, as the model took them: they share memory and history.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor


def encode(vocab_dim: int, steps: Sequence[Sequence[Any]], new_vocab_dim: int) -> str:
    """The text of a view of logits that have their vocabulary in ``vocab_dim``.

    ``steps`` act on ``[*rows, V]``, and after them the vocabulary is moved to ``new_vocab_dim``.
    Each step is a word and its operands: "detach"; "permute" and the order of the rows; "reshape"
    and their sizes; "index" and what is between the brackets; or a function that gives several
    tensors ("split"), what it is given before the dimension, this, and which of them is taken.
    """
    return json.dumps([vocab_dim, steps, new_vocab_dim], default=_sliced)


def calls_of(text: str, like: Tensor) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...], Any]]:
    """The functions that make the view with this text of logits ``like`` this.

    Each with its arguments after the first, and which of several results is taken.
    """
    vocab_dim, steps, new_vocab_dim = json.loads(text)
    if vocab_dim != like.dim() - 1:
        yield Tensor.movedim, (vocab_dim, -1), None
    vocab, dims = like.size(vocab_dim), like.dim()
    for word, *operands in steps:
        match word:
            case "detach":
                yield Tensor.detach, (), None
            case "permute":
                yield Tensor.permute, (*operands, len(operands)), None
            case "reshape":
                yield Tensor.reshape, (*operands, vocab), None
                dims = len(operands) + 1
            case "index":
                yield Tensor.__getitem__, (tuple(map(_item, operands)),), None
                dims += operands.count(None) - sum(isinstance(one, int) for one in operands)
            case _:
                *sizes, dim, number = operands
                yield getattr(Tensor, word), (*sizes, dim), number
                dims -= word == "unbind"
    if new_vocab_dim != dims - 1:
        yield Tensor.movedim, (-1, new_vocab_dim), None
    elif not steps and vocab_dim == new_vocab_dim:
        yield Tensor.__getitem__, (...,), None


def _sliced(part: slice) -> dict[str, list[Any]]:
    return {"slice": [part.start, part.stop, part.step]}


def _item(part: Any) -> Any:
    return slice(*part["slice"]) if isinstance(part, dict) else part
