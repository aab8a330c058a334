"The specification's figures, and that the hash sees every change of a column."

from dataclasses import replace

import numpy as np
import pytest

from trading_lib.config import InputError
from trading_lib.market import layouts
from trading_lib.market.layouts import BLOCKS, LAYOUTS, get_target_features_from_obs_dim, layout_hash


@pytest.mark.parametrize(
    "version, n_features, obs_dim, windowed, account",
    [
        ("2.3.0", 53, 5300, 8, 0),
        ("2.4.0", 56, 5600, 8, 3),
        ("2.5.0", 56, 5600, 8, 3),
        ("2.6.0", 56, 5600, 8, 3),
        ("2.7.0", 59, 5900, 8, 6),
        ("5.3.0", 65, 6500, 8, 6),
        ("5.5.0", 51, 5100, 3, 0),
        ("5.6.0", 58, 5800, 3, 0),
    ],
)
def test_figures(version, n_features, obs_dim, windowed, account):
    layout = LAYOUTS[version]
    assert (layout.n_features, layout.obs_dim(), int(layout.windowed.sum()), len(layout.account_columns)) == (
        n_features,
        obs_dim,
        windowed,
        account,
    )
    assert (
        len(layout.columns)
        == len(layout.market_columns) + len(layout.account_columns)
        == len(set(layout.columns))
        and layout.min_history == 600
    )
    assert get_target_features_from_obs_dim(obs_dim) == n_features
    for name, where in layout.slices.items():
        assert (
            layout.columns[where] == BLOCKS[name].columns
            and tuple(layout.windowed[where]) == BLOCKS[name].windowed
        )


def test_shared_arrays_cannot_be_changed():
    with pytest.raises(ValueError):
        LAYOUTS["5.6.0"].windowed[0] = False


@pytest.mark.parametrize("obs_dim", [5799, 5801, 0, -5800, 58, 10_000])
def test_unknown_widths_list_the_known_ones(obs_dim):
    with pytest.raises(InputError, match="5300.*5800.*6500"):
        get_target_features_from_obs_dim(obs_dim)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: replace(b, columns=("price",) + b.columns[1:]),
        lambda b: replace(b, columns=b.columns[::-1]),
        lambda b: replace(b, windowed=(False,) + b.windowed[1:]),
        lambda b: replace(b, columns=b.columns[:-1], windowed=b.windowed[:-1]),
    ],
    ids=["renamed", "reordered", "another kind", "one fewer"],
)
def test_the_hash_sees_every_change(change, monkeypatch):
    before = layout_hash("5.6.0")
    monkeypatch.setitem(layouts.BLOCKS, "price_6", change(BLOCKS["price_6"]))
    monkeypatch.setitem(
        layouts.LAYOUTS, "5.6.0", replace(LAYOUTS["5.6.0"])
    )  # a fresh one, without cached columns
    assert layout_hash("5.6.0") != before


def test_masks_are_plain_booleans():
    assert all(layout.windowed.dtype == np.bool_ for layout in LAYOUTS.values())
