"""Every kind of bad bar: refused by name, or repaired and counted."""

import json
import re
import zoneinfo

import numpy as np
import pandas as pd
import pytest
from small_bars import CRYPTO, DAILY, EQUITY, crypto_bars, equity_bars, wandering_bars, with_label, with_value

from trading_lib.bars import (
    COLUMNS,
    OUT_OF_SESSION,
    REFUSED,
    REPAIRED,
    REPORTED,
    TIMEFRAMES,
    bar_clock,
    validate_bars,
)
from trading_lib.config import DataParameters, InputError
from trading_lib.env import split_bounds

NEW_YORK = zoneinfo.ZoneInfo("America/New_York")


# refused

HALVED = pd.concat([EQUITY.iloc[:400], EQUITY.iloc[400:] * [0.5, 0.5, 0.5, 0.5, 2.0]])
REFUSALS = [
    ("not a table", EQUITY.to_numpy(), "15Min", "equity"),
    ("not a table", None, "15Min", "equity"),
    ("empty", EQUITY.iloc[:0], "15Min", "equity"),
    ("missing column", EQUITY.drop(columns="close"), "15Min", "equity"),
    ("missing column", EQUITY.reset_index(drop=True), "15Min", "equity"),
    ("mixed content", EQUITY.assign(symbol=["OLD"] * 300 + ["NEW"] * (len(EQUITY) - 300)), "15Min", "equity"),
    ("mixed content", EQUITY.assign(feed=["iex", "sip"] * (len(EQUITY) // 2)), "15Min", "equity"),
    ("mixed content", pd.concat([EQUITY, EQUITY[["close"]]], axis=1), "15Min", "equity"),
    ("empty symbol", EQUITY.assign(symbol=""), "15Min", "equity"),
    ("empty symbol", EQUITY.assign(symbol=["SPY"] * (len(EQUITY) - 1) + [None]), "15Min", "equity"),
    ("bad dtype", CRYPTO.assign(updated=[3, "never"] * (len(CRYPTO) // 2)), "15Min", "crypto"),
    ("bad dtype", EQUITY.assign(close=EQUITY.close.astype(str)), "15Min", "equity"),
    ("bad dtype", EQUITY.assign(volume=EQUITY.volume > 5), "15Min", "equity"),
    (
        "no number",
        EQUITY.assign(close=EQUITY.close.astype(object).where(EQUITY.index != EQUITY.index[30], "-")),
        "15Min",
        "equity",
    ),
    ("impossible time", CRYPTO.set_axis(CRYPTO.index - pd.Timedelta(365 * 200, "D")), "15Min", "crypto"),
    ("impossible value", with_value(CRYPTO, "volume", 1e25), "15Min", "crypto"),
    ("impossible value", CRYPTO.assign(**{c: CRYPTO[c] * 1e12 for c in COLUMNS[:4]}), "15Min", "crypto"),
    (
        "bad dtype",
        EQUITY.rename_axis("timestamp")
        .reset_index()
        .assign(timestamp=EQUITY.index.strftime("%Y-%m-%d %H:%M")),
        "15Min",
        "equity",
    ),
    (
        "bad dtype",
        EQUITY.rename_axis("timestamp").reset_index().assign(timestamp=EQUITY.index.asi8),
        "15Min",
        "equity",
    ),
    ("naive time", EQUITY.set_axis(EQUITY.index.tz_localize(None)), "15Min", "equity"),
    ("wrong zone", EQUITY.tz_convert("America/New_York"), "15Min", "equity"),
    (
        "wrong zone",
        EQUITY.set_axis(EQUITY.index.tz_convert("America/New_York").tz_localize(None).tz_localize("UTC")),
        "15Min",
        "equity",
    ),  # New York's clock called UTC
    (
        "wrong zone",
        EQUITY.set_axis(EQUITY.index - pd.Timedelta("1h")),
        "15Min",
        "equity",
    ),  # Chicago's clock called New York's
    ("wrong zone", EQUITY.set_axis(EQUITY.index + pd.Timedelta("1h")), "15Min", "equity"),
    ("null time", EQUITY.set_axis(EQUITY.index.where(EQUITY.index != EQUITY.index[5])), "15Min", "equity"),
    *[("null price", with_value(CRYPTO, c, np.nan), "15Min", "crypto") for c in COLUMNS],
    ("null price", EQUITY.assign(close=None), "15Min", "equity"),
    *[
        ("infinite value", with_value(CRYPTO, c, v), "15Min", "crypto")
        for c in ("high", "volume")
        for v in (np.inf,)
    ],
    *[
        ("price not above zero", with_value(CRYPTO, c, v), "15Min", "crypto")
        for c in COLUMNS[:4]
        for v in (0.0, -1.0)
    ],
    ("negative volume", with_value(CRYPTO, "volume", -1.0), "15Min", "crypto"),
    ("OHLC order", with_value(CRYPTO, "high", CRYPTO.low.iloc[30] * 0.999), "15Min", "crypto"),
    ("OHLC order", with_value(CRYPTO, "close", CRYPTO.high.iloc[30] * 1.001), "15Min", "crypto"),
    ("OHLC order", with_value(CRYPTO, "open", CRYPTO.low.iloc[30] * 0.999), "15Min", "crypto"),
    ("conflicting duplicate", pd.concat([CRYPTO, CRYPTO.iloc[[30]].assign(volume=0.5)]), "15Min", "crypto"),
    (
        "conflicting duplicate",
        pd.concat(
            [DAILY, DAILY.iloc[[30]].set_axis(DAILY.index[[30]] + pd.Timedelta("5h")).assign(volume=0.5)]
        ),
        "1Day",
        "equity",
    ),
    ("wrong timeframe", crypto_bars(timeframe="1Hour"), "15Min", "crypto"),
    ("wrong timeframe", crypto_bars(timeframe="1Min"), "15Min", "crypto"),
    ("wrong timeframe", DAILY.resample("7D").first(), "1Day", "equity"),
    ("off grid", with_label(CRYPTO, CRYPTO.index[30] + pd.Timedelta("4min")), "15Min", "crypto"),
    ("off grid", DAILY.set_axis(DAILY.index + pd.Timedelta("9h")), "1Day", "equity"),
    (
        "off grid",
        crypto_bars(timeframe="1Day").set_axis(crypto_bars(timeframe="1Day").index + pd.Timedelta("5h")),
        "1Day",
        "crypto",
    ),
    ("bar in the future", with_label(CRYPTO, "2031-01-01 00:00Z", -1), "15Min", "crypto"),
    *[
        (
            "shifted labels",
            (b := equity_bars(timeframe=t)).set_axis(b.index + k * pd.Timedelta(seconds=TIMEFRAMES[t])),
            t,
            "equity",
        )
        for t in ("1Min", "5Min", "15Min", "1Hour")
        for k in (1, -1)
    ],
    ("outside session", crypto_bars("2024-01-06", "2024-01-07"), "15Min", "equity"),  # a Saturday
    ("outside session", crypto_bars(), "15Min", "equity"),
    (
        "outside session",
        EQUITY.set_axis(EQUITY.index - pd.Timedelta("8h")),
        "15Min",
        "equity",
    ),  # nothing but nights
    ("outside session", crypto_bars("2024-01-01", "2024-06-01", "1Day"), "1Day", "equity"),
    ("unexplained step", HALVED, "15Min", "equity"),
    ("unexplained step", pd.concat([CRYPTO.iloc[:300], CRYPTO.iloc[300:] * 10]), "15Min", "crypto"),
    (
        "unexplained step",
        pd.concat(
            [
                CRYPTO.iloc[:300],
                with_value(CRYPTO.iloc[300:] * 2, "open", CRYPTO.close.iloc[299], 0).assign(
                    low=lambda b: b[["low", "open"]].min(axis=1)
                ),
            ]
        ),
        "15Min",
        "crypto",
    ),  # doubles within a bar
    (
        "unexplained step",
        with_value(with_value(CRYPTO, "close", 200.0), "high", 200.0),
        "15Min",
        "crypto",
    ),  # a bad tick
]


@pytest.mark.parametrize(
    "kind, frame, timeframe, asset_class", REFUSALS, ids=[f"{k}-{i}" for i, (k, *_) in enumerate(REFUSALS)]
)
def test_refused_by_name(kind, frame, timeframe, asset_class):
    with pytest.raises(InputError) as error:
        validate_bars(frame, timeframe, asset_class)
    text = str(error.value)
    assert text.startswith(f"bars refused, {kind}: ") and text.endswith(REFUSED[kind]) and "\n" not in text


def test_high_below_low_is_called_so():
    with pytest.raises(InputError, match="high .* is below low"):
        validate_bars(with_value(CRYPTO, "high", CRYPTO.low.iloc[30] * 0.999), "15Min", "crypto")


def test_every_kind_of_refusal_is_tested():
    assert {kind for kind, *_ in REFUSALS} == set(REFUSED)


def test_the_first_offending_bar_is_named():
    frame = with_value(with_value(CRYPTO, "close", np.nan, row=200), "close", np.nan, row=100)
    with pytest.raises(
        InputError, match=rf"{CRYPTO.index[100]:%Y-%m-%d %H:%M}Z, close is missing \(and 1 more\)"
    ):
        validate_bars(frame.iloc[::-1], "15Min", "crypto")


BAD_CELLS = {
    "-": "'-'",
    "1,234.5": "'1,234.5'",
    "1_000": "'1_000'",
    "12 $": "'12 $'",
    True: "'True'",
    (1.5,): "'(1.5,)'",
    10**400: "'1000",
    "a\nb": r"'a\\nb'",
    "x" * 100_000: "xxx…'",
    b"1.5x": "1.5x",
}


@pytest.mark.parametrize("value", BAD_CELLS)
def test_the_bad_cell_is_shown_and_not_a_good_one(value):
    frame = CRYPTO.astype({"high": object})
    frame.iat[41, 1] = value
    with pytest.raises(InputError) as e:
        validate_bars(frame, "15Min", "crypto")
    said = str(e.value)
    assert (
        f"no number: {CRYPTO.index[41]:%Y-%m-%d %H:%M}Z, high is " in said
        and BAD_CELLS[value] in said
        and "\n" not in said
        and len(said) < 300
    )
    frame.iat[7, 1] = "none"
    with pytest.raises(
        InputError, match=rf"{CRYPTO.index[7]:%Y-%m-%d %H:%M}Z, high is 'none' \(and 1 more\)"
    ):
        validate_bars(frame, "15Min", "crypto")


@pytest.mark.parametrize("volume", [1e12, 2.0**53, 2.0**63, 1e25, 1e308])
def test_volumes_that_sums_cannot_carry_are_refused_and_large_ones_are_not(volume):
    "A running sum of dollars that holds one such bar no longer holds the others."
    when, amount = f"{CRYPTO.index[30]:%Y-%m-%d %H:%M}Z", re.escape(f"{volume:g}")
    text = rf"impossible value: {when}, volume is {amount} at a close of .*worth more than 1e\+15"
    with pytest.raises(InputError, match=text):
        validate_bars(
            with_value(
                CRYPTO.assign(**{c: CRYPTO[c] * 2e4 / CRYPTO.close.iloc[30] for c in COLUMNS[:4]}),
                "volume",
                volume,
            ),
            "15Min",
            "crypto",
        )
    most = 0.99e15 / CRYPTO.close.iloc[30]
    clean, _ = validate_bars(with_value(CRYPTO, "volume", most), "15Min", "crypto")
    worth = (clean.close * clean.volume).to_numpy()
    total = np.cumsum(worth)
    assert np.abs(np.diff(total)[40:] - worth[41:]).max() < 1  # a dollar, of what other bars trade


def test_steps_pass_on_the_dates_that_are_named():
    gap = np.where(np.arange(len(DAILY)) >= 60, 0.8, 1.0) * np.where(np.arange(len(DAILY)) >= 90, 0.4, 1.0)
    bars = DAILY.assign(**{c: DAILY[c] * gap for c in COLUMNS[:4]}, volume=1e6)
    first, second = (f"{DAILY.index[i]:%Y-%m-%d}" for i in (60, 90))

    def refused(*dates):
        with pytest.raises(InputError, match="unexplained step") as e:
            validate_bars(bars, "1Day", "equity", allow_steps=list(dates))
        return str(e.value)

    assert (
        first in refused()
        and second in refused(first)
        and first in refused(second)
        and first in refused("2001-01-01")
    )
    for allowed in (True, [first, second], [DAILY.index[60], DAILY.index[90].date()]):
        assert validate_bars(bars, "1Day", "equity", allow_steps=allowed)[1]["bars"] == len(DAILY)
    hours = EQUITY.assign(
        **{c: EQUITY[c] * np.where(EQUITY.index >= "2024-11-20", 0.3, 1.0) for c in COLUMNS[:4]}
    )
    assert len(validate_bars(hours, "15Min", "equity", allow_steps=["2024-11-20"])[0]) == len(EQUITY)
    for wrong in (3, "soon", [5.5], {"a": 1}):
        with pytest.raises(InputError, match="allow_steps"):
            validate_bars(bars, "1Day", "equity", allow_steps=wrong)


def test_the_timeframe_that_bars_have_is_named():
    with pytest.raises(
        InputError, match="bars are 15 minutes apart, as 15Min bars are, expected 60; say the timeframe"
    ):
        validate_bars(CRYPTO, "1Hour", "crypto")


def test_the_bars_the_refusals_start_from_are_good():
    for frame, timeframe, asset_class in (
        (EQUITY, "15Min", "equity"),
        (CRYPTO, "15Min", "crypto"),
        (DAILY, "1Day", "equity"),
    ):
        clean, report = validate_bars(frame, timeframe, asset_class)
        pd.testing.assert_frame_equal(clean, frame, check_freq=False)
        assert (
            not any(report["repaired"].values())
            and not any(report["findings"].values())
            and not any(report["dropped_out_of_session"].values())
        )
        assert set(report["repaired"]) == set(REPAIRED) and set(report["findings"]) == set(REPORTED)
        assert (
            clean.index.name == "timestamp"
            and str(clean.index.dtype) == "datetime64[ns, UTC]"
            and list(clean.columns) == list(COLUMNS)
        )
        assert json.loads(json.dumps(report)) == report


# repaired and counted


def test_disorder_and_exact_duplicates():
    shuffled = pd.concat([CRYPTO.iloc[50:], CRYPTO.iloc[:50], CRYPTO.iloc[[7, 8, 8]]])
    clean, report = validate_bars(shuffled, "15Min", "crypto")
    pd.testing.assert_frame_equal(clean, CRYPTO, check_freq=False)
    assert (
        report["repaired"]["exact_duplicates"] == 3
        and report["repaired"]["disorder"] == 2
        and report["bars_in"] == len(CRYPTO) + 3
    )


def test_the_input_is_left_alone():
    frame = pd.concat([CRYPTO.iloc[50:], CRYPTO.iloc[:51]])
    before = frame.copy()
    validate_bars(frame, "15Min", "crypto")
    pd.testing.assert_frame_equal(frame, before)


def test_a_timestamp_column_any_unit_any_number_type_and_more_columns():
    raw = CRYPTO.rename_axis("timestamp").reset_index()
    raw["timestamp"] = raw["timestamp"].astype("datetime64[s, UTC]")
    raw["volume"] = raw["volume"].astype("Int64")
    clean, report = validate_bars(raw.assign(vwap=1.0, symbol="X"), "15Min", "crypto")
    pd.testing.assert_frame_equal(clean, CRYPTO, check_freq=False)
    assert report["ignored_columns"] == ["symbol", "vwap"]


def test_zero_volume_is_kept_and_counted():
    clean, report = validate_bars(with_value(CRYPTO, "volume", 0.0), "15Min", "crypto")
    assert len(clean) == len(CRYPTO) and report["findings"]["zero_volume"] == 1


def test_differences_of_rounding_are_mended():
    high = CRYPTO.high.iloc[30]
    clean, report = validate_bars(with_value(CRYPTO, "close", high * (1 + 1e-10)), "15Min", "crypto")
    assert report["repaired"]["rounding"] == 1 and clean.high.iloc[30] == clean.close.iloc[30] == high * (
        1 + 1e-10
    )


def test_unfinished_last_bar():
    last = CRYPTO.index[-1]
    for now, dropped in ((last + pd.Timedelta("14min"), 1), (last + pd.Timedelta("15min"), 0), (last, 1)):
        clean, report = validate_bars(CRYPTO, "15Min", "crypto", now=now)
        assert report["repaired"]["unfinished_last_bar"] == dropped == len(CRYPTO) - len(clean)
    # a half day's last hour closes at 13:00, not an hour after its label's bar length
    hourly = equity_bars("2024-11-29", "2024-11-30", "4Hour")
    assert (
        validate_bars(hourly, "4Hour", "equity", now="2024-11-29 18:00Z")[1]["bars"] == 2
        and validate_bars(hourly, "4Hour", "equity", now="2024-11-29 17:59Z")[1]["bars"] == 1
    )
    with pytest.raises(InputError, match="no bar had closed"):
        validate_bars(CRYPTO.iloc[:1], "15Min", "crypto", now=CRYPTO.index[0])
    with pytest.raises(InputError, match="bar in the future"):
        validate_bars(CRYPTO, "15Min", "crypto", now=last - pd.Timedelta("1min"))


def test_a_session_in_progress_is_no_wrong_zone():
    "Pre-market bars of today, and a session that has only begun."
    early = wandering_bars(pd.date_range("2024-11-20 13:00Z", periods=6, freq="15min"))
    frame = pd.concat([equity_bars("2024-11-18", "2024-11-20"), early])
    _, report = validate_bars(frame, "15Min", "equity", allow_steps=True)
    assert report["dropped_out_of_session"]["before_open"] == 6
    clean, report = validate_bars(
        pd.concat([frame, equity_bars("2024-11-20", "2024-11-21").iloc[:2]]),
        "15Min",
        "equity",
        now="2024-11-20 14:50Z",
        allow_steps=True,
    )
    assert len(clean) == 2 * 26 + 1


def test_out_of_session_bars_by_kind():
    extra = wandering_bars(
        pd.DatetimeIndex(
            [
                "2024-11-29 13:00Z",
                "2024-11-29 14:15Z",
                "2024-11-27 21:00Z",
                "2024-11-29 18:00Z",
                "2024-11-29 18:15Z",
                "2024-11-27 21:15Z",
                "2024-11-28 15:00Z",
                "2024-11-30 15:00Z",
            ]
        ),
        seed=3,
    )
    clean, report = validate_bars(pd.concat([EQUITY, extra]), "15Min", "equity")
    pd.testing.assert_frame_equal(clean, EQUITY, check_freq=False)
    assert report["dropped_out_of_session"] == {
        "before_open": 2,
        "closing_print": 2,
        "after_close": 2,
        "no_session": 2,
    } and set(OUT_OF_SESSION) == set(report["dropped_out_of_session"])


def test_extended_hours_history():
    "4:00 to 20:00 New York, as full feeds deliver: only the sessions remain."
    local = pd.date_range("2024-11-04 04:00", "2024-12-06 19:45", freq="15min", tz="America/New_York")
    local = local[(local.hour >= 4) & (local.hour < 20) & (local.day_of_week < 5)]
    clean, report = validate_bars(wandering_bars(local.tz_convert("UTC")), "15Min", "equity")
    assert (
        clean.index.equals(EQUITY.index) and report["dropped_out_of_session"]["no_session"] == 64
    )  # Thanksgiving
    assert {k: v["days"] for k, v in report["out_of_session"].items()} == {
        "before_open": 24,
        "closing_print": 24,
        "after_close": 24,
        "no_session": 1,
    }  # 19:45 in winter is 0:45 UTC of the next day


def test_daily_labels_of_new_york_midnight():
    midnight = DAILY.set_axis(DAILY.index.tz_localize(None).tz_localize("America/New_York").tz_convert("UTC"))
    assert sorted(set(midnight.index.hour)) == [4, 5]
    clean, report = validate_bars(midnight, "1Day", "equity")
    pd.testing.assert_frame_equal(clean, DAILY, check_freq=False)
    assert report["repaired"]["daily_labels"] == len(DAILY)
    clean, report = validate_bars(
        pd.concat([DAILY, DAILY.iloc[[3]].set_axis(pd.DatetimeIndex(["2024-01-06 00:00Z"]))]),
        "1Day",
        "equity",
    )
    assert len(clean) == len(DAILY) and report["dropped_out_of_session"]["no_session"] == 1


def test_four_hour_bars_may_follow_the_exchange_clock_or_utc():
    winter = equity_bars("2024-01-08", "2024-02-10", "4Hour")
    assert set(winter.index.hour) == {13, 17} and len(validate_bars(winter, "4Hour", "equity")[0]) == len(
        winter
    )  # 8:00 and 12:00 in New York
    by_utc = wandering_bars(
        pd.DatetimeIndex(
            [
                d + pd.Timedelta(hours=h)
                for d in pd.date_range("2024-01-08", "2024-01-12", tz="UTC")
                for h in (12, 16, 20)
            ]
        )
    )
    clean, report = validate_bars(by_utc, "4Hour", "equity")
    assert len(clean) == len(by_utc) and report["findings"]["thin_sessions"] == 0
    _, report = validate_bars(by_utc.iloc[2:], "4Hour", "equity")
    assert (report["findings"]["thin_sessions"], report["findings"]["missing_bars"]) == (
        1,
        1,
    )  # three bars in a session do not make up for one in another
    with pytest.raises(InputError, match="off grid"):
        validate_bars(pd.concat([by_utc, winter.iloc[[0]]]), "4Hour", "equity", allow_steps=True)


# steps, gaps, thin sessions


def test_steps():
    assert validate_bars(HALVED, "15Min", "equity", allow_steps=True)[1]["findings"]["large_steps"] == 1
    # two for one, on a day that gains 6 %
    with pytest.raises(InputError, match="unexplained step.*-47%"):
        validate_bars(
            pd.concat([DAILY.iloc[:50], DAILY.iloc[50:] * DAILY.close.iloc[49] / DAILY.open.iloc[50] * 0.53]),
            "1Day",
            "equity",
        )
    # a rise of 52 % that opens 20 % up and trades the rest is reported, as AMD's was
    rise = DAILY.iloc[:50].copy()
    before = rise.close.iloc[48]
    rise.iloc[49] = [before * 1.2, before * 1.53, before * 1.19, before * 1.52, 1e6]
    assert validate_bars(rise, "1Day", "equity")[1]["findings"]["large_steps"] == 1
    # no step is judged across a segment
    apart = pd.concat([CRYPTO.iloc[:300], CRYPTO.iloc[310:] * 10])
    _, report = validate_bars(apart, "15Min", "crypto")
    assert report["segments"] == 2 and report["findings"] | {"wide_ranges": 0} == dict.fromkeys(
        REPORTED, 0
    ) | {"gaps": 1, "missing_bars": 10}
    assert report["breaks"] == [
        {"last_bar": "2024-01-04 02:45Z", "next_bar": "2024-01-04 05:30Z", "missing": 10}
    ]


def test_missing_and_thin_sessions():
    gone = (
        (EQUITY.index.normalize() == "2024-11-13")
        | (EQUITY.index == "2024-11-20 15:00Z")
        | (EQUITY.index == "2024-11-29 15:00Z")
    )
    _, report = validate_bars(EQUITY[~gone], "15Min", "equity")
    assert report["segments"] == 2 and (
        report["findings"]["missing_sessions"],
        report["findings"]["thin_sessions"],
        report["findings"]["missing_bars"],
    ) == (1, 2, 2)
    assert report["breaks"] == [
        {"last_bar": "2024-11-12 20:45Z", "next_bar": "2024-11-14 14:30Z", "missing": 1}
    ]


def test_missing_first_bars_are_no_shifted_labels():
    "Closing prints beside bars at the open; an open that is missing half of the time."
    prints = wandering_bars(
        EQUITY.groupby(EQUITY.index.date).tail(1).index[:-6] + pd.Timedelta("15min")
    )  # before the half days
    opens = EQUITY.groupby(EQUITY.index.date).head(1).index
    for missing in (opens[:0], opens[::2]):
        _, report = validate_bars(
            pd.concat([EQUITY.drop(missing), prints]), "15Min", "equity", allow_steps=True
        )
        assert report["dropped_out_of_session"]["closing_print"] == len(prints) and report["findings"][
            "thin_sessions"
        ] == len(missing)


# splits


def split(bars, day, ratio):
    "Prices and volumes before a day as they were before a split that makes `ratio` shares of one."
    before = bars.index < pd.Timestamp(day, tz="UTC")
    return bars.assign(
        **{c: bars[c].where(~before, bars[c] * (ratio if c != "volume" else 1 / ratio)) for c in COLUMNS}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "ratio, name",
    [
        (2, "2-for-1"),
        (3, "3-for-1"),
        (4, "4-for-1"),
        (5, "5-for-1"),
        (7, "7-for-1"),
        (10, "10-for-1"),
        (20, "20-for-1"),
        (3 / 2, "3-for-2"),
        (1 / 4, "1-for-4"),
        (1 / 10, "1-for-10"),
        (1 / 50, "1-for-50"),
    ],
)
def test_splits_are_called_so(ratio, name):
    for bars, timeframe in (
        (DAILY, "1Day"),
        (equity_bars("2024-02-01", "2024-04-01"), "15Min"),
        (equity_bars("2024-03-01", "2024-03-20", "1Hour"), "1Hour"),
    ):
        with pytest.raises(
            InputError,
            match=f"unexplained step: 2024-03-12 .*like a {name} split on 2024-03-12; load adjusted prices",
        ):
            validate_bars(split(bars, "2024-03-12", ratio), timeframe, "equity")
        report = validate_bars(split(bars, "2024-03-12", ratio), timeframe, "equity", allow_steps=True)[1]
        assert [(s["date"], s["like"]) for s in report["splits"]] == [("2024-03-12", name)] and report[
            "findings"
        ]["split_steps"] == 1
        apart = bars[bars.index.strftime("%m-%d") != "2024-03-11"[5:]]
        report = validate_bars(split(apart, "2024-03-12", ratio), timeframe, "equity")[
            1
        ]  # the session before it is missing: found, though no step is judged there
        assert [(s["date"], s["like"]) for s in report["splits"]] == [("2024-03-12", name)] and report[
            "segments"
        ] == 2


def test_a_crash_by_a_third_is_no_split():
    "It trades five times its usual volume, in ranges that are three times as wide."
    crash = split(DAILY, "2024-03-12", 3 / 2)
    row = crash.index.get_loc("2024-03-12")
    crash.iloc[row, 4] *= 5
    assert not validate_bars(crash, "1Day", "equity")[1]["splits"]
    crash = split(DAILY, "2024-03-12", 3 / 2)
    crash.iloc[row, 1] *= 1.02
    assert not validate_bars(crash, "1Day", "equity")[1]["splits"]
    assert not validate_bars(split(DAILY, "2024-03-12", 1.42), "1Day", "equity")[1][
        "splits"
    ]  # -30 %: no such split
    assert not validate_bars(split(CRYPTO, "2024-01-04", 3 / 2), "15Min", "crypto")[1]["splits"]


# feeds that change


def thinned(bars, first, last, times):
    "A stretch of sessions with so many times less volume."
    inside = (bars.index >= pd.Timestamp(first, tz="UTC")) & (bars.index < pd.Timestamp(last, tz="UTC"))
    return bars.assign(volume=bars.volume.where(~inside, bars.volume / times))


@pytest.mark.parametrize("times", [10, 30, 300, 5000, 1 / 10, 1 / 1000])
def test_a_change_of_feed_is_found_and_dated(times):
    for bars, timeframe, asset_class in (
        (equity_bars("2024-01-01", "2024-07-01"), "15Min", "equity"),
        (crypto_bars("2024-01-01", "2024-05-01", "1Hour"), "1Hour", "crypto"),
        (equity_bars("2023-01-01", "2025-01-01", "1Day"), "1Day", "equity"),
    ):
        bars["volume"] = np.random.default_rng(1).lognormal(10, 0.4, len(bars))
        _, report = validate_bars(thinned(bars, "2024-03-01", "2024-04-02", times), timeframe, asset_class)
        first, second = report["volume_breaks"]
        assert (first["date"], second["date"]) == ("2024-03-01", "2024-04-02") and report["findings"][
            "volume_breaks"
        ] == 2
        assert first["times"] == pytest.approx(1 / times, rel=0.5) and second["times"] == pytest.approx(
            times, rel=0.5
        )
    _, report = validate_bars(
        thinned(bars, "2024-03-01", "2024-03-08", 50), timeframe, asset_class
    )  # five sessions
    assert [b["date"] for b in report["volume_breaks"]] == ["2024-03-01", "2024-03-08"]


def test_busy_markets_are_no_change_of_feed():
    """Volume that rises with the ranges, as when a bull market opens; the U of the day; half days; quiet
    weekends; a busy week; too short a history."""
    random = np.random.default_rng(5)
    for bars, timeframe, asset_class in (
        (equity_bars("2024-01-01", "2025-01-01"), "15Min", "equity"),
        (crypto_bars("2024-01-01", "2024-07-01", "1Hour"), "1Hour", "crypto"),
    ):
        clock = bar_clock(bars.index, timeframe, asset_class)
        volume = (
            random.lognormal(9, 0.6, len(bars))
            * (0.5 + 3 * (clock.session_progress - 0.5) ** 2)
            * np.where(clock.weekday > 4, 0.4, 1.0)
        )
        bull = bars.index >= pd.Timestamp("2024-03-01", tz="UTC")
        wide = bars.assign(
            volume=np.where(bull, 10 * volume, volume),
            high=bars.high + np.where(bull, 4, 0) * (bars.high - bars.low),
        )
        assert not validate_bars(bars.assign(volume=volume), timeframe, asset_class)[1]["volume_breaks"]
        assert not validate_bars(wide, timeframe, asset_class)[1]["volume_breaks"]
        assert (
            len(validate_bars(wide.assign(high=bars.high), timeframe, asset_class)[1]["volume_breaks"]) == 1
        )  # without the ranges it is one
        assert not validate_bars(
            thinned(bars.assign(volume=volume), "2024-03-01", "2024-03-11", 0.25), timeframe, asset_class
        )[1]["volume_breaks"]
    assert not validate_bars(
        thinned(equity_bars("2024-03-01", "2024-03-13"), "2024-03-07", "2024-04-01", 1000), "15Min", "equity"
    )[1]["volume_breaks"]
    for volume in (0.0, 7.0):
        assert not validate_bars(bars.assign(volume=volume), timeframe, asset_class)[1]["volume_breaks"]


def test_bars_of_another_feed_outside_the_session():
    usual = 100_000.0
    bars = equity_bars("2024-10-01", "2024-11-28").assign(volume=usual)
    mornings = bars.groupby(bars.index.date).head(1)
    mornings = mornings.set_axis(mornings.index - pd.Timedelta("30min"))
    for volume, foreign in ((20.0, True), (999.0, True), (1001.0, False), (usual, False)):
        _, report = validate_bars(pd.concat([bars, mornings[5:35].assign(volume=volume)]), "15Min", "equity")
        kind = report["out_of_session"]["before_open"]
        assert kind == {
            "bars": 30,
            "days": 30,
            "first": f"{mornings.index[5]:%Y-%m-%d %H:%M}Z",
            "last": f"{mornings.index[34]:%Y-%m-%d %H:%M}Z",
            "times_smaller": pytest.approx(usual / volume, rel=0.005),
            "foreign": foreign,
        }
        assert report["findings"]["foreign_bars"] == 30 * foreign
    # a full feed trades little before the open as well, but all the time
    local = pd.date_range("2024-10-01 04:00", "2024-11-27 19:45", freq="15min", tz="America/New_York")
    local = local[(local.hour >= 4) & (local.hour < 20) & (local.day_of_week < 5)].tz_convert("UTC")
    whole = wandering_bars(local)
    _, report = validate_bars(
        whole.assign(volume=np.where(whole.index.isin(bars.index), usual, 300.0)), "15Min", "equity"
    )
    assert (
        report["out_of_session"]["before_open"]["times_smaller"] == pytest.approx(333, rel=0.01)
        and report["findings"]["foreign_bars"] == 0
    )


def test_spikes():
    bars = equity_bars("2024-10-01", "2024-11-28")
    usual = np.median(np.log(bars.high / bars.low))
    for column, sign in (("high", 1), ("low", -1)):
        for times, found in ((30, 1), (6, 0)):
            _, report = validate_bars(
                with_value(bars, column, bars.close.iloc[200] * np.exp(sign * times * usual), 200),
                "15Min",
                "equity",
            )
            assert (
                report["findings"]["spikes"] == found
                and [s["bar"] for s in report["spikes"]] == [f"{bars.index[200]:%Y-%m-%d %H:%M}Z"] * found
            )
    moved = pd.concat(
        [bars.iloc[:200], bars.iloc[200:] * [1.1, 1.1, 1.1, 1.1, 1]]
    )  # a step that stays is none
    assert validate_bars(moved, "15Min", "equity")[1]["findings"]["spikes"] == 0


# later versions


def test_a_later_version_replaces_a_bar():
    late = CRYPTO.iloc[[30, 40]].assign(volume=[7.5, 8.5])
    stamp = pd.Timestamp("2024-02-01", tz="UTC")
    for first, second in (
        (False, True),
        (0, 1),
        (stamp, stamp + pd.Timedelta("30s")),
        (None, stamp),
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:30Z"),
    ):
        raw = pd.concat(
            [
                CRYPTO.assign(updated=first).astype({"updated": object}),
                late.assign(updated=second).astype({"updated": object}),
            ]
        ).sort_index()
        for frame in (raw, raw[::-1], raw.infer_objects()):
            clean, report = validate_bars(frame, "15Min", "crypto")
            assert (
                clean.volume.iloc[[30, 40]].tolist() == [7.5, 8.5]
                and len(clean) == len(CRYPTO)
                and report["repaired"]["updated_bars"] == 2
                and not report["ignored_columns"]
            )
            pd.testing.assert_frame_equal(clean.drop(late.index), CRYPTO.drop(late.index), check_freq=False)
    twice = pd.concat([CRYPTO.assign(updated=0), late.assign(updated=1), late.assign(updated=1, volume=9.5)])
    with pytest.raises(InputError, match="conflicting duplicate"):
        validate_bars(twice, "15Min", "crypto")  # two later versions that differ
    clean, report = validate_bars(
        pd.concat([twice, late.assign(updated=2, volume=3.5)]), "15Min", "crypto"
    )  # a third one settles it
    assert clean.volume.iloc[[30, 40]].tolist() == [3.5, 3.5] and report["repaired"]["updated_bars"] == 6
    _, report = validate_bars(
        pd.concat([CRYPTO.assign(updated=0), CRYPTO.iloc[[30]].assign(updated=1)]), "15Min", "crypto"
    )
    assert (report["repaired"]["updated_bars"], report["repaired"]["exact_duplicates"]) == (
        0,
        1,
    )  # the same again is no news


# the 24 kinds of bad input, and what becomes of each


def _overlap():
    """Spans are cut from one table by two fractions: no overlap can be written down; too much of a share is
    refused."""
    for n in (10, 997, 44_371):
        for a, b in ((0.7, 0.15), (0.5, 0.49), (0.01, 0.01)):
            spans = [set(range(*s)) for s in split_bounds(n, a, b).values()]
            assert len(set.union(*spans)) == sum(map(len, spans)) == n
    return DataParameters(train_fraction=0.9, validation_fraction=0.2)


REFUSED_KINDS = {  # as people name them -> how we name them, and the input
    "missing column": (
        "missing column",
        lambda: validate_bars(EQUITY.drop(columns="close"), "15Min", "equity"),
    ),
    "null price": (
        "null price",
        lambda: validate_bars(with_value(EQUITY, "close", np.nan), "15Min", "equity"),
    ),
    "infinite price": (
        "infinite value",
        lambda: validate_bars(with_value(EQUITY, "high", np.inf), "15Min", "equity"),
    ),
    "price of 0 or less": (
        "price not above zero",
        lambda: validate_bars(with_value(EQUITY, "low", 0.0), "15Min", "equity"),
    ),
    "negative volume": (
        "negative volume",
        lambda: validate_bars(with_value(EQUITY, "volume", -1.0), "15Min", "equity"),
    ),
    "OHLC order": (
        "OHLC order",
        lambda: validate_bars(with_value(EQUITY, "low", EQUITY.high.iloc[30] * 1.01), "15Min", "equity"),
    ),
    "naive time": ("naive time", lambda: validate_bars(EQUITY.tz_localize(None), "15Min", "equity")),
    "wrong zone": (
        "wrong zone",
        lambda: validate_bars(
            EQUITY.tz_convert("America/New_York").tz_localize(None).tz_localize("UTC"), "15Min", "equity"
        ),
    ),
    "same time, other values": (
        "conflicting duplicate",
        lambda: validate_bars(pd.concat([EQUITY, EQUITY.iloc[[30]] * 1.001]), "15Min", "equity"),
    ),
    "outside session": (
        "outside session",
        lambda: validate_bars(
            wandering_bars(pd.date_range("2024-11-03 09:00Z", periods=100, freq="15min")), "15Min", "equity"
        ),
    ),
    "off grid": (
        "off grid",
        lambda: validate_bars(with_label(EQUITY, EQUITY.index[30] + pd.Timedelta("7min")), "15Min", "equity"),
    ),
    "future": ("bar in the future", lambda: validate_bars(EQUITY, "15Min", "equity", now=EQUITY.index[-5])),
    "empty symbol": ("empty symbol", lambda: validate_bars(EQUITY.assign(symbol=" "), "15Min", "equity")),
    "mixed feed or adjustment": (
        "mixed content",
        lambda: validate_bars(
            EQUITY.assign(feed=["iex"] * 100 + ["sip"] * (len(EQUITY) - 100)), "15Min", "equity"
        ),
    ),
    "bad dtype": (
        "bad dtype",
        lambda: validate_bars(EQUITY.assign(close=EQUITY.close.map("{:.2f} USD".format)), "15Min", "equity"),
    ),
    "unexplained step above 50 %": ("unexplained step", lambda: validate_bars(HALVED, "15Min", "equity")),
    "symbol renamed": (
        "mixed content",
        lambda: validate_bars(
            EQUITY.assign(symbol=["FB"] * 100 + ["META"] * (len(EQUITY) - 100)), "15Min", "equity"
        ),
    ),
    "train and test overlap": ("train_fraction and validation_fraction", _overlap),
}
REPAIRED_KINDS = {  # -> where it is counted, how many there are, how many bars stay, and the input
    "exact duplicate": (
        ("repaired", "exact_duplicates"),
        2,
        len(EQUITY),
        lambda: validate_bars(pd.concat([EQUITY, EQUITY.iloc[[30, 31]]]).sort_index(), "15Min", "equity"),
    ),
    "disorder": (
        ("repaired", "disorder"),
        len(EQUITY) - 1,
        len(EQUITY),
        lambda: validate_bars(EQUITY[::-1], "15Min", "equity"),
    ),
    "tradeless minute": (
        ("findings", "missing_bars"),
        3,
        -3,
        lambda: validate_bars(
            (m := equity_bars("2024-11-04", "2024-11-06", "1Min")).drop(m.index[[100, 101, 500]]),
            "1Min",
            "equity",
        ),
    ),  # never filled in: counted as missing
    "zero volume, crypto": (
        ("findings", "zero_volume"),
        1,
        len(CRYPTO),
        lambda: validate_bars(with_value(CRYPTO, "volume", 0.0), "15Min", "crypto"),
    ),
    "unfinished last bar": (
        ("repaired", "unfinished_last_bar"),
        1,
        len(CRYPTO) - 1,
        lambda: validate_bars(CRYPTO, "15Min", "crypto", now=CRYPTO.index[-1] + pd.Timedelta("10min")),
    ),
    "updated bar": (
        ("repaired", "updated_bars"),
        1,
        len(CRYPTO),
        lambda: validate_bars(
            pd.concat([CRYPTO.assign(updated=False), CRYPTO.iloc[[30]].assign(volume=7.5, updated=True)]),
            "15Min",
            "crypto",
        ),
    ),
}


def test_the_24_kinds_of_bad_input():
    "Eighteen are refused by name, six are repaired or kept, and counted; `-s` shows the table."
    met = 0
    for kind, (name, attempt) in REFUSED_KINDS.items():
        with pytest.raises(InputError) as error:
            attempt()
        text = str(error.value)
        assert name in text and "\n" not in text, kind
        met += 1
        print(f"\n{met:2} {kind:28} refused   {text[:150]}", end="")
    for kind, ((section, counter), count, bars, attempt) in REPAIRED_KINDS.items():
        clean, report = attempt()
        assert report[section][counter] == count and len(clean) == (bars if bars >= 0 else 2 * 390 + bars), (
            kind
        )
        met += 1
        outcome = "repaired" if section == "repaired" else "kept"
        meaning = (REPAIRED | REPORTED)[counter]
        print(f"\n{met:2} {kind:28} {outcome}  {section}.{counter} = {count}: {meaning}", end="")
    print(f"\n{met} of 24")
    assert met == len(REFUSED_KINDS) + len(REPAIRED_KINDS) == 24
