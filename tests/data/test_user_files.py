"""Files as people have them."""

import numpy as np
import pandas as pd
import pytest

from trading_lib.bars import COLUMNS, validate_bars
from trading_lib.config import InputError
from trading_lib.data.simulation import simulate_bars
from trading_lib.data.user_files import find_file, read_own_bars
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
    "offset": [t.isoformat() for t in LOCAL],
    "Z": list(HOURS.index.strftime("%Y-%m-%dT%H:%M:%SZ")),
    "UTC": list(HOURS.index.strftime("%Y-%m-%d %H:%M:%S UTC")),
    "seconds": NANOSECONDS // 10**9,
    "milliseconds": NANOSECONDS // 10**6,
    "microseconds": NANOSECONDS // 10**3,
    "nanoseconds": NANOSECONDS,
    "float seconds": NANOSECONDS / 1e9,
}


@pytest.mark.parametrize("kind", TIMES)
def test_times_that_are_certain(tmp_path, kind):
    bars, report = load(tmp_path, as_csv(HOURS, TIMES[kind]))
    pd.testing.assert_frame_equal(bars, HOURS, check_freq=False, rtol=0, atol=0)
    assert (
        not report["simulated"]
        and report["source"] == "files"
        and report["file"] == "SIMA.csv"
        and "seed" not in report
    )


def test_times_without_a_zone_are_asked_for(tmp_path):
    text = as_csv(HOURS, LOCAL.strftime("%Y-%m-%d %H:%M:%S"))
    with pytest.raises(InputError, match="carry no zone; set timezone"):
        load(tmp_path, text)
    pd.testing.assert_frame_equal(
        load(tmp_path, text, timezone="America/New_York")[0], HOURS, check_freq=False
    )
    with pytest.raises(InputError, match="unknown zone 'America/NewYork'"):
        load(tmp_path, text, timezone="America/NewYork")
    with pytest.raises(InputError, match="wrong zone"):
        load(tmp_path, text, timezone="UTC")  # what a wrong answer looks like
    parquet = HOURS.set_axis(LOCAL.tz_localize(None)).rename_axis("Date")
    parquet.to_parquet(tmp_path / "naive.parquet")
    with pytest.raises(InputError, match="carry no zone"):
        load_bars("SIMA", "1Hour", "files", path=tmp_path / "naive.parquet")
    pd.testing.assert_frame_equal(
        load_bars("SIMA", "1Hour", "files", path=tmp_path / "naive.parquet", timezone="America/New_York"),
        HOURS,
        check_freq=False,
    )


def test_the_hour_that_exists_twice(tmp_path):
    coins = simulate_bars("SIM-USD", "15Min", "2024-11-01", "2024-11-05", 0, 0.0)
    text = as_csv(coins, coins.index.tz_convert("America/New_York").strftime("%Y-%m-%d %H:%M"))
    with pytest.raises(InputError, match="where clocks are changed.*write times in UTC"):
        load(tmp_path, text, "SIM-USD", "15Min", timezone="America/New_York")


def test_times_nobody_can_tell(tmp_path):
    unreadable, no_epoch, unlike = (
        "cannot read the time",
        "is no epoch",
        "some times carry an offset and some do not",
    )
    for times, message in (
        (HOURS.index.strftime("%m/%d/%Y %H:%M"), unreadable),
        (HOURS.index.strftime("%d.%m.%Y %H:%M"), unreadable),
        (["soon"] * len(HOURS), unreadable),
        (np.arange(len(HOURS)) + 45292.0, no_epoch),
        ([*(NANOSECONDS[:100] // 10**9), *(NANOSECONDS[100:] // 10**6)], no_epoch),
        ([*TIMES["Z"][:50], *LOCAL.strftime("%Y-%m-%d %H:%M")[50:]], unlike),
        ([*TIMES["Z"][:50], None, *TIMES["Z"][51:]], "row 51 has no time"),
    ):
        with pytest.raises(InputError, match=f"SIMA.csv: .*{message}"):
            load(tmp_path, as_csv(HOURS, times), timezone="America/New_York")


def test_daily_dates_are_labels(tmp_path):
    midnight = DAYS.index.tz_localize(None).tz_localize("America/New_York")
    for times, repaired in (
        (DAYS.index.strftime("%Y-%m-%d"), 0),
        (DAYS.index.strftime("%Y%m%d").astype(int), 0),
        (DAYS.index.strftime("%Y-%m-%d 00:00:00"), 0),
        ([t.isoformat() for t in midnight], len(DAYS)),
    ):
        for timezone in (None, "America/New_York"):
            bars, report = load(tmp_path, as_csv(DAYS, times), timeframe="1Day", timezone=timezone)
            pd.testing.assert_frame_equal(bars, DAYS, check_freq=False, rtol=0, atol=0)
            assert report["repaired"]["daily_labels"] == repaired


@pytest.mark.parametrize(
    "names",
    [
        "Date,Open,High,Low,Close,Volume",
        "t,o,h,l,c,v",
        "Open time,Open,High,Low,Close,Volume",
        "open_time,open,high,low,close,volume",
        "DATETIME,OPEN,HIGH,LOW,CLOSE,VOL",
        "unix,open,high,low,close,volume",
    ],
)
def test_names_of_columns(tmp_path, names):
    time_name, *rest = names.split(",")
    for options, encoding in ((dict(), "utf-8"), (dict(sep=";"), "utf-8"), (dict(sep="\t"), "utf-8-sig")):
        bars, _ = load(
            tmp_path, as_csv(HOURS, TIMES["milliseconds"], time_name, rest, **options), encoding=encoding
        )
        pd.testing.assert_frame_equal(bars, HOURS, check_freq=False, rtol=0, atol=0)


def test_a_date_and_a_time_of_day(tmp_path):
    text = as_csv(HOURS, LOCAL.strftime("%Y-%m-%d"), "Date")
    lines = text.splitlines()
    text = "\n".join(
        [lines[0].replace("Date", "Date,Time")]
        + [line.replace(",", f",{t:%H:%M},", 1) for line, t in zip(lines[1:], LOCAL)]
    )
    pd.testing.assert_frame_equal(
        load(tmp_path, text, timezone="America/New_York")[0], HOURS, check_freq=False
    )


def test_columns_that_are_asked_about(tmp_path):
    text = as_csv(HOURS, TIMES["Z"])
    body = text.split("\n", 1)[1]
    with pytest.raises(
        InputError, match="is no header; add a first line such as timestamp,open,high,low,close,volume"
    ):
        load(tmp_path, body)
    with pytest.raises(
        InputError, match="expected a column volume, found timestamp, open, high, low, close, traded"
    ):
        load(tmp_path, text.replace("volume", "traded", 1))
    with pytest.raises(InputError, match="date and unix could both be timestamp; rename"):
        load(tmp_path, HOURS.assign(unix=TIMES["seconds"]).rename_axis("date").to_csv())
    bars, report = load(
        tmp_path, HOURS.assign(Date="?").rename_axis("timestamp").to_csv()
    )  # our own name settles it
    assert len(bars) == len(HOURS) and report["ignored_columns"] == ["Date"]
    with pytest.raises(InputError, match="the first line is empty"):
        load(tmp_path, "")
    with pytest.raises(InputError, match="holds no bars"):
        load(tmp_path, text.split("\n")[0] + "\n")
    bars, report = load(
        tmp_path, HOURS.assign(**{"Adj Close": 1.0, "Trades": 5}).rename_axis("timestamp").to_csv()
    )
    assert report["ignored_columns"] == ["Adj Close", "Trades"] and len(bars) == len(HOURS)
    with pytest.raises(InputError, match="mixed content: column symbol holds A, B"):
        load(
            tmp_path,
            HOURS.assign(Symbol=["A", "B"] * (len(HOURS) // 2) + ["A"] * (len(HOURS) % 2))
            .rename_axis("timestamp")
            .to_csv(),
        )
    with pytest.raises(InputError, match=r"SIMA.csv: bars refused, bad dtype: close holds"):
        load(tmp_path, HOURS.assign(close="$" + HOURS.close.astype(str)).rename_axis("timestamp").to_csv())


# labels, scales, headers: asked for and said, never guessed


def read(tmp_path, text, symbol="SIMA", timeframe="1Hour", asset_class="equity", **options):
    "Raw bars through the checks, with the options of `read_own_bars`."
    (tmp_path / f"{symbol}.csv").write_text(text)
    raw, facts = read_own_bars(symbol, timeframe, asset_class, tmp_path, **options)
    clean, report = validate_bars(raw, timeframe, asset_class)
    return clean, report | facts


def utc(index, shift="0s"):
    return list((index + pd.Timedelta(shift)).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))


def test_newest_first(tmp_path):
    bars, report = read(tmp_path, as_csv(HOURS[::-1], TIMES["Z"][::-1]))
    pd.testing.assert_frame_equal(bars, HOURS, check_freq=False, rtol=0, atol=0)
    assert report["repaired"]["disorder"] == len(HOURS) - 1


@pytest.mark.parametrize("timeframe", ["1Min", "5Min", "15Min", "1Hour", "4Hour"])
def test_end_labels_of_equities_are_recognised(tmp_path, timeframe):
    bars = simulate_bars(
        "SIMA", timeframe, "2024-02-26", "2024-03-20", 0, 0.0
    )  # over the change of the clock
    text = as_csv(bars, utc(bars.index, timeframe.lower().replace("hour", "h")))
    with pytest.raises(
        InputError,
        match=(
            "shifted labels: in 17 of 17 sessions, such as 2024-02-26, the first bar is missing.*labels='end'"
        ),
    ):
        read(tmp_path, text, timeframe=timeframe)
    clean, report = read(tmp_path, text, timeframe=timeframe, labels="end")
    pd.testing.assert_frame_equal(clean, bars, check_freq=False, rtol=0, atol=0)
    assert (
        report["labels"] == "end"
        and not any(report["repaired"].values())
        and not any(report["dropped_out_of_session"].values())
    )
    with pytest.raises(
        InputError, match="shifted labels: in 17 of 17 sessions.*starts had been taken for ends"
    ):
        read(
            tmp_path, as_csv(bars, utc(bars.index)), timeframe=timeframe, labels="end"
        )  # a wrong answer would look ahead


def test_end_labels_of_crypto_are_said(tmp_path):
    for end in ("15min", "14min 59s 999ms", "14min 59s"):
        clean, _ = read(
            tmp_path, as_csv(COINS, utc(COINS.index, end)), "SIM-USD", "15Min", "crypto", labels="end"
        )
        pd.testing.assert_frame_equal(clean, COINS, check_freq=False, rtol=0, atol=0)
    text = as_csv(COINS, utc(COINS.index, "15min"), "close_time")
    with pytest.raises(InputError, match="SIM-USD.csv: close_time is the end of a bar; set labels to end"):
        read(tmp_path, text, "SIM-USD", "15Min", "crypto")
    assert read(tmp_path, text, "SIM-USD", "15Min", "crypto", labels="end")[0].index.equals(COINS.index)
    both = COINS.assign(
        open_time=COINS.index.asi8 // 10**6, close_time=COINS.index.asi8 // 10**6 + 899_999
    ).to_csv(index=False)
    for labels in ("start", "end"):
        assert read(tmp_path, both, "SIM-USD", "15Min", "crypto", labels=labels)[0].index.equals(COINS.index)
    days = simulate_bars("SIM-USD", "1Day", "2024-01-01", "2024-02-01", 0, 0.0)
    assert read(tmp_path, as_csv(days, utc(days.index, "1D")), "SIM-USD", "1Day", "crypto", labels="end")[
        0
    ].index.equals(days.index)
    with pytest.raises(InputError, match="labelled by their date; leave labels at start"):
        read(tmp_path, as_csv(DAYS, utc(DAYS.index)), timeframe="1Day", labels="end")
    with pytest.raises(InputError, match="labels: unknown name 'ends'; did you mean 'end'"):
        read(tmp_path, text, "SIM-USD", "15Min", "crypto", labels="ends")
    clean, _ = read(
        tmp_path,
        as_csv(COINS, utc(COINS.index, "15min")),
        "SIM-USD",
        "15Min",
        "crypto",
        labels="end",
        start="2024-01-02",
        end="2024-01-03",
    )
    assert (clean.index[0], clean.index[-1], len(clean)) == (
        pd.Timestamp("2024-01-02", tz="UTC"),
        pd.Timestamp("2024-01-02 23:45", tz="UTC"),
        96,
    )  # start and end are those of bars


def test_scaled_prices(tmp_path):
    prices = list(COLUMNS[:4])
    for scale in (100, 10_000):
        stored = HOURS.copy()
        stored[prices] = (HOURS[prices] * scale).round().astype(int)
        text = as_csv(stored, TIMES["Z"])
        with pytest.raises(
            InputError, match="SIMA.csv: all prices are whole numbers, such as [0-9]+; set price_scale"
        ):
            read(tmp_path, text)
        clean, report = read(tmp_path, text, price_scale=scale)
        assert (
            np.abs(clean[prices] - HOURS[prices]).max(axis=None) <= 0.5 / scale + 1e-12
            and report["price_scale"] == scale
            and (clean.volume == HOURS.volume).all()
        )
        assert (
            read(tmp_path, text, price_scale=1)[0].close == stored.close
        ).all()  # they are right, says the user
        assert len(read(tmp_path, text.replace("SIMA", "SIM-USD"), "SIM-USD", "1Hour", "crypto")[0]) == len(
            HOURS
        )  # a coin may cost millions
        stored = stored.astype({"close": float})
        stored.iloc[5, 3] += 0.5  # one price with a fraction: not scaled
        stored["high"] = stored[prices].max(axis=1)
        assert len(read(tmp_path, as_csv(stored, TIMES["Z"]))[0]) == len(HOURS)
    few = HOURS.iloc[:90].assign(**{p: (HOURS[p].iloc[:90] * 100).round() for p in prices})
    assert len(read(tmp_path, as_csv(few, TIMES["Z"][:90]))[0]) == 90  # too few to be certain
    for wrong in (0, -100, np.inf, np.nan, "100", True):
        with pytest.raises(InputError, match="price_scale: expected a number above 0"):
            read(tmp_path, as_csv(HOURS, TIMES["Z"]), price_scale=wrong)


def test_a_header_that_is_missing(tmp_path):
    body = as_csv(HOURS, TIMES["Z"]).split("\n", 1)[1]
    for columns in (
        "timestamp,open,high,low,close,volume",
        ["t", "o", "h", "l", "c", "v"],
        " Date , Open,High,Low,Close,Volume",
    ):
        pd.testing.assert_frame_equal(
            read(tmp_path, body, columns=columns)[0], HOURS, check_freq=False, rtol=0, atol=0
        )
    with pytest.raises(InputError, match="is no header.*or name the columns with columns"):
        read(tmp_path, body)
    with pytest.raises(InputError, match="columns names 5 columns, the file has 6"):
        read(tmp_path, body, columns="timestamp,open,high,low,close")
    with pytest.raises(InputError, match="columns names close twice|columns names close, close twice"):
        read(tmp_path, body, columns="timestamp,open,high,close,close,volume")
    with pytest.raises(
        InputError, match="has a header of its own, 'timestamp,open,high,low,close,volume'; leave columns out"
    ):
        read(tmp_path, as_csv(HOURS, TIMES["Z"]), columns="timestamp,open,high,low,close,volume")
    with pytest.raises(
        InputError, match="expected a column volume, found timestamp, open, high, low, close, x1"
    ):
        read(tmp_path, body, columns="timestamp,open,high,low,close,x1")
    with pytest.raises(InputError, match="high .* is below low"):
        read(tmp_path, body, columns="timestamp,open,low,high,close,volume")  # the wrong way round
    HOURS.to_parquet(tmp_path / "whole.parquet")
    with pytest.raises(InputError, match="parquet has one; leave it out"):
        read_own_bars("SIMA", "1Hour", "equity", tmp_path / "whole.parquet", columns="t,o,h,l,c,v")


def test_rows_that_do_not_fit_their_header(tmp_path):
    text = as_csv(HOURS, TIMES["Z"])
    trailing = text.replace("\n", ",\n")
    for variant in (
        trailing,
        trailing.replace("volume,", "volume", 1),
    ):  # a comma at the end of rows, of the header or not
        pd.testing.assert_frame_equal(read(tmp_path, variant)[0], HOURS, check_freq=False, rtol=0, atol=0)
    with pytest.raises(InputError, match="the header names 6 columns, a row has 7"):
        read(tmp_path, text.replace("Z,", "Z,9,"))
    with pytest.raises(InputError, match="the header has close and Close; keep one"):
        read(tmp_path, HOURS.assign(Close=1.0).rename_axis("timestamp").to_csv())
    spaced = text.replace(",", ", ")
    pd.testing.assert_frame_equal(read(tmp_path, spaced)[0], HOURS, check_freq=False, rtol=0, atol=0)


def test_later_versions_in_a_file(tmp_path):
    late = HOURS.iloc[[7]].assign(volume=5.0)
    both = pd.concat(
        [HOURS.assign(updated="2024-01-01T00:00:00Z"), late.assign(updated="2024-01-01T00:00:30Z")]
    )
    clean, report = read(tmp_path, both.rename_axis("timestamp").to_csv())
    assert (
        clean.volume.iloc[7] == 5.0
        and report["repaired"]["updated_bars"] == 1
        and "updated" not in report["ignored_columns"]
    )


def test_the_timeframe_must_be_that_of_the_file(tmp_path):
    for timeframe in ("15Min", "1Min", "1Day"):
        with pytest.raises(
            InputError, match="SIMA.csv: bars refused, wrong timeframe: bars are 60 minutes apart"
        ):
            load(tmp_path, as_csv(HOURS, TIMES["Z"]), timeframe=timeframe)


def test_start_is_inclusive_and_end_is_not(tmp_path):
    text = as_csv(COINS, COINS.index.strftime("%Y-%m-%dT%H:%M:%SZ"))
    bars, report = load(tmp_path, text, "SIM-USD", "15Min", start="2024-01-03", end="2024-01-05 12:00")
    assert (
        bars.index[0] == pd.Timestamp("2024-01-03", tz="UTC")
        and bars.index[-1] == pd.Timestamp("2024-01-05 11:45", tz="UTC")
        and report["bars_in"] == 2 * 96 + 48
    )
    with pytest.raises(
        InputError, match="no bars from 2025-01-01 to None; it covers 2024-01-01 to 2024-01-10"
    ):
        load(tmp_path, text, "SIM-USD", "15Min", start="2025-01-01")
    with pytest.raises(InputError, match="start: expected a date"):
        load(tmp_path, text, "SIM-USD", "15Min", start="yesterday or so")
    bars, report = load(tmp_path, text, "SIM-USD", "15Min", now="2024-01-10 23:50Z")
    assert report["repaired"]["unfinished_last_bar"] == 1


def test_where_files_are_looked_for(tmp_path):
    for place in (
        "BTC-USD.csv",
        "BTC-USD_15Min.parquet",
        "15Min/BTC-USD.csv",
        "crypto/15Min/BTC-USD.parquet",
    ):
        file = tmp_path / place.replace("/", "_").replace(".", "_") / place
        file.parent.mkdir(parents=True)
        file.touch()
        root = tmp_path / place.replace("/", "_").replace(".", "_")
        assert (
            find_file(root, "BTC/USD", "15Min", "crypto") == file
            and find_file(file, "BTC/USD", "15Min", "crypto") == file
        )
        with pytest.raises(InputError, match="found none of"):
            find_file(root, "ETH/USD", "15Min", "crypto")
    (tmp_path / "other").mkdir()
    for name in ("SPY_1Day.csv", "spy.CSV", "SPYG.csv"):
        (tmp_path / "other" / name).touch()
    with pytest.raises(
        InputError, match=r"found none of .* \(there is SPY_1Day.csv, spy.CSV\); put the file"
    ):
        find_file(tmp_path / "other", "SPY", "15Min", "equity")
    with pytest.raises(InputError, match="/dev/null is neither a file nor a folder"):
        find_file("/dev/null", "SPY", "15Min", "equity")
    both = tmp_path / "both"
    both.mkdir()
    (both / "SPY.csv").touch(), (both / "SPY_1Day.csv").touch()
    with pytest.raises(InputError, match="SPY.csv and SPY_1Day.csv both fit SPY 1Day; remove one"):
        find_file(both, "SPY", "1Day", "equity")
    with pytest.raises(InputError, match="there is no"):
        find_file(tmp_path / "nowhere", "SPY", "1Day", "equity")
    with pytest.raises(InputError, match="set path"):
        load_bars("SPY", "1Day", "files")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        load_bars("SPY", "1Day", "files", path=tmp_path / "torn.parquet")


@pytest.mark.slow
def test_all_real_files_load(real_bars_folder):
    files = sorted(real_bars_folder.glob("*/*/*.parquet"))
    assert len(files) >= 38
    for file in files:
        asset_class, timeframe = file.parts[-3:-1]
        bars, report = load_with_report(file.stem, timeframe, "files", path=real_bars_folder)
        assert (
            report["asset_class"] == asset_class
            and report["bars"] == len(bars) > 1000
            and not any(report["repaired"].values())
        )
        assert validate_bars(bars, timeframe, asset_class)[0].equals(bars)  # good bars stay as they are
