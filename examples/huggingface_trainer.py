"""Train a tiny Llama with the Trainer of transformers: `torch_compile=True` is all it takes.

    pip install "transformers[torch]"
    python examples/huggingface_trainer.py

With label smoothing the Trainer takes the loss itself, of the logits that the compiled model
returns: these are never computed.
"""

import logging
import tempfile

import torch
from torch import Tensor
from transformers import EvalPrediction, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lmhead_pass  # noqa: F401  (the import is all it takes)

VOCAB, CONTEXT, BATCH = 8192, 128, 4

logging.basicConfig(format="%(name)s: %(message)s")
logging.getLogger("lmhead_pass").setLevel(logging.INFO)


def best_words(logits: Tensor, labels: Tensor) -> Tensor:
    """What an evaluation keeps of the logits: [B, T] instead of [B, T, VOCAB]."""
    return logits.argmax(-1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
    return {"accuracy": float(right.mean())}


torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        use_cache=False,
    )
)
tokens = torch.randint(VOCAB, (2 * BATCH, CONTEXT))
data = [{"input_ids": row, "labels": row} for row in tokens]

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            torch_compile=True,
            label_smoothing_factor=0.1,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            num_train_epochs=3,
            learning_rate=3e-3,
            logging_steps=1,
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data,
        preprocess_logits_for_metrics=best_words,
        compute_metrics=accuracy,
    )
    trainer.train()
