"""Losses that a Trainer's users take of a compiled model's logits, and metrics in its log."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

from .model import VOCAB

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


def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


@pytest.mark.parametrize(("trainer", "options"), TRAINERS.values(), ids=TRAINERS)
def test_logs_are_those_without_the_pass(trainer, options, tmp_path):
    tokens = torch.randint(VOCAB, (24, 9), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def logs():
        torch._dynamo.reset()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=3,
            learning_rate=1e-2,
            torch_compile=True,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            seed=0,
            **options,
        )
        run = trainer(model=model(), args=arguments, train_dataset=data)
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
