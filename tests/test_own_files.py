"""Files as people have them."""
import numpy as np
import pandas as pd
import pytest

from trading_lib.bars import COLUMNS, validate_bars
from trading_lib.config import InputError
from trading_lib.own_files import find_file
from trading_lib.simulation import simulate_bars
from trading_lib.sources import load_bars, load_with_report

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
