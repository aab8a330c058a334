"""What every market has in common, as numbers: fat tails, sizes that remember, volume that follows them.

Returns of very different markets share a handful of statistical traits, the stylised facts (Cont, 2001). A
simulated market is worth training on as far as it has them too. nbs/explore/simulation.ipynb shows them
beside those of real bars.

The return of a bar is r = ln(close / previous close). The first bar of a segment has none: nobody traded
through the gap. In intraday equities the first bar of a session counts from its own open, and the night has a
fact of its own.

| fact | formula | source |
| --- | --- | --- |
| volatility, skewness, kurtosis | moments of r; a normal distribution has kurtosis 3 | Cont (2001) |
| tail index | 1 / mean of ln(x_i / x_k+1) over the largest hundredth of abs(r); 3 to 5 | Hill (1975) |
| return autocorrelation | of r, one bar later | Cont (2001) |
| size autocorrelation | of abs(r), 1, 20 and 100 bars on: volatility clusters | Ding et al. (1993) |
| leverage | mean over k = 1 … 10 of the correlation of r with abs(r) k bars on | Black (1976) |
| volume and range | correlation of ln(volume) with ln(ln(high / low)) | Karpoff (1987) |
| volume autocorrelation | of ln(volume), one bar on | Lobato and Velasco (2000) |
| variance ratio | of 2 and 16 bars, see `variance_ratio` | Lo and MacKinlay (1988) |
| range ratio | Parkinson's volatility over that of ln(close / open); 1 on a continuous walk | Parkinson |
| gap share | of the variance, between a close and the next open inside a session | |
| overnight share | of the variance of nights and days together | French and Roll (1986) |
| day edges | mean abs(r) of a session's ends over its middle third | Wood et al. (1985) |
| day spread | largest over smallest such mean, by half hours (crypto: four hours) | |

A history of half a year knows its kurtosis to within a factor of two, and its autocorrelation at 100 bars to
within some hundredths: compare ranges, not digits.
"""

import numpy as np
import pandas as pd

from trading_lib.bars import COLUMNS, BarClock, bar_clock, timeframe_name, timeframe_seconds
from trading_lib.config import InputError

_DAY_PARTS = {"crypto": 6, "equity": 13}  # of a session
_SESSION_SECONDS = {"crypto": 86400, "equity": 23400}
_LEVERAGE_LAGS = range(1, 11)
_TAIL = 0.01  # share of the returns that make the tail
_FEWEST = 500  # bars


# --- returns that cross no gap ------------------------------------------------------------------------------


def _first_of(number: np.ndarray) -> np.ndarray:
    "The first row of every run of equal numbers."
    return np.concatenate([[True], number[1:] != number[:-1]])


def log_returns(
    bars: pd.DataFrame,  # validated bars
    timeframe: str,  # such as "15Min"
    asset_class: str,  # "crypto" or "equity"
) -> np.ndarray:  # one value per bar; NaN where a bar has no return
    "Close-to-close log returns within segments; intraday equities: the night is left out."
    clock = bar_clock(bars.index, timeframe, asset_class)
    open_, close = bars["open"].to_numpy(), bars["close"].to_numpy()
    returns = np.concatenate([[np.nan], np.log(close[1:] / close[:-1])])
    returns[_first_of(clock.segment)] = np.nan
    if asset_class == "equity" and timeframe_name(timeframe) != "1Day":
        morning = _first_of(clock.session)
        returns[morning] = np.log(close / open_)[morning]
    return returns


# --- autocorrelation and the variance ratio -----------------------------------------------------------------


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else 0.0


def autocorrelation(
    values: np.ndarray,  # one per bar, NaN where there is none
    lag: int,  # bars, from 1
    segment: np.ndarray | None = None,  # of each bar, as in `bar_clock`; None: one
    later: np.ndarray | None = None,  # what is looked at `lag` bars later; None: the same values
) -> float:  # in [-1, 1]
    "Correlation of values with those a lag later, over pairs that lie in one segment."
    earlier, later = values[:-lag], (values if later is None else later)[lag:]
    used = np.isfinite(earlier) & np.isfinite(later)
    if segment is not None:
        used &= segment[lag:] == segment[:-lag]
    pairs = int(used.sum())
    if pairs <= 2:
        raise InputError(
            f"autocorrelation: {pairs} pairs are {lag} bars apart in one segment; "
            "take a longer history or a shorter lag"
        )
    return _correlation(earlier[used], later[used])


def variance_ratio(
    returns: np.ndarray,  # one per bar, NaN where there is none
    bars: int,  # q, from 2
    segment: np.ndarray | None = None,  # of each bar; None: one
) -> tuple[float, float]:  # the ratio, and its standard error under no autocorrelation
    """Variance of q-bar returns over q times that of one bar (Lo and MacKinlay, 1988).

    The standard error holds for returns whose volatility comes and goes: with d the returns less their mean,
    its square is the sum over j < q of (2 (q - j) / q)² Σ d_t² d_t-j² / (Σ d_t²)².
    """
    finite = np.isfinite(returns)
    d = np.where(finite, returns - returns[finite].mean(), 0.0)
    segment = np.zeros(len(d), int) if segment is None else segment
    count, total = np.concatenate([[0], finite.cumsum()]), np.concatenate([[0.0], d.cumsum()])
    same = segment[bars - 1 :] == segment[: len(segment) - bars + 1]
    whole = (count[bars:] - count[:-bars] == bars) & same
    n = int(finite.sum())
    if not whole.any() or n <= bars:
        raise InputError(
            f"variance_ratio: no segment holds {bars} returns; take a longer history or fewer bars"
        )
    ratio = ((total[bars:] - total[:-bars])[whole] ** 2).mean() / (1 - bars / n) / bars / ((d @ d) / (n - 1))
    square = d**2

    def delta(j):
        return (square[j:] * square[:-j])[segment[j:] == segment[:-j]].sum() / square.sum() ** 2

    error = np.sqrt(sum((2 * (bars - j) / bars) ** 2 * delta(j) for j in range(1, bars)))
    return float(ratio), float(error)


# --- the facts ----------------------------------------------------------------------------------------------


def stylised_facts(
    bars: pd.DataFrame,  # validated bars, at least 500
    timeframe: str,  # such as "15Min"
    asset_class: str,  # "crypto" or "equity"
) -> dict[str, float]:  # NaN where a fact does not exist: no nights in crypto, no time of day in daily bars
    "The stylised facts of a history, by name; the table at the top has formulas and sources."
    if len(bars) < _FEWEST:
        raise InputError(
            f"stylised_facts: expected at least {_FEWEST} bars, was {len(bars)}; "
            "a shorter history says nothing about tails"
        )
    clock, returns = bar_clock(bars.index, timeframe, asset_class), log_returns(bars, timeframe, asset_class)
    size, segment = np.abs(returns), clock.segment
    facts = _moments(returns[np.isfinite(returns)])
    facts["return_autocorrelation_1"] = autocorrelation(returns, 1, segment)
    for lag in (1, 20, 100):
        facts[f"size_autocorrelation_{lag}"] = autocorrelation(size, lag, segment)
    facts["leverage"] = np.mean([autocorrelation(returns, lag, segment, size) for lag in _LEVERAGE_LAGS])
    facts |= _volume_facts(bars, segment)
    for q in (2, 16):
        facts[f"variance_ratio_{q}"] = variance_ratio(returns, q, segment)[0]
    facts |= _path_facts(bars, returns, clock, timeframe, asset_class)
    facts |= _day_shape(size, clock, timeframe_seconds(timeframe), asset_class)
    return {name: float(value) for name, value in facts.items()}


def _moments(r: np.ndarray) -> dict[str, float]:
    "Volatility, skewness, kurtosis and the tail."
    if not r.std() > 0:
        raise InputError("stylised_facts: the close never moves; these are no bars of a market")
    d = r - r.mean()
    tail = np.sort(np.abs(r))[::-1][: max(10, int(_TAIL * len(r))) + 1]
    return {
        "volatility": r.std(),
        "skewness": (d**3).mean() / r.std() ** 3,
        "kurtosis": (d**4).mean() / r.std() ** 4,
        "tail_index": 1 / np.log(tail[:-1] / tail[-1]).mean(),
    }


def _volume_facts(bars: pd.DataFrame, segment: np.ndarray) -> dict[str, float]:
    "Volume with ranges, and with itself."
    span = np.log(bars["high"].to_numpy() / bars["low"].to_numpy())
    with np.errstate(divide="ignore"):
        log_volume, log_span = (np.where(x > 0, np.log(x), np.nan) for x in (bars["volume"].to_numpy(), span))
    both = np.isfinite(log_volume) & np.isfinite(log_span)
    return {
        "volume_range_correlation": _correlation(log_volume[both], log_span[both]),
        "volume_autocorrelation_1": autocorrelation(log_volume, 1, segment),
    }


def _path_facts(
    bars: pd.DataFrame, returns: np.ndarray, clock: BarClock, timeframe: str, asset_class: str
) -> dict[str, float]:
    "Ranges, gaps inside a session, and nights."
    open_, high, low, close, _ = (bars[name].to_numpy() for name in COLUMNS)
    before = np.concatenate([[np.nan], np.log(open_[1:] / close[:-1])])
    before[_first_of(clock.segment)] = np.nan
    if asset_class == "crypto":
        inside = np.ones(len(bars), bool)
    elif timeframe_name(timeframe) == "1Day":
        inside = np.zeros(len(bars), bool)
    else:
        inside = ~_first_of(clock.session)
    facts = {
        "range_ratio": np.sqrt(
            (np.log(high / low) ** 2).mean() / (4 * np.log(2)) / (np.log(close / open_) ** 2).mean()
        ),
        "gap_share": np.nan,
        "overnight_share": np.nan,
    }
    if inside.any():
        facts["gap_share"] = np.nanmean(before[inside] ** 2) / np.nanmean(returns[inside] ** 2)
    if asset_class == "equity":
        first = np.flatnonzero(_first_of(clock.session))
        last = np.concatenate([first[1:], [len(open_)]]) - 1
        nights, days = np.nanmean(before[first] ** 2), (np.log(close[last] / open_[first]) ** 2).mean()
        facts["overnight_share"] = nights / (nights + days)
    return facts


def _day_shape(size: np.ndarray, clock: BarClock, seconds: int, asset_class: str) -> dict[str, float]:
    "Edges over middle, and largest over smallest, of the mean size of returns by part of the session."
    parts = _DAY_PARTS[asset_class]
    if seconds > _SESSION_SECONDS[asset_class] / parts:
        return {"day_edges": np.nan, "day_spread": np.nan}
    length = clock.session_close - clock.session_open
    full = length >= np.median(length)  # half days have no middle of the day
    progress = (np.maximum(clock.start, clock.session_open) - clock.session_open) / length
    used, part = np.isfinite(size) & full, np.minimum((progress * parts).astype(int), parts - 1)
    mean = np.bincount(part[used], size[used], parts) / np.bincount(part[used], minlength=parts)
    middle = mean[parts // 3 : parts - parts // 3].mean()
    return {"day_edges": (mean[0] + mean[-1]) / 2 / middle, "day_spread": mean.max() / mean.min()}


# --- simulated beside real ----------------------------------------------------------------------------------


def fidelity_table(
    real: list[dict],  # facts of real symbols, from `stylised_facts`
    simulated: list[dict],  # facts of simulated histories: their mean is judged
    widen: float = 1.0,  # on each side, in units of the range of the real ones
) -> pd.DataFrame:  # fact -> lowest, median, highest (real), simulated, spread over the histories, inside
    "Facts of simulated bars beside the range that real ones span."
    if len(real) < 2 or not simulated:
        raise InputError(
            "fidelity_table: expected two or more real symbols and one simulated history, "
            f"was {len(real)} and {len(simulated)}"
        )
    theirs, ours = pd.DataFrame(real), pd.DataFrame(simulated)[list(real[0])]
    table = pd.DataFrame(
        {
            "lowest": theirs.min(),
            "median": theirs.median(),
            "highest": theirs.max(),
            "simulated": ours.mean(),
            "spread": ours.std(ddof=0),
        }
    ).dropna()
    room = widen * (table["highest"] - table["lowest"])
    table["inside"] = table["simulated"].between(table["lowest"] - room, table["highest"] + room)
    return table.rename_axis("fact")


def return_correlations(
    bars: dict[str, pd.DataFrame],  # symbol -> validated bars
    timeframe: str,  # of all of them
    asset_class: str,  # of all of them
) -> pd.DataFrame:  # symbol × symbol
    "Correlations of returns, over the bars that all symbols have."
    returns = pd.DataFrame(
        {symbol: pd.Series(log_returns(b, timeframe, asset_class), b.index) for symbol, b in bars.items()}
    ).dropna()
    if len(returns) <= 2:
        raise InputError(
            f"return_correlations: {', '.join(bars)} have {len(returns)} bars in common; "
            "choose spans that overlap"
        )
    return returns.corr()
