"""The environment: nothing from the future is seen, nothing crosses a border, the books close, and every
reward is what the rules say.

Accounts are held against the slow one of `scalar_account`, observations against windows that are cut by
hand and against both builders, rewards against plain floats.
"""

import functools
import math
import os
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import fields, replace
from pathlib import Path

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
import torch
from scalar_account import ACTIONS, BROKER, FREE, ScalarAccount, hand_made_market, scalar_step, torch_root

from trading_lib import features
from trading_lib.account import AccountState, account_rules
from trading_lib.bars import validate_bars
from trading_lib.builder import BacktestObservationBuilder, InferenceObservationBuilder
from trading_lib.config import AccountConfig, InputError
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, MarketData, Obs, market_data, reward_preset
from trading_lib.features import feature_table, fit_features
from trading_lib.market.layouts import LAYOUTS
from trading_lib.sources import simulate_bars
from trading_lib.version import MODEL_SPECS

HERE = Path(__file__).resolve().parent
DISTINCT = ["2.3.0", "2.6.0", "2.7.0", "5.3.0", "5.5.0", "5.6.0"]  # the six layouts
# nearly everything at once, so that small markets show large drawdowns
BOLD = {
    name: replace(config, safety_buffer_pct=0.0, base_alloc=1.0, max_position_pct=0.9)
    for name, config in BROKER.items()
}
BUY_75, SELL_75, CLOSE = 3, 6, 7
MARKETS = {"crypto": ("SIM-USD", "2023-01-01", "2023-02-20"), "equity": ("SIMA", "2023-01-01", "2023-09-30")}
FITTED = 3000  # bars of the training span


@functools.cache
def simulated(asset_class):
    symbol, first, last = MARKETS[asset_class]
    return simulate_bars(symbol, "15Min", first, last, seed=3, asset_class=asset_class)


@functools.cache
def fitted(asset_class, version="5.6.0"):
    if version in ("2.4.0", "2.5.0"):
        return fitted(asset_class, "2.6.0")  # one layout
    return fit_features(simulated(asset_class)[:FITTED], version, "15Min", asset_class)


@functools.cache
def market_of(asset_class, version="5.6.0", window=100):
    return market_data(
        simulated(asset_class),
        version,
        fitted(asset_class, version),
        "15Min",
        asset_class,
        window,
        MARKETS[asset_class][0],
    )


@functools.cache
def real(folder, asset_class, symbol):
    bars = pd.read_parquet(folder / asset_class / "15Min" / f"{symbol}.parquet").set_index("timestamp")[
        ["open", "high", "low", "close", "volume"]
    ]
    return validate_bars(bars, "15Min", asset_class)[0]


def around_the_hole(bars):
    "BTC-USDT's 3,000 bars before its hole of 115 days, and 1,500 after."
    hole = int(np.argmax(np.diff(bars.index.asi8))) + 1
    return bars[hole - 3000 : hole + 1500]


def config_of(market, **changes):
    return GPUEnvConfig(
        **{
            "n_envs": 8,
            "version": market.version,
            "window": market.window,
            "timeframe": market.timeframe,
            "asset_class": market.asset_class,
            "account": BROKER[market.asset_class],
        }
        | changes
    )


def env_of(market, **changes):
    return GPUVectorizedTradingEnv(market, config_of(market, **changes))


def random_actions(seed, steps, env):
    return torch.randint(env.n_actions, (steps, env.n_envs), generator=torch.Generator().manual_seed(seed))


# the books


def books_close(market, steps, n_envs, **changes):
    """Random actions and automatic restarts; gross P&L is added up in numpy from price moves alone. The
    largest error of any account at any step."""
    env = env_of(market, n_envs=n_envs, observations="indices", **changes)
    env.reset(1)
    gross, worst, restarts, moved, opening, close = (
        np.zeros(n_envs),
        0.0,
        0,
        0.0,
        market.prices[0],
        market.prices[3],
    )
    random = torch.Generator().manual_seed(2)
    for _ in range(steps):
        bar, held = env.bar.numpy().copy(), env.account.quantity.numpy()
        _, _, terminated, truncated, infos = env.step_index(
            torch.randint(env.n_actions, (n_envs,), generator=random)
        )
        account, fills = infos["account"], infos["fills"]
        inside = (fills.exit_quantity - fills.gap_quantity).numpy()
        position = np.where(inside != 0, -inside, account.quantity.numpy())  # after the order
        gross += held * (opening[bar + 1] - close[bar]) + position * (
            np.where(inside != 0, fills.exit_price.numpy(), close[bar + 1]) - opening[bar + 1]
        )
        books = (
            account.cash.numpy()
            + account.quantity.numpy() * close[bar + 1]
            + (account.commission + account.spread + account.slippage + account.impact).numpy()
        )
        worst = max(worst, np.abs(books - 1000 - gross).max())
        done = (terminated | truncated).numpy()
        moved = max(moved, float(account.costs.min()), np.abs(gross).max())
        gross[done], restarts = 0.0, restarts + int(done.sum())
    assert restarts > n_envs and moved > 1
    return worst


@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_cash_position_and_costs_are_initial_plus_gross_profit_at_every_step(asset_class):
    "100,000 random steps; an account's money is known to a billionth."
    assert books_close(market_of(asset_class), 200, 512, episode_length=60) < 1e-9


@pytest.mark.proof
def test_the_books_close_over_ten_million_steps():
    "The same, 10 million account steps."
    for asset_class in ("crypto", "equity"):
        worst = books_close(market_of(asset_class), 2500, 2048, episode_length=250)
        print(
            f"{asset_class}: {2500 * 2048:,} random steps, largest error of "
            f"cash + position + costs - initial - gross P&L: {worst:.1e} of 1,000"
        )
        assert worst < 1e-8


@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_accounts_are_the_slow_account_bar_by_bar(asset_class):
    "Every variable of a few accounts of many, at every step, to the last bit."
    market = market_of(asset_class)
    env = env_of(market, n_envs=300, episode_length=80, observations="indices")
    env.reset(5)
    chosen, actions = [0, 1, 17, 150, 299], random_actions(6, 80, env)
    slow, bars = (
        {i: ScalarAccount.of(BROKER[asset_class], asset_class, torch_root) for i in chosen},
        env.bar.tolist(),
    )
    for t, action in enumerate(actions):
        account = env.step(action)[4]["account"]
        for i in chosen:
            scalar_step(slow[i], market, bars[i] + t, int(action[i]), 8)
            assert tuple(float(getattr(account, f.name)[i]) for f in fields(AccountState)) == slow[i].state, (
                i,
                t,
            )
    assert sum(s.trades for s in slow.values()) > 3


# what is seen


def changed(bars, cut, how):
    "The same history, with another future."
    if how == "truncation":
        return bars[: cut + 1]
    other, rng = bars.copy(), np.random.default_rng(cut)
    if how == "NaN":
        other.iloc[cut + 1 :] = np.nan
    else:
        other.iloc[cut + 1 :] = other.iloc[cut + 1 :].to_numpy() * np.exp(
            0.2 * rng.standard_normal((len(bars) - cut - 1, 5))
        )
    return other


STEPS_SEEN = 24


def seen_until(bars, cut, version, asset_class):
    """Everything that an account could know or own until the close of the bar `cut`: tables, the windows of
    its last steps, orders, fills and account."""
    market = market_data(bars, version, fitted(asset_class, version), "15Min", asset_class)
    known = [
        getattr(market, name)[: cut + 1]
        for name in (
            "features",
            "timestamp",
            "volatility",
            "daily_volatility",
            "daily_dollar_volume",
            "segment",
            "can_decide",
        )
    ]
    # the last step fills and marks in the bar `cut`
    env = env_of(market, n_envs=3, reward_preset="equity")
    observations, accounts = [env.reset_at([cut - STEPS_SEEN] * 3, [cut] * 3)], []
    for action in random_actions(cut, STEPS_SEEN, env):
        *_, infos = env.step(action)
        observations.append(infos["final_obs"])
        accounts += [getattr(infos["account"], f.name) for f in fields(AccountState)] + [
            part.double() for part in infos["fills"]
        ]
    return [*known, torch.stack(observations).numpy(), torch.stack(accounts).numpy()]


def moved_by_the_future(bars, cuts, version, asset_class, ways=("NaN", "noise", "truncation")):
    "How many of the changes after the cuts move a bit of what is known at them."
    moved = 0
    for cut in cuts:
        here = seen_until(bars, cut, version, asset_class)
        assert all(np.isfinite(a).all() for a in here)
        for how in ways:
            there = seen_until(changed(bars, cut, how), cut, version, asset_class)
            moved += not all(
                a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(here, there, strict=True)
            )
    return moved


def recent(asset_class):
    "1,000 bars, all but the first few after the training span."
    return simulated(asset_class)[FITTED - 100 : FITTED + 900]


@pytest.mark.parametrize(
    "version,asset_class", [(v, "crypto") for v in DISTINCT] + [("5.6.0", "equity"), ("5.3.0", "equity")]
)
def test_no_future_bar_moves_what_is_seen_or_owned(version, asset_class):
    """NaN, noise and truncation after cuts beyond the fitted span: not a bit of any table, window, fill or
    account at or before the cut."""
    assert (
        moved_by_the_future(
            recent(asset_class), [700, 833] if version in ("5.3.0", "5.6.0") else [777], version, asset_class
        )
        == 0
    )


def test_an_observation_without_an_index_is_refused_by_name():
    obs = Obs(None, torch.zeros(2, 3))
    with pytest.raises(InputError, match="observation: has no index"):
        obs.rows  # noqa: B018
    assert Obs(torch.arange(2), obs.dense).rows.tolist() == [0, 1]


def test_real_futures_move_nothing_either(real_bars_folder, monkeypatch):
    "The same on real bars."
    for asset_class, symbol in (("crypto", "BTC-USDT"), ("equity", "SPY")):
        bars = real(real_bars_folder, asset_class, symbol)
        fit = fit_features(bars[:1000], "5.6.0", "15Min", asset_class)
        monkeypatch.setitem(globals(), "fitted", lambda *_, fit=fit: fit)
        assert moved_by_the_future(bars[900:1900], [701, 801], "5.6.0", asset_class) == 0


@pytest.mark.proof
def test_two_hundred_cuts_move_nothing():
    "600 futures."
    cuts = np.random.default_rng(0).choice(np.arange(3640, 4580), 200, replace=False)
    assert moved_by_the_future(simulated("crypto")[:4600], cuts.tolist(), "5.6.0", "crypto") == 0


@pytest.mark.parametrize(
    "version,column",
    [
        ("5.6.0", "returns"),
        ("5.6.0", "rsi"),
        ("5.6.0", "h1_return"),
        ("5.3.0", "close_location"),
        ("5.3.0", "p_reversal_up"),
    ],
)
def test_a_column_shifted_by_one_bar_is_found(monkeypatch, version, column):
    "A planted leak: one column of the table tells the next bar's value."
    honest = features.feature_table

    def leaking(*args, **kwargs):
        table = honest(*args, **kwargs)
        table[column] = table[column].shift(-1).ffill()
        return table

    monkeypatch.setattr(features, "feature_table", leaking)
    assert moved_by_the_future(recent("crypto"), [702, 834], version, "crypto", ["noise"]) == 2, (
        "the bar after each cut is the last of its hour"
    )


@pytest.mark.parametrize("name", ["volatility", "daily_volatility", "daily_dollar_volume"])
def test_costs_that_know_the_next_bar_are_found(monkeypatch, name):
    "A planted leak in what the account is told, not in a feature."
    honest = market_data
    monkeypatch.setitem(
        globals(),
        "market_data",
        lambda *args, **kwargs: (lambda m: replace(m, **{name: np.append(getattr(m, name)[1:], 0.01)}))(
            honest(*args, **kwargs)
        ),
    )
    assert moved_by_the_future(recent("crypto"), [733], "5.6.0", "crypto", ["noise"]) == 1


@pytest.mark.parametrize("asset_class,per_day", [("crypto", 96), ("equity", 26)])
def test_what_impact_is_made_of_is_known_and_stays_in_its_segment(asset_class, per_day):
    """Volatility and turnover of a day over the last five days of the same stretch, or as many bars as
    there are: by pandas, stretch by stretch."""
    market, bars = (
        (gap_market(), pd.concat([simulated("crypto")[:3400], simulated("crypto")[3640:]]))
        if asset_class == "crypto"
        else (market_of("equity"), simulated("equity"))
    )
    for segment in range(market.segment.max() + 1):
        rows = market.segment == segment
        part = bars[rows]
        squares = (part["close"].pct_change().fillna(0) ** 2).rolling(5 * per_day, min_periods=1).mean()
        turnover = (part["close"] * part["volume"]).rolling(5 * per_day, min_periods=1).mean()
        np.testing.assert_allclose(
            market.daily_volatility[rows], np.sqrt(squares * per_day), rtol=1e-7, atol=1e-12
        )
        np.testing.assert_allclose(market.daily_dollar_volume[rows], turnover * per_day, rtol=1e-9)


def test_rewards_look_ahead_and_fills_do_not():
    """Another close of the next bar changes the mark and the reward, not the order, its fill or the cash;
    another next open changes the fill; a close four bars on changes the reward alone."""
    close = 100 * np.cumprod(1 + 0.004 * np.random.default_rng(0).standard_normal(40))
    base = hand_made_market(close, high=close * 1.05, low=close * 0.95)

    def at_ten(row=None, bar=None, factor=1.001):
        prices = base.prices.copy()
        if row is not None:
            prices[row, bar] *= factor
        env = env_of(
            replace(base, prices=prices),
            n_envs=1,
            account=replace(BROKER["crypto"], stop_pct=0.5, target_pct=0.5),
        )
        env.reset_at([10])
        return env.step(torch.tensor([BUY_75]))

    _, reward, _, _, infos = at_ten()
    assert float(infos["fills"].quantity) * base.prices[0, 11] == pytest.approx(78.75)
    # (row of the prices, bar): what stays the same; an order is an amount of money, so the units change with
    # the open and the cash does not
    for (row, bar), same in {
        (3, 11): "quantity",
        (0, 11): "",
        (3, 14): "quantity equity",
        (0, 12): "quantity equity reward",
        (3, 10): "quantity equity reward",
        (3, 15): "quantity equity reward",
    }.items():
        _, other, _, _, there = at_ten(row, bar, 1.02)
        for name in ("quantity", "equity"):
            assert torch.equal(getattr(infos["account"], name), getattr(there["account"], name)) == (
                name in same
            ), (row, bar, name)
        assert torch.equal(reward, other) == ("reward" in same), (row, bar)


# where episodes lie


@functools.cache
def gap_market():
    "Simulated crypto bars with a hole of two days and a half."
    bars = simulated("crypto")
    return market_data(pd.concat([bars[:3400], bars[3640:]]), "5.6.0", fitted("crypto"), "15Min", "crypto")


def walk_episodes(market, steps, allowed, n_envs=256, episode_length=64, seed=0, **changes):
    """Bars of all steps, where each episode began, the bars after the steps, and how each ended. Decisions
    are made at all allowed bars, and at no other."""
    env = env_of(market, n_envs=n_envs, episode_length=episode_length, observations="indices", **changes)
    assert np.array_equal(env.decision_bars, np.concatenate(allowed))
    env.reset(seed)
    actions, rows = random_actions(seed, steps, env), []
    began = env.bar.numpy().copy()
    for action in actions:
        bar = env.bar.numpy().copy()
        _, _, terminated, truncated, infos = env.step_index(action)
        rows.append(
            (
                bar,
                began.copy(),
                infos["final_obs"].index.numpy().copy(),
                terminated.numpy(),
                truncated.numpy(),
            )
        )
        began = np.where(terminated | truncated, env.bar.numpy(), began)
    bar, *rest = (np.stack(column) for column in zip(*rows))
    assert np.isin(bar, np.concatenate(allowed)).all() and len(np.unique(bar)) > 0.97 * sum(map(len, allowed))
    return bar, *rest


@pytest.mark.parametrize("preset", ["v2.4.5", "equity"])
def test_episodes_stay_in_their_segment_and_span(preset):
    """Around a synthetic gap, in a span that ends soon after: no decision's fill, mark or reward horizon
    crosses the gap or the span's end, none is made in warm-up, and all of both sides is used."""
    market, horizon = gap_market().span(3200, 4300), {"v2.4.5": 4, "equity": 1}[preset]
    # bars 3400 to 3999 are the second stretch's warm-up
    allowed = np.arange(3200, 3400 - horizon), np.arange(4000, 4300 - horizon)
    bar, began, after, terminated, truncated = walk_episodes(market, 200, allowed, reward_preset=preset)
    assert (
        market.segment.max() == 1
        and (market.segment[bar + horizon] == market.segment[bar]).all()
        and (market.segment[bar] == market.segment[began]).all()
    )
    assert market.can_decide[bar].all() and (after == bar + 1).all() and not terminated.any()
    assert ((after - began)[truncated] == 64).all() and ((after - began)[~truncated] < 64).all()


def test_episodes_shorter_than_asked_run_through_their_whole_stretch():
    "A stretch that cannot hold a whole episode is one episode, from its first decision to its last."
    bar, began, after, _, truncated = walk_episodes(
        gap_market().span(3350, 4300), 240, (np.arange(3350, 3396), np.arange(4000, 4296)), episode_length=80
    )
    short = bar < 3400
    assert set(began[short].tolist()) == {3350} and set(after[truncated & short].tolist()) == {3396}
    assert set((after - began)[truncated & ~short].tolist()) == {80}


def test_real_episodes_never_bridge_the_gap(real_bars_folder):
    "BTC-USDT has a hole of 115 days: episodes on both sides, none across."
    bars = around_the_hole(real(real_bars_folder, "crypto", "BTC-USDT"))
    whole = market_data(
        bars, "5.6.0", fit_features(bars[:2000], "5.6.0", "15Min", "crypto"), "15Min", "crypto"
    )
    assert whole.timestamp[3000] - whole.timestamp[2999] > 100 * 86_400e9 and whole.segment[
        2999:3001
    ].tolist() == [0, 1]
    market = whole.span(2700, 4200)
    bar, began, after, _, truncated = walk_episodes(
        market, 200, (np.arange(2700, 2996), np.arange(3600, 4196))
    )
    assert (
        truncated.sum() > 500
        and (market.segment[bar + 4] == market.segment[began]).all()
        and (market.timestamp[bar + 4] - market.timestamp[bar] == 4 * 900e9).all()
    )


def test_starts_are_random_and_seeded():
    """One seed, one trajectory, bit for bit; another seed, another; starts lie all over the span; what
    others draw changes nothing."""
    market = market_of("crypto", window=10).span(600, 3000)

    def run(seed):
        env = env_of(market, n_envs=64, episode_length=20)
        rows = [env.reset(seed)]
        for action in random_actions(3, 50, env):
            torch.rand(3)
            obs, reward, terminated, truncated, infos = env.step(action)
            rows += [obs, reward, terminated, truncated, infos["account"].equity, env.bar]
        return rows

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[6], other[6])
    env = env_of(market, n_envs=4000, episode_length=20, observations="indices")
    env.reset(0)
    starts = env.bar.numpy()
    places = np.histogram(starts, 10, (600, 3000 - 20 - 3))[0]
    assert starts.min() >= 600 and starts.max() <= 3000 - 20 - 4 + 1 and places.min() > 300, (
        "evenly, all over the span"
    )
    without = env_of(market, n_envs=64)
    without.reset()
    same = env_of(market, n_envs=64)
    same.reset()
    assert torch.equal(without.bar, same.bar), "no seed: repeatable from construction on"


def test_an_ended_episode_restarts_in_the_same_step():
    """SAME_STEP: the observation returned belongs to the new episode and a fresh account, `final_obs` and
    the account in `infos` are the old one's last."""
    market = market_of("crypto", "5.3.0", 10)
    env = env_of(market, n_envs=16, episode_length=7)
    env.reset(0)
    before = env.bar.clone()
    for t in range(7):
        obs, _, terminated, truncated, infos = env.step(torch.full((16,), BUY_75))
        assert bool(truncated.all()) == (t == 6) and not bool(terminated.any())
        own = env._observe()
        assert torch.equal(obs, env.table.materialise(own)), (
            "what is returned is what the next action answers to"
        )
        if t < 6:
            assert torch.equal(obs, infos["final_obs"])
    assert not torch.equal(obs, infos["final_obs"]) and not torch.equal(env.bar, before + 7)
    builder = BacktestObservationBuilder(
        simulated("crypto"), "5.3.0", fitted("crypto", "5.3.0"), "15Min", "crypto", 10, BROKER["crypto"]
    )
    assert torch.equal(infos["final_obs"], builder.observations(before + 7, infos["account"]).flatten(1))
    assert torch.equal(obs, builder.observations(env.bar, AccountState.initial(n=16)).flatten(1))
    assert bool((infos["account"].quantity > 0).all()) and all(
        torch.equal(getattr(env.account, f.name), getattr(AccountState.initial(n=16), f.name))
        for f in fields(AccountState)
    )


def test_ruin_is_termination_and_time_is_truncation():
    """A short in a share that rises eightfold is over for good; the others go on, and end when their time
    is up, which is something else."""
    close = np.concatenate([np.full(20, 1.0), np.full(20, 8.0)])
    market = hand_made_market(close, asset_class="equity")
    env = env_of(market, n_envs=3, episode_length=12, account=replace(FREE, stop_pct=0.0, target_pct=0.0))
    env.reset_at([12, 12, 8], [24, 24, 20])
    events = []
    for t in range(12):
        _, _, terminated, truncated, infos = env.step(
            torch.tensor([SELL_75, BUY_75, SELL_75]) if t < 3 else torch.tensor([0, 0, 0])
        )
        events += [
            (t, i, "terminated" if terminated[i] else "truncated", float(infos["account"].equity[i]))
            for i in range(3)
            if terminated[i] or truncated[i]
        ]
        assert not bool((terminated & truncated).any())
    # the jump lies in bar 20: step 7 of the first two; the last step of the third, which is ruined
    assert events == [
        (7, 0, "terminated", -400.0),
        (11, 1, "truncated", 2400.0),
        (11, 2, "terminated", -400.0),
    ]


# windows


def window_by_hand(table, version, i, window, columns):
    """One observation from the table: windowed columns move along it, broadcast ones repeat the last bar,
    the account's own are given."""
    layout = LAYOUTS[version]
    out = np.empty((window, layout.n_features), np.float32)
    for place, (name, windowed) in enumerate(zip(layout.columns, layout.windowed)):
        out[:, place] = (
            columns[name]
            if name in columns
            else table[name].to_numpy()[i - window + 1 : i + 1]
            if windowed
            else table[name].iloc[i]
        )
    return out


def own_columns(account, i, initial=1000.0, cap=0.20):
    "The account's columns in plain floats."
    cash, equity, peak, trades, wins = (
        float(getattr(account, name)[i]) for name in ("cash", "equity", "peak_equity", "trades", "wins")
    )
    share = (equity - cash) / equity
    return {
        "pnl": math.tanh(10 * (equity - initial) / initial),
        "win_rate": wins / trades if trades else 0.5,
        "drawdown": (peak - equity) / peak,
        "position_pct": share / cap,
        "available_pct": 1 - abs(share),
        "account_change": math.log10(equity / initial),
    }


def compare_windows(bars, version, fit, asset_class, start, steps=16, n=6, window=100):
    """The environment's windows against the builder's, bit for bit, and against windows cut by hand, while
    the accounts trade."""
    env = GPUVectorizedTradingEnv(
        bars,
        GPUEnvConfig(
            n_envs=n, version=version, asset_class=asset_class, window=window, account=BROKER[asset_class]
        ),
        fit,
    )
    builder = BacktestObservationBuilder(
        bars, version, fit, "15Min", asset_class, window, BROKER[asset_class]
    ).precompute()
    table, shows_account = (
        feature_table(bars, version, fit, "15Min", asset_class),
        bool(LAYOUTS[version].account_columns),
    )
    obs, moved, usable = env.reset_at(start), set(), LAYOUTS[version].account_columns
    for t, action in enumerate(random_actions(1, steps, env)):
        account, rows = env.account, env.bar
        assert (
            obs.shape == (n, window * LAYOUTS[version].n_features) == (n, env.obs_dim)
            and obs.dtype == torch.float32
        )
        assert torch.equal(obs, builder.observations(rows, account if shows_account else None).flatten(1)), t
        one = AccountState(*(getattr(account, f.name)[t % n : t % n + 1] for f in fields(AccountState)))
        alone = builder.get_obs_at_bar(int(rows[t % n]), one if shows_account else None)
        assert alone.shape == (window, LAYOUTS[version].n_features) and np.array_equal(
            alone.ravel(), obs[t % n].numpy()
        ), t
        if t % 5 == 0:
            columns = {name: value for name, value in own_columns(account, t % n).items() if name in usable}
            by_hand = window_by_hand(table, version, int(rows[t % n]), window, columns)
            market = [name not in columns for name in LAYOUTS[version].columns]
            assert (
                np.array_equal(alone[:, market], by_hand[:, market]) and np.abs(alone - by_hand).max() < 1e-6
            )
        moved |= {float(account.equity[t % n])}
        obs = env.step(action)[0]
    assert len(moved) > steps // 4, "the accounts moved"


@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
@pytest.mark.parametrize("version", list(LAYOUTS))
def test_windows_are_those_of_the_builder(version, asset_class):
    "Every layout, account columns included, while the accounts trade."
    compare_windows(
        simulated(asset_class),
        version,
        fitted(asset_class, version),
        asset_class,
        [3010, 3200, 3511, 3777, 4000, 4100],
    )


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.6.0", "5.3.0"])
def test_windows_of_real_bars_are_those_of_the_builder(real_bars_folder, version):
    "BTC-USDT on both sides of its gap, SPY over sessions and a half day."
    for asset_class, symbol in (("crypto", "BTC-USDT"), ("equity", "SPY")):
        bars = real(real_bars_folder, asset_class, symbol)
        if asset_class == "crypto":
            bars = around_the_hole(bars)
        else:
            half_day = int(np.searchsorted(bars.index, pd.Timestamp("2024-11-29", tz="UTC")))
        fit = fit_features(bars[:2000], version, "15Min", asset_class)
        compare_windows(
            bars,
            version,
            fit,
            asset_class,
            [2100, 2940, 3600, 3601, 4000, 4200]
            if asset_class == "crypto"
            else [2100, 2500, half_day - 20, half_day, half_day + 5, 4800],
            steps=20,
        )


def test_other_windows_work_as_well():
    "One bar, and more than a hundred."
    for window in (1, 7, 250):
        compare_windows(
            simulated("crypto"),
            "5.3.0",
            fitted("crypto", "5.3.0"),
            "crypto",
            [3010, 3200, 3511, 3777, 4000, 4100],
            steps=10,
            window=window,
        )


@pytest.mark.parametrize("version", DISTINCT)
def test_a_live_window_is_that_of_training(version):
    """From `min_history` bars and the account's state alone, within 1e-4; an age may differ where two
    states are equally likely."""
    bars, fit, config = simulated("equity"), fitted("equity", version), BROKER["equity"]
    live = InferenceObservationBuilder(version, fit, "15Min", "equity", account_config=config)
    env = env_of(market_of("equity", version), n_envs=1)
    obs, worst = env.reset_at([3600]), 0.0
    for action in random_actions(4, 6, env):
        i = int(env.bar[0])
        window = live.build(
            bars[i - LAYOUTS[version].min_history + 1 : i + 1],
            env.account if LAYOUTS[version].account_columns else None,
        )
        exact = [not name.startswith("age_") for name in LAYOUTS[version].columns]
        worst = max(worst, np.abs(window.ravel() - obs.numpy()[0]).reshape(100, -1)[:, exact].max())
        obs = env.step(action)[0]
    assert worst <= 1e-4, worst


def test_no_builder_reaches_over_a_gap():
    """99 bars after it there is no window yet, 100 after there is; a live decision waits for `min_history`
    bars."""
    bars = simulated("crypto")
    bars, fit = pd.concat([bars[:3400], bars[3640:]]), fitted("crypto")
    builder = BacktestObservationBuilder(bars, "5.6.0", fit, "15Min", "crypto")
    for bar in (98, 3400, 3498, 4560, -1):
        with pytest.raises(InputError):
            builder.get_obs_at_bar(bar)
    assert all(np.isfinite(builder.get_obs_at_bar(bar)).all() for bar in (99, 3399, 3499, 4559))
    live = InferenceObservationBuilder("5.6.0", fit, "15Min", "crypto")
    for few in (bars[:0], bars[:599], bars[3000:3999]):
        with pytest.raises(InputError, match="needs 600 bars without a gap"):
            live.build(few)
    assert live.build(bars[3000:4000]).shape == (100, 58)
    with pytest.raises(InputError, match="layout 5.3.0 shows the account"):
        InferenceObservationBuilder("5.3.0", fitted("crypto", "5.3.0"), "15Min", "crypto").build(bars[:700])


def test_indices_become_the_windows_that_others_get():
    "An observation asked for as indices, materialised, is the window."
    market = market_of("crypto", "5.3.0")
    windows, indices = (
        env_of(market, episode_length=5),
        env_of(market, episode_length=5, observations="indices"),
    )
    a, b = windows.reset(3), indices.reset(3)
    for action in random_actions(5, 12, windows):
        assert (
            isinstance(b, Obs)
            and b.index.dtype == torch.int64
            and b.dense.shape == (8, 6)
            and torch.equal(a, indices.table.materialise(b))
        )
        a, _, _, _, one = windows.step(action)
        b, _, _, _, two = indices.step(action)
        assert torch.equal(one["final_obs"], indices.table.materialise(two["final_obs"]))


# sessions


def check_session_ends(bars, fit, days):
    """By the exchange's own calendar: no order fills across a session's end, whether it opens, closes or
    adds; the bar before can still trade."""
    market = market_data(bars, "5.6.0", fit, "15Min", "equity")
    closes = set(
        pd.DatetimeIndex(
            exchange_calendars.get_calendar("XNYS").closes[
                str(bars.index[0].date()) : str(bars.index[-1].date())
            ]
        )
        .as_unit("ns")
        .asi8
    )
    ends = np.flatnonzero([label + 900_000_000_000 in closes for label in bars.index.as_unit("ns").asi8])
    assert np.array_equal(np.flatnonzero(~market.can_fill), ends), (
        "one bar a session, and the last one of all"
    )
    usable = np.array([i for i in ends if market.can_decide[i - 3] and i + 5 < len(bars)])
    assert len(usable) >= days
    holding = AccountConfig(
        **{
            **{f.name: getattr(BROKER["equity"], f.name) for f in fields(AccountConfig)},
            "stop_pct": 0.0,
            "target_pct": 0.0,
        }
    )
    env = env_of(market, n_envs=len(usable), account=holding, observations="indices")
    for action in (1, SELL_75, CLOSE):
        env.reset_at(usable)
        *_, infos = env.step(torch.full((len(usable),), action))
        assert not bool(infos["fills"].quantity.any()) and bool((infos["account"].equity == 1000).all())
        env.reset_at(usable - 1)
        filled = env.step(torch.full((len(usable),), BUY_75))[4]["fills"].quantity
        assert bool((filled > 0).all())
        *_, infos = env.step(torch.full((len(usable),), action))
        assert not bool(infos["fills"].quantity.any()) and torch.equal(infos["account"].quantity, filled), (
            "held overnight"
        )
        assert torch.allclose(
            infos["account"].equity,
            infos["account"].cash + filled * torch.as_tensor(market.prices[3][usable + 1]),
            rtol=1e-15,
        )
    return usable


def test_no_order_is_filled_on_a_sessions_last_bar():
    "Simulated shares."
    check_session_ends(simulated("equity"), fitted("equity"), 100)


def test_no_order_is_filled_on_a_real_sessions_last_bar(real_bars_folder):
    "SPY, whose half days of 2024 end at 13:00."
    bars = real(real_bars_folder, "equity", "SPY")
    usable = check_session_ends(bars, fit_features(bars[:2000], "5.6.0", "15Min", "equity"), 100)
    ends = bars.index[usable].tz_convert("America/New_York").strftime("%Y-%m-%d %H:%M")
    assert {"2024-07-03 12:45", "2024-11-29 12:45", "2024-12-24 12:45", "2024-07-02 15:45"} <= set(ends)


# fitted state


def test_fitted_state_travels_with_the_market():
    """Without a fit an environment takes its own bars as the training span; a later span keeps the training
    span's fit, and asking for one without a fit is an error."""
    bars = simulated("crypto")
    own = GPUVectorizedTradingEnv(bars[:FITTED], GPUEnvConfig(n_envs=2), None)
    given = GPUVectorizedTradingEnv(bars[:FITTED], GPUEnvConfig(n_envs=2), fitted("crypto"))
    assert own.market.fit == given.market.fit and np.array_equal(own.market.features, given.market.features)
    later = GPUVectorizedTradingEnv(own.market.span(1000, 2000))
    assert (
        later.market.fit == own.market.fit and later.market.fit["last"] == bars.index[FITTED - 1].isoformat()
    )
    whole = GPUVectorizedTradingEnv(bars, GPUEnvConfig(n_envs=2), fitted("crypto"))
    assert np.array_equal(whole.market.features[:FITTED], own.market.features), (
        "later bars see the chains of the training span"
    )
    with pytest.raises(
        InputError, match="expected a FeatureFit from fit_features .of the training span., was NoneType"
    ):
        market_data(bars, "5.6.0", None, "15Min", "crypto")
    for builder in (
        lambda: BacktestObservationBuilder(bars, "5.6.0", None, "15Min", "crypto"),
        lambda: InferenceObservationBuilder("5.6.0", None, "15Min", "crypto"),
    ):
        with pytest.raises(InputError, match="fit: is missing"):
            builder()


# rewards


PRESETS = {  # name -> horizon, threshold, weights
    "v2.4.5": (
        4,
        0.0,
        {
            "direction": 0.35,
            "magnitude": 0.10,
            "pnl": 0.25,
            "stop_tp": 0.15,
            "exploration": 0.10,
            "drawdown": 0.05,
        },
    ),
    "v2.5.0": (
        4,
        0.003,
        {
            "direction": 0.40,
            "magnitude": 0.05,
            "pnl": 0.25,
            "stop_tp": 0.10,
            "exploration": 0.15,
            "drawdown": 0.03,
            "costs": 0.02,
            "incentive": 0.02,
        },
    ),
    "equity": (1, 0.0, {"equity": 1.0}),
    "differential_sharpe": (1, 0.0, {"differential_sharpe": 1.0}),
}
ROUND_TRIP = {"crypto": 2 * 27e-4, "equity": 2 * 2e-4}


def clip(x, limit):
    return max(-limit, min(limit, x))


def test_weights_of_ones_own_take_the_place_of_the_presets():
    rules = account_rules(AccountConfig(), "crypto")

    def own(weights):
        return reward_preset("v2.4.5", "5.6.0", rules, weights).weights

    assert own({"pnl": 0.5, "drawdown": 0, "equity": 2}) == {
        "direction": 0.35,
        "magnitude": 0.10,
        "pnl": 0.5,
        "stop_tp": 0.15,
        "exploration": 0.10,
        "equity": 2,
    } and own(None) == own({"pnl": 0.25})
    with pytest.raises(InputError, match="env.reward_weights: unknown name 'pln'; did you mean 'pnl'"):
        own({"pln": 1.0})
    with pytest.raises(InputError, match="every component of equity is left out"):
        reward_preset("equity", "5.6.0", rules, {"equity": 0})
    env, plain = (
        env_of(
            rough_market("crypto", "5.6.0"), n_envs=3, reward_preset="equity", observations="indices", **how
        )
        for how in (dict(reward_weights={"equity": 0.5, "costs": 1.0}), {})
    )
    for e in (env, plain):
        e.reset_at([10, 11, 23], [131, 132, 144])
    assert env.reward_names == ["equity", "costs"]
    for action in (3, 0, 5):
        (_, reward, *_, infos), (_, other, *_) = (e.step(torch.full((3,), action)) for e in (env, plain))
        paid = infos["reward_components"][:, 1]
        assert torch.allclose(reward.double(), 0.5 * other.double() + paid.double(), atol=2e-6) and (
            action != 3 or bool((paid < 0).any())
        )


def expected_rewards(market, account, preset, actions, start, typical):
    "Components of each step of one account, from the description of the rewards, in plain floats."
    horizon, threshold, weights = PRESETS[preset]
    threshold, recent, mean, square, rows = (
        max(threshold, ROUND_TRIP[market.asset_class]),
        deque(maxlen=64),
        0.0,
        0.0,
        [],
    )
    opening, _, _, close, _ = market.prices
    n_actions = MODEL_SPECS[market.version].n_actions
    for t, action in enumerate(actions):
        bar = start + t
        before, paid = account.equity, account.costs
        units, exit_price = scalar_step(account, market, bar, action, n_actions)
        side, _, is_close = ACTIONS[n_actions][action]
        change, volatility = account.equity / before - 1, float(market.volatility[bar])
        forward = close[bar + horizon] / opening[bar + 1] - 1
        direction = (
            0 if is_close or units == 0 or abs(forward) <= threshold else side * math.copysign(1, forward)
        )
        recent.append(action)
        met = sum(account.met)
        account.met = []
        variance = square - mean**2
        sharpe = (
            (square * (change - mean) - 0.5 * mean * (change**2 - square)) / variance**1.5
            if variance > 1e-12
            else 0.0
        )
        rows.append(
            {
                "direction": direction,
                "magnitude": direction * math.tanh(abs(forward) / (volatility * math.sqrt(horizon))),
                "pnl": clip(change / volatility, 1),
                "stop_tp": met,
                "exploration": 1 - recent.count(action) / len(recent) if units != 0 or action == 0 else 0,
                "drawdown": max(
                    -1.0,
                    -10 * max(0.0, (account.peak_equity - account.equity) / account.peak_equity - 0.15) ** 2,
                ),
                "costs": clip(-(account.costs - paid) / before / volatility, 1),
                "incentive": float(units != 0),
                "equity": clip(math.log(account.equity / before) / typical, 10),
                "differential_sharpe": clip(sharpe, 10),
            }
        )
        mean, square = mean + 0.01 * (change - mean), square + 0.01 * (change**2 - square)
    return rows


class ExitAware(ScalarAccount):
    "Remembers what was met in a bar: +1 for a target, -1 for a stop."

    met = []

    def _passed(self, open_):
        passed, side = super()._passed(open_), math.copysign(1, self.quantity)
        if passed:
            self.met = [math.copysign(1, side * (open_ - self.average_entry))]
        return passed

    def _inside(self, high, low):
        price, side = super()._inside(high, low), math.copysign(1, self.quantity)
        if price is not None:
            self.met = [*self.met, math.copysign(1, side * (price - self.average_entry))]
        return price


@functools.cache
def rough_market(asset_class, version):
    "150 bars of a market that falls, with gaps and wide bars."
    rng = np.random.default_rng(4)
    close = 20 * np.cumprod(1 - 0.004 + 0.018 * rng.standard_normal(150))
    open_ = np.concatenate([close[:1], close[:-1]]) * (1 + 0.004 * rng.standard_normal(150))
    return hand_made_market(
        close,
        open_,
        np.maximum(open_, close) * 1.004,
        np.minimum(open_, close) * 0.996,
        version,
        asset_class,
        volatility=rng.uniform(0.005, 0.05, 150),
        daily_volatility=rng.uniform(0.01, 0.1, 150),
        daily_dollar_volume=np.exp(rng.uniform(10, 20, 150)),
        can_fill=rng.random(150) < 0.9,
    )


@pytest.mark.parametrize(
    "version,asset_class",
    [("5.6.0", "crypto"), ("5.6.0", "equity"), ("5.3.0", "equity"), ("2.7.0", "crypto"), ("2.3.0", "equity")],
)
@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_component_by_hand(preset, version, asset_class):
    """Three accounts through 120 bars, each component of each step in plain floats, and their weighted sum;
    a policy that cannot see its drawdown pays twice for it."""
    market = rough_market(asset_class, version)
    env = env_of(market, n_envs=3, reward_preset=preset, account=BOLD[asset_class], observations="indices")
    weights = dict(PRESETS[preset][2])
    if "drawdown" in weights and version in ("5.6.0", "2.3.0"):
        weights["drawdown"] = 0.10
    assert env.reward.weights == weights and env.reward_names == list(weights)
    assert (
        env.reward.threshold == pytest.approx(max(PRESETS[preset][1], ROUND_TRIP[asset_class]), abs=1e-15)
        and env.reward.horizon == PRESETS[preset][0]
    )
    starts, steps = [10, 11, 23], 120
    actions = random_actions(7, steps, env)
    actions[:, 1] = torch.where(torch.arange(steps) % 20 == 0, 1, 0)  # mostly holds
    actions[:, 2] = torch.where(actions[:, 2] > env.n_actions // 2, 1, actions[:, 2])
    typical = 0.9 * math.sqrt(
        float(np.mean(market.volatility[env.decision_bars] ** 2))
    )  # by this moves an account that holds all it may
    expected = [
        expected_rewards(
            market,
            ExitAware.of(BOLD[asset_class], asset_class, torch_root),
            preset,
            actions[:, i].tolist(),
            start,
            typical,
        )
        for i, start in enumerate(starts)
    ]
    env.reset_at(starts, [s + steps + 1 for s in starts])
    weight_row, components = (
        np.array(list(weights.values())),
        np.array([[[row[name] for name in weights] for row in rows] for rows in expected]),
    )
    for t in range(steps):
        _, reward, terminated, _, infos = env.step(actions[t])
        assert not bool(terminated.any())
        np.testing.assert_allclose(
            infos["reward_components"].numpy(),
            components[:, t],
            rtol=1e-7,
            atol=1e-10,
            err_msg=f"{t} {env.reward_names}",
        )
        np.testing.assert_allclose(reward.numpy(), components[:, t] @ weight_row, rtol=1e-6, atol=2e-6)
    found = {name: set(components[..., k].ravel().round(6).tolist()) for k, name in enumerate(weights)}
    assert min(map(len, found.values())) >= 2, (
        f"nothing was seen of {[name for name in found if len(found[name]) < 2]}"
    )
    assert "stop_tp" not in found or found["stop_tp"] == found["direction"] == {-1, 0, 1}
    assert all(
        abs(v) <= 1 for name in found if name not in ("equity", "differential_sharpe") for v in found[name]
    )


def test_direction_pays_from_the_round_trip_on():
    """54 bp for crypto at the broker's costs: a move below has no direction, one above has; HOLD, CLOSE and
    a sale of nothing never have."""

    def direction(move, action, preset="v2.4.5", asset_class="crypto", **account):
        close = np.full(30, 100.0)
        close[14:] *= 1 + move
        env = env_of(
            hand_made_market(close, asset_class=asset_class),
            n_envs=1,
            reward_preset=preset,
            account=replace(BROKER[asset_class], **account),
        )
        env.reset_at([10])
        return float(env.step(torch.tensor([action]))[4]["reward_components"][0, 0])

    assert [direction(m, BUY_75) for m in (0.0053, 0.0055, -0.0053, -0.0055)] == [0, 1, 0, -1]
    assert [direction(m, a) for m, a in ((0.1, 0), (0.1, CLOSE), (0.1, SELL_75), (-0.1, SELL_75))] == [
        0,
        0,
        0,
        0,
    ], "crypto holds nothing to sell"
    assert [
        direction(m, SELL_75, asset_class="equity", initial_account_value=10_000.0)
        for m in (0.0003, 0.0005, -0.0003, -0.0005)
    ] == [0, -1, 0, 1]
    assert [direction(m, BUY_75, "v2.5.0", "equity") for m in (0.0029, 0.0031)] == [0, 1], (
        "0.003 of the preset's own, where the round trip is less"
    )
    assert [direction(m, BUY_75, slippage_bps=10.0) for m in (0.0071, 0.0073)] == [0, 1], (
        "a threshold follows the costs"
    )


@pytest.mark.parametrize("preset", ["v2.4.5", "v2.5.0"])
@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_an_order_that_the_broker_refuses_is_not_rewarded(asset_class, preset):
    """Small accounts, random actions: what asks for an order and gets none has no direction, no magnitude,
    no exploration and no incentive; every order that is placed is worth the minimum, or is an exit."""
    least = {"crypto": 10.0, "equity": 1.0}[asset_class]
    account = replace(BROKER[asset_class], initial_account_value=16 * least)
    env = env_of(
        market_of(asset_class),
        n_envs=200,
        reward_preset=preset,
        account=account,
        observations="indices",
        episode_length=60,
    )
    env.reset(0)
    kinds = [
        name for name in ("direction", "magnitude", "exploration", "incentive") if name in env.reward_names
    ]
    refused = placed = 0
    for action in random_actions(5, 80, env):
        held = env.account.quantity
        *_, infos = env.step(action)
        fills, components = infos["fills"], infos["reward_components"]
        none = (action > 0) & (fills.quantity == 0)
        assert not bool(components[none][:, [env.reward_names.index(name) for name in kinds]].any())
        assert bool(
            (
                components[:, env.reward_names.index("exploration")][(action == 0) | (fills.quantity != 0)]
                >= 0
            ).all()
        )
        opens = (fills.quantity != 0) & (fills.quantity * held >= 0)
        price = torch.as_tensor(env.market.prices[0])[infos["final_obs"].index]
        assert bool(((fills.quantity.abs() * price)[opens] >= least - 1e-9).all())
        refused, placed = refused + int(none.sum()), placed + int(opens.sum())
    assert refused > 1000 and placed > 500


@pytest.mark.parametrize("preset", ["equity", "differential_sharpe"])
def test_a_gap_does_not_outweigh_everything(preset):
    """A share that opens 45 % higher against a short, and one that falls by half: rewards stay within 10;
    ordinary bars are not touched by the bound."""
    close = 20 * np.cumprod(1 + 0.0025 * np.random.default_rng(0).standard_normal(300))
    close[200:] *= 1.45
    close[250:] *= 0.5
    open_ = np.concatenate([close[:1], close[:-1]])
    open_[[200, 250]] = close[[200, 250]]
    market = hand_made_market(close, open_, asset_class="equity", volatility=0.0025)
    env = env_of(market, n_envs=2, reward_preset=preset, episode_length=290)
    env.reset_at([5, 5])
    rewards = torch.stack([env.step(torch.tensor([SELL_75, BUY_75]))[1] for _ in range(280)]).numpy()
    ordinary = np.delete(rewards, [194, 195, 244, 245], 0)
    assert np.abs(rewards).max() == 10 and np.isfinite(rewards).all() and ordinary.std() > 0
    # the differential Sharpe ratio has no scale before it has seen a few returns
    assert preset != "equity" or (np.abs(ordinary).max() < 10 and rewards[194].tolist() == [-10, 10])


@pytest.mark.slow
@pytest.mark.parametrize("volume", [1e12, 2.0**53, 2.0**64, 1e25, 1e308])
def test_one_absurd_volume_is_forgotten_with_its_window(volume):
    """Turnover before it and from five days after it on is to the last bit what it was, and finite in
    between: sums are never subtracted."""
    bars = simulated("crypto").copy()
    honest = market_of("crypto").daily_dollar_volume
    bars.iloc[2000, bars.columns.get_loc("volume")] = volume
    changed_ = market_data(bars, "5.6.0", fitted("crypto"), "15Min", "crypto").daily_dollar_volume
    same = np.r_[0:2000, 2480 : len(bars)]
    assert (
        np.array_equal(changed_[same], honest[same])
        and np.isfinite(changed_).all()
        and (changed_[2000:2480] > 100 * honest[2000:2480]).all()
    )


def test_exploration_counts_the_last_sixty_four_actions():
    """64 holds, then one purchase: 1 of 64; held on, the holds return to 63 of 64 as the window moves. A
    CLOSE of nothing is counted and earns nothing."""
    env = env_of(hand_made_market(np.full(200, 10.0)), n_envs=2)
    env.reset_at([10, 10])
    share = []
    for t in range(140):
        *_, infos = env.step(torch.tensor([1 if t == 70 else 0, t % 8]))
        share.append((1 - infos["reward_components"][:, env.reward_names.index("exploration")]).tolist())
    assert [share[t][0] for t in (0, 69, 70, 71, 133, 134, 135)] == [1, 1, 1 / 64, 63 / 64, 63 / 64, 1, 1]
    assert [share[t][1] for t in (0, 1, 7, 8, 63, 64, 139)] == [1, 1 / 2, 1, 2 / 9, 1, 1 / 8, 1 / 8]


@pytest.mark.slow
def test_a_restart_forgets_the_old_episode():
    """After each of several restarts the account's rewards are those of a fresh environment: neither recent
    actions nor moving averages survive, also where the ring of 64 comes around again."""
    market = rough_market("crypto", "5.3.0")
    for preset in PRESETS:
        env, fresh, restarts = (
            env_of(market, n_envs=2, reward_preset=preset, episode_length=20, observations="indices"),
            None,
            0,
        )
        env.reset(1)
        for action in random_actions(8, 110, env):
            _, _, terminated, truncated, infos = env.step(action)
            if fresh:
                assert torch.equal(
                    infos["reward_components"][0], fresh.step(action)[4]["reward_components"][0]
                ), (preset, restarts)
            if terminated[0] or truncated[0]:
                fresh, restarts = (
                    env_of(market, n_envs=2, reward_preset=preset, episode_length=20, observations="indices"),
                    restarts + 1,
                )
                fresh.reset_at(env.bar[:1].expand(2), env.end[:1].expand(2))
        assert restarts == 5


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_market_that_stands_still_has_finite_rewards(preset):
    "No volatility and no volume: costs are all that moves the account, and nothing is divided by zero."
    env = env_of(
        hand_made_market(np.full(80, 10.0), volatility=0.0, daily_volatility=0.0, daily_dollar_volume=0.0),
        n_envs=8,
        reward_preset=preset,
    )
    env.reset(0)
    for action in random_actions(2, 60, env):
        _, reward, _, _, infos = env.step(action)
        assert bool(
            torch.isfinite(reward).all()
            and torch.isfinite(infos["reward_components"]).all()
            and torch.isfinite(infos["account"].equity).all()
        )


def test_cheaper_training_keeps_the_thresholds():
    """Costs at a half are half, to a step of the size grid, and a direction must still pay the whole round
    trip."""
    holding = replace(BROKER["crypto"], stop_pct=0.0, target_pct=0.0)
    env, other, buy = (
        tiny_env(n_envs=1, account=holding),
        tiny_env(n_envs=1, account=holding),
        torch.tensor([BUY_75]),
    )
    other.set_cost_scale(0.5)
    for e in (env, other):
        e.reset_at([10])
    a, b = (e.step(buy)[4]["fills"].costs for e in (env, other))
    assert (
        float(b) == pytest.approx(0.5 * float(a), abs=TINY.prices[0, 11] * 1e-9)
        and float(a) > 0
        and other.reward.threshold == env.reward.threshold
    )
    other.set_cost_scale(1.0)
    other.reset_at([10])
    assert torch.equal(other.step(buy)[4]["fills"].costs, a), "and back, exactly"


# going on later


def trajectory(env, actions):
    "All that the steps give."
    rows = []
    for action in actions:
        obs, reward, terminated, truncated, infos = env.step(action)
        rows += [
            obs,
            reward,
            terminated,
            truncated,
            infos["final_obs"],
            infos["reward_components"],
            env.bar,
            *(getattr(infos["account"], f.name) for f in fields(AccountState)),
        ]
    return rows


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_saved_environment_goes_on_bit_for_bit(tmp_path, preset):
    "Through a file, into a new environment, across restarts; and saving disturbs nothing."
    market = market_of("equity", "5.3.0", 10)

    def make():
        return env_of(market, n_envs=9, reward_preset=preset, episode_length=50)

    env = make()
    actions = random_actions(9, 74, env)
    env.reset(4)
    trajectory(env, actions[:37])
    torch.save(env.state_dict(), tmp_path / "state.pt")
    rest = trajectory(env, actions[37:])
    other = make()
    obs = other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(obs.index, other.bar)
    again = trajectory(other, actions[37:])
    assert len(rest) == len(again) and all(torch.equal(a, b) for a, b in zip(rest, again))
    undisturbed = make()
    undisturbed.reset(4)
    assert all(torch.equal(a, b) for a, b in zip(rest, trajectory(undisturbed, actions)[-len(rest) :]))


def test_a_saved_environment_remembers_its_cost_scale():
    "What the next step costs depends on it."
    env, other, buy = tiny_env(), tiny_env(), torch.tensor([BUY_75, BUY_75])
    env.set_cost_scale(0.25)
    env.reset(0)
    other.load_state_dict(env.state_dict())
    costs = env.step(buy)[4]["fills"].costs
    assert bool((costs > 0).all()) and torch.equal(costs, other.step(buy)[4]["fills"].costs)


@pytest.mark.slow
def test_a_state_from_before_is_still_read():
    """Older states keep the recent actions in a ring that begins anywhere, and their counts beside them:
    the same trajectory, through restarts."""

    def make():
        return env_of(market_of("equity", "5.3.0", 10), n_envs=9, episode_length=90)

    env, other = make(), make()
    actions = random_actions(19, 300, env)
    env.reset(4)
    trajectory(env, actions[:130])
    state = env.state_dict()
    assert (
        {len(torch.unique(column)) for column in (state["recent"] < 0).sum(0)[:, None]} == {1}
        and int((state["recent"] < 0).sum()) > 0
        and state["recent"].max() == 7
    )
    counts = torch.stack(
        [(state["recent"] == action).sum(0) for action in range(8)] + [-(state["recent"] >= 0).sum(0)], 1
    ).double()
    other.load_state_dict(state | {"recent": state["recent"].roll(17, 0), "recent_row": 17, "counts": counts})
    assert all(
        torch.equal(a, b) for a, b in zip(trajectory(env, actions[130:]), trajectory(other, actions[130:]))
    )


# compiled


needs_a_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler here"
)


def closest(plain, compiled, actions):
    """Both through the same steps: the largest difference of any variable, fill, component and reward
    (relative where they exceed 1), and the restarts. What is whole or true must be equal."""
    worst, restarts = 0.0, 0
    for action in actions:
        (obs, reward, *ends, infos), (obs2, reward2, *ends2, infos2) = (
            plain.step_index(action),
            compiled.step_index(action),
        )
        here, there = (
            [
                *vars(i["account"]).values(),
                *vars(e.account).values(),
                *i["fills"],
                i["reward_components"],
                r,
                o.dense,
                i["final_obs"].dense,
                i["decision_equity"],
            ]
            for i, e, r, o in ((infos, plain, reward, obs), (infos2, compiled, reward2, obs2))
        )
        whole = [
            (plain.bar, compiled.bar),
            (plain.end, compiled.end),
            (obs.index, obs2.index),
            (infos["final_obs"].index, infos2["final_obs"].index),
            *zip(ends, ends2),
        ]
        assert all(
            a.dtype == b.dtype and a.shape == b.shape for a, b in [*zip(here, there, strict=True), *whole]
        ) and all(
            torch.equal(a, b)
            for a, b in whole + [(a, b) for a, b in zip(here, there) if a.dtype == torch.bool]
        )
        for a, b in zip(here, there):
            if a.dtype == torch.float64:
                worst = max(worst, float(((a - b).abs() / a.abs().clamp(min=1)).max()))
            elif a.dtype == torch.float32 and a.numel():
                assert torch.equal(a, b) or float(((a - b).abs() / a.abs().clamp(min=1)).max()) < 2e-7, (
                    "more than a last bit of a rounded number"
                )
        restarts += int((ends[0] | ends[1]).sum())
    return worst, restarts


@pytest.mark.slow
@needs_a_compiler
def test_compiled_steps_are_the_plain_ones():
    """Shorts, stops, costs, account columns, restarts, another cost scale, and a saved state that goes from
    one to the other and back: all within 1e-12."""
    market = rough_market("equity", "5.3.0")

    def make(compiled):
        return GPUVectorizedTradingEnv(
            market,
            config_of(market, n_envs=40, episode_length=30, account=BOLD["equity"], observations="indices"),
            compiled=compiled,
        )

    plain, compiled = make(False), make(True)
    for env in (plain, compiled):
        env.reset_index(3)
    actions = random_actions(31, 590, plain)
    assert closest(plain, compiled, actions[:200])[0] < 1e-12
    for env in (plain, compiled):
        env.set_cost_scale(0.25)
    assert closest(plain, compiled, actions[200:400])[0] < 1e-12
    state, other = compiled.state_dict(), plain.state_dict()
    assert state.keys() == other.keys() and all(
        torch.equal(state[name], other[name]) for name in ("bar", "end", "recent", "random")
    )
    plain.load_state_dict(state)
    compiled.load_state_dict(state)
    worst, restarts = closest(plain, compiled, actions[400:])
    assert (
        worst < 1e-12
        and restarts > 100
        and float(plain.account.quantity.min()) < 0 < float(plain.account.costs.max())
    )
    for wrong in (-1, 8):
        with pytest.raises(InputError, match="actions are int64, 0 to 7"):
            compiled.step_index(torch.full((40,), wrong))


@pytest.mark.proof
@needs_a_compiler
@pytest.mark.parametrize("version,asset_class", [("5.6.0", "crypto"), ("5.3.0", "equity")])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_is_the_same_compiled(preset, version, asset_class):
    "A million steps each."
    market = market_of(asset_class, version)
    plain, compiled = (
        GPUVectorizedTradingEnv(
            market,
            config_of(
                market,
                n_envs=500,
                episode_length=64,
                reward_preset=preset,
                account=BOLD[asset_class],
                observations="indices",
            ),
            compiled=c,
        )
        for c in (False, True)
    )
    for env in (plain, compiled):
        env.reset_index(3)
    worst, restarts = closest(plain, compiled, random_actions(32, 2000, plain))
    print(
        f"{preset}, {asset_class}: 1,000,000 random steps, {restarts:,} restarts, "
        f"largest difference of plain and compiled {worst:.1e}"
    )
    assert worst < 1e-12 and restarts > 10_000


@pytest.mark.slow
def test_without_a_compiler_it_says_what_to_do(tmp_path):
    "In a process of its own, whose compiler does not exist; plain steps go on as ever."
    code = """
import torch
from test_env import TINY, GPUVectorizedTradingEnv, InputError, config_of
for compiled in (False, True):
    env = GPUVectorizedTradingEnv(TINY, config_of(TINY, n_envs=2), compiled=compiled)
    env.reset(0)
    try: print("stepped", len(env.step(torch.tensor([0, 1]))))
    except InputError as e: print(e)
"""
    settings = os.environ | {
        "CXX": str(tmp_path / "g++"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent))),  # this file, and scalar_account
    }
    lines = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=600
    ).stdout.splitlines()
    assert (
        lines[0] == "stepped 5"
        and len(lines) == 2
        and "C++ compiler" in lines[1]
        and "install g++" in lines[1]
        and "compiled=False" in lines[1]
    )


def test_market_data_survives_its_file(tmp_path):
    "An environment from the file does what one from the bars does."
    market = market_of("equity")
    loaded = MarketData.load(market.span(3000, 4000).save(tmp_path / "market.npz"))
    runs = []
    for m in (market.span(3000, 4000), loaded):
        env = env_of(m)
        env.reset(1)
        runs.append(trajectory(env, random_actions(2, 40, env)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    (tmp_path / "broken.npz").write_bytes((tmp_path / "market.npz").read_bytes()[:5000])
    for path, words in (
        (tmp_path / "none.npz", "no such file"),
        (tmp_path / "broken.npz", "is not a market data file"),
    ):
        with pytest.raises(InputError, match=words):
            MarketData.load(path)


# careless people


TINY = hand_made_market(np.arange(1.0, 60.0))


def tiny_env(**changes):
    return env_of(TINY, **{"n_envs": 2, "episode_length": 8} | changes)


@pytest.mark.parametrize(
    "careless,words",
    [
        (lambda: GPUEnvConfig(n_env=4), "unknown name 'n_env'; did you mean 'n_envs'"),
        (lambda: GPUEnvConfig(n_envs=0), "n_envs: expected 1 or more, was 0"),
        (lambda: GPUEnvConfig(n_envs="many"), "expected a whole number, was 'many'"),
        (lambda: GPUEnvConfig(n_envs=2.5), "expected a whole number, was 2.5"),
        (lambda: GPUEnvConfig(window=0), "window: expected 1 or more bars, was 0"),
        (lambda: GPUEnvConfig(episode_length=0), "episode_length: expected 1 or more"),
        (lambda: GPUEnvConfig(version="5.60"), "did you mean '5.6.0'"),
        (lambda: GPUEnvConfig(observations="pixels"), "one of windows, indices, was 'pixels'"),
        (lambda: GPUEnvConfig(account=None), "GPUEnvConfig.account"),
        (lambda: tiny_env(reward_preset="v2.4"), "did you mean 'v2.4.5'"),
        (lambda: tiny_env(window=5), "was made for 4, was 5"),
        (lambda: tiny_env(account=AccountConfig(allow_short=True)), "crypto cannot be sold short"),
        (
            lambda: GPUVectorizedTradingEnv(TINY.span(0, 5), config_of(TINY)),
            "no decision can be made in bars 0..4",
        ),
        (lambda: TINY.span(10, 5), "expected a span inside 0..59, was 10..5"),
        (lambda: TINY.span(0, 99), "was 0..99"),
        (
            lambda: replace(TINY, features=TINY.features[:, :9]),
            "expected features of shape (59, 58) for layout 5.6.0",
        ),
        (lambda: replace(TINY, version="2.3.0"), "expected features of shape (59, 53) for layout 2.3.0"),
        (
            lambda: GPUVectorizedTradingEnv(simulated("crypto"), GPUEnvConfig(window=9000), fitted("crypto")),
            "a window of 9000 and the warm-up of layout 5.6.0 need more than 9000",
        ),
        (
            lambda: GPUVectorizedTradingEnv(simulated("crypto")[:500], GPUEnvConfig(), fitted("crypto")),
            "need more than 600",
        ),
        (lambda: GPUVectorizedTradingEnv(simulated("crypto")[:500]), "500 bars, layout 5.6.0 needs 700"),
        (
            lambda: GPUVectorizedTradingEnv(
                simulated("crypto"), GPUEnvConfig(timeframe="7Min"), fitted("crypto")
            ),
            "7Min",
        ),
        (
            lambda: GPUVectorizedTradingEnv(
                simulated("crypto"), GPUEnvConfig(asset_class="stock"), fitted("crypto")
            ),
            "'stock'",
        ),
        (
            lambda: GPUVectorizedTradingEnv(
                simulated("crypto"), GPUEnvConfig(version="5.3.0"), fitted("crypto")
            ),
            "the fit is of layout 5.6.0",
        ),
        (lambda: GPUVectorizedTradingEnv(simulated("crypto").assign(close=np.nan)), "not finite"),
        (lambda: GPUVectorizedTradingEnv([1.0, 2.0]), "bars"),
        (lambda: GPUVectorizedTradingEnv(None), "bars"),
        (lambda: GPUVectorizedTradingEnv("data/SIM-USD.npz"), "bars"),
        (lambda: GPUVectorizedTradingEnv(TINY, config_of(TINY), device="gpu"), "gpu"),
    ],
    ids=range(28),
)
def test_a_careless_construction_gets_one_line(careless, words):
    "What was given, what was expected; never a traceback from within."
    with pytest.raises(InputError) as e:
        careless()
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named():
    "Asked for, but torch sees none."
    with pytest.raises(InputError, match="cuda"):
        GPUVectorizedTradingEnv(TINY, config_of(TINY), device="cuda")


def test_a_careless_step_gets_one_line():
    "Actions and starts are checked before anything moves."
    env = tiny_env()
    env.reset(0)
    before = env.state_dict()
    for careless, words in (
        (lambda: env.step(torch.tensor([0])), "expected 2 whole-number actions"),
        (lambda: env.step(torch.tensor([0.0, 1.0])), "whole-number actions, was torch.float32"),
        (lambda: env.step(torch.tensor([0, 8])), "actions are 0 to 7, was 0 to 8"),
        (lambda: env.step(torch.tensor([-1, 0])), "was -1 to 0"),
        (lambda: env.reset_at([0, 10]), "a first bar is warm-up"),
        (lambda: env.reset_at([10]), "expected 2 first bars"),
        (lambda: env.reset_at([10, 58]), "outside the span"),
    ):
        with pytest.raises(InputError) as e:
            careless()
        assert words in str(e.value) and "\n" not in str(e.value)
    after = env.state_dict()
    assert torch.equal(before["bar"], after["bar"]) and torch.equal(before["random"], after["random"])


def test_a_step_before_any_reset_gets_one_line():
    "It says to reset first."
    with pytest.raises(InputError, match="reset"):
        tiny_env().step(torch.tensor([0, 0]))


@pytest.mark.parametrize("state", ["empty", "of three accounts"])
def test_a_foreign_state_is_refused(state):
    "A state of another number of accounts, or none, is named, not loaded."
    three = tiny_env(n_envs=3)
    three.reset(0)
    with pytest.raises(InputError):
        tiny_env().load_state_dict({} if state == "empty" else three.state_dict())
