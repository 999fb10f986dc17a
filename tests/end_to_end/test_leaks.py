"""Nothing piles up: neither over training steps nor over compilations."""

import gc
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.fx import Graph, GraphModule, Node

import lmhead_pass
from benchmarks.memory import live_bytes
from lmhead_pass import compat
from lmhead_pass.graph_pass import the_pass

V = 97


@contextmanager
def no_collector():
    """What is in a cycle of references stays: a step has to do without."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def growth(run):
    """Bytes of tensors, and Python objects, that are there after ``run`` and were not before."""
    gc.collect()
    gc.freeze()  # what there is already is not looked through again
    try:
        with no_collector():
            held = live_bytes(run)[-1]
        gc.collect()
        return held, len(gc.get_objects())
    finally:
        gc.unfreeze()


class Training:
    """A head in training: what a step does with the logits that it gets is the test's."""

    def __init__(self, returns_logits):
        self.hidden = torch.randn(24, 16, requires_grad=True)
        self.weight = torch.randn(V, 16, requires_grad=True)
        self.target = torch.randint(V, (24,))
        self.optimizer = torch.optim.AdamW([self.hidden, self.weight])
        self.kept = []

        def forward(hidden, weight, target):
            logits = F.linear(torch.tanh(hidden), weight)
            loss = F.cross_entropy(logits, target)
            return (loss, logits) if returns_logits else (loss, None)

        self.forward = torch.compile(forward)

    def step(self, use):
        loss, logits = self.forward(self.hidden, self.weight, self.target)
        loss.backward()
        use(self, logits)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, use, steps):
        with lmhead_pass.config.patch(batch_chunk_size=12):
            for _ in range(steps):
                self.step(use)
        self.kept.clear()


def ignore(training, logits):
    """As a loop does that wants the loss alone."""


def keep(training, logits):
    """Until the next step, unread."""
    training.kept[:] = [logits, logits[:3].detach()]


def keep_and_read(training, logits):
    keep(training, logits)
    (logits.float().argmax(-1) == training.target).float().mean()


USES = {
    "loss": (False, ignore),
    "ignored logits": (True, ignore),
    "kept logits": (True, keep),
    "kept and read logits": (True, keep_and_read),
}


@pytest.mark.parametrize("name", USES)
def test_steps_hold_memory_flat(name):
    returns_logits, use = USES[name]
    training = Training(returns_logits)
    growth(lambda: training.run(use, 3))  # what tests before this one have left goes with it
    is_read = use is keep_and_read  # by an argmax, outside
    assert counters["lmhead_pass"] == {"rewritten": 1 + is_read}
    held, objects = growth(lambda: training.run(use, 100))
    assert held == 0
    assert objects < 100


@pytest.mark.parametrize("read_them", [False, True])
def test_a_leak_of_logits_is_seen(read_them):
    def hoard(training, logits):
        hoarded.append(logits)
        if read_them:
            hoarded.append(logits.clone())

    hoarded = []
    training = Training(returns_logits=True)
    growth(lambda: training.run(hoard, 3))
    held, objects = growth(lambda: training.run(hoard, 10))
    of_each = 24 * V * 4 if read_them else 24 * 16 * 4  # the logits, or the hidden states
    assert held >= 10 * of_each
    assert objects >= 10


def living():
    """How many graphs, and objects of this package, there are of each kind."""
    gc.collect()
    kinds = map(type, gc.get_objects())
    return Counter(
        kind.__qualname__
        for kind in kinds
        if issubclass(kind, Graph | GraphModule | Node)
        or str(kind.__module__).startswith("lmhead_pass")
    )


def compile_and_train():
    torch._dynamo.reset()
    counters.clear()
    Training(returns_logits=True).run(keep_and_read, 1)
    assert counters["lmhead_pass"] == {"rewritten": 2}  # the loss, and the argmax outside


def growth_of_compilations(count):
    for _ in range(5):
        compile_and_train()
    before = living()
    for _ in range(count):
        compile_and_train()
    return living() - before


def test_compilations_leave_nothing_behind():
    assert not growth_of_compilations(15)


def test_a_leak_of_graphs_is_seen():
    hoarded = []
    setting = compat.pass_setting([hoarded.append, the_pass()])
    with inductor_config.patch(pre_grad_custom_pass=setting):
        grown = growth_of_compilations(3)
    assert grown["Graph"] >= 3
    assert grown["Node"] >= 3 * 5
