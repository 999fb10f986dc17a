"""Where Triton's kernels are tested: on a GPU, or else on the CPU through Triton's interpreter.

Import this before Triton: it reads the environment when it is itself imported.
"""

import os

import pytest
import torch

DEVICE = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")
