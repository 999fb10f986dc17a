"""The hypothesis strategy that writes programs whose losses have no fused form."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st

from . import row_wise_tables as words
from . import tables
from .grammar import BORDERS, Logits, Writer, drawn_inputs
from .program import Program

KINDS = frozenset(
    f"row_wise.{name}.{key}"
    for name in ("HEADS", "OTHERS", "STEPS", "RESIZING", "WRITES", "MIXING", "ENDS", "WHOLE")
    for key in getattr(words, name)
)
"""Every part that such a program may have."""


@st.composite
def row_wise_programs(draw: Callable[..., Any], border: bool = False) -> Program:
    """Models with one head or two, whose logits go through operations on each row.

    With a ``border``, all after the first logits is outside of what is compiled.
    """
    inputs = draw(drawn_inputs())
    if inputs.transposed:
        inputs = replace(inputs, transposed=False)
    writer = _RowWiseWriter(draw, inputs, draw(st.sampled_from(BORDERS)) if border else None)
    writer.write()
    program = writer.program()
    return replace(program, compiles_rows=draw(st.integers(0, 3)) == 3)


class _RowWiseWriter(Writer):
    """Writes one program with chains from logits to numbers without a vocabulary."""

    _other = ""

    def _word(self, table: str) -> Any:
        names = [
            name
            for name in getattr(words, table)
            if self._inputs.dtype.itemsize > 2 or f"{table}.{name}" not in words.STEEP
        ]
        name = self._one(names)
        self.kinds.add(f"row_wise.{table}.{name}")
        return getattr(words, table)[name]

    def _model(self) -> None:
        logits = self._logits()
        losses = [self._chain(logits)]
        if self._chance(4):
            losses.append(self._chain(self._one([logits, *self._states])))
        if self._chance(6):
            losses.append(self._loss(logits))
        self._line("loss = " + " + 0.5 * ".join(losses))
        if self._is_odd(6):
            self._read_or_write()
        if self._chance(12):
            self._return_logits()
        if self._chance(12):
            self._return(self._assign("hidden * 2", "h"), differentiable=True)

    def _filled(self, text: str) -> str:
        sizes = {"B": "hidden.size(0)", "S": "hidden.size(1)", "V": self._inputs.vocab_size}
        return text.format(**sizes)

    def _logits(self) -> Logits:
        """``[B, S, V]`` or ``[N, V]``, with others of the same form."""
        inputs = self._inputs
        with self._region(10):
            name = self._assign(self._filled(self._word("HEADS")))
        with self._region(10):
            self._other = self._assign(self._filled(self._word("OTHERS")), "o")
        logits = Logits(name, "target", "row", (inputs.batch, inputs.length), inputs.vocab_size)
        return self._note(self._flatten(logits) if self._chance(3) else logits)

    def _flatten(self, logits: Logits) -> Logits:
        self._other = self._assign(f"{self._other}.flatten(0, -2)", "o")
        return super()._flatten(logits)

    def _step(self, logits: Logits) -> Logits:
        """Before a cross entropy beside. No step takes rows, as the others would keep theirs."""
        return replace(logits, x=self._assign(self._on_words("STEPS", logits)))

    def _on_words(self, table: str, logits: Logits) -> str:
        return self._formatted(self._word(table), logits)

    def _formatted(self, text: str, logits: Logits) -> str:
        n = logits.vocab
        z = self._other if n == self._inputs.vocab_size else f"{self._other}[..., :1]"
        return text.format(x=logits.x, z=z, n=n, c=f"({logits.y}.clamp(min=0) % {n})", r=logits.r)

    def _chain(self, logits: Logits) -> str:
        """The name of a loss."""
        other, known = self._other, self._states
        with self._region(10):
            for _ in range(self._one((1, 1, 2, 2, 3, 4))):
                logits = self._chained(logits)
            if self._chance(3):
                loss = self._assign(self._on_words("WHOLE", logits), "loss")
            else:
                tokens = self._assign(self._on_words("ENDS", logits), "t")
                loss = self._reduced(tokens, logits)
        self._other, self._states = other, known
        return loss

    def _picks(self, logits: Logits) -> list[tuple[str, str, Callable[..., tuple[int, ...]]]]:
        """Rows by their numbers."""
        numbers = self._assign("torch.tensor([1, 0, -1, 1])", "i")
        first = f"{{x}}[{numbers}]"
        found = [(first, first, lambda n, *others: (4, *others))]
        if len(logits.rows) == 2:
            second, both = f"{{x}}[:, {numbers}]", f"{{x}}[{numbers}, {numbers}.abs()]"
            found += [(second, second, lambda b, s: (b, 4)), (both, both, lambda b, s: (4,))]
        return found

    def _chained(self, logits: Logits) -> Logits:
        kind = self._draw(st.integers(0, 31))
        if kind == 31:
            return replace(logits, x=self._assign(self._on_words("MIXING", logits)))
        if kind >= 28 and logits.vocab > 8:
            text, words = self._word("RESIZING")
            changed = self._assign(self._formatted(text, logits))
            return replace(logits, x=changed, vocab=words(logits.vocab))
        if kind >= 25:
            if self._chance(2):
                logits = replace(logits, x=self._assign(f"{logits.x}.clone()"))
            self._line(self._on_words("WRITES", logits))
            return logits
        if kind >= 22 and (len(logits.rows) == 1 or logits.rows[1] > 2) and logits.rows[0] > 3:
            table = tables.FLAT_ROW_STEPS if len(logits.rows) == 1 else tables.ROW_STEPS
            steps = [*table.values(), *self._picks(logits)]
            text, rows_text, rows = self._one(steps)
            self._other = self._assign(text.format(x=self._other), "o")
            return self._on_rows(logits, text, rows_text, rows)
        if kind >= 21 and len(logits.rows) == 2:
            return self._flatten(logits)
        return replace(logits, x=self._assign(self._on_words("STEPS", logits)))
