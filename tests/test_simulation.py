"""The simulated market against its own promises."""
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from trading_lib.bars import bar_clock, expected_labels, timeframe_seconds
from trading_lib.config import InputError
from trading_lib.simulation import STATE_BARS, simulate_bars, simulate_market
from trading_lib.sources import load_with_report

SPAN = ("2022-01-01", "2022-07-01")


def next_returns(bars): return (bars.close.to_numpy()[1:] / bars.close.to_numpy()[:-1] - 1)


def pooled(symbol, edge, seeds=range(12), timeframe="15Min", span=SPAN):
    "Next returns and truth of several histories, in units of volatility."
    returns, expected, state = [], [], []
    for seed in seeds:
        bars, truth = simulate_market(symbol, timeframe, *span, seed, edge)
        scale = truth.volatility.to_numpy()[:-1]
        returns.append(next_returns(bars) / scale), expected.append(truth.expected_return.to_numpy()[:-1] / scale), state.append(truth.state.to_numpy()[:-1])
    return np.concatenate(returns), np.concatenate(expected), np.concatenate(state)


@pytest.mark.parametrize("symbol, timeframe, span", [("SIM-USD", "15Min", SPAN), ("SIMA", "15Min", ("2015-01-01", "2017-01-01")), ("SIMA", "1Day", ("1980-01-01", "2020-01-01")), ("SIM-USD", "1Hour", ("2018-01-01", "2020-01-01"))])
def test_martingale_at_edge_zero(symbol, timeframe, span):
    "The mean of the next return is 0: over all bars, after a rise, after a fall, in each state, and in the opening gap."
    z, expected, state = pooled(symbol, 0.0, timeframe=timeframe, span=span)
    assert not expected.any()
    assert abs(z.std() - 1) < 0.02  # `volatility` is the standard deviation
    earlier, later = z[:-1], z[1:]
    for sample in (z, z[state > 0], z[state < 0], later[earlier > 0], later[earlier < 0], later[earlier < -2]):
        assert abs(sample.mean()) < 3.5 * sample.std() / len(sample)**0.5


def test_prices_are_a_martingale_over_whole_histories():
    "The mean over 3000 histories of last price over first is 1: simple returns, not logarithms, whose mean is negative."
    ratios = []
    for seed in range(3000):
        bars = simulate_bars("SIM-USD", "1Day", "2022-01-01", "2022-03-01", seed, 0.0)
        ratios.append(bars.close.iloc[-1] / bars.close.iloc[0])
    ratios = np.array(ratios)
    error = ratios.std() / len(ratios)**0.5
    assert abs(ratios.mean() - 1) < 3.5 * error and np.log(ratios).mean() < -3.5 * error


@pytest.mark.parametrize("symbol", ["SIM-USD", "SIMA"])
@pytest.mark.parametrize("edge", [0.1, 0.5])
def test_expected_return_is_exact(symbol, edge):
    "Regression of the realised next return on the expected one: slope 1, intercept 0, and nothing left to earn."
    z, expected, state = pooled(symbol, edge)
    assert np.allclose(expected, edge * state, rtol=1e-12)
    error = (expected @ expected)**-0.5
    slope = z @ expected / (expected @ expected)
    assert abs(slope - 1) < 3.5 * error and error < 0.1
    rest = z - expected
    assert abs(rest.mean()) < 3.5 * rest.std() / len(rest)**0.5
    assert abs(np.mean(rest * state)) < 3.5 * rest.std() / len(rest)**0.5


def test_the_opening_gap_carries_its_share_of_the_drift():
    "Overnight moves of an equity: what is expected by variance share, so that no leg of the bar is free money."
    gaps, days = [], []
    for seed in range(40):
        bars, truth = simulate_market("SIMA", "1Day", "2000-01-01", "2008-01-01", seed, 0.5)
        side = truth.state.to_numpy()[:-1] / truth.volatility.to_numpy()[:-1]
        o, c = bars.open.to_numpy(), bars.close.to_numpy()
        gaps.append((o[1:] / c[:-1] - 1) * side), days.append((c[1:] / o[1:] - 1) * side)
    gap, day = np.concatenate(gaps), np.concatenate(days)
    share = 0.55**2 / (1 + 0.55**2)  # overnight volatility is 0.55 of a session's
    for leg, part in ((gap, share), (day, 1 - share)):
        assert abs(leg.mean() - 0.5 * part) < 4 * leg.std() / len(leg)**0.5
        assert abs(leg.std() - part**0.5) < 0.05


def test_the_state_lasts_as_documented():
    state = simulate_market("SIM-USD", "15Min", "2022-01-01", "2026-01-01", 0, 0.1)[1].state.to_numpy()
    switches = int((np.diff(state) != 0).sum())
    expected = len(state) / STATE_BARS
    assert set(state) == {-1, 1} and abs(switches - expected) < 4 * expected**0.5
    beginnings = [simulate_market("SIM-USD", "15Min", "2022-01-01", "2022-01-02", seed, 0.1)[1].state.iloc[0] for seed in range(200)]
    assert abs(np.mean(beginnings)) < 4 / 200**0.5


def test_the_truth_is_of_the_next_bar_and_known():
    "Row t of the truth is settled at the close of bar t: cutting the history there leaves it as it was."
    bars, truth = simulate_market("SIMA", "15Min", "2022-01-01", "2022-04-01", 3, 0.2)
    assert truth.index.equals(bars.index)
    for cut in (40, 500, 1000):
        shorter, known = simulate_market("SIMA", "15Min", "2022-01-01", bars.index[cut] + pd.Timedelta("15min"), 3, 0.2)
        assert len(shorter) == cut + 1
        pd.testing.assert_frame_equal(shorter, bars.iloc[:cut + 1], rtol=0, atol=0)
        pd.testing.assert_frame_equal(known, truth.iloc[:cut + 1], rtol=0, atol=0)


def test_an_oracle_earns_and_nobody_else_does():
    z, expected, state = pooled("SIM-USD", 0.1)
    assert abs((z * state).mean() - 0.1) < 4 / len(z)**0.5
    coin = np.random.default_rng(0).choice([-1, 1], len(z))
    assert abs((z * coin).mean()) < 4 / len(z)**0.5


@pytest.mark.parametrize("symbol, other", [("SIM-USD", "SIM2-USD"), ("SIMA", "SIMB")])
def test_stylised_facts(symbol, other):
    bars, companion = (simulate_bars(s, "15Min", "2022-01-01", "2024-01-01", 5, 0.0) for s in (symbol, other))
    r = bars.close.pct_change().dropna()
    assert r.abs().autocorr(1) > 0.1 and r.abs().autocorr(20) > 0.08 and abs(r.autocorr(1)) < 0.05
    assert 6 < r.kurt() + 3 < 40 and abs(r.skew()) < 1
    assert 0.25 < r.corr(companion.close.pct_change().dropna()) < 0.65
    assert r.abs().corr(bars.volume.iloc[1:]) > 0.25  # volume goes with volatility
    assert r.corr(simulate_bars(other, "15Min", "2022-01-01", "2024-01-01", 6, 0.0).close.pct_change().dropna()) < 0.05  # another seed, another market
    assert (bars.open.iloc[1:].to_numpy() != bars.close.iloc[:-1].to_numpy()).all()


def test_scales():
    "About 0.3 % per quarter-hour in crypto, 0.25 % in equities, growing with the root of the bar's length; prices that a small account can buy."
    for symbol, volatility in (("SIM-USD", 0.003), ("SIMA", 0.0025)):
        r = np.concatenate([np.log(b.close / b.open) for b in (simulate_bars(symbol, "15Min", *SPAN, seed, 0.0) for seed in range(10))])
        assert r.std() == pytest.approx(volatility, rel=0.1)
    by_length = {}
    for timeframe in ("1Min", "15Min", "4Hour"):
        span = ("2022-01-01", "2022-03-01") if timeframe == "1Min" else ("2015-01-01", "2022-01-01")
        by_length[timeframe] = np.mean([simulate_market("SIM-USD", timeframe, *span, s, 0.0)[1].volatility.pow(2).mean()**0.5 for s in range(3)])
    assert by_length["4Hour"] / by_length["15Min"] == pytest.approx(4, rel=0.15) and by_length["15Min"] / by_length["1Min"] == pytest.approx(15**0.5, rel=0.15)
    assert all(20 <= simulate_bars(s, "1Day", "2022-01-01", "2022-01-20", 0, 0.0).open.iloc[0] < 62 for s in ("SIMA", "SIMB", "ZZZ"))


def test_seasons():
    stock = simulate_market("SIMA", "15Min", "2015-01-01", "2022-01-01", 0, 0.0)
    hour = stock[0].index.tz_convert("America/New_York").hour
    size = np.log(stock[0].close / stock[0].open).abs().groupby(hour).mean()
    assert size[9] > 1.2 * size[12] and size[15] > 1.2 * size[12]
    assert stock[0].volume.groupby(hour).mean()[12] < 0.7 * stock[0].volume.groupby(hour).mean()[9]
    # the first clock hour of a session is half an hour long
    hourly = simulate_bars("SIMA", "1Hour", "2015-01-01", "2022-01-01", 0, 0.0)
    size = np.log(hourly.close / hourly.open).groupby(hourly.index.tz_convert("America/New_York").hour).std()
    assert size[9] < 0.95 * size[10]
    # the truth knows that the night is wilder than a quarter-hour
    last = bar_clock(stock[0].index, "15Min", "equity").last_of_session
    assert stock[1].volatility[last].mean() > 2 * stock[1].volatility[~last].mean()


@pytest.mark.parametrize("symbol, timeframe", [("SIM-USD", "1Min"), ("SIM-USD", "15Min"), ("SIM-USD", "1Day"), ("SIMA", "5Min"), ("SIMA", "15Min"), ("SIMA", "1Hour"), ("SIMA", "4Hour"), ("SIMA", "1Day")])
def test_simulated_bars_are_good_bars(symbol, timeframe):
    days = 40 if timeframe_seconds(timeframe) < 3600 else 4000
    end = str((pd.Timestamp("2012-01-01") + pd.Timedelta(days=days)).date())
    bars, report = load_with_report(symbol, timeframe, "simulated", start="2012-01-01", end=end, seed=2, edge=0.3)
    asset_class = report["asset_class"]
    assert bars.index.equals(expected_labels(timeframe, asset_class, "2012-01-01", end)) and report["segments"] == 1
    assert not any(report["repaired"].values()) and not any(v for k, v in report["findings"].items() if k not in ("large_steps", "wide_ranges"))
    assert (bars.high > bars.low).all() and (bars.volume > 0).all() and bars.notna().all().all()
    if asset_class == "equity": assert (bars.volume == bars.volume.round()).all()


def test_same_seed_same_market_in_any_process():
    "Python's own hash differs from process to process; the market must not."
    code = "from trading_lib.simulation import simulate_bars; from trading_lib.bars import fingerprint; print(fingerprint(simulate_bars('SIM-USD', '15Min', '2022-01-01', '2022-02-01', 7, 0.1))['sha256'])"
    prints = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": h, "PYTHONPATH": ":".join(p for p in sys.path if p)}).stdout for h in ("1", "2")}
    assert len(prints) == 1 and len(prints.pop().strip()) == 64
    a, b = (simulate_bars(s, "15Min", *SPAN, 7, 0.1) for s in ("SIM-USD", "SIM/USD"))
    pd.testing.assert_frame_equal(a, b)
    assert not np.allclose(a.close, simulate_bars("SIM2-USD", "15Min", *SPAN, 7, 0.1).close)


def test_simulation_refuses():
    for wrong in (dict(seed=-1), dict(seed=1.5), dict(edge=-0.1), dict(edge=2), dict(edge="x"), dict(start="2022-01-02", end="2022-01-01"), dict(asset_class="bond"), dict(symbol=""), dict(timeframe="7Min"),
                  dict(symbol="SIMA", start="2022-01-01", end="2022-01-02"), dict(symbol="SIMA", start="2040-01-01", end="2041-01-01"), dict(start="soon")):
        with pytest.raises(InputError): simulate_market(**wrong)
