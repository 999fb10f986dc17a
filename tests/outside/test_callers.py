"""Training steps as their authors write them: the model is compiled, the rest is plain Python."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from ..backend import rewrite
from ..returned.model import is_unread
from .test_losses import H, Model, V, batch


class Recorded:
    """A compiled model, and the logits that it has returned."""

    def __init__(self, model):
        self.model, self.compiled, self.logits = model, rewrite(model), []

    def __call__(self, x):
        self.logits.append(self.compiled(x))
        return self.logits[-1]


def train(model, function, step):
    """What three steps give, and the parameters afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        results.append(step(function, *batch((4, 7))))
        optimizer.step()
        optimizer.zero_grad()
    return [*results, *model.parameters()]


def in_pieces(model, x, y):
    """As litgpt: the loss of some tokens at a time."""
    rows, targets = model(x).reshape(-1, V), y.flatten().masked_fill(y.flatten() % 5 == 0, -100)
    pieces = zip(rows.split(8), targets.split(8), strict=True)
    losses = torch.cat([F.cross_entropy(*piece, reduction="none") for piece in pieces])
    loss = losses.sum() / (targets != -100).sum().clamp(min=1)
    loss.backward()
    return loss.detach()


def of_words(logits, y):
    return logits[:, :-1].log_softmax(-1).gather(-1, y[:, 1:, None]).squeeze(-1)


def of_words_by_sequence(logits, y):
    """As TRL: word and log-sum-exp, the second a sequence at a time."""
    logits = logits[:, :-1] / 0.9
    words = logits.gather(-1, y[:, 1:, None]).squeeze(-1)
    return words - torch.stack([sequence.logsumexp(-1) for sequence in logits])


@pytest.fixture
def reference():
    torch.manual_seed(7)
    return Model()


def preferences(of_words):
    """DPO: the first half of the sequences is preferred."""

    def step(model, x, y):
        per_sequence = of_words(model(x), y).sum(-1)
        with torch.no_grad():
            before = of_words(step.reference(x), y).sum(-1)
        preferred, other = (per_sequence - before).chunk(2)
        loss = -F.logsigmoid(0.1 * (preferred - other)).mean()
        loss.backward()
        return loss.detach()

    return step


def policy(of_words):
    """GRPO: a clipped ratio to log-probabilities of before, and a penalty."""

    def step(model, x, y):
        with torch.no_grad():
            before, other = of_words(model(x), y), of_words(step.reference(x), y)
        advantages = torch.linspace(-1, 1, len(x))[:, None]
        now = of_words(model(x), y)
        ratio = (now - before).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        penalty = (other - now).exp() - (other - now) - 1
        loss = -(gain - 0.04 * penalty).mean()
        loss.backward()
        return loss.detach()

    return step


STEPS = {
    "litgpt": lambda: in_pieces,
    **{
        f"{kind.__name__}, {how.__name__}": lambda kind=kind, how=how: kind(how)
        for kind in (preferences, policy)
        for how in (of_words, of_words_by_sequence)
    },
}


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_a_step_is_as_without_the_pass_and_reads_no_logits(make, reference):
    model, step = Model(), make()
    again, other = copy.deepcopy(model), copy.deepcopy(reference)
    step.reference = reference
    expected = train(model, model, step)
    ours, step.reference = Recorded(again), Recorded(other)
    results = train(again, ours, step)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)
    logits = ours.logits + step.reference.logits
    assert len(logits) in (3, 6, 9) and all(map(is_unread, logits))
    assert not counters["lmhead_pass"]["refused"]


class Module:
    """Shaped like a LightningModule: hooks around an optimizer's step that is not in sight."""

    def __init__(self, model, function):
        self.function, self.accuracies = function, []
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def training_step(self, x, y):
        logits = self.function(x)
        loss = F.cross_entropy(logits.transpose(1, 2), y)
        return {"loss": loss, "logits": logits}

    def on_train_batch_end(self, outputs, x, y):
        logits = outputs["logits"]
        self.accuracies.append((logits.argmax(-1) == y).float().mean())
        self.accuracies.append(F.cross_entropy(logits.detach().flatten(0, 1), y.flatten()).exp())

    def fit(self):
        for seed in range(3):
            torch.manual_seed(seed)
            x, y = batch((4, 7))

            def closure(x=x, y=y):
                self.optimizer.zero_grad()
                self.outputs = self.training_step(x, y)
                self.outputs["loss"].backward()
                return self.outputs["loss"]

            self.optimizer.step(closure)
            self.on_train_batch_end(self.outputs, x, y)
        return self.accuracies


def test_a_metric_after_the_step_is_of_the_forward():
    model = Model()
    again = copy.deepcopy(model)
    expected, ours = Module(model, model).fit(), Recorded(again)
    torch.testing.assert_close(Module(again, ours).fit(), expected, rtol=1e-4, atol=1e-5)
    assert len(ours.logits) == 3 and all(map(is_unread, ours.logits))


def test_generate():
    """A token at a time, with a static cache: nothing is deferred."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=2 * H,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(1, V, (2, 5))
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(tokens, **options, return_dict_in_generate=True, output_logits=True)
    model.forward = rewrite(model.forward)
    ours = model.generate(tokens, **options, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(ours.logits, expected.logits)
    assert not counters["lmhead_pass"]
