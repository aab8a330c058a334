"""The pages of docs/ speak of things that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "CHANGELOG.md"]


def named_tests(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)


def is_there(file: str, name: str) -> bool:
    defined = re.compile(rf"(?m)^(?:async )?def {name}\(")
    return any(defined.search(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob(file))


def test_the_reader_of_names_knows_what_is_missing():
    assert named_tests("| `test_a.py::test_b` |") == [("test_a.py", "test_b")]
    assert (
        is_there("test_docs.py", "test_every_lesson_names_a_test")
        and not is_there("test_docs.py", "test_b")
        and not is_there("test_none.py", "test_b")
    )


def test_every_lesson_names_a_test():
    text = (ROOT / "docs" / "lessons.md").read_text(encoding="utf-8")
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith(("| What", "| ---"))
    ]
    assert len(rows) >= 30
    assert [row for row in rows if len(named_tests(row)) != 1] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_tests_and_links_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    assert [pair for pair in named_tests(text) if not is_there(*pair)] == []
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
