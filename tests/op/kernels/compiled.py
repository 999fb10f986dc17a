"""Compiles the GPU kernels for a GPU that is not there: a script, run without the interpreter.

Prints, as JSON, what the compiler made of each variant: registers, bytes of stack, shared memory,
and how often each instruction occurs. ``test_compiled.py`` says what these must be.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmhead_pass.op.kernels import triton_exponential_kernels as of_exponentials
from lmhead_pass.op.kernels import triton_products as products
from lmhead_pass.op.kernels import triton_row_kernels as rows

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PRODUCT = products._OPTIONS
ROW = {"num_warps": 8, "enable_fp_fusion": False}


def variants():
    """Name, kernel, types of its arguments, constants, options."""
    common = {"PROGRAMS": 132, "GROUP": 8, "DEPTH": 64}
    logits = {
        "hidden": "tensordesc<bf16[128,64]>",
        "weight": "tensordesc<bf16[256,64]>",
        "out": "tensordesc<fp16[128,128]>",
        "word_ptr": "*i32",
        **dict.fromkeys(("bias_ptr", "fill_ptr")),
        **dict.fromkeys(("largest_ptr", "total_ptr"), "*fp32"),
        **dict.fromkeys(("rows", "vocab", "depth"), "i32"),
    }
    plain = {**common, "LOGIT_SCALE": None, "IS_TRANSPOSED": False, "ROWS": 128, "WORDS": 256}
    kernel = products._exponentials_kernel
    yield "exponentials", kernel, logits, plain, PRODUCT
    scaled = {**plain, "LOGIT_SCALE": 0.5}
    yield "exponentials_bias", kernel, {**logits, "bias_ptr": "*bf16"}, scaled, PRODUCT
    transposed = {**logits, "weight": "tensordesc<bf16[64,256]>"}
    yield "exponentials_fill", kernel, {**logits, "fill_ptr": "*fp32"}, plain, PRODUCT
    yield "exponentials_transposed", kernel, transposed, {**plain, "IS_TRANSPOSED": True}, PRODUCT
    yield "exponentials_loss_alone", kernel, {**logits, "out": None}, plain, PRODUCT

    gradient = {
        "grad_logits": "tensordesc<bf16[64,128]>",
        "hidden": "tensordesc<bf16[64,256]>",
        "total_ptr": None,
        "factor_ptr": "*fp32",
        "out": "tensordesc<bf16[128,64]>",
        **dict.fromkeys(("rows", "vocab", "size"), "i32"),
    }
    sizes = {**common, "WORDS": 128, "HIDDEN": 256}
    kernel = products._weight_gradient_kernel
    yield "weight", kernel, gradient, sizes, PRODUCT
    yield "weight_and_sum", kernel, {**gradient, "total_ptr": "*fp32"}, sizes, PRODUCT
    wide = {**gradient, "total_ptr": "*fp32", "out": "tensordesc<fp32[128,64]>"}
    yield "weight_and_sum_in_fp32", kernel, wide, sizes, PRODUCT

    per_row = ("target_logit_ptr", "target_coef_ptr", "row_max_ptr", "log_sum_ptr")
    in_place = {
        "exponentials_ptr": "*fp16",
        "gradient_ptr": "*bf16",
        **dict.fromkeys(("largest_ptr", *per_row, "coefficient_ptr"), "*fp32"),
        "word_ptr": "*i32",
        "ignored_ptr": "*i1",
        **dict.fromkeys(("stride", "width"), "i32:16"),
        **dict.fromkeys(("rows", "tiles", "vocab", "grad_logsumexp_stride"), "i32"),
        "coefficient_stride": "i32",
        **dict.fromkeys(("grad_logsumexp_ptr", "fill_ptr")),
    }
    constants = {"LOGIT_SCALE": 1.0, "TILES": of_exponentials._TILES, "WORDS": 256}
    kernel = of_exponentials._gradient_kernel
    yield "gradients", kernel, in_place, constants, ROW
    yield "gradients_fill", kernel, {**in_place, "fill_ptr": "*fp32"}, constants, ROW

    of_logits = {
        "logits_ptr": "*fp32",
        "gradient_ptr": "*bf16",
        "target_ptr": "*i64",
        **dict.fromkeys(("coefficient_ptr", "loss_ptr"), "*fp32"),
        **dict.fromkeys(("logits_stride", "gradient_stride"), "i32:16"),
        **dict.fromkeys(("coefficient_stride", "grad_logsumexp_stride", "ignore_index"), "i32"),
        "vocab": "i32",  # 50257, say: divisible by nothing
        **dict.fromkeys(("grad_logsumexp_ptr", "row_max_ptr", "log_sum_ptr"), None),
        **dict.fromkeys(("bias_ptr", "class_weight_ptr", "class_weight_sum_ptr", "fill_ptr")),
    }
    off = {"SMOOTHING": 0.0, "SMOOTHING_COEF": 0.0, "LOGIT_SCALE": None, "COLUMNS": 4096}
    for name, softcap in (("logits", None), ("logits_softcap", 30.0)):
        yield name, rows._gradient_kernel, of_logits, {**off, "SOFTCAP": softcap}, ROW
    masked = {**of_logits, "fill_ptr": "*fp32"}
    yield "logits_fill", rows._gradient_kernel, masked, {**off, "SOFTCAP": None}, ROW


def compiled(kernel, types, constants, options):
    types = {**types, **dict.fromkeys(constants, None)}
    signature, values, attributes = {}, dict(constants), {}
    for place, name in enumerate(kernel.arg_names):
        kind, _, multiple = (types[name] or "constexpr").partition(":")
        signature[name] = kind
        if kind == "constexpr":
            values.setdefault(name, None)
        elif multiple or kind.startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, values, attributes), target=HOPPER, options=options
    )


def tool(name, *arguments):
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def main():
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, *what in variants():
            code = compiled(*what)
            file = Path(folder) / f"{name}.cubin"
            file.write_bytes(code.asm["cubin"])
            usage = tool("cuobjdump", "-res-usage", file)
            instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)",
                                      tool("nvdisasm", "-c", file), re.M)  # fmt: skip
            report[name] = {
                "registers": int(re.search(r"REG:(\d+)", usage)[1]),
                "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
                "shared": code.metadata.shared,
                "instructions": Counter(instructions),
            }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
