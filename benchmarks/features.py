"""Feature tables and live observations: seconds per layout on one core, and where the time goes.

    python benchmarks/features.py     # tables of one and of four years of 15Min crypto, live build, profile

Ratios between rows come from one run on one machine; absolute seconds depend on it.
"""

# The number of threads is set before numpy is imported.
# ruff: noqa: E402
import os
import platform
import time
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

torch.set_num_threads(1)

from timing import best_of, print_profile

from trading_lib.account import AccountState
from trading_lib.builder import InferenceObservationBuilder
from trading_lib.features import feature_table, fit_features
from trading_lib.market.layouts import LAYOUTS
from trading_lib.sources import simulate_bars

SIZES = (35_040, 140_000)
MOST_YEAR, MOST_LIVE = 1.0, 0.02  # seconds, of 5.6.0: its table of a year, and an observation of a live tail


def main():
    bars = simulate_bars("SIM-USD", "15Min", "2019-01-01", "2023-01-01", seed=0, edge=0.0)
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy "
        f"{np.__version__}, torch {torch.__version__}, one core, shortest of 3"
    )
    print(
        f"{'layout':8} {'columns':>7} "
        + " ".join(f"{n:>9,} bars" for n in SIZES)
        + f" {'live build':>14} {'fit 25,000 bars':>16}"
    )
    for version in ("2.3.0", "2.6.0", "2.7.0", "5.3.0", "5.5.0", "5.6.0"):
        layout = LAYOUTS[version]
        begin = time.perf_counter()
        fit = fit_features(bars.iloc[:25_000], version, "15Min", "crypto")
        fitting = time.perf_counter() - begin
        of_bars = partial(feature_table, version=version, fit=fit, timeframe="15Min", asset_class="crypto")
        tables = [best_of(partial(of_bars, bars.iloc[:n]), 3) for n in SIZES]
        builder = InferenceObservationBuilder(version, fit, "15Min", "crypto")
        live = best_of(partial(builder.build, bars.iloc[-layout.min_history :], AccountState.initial()), 20)
        print(
            f"{version:8} {layout.n_features:>7} "
            + " ".join(f"{t:>12.3f} s" for t in tables)
            + f" {1000 * live:>11.1f} ms {fitting:>14.2f} s"
        )
        if version == "5.6.0":
            for name, took, most in (
                ("a year's table", tables[0], MOST_YEAR),
                ("a live observation", live, MOST_LIVE),
            ):
                print(
                    f"{'met   ' if took <= most else 'missed'} {version}: {name} within {most:g} s "
                    f"of one core, is {took:.3f}"
                )
    print_profile(
        f"5.6.0, {SIZES[1]:,} bars", feature_table, bars.iloc[: SIZES[1]], "5.6.0", fit, "15Min", "crypto"
    )


if __name__ == "__main__":
    main()
