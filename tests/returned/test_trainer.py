"""A Trainer of transformers, with the losses and metrics that its users take of logits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

from .model import VOCAB, is_unread

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Weighted(transformers.Trainer):
    """Class weights, with the labels left in the inputs: the model's own loss is not used."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        logits, labels = outputs.logits[:, :-1], inputs["labels"][:, 1:]
        weight = torch.linspace(0.5, 1.5, VOCAB)
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), weight=weight)
        return (loss, outputs) if return_outputs else loss


class Penalised(transformers.Trainer):
    """A second loss beside the model's, and an accuracy taken after the optimizer's step."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        self.last = outputs.logits, inputs["labels"]
        loss = outputs.loss + 1e-3 * outputs.logits.logsumexp(-1).square().mean()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        logits, labels = self.last
        logs["accuracy"] = (logits.argmax(-1)[:, :-1] == labels[:, 1:]).float().mean().item()
        super().log(logs, *args, **kwargs)


TRAINERS = {
    "label smoothing": (transformers.Trainer, {"label_smoothing_factor": 0.1}),
    "class weights": (Weighted, {}),
    "a second loss": (Penalised, {"gradient_accumulation_steps": 2}),
    "checkpointing": (transformers.Trainer, {"gradient_checkpointing": True}),
}


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def arguments(path, **options):
    return transformers.TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        **options,
    )


def data():
    tokens = torch.randint(VOCAB, (24, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


@pytest.mark.parametrize(("trainer", "options"), TRAINERS.values(), ids=TRAINERS)
def test_logs_are_those_without_the_pass(trainer, options, tmp_path):
    def logs():
        torch._dynamo.reset()
        settings = arguments(tmp_path, torch_compile=True, max_steps=3, logging_steps=1, **options)
        run = trainer(model=tiny_llama(), args=settings, train_dataset=data())
        run.train()
        names = ("loss", "grad_norm", "accuracy")
        return [[step.get(name, 0.0) for name in names] for step in run.state.log_history[:-1]]

    with lmhead_pass.disabled():
        expected = logs()
    assert not counters["lmhead_pass"]
    ours = logs()
    assert counters["lmhead_pass"]["rewritten"] >= 1 and not counters["lmhead_pass"]["refused"]
    assert len(ours) == 3
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_model_output():
    model = tiny_llama()
    tokens = torch.randint(VOCAB, (2, 9))
    output = torch.compile(model)(input_ids=tokens, labels=tokens)
    plain = model(input_ids=tokens, labels=tokens)
    assert type(output) is type(plain) and is_unread(output.logits)
    output.loss.backward()
    torch.testing.assert_close(output.loss, plain.loss)
    torch.testing.assert_close(output["logits"].detach() + 0, plain.logits.detach())


def test_it_trains_evaluates_and_predicts(tmp_path):
    seen, examples = [], data()

    def metrics(prediction):
        best = prediction.predictions[:, :-1].argmax(-1)
        return {"accuracy": float((best == prediction.label_ids[:, 1:]).mean())}

    def run(compiled):
        class Trainer(transformers.Trainer):
            def compute_loss(self, *args, return_outputs=False, **kwargs):
                loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
                seen.append((compiled, is_unread(outputs["logits"])))
                return (loss, outputs) if return_outputs else loss

        settings = arguments(
            tmp_path / str(compiled),
            torch_compile=compiled,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            logging_strategy="no",
        )
        trainer = Trainer(
            *(tiny_llama(), settings),
            train_dataset=examples,
            eval_dataset=examples,
            compute_metrics=metrics,
        )
        loss = trainer.train().training_loss
        if compiled:  # which Trainer does for training only
            trainer.model.forward = torch.compile(trainer.model.forward)
        evaluated = trainer.evaluate()
        values = evaluated["eval_loss"], evaluated["eval_accuracy"]
        return loss, *values, trainer.predict(examples)[0]

    *numbers, predictions = run(compiled=True)
    *expected, plain = run(compiled=False)
    assert {unread for compiled, unread in seen if compiled} == {True}
    np.testing.assert_allclose(numbers, expected, rtol=1e-4)
    np.testing.assert_allclose(predictions, plain, rtol=1e-3, atol=1e-4)
