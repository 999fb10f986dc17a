"""Writes every picture and table that README and docs take from the results in benchmarks/results.

pip install matplotlib
python benchmarks/pages.py
"""

from pathlib import Path

import pictures
import tables

ROOT = Path(__file__).parents[1]


def main() -> None:
    pictures.draw_all(ROOT / "docs" / "pictures")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        new = tables.with_tables(text)
        if new != text:
            page.write_text(new)
            print(page)


if __name__ == "__main__":
    main()
