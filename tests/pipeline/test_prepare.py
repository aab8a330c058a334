"The prepare stage on files of your own: whose they are, what a symbol is, and advice that helps."

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from trading_lib.bars import COLUMNS, write_bars
from trading_lib.config import InputError, parse_parameters
from trading_lib.data.simulation import simulate_bars
from trading_lib.pipeline.prepare import prepare_symbol
from trading_lib.pipeline.project import artefacts, asset_class_for, prepared_market

ROOT = Path(__file__).resolve().parents[2]
DAYS = simulate_bars("SIMA", "1Day", "2015-01-01", "2021-01-01", 0, 0.0)  # 1510 bars


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name in ("params.yaml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "data" / "raw").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(symbol, symbols=None, window=100, bars=DAYS, **data):
    parameters = parse_parameters(
        {
            "symbols": symbols or [symbol],
            "features": {"window": window},
            "data": {"source": "files", "timeframe": "1Day"} | data,
        }
    )
    return parameters, *prepare_symbol(parameters, symbol, artefacts(parameters, symbol))


def refused(*arguments, **options):
    with pytest.raises(InputError) as e:
        prepare(*arguments, **options)
    return str(e.value)


def test_one_file_is_of_one_symbol(project):
    for name in ("SPY", "QQQ"):
        write_bars(DAYS, project / "data" / "raw" / f"{name}.parquet")
    for path in ("data/raw/SPY.parquet", str(project / "data/raw/SPY.parquet")):
        for symbol in ("SPY", "QQQ"):
            assert f"data.path: {path} is one file, and symbols lists SPY, QQQ" in refused(
                symbol, ["SPY", "QQQ"], path=path
            )
        assert prepare("SPY", path=path)[3]["fingerprint"]["bars"] == len(DAYS)
    assert prepare("QQQ", ["SPY", "QQQ"])[3]["checks"]["file"] == "QQQ.parquet"


def test_paths_of_parameters_may_begin_at_home(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project / "at home"))
    write_bars(DAYS, project / "at home" / "my bars" / "SPY.csv")
    assert (
        prepare("SPY", path="~/my bars")[3]["fingerprint"]["bars"]
        == prepare("SPY", path="at home/my bars")[3]["fingerprint"]["bars"]
        == len(DAYS)
    )
    assert "home folder" in refused("SPY", path="~nobody-of-this-name/bars")


def test_a_share_class_with_a_dash_is_what_it_is_said_to_be(project):
    write_bars(DAYS, project / "data" / "raw" / "BRK-B.csv")
    assert "BRK-B is read as crypto" in refused("BRK-B")
    parameters, bars, market, report = prepare("BRK-B", asset_classes={"BRK-B": "equity"})
    assert (
        market.asset_class
        == report["asset_class"]
        == report["checks"]["asset_class"]
        == asset_class_for(parameters, "BRK-B")
        == "equity"
        and report["checks"]["segments"] == 1
    )
    same, paths = (
        parse_parameters({"symbols": ["BRK-B"], "data": {"source": "files", "timeframe": "1Day"}}),
        artefacts(parameters, "BRK-B"),
    )
    assert prepared_market(parameters, "BRK-B", paths).asset_class == "equity"
    with pytest.raises(
        InputError,
        match=(
            "was prepared as equity, and BRK-B is crypto; run `trading-lib stage prepare --symbol BRK-B` "
            "again"
        ),
    ):
        prepared_market(same, "BRK-B", paths)


def test_a_true_move_passes_for_its_symbol_on_its_date(project):
    gapped = DAYS.assign(
        **{c: DAYS[c] * np.where(np.arange(len(DAYS)) >= 700, 0.5, 1.0) for c in COLUMNS[:4]}
    )
    day = f"{DAYS.index[700]:%Y-%m-%d}"
    for name in ("EARN", "SPY"):
        write_bars(gapped, project / "data" / "raw" / f"{name}.csv")
    for allowed in (True, {"EARN": [day]}, {"EARN": True}, [day]):
        assert prepare("EARN", allow_steps=allowed)[3]["checks"]["splits"][0]["date"] == day
    for refuse in (False, {"SPY": [day]}, {"EARN": ["2020-01-02"]}, ["2020-01-02"]):
        assert f"2-for-1 split on {day}" in refused("EARN", allow_steps=refuse)


@pytest.mark.parametrize(
    "bars, window, smaller",
    [(900, 100, None), (900, 20, None), (1200, 300, 240), (1200, 1000, 240), (999, 100, None)],
)
def test_a_smaller_window_is_advised_only_where_it_helps(project, bars, window, smaller):
    "700 bars for training are needed whatever the window; 70 % of the bars are for training."
    write_bars(DAYS[:bars], project / "data" / "raw" / "SPY.csv")
    said = refused("SPY", window=window)
    advised = re.search(r"a features\.window of at most (\d+)$", said)
    assert "use more history or a shorter bar" in said and (int(advised[1]) if advised else None) == smaller
    if smaller:
        assert prepare("SPY", window=smaller)[3]["fingerprint"]["bars"] == bars and "of at most" in refused(
            "SPY", window=smaller + 1
        )


def test_stretches_between_gaps_are_not_lengthened_by_a_smaller_window(project):
    coins = simulate_bars("SIM-USD", "15Min", "2023-01-01", "2023-02-01", 0, 0.0)
    coins = coins[coins.index.hour < 20]  # 80 bars a day, and a gap
    write_bars(coins, project / "data" / "raw" / "ABC-USD.csv")
    for window in (100, 10):
        said = refused("ABC-USD", window=window, timeframe="15Min")
        assert "80 bars" in said and "use more history or a shorter" in said and "window" not in said
