"""Has Inductor compile what is done to a block of rows (losses, say), once for each way of use.

Blocks of one call have one size, whatever the number of rows, so that sizes are constants. What is
left of the rows is run by ATen, and so is everything where nothing can be compiled.
"""

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...compat.inductor import compile_as_it_is
from ...log import log

Work = Callable[..., Sequence[Tensor | None]]
"""A plain function of contiguous tensors, equal to others that do the same."""


class _Form(NamedTuple):
    """All that is known of a tensor when a block is compiled: it is contiguous."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


_compiled: dict[tuple[Work, tuple[_Form, ...]], Work | None] = {}
_compiling = threading.Lock()


def run_compiled(work: Work, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """What ``work`` gives for ``tensors``, by compiled code if there is some."""
    dense = [tensor.contiguous() for tensor in tensors]
    key = work, tuple(_Form(one.shape, one.dtype, one.device) for one in dense)
    if key not in _compiled:
        with _compiling:
            if key not in _compiled:
                _compiled[key] = _compile(*key)
    return (_compiled[key] or work)(*dense)


def _compile(work: Work, forms: Sequence[_Form]) -> Work | None:
    """Compile ``work``; None if that is impossible here.

    In a thread of its own: an op's kernel runs where autograd is switched off, below any modes,
    perhaps in a thread of autograd's. None of that is to be part of what is compiled.
    """
    found: list[Work | Exception] = []
    settings = contextvars.copy_context()

    def run() -> None:
        try:
            found.append(settings.run(compile_as_it_is, work, forms))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="lmhead_pass-compile")
    thread.start()
    thread.join()
    (made,) = found
    if isinstance(made, Exception):
        log.warning(
            "lmhead_pass: what is done to each row is run by ATen, operation by operation, which "
            "takes longer: Inductor did not compile it. `python -m lmhead_pass env` tells of "
            "compilers. %s: %s",
            *(type(made).__name__, str(made).strip().partition("\n")[0]),
        )
        return None
    return made
