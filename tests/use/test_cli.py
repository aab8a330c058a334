"""The command line: options are written in full, each says what it is, mistakes are one line,
and whoever listens need not listen to the end."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from prepared import prepare
from test_pipeline import edit

from trading_lib import cli
from trading_lib.checkpoint import load_checkpoint, save_checkpoint
from trading_lib.cli import COMMANDS, main
from trading_lib.commands.training import torchrun_command, train_parameters
from trading_lib.config import PARAMETERS_VARIABLE, TrainParameters


@pytest.fixture
def prepared(project):
    "The same, with its bars prepared."
    prepare()
    return project


def said(capsys, *arguments) -> tuple[int, str]:
    "Exit status, and the one line on standard error."
    status, line = main(list(arguments)), capsys.readouterr().err
    assert line.count("\n") <= 1 and "Traceback" not in line, line
    return status, line.strip()


def parameters(*options):
    "What `trading-lib train` would train with."
    return train_parameters(cli._chosen(["train", *options])).train


def process(*arguments, **environment):
    "The command as a process of its own."
    return [
        sys.executable,
        "-c",
        "import sys; from trading_lib.cli import main; sys.exit(main())",
        *arguments,
    ], {**os.environ, "OMP_NUM_THREADS": "1", **environment}


# --- options ------------------------------------------------------------------------------------------------


def test_every_option_says_what_it_is_and_every_command_has_an_example(capsys):
    for name, command in COMMANDS.items():
        assert command.help
        for flags, settings in command.arguments:
            assert settings.get("help"), (name, flags)
        with pytest.raises(SystemExit) as e:
            main([*name.split(), "--help"])
        assert e.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"Example: trading-lib {name}" in shown and "--config FILE" in shown
        if command.example:
            cli._chosen([*name.split(), *command.example.split()])  # its options exist


def test_every_setting_of_training_has_an_option_of_its_name():
    for command in ("train", "seeds", "preflight"):
        names = {how.get("dest"): flags for flags, how in COMMANDS[command].arguments}
        for f in fields(TrainParameters):
            assert f"--{f.name.replace('_', '-')}" in names[f.name], f.name


@pytest.mark.parametrize(
    "options, field, value",
    [
        ("--hidden-dim 64 --network gru", "gru_hidden_dim", 64),
        ("--gru-hidden-dim 64 --network gru", "gru_hidden_dim", 64),
        ("--hidden-dims 64", "hidden_dims", [64]),
        ("--hidden-dims [64,32]", "hidden_dims", [64, 32]),
        ("--n-gru-layers 3 --network gru", "n_gru_layers", 3),
        ("--dropout 0.2 --network gru", "dropout", 0.2),
        ("--batch-size 512", "minibatch_size", 512),
        ("--minibatch-size 512", "minibatch_size", 512),
        ("--no-amp", "amp", False),
        ("--amp", "amp", True),
        ("--no-compile", "compile", False),
        ("--gae-lambda 0.9", "gae_lambda", 0.9),
        ("--learning-rate 3e-4", "learning_rate", 3e-4),
        ("--mode auto", "mode", "auto"),
        ("--warmup-fraction 0", "warmup_fraction", 0.0),
        ("--min-lr-fraction 0.1", "min_lr_fraction", 0.1),
        ("--timesteps 1e6", "total_timesteps", 1_000_000),
        ("--total-timesteps 5", "total_timesteps", 5),
        ("--no-recovery", "recovery", False),
        ("--amp-dtype fp16", "amp_dtype", "fp16"),
    ],
)
def test_an_option_sets_its_field(project, options, field, value):
    assert getattr(parameters(*options.split()), field) == value


def test_a_duration_of_the_command_line_takes_the_place_of_the_files(project):
    assert (
        parameters().total_timesteps == 512
        and parameters("--iterations", "3").total_timesteps is None
        and parameters("--iterations", "3").iterations == 3
    )


MISTAKES = {
    "train --hidden-dim 64": (
        "--hidden-dim: is of a recurrent policy; add --network gru, or name the layers of an mlp by "
        "--hidden-dims"
    ),
    "train --hidden-dim 64,32 --network gru": (
        "train.gru_hidden_dim: expected a whole number or null, was '64,32'"
    ),
    "train --see 3": "trading-lib train: unknown option '--see'; did you mean --seed?",
    "train --hiden-dims=3": "did you mean --hidden-dims?",
    "train --verb": "unknown option '--verb'",
    "seeds --seed many": "train.seed: expected a whole number, was 'many'",
    "seeds --seeds many": "trading-lib seeds: argument --seeds: invalid int value: 'many'",
    "train --learning-rate": "argument --learning-rate: expected one argument",
    "trian": "invalid choice: 'trian'",
    "": "the following arguments are required: COMMAND",
    "data": "the following arguments are required: COMMAND",
    "data chekc": "invalid choice: 'chekc'",
    "stage prepare --symb SIM-USD": "unknown option '--symb'; did you mean --symbol?",
    "inspect": "required: file",
    "deploy SIM-USD more": "unknown argument 'more'",
    "verdict --config nothing.yaml": "--config: nothing.yaml: no such file",
    "--config nothing.yaml verdict": "--config: nothing.yaml: no such file",
    "verdict --config .": "is a folder",
    "verdict --config ~nobody-of-that-name/x": "no such home folder",
    "train": "SIM-USD_15Min.npz is missing, its bars are not prepared; "
    "run `trading-lib stage prepare --symbol SIM-USD`",
    "train SIM-USD --dropout 1 --network gru": "train.dropout: expected 0 or more and less than 1, was 1.0",
    "train --no-amp=5": "ignored explicit argument '5'",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(project, capsys, line):
    status, answer = said(capsys, *line.split())
    assert status == 2 and answer.startswith("error: ") and MISTAKES[line] in answer, answer


# --- another file of parameters -----------------------------------------------------------------------------


def test_any_command_takes_another_file_of_parameters(project, capsys, monkeypatch):
    (project / "own").mkdir()
    shutil.copy("params.yaml", "own/other.yaml")
    edit(project / "own" / "other.yaml", symbols=["SIMA"])
    for line in (
        ["verdict", "--config", "own/other.yaml"],
        ["--config", "own/other.yaml", "verdict"],
        ["verdict", f"--config={project}/own/other.yaml"],
    ):
        assert (
            main(line) == 0
            and capsys.readouterr().out.startswith("SIMA: no backtest yet")
            and PARAMETERS_VARIABLE not in os.environ
        )
    monkeypatch.setenv("HOME", str(project))
    assert main(["verdict", "--config=~/own/other.yaml"]) == 0 and "SIMA" in capsys.readouterr().out
    assert (
        "'SIM-USD' is not among the symbols of params.yaml (SIMA)"
        in said(capsys, "stage", "prepare", "--symbol", "SIM-USD", "--config", "own/other.yaml")[1]
    )
    assert main(["verdict"]) == 0 and "SIM-USD" in capsys.readouterr().out


# --- terminals and pipes ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_terminal_without_utf_8_gets_what_it_can_show(prepared):
    for arguments, status, encoding in (
        (["train", "SIM-USD"], 0, "ascii"),
        (["backtest", "S\u0420Y"], 2, "latin-1"),
    ):
        command, environment = process(*arguments, PYTHONIOENCODING=encoding)
        done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
        assert (
            done.returncode == status
            and b"UnicodeEncodeError" not in done.stderr
            and b"Traceback" not in done.stderr
        ), done.stderr
        (done.stdout + done.stderr).decode(encoding)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["size", "--hidden-dims", "8"], ["verdict"], ["--help"], ["train", "--help"]]
)
def test_nobody_reads_to_the_end(project, arguments):
    "As `| head` does: no traceback, and the exit status of a tool that SIGPIPE ended."
    command, environment = process(*arguments)
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(command, env=environment, stdout=writer, stderr=subprocess.PIPE) as running:
        os.close(writer)
        errors = running.stderr.read()
    # newer releases of Python 3.11 and later ones swallow it in argparse itself, and a help ends with 0
    assert running.returncode in ((0, 141) if "--help" in arguments else (141,))
    assert errors == b""


def test_ctrl_c_while_the_command_is_still_loading():
    loading = (
        "import sys, signal\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'trading_lib.files': signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "import trading_lib.cli\n"
    )
    done = subprocess.run([sys.executable, "-c", loading], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted before anything began\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, left", [("train", "models/runs/SIM-USD_15Min/*.pt"), ("seeds", "reports/*/own/seeds.json")]
)
def test_a_training_that_nobody_reads_ends_and_is_saved(prepared, command, left):
    """As `trading-lib train | head -1` does:
    after the present update, with something to go on from, and the status of SIGPIPE."""
    arguments, environment = process(
        command, "SIM-USD", "--iterations", "40", "--validation-interval", "1", TRADING_LIB_PROGRESS="lines"
    )
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout.readline().startswith("SIM-USD")
        running.stdout.close()
        errors = running.stderr.read()
    assert running.returncode == 141 and "Traceback" not in errors, errors
    if command == "seeds":
        assert json.loads(next(prepared.glob(left)).read_text())["updates"] < 40
    else:
        assert (
            "nobody reads the output any more: stopped after update " in errors
            and "trading-lib train SIM-USD --iterations 40 --validation-interval 1 --resume" in errors
        ), errors
        assert len(list(prepared.glob(left))) >= 1 and (prepared / "ledger" / "SIM-USD.jsonl").exists()
        assert (
            main(
                [
                    "train",
                    "SIM-USD",
                    "--iterations",
                    "40",
                    "--validation-interval",
                    "1",
                    "--resume",
                    "--quiet",
                ]
            )
            == 0
        )


@pytest.mark.slow
def test_an_output_that_was_closed_before_it_began(project):
    "As `trading-lib size >&-` does."
    command, environment = process("size", "--hidden-dims", "8")
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], env=environment, stderr=subprocess.PIPE
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_trials_of_a_simulated_market_are_called_so(project, capsys):
    from trading_lib.ledger import record_trials, run_trials

    for symbol, source in (("SIM-USD", "simulated"), ("TSLA", "alpaca")):
        looked = {"update": 1, "sharpe_per_bar": 0.1, "bars": 9, "days": [], "returns": []}
        record_trials(
            project / "ledger" / f"{symbol}.jsonl",
            run_trials(
                symbol,
                "15Min",
                {"source": source, "sha256": "0" * 64, "first": "2024-01-01", "last": "2024-02-01"},
                ("2024-01-01", "2024-02-01"),
                {},
                0,
                [looked],
                code="x",
            ),
        )
    assert main(["trials"]) == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("SIM-USD: simulated, trials 1, ") and second.startswith("TSLA: trials 1, ")


def test_a_file_where_the_ledgers_belong_is_named(prepared, capsys):
    (prepared / "ledger").write_text("mine\n")
    for arguments in (["trials"], ["trials", "SIM-USD"], ["train", "SIM-USD"]):
        status, line = said(capsys, *arguments)
        assert status == 2 and line == (
            f"error: {prepared}/ledger: is no folder, and what was tried is kept in one of that "
            "name; move it out of the way"
        ), arguments
    assert (prepared / "ledger").read_text() == "mine\n" and not list(prepared.glob("models/**/*.pt"))


def test_few_trials_say_nothing_of_overfitting(project, capsys):
    import numpy as np

    from trading_lib.ledger import record_trials, run_trials

    days = [f"2024-01-{day:02}" for day in range(1, 29)]
    for already, more in ((0, 9), (9, 1)):
        looked = [
            {
                "update": i,
                "sharpe_per_bar": 0.1,
                "bars": 9,
                "days": days,
                "returns": np.random.default_rng(i).normal(size=28),
            }
            for i in range(already, already + more)
        ]
        record_trials(
            project / "ledger" / "SIM-USD.jsonl",
            run_trials(
                "SIM-USD",
                "15Min",
                {"source": "simulated", "sha256": "0" * 64, "first": "2024-01-01", "last": "2024-02-01"},
                ("2024-01-01", "2024-02-01"),
                {},
                0,
                looked,
                code="x",
            ),
        )
        assert main(["trials"]) == 0
        line = capsys.readouterr().out.splitlines()[0]
        assert ("overfitting too few trials to say (9)" in line) == (already == 0) and (
            " over 10 trials and 28 days" in line
        ) == (already == 9), line


def test_a_file_of_bars_that_went_away_is_asked_for(project, capsys):
    "DVC ends at a link that leads nowhere; without one its next run has our line."
    (project / "data" / "raw").mkdir(parents=True)
    edit(
        project / "params.yaml",
        **{"data.source": "files", "symbols": ["OWN-USD"], "data.start": None, "data.end": None},
    )
    assert (
        main(
            [
                "data",
                "simulate",
                "SIM-USD",
                "data/raw/OWN-USD.csv",
                "--start",
                "2023-01-01",
                "--end",
                "2023-01-20",
            ]
        )
        == 0
    )
    assert main(["data", "find"]) == 0
    link = project / "data" / "own_files" / "OWN-USD_15Min"
    assert link.resolve() == project / "data" / "raw" / "OWN-USD.csv"
    link.resolve().unlink()
    capsys.readouterr()
    status, line = said(capsys, "data", "find")
    assert status == 2 and "found none of" in line and not link.is_symlink()


def test_a_link_in_place_of_the_folder_of_bars_is_warned_of(project, capsys):
    """Until git has let go of what it keeps there:
    DVC's experiments would fail and leave edits in git's stash."""

    def git(*words):
        named = ["git", "-c", "user.name=n", "-c", "user.email=n@example.org"]
        subprocess.run([*named, *words], cwd=project, check=True, capture_output=True)

    raw, disk = project / "data" / "raw", project / "disk"
    raw.mkdir(parents=True), disk.mkdir()
    (raw / ".gitignore").write_text("*\n!.gitignore\n")
    git("init", "-q"), git("add", "."), git("commit", "-qm", "start")
    assert main(["data", "find"]) == 0 and capsys.readouterr().err == ""
    shutil.rmtree(raw)
    raw.symlink_to(disk)
    assert main(["data", "find"]) == 0
    warned = capsys.readouterr().err
    assert (
        warned.startswith("warning: data/raw: is a link, and git still keeps data/raw/.gitignore")
        and warned.count("\n") == 1
    )
    subprocess.run(
        warned.strip().rpartition("do once: ")[2],
        shell=True,
        cwd=project,
        check=True,
        capture_output=True,
        env=os.environ
        | {f"GIT_{who}_{what}": "n" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    )
    assert main(["data", "find"]) == 0 and capsys.readouterr().err == ""


def test_a_model_of_another_kind_of_market_is_refused_by_its_name(project, capsys):
    from small_backtests import small_trainer

    model = str(save_checkpoint(small_trainer("equity", "5.6.0").content(), project / "equity.pt"))
    (project / "data").mkdir()
    bars_file(project).rename(project / "data" / "SIM-USD_15Min.parquet")
    status, line = said(capsys, "backtest", "SIM-USD", "--model", model)
    assert (
        status == 2
        and line.startswith("error: SIM-USD: is crypto, and ")
        and "equity.pt was trained on equity" in line
    )


# --- several GPUs, versions ---------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are several GPUs here")
def test_several_gpus_where_there_are_none(project, capsys):
    assert said(capsys, "train", "--multi-gpu") == (
        2,
        (
            f"error: --multi-gpu: torch sees {torch.cuda.device_count()} "
            f"GPU{'' if torch.cuda.device_count() == 1 else 's'} here, and it takes two; train without it"
        ),
    )


@pytest.mark.slow
def test_the_command_for_several_gpus_trains_one_policy_in_as_many_processes(prepared, capsys):
    command = torchrun_command(2, ["train", "SIM-USD", "--multi-gpu", "-q"])
    assert (
        capsys.readouterr().out
        == "running: torchrun --standalone --nproc-per-node 2 .venv/bin/trading-lib train SIM-USD -q\n"
    )
    done = subprocess.run(command, env=process()[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (model,) = [
        path
        for path in (prepared / "models").rglob("*.pt")
        if "last" not in path.name and load_checkpoint(path)["processes"]
    ]
    assert len(load_checkpoint(model)["processes"]) == 2


@pytest.mark.slow
def test_a_strict_version_refuses_what_a_warning_would_let_through(project, capsys):
    "As a check of continuous integration: `trading-lib inspect MODEL --strict-version`."
    from small_backtests import small_trainer

    old, new = (
        str(save_checkpoint(small_trainer("crypto", version).content(), project / f"{version}.pt"))
        for version in ("2.7.0", "5.6.0")
    )
    assert main(["inspect", new, "--strict-version"]) == 0 == main(["inspect", old])
    capsys.readouterr()
    for command in (["inspect", old], ["backtest", "--model", old, "--bars", str(bars_file(project))]):
        status, line = said(capsys, *command, "--strict-version")
        assert status == 2 and "model version 2.7.0 differs from the current" in line


def bars_file(project):
    from small_backtests import simulated

    from trading_lib.bars import write_bars

    return write_bars(simulated("crypto")[0], project / "SIM-USD_15Min.parquet")
