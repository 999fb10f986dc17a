"""The pages say what the package says."""

import ast
import re
from pathlib import Path

import lmhead_pass
from lmhead_pass.log import TROUBLESHOOTING

DOCS = Path(__file__).parents[1] / "docs"


def test_troubleshooting_quotes_what_the_package_says():
    texts = []
    for file in Path(lmhead_pass.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                texts += [part.value for part in parts if isinstance(part, ast.Constant)]
    said = "\n".join(text for text in texts if isinstance(text, str))
    page = " ".join((DOCS / "troubleshooting.md").read_text().split())
    page = re.sub(r"`[^`]*`", "", page)  # code has quotes of its own
    quotes = [quote.rstrip(",.") for quote in re.findall(r'"([^"]+)"', page)]
    assert len(quotes) > 30
    missing = [quote for quote in quotes if quote not in said]
    assert missing == []


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w-]+\.md)$", (DOCS / "site" / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_every_example_has_a_recipe():
    page = (DOCS / "recipes.md").read_text()
    examples = {file.name for file in (DOCS.parent / "examples").glob("*.py")}
    commands = set(
        re.findall(r"^(?:python|torchrun --nproc-per-node 2) examples/(\S+)$", page, re.M)
    )
    # The model and the text that they share, and what starts train_gpt.py twice.
    assert examples - commands == {"gpt.py", "stdlib_text.py", "demo.py"} and commands <= examples


def test_log_lines_name_a_section_of_troubleshooting():
    report = (Path(lmhead_pass.__file__).parent / "rewrite" / "report.py").read_text()
    named = set(re.findall(r"{TROUBLESHOOTING}#([\w-]+)", report))
    titles = re.findall(r"^#+ (.+)$", (DOCS.parent / TROUBLESHOOTING).read_text(), re.M)
    assert named == {"left-alone", "nothing-is-logged"}
    assert named <= {title.lower().replace(" ", "-") for title in titles}


def test_figures_of_coverage_are_the_same_everywhere():
    row = re.search(r"\| all \| (\d+) \| (\d+) \|", (DOCS / "coverage.md").read_text())
    built, rewritten = map(int, row.groups())
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    assert f"Of the {built} language models of transformers" in readme
    assert f"tiny, {rewritten} are rewritten" in readme
    recipes = " ".join((DOCS / "recipes.md").read_text().split())
    assert f"{rewritten} of the {built} language models" in recipes
