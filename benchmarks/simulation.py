"""Simulated markets: seconds per history on one core, by recipe, asset class and timeframe; where time goes.

    python benchmarks/simulation.py    # fails if a year of 15Min crypto bars takes over half a second

Ratios between rows come from one run on one machine; absolute seconds depend on it.
"""

import os
import platform
import sys
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
from timing import best_of, print_profile

from trading_lib.data.simulation import RECIPES, simulate_market

YEAR = ("2022-01-01", "2023-01-01")
SPANS = {
    "1Min": ("2022-01-01", "2022-04-01"),
    "5Min": YEAR,
    "15Min": YEAR,
    "1Hour": ("2015-01-01", "2023-01-01"),
    "4Hour": ("2000-01-01", "2023-01-01"),
    "1Day": ("1980-01-01", "2023-01-01"),
}
BUDGET = 0.5  # seconds for a year of 15Min crypto bars: 35,040


def main():
    print(f"{platform.processor() or platform.machine()}, one core, shortest of 5")
    print(f"Python {platform.python_version()}, numpy {np.__version__}, pandas {pd.__version__}")
    print(f"{'':8} {'':9} {'':>7} " + " ".join(f"{recipe:>25}" for recipe in RECIPES))
    slowest = 0.0
    for asset_class, symbol in (("crypto", "SIM-USD"), ("equity", "SIMA")):
        for timeframe, span in SPANS.items():
            bars = len(simulate_market(symbol, timeframe, *span)[0])  # builds the exchange's calendar, once
            cells = []
            for recipe in RECIPES:
                simulate = partial(simulate_market, symbol, timeframe, *span, recipe=recipe)
                seconds = best_of(simulate, 5)
                cells.append(f"{seconds:>7.3f} s {bars / seconds:>9,.0f} bars/s")
                if (asset_class, timeframe) == ("crypto", "15Min"):
                    slowest = max(slowest, seconds)
            print(f"{asset_class:8} {timeframe:>5} {bars:>11,} " + " ".join(cells))
    print_profile("lifelike, 35,040 bars", simulate_market, "SIM-USD", "15Min", *YEAR, recipe="lifelike")
    print(f"\na year of 15Min bars: {slowest:.3f} s at most, budget {BUDGET} s")
    return int(slowest > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
