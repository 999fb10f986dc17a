"""The hypothesis strategy that writes programs."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import torch

from . import tables
from .border import places, with_border
from .program import ARGUMENTS, Inputs, Program

KINDS = frozenset(
    f"{name}.{key}"
    for name, table in vars(tables).items()
    if name.isupper() and isinstance(table, dict)
    for key in table
)
"""Every part that a program may have."""

_GRADIENTS = (
    ("hidden", "weight", "bias"),
    ("hidden", "weight"),
    ("hidden",),
    ("weight",),
    ("weight", "bias", "row"),
    ("hidden", "weight", "bias", "scale", "row"),
    ("hidden", "scale"),
    (),
)
BORDERS = ("eager", "eager", "eager", "eager_no_grad", "compiled", "compiled")
_DTYPES = (torch.float32, torch.float64, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def programs(draw: Callable[..., Any], border: bool = False) -> Program:
    """Models around the pattern: some that the pass understands, most a little off it.

    With a ``border``, a part from some line after the first logits on is outside of what is
    compiled, and goes on with them: more losses, measures, a backward in between.
    """
    writer = Writer(draw, draw(drawn_inputs()), draw(st.sampled_from(BORDERS)) if border else None)
    writer.write()
    return writer.program()


@st.composite
def drawn_inputs(draw: Callable[..., Any]) -> Inputs:
    # Sizes that are equal are easily mistaken for each other.
    batch, length = draw(st.sampled_from(((3, 5), (2, 7), (1, 6), (4, 4), (5, 3), (13, 3))))
    return Inputs(
        batch=batch,
        length=length,
        hidden_size=draw(st.sampled_from((8, 4, 13, 5))),
        vocab_size=draw(st.sampled_from((19, 16, 13, 40))),
        dtype=draw(st.sampled_from(_DTYPES)),
        requires_grad=draw(st.sampled_from(_GRADIENTS)),
        transposed=draw(st.integers(0, 3)) == 3,
        ignored=draw(st.sampled_from((None, -100, -100, 0, 3, -1))),
        seed=draw(st.integers(0, 99)),
    )


def _larger(inputs: Inputs) -> Inputs:
    return replace(
        inputs, batch=inputs.batch + 2, length=inputs.length + 3, seed=inputs.seed + 1000
    )


@dataclass(frozen=True)
class Logits:
    """Logits at some point of the program, and what belongs to their rows: names or expressions."""

    x: str
    y: str
    r: str
    rows: tuple[int, ...]
    vocab: int
    is_second: bool = False
    """Whether the vocabulary is not the last dimension, but the second of three."""

    @property
    def vocab_dim(self) -> int:
        return 1 if self.is_second else -1


class Writer:
    """Writes one program, statement by statement."""

    def __init__(self, draw: Callable[..., Any], inputs: Inputs, outside: str | None = None):
        self._draw = draw
        self._inputs = inputs
        self._outside = outside
        self._names = 0
        self._indent = 1
        self._checkpoints = 0
        self._has_written = False
        """Whether logits were written to in place."""
        self._states: list[Logits] = []
        self._returned: list[str] = []
        self._odd = self._one((0, 0, 1, 2, 3, 5, 7))
        """How many more parts it may have that are off the plainest pattern."""
        self._leaves = set(inputs.requires_grad)
        self.kinds: set[str] = set()
        self.gradient_of = [0]
        self.lines = [f"def program({', '.join(ARGUMENTS)}, head):"]

    # Choices.

    def _one(self, options: Sequence[Any]) -> Any:
        return self._draw(st.sampled_from(options))

    def _chance(self, one_in: int) -> bool:
        return self._draw(st.integers(0, one_in - 1)) == one_in - 1

    def _is_odd(self, one_in: int = 2) -> bool:
        """Whether to use up some of the oddness here."""
        if self._odd and self._chance(one_in):
            self._odd -= 1
            return True
        return False

    def _pick(self, *names: str, among: Sequence[str] | None = None) -> tuple[str, Any]:
        """One entry of the tables of these names: key and value."""
        options = [(name, key) for name in names for key in getattr(tables, name)]
        name, key = self._one([o for o in options if among is None or o[1] in among])
        self.kinds.add(f"{name}.{key}")
        return key, getattr(tables, name)[key]

    # Statements.

    def _line(self, text: str) -> None:
        self.lines.append(textwrap.indent(text, "    " * self._indent))

    def _assign(self, text: str, prefix: str = "z") -> str:
        self._names += 1
        name = f"{prefix}{self._names}"
        self._line(f"{name} = {text}")
        return name

    def _fill(self, text: str, logits: Logits | None = None, **more: Any) -> str:
        fields: dict[str, Any] = {"ignored": self._ignored, "V": self._inputs.vocab_size}
        if logits is not None:
            fields |= {"x": logits.x, "y": logits.y, "r": logits.r, "V": logits.vocab}
            fields["v"] = logits.vocab_dim
        return text.format(**{**fields, **more})

    @property
    def _ignored(self) -> int:
        return -100 if self._inputs.ignored is None else self._inputs.ignored

    @contextmanager
    def _region(self, one_in: int) -> Iterator[None]:
        """Perhaps autocast, no_grad or the like around what is written inside."""
        inside = self._chance(one_in)
        if inside:
            self._line(self._pick("REGIONS")[1])
            self._indent += 1
        yield
        self._indent -= inside

    # The parts of a program.

    def write(self) -> None:
        """All of it."""
        self._prepare()
        if self._chance(10):
            with self._checkpoint("model") as names:
                self._model()
                names.append("loss")
        else:
            with self._region(6):
                self._model()
        while self._is_odd(4):
            self._write_elsewhere()
        if self._chance(4):
            for _ in range(self._one((1, 1, 2, 3))):
                self._line(self._pick("FACTORS")[1])
        if self._outside is not None:
            self._go_on()
        names = ["loss", *self._returned]
        if self._chance(4):
            self._line("return {" + ", ".join(f"{name!r}: {name}" for name in names) + "}")
        else:
            self._line("return " + ", ".join(names))

    def program(self) -> Program:
        """What is written, as it is to be run."""
        draw, inputs, lines = self._draw, self._inputs, self.lines
        if self._outside is not None and (among := places(lines)):
            place = among[0] if draw(st.booleans()) else draw(st.sampled_from(among))
            lines = with_border(lines, place, self._outside)
        return Program(
            source="\n".join(lines) + "\n",
            inputs=inputs,
            more_inputs=_larger(inputs) if draw(st.integers(0, 7)) == 7 else None,
            gradient_of=tuple(self.gradient_of),
            reads_first=draw(st.booleans()),
            returned_logits=draw(st.sampled_from(("lazy", "lazy", "detach", "keep"))),
            batch_chunk_size=draw(st.sampled_from((None, 1, 3, 4, 7))),
            captures_unknown_numbers=draw(st.booleans()),
            kinds=frozenset(self.kinds),
        )

    def _go_on(self) -> None:
        """What callers do with what a model has returned."""
        states = list(self._states)
        for _ in range(self._one((0, 1, 1, 2)) if states else 0):
            match self._one(("loss", "loss", "measure", "read", "backward")):
                case "loss":
                    self._return(self._loss(self._between(self._one(states))), differentiable=True)
                case "measure":
                    self._measure(self._one(states))
                case "read":
                    self._read(self._one(states))
                case "backward" if self._outside == "eager":
                    self._line("if loss.requires_grad:")
                    self._line("    loss.sum().backward(retain_graph=True)")

    @contextmanager
    def _checkpoint(self, kind: str, *read: str) -> Iterator[list[str]]:
        """A checkpointed region around what is written inside.

        Inside only the names ``read`` and the arguments may be written to. What it yields is to be
        filled with the names that are needed outside; the other names are not known there.
        """
        self.kinds.add(f"checkpoint_{kind}")
        self._names += 1
        region, known, returned = f"region{self._names}", self._states, len(self._returned)
        arguments = list(dict.fromkeys([*ARGUMENTS, *read]))
        self._states = [state for state in known if {state.x, state.y, state.r} <= {*arguments}]
        names: list[str] = []
        self._line(f"def {region}({', '.join(arguments)}):")
        self._indent += 1
        self._checkpoints += 1
        if kind != "loss" and self._chance(2):
            self._line("hidden = torch.tanh(hidden)")
        yield names
        if self._chance(4):
            self._return(self._assign("hidden * 2", "h"), differentiable=True)
        names = list(dict.fromkeys([*names, *self._returned[returned:]]))
        self._line(f"return {', '.join(names)}")
        self._indent -= 1
        self._checkpoints -= 1
        called = ", ".join([region, *arguments])
        self._line(f"{', '.join(names)} = checkpoint({called}, use_reentrant=False)")
        self._states = known

    def _prepare(self) -> None:
        for _ in range(self._one((0, 0, 1, 2))):
            names = ["PREPARATIONS"] if self._inputs.transposed else ["PREPARATIONS", "TIED"]
            key, text = self._pick(*names)
            self._line(self._fill(text))
            if key != "weight_written" and key != "bias_written":
                self._leaves -= {text.split(" ", 1)[0]}
            if key == "views_of_inputs":
                self._leaves -= {"weight"}

    def _model(self) -> None:
        """Heads, losses, and what else is to be returned."""
        losses = [
            self._heads_of_pieces()
            if self._is_odd(8)
            else self._loss(self._between(self._checkpointed_head()))
        ]
        if self._chance(5):
            if not self._states or self._chance(2):
                logits = self._head("(hidden * 0.5)")
            else:
                logits = self._one([s for s in self._states if self._has_layout_for_loss(s)])
            losses.append(self._loss(self._between(logits)))
        self._line("loss = " + " + 0.5 * ".join(losses))
        while self._is_odd(4):
            self._read_or_write()
        if self._states and self._chance(3):
            self._return_logits()
        if self._chance(12):
            self._return(self._assign("hidden * 2", "h"), differentiable=True)

    def _checkpointed_head(self) -> Logits:
        if not self._chance(12):
            return self._head()
        with self._checkpoint("head") as names:
            logits = self._head()
            if self._chance(2):
                logits = self._between(logits)
            names += [name for name in (logits.x, logits.y, logits.r) if name not in ARGUMENTS]
        return self._note(logits)

    def _head(self, hidden: str = "hidden") -> Logits:
        with self._region(10):
            return self._head_itself(hidden)

    def _head_itself(self, hidden: str) -> Logits:
        inputs = self._inputs
        odd = "ODD_" if self._is_odd(5) else ""
        shape = self._one(("HEADS", "HEADS", "HEADS_OF_FLAT_ROWS", "HEADS_VOCABULARY_SECOND"))
        among = None
        if shape == "HEADS" and inputs.transposed:
            among = [key for key in getattr(tables, odd + shape) if key != "module"]
        _, text = self._pick(odd + shape, among=among)
        logits = Logits(
            x=self._assign(self._fill(text, h=hidden, **self._weights())),
            y="target",
            r="row",
            rows=(inputs.batch, inputs.length),
            vocab=inputs.vocab_size,
            is_second="SECOND" in shape,
        )
        if "FLAT" in shape:
            logits = replace(
                logits,
                y=self._assign("target.reshape(-1)", "y"),
                r=self._assign("row.reshape(-1)", "r"),
                rows=(inputs.batch * inputs.length,),
            )
        return self._note(logits)

    def _weights(self) -> dict[str, str]:
        """The weight ``[V, H]``, as ``[H, V]``, and the bias."""
        if self._inputs.transposed:
            return {"w": "weight.t()", "wt": "weight", "b": "bias"}
        transposed = self._pick("TRANSPOSED")[1].format(w="weight")
        return {"w": "weight", "wt": transposed, "b": "bias"}

    def _note(self, logits: Logits) -> Logits:
        self._states.append(logits)
        return logits

    # Between head and loss.

    def _between(self, logits: Logits) -> Logits:
        for _ in range(self._one((0, 1, 2, 3))):
            logits = self._note(self._step(logits))
        return logits

    def _step(self, logits: Logits) -> Logits:
        if self._is_odd(4):
            self._read_or_write()
        if self._is_odd(4):
            return self._write_to_logits(logits)
        if self._is_odd(2):
            return self._odd_value(logits)
        if self._chance(2):
            return replace(logits, x=self._cast(logits))
        return self._row_step(logits)

    def _cast(self, logits: Logits) -> str:
        options = [key for key in tables.CASTS if key != "detach" or self._chance(4)]
        # Then the last dimension is not the vocabulary.
        options = [o for o in options if o != "whole_vocabulary" or not logits.is_second]
        return self._assign(self._fill(self._pick("CASTS", among=options)[1], logits))

    def _odd_value(self, logits: Logits) -> Logits:
        by_word = () if logits.is_second else ("ODD_VALUES_BY_WORD",)
        key, text = self._pick("ODD_VALUES", *by_word)
        changed = replace(logits, x=self._assign(self._fill(text, logits)))
        if key in tables.SHORTENING:
            changed = replace(changed, vocab=logits.vocab - 3)
            changed = self._without_last_words(changed, logits.vocab)
        elif key.startswith("masked_") and self._chance(2):
            changed = self._without_last_words(changed, logits.vocab)
        return changed

    def _without_last_words(self, logits: Logits, vocab: int) -> Logits:
        return replace(logits, y=self._assign(f"{logits.y}.clamp(max={vocab - 4})", "y"))

    def _row_step(self, logits: Logits) -> Logits:
        if logits.is_second:
            return replace(logits, x=self._assign(f"{logits.x}.permute(0, 2, 1)"), is_second=False)
        if len(logits.rows) == 1:
            if logits.rows[0] < 4:
                return logits
            if self._is_odd(8):
                return self._some_rows(logits)
            return self._on_rows(logits, *self._pick("FLAT_ROW_STEPS")[1])
        if min(logits.rows) < 1 or logits.rows[1] < 3 or self._chance(4):
            return self._flatten(logits)
        if self._is_odd(8):
            return self._some_rows(logits)
        names = ["ODD_ROW_STEPS"] if self._is_odd(4) else ["ROW_STEPS"]
        return self._on_rows(logits, *self._pick(*names)[1])

    def _some_rows(self, logits: Logits) -> Logits:
        """As many as a mask has."""
        self.kinds.add("masked_rows")
        mask = self._one((f"{logits.y} != {self._ignored}", f"{logits.r} > 0.5"))
        text = "{x}[" + self._assign(mask, "m") + "]"
        return self._on_rows(logits, text, text, lambda *_: (3,))

    def _on_rows(
        self, logits: Logits, text: str, rows_text: str, rows: Callable[..., tuple[int, ...]]
    ) -> Logits:
        return replace(
            logits,
            x=self._assign(text.format(x=logits.x)),
            y=self._assign(rows_text.format(x=logits.y), "y"),
            r=self._assign(rows_text.format(x=logits.r), "r"),
            rows=rows(*logits.rows),
        )

    def _flatten(self, logits: Logits) -> Logits:
        _, text = self._pick("FLATTENINGS")
        rows = 1
        for size in logits.rows:
            rows *= size
        return replace(
            logits,
            x=self._assign(self._fill(text, logits)),
            y=self._assign(f"{logits.y}.reshape(-1)", "y"),
            r=self._assign(f"{logits.r}.reshape(-1)", "r"),
            rows=(rows,),
        )

    # What reads or writes beside.

    def _read_or_write(self) -> None:
        if self._chance(2):
            self._write_elsewhere()
        elif not self._states:
            return
        elif self._chance(2):
            self._write_to_logits(self._one(self._states))
        elif self._chance(2):
            self._measure(self._one(self._states))
        else:
            self._read(self._one(self._states))

    def _measure(self, logits: Logits) -> None:
        """What a training step logs of the logits, without a gradient, mostly."""
        text = self._pick("MEASURES")[1]
        how = self._one(("no_grad", "no_grad", "detach", "plain"))
        if how == "detach":
            logits = replace(logits, x=f"{logits.x}.detach()")
        if how == "no_grad":
            self._line("with torch.no_grad():")
            self._indent += 1
        value = self._assign(self._fill(text, logits), "a")
        self._indent -= how == "no_grad"
        self._return(value, differentiable=True)

    def _write_to_logits(self, logits: Logits) -> Logits:
        names = ["LOGITS_WRITES"] + ["LOGITS_WRITES_BY_WORD"] * (not logits.is_second)
        key, text = self._pick(*names)
        written = logits
        if self._chance(4):
            _, name = self._pick("WRITTEN_NAMES")
            written = replace(logits, x=self._assign(self._fill(name, logits)))
        with self._region(8):
            self._line(self._fill(text, written))
        self._has_written = True
        if key in tables.LOGITS_WRITES_BY_WORD and self._chance(2):
            return self._without_last_words(logits, logits.vocab)
        return logits

    def _write_elsewhere(self) -> None:
        names = ["OTHER_WRITES", "TARGET_WRITES"]
        # Others autograd refuses in the backward, mostly.
        allowed = []
        if "weight" not in self._inputs.requires_grad or self._chance(8):
            allowed.append("HIDDEN_WRITES")
        if "hidden" not in self._inputs.requires_grad or self._chance(8):
            allowed.append("WEIGHT_WRITES")
        if allowed and not self._chance(3):
            names = allowed
        logits = self._one(self._states) if self._states else None
        among = None
        if logits is None:
            among = [k for n in names for k, t in getattr(tables, n).items() if "{y}" not in t]
        key, text = self._pick(*names, among=among)
        text = self._fill(text, logits)
        if key.split("_")[0] in self._leaves:
            text = "with torch.no_grad():\n" + textwrap.indent(text, "    ")
        self._line(text)

    def _read(self, logits: Logits) -> None:
        # There hooks crash torch 2.13, with the pass and without.
        crashes = self._checkpoints or self._outside in ("compiled", "eager_no_grad")
        if self._chance(10) and not crashes and not self._has_written:
            self.kinds.add("hook")
            self._line(
                f"if {logits.x}.requires_grad:\n"
                f"    {logits.x}.register_hook(lambda gradient: gradient * 0.5)"
            )
            return
        names = ["READERS"] + ["READERS_BY_WORD"] * (not logits.is_second)
        with self._region(3):
            value = self._assign(self._fill(self._pick(*names)[1], logits), "a")
        self._return(value, differentiable=True)

    def _return(self, name: str, differentiable: bool) -> None:
        self._returned.append(name)
        if differentiable:
            self.gradient_of.append(len(self._returned))

    def _return_logits(self) -> None:
        for _ in range(self._one((1, 1, 2))):
            logits = self._one(self._states)
            among = ["logits"] if self._chance(2) else None
            _, text = self._pick("RETURNED_LOGITS", among=among)
            if len(logits.rows) == 1 and "-1:" in text:
                text = "{x}"
            self._return(self._assign(self._fill(text, logits), "out"), differentiable=False)

    # Losses.

    def _has_layout_for_loss(self, logits: Logits) -> bool:
        return logits.is_second or bool(logits.rows)

    def _loss(self, logits: Logits) -> str:
        if self._is_odd(4):
            self._read_or_write()
        if self._is_odd(6):
            _, text = self._pick("LABELS")
            logits = self._note(replace(logits, y=self._assign(self._fill(text, logits), "y")))
        if not self._chance(12):
            return self._loss_and_more(logits)
        with self._checkpoint("loss", logits.x, logits.y, logits.r) as names:
            names.append(self._loss_and_more(logits))
        return names[0]

    def _loss_and_more(self, logits: Logits) -> str:
        terms = []
        if self._chance(6):
            self._measure(logits)
        if self._is_odd(4):
            terms.append(self._loss_beside(logits))
        terms.append(self._loss_itself(logits))
        if self._is_odd(4):
            terms.append(self._loss_beside(logits))
        if self._chance(6):
            self._measure(self._one(self._states) if self._states else logits)
        return terms[0] if len(terms) == 1 else self._assign(" + ".join(terms), "loss")

    def _loss_beside(self, logits: Logits) -> str:
        return self._assign(self._fill(self._pick("LOSSES_BESIDE")[1], logits), "l")

    def _loss_itself(self, logits: Logits) -> str:
        with self._region(8):
            if self._is_odd(2):
                if logits.is_second:
                    logits = self._row_step(logits)
                if self._chance(3):
                    return self._loop(logits)
                return self._reduced(self._tokens(logits), logits)
            return self._cross_entropy(self._with_classes_second(logits))

    def _with_classes_second(self, logits: Logits) -> Logits:
        if logits.is_second or len(logits.rows) == 1:
            return logits
        if len(logits.rows) == 2 and self._chance(4):
            _, text = self._pick("TO_SECOND")
            logits = replace(logits, x=self._assign(text.format(x=logits.x)), is_second=True)
        else:
            logits = self._flatten(logits)
        return self._note(logits)

    def _cross_entropy(self, logits: Logits) -> str:
        names = ["CROSS_ENTROPIES", "NLL_LOSSES"] if self._chance(2) else ["CROSS_ENTROPIES"]
        key, text = self._pick(*names)
        if key == "cross_entropy" and not logits.is_second and self._is_odd(12):
            self.kinds.add("soft_targets")
            soft = f"F.one_hot({logits.y}.clamp(min=0), {logits.vocab}).to({logits.x}.dtype)"
            return self._assign(f"F.cross_entropy({logits.x}, {soft})", "loss")
        reduction = self._one(("mean", "mean", "sum", "none"))
        options = {} if reduction == "mean" and self._chance(2) else {"reduction": reduction}
        if self._inputs.ignored not in (None, -100) and not self._chance(12):
            options["ignore_index"] = self._ignored
        if self._chance(5):
            options["weight"] = f"torch.linspace(0.5, 2.0, {logits.vocab}, dtype={logits.x}.dtype)"
        if self._chance(5) and not key.startswith("nll"):
            options["label_smoothing"] = self._one((0.1, 0.5, 1.0, "number * 0.5"))
        self.kinds.update(f"option {name}" for name in options)
        words = ", ".join(
            f"{name}={value!r}" if name == "reduction" else f"{name}={value}"
            for name, value in options.items()
        )
        loss = self._assign(
            self._fill(
                text,
                logits,
                options=f", {words}" if words else "",
                only_options=words,
                dim=self._one((1, -1)) if not logits.is_second else 1,
            ),
            "loss",
        )
        return self._reduced(loss, logits) if reduction == "none" else loss

    def _tokens(self, logits: Logits) -> str:
        """Per-token losses, without a loss function."""
        names = ["TOKEN_LOG_PROBABILITIES"]
        if len(logits.rows) == 1:
            names.append("FLAT_TOKEN_LOG_PROBABILITIES")
        classes = self._one(
            (f"{logits.y}.clamp(min=0)", f"torch.where({logits.y} < 0, 0, {logits.y})")
        )
        among = None
        if len(logits.rows) == 1:
            among = [k for name in names for k in getattr(tables, name) if k != "by_sequence"]
        _, text = self._pick(*names, among=among)
        return self._assign(
            "-(" + self._fill(text, logits, c=self._assign(classes, "c")) + ")", "t"
        )

    def _reduced(self, tokens: str, logits: Logits) -> str:
        if self._is_odd(4):
            self._read_or_write()
        if self._chance(3):
            tokens = self._assign(self._fill(self._pick("TOKEN_STEPS")[1], logits, t=tokens), "t")
        if self._chance(6):
            self._measure_tokens(tokens, logits)
        if self._is_odd(3):
            self._line(self._fill(self._pick("TOKEN_WRITES")[1], logits, t=tokens))
        _, text = self._pick("REDUCTIONS", among=self._reductions())
        if self._chance(6):
            self._return(tokens, differentiable=True)
        loss = self._assign(self._fill(text, logits, t=tokens), "loss")
        if self._chance(8):
            self._measure_tokens(tokens, logits)
        return loss

    def _measure_tokens(self, tokens: str, logits: Logits) -> None:
        text = self._fill(self._pick("TOKEN_MEASURES")[1], logits, t=tokens)
        self._line("with torch.no_grad():")
        self._indent += 1
        value = self._assign(text, "a")
        self._indent -= 1
        self._return(value, differentiable=True)

    def _reductions(self) -> list[str]:
        # A graph break: once is enough.
        return [
            key for key in tables.REDUCTIONS if not key.startswith("selected") or self._chance(3)
        ]

    def _loop(self, logits: Logits) -> str:
        if len(logits.rows) == 2 and self._chance(2):
            _, pairs = self._pick("UNBINDING")
        else:
            if len(logits.rows) == 2:
                logits = self._note(self._flatten(logits))
            _, pairs = self._pick("LOOPS")
        _, piece = self._pick("PIECES", among=None if self._chance(2) else ["as_is"])
        return self._sum_of_pieces(self._fill(pairs, logits), piece, logits.y)

    def _heads_of_pieces(self) -> str:
        """One weight, by a node of its own for each piece."""
        pairs = self._pick("HEAD_LOOPS")[1].format(h="hidden", y="target")
        piece = self._fill(self._pick("HEAD_PIECES")[1], **self._weights())
        return self._sum_of_pieces(pairs, f"{piece}.flatten(0, 1)", "target", "labels.flatten()")

    def _sum_of_pieces(self, pairs: str, piece: str, y: str, labels: str = "labels") -> str:
        ignored = self._inputs.ignored
        ignoring = "" if ignored in (None, -100) else f", ignore_index={ignored}"
        self._names += 1
        total = f"loss{self._names}"
        self._line(f"{total} = 0.0")
        self._line(f"for part, labels in {pairs}:")
        if labels != "labels":
            self._line(f"    labels = {labels}")
        _, call = self._pick("PIECE_LOSSES", among=None if self._chance(2) else ["sum"])
        self._line(f"    {total} = {total} + {call.format(p=f'({piece})', ignoring=ignoring)}")
        return self._assign(f"{total} / {y}.numel()", "loss")
