"""What people do wrong with account, environment, backtest and verdict, and the one line they get.

`pytest -s tests/system/test_misuse.py` prints the table.
"""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_backtests import FITTED, backtest, simulated, small_trainer
from small_ledgers import trial

from trading_lib.backtest import run_backtest
from trading_lib.bars import write_bars
from trading_lib.checkpoint import load_checkpoint, save_checkpoint
from trading_lib.cli import main
from trading_lib.config import AccountConfig, InputError, parse_parameters
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data
from trading_lib.ledger import ledger_path, read_trials, record_trials
from trading_lib.reporting.registry import load_deploy_zip
from trading_lib.reporting.verdict import assess
from trading_lib.trainer import NativePPOTrainer
from trading_lib.walk_forward import Fold, check_folds, walk_forward_folds

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def model_content(version="5.6.0"):
    return small_trainer("crypto", version).content()


def command(project, *arguments):
    "What the command line says on standard error, and its exit status."
    import contextlib
    import io

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = main(list(arguments))
    return status, errors.getvalue().strip()


def raised(call):
    "The line of an InputError."
    with pytest.raises(InputError) as e:
        call()
    return 2, f"error: {e.value}"


def all_hold(project):
    result = backtest(actions=np.zeros(99, int), start=4000, stop=4100)
    verdict = assess(result)
    return 0, f"{verdict['verdict']}: {verdict['headline']}"


def damaged_ledger(project):
    path = ledger_path(project, "SIM-USD")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"key": 1}\n{"key": 2}\n')
    return raised(lambda: read_trials(path))


def parameters(**sections):
    return raised(lambda: parse_parameters(sections))


def file_of(project, bars, name="SIM-USD_15Min.parquet"):
    return str(write_bars(bars, project / name))


def saved_model(project):
    return str(save_checkpoint(model_content(), project / "model.pt"))


def nan_bars(project):
    bars = simulated("crypto")[0].copy()
    bars.iloc[100, 3] = np.nan
    bars.reset_index(names="timestamp").to_parquet(project / "SIM-USD_15Min.parquet")
    return command(
        project, "backtest", "--model", saved_model(project), "--bars", str(project / "SIM-USD_15Min.parquet")
    )


# what was done -> (how, exit status, words of the answer)
USES = {
    "an empty span": (
        lambda p: raised(lambda: backtest(actions=[0], start=4000, stop=4000)),
        2,
        "expected a span inside",
    ),
    "a span of one bar": (
        lambda p: raised(lambda: backtest(actions=[0], start=4000, stop=4001)),
        2,
        "no decision can be made in bars 4000..4000",
    ),
    "a file of one bar": (
        lambda p: command(
            p, "backtest", "--model", saved_model(p), "--bars", file_of(p, simulated("crypto")[0][:1])
        ),
        2,
        "1 bars",
    ),
    "a policy that always holds": (all_hold, 0, "It made no trade"),
    "a symbol that was never prepared": (
        lambda p: command(p, "backtest", "ABC-USD"),
        2,
        "'ABC-USD' is not among the symbols of params.yaml (SIM-USD); "
        "add it there: symbols: [SIM-USD, ABC-USD]",
    ),
    "a listed symbol that was never prepared": (
        lambda p: command(p, "backtest", "SIM-USD"),
        2,
        "SIM-USD: no SIM-USD_15Min.parquet; run `trading-lib stage prepare --symbol SIM-USD`",
    ),
    "a model of another layout": (
        lambda p: raised(lambda: run_backtest(model_content(), simulated("crypto")[0], version="5.3.0")),
        2,
        "version: the model was trained on layout 5.6.0, was '5.3.0'",
    ),
    "a crypto model on a share": (
        lambda p: raised(lambda: run_backtest(model_content(), simulated("equity")[0], asset_class="equity")),
        2,
        "asset_class: the model was trained on crypto",
    ),
    "a model that is not one": (
        lambda p: ((p / "model.pt").write_text("hello"), command(p, "inspect", str(p / "model.pt")))[1],
        2,
        "model.pt",
    ),
    "no model at all": (
        lambda p: command(p, "backtest", "--bars", file_of(p, simulated("crypto")[0])),
        2,
        "--bars needs --model",
    ),
    "negative costs": (
        lambda p: parameters(account={"commission_bps": -1}),
        2,
        "account.commission_bps: expected 0 or more and less than 10000, was -1.0; "
        "10000 is all that is traded",
    ),
    "an unknown cost preset": (
        lambda p: parameters(account={"costs": "brocker"}),
        2,
        "account.costs: expected one of broker, conservative, zero, was 'brocker'",
    ),
    "no capital": (
        lambda p: parameters(account={"initial_account_value": 0}),
        2,
        "account.initial_account_value: expected more than 0, was 0",
    ),
    "more than everything in one position": (
        lambda p: parameters(account={"max_position_pct": 1.5}),
        2,
        "account.max_position_pct: expected more than 0 and at most 1, was 1.5",
    ),
    "crypto sold short": (
        lambda p: raised(
            lambda: backtest(
                actions=np.zeros(99, int), start=4000, stop=4100, account=AccountConfig(allow_short=True)
            )
        ),
        2,
        "crypto cannot be sold short",
    ),
    "splits that leave no test span": (
        lambda p: parameters(data={"train_fraction": 0.9, "validation_fraction": 0.2}),
        2,
        "leave a share for the test span",
    ),
    "folds that overlap": (
        lambda p: raised(lambda: check_folds([Fold(1, (0, 1000), (1200, 1400), (1300, 1800))], 100, 1, 0)),
        2,
        "validation",
    ),
    "more folds than history": (lambda p: raised(lambda: walk_forward_folds(400, 5)), 2, "bars"),
    "an environment on a later span without a fit": (
        lambda p: raised(
            lambda: GPUVectorizedTradingEnv(
                market_data(simulated("crypto")[0], "5.6.0", None, "15Min", "crypto"), GPUEnvConfig()
            )
        ),
        2,
        "fit",
    ),
    "NaN in a price": (nan_bars, 2, "close is missing"),
    "a policy with other actions": (
        lambda p: raised(lambda: backtest(actions=np.full(99, 9), start=4000, stop=4100)),
        2,
        "actions: expected one list of whole numbers from 0 to 7",
    ),
    "an unknown reward preset": (
        lambda p: raised(
            lambda: GPUVectorizedTradingEnv(
                simulated("crypto")[0][:FITTED], GPUEnvConfig(reward_preset="sharp")
            )
        ),
        2,
        "env.reward_preset: unknown name 'sharp'",
    ),
    "a ledger that somebody edited": (damaged_ledger, 2, "SIM-USD.jsonl"),
    "a deploy zip before any verdict": (
        lambda p: command(p, "deploy", "SIM-USD"),
        2,
        "is missing; run `dvc repro` first",
    ),
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A folder with the project's parameters."
    for name in ("params.yaml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_a_misuse_gets_one_line(project, use):
    act, expected_status, words = USES[use]
    status, line = act(project)
    print(f"\n{use:45} {status}  {line}", end="")
    assert status == expected_status and words in line and "\n" not in line and "Traceback" not in line


def test_a_model_on_another_symbols_bars_is_discounted_by_the_trials_it_was_chosen_from(project, capsys):
    "Not by those of the symbol that it is tested on; the gates that fail are named."
    record_trials(ledger_path(project, "SIM-USD"), [trial(seed=seed) for seed in range(40)])
    record_trials(
        ledger_path(project, "OTHER-USD"), [trial(symbol="OTHER-USD", seed=seed) for seed in range(3)]
    )
    record_trials(
        ledger_path(project, "SIMA"), [trial(symbol="SIMA", seed=seed) for seed in range(5)]
    )  # another simulated market: the best of both was chosen
    day = str(simulated("crypto")[0].index[FITTED].date() + np.timedelta64(2, "D").item())
    assert (
        main(
            [
                "backtest",
                "--model",
                saved_model(project),
                "--bars",
                file_of(project, simulated("crypto")[0], "OTHER-USD_15Min.parquet"),
                "--start",
                day,
                "--out",
                str(project / "out"),
            ]
        )
        == 0
    )
    verdict = json.loads((project / "out" / "OTHER-USD" / "verdict.json").read_text())
    assert (
        verdict["trials"]["n_trials"] == 45
        and verdict["trials"]["n_symbols"] == 2
        and "45 trials of 2 symbols" in " ".join(verdict["reasons"])
    )
    assert verdict["headline"].startswith("OTHER-USD") and "unseen" in verdict["headline"]
    assert (
        verdict["verdict"] == "DROP"
        and verdict["failed"]["REVIEW"]
        and set(verdict["failed"]["REVIEW"])
        <= {line.strip() for line in capsys.readouterr().out.splitlines()}
    )


def test_a_model_without_a_ledger_is_discounted_by_what_its_checkpoint_has_seen(project):
    seen = [{"update": update} for update in range(1, 8)]
    save_checkpoint(load_checkpoint(saved_model(project)) | {"validations": seen}, project / "seven.pt")
    day = str(simulated("crypto")[0].index[FITTED].date() + np.timedelta64(2, "D").item())
    for own, words in (
        (0, "No ledger was found: the 7 validations"),
        (2, "2 trials of 1 symbol in the project's ledgers, and for 5 of the 7 validations"),
        (9, "11 trials of 1 symbol in the project's ledgers."),
    ):
        record_trials(ledger_path(project, "SIM-USD"), [trial(seed=seed, update=own) for seed in range(own)])
        assert (
            main(
                [
                    "backtest",
                    "--model",
                    str(project / "seven.pt"),
                    "--bars",
                    file_of(project, simulated("crypto")[0]),
                    "--start",
                    day,
                    "--out",
                    str(project / "out"),
                ]
            )
            == 0
        )
        verdict = json.loads((project / "out" / "SIM-USD" / "verdict.json").read_text())
        assert verdict["trials"]["n_trials"] == max(7, own + 2 * (own > 2)) and any(
            words in reason for reason in verdict["reasons"]
        ), own


def test_a_model_that_is_deployed_anyway_carries_what_it_failed(project):
    from hashlib import sha256

    (project / "models").mkdir()
    model = save_checkpoint(model_content(), project / "models" / "SIM-USD_15Min.pt")
    digest, report = sha256(model.read_bytes()).hexdigest(), project / "reports" / "SIM-USD_15Min"
    report.mkdir(parents=True)
    verdict = {
        "verdict": "REVIEW",
        "headline": "a line",
        "failed": {"APPROVED": ["fitness 0.61, APPROVED needs >= 0.7"]},
        "model_sha256": digest,
    }
    for name, content in {
        "verdict.json": json.dumps(verdict),
        "metrics.json": json.dumps({"provenance": {"model_sha256": digest}}),
        "report.html": "a page",
    }.items():
        (report / name).write_text(content)
    status, line = command(project, "deploy", "SIM-USD", "--out", str(project / "deploy.zip"))
    assert status == 2 and "the verdict is REVIEW" in line and not (project / "deploy.zip").exists()
    assert command(project, "deploy", "SIM-USD", "--anyway", "--out", str(project / "deploy.zip")) == (0, "")
    deployed = load_deploy_zip(project / "deploy.zip")
    assert (
        "# SIM-USD, 15Min simulated bars: REVIEW" in deployed["files"]["README.md"].decode()
        and "- market: SIMULATED" in deployed["files"]["README.md"].decode()
    )
    assert (
        deployed["manifest"]["verdict"] == {"verdict": "REVIEW", "failed": verdict["failed"]}
        and "fitness 0.61, APPROVED needs >= 0.7" in deployed["files"]["README.md"].decode()
    )
    (project / "deploy.zip").unlink()
    for forged, words in (
        ({"verdict": "APPROVED"}, "says APPROVED, but its bars are simulated; it lists gates that failed"),
        ({"verdict": "APPROVED", "failed": {}}, "says APPROVED, but its bars are simulated; it was changed"),
    ):
        (report / "verdict.json").write_text(json.dumps(verdict | forged))
        for options in ([], ["--anyway"]):
            status, line = command(
                project, "deploy", "SIM-USD", *options, "--out", str(project / "deploy.zip")
            )
            assert status == 2 and words in line and not (project / "deploy.zip").exists(), line
    metrics = {
        "provenance": {"model_sha256": digest, "data": {"source": "alpaca"}}
    }  # real bars, and a smoke test all the same
    content = model_content()
    content["config"] = {
        **(content.get("config") or {}),
        "train": {**((content.get("config") or {}).get("train") or {}), "mode": "quick_test"},
    }
    digest = sha256(save_checkpoint(content, model).read_bytes()).hexdigest()
    metrics["provenance"]["model_sha256"] = digest
    (report / "metrics.json").write_text(json.dumps(metrics))
    (report / "verdict.json").write_text(
        json.dumps({"verdict": "APPROVED", "headline": "a line", "failed": {}, "model_sha256": digest})
    )
    status, line = command(project, "deploy", "SIM-USD", "--out", str(project / "deploy.zip"))
    assert status == 2 and "says APPROVED, but mode quick_test" in line, line


def test_the_command_line_says_on_what_how_long_and_what_does_better(project, capsys):
    "SMOKE TEST where a mode stands for more steps, with baselines on the model's own spans beside it."
    trainer = small_trainer("crypto", "5.6.0")
    bars, market = simulated("crypto")[0], trainer.env.market
    trainer = NativePPOTrainer(
        trainer.env,
        replace(trainer.config, mode="standard", tier="cpu", mode_timesteps=7_500_000, validation_interval=2),
        replace(market, start=FITTED, stop=FITTED + 400),
        progress=None,
    )
    trainer.train()
    path = str(save_checkpoint(trainer.best, project / "m.pt"))
    start = str(bars.index[FITTED + 400].date() + np.timedelta64(1, "D").item())
    asked = ["backtest", "--model", path, "--bars", file_of(project, bars), "--start", start]
    for switch, probed in ((["--out", str(project / "out")], True), (["--no-probes"], False)):
        assert main(asked + switch) == 0
        output = capsys.readouterr().out
        assert (
            "ridge regression" in output and "gradient boosting" in output and "left out" not in output
        ) == probed and "the moving-average cross" in output
        assert (
            "SMOKE TEST" in output
            and "256 of the 7,500,000 steps that mode standard stands for on tier cpu" in output
            and " simulated bars" in output
            and "APPROVED" not in output
        )
    page, verdict = (
        (project / "out" / "SIM-USD" / name).read_text() for name in ("report.html", "verdict.json")
    )
    assert (
        "Simulated data." in page
        and "What supervised learning finds" in page
        and "<b>SMOKE TEST</b>" in page
        and json.loads(verdict)["verdict"] == "SMOKE TEST"
    )


def test_a_model_that_answers_nan_is_no_model_that_does_not_trade():
    "Of layouts that see their account and that do not: refused by name in a backtest."
    for version in ("5.6.0", "5.3.0"):
        trainer = small_trainer("crypto", version)
        with torch.no_grad():
            next(trainer.policy.parameters()).fill_(torch.nan)
        with pytest.raises(InputError, match="not finite"):
            backtest(model=trainer.policy.eval(), version=version, window=20, start=FITTED, stop=FITTED + 50)
