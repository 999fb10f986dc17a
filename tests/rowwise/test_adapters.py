"""LoRA on the head, unmerged: the logits are a sum of two products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import lmhead_pass

from .. import reference
from ..backend import rewrite

H, V, RANK = 16, 160, 4


class Adapted(nn.Module):
    """A linear layer as PEFT's ``lora.Linear`` runs it."""

    def __init__(self, base, dropout):
        super().__init__()
        self.base_layer, self.dropout = base.requires_grad_(False), nn.Dropout(dropout)
        self.lora_a, self.lora_b = nn.Linear(H, RANK, bias=False), nn.Linear(RANK, V, bias=False)

    def forward(self, x):
        result = self.base_layer(x)
        dtype, x = result.dtype, x.to(self.lora_a.weight.dtype)
        return (result + self.lora_b(self.lora_a(self.dropout(x))) * 2.0).to(dtype)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(H, H), nn.Linear(H, V, bias=False)

    def forward(self, x, y):
        logits = self.lm_head(self.body(x).tanh())
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def adapted(dropout, dtype):
    model = Model().to(dtype)
    model.lm_head = Adapted(model.lm_head, dropout).to(dtype)
    return model


def by_peft(dropout, dtype):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=RANK, lora_dropout=dropout, target_modules=["lm_head"])
    model = peft.get_peft_model(Model().to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros at first
            nn.init.normal_(parameter)
    return model


def step(function, model, x, y):
    torch.manual_seed(1)  # of the dropout
    loss = function(x, y)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("make", [adapted, by_peft])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_adapter_on_the_head(make, dtype, dropout):
    model, x, y = make(dropout, dtype), torch.randn(3, 7, H).to(dtype), torch.randint(V, (3, 7))
    unfused = step(model, model, x, y)
    graphs = []
    with lmhead_pass.config.patch(batch_chunk_size=5):
        ours = step(rewrite(model, graphs), model, x, y)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    assert "lmhead_pass.rowwise_sum" in graphs[1]
    if dropout and dtype == torch.bfloat16:  # FP64 would draw other numbers
        torch.testing.assert_close(ours, unfused, rtol=0.05, atol=0.02)
        return
    exact = step(model.double(), model, x.double(), y)
    reference.assert_no_worse(ours, unfused, exact, dtype, roundings=4)
