"""The simulated universe: what is planted pays where it is planted, and without it nothing does."""

import numpy as np
import pytest
from scipy import stats

from trading_lib.config import InputError
from trading_lib.data.simulated_panel import PANEL_STATES, inferred_states, planted_states, simulate_panel
from trading_lib.portfolio.market import portfolio_market
from trading_lib.portfolio.regimes import REGIMES
from trading_lib.portfolio.replay import replay_regimes
from trading_lib.portfolio_env import PortfolioConfig

FREE = PortfolioConfig(frictions="zero", min_notional=0.0)
PLACE = {regime.name: k for k, regime in enumerate(REGIMES)}
CHOSEN = ("FULL_CASH", "EQUAL_WEIGHT", "MOMENTUM", "LOW_VOL", "RISK_ON")


def daily_returns(panel) -> tuple[np.ndarray, np.ndarray]:  # (S, regimes) returns, (S,) day of each
    "What each of some regimes earns in a day, chosen again every day, without costs."
    market = portfolio_market(panel)
    days = market.decision_days
    actions = np.tile([PLACE[name] for name in CHOSEN], (len(days), 1))
    return replay_regimes(market, FREE, actions).returns, days + 1


def test_each_state_pays_the_regime_that_it_is_named_for():
    "On average of four histories; the best of the five regimes is the state's own."
    earned = {state.name: [] for state in PANEL_STATES}
    for seed in range(4):
        panel = simulate_panel(12, years=10, seed=seed)
        returns, day = daily_returns(panel)
        # what is chosen at t is held from the close of t+1 on
        states = planted_states(len(panel.day), seed)[day]
        for k, state in enumerate(PANEL_STATES):
            earned[state.name].append(returns[1:][states[1:] == k].mean(0))
    for state in PANEL_STATES:
        best = CHOSEN[int(np.mean(earned[state.name], 0).argmax())]
        assert best == state.regime, (state.name, best)


def test_without_anything_planted_no_regime_earns_anything():
    "Mean daily return over eight histories: 0 lies within the 99.9 % interval of Student's t."
    pooled = np.concatenate([daily_returns(simulate_panel(6, 6, seed, planted=0.0))[0] for seed in range(8)])
    for name, own in zip(CHOSEN[1:], pooled.T[1:]):
        low, high = stats.t.interval(0.999, len(own) - 1, own.mean(), stats.sem(own))
        assert low < 0 < high, name


def test_the_same_seed_is_the_same_history_and_a_longer_one_begins_with_its_states():
    one, other = simulate_panel(3, 2, seed=5), simulate_panel(3, 2, seed=5)
    assert one.fingerprint == other.fingerprint != simulate_panel(3, 2, seed=6).fingerprint
    assert np.array_equal(planted_states(900, 5)[:500], planted_states(500, 5))


def test_who_knows_the_law_finds_the_state_more_often_than_not():
    "Bayes' filter with the true parameters: right on well over a third of the days, and a probability."
    panel = simulate_panel(12, years=6, seed=1)
    belief = inferred_states(panel, 1)
    assert np.allclose(belief.sum(1), 1) and (belief >= 0).all()
    assert (belief.argmax(1) == planted_states(len(panel.day), 1)).mean() > 0.6


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"n_assets": 2}, "n_assets: expected a whole number from 3 to 300, was 2"),
        ({"years": 0}, "years: expected a whole number from 1 to 25, was 0"),
        ({"planted": -1}, "planted: expected 0 to 5, was -1"),
        ({"seed": 0.5}, "seed: expected a whole number"),
    ],
)
def test_what_no_universe_is_made_of_is_one_line(wrong, words):
    with pytest.raises(InputError) as error:
        simulate_panel(**wrong)
    assert words in str(error.value) and "\n" not in str(error.value)
