"""Beside others: threads that compile at once, workers, and who else sets torch's settings."""

import textwrap
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

from ..process import output_of

V = 4096  # enough for the default of min_vocab_size: settings belong to the thread


class Model(nn.Module):
    """A model unlike those of other names, so that each is compiled by itself."""

    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(V, width)
        self.head = nn.Linear(width, V, bias=False)

    def forward(self, tokens):
        logits = self.head(torch.tanh(self.embedding(tokens)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def step(model, function, tokens):
    """The loss and the gradients of a step."""
    model.zero_grad()
    loss = function(tokens)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def at_once(*jobs):
    """What the jobs return, each run in a thread of its own, started together."""
    together = threading.Barrier(len(jobs))
    results = {}

    def run(number, job):
        together.wait()
        results[number] = job()

    threads = [threading.Thread(target=run, args=item) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(jobs))]


# With dynamic=False torch 2.11 changes a setting of the process around each call. Threads that do
# so at once leave it changed: no test after them would have automatic dynamic shapes.


def test_two_threads_compile_at_once():
    tokens = torch.randint(V, (3, 7))
    models = [Model(width) for width in (16, 24)]

    def train(model):
        compiled = torch.compile(model)
        return [step(model, compiled, tokens) for _ in range(3)]

    trained = at_once(*(lambda model=model: train(model) for model in models))
    assert counters["lmhead_pass"] == {"rewritten": 2}
    for model, steps in zip(models, trained, strict=True):
        expected = step(model, model, tokens)
        for results in steps:
            torch.testing.assert_close(results, expected)


def test_two_threads_share_a_function():
    """Each has gradients of its own."""
    weight = torch.randn(V, 16)
    function = torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w), y))
    data = [(torch.randn(40, 16), torch.randint(V, (40,))) for _ in range(2)]

    def gradients(function, hidden, target):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        return torch.autograd.grad(function(*leaves, target), leaves)

    def many(hidden, target):
        return [gradients(function, hidden, target) for _ in range(20)]

    results = at_once(*(lambda pair=pair: many(*pair) for pair in data))
    assert counters["lmhead_pass"].keys() == {"rewritten"}  # once, or once for each thread
    for pair, runs in zip(data, results, strict=True):
        expected = gradients(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), *pair)
        for result in runs:
            torch.testing.assert_close(result, expected)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="settings belonged to the process")
def test_disabled_belongs_to_its_thread():
    entered, compiled = threading.Event(), threading.Event()
    function = torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), dynamic=False)

    def rewritten_elsewhere():
        entered.wait()
        function(torch.randn(8, 16), torch.randn(V, 16), torch.arange(8))
        compiled.set()

    thread = threading.Thread(target=rewritten_elsewhere)
    thread.start()
    with lmhead_pass.disabled():
        entered.set()
        compiled.wait(240)
        function(torch.randn(9, 16), torch.randn(V, 16), torch.arange(9))
    thread.join()
    assert counters["lmhead_pass"] == {"rewritten": 1}
    assert counters["stats"]["unique_graphs"] == 2


WORKERS = """
    import multiprocessing
    import torch, torch.nn.functional as F
    import lmhead_pass
    from tests.inductor import without_codegen
    from torch._dynamo.utils import counters
    from torch.utils.data import DataLoader

    def function(hidden, weight, target):
        return F.cross_entropy(hidden @ weight.t(), target)

    def gradients(function, rows):
        torch.manual_seed(0)
        hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (len(rows), 5000))
        loss = function(hidden, weight, rows)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    def train(batches):
        compiled = torch.compile(function, dynamic=False)
        with without_codegen():
            for rows in batches:
                torch.testing.assert_close(gradients(compiled, rows), gradients(function, rows))
        return counters["lmhead_pass"]["rewritten"]

    def work(first, answers):
        answers.put(train([torch.arange(first, first + 8)]))

    if __name__ == "__main__":
        context = multiprocessing.get_context(START)
        answers = context.Queue()
        given = [(8 * number, answers) for number in range(COUNT)]
        workers = [context.Process(target=work, args=pair) for pair in given]
        for worker in workers:
            worker.start()
        print(*(answers.get(timeout=240) for _ in workers))
        for worker in workers:
            worker.join(60)
            assert worker.exitcode == 0
        # Workers that load data are there while the parent compiles, and start anew after it.
        loader = DataLoader(torch.arange(16), 8, num_workers=1, multiprocessing_context=context)
        print(train(batch for _ in range(COUNT) for batch in loader))
"""


@pytest.mark.parametrize(("start", "count"), [("fork", 2), ("spawn", 1)])
def test_workers(start, count):
    """So many that train, and one that loads the data for their parent: each step is rewritten.

    Once a process has compiled, torch.compile hangs in what it forks, with or without lmhead_pass.
    """
    code = WORKERS.replace("START", repr(start)).replace("COUNT", str(count))
    assert output_of(code, is_fresh=True, OMP_NUM_THREADS="1").split() == ["1"] * (count + 1)


SETTINGS = """
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 3
    inductor_config.fallback_random = True
"""
IMPORT = "import lmhead_pass"
OTHER_ADDED = """
    from lmhead_pass import compat
    passes = compat.passes_in(inductor_config.pre_grad_custom_pass)
    inductor_config.pre_grad_custom_pass = compat.pass_setting([*passes, seen.append])
"""
OTHER_ASSIGNED = "inductor_config.pre_grad_custom_pass = seen.append"


@pytest.mark.parametrize(
    ("steps", "rewritten"),
    [
        ((SETTINGS, OTHER_ASSIGNED, IMPORT), 1),
        ((IMPORT, OTHER_ADDED, SETTINGS), 1),
        ((IMPORT, SETTINGS, OTHER_ASSIGNED), 0),  # that takes our pass away
        ((IMPORT, SETTINGS, OTHER_ASSIGNED, "lmhead_pass.register()"), 1),
    ],
    ids=["after", "before", "replaced", "registered again"],
)
def test_beside_other_settings_and_passes(steps, rewritten):
    code = """
        import torch, torch.nn.functional as F
        import torch._dynamo, torch._inductor.config as inductor_config
        from torch._dynamo.utils import counters
        seen = []
    """
    use = """
        inputs = torch.randn(8, 16), torch.randn(5000, 16), torch.arange(8)
        function = lambda h, w, y: F.cross_entropy(h @ w.t(), y)
        torch.testing.assert_close(torch.compile(function)(*inputs), function(*inputs))
        print(len(seen), counters["lmhead_pass"]["rewritten"])
    """
    script = "".join(map(textwrap.dedent, [code, *(f"{step}\n" for step in steps), use]))
    assert output_of(script) == f"1 {rewritten}"


FIRST_STEP = """
import torch, torch.nn.functional as F
from torch import nn
import lmhead_pass

model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4096))
compiled = torch.compile(model)
optimizer = torch.optim.SGD(model.parameters(), 1.0)
x, y, seen = torch.randn(9, 8), torch.randint(4096, (9,)), []
expected = model(x).detach().clone()

def closure():
    optimizer.zero_grad()
    logits = compiled(x)
    seen.append((logits.detach(), type(logits).__name__))
    loss = F.cross_entropy(logits, y)
    loss.backward()
    return loss

optimizer.step(closure)
(logits, name), = seen
torch.testing.assert_close(logits + 0, expected)
print(name)
"""


@pytest.mark.codegen
def test_first_logits_of_all_are_returned_inside_of_a_step():
    """As by Lightning, which gives each step a closure: they keep the head that they were of."""
    assert output_of(FIRST_STEP, is_fresh=True) == "LazyLogits"
