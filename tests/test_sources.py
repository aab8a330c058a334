"""The simulated market against its own promises, and files as people have them."""
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from trading_lib.bars import COLUMNS, bar_clock, expected_labels, timeframe_seconds, validate_bars
from trading_lib.config import InputError
from trading_lib.sources import OPTIONS, SOURCES, STATE_BARS, find_file, load_bars, load_with_report, simulate_bars, simulate_market

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


# the simulated market

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
    code = "from trading_lib.sources import simulate_bars; from trading_lib.bars import fingerprint; print(fingerprint(simulate_bars('SIM-USD', '15Min', '2022-01-01', '2022-02-01', 7, 0.1))['sha256'])"
    prints = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": h, "PYTHONPATH": ":".join(p for p in sys.path if p)}).stdout for h in ("1", "2")}
    assert len(prints) == 1 and len(prints.pop().strip()) == 64
    a, b = (simulate_bars(s, "15Min", *SPAN, 7, 0.1) for s in ("SIM-USD", "SIM/USD"))
    pd.testing.assert_frame_equal(a, b)
    assert not np.allclose(a.close, simulate_bars("SIM2-USD", "15Min", *SPAN, 7, 0.1).close)


def test_simulation_refuses():
    for wrong in (dict(seed=-1), dict(seed=1.5), dict(edge=-0.1), dict(edge=2), dict(edge="x"), dict(start="2022-01-02", end="2022-01-01"), dict(asset_class="bond"), dict(symbol=""), dict(timeframe="7Min"),
                  dict(symbol="SIMA", start="2022-01-01", end="2022-01-02"), dict(symbol="SIMA", start="2040-01-01", end="2041-01-01"), dict(start="soon")):
        with pytest.raises(InputError): simulate_market(**wrong)


# the door

def test_options():
    bars, report = load_with_report("SIM-USD", "15Min", "simulated", start=None, end=None, seed=None, edge=None, path=None, timezone=None)
    assert (report["first"], report["last"]) == ("2022-01-01 00:00Z", "2023-12-31 23:45Z") and (report["seed"], report["edge"], report["simulated"], report["source"]) == (0, 0.1, True, "simulated")
    assert json.loads(json.dumps(report)) == report
    pd.testing.assert_frame_equal(bars, load_bars("SIM/USD", "15Min"))
    assert not np.allclose(bars.close, load_bars("SIM-USD", "15Min", seed=1).close)
    with pytest.raises(InputError, match="did you mean 'simulated'"): load_bars("SIM-USD", "15Min", "simulate")
    with pytest.raises(InputError, match="did you mean 'seed'"): load_bars("SIM-USD", "15Min", "simulated", sed=1)
    with pytest.raises(InputError, match="symbol"): load_bars("", "15Min")
    with pytest.raises(InputError, match="start before end"): load_bars("SIM-USD", "15Min", start="2023-01-01", end="2022-01-01")
    assert set(SOURCES) == {"simulated", "files"} and {"start", "end", "seed", "edge", "path", "timezone"} <= set(OPTIONS)


# files

HOURS = simulate_bars("SIMA", "1Hour", "2024-02-01", "2024-04-01", 0, 0.0)  # over the change of the clock
DAYS = simulate_bars("SIMA", "1Day", "2024-01-01", "2024-07-01", 0, 0.0)
COINS = simulate_bars("SIM-USD", "15Min", "2024-01-01", "2024-01-11", 0, 0.0)


def as_csv(bars, times, name="timestamp", columns=COLUMNS, **options):
    "Text of a CSV file."
    table = bars.set_axis(list(columns), axis=1)
    table.insert(0, name, np.asarray(times))
    return table.to_csv(index=False, **options)


def load(tmp_path, text, symbol="SIMA", timeframe="1Hour", **options):
    (tmp_path / f"{symbol}.csv").write_text(text, encoding=options.pop("encoding", "utf-8"))
    return load_with_report(symbol, timeframe, "files", path=tmp_path, **options)


LOCAL = HOURS.index.tz_convert("America/New_York")
NANOSECONDS = HOURS.index.asi8
TIMES = {
    "offset": [t.isoformat() for t in LOCAL], "Z": list(HOURS.index.strftime("%Y-%m-%dT%H:%M:%SZ")), "UTC": list(HOURS.index.strftime("%Y-%m-%d %H:%M:%S UTC")),
    "seconds": NANOSECONDS // 10**9, "milliseconds": NANOSECONDS // 10**6, "microseconds": NANOSECONDS // 10**3, "nanoseconds": NANOSECONDS, "float seconds": NANOSECONDS / 1e9,
}


@pytest.mark.parametrize("kind", TIMES)
def test_times_that_are_certain(tmp_path, kind):
    bars, report = load(tmp_path, as_csv(HOURS, TIMES[kind]))
    pd.testing.assert_frame_equal(bars, HOURS, check_freq=False, rtol=0, atol=0)
    assert not report["simulated"] and report["source"] == "files" and report["file"] == "SIMA.csv" and "seed" not in report


def test_times_without_a_zone_are_asked_for(tmp_path):
    text = as_csv(HOURS, LOCAL.strftime("%Y-%m-%d %H:%M:%S"))
    with pytest.raises(InputError, match="carry no zone; set timezone"): load(tmp_path, text)
    pd.testing.assert_frame_equal(load(tmp_path, text, timezone="America/New_York")[0], HOURS, check_freq=False)
    with pytest.raises(InputError, match="unknown zone 'America/NewYork'"): load(tmp_path, text, timezone="America/NewYork")
    with pytest.raises(InputError, match="wrong zone"): load(tmp_path, text, timezone="UTC")  # what a wrong answer looks like
    parquet = HOURS.set_axis(LOCAL.tz_localize(None)).rename_axis("Date")
    parquet.to_parquet(tmp_path / "naive.parquet")
    with pytest.raises(InputError, match="carry no zone"): load_bars("SIMA", "1Hour", "files", path=tmp_path / "naive.parquet")
    pd.testing.assert_frame_equal(load_bars("SIMA", "1Hour", "files", path=tmp_path / "naive.parquet", timezone="America/New_York"), HOURS, check_freq=False)


def test_the_hour_that_exists_twice(tmp_path):
    coins = simulate_bars("SIM-USD", "15Min", "2024-11-01", "2024-11-05", 0, 0.0)
    text = as_csv(coins, coins.index.tz_convert("America/New_York").strftime("%Y-%m-%d %H:%M"))
    with pytest.raises(InputError, match="where clocks are changed.*write times in UTC"): load(tmp_path, text, "SIM-USD", "15Min", timezone="America/New_York")


def test_times_nobody_can_tell(tmp_path):
    unreadable, no_epoch, unlike = "cannot read the time", "is no epoch", "some times carry an offset and some do not"
    for times, message in ((HOURS.index.strftime("%m/%d/%Y %H:%M"), unreadable), (HOURS.index.strftime("%d.%m.%Y %H:%M"), unreadable), (["soon"] * len(HOURS), unreadable),
                           (np.arange(len(HOURS)) + 45292.0, no_epoch), ([*(NANOSECONDS[:100] // 10**9), *(NANOSECONDS[100:] // 10**6)], no_epoch),
                           ([*TIMES["Z"][:50], *LOCAL.strftime("%Y-%m-%d %H:%M")[50:]], unlike), ([*TIMES["Z"][:50], None, *TIMES["Z"][51:]], "row 51 has no time")):
        with pytest.raises(InputError, match=f"SIMA.csv: .*{message}"): load(tmp_path, as_csv(HOURS, times), timezone="America/New_York")


def test_daily_dates_are_labels(tmp_path):
    midnight = DAYS.index.tz_localize(None).tz_localize("America/New_York")
    for times, repaired in ((DAYS.index.strftime("%Y-%m-%d"), 0), (DAYS.index.strftime("%Y%m%d").astype(int), 0), (DAYS.index.strftime("%Y-%m-%d 00:00:00"), 0), ([t.isoformat() for t in midnight], len(DAYS))):
        for timezone in (None, "America/New_York"):
            bars, report = load(tmp_path, as_csv(DAYS, times), timeframe="1Day", timezone=timezone)
            pd.testing.assert_frame_equal(bars, DAYS, check_freq=False, rtol=0, atol=0)
            assert report["repaired"]["daily_labels"] == repaired


@pytest.mark.parametrize("names", ["Date,Open,High,Low,Close,Volume", "t,o,h,l,c,v", "Open time,Open,High,Low,Close,Volume", "open_time,open,high,low,close,volume", "DATETIME,OPEN,HIGH,LOW,CLOSE,VOL", "unix,open,high,low,close,volume"])
def test_names_of_columns(tmp_path, names):
    time_name, *rest = names.split(",")
    for options, encoding in ((dict(), "utf-8"), (dict(sep=";"), "utf-8"), (dict(sep="\t"), "utf-8-sig")):
        bars, _ = load(tmp_path, as_csv(HOURS, TIMES["milliseconds"], time_name, rest, **options), encoding=encoding)
        pd.testing.assert_frame_equal(bars, HOURS, check_freq=False, rtol=0, atol=0)


def test_a_date_and_a_time_of_day(tmp_path):
    text = as_csv(HOURS, LOCAL.strftime("%Y-%m-%d"), "Date")
    lines = text.splitlines()
    text = "\n".join([lines[0].replace("Date", "Date,Time")] + [line.replace(",", f",{t:%H:%M},", 1) for line, t in zip(lines[1:], LOCAL)])
    pd.testing.assert_frame_equal(load(tmp_path, text, timezone="America/New_York")[0], HOURS, check_freq=False)


def test_columns_that_are_asked_about(tmp_path):
    text = as_csv(HOURS, TIMES["Z"])
    body = text.split("\n", 1)[1]
    with pytest.raises(InputError, match="is no header; add a first line such as timestamp,open,high,low,close,volume"): load(tmp_path, body)
    with pytest.raises(InputError, match="expected a column volume, found timestamp, open, high, low, close, traded"): load(tmp_path, text.replace("volume", "traded", 1))
    with pytest.raises(InputError, match="date and unix could both be timestamp; rename"): load(tmp_path, HOURS.assign(unix=TIMES["seconds"]).rename_axis("date").to_csv())
    bars, report = load(tmp_path, HOURS.assign(Date="?").rename_axis("timestamp").to_csv())  # our own name settles it
    assert len(bars) == len(HOURS) and report["ignored_columns"] == ["Date"]
    with pytest.raises(InputError, match="the first line is empty"): load(tmp_path, "")
    with pytest.raises(InputError, match="holds no bars"): load(tmp_path, text.split("\n")[0] + "\n")
    bars, report = load(tmp_path, HOURS.assign(**{"Adj Close": 1.0, "Trades": 5}).rename_axis("timestamp").to_csv())
    assert report["ignored_columns"] == ["Adj Close", "Trades"] and len(bars) == len(HOURS)
    with pytest.raises(InputError, match="mixed content: column symbol holds A, B"): load(tmp_path, HOURS.assign(Symbol=["A", "B"] * (len(HOURS) // 2) + ["A"] * (len(HOURS) % 2)).rename_axis("timestamp").to_csv())
    with pytest.raises(InputError, match=r"SIMA.csv: bars refused, bad dtype: close holds"): load(tmp_path, HOURS.assign(close="$" + HOURS.close.astype(str)).rename_axis("timestamp").to_csv())


def test_the_timeframe_must_be_that_of_the_file(tmp_path):
    for timeframe in ("15Min", "1Min", "1Day"):
        with pytest.raises(InputError, match="SIMA.csv: bars refused, wrong timeframe: bars are 60 minutes apart"): load(tmp_path, as_csv(HOURS, TIMES["Z"]), timeframe=timeframe)


def test_start_is_inclusive_and_end_is_not(tmp_path):
    text = as_csv(COINS, COINS.index.strftime("%Y-%m-%dT%H:%M:%SZ"))
    bars, report = load(tmp_path, text, "SIM-USD", "15Min", start="2024-01-03", end="2024-01-05 12:00")
    assert bars.index[0] == pd.Timestamp("2024-01-03", tz="UTC") and bars.index[-1] == pd.Timestamp("2024-01-05 11:45", tz="UTC") and report["bars_in"] == 2 * 96 + 48
    with pytest.raises(InputError, match="no bars from 2025-01-01 to None; it covers 2024-01-01 to 2024-01-10"): load(tmp_path, text, "SIM-USD", "15Min", start="2025-01-01")
    with pytest.raises(InputError, match="start: expected a date"): load(tmp_path, text, "SIM-USD", "15Min", start="yesterday or so")
    bars, report = load(tmp_path, text, "SIM-USD", "15Min", now="2024-01-10 23:50Z")
    assert report["repaired"]["unfinished_last_bar"] == 1


def test_where_files_are_looked_for(tmp_path):
    for place in ("BTC-USD.csv", "BTC-USD_15Min.parquet", "15Min/BTC-USD.csv", "crypto/15Min/BTC-USD.parquet"):
        file = tmp_path / place.replace("/", "_").replace(".", "_") / place
        file.parent.mkdir(parents=True)
        file.touch()
        root = tmp_path / place.replace("/", "_").replace(".", "_")
        assert find_file(root, "BTC/USD", "15Min", "crypto") == file and find_file(file, "BTC/USD", "15Min", "crypto") == file
        with pytest.raises(InputError, match="found none of"): find_file(root, "ETH/USD", "15Min", "crypto")
    both = tmp_path / "both"
    both.mkdir()
    (both / "SPY.csv").touch(), (both / "SPY_1Day.csv").touch()
    with pytest.raises(InputError, match="SPY.csv and SPY_1Day.csv both fit SPY 1Day; remove one"): find_file(both, "SPY", "1Day", "equity")
    with pytest.raises(InputError, match="there is no"): find_file(tmp_path / "nowhere", "SPY", "1Day", "equity")
    with pytest.raises(InputError, match="set path"): load_bars("SPY", "1Day", "files")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="cannot be read as parquet"): load_bars("SPY", "1Day", "files", path=tmp_path / "torn.parquet")


def test_all_real_files_load(real_bars_folder):
    files = sorted(real_bars_folder.glob("*/*/*.parquet"))
    assert len(files) >= 38
    for file in files:
        asset_class, timeframe = file.parts[-3:-1]
        bars, report = load_with_report(file.stem, timeframe, "files", path=real_bars_folder)
        assert report["asset_class"] == asset_class and report["bars"] == len(bars) > 1000 and not any(report["repaired"].values())
        assert validate_bars(bars, timeframe, asset_class)[0].equals(bars)  # good bars stay as they are
