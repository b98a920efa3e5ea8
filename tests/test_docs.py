"""The README and the pages of the site: code blocks run, links resolve, and the README stays short."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST_README = 220

#: Blocks of a page that are not run; each begins with ``# docs: not run``. Those of the recipes are excerpts of scripts
#: that run as a whole, the others need a process group or a checkout.
NOT_RUN = {"docs/coming-from.md": 1, "docs/distributed.md": 1, "docs/recipes.md": 4}
EXEMPT = "# docs: not run"

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[str]:
    """The Python blocks, each with as many empty lines before it as to keep its line numbers."""
    text = page.read_text()
    found = [match for match in FENCE.finditer(text) if match["language"] == "python"]
    return ["\n" * text.count("\n", 0, match.start("code")) + match["code"] for match in found]


def is_exempt(block: str) -> bool:
    return block.lstrip().startswith(EXEMPT)


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub and the site make them of plain titles."""
    titles = (match["title"] for match in HEADING.finditer(FENCE.sub("", page.read_text())))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    broken = []
    for match in LINK.finditer(FENCE.sub("", page.read_text())):
        target = match["target"]
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    return broken


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for block in blocks(page):
            if not is_exempt(block):
                exec(compile(block, str(page), "exec"), namespace)


def test_exempt_blocks_are_the_known_ones() -> None:
    counts = {name_of(page): sum(map(is_exempt, blocks(page))) for page in PAGES}
    assert {name: count for name, count in counts.items() if count} == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    assert not broken_links(page)


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title, so\n[a](#a-title-so) [b](#no) [c](none.md) [d](https://x.y) [e](page.md#nor)\n")
    assert broken_links(page) == ["#no", "none.md", "page.md#nor"]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[1].split("\n\n")[0]
    assert set(re.findall(r"\S+\.md", navigation)) == {page.name for page in PAGES[1:]}


def test_the_benchmark_writes_figures_into_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's figures are those of the results beside it: writing them again changes nothing."""
    page = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", page)
    before = page.read_text()
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    results = ROOT / "bench/results/epyc-avx512/results.json"
    monkeypatch.setattr(sys, "argv", ["table.py", str(results), "--page", str(page)])
    runpy.run_path(str(ROOT / "bench/table.py"), run_name="__main__")
    assert page.read_text() == before
    page.write_text(before.replace("<!-- table -->", ""))
    with pytest.raises(ValueError, match="must have the markers"):
        runpy.run_path(str(ROOT / "bench/table.py"), run_name="__main__")
