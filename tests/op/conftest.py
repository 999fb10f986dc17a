"""Triton's interpreter, made faster."""

import importlib.util

import pytest

from ..device import DEVICE


@pytest.fixture(autouse=True, scope="session")
def _language_is_patched_once_for_each_launch():
    """Not again for each function that a kernel calls, where nothing is left to patch.

    The interpreter looks through all of triton.language to find that: half of a test's time.
    """
    if DEVICE != "cpu" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    patch, language = interpreter._patch_lang, interpreter.tl

    def patch_once(function):
        used = [m for m in function.__globals__.values() if m is language or m is language.core]
        is_patched = all(module.static_print is print for module in used)
        return interpreter._LangPatchScope() if is_patched else patch(function)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_once)
        yield
