"""One door for every source."""

import json

import numpy as np
import pandas as pd
import pytest

from trading_lib.config import InputError
from trading_lib.sources import OPTIONS, SOURCES, load_bars, load_with_report


def test_options():
    bars, report = load_with_report(
        "SIM-USD", "15Min", "simulated", start=None, end=None, seed=None, edge=None, path=None, timezone=None
    )
    assert (report["first"], report["last"]) == ("2022-01-01 00:00Z", "2023-12-31 23:45Z") and (
        report["seed"],
        report["edge"],
        report["simulated"],
        report["source"],
    ) == (0, 0.1, True, "simulated")
    assert json.loads(json.dumps(report)) == report
    pd.testing.assert_frame_equal(bars, load_bars("SIM/USD", "15Min"))
    assert not np.allclose(bars.close, load_bars("SIM-USD", "15Min", seed=1).close)
    with pytest.raises(InputError, match="did you mean 'simulated'"):
        load_bars("SIM-USD", "15Min", "simulate")
    with pytest.raises(InputError, match="did you mean 'seed'"):
        load_bars("SIM-USD", "15Min", "simulated", sed=1)
    with pytest.raises(InputError, match="symbol"):
        load_bars("", "15Min")
    with pytest.raises(InputError, match="start before end"):
        load_bars("SIM-USD", "15Min", start="2023-01-01", end="2022-01-01")
    assert set(SOURCES) == {"simulated", "files", "alpaca"} and {
        "start",
        "end",
        "seed",
        "edge",
        "path",
        "timezone",
    } <= set(OPTIONS)
