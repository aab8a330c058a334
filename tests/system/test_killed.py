"""`dvc repro` killed at thirty random moments, without a chance to tidy up:
the next one makes what an undisturbed one makes, byte for byte."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_pipeline import COMMANDS, Tree, origin  # noqa: F401 (a fixture)

MOMENTS = 30


def processes_in(folder: Path) -> list[int]:
    "Those that work in that folder."
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found += [int(path.parent.name)] if Path(os.readlink(path)) == folder else []
        except OSError:
            pass
    return found


def small(tree: Tree) -> Tree:
    tree.edit(symbols=["SIM-USD"])
    tree.run("git", "commit", "--quiet", "--no-verify", "-am", "one symbol")
    return tree


@pytest.mark.proof
@pytest.mark.skipif(
    not Path("/proc/self/cwd").exists(), reason="no /proc here to look for processes that are left"
)
def test_kills_at_random_moments_change_nothing(origin):  # noqa: F811
    whole, killed, chance = (
        small(origin.clone("undisturbed")),
        small(origin.clone("killed")),
        random.Random(0),
    )
    began = time.monotonic()
    whole.run("dvc", "repro")
    seconds = time.monotonic() - began
    for moment in range(MOMENTS):
        process = subprocess.Popen(
            [COMMANDS / "dvc", "repro", "--force"],
            cwd=killed.root,
            env=killed.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(chance.uniform(0, seconds))
        try:
            (os.killpg if moment % 2 else os.kill)(
                process.pid, signal.SIGKILL
            )  # the whole group, or DVC alone
        except ProcessLookupError:
            pass  # it was quicker
        process.wait()
        if moment % 3:
            continue  # and else the next one begins at once
        end = time.monotonic() + 60
        while processes_in(killed.root):
            assert time.monotonic() < end, (
                f"after kill {moment + 1}, still there: {processes_in(killed.root)}"
            )
            time.sleep(0.1)
    killed.run("dvc", "repro")
    assert (
        killed.lock() == whole.lock()
        and not processes_in(killed.root)
        and not list(killed.root.glob("kernel-ipc*"))
    )

    def made(tree: Tree, name: str) -> dict[str, bytes]:
        return {
            str(p.relative_to(tree.root)): p.read_bytes()
            for p in (tree.root / name).rglob("SIM-USD_15Min*")
            if p.is_file() and p.parent == tree.root / name
        }

    for name in ("data", "models", "reports"):
        assert made(killed, name) == made(whole, name)
