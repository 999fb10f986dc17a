"""Compiles the GPU kernels for GPUs that are not there: a script, run without the interpreter.

Prints, as JSON, what the compiler made of each variant: registers, spilled registers, shared
memory, how often each instruction occurs, and those of its innermost loops in order.
``test_compiled.py`` says what these must be.

    python -m tests.op.kernels.compiled --record     # writes compiled.json
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
from lmhead_pass.op.kernels import triton_fingerprint as fingerprint
from lmhead_pass.op.kernels import triton_products as products
from lmhead_pass.op.kernels import triton_row_kernels as rows

HOPPER = GPUTarget("cuda", 90, 32)
CDNA3 = GPUTarget("hip", "gfx942", 64)
RECORD = Path(__file__).with_name("compiled.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PRODUCT = products._OPTIONS
ROW = {"num_warps": 8, "enable_fp_fusion": False}
COLUMNS = 4096


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

    tiles = {
        **dict.fromkeys(("largest_ptr", "total_ptr", *per_row, "loss_ptr"), "*fp32"),
        "word_ptr": "*i32",
        "ignored_ptr": "*i1",
        **dict.fromkeys(("rows", "tiles"), "i32"),
    }
    sizes = {"ROWS": of_exponentials._ROWS, "TILES": of_exponentials._TILES}
    yield "exponential_losses", of_exponentials._loss_kernel, tiles, sizes, {**ROW, "num_warps": 4}
    targets = {
        **dict.fromkeys(("hidden_ptr", "weight_ptr"), "*bf16"),
        "word_ptr": "*i32",
        **dict.fromkeys(("bias_ptr", "fill_ptr")),
        "out_ptr": "*fp32",
        **dict.fromkeys(("hidden_stride", "weight_stride", "depth"), "i32:16"),
        **dict.fromkeys(("hidden_step", "weight_step"), "i32"),
    }
    options = {"num_warps": 4, "enable_fp_fusion": True}
    constants = {"LOGIT_SCALE": None, "COLUMNS": 1024}
    yield "target_logits", products._target_logits_kernel, targets, constants, options
    yield from variants_of_rows()


def variants_of_rows():
    """Those that any GPU runs."""
    bits = {"bits_ptr": "*i64", "sums_ptr": "*i64", "rows": "i32", "columns": "i32:16"}
    sizes = {"ROWS": fingerprint._ROWS, "COLUMNS": fingerprint._COLUMNS}
    yield "fingerprint", fingerprint._kernel, bits, sizes, {"num_warps": 4}
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
    off = {"SMOOTHING": 0.0, "SMOOTHING_COEF": 0.0, "LOGIT_SCALE": None, "SOFTCAP": None}
    off["COLUMNS"] = COLUMNS
    on = {**off, "SMOOTHING": 0.1, "SMOOTHING_COEF": 1e-6, "LOGIT_SCALE": 0.5, "SOFTCAP": 30.0}
    every = {name: "*fp32" for name in of_logits if name.endswith("_ptr") and name != "loss_ptr"}
    every |= {"loss_ptr": None, "gradient_ptr": "*bf16", "target_ptr": "*i64"}
    kernel = rows._gradient_kernel
    yield "logits", kernel, of_logits, off, ROW
    yield "logits_softcap", kernel, of_logits, {**off, "SOFTCAP": 30.0}, ROW
    yield "logits_algebraic", kernel, of_logits, {**off, "SOFTCAP": -30.0}, ROW
    yield "logits_fill", kernel, {**of_logits, "fill_ptr": "*fp32"}, off, ROW
    yield "logits_all", kernel, {**of_logits, **every}, on, ROW
    losses = {**of_logits, **dict.fromkeys(("row_max_ptr", "log_sum_ptr"), "*fp32")}
    kernel = rows._loss_kernel
    yield "logits_losses", kernel, losses, {**off, "EVERY_ROW": False}, ROW
    yield "logits_losses_all", kernel, {**losses, **every, "loss_ptr": "*fp32"}, {
        **on, "EVERY_ROW": True
    }, ROW  # fmt: skip


def compiled(target, kernel, types, constants, options):
    types = {**types, **dict.fromkeys(constants, None)}
    signature, values, attributes = {}, dict(constants), {}
    for place, name in enumerate(kernel.arg_names):
        kind, _, multiple = (types[name] or "constexpr").partition(":")
        signature[name] = kind
        if kind == "constexpr":
            values.setdefault(name, None)
        elif multiple or kind.startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    values = {name: value for name, value in values.items() if name in kernel.arg_names}
    return triton.compile(
        ASTSource(kernel, signature, values, attributes), target=target, options=options
    )


def tool(name, *arguments):
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def on_hopper(code, file):
    file.write_bytes(code.asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", file)
    text = tool("nvdisasm", "-c", file)
    instruction = r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)"
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": code.metadata.shared,
        **instructions(text, r"(\.L_x_\d+):", instruction, r"BRA.*`\((\.L_x_\d+)\)"),
    }


def on_cdna3(code, file):
    text = code.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    code = text[: text.index("s_endpgm")]
    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count") + number("sgpr_spill_count"),
        **instructions(code, r"(\.LBB0_\d+):", r"\t([a-z]\w+)", r"s_c?branch\w* (\.LBB0_\d+)"),
    }


def instructions(text, label, instruction, branch):
    """Their names in all, and in each innermost loop in order."""
    names, places, loops = [], {}, []
    for line in text.splitlines():
        if found := re.match(label, line):
            places[found[1]] = len(names)
        elif found := re.match(instruction, line):
            names.append(found[1])
            target = re.search(branch, line)
            if target and (start := places.get(target[1])) is not None:
                inner = any(start <= first for first, _ in loops)
                loops += [] if inner else [(start, len(names))]
    # The assembler ends each kernel with a jump to itself.
    loops = [names[start:stop] for start, stop in loops if stop - start > 4]
    return {"instructions": Counter(names), "loops": loops}


def main():
    report = {"sm_90": {}, "gfx942": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, *what in variants():
            report["sm_90"][name] = on_hopper(compiled(HOPPER, *what), Path(folder) / name)
        for name, *what in variants_of_rows():
            report["gfx942"][name] = on_cdna3(compiled(CDNA3, *what), Path(folder) / name)
    if "--record" in sys.argv:
        record(report)
    else:
        json.dump(report, sys.stdout)


def record(report):
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known[triton.__version__] = {
        chip: {name: recorded(found) for name, found in variants.items()}
        for chip, variants in report.items()
    }
    RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def recorded(found):
    """What ``compiled.json`` has of a variant: registers, and how many instructions its loops have.

    A loop of a row kernel works on 16 elements for each thread of sm_90, and on 8 of gfx942.
    """
    lengths = [len(loop) for loop in found["loops"]] or [sum(found["instructions"].values())]
    return {"registers": found["registers"], "loops": lengths}


if __name__ == "__main__":
    main()
