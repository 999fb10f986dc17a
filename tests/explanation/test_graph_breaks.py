"""``lmhead_pass.explain`` on heads and losses that are kept apart: its advice, and that it helps.

Every piece of advice is followed to the letter: settings and assignments are run as it says them.
The rows of docs/graph-breaks.md are these. Where logits are returned to be computed later, as they
are unless a test says otherwise, most breaks do no harm: ``test_harmless``.
"""

import logging
import re
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lmhead_pass

from ..backend import rewrite
from ..forms import V, flat

PAGE = (Path(__file__).parents[2] / "docs" / "graph-breaks.md").read_text()
log = logging.getLogger("tests.graph_breaks")


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, 16)
        self.head = nn.Linear(16, V)

    def logits(self, tokens):
        return self.head(self.embedding(tokens))


class Between(Parts):
    """Something is done between head and loss."""

    def __init__(self, action):
        super().__init__()
        self.action = action

    def forward(self, tokens):
        logits = self.logits(tokens)
        factor = self.action(tokens)
        return flat(logits, tokens) * factor


@torch._dynamo.disable
def kept_from_compiling(tokens):
    return 2


def warn(tokens):
    warnings.warn("a warning", stacklevel=2)
    return 2


def log_message(tokens):
    log.error("a message")
    return 2


def print_something(tokens):
    print("something")
    return 2


def branch(tokens):
    return 1 if (tokens > 2).any() else 2


def skipped(tokens):
    time.sleep(0)
    return 2


def own_break(tokens):
    torch._dynamo.graph_break()
    return 2


SETTINGS = {
    "warning": (warn, "a warning, which Dynamo does not trace"),
    "log message": (log_message, "a log message, which Dynamo does not trace"),
    "print": (print_something, "Dynamo does not trace print"),
    "item": (lambda tokens: tokens.max().item(), "a number is taken out of a tensor"),
    "tolist": (lambda tokens: tokens.max().tolist(), "a number is taken out of a tensor"),
    "float": (lambda tokens: float(tokens.max()), "a number is taken out of a tensor"),
    "nonzero": (
        lambda tokens: tokens.nonzero().sum(),
        "the shape of a result depends on the values of a tensor",
    ),
    "mask": (
        lambda tokens: tokens[tokens > 2].sum(),
        "the shape of a result depends on the values of a tensor",
    ),
}
CHANGES = {
    "branch": (branch, "the branch depends on the values of a tensor"),
    "disabled": (kept_from_compiling, "this call is kept from being compiled"),
    "skipped": (skipped, "Dynamo does not trace this call"),
    "own break": (own_break, "Dynamo's own hint: Remove the `torch._dynamo.graph_break()` call."),
}


@pytest.fixture(autouse=True)
def _logits_are_detached(request):
    if "harmless" in request.node.name:
        yield
        return
    with lmhead_pass.config.patch(returned_logits="detach"):
        yield


@pytest.fixture
def tokens():
    return torch.randint(1, V, (3, 7))


def codes(advice):
    """The statements in backticks that a sentence tells to run."""
    return [code for code in re.findall(r"`([^`]+)`", advice) if re.match(r"[\w.]+ = ", code)]


def following(advice):
    """The setting that a sentence tells to make, for a ``with`` statement."""
    statement = next(code for code in codes(advice) if code.startswith("torch._dynamo.config."))
    name, value = statement.removeprefix("torch._dynamo.config.").split(" = ")
    return torch._dynamo.config.patch(**{name: eval(value)})


def assignment(advice):
    """The assignment to an attribute of the model that a sentence tells to make."""
    return next(code for code in codes(advice) if code.startswith("model."))


def only_advice(fn, *args, **kwargs):
    explanation = lmhead_pass.explain(fn, *args, **kwargs)
    assert not explanation.rewritten
    assert len(explanation.advice) == 1, explanation.advice
    torch._dynamo.reset()
    return explanation.advice[0]


def check_rewritten(fn, *args, **kwargs):
    explanation = lmhead_pass.explain(fn, *args, **kwargs)
    assert len(explanation.rewritten) == 1, str(explanation)
    assert not explanation.refused
    assert not explanation.advice


@pytest.mark.filterwarnings("ignore:a warning")
@pytest.mark.parametrize("kind", SETTINGS)
def test_settings(kind, tokens):
    action, says = SETTINGS[kind]
    model = Between(action)
    advice = only_advice(model, tokens)
    assert "test_graph_breaks.py:" in advice
    assert says in advice
    assert says in PAGE
    with following(advice):
        check_rewritten(model, tokens)


@pytest.mark.filterwarnings("ignore:a warning")
@pytest.mark.parametrize("kind", SETTINGS | CHANGES)
def test_harmless(kind, tokens):
    """Logits go across the break unread, and the loss behind it is fused."""
    model = Between((SETTINGS | CHANGES)[kind][0])
    explanation = lmhead_pass.explain(model, tokens)
    (sentence,) = explanation.rewritten
    assert "of logits that are deferred" in sentence and "forms.py:" in sentence
    assert len(explanation.deferred) == 1 and explanation.graph_breaks
    assert not explanation.refused + explanation.advice
    torch._dynamo.reset()
    torch.testing.assert_close(rewrite(model)(tokens), model(tokens))
    assert counters["lmhead_pass"] == {"deferred": 1, "rewritten": 1}


@pytest.mark.parametrize("kind", CHANGES)
def test_changes(kind, tokens):
    """The break goes when what makes it is moved behind the loss, or before the head."""
    action, says = CHANGES[kind]
    advice = only_advice(Between(action), tokens)
    assert says in advice
    assert says in PAGE

    class Behind(Between):
        def forward(self, tokens):
            loss = flat(self.logits(tokens), tokens)
            return loss * self.action(tokens)

    class Before(Between):
        def forward(self, tokens):
            factor = self.action(tokens)
            return flat(self.logits(tokens), tokens) * factor

    check_rewritten(Behind(action), tokens)
    check_rewritten(Before(action), tokens)


def test_a_branch_made_branchless(tokens):
    """As the advice has it: torch.where."""
    check_rewritten(Between(lambda tokens: torch.where((tokens > 2).any(), 1, 2)), tokens)


def test_counted_by_the_compiled_model(tokens):
    model = Between(lambda tokens: tokens.max().item())
    with following(only_advice(model, tokens)):
        torch.compile(model)(tokens)
    assert counters["lmhead_pass"] == {"rewritten": 1}


class Masked(Parts):
    def forward(self, tokens):
        chosen = tokens > 2
        return flat(self.head(self.embedding(tokens)[chosen]), tokens[chosen])


class MaskedLogits(Parts):
    def forward(self, tokens):
        chosen = tokens > 2
        return flat(self.logits(tokens)[chosen], tokens[chosen])


@pytest.mark.parametrize("cls", [Masked, MaskedLogits])
def test_masked_rows_come_into_one_graph(cls, tokens):
    model = cls()
    with following(only_advice(model, tokens)):
        explanation = lmhead_pass.explain(model, tokens)
    assert explanation.graphs == 1
    assert explanation.advice == explanation.graph_breaks == []


@pytest.mark.parametrize("cls", [Masked, MaskedLogits])
def test_masked_rows_are_rewritten(cls, tokens):
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check_rewritten(cls(), tokens)


def test_the_cause_behind_step_unsupported(tokens):
    """A property that logs, as Hugging Face's loss_function does; there a setting is known too."""

    class Logging(Parts):
        loss_type = None

        @property
        def loss_function(self):
            if self.loss_type is None:
                log.warning("`loss_type=None` was set, but it is unrecognized.")
            return flat

        def forward(self, tokens):
            logits = self.logits(tokens)
            return self.loss_function(logits, tokens)

    model = Logging()
    assert "logging.Logger" in lmhead_pass.explain(model, tokens).graph_breaks[0]
    advice = only_advice(model, tokens)
    assert "the model has no loss_type" in advice
    assert "the model has no loss_type" in PAGE
    with following(advice):
        check_rewritten(model, tokens)
    exec(assignment(advice), {"model": model})
    check_rewritten(model, tokens)


def test_a_break_in_the_body_is_harmless(tokens):
    class Printing(Parts):
        def forward(self, tokens):
            hidden = self.embedding(tokens)
            print("something")
            return flat(self.head(hidden), tokens)

    explanation = lmhead_pass.explain(Printing(), tokens)
    assert len(explanation.rewritten) == len(explanation.graph_breaks) == 1
    assert explanation.advice == []
    assert "fix:" not in str(explanation)


class PrintingBody(Parts):
    def forward(self, tokens):
        hidden = self.embedding(tokens)
        print("something")
        return self.head(hidden)


def test_a_break_in_the_body_of_a_model_whose_caller_takes_the_loss(tokens):
    """There Dynamo compiles the model apart from its caller."""
    model = PrintingBody()

    def step(tokens):
        return flat(model(tokens), tokens)

    advice = only_advice(step, tokens)
    assert "Dynamo does not trace print" in advice
    with following(advice):
        check_rewritten(step, tokens)


def test_several_breaks_but_not_those_elsewhere(tokens):
    class Several(Parts):
        def forward(self, tokens):
            hidden = self.embedding(tokens)
            torch._dynamo.graph_break()
            logits = self.head(hidden)
            print("something")
            number = tokens.max().item()
            loss = flat(logits, tokens)
            time.sleep(0)
            return loss * number

    model = Several()
    explanation = lmhead_pass.explain(model, tokens)
    assert len(explanation.graph_breaks) == 4
    with following(explanation.advice[0]), following(explanation.advice[1]):
        check_rewritten(model, tokens)


def test_a_break_in_a_loop(tokens):
    """Dynamo leaves such a function to Python, and no graph ends with the break."""

    class Loop(Parts):
        def forward(self, tokens, has_break=True):
            logits = self.logits(tokens)
            for number in range(2):
                if has_break:
                    torch._dynamo.graph_break()
                loss = flat(logits, tokens) * number
            return loss

    assert "Remove the `torch._dynamo.graph_break()` call" in only_advice(Loop(), tokens)
    explanation = lmhead_pass.explain(Loop(), tokens, has_break=False)
    assert explanation.advice == []
    assert len(explanation.rewritten + explanation.refused) > 0


def test_a_disabled_loss_is_harmless(tokens):
    class Disabled(Parts):
        loss = staticmethod(torch._dynamo.disable(flat))

        def forward(self, tokens):
            return self.loss(self.logits(tokens), tokens)

    class Enabled(Disabled):
        loss = staticmethod(flat)

    explanation = lmhead_pass.explain(Disabled(), tokens)
    assert explanation.deferred and not explanation.advice
    with lmhead_pass.config.patch(returned_logits="keep"):
        assert "Take `torch.compiler.disable` away" in only_advice(Disabled(), tokens)
    check_rewritten(Enabled(), tokens)


def test_a_disabled_head(tokens):
    class Disabled(Parts):
        def __init__(self):
            super().__init__()
            self.head = torch._dynamo.disable(self.head)

        def forward(self, tokens):
            hidden = self.embedding(tokens)
            torch._dynamo.graph_break()
            return flat(self.head(hidden * 2), tokens)

    model = Disabled()
    assert "Take `torch.compiler.disable` away" in only_advice(model, tokens)
    model.head = nn.Linear(16, V)
    check_rewritten(model, tokens)


def test_a_loss_in_another_spelling(tokens):
    """It does not look like a loss where its logits are an input."""

    class Gathering(Parts):
        def forward(self, tokens, has_break=True):
            logits = self.logits(tokens)
            if has_break:
                torch._dynamo.graph_break()
            return -logits.log_softmax(-1).gather(-1, tokens[..., None]).mean()

    assert "Remove the `torch._dynamo.graph_break()` call" in only_advice(Gathering(), tokens)
    check_rewritten(Gathering(), tokens, has_break=False)


class Plain(Parts):
    def forward(self, tokens):
        return self.logits(tokens)


def test_only_the_model_is_compiled(tokens):
    with lmhead_pass.config.patch(returned_logits="lazy"):
        explanation = lmhead_pass.explain(torch.compile(Plain()), tokens)
    (sentence,) = explanation.deferred
    assert "deferred: linear" in sentence and sentence in str(explanation)
    assert not explanation.advice
    assert "no loss over logits" not in str(explanation)


def test_only_a_model_that_keeps_its_logits_is_compiled(tokens):
    model = Plain()
    advice = only_advice(torch.compile(model), tokens)
    assert f"logits of {V} words are returned" in advice
    assert "are returned, and their loss taken outside of what is compiled" in PAGE
    assert "compile one function that computes head and loss" in advice
    assert "compile one function that computes head and loss" in PAGE

    def step(tokens):
        return flat(model(tokens), tokens)

    check_rewritten(torch.compile(step), tokens)
    torch.compile(step)(tokens)
    assert counters["lmhead_pass"] == {"rewritten": 1}


def test_only_the_loss_is_compiled(tokens):
    model, loss = Plain(), torch.compile(flat)
    advice = only_advice(loss, model(tokens), tokens)
    assert "the loss alone: compile one function that computes head and loss" in advice
    assert "the loss alone" in PAGE
    check_rewritten(lambda tokens: loss(model(tokens), tokens), tokens)


def test_small_results_are_no_logits(tokens):
    with lmhead_pass.config.patch(min_vocab_size=V + 1):
        assert lmhead_pass.explain(Plain(), tokens).advice == []
    assert lmhead_pass.explain(nn.Embedding(V, 4), tokens).advice == []


class HeadFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight = ctx.saved_tensors
        return gradient @ weight, torch.einsum("bsv,bsh->vh", gradient, hidden)


@torch.library.custom_op("lmhead_pass_tests::head", mutates_args=())
def head_op(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden @ weight.t()


@head_op.register_fake
def _(hidden, weight):
    return hidden @ weight.t()


@pytest.mark.parametrize(
    "head, name",
    [(HeadFunction.apply, "an autograd.Function"), (head_op, "the custom op ")],
)
def test_an_opaque_head(head, name, tokens):
    class Opaque(Parts):
        def forward(self, tokens, head):
            return flat(head(self.embedding(tokens), self.head.weight), tokens)

    advice = only_advice(Opaque(), tokens, head)
    assert name in advice
    assert "what it computes cannot be seen" in advice
    assert name in PAGE
    assert "what it computes cannot be seen" in PAGE
    check_rewritten(Opaque(), tokens, nn.functional.linear)


def test_an_opaque_loss(tokens):
    class LossFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            ctx.save_for_backward(logits)
            return logits.logsumexp(-1).mean()

        @staticmethod
        def backward(ctx, gradient):
            (logits,) = ctx.saved_tensors
            return gradient * logits.softmax(-1) / logits[..., 0].numel()

    class Opaque(Parts):
        def forward(self, tokens):
            return LossFunction.apply(self.logits(tokens))

    assert "an autograd.Function: what it computes cannot be seen" in only_advice(Opaque(), tokens)


class FusedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target):
        ctx.save_for_backward(hidden, weight, target)
        return flat(hidden @ weight.t(), target)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, _ = ctx.saved_tensors
        return gradient * hidden, gradient * weight, None


@torch.library.custom_op("lmhead_pass_tests::fused", mutates_args=())
def fused_op(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return flat(hidden @ weight.t(), target)


@fused_op.register_fake
def _(hidden, weight, target):
    return hidden.new_empty(())


@pytest.mark.parametrize(
    "loss, name",
    [(FusedFunction.apply, "an autograd.Function"), (fused_op, "the custom op ")],
)
def test_a_loss_that_a_library_has_fused(loss, name, tokens):
    class Fused(Parts):
        def forward(self, tokens):
            return loss(self.embedding(tokens), self.head.weight, tokens)

    explanation = lmhead_pass.explain(Fused(), tokens)
    (sentence,) = explanation.fused_elsewhere
    assert sentence.startswith("already fused: ") and name in sentence
    assert f"a weight of {V} words" in sentence
    assert sentence in str(explanation) and "no loss over logits" not in str(explanation)
    assert not explanation.advice
    with lmhead_pass.config.patch(min_vocab_size=V + 1):
        assert not lmhead_pass.explain(Fused(), tokens).fused_elsewhere


def test_opaque_calls_in_the_body_are_harmless(tokens):
    """A loss that is left alone for another reason."""

    class Body(Parts):
        def forward(self, tokens):
            hidden = head_op(self.embedding(tokens), self.embedding.weight[:16])
            wide = head_op(nn.functional.linear(hidden, self.head.weight), self.head.weight.t())
            logits = self.head(hidden + wide)
            return flat(logits, tokens) + logits.flip(1).std(-1).sum()

    explanation = lmhead_pass.explain(Body(), tokens)
    assert len(explanation.refused) == 1
    assert explanation.advice == []


def test_a_head_with_a_fully_shard_of_its_own(tokens):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class Model(Parts):
        def forward(self, tokens):
            return flat(self.head(self.embedding(tokens)), tokens)

    def sharded(*parts):
        model = Model()
        for part in (*(getattr(model, name) for name in parts), model):
            fully_shard(part, mesh=mesh)
        return model

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        advice = only_advice(sharded("embedding", "head"), tokens)
        says = "FSDP's hooks, which Dynamo does not trace"
        assert says in advice and says in PAGE
        assert "leave the head to the `fully_shard` of the whole model" in advice
        check_rewritten(sharded("embedding"), tokens)
    finally:
        dist.destroy_process_group()


class TestTransformers:
    """The models for which the advice was written."""

    @pytest.fixture(autouse=True)
    def _large_heads_only(self):
        pytest.importorskip("transformers")
        with lmhead_pass.config.patch(min_vocab_size=256):
            yield

    @staticmethod
    def build(class_name):
        from ..models.architectures import architectures
        from ..models.running import build

        return build(class_name, architectures()[class_name][1])

    @pytest.mark.parametrize(
        "class_name",
        [
            "GPT2LMHeadModel",
            "OpenAIGPTLMHeadModel",
            *(
                pytest.param(name, marks=pytest.mark.slow)
                for name in ("BertLMHeadModel", "BertGenerationDecoder", "CTRLLMHeadModel")
            ),
        ],
    )
    def test_no_loss_type(self, class_name):
        built = self.build(class_name)
        advice = only_advice(built.model, **built.inputs)
        assert "the model has no loss_type" in advice
        with following(advice):
            check_rewritten(built.model, **built.inputs)
        exec(assignment(advice), {"model": built.model})
        check_rewritten(built.model, **built.inputs)

    def test_a_deprecation_warning(self):
        built = self.build("EncoderDecoderModel")
        advice = only_advice(built.model, **built.inputs)
        assert "a warning, which Dynamo does not trace" in advice
        with following(advice):
            check_rewritten(built.model, **built.inputs)

    def test_a_branch_in_the_body(self):
        """Padding is looked for, and the branch is outside of what is compiled if it is given."""
        built = self.build("FSMTForConditionalGeneration")
        advice = only_advice(built.model, **built.inputs)
        assert "the branch depends on the values of a tensor" in advice
        shape = built.inputs["labels"].shape
        masks = {"decoder_attention_mask": torch.zeros(shape, dtype=torch.bool)}
        explanation = lmhead_pass.explain(built.model, **built.inputs, **masks)
        assert len(explanation.rewritten) == 1, str(explanation)
