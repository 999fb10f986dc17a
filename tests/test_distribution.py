"""What a release says of itself: its version, its addresses, and its links."""

import re
from pathlib import Path

import pytest

import lmhead_pass

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
README = (ROOT / "README.md").read_text()
(REPOSITORY,) = re.findall(r'^Repository = "(.+)"$', PROJECT, re.MULTILINE)


def test_the_version_is_in_one_place_and_heads_the_changelog():
    assert 'dynamic = ["version"]' in PROJECT
    assert 'version = { attr = "lmhead_pass.__version__" }' in PROJECT
    newest = re.search(r"^## (.+?) - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == lmhead_pass.__version__


def test_every_address_is_in_the_repository():
    urls = PROJECT.partition("[project.urls]")[2].partition("\n[")[0]
    addresses = re.findall(r'"(https://.+)"', urls)
    assert len(addresses) == 4
    assert all(address.startswith(REPOSITORY) for address in addresses)
    assert f"pip install git+{REPOSITORY}\n" in README


def test_links_of_the_readme_work_where_it_is_shown_elsewhere():
    """An index of packages shows it without the files beside it."""
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://"), link
        if link.startswith(REPOSITORY):
            path, _, anchor = link.removeprefix(f"{REPOSITORY}/blob/main/").partition("#")
            assert (ROOT / path).is_file(), link
            titles = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not anchor or anchor in anchors, link


@pytest.mark.parametrize("folder", ["benchmarks", "docs", "examples", "tests"])
def test_the_sdist_has_all_of_a_folder(folder):
    assert f"graft {folder}\n" in (ROOT / "MANIFEST.in").read_text()
