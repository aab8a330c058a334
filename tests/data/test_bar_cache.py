"""The bar cache: what it asks for against a model of sets, and files that survive kills, full disks, other
writers and other people's hands. Processes and signals are real."""

import fcntl
import functools
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from trading_lib.bars import validate_bars
from trading_lib.config import InputError
from trading_lib.data import cache as bar_cache
from trading_lib.data import cache_files
from trading_lib.data.cache import cache_info, cached_bars, merge_ranges, subtract_ranges
from trading_lib.data.simulation import simulate_bars
from trading_lib.data.user_files import read_own_bars

LATER = "2026-01-01"  # `now` of most tests: everything has happened


def utc(text):
    return pd.Timestamp(text, tz="UTC")


@functools.cache
def truth(symbol, timeframe="15Min", end="2023-02-01"):
    return simulate_bars(symbol, timeframe, "2023-01-01", end, seed=5)


class Vendor:
    "Gives bars of a known history, notes every request, and changes its mind when told to."

    def __init__(self, bars):
        self.bars, self.asked = bars, []

    def __call__(self, start, end):
        self.asked.append((start, end))
        return self.bars[(self.bars.index >= start) & (self.bars.index < end)]

    def adjust(self, factor, before=LATER):
        earlier = self.bars.index < utc(before)
        self.bars = self.bars.assign(
            **{
                c: np.where(earlier, self.bars[c] * factor, self.bars[c])
                for c in ("open", "high", "low", "close")
            }
        )


def crypto(folder, vendor, start, end, **options):
    return cached_bars(
        folder,
        "SIM-USD",
        options.pop("timeframe", "15Min"),
        "crypto",
        start,
        end,
        vendor,
        **{"now": LATER, "progress": None} | options,
    )


def equity(folder, vendor, start, end, **options):
    return cached_bars(
        folder,
        "SIMA",
        options.pop("timeframe", "15Min"),
        "equity",
        start,
        end,
        vendor,
        **{"now": LATER, "progress": None, "feed": "iex"} | options,
    )


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def audit(folder):
    "Every parquet is one that its manifest names; returns how many manifests stood between two states."
    between = 0
    for manifest in Path(folder).rglob("*.json"):
        told, file = json.loads(manifest.read_text()), manifest.with_suffix(".parquet")
        named = [told["sha256"]] + ([told["next"]["sha256"]] if "next" in told else [])
        assert (hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None) in named, (
            f"{manifest.name} names {named}"
        )
        between += "next" in told
    assert all(p.with_suffix(".json").exists() for p in Path(folder).rglob("*.parquet"))
    return between


# ranges


def test_range_arithmetic_against_sets():
    rng = random.Random(0)

    def some():
        starts = [rng.randint(0, 40) for _ in range(rng.randint(0, 6))]
        return [(start, start + rng.randint(-2, 9)) for start in starts]

    def moments(ranges):
        return {m for a, b in ranges for m in range(a, b)}

    for _ in range(3000):
        one, two = some(), some()
        for out, expected in (
            (merge_ranges(one), moments(one)),
            (subtract_ranges(one, two), moments(one) - moments(two)),
        ):
            assert moments(out) == expected and sum(b - a for a, b in out) == len(expected)
            assert all(a < b for a, b in out) and all(
                before[1] < after[0] for before, after in zip(out, out[1:])
            )  # sorted, and none touches the next


@pytest.mark.slow
@pytest.mark.parametrize("adjustment", ["raw", "all"])
def test_any_order_of_calls_asks_for_each_moment_once_and_ends_in_the_same_bytes(tmp_path, adjustment):
    bars, rng = (
        truth("SIM-USD").drop(truth("SIM-USD").index[900:1300]),
        random.Random(adjustment),
    )  # four days without bars
    step, first = 900, utc("2023-01-01").timestamp()

    def slots(ranges):
        return {
            n
            for a, b in ranges
            for n in range(-int((first - a.timestamp()) // step), -int((first - b.timestamp()) // step))
        }  # quarter-hours that start in them

    present = {int(t.timestamp() - first) // step for t in bars.index}
    for trial in range(3):
        vendor, known = Vendor(bars), set()
        for _ in range(15):
            a = utc("2023-01-01") + pd.Timedelta(rng.randint(0, 28 * 1440), "min")
            b = a + pd.Timedelta(rng.randint(15, 4 * 1440), "min")
            vendor.asked.clear()
            out, facts = crypto(tmp_path / str(trial), vendor, a, b, adjustment=adjustment, chunk=150)
            pd.testing.assert_frame_equal(
                out, bars[(bars.index >= a) & (bars.index < b)], check_freq=False, rtol=0, atol=0
            )
            missing, asked = slots([(a, b)]) - known, [slots([r]) for r in vendor.asked]
            assert (
                set().union(*asked) - known == missing
                and facts["requests"] == len(vendor.asked)
                and facts["bars_fetched"] + facts["bars_from_cache"] == len(out)
            )
            assert facts["bars_fetched"] == len(missing & present)
            if adjustment == "raw":
                assert sum(map(len, asked)) == len(missing)  # nothing twice, nothing else
            known |= missing
        crypto(
            tmp_path / str(trial),
            vendor,
            "2023-01-01",
            "2023-02-01",
            adjustment=adjustment,
            chunk=rng.randint(1, 5) * 100,
        )
    crypto(tmp_path / "at once", Vendor(bars), "2023-01-01", "2023-02-01", adjustment=adjustment)
    assert (
        len({p.read_bytes() for p in tmp_path.rglob("*.parquet")}) == 1
        and len(list(tmp_path.rglob("*.parquet"))) == 4
    )


def test_ranges_without_bars_are_asked_for_once(tmp_path):
    vendor = Vendor(truth("SIMA"))
    out, facts = equity(tmp_path, vendor, "2023-01-07", "2023-01-09")  # a weekend
    assert (
        len(out) == 0
        and list(out.columns) == ["open", "high", "low", "close", "volume"]
        and facts["requests"] == 1
    )
    assert equity(tmp_path, vendor, "2023-01-07 12:00", "2023-01-08")[1]["requests"] == 0
    vendor.asked.clear()
    out, _ = equity(
        tmp_path, vendor, "2023-01-06", "2023-01-17"
    )  # Friday to the Monday of Martin Luther King's day
    assert (
        vendor.asked == [(utc("2023-01-06"), utc("2023-01-07")), (utc("2023-01-09"), utc("2023-01-17"))]
        and len(out) == 6 * 26
    )
    assert len(validate_bars(out, "15Min", "equity")[0]) == len(out)
    assert equity(tmp_path, vendor, "2023-01-06", "2023-01-17")[1]["requests"] == 0


@pytest.mark.slow
def test_long_histories_are_not_rewritten_with_every_request(tmp_path, monkeypatch):
    written, write = [], cache_files.atomic_write
    monkeypatch.setattr(
        cache_files,
        "atomic_write",
        lambda path, data: written.append((path.suffix, len(data))) or write(path, data),
    )
    vendor = Vendor(truth("SIM-USD", end="2023-09-01"))
    _, facts = crypto(tmp_path, vendor, "2023-01-01", "2023-09-01", chunk=96)
    sizes = [n for suffix, n in written if suffix == ".parquet"]
    # one by one to 20 days, then each 5 % longer than the one before, but for whole days: at most 20 +
    # log(243 / 20) / log(1.05), and no more bytes than 21 times the last
    assert facts["requests"] == 243 and 20 < len(sizes) <= 71 and sum(sizes) < 21 * sizes[-1]


# the end of what is known


@pytest.mark.parametrize(
    "now, last",
    [
        ("2023-01-10 12:16:59", "11:45"),
        ("2023-01-10 12:17", "12:00"),
        ("2023-01-10 12:31", "12:00"),
        ("2023-01-10 12:32", "12:15"),
    ],
)
def test_the_future_and_the_unfinished_bar_are_not_asked_for(tmp_path, now, last):
    "A bar of 12:00 closes at 12:15 and is settled at 12:17."
    for end in (None, "2023-01-20", utc(now)):
        vendor = Vendor(truth("SIM-USD"))
        out, _ = crypto(tmp_path / str(end), vendor, "2023-01-10", end, now=now)
        assert out.index[-1] == utc(f"2023-01-10 {last}") and vendor.asked == [
            (utc("2023-01-10"), utc(f"2023-01-10 {last}") + pd.Timedelta("15min"))
        ]
        assert crypto(tmp_path / str(end), vendor, "2023-01-10", end, now=utc(now) + pd.Timedelta("59s"))[1][
            "requests"
        ] == (1 if now.endswith("59") else 0)


def test_daily_bars_of_new_york_midnight_count_when_their_day_is_over(tmp_path):
    daily = truth("SIMA", "1Day", "2023-04-01")
    vendor = Vendor(
        daily.set_axis(
            daily.index.tz_localize(None)
            .tz_localize("America/New_York")
            .tz_convert("UTC")
            .rename("timestamp")
        )
    )
    for now, last in (
        ("2023-02-01 05:01", "2023-01-30"),
        ("2023-02-01 05:02", "2023-01-31"),
        ("2023-03-14 04:02", "2023-03-13"),
        ("2023-03-14 04:01", "2023-03-10"),
    ):
        out, _ = equity(tmp_path / now, vendor, "2023-01-01", None, timeframe="1Day", now=now)
        assert out.index[-1].tz_convert("America/New_York") == pd.Timestamp(last, tz="America/New_York")


def test_nothing_to_ask_for_is_an_error(tmp_path):
    for start, end, now in (
        ("2027-01-01", "2027-02-01", LATER),
        ("2023-01-10 12:00", None, "2023-01-10 12:16"),
        ("2023-01-10 12:01", "2023-01-10 12:14", LATER),
    ):
        with pytest.raises(InputError, match="no bar that starts from"):
            crypto(tmp_path, Vendor(truth("SIM-USD")), start, end, now=now)
    with pytest.raises(InputError, match="expected start before end"):
        crypto(tmp_path, Vendor(truth("SIM-USD")), "2023-01-02", "2023-01-01")
    assert files_of(tmp_path) == {}


# adjusted history


def adjusted(tmp_path):
    "A vendor, and three days of its bars in the cache."
    vendor = Vendor(truth("SIMA"))
    equity(tmp_path, vendor, "2023-01-09", "2023-01-12", adjustment="all")
    vendor.asked.clear()
    return vendor


def test_new_bars_reach_back_over_the_last_cached_day(tmp_path):
    vendor = adjusted(tmp_path)
    equity(tmp_path, vendor, "2023-01-09", "2023-01-13", adjustment="all")
    assert vendor.asked == [(utc("2023-01-11 14:30"), utc("2023-01-13"))]
    equity(
        tmp_path, vendor, "2023-01-06", "2023-01-13", adjustment="all"
    )  # before what is held: over the first day
    assert vendor.asked[1:] == [(utc("2023-01-06"), utc("2023-01-09 21:00"))]
    equity(tmp_path, vendor, "2023-01-23", "2023-01-24", adjustment="all")  # apart: the cached day by itself
    assert vendor.asked[2:] == [
        (utc("2023-01-12 14:30"), utc("2023-01-12 21:00")),
        (utc("2023-01-23"), utc("2023-01-24")),
    ]
    assert cache_info(tmp_path)[0]["invalidated"] == []


@pytest.mark.parametrize(
    "start, end", [("2023-01-09", "2023-01-14"), ("2023-01-05", "2023-01-12"), ("2023-01-24", "2023-01-26")]
)
@pytest.mark.parametrize("factor", [0.1, 3.0, 0.99, 1 - 5e-5])
def test_a_split_or_a_dividend_drops_what_was_cached(tmp_path, start, end, factor):
    "After, before and apart from the cached bars; NVDA's dividends have been 0.005 % of its price."
    vendor, lines = adjusted(tmp_path), []
    held = len(vendor(utc("2023-01-09"), utc("2023-01-12")))
    vendor.adjust(factor)
    out, facts = equity(tmp_path, vendor, start, end, adjustment="all", progress=lines.append)
    fresh = vendor(utc(start), utc(end))
    pd.testing.assert_frame_equal(out, fresh, check_freq=False, rtol=0, atol=0)
    assert facts["bars_from_cache"] == 0 and facts["bars_fetched"] == len(fresh)
    assert (
        facts["invalidated"]["ratio"] == pytest.approx(factor, rel=1e-9)
        and facts["invalidated"]["bars"] == held
    )
    said = [line for line in lines if "adjusted prices have changed" in line]
    assert (
        len(said) == 1
        and f"by a factor of {factor:.6g}" in said[0]
        and f"{held} cached bars are dropped" in said[0]
    )
    (row,) = cache_info(tmp_path)
    assert row["invalidated"] == [facts["invalidated"]] and (
        row["ranges"][0]["start"],
        row["ranges"][-1]["end"],
    ) == (f"{start}T00:00:00Z", f"{end}T00:00:00Z")
    audit(tmp_path)
    assert equity(tmp_path, vendor, start, end, adjustment="all")[1]["requests"] == 0


def test_a_split_between_two_requests_of_one_call(tmp_path):
    "A download that takes the night, and the split comes with the morning."
    vendor = Vendor(truth("SIMA"))

    def overnight(start, end):
        if len(vendor.asked) == 3:
            vendor.adjust(0.5)
        return vendor(start, end)

    out, facts = equity(tmp_path, overnight, "2023-01-03", "2023-01-14", adjustment="split", chunk=96)
    pd.testing.assert_frame_equal(
        out, vendor(utc("2023-01-03"), utc("2023-01-14")), check_freq=False, rtol=0, atol=0
    )
    assert facts["invalidated"]["ratio"] == 0.5 and len(out) == 9 * 26


def test_rounding_and_volumes_invalidate_nothing_and_raw_is_not_compared(tmp_path):
    vendor = adjusted(tmp_path)
    vendor.adjust(1 + 1e-9)
    vendor.bars = vendor.bars.assign(volume=vendor.bars.volume * 2)
    assert equity(tmp_path, vendor, "2023-01-09", "2023-01-14", adjustment="all")[1]["invalidated"] is None
    raw = Vendor(truth("SIMA"))
    equity(tmp_path, raw, "2023-01-09", "2023-01-12")
    raw.adjust(0.5)
    _, facts = equity(tmp_path, raw, "2023-01-09", "2023-01-14")
    assert facts["invalidated"] is None and raw.asked == [
        (utc("2023-01-09"), utc("2023-01-12")),
        (utc("2023-01-12"), utc("2023-01-14")),
    ]


def test_what_cannot_be_compared_is_an_error(tmp_path):
    vendor = adjusted(tmp_path)
    before = files_of(tmp_path)
    vendor.bars = vendor.bars[vendor.bars.index >= utc("2023-01-12")]
    with pytest.raises(InputError, match="gives none of the 26 bars of 2023-01-11 any more"):
        equity(tmp_path, vendor, "2023-01-09", "2023-01-14", adjustment="all")
    assert files_of(tmp_path) == before
    restless = Vendor(truth("SIMA"))

    def other_each_time(start, end):
        restless.adjust(0.9)
        return restless(start, end)

    with pytest.raises(InputError, match="other prices each time"):
        equity(tmp_path, other_each_time, "2023-01-03", "2023-01-14", adjustment="all", chunk=96)
    audit(tmp_path)


# fetches that fail, and fetches that lie


@pytest.mark.parametrize("error", [InputError("the vendor says 503"), KeyboardInterrupt(), MemoryError()])
def test_what_came_before_a_failure_is_kept(tmp_path, error):
    vendor = Vendor(truth("SIM-USD"))

    def failing(start, end):
        if start >= utc("2023-01-25"):
            raise error
        return vendor(start, end)

    with pytest.raises(type(error)):
        crypto(tmp_path, failing, "2023-01-01", "2023-01-30", chunk=96)
    assert len(vendor.asked) == 24
    audit(tmp_path)
    out, facts = crypto(tmp_path, vendor, "2023-01-01", "2023-01-30", chunk=96)
    assert (
        vendor.asked[24] == (utc("2023-01-25"), utc("2023-01-26"))
        and facts["requests"] == 5
        and facts["bars_from_cache"] == 24 * 96
    )
    pd.testing.assert_frame_equal(out, truth("SIM-USD").loc[:"2023-01-29"], check_freq=False, rtol=0, atol=0)


DAY = truth("SIM-USD").loc["2023-01-03"]
LIES = {
    "was NoneType": None,
    "its index is int64": DAY.reset_index(drop=True),
    "expected times in UTC": DAY.tz_localize(None),
    "its index is datetime64[ns, America/New_York]": DAY.tz_convert("America/New_York"),
    "without low, volume": DAY.drop(columns=["low", "volume"]),
    "its columns are float64, str, expected numbers": DAY.assign(close="12.5"),
    "its times are not in order, or not unique": DAY.iloc[::-1],
    "not unique; ": pd.concat([DAY, DAY.iloc[[-1]]]),
    "was 2023-01-03 00:00:00+00:00 to 2023-01-04 00:00:00+00:00": pd.concat(
        [DAY, truth("SIM-USD").loc[["2023-01-04"]]]
    ),
    "was 2023-01-02 23:45:00+00:00 to 2023-01-03 23:45:00+00:00": pd.concat(
        [truth("SIM-USD").loc[["2023-01-02 23:45"]], DAY]
    ),
    "not all of them start on whole 15 minutes": DAY.set_axis(DAY.index + pd.Timedelta("4min")),
}


@pytest.mark.parametrize("message", LIES)
def test_a_fetch_that_breaks_its_promise_is_refused(tmp_path, message):
    with pytest.raises(InputError, match=re.escape(message).replace("str", "(str|object)")):
        crypto(tmp_path, lambda start, end: LIES[message], "2023-01-03", "2023-01-04")
    assert files_of(tmp_path) == {}


def test_more_columns_units_and_notes_leave_no_trace_in_the_file(tmp_path):
    plain = crypto(tmp_path / "plain", Vendor(truth("SIM-USD")), "2023-01-01", "2023-01-05")[1]["sha256"]
    bars = truth("SIM-USD").assign(vwap=1.0, volume=truth("SIM-USD").volume.astype("Float64"))[
        ["vwap", "volume", "low", "open", "high", "close"]
    ]
    bars = bars.set_axis(bars.index.as_unit("s").rename("t"))
    bars.attrs["downloaded"] = "today"
    assert crypto(tmp_path / "odd", Vendor(bars), "2023-01-01", "2023-01-05", chunk=100)[1]["sha256"] == plain


# other people's hands


def edited(text, **changes):
    return json.dumps(json.loads(text) | changes)


DAMAGE = {  # file -> what is done to its bytes, and what is said
    "a bit": ("parquet", lambda b: b[:500] + bytes([b[500] ^ 4]) + b[501:], "was changed by another program"),
    "cut short": ("parquet", lambda b: b[:-10], "was changed by another program"),
    "another file": ("parquet", lambda b: b"", "was changed by another program"),
    "gone": ("parquet", lambda b: None, "is gone"),
    "torn manifest": ("json", lambda b: b[: len(b) // 2], "cannot be read"),
    "no text": ("json", lambda b: b"\xff\xfe\x00", "cannot be read"),
    "no manifest": ("json", lambda b: b"[1, 2]", "is no manifest"),
    "without a schema": ("json", lambda b: b"{}", "is no manifest"),
    "newer": (
        "json",
        lambda b: edited(b, schema=2),
        "has schema 2, this version reads up to 1; update trading_lib",
    ),
    "without a hash": (
        "json",
        lambda b: json.dumps({k: v for k, v in json.loads(b).items() if k != "sha256"}),
        "does not describe",
    ),
    "a longer range": (
        "json",
        lambda b: edited(
            b, ranges=[{"start": "2023-01-04", "end": "2023-01-06", "downloaded": "2023-02-01"}]
        ),
        "does not describe",
    ),
    "a time that is none": (
        "json",
        lambda b: edited(b, ranges=[{"start": "soon", "end": "2023-01-06", "downloaded": "2023-02-01"}]),
        "does not describe",
    ),
    "of another symbol": (
        "json",
        lambda b: edited(b, symbol="SIM2-USD"),
        "expected symbol SIM-USD, was SIM2-USD",
    ),
    "of another feed": ("json", lambda b: edited(b, feed="us"), "expected feed None, was us"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_was_touched_is_refused_and_the_advice_works(tmp_path, damage):
    ending, change, message = DAMAGE[damage]
    vendor = Vendor(truth("SIM-USD"))
    crypto(tmp_path, vendor, "2023-01-03", "2023-01-05")
    whole, folder = files_of(tmp_path), tmp_path / "alpaca" / "raw" / "15Min"
    touched = change((folder / f"SIM-USD.{ending}").read_bytes())
    if touched is None:
        (folder / "SIM-USD.parquet").unlink()
    else:
        (folder / f"SIM-USD.{ending}").write_bytes(
            touched if isinstance(touched, bytes) else touched.encode()
        )
    before = files_of(tmp_path)
    vendor.asked.clear()
    for end in ("2023-01-05", "2023-01-07"):
        with pytest.raises(InputError, match=re.escape(message)) as error:
            crypto(tmp_path, vendor, "2023-01-03", end)
        assert (
            "\n" not in str(error.value)
            and str(folder) in str(error.value)
            and re.search(r"delete (SIM-USD\.json|it) to download", str(error.value))
        )
    assert vendor.asked == [] and files_of(tmp_path) == before
    problem = cache_info(tmp_path)[0]["problem"]
    assert (
        problem is not None or "another" in damage and damage.startswith("of ")
    )  # that it was moved is seen by who asks for it
    (folder / "SIM-USD.json").unlink()
    assert crypto(tmp_path, vendor, "2023-01-03", "2023-01-05")[1]["requests"] == 1
    assert files_of(tmp_path)["alpaca/raw/15Min/SIM-USD.parquet"] == whole["alpaca/raw/15Min/SIM-USD.parquet"]


# what it says


def test_layout_facts_and_info(tmp_path):
    for options in ({}, {"adjustment": "all"}, {"feed": "sip"}, {"timeframe": "1Hour"}):
        equity(
            tmp_path,
            Vendor(truth("SIMA", options.get("timeframe", "15Min"))),
            "2023-01-03",
            "2023-01-05",
            **options,
        )
    pair = Vendor(truth("SIM-USD"))
    out, facts = cached_bars(
        tmp_path, "SIM/USD", "15min", "crypto", "2023-01-03", "2023-01-04", pair, now=LATER, progress=None
    )
    assert (
        crypto(tmp_path, pair, "2023-01-03", "2023-01-04")[1]["requests"] == 0
    )  # one history, two spellings
    names = [
        "iex_all/15Min/SIMA",
        "iex_raw/15Min/SIMA",
        "iex_raw/1Hour/SIMA",
        "raw/15Min/SIM-USD",
        "sip_raw/15Min/SIMA",
    ]
    assert sorted(files_of(tmp_path)) == [f"alpaca/{n}.{e}" for n in names for e in ("json", "parquet")]
    file = tmp_path / "alpaca/raw/15Min/SIM-USD.parquet"
    assert {
        k: facts[k]
        for k in ("requests", "bars_fetched", "bars_from_cache", "feed", "adjustment", "invalidated", "file")
    } == {
        "requests": 1,
        "bars_fetched": 96,
        "bars_from_cache": 0,
        "feed": None,
        "adjustment": "raw",
        "invalidated": None,
        "file": str(file),
    }
    assert facts["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest() and abs(
        pd.Timestamp.now("UTC") - pd.Timestamp(facts["downloaded"])
    ) < pd.Timedelta("60s")
    rows = {(r["feed"], r["adjustment"], r["timeframe"], r["symbol"]): r for r in cache_info(tmp_path)}
    assert len(rows) == 5 and all(r["problem"] is None and r["source"] == "alpaca" for r in rows.values())
    row = rows[None, "raw", "15Min", "SIM-USD"]
    assert (row["bars"], row["first"], row["last"], row["sha256"]) == (
        96,
        "2023-01-03T00:00:00Z",
        "2023-01-03T23:45:00Z",
        facts["sha256"],
    )
    assert (
        row["ranges"]
        == [
            {
                "start": "2023-01-03T00:00:00Z",
                "end": "2023-01-04T00:00:00Z",
                "downloaded": facts["downloaded"],
            }
        ]
        and row["downloaded"] == facts["downloaded"]
    )
    assert (
        rows["iex", "raw", "1Hour", "SIMA"]["bars"] == 2 * 7
        and rows["sip", "raw", "15Min", "SIMA"]["bars"] == 2 * 26
    )
    assert (
        json.loads(json.dumps(cache_info(tmp_path))) == cache_info(tmp_path)
        and cache_info(tmp_path / "none") == []
    )


def test_the_files_are_plain_parquet(tmp_path):
    bars, _ = equity(tmp_path, Vendor(truth("SIMA")), "2023-01-03", "2023-01-14")
    table = pd.read_parquet(tmp_path / "alpaca/iex_raw/15Min/SIMA.parquet")
    assert (
        list(table.columns) == ["timestamp", "open", "high", "low", "close", "volume"]
        and str(table.timestamp.dtype) == "datetime64[ns, UTC]"
    )
    own, _ = read_own_bars("SIMA", "15Min", "equity", tmp_path / "alpaca/iex_raw")
    pd.testing.assert_frame_equal(own, bars, check_names=False, check_freq=False, rtol=0, atol=0)


def test_ranges_remember_when_they_came(tmp_path, monkeypatch):
    "The same day: one range. Another day: another range, beside the first."
    vendor = Vendor(truth("SIM-USD"))

    class Clock(pd.Timestamp):
        today_is = "2026-03-01 10:00"

        @classmethod
        def now(cls, zone):
            return pd.Timestamp(cls.today_is, tz=zone)

    monkeypatch.setattr(bar_cache.pd, "Timestamp", Clock)
    for when, end in (
        ("2026-03-01 10:00", "2023-01-04"),
        ("2026-03-01 23:59", "2023-01-05"),
        ("2026-03-02 00:00", "2023-01-06"),
        ("2026-03-04 00:00", "2023-01-06"),
    ):
        Clock.today_is = when
        facts = crypto(tmp_path, vendor, "2023-01-03", end)[1]
    ranges = [tuple(r.values()) for r in cache_info(tmp_path)[0]["ranges"]]
    assert ranges == [
        ("2023-01-03T00:00:00Z", "2023-01-05T00:00:00Z", "2026-03-01T23:59:00Z"),
        ("2023-01-05T00:00:00Z", "2023-01-06T00:00:00Z", "2026-03-02T00:00:00Z"),
    ]
    assert facts["downloaded"] == "2026-03-02T00:00:00Z"


def test_wrong_arguments(tmp_path):
    vendor = Vendor(truth("SIM-USD"))
    for wrong, message in (
        ({"source": "../up"}, "source: expected letters"),
        ({"feed": "a/b"}, "feed: expected letters"),
        ({"adjustment": ""}, "adjustment: expected letters"),
        ({"chunk": 0}, "chunk: expected"),
        ({"timeframe": "7Min"}, "timeframe"),
        ({"now": "soon"}, "now: expected a date"),
    ):
        with pytest.raises(InputError, match=message):
            crypto(tmp_path, vendor, "2023-01-03", "2023-01-05", **wrong)
    with pytest.raises(InputError, match="did you mean 'crypto'"):
        cached_bars(tmp_path, "SIM-USD", "15Min", "cripto", "2023-01-03", "2023-01-05", vendor)
    assert files_of(tmp_path) == {} and vendor.asked == []


# processes. A script forks its children, so that they need not import anything, and kills them.

COMMON = """
import fcntl, hashlib, json, mmap, os, random, resource, shutil, signal, sys, time, traceback
from pathlib import Path
import pandas as pd
from trading_lib.data import cache as bar_cache
from trading_lib.data import cache_files
from trading_lib import files
from trading_lib.data.cache import cache_info, cached_bars
from trading_lib.config import InputError
from trading_lib.data.simulation import simulate_bars

sys.path.insert(0, TESTS)
from test_bar_cache import audit, files_of

folder, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
MARKET = {s: simulate_bars(s, "15Min", "2022-01-01", "2024-01-03", seed=5) for s in SYMBOLS}


def fill(folder, symbol, start, end, pause=0.0, chunk=4000, log=None, progress=None, turn=None, **options):
    bars = MARKET[symbol]

    def fetch(start, end):
        if log:
            with open(log, "a") as f:
                f.write(f"{symbol} {start} {end}\\n")
        time.sleep(random.random() * 2 * pause)
        if turn:
            turn()
        return bars[(bars.index >= start) & (bars.index < end)]

    asset_class = "crypto" if "-" in symbol else "equity"
    return cached_bars(
        folder,
        symbol,
        "15Min",
        asset_class,
        start,
        end,
        fetch,
        chunk=chunk,
        progress=progress,
        now="2025-01-01",
        **options,
    )


def child(task, *args, **kwargs):
    "Start a process that does this and ends; 0 if all went well."
    pid = os.fork()
    if pid:
        return pid
    try:
        random.seed(os.getpid())
        task(*args, **kwargs)
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ended(pid):
    return os.waitpid(pid, 0)[1]


def requests(log):
    return Path(log).read_text().splitlines() if Path(log).exists() else []
"""


def run(script, folder, *args, symbols=("SIM-USD",), timeout=120):
    code = (
        f"TESTS, SYMBOLS = {str(Path(__file__).parent)!r}, {symbols!r}\n"
        + textwrap.dedent(COMMON)
        + textwrap.dedent(script)
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_at_twenty_random_moments_the_files_are_those_of_an_undisturbed_run(tmp_path):
    "Three symbols, two years of quarter-hours."
    out = run(
        """
        def everything(folder, end, pause, log):
            for symbol in SYMBOLS:
                fill(folder, symbol, "2022-01-01", end, pause, log=log)


        calm, killed = folder / "calm", folder / "killed"
        begun = time.monotonic()
        assert ended(child(everything, calm, "2024-01-01", 0.01, folder / "calm.log")) == 0
        step = (time.monotonic() - begun) / len(
            requests(folder / "calm.log")
        )  # a life is up to three and a half requests long, on any machine
        kills = worked = between = temporary = 0
        while kills < 20:
            before = len(requests(folder / "killed.log"))
            pid = child(everything, killed, "2024-01-01", 0.01, folder / "killed.log")
            time.sleep(rng.uniform(0, 3.5 * step))
            os.kill(pid, signal.SIGKILL)
            if os.WIFSIGNALED(ended(pid)):
                kills += 1
            else:
                break  # it was done: too few moments, and the test says so
            worked += len(requests(folder / "killed.log")) > before
            between += audit(killed)
            temporary += any(p.suffix == ".tmp" for p in killed.rglob(".*"))
        assert ended(child(everything, killed, "2024-01-01", 0, folder / "killed.log")) == 0
        facts = {
            "kills": kills,
            "worked": worked,
            "between": between,
            "temporary": temporary,
            "requests calm": len(requests(folder / "calm.log")),
            "requests killed": len(requests(folder / "killed.log")),
        }
        assert ended(child(everything, killed, "2024-01-01", 0, folder / "again.log")) == 0
        facts["requests again"] = len(requests(folder / "again.log"))
        facts["calm"], facts["killed"] = (
            {n: hashlib.sha256(b).hexdigest() for n, b in files_of(f).items()} for f in (calm, killed)
        )
        facts["info"] = [
            [
                {k: r[k] for k in ("symbol", "bars", "first", "last", "sha256", "problem")}
                for r in cache_info(f)
            ]
            for f in (calm, killed)
        ]
        assert ended(child(everything, killed, "2024-01-02", 0, folder / "day.log")) == 0
        facts["day"] = requests(folder / "day.log")
        print(json.dumps(facts))
    """,
        tmp_path,
        random.randrange(10**6),
        symbols=("SIM-USD", "SIM2-USD", "SIMA"),
    )
    print({k: v for k, v in out.items() if isinstance(v, int)})
    assert out["kills"] == 20 and out["worked"] >= 5  # and did not all die before they had begun
    assert (
        sorted(out["killed"]) == sorted(out["calm"]) and len(out["calm"]) == 6
    )  # and nothing else lies there
    assert {n: h for n, h in out["killed"].items() if n.endswith("parquet")} == {
        n: h for n, h in out["calm"].items() if n.endswith("parquet")
    }
    assert out["info"][0] == out["info"][1] and [r["bars"] for r in out["info"][0]] == [2 * 365 * 96] * 2 + [
        501 * 26 - 3 * 12
    ]  # sessions of 2022 and 2023, three half days
    assert (
        out["requests calm"] <= out["requests killed"] <= out["requests calm"] + 20
    )  # a kill costs one request
    assert out["requests again"] == 0
    assert out["day"] == [
        f"{s} 2024-01-01 00:00:00+00:00 2024-01-02 00:00:00+00:00" for s in ("SIM-USD", "SIM2-USD", "SIMA")
    ]


@pytest.mark.slow
def test_killed_before_every_line_that_writes(tmp_path):
    "At each line of the commit, of the atomic write and of the lock, in the first commit and in a later one."
    out = run(
        """
        WRITING = {
            f.__code__
            for f in (
                cache_files.CachedHistory.commit,
                cache_files.CachedHistory._lock,
                cache_files.CachedHistory.locked.__wrapped__,
                files.atomic_write,
                files._replace,
            )
        }


        def killed_at(n, *args):
            "Die before the n-th line of these functions."
            lines = 0

            def each(frame, event, arg):
                nonlocal lines
                if event == "line":
                    lines += 1
                    if lines == n:
                        os.kill(os.getpid(), signal.SIGKILL)
                return each

            sys.settrace(lambda frame, event, arg: each if frame.f_code in WRITING else None)
            fill(*args, log=folder / "killed.log")


        ends = ("2022-01-02", "2022-01-04")
        for i, end in enumerate(ends):
            fill(folder / f"calm{i}", "SIM-USD", "2022-01-01", end)
        calm = [(folder / f"calm{i}/alpaca/raw/15Min/SIM-USD.parquet").read_bytes() for i in (0, 1)]
        lives, between, litter, again = [], 0, 0, 0
        for i, end in enumerate(ends):
            for n in range(1, 1000):
                here = folder / "here"
                shutil.rmtree(here, ignore_errors=True)
                if i:
                    shutil.copytree(folder / "calm0", here)
                pid = child(killed_at, n, here, "SIM-USD", "2022-01-01", end)
                if not os.WIFSIGNALED(ended(pid)):
                    break
                between += audit(here)
                litter += any(p.name.startswith(".") for p in here.rglob("*"))
                fill(here, "SIM-USD", "2022-01-01", end, log=folder / "again.log")
                found = files_of(here)
                assert sorted(found) == [f"alpaca/raw/15Min/SIM-USD.{e}" for e in ("json", "parquet")], (
                    n,
                    found.keys(),
                )
                assert found["alpaca/raw/15Min/SIM-USD.parquet"] == calm[i] and "next" not in json.loads(
                    found["alpaca/raw/15Min/SIM-USD.json"]
                ), n
            lives.append(n - 1)
        print(
            json.dumps(
                {
                    "lives": lives,
                    "between": between,
                    "litter": litter,
                    "again": len(requests(folder / "again.log")),
                }
            )
        )
    """,
        tmp_path,
    )
    print(out)
    assert (
        min(out["lives"]) > 60 and out["between"] > 40 and out["litter"] > 80
    )  # the kills did fall into all these places
    assert 0 < out["again"] < sum(out["lives"])  # some of the killed had the bars on disk already


@pytest.mark.slow
def test_two_processes_fill_one_cache_together(tmp_path):
    out = run(
        """
        def one(name):
            lines = []
            bars, facts = fill(
                folder / "cache",
                "SIM-USD",
                "2022-01-01",
                "2022-03-01",
                0.03,
                chunk=400,
                log=folder / "both.log",
                progress=lines.append,
            )
            (folder / name).write_text(
                json.dumps(
                    {
                        "bars": len(bars),
                        "requests": facts["requests"],
                        "waited": sum("waiting for process" in line for line in lines),
                    }
                )
            )


        children = [child(one, name) for name in ("a", "b")]
        assert [ended(c) for c in children] == [0, 0]
        audit(folder / "cache")
        print(
            json.dumps(
                {
                    "both": sorted(
                        (json.loads((folder / n).read_text()) for n in "ab"), key=lambda r: r["requests"]
                    ),
                    "asked": requests(folder / "both.log"),
                    "files": list(files_of(folder / "cache")),
                }
            )
        )
    """,
        tmp_path,
    )
    idle, busy = out["both"]
    assert idle == {"bars": 59 * 96, "requests": 0, "waited": 1} and busy == {
        "bars": 59 * 96,
        "requests": 15,
        "waited": 0,
    }
    assert len(out["asked"]) == len(set(out["asked"])) == 15 and len(out["files"]) == 2


@pytest.mark.slow
def test_many_processes_and_many_locks(tmp_path):
    "Six at once, over and over: the lock's file comes and goes, and never are two of them in."
    out = run(
        """
        def one(seed):
            choose = random.Random(seed)
            for _ in range(12):
                day = choose.randint(1, 27)
                bars, _ = fill(
                    folder / "cache",
                    "SIM-USD",
                    f"2022-01-{day:02d}",
                    f"2022-01-{day + 2:02d}",
                    0.002,
                    chunk=60,
                    log=folder / "all.log",
                )
                assert len(bars) == 2 * 96


        children = [child(one, seed) for seed in range(6)]
        assert [ended(c) for c in children] == [0] * 6
        audit(folder / "cache")
        print(json.dumps({"asked": requests(folder / "all.log"), "files": list(files_of(folder / "cache"))}))
    """,
        tmp_path,
    )
    spans = sorted(tuple(re.findall(r"20\S+ \S+", line)) for line in out["asked"])
    assert (
        all(a[1] <= b[0] for a, b in zip(spans, spans[1:])) and len(spans) > 30
    )  # no moment was asked for twice
    assert len(out["files"]) == 2


@pytest.mark.slow
def test_a_process_waits_only_so_long_and_the_dead_hold_no_lock(tmp_path):
    out = run(
        """
        holder = child(
            fill, folder / "cache", "SIM-USD", "2022-01-01", "2022-01-03", 100.0, log=folder / "log"
        )
        while not requests(folder / "log"):
            time.sleep(0.01)
        begun, lines = time.monotonic(), []
        try:
            fill(folder / "cache", "SIM-USD", "2022-01-01", "2022-01-05", wait_s=0.3, progress=lines.append)
        except InputError as e:
            said = str(e)
        waited = time.monotonic() - begun
        other = fill(folder / "cache", "SIM2-USD", "2022-01-01", "2022-01-05", wait_s=0.0)[1][
            "requests"
        ]  # another history has a lock of its own
        os.kill(holder, signal.SIGKILL)
        ended(holder)
        after = fill(folder / "cache", "SIM-USD", "2022-01-01", "2022-01-05", wait_s=0.0)[1]["requests"]
        print(
            json.dumps(
                {
                    "said": said.replace(str(holder), "PID"),
                    "lines": [line.replace(str(holder), "PID") for line in lines],
                    "waited": waited,
                    "other": other,
                    "after": after,
                    "files": len(files_of(folder / "cache")),
                }
            )
        )
    """,
        tmp_path,
        symbols=("SIM-USD", "SIM2-USD"),
    )
    assert "process PID has been filling it for longer than 0.3 s" in out["said"] and 0.3 <= out["waited"] < 5
    assert len(out["lines"]) == 1 and "waiting for process PID" in out["lines"][0]
    assert (out["other"], out["after"], out["files"]) == (1, 1, 4)


@pytest.mark.slow
def test_readers_are_never_in_the_way_of_a_writer_nor_misled_by_it(tmp_path):
    "Before each piece the writer waits until the reader has read twice, so that every state was read."
    out = run(
        """
        fill(folder / "cache", "SIM-USD", "2022-01-01", "2022-01-03")
        expected = MARKET["SIM-USD"].loc["2022-01-01":"2022-01-02"]
        shared, reader = memoryview(mmap.mmap(-1, 8)).cast("q"), os.getpid()  # how often was read


        def turn():
            seen = shared[0]
            while shared[0] < seen + 2:  # the first of them may have begun before the last commit
                if os.getppid() != reader:
                    os._exit(1)  # it has failed
                time.sleep(0.001)


        writer = child(
            fill,
            folder / "cache",
            "SIM-USD",
            "2022-01-01",
            "2022-06-01",
            chunk=288,
            log=folder / "log",
            turn=turn,
        )
        sizes = set()
        while not os.waitpid(writer, os.WNOHANG)[0]:
            bars, facts = fill(folder / "cache", "SIM-USD", "2022-01-01", "2022-01-03")
            (row,) = cache_info(folder / "cache")
            assert facts["requests"] == 0 and bars.equals(expected) and row["problem"] is None, row["problem"]
            shared[0] += 1
            sizes.add(row["bars"])
        print(
            json.dumps(
                {
                    "reads": shared[0],
                    "rounds": len(requests(folder / "log")),
                    "sizes": len(sizes),
                    "files": len(files_of(folder / "cache")),
                }
            )
        )
    """,
        tmp_path,
    )
    print(out)
    assert out["reads"] >= 2 * out["rounds"] > 30 and out["sizes"] > 10 and out["files"] == 2


def test_a_commit_between_the_two_reads_of_a_reader(tmp_path, monkeypatch):
    "The manifest is the old one, and the parquet the new one: nobody has changed it but a writer."
    vendor, read = Vendor(truth("SIM-USD")), Path.read_bytes
    crypto(tmp_path, vendor, "2023-01-03", "2023-01-05")

    def interleaved(path):
        content = read(path)
        if path.suffix == ".json":
            monkeypatch.undo()  # once
            crypto(tmp_path, vendor, "2023-01-03", "2023-01-06")
        return content

    monkeypatch.setattr(Path, "read_bytes", interleaved)
    assert len(crypto(tmp_path, vendor, "2023-01-03", "2023-01-05")[0]) == 2 * 96 and len(vendor.asked) == 2
    monkeypatch.setattr(Path, "read_bytes", interleaved)
    assert cache_info(tmp_path)[0]["problem"] is None


def test_a_lock_on_a_file_that_its_holder_has_removed_is_none(tmp_path, monkeypatch):
    "Opened while another process held it, locked after it was removed: a third one would lock a new file."
    lock, flock = tmp_path / "alpaca/raw/15Min/.SIM-USD.lock", fcntl.flock
    vendor, refused = Vendor(truth("SIM-USD")), []

    def late(handle, how):
        monkeypatch.undo()  # once
        lock.unlink()
        flock(handle, how)

    def third(start, end):
        with open(lock) as f, pytest.raises(BlockingIOError):
            flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refused.append(lock.read_text())
        return vendor(start, end)

    monkeypatch.setattr(fcntl, "flock", late)
    crypto(tmp_path, third, "2023-01-03", "2023-01-05")
    assert refused == [f"{os.getpid()}\n"] and not lock.exists()


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_cache_good(tmp_path):
    "A limit on the size of files stands for it: at nothing, before the parquet, and at the second manifest."
    out = run(
        """
        file = folder / "cache/alpaca/raw/15Min/SIM-USD.parquet"
        fill(folder / "cache", "SIM-USD", "2022-01-01", "2022-01-20")
        before = files_of(folder / "cache")
        errors = []
        for limit in (200, file.stat().st_size + 100):

            def full():
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                try:
                    fill(folder / "cache", "SIM-USD", "2022-01-01", "2022-01-25")
                except InputError as e:
                    said = str(e)
                assert (
                    len(fill(folder / "cache", "SIM-USD", "2022-01-01", "2022-01-20")[0]) == 19 * 96
                )  # while the disk is full
                os.write(pipe, said.encode())

            reader, pipe = os.pipe()
            assert ended(child(full)) == 0
            errors.append(os.read(reader, 10000).decode())
            assert (
                files_of(folder / "cache")["alpaca/raw/15Min/SIM-USD.parquet"]
                == before["alpaca/raw/15Min/SIM-USD.parquet"]
            )
            audit(folder / "cache")
        bars, facts = fill(folder / "cache", "SIM-USD", "2022-01-01", "2022-01-25")
        print(
            json.dumps(
                {
                    "errors": errors,
                    "requests": facts["requests"],
                    "from cache": facts["bars_from_cache"],
                    "bars": len(bars),
                    "files": len(files_of(folder / "cache")),
                }
            )
        )
    """,
        tmp_path,
    )
    assert [
        re.search(
            r"SIM-USD\.\w+: cannot be written \(File too large\); make room.*what was there before is kept$",
            e,
        )[0].split(":")[0]
        for e in out["errors"]
    ] == ["SIM-USD.json", "SIM-USD.parquet"]
    assert (out["requests"], out["from cache"], out["bars"], out["files"]) == (1, 19 * 96, 24 * 96, 2)


@pytest.mark.slow
def test_a_read_only_folder_can_be_read_and_is_left_alone():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders cannot be entered by another user
        os.chmod(folder, 0o755)
        out = run(
            """
            fill(folder / "cache", "SIM-USD", "2022-01-01", "2022-01-20")
            inner, before = folder / "cache/alpaca/raw/15Min", files_of(folder / "cache")
            (inner / ".SIM-USD.json.abc.tmp").write_text("left by a killed writer")
            for path in [folder / "cache", *(p for p in (folder / "cache").rglob("*") if p.is_dir())]:
                path.chmod(0o555)


            def reader():
                if os.geteuid() == 0:
                    os.setuid(65534)  # nothing is read-only to root
                bars, facts = fill(folder / "cache", "SIM-USD", "2022-01-01", "2022-01-20")
                assert len(bars) == 19 * 96 and facts["requests"] == 0
                for symbol, end in (("SIM-USD", "2022-01-21"), ("SIM2-USD", "2022-01-21")):
                    try:
                        fill(folder / "cache", symbol, "2022-01-01", end, log=None)
                    except InputError as e:
                        os.write(pipe, f"{e}\\n".encode())


            r, pipe = os.pipe()
            assert ended(child(reader)) == 0
            errors = os.read(r, 10000).decode().splitlines()
            assert {n: b for n, b in files_of(folder / "cache").items() if not n.endswith(".tmp")} == before
            for path in [folder / "cache", *(p for p in (folder / "cache").rglob("*") if p.is_dir())]:
                path.chmod(0o755)
            fill(
                folder / "cache", "SIM-USD", "2022-01-01", "2022-01-20"
            )  # everything is there, and what was left is cleared away
            print(json.dumps({"errors": errors, "files": len(files_of(folder / "cache"))}))
        """,
            folder,
            symbols=("SIM-USD", "SIM2-USD"),
        )
    assert (
        len(out["errors"]) == 2
        and all("cannot be written (Permission denied)" in e for e in out["errors"])
        and out["files"] == 2
    )


def test_only_its_own_litter_is_cleared(tmp_path):
    "BRK and BRK.B live side by side, and people keep files of their own."
    vendor = Vendor(truth("SIMA"))

    def call(symbol, end):
        return cached_bars(
            tmp_path, symbol, "15Min", "equity", "2023-01-03", end, vendor, now=LATER, progress=None
        )

    call("BRK", "2023-01-05")
    inner = tmp_path / "alpaca/raw/15Min"
    others = [
        ".BRK.B.parquet.x1_a.tmp",
        ".BRK.B.json.x1_a.tmp",
        ".BRK.B.lock",
        ".notes",
        "BRK.parquet.bak",
        ".BRK.parquet.tmp",
    ]
    own = [".BRK.parquet.x1_a.tmp", ".BRK.json.x1_a.tmp", ".BRK.lock"]
    for name in others + own:
        (inner / name).write_text("")
    call("BRK", "2023-01-05")
    assert sorted(p.name for p in inner.iterdir()) == sorted(["BRK.json", "BRK.parquet", *others])


# clocks that are wrong


class Server(Vendor):
    "Has the bars that are settled by its own time, and tells it or not."

    def __init__(self, bars, time, tells):
        super().__init__(bars)
        self.time, self.tells = utc(time), tells

    def settled(self, start, end):
        return self.bars[
            (self.bars.index >= start)
            & (self.bars.index < end)
            & (self.bars.index + pd.Timedelta("17min") <= self.time)
        ]

    def __call__(self, start, end):
        self.asked.append((start, end))
        return self.settled(start, end)

    def call(self, folder, ahead="0s", start="2023-01-03", end=None, **options):
        "A call by somebody whose clock is ahead of the server's; with the bars that it should have brought."
        self.asked.clear()
        out, facts = crypto(
            folder,
            self,
            start,
            end,
            now=self.time + pd.Timedelta(ahead),
            source_time=(lambda: self.time) if self.tells else None,
            **options,
        )
        return out, facts, self.settled(utc(start), utc(end) if end else self.time)


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("ahead", ["20min", "8h", "3D", "2922D"])
@pytest.mark.parametrize("later", ["1min", "40min", "9h", "26h", "5D"])
def test_a_clock_that_was_ahead_once_loses_no_bar(tmp_path, tells, ahead, later):
    server = Server(truth("SIM-USD"), "2023-01-10 12:00", tells)
    for wrong in (ahead, "0s"):
        out, _, expected = server.call(tmp_path, wrong)
        assert out.index.equals(expected.index) and len(server.asked) <= (1 if tells else 30)
    server.call(tmp_path, ahead)
    server.time += pd.Timedelta(later)
    out, _, expected = server.call(tmp_path)
    pd.testing.assert_frame_equal(out, expected, check_freq=False, rtol=0, atol=0)
    assert server.call(tmp_path)[1]["requests"] == 0
    audit(tmp_path)


@pytest.mark.parametrize(
    "tells, after, requests",
    [
        (True, "1min", 0),
        (True, "400D", 0),
        (False, "1min", 0),
        (False, "59min", 0),
        (False, "61min", 1),
        (False, "400D", 1),
    ],
)
def test_a_quiet_end_is_asked_for_once_where_the_source_tells_its_time_and_once_an_hour_elsewhere(
    tmp_path, tells, after, requests
):
    quiet = truth("SIM-USD")[:"2023-01-20 05:00"]  # it was traded no more
    server = Server(quiet, "2023-03-01", tells)
    for expected in (1, 0):
        out, facts, bars = server.call(tmp_path, end="2023-01-25")
        assert facts["requests"] == expected and out.index.equals(bars.index)
    server.time += pd.Timedelta(after)
    out, facts, bars = server.call(tmp_path, end="2023-01-25")
    assert (
        facts["requests"] == requests
        and out.index.equals(bars.index)
        and server.asked == [(utc("2023-01-20 05:15"), utc("2023-01-25"))] * requests
    )


def test_a_cache_that_a_wrong_clock_has_marked_heals_itself(tmp_path):
    "Manifests of before said nothing of the source's time."
    server = Server(truth("SIM-USD"), "2023-01-10 12:00", True)
    server.call(tmp_path)
    (manifest,) = tmp_path.rglob("*.json")
    told = json.loads(manifest.read_text())
    told["ranges"][-1]["end"] = "2030-01-01T00:00:00Z"
    manifest.write_text(json.dumps({k: v for k, v in told.items() if k not in ("proven", "asked")}))
    server.time = utc("2023-01-20")
    out, _, expected = server.call(tmp_path)
    assert out.index.equals(expected.index) and server.asked == [
        (utc("2023-01-10 11:45"), utc("2023-01-19 23:45"))
    ]  # the bar of 11:45 was not settled
    assert (
        cache_info(tmp_path)[0]["ranges"][-1]["end"] == "2023-01-19T23:45:00Z"
        and server.call(tmp_path)[1]["requests"] == 0
    )


def test_no_bar_at_all_is_no_error_and_asked_for_again(tmp_path):
    server = Server(truth("SIM-USD")[:0], "2023-01-10 12:00", True)
    out, facts, _ = server.call(tmp_path, "3D", start="2023-01-11")
    assert len(out) == 0 and facts["downloaded"] is None and facts["requests"] == 1
