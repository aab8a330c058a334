"""Prints the tests of the chapters that changed since the last push, or since the last commit:
what `make check` runs."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ("tests/system/test_repository.py", "tests/system/test_docs.py")
NOTHING = ("tests/base",)  # where nothing changed, the fastest


def git(*words: str) -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed_files() -> set[str]:
    pushed = git("rev-parse", "--verify", "--quiet", "@{upstream}")
    since = pushed[0] if pushed else "HEAD"
    return {*git("diff", "--name-only", since), *git("ls-files", "--others", "--exclude-standard")}


def tests_of(file: str) -> str | None:
    "A chapter's notebook is tested by the folder of its name, a stage's by the pipeline's; a test by itself."
    chapter = re.match(r"nbs/\d\d_(\w+)/", file)
    if chapter:
        return f"tests/{chapter[1]}"
    if re.match(r"nbs/\w+\.ipynb$", file):
        return "tests/pipeline"
    return file if re.match(r"tests/\w+/test_\w+\.py$", file) else None


def main() -> None:
    chosen = {tests_of(file) for file in changed_files()} - {None}
    chosen = {place for place in chosen if (ROOT / place).exists()} or set(NOTHING)
    print(*sorted(chosen), *(place for place in ALWAYS if place not in chosen))


if __name__ == "__main__":
    main()
