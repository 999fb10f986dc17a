"""Returned logits in training loops."""

import copy

import numpy as np
import torch

from .model import (
    Model,
    batch,
)


def train(model, compiled, steps):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses, accuracies = [], []
    for step in range(steps):
        x, y = batch()
        loss, logits = compiled(x, y)
        loss.backward()
        accuracies.append((logits.argmax(-1) == y).float().mean().item())
        if step % 2:  # gradients accumulate over two steps
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, accuracies


def test_accuracy_inside_a_training_loop_with_gradient_accumulation():
    model = Model()
    twin = copy.deepcopy(model)
    expected = train(twin, twin, 6)
    losses, accuracies = train(model, torch.compile(model), 6)
    assert accuracies == expected[1]
    np.testing.assert_allclose(losses, expected[0], rtol=1e-4)


def test_metrics_after_the_optimizer_step_are_those_of_the_forward(model):
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    plain = model(x, y)[1].detach()
    loss, logits = torch.compile(model)(x, y)
    loss.backward()
    optimizer.step()
    assert torch.equal(logits.argmax(-1), plain.argmax(-1))
    torch.testing.assert_close(logits.detach() + 0, plain)
