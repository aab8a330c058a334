"""The feature table against independent computations, and its invariants: nothing from the future, nothing
across a segment, a tail is enough, always finite.

References are pandas (rolling, ewm), TA-Lib where the library itself does not call it, and slow loops over
bars; none of them shares code with trading_lib.features.
"""

import functools
import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from trading_lib import features
from trading_lib.bars import bar_clock, validate_bars
from trading_lib.config import InputError
from trading_lib.features import FeatureFit, feature_table, fit_features
from trading_lib.market.layouts import BLOCKS, LAYOUTS, get_layout
from trading_lib.market.segments import segments_of
from trading_lib.sources import simulate_bars

DISTINCT = ["2.3.0", "2.6.0", "2.7.0", "5.3.0", "5.5.0", "5.6.0"]  # the six layouts
MARKET_BLOCKS = [name for name in BLOCKS if name in features.BLOCK_FUNCTIONS]
MARKETS = {
    "crypto": ("SIM-USD", "15Min", "crypto", "2023-01-01", "2023-03-15"),
    "equity": ("SIMA", "15Min", "equity", "2023-01-01", "2023-12-31"),
}


@functools.cache
def simulated(market, timeframe=None, start=None, end=None):
    symbol, step, asset_class, first, last = MARKETS[market]
    return simulate_bars(
        symbol, timeframe or step, start or first, end or last, seed=3, asset_class=asset_class
    )


@functools.cache
def fitted(market, version="5.6.0", bars=3000):
    return fit_features(simulated(market)[:bars], version, "15Min", MARKETS[market][2])


def real(folder, path, timeframe, asset_class):
    bars = pd.read_parquet(folder / asset_class / timeframe / f"{path}.parquet").set_index("timestamp")[
        ["open", "high", "low", "close", "volume"]
    ]
    return validate_bars(bars, timeframe, asset_class)[0]


def plain(fit, version):
    "The same chains under another layout, so that one fit serves tests of columns."
    n = get_layout(version).n_features
    return FeatureFit(
        version,
        fit.timeframe,
        fit.asset_class,
        fit.context,
        fit.chains,
        np.zeros(n),
        np.ones(n),
        fit.first,
        fit.last,
        fit.bars,
        fit.tail_error,
    )


def table_of(bars, version, fit, timeframe="15Min", asset_class="crypto"):
    return feature_table(bars, version, fit, timeframe, asset_class)


def close_to(values, expected, tolerance=1e-10):
    difference = np.abs(np.asarray(values, float) - np.asarray(expected, float)).max()
    assert difference <= tolerance, difference


# columns against pandas


@functools.cache
def everything():
    "One unbroken stretch of crypto bars and all market columns of all layouts over it."
    bars = simulated("crypto")[:4000]
    return bars, pd.concat(
        [
            table_of(bars, "5.3.0", plain(fitted("crypto"), "5.3.0")),
            table_of(bars, "5.6.0", fitted("crypto"))[list(BLOCKS["hourly_context"].columns)],
        ],
        axis=1,
    )


def test_price_and_intraday_columns_equal_pandas():
    bars, table = everything()
    o, h, low, c, v = (bars[name] for name in ("open", "high", "low", "close", "volume"))
    r = c.pct_change()
    close_to(table.norm_price, c / c.rolling(100, min_periods=1).mean() - 1)
    close_to(table.returns, r.fillna(0))
    close_to(table.log_returns, np.log(c).diff().fillna(0))
    close_to(table.volatility, r.rolling(20, min_periods=1).std(ddof=0).fillna(0))
    close_to(table.momentum[10:], c.pct_change(10)[10:])
    close_to(table.momentum[:10], c[:10] / c.iloc[0] - 1)
    activity = np.log1p(v)
    close_to(table.volume_proxy, activity - activity.rolling(20, min_periods=1).mean())
    close_to(table.bar_range, (h - low) / c)
    close_to(table.close_location, ((2 * c - h - low) / (h - low)).where(h > low, 0))
    close_to(table.open_gap, (o / c.shift() - 1).fillna(0))
    close_to(table.body, c / o - 1)


def test_multi_window_columns_equal_pandas():
    bars, table = everything()
    c, r = bars.close, bars.close.pct_change()
    for w in (20, 50, 100):
        close_to(table[f"return_{w}"][w:], c.pct_change(w)[w:])
        close_to(table[f"volatility_{w}"], r.rolling(w, min_periods=1).std(ddof=0).fillna(0))
        z = (c - c.rolling(w, min_periods=1).mean()) / c.rolling(w, min_periods=1).std(ddof=0)
        close_to(table[f"zscore_{w}"][1:], z[1:], 1e-6)  # pandas' own rolling deviation is the less exact one


def test_temporal_columns_equal_the_calendar():
    for market, zone in (("crypto", "UTC"), ("equity", "America/New_York")):
        bars = simulated(market)
        local, table = (
            bars.index.tz_convert(zone),
            table_of(bars, "5.6.0", fitted(market), asset_class=market),
        )
        for name, share in (
            ("hour", (local.hour + local.minute / 60) / 24),
            ("weekday", local.day_of_week / 7),
            ("month", (local.month - 1) / 12),
        ):
            close_to(table[f"{name}_sin"], np.sin(2 * np.pi * share))
            close_to(table[f"{name}_cos"], np.cos(2 * np.pi * share))
        day = bars.index.floor("D") if market == "crypto" else None
        if market == "crypto":
            close_to(table.session_progress, (bars.index + pd.Timedelta("15min") - day) / pd.Timedelta("1D"))
        else:  # full sessions have 26 bars
            place = pd.Series(1, bars.index).groupby(local.date)
            whole = (place.transform("size") == 26).to_numpy()
            close_to(table.session_progress[whole], (place.cumsum() / 26)[whole])


def wilder(x, bars):
    return x.ewm(alpha=1 / bars, adjust=False).mean()


def test_indicators_equal_textbook_formulas():
    "Recursive ones agree once their different starting values are forgotten."
    bars, table = everything()
    h, low, c = bars.high, bars.low, bars.close
    gain, loss = c.diff().clip(lower=0).fillna(0), (-c.diff()).clip(lower=0).fillna(0)
    for name, n in (("rsi", 14), ("rsi_7", 7)):
        close_to(table[name][600:], (wilder(gain, n) / (wilder(gain, n) + wilder(loss, n)))[600:])
    macd = c.ewm(span=12, adjust=False).mean() - c.ewm(span=26, adjust=False).mean()
    signal = macd.ewm(span=9, adjust=False).mean()
    for name, x in (("macd", macd), ("macd_signal", signal), ("macd_hist", macd - signal)):
        close_to(table[name][600:], (x / c)[600:])
    true_range = pd.concat([h - low, (h - c.shift()).abs(), (low - c.shift()).abs()], axis=1).max(axis=1)
    close_to(table.atr_pct[600:], (wilder(true_range, 14) / c)[600:])
    rise, fall = h.diff(), -low.diff()
    plus, minus = rise.where((rise > fall) & (rise > 0), 0.0), fall.where((fall > rise) & (fall > 0), 0.0)
    plus_di, minus_di = wilder(plus, 14) / wilder(true_range, 14), wilder(minus, 14) / wilder(true_range, 14)
    close_to(table.plus_di[600:], plus_di[600:])
    close_to(table.minus_di[600:], minus_di[600:])
    close_to(table.adx[600:], wilder(((plus_di - minus_di).abs() / (plus_di + minus_di)).fillna(0), 14)[600:])
    fast = (c - low.rolling(14).min()) / (h.rolling(14).max() - low.rolling(14).min())
    close_to(table.stoch_k[20:], fast.rolling(3).mean()[20:])
    close_to(table.stoch_d[20:], fast.rolling(3).mean().rolling(3).mean()[20:])
    close_to(table.williams_r[20:], (fast - 1)[20:])
    typical = (h + low + c) / 3
    spread = typical.rolling(14).apply(lambda x: np.abs(x - x.mean()).mean(), raw=True)
    close_to(
        table.cci[20:],
        ((typical - typical.rolling(14).mean()) / (0.015 * spread) / 200).clip(-1, 1)[20:],
        1e-8,
    )
    close_to(table.roc[10:], c.pct_change(10)[10:])


def test_indicators_equal_talib_itself():
    "Against TA-Lib's stochastic and bands, which the table does not call, and on raw prices for the rest."
    talib = pytest.importorskip("talib")
    bars, table = everything()
    h, low, c = (bars[name].to_numpy() for name in ("high", "low", "close"))
    k, d = talib.STOCH(h, low, c, 14, 3, 0, 3, 0)
    close_to(table.stoch_k[20:], k[20:] / 100)
    close_to(table.stoch_d[20:], d[20:] / 100)
    upper, middle, lower = talib.BBANDS(c, 20, 2.0, 2.0, 0)
    close_to(
        table.bb_percent_b[20:], ((c - lower) / (upper - lower))[20:], 1e-6
    )  # TA-Lib's running variance is the less exact one
    assert np.array_equal(table.rsi[14:], talib.RSI(c, 14)[14:] / 100)
    assert np.array_equal(table.adx[40:], talib.ADX(h, low, c, 14)[40:] / 100)


def test_markov_columns_equal_a_slow_filter():
    bars, table = everything()
    n, chains = 1500, fitted("crypto").chains
    c = bars.close[:n]
    volatility = c.pct_change().rolling(20).std(ddof=0)
    observed = {
        "volatility": np.log(volatility),
        **{
            name: c.pct_change(w) / (volatility * math.sqrt(w))
            for name, w in (("trend", 50), ("momentum", 10), ("macro", 200))
        },
    }
    for i, (name, x) in enumerate(observed.items()):
        matrix, reach = chains.transitions[i], 3 * np.sqrt(chains.variances[i])
        x = x.clip(
            chains.means[i, 0] - reach[0], chains.means[i, 2] + reach[2]
        )  # further out counts as that far out
        belief, rows = np.linalg.matrix_power(matrix, 5000)[0], []
        for value in x:
            belief = belief @ matrix
            if np.isfinite(value):
                belief = (
                    belief
                    * np.exp(-0.5 * (value - chains.means[i]) ** 2 / chains.variances[i])
                    / np.sqrt(chains.variances[i])
                )
            belief = belief / belief.sum()
            rows.append(belief)
        rows = np.array(rows)
        close_to(table[[f"{state}_{name}" for state in ("low", "medium", "high")]][:n], rows, 1e-9)
        if name == "trend":
            joint = rows[:, :, None] * matrix  # present state and next state
            close_to(table.p_reversal_up[:n], joint[:, [0, 0, 1], [1, 2, 2]].sum(1), 1e-9)
            close_to(table.p_reversal_down[:n], joint[:, [1, 2, 2], [0, 0, 1]].sum(1), 1e-9)
            close_to(table.p_continue[:n], joint[:, [0, 1, 2], [0, 1, 2]].sum(1), 1e-9)
        if name != "macro":
            state = pd.Series(rows.argmax(1))
            close_to(
                table[f"age_{name}"][:n],
                (state.groupby((state != state.shift()).cumsum()).cumcount() / 100).clip(upper=1),
            )


# the context, by a slow loop over bars


def start_of_context(t, context):
    "The clock hour, the day or the Monday that a bar belongs to."
    if context == "1Hour":
        return t.floor("h")
    days = t.day_of_week if context == "1Week" else 0
    return t.normalize() - pd.Timedelta(days=days)


def steps_in_context(timeframe, context, asset_class):
    "Bars in one context bar; an exchange is open for 6.5 hours and five days."
    crypto = asset_class == "crypto"
    return {
        ("15Min", "1Hour"): 4,
        ("5Min", "1Hour"): 12,
        ("1Hour", "1Day"): 24 if crypto else 7,
        ("1Day", "1Week"): 7 if crypto else 5,
    }[timeframe, context]


def slow_context(bars, timeframe, context, asset_class):
    "The seven columns from their definition, one bar at a time; `context` is 1Hour, 1Day or 1Week."
    step = pd.Timedelta({"5Min": "5min", "15Min": "15min", "1Hour": "1h", "1Day": "1D"}[timeframe])
    local = (
        bars.index
        if asset_class == "crypto" or timeframe == "1Day"
        else bars.index.tz_convert("America/New_York")
    )
    dates, rows = np.array(local.date), []
    day_end = {
        date: (pd.Timestamp("13:00" if (local[dates == date].hour.max() < 13) else "16:00").time())
        for date in np.unique(dates)
    }
    r = steps_in_context(timeframe, context, asset_class)
    o, h, low, c = (bars[name].to_numpy() for name in ("open", "high", "low", "close"))
    sessions = asset_class == "equity" and context == "1Hour"
    group_start = [start_of_context(t, context) for t in local]
    day_open = pd.Timedelta("9h30min")
    for i, t in enumerate(local):
        closes = (
            pd.Timestamp.combine(t.date(), day_end[t.date()]).tz_localize(t.tz)
            if asset_class == "equity" and timeframe != "1Day"
            else None
        )
        known = t + step if closes is None else min(t + step, closes)

        def over(g):
            if context == "1Week":
                return g + pd.Timedelta(days=5 if asset_class == "equity" else 7)
            if context == "1Hour":
                return g + pd.Timedelta("1h")
            return (
                g + pd.Timedelta("1D")
                if asset_class == "crypto"
                else pd.Timestamp.combine(g.date(), day_end[g.date()]).tz_localize(g.tz)
            )

        first = i
        while (
            first > 0
            and (dates[first - 1] == dates[i] if sessions else True)
            and (sessions or i - first < 40 * r)
        ):
            first -= 1
        begins = first == 0 or sessions
        returns = [
            (c[j] / c[j - 1] - 1) if j > first or not begins else c[j] / o[j] - 1
            for j in range(max(first, 1) if not begins else first, i + 1)
        ]
        returns = dict(zip(range(i + 1 - len(returns), i + 1), returns))
        complete = [g for g in group_start[first : i + 1] if over(g) <= known]
        row = [0.0] * 7
        if complete:
            members = [j for j in range(first, i + 1) if group_start[j] == complete[-1]]
            row[0] = c[members[-1]] / o[members[0]] - 1
            row[1] = np.std([returns[j] for j in members])
            row[5] = (h[members].max() - low[members].min()) / c[members[-1]]
        if i - first >= 4 * r:
            row[2] = c[i] / c[i - 4 * r] - 1
            row[4] = np.mean([c[j] > c[j - 1] for j in range(i - 4 * r + 1, i + 1)])
        if i - first >= 2 * r:
            row[3] = (c[i] / c[i - r] - 1) - (c[i - r] / c[i - 2 * r] - 1)
        if context == "1Hour":
            row[6] = (known - group_start[i]) / pd.Timedelta("1h")
        elif context == "1Week":
            row[6] = (t.day_of_week + 1) / r
        elif asset_class == "crypto":
            row[6] = (t.hour + 1) / 24
        else:
            row[6] = (known - t.normalize() - day_open) / (closes - t.normalize() - day_open)
        rows.append(row)
    return np.array(rows)


def context_of(bars, timeframe, asset_class):
    "The seven columns; they need no chains, so any fit of the right kind serves."
    f = fitted("crypto")
    fit = FeatureFit(
        "5.6.0",
        timeframe,
        asset_class,
        features.CONTEXTS[timeframe],
        f.chains,
        f.shift,
        f.scale,
        f.first,
        f.last,
        f.bars,
        0.0,
    )
    return feature_table(bars, "5.6.0", fit, timeframe, asset_class)[list(BLOCKS["hourly_context"].columns)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "timeframe, asset_class, start, end",
    [
        ("15Min", "equity", "2024-03-04", "2024-03-20"),  # New York moves its clocks on 10 March
        ("15Min", "equity", "2024-10-28", "2024-12-04"),  # and on 3 November; 29 November is a half day
        ("5Min", "equity", "2024-11-27", "2024-12-03"),
        ("15Min", "crypto", "2024-03-08", "2024-03-14"),
        ("5Min", "crypto", "2024-03-08", "2024-03-10"),
        ("1Hour", "equity", "2024-10-28", "2024-12-04"),
        ("1Hour", "crypto", "2024-03-01", "2024-03-20"),
        ("1Day", "equity", "2024-01-01", "2024-07-01"),
        ("1Day", "crypto", "2024-01-01", "2024-05-01"),
    ],
)
def test_context_equals_a_slow_loop(timeframe, asset_class, start, end):
    bars = simulated(asset_class, timeframe, start, end)
    expected = slow_context(bars, timeframe, features.CONTEXTS[timeframe], asset_class)
    close_to(context_of(bars, timeframe, asset_class), expected, 1e-12)
    assert (np.abs(expected[:, [0, 1, 5]]).max(0) > 0).all()  # something was compared


def test_context_on_real_bars_follows_the_clock(real_bars_folder):
    "SPY, 2024: half days on 3 July, 29 November, 24 December, and a change of clocks on 3 November."
    bars = real(real_bars_folder, "SPY", "15Min", "equity")
    bars = bars["2024-06-28":"2024-07-12"], bars["2024-10-25":"2024-12-31"]
    for span in bars:
        values = context_of(span, "15Min", "equity")
        close_to(values, slow_context(span, "15Min", "1Hour", "equity"), 1e-12)
        minutes = span.index.tz_convert("America/New_York").minute
        close_to(values.position_in_hour, (minutes + 15) / 60)
    local = bars[1].index.tz_convert("America/New_York")
    assert (local.date == pd.Timestamp("2024-11-29").date()).sum() == 14


def test_context_is_fresh_and_not_early():
    "The bar that closes at 11:00 sees 10:00-11:00, the one before does not; a change shows at once."
    bars = simulated("equity", "15Min", "2024-01-02", "2024-01-06")
    local = bars.index.tz_convert("America/New_York")
    at = {(t.date(), t.hour, t.minute): i for i, t in enumerate(local)}
    day = local[-1].date()
    values = context_of(bars, "15Min", "equity")
    hour = bars.iloc[at[day, 10, 0] : at[day, 10, 45] + 1]
    whole = hour.close.iloc[-1] / hour.open.iloc[0] - 1
    assert values.h1_return.iloc[at[day, 10, 45]] == pytest.approx(
        whole, abs=1e-15
    ) and values.h1_return.iloc[at[day, 11, 30]] == pytest.approx(whole, abs=1e-15)
    short = bars.iloc[at[day, 9, 30] : at[day, 9, 45] + 1]
    assert values.h1_return.iloc[at[day, 10, 30]] == pytest.approx(
        short.close.iloc[-1] / short.open.iloc[0] - 1, abs=1e-15
    )
    assert values.iloc[at[day, 9, 30]].tolist()[:6] == [0.0] * 6


def test_context_never_crosses_a_session():
    bars = simulated("equity", "15Min", "2024-11-18", "2024-12-04")
    dates = bars.index.tz_convert("America/New_York").date
    values = context_of(bars, "15Min", "equity")
    for day in np.unique(dates)[1:]:
        changed = bars.copy()
        changed[dates < day] *= np.random.default_rng(1).uniform(0.5, 2, (int((dates < day).sum()), 5))
        assert context_of(changed, "15Min", "equity")[dates == day].equals(values[dates == day])
        assert not context_of(changed, "15Min", "equity")[dates < day].equals(values[dates < day])


def test_other_contexts_are_checked():
    bars = simulated("crypto")[:800]
    assert fit_features(bars, "5.6.0", "15Min", "crypto", context="4Hour").context == "4Hour"
    for wrong in ("5Min", "15Min", "1Week"):
        with pytest.raises(InputError, match="context"):
            fit_features(bars, "5.6.0", "15Min", "crypto", context=wrong)


# nothing from the future


def leaks(bars, version, fit, timeframe, asset_class, cuts):
    "How many of the changes {NaN, noise, truncation} after the cuts move a bit at or before them."
    known, found = feature_table(bars, version, fit, timeframe, asset_class).to_numpy(), 0
    for cut in cuts:
        noise = bars.copy()
        noise.iloc[cut + 1 :] *= np.random.default_rng(cut).uniform(0.2, 5.0, (len(bars) - cut - 1, 5))
        void = bars.copy()
        void.iloc[cut + 1 :] = np.nan
        for changed in (void, noise, bars.iloc[: cut + 1]):
            rows = feature_table(changed, version, fit, timeframe, asset_class).to_numpy()[: cut + 1]
            found += not np.array_equal(rows, known[: cut + 1])
    return found


@pytest.mark.parametrize("market", ["crypto", "equity"])
@pytest.mark.parametrize("version", DISTINCT)
def test_no_lookahead(version, market):
    bars = simulated(market)[:3600]
    cuts = np.random.default_rng(0).integers(3000, len(bars) - 1, 5)
    assert leaks(bars, version, fitted(market, version), "15Min", market, cuts) == 0


@pytest.mark.parametrize(
    "path, timeframe, asset_class",
    [
        ("BTC-USDT", "15Min", "crypto"),
        ("SPY", "15Min", "equity"),
        ("SPY", "1Day", "equity"),
        ("TSLA", "5Min", "equity"),
    ],
)
def test_no_lookahead_on_real_bars(real_bars_folder, path, timeframe, asset_class):
    bars = real(real_bars_folder, path, timeframe, asset_class)[:2000]
    split = 1300
    cuts = np.random.default_rng(1).integers(split, len(bars) - 1, 5)
    for version in ("5.3.0", "5.6.0"):
        assert (
            leaks(
                bars,
                version,
                fit_features(bars[:split], version, timeframe, asset_class),
                timeframe,
                asset_class,
                cuts,
            )
            == 0
        )


@pytest.mark.slow
@pytest.mark.parametrize("block", MARKET_BLOCKS)
def test_a_planted_shift_is_caught_in_every_block(block, monkeypatch):
    version = next(v for v in DISTINCT if block in LAYOUTS[v].blocks)
    fit, bars, honest = fitted("crypto", version), simulated("crypto")[:3600], features.BLOCK_FUNCTIONS[block]
    assert leaks(bars, version, fit, "15Min", "crypto", [3300, 3501]) == 0
    monkeypatch.setitem(
        features.BLOCK_FUNCTIONS, block, lambda s: [np.append(c[1:], c[-1]) for c in honest(s)]
    )
    assert leaks(bars, version, fit, "15Min", "crypto", [3300, 3501]) > 0


# segments, tails, markov


def test_segments_stand_alone():
    "A table over a gap is the tables of its two sides, one below the other, in every layout."
    bars = simulated("crypto")
    left, right = bars[:1500], bars[1510:3000]  # two and a half hours are missing
    for version in DISTINCT:
        fit = fitted("crypto", version)
        apart = pd.concat([table_of(left, version, fit), table_of(right, version, fit)])
        assert table_of(pd.concat([left, right]), version, fit).equals(apart)
        assert not table_of(bars[:3000], version, fit).loc[right.index].equals(apart.loc[right.index])
    assert apart.loc[right.index[0], ["returns", "log_returns", "volatility", "momentum"]].eq(0).all()


def tail_difference(bars, version, fit, timeframe, asset_class, ends):
    layout, table = get_layout(version), feature_table(bars, version, fit, timeframe, asset_class)
    rows = [
        feature_table(bars[end - layout.min_history : end], version, fit, timeframe, asset_class).iloc[-1]
        - table.iloc[end - 1]
        for end in ends
    ]
    return pd.DataFrame(rows).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, timeframe, asset_class",
    [
        ("BTC-USDT", "15Min", "crypto"),
        ("ETH-USDT", "1Min", "crypto"),
        ("SPY", "15Min", "equity"),
        ("SPY", "5Min", "equity"),
        ("QQQ", "1Day", "equity"),
    ],
)
def test_a_tail_of_min_history_bars_is_enough_on_real_bars(real_bars_folder, path, timeframe, asset_class):
    bars = real(real_bars_folder, path, timeframe, asset_class)[:14_000]
    split, segment = 1300, bar_clock(bars.index, timeframe, asset_class).segment
    ends = [
        e
        for e in np.random.default_rng(0).integers(split, len(bars), 20)
        if segment[e - 600] == segment[e - 1]
    ]
    for version in ("5.3.0", "5.6.0"):
        difference = tail_difference(
            bars,
            version,
            fit_features(bars[:split], version, timeframe, asset_class),
            timeframe,
            asset_class,
            ends,
        )
        print(
            f"{path} {timeframe} {version}: {len(ends)} tails, largest difference "
            f"{difference.max():.1e} in {difference.idxmax()}"
        )
        assert len(ends) > 10 and difference.max() <= 1e-8


def test_a_shorter_tail_is_not_enough():
    "The comparison is worth something: 150 bars give other rows."
    bars = simulated("crypto")[:4000]
    table, tail = table_of(bars, "5.6.0", fitted("crypto")), table_of(bars[-150:], "5.6.0", fitted("crypto"))
    assert (tail.iloc[-1] - table.iloc[-1]).abs().max() > 1e-4


def test_min_history_is_verified_when_fitting(monkeypatch):
    monkeypatch.setitem(
        features.LAYOUTS,
        "5.6.0",
        features.LAYOUTS["5.6.0"].__class__("5.6.0", LAYOUTS["5.6.0"].blocks, min_history=120),
    )
    with pytest.raises(InputError, match="not enough"):
        fit_features(simulated("crypto")[:3000], "5.6.0", "15Min", "crypto")


@pytest.mark.parametrize(
    "path, asset_class",
    [("BTC-USDT", "crypto"), ("ETH-USDT", "crypto"), ("SPY", "equity"), ("TSLA", "equity")],
)
def test_markov_columns_move_and_sum_to_one_on_real_bars(real_bars_folder, path, asset_class):
    bars = real(real_bars_folder, path, "15Min", asset_class)[:6000]
    table = feature_table(
        bars, "5.3.0", fit_features(bars[:2500], "5.3.0", "15Min", asset_class), "15Min", asset_class
    )
    for chain in ("volatility", "trend", "momentum", "macro"):
        close_to(table[[f"{state}_{chain}" for state in ("low", "medium", "high")]].sum(axis=1), 1, 1e-12)
    close_to(table[list(BLOCKS["reversal"].columns)].sum(axis=1), 1, 1e-12)
    columns, week = (
        [*BLOCKS["markov"].columns, *BLOCKS["reversal"].columns, *BLOCKS["regime_bars"].columns],
        table.iloc[600:].groupby(pd.Grouper(freq="W")),
    )
    bars_in_week = week.size()
    spread = (week.max() - week.min())[columns][bars_in_week >= 100]
    assert len(spread) >= 2 and spread.min().min() > 0  # no column stands still over any week


def test_fit_uses_the_training_span_only_and_is_deterministic():
    bars = simulated("crypto")
    a, b = (fit_features(x, "5.3.0", "15Min", "crypto").to_state() for x in (bars[:2500], bars[:2500].copy()))
    assert a == b
    assert fit_features(bars[:2600], "5.3.0", "15Min", "crypto").to_state()["chains"] != a["chains"]


# finite, whatever comes


def flat(n, price=100.0, volume=0.0, start="2024-01-01", frequency="15min"):
    index = pd.date_range(start, periods=n, freq=frequency, tz="UTC", name="timestamp")
    return pd.DataFrame(
        {"open": price, "high": price, "low": price, "close": price, "volume": volume}, index=index
    )


def halted():
    bars = simulated("crypto")[:1500].copy()
    bars.iloc[700:1300] = [*[bars.close.iloc[699]] * 4, 0.0]
    return bars


DEGENERATE = {
    "flat": lambda: flat(800),
    "flat 0.1": lambda: flat(800, 0.1),
    "tiny": lambda: simulated("crypto")[:900] * [1e-10, 1e-10, 1e-10, 1e-10, 1e12],
    "huge": lambda: simulated("crypto")[:900] * 1e8,
    "zero volume": lambda: simulated("crypto")[:900].assign(volume=0.0),
    "halt": halted,
    "one bar": lambda: flat(1),
    "two bars": lambda: flat(2),
    "none": lambda: flat(0),
    "one-bar segments": lambda: simulated("crypto")[:900:8],
    "one price, then another": lambda: pd.concat(
        [flat(400), flat(400, 101.0, 5.0, start="2024-01-05 04:00")]
    ),
    "straight up": lambda: flat(900).mul(1.001 ** np.arange(900), axis=0),
    "straight down": lambda: flat(900).mul(0.999 ** np.arange(900), axis=0),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("version", ["5.3.0", "5.6.0"])
def test_always_finite(case, version):
    bars = DEGENERATE[case]()
    table = table_of(bars, version, fitted("crypto", version))
    assert len(table) == len(bars) and np.isfinite(table.to_numpy()).all()
    bounded = [*BLOCKS["markov"].columns, "rsi", "rsi_7", "stoch_k", "adx", "plus_di"]
    assert ((table[bounded] >= -1e-9) & (table[bounded] <= 1 + 1e-9)).all().all()


def test_one_bar_sessions_and_early_closes_are_finite():
    bars = simulated("equity", "15Min", "2024-11-25", "2025-01-10")
    dates = pd.Series(bars.index.tz_convert("America/New_York").date, bars.index)
    for span in (bars[~dates.duplicated()], bars[~dates.duplicated(keep="last")], bars):
        table = table_of(span, "5.6.0", fitted("equity"), asset_class="equity")
        assert np.isfinite(table.to_numpy()).all()
    assert (
        table_of(bars[~dates.duplicated()], "5.6.0", fitted("equity"), asset_class="equity")[
            list(BLOCKS["hourly_context"].columns)[:5]
        ]
        .eq(0)
        .all()
        .all()
    )


def test_every_length_from_one_bar_on():
    bars = simulated("crypto")
    for n in [*range(1, 60), 100, 101, 200, 201]:
        for version in ("5.3.0", "5.6.0"):
            assert np.isfinite(table_of(bars[:n], version, fitted("crypto", version)).to_numpy()).all()


@pytest.mark.parametrize("price", [100.0, 0.1, 33.33, 1.7e-5])
def test_flat_prices_are_neutral_and_can_be_fitted(price):
    fit = fit_features(flat(800, price), "5.3.0", "15Min", "crypto")
    assert np.isfinite(fit.shift).all() and np.isfinite(fit.scale).all() and (fit.scale > 0).all()
    assert np.isfinite(
        features.chain_observations(segments_of(flat(800, price), "15Min", "crypto", None)[0])[200:]
    ).all()
    row = table_of(flat(800, price), "5.3.0", fit).iloc[-1]
    neutral = {
        "norm_price": 0,
        "returns": 0,
        "volatility": 0,
        "rsi": 0.5,
        "rsi_7": 0.5,
        "close_location": 0,
        "stoch_k": 0.5,
        "stoch_d": 0.5,
        "bb_percent_b": 0.5,
        "cci": 0,
        "williams_r": -0.5,
        "adx": 0,
        "atr_pct": 0,
        "zscore_20": 0,
        "zscore_100": 0,
        "volume_proxy": 0,
    }
    for name, value in neutral.items():
        assert row[name] == pytest.approx(value, abs=1e-12), name


def test_a_long_halt_ends_neutral_and_without_a_jump_to_oversold():
    table = table_of(halted(), "5.3.0", plain(fitted("crypto"), "5.3.0"))
    assert table.low_volatility.iloc[760:1300].min() > 0.99  # no movement at all is low volatility
    assert (
        table.rsi.iloc[700:1300].min() > 0.2
        and (table.stoch_k.iloc[720:1300] == 0.5).all()
        and (table.williams_r.iloc[720:1300] == -0.5).all()
    )


@pytest.mark.slow
def test_a_halt_is_low_volatility_on_real_bars(real_bars_folder):
    for path, asset_class in (
        ("BTC-USDT", "crypto"),
        ("XRP-USDT", "crypto"),
        ("SPY", "equity"),
        ("TSLA", "equity"),
    ):
        bars = real(real_bars_folder, path, "15Min", asset_class)[:3600]
        fit = fit_features(bars[:2500], "5.5.0", "15Min", asset_class)
        bars.iloc[3000:3300] = [*[bars.close.iloc[2999]] * 4, 0.0]
        assert (
            table_of(bars, "5.5.0", fit, asset_class=asset_class).low_volatility.iloc[3040:3300].min() > 0.95
        )


def test_the_currency_does_not_matter():
    "Prices in units 2^80 times as large give the same bits: no threshold, TA-Lib's included, is a price."
    bars = simulated("crypto")[:900]
    for version in ("5.3.0", "5.6.0"):
        fit = fitted("crypto", version)
        assert table_of(bars.mul([2.0**-80] * 4 + [1.0], axis=1), version, fit).equals(
            table_of(bars, version, fit)
        )


# the fit


def test_scales_are_about_one_on_the_training_span():
    for market, version in (("crypto", "5.3.0"), ("equity", "5.6.0")):
        layout, fit = get_layout(version), fitted(market, version)
        table = table_of(simulated(market)[:3000], version, fit, asset_class=market)
        where = [layout.columns.index(c) for c in layout.market_columns]
        scaled = (table.iloc[600:] - fit.shift[where]) * fit.scale[where]
        moving = [
            c for c in layout.market_columns if c not in (*BLOCKS["temporal"].columns, "position_in_hour")
        ]
        close_to(scaled[moving].mean(), 0, 0.02)
        close_to(scaled[moving].std(), 1, 0.02)
        assert scaled.abs().mean().max() < 2
        calendar = [
            layout.columns.index(c)
            for c in layout.columns
            if c not in moving and c not in layout.account_columns
        ]
        assert len(calendar) >= 7 and (fit.shift[calendar] == 0).all() and (fit.scale[calendar] == 1).all()
        account = [layout.columns.index(c) for c in layout.account_columns]
        assert (
            (fit.shift[account] == 0).all()
            and (fit.scale[account] == 1).all()
            and len(fit.shift) == layout.n_features
        )


def test_a_fit_survives_json_bit_for_bit_and_foreign_ones_are_refused():
    fit = fitted("crypto")
    state = json.loads(json.dumps(fit.to_state()))
    assert FeatureFit.from_state(state).to_state() == fit.to_state()
    bad = [
        {**state, "version": "5.5.0"},
        {**state, "version": "9.9.9"},
        {**state, "layout_hash": "0" * 64},
        {**state, "shift": state["shift"][:-1]},
        {**state, "extra": 1},
        {k: v for k, v in state.items() if k != "chains"},
        {**state, "scale": [float("nan")] * 58},
        {**state, "columns": state["columns"][::-1]},
        [],
        None,
    ]
    for wrong in bad:
        with pytest.raises(InputError):
            FeatureFit.from_state(wrong)


def test_wrong_input_is_named():
    bars, fit = simulated("crypto")[:700], fitted("crypto")
    for call, words in [
        (lambda: table_of(bars, "5.60", fit), "did you mean '5.6.0'"),
        (lambda: table_of(bars, "5.5.0", fit), "layout 5.6.0"),
        (lambda: feature_table(bars, "5.6.0", fit, "5Min", "crypto"), "15Min"),
        (lambda: table_of(bars, "5.6.0", None), "fit_features"),
        (lambda: table_of(bars.drop(columns="volume"), "5.6.0", fit), "volume"),
        (lambda: table_of(bars[::-1], "5.6.0", fit), "sorted"),
        (lambda: fit_features(bars[:650], "5.6.0", "15Min", "crypto"), "needs 700"),
        (lambda: fit_features(bars.assign(close=np.nan), "5.6.0", "15Min", "crypto"), "not finite"),
    ]:
        with pytest.raises(InputError, match=words):
            call()


# cost


def test_importing_needs_numpy_alone():
    code = (
        "import sys, trading_lib.features; bad = {'pandas', 'talib', 'torch', 'exchange_calendars', "
        "'pyarrow'} & set(sys.modules); sys.exit(', '.join(bad))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
