"Files in the shapes that programs write, and files with lies in them: bars, or one line."

import io
import json
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from trading_lib.bars import COLUMNS
from trading_lib.cli import main
from trading_lib.config import InputError
from trading_lib.data.simulation import simulate_bars
from trading_lib.data.user_files import file_timeframe
from trading_lib.sources import load_bars, load_with_report

DAYS = simulate_bars("SIMA", "1Day", "2024-01-01", "2024-07-01", 0, 0.0)
QUARTERS = simulate_bars("SIMA", "15Min", "2024-01-02", "2024-01-13", 0, 0.0)
COINS = simulate_bars("SIM-USD", "15Min", "2024-01-01", "2024-01-21", 0, 0.0)
TITLED = dict(zip(COLUMNS, ("Open", "High", "Low", "Close", "Volume")))


def csv_of(bars, **options):
    return bars.rename_axis("timestamp").to_csv(**options)


def parquet_of(table, **options):
    content = io.BytesIO()
    (table.to_parquet if isinstance(table, pd.DataFrame) else lambda c: pa.parquet.write_table(table, c))(
        content, **options
    )
    return content.getvalue()


def loaded(folder, content, name="SIMA.csv", timeframe="15Min", symbol="SIMA", **options):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_with_report(symbol, timeframe, "files", path=file, **options)


def refused(*arguments, **options):
    with pytest.raises(InputError) as e:
        loaded(*arguments, **options)
    assert "\n" not in str(e.value) and len(str(e.value)) < 700
    return str(e.value)


# --- shapes that programs write
# --------------------------------------------------------------------------------------


def yfinance(bars, symbols=("SIMA",), time="Date", by_ticker=False):
    "What yf.download returns: columns of two levels, with names."
    parts = {
        symbol: bars.rename(columns=TITLED)[["Close", "High", "Low", "Open", "Volume"]] * (1 + n)
        for n, symbol in enumerate(symbols)
    }
    table = pd.concat(parts, axis=1, names=["Ticker", "Price"]).rename_axis(index=time)
    return table if by_ticker else table.swaplevel(axis=1).sort_index(axis=1, level=0, sort_remaining=False)


def metatrader(bars, zone="America/New_York", times=True, volume="<TICKVOL>\t<VOL>\t<SPREAD>"):
    local = bars.index.tz_convert(zone) if times else bars.index
    rows = [
        "\t".join(
            [
                f"{t:%Y.%m.%d}",
                *([f"{t:%H:%M:%S}"] if times else []),
                *(repr(float(v)) for v in b[:4]),
                *(["7", repr(float(b[4])), "2"] if "<VOL>" in volume else [repr(float(b[4]))]),
            ]
        )
        for t, b in zip(local, bars[list(COLUMNS)].to_numpy())
    ]
    return (
        "\t".join(["<DATE>", *(["<TIME>"] if times else []), "<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>", volume])
        + "\n"
        + "\n".join(rows)
    )


def alpaca(bars, *symbols):
    return pd.concat(
        {s: bars.assign(trade_count=3.0, vwap=bars.close) for s in symbols}, names=["symbol", "timestamp"]
    )


def stooq(bars):
    local = bars.index.tz_convert("America/New_York")
    return "<TICKER>,<PER>,<DATE>,<TIME>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOL>,<OPENINT>\n" + "\n".join(
        f"SIMA.US,15,{t:%Y%m%d},{t:%H%M%S},{','.join(repr(float(v)) for v in b)},0"
        for t, b in zip(local, bars[list(COLUMNS)].to_numpy())
    )


NEW_YORK = {"timezone": "America/New_York"}
naive = DAYS.tz_localize(None)
SHAPES = {  # content, bars, options
    "yfinance, daily": (lambda: yfinance(naive).to_csv(), DAYS, {}),
    "yfinance, by ticker": (lambda: yfinance(naive, by_ticker=True).to_csv(), DAYS, {}),
    "yfinance, intraday": (lambda: yfinance(QUARTERS, time="Datetime").to_csv(), QUARTERS, {}),
    "yfinance, one of two symbols": (lambda: yfinance(naive, ("SIMA", "SIMB")).to_csv(), DAYS, {}),
    "yfinance, the other of two": (lambda: yfinance(naive / 2, ("SIMB", "SIMA")).to_csv(), DAYS, {}),
    "yfinance, parquet": (lambda: parquet_of(yfinance(naive, ("SIMA", "SIMB"))), DAYS, {}),
    "yfinance, parquet by ticker": (
        lambda: parquet_of(yfinance(naive, ("SIMA", "SIMB"), by_ticker=True)),
        DAYS,
        {},
    ),
    "a header of names and one of the index": (
        lambda: "Price,Open,High,Low,Close,Volume\nDate,,,,,\n" + naive.to_csv(header=False),
        DAYS,
        {},
    ),
    "MetaTrader": (lambda: metatrader(QUARTERS), QUARTERS, NEW_YORK),
    "MetaTrader, daily": (lambda: metatrader(DAYS, times=False), DAYS, {}),
    "MetaTrader, ticks alone": (lambda: metatrader(QUARTERS, volume="<TICKVOL>"), QUARTERS, NEW_YORK),
    "Polygon": (
        lambda: pd.DataFrame(
            {
                "ticker": "SIMA",
                **{c: QUARTERS[c].to_numpy() for c in COLUMNS},
                "window_start": QUARTERS.index.asi8,
                "transactions": 3,
            }
        ).to_csv(index=False),
        QUARTERS,
        {},
    ),
    "TradingView": (
        lambda: (
            QUARTERS.set_axis(QUARTERS.index.as_unit("s").asi8).rename_axis("time").assign(MA=1.0).to_csv()
        ),
        QUARTERS,
        {},
    ),
    "bars between": (lambda: csv_of(DAYS, sep="|"), DAYS, {}),
    "all quoted": (lambda: csv_of(DAYS, quoting=1), DAYS, {}),
    "Stooq": (lambda: stooq(QUARTERS), QUARTERS, NEW_YORK),
    "Alpaca, parquet": (lambda: parquet_of(alpaca(QUARTERS, "SIMA")), QUARTERS, {}),
    "Alpaca, CSV": (lambda: alpaca(QUARTERS, "SIMA").to_csv(), QUARTERS, {}),
    "two levels without names": (
        lambda: parquet_of(alpaca(QUARTERS, "SIMA").rename_axis([None, None])),
        QUARTERS,
        {},
    ),
    "an index without a name": (lambda: parquet_of(QUARTERS.rename_axis(None)), QUARTERS, {}),
    "an index without a name, CSV": (lambda: QUARTERS.rename_axis(None).to_csv(), QUARTERS, {}),
    "an index of epochs": (
        lambda: parquet_of(QUARTERS.set_axis(QUARTERS.index.as_unit("s").asi8)),
        QUARTERS,
        {},
    ),
    "an index of epochs with a name": (
        lambda: parquet_of(QUARTERS.set_axis(QUARTERS.index.as_unit("ms").asi8).rename_axis("time")),
        QUARTERS,
        {},
    ),
    "dates of Arrow": (lambda: parquet_of(naive.set_axis(naive.index.date).rename_axis("date")), DAYS, {}),
    "decimals": (
        lambda: parquet_of(DAYS.map(lambda v: Decimal(repr(float(v)))).rename_axis("timestamp")),
        DAYS,
        {},
    ),
    "numbers as text": (
        lambda: parquet_of(DAYS.map(lambda v: repr(float(v))).rename_axis("timestamp")),
        DAYS,
        {},
    ),
    "categories": (
        lambda: parquet_of(
            DAYS.assign(
                symbol=pd.Categorical(["SIMA"] * len(DAYS)), volume=DAYS.volume.astype("category")
            ).rename_axis("timestamp")
        ),
        DAYS,
        {},
    ),
    "lists in a column of no use": (
        lambda: parquet_of(DAYS.assign(notes=[[1, 2]] * len(DAYS)).rename_axis("timestamp")),
        DAYS,
        {},
    ),
    "UTF-16": (lambda: csv_of(DAYS).encode("utf-16"), DAYS, {}),
    "UTF-16 without a mark": (lambda: csv_of(DAYS).encode("utf-16-le"), DAYS, {}),
    "UTF-16, big end first, without a mark": (lambda: csv_of(DAYS).encode("utf-16-be"), DAYS, {}),
    "UTF-32": (lambda: csv_of(DAYS).encode("utf-32"), DAYS, {}),
    "a mark of UTF-8": (lambda: csv_of(DAYS).encode("utf-8-sig"), DAYS, {}),
    "Latin 1": (lambda: csv_of(DAYS.assign(Börse="Zürich")).encode("latin-1"), DAYS, {}),
    "Excel's separator": (lambda: "sep=;\r\n" + csv_of(DAYS, sep=";", lineterminator="\r\n"), DAYS, {}),
    "lines of an old Mac": (lambda: csv_of(DAYS, lineterminator="\r"), DAYS, {}),
    "days with slashes": (
        lambda: naive.set_axis(naive.index.strftime("%Y/%m/%d")).rename_axis("Date").to_csv(),
        DAYS,
        {},
    ),
    "a symbol that looks like nothing": (lambda: csv_of(DAYS.assign(symbol="NA")), DAYS, {"symbol": "NA"}),
    "another spelling of the symbol": (lambda: csv_of(DAYS.assign(Ticker="NASDAQ:SIMA")), DAYS, {}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_programs_write_are_read(tmp_path, shape):
    content, bars, options = SHAPES[shape]
    timeframe = "1Day" if bars is DAYS else "15Min"
    for name in ("SIMA.csv", "SIMA.parquet"):  # by its content, whatever its name
        read, report = loaded(tmp_path, content(), name, timeframe, **options)
        pd.testing.assert_frame_equal(read, bars, check_freq=False, rtol=0, atol=0)
        assert report["file"] == name and report["findings"]["zero_volume"] == 0
    assert file_timeframe(tmp_path / "SIMA.csv", symbol=options.get("symbol", "SIMA")) == timeframe


# --- whose bars, of what length, on which days
# -----------------------------------------------------------------------


def test_a_file_that_says_whose_bars_it_holds_is_not_taken_for_anothers(tmp_path):
    for content in (
        csv_of(DAYS.assign(symbol="QQQ")),
        parquet_of(alpaca(DAYS, "QQQ")),
        csv_of(DAYS.assign(ticker="QQQ")),
        yfinance(naive, ("QQQ",)).to_csv(),
    ):
        assert "its column symbol says QQQ, and it was read for SIMA" in refused(
            tmp_path, content, timeframe="1Day"
        )
    assert "holds QQQ, SPY, and not SIMA" in refused(
        tmp_path, yfinance(naive, ("QQQ", "SPY")).to_csv(), timeframe="1Day"
    )
    assert "mixed content: column symbol holds QQQ, SIMA" in refused(
        tmp_path, parquet_of(alpaca(DAYS, "QQQ", "SIMA")), timeframe="1Day"
    )
    assert "BRK.A" in refused(
        tmp_path, csv_of(DAYS.assign(symbol="BRK.A")), timeframe="1Day", symbol="BRK-B", asset_class="equity"
    )
    loaded(
        tmp_path, csv_of(DAYS.assign(symbol="BRK.B")), timeframe="1Day", symbol="BRK-B", asset_class="equity"
    )


@pytest.mark.parametrize(
    "name, bars, timeframe, right",
    [
        ("BRK-B", DAYS, "1Day", "equity"),
        (
            "BF-A",
            QUARTERS.iloc[:0].reindex(
                simulate_bars("SIMA", "15Min", "2024-01-02", "2024-02-13", 0, 0.0).index
            ),
            "15Min",
            "equity",
        ),
        ("BTCUSDT", simulate_bars("SIM-USD", "1Day", "2024-01-01", "2024-07-01", 0, 0.0), "1Day", "crypto"),
        ("ETHUSD", COINS, "15Min", "crypto"),
    ],
)
def test_a_name_that_misleads_is_said_and_the_advice_works(tmp_path, capsys, name, bars, timeframe, right):
    if bars.isna().any(axis=None):
        bars = simulate_bars("SIMA", "15Min", "2024-01-02", "2024-02-13", 0, 0.0)
    said = refused(tmp_path, csv_of(bars), f"{name}.csv", timeframe, name)
    wrong = "crypto" if right == "equity" else "an equity"
    assert (
        f"{name} is read as {wrong}, since" in said
        and f"data.asset_classes: {{{name}: {right}}}" in said
        and f"--asset-class {right}" in said
    )
    assert len(loaded(tmp_path, csv_of(bars), f"{name}.csv", timeframe, name, asset_class=right)[0]) == len(
        bars
    )
    assert (
        main(["data", "check", str(tmp_path / f"{name}.csv"), "--asset-class", right]) == 0
        and f"{name} {timeframe}: " in capsys.readouterr().out
    )
    assert main(["data", "check", str(tmp_path / f"{name}.csv")]) == 2


def test_the_length_of_bars_is_the_files_own_or_named(tmp_path, capsys):
    (tmp_path / "SIMA.csv").write_text(csv_of(DAYS))
    assert (
        main(["data", "check", str(tmp_path / "SIMA.csv")]) == 0 and "SIMA 1Day: " in capsys.readouterr().out
    )
    assert "bars are 1440 minutes apart, as 1Day bars are, expected 15" in refused(tmp_path, csv_of(DAYS))
    assert "so it holds daily bars, expected 15Min; say the timeframe 1Day" in refused(
        tmp_path, csv_of(naive)
    )
    weeks = DAYS.set_axis(pd.date_range("2020-01-06", periods=len(DAYS), freq="7D", tz="UTC"))
    (tmp_path / "SIMA.csv").write_text(csv_of(weeks))
    assert (
        main(["data", "check", str(tmp_path / "SIMA.csv")]) == 2
        and "do not tell the length of a bar; say it with --timeframe" in capsys.readouterr().err
    )


def test_what_a_file_lacks_is_said(tmp_path, capsys):
    assert (
        "expected a column volume, found timestamp, open, high, low, close; rename the one that "
        "holds it, or add one of zeros where the market has none"
    ) in refused(tmp_path, csv_of(DAYS.drop(columns="volume")))
    (tmp_path / "SIMA.csv").write_text("timestamp,open,high,low,close,volume\n")
    assert (
        main(["data", "check", str(tmp_path / "SIMA.csv")]) == 2
        and "SIMA.csv: holds a header and no bars" in capsys.readouterr().err
    )


@pytest.mark.parametrize("zone", ["America/Chicago", "Asia/Tokyo", "America/New_York", "Europe/London"])
def test_days_of_another_zone_are_refused_however_they_are_told(tmp_path, zone):
    days = simulate_bars("SIM-USD", "1Day", "2024-01-01", "2024-07-01", 0, 0.0)
    local = days.set_axis(days.index.tz_localize(None).tz_localize(zone))
    for content, options in (
        (csv_of(days.tz_localize(None)), {"timezone": zone}),
        (csv_of(local), {}),
        (parquet_of(days.tz_localize(None)), {"timezone": zone}),
        (parquet_of(local), {}),
    ):
        assert (
            "days of" in (said := refused(tmp_path, content, timeframe="1Day", symbol="SIM-USD", **options))
            or "off grid" in said
        )
    for zone_said in (None, "UTC"):
        assert len(
            loaded(
                tmp_path,
                csv_of(days.tz_localize(None)),
                timeframe="1Day",
                symbol="SIM-USD",
                timezone=zone_said,
            )[0]
        ) == len(days)
    if zone == "America/New_York":
        assert len(loaded(tmp_path, csv_of(naive), timeframe="1Day", timezone=zone)[0]) == len(DAYS)
    else:
        assert "days of" in refused(tmp_path, csv_of(naive), timeframe="1Day", timezone=zone)


def test_a_true_move_passes_with_its_date(tmp_path, capsys):
    bars = DAYS.assign(**{c: DAYS[c] * np.where(np.arange(len(DAYS)) >= 60, 0.5, 1.0) for c in COLUMNS[:4]})
    day = f"{DAYS.index[60]:%Y-%m-%d}"
    file = tmp_path / "SIMA.csv"
    file.write_text(csv_of(bars))
    assert main(["data", "check", str(file)]) == 2 and "--allow-steps-on" in capsys.readouterr().err
    for option in (["--allow-steps"], ["--allow-steps-on", day], ["--allow-steps-on", f"2020-01-01,{day}"]):
        assert main(["data", "check", str(file), *option]) == 0
    assert f"2-for-1 on {day}" in capsys.readouterr().out
    assert main(["data", "check", str(file), "--allow-steps-on", "2020-01-01"]) == 2


def test_paths_as_people_write_them(tmp_path, monkeypatch):
    folder = tmp_path / "home" / "my bars, é"
    folder.mkdir(parents=True)
    (folder / "SIMA.csv").write_text(csv_of(DAYS))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("params.yaml", "settings.ini"):
        (tmp_path / name).write_text("")
    (tmp_path / "nbs" / "explore").mkdir(parents=True)
    for here in (tmp_path, tmp_path / "nbs", tmp_path / "nbs" / "explore"):
        monkeypatch.chdir(here)
        for path in ("~/my bars, é", "~/my bars, é/SIMA.csv", "home/my bars, é", str(folder)):
            assert len(load_bars("SIMA", "1Day", "files", path=path)) == len(DAYS)
    (tmp_path / "nbs" / "home" / "my bars, é").mkdir(parents=True)  # what lies here comes first
    monkeypatch.chdir(tmp_path / "nbs")
    with pytest.raises(InputError, match="found none of"):
        load_bars("SIMA", "1Day", "files", path="home/my bars, é")
    for zone in ("Mars/Olympus", "../../etc/passwd", "/etc/localtime"):
        with pytest.raises(InputError, match="timezone: unknown zone"):
            load_bars("SIMA", "1Day", "files", path=folder, timezone=zone)
    for path in ("~nobody-of-this-name/x", "n" * 300, "a\0b"):
        with pytest.raises(InputError, match="files: "):
            load_bars("SIMA", "1Day", "files", path=path)


# --- lies
# ------------------------------------------------------------------------------------------------------------

TEXT = csv_of(DAYS)
HEAD, ROWS = TEXT.split("\n", 1)
LINES = ROWS.splitlines()


def with_cell(column, value, row=41):
    "The daily bars as CSV, with one cell that lies."
    rows = [line.split(",") for line in LINES]
    rows[row][column] = value
    return "\n".join([HEAD, *map(",".join, rows)])


def arrow(**columns):
    table = pa.Table.from_pandas(DAYS.rename_axis("timestamp").reset_index())
    for name, values in columns.items():
        table = (
            table.set_column(table.column_names.index(name), name, values)
            if name in table.column_names
            else table.append_column(name, values)
        )
    return parquet_of(table)


def many(rows):
    "A small parquet file that unpacks to very many rows."
    return parquet_of(pa.table({"timestamp": pa.array([0]).take(pa.array(np.zeros(rows, np.int32)))}))


N, NUMBERS = len(DAYS), pa.array(DAYS.close.to_numpy())
LIES = {
    **{
        f"a cell that is {shown}": with_cell(column, value)
        for shown, column, value in (
            ("text", 2, "-"),
            ("empty", 4, ""),
            ("quoted and unbalanced", 1, '"'),
            ("a formula", 3, "=1+1"),
            ("infinite", 5, "inf"),
            ("hexadecimal", 1, "0x1p3"),
            ("huge", 5, "1" + "0" * 400),
            ("very long", 2, "9" * 200_000),
            ("a decimal comma", 4, '"12,5"'),
            ("true", 5, "True"),
            ("a volume of 1e25", 5, "1e25"),
            ("a volume of 1e308", 5, "1e308"),
            ("a price of 1e300", 2, "1e300"),
            ("a price of 1e-300", 3, "1e-300"),
            ("negative", 5, "-1"),
            ("a date of 1677", 0, "1677-01-01"),
            ("a date of 2262", 0, "2262-12-31"),
            ("the year 0", 0, "0000-01-01"),
            ("the year 9999", 0, "9999-12-31"),
            ("the 30th of February", 0, "2024-02-30"),
            ("a time with an offset", 0, "2024-03-01T00:00+09:99"),
            ("no time", 0, ""),
            ("a number for a time", 0, "5"),
            ("an escape sequence", 4, "\x1b[31m9"),
            ("a letter of another alphabet", 4, "١٢٬٥٠x"),
        )
    },
    "no rows": HEAD,
    "a line feed": "\n",
    "nothing": b"",
    "one byte": b"x",
    "zero bytes": b"\0" * 4096,
    "a zero byte in text": TEXT[:300] + "\0" + TEXT[300:],
    "random bytes": np.random.default_rng(0).bytes(5000),
    "unbalanced quotes": HEAD + '\n"' + ROWS,
    "a header twice": HEAD + "," + HEAD + "\n" + ROWS,
    "a column twice": parquet_of(
        pa.table([pa.array(DAYS.index.asi8), NUMBERS, NUMBERS], names=["timestamp", "close", "close"])
    ),
    "rows that grow": HEAD + "\n" + "\n".join(line + ",1" * i for i, line in enumerate(LINES)),
    "rows that shrink": HEAD + "\n" + "\n".join(line[:i] for i, line in enumerate(LINES)),
    "half of UTF-16": csv_of(DAYS).encode("utf-16")[:-1] + b"\xd8",
    "negative epochs": csv_of(DAYS.set_axis(-DAYS.index.asi8)),
    "huge epochs": csv_of(DAYS.set_axis([10**30 + i for i in range(N)])),
    "infinite epochs": csv_of(DAYS.set_axis([np.inf] * N)),
    "fractions for times": csv_of(DAYS.set_axis(np.linspace(0, 1, N))),
    "true for times": csv_of(DAYS.set_axis([True] * N)),
    "mixed zones": csv_of(
        DAYS.set_axis([str(t) if i % 2 else str(t)[:-6] for i, t in enumerate(DAYS.index)])
    ),
    "a very wide header": ",".join(f"c{i}" for i in range(20_000)) + "\n1",
    "a very long header": "x" * 2_000_000 + "\n1",
    "columns named like control characters": "timestamp,open,high,low,\x1b]0;x\x07close\n1,2,3,4,5",
    "HTML": "<!DOCTYPE html><html><body>403 Forbidden</body></html>",
    "JSON": json.dumps({"bars": [1, 2]}),
    "a ZIP archive": b"PK\x03\x04" + b"x" * 100,
    "gzip": b"\x1f\x8b" + b"x" * 100,
    "a pickle": b"\x80\x04cos\nsystem\n(S'x'\ntR.",
    "parquet cut short": arrow()[:-50],
    "parquet without a foot": b"PAR1" + b"x" * 100,
    "parquet with a foot of lies": arrow()[:-8] + b"\xff\xff\xff\x7fPAR1",
    "parquet with a flipped page": bytes(b ^ (90 <= i < 140) for i, b in enumerate(arrow())),
    "parquet without rows": parquet_of(DAYS[:0].rename_axis("timestamp")),
    "parquet without columns": parquet_of(pa.table({})),
    "a bomb of rows": many(70_000_000),
    "lists": arrow(close=pa.array([[1.0]] * N)),
    "tables": arrow(close=pa.array([{"a": 1.0}] * N)),
    "maps": arrow(timestamp=pa.array([[("a", 1)]] * N, pa.map_(pa.string(), pa.int64()))),
    "bytes": arrow(close=pa.array([b"\xff\xfe"] * N)),
    "null": arrow(close=pa.nulls(N)),
    "true and false": arrow(close=pa.array([True] * N)),
    "wide decimals": arrow(volume=pa.array([Decimal(10**37)] * N, pa.decimal128(38, 0))),
    "wider decimals": arrow(volume=pa.array([Decimal(10**70)] * N, pa.decimal256(76, 0))),
    "whole numbers without sign": arrow(volume=pa.array([2**64 - 1] * N, pa.uint64())),
    "durations": arrow(close=pa.array([1] * N, pa.duration("s"))),
    "times of day": arrow(timestamp=pa.array([1] * N, pa.time32("s"))),
    "text": arrow(close=pa.array(["a"] * N)),
    "times of the year 1": arrow(timestamp=pa.array([-62135596800] * N, pa.timestamp("s", "UTC"))),
    "times of the year 9999": arrow(
        timestamp=pa.array([253402300799 - i for i in range(N)], pa.timestamp("s", "UTC"))
    ),
    "no times": arrow(timestamp=pa.nulls(N, pa.timestamp("us", "UTC"))),
    "a zone that does not exist": arrow(
        timestamp=pa.array(DAYS.index.asi8, pa.timestamp("ns", "Mars/Olympus"))
    ),
    "an empty symbol": arrow(symbol=pa.array([""] * N)),
    "symbols that are lists": arrow(symbol=pa.array([["SIMA"]] * N)),
    "symbols with a line feed": csv_of(DAYS.assign(symbol="A\nB" * 200)),
    "updates that are lists": arrow(updated=pa.array([[1]] * N)),
    "a flat price": csv_of(DAYS.assign(open=0, high=0, low=0, close=0)),
    "the same time throughout": csv_of(DAYS.set_axis([DAYS.index[0]] * N)),
    "the times of tomorrow": csv_of(DAYS.set_axis(DAYS.index + pd.Timedelta(36500, "D"))),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_with_a_lie_in_it_gets_one_line(tmp_path, capsys, lie):
    content = LIES[lie] if isinstance(LIES[lie], bytes) else LIES[lie].encode()
    for name in ("SIMA.csv", "SIMA.parquet"):
        (tmp_path / name).write_bytes(content)
        for timeframe in (["--timeframe", "1Day"], []):
            assert (
                main(["data", "check", str(tmp_path / name), "--asset-class", "equity", *timeframe]) == 2
            ), capsys.readouterr().out
            said = capsys.readouterr().err
            assert (
                said.startswith("error: ")
                and said.count("\n") == 1
                and said.strip().isprintable()
                and len(said) < 700
            ), said
