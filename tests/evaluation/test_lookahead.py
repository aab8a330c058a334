"""The check that users run on their own bars.

Honest layouts and fills pass it, each known kind of leak is caught and named.
"""

import numpy as np
import pandas as pd
import pytest

from trading_lib import features
from trading_lib.env import GPUVectorizedTradingEnv
from trading_lib.evaluation.lookahead import check_lookahead
from trading_lib.features import fit_features
from trading_lib.market import feature_blocks
from trading_lib.sources import simulate_bars

CUTS = 6


@pytest.fixture(scope="module", params=["crypto", "equity"])
def market(request):
    "Bars, and an honest fit of their first part: fitting itself would refuse most leaks."
    symbol, stop = {"crypto": ("SIM-USD", "2023-02-01"), "equity": ("SIM", "2023-05-01")}[request.param]
    bars = simulate_bars(symbol, "15Min", "2023-01-01", stop, seed=0, edge=0.0)
    return (
        bars,
        fit_features(bars.iloc[: int(0.6 * len(bars))], "5.6.0", "15Min", request.param),
        request.param,
    )


def checked(market):
    return check_lookahead(market[0], "5.6.0", "15Min", market[2], cuts=CUTS, refits=0, fit=market[1])


def planted(column, leak):
    "A way to replace one column of the price block."

    def plant(patch):
        honest = features.BLOCK_FUNCTIONS["price_6"]

        def dishonest(s):
            columns = list(honest(s))
            columns[column] = leak(s, columns[column])
            return columns

        patch.setitem(features.BLOCK_FUNCTIONS, "price_6", dishonest)

    return plant


def early(by):
    "A way to let hours be known before they are over."

    def plant(patch):
        groups = feature_blocks._groups

        def hasty(s):
            begin, over, known = groups(s)
            return begin, over - pd.Timedelta(by).value, known

        patch.setattr(feature_blocks, "_groups", hasty)

    return plant


def same_bar_fill(patch):
    "Orders fill at the open of the bar whose close they were decided on."
    step = GPUVectorizedTradingEnv.step_index

    def at_once(self, actions):
        market = self._market.clone()
        self._market[1:, 4] = market[:-1, 4]
        try:
            return step(self, actions)
        finally:
            self._market = market

    patch.setattr(GPUVectorizedTradingEnv, "step_index", at_once)


CONTEXT = {"h1_return", "h1_volatility", "h1_range"}
# kind -> how it is planted, what must be named
LEAKS = {
    "shift(-1)": (planted(0, lambda s, c: np.append(c[1:], c[-1])), {"norm_price"}),
    "centred window": (
        planted(
            0,
            lambda s, c: (
                s.close / pd.Series(s.close).rolling(5, center=True, min_periods=1).mean().to_numpy() - 1
            ),
        ),
        {"norm_price"},
    ),
    "global z-score": (planted(1, lambda s, c: (c - np.nanmean(c)) / np.nanstd(c)), {"returns"}),
    "back-fill": (
        planted(1, lambda s, c: pd.Series(np.where(s.index % 2, c, np.nan)).bfill().fillna(0).to_numpy()),
        {"returns"},
    ),
    "start-labelled higher timeframe": (early("1h"), CONTEXT),
    "same-bar fill": (same_bar_fill, {"fill at a price known before the order"}),
    "target as feature": (
        planted(4, lambda s, c: np.append(s.close[1:] / s.open[1:] - 1, 0.0)),
        {"momentum"},
    ),
    "unfinished bar": (early("15min"), CONTEXT),
}


def test_nothing_honest_is_accused(market):
    report = checked(market)
    assert report.passed and report.comparisons == 3 * 3 * CUTS and "PASSED" in str(report)


@pytest.mark.parametrize("kind", LEAKS)
def test_a_planted_leak_is_caught_and_named(market, monkeypatch, kind):
    plant, columns = LEAKS[kind]
    plant(monkeypatch)
    report = checked(market)
    named = {leak["column"] for leak in report.leaks}
    print(f"{market[2]:6} {kind:32} caught: {', '.join(sorted(named))}")
    assert named == columns and "FAILED" in str(report) and all(name in str(report) for name in columns)


def test_a_mask_that_knows_the_end_of_history_is_caught(market, monkeypatch):
    "Decisions that are allowed only where a hundred bars follow."
    from trading_lib.evaluation import lookahead

    honest = lookahead.market_data

    def knowing(bars, *options):
        data = honest(bars, *options)
        data.can_decide[-100:] = False
        return data

    monkeypatch.setattr(lookahead, "market_data", knowing)
    assert "mask can_decide" in {leak["column"] for leak in checked(market).leaks}


def test_a_stop_that_sees_the_next_bar_is_caught(market, monkeypatch):
    "Protective orders that look one bar too far: the account of a cut moves with the bar after it."
    step = GPUVectorizedTradingEnv.step_index

    def foresighted(self, actions):
        market = self._market.clone()
        self._market[:-1, 6] = market[:-1, 6].minimum(market[1:, 6])
        try:
            return step(self, actions)
        finally:
            self._market = market

    monkeypatch.setattr(GPUVectorizedTradingEnv, "step_index", foresighted)
    assert "accounts of random orders" in {leak["column"] for leak in checked(market).leaks}
