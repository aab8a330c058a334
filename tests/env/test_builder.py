"""Three readers, one observation: environment, backtest and live builder give the same windows, in every
layout, and refuse what they cannot know."""

import functools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from trading_lib.account import AccountState
from trading_lib.bars import bar_clock, validate_bars
from trading_lib.builder import BacktestObservationBuilder, InferenceObservationBuilder
from trading_lib.config import AccountConfig, InputError
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv
from trading_lib.features import feature_table, fit_features
from trading_lib.market.layouts import LAYOUTS
from trading_lib.sources import simulate_bars

VERSIONS = list(LAYOUTS)
MARKETS = {
    "crypto": ("SIM-USD", "2023-01-01", "2023-02-15", 2500),
    "equity": ("SIMA", "2023-01-01", "2023-08-01", 1500),
}
AT_END = 600  # bars from which a tail is enough, in every layout


@functools.cache
def simulated(asset_class):
    symbol, start, end, _ = MARKETS[asset_class]
    return simulate_bars(symbol, "15Min", start, end, seed=3, edge=0.1, asset_class=asset_class)


@functools.cache
def fitted(version, asset_class):
    "One fit serves all layouts: its chains are the same, and builders do not scale."
    if version != "5.3.0":
        return replace(
            fitted("5.3.0", asset_class),
            version=version,
            shift=np.zeros(LAYOUTS[version].n_features),
            scale=np.ones(LAYOUTS[version].n_features),
        )
    return fit_features(simulated(asset_class)[: MARKETS[asset_class][3]], version, "15Min", asset_class)


@functools.cache
def backtest(version, asset_class, window=100):
    return BacktestObservationBuilder(
        simulated(asset_class), version, fitted(version, asset_class), "15Min", asset_class, window
    ).precompute()


def live(version, asset_class, **settings):
    return InferenceObservationBuilder(
        version, fitted(version, asset_class), "15Min", asset_class, **settings
    )


def refusal(make, *arguments, **named) -> str:
    "The one line that a mistake gets."
    with pytest.raises(InputError) as e:
        make(*arguments, **named)
    assert "\n" not in str(e.value)
    return str(e.value)


def moved_account(n=1, seed=0):
    "Accounts in the middle of a career."
    state, random = AccountState.initial(n=n), np.random.default_rng(seed)

    def draw(low, high):
        return torch.as_tensor(random.uniform(low, high, n))

    state.equity, state.peak_equity, state.trades, state.wins = (
        draw(900, 1100),
        torch.full((n,), 1200.0, dtype=torch.float64),
        draw(3, 9).round(),
        draw(0, 3).round(),
    )
    state.cash = state.equity - draw(0, 200)
    return state


def real(folder, path, timeframe, asset_class):
    bars = pd.read_parquet(folder / asset_class / timeframe / f"{path}.parquet").set_index("timestamp")[
        ["open", "high", "low", "close", "volume"]
    ]
    return validate_bars(bars, timeframe, asset_class)[0]


# --- one observation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("asset_class", MARKETS)
@pytest.mark.parametrize("version", VERSIONS)
def test_environment_and_backtest_see_the_same_bits(version, asset_class):
    "At the start, and step by step while the accounts part."
    bars, layout, builder, n = simulated(asset_class), LAYOUTS[version], backtest(version, asset_class), 16
    config = GPUEnvConfig(
        n_envs=n, version=version, asset_class=asset_class, account=AccountConfig(costs="broker")
    )
    env, random = (
        GPUVectorizedTradingEnv(bars, config, fitted(version, asset_class)),
        torch.Generator().manual_seed(0),
    )
    starts = torch.as_tensor(np.random.default_rng(0).choice(env.decision_bars[:-40], n))
    seen = env.reset_at(starts)
    for step in range(6):
        windows = seen.view(n, 100, layout.n_features)
        assert seen.shape == (n, env.obs_dim) and seen.dtype == torch.float32 and torch.isfinite(seen).all()
        assert torch.equal(
            windows, builder.observations(env.bar, env.account if layout.account_columns else None)
        )
        if step in (0, 5):
            assert all(
                np.array_equal(
                    windows[i].numpy(), builder.get_obs_at_bar(int(env.bar[i]), one(env.account, i))
                )
                for i in range(0, n, 5)
            )
        seen = env.step(torch.randint(env.n_actions, (n,), generator=random))[0]
    if layout.account_columns:
        assert (
            len(seen.view(n, 100, -1)[:, 0, list(layout.columns).index("pnl")].unique()) > n // 2
        )  # the accounts did differ


def one(state, i):
    return AccountState(**{name: v[i : i + 1] for name, v in vars(state).items()})


@pytest.mark.parametrize("asset_class", MARKETS)
@pytest.mark.parametrize("version", VERSIONS)
def test_windows_are_cut_from_the_feature_table(version, asset_class):
    """Windowed columns run along the table, oldest bar first; broadcast ones repeat the last bar; columns
    of the account come from the account. By a loop over columns."""
    table, layout, account = (
        feature_table(simulated(asset_class), version, fitted(version, asset_class), "15Min", asset_class),
        LAYOUTS[version],
        moved_account(),
    )
    config = AccountConfig()
    exposure = float((account.equity - account.cash) / account.equity)
    own = {
        "pnl": np.tanh(10 * (float(account.equity) / 1000 - 1)),
        "win_rate": float(account.wins / account.trades),
        "drawdown": 1 - float(account.equity) / 1200,
        "position_pct": exposure / config.max_position_pct,
        "available_pct": 1 - exposure,
        "account_change": np.log10(float(account.equity) / 1000),
    }
    for i in (99, 700, len(table) - 1):
        if (
            i < 600
            and asset_class == "equity"
            and bar_clock(simulated(asset_class).index, "15Min", asset_class).segment[i]
        ):
            continue
        seen = backtest(version, asset_class).get_obs_at_bar(i, account)
        assert seen.shape == (100, layout.n_features) and seen.dtype == np.float32
        for place, (name, windowed) in enumerate(zip(layout.columns, layout.windowed)):
            if name in own:
                assert np.allclose(seen[:, place], own[name], rtol=1e-6), name
            else:
                assert np.array_equal(
                    seen[:, place],
                    table[name].to_numpy(np.float32)[i - 99 : i + 1]
                    if windowed
                    else np.full(100, table[name].to_numpy(np.float32)[i]),
                ), name


@pytest.mark.parametrize("asset_class", MARKETS)
@pytest.mark.parametrize("version", VERSIONS)
def test_live_from_600_bars_is_the_backtest(version, asset_class):
    bars, account, random = simulated(asset_class), moved_account(), np.random.default_rng(1)
    clock, builder, inference = (
        bar_clock(bars.index, "15Min", asset_class),
        backtest(version, asset_class),
        live(version, asset_class),
    )
    ends = [
        i for i in random.integers(AT_END, len(bars), 6) if clock.segment[i - AT_END + 1] == clock.segment[i]
    ] + [AT_END - 1]
    largest = max(
        np.abs(
            inference.build(bars[i - AT_END + 1 : i + 1], account) - builder.get_obs_at_bar(i, account)
        ).max()
        for i in ends
    )
    print(f"{version} {asset_class}: {len(ends)} tails of {AT_END} bars, largest difference {largest:.1e}")
    assert len(ends) >= 4 and largest < 1e-4
    longer = inference.build(bars[: ends[0] + 1], account)
    assert np.array_equal(
        longer, builder.get_obs_at_bar(ends[0], account)
    )  # from the whole history, the same bits


@pytest.mark.parametrize(
    "path, timeframe, asset_class",
    [("BTC-USDT", "15Min", "crypto"), ("SPY", "15Min", "equity"), ("SPY", "1Day", "equity")],
)
@pytest.mark.parametrize("version", ["5.3.0", "5.6.0"])
def test_live_from_600_bars_is_the_backtest_on_real_bars(
    real_bars_folder, version, path, timeframe, asset_class
):
    bars, account = real(real_bars_folder, path, timeframe, asset_class)[:6000], moved_account()
    fit, clock = (
        fit_features(bars[:1300], version, timeframe, asset_class),
        bar_clock(bars.index, timeframe, asset_class),
    )
    builder, inference = (
        make(*first, version, fit, timeframe, asset_class)
        for make, first in ((BacktestObservationBuilder, (bars,)), (InferenceObservationBuilder, ()))
    )
    ends = [
        i
        for i in np.random.default_rng(2).integers(1300, len(bars), 12)
        if clock.segment[i - AT_END + 1] == clock.segment[i]
    ]
    differences = np.max(
        [
            np.abs(
                inference.build(bars[i - AT_END + 1 : i + 1], account) - builder.get_obs_at_bar(i, account)
            ).max(0)
            for i in ends
        ],
        axis=0,
    )
    column = LAYOUTS[version].columns[differences.argmax()]
    print(
        f"{path} {timeframe} {version}: {len(ends)} tails of {AT_END} bars, "
        f"largest difference {differences.max():.1e} in {column}"
    )
    assert len(ends) > 5 and differences.max() < 1e-4
    env = GPUVectorizedTradingEnv(
        bars,
        GPUEnvConfig(n_envs=len(ends), version=version, timeframe=timeframe, asset_class=asset_class),
        fit,
    )
    ends = np.array([min(i, env.decision_bars[-1]) for i in ends])
    fresh = AccountState.initial(n=len(ends))
    assert torch.equal(env.reset_at(ends).view(len(ends), 100, -1), builder.observations(ends, fresh))


@pytest.mark.parametrize("window", [1, 10, 250])
def test_other_windows(window):
    builder, inference = backtest("5.6.0", "crypto", window), live("5.6.0", "crypto", window=window)
    seen = builder.get_obs_at_bar(1500)
    assert (
        seen.shape == (window, 58)
        and np.abs(inference.build(simulated("crypto")[901:1501]) - seen).max() < 1e-4
    )
    shared = min(window, 100)
    windowed = LAYOUTS["5.6.0"].windowed
    assert np.array_equal(
        seen[-shared:, windowed], backtest("5.6.0", "crypto").get_obs_at_bar(1500)[-shared:, windowed]
    )
    assert (
        f"fewer than {window} bars" in refusal(builder.get_obs_at_bar, window - 2)
        if window > 1
        else builder.get_obs_at_bar(0).shape == (1, 58)
    )


def test_a_long_window_needs_a_long_history():
    inference = live("5.6.0", "crypto", window=700)
    assert "needs 700 bars" in refusal(inference.build, simulated("crypto")[:699]) and inference.build(
        simulated("crypto")[:700]
    ).shape == (700, 58)


def test_a_later_bar_changes_nothing():
    "What the backtest shows at a bar is what a live builder saw when that bar was the latest."
    bars = simulated("crypto")
    changed = bars.copy()
    changed.iloc[3001:] *= 1.7
    for version in ("5.3.0", "5.6.0"):
        account = moved_account()
        later = BacktestObservationBuilder(changed, version, fitted(version, "crypto"), "15Min", "crypto")
        assert np.array_equal(
            later.get_obs_at_bar(3000, account), backtest(version, "crypto").get_obs_at_bar(3000, account)
        )
        assert not np.array_equal(
            later.get_obs_at_bar(3001, account), backtest(version, "crypto").get_obs_at_bar(3001, account)
        )


def test_a_fit_from_a_checkpoint_gives_the_same_bits():
    "Plain containers, through JSON and back."
    fit = fitted("5.6.0", "crypto")
    state, bars = json.loads(json.dumps(fit.to_state())), simulated("crypto")
    assert np.array_equal(
        InferenceObservationBuilder("5.6.0", state, "15Min", "crypto").build(bars[:800]),
        live("5.6.0", "crypto").build(bars[:800]),
    )
    assert np.array_equal(
        BacktestObservationBuilder(bars, "5.6.0", state, "15Min", "crypto").get_obs_at_bar(900),
        backtest("5.6.0", "crypto").get_obs_at_bar(900),
    )


def test_precompute_is_only_a_matter_of_time():
    lazy = BacktestObservationBuilder(
        simulated("crypto"), "5.6.0", fitted("5.6.0", "crypto"), "15Min", "crypto"
    )
    assert (
        np.array_equal(lazy.get_obs_at_bar(900), backtest("5.6.0", "crypto").get_obs_at_bar(900))
        and lazy.precompute() is lazy
    )
    seen = lazy.get_obs_at_bar(900)
    seen += 1  # the caller's own copy
    assert np.array_equal(lazy.get_obs_at_bar(900), backtest("5.6.0", "crypto").get_obs_at_bar(900))


# --- segments -----------------------------------------------------------------------------------------------


@functools.cache
def gapped():
    return simulated("crypto").drop(
        simulated("crypto").index[2000:2008]
    )  # two hours are missing: a new segment begins with bar 2000


def test_live_never_crosses_a_gap():
    """With 599 bars since the gap it refuses, whatever came before; with 600 it sees what a history that
    begins at the gap would show."""
    inference, bars = live("5.6.0", "crypto"), gapped()
    assert "needs 600 bars without a gap" in refusal(inference.build, bars[:2599]) and "was 599" in refusal(
        inference.build, bars[:2599]
    )
    assert "was 1;" in refusal(inference.build, bars[:2001]) and inference.build(bars[:2000]).shape == (
        100,
        58,
    )
    seen = inference.build(bars[:2600])
    assert np.array_equal(seen, inference.build(bars[2000:2600]))
    before = bars.copy()
    before.iloc[:2000] *= 3.0
    assert np.array_equal(seen, inference.build(before[:2600]))


@pytest.mark.parametrize("version", ["5.3.0", "5.6.0"])
def test_backtest_never_crosses_a_gap(version):
    bars, account = gapped(), moved_account()
    builder = BacktestObservationBuilder(
        bars, version, fitted(version, "crypto"), "15Min", "crypto"
    ).precompute()
    for i in (2000, 2050, 2098):
        assert f"bar {i}: fewer than 100 bars" in refusal(builder.get_obs_at_bar, i, account)
    alone = BacktestObservationBuilder(bars[2000:], version, fitted(version, "crypto"), "15Min", "crypto")
    for i in (2099, 2300):
        assert np.array_equal(builder.get_obs_at_bar(i, account), alone.get_obs_at_bar(i - 2000, account))
    assert builder.get_obs_at_bar(1999, account).shape == (100, LAYOUTS[version].n_features)
    assert "bar 2050: fewer than 100 bars" in refusal(
        builder.observations, [1500, 2050, 2300], moved_account(3)
    )


def test_a_missing_exchange_session_is_a_gap():
    bars = simulated("equity")
    sessions = bar_clock(bars.index, "15Min", "equity").session
    day = sessions[1500]
    without = bars[sessions != day]
    first = int((sessions < day).sum())
    inference = live("5.6.0", "equity")
    assert (
        "was 599" in refusal(inference.build, without[: first + 599])
        and inference.build(without[: first + 600]).shape == (100, 58)
        and inference.build(bars[: first + 599]).shape == (100, 58)
    )


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 100, 599])
def test_too_short_a_history_is_refused(n):
    message = refusal(live("5.6.0", "crypto").build, simulated("crypto")[:n])
    assert (
        "layout 5.6.0 needs 600 bars" in message
        and f"was {n};" in message
        and "fetch a longer history" in message
    )


@pytest.mark.parametrize("i", [-1, -100, 10**6, "end"])
def test_bars_that_are_not_there_are_refused(i):
    builder = backtest("5.6.0", "crypto")
    assert f"expected numbers from 0 to {len(simulated('crypto')) - 1}" in refusal(
        builder.get_obs_at_bar, len(simulated("crypto")) if i == "end" else i
    )


@pytest.mark.parametrize("i", [0, 98])
def test_bars_without_a_full_window_are_refused(i):
    assert f"bar {i}: fewer than 100 bars" in refusal(backtest("5.6.0", "crypto").get_obs_at_bar, i)


def test_no_bars_give_no_windows():
    assert backtest("5.6.0", "crypto").observations([]).shape == (0, 100, 58)


@pytest.mark.parametrize("version", [v for v in VERSIONS if LAYOUTS[v].account_columns])
def test_a_missing_account_is_refused_where_the_layout_shows_it(version):
    for read in (
        lambda a: backtest(version, "crypto").get_obs_at_bar(900, a),
        lambda a: live(version, "crypto").build(simulated("crypto")[:700], a),
    ):
        assert f"layout {version} shows the account" in refusal(
            read, None
        ) and "AccountState.initial" in refusal(read, None)
        seen, columns = read(AccountState.initial()), list(LAYOUTS[version].columns)
        fresh = {
            "pnl": 0,
            "win_rate": 0.5,
            "drawdown": 0,
            "position_pct": 0,
            "available_pct": 1,
            "account_change": 0,
        }
        assert all(
            (seen[:, columns.index(name)] == fresh[name]).all() for name in LAYOUTS[version].account_columns
        )


@pytest.mark.parametrize("version", ["2.3.0", "5.5.0", "5.6.0"])
def test_layouts_that_hide_the_position_do_not_look_at_the_account(version):
    builder = backtest(version, "crypto")
    assert np.array_equal(builder.get_obs_at_bar(900), builder.get_obs_at_bar(900, moved_account()))


def test_the_account_is_shown_in_the_units_of_its_own_configuration():
    config = AccountConfig(initial_account_value=5000, max_position_pct=0.4)
    builder = BacktestObservationBuilder(
        simulated("crypto"), "5.3.0", fitted("5.3.0", "crypto"), "15Min", "crypto", account_config=config
    )
    columns, state = list(LAYOUTS["5.3.0"].columns), AccountState.initial(config)
    seen = builder.get_obs_at_bar(900, state)
    assert (seen[:, columns.index("pnl")] == 0).all() and (
        seen[:, columns.index("account_change")] == 0
    ).all()
    state.cash = state.cash - 1000  # a position of a fifth of the account, half of what is allowed
    assert np.allclose(builder.get_obs_at_bar(900, state)[:, columns.index("position_pct")], 0.5)


def test_accounts_must_be_as_many_as_bars():
    builder = backtest("5.3.0", "crypto")
    assert "account" in refusal(
        builder.observations, [900, 901], AccountState.initial(n=3)
    ) and "account" in refusal(builder.get_obs_at_bar, 900, AccountState.initial(n=2))
    assert builder.observations([900, 901], AccountState.initial(n=2)).shape == (2, 100, 65)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: InferenceObservationBuilder("5.6", fitted("5.6.0", "crypto"), "15Min", "crypto"),
            "did you mean '5.6.0'",
        ),
        (
            lambda: BacktestObservationBuilder(
                simulated("crypto"), "5.7.0", fitted("5.6.0", "crypto"), "15Min", "crypto"
            ),
            "unknown name '5.7.0'",
        ),
        (lambda: InferenceObservationBuilder("5.6.0", None, "15Min", "crypto"), "fit: is missing"),
        (
            lambda: InferenceObservationBuilder("5.6.0", {"version": "5.6.0"}, "15Min", "crypto"),
            "feature fit: expected",
        ),
        (lambda: live("5.6.0", "crypto", window=0), "window"),
        (lambda: live("5.6.0", "crypto", window=-5), "window"),
        # fitted for one thing, used for another
        (
            lambda: InferenceObservationBuilder("5.6.0", fitted("5.3.0", "crypto"), "15Min", "crypto").build(
                simulated("crypto")[:700]
            ),
            "5.3.0",
        ),
        (
            lambda: InferenceObservationBuilder("5.6.0", fitted("5.6.0", "crypto"), "15Min", "equity").build(
                simulated("equity")[:700]
            ),
            "crypto",
        ),
        (
            lambda: InferenceObservationBuilder("5.6.0", fitted("5.6.0", "crypto"), "5Min", "crypto").build(
                simulated("crypto")[:700]
            ),
            "15Min",
        ),
        (
            lambda: InferenceObservationBuilder("5.6.0", fitted("5.6.0", "crypto"), "15Mn", "crypto").build(
                simulated("crypto")[:700]
            ),
            "did you mean '15Min'",
        ),
    ],
)
def test_a_builder_that_cannot_be_is_refused(make, words):
    assert words in refusal(make)
