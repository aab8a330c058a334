"""Longer bars, files, fingerprints; and real files with known defects."""

import io
import os
import re
import threading
import zoneinfo
from pathlib import Path
from types import SimpleNamespace

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
from small_bars import CRYPTO, crypto_bars, equity_bars, with_value

from trading_lib import bars as bars_module
from trading_lib.bars import (
    COLUMNS,
    TIMEFRAMES,
    bar_clock,
    fingerprint,
    read_bars,
    resample_bars,
    validate_bars,
    write_bars,
)
from trading_lib.config import InputError

NEW_YORK = zoneinfo.ZoneInfo("America/New_York")


@pytest.fixture(scope="module")
def nyse():
    "The exchange calendar itself, read without our arrays."
    return exchange_calendars.get_calendar("XNYS", start="2005-01-01", end="2026-12-31")


# resampling


@pytest.mark.parametrize(
    "to, rule", [("5Min", "5min"), ("15Min", "15min"), ("1Hour", "h"), ("4Hour", "4h"), ("1Day", "D")]
)
def test_resampling_crypto_against_pandas(to, rule):
    minutes = crypto_bars("2024-01-01", "2024-01-04", "1Min")
    minutes = minutes.drop(minutes.index[500:900])
    expected = (
        minutes.resample(rule)
        .agg({"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"})
        .dropna()
    )
    pd.testing.assert_frame_equal(
        resample_bars(minutes, "1Min", to, "crypto"), expected, check_freq=False, rtol=1e-13
    )
    # one minute short: the last bin is not known
    pd.testing.assert_frame_equal(
        resample_bars(minutes.iloc[:-1], "1Min", to, "crypto"),
        expected.iloc[:-1],
        check_freq=False,
        rtol=1e-13,
    )


@pytest.mark.parametrize("to", ["15Min", "1Hour", "4Hour", "1Day"])
def test_resampling_equities_against_grouping_by_local_hour(to):
    minutes = equity_bars("2024-10-28", "2024-11-09", "5Min")  # over the change of the clock
    minutes = pd.concat([minutes, equity_bars("2024-11-27", "2024-12-03", "5Min")])  # and a half day
    local = minutes.index.tz_convert("America/New_York")
    size = TIMEFRAMES[to] // 60
    bin_ = (local.hour * 60 + local.minute) // size if to != "1Day" else np.zeros(len(local), int)
    expected = minutes.groupby([local.date, bin_]).agg(
        {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"}
    )
    out = resample_bars(minutes, "5Min", to, "equity")
    assert np.allclose(out.to_numpy(), expected.to_numpy(), rtol=1e-13, atol=0)
    stamps = [
        pd.Timestamp(d).tz_localize("UTC")
        if to == "1Day"
        else (pd.Timestamp(d) + pd.Timedelta(minutes=int(b) * size))
        .tz_localize("America/New_York")
        .tz_convert("UTC")
        for d, b in expected.index
    ]
    assert list(out.index) == stamps
    assert len(validate_bars(out, to, "equity")[0]) == len(out)  # the labels are on the grid
    assert len(resample_bars(minutes.iloc[:-1], "5Min", to, "equity")) == len(out) - 1


@pytest.mark.slow
def test_a_longer_bar_is_known_only_at_its_close():
    """Whatever the moment, the longer bars made of what is known then are those of the whole history that
    have closed."""
    minutes = equity_bars("2024-11-27", "2024-12-03", "5Min")
    minutes = minutes.drop(minutes.index[[11, 40, 41]])  # 10:25 and two in the middle
    coins = crypto_bars("2024-01-01", "2024-01-03", "5Min")
    for bars, asset_class in ((minutes, "equity"), (coins.drop(coins.index[100:140]), "crypto")):
        for to in ("15Min", "1Hour", "4Hour", "1Day"):
            whole = resample_bars(bars, "5Min", to, asset_class)
            closes, known = (
                bar_clock(whole.index, to, asset_class).close,
                bar_clock(bars.index, "5Min", asset_class).close,
            )
            assert np.all(np.diff(closes) > 0)
            for k in range(1, len(bars) + 1, 7):
                closed = whole[closes <= known[k - 1]]
                if not len(closed):
                    with pytest.raises(InputError, match="do not fill one bar"):
                        resample_bars(bars.iloc[:k], "5Min", to, asset_class)
                else:
                    pd.testing.assert_frame_equal(
                        resample_bars(bars.iloc[:k], "5Min", to, asset_class),
                        closed,
                        check_freq=False,
                        rtol=1e-13,
                    )


def test_resampling_refuses():
    with pytest.raises(InputError, match="choose a multiple"):
        resample_bars(crypto_bars(timeframe="1Hour"), "1Hour", "15Min", "crypto")
    with pytest.raises(InputError, match="do not fill one bar"):
        resample_bars(CRYPTO.iloc[:3], "15Min", "1Hour", "crypto")


# files


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    file = write_bars(CRYPTO, tmp_path / "a" / "X.parquet")
    pd.testing.assert_frame_equal(read_bars(file), CRYPTO, check_freq=False)
    first = file.read_bytes()
    assert list(pd.read_parquet(file).columns) == ["timestamp", *COLUMNS]

    def power_cut(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(OSError):
        write_bars(CRYPTO.iloc[:10], file)
    monkeypatch.undo()
    assert file.read_bytes() == first and [p.name for p in file.parent.iterdir()] == ["X.parquet"]
    assert write_bars(CRYPTO, file).read_bytes() == first  # same bars, same bytes


def test_parquet_is_read_by_the_calling_thread(tmp_path, monkeypatch):
    """Another thread that holds a Python object when the interpreter ends aborts the process, after all of
    its work is done."""

    class Watched(io.BytesIO):
        readers = set()

        def read(self, *size):
            self.readers.add(threading.get_ident())
            return super().read(*size)

    file = write_bars(CRYPTO, tmp_path / "X.parquet")
    monkeypatch.setattr(bars_module, "io", SimpleNamespace(BytesIO=Watched))
    pd.testing.assert_frame_equal(read_bars(file), CRYPTO, check_freq=False)
    assert Watched.readers == {threading.get_ident()}
    modules = Path(bars_module.__file__).parent.rglob("*.py")
    assert [
        m.name
        for m in modules
        if "read_parquet(" in re.sub(r"\b_read_parquet\(", "", m.read_text(encoding="utf-8"))
    ] == []  # pandas has others read it


def test_unreadable_files_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_bars(tmp_path / "none.parquet")
    (tmp_path / "torn.parquet").write_bytes(
        write_bars(CRYPTO, tmp_path / "whole.parquet").read_bytes()[:-100]
    )
    with pytest.raises(InputError, match="no readable parquet"):
        read_bars(tmp_path / "torn.parquet")
    CRYPTO.drop(columns="low").rename_axis("timestamp").reset_index().to_parquet(tmp_path / "low.parquet")
    with pytest.raises(InputError, match="low missing"):
        read_bars(tmp_path / "low.parquet")


def test_fingerprint():
    print_ = fingerprint(CRYPTO)
    assert (
        print_["bars"] == len(CRYPTO)
        and print_["start"] == "2024-01-01 00:00Z"
        and print_["end"] == "2024-01-07 23:45Z"
        and len(print_["sha256"]) == 64
    )
    assert (
        fingerprint(CRYPTO.set_axis(CRYPTO.index.as_unit("s")))
        == print_
        == fingerprint(CRYPTO[["volume", "close", "low", "high", "open"]])
    )
    assert (
        fingerprint(with_value(CRYPTO, "low", np.nextafter(CRYPTO.low.iloc[30], 0)))["sha256"]
        != print_["sha256"]
    )
    assert fingerprint(CRYPTO.set_axis(CRYPTO.index + pd.Timedelta("15min")))["sha256"] != print_["sha256"]


# real bars

REAL = {  # file -> bars, segments, missing bars, out-of-session bars
    "crypto/15Min/BTC-USDT": (44371, 2, 11117, 0),
    "crypto/15Min/SOL-USDT": (44457, 2, 11031, 0),
    "crypto/15Min/ETH-BTC": (8112, 4, 34, 0),
    "crypto/5Min/ETH-BTC": (24336, 4, 104, 0),
    "crypto/1Min/ETH-USDT": (42915, 2, 284, 0),
    "crypto/1Min/BTC-USDT": (105120, 1, 0, 0),
    "equity/15Min/SPY": (194 * 26 - 3 * 12, 1, 0, 5237 - 5008),
    "equity/15Min/AAPL": (3616, 1, 0, 55),
    "equity/15Min/COST": (3616, 1, 0, 0),
    "equity/5Min/COST": (10848, 1, 0, 0),
    "equity/1Day/AMD": (2013, 1, 0, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_bars_with_known_defects(real_bars_folder, name):
    asset_class, timeframe, _ = name.split("/")
    clean, report = validate_bars(
        pd.read_parquet(real_bars_folder / f"{name}.parquet"), timeframe, asset_class
    )
    assert (
        report["bars"],
        report["segments"],
        report["findings"]["missing_bars"],
        sum(report["dropped_out_of_session"].values()),
    ) == REAL[name]
    assert report["findings"]["thin_sessions"] == 0 and len(clean) == report["bars"] == report[
        "bars_in"
    ] - sum(report["dropped_out_of_session"].values())


def test_real_closing_prints_and_outages(real_bars_folder):
    _, report = validate_bars(
        pd.read_parquet(real_bars_folder / "equity/15Min/SPY.parquet"), "15Min", "equity"
    )
    assert report["dropped_out_of_session"] == {
        "before_open": 0,
        "closing_print": 194,
        "after_close": 35,
        "no_session": 0,
    }  # 35: thin bars after 13:00 on three half days
    _, report = validate_bars(
        pd.read_parquet(real_bars_folder / "crypto/5Min/ETH-BTC.parquet"), "5Min", "crypto"
    )
    assert [(b["last_bar"], b["next_bar"]) for b in report["breaks"]] == [
        ("2021-03-06 01:55Z", "2021-03-06 03:30Z"),
        ("2021-04-20 01:55Z", "2021-04-20 04:30Z"),
        ("2021-04-25 04:00Z", "2021-04-25 08:45Z"),
    ]
    _, report = validate_bars(pd.read_parquet(real_bars_folder / "equity/1Day/AMD.parquet"), "1Day", "equity")
    assert report["findings"]["large_steps"] == 1  # +52 % on 2016-04-22


RESAMPLED = [  # asset class, symbol, short, long; the folder holds both, made by other code
    *[("crypto", s, "5Min", "15Min") for s in ("BTC-USDT", "ETH-BTC", "ETH-USDT", "SOL-USDT", "XRP-USDT")],
    ("crypto", "BTC-USDT", "1Min", "5Min"),
    ("crypto", "BTC-USDT", "1Min", "15Min"),
    *[("equity", s, "5Min", "15Min") for s in ("AAPL", "COST", "META", "MSFT", "QQQ", "SPY", "TSLA")],
    ("equity", "SPY", "1Min", "5Min"),
    ("equity", "SPY", "1Min", "15Min"),
]
EXPLAINED = {  # bars that one side has alone -> why
    ("SOL-USDT", "2024-09-07 02:15"): "one of three 5Min bars: the first source of the file ends there, and "
    "its 15Min file leaves the unfinished bar out; to us it is a gap, as in an outage",
    ("XRP-USDT", "2024-09-07 02:15"): "as in SOL-USDT",
}


@pytest.mark.slow
def test_real_resampling_equals_the_files(real_bars_folder):
    """Every pair of timeframes of every symbol; prices exactly, volumes but for the order of summation; `-s`
    shows the table."""
    explained = set()
    for asset_class, symbol, short, long in RESAMPLED:
        made, stored = (
            validate_bars(
                pd.read_parquet(real_bars_folder / f"{asset_class}/{t}/{symbol}.parquet"), t, asset_class
            )[0]
            for t in (short, long)
        )
        made = resample_bars(made, short, long, asset_class)
        first, last = max(made.index[0], stored.index[0]), min(made.index[-1], stored.index[-1])
        made, stored = made.loc[first:last], stored.loc[first:last]
        alone = made.index.symmetric_difference(stored.index)
        for t in alone:
            explained.add((symbol, f"{t:%Y-%m-%d %H:%M}"))
        both = made.index.intersection(stored.index)
        assert len(both) > 3000 and (
            made.loc[both, list(COLUMNS[:4])] == stored.loc[both, list(COLUMNS[:4])]
        ).all(axis=None), (symbol, short, long)
        ulp = (np.abs(made.volume - stored.volume) / np.spacing(stored.volume)).loc[both].max()
        summed = TIMEFRAMES[long] // TIMEFRAMES[short]
        assert ulp < (summed if short == "1Min" and asset_class == "crypto" else 1), (
            symbol,
            short,
            long,
        )  # fractions of coins are rounded at each addition, in another order
        print(
            f"\n{symbol:9} {short:>5} -> {long:5} {len(both):6,} bars equal, {len(alone)} alone, "
            f"volumes differ by {ulp:.0f} units in the last place at most",
            end="",
        )
    print(*(f"\n{' '.join(k)}: {v}" for k, v in EXPLAINED.items()))
    assert explained == set(EXPLAINED)
