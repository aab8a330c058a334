"""Panels from bars: members of the time, names that changed, assets that come and go; and what is refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from trading_lib.config import InputError
from trading_lib.data.membership import read_membership
from trading_lib.data.panels import UNIVERSES, load_panel, panel_from_bars
from trading_lib.portfolio.market import portfolio_market
from trading_lib.portfolio.panel import PortfolioPanel

DAYS = pd.bdate_range("2022-01-03", periods=120, tz="UTC")


def bars(price: float, days=DAYS) -> pd.DataFrame:
    close = price * (1 + 0.01 * np.sin(np.arange(len(days))))
    return pd.DataFrame(
        {"open": close, "high": close, "low": close, "close": close, "volume": 1e6}, index=days
    )


def three(**changes) -> dict:
    return {"AAA": bars(10), "BBB": bars(20), "CCC": bars(30)} | changes


def membership(tmp_path, text: str):
    path = tmp_path / "members.csv"
    path.write_text("symbol,from,to,formerly\n" + text)
    return path


def test_days_are_the_union_and_what_is_missing_stays_missing():
    panel = panel_from_bars(three(BBB=bars(20, DAYS[30:]), CCC=bars(30, DAYS[:-5])))
    assert len(panel.day) == 120 and panel.has_bar.sum(0).tolist() == [120, 90, 115]
    assert np.isnan(panel.close[:30, 1]).all() and np.isnan(panel.volume[-5:, 2]).all()
    assert panel.close[40, 1] == three()["BBB"]["close"].iloc[10]
    assert portfolio_market(panel).can_decide.any()


def test_prices_as_traded_stand_beside_adjusted_ones():
    "A split of 4:1 after day 60: what is 25 today was 100 then."
    raw = bars(10)
    raw.iloc[:60] *= 4
    panel = panel_from_bars(three(), raw=three(AAA=raw))
    assert np.allclose(panel.raw_close[:60, 0], 4 * panel.close[:60, 0], rtol=1e-12)
    assert (panel.raw_close[60:, 0] == panel.close[60:, 0]).all()


@pytest.mark.parametrize(
    "given, words",
    [
        ({"AAA": bars(10)}, "expected 3 to 300 assets, was 1"),
        ({}, "expected 3 to 300 assets, was 0"),
        ({f"A{i}": bars(10) for i in range(301)}, "expected 3 to 300 assets, was 301"),
        (three(BBB=bars(20, DAYS[:3])), "BBB has 3 days of bars, and its scores need 21"),
        (three(**{"BTC-USD": bars(20)}), "mixes equities and crypto (BTC-USD)"),
    ],
)
def test_what_is_no_universe_is_one_clear_line(given, words):
    with pytest.raises(InputError) as error:
        panel_from_bars(given, universe="mine")
    assert words in str(error.value) and "universe mine" in str(error.value) and "\n" not in str(error.value)


def test_members_are_those_of_the_time(tmp_path):
    path = membership(tmp_path, "AAA,2022-01-03,,\nBBB,2022-01-03,2022-03-01,\nCCC,2022-03-01,,\n")
    panel = panel_from_bars(three(), membership=read_membership(path))
    first_of_march = int(np.argmax(panel.day >= pd.Timestamp("2022-03-01", tz="UTC").value))
    assert panel.member[:, 0].all()
    assert panel.member[:first_of_march, 1].all() and not panel.member[first_of_march:, 1].any()
    assert not panel.member[:first_of_march, 2].any() and panel.member[first_of_march:, 2].all()


@pytest.mark.parametrize(
    "what, words",
    [
        ("coer", "did you mean 'core'"),
        (["AAA", "AAA", "BBB"], "AAA is listed more than once"),
        (["AAA", "BBB"], "expected 3 to 300 assets, was 2"),
        (Path("none.csv"), "no such file"),
    ],
)
def test_a_universe_that_nobody_knows_is_named(what, words):
    with pytest.raises(InputError) as error:
        load_panel(what, "files", path="nowhere")
    assert words in str(error.value)


def test_an_empty_membership_is_named(tmp_path):
    with pytest.raises(InputError, match="holds a header and no members"):
        load_panel(membership(tmp_path, ""), "files", path="nowhere")


def test_real_assets_are_no_simulated_ones():
    with pytest.raises(InputError, match="take source files or alpaca, or the universe named simulated"):
        load_panel("core", "simulated")


def test_files_of_a_folder_make_a_universe_and_a_former_name_is_found(tmp_path):
    "META's history lies in a file called FB, which is what it was called then."
    for name in UNIVERSES["expanded"].symbols:
        bars(50).rename_axis("timestamp").reset_index().to_parquet(
            tmp_path / f"{name.replace('META', 'FB')}.parquet"
        )
    panel = load_panel("expanded", "files", path=str(tmp_path))
    assert panel.symbols == UNIVERSES["expanded"].symbols and panel.universe == "expanded"
    meta = panel.has_bar[:, panel.symbols.index("META")]
    renamed = pd.Timestamp("2022-06-09", tz="UTC").value
    assert meta[panel.day < renamed].all() and not meta[panel.day >= renamed].any()
    assert panel.chosen == "2026-11-30" and panel.source == "files"


def test_a_panel_comes_back_from_its_file_to_the_bit(tmp_path):
    panel = panel_from_bars(three(BBB=bars(20, DAYS[30:])))
    back = PortfolioPanel.load(panel.save(tmp_path / "panel.npz"))
    assert back.fingerprint == panel.fingerprint and back.symbols == panel.symbols
    first = (tmp_path / "panel.npz").read_bytes()
    panel.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == first


def test_a_panel_file_with_code_in_it_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "panel.npz"
    np.savez(path, meta=np.array([Attack()], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="is not a panel file"):
        PortfolioPanel.load(path)
    assert not (tmp_path / "ran").exists()


def test_the_real_daily_bars_make_both_universes(real_bars_folder):
    for name, assets in (("core", 3), ("expanded", 12)):
        panel = load_panel(name, "files", path=str(real_bars_folder / "equity" / "1Day"))
        assert len(panel.symbols) == assets and len(panel.day) == 2013
        assert portfolio_market(panel).can_decide.sum() > 1900


def test_raw_prices_go_by_name_and_must_be_there_for_all():
    raw = {name: table * 4 for name, table in reversed(three().items())}
    panel = panel_from_bars(three(), raw=raw)
    assert np.allclose(panel.raw_close, 4 * panel.close, rtol=1e-12)
    with pytest.raises(InputError, match="raw lacks BBB, CCC"):
        panel_from_bars(three(), raw={"AAA": bars(10)})


def test_a_day_without_a_raw_price_takes_the_ratio_of_the_day_before():
    "40 was traded where 10 is the adjusted price: a gap must not show the later split."
    raw = three(AAA=(bars(10) * 4).drop(DAYS[50]))
    panel = panel_from_bars(three(), raw=raw)
    assert panel.raw_close[50, 0] == pytest.approx(4 * panel.close[50, 0], rel=1e-12)


def written(folder, **tables):
    for name, table in tables.items():
        table.rename_axis("timestamp").reset_index().to_parquet(folder / f"{name}.parquet")


def test_a_broken_file_is_an_error_though_a_former_name_has_bars(tmp_path):
    broken = bars(50)
    broken.iloc[70, broken.columns.get_loc("low")] = 1e6
    written(tmp_path, META=broken, FB=bars(50), AAA=bars(10), BBB=bars(20))
    with pytest.raises(InputError, match="META"):
        load_panel(["META", "AAA", "BBB"], "files", path=str(tmp_path))


def test_two_names_of_one_asset_are_one_asset():
    with pytest.raises(InputError, match="META is listed more than once"):
        load_panel(["FB", "META", "AAA"], "files", path="nowhere")


def test_what_is_said_of_an_asset_comes_before_its_name(tmp_path):
    written(tmp_path, **{"BRK-B": bars(300), "AAA": bars(10), "BBB": bars(20)})
    panel = load_panel(
        ["BRK-B", "AAA", "BBB"], "files", asset_classes={"BRK-B": "equity"}, path=str(tmp_path)
    )
    assert panel.asset_class == "equity"


def test_a_list_of_ones_own_was_chosen_with_all_days_known(tmp_path):
    written(tmp_path, AAA=bars(10), BBB=bars(20), CCC=bars(30))
    panel = load_panel(["AAA", "BBB", "CCC"], "files", path=str(tmp_path))
    assert panel.chosen == DAYS[-1].strftime("%Y-%m-%d")
