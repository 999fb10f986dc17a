"""Where Triton's kernels are tested: on a GPU, or else on the CPU through Triton's interpreter.

Triton reads the environment when it is itself imported, by transformers for instance: conftest.py
imports this first.
"""

import os

import pytest
import torch

DEVICE = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), "cpu")
SUITE = [] if DEVICE == "cpu" else [pytest.mark.gpu]
"""Marks of these tests: on a GPU they are part of its suite."""

if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
