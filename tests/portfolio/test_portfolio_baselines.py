"""What an agent stands beside: each against arithmetic of its own, and none of them sees the future."""

import numpy as np
import pytest

from trading_lib.data.simulated_panel import simulate_panel
from trading_lib.evaluation.portfolio_baselines import (
    PORTFOLIO_BASELINES,
    equal_weight_monthly,
    inverse_volatility,
    moving_average_reversion,
    new_months,
    projected_to_weights,
    random_regimes,
    run_baselines,
)
from trading_lib.evaluation.portfolio_figures import difference, percentile_among
from trading_lib.portfolio.market import PortfolioMarket, portfolio_market
from trading_lib.portfolio.panel import PortfolioPanel
from trading_lib.portfolio.regimes import REGIMES
from trading_lib.portfolio_env import PortfolioConfig

PANEL = simulate_panel(4, years=2, seed=4)
MARKET = portfolio_market(PANEL)


def later_days_changed(market: PortfolioMarket, day: int) -> PortfolioMarket:
    panel = market.panel
    factor = np.ones_like(panel.close)
    factor[day + 1 :] = np.random.default_rng(0).uniform(0.5, 2, factor[day + 1 :].shape)
    arrays = {n: getattr(panel, n) * factor for n in ("open", "close", "raw_close")}
    return portfolio_market(PortfolioPanel(**{**vars(panel), **arrays}), market.fit)


def test_every_baseline_of_the_specification_is_there():
    names = set(PORTFOLIO_BASELINES)
    assert names >= {
        "cash",
        "ucrp",
        "olmar",
        "inverse_volatility",
        "minimum_variance",
        "hierarchical_risk_parity",
    }
    assert names >= {"equal_weight_once", "equal_weight_monthly", "equal_weight_daily"}
    invests = [r.name.lower() for r in REGIMES if r.name not in ("HOLD", "FULL_CASH")]
    assert len(invests) == 10 and names >= {f"{n}_{how}" for n in invests for how in ("once", "daily")}


@pytest.mark.parametrize("name", [n for n, b in PORTFOLIO_BASELINES.items() if not b.missing])
def test_what_was_decided_does_not_depend_on_what_came_later(name):
    "Decisions up to a day are the same after every later price has changed."
    row = 120
    day = int(MARKET.decision_days[row])
    before = PORTFOLIO_BASELINES[name].plan(MARKET)[: row + 1]
    after = PORTFOLIO_BASELINES[name].plan(later_days_changed(MARKET, day))[: row + 1]
    assert np.array_equal(before, after, equal_nan=True)


def test_inverse_volatility_is_what_the_formula_says():
    "1 / standard deviation of the daily returns seen, shared out to 1."
    pytest.importorskip("skfolio")
    weights = inverse_volatility(MARKET)
    rows = np.flatnonzero(new_months(MARKET))
    assert np.isnan(np.delete(weights, rows, 0)).all()
    row = rows[-1]
    day = int(MARKET.decision_days[row])
    returns = PANEL.close[1:] / PANEL.close[:-1] - 1
    inverse = 1 / returns[max(0, day - 252) : day].std(0, ddof=1)
    assert weights[row] == pytest.approx(inverse / inverse.sum(), rel=1e-9)


def test_months_begin_on_their_first_trading_day():
    months = PANEL.day[MARKET.decision_days].astype("datetime64[ns]").astype("datetime64[M]")
    first = new_months(MARKET)
    assert first.sum() == len(set(months)) and first[0]
    names = np.array([r.name for r in REGIMES])[equal_weight_monthly(MARKET)]
    assert set(names[first]) == {"EQUAL_WEIGHT"} and set(names[~first]) == {"HOLD"}


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
        ([1.0, 1.0], [0.5, 0.5]),
        ([2.0, 0.0, -1.0], [1.0, 0.0, 0.0]),
        ([0.6, 0.6, -0.5], [0.5, 0.5, 0.0]),
    ],
)
def test_the_nearest_weights_by_hand(values, expected):
    assert projected_to_weights(np.array(values)) == pytest.approx(expected, abs=1e-15)


def test_olmar_moves_to_what_has_fallen():
    "Two assets, expected moves 1.2 and 0.8: all goes to the first, which the average says will rise."
    moved = moving_average_reversion(np.array([0.5, 0.5]), np.array([1.2, 0.8]), 10.0)
    assert moved == pytest.approx([1.0, 0.0])
    same = moving_average_reversion(np.array([0.3, 0.7]), np.array([1.0, 1.0]), 10.0)
    assert same == pytest.approx([0.3, 0.7])


def test_without_costs_cash_stays_and_a_held_asset_earns_its_price():
    runs, notes = run_baselines(MARKET, PortfolioConfig(frictions="zero", min_notional=0.0))
    first, last = MARKET.decision_days[0], MARKET.decision_days[-1]
    assert (runs["cash"].equity == 100_000).all()
    for i, symbol in enumerate(PANEL.symbols):
        own = PANEL.close[last + 1, i] / PANEL.close[first + 1, i]
        assert runs[f"hold_{symbol}"].equity[-1] / 100_000 == pytest.approx(own, rel=1e-9)
    assert runs["ucrp"].equity[-1] == pytest.approx(runs["equal_weight_daily"].equity[-1], rel=1e-6)


def test_each_account_of_dice_has_a_seed_of_its_own():
    drawn = random_regimes(50, 4, seed=7)
    assert np.array_equal(drawn[:, 1:], random_regimes(50, 3, seed=8))
    assert set(random_regimes(500, 2).ravel()) == set(range(12))


def test_ranks_count_ties_half():
    assert percentile_among(2.0, [1.0, 2.0, 3.0, 4.0]) == pytest.approx(37.5)


def test_the_difference_of_the_same_curve_is_exactly_nothing():
    curve = np.cumprod(1 + np.random.default_rng(0).normal(0, 0.01, 300))
    found = difference(curve, curve, 252)
    assert found["annual"] == found["low"] == found["high"] == 0


def test_the_difference_of_a_constant_is_that_constant():
    "One account earns 1 basis point more each day: e^(252 × 0.0001) - 1 a year, whatever is drawn."
    curve = np.cumprod(1 + np.random.default_rng(0).normal(0, 0.01, 300))
    found = difference(curve * np.exp(1e-4 * np.arange(300)), curve, 252)
    expected = np.expm1(252 * 1e-4)
    assert [found[n] for n in ("annual", "low", "high")] == pytest.approx([expected] * 3, rel=1e-9)


def test_too_few_days_have_no_interval():
    assert difference(np.ones(10), np.ones(10), 252)["low"] is None
