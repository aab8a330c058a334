"""Timeframes, the calendar against an independent reading of it, the clock of the bars."""

import zoneinfo
from datetime import UTC, timedelta

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
from small_bars import crypto_bars

from trading_lib.bars import (
    TIMEFRAMES,
    asset_class_of,
    bar_clock,
    bars_per_year,
    expected_labels,
    path_symbol,
    timeframe_name,
    timeframe_seconds,
)
from trading_lib.config import InputError

NEW_YORK = zoneinfo.ZoneInfo("America/New_York")


@pytest.fixture(scope="module")
def nyse():
    "The exchange calendar itself, read without our arrays."
    return exchange_calendars.get_calendar("XNYS", start="2005-01-01", end="2026-12-31")


# names


def test_timeframes_and_symbols():
    assert {
        timeframe_name(t): timeframe_seconds(t)
        for t in ("1Min", "5m", "15min", "30T", "60Min", "240Min", "24Hour")
    } == TIMEFRAMES
    with pytest.raises(InputError, match="did you mean '15Min'"):
        timeframe_seconds("15Mim")
    with pytest.raises(InputError):
        timeframe_seconds("1M")  # a month
    with pytest.raises(InputError, match="did you mean 'equity'"):
        bar_clock(crypto_bars().index, "15Min", "equities")
    assert asset_class_of("ETH/BTC") == "crypto" and asset_class_of("QQQ") == "equity"
    for wrong in ("", "  ", None, "../x", "A/B/C", "BTC USD"):
        with pytest.raises(InputError, match="symbol"):
            path_symbol(wrong)


# calendar


def test_sessions_known_from_the_exchange():
    labels = expected_labels("15Min", "equity", "2024-03-08", "2024-03-09")
    assert (labels[0], labels[-1]) == (pd.Timestamp("2024-03-08 14:30Z"), pd.Timestamp("2024-03-08 20:45Z"))
    labels = expected_labels("15Min", "equity", "2024-03-11", "2024-03-12")
    assert (labels[0], labels[-1]) == (pd.Timestamp("2024-03-11 13:30Z"), pd.Timestamp("2024-03-11 19:45Z"))
    assert len(expected_labels("15Min", "equity", "2024-11-28", "2024-11-29")) == 0  # Thanksgiving
    half = bar_clock(expected_labels("15Min", "equity", "2024-11-29", "2024-11-30"), "15Min", "equity")
    assert (
        len(half) == 14
        and pd.Timestamp(half.session_close[0], tz="UTC") == pd.Timestamp("2024-11-29 18:00Z")
        and half.last_of_session[13]
        and half.last_of_session.sum() == 1
    )


@pytest.mark.parametrize("timeframe", ["5Min", "15Min", "30Min", "1Hour", "4Hour"])
def test_clock_against_a_scalar_reading(nyse, timeframe):
    "Bar by bar with zoneinfo and the calendar's own methods, over both changes of the clock and a half day."
    step = timedelta(seconds=TIMEFRAMES[timeframe])
    for start, end in (
        ("2024-03-07", "2024-03-13"),
        ("2024-10-31", "2024-11-06"),
        ("2024-11-27", "2024-12-03"),
    ):
        expected = []
        for session in nyse.sessions_in_range(start, pd.Timestamp(end) - pd.Timedelta(days=1)):
            opened, closed = (
                nyse.session_open(session).to_pydatetime(),
                nyse.session_close(session).to_pydatetime(),
            )
            local = opened.astimezone(NEW_YORK)
            midnight = local.replace(hour=0, minute=0)
            label = midnight
            while label.astimezone(UTC) < closed:
                known = min((label + step).astimezone(UTC), closed)
                if (label + step).astimezone(UTC) > opened:
                    expected.append(
                        (
                            label.astimezone(UTC),
                            known,
                            opened,
                            closed,
                            (known - opened) / (closed - opened),
                            known == closed,
                            label.hour + label.minute / 60,
                            label.weekday(),
                            label.month,
                        )
                    )
                label += step
        labels = expected_labels(timeframe, "equity", start, end)
        clock = bar_clock(labels, timeframe, "equity")
        assert len(clock) == len(expected)
        for i, row in enumerate(expected):
            times = [pd.Timestamp(t).value for t in row[:4]]
            assert [clock.start[i], clock.close[i], clock.session_open[i], clock.session_close[i]] == times
            assert clock.session_progress[i] == pytest.approx(row[4], abs=1e-15)
            assert (clock.last_of_session[i], clock.hour[i], clock.weekday[i], clock.month[i]) == row[5:]
        assert np.array_equal(
            np.unique(clock.session) - clock.session[0], np.arange(len(np.unique([t[3] for t in expected])))
        )


def test_crypto_clock():
    labels = expected_labels("15Min", "crypto", "2024-02-28", "2024-03-02")
    clock = bar_clock(labels, "15Min", "crypto")
    assert len(clock) == 3 * 96 and np.array_equal(clock.close - clock.start, np.full(288, 900 * 10**9))
    assert (
        np.array_equal(clock.hour, labels.hour + labels.minute / 60)
        and np.array_equal(clock.weekday, labels.day_of_week)
        and np.array_equal(clock.month, labels.month)
    )
    assert (
        not clock.last_of_session.any()
        and clock.session_progress[95] == 1
        and clock.session_progress[96] == 1 / 96
    )
    assert clock.session[0] == (pd.Timestamp("2024-02-28") - pd.Timestamp("1970-01-01")).days


def test_daily_clock():
    labels = expected_labels("1Day", "equity", "2024-11-25", "2024-12-03")
    clock = bar_clock(labels, "1Day", "equity")
    assert [f"{t:%m-%d}" for t in labels] == ["11-25", "11-26", "11-27", "11-29", "12-02"]
    assert (
        clock.weekday.tolist() == [0, 1, 2, 4, 0]
        and clock.month.tolist() == [11, 11, 11, 11, 12]
        and not clock.hour.any()
    )  # the date's own clock
    assert (
        pd.Timestamp(clock.close[3], tz="UTC") == pd.Timestamp("2024-11-29 18:00Z")
        and (clock.session_progress == 1).all()
        and not clock.last_of_session.any()
    )
    assert bar_clock(labels[[0, 1, 3, 4]], "1Day", "equity").segment.tolist() == [0, 0, 1, 1]
    crypto = bar_clock(
        expected_labels("1Day", "crypto", "2024-01-01", "2024-01-04").delete(1), "1Day", "crypto"
    )
    assert crypto.segment.tolist() == [0, 1] and (crypto.session_progress == 1).all()


def test_clock_depends_on_the_label_alone():
    "A window of history has the clock of the whole, but for the number of its segment."
    labels = expected_labels("15Min", "equity", "2023-01-01", "2024-01-01")
    whole, part = bar_clock(labels, "15Min", "equity"), bar_clock(labels[1000:1700], "15Min", "equity")
    for name in whole.__dataclass_fields__:
        if name != "segment":
            assert np.array_equal(getattr(whole, name)[1000:1700], getattr(part, name)), name


def test_clock_refuses_what_is_not_validated():
    with pytest.raises(InputError, match="outside the exchange's sessions"):
        bar_clock(pd.DatetimeIndex(["2024-03-09 15:00Z"]), "15Min", "equity")
    with pytest.raises(InputError, match="sorted"):
        bar_clock(crypto_bars().index[::-1], "15Min", "crypto")
    with pytest.raises(InputError, match="UTC"):
        bar_clock(crypto_bars().index.tz_localize(None), "15Min", "crypto")
    for year in ("1969", "2036"):
        with pytest.raises(InputError, match="calendar covers 1970-01-02 to 2035"):
            bar_clock(pd.DatetimeIndex([f"{year}-06-02 15:00Z"]), "15Min", "equity")
        with pytest.raises(InputError, match="calendar covers"):
            expected_labels("1Day", "equity", f"{year}-01-01", f"{year}-06-01")
    assert (
        len(bar_clock(crypto_bars().index[:0], "15Min", "crypto"))
        == len(bar_clock(crypto_bars().index[:0], "15Min", "equity"))
        == 0
    )


def test_segments_begin_beyond_one_missing_hour():
    for timeframe, spared in (("1Min", 60), ("15Min", 4), ("30Min", 2), ("1Hour", 1)):
        labels = expected_labels(timeframe, "crypto", "2024-01-01", "2024-01-02")
        assert bar_clock(labels.delete(range(5, 5 + spared)), timeframe, "crypto").segment.max() == 0
        assert bar_clock(labels.delete(range(5, 6 + spared)), timeframe, "crypto").segment.tolist() == [
            0
        ] * 5 + [1] * (len(labels) - 6 - spared)


def test_bars_per_year(nyse):
    for year in (2007, 2020, 2024, 2025):
        sessions = nyse.sessions_in_range(f"{year}-01-01", f"{year}-12-31")
        minutes = sum((nyse.session_close(s) - nyse.session_open(s)).total_seconds() / 60 for s in sessions)
        assert bars_per_year("1Day", "equity", f"{year}-05-05", f"{year}-05-06") == len(sessions)
        assert bars_per_year("15Min", "equity", f"{year}-01-01", f"{year + 1}-01-01") == minutes / 15
        assert bars_per_year("1Min", "equity", f"{year}-12-31", f"{year}-12-31 23:00") == minutes
    assert (
        bars_per_year("15Min", "equity", "2025-01-01", "2026-01-01") == 6464
        and bars_per_year("1Hour", "equity", "2025-01-01", "2026-01-01") == 250 * 7 - 3 * 3
    )
    assert (
        bars_per_year("1Day", "equity", "2024-12-31", "2025-01-02") == (252 + 250) / 2
    )  # both years are touched
    assert bars_per_year("1Hour", "crypto", "2024-01-01", "2024-02-01") == 8760
    with pytest.raises(InputError):
        bars_per_year("1Day", "equity", "2025-01-02", "2025-01-02")
