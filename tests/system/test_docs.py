"""The pages of docs/ speak of things that exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]


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


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"(?s)```{language}\n(.*?)```", text)


def paragraphs(text: str) -> list[str]:
    "Of prose: without code, tables, pictures and headings."
    prose = re.sub(r"(?s)```.*?```", "", text)
    return [p for p in prose.split("\n\n") if p.strip() and not p.lstrip().startswith(("|", "#", "!"))]


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 700
    assert max(len(paragraph.split()) for paragraph in paragraphs(text)) <= 60


def test_the_python_example_of_the_readme_runs(tmp_path):
    (example,) = blocks(README.read_text(encoding="utf-8"), "python")
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # several wait for each other on a busy machine
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=one_thread,
        capture_output=True,
        text=True,
        check=True,
    )
    assert -1 < float(done.stdout.splitlines()[-1]) < 10
    assert (tmp_path / "model.pt").exists()


def commands(text: str) -> list[list[str]]:
    "Words of each call of trading-lib, up to a comment or the next command."
    calls = []
    for line in "\n".join(blocks(text, "bash")).splitlines():
        for part in line.partition("  #")[0].split(";"):
            words = shlex.split(part)
            if words and words[0].endswith("trading-lib"):
                calls.append(words[1:])
    return calls


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "commands.md"], ids=lambda p: p.stem)
def test_commands_of_a_page_and_their_options_exist(page):
    from trading_lib.cli import _command_line

    parser = _command_line()
    for words in commands(page.read_text(encoding="utf-8")):
        parser.parse_args(words)  # a wrong name or option ends the program
