"""Returned logits in training loops, and in those of transformers."""

import copy

import numpy as np
import pytest
import torch

from .model import (
    VOCAB,
    Model,
    batch,
    is_unread,
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


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def test_transformers_model_output():
    model = tiny_llama()
    tokens = torch.randint(VOCAB, (2, 9))
    output = torch.compile(model)(input_ids=tokens, labels=tokens)
    plain = model(input_ids=tokens, labels=tokens)
    assert type(output) is type(plain) and is_unread(output.logits)
    output.loss.backward()
    torch.testing.assert_close(output.loss, plain.loss)
    torch.testing.assert_close(output["logits"].detach() + 0, plain.logits.detach())


def test_transformers_trainer_trains_evaluates_and_predicts(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    tokens = torch.randint(VOCAB, (24, 9), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    seen = []

    def metrics(prediction):
        best = prediction.predictions[:, :-1].argmax(-1)
        return {"accuracy": float((best == prediction.label_ids[:, 1:]).mean())}

    def run(compiled):
        class Trainer(transformers.Trainer):
            def compute_loss(self, *args, return_outputs=False, **kwargs):
                loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
                seen.append((compiled, is_unread(outputs["logits"])))
                return (loss, outputs) if return_outputs else loss

        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(compiled)),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            learning_rate=1e-2,
            torch_compile=compiled,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            seed=0,
        )
        trainer = Trainer(
            tiny_llama(), arguments, train_dataset=data, eval_dataset=data, compute_metrics=metrics
        )
        loss = trainer.train().training_loss
        if compiled:  # which Trainer does for training only
            trainer.model.forward = torch.compile(trainer.model.forward)
        evaluated = trainer.evaluate()
        return loss, evaluated["eval_loss"], evaluated["eval_accuracy"], trainer.predict(data)[0]

    *numbers, predictions = run(compiled=True)
    *expected, plain = run(compiled=False)
    assert {unread for compiled, unread in seen if compiled} == {True}
    np.testing.assert_allclose(numbers, expected, rtol=1e-4)
    np.testing.assert_allclose(predictions, plain, rtol=1e-3, atol=1e-4)
