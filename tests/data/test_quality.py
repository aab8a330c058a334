"""The data report: against a slow count, on histories with planted defects, and on real files whose defects
are known."""

import json

import exchange_calendars
import matplotlib
import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest

from trading_lib.bars import expected_labels, validate_bars
from trading_lib.data.quality import data_report, plot_data_report
from trading_lib.data.simulation import simulate_bars

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    matplotlib.pyplot.close("all")


def report_of(bars, timeframe, asset_class, **options):
    clean, checks = validate_bars(bars, timeframe, asset_class, **options)
    report = data_report(clean, checks)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    return clean, checks, report


def slow_gaps(present, every):
    "Runs of missing labels, one label at a time."
    gaps, run = [], []
    for t in [*every, None]:
        if t is not None and t not in present:
            run.append(t)
        elif run:
            gaps.append(
                {"from": f"{run[0]:%Y-%m-%d %H:%M}Z", "to": f"{run[-1]:%Y-%m-%d %H:%M}Z", "bars": len(run)}
            )
            run = []
    return gaps


@pytest.mark.slow
@pytest.mark.parametrize(
    "asset_class, timeframe, start, end",
    [
        ("crypto", "15Min", "2024-01-01", "2024-02-01"),
        ("crypto", "1Day", "2023-01-01", "2024-03-01"),
        ("equity", "15Min", "2024-10-28", "2024-12-31"),
        ("equity", "1Hour", "2024-02-01", "2024-04-01"),
        ("equity", "1Day", "2024-01-01", "2024-12-31"),
        ("equity", "4Hour", "2024-02-01", "2024-04-01"),
    ],
)
def test_against_a_slow_count(asset_class, timeframe, start, end):
    whole = simulate_bars("SIMA" if asset_class == "equity" else "SIM-USD", timeframe, start, end, 3, 0.0)
    random = np.random.default_rng(7)
    gone = np.zeros(len(whole), bool)
    for a in random.integers(5, len(whole) - 5, 6):
        gone[a : a + random.integers(1, 60)] = True
    gone[[0, -1]] = False
    bars, checks, report = report_of(whole[~gone], timeframe, asset_class, allow_steps=True)
    every = list(whole.index)
    assert (
        report["gaps"] == slow_gaps(set(bars.index), every) and report["gap_count"] == len(report["gaps"]) > 0
    )
    assert report["bars"] == {
        "read": len(bars),
        "kept": len(bars),
        "expected": len(every),
        "missing": int(gone.sum()),
    }
    for month in report["months"]:
        inside = [t for t in every if f"{t:%Y-%m}" == month["month"]]
        here = sum(t in bars.index for t in inside)
        assert (month["expected"], month["present"], month["missing"]) == (
            len(inside),
            here,
            len(inside) - here,
        )
    assert sum(m["expected"] for m in report["months"]) == len(every)
    days = sorted({f"{t:%Y-%m-%d}" for t in every})
    lost = [d for d in days if not any(f"{t:%Y-%m-%d}" == d for t in bars.index)]
    assert report["sessions"]["missing"] == lost[:100] and (
        report["sessions"]["expected"],
        report["sessions"]["present"],
    ) == (len(days), len(days) - len(lost))
    if (
        asset_class == "equity"
    ):  # the same bars are missing to the checks, which count those of lost sessions as sessions
        assert checks["findings"]["missing_sessions"] == len(report["sessions"]["missing"])
        closes = exchange_calendars.get_calendar("XNYS", start="2024-01-01", end="2025-01-01").early_closes
        assert report["sessions"]["half_days"] == [
            f"{t:%Y-%m-%d}"
            for t in closes
            if start <= f"{t:%Y-%m-%d}" < end and f"{t:%Y-%m-%d}" not in report["sessions"]["missing"]
        ]
        assert report["sessions"]["clock_changes"] == [
            d for d in ("2024-03-11", "2024-11-04") if start < d < end
        ]
    change = bars.close.to_numpy()[1:] / bars.close.to_numpy()[:-1] - 1
    unbroken = [
        (abs(np.log1p(c)), t)
        for c, t in zip(change, bars.index[1:])
        if not any(
            g["to"] < f"{t:%Y-%m-%d %H:%M}Z"
            and g["to"] >= f"{bars.index[bars.index < t][-1]:%Y-%m-%d %H:%M}Z"
            for g in report["gaps"]
        )
    ]
    largest = {f"{t:%Y-%m-%d %H:%M}Z" for _, t in sorted(unbroken, reverse=True)[:3]}
    assert len(report["moves"]) == 10 and largest <= {m["bar"] for m in report["moves"]}
    for move in report["moves"]:
        assert move["change"] == pytest.approx(
            change[bars.index.get_loc(pd.Timestamp(move["bar"])) - 1], abs=1e-4
        )


def test_a_whole_history_has_nothing_to_say():
    for symbol, asset_class in (("SIMA", "equity"), ("SIM-USD", "crypto")):
        bars, checks, report = report_of(
            simulate_bars(symbol, "15Min", "2024-01-02", "2024-03-01", 0, 0.0),
            "15Min",
            asset_class,
            allow_steps=True,
        )
        assert (
            report["notes"] == []
            and report["gap_count"] == 0
            and report["bars"]["missing"] == 0
            and report["segments"] == 1
        )
        assert "complete" in plot_data_report(bars, checks).axes[0].get_title()


def test_sentences_name_what_was_planted():
    bars = simulate_bars("SIMA", "15Min", "2024-01-02", "2024-07-01", 1, 0.0)
    day = bars.index.strftime("%m-%d")
    worse = bars[~np.isin(day, ["02-13", "02-14"])].copy()
    worse.loc[worse.index.month == 5, "volume"] /= 50
    worse.iloc[300, 1] *= 1.2
    worse.iloc[[10, 11], 4] = 0.0
    worse = pd.concat(
        [worse, worse.iloc[[50, 60]], worse.iloc[[80]].set_axis(worse.index[[80]] + pd.Timedelta("12h"))]
    ).assign(adj_close=1.0)
    clean, checks, report = report_of(worse, "15Min", "equity", allow_steps=True)
    said = "\n".join(report["notes"])
    for words in (
        "exact duplicates dropped: 2",
        "52 bars missing in 1 gap: 2024-02-13 14:30Z to 2024-02-14 20:45Z (52 bars)",
        "2 sessions without any bar: 2024-02-13, 2024-02-14",
        "1 bar after the close on 1 day dropped",
        "2 bars without volume, at most 2 in a row",
        "volume changes for good on 2024-05-01",
        "volume changes for good on 2024-06-03",
        f"1 spike, bars that stick out of both neighbours: {bars.index[300]:%Y-%m-%d %H:%M}Z",
        "adj_close lies beside close and is not used",
    ):
        assert words in said, words
    assert len(report["notes"]) == 10  # and the disorder that the two duplicates make
    figure = plot_data_report(clean, checks)
    cover, price, volume, text = figure.axes
    assert len([line for line in volume.lines if line.get_color() == "#d62728"]) == 2 and {
        t.get_text() for t in price.get_legend().get_texts()
    } == {"largest moves", "spikes"}
    assert (cover.images[0].get_array() == 0).sum() == 52 and all(
        note[:40] in text.texts[0].get_text() for note in report["notes"]
    )


def test_one_missing_minute_shows_in_the_picture():
    "Long histories put minutes and days together; red must not vanish in the mean."
    minutes = simulate_bars("SIM-USD", "1Min", "2024-01-01", "2024-01-15", 0, 0.0)
    bars, checks, report = report_of(minutes.drop(minutes.index[5000]), "1Min", "crypto")
    grid = plot_data_report(bars, checks).axes[0].images[0].get_array()
    assert grid.shape[0] < 150 and grid.shape[1] == 14 and np.nanmin(grid) <= 0.6 and (grid < 1).sum() == 1
    days = simulate_bars("SIM-USD", "1Hour", "2018-01-01", "2024-01-01", 0, 0.0)
    bars, checks, _ = report_of(days.drop(days.index[5000]), "1Hour", "crypto", allow_steps=True)
    grid = plot_data_report(bars, checks).axes[0].images[0].get_array()
    assert grid.shape == (24, -(-2191 // 4)) and (grid < 1).sum() == 1 and np.nanmin(grid) <= 0.6


def test_four_hour_bars_on_another_grid():
    "Bars that start at 12:00, 16:00 and 20:00 UTC make whole sessions, whatever the exchange's clock says."
    labels = pd.DatetimeIndex(
        [
            d + pd.Timedelta(hours=h)
            for d in expected_labels("1Day", "equity", "2024-01-08", "2024-02-10")
            for h in (12, 16, 20)
        ]
    )
    bars = pd.DataFrame({"open": 10.0, "high": 11.0, "low": 9.0, "close": 10.0, "volume": 5.0}, index=labels)
    assert report_of(bars, "4Hour", "equity")[2]["bars"]["missing"] == 0


# real files: what their description says, and nothing else

OUTAGES = {  # first and last missing label, UTC
    "D 5Min": [
        ("2021-03-06 02:00", "2021-03-06 03:25"),
        ("2021-04-20 02:00", "2021-04-20 04:25"),
        ("2021-04-25 04:05", "2021-04-25 08:40"),
    ],  # of the exchange
    "D 15Min": [
        ("2021-03-06 02:00", "2021-03-06 03:15"),
        ("2021-04-20 02:00", "2021-04-20 04:15"),
        ("2021-04-25 04:15", "2021-04-25 08:30"),
    ],  # 4:00 holds a 5Min bar
    "D 1Min": [("2021-04-25 04:01", "2021-04-25 08:44")],  # the file begins on the evening of 20 April
    "BTC and ETH 5Min": [("2024-09-06 04:45", "2024-12-30 23:55")],
    "BTC and ETH 15Min": [("2024-09-06 04:45", "2024-12-30 23:45")],  # 115 days between two sources
    "SOL and XRP 5Min": [("2024-09-07 02:20", "2024-12-30 23:55")],
    "SOL and XRP 15Min": [("2024-09-07 02:15", "2024-12-30 23:45")],
}
SUMMER, AUTUMN = ["2025-07-03", "2025-11-28"], ["2024-07-03", "2024-11-29", "2024-12-24"]
# file -> known defects: outages, (missing bars), bars outside 9:30 to 16:00, half days, another feed,
# bars without volume, large moves, adj_close
KNOWN = {
    **{
        f"crypto/{t}/{s}-USDT": dict(outages=f"{pair} {t}", missing=n)
        for pair, counts in {
            "BTC and ETH": {"5Min": 33351, "15Min": 11117},
            "SOL and XRP": {"5Min": 33092, "15Min": 11031},
        }.items()
        for t, n in counts.items()
        for s in pair.split(" and ")
    },
    "crypto/5Min/ETH-BTC": dict(outages="D 5Min", missing=104),
    "crypto/15Min/ETH-BTC": dict(outages="D 15Min", missing=34),
    "crypto/1Min/BTC-USDT": {},
    "crypto/1Min/ETH-USDT": dict(outages="D 1Min", missing=284),
    **{
        f"equity/{t}/{s}": dict(outside=n, half_days=SUMMER, foreign=n > 0)
        for t, counts in {
            "15Min": dict(AAPL=55, COST=0, META=0, MSFT=44, QQQ=409, TSLA=117),
            "5Min": dict(AAPL=66, COST=0, META=0, MSFT=48, QQQ=808, TSLA=177),
        }.items()
        for s, n in counts.items()
    },
    **{f"equity/{t}/SPY": dict(outside=193, half_days=AUTUMN, prints=194) for t in ("1Min", "5Min", "15Min")},
    **{
        f"equity/1Day/{s}": dict(adjusted=s in ("AMD", "IWM", "MSFT", "QQQ", "SPY"))
        for s in ("AAPL", "AMD", "AMZN", "FB", "GOOGL", "IWM", "MSFT", "NFLX", "NVDA", "QQQ", "SPY", "TSLA")
    },
}
KNOWN["equity/5Min/COST"]["zero_volume"] = 1
KNOWN["equity/1Day/AMD"]["large"] = ["2016-04-22"]  # +52 % after results


def test_the_table_names_every_real_file(real_bars_folder):
    assert {"/".join(f.with_suffix("").parts[-3:]) for f in real_bars_folder.glob("*/*/*.parquet")} == set(
        KNOWN
    )


@pytest.mark.parametrize("name", KNOWN)
def test_real_files_have_their_known_defects_and_no_others(real_bars_folder, name):
    asset_class, timeframe, symbol = name.split("/")
    raw, known = pd.read_parquet(real_bars_folder / f"{name}.parquet").set_index("timestamp"), KNOWN[name]
    bars, checks, report = report_of(raw, timeframe, asset_class)

    outages = OUTAGES.get(known.get("outages"), [])
    assert [(g["from"], g["to"]) for g in report["gaps"]] == [(f"{a}Z", f"{b}Z") for a, b in outages]
    assert report["bars"]["missing"] == known.get("missing", 0) == sum(g["bars"] for g in report["gaps"])

    outside = 0
    if asset_class == "equity" and timeframe != "1Day":
        local = raw.index.tz_convert("America/New_York")
        at = local.hour * 60 + local.minute
        after_half = np.isin(local.strftime("%Y-%m-%d"), known["half_days"]) & (at >= 780) & (at < 960)
        assert ((at < 570) | (at >= 960)).sum() == known["outside"]  # as its description counts
        outside = known["outside"] + int(after_half.sum())
        assert report["sessions"]["half_days"] == known["half_days"] and report["sessions"]["missing"] == []
        assert report["out_of_session"].get("closing_print", {}).get("bars", 0) == known.get(
            "prints",
            ((at == 960) | (np.isin(local.strftime("%Y-%m-%d"), known["half_days"]) & (at == 780))).sum(),
        )
        for kind in report["out_of_session"].values():
            assert kind["foreign"] == bool(known.get("foreign")) and (
                not kind["foreign"] or kind["first"] >= "2025-09-15" and 100 < kind["times_smaller"] < 20_000
            )
    assert sum(k["bars"] for k in report["out_of_session"].values()) == outside and checks["findings"][
        "foreign_bars"
    ] == (outside if known.get("foreign") else 0)
    if timeframe == "1Day":
        assert report["sessions"]["half_days"] == [
            f"{t:%Y-%m-%d}"
            for t in exchange_calendars.get_calendar(
                "XNYS", start="2010-01-04", end="2017-12-29"
            ).early_closes
            if t >= raw.index[0].tz_localize(None)
        ]

    assert (
        report["zero_volume"]["bars"] == known.get("zero_volume", 0)
        and (["adj_close"] if known.get("adjusted") else []) == report["ignored_columns"]
    )
    assert (
        not any(report["repaired"].values())
        and report["spikes"] == report["splits"] == report["volume_breaks"] == []
    )
    large = [m["bar"][:10] for m in report["moves"] if not -0.45 < m["change"] < 0.5]
    assert (
        large == known.get("large", [])
        and checks["findings"]["large_steps"] == len(large)
        and checks["findings"]["wide_ranges"] == report["wide_ranges"]
    )
    said = " ".join(report["notes"])
    assert (
        ("missing" in said) == bool(outages)
        and ("another feed" in said) == bool(known.get("foreign"))
        and ("labelled at the close" in said) == ("closing_print" in report["out_of_session"])
    )
    print(f"\n{name:24}", *(f"\n    {note}" for note in report["notes"]), end="")


@pytest.mark.slow
def test_feeds_planted_into_real_files_are_found(real_bars_folder):
    """Ten sessions' worth of hundredfold thinner volume, at twelve random places of four real files: both
    ends, to the day."""
    random, found, places = np.random.default_rng(1), 0, 0
    for name in ("crypto/15Min/BTC-USDT", "equity/15Min/META", "equity/1Day/TSLA", "equity/5Min/SPY"):
        asset_class, timeframe, _ = name.split("/")
        bars = validate_bars(pd.read_parquet(real_bars_folder / f"{name}.parquet"), timeframe, asset_class)[0]
        days = bars.index.normalize().unique()
        for k in random.integers(25, len(days) - 35, 12):
            thin = (bars.index >= days[k]) & (bars.index < days[k + 10])
            _, report = validate_bars(
                bars.assign(volume=bars.volume.where(~thin, bars.volume / 100)), timeframe, asset_class
            )
            places += 1
            found += [b["date"] for b in report["volume_breaks"]] == [
                f"{days[k]:%Y-%m-%d}",
                f"{days[k + 10]:%Y-%m-%d}",
            ]
    print(f"\n{found} of {places} to the day")
    assert found >= places - 2
