"""Prints tables: by rich where that is installed, and plainly elsewhere."""

import importlib.util
import textwrap

Table = list[tuple[str, str]]
"""Names and what is said of each."""

_WIDTH = 100


def show(tables: dict[str, Table]) -> None:
    """Print each table under its title."""
    # A spec of None, too, where somebody has put None into sys.modules.
    if importlib.util.find_spec("rich") is None:
        print(plain(tables))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    for title, rows in tables.items():
        table = RichTable(title=title, title_justify="left", show_header=False, box=box.SIMPLE)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)


def plain(tables: dict[str, Table]) -> str:
    """The tables as text."""
    width = max(len(name) for rows in tables.values() for name, _ in rows) + 4
    lines = []
    for title, rows in tables.items():
        lines.append(title)
        for name, text in rows:
            first = f"  {name}".ljust(width)
            lines += textwrap.wrap(
                text, _WIDTH, initial_indent=first, subsequent_indent=" " * width
            ) or [first.rstrip()]
        lines.append("")
    return "\n".join(lines[:-1])
