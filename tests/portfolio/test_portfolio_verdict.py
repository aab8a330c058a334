"""The verdict on a portfolio: no figure makes up for equal weight not beaten, and regimes count as trials."""

from dataclasses import replace

import numpy as np
import pytest

from trading_lib.data.simulated_panel import simulate_panel
from trading_lib.portfolio.market import portfolio_market
from trading_lib.portfolio.regimes import EQUAL_WEIGHT
from trading_lib.portfolio_backtest import PortfolioBacktest, run_portfolio_backtest
from trading_lib.reporting.portfolio_page import render_portfolio_report
from trading_lib.reporting.portfolio_verdict import assess_portfolio

BEATEN = {"annual": 0.10, "low": 0.02, "high": 0.20, "days": 250}


@pytest.fixture(scope="module")
def equal_weight() -> PortfolioBacktest:
    "Somebody who chooses equal weight every day."
    panel = simulate_panel(3, years=2)
    span = panel.span(300, len(panel.day))
    actions = np.full(len(portfolio_market(span).decision_days), EQUAL_WEIGHT)
    return run_portfolio_backtest(None, span, actions=actions, random_accounts=5)


@pytest.fixture(scope="module")
def excellent(equal_weight) -> PortfolioBacktest:
    "The same with figures that pass every gate, on bars that nobody simulated."
    moments = equal_weight.metrics["moments"]
    good = {
        "fitness": 0.95,
        "profit_factor": 3.0,
        "consistency": 0.95,
        "max_drawdown": 0.03,
        "total_return": 9.0,
        "difference": BEATEN,
        "moments": moments | {"sharpe": 0.5} if isinstance(moments, dict) else moments,
    }
    stress = [row | {k: good[k] for k in good if k in row} for row in equal_weight.stress]
    provenance = equal_weight.provenance | {"simulated": None, "data": {"source": "files"}}
    return replace(equal_weight, metrics=equal_weight.metrics | good, stress=stress, provenance=provenance)


def test_equal_weight_differs_from_itself_by_nothing(equal_weight):
    found = equal_weight.metrics["difference"]
    assert found["annual"] == found["low"] == found["high"] == 0
    said = assess_portfolio(equal_weight)
    assert "earned what equal weight every day earned" in said["headline"]
    missed = said["failed"]["SIMULATED PASS"]
    assert any("the whole interval must be above 0" in reason for reason in missed)


def test_figures_that_pass_are_approved_only_where_equal_weight_is_beaten(excellent):
    assert assess_portfolio(excellent)["verdict"] == "APPROVED"
    for low in (-0.01, 0.0, None):
        metrics = excellent.metrics | {"difference": BEATEN | {"low": low}}
        assert assess_portfolio(replace(excellent, metrics=metrics))["verdict"] == "REVIEW", low


def test_a_simulated_universe_is_never_approved(excellent):
    simulated = replace(excellent, provenance=excellent.provenance | {"simulated": True})
    said = assess_portfolio(simulated)
    assert said["verdict"] == "SIMULATED PASS" and said["simulated"]


def test_a_baseline_that_did_better_is_named(excellent):
    better = {"label": "minimum variance, monthly", "rival": True} | {
        "total_return": excellent.metrics["total_return"] + 1
    }
    baselines = excellent.baselines | {"minimum_variance": excellent.baselines["cash"] | better}
    said = assess_portfolio(replace(excellent, baselines=baselines))
    assert said["verdict"] == "REVIEW"
    assert any("minimum variance, monthly" in reason for reason in said["reasons"])


def test_choosing_a_regime_counts_as_eleven_trials(equal_weight):
    "Twelve regimes, of which holding what is there is no strategy of its own."
    assert assess_portfolio(equal_weight)["trials"]["n_trials"] == 12
    assert equal_weight.metrics["regime_trials"] == 11


@pytest.mark.parametrize("limits", [{"ruined": True}, {"unseen": False}])
def test_ruin_and_days_that_training_has_seen_are_no_evidence(excellent, limits):
    metrics = excellent.metrics | {k: v for k, v in limits.items() if k == "ruined"}
    provenance = excellent.provenance | {"seen_to": excellent.provenance["span"][1]}
    provenance |= {k: v for k, v in limits.items() if k == "unseen"}
    said = assess_portfolio(replace(excellent, metrics=metrics, provenance=provenance))
    assert said["verdict"] == "DROP"


def test_the_page_stands_alone_and_says_who_chose_the_universe(equal_weight):
    page = render_portfolio_report(equal_weight)
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "Who chose the universe" in page and page.count("data:image/png;base64") == 2
