"""The simulated market against its own promises."""

import math
import subprocess
import sys
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
import torch
from stylised_facts import log_returns, return_correlations, variance_ratio

from trading_lib.account import AccountState, NextBar, account_rules, account_step
from trading_lib.bars import bar_clock, expected_labels, timeframe_seconds
from trading_lib.cli import main
from trading_lib.config import AccountConfig, InputError, parse_parameters
from trading_lib.data.simulation import (
    RECIPES,
    STATE_BARS,
    check_simulated_name,
    is_simulated_name,
    oracle_figures,
    simulate_bars,
    simulate_market,
    simulated_bars,
)
from trading_lib.pipeline.project import artefacts
from trading_lib.sources import load_with_report

SPAN = ("2022-01-01", "2022-07-01")


def next_returns(bars):
    return bars.close.to_numpy()[1:] / bars.close.to_numpy()[:-1] - 1


def pooled(symbol, edge, seeds=range(12), timeframe="15Min", span=SPAN):
    "Next returns and truth of several histories, in units of volatility."
    returns, expected, state = [], [], []
    for seed in seeds:
        bars, truth = simulate_market(symbol, timeframe, *span, seed, edge)
        scale = truth.volatility.to_numpy()[:-1]
        (
            returns.append(next_returns(bars) / scale),
            expected.append(truth.expected_return.to_numpy()[:-1] / scale),
            state.append(truth.state.to_numpy()[:-1]),
        )
    return np.concatenate(returns), np.concatenate(expected), np.concatenate(state)


@pytest.mark.parametrize(
    "symbol, timeframe, span",
    [
        ("SIM-USD", "15Min", SPAN),
        ("SIMA", "15Min", ("2015-01-01", "2017-01-01")),
        ("SIMA", "1Day", ("1980-01-01", "2020-01-01")),
        ("SIM-USD", "1Hour", ("2018-01-01", "2020-01-01")),
    ],
)
def test_martingale_at_edge_zero(symbol, timeframe, span):
    """The mean of the next return is 0: over all bars, after a rise, after a fall, in each state, and in the
    opening gap."""
    z, expected, state = pooled(symbol, 0.0, timeframe=timeframe, span=span)
    assert not expected.any()
    assert abs(z.std() - 1) < 0.02  # `volatility` is the standard deviation
    earlier, later = z[:-1], z[1:]
    for sample in (
        z,
        z[state > 0],
        z[state < 0],
        later[earlier > 0],
        later[earlier < 0],
        later[earlier < -2],
    ):
        assert abs(sample.mean()) < 3.5 * sample.std() / len(sample) ** 0.5


@pytest.mark.slow
def test_prices_are_a_martingale_over_whole_histories():
    """The mean over 3000 histories of last price over first is 1: simple returns, not logarithms, whose mean
    is negative."""
    ratios = []
    for seed in range(3000):
        bars = simulate_bars("SIM-USD", "1Day", "2022-01-01", "2022-03-01", seed, 0.0)
        ratios.append(bars.close.iloc[-1] / bars.close.iloc[0])
    ratios = np.array(ratios)
    error = ratios.std() / len(ratios) ** 0.5
    assert abs(ratios.mean() - 1) < 3.5 * error and np.log(ratios).mean() < -3.5 * error


@pytest.mark.parametrize("symbol", ["SIM-USD", "SIMA"])
@pytest.mark.parametrize("edge", [0.1, 0.5])
def test_expected_return_is_exact(symbol, edge):
    """Regression of the realised next return on the expected one: slope 1, intercept 0, and nothing left to
    earn."""
    z, expected, state = pooled(symbol, edge)
    assert np.allclose(expected, edge * state, rtol=1e-12)
    error = (expected @ expected) ** -0.5
    slope = z @ expected / (expected @ expected)
    assert abs(slope - 1) < 3.5 * error and error < 0.1
    rest = z - expected
    assert abs(rest.mean()) < 3.5 * rest.std() / len(rest) ** 0.5
    assert abs(np.mean(rest * state)) < 3.5 * rest.std() / len(rest) ** 0.5


def test_the_opening_gap_carries_its_share_of_the_drift():
    """Overnight moves of an equity: what is expected by variance share, so that no leg of the bar is free
    money."""
    gaps, days = [], []
    for seed in range(40):
        bars, truth = simulate_market("SIMA", "1Day", "2000-01-01", "2008-01-01", seed, 0.5)
        side = truth.state.to_numpy()[:-1] / truth.volatility.to_numpy()[:-1]
        o, c = bars.open.to_numpy(), bars.close.to_numpy()
        gaps.append((o[1:] / c[:-1] - 1) * side), days.append((c[1:] / o[1:] - 1) * side)
    gap, day = np.concatenate(gaps), np.concatenate(days)
    share = 0.55**2 / (1 + 0.55**2)  # overnight volatility is 0.55 of a session's
    for leg, part in ((gap, share), (day, 1 - share)):
        assert abs(leg.mean() - 0.5 * part) < 4 * leg.std() / len(leg) ** 0.5
        assert abs(leg.std() - part**0.5) < 0.05


def test_the_state_lasts_as_documented():
    state = simulate_market("SIM-USD", "15Min", "2022-01-01", "2026-01-01", 0, 0.1)[1].state.to_numpy()
    switches = int((np.diff(state) != 0).sum())
    expected = len(state) / STATE_BARS
    assert set(state) == {-1, 1} and abs(switches - expected) < 4 * expected**0.5
    beginnings = [
        simulate_market("SIM-USD", "15Min", "2022-01-01", "2022-01-02", seed, 0.1)[1].state.iloc[0]
        for seed in range(200)
    ]
    assert abs(np.mean(beginnings)) < 4 / 200**0.5


def test_the_truth_is_of_the_next_bar_and_known():
    "Row t of the truth is settled at the close of bar t: cutting the history there leaves it as it was."
    bars, truth = simulate_market("SIMA", "15Min", "2022-01-01", "2022-04-01", 3, 0.2)
    assert truth.index.equals(bars.index)
    for cut in (40, 500, 1000):
        shorter, known = simulate_market(
            "SIMA", "15Min", "2022-01-01", bars.index[cut] + pd.Timedelta("15min"), 3, 0.2
        )
        assert len(shorter) == cut + 1
        pd.testing.assert_frame_equal(shorter, bars.iloc[: cut + 1], rtol=0, atol=0)
        pd.testing.assert_frame_equal(known, truth.iloc[: cut + 1], rtol=0, atol=0)


def test_an_oracle_earns_and_nobody_else_does():
    z, expected, state = pooled("SIM-USD", 0.1)
    assert abs((z * state).mean() - 0.1) < 4 / len(z) ** 0.5
    coin = np.random.default_rng(0).choice([-1, 1], len(z))
    assert abs((z * coin).mean()) < 4 / len(z) ** 0.5


@pytest.mark.parametrize(
    "symbol, other, correlation", [("SIM-USD", "SIM2-USD", (0.55, 0.85)), ("SIMA", "SIMB", (0.25, 0.65))]
)
def test_stylised_facts(symbol, other, correlation):
    bars, companion = (simulate_bars(s, "15Min", "2022-01-01", "2024-01-01", 5, 0.0) for s in (symbol, other))
    r = bars.close.pct_change().dropna()
    assert r.abs().autocorr(1) > 0.1 and r.abs().autocorr(20) > 0.03 and abs(r.autocorr(1)) < 0.05
    assert 6 < r.kurt() + 3 < 40 and abs(r.skew()) < 1
    assert correlation[0] < r.corr(companion.close.pct_change().dropna()) < correlation[1]
    assert r.abs().corr(bars.volume.iloc[1:]) > 0.25  # volume goes with volatility
    assert (
        r.corr(simulate_bars(other, "15Min", "2022-01-01", "2024-01-01", 6, 0.0).close.pct_change().dropna())
        < 0.05
    )  # another seed, another market
    assert (bars.open.iloc[1:].to_numpy() != bars.close.iloc[:-1].to_numpy()).all()


@pytest.mark.slow
def test_scales():
    """About 0.3 % per quarter-hour in crypto, 0.25 % in equities, growing with the root of the bar's length;
    prices that a small account can buy."""
    for symbol, volatility in (("SIM-USD", 0.003), ("SIMA", 0.0025)):
        r = np.concatenate(
            [
                np.log(b.close / b.open)
                for b in (simulate_bars(symbol, "15Min", *SPAN, seed, 0.0) for seed in range(10))
            ]
        )
        assert r.std() == pytest.approx(volatility, rel=0.1)
    by_length = {}
    for timeframe in ("1Min", "15Min", "4Hour"):
        span = ("2022-01-01", "2022-03-01") if timeframe == "1Min" else ("2015-01-01", "2022-01-01")
        by_length[timeframe] = np.mean(
            [
                simulate_market("SIM-USD", timeframe, *span, s, 0.0)[1].volatility.pow(2).mean() ** 0.5
                for s in range(3)
            ]
        )
    assert by_length["4Hour"] / by_length["15Min"] == pytest.approx(4, rel=0.15) and by_length[
        "15Min"
    ] / by_length["1Min"] == pytest.approx(15**0.5, rel=0.15)
    assert all(
        20 <= simulate_bars(s, "1Day", "2022-01-01", "2022-01-20", 0, 0.0).open.iloc[0] < 62
        for s in ("SIMA", "SIMB", "ZZZ")
    )


def test_seasons():
    "Wild mornings, a livelier end of the day; the plain recipe is a symmetric U."
    stock = simulate_market("SIMA", "15Min", "2015-01-01", "2022-01-01", 0, 0.0, recipe="plain")
    lifelike = simulate_bars("SIMA", "15Min", "2015-01-01", "2022-01-01", 0, 0.0)
    by_hour = (
        np.log(lifelike.close / lifelike.open)
        .abs()
        .groupby(stock[0].index.tz_convert("America/New_York").hour)
        .mean()
    )
    assert by_hour[9] > 1.5 * by_hour[12] and by_hour[15] > by_hour[12]
    hour = stock[0].index.tz_convert("America/New_York").hour
    size = np.log(stock[0].close / stock[0].open).abs().groupby(hour).mean()
    assert size[9] > 1.2 * size[12] and size[15] > 1.2 * size[12]
    assert stock[0].volume.groupby(hour).mean()[12] < 0.7 * stock[0].volume.groupby(hour).mean()[9]
    # the first clock hour of a session is half an hour long
    hourly = simulate_bars("SIMA", "1Hour", "2015-01-01", "2022-01-01", 0, 0.0, recipe="plain")
    size = np.log(hourly.close / hourly.open).groupby(hourly.index.tz_convert("America/New_York").hour).std()
    assert size[9] < 0.95 * size[10]
    # the truth knows that the night is wilder than a quarter-hour
    last = bar_clock(stock[0].index, "15Min", "equity").last_of_session
    assert stock[1].volatility[last].mean() > 2 * stock[1].volatility[~last].mean()


@pytest.mark.parametrize(
    "symbol, timeframe",
    [
        ("SIM-USD", "1Min"),
        ("SIM-USD", "15Min"),
        ("SIM-USD", "1Day"),
        ("SIMA", "5Min"),
        ("SIMA", "15Min"),
        ("SIMA", "1Hour"),
        ("SIMA", "4Hour"),
        ("SIMA", "1Day"),
    ],
)
def test_simulated_bars_are_good_bars(symbol, timeframe):
    days = 40 if timeframe_seconds(timeframe) < 3600 else 4000
    end = str((pd.Timestamp("2012-01-01") + pd.Timedelta(days=days)).date())
    bars, report = load_with_report(
        symbol, timeframe, "simulated", start="2012-01-01", end=end, seed=2, edge=0.3
    )
    asset_class = report["asset_class"]
    assert (
        bars.index.equals(expected_labels(timeframe, asset_class, "2012-01-01", end))
        and report["segments"] == 1
    )
    assert not any(report["repaired"].values()) and not any(
        v for k, v in report["findings"].items() if k not in ("large_steps", "wide_ranges")
    )
    assert (bars.high > bars.low).all() and (bars.volume > 0).all() and bars.notna().all().all()
    if asset_class == "equity":
        assert (bars.volume == bars.volume.round()).all()


@pytest.mark.slow
def test_same_seed_same_market_in_any_process():
    "Python's own hash differs from process to process; the market must not."
    code = """if True:
        from trading_lib.bars import fingerprint
        from trading_lib.data.simulation import simulate_bars

        bars = simulate_bars("SIM-USD", "15Min", "2022-01-01", "2022-02-01", 7, 0.1)
        print(fingerprint(bars)["sha256"])
    """
    prints = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": h, "PYTHONPATH": ":".join(p for p in sys.path if p)},
        ).stdout
        for h in ("1", "2")
    }
    assert len(prints) == 1 and len(prints.pop().strip()) == 64
    a, b = (simulate_bars(s, "15Min", *SPAN, 7, 0.1) for s in ("SIM-USD", "SIM/USD"))
    pd.testing.assert_frame_equal(a, b)
    assert not np.allclose(a.close, simulate_bars("SIM2-USD", "15Min", *SPAN, 7, 0.1).close)


def test_simulation_refuses():
    for wrong in (
        dict(seed=-1),
        dict(seed=1.5),
        dict(edge=-0.1),
        dict(edge=2),
        dict(edge="x"),
        dict(start="2022-01-02", end="2022-01-01"),
        dict(asset_class="bond"),
        dict(symbol=""),
        dict(timeframe="7Min"),
        dict(symbol="SIMA", start="2022-01-01", end="2022-01-02"),
        dict(symbol="SIMA", start="2040-01-01", end="2041-01-01"),
        dict(start="soon"),
    ):
        with pytest.raises(InputError):
            simulate_market(**wrong)


# --- recipes ------------------------------------------------------------------------------------------------


def test_the_default_market_is_the_one_that_results_were_calibrated_on():
    """A pin, not a truth: trained agents and stated results belong to these bars. Change the recipe, not the
    default."""
    pinned = {
        ("SIM-USD", "15Min"): (300.205989183, 300.537050355, 300.043115307, 300.053629204, 18496.9091222),
        ("SIMA", "15Min"): (20.6234018555, 20.9074611264, 20.6171955667, 20.8473042723, 2926692),
        ("SIMA", "1Day"): (35.2837649955, 35.94457999, 34.698212603, 34.7159563612, 14873859),
    }
    for (symbol, timeframe), values in pinned.items():
        bars = simulate_bars(symbol, timeframe, "2022-01-01", "2023-01-01", seed=0, edge=0.1)
        assert bars.iloc[-1].tolist() == pytest.approx(values, rel=1e-9)


@pytest.mark.parametrize("symbol, timeframe", [("SIM-USD", "15Min"), ("SIMA", "15Min"), ("SIMA", "1Day")])
def test_the_bridge_changes_the_range_alone(symbol, timeframe):
    plain, bridged = (
        simulate_market(symbol, timeframe, "2022-01-01", "2023-01-01", 3, 0.2, recipe=r)
        for r in ("plain", "bridged")
    )
    pd.testing.assert_frame_equal(plain[1], bridged[1], rtol=0, atol=0)
    pd.testing.assert_frame_equal(
        plain[0].drop(columns=["high", "low"]), bridged[0].drop(columns=["high", "low"]), rtol=0, atol=0
    )
    assert (
        (bridged[0].high >= plain[0].high).all()
        and (bridged[0].low <= plain[0].low).all()
        and (bridged[0].low > 0).all()
    )
    assert (bridged[0].high > plain[0].high).mean() > 0.8


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "plain"])
def test_every_recipe_gives_good_bars_and_a_known_truth(recipe):
    for symbol in ("SIM-USD", "SIMA"):
        bars, truth = simulate_market(symbol, "15Min", "2022-01-01", "2022-04-01", 3, 0.2, recipe=recipe)
        assert (
            (bars.low <= bars[["open", "close"]].min(axis=1)).all()
            and (bars.high >= bars[["open", "close"]].max(axis=1)).all()
            and (bars.volume > 0).all()
            and bars.notna().all().all()
        )
        for cut in (40, 900):
            shorter, known = simulate_market(
                symbol, "15Min", "2022-01-01", bars.index[cut] + pd.Timedelta("15min"), 3, 0.2, recipe=recipe
            )
            pd.testing.assert_frame_equal(shorter, bars.iloc[: cut + 1], rtol=0, atol=0)
            pd.testing.assert_frame_equal(known, truth.iloc[: cut + 1], rtol=0, atol=0)
    with pytest.raises(InputError, match="recipe"):
        simulate_market(recipe="realistic")


@pytest.mark.parametrize("symbol", ["SIM-USD", "SIMA"])
def test_high_and_low_of_a_bridge_are_those_of_a_continuous_walk(symbol):
    """Of a Brownian motion, E[(ln H/L)^2] = 4 ln 2 times its variance (Parkinson 1980), and P(high is x above
    the larger end) follows the reflection principle."""
    b = pd.concat(
        [
            simulate_bars(symbol, "15Min", "2022-01-01", "2023-01-01", seed, 0.0, recipe="bridged")
            for seed in range(6)
        ]
    )
    body, span = np.log(b.close / b.open), np.log(b.high / b.low)
    assert (span**2).mean() / (body**2).mean() == pytest.approx(4 * math.log(2), rel=0.04)
    # for any end c of a bridge of variance v, E[ln(H/O) ln(H/C)] = v / 2: the product is exponential
    assert (np.log(b.high / b.open) * np.log(b.high / b.close)).mean() / (body**2).mean() == pytest.approx(
        0.5, rel=0.04
    )
    assert (np.log(b.low / b.open) * np.log(b.low / b.close)).mean() / (body**2).mean() == pytest.approx(
        0.5, rel=0.04
    )


@pytest.mark.parametrize("symbol", ["SIM-USD", "SIMA"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_orders_inside_a_bar_earn(recipe, symbol):
    """A stop or a target half a percent from every close, for one bar. Its fill is worth the bar's close, but
    for plain bars, whose path jumps over the level."""
    stops, targets = [], []
    for seed in range(12):
        b = simulate_bars(symbol, "15Min", *SPAN, 50 + seed, 0.0, recipe=recipe)
        before = b.close.shift(1)
        stop, target = before * 0.995, before * 1.005
        (
            stops.append((stop / b.close - 1)[(b.low <= stop) & (b.open > stop)]),
            targets.append((target / b.close - 1)[(b.high >= target) & (b.open < target)]),
        )
    for leg, sign in ((stops, 1), (targets, -1)):
        gift = 1e4 * sign * pd.concat(leg)
        error = gift.std() / len(gift) ** 0.5
        if recipe == "plain":
            assert 4 < gift.mean() < 14
        else:
            assert abs(gift.mean()) < 3.5 * error and error < 1.5


# --- symbols together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, symbol, other",
    [
        ("plain", "SIM-USD", "SIM2-USD"),
        ("plain", "SIMA", "SIMB"),
        ("lifelike", "SIM-USD", "SIM2-USD"),
        ("lifelike", "SIMA", "SIMB"),
    ],
)
def test_symbols_of_one_seed_share_the_stated_part(recipe, symbol, other):
    """Noise in units of volatility: the market's share times E[width]^2, since turbulence is each symbol's
    own. Trends are not shared."""
    share = RECIPES[recipe]["crypto" if "-" in symbol else "equity"].market_share
    assert share == (0.8 if recipe == "lifelike" and "-" in symbol else 0.5)
    width = 0.05 * 2 + 0.95 * math.sqrt((1 - 0.05 * 4) / 0.95)
    noise, states = [], []
    for seed in range(6):
        parts = [simulate_market(s, "15Min", *SPAN, seed, 0.0, recipe=recipe) for s in (symbol, other)]
        (
            noise.append([next_returns(b) / t.volatility.to_numpy()[:-1] for b, t in parts]),
            states.append([t.state.to_numpy() for _, t in parts]),
        )
        together = return_correlations(
            {symbol: parts[0][0], other: parts[1][0]}, "15Min", "crypto" if "-" in symbol else "equity"
        ).iloc[0, 1]
        assert share * 0.65 < together < share  # volatilities that differ make it smaller
    z = np.concatenate(noise, 1)
    assert np.corrcoef(z)[0, 1] == pytest.approx(share * width**2, abs=3.5 * 1.5 / z.shape[1] ** 0.5)
    assert abs(np.mean([np.mean(a * b) for a, b in states])) < 0.2


def test_raw_returns_and_volatilities_correlate_as_computed():
    """corr(r1, r2) = share E[width]^2 E[s1 s2] / E[s^2], with log-volatilities of variance 1/4 that share one
    half: a factor exp(-1/8). Shocks to log-volatility share one half."""
    returns, shocks = [], []
    for seed in range(20):
        parts = [
            simulate_market(s, "1Hour", "2015-01-01", "2017-01-01", seed, 0.0, recipe="plain")
            for s in ("SIM-USD", "SIM2-USD")
        ]
        returns.append([next_returns(b) for b, _ in parts])
        slow = [np.log(t.volatility.to_numpy()) for _, t in parts]
        hour = parts[0][1].index.hour
        slow = [v - pd.Series(v).groupby(hour).transform("mean").to_numpy() for v in slow]
        shocks.append([v[1:] - 0.98 * v[:-1] for v in slow])
    width = 0.05 * 2 + 0.95 * math.sqrt((1 - 0.05 * 4) / 0.95)
    each = [np.corrcoef(r)[0, 1] for r in returns]
    r = np.concatenate(returns, 1)
    assert np.corrcoef(r)[0, 1] == pytest.approx(
        0.5 * width**2 * math.exp(-1 / 8), abs=4 * np.std(each) / len(each) ** 0.5
    )
    assert np.corrcoef(np.concatenate(shocks, 1))[0, 1] == pytest.approx(0.5, abs=0.02)


def test_other_seeds_and_other_asset_classes_are_other_markets():
    z = {}
    for name, symbol, seed in (("a", "SIM-USD", 0), ("b", "SIM2-USD", 1), ("c", "SIMA", 0)):
        bars, truth = simulate_market(symbol, "1Day", "1990-01-01", "2020-01-01", seed, 0.0)
        z[name] = pd.Series(next_returns(bars) / truth.volatility.to_numpy()[:-1], bars.index[1:])
    z = pd.DataFrame(z).dropna()
    assert len(z) > 7000 and abs(z.corr().to_numpy()[np.triu_indices(3, 1)]).max() < 4 / len(z) ** 0.5


# --- nobody earns on a martingale ---------------------------------------------------------------------------


def simple_strategies(bars, asset_class):
    """Name -> position after each close, from bars up to it: a family that people try first. Opposites are
    the same test with the other sign."""
    close, log_volume, last = bars.close, np.log(bars.volume), bars.close.pct_change()
    family = {f"momentum {k}": np.sign(close.pct_change(k)) for k in (1, 2, 4, 16, 96)}
    family |= {
        f"averages {a}/{b}": np.sign(close.rolling(a).mean() - close.rolling(b).mean())
        for a, b in ((5, 20), (20, 100), (50, 200))
    }
    local = (bars.index + pd.Timedelta("15min")).tz_convert(
        "America/New_York" if asset_class == "equity" else "UTC"
    )  # of the bar that is held
    family |= {
        f"hour {h}": pd.Series((local.hour == h).astype(float), bars.index)
        for h in range(24)
        if (local.hour == h).any()
    }
    family |= {f"weekday {d}": pd.Series((local.weekday == d).astype(float), bars.index) for d in range(5)}
    busy = np.sign(log_volume - log_volume.rolling(96).median())
    family |= {
        "busy": busy,
        "busy with the move": busy * np.sign(last),
        "volume rises": np.sign(log_volume.diff()),
    }
    wild = np.sign(last.abs().rolling(20).mean() - last.abs().rolling(200).mean())
    family |= {
        "wild": wild,
        "wild, against the move": -wild * np.sign(last),
        "close in its range": np.sign(2 * close - bars.high - bars.low),
        "gap": np.sign(bars.open - close.shift(1)),
    }
    return {name: p.fillna(0.0).to_numpy() for name, p in family.items()}


def leaking_strategies(bars, asset_class):
    "Mistakes that people make: each sees the next bar, if only a little."
    close = bars.close
    following = np.sign(close.shift(-1) - close)
    one_in_twenty = np.arange(len(bars)) % 20 == 0
    hour_close = close.groupby(bars.index.floor("h")).transform(
        "last"
    )  # hour bars by their start: known too early
    return {
        name: p.fillna(0.0).to_numpy()
        for name, p in {
            "average that is centred": np.sign(
                close.rolling(21, center=True).mean() - close.rolling(100).mean()
            ),
            "one bar in twenty": pd.Series(
                np.where(one_in_twenty, following, np.sign(close.pct_change())), bars.index
            ),
            "hour bars by their start": np.sign(hour_close - close),
        }.items()
    }


def scores(symbol, recipe, strategies, edge=0.0):
    "Name -> t-value of the profit before costs, pooled over histories, in units of volatility."
    asset_class, total = "crypto" if "-" in symbol else "equity", {}
    for seed in range(200, 206):
        bars, truth = simulate_market(
            symbol,
            "15Min",
            "2022-01-01",
            "2022-07-01" if asset_class == "crypto" else "2023-07-01",
            seed,
            edge,
            recipe=recipe,
        )
        z = next_returns(bars) / truth.volatility.to_numpy()[:-1]
        for name, position in strategies(bars, asset_class).items():
            profit = position[:-1] * z
            total[name] = total.get(name, np.zeros(2)) + (profit.sum(), (profit**2).sum())
    return {name: a / b**0.5 for name, (a, b) in total.items() if b > 0}


MARKETS = [("SIM-USD", "plain"), ("SIMA", "plain"), ("SIM-USD", "lifelike"), ("SIMA", "lifelike")]


def threshold(n):
    return NormalDist().inv_cdf(
        1 - 0.01 / (2 * n * len(MARKETS))
    )  # Bonferroni: one false alarm in a hundred for all of them together


@pytest.mark.parametrize("symbol, recipe", MARKETS)
def test_no_simple_strategy_earns_before_costs(symbol, recipe):
    """Neither any of the family nor the family as a whole: t-values are as large as chance makes them, and no
    smaller."""
    t = scores(symbol, recipe, simple_strategies)
    assert len(t) > 25
    worst = max(t, key=lambda name: abs(t[name]))
    size = np.mean(np.square(list(t.values()))) ** 0.5
    print(
        f"\n{symbol}, {recipe}: {len(t)} strategies, largest |t| {abs(t[worst]):.2f} ({worst}), "
        f"limit {threshold(len(t)):.2f}, root mean square {size:.2f}"
    )
    assert abs(t[worst]) < threshold(len(t)) and 0.6 < size < 1.4


@pytest.mark.parametrize("symbol, recipe", MARKETS)
def test_the_same_test_catches_a_look_ahead_and_an_edge(symbol, recipe):
    leaks, n = scores(symbol, recipe, leaking_strategies), 40
    print(f"\n{symbol}, {recipe}: " + ", ".join(f"{name} t = {value:.1f}" for name, value in leaks.items()))
    assert len(leaks) == 3 and min(leaks.values()) > threshold(n)
    assert max(scores(symbol, recipe, simple_strategies, edge=0.1).values()) > threshold(n)


@pytest.mark.slow
@pytest.mark.parametrize("symbol, recipe", MARKETS)
def test_means_and_variance_ratios_at_many_horizons(symbol, recipe):
    "Simple returns over 1 to 960 bars have mean 0; variances add up."
    asset_class = "crypto" if "-" in symbol else "equity"
    histories = [
        simulate_bars(symbol, "15Min", "2020-01-01", "2021-07-01", seed, 0.0, recipe=recipe)
        for seed in range(300, 306)
    ]
    for horizon in (1, 4, 16, 96, 960):
        r = np.concatenate([b.close.iloc[::horizon].pct_change().dropna() for b in histories])
        assert abs(r.mean()) < 3.5 * r.std() / len(r) ** 0.5
    for q in (2, 4, 16, 48):
        z = [
            (ratio - 1) / error
            for ratio, error in (variance_ratio(log_returns(b, "15Min", asset_class), q) for b in histories)
        ]
        assert abs(np.mean(z)) < 3.5 / len(z) ** 0.5


@pytest.mark.parametrize("recipe", ["plain", "lifelike"])
def test_after_costs_they_lose_exactly_their_costs(recipe):
    """The project's own account at 27 basis points a side, 120 histories: profit before costs is 0 within its
    error; what is lost is rate times traded value."""
    n, rate = 120, 27e-4
    histories = [
        simulate_bars("SIM-USD", "15Min", "2022-01-01", "2022-01-06", 1000 + seed, 0.0, recipe=recipe)
        for seed in range(n)
    ]
    want = torch.tensor(
        np.stack(
            [
                [
                    b.close.rolling(5).mean() > b.close.rolling(20).mean(),
                    b.close.diff() < 0,
                    b.volume.diff() > 0,
                ]
                for b in histories
            ]
        )
    )  # (n, strategies, bars)
    price = {
        c: torch.tensor(np.repeat(np.stack([b[c].to_numpy() for b in histories]), 3, 0))
        for c in ("open", "high", "low", "close")
    }
    want, length = want.flatten(0, 1), len(histories[0])
    account = AccountConfig(
        costs="zero",
        commission_bps=1e4 * rate,
        stop_pct=0.0,
        target_pct=0.0,
        safety_buffer_pct=0.0,
        base_alloc=0.5,
        max_position_pct=0.5,
    )
    rules = account_rules(account, "crypto")
    state = AccountState.initial(rules, 3 * n)
    ones = torch.ones(3 * n, dtype=torch.float64)
    for t in range(length - 1):
        bar = NextBar(
            *(price["close"][:, t], *(price[c][:, t + 1] for c in ("open", "high", "low", "close"))),
            0 * ones,
            1e12 * ones,
            ones.bool(),
        )
        held = state.quantity > 0
        state, _ = account_step(
            state, torch.where(want[:, t] & ~held, 1.0, 0.0).double(), ones, ~want[:, t] & held, bar, rules
        )
    net, costs = (state.equity - rules.initial).reshape(n, 3), state.costs.reshape(n, 3)
    gross = net + costs
    torch.testing.assert_close(costs, rate * state.traded_value.reshape(n, 3))
    for name, before, after, paid in zip(
        ("averages", "reversal", "volume"), gross.T.numpy(), net.T.numpy(), costs.T.numpy()
    ):
        error = before.std() / n**0.5
        print(
            f"\n{recipe}, {name}: before costs {before.mean():+.1f} ± {error:.1f}, "
            f"costs {paid.mean():.1f}, after {after.mean():+.1f}"
        )
        assert (
            abs(before.mean()) < 3.5 * error
            and abs(after.mean() + paid.mean()) < 3.5 * error
            and after.mean() < -3.5 * error
        )


# --- what an oracle earns -----------------------------------------------------------------------------------


def made_by(bars, truth, cost, allow_short):
    "Profit per unit of money, growth and Sharpe ratio of the oracle's positions: a slow walk over closes."
    close, expected = bars.close.tolist(), truth.expected_return.tolist()
    growth, held, results = 1.0, 0, []
    for t in range(len(close) - 1):
        position = 1 if expected[t] > 0 else -1 if expected[t] < 0 and allow_short else 0
        paid, r = cost * abs(position - held), close[t + 1] / close[t] - 1
        if t == len(close) - 2:
            paid += cost * abs(position)
        results.append(position * r - paid)
        growth *= (1 - cost * abs(position - held)) * (1 + position * r)
        held = position
    return sum(results), growth * (1 - cost * abs(held)), np.mean(results) / np.std(results)


def test_oracle_figures_by_hand():
    "Five bars: up, up, down, down, and a last row that speaks of a bar beyond."
    truth = pd.DataFrame(
        {"expected_return": [0.01, 0.02, -0.03, -0.01, 0.5], "volatility": [0.1, 0.2, 0.3, 0.1, 9.0]}
    )
    f = oracle_figures(truth, cost=0.001)
    assert (
        f["bars"] == 4
        and f["turnover"] == 1 + 2 + 1
        and f["profit"] == pytest.approx(0.07 - 0.004)
        and f["profit_error"] == pytest.approx(0.15**0.5)
        and f["break_even_cost"] == pytest.approx(0.07 / 4)
    )
    assert f["growth"] == pytest.approx(0.999 * 1.01 * 1.02 * 0.998 * 1.03 * 1.01 * 0.999)
    means = [0.009, 0.02, 0.028, 0.009]
    assert f["sharpe"] == pytest.approx(np.mean(means) / (0.15 / 4 + np.var(means)) ** 0.5)
    f = oracle_figures(truth, cost=0.001, allow_short=False)
    assert (
        f["turnover"] == 2
        and f["profit"] == pytest.approx(0.03 - 0.002)
        and f["profit_error"] == pytest.approx(0.05**0.5)
        and f["growth"] == pytest.approx(0.999 * 1.01 * 1.02 * 0.999)
    )
    none = oracle_figures(truth.assign(expected_return=0.0), cost=0.001)
    assert (none["turnover"], none["profit"], none["growth"], none["sharpe"], none["break_even_cost"]) == (
        0,
        0,
        1,
        0,
        0,
    )
    with pytest.raises(InputError, match="truth of simulate_market"):
        oracle_figures(truth.drop(columns="volatility"))
    with pytest.raises(InputError, match="cost"):
        oracle_figures(truth, cost=27)


@pytest.mark.parametrize(
    "symbol, recipe, edge, cost, allow_short",
    [
        ("SIM-USD", "plain", 0.2, 0.0, True),
        ("SIM-USD", "plain", 0.2, 0.0027, False),
        ("SIMA", "plain", 0.5, 0.0002, True),
        ("SIM-USD", "lifelike", 0.3, 0.001, True),
    ],
)
def test_an_oracle_makes_what_is_computed(symbol, recipe, edge, cost, allow_short):
    """70 histories: standardised profits have mean 0 and spread 1; growth over its expectation has mean 1;
    Sharpe ratios are centred on the computed ones."""
    profits, growths, sharpes, expected_sharpes = [], [], [], []
    for seed in range(400, 470):
        bars, truth = simulate_market(
            symbol,
            "15Min",
            "2022-01-03",
            "2022-02-03" if symbol != "SIMA" else "2022-05-03",
            seed,
            edge,
            recipe=recipe,
        )
        f, (profit, growth, sharpe) = (
            oracle_figures(truth, cost, allow_short),
            made_by(bars, truth, cost, allow_short),
        )
        (
            profits.append((profit - f["profit"]) / f["profit_error"]),
            growths.append(growth / f["growth"]),
            sharpes.append(sharpe),
            expected_sharpes.append(f["sharpe"]),
        )
    n = len(profits)
    assert (
        abs(np.mean(profits)) < 3.5 / n**0.5 and abs(np.std(profits) - 1) < 3.5 * (3 / (4 * n)) ** 0.5
    )  # error of a standard deviation, kurtosis 4
    assert abs(np.mean(growths) - 1) < 3.5 * np.std(growths) / n**0.5
    difference = np.subtract(sharpes, expected_sharpes)
    assert abs(difference.mean()) < 3.5 * difference.std() / n**0.5
    assert np.mean(expected_sharpes) > 10 * difference.std() / n**0.5  # there is something to measure


def test_the_long_run_sharpe_ratio_has_a_closed_form():
    """Daily crypto has no time of day: edge E[s] / sqrt(E[s^2] + var(edge s)), with s log-normal of
    log-variance 1/4 whose normal is cut off at 3."""
    edge, cut, std = 0.3, np.linspace(-8, 8, 400_001), 0.5
    weight = np.exp(-(cut**2) / 2) / np.exp(-(cut**2) / 2).sum()
    s = np.exp(std * np.clip(cut, -3, 3))
    first, second = weight @ s, weight @ s**2
    expected = edge * first / (second * (1 + edge**2) - edge**2 * first**2) ** 0.5
    figures = [
        oracle_figures(
            simulate_market("SIM-USD", "1Day", "1980-01-01", "2010-01-01", seed, edge, recipe="plain")[1]
        )["sharpe"]
        for seed in range(20)
    ]
    assert np.mean(figures) == pytest.approx(expected, abs=3.5 * np.std(figures) / len(figures) ** 0.5)
    assert np.std(figures) < 0.05 * expected


# names


@pytest.mark.parametrize(
    "name, simulated",
    [
        ("SIM-USD", True),
        ("SIM2-USD", True),
        ("SIMA", True),
        ("SIM.X", True),
        *(
            (name, False)
            for name in (
                "TSLA",
                "BTC-USD",
                "SPY",
                "SIM",
                "SIMO",
                "SIMS",
                "sim-usd",
                "Sim-USD",
                "ASIM",
                "S-IM",
                " SIM-USD",
                "SIM-USD\n",
                "SMI-USD",
                "",
                None,
            )
        ),
    ],
)
def test_a_simulated_market_has_a_name_that_is_no_tickers(name, simulated):
    """By the source, by the command, and at every path of a symbol that is simulated; the function that makes
    the bars takes any name."""
    assert is_simulated_name(name) is simulated
    if simulated or not name or name != name.strip():
        return
    parameters = parse_parameters({})
    for act in (
        lambda: load_with_report(name, "15Min", "simulated"),
        lambda: artefacts(parameters, name),
        lambda: check_simulated_name(name),
    ):
        with pytest.raises(
            InputError,
            match=rf"^{name}: .*simulated.*SIM…, such as SIM-USD.*set data.source to files or alpaca$",
        ):
            act()
    assert (
        len(simulate_bars(name, "1Day", "2022-01-01", "2022-02-01"))
        and artefacts(replace(parameters, data=replace(parameters.data, source="files")), name).name
        == f"{name}_15Min"
    )


@pytest.mark.parametrize(
    "symbol, source, simulated",
    [
        ("SIM-USD", "simulated", True),
        ("SIM-USD", None, True),
        ("SIM-USD", "files", True),
        ("SIM-USD", "the file SIM-USD_15Min.csv", True),
        ("SIM-USD", "alpaca", False),
        ("SIMA", "alpaca", False),
        ("TSLA", "simulated", True),
        ("TSLA", None, False),
        ("TSLA", "files", False),
        ("TSLA", "the file SIM-USD.csv", False),
        (None, None, False),
    ],
)
def test_one_rule_says_whether_bars_are_simulated(symbol, source, simulated):
    "The ledger's, the verdict's and the card's: a file under a simulated market's name holds no real bars."
    from types import SimpleNamespace

    from trading_lib.evaluation.comparison import is_simulated
    from trading_lib.ledger import run_trials

    data = {"source": source, "sha256": "0" * 64, "first": "2024-01-01", "last": "2024-02-01"}
    looked = {"update": 1, "sharpe_per_bar": 0.1, "bars": 9, "days": [], "returns": []}
    assert (
        simulated_bars(symbol, data) is simulated
        and is_simulated(SimpleNamespace(provenance={"symbol": symbol, "data": data})) is simulated
    )
    if symbol:
        assert (
            run_trials(symbol, "15Min", data, ("2024-01-01", "2024-02-01"), {}, 0, [looked], code="x")[
                0
            ].simulated
            is simulated
        )


def test_the_command_simulates_no_ticker(tmp_path, capsys):
    assert (
        main(["data", "simulate", "TSLA", str(tmp_path / "t.parquet")]) == 2
        and "SIM…" in capsys.readouterr().err
        and not list(tmp_path.iterdir())
    )
    assert main(["data", "simulate", "SIM/USD", str(tmp_path / "s.parquet"), "--end", "2022-01-05"]) == 0
