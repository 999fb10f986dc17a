"""Python in README and docs can be read, and names what there is."""

import ast
import functools
import re
import textwrap

import pytest

import lmhead_pass

from .commands import PAGES, ROOT

SNIPPETS = {
    f"{page.relative_to(ROOT)}-{number}": textwrap.dedent(text)
    for page in PAGES
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
}


def test_snippets_are_found():
    assert len(SNIPPETS) > 10


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_names_what_there_is(name):
    for node in ast.walk(ast.parse(SNIPPETS[name])):
        path = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"lmhead_pass(\.\w+)+", path):
            functools.reduce(getattr, path.split(".")[1:], lmhead_pass)
