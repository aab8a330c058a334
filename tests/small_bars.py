"""Bars of a random walk, and the same with one value or one time replaced."""

import numpy as np
import pandas as pd

from trading_lib.sessions import expected_labels


def wandering_bars(index, seed=0):
    "Bars of a random walk with a proper range."
    random = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(0.002 * random.standard_normal(len(index))))
    open_ = np.concatenate([[100.0], close[:-1]]) * (1 + 0.0002 * random.standard_normal(len(index)))
    spread = 1 + 0.001 * random.random((2, len(index)))
    return pd.DataFrame(
        {
            "open": open_,
            "high": np.maximum(open_, close) * spread[0],
            "low": np.minimum(open_, close) / spread[1],
            "close": close,
            "volume": random.integers(1, 1000, len(index)).astype(float),
        },
        index=index,
    )


def equity_bars(start="2024-11-04", end="2024-12-07", timeframe="15Min"):
    return wandering_bars(expected_labels(timeframe, "equity", start, end))


def crypto_bars(start="2024-01-01", end="2024-01-08", timeframe="15Min"):
    return wandering_bars(expected_labels(timeframe, "crypto", start, end))


def with_value(bars, column, value, row=30):
    bars = bars.copy()
    bars.iloc[row, bars.columns.get_loc(column)] = value
    return bars


def with_label(bars, label, row=30):
    labels = list(bars.index)
    labels[row] = pd.Timestamp(label)
    return bars.set_axis(pd.DatetimeIndex(labels))


EQUITY, CRYPTO = equity_bars(), crypto_bars()
DAILY = equity_bars("2024-01-01", "2024-06-01", "1Day")
