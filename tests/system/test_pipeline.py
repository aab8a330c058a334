"""The pipeline as people run it:
real DVC and papermill on fresh clones of the working tree, with small budgets."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from trading_lib.bars import read_bars
from trading_lib.checkpoint import inspect_checkpoint, load_checkpoint
from trading_lib.env import MarketData
from trading_lib.ledger import (
    index_path,
    ledger_path,
    ledger_summary,
    project_trials,
    read_trials,
)
from trading_lib.reporting.registry import index_runs
from trading_lib.sources import simulate_bars

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = Path(
    sys.executable
).parent  # of the environment, which nobody activates: they are called by path, as the README says
SYMBOLS = ["SIM-USD", "SIMA"]  # one that trades round the clock, one with sessions
SMALL = {
    "symbols": SYMBOLS,
    "data.start": "2023-01-01",
    "data.end": "2023-03-10",
    "train.device": "cpu",
    "train.hidden_dims": [16],
    "train.total_timesteps": 1000,
    "train.n_envs": 8,
    "train.n_steps": 64,
    "backtest.random_policies": 20,
}


def edit(path: Path, **changes):
    "Set values in a params.yaml by dotted name."
    document = yaml.safe_load(path.read_text())
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if not key:
            document[section] = value
        elif "." in key:
            document[section][key.split(".")[0]][key.split(".")[1]] = value
        else:
            document[section][key] = value
    path.write_text(yaml.safe_dump(document, sort_keys=False))


@dataclass(frozen=True)
class Tree:
    "A clone of the project, and commands that run its code."

    root: Path

    @property
    def env(self) -> dict:
        person = {
            f"GIT_{who}_{what}": value
            for who in ("AUTHOR", "COMMITTER")
            for what, value in (("NAME", "a"), ("EMAIL", "a@b"))
        }
        return (
            os.environ
            | person
            | {
                "PATH": os.pathsep.join(
                    p for p in os.environ["PATH"].split(os.pathsep) if p != str(COMMANDS)
                ),
                "PYTHONPATH": str(self.root),
                "GIT_CONFIG_GLOBAL": os.devnull,
                "GIT_CONFIG_SYSTEM": os.devnull,
                "DVC_SITE_CACHE_DIR": str(self.root.parent / "site"),
                "JUPYTER_PREFER_ENV_PATH": "1",
                "COLUMNS": "200",
            }
        )

    def run(
        self, *command, fails: bool = False, activated: bool = False, settings: dict | None = None
    ) -> subprocess.CompletedProcess:
        """Run a command in the clone, its environment activated or not;
        it must succeed, or fail if that is what is expected."""
        env = (
            self.env
            | (
                {"PATH": os.pathsep.join([str(self.root / ".venv/bin"), self.env["PATH"]])}
                if activated
                else {}
            )
            | (settings or {})
        )
        command = [COMMANDS / command[0] if (COMMANDS / command[0]).exists() else command[0], *command[1:]]
        done = subprocess.run(
            list(map(str, command)), cwd=self.root, env=env, capture_output=True, text=True, timeout=900
        )
        assert (done.returncode != 0) == fails, (
            f"{command} gave {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        return done

    def clone(self, name: str) -> "Tree":
        self.run("git", "clone", "--quiet", self.root, self.root.parent / name)
        return Tree(self.root.parent / name).with_environment()

    def with_environment(self) -> "Tree":
        "The commands under .venv, where `make install` puts them."
        (self.root / ".venv").mkdir()
        (self.root / ".venv/bin").symlink_to(COMMANDS)
        return self

    def edit(self, **changes):
        edit(self.root / "params.yaml", **changes)

    def stale(self) -> dict[str, list]:
        return json.loads(self.run("dvc", "status", "--json").stdout)

    def lock(self) -> dict:
        return yaml.safe_load((self.root / "dvc.lock").read_text())["stages"]

    def model(self, symbol: str) -> Path:
        return self.root / "models" / f"{symbol}_15Min.pt"

    def report(self, symbol: str) -> Path:
        return self.root / "reports" / f"{symbol}_15Min"

    def files(self) -> dict[str, str]:
        "Hash of every file but executed notebooks and tools' own."
        names = [p.relative_to(self.root) for p in self.root.rglob("*") if p.is_file()]
        own = {".git", ".dvc", "__pycache__", ".ipynb_checkpoints"}
        return {
            str(p): hashlib.md5((self.root / p).read_bytes()).hexdigest()
            for p in names
            if not own & set(p.parts) and p.parts[:2] != ("models", "runs")
        }


# --- what runs beside each other ----------------------------------------------------------------------------


def reproduce_twice(tree: Tree):
    first = tree.run("dvc", "repro")
    before = {
        p: p.stat().st_mtime_ns
        for p in tree.root.rglob("*")
        if p.is_file() and p.parts[len(tree.root.parts)] in ("data", "models", "reports")
    }
    second = tree.run("dvc", "repro")
    after = {p: p.stat().st_mtime_ns for p in before}
    return tree, first.stdout, second.stdout, before == after


def reproduce_one_symbol(tree: Tree):
    return tree, tree.run("dvc", "repro", "report@SIMA").stdout


def walk_forward_of_one(tree: Tree):
    tree.edit(**{"symbols": ["SIM-USD"], "walk_forward.symbols": ["SIM-USD"], "walk_forward.folds": 2})
    first = tree.run("dvc", "repro", "walk_forward").stdout
    return tree, first, tree.run("dvc", "repro", "walk_forward").stdout


def seeds_of_one(tree: Tree):
    tree.edit(**{"symbols": ["SIM-USD"], "seeds.symbols": ["SIM-USD"], "seeds.count": 3})
    first = tree.run("dvc", "repro", "seeds").stdout
    return (
        tree,
        first,
        tree.run("dvc", "repro", "seeds").stdout,
        tree.run("dvc", "metrics", "show", "--json").stdout,
    )


def papermill_on_a_bare_clone(tree: Tree):
    asked = ("-p", "mode", "quick_test", "-p", "total_timesteps", "1000", "-p", "hidden_dims", "[8]")
    with_output = tree.run("papermill", "nbs/train.ipynb", "models/runs/train.ipynb", *asked)
    elsewhere = tree.root / "elsewhere"
    without_output = tree.run("papermill", "nbs/train.ipynb", *asked, "-p", "out_dir", elsewhere)
    return tree, with_output, without_output, elsewhere


def papermill_with_a_misspelt_name(tree: Tree):
    return tree, tree.run(
        "papermill",
        "nbs/train.ipynb",
        "models/runs/train.ipynb",
        "-p",
        "mode",
        "quick_test",
        "-p",
        "hiden_dims",
        "[8]",
        fails=True,
    )


def break_the_code(tree: Tree):
    path = tree.root / "trading_lib" / "pipeline" / "prepare.py"
    text = path.read_text()
    assert text.count("    write_bars(bars, paths.bars)\n") == 1
    path.write_text(
        text.replace(
            "    write_bars(bars, paths.bars)\n", "    raise ZeroDivisionError('broken on purpose')\n"
        )
    )
    tree.run("dvc", "repro", "find@SIM-USD")
    before = tree.files()
    return tree, before, tree.run("dvc", "repro", "prepare@SIM-USD", fails=True)


def own_bars() -> dict[str, pd.DataFrame]:
    return {
        "OWN-USD": simulate_bars("SIM-USD", "15Min", "2023-01-01", "2023-01-13", seed=3),
        "OWN": simulate_bars("SIMA", "15Min", "2023-01-01", "2023-03-08", seed=3),
    }


def prepare_own_files(tree: Tree):
    bars, raw = own_bars(), tree.root / "data" / "raw"
    tree.edit(**{"symbols": list(bars), "data.source": "files", "data.start": None, "data.end": None})
    bars["OWN-USD"].to_csv(raw / "OWN-USD.csv", index_label="timestamp")
    bars["OWN"].reset_index(names="timestamp").to_parquet(raw / "OWN.parquet", index=False)
    tree.run("dvc", "repro", "prepare")
    made = {
        s: (
            read_bars(tree.root / "data" / f"{s}_15Min.parquet"),
            json.loads((tree.report(s) / "data.json").read_text()),
        )
        for s in bars
    }
    stale = [tree.stale()]
    (raw / "OWN-USD.csv").touch()
    shutil.copy(raw / "OWN-USD.csv", raw / "OTHER.csv")
    stale.append(tree.stale())
    bars["OWN-USD"].iloc[:-1].to_csv(raw / "OWN-USD.csv", index_label="timestamp")
    stale.append(tree.stale())
    again = tree.run("dvc", "repro", "prepare@OWN-USD").stdout
    for command in (
        ("rm", "--cached", "--quiet", "data/raw/.gitignore"),
        ("commit", "--quiet", "--no-verify", "-m", "bars are on another disk"),
    ):
        tree.run("git", *command)  # as CONTRIBUTING says
    (raw / ".gitignore").unlink()
    kept = {path.name: path.read_bytes() for path in raw.iterdir()}
    # bars on another disk, and an edit of params.yaml before an experiment
    raw.rename(tree.root.parent / "disk")
    raw.symlink_to(tree.root.parent / "disk")
    git = tree.run("git", "status", "--porcelain").stdout
    tree.edit(**{"train.seed": 7})
    experiment = tree.run("dvc", "exp", "run", "-S", "backtest.seed=5", "prepare").stdout
    elsewhere = tree.run(
        "dvc", "exp", "run", "--temp", "-S", "data.train_fraction=0.69", "prepare@OWN-USD", activated=True
    ).stdout
    there = {path.name: path.read_bytes() for path in (tree.root.parent / "disk").iterdir()}
    return (
        tree,
        made,
        [{name for name in s if name.startswith("prepare")} for s in stale],
        again,
        (kept, there, git, experiment, elsewhere),
    )


def name_a_shell_would_run(tree: Tree):
    tree.edit(symbols=["A;touch made", "$(touch made)"])
    return tree, tree.run("dvc", "repro", "--keep-going", "prepare", fails=True)


def a_persons_own_settings(tree: Tree):
    """Startup files with variables, a matplotlibrc that needs LaTeX,
    a kernel python3 that is another program, a notebook that was saved with another kernel."""
    home = tree.root.parent / "home"
    for name, text in {
        "rc.py": "histfile = '~/.history'\n",
        ".ipython/profile_default/startup/00-mine.py": "DATA_DIR = '/data'\n",
        ".config/matplotlib/matplotlibrc": "text.usetex: True\n",
        ".local/share/jupyter/kernels/python3/kernel.json": json.dumps(
            {"argv": ["false"], "display_name": "mine", "language": "python"}
        ),
    }.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    settings = {
        "HOME": str(home),
        "PYTHONSTARTUP": str(home / "rc.py"),
        "IPYTHONDIR": str(home / ".ipython"),
        "XDG_CONFIG_HOME": str(home / ".config"),
    }
    papermill = tree.run(
        "papermill", "nbs/prepare.ipynb", "-p", "out_dir", tree.root / "elsewhere", settings=settings
    )
    notebook = tree.root / "nbs" / "prepare.ipynb"
    content = json.loads(notebook.read_text())
    content["metadata"]["kernelspec"] = {"name": "nobody", "display_name": "nobody", "language": "python"}
    notebook.write_text(json.dumps(content))
    stage = tree.run(
        "trading-lib",
        "stage",
        "prepare",
        "--symbol",
        "SIM-USD",
        settings=settings | {"JUPYTER_PREFER_ENV_PATH": "0"},
    )
    return tree, papermill, stage


HEADER, ROW = "timestamp,open,high,low,close,volume\n", "2023-01-01T00:{:02}:00Z,1,2,1,{},5\n"
CARELESS = {  # what was done -> stage, parameters, the person's file, words of the answer
    "missing file": (
        "prepare",
        {"data.source": "files"},
        None,
        ["files: found none of", "data/raw/{SIM-USD,", "put the file in one of these places"],
    ),
    "CSV without a header": (
        "prepare",
        {"data.source": "files"},
        ROW.format(0, 2) + ROW.format(15, 2),
        ["SIM-USD.csv", "is no header", f"add a first line such as {HEADER.strip()}"],
    ),
    "NaN price": (
        "prepare",
        {"data.source": "files"},
        HEADER + ROW.format(0, 2) + ROW.format(15, "nan"),
        ["SIM-USD.csv", "2023-01-01 00:15", "close is missing", "remove the row"],
    ),
    "unknown mode": (
        "train",
        {"train.mode": "quick_tset"},
        None,
        ["train.mode", "'quick_tset'", "did you mean 'quick_test'?"],
    ),
    "hidden_dims as text": (
        "train",
        {"train.hidden_dims": "wide"},
        None,
        ["train.hidden_dims", "a list such as [256, 128]", "was 'wide'"],
    ),
    "window longer than the data": (
        "prepare",
        {"features.window": 100_000},
        None,
        ["6528 bars", "window of 100000", "use more history"],
    ),
}


def be_careless(tree: Tree, stage: str, parameters: dict, file: str | None):
    tree.edit(**parameters)
    if file:
        (tree.root / "data" / "raw" / "SIM-USD.csv").write_text(file)
    for name in (
        "data/SIM-USD_15Min.parquet",
        "data/SIM-USD_15Min.npz",
        "models/SIM-USD_15Min.pt",
        "models/SIM-USD_15Min_last.pt",
    ):
        (tree.root / name).write_text("of an earlier run")
    before = tree.files()
    done = tree.run("trading-lib", "stage", stage, "--symbol", "SIM-USD", fails=True)
    return before, tree.files(), done, tree.root / "models" / "runs" / f"{stage}-SIM-USD.ipynb"


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Tree:
    "The working tree as it is now, committed, with small budgets."
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository here")
    tree = Tree(tmp_path_factory.mktemp("pipeline") / "origin")
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree.root / name)
    tree.edit(**SMALL)
    for command in (
        ("init", "--quiet"),
        ("add", "--all"),
        ("commit", "--quiet", "--no-verify", "-m", "as it is"),
    ):
        tree.run("git", *command)
    return tree.with_environment()


@pytest.fixture(scope="module")
def job(origin, request):
    """Runs in clones of their own, named;
    two at a time, all of them ahead of the tests when the whole file is run."""
    work = {
        "first": (reproduce_twice,),
        "second": (reproduce_one_symbol,),
        "walk forward": (walk_forward_of_one,),
        "seeds": (seeds_of_one,),
        "papermill": (papermill_on_a_bare_clone,),
        "misspelt": (papermill_with_a_misspelt_name,),
        "own files": (prepare_own_files,),
    }
    work |= {
        name: (be_careless, stage, parameters, file)
        for name, (stage, parameters, file, _) in CARELESS.items()
    } | {
        "broken": (break_the_code,),
        "shell": (name_a_shell_would_run,),
        "settings": (a_persons_own_settings,),
    }
    pool, started = ThreadPoolExecutor(2), {}

    def start(name):
        run, *rest = work[name]
        if name not in started:
            started[name] = pool.submit(run, origin.clone(name.replace(" ", "_")), *rest)
        return started[name]

    if sum(item.path == request.path for item in request.session.items) > 2 * len(work):
        for name in work:
            start(name)
    yield lambda name: start(name).result()
    pool.shutdown(cancel_futures=True)


# --- a fresh clone ------------------------------------------------------------------------------------------


def test_commands_run_the_clones_own_code(origin):
    file, found = origin.run(
        "python",
        "-c",
        "import trading_lib as t, shutil; print(t.__file__); print(shutil.which('trading-lib'))",
    ).stdout.split()
    assert Path(file).is_relative_to(origin.root) and found == "None", (
        "the stages must find their command although no environment is activated"
    )


@pytest.mark.slow
def test_repro_runs_three_stages_for_each_symbol(job):
    tree, said, *_ = job("first")
    for symbol in SYMBOLS:
        places = [
            said.index(f"Running stage '{stage}@{symbol}'")
            for stage in ("prepare", "train", "backtest", "report")
        ]
        assert places == sorted(places)
    assert set(tree.lock()) == both("find", "prepare", "train", "backtest", "report", "verdict")
    assert tree.stale() == {}


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_every_artefact_can_be_read(job, symbol):
    tree, *_ = job("first")
    bars, market = (
        read_bars(tree.root / "data" / f"{symbol}_15Min.parquet"),
        MarketData.load(tree.root / "data" / f"{symbol}_15Min.npz"),
    )
    assert len(bars) == len(market.timestamp) and market.symbol == symbol and np.isfinite(market.prices).all()
    pd.testing.assert_frame_equal(
        bars,
        simulate_bars(symbol, "15Min", SMALL["data.start"], SMALL["data.end"], seed=0, edge=0.2),
        check_freq=False,
    )
    best, last = (
        load_checkpoint(tree.model(symbol)),
        load_checkpoint(tree.root / "models" / f"{symbol}_15Min_last.pt"),
    )
    assert (
        best["update"] <= last["update"] == 2
        and last["global_step"] == 2 * 8 * 64
        and inspect_checkpoint(tree.model(symbol))["hidden_dims"] == [16]
    )
    assert best["data"]["sha256"] == market.fingerprint["sha256"] and best["git"] == {
        "commit": tree.run("git", "rev-parse", "HEAD").stdout.strip(),
        "dirty": False,
    }
    folder = tree.report(symbol)
    numbers = [
        json.loads((folder / name).read_text()) for name in ("data.json", "train.json", "metrics.json")
    ]
    assert (
        numbers[0]["fingerprint"]["bars"] == len(bars)
        and numbers[1]["timesteps"] == 1024
        and numbers[2]["agent"]["costs"] >= 0
    )
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("train", "equity", "actions", "trades")}
    assert (
        len(tables["train"]) == 2
        and len(tables["actions"]) > 100
        and (tables["equity"]["agent"] > 0).all()
        and math.isclose(tables["equity"]["agent"].iloc[-1], 1000 + numbers[2]["agent"]["net_profit"])
    )
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("data.png", "backtest.png"))
    page = (folder / "report.html").read_text()
    said, trials = (
        json.loads((folder / "verdict.json").read_text()),
        read_trials(ledger_path(tree.root, symbol)),
    )
    assert (
        "Simulated data." in page
        and market.fingerprint["sha256"] in page
        and said["headline"].split(":")[0] == symbol
        and f"<b>{said['verdict']}</b>" in page
    )
    assert (
        set(numbers[2]["baselines"]) >= {"ridge", "boosting", "oracle", "moving_average_cross"}
        and len(numbers[2]["stress"]) == 7
        and 1 <= len(numbers[2]["capacity"]) <= 6
    )
    # one run, every validated checkpoint of it
    everything = project_trials(tree.root)
    assert (
        said["trials"]["n_runs"] == said["trials"]["n_symbols"] == len(SYMBOLS)
        and said["trials"]["n_trials"] == sum(map(len, everything.values()))
        and len(trials) == int(tables["train"]["validation_score"].notna().sum())
        and {t["seed"] for t in trials} == {0}
    )
    (run,) = index_runs(index_path(tree.root))[SYMBOLS.index(symbol) :: len(SYMBOLS)]
    assert (
        run["symbol"] == symbol
        and run["model_sha256"] == hashlib.sha256(tree.model(symbol).read_bytes()).hexdigest()
        and run["verdict"] == said["verdict"]
    )
    for path in (folder / "report.html", folder / "data.json", tree.model(symbol)):
        assert str(tree.root).encode() not in path.read_bytes()
    for stage in ("prepare", "train", "backtest", "report"):
        assert json.loads((tree.root / "models" / "runs" / f"{stage}-{symbol}.ipynb").read_text())["cells"]


def test_the_verdict_names_every_symbol(job):
    tree, *_ = job("first")
    lines = tree.run("trading-lib", "verdict").stdout.splitlines()
    named = [line for line in lines if not line.startswith("  ")]
    assert [line.split(":")[0] for line in named] == ["Report", "Verdict"] * 2 and len(lines) > len(
        named
    )  # reasons are indented
    for symbol, line in zip(SYMBOLS, named[1::2]):
        assert (
            re.match(rf"Verdict: SMOKE TEST\. {symbol}: agent .* simulated ", line)
            and "buy-and-hold" in line
            and "cash" in line
        )


def test_a_second_repro_does_nothing(job):
    _, _, said, untouched = job("first")
    assert "Running stage" not in said and "up to date" in said and untouched


def test_two_clones_make_the_same_bytes(job):
    first, second = job("first")[0], job("second")[0]
    made = second.lock()
    assert set(made) == {f"{stage}@SIMA" for stage in ("find", "prepare", "train", "backtest", "report")}
    for stage in set(made) - {"report@SIMA"}:
        assert made[stage] == first.lock()[stage], stage  # the report counts what was tried on other symbols
    assert first.model("SIMA").read_bytes() == second.model("SIMA").read_bytes()


def test_nothing_made_by_the_pipeline_is_offered_to_git(job):
    tree, *_ = job("first")
    offered = {
        line
        for line in tree.run("git", "status", "--porcelain").stdout.splitlines()
        if not line.endswith("dvc.lock")
    }  # that is for the person to decide
    assert all(line.startswith("?? ledger/") for line in offered), "what was tried travels with the project"


def test_a_walk_forward_is_a_stage_of_its_own(job):
    """For those that ask for it: every fold is trained anew, counted in the ledger, and told on a page;
    the second time nothing runs."""
    tree, said, again = job("walk forward")
    assert (
        "Running stage 'prepare@SIM-USD'" in said
        and "Running stage 'walk_forward@SIM-USD'" in said
        and "train@" not in said
        and "Running stage" not in again
    )
    table, told = (
        pd.read_csv(tree.report("SIM-USD") / "walk_forward.csv"),
        json.loads((tree.report("SIM-USD") / "walk_forward.json").read_text()),
    )
    trials = read_trials(ledger_path(tree.root, "SIM-USD"))
    assert (
        len(table) == 2
        and ledger_summary(trials)["n_runs"] == 2
        and len({tuple(t["span"]) for t in trials}) == 2
        and "Simulated" in (tree.report("SIM-USD") / "walk_forward.html").read_text()
    )
    (figures,) = told["metrics"].values()
    assert math.isclose(figures["total_return"], np.prod(1 + table["return"]) - 1, rel_tol=1e-9)


def test_a_study_of_seeds_is_a_stage_of_its_own(job):
    """For those that ask for it: means with intervals among the metrics, a picture,
    every checkpoint in the ledger, and no model; the second time nothing runs."""
    tree, said, again, metrics = job("seeds")
    assert (
        "Running stage 'prepare@SIM-USD'" in said
        and "Running stage 'seeds@SIM-USD'" in said
        and "train@" not in said
        and "Running stage" not in again
    )
    told, trials = (
        json.loads((tree.report("SIM-USD") / "seeds.json").read_text()),
        read_trials(ledger_path(tree.root, "SIM-USD")),
    )
    shown = json.loads(metrics)[""]["data"]["reports/SIM-USD_15Min/compared/seeds.json"]["data"]
    values = told["validation"]["sharpe"]["seeds"]
    assert (
        told["seeds"] == [0, 1, 2]
        and len(values) == 3
        and {t["seed"] for t in trials} == {0, 1, 2}
        and not list((tree.root / "models").rglob("*.pt"))
    )
    assert (
        math.isclose(shown["seeds_sharpe"], np.mean(values), rel_tol=1e-9)
        and shown["seeds_sharpe_low"] < shown["seeds_sharpe"] < shown["seeds_sharpe_high"]
    )
    assert "95 % interval" in shown_in(
        json.loads((tree.root / "models/runs/seeds-SIM-USD.ipynb").read_text())
    ) and (tree.report("SIM-USD") / "seeds.png").read_bytes().startswith(b"\x89PNG")


def test_a_repro_without_a_wish_walks_nobody_forward(job):
    tree, said, *_ = job("first")
    assert (
        "walk_forward" not in said
        and "seeds@" not in said
        and not list(tree.root.rglob("walk_forward.json"))
        and not list(tree.root.rglob("seeds.json"))
    )


# --- what makes which stage stale ---------------------------------------------------------------------------


def shown_in(notebook: dict) -> str:
    "All text of a notebook's outputs."
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    return "".join(
        "".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", "")) for o in outputs
    )


def both(*stages):
    return {f"{stage}@{symbol}" for stage in stages for symbol in SYMBOLS}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"modes.standard.total_timesteps": 1}, set()),
        ({"modes.quick_test.validation_interval": 1}, both("train")),
        ({"train.hidden_dims": [8, 8]}, both("train")),
        ({"env.episode_length": 128}, both("train")),
        ({"backtest.random_policies": 21}, both("backtest")),
        ({"account.costs": "zero"}, both("train", "backtest")),
        ({"data.seed": 1}, both("prepare", "backtest")),
        ({"features.window": 50}, both("prepare", "train", "backtest")),
        (
            {"symbols": [*SYMBOLS, "SIMB"]},
            {f"{stage}@SIMB" for stage in ("find", "prepare", "train", "backtest", "report", "verdict")},
        ),
        ({"symbols": SYMBOLS[:1]}, set()),
    ],
    ids=lambda v: ", ".join(v) if isinstance(v, dict) else None,
)
def test_an_edit_makes_stale_what_reads_it(job, change, expected):
    tree, *_ = job("first")
    text = (tree.root / "params.yaml").read_text()
    try:
        tree.edit(**change)
        assert (
            set(tree.stale()) == expected
        )  # those that follow from these are stale when their inputs have changed
    finally:
        (tree.root / "params.yaml").write_text(text)


def test_an_unknown_mode_stops_repro_and_what_was_made_can_be_had_again(job):
    tree, *_ = job("first")
    text, before = (tree.root / "params.yaml").read_text(), tree.files()
    try:
        tree.edit(**{"train.mode": "quick_tset"})
        said = tree.run(
            "dvc", "repro", fails=True
        ).stderr  # DVC's own line: it looks the mode's budget up before the stage starts
        assert "modes.quick_tset" in said and "params.yaml" in said and "Traceback" not in said
    finally:
        (tree.root / "params.yaml").write_text(text)
    assert tree.files().items() <= before.items()  # DVC puts the outputs of a failed stage away …
    tree.run("dvc", "checkout")
    assert tree.files() == before and tree.stale() == {}  # … and keeps them


def test_a_notebook_run_in_jupyter_is_up_to_date_once_cleaned(job):
    tree, *_ = job("first")
    before = tree.files()
    tree.run("jupyter", "nbconvert", "--execute", "--inplace", "nbs/train.ipynb")
    ran = json.loads((tree.root / "nbs" / "train.ipynb").read_text())
    assert "saved" in shown_in(ran) and set(tree.stale()) == both("train")
    tree.run("jupyter", "nbconvert", "--clear-output", "--inplace", "nbs/train.ipynb")
    tree.run("nbdev_clean")
    assert tree.stale() == {} and tree.files() == before


# --- DVC's commands -----------------------------------------------------------------------------------------


def test_metrics_and_plots_are_shown(job):
    tree, *_ = job("first")
    shown = json.loads(tree.run("dvc", "metrics", "show", "--json").stdout)[""]["data"]
    assert set(shown) == {
        f"reports/{s}_15Min/{name}.json"
        for s in SYMBOLS
        for name in ("compared/train", "compared/backtest", "compared/report")
    }
    written = json.loads((tree.report("SIMA") / "metrics.json").read_text())
    compared = {
        "total_return": written["agent"]["total_return"],
        "sharpe": written["agent"]["sharpe"],
        "trades": written["agent"]["trades"],
        "buy_and_hold": written["baselines"]["buy_and_hold"],
    }
    assert compared.items() <= shown["reports/SIMA_15Min/compared/backtest.json"]["data"].items() and sum(
        len(file["data"]) for file in shown.values()
    ) <= 10 * len(SYMBOLS)
    tree.run("dvc", "plots", "show", "--out", tree.root / "plots")
    page = (tree.root / "plots" / "index.html").read_text()
    for words in ("SIMA_15Min", "equity of the agent", "reward per step", "backtest.png", "data.png"):
        assert words in page
    assert {p.suffix for p in (tree.root / "plots" / "static").iterdir()} == {".png"}
    shutil.rmtree(tree.root / "plots")


def test_an_experiment_trains_another_shape(job):
    tree, *_ = job("second")
    prepared = tree.lock()["prepare@SIMA"]
    said = tree.run(
        "dvc", "exp", "run", "--name", "smaller", "-S", "train.hidden_dims=[8,8]", "backtest@SIMA"
    ).stdout
    assert (
        "Stage 'prepare@SIMA' didn't change" in said
        and "Running stage 'train@SIMA'" in said
        and "Running stage 'backtest@SIMA'" in said
    )
    facts = inspect_checkpoint(tree.model("SIMA"))
    assert facts["hidden_dims"] == [8, 8] and list(facts["config"]["train"]["hidden_dims"]) == [8, 8]
    assert tree.lock()["prepare@SIMA"] == prepared and tree.lock()["train@SIMA"]["params"]["params.yaml"][
        "train"
    ]["hidden_dims"] == [8, 8]
    assert json.loads(tree.run("dvc", "params", "diff", "--json").stdout) == {
        "params.yaml": {"train.hidden_dims": {"old": "[16]", "new": "[8, 8]"}}
    }
    table = tree.run("dvc", "exp", "show", "--csv").stdout
    assert (
        "smaller" in table
        and '"[8, 8]"' in table
        and "train.hidden_dims" in table
        and "total_return" in table
    )


# --- papermill ----------------------------------------------------------------------------------------------


def test_papermill_trains_on_a_bare_clone_with_and_without_an_output_path(job):
    tree, with_output, without_output, elsewhere = job("papermill")
    kept, printed = (
        json.loads((tree.root / "models" / "runs" / "train.ipynb").read_text()),
        json.loads(without_output.stdout),
    )
    for notebook in (kept, printed):
        assert notebook["cells"][-1]["outputs"] and not any(
            o["output_type"] == "error" for c in notebook["cells"] for o in c.get("outputs", [])
        )
    assert (
        inspect_checkpoint(tree.model("SIM-USD"))["hidden_dims"] == [8]
        and load_checkpoint(tree.model("SIM-USD"))["config"]["train"]["total_timesteps"] == 1000
    )
    assert "unknown parameter" not in (with_output.stderr + without_output.stderr).lower()
    there, here = (
        {
            str(p.relative_to(r)): p.read_bytes()
            for f in ("data", "models", "reports")
            for p in (r / f).rglob("SIM-USD*/*" if f == "reports" else "SIM-USD*")
            if p.is_file()
        }
        for r in (elsewhere, tree.root)
    )
    assert there == here and len(there) >= 6  # the same bytes wherever they are written
    # what was looked at counts wherever it is written: the second run is known to the project's own ledger
    n = len(read_trials(ledger_path(tree.root, "SIM-USD")))
    said = shown_in(printed)
    assert (
        n > 0
        and f"ledger of SIM-USD: 0 new trials, {n} in all" in said
        and not (elsewhere / "ledger").exists()
    )


def test_papermill_refuses_a_misspelt_parameter(job):
    tree, done = job("misspelt")
    assert "unknown name 'hiden_dims'; did you mean 'hidden_dims'?" in done.stderr
    assert not tree.model("SIM-USD").exists() and not tree.report("SIM-USD").exists()


# --- files of one's own -------------------------------------------------------------------------------------


def test_csv_and_parquet_are_prepared_as_they_were_written(job):
    _, made, *_ = job("own files")
    for symbol, written in own_bars().items():
        bars, report = made[symbol]
        pd.testing.assert_frame_equal(bars, written, check_freq=False, rtol=1e-12)
        assert (
            report["source"] == "files"
            and report["checks"]["simulated"] is False
            and report["fingerprint"]["bars"] == len(written)
        )


def test_new_content_of_a_file_prepares_again_and_a_new_date_or_another_file_does_not(job):
    tree, made, stale, said, _ = job("own files")
    assert (
        stale[0] == stale[1] == set()
        and "prepare@OWN-USD" in stale[2]
        and "Running stage 'prepare@OWN-USD'" in said
    )
    assert len(read_bars(tree.root / "data" / "OWN-USD_15Min.parquet")) == len(made["OWN-USD"][0]) - 1


def test_bars_on_another_disk_and_edits_of_params_yaml_survive_experiments(job):
    """In the workspace and in a copy that DVC makes, which has no data/raw of its own;
    and no file of the person's is changed."""
    tree, _, _, _, (kept, there, git, experiment, elsewhere) = job("own files")
    assert (
        kept == there
        and (tree.root / "data" / "raw").is_symlink()
        and set(git.splitlines()) <= {" M params.yaml", "?? dvc.lock"}
    )
    parameters = yaml.safe_load((tree.root / "params.yaml").read_text())
    assert (parameters["train"]["seed"], parameters["backtest"]["seed"]) == (7, 5) and tree.run(
        "git", "stash", "list"
    ).stdout == ""
    assert (
        "Ran experiment(s)" in experiment
        and "Ran experiment(s)" in elsewhere
        and not (
            tree.root
            / ".dvc"
            / "cache"
            / "files"
            / "md5"
            / hashlib.md5(kept["OWN-USD.csv"]).hexdigest()[:2]
            / hashlib.md5(kept["OWN-USD.csv"]).hexdigest()[2:]
        ).exists()
    )


def test_symbols_that_are_not_listed_for_a_while_lose_nothing(job):
    """DVC's checkout, with which every experiment begins, deletes what it wrote for stages that are gone;
    the last stage of a chain holds it."""
    tree, *_ = job("second")
    tree.run("dvc", "repro", "verdict@SIMA")
    text, before = (tree.root / "params.yaml").read_text(), tree.files()
    assert tree.model("SIMA").exists()
    try:
        tree.edit(symbols=["SIM-USD"])
        tree.run("dvc", "checkout", "--allow-missing")
        assert tree.files() | {"params.yaml": None} == before | {"params.yaml": None}
    finally:
        (tree.root / "params.yaml").write_text(text)


# --- a sweep ------------------------------------------------------------------------------------------------


@pytest.mark.proof
def test_a_sweep_of_eight_runs_is_counted_as_eight(origin):
    """`dvc exp run` over eight seeds, queued in copies of the project: eight runs and all their
    checkpoints are in the ledger; the report of the next repro discounts them all."""
    tree = origin.clone("sweep")
    tree.edit(symbols=["SIM-USD"])
    for command in (("add", "--all"), ("commit", "--quiet", "--no-verify", "-m", "one symbol")):
        tree.run("git", *command)
    tree.run(
        "dvc", "exp", "run", "--queue", "-S", "train.seed=1,2,3,4,5,6,7,8", "train@SIM-USD", activated=True
    )
    # DVC starts the workers of its queue by the name dvc, and waits for ever where there is none
    print(tree.run("dvc", "exp", "run", "--run-all", "--jobs", "2", activated=True).stdout[-500:])
    trials = read_trials(ledger_path(tree.root, "SIM-USD"))
    counted = ledger_summary(trials)
    print(counted)
    assert (
        counted["n_runs"] == counted["n_seeds"] == 8
        and counted["n_parameter_sets"] == 1
        and counted["n_trials"] == counted["n_checkpoints"] >= 16
    )
    tree.run("dvc", "repro", "report@SIM-USD")  # seed 0: the ninth run
    said = json.loads((tree.report("SIM-USD") / "verdict.json").read_text())
    assert (
        said["trials"]["n_runs"] == 9
        and said["trials"]["n_trials"]
        == len(read_trials(ledger_path(tree.root, "SIM-USD")))
        > counted["n_trials"]
    )


# --- when something is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CARELESS)
def test_a_careless_input_gets_one_line_and_leaves_nothing_behind(job, name):
    before, after, done, notebook = job(name)
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: ") and done.stderr.splitlines()[-1] == errors[0]
    for words in CARELESS[name][3]:
        assert words in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert after == before
    assert notebook.exists() == (
        name not in ("unknown mode", "hidden_dims as text")
    )  # parameters are read before a kernel is started
    print(f"{name:28} {errors[0]}")


def test_no_symbol_of_params_yaml_is_run_by_a_shell(job):
    tree, done = job("shell")
    assert not (tree.root / "made").exists()
    assert done.stderr.count("error: ") == 2 and "Traceback" not in done.stderr


def test_stages_do_not_read_a_persons_own_settings(job):
    tree, papermill, stage = job("settings")
    made = [
        {p.name: p.read_bytes() for p in (root / "reports" / "SIM-USD_15Min").iterdir() if p.is_file()}
        for root in (tree.root, tree.root / "elsewhere")
    ]
    assert made[0] == made[1] and set(made[0]) == {"data.json", "bars.json", "bars.png", "data.png"}


def test_a_failed_notebook_fails_its_stage_and_is_kept(job):
    tree, before, done = job("broken")
    assert "failed to reproduce 'prepare@SIM-USD'" in done.stderr
    outputs = [
        o
        for c in json.loads((tree.root / "models" / "runs" / "prepare-SIM-USD.ipynb").read_text())["cells"]
        for o in c.get("outputs", [])
    ]
    assert [(o["ename"], o["evalue"]) for o in outputs if o["output_type"] == "error"] == [
        ("ZeroDivisionError", "broken on purpose")
    ]  # the clone's code ran in the kernel
    assert tree.files() == before
