"""A portfolio's pipeline: spans with a purge, a training that stops and goes on, and refusals in one line."""

import json
from pathlib import Path

import pytest
import torch

from trading_lib.cli import main
from trading_lib.config import InputError, Parameters, load_parameters
from trading_lib.data.simulated_panel import simulate_panel
from trading_lib.pipeline.project import universe_artefacts
from trading_lib.pipeline.universe_training import (
    prepared_panel,
    train_universe,
    trainer_between,
    universe_spans,
    universe_trainer,
)
from trading_lib.pipeline.universes import (
    backtest_universe,
    prepare_universe,
    report_universe,
    universe_panel,
)
from trading_lib.portfolio_backtest import write_portfolio_backtest

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "train.n_envs": 4,
    "train.n_steps": 32,
    "train.minibatch_size": 64,
    "train.gru_hidden_dim": 8,
    "train.total_timesteps": 512,
    "train.validation_interval": 2,
    "portfolio.assets": 3,
    "portfolio.years": 2,
    "portfolio.random_accounts": 5,
}


def small(**changes) -> Parameters:
    return load_parameters(**SMALL | changes)


def test_spans_are_apart_by_as_many_days_as_scores_look_back():
    panel = simulate_panel(3, years=3)
    spans = universe_spans(panel, Parameters())
    (a, b), (c, d), (e, f) = spans.values()
    n = len(panel.day)
    assert (a, b) == (0, int(0.7 * n)) and c - b == 20 and e - d == 20 and f == n


def test_a_history_that_is_too_short_is_named():
    panel = simulate_panel(3, years=1)
    short = Parameters(data=type(Parameters().data)(train_fraction=0.9, validation_fraction=0.05))
    with pytest.raises(
        InputError, match="days leave .* for validation after a purge of 20; use more history"
    ):
        universe_spans(panel, short)


def test_a_universe_goes_from_nothing_to_a_backtest(project):
    p, paths = small(), universe_artefacts("simulated")
    panel, report = prepare_universe(p, "simulated", paths)
    assert json.loads((paths.report / "data.json").read_text())["spans"] == report["spans"]
    assert prepared_panel(p, "simulated", paths).fingerprint == panel.fingerprint
    trainer, stopped = train_universe(p, "simulated", paths, "a test", progress="quiet")
    assert stopped is None and trainer.global_step == 512 and trainer.config.network == "gru"
    result = backtest_universe(p, "simulated", paths)
    assert (
        len(result.curves)
        == len(trainer.env.market.span(*universe_spans(panel, p)["test"]).decision_days) + 1
    )
    assert result.provenance["simulated"] and result.provenance["unseen"]


def test_a_run_that_was_stopped_goes_on_to_the_same_weights():
    p, panel = small(), simulate_panel(3, years=2)
    whole = universe_trainer(p, panel)
    whole.train()
    first = universe_trainer(p, panel)
    first.train(stop=lambda: first.update == 2)
    second = universe_trainer(p, panel)
    second.restore(first.content(), "a test")
    second.train()
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, second.policy.state_dict()[name]), name


def test_the_map_of_the_observation_is_fitted_on_the_training_span_alone():
    p, panel = small(), simulate_panel(3, years=2)
    spans = universe_spans(panel, p)
    before = trainer_between(p, panel, spans["train"], spans["validation"]).env.market.fit
    close = panel.close.copy()
    close[spans["train"][1] :] *= 3
    changed = type(panel)(**{**vars(panel), "close": close})
    after = trainer_between(p, changed, spans["train"], spans["validation"]).env.market.fit
    assert json.dumps(before, default=lambda v: v.tolist()) == json.dumps(after, default=lambda v: v.tolist())


@pytest.mark.parametrize(
    "changes, universe, words",
    [
        ({}, "core", "data.source is simulated; set it to files or alpaca"),
        ({"data.source": "files"}, "nobody", "nobody"),
    ],
)
def test_a_universe_without_bars_says_what_to_set(changes, universe, words):
    with pytest.raises(InputError) as error:
        universe_panel(small(**changes), universe)
    assert words in str(error.value)


def test_what_is_not_prepared_says_which_command_to_run(tmp_path):
    with pytest.raises(InputError, match="stage portfolio_prepare --universe simulated"):
        prepared_panel(small(), "simulated", universe_artefacts("simulated", tmp_path))


@pytest.mark.parametrize(
    "line, words",
    [
        (["train", "--universe", "coer"], "--universe: 'coer' is not among portfolio.universes"),
        (["train", "SIM-USD", "--universe", "simulated"], "leave symbols and --multi-gpu out"),
        (["train", "--universe", "simulated", "--expanded"], "were both given; choose one"),
        (["train", "--expanded"], "'expanded' is not among portfolio.universes"),
        (["train", "--cache-path", "none.npz"], "none.npz: no such file"),
        (["stage", "portfolio_train", "--symbol", "SIM-USD"], "portfolio_train runs for a universe"),
        (["stage", "train", "--universe", "simulated"], "train runs for a symbol"),
        (["stage", "portfolio_train"], "which universe? Add one, such as --universe core"),
    ],
)
def test_commands_refuse_in_one_line(line, words, capsys, tmp_path, monkeypatch):
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert "  universes: [] " in text
    own = tmp_path / "params.yaml"
    own.write_text(text.replace("  universes: [] ", "  universes: [simulated] "), encoding="utf-8")
    monkeypatch.setenv("TRADING_LIB_CONFIG", str(own))
    assert main(line) != 0
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said


def test_the_verdict_counts_what_was_tried(project):
    p, paths = small(), universe_artefacts("simulated")
    prepare_universe(p, "simulated", paths)
    train_universe(p, "simulated", paths, "a test", progress="quiet")
    result = backtest_universe(p, "simulated", paths)
    write_portfolio_backtest(result, paths.report)
    verdict = report_universe("simulated", paths)
    assert verdict["verdict"] in ("SMOKE TEST", "DROP") and verdict["trials"]["n_trials"] >= 12
    assert (paths.report / "report.html").read_text().rstrip().endswith("</html>")
    assert '"symbol":"simulated"' in (project / "ledger" / "index.jsonl").read_text()


def test_without_a_list_the_simulated_universe_is_meant():
    assert Parameters().listed_universe(None) == Parameters().listed_universe("simulated") == "simulated"
    with pytest.raises(InputError, match="none yet.; add it there: universes: .core."):
        Parameters().listed_universe("core")


def test_what_the_project_decided_is_not_said_to_be_a_persons():
    plan = universe_trainer(small(), simulate_panel(3, years=2)).description
    (rate,) = [line for line in plan.splitlines() if line.startswith("learning rate")]
    (sizes,) = [line for line in plan.splitlines() if line.startswith("environments")]
    assert "0.003" in rate and rate.endswith("project") and sizes.endswith("you")


def test_costs_rise_in_a_training_as_its_settings_say():
    p = small(**{"train.cost_warm_up": 1.0})
    trainer = universe_trainer(p, simulate_panel(3, years=2))
    seen = []
    set_scale = trainer.env.set_cost_scale
    trainer.env.set_cost_scale = lambda scale: (seen.append(scale), set_scale(scale))
    trainer.train()
    assert seen == [0.25, 0.5, 0.75, 1.0]
