"""Notebooks that papermill runs: real kernels, real signals.
The notebook is a loop that looks for a stop request, as a training does."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
LOOP = """
import time
from pathlib import Path
from trading_lib.config import InputError
from trading_lib.pipeline.stopping import StopRequest
with StopRequest() as stop:
    Path("ready").touch()
    for i in range(6000):
        time.sleep(0.01)
        if stop.requested: break
if stop.requested:
    Path("saved").touch()
    raise InputError("train: was stopped and has saved")
"""
RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import papermill
from papermill.engines import papermill_engines
from trading_lib.pipeline.engine import papermill_engine
papermill_engines.register("trading_lib", papermill_engine)
papermill.execute_notebook("loop.ipynb", "done.ipynb", engine_name="trading_lib", progress_bar=False)
"""


@pytest.fixture
def folder(tmp_path):
    "Two cells: the loop, and one that must not run after a stop."
    cells = [nbformat.v4.new_code_cell(LOOP), nbformat.v4.new_code_cell("Path('second').touch()")]
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells,
            metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
        ),
        tmp_path / "loop.ipynb",
    )
    return tmp_path


@pytest.fixture
def short():
    "Where sockets go; the path of one has room for some hundred characters."
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        yield Path(place)


def start(folder: Path, short: Path, before=(), **more) -> subprocess.Popen:
    env = (
        {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
        | {
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(short),
            "IPYTHONDIR": str(short / "ipython"),
            "JUPYTER_RUNTIME_DIR": str(short),
        }
        | more
    )
    return subprocess.Popen(
        [*before, sys.executable, "-c", RUN],
        cwd=folder,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(what, seconds: float = 90):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.02)


def kernels(short: Path) -> list[int]:
    "Processes whose connection lies in that folder."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += (
                [int(path.parent.name)]
                if f"{short}/trading_lib-kernel-".encode() in path.read_bytes()
                else []
            )
        except OSError:
            pass
    return found


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_reaches_the_kernel_which_saves_and_the_process_ends_with_its_status(
    folder, short, number, status
):
    process = start(folder, short)
    wait_for((folder / "ready").exists)
    assert not list(folder.glob("kernel-ipc*")) and len(kernels(short)) == 1
    process.send_signal(number)
    error = process.communicate(timeout=90)[1]
    assert process.returncode == status, error
    assert (
        (folder / "saved").exists()
        and not (folder / "second").exists()
        and error.splitlines()[-1] == "train: was stopped and has saved"
    )
    assert (
        not list(short.glob("trading_lib-kernel-*"))
        and not kernels(short)
        and "was stopped" in (folder / "done.ipynb").read_text()
    )


@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(),
    reason="no /proc here: the end of DVC is then noticed by its direct children only",
)
def test_a_stage_saves_and_ends_when_dvc_is_killed(folder, short):
    "Also with a shell between them, which does not end with DVC."
    dvc = start(
        folder,
        short,
        before=[
            sys.executable,
            "-c",
            (
                "import os, subprocess, sys; subprocess.run(['sh', '-c', '\"$@\"; exit $?', 'sh', "
                "*sys.argv[1:]], env=os.environ | {'DVC_STAGE': 'train@SIM-USD'})"
            ),
        ],
    )
    wait_for((folder / "ready").exists)
    dvc.kill()
    wait_for((folder / "saved").exists)
    wait_for(lambda: not kernels(short) and not list(short.glob("trading_lib-kernel-*")))
    dvc.communicate(timeout=30)


def test_two_at_once_keep_out_of_each_others_way_and_what_a_killed_one_leaves_goes_with_the_next(
    folder, short
):
    other = folder / "other"
    other.mkdir()
    (other / "loop.ipynb").write_bytes((folder / "loop.ipynb").read_bytes())
    first, second = start(folder, short), start(other, short)
    wait_for(lambda: (folder / "ready").exists() and (other / "ready").exists())
    folders = {p.name for p in short.glob("trading_lib-kernel-*")}
    assert len(folders) == 2 and len(kernels(short)) == 2
    first.kill()
    first.communicate(timeout=30)
    wait_for(lambda: len(kernels(short)) == 1)  # the killed one's kernel does not go on
    second.send_signal(signal.SIGTERM)
    assert (
        second.communicate(timeout=90)
        and second.returncode == 143
        and (other / "saved").exists()
        and not (folder / "saved").exists()
    )
    (left,) = short.glob("trading_lib-kernel-*")
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "from trading_lib.pipeline.engine import kernel_folder\nwith kernel_folder() as f: print(f)",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(short)},
        capture_output=True,
        text=True,
    ).stdout
    assert (
        left.name in folders
        and re.search(r"trading_lib-kernel-\d+-", told)
        and not list(short.glob("trading_lib-kernel-*"))
    )
