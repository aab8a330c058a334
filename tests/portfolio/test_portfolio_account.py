"""Money of a portfolio: what costs are, that nothing appears or is lost, and that no future is seen."""

import numpy as np
import pandas as pd
import pytest
import torch

from trading_lib.data.simulated_panel import simulate_panel
from trading_lib.portfolio.market import portfolio_market
from trading_lib.portfolio.panel import PortfolioPanel
from trading_lib.portfolio.regimes import REGIMES
from trading_lib.portfolio.replay import replay_regimes
from trading_lib.portfolio_env import GPUPortfolioEnv, PortfolioConfig

PLACE = {regime.name: k for k, regime in enumerate(REGIMES)}


def changed(panel: PortfolioPanel, **arrays) -> PortfolioPanel:
    return PortfolioPanel(**{**vars(panel), **arrays})


def with_holes(seed: int = 0) -> PortfolioPanel:
    "One asset is listed late, one is gone early, and days are missing here and there."
    panel, random = simulate_panel(5, years=2, seed=seed), np.random.default_rng(seed)
    gone = random.random(panel.close.shape) < 0.03
    gone[:100, 0], gone[300:, 1] = True, True
    gone[0, 2:] = False
    return changed(
        panel,
        **{n: np.where(gone, np.nan, getattr(panel, n)) for n in ("open", "close", "raw_close", "volume")},
    )


# --- costs ------------------------------------------------------------------------------------------------

# `reference`: spread 0.02 %, slippage 0 to 0.05 % at random,
# impact 1 % × √(traded / portfolio) of what is traded
ENTERING = {
    "DEFENSIVE": 0.5 * (0.0002 + 0.00025 + 0.01 * 0.5**0.5),
    "LIGHT_CASH": 0.75 * (0.0002 + 0.00025 + 0.01 * 0.75**0.5),
    "EQUAL_WEIGHT": 0.0002 + 0.00025 + 0.01,
    "MOMENTUM": 0.0002 + 0.00025 + 0.01,
    "SAFE_QUALITY": 0.7 * (0.0002 + 0.00025 + 0.01 * 0.7**0.5),
    "FULL_CASH": 0.0,
}


@pytest.mark.parametrize("regime, expected", ENTERING.items())
def test_entering_a_regime_from_cash_costs_what_the_formula_says(regime, expected):
    "Within 2 %: what is traded is a share of the equity after costs, and slippage is drawn."
    env = GPUPortfolioEnv(simulate_panel(12, years=1), PortfolioConfig(n_envs=2000, frictions="reference"))
    env.reset(seed=0)
    env.step(torch.full((2000,), PLACE[regime]))
    assert (env.account.costs / 100_000).mean().item() == pytest.approx(expected, rel=0.02, abs=1e-12)


# --- conservation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frictions", ["broker", "reference", "zero"])
@pytest.mark.parametrize("own", [{}, {"whole_shares": True, "min_notional": 50.0}])
def test_equity_moves_by_what_prices_did_less_costs_and_haircut(frictions, own):
    """Orders fill at the close, so between two closes only what was held earns:
    units held × change of the last known price. Nothing else appears, and nothing is lost."""
    panel = with_holes()
    market, random = portfolio_market(panel), np.random.default_rng(1)
    actions = random.integers(0, 12, (len(market.decision_days), 40))
    config = PortfolioConfig(frictions=frictions, delisting_haircut=0.3, **own)
    path = replay_regimes(market, config, actions, seed=3)
    first = int(market.decision_days[0])
    mark = pd.DataFrame(panel.close).ffill().to_numpy()[first : first + len(path.equity)]
    units = path.value / mark[:, None, :]
    earned = (np.nan_to_num(units[:-1]) * np.nan_to_num(np.diff(mark, axis=0))[:, None, :]).sum(2)
    lost = path.costs + path.haircut
    assert np.abs(np.diff(path.equity, axis=0) - earned + lost).max() < 1e-9 * path.equity.max()
    assert np.abs(path.equity - path.cash - path.value.sum(2)).max() < 1e-9 * path.equity.max()
    assert (path.cash >= 0).all() and (path.value >= 0).all() and (path.costs >= 0).all()
    assert path.haircut.sum() > 0 and path.settled.sum() > 0


def test_without_costs_equal_weight_earns_the_mean_of_the_returns():
    panel = simulate_panel(4, years=1)
    market = portfolio_market(panel)
    days = market.decision_days
    actions = np.full((len(days), 1), PLACE["EQUAL_WEIGHT"])
    path = replay_regimes(market, PortfolioConfig(frictions="zero", min_notional=0.0), actions)
    # decided at day t, filled at the close of t+1: the first return is earned on t+2
    returns = (panel.close[1:] / panel.close[:-1] - 1).mean(1)
    expected = np.prod(1 + returns[days[0] + 1 : days[-1] + 1])
    assert path.equity[-1, 0] / path.equity[0, 0] == pytest.approx(expected, rel=1e-10)


# --- lookahead --------------------------------------------------------------------------------------------


def seen_until(panel: PortfolioPanel, cut: int) -> list[np.ndarray]:
    "Everything that is known or done up to the close of day `cut`."
    market = portfolio_market(panel, FIT)
    days = market.decision_days[market.decision_days <= cut - 1]
    actions = np.random.default_rng(5).integers(0, 12, (len(market.decision_days), 3))
    path = replay_regimes(market, PortfolioConfig(), actions)
    done = len(days)
    return [
        market.features[: cut + 1],
        market.scores[: cut + 1],
        market.eligible[: cut + 1],
        path.equity[: done + 1],
        path.order[:done],
        path.reward[:done],
    ]


PANEL = with_holes(2)
FIT = portfolio_market(PANEL).fit


def noise(panel, cut, random):
    factor = np.ones_like(panel.close)
    factor[cut + 1 :] = random.uniform(0.5, 2, panel.close[cut + 1 :].shape)
    return changed(panel, **{n: getattr(panel, n) * factor for n in ("open", "close", "raw_close", "volume")})


def nothing(panel, cut, random):
    hidden = np.zeros_like(panel.member)
    hidden[cut + 1 :] = True
    hidden[-1] = False  # the panel keeps its length
    return changed(
        panel,
        **{n: np.where(hidden, np.nan, getattr(panel, n)) for n in ("open", "close", "raw_close", "volume")},
    )


def truncated(panel, cut, random):
    arrays = {
        n: getattr(panel, n)[: cut + 2] for n in ("day", "open", "close", "raw_close", "volume", "member")
    }
    return changed(panel, stop=-1, **arrays)


def members(panel, cut, random):
    member = panel.member.copy()
    member[cut + 1 :] = random.random(member[cut + 1 :].shape) < 0.5
    return changed(panel, member=member)


@pytest.mark.parametrize("change", [noise, nothing, truncated, members])
@pytest.mark.parametrize("cut", [150, 260, 299, 310, 400])
def test_nothing_up_to_a_day_depends_on_what_comes_after_it(change, cut):
    before = seen_until(PANEL, cut)
    after = seen_until(change(PANEL, cut, np.random.default_rng(cut)), cut)
    for k, (one, other) in enumerate(zip(before, after)):
        assert np.array_equal(one, other, equal_nan=True), k


def test_a_later_split_moves_no_score():
    "Adjusted history is halved by a split that comes later; prices as traded are not."
    panel = with_holes(3)
    halved = changed(panel, open=panel.open / 2, close=panel.close / 2, volume=panel.volume * 2)
    one, other = portfolio_market(panel, FIT), portfolio_market(halved, FIT)
    assert np.array_equal(one.scores, other.scores, equal_nan=True)
