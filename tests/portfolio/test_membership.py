"""Membership files: who belonged when, what an asset was called, and what is refused in one line."""

import numpy as np
import pandas as pd
import pytest

from trading_lib.config import InputError
from trading_lib.data.membership import former_name, joined_history, names_of, read_membership

HEADER = "symbol,from,to,formerly\n"


def written(folder, text: str):
    path = folder / "members.csv"
    path.write_text(text)
    return path


def test_who_was_a_member_on_which_day(tmp_path):
    path = written(tmp_path, HEADER + "AAA,2020-01-01,2020-01-03,\nAAA,2020-01-05,,\nBBB,2020-01-02,,\n")
    days = pd.date_range("2020-01-01", periods=6, tz="UTC")
    mask = read_membership(path).mask(days.as_unit("ns").astype("int64").to_numpy(), ("AAA", "BBB"))
    assert mask.T.astype(int).tolist() == [[1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]]


def test_a_renamed_asset_is_one_asset(tmp_path):
    path = written(tmp_path, HEADER + "FB,2015-01-01,2022-06-09,\nMETA,2022-06-09,,FB\nAAA,2015-01-01,,\n")
    found = read_membership(path)
    assert found.symbols == ("META", "AAA") and names_of("META", found.formerly) == ["META", "FB"]
    days = pd.to_datetime(["2022-06-08", "2022-06-09"], utc=True).as_unit("ns").astype("int64").to_numpy()
    assert found.mask(days, ("META",)).all()


def test_the_history_of_both_names_is_joined_at_the_day_of_the_change():
    days = pd.date_range("2022-06-01", periods=6, tz="UTC")
    old, new = (pd.DataFrame({"close": np.full(6, price)}, index=days) for price in (1.0, 2.0))
    formerly = {"META": former_name("FB", "2022-06-04")}
    joined = joined_history("META", {"FB": old, "META": new}, formerly)
    assert joined["close"].tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is empty; its first line should read symbol,from,to,formerly"),
        (HEADER, "holds a header and no members"),
        ("symbol,since\nAAA,2020-01-01\n", "column"),
        (HEADER + "AAA,2020-01-01,,,x\n", "line 2 has 5 cells, expected 4"),
        (HEADER + "AAA,yesterday,,\n", "line 2"),
        (HEADER + "AAA,2020-02-01,2020-01-01,\n", "line 2"),
        (HEADER + "AAA,2020-01-01,,\nAAA,2021-01-01,,\n", "lines 2 and 3 overlap, both are of AAA"),
        (HEADER + "BBB,2020-01-01,,AAA\nCCC,2020-01-01,,AAA\n", "AAA is the former name of another asset"),
    ],
)
def test_what_is_no_membership_is_one_line(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        read_membership(written(tmp_path, text))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_says_what_it_should_hold(tmp_path):
    with pytest.raises(InputError, match="no such file; name a membership file of columns"):
        read_membership(tmp_path / "none.csv")
