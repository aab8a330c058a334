"""What took hours is kept: models that another run or the pipeline would replace,
and runs whose disk is full at the last save."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prepared import prepare

from trading_lib.checkpoint import load_checkpoint, save_checkpoint
from trading_lib.cli import main
from trading_lib.config import InputError, load_parameters
from trading_lib.files import sha256_of_file
from trading_lib.pipeline.project import artefacts, kept_models, newest_model
from trading_lib.pipeline.stopped_run import how_to_go_on
from trading_lib.pipeline.train import train_symbol
from trading_lib.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(project, monkeypatch):
    monkeypatch.setenv("TRADING_LIB_PROGRESS", "quiet")
    prepare()
    return project


def command(*arguments) -> tuple[int, str, str]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main(list(arguments))
    return status, out.getvalue(), error.getvalue()


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_of_file(p) for p in folder.rglob("*") if p.is_file()}


def paths_of(project):
    parameters = load_parameters()
    return parameters, artefacts(parameters, "SIM-USD")


def test_models_of_the_command_line_and_of_the_pipeline_live_apart(project):
    parameters, paths = paths_of(project)
    train_symbol(parameters, "SIM-USD", paths, "the pipeline's")
    pipeline = {
        name: h for name, h in hashes(project).items() if name.startswith(("models/SIM-USD", "reports"))
    }
    first = kept_models(paths)
    assert [sha256_of_file(p) for p in first] == [pipeline["models/SIM-USD_15Min.pt"]] and newest_model(
        paths
    ) == paths.model
    status, out, _ = command("train", "--seed", "7")
    assert (
        status == 0 and pipeline.items() <= hashes(project).items()
    )  # nothing of the pipeline's was touched
    (own,) = set(kept_models(paths)) - set(first)
    assert (
        f"saved {own}" in out
        and f"2 models are kept in {paths.kept}" in out
        and load_checkpoint(own)["config"]["train"]["seed"] == 7
        and newest_model(paths) == own
    )
    status, out, _ = command("backtest", "SIM-USD")
    assert status == 0 and f"SIM-USD: {own}, the newest; the pipeline's is {paths.model}" in out
    listed = command("models")[1]
    assert all(str(p) in listed for p in (own, *first, paths.model)) and listed.count("seed 7") == 1
    before = hashes(paths.kept)
    assert (
        command("train", "--seed", "7")[0] == 0
        and hashes(paths.kept).items() >= {k: v for k, v in before.items() if k.endswith(".pt")}.items()
        and len(kept_models(paths)) == 2
    )  # the same run is one file


def test_a_model_in_the_way_of_another_is_kept(project):
    "One that no training of this project made, such as a colleague's."
    parameters, paths = paths_of(project)
    paths.model.parent.mkdir()
    save_checkpoint({"policy_state_dict": {"x": torch.zeros(3)}}, paths.model)
    digest = sha256_of_file(paths.model)
    train_symbol(parameters, "SIM-USD", paths, "test")
    assert sha256_of_file(paths.model) != digest and digest in map(sha256_of_file, kept_models(paths))


def test_an_earlier_study_of_seeds_is_put_aside(project):
    for seeds in ("2", "3"):
        status, out, _ = command("seeds", "--seeds", seeds)
    report = project / "reports" / "SIM-USD_15Min" / "own"
    assert (
        status == 0
        and f"put aside as {report / 'seeds.1.json'}" in out
        and json.loads((report / "seeds.1.json").read_text())["seeds"] == [0, 1]
        and json.loads((report / "seeds.json").read_text())["seeds"] == [0, 1, 2]
    )


# --- disks --------------------------------------------------------------------------------------------------


def go_on(error: str, *more) -> tuple[int, str, str]:
    "What the line advises."
    return command(*re.search(r"`trading-lib (train [^`]*)`", error)[1].split(), *more)


@pytest.mark.parametrize(
    "blocked",
    [["kept"], ["kept", "runs/SIM-USD_15Min"]],
    ids=["no room for the model", "no room for the run's folder either"],
)
def test_where_the_model_cannot_be_written_the_run_is_saved_and_gone_on_with(
    project, blocked, monkeypatch, tmp_path_factory
):
    "Files stand where folders should be: the system refuses what a full disk would."
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("elsewhere")))
    _, paths = paths_of(project)
    (project / "models" / "runs").mkdir(parents=True)
    for name in blocked:
        (project / "models" / name).write_text("in the way")
    status, out, error = command("train")
    assert (
        status == 2
        and error.count("\n") == 1
        and "the run is complete, and its state saved as" in error
        and str(paths.kept) in error
    )
    for name in blocked:
        (project / "models" / name).unlink()
    status, out, second = go_on(error)
    assert (status, second) == (0, "") and f"saved {paths.kept}" in out

    def facts():
        content = load_checkpoint(kept_models(paths)[0])
        weights = {name: v.tolist() for name, v in content["policy_state_dict"].items()}
        return weights, content["update"], content["metrics"], content["validations"]

    found = facts()
    shutil.rmtree(project / "models")
    assert command("train")[0] == 0 and facts() == found  # as if nothing had been


@contextlib.contextmanager
def largest_file(size: int):
    "The system writes no file beyond that size."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_checkpoints_for_which_there_is_no_room_are_said_and_the_older_ones_stay(tmp_path):
    run, said = RunFolder(tmp_path / "run", keep=1), []
    run.say = said.append

    def content(update, best):
        return {
            "update": update,
            "best_update": best,
            "policy_state_dict": {"x": torch.ones(5000)},
        }

    run.save_best(content(1, 1)), run.save(content(1, 1))
    before = hashes(run.path)
    with largest_file(1000):
        assert run.save_best(content(2, 2)) is None and run.save(content(2, 2)) is None
    assert (
        hashes(run.path) == before
        and len(said) == 3
        and all("cannot be written" in line and "the run goes on" in line for line in said)
    )
    run.save(content(3, 2))  # there is room again: the best policy that it refers to comes first
    assert sorted(p.name for p in run.path.iterdir()) == ["best_000002.pt", "checkpoint_000003.pt"]


def test_curves_and_reports_end_no_run(project):
    "The folder of reports is a file; the model is written all the same."
    shutil.rmtree(project / "reports")
    (project / "reports").write_text("in the way")
    status, out, error = command("train")
    assert (
        (status, error) == (0, "")
        and out.count("training curves cannot be written") == 1
        and "the model is saved all the same" in out
        and "saved " in out
    )


# --- one at a time ------------------------------------------------------------------------------------------


def test_a_second_training_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    run = RunFolder(tmp_path / "runs" / "SIM-USD_15Min")
    held = (
        "import sys, time\n"
        "from trading_lib.training.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).alone():\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", held, str(run.path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    for _ in range(2):  # who is refused leaves the number of the one who holds it
        with (
            pytest.raises(InputError, match=rf"another training is going on there \(process {other.pid}\)"),
            run.alone(wait=0.2),
        ):
            pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock = run.path.with_name("SIM-USD_15Min.lock")
    for _ in range(2):
        with run.alone(wait=0.2):
            assert lock.read_text().strip() == str(os.getpid())
        assert lock.read_bytes() == b""  # a file that says the same after every run, and names nobody


# --- the way on is the way it began -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, says",
    [
        ("trading-lib train SIM-USD", "trading-lib train SIM-USD --resume"),
        ("trading-lib train", "trading-lib train SIM-USD --resume"),
        (
            "trading-lib train SIM-USD SIMA --timesteps 40000 --seed 7",
            "trading-lib train SIM-USD --timesteps 40000 --seed 7 --resume",
        ),
        (
            "trading-lib train --resume SIM-USD --checkpoint 'my models/x.pt' --seed 7",
            "trading-lib train SIM-USD --seed 7 --resume",
        ),
        ("trading-lib stage train --symbol SIM-USD", "trading-lib train SIM-USD --resume"),
    ],
)
def test_the_advice_names_the_options_that_the_run_began_with(command, says):
    trainer = SimpleNamespace(folder=SimpleNamespace(path=Path("runs")))
    advice = partial(how_to_go_on, trainer, ["SIM-USD", "SIMA"], ["SIM-USD"])
    assert advice(Path("runs/model_interrupted_1.pt"), command) == f"`{says}`"
    elsewhere = says.replace("--resume", "--checkpoint /tmp/x/model.pt")
    assert advice(Path("/tmp/x/model.pt"), command) == f"`{elsewhere}`"


def test_a_stage_that_cannot_write_says_so_in_one_line(project):
    "In a process of its own, whose errors are known by their names alone."
    place = project / "data" / "SIM-USD_15Min.npz"
    shutil.copytree(ROOT / "nbs", project / "nbs", dirs_exist_ok=True)
    place.unlink()  # what was prepared before
    place.mkdir()
    status, out, error = command("stage", "prepare", "--symbol", "SIM-USD")
    assert status == 2 and f"{place.name}: cannot be written" in error.splitlines()[-1]
    assert "Traceback" not in error
