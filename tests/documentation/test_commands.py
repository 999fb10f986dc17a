"""Commands in README and docs name what there is; ``tox run -e docs-commands`` runs them."""

import re

import pytest

from .commands import NOT_RUN, ROOT, commands, commands_in

COMMANDS = commands()
ENVIRONMENTS = set(re.findall(r"^\[testenv:([\w-]+)\]", (ROOT / "tox.ini").read_text(), re.M))
# Named by their dependencies alone.
ENVIRONMENTS |= {"tests", "codegen", "slow", "torch211", "torch215"}


def test_commands_are_found():
    page = """
Run `python a.py --b
c` or `A_B=1 tox run -e d`, and read `python`, `A=1`, `pip`.

```
LOGS="x" python e.py \\
    --f
no program
```

    python g.py
"""
    found = ['LOGS="x" python e.py --f', "python g.py", "python a.py --b c", "A_B=1 tox run -e d"]
    assert commands_in(page) == found
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("start", NOT_RUN)
def test_what_is_not_run_is_in_a_page(start):
    assert any(start in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_what_there_is(command):
    for names in re.findall(r"tox run -e ([\w,-]+)", command):
        assert set(names.split(",")) <= ENVIRONMENTS
    for path in re.findall(r"(?<!\S)(?:python|torchrun|launch)(?: -\S+)* (\S+\.py)", command):
        assert path == "train.py" or (ROOT / path).is_file()
    for module in re.findall(r"python -m ((?:tests|benchmarks|lmhead_pass)[\w.]*)", command):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
