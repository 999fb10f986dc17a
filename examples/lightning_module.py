"""Train with Lightning: compile the network inside of the LightningModule.

    pip install lightning
    python examples/lightning_module.py

`torch.compile(LightningModule)` would trace `self.log` too, which Dynamo cannot do.
"""

import logging

import lightning as L
import torch
from gpt import GPT
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lmhead_pass  # noqa: F401  (the import is all it takes)

VOCAB, CONTEXT, BATCH = 8192, 128, 4

logging.basicConfig(format="%(name)s: %(message)s")
logging.getLogger("lmhead_pass").setLevel(logging.INFO)


class LanguageModel(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = GPT(VOCAB, CONTEXT, dim=64, depth=1)
        self.model.compile()  # in place: names in checkpoints stay as they are

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (tokens,) = batch
        loss = self.model(tokens[:, :-1], tokens[:, 1:])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


L.seed_everything(0)
tokens = torch.randint(VOCAB, (4 * BATCH, CONTEXT + 1))
trainer = L.Trainer(
    max_epochs=2,
    accelerator="cpu",
    log_every_n_steps=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(LanguageModel(), DataLoader(TensorDataset(tokens), batch_size=BATCH))
print(f"loss {trainer.callback_metrics['loss'].item():.3f}")
