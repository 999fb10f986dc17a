"""See what is rewritten: explain, the log, the graph before and after, and files for tlparse.

python examples/inspect_rewrite.py
"""

import logging
import os
import tempfile
from pathlib import Path

# torch reads this when it is imported. In a shell: TORCH_TRACE=folder python train.py
folder = os.environ.setdefault("TORCH_TRACE", tempfile.mkdtemp(prefix="torch_trace_"))

import torch  # noqa: E402
from gpt import GPT  # noqa: E402

import lmhead_pass  # noqa: E402

VOCAB, CONTEXT, BATCH = 8192, 128, 4

torch.manual_seed(0)
model = GPT(VOCAB, CONTEXT, dim=64, depth=1)
batch = torch.randint(VOCAB, (BATCH, CONTEXT + 1))
inputs = batch[:, :-1], batch[:, 1:]

print("1. Without compiling: lmhead_pass.explain(model, *inputs)\n")
print(lmhead_pass.explain(model, *inputs))

print('\n2. While compiling: what TORCH_LOGS="+lmhead_pass" shows, with the graph (without "+",')
print("   the first line alone)\n", flush=True)
logging.basicConfig(format="%(message)s")
logging.getLogger("lmhead_pass").setLevel(logging.DEBUG)
torch.compile(model)(*inputs)

print("\n3. Afterwards: what was counted, and what TORCH_TRACE has left\n", flush=True)
print(dict(torch._dynamo.utils.counters["lmhead_pass"]))
for file in Path(folder).iterdir():
    text = file.read_text()
    names = [name for name in ("lmhead_pass_before", "lmhead_pass_after") if name in text]
    print(f"{file}: {', '.join(names)}")
print(f"To read it in a browser: pip install tlparse && tlparse {folder}")
