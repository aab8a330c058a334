"""The backtest is the environment, replayed to the last bit; books, baselines and reports add up."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from scalar_account import BROKER, FREE, STATE, ScalarAccount, hand_made_market, scalar_step, torch_root
from small_backtests import (
    FITTED,
    TIGHT,
    backtest,
    fitted,
    gap_bars,
    long_run,
    market_of,
    random_list,
    runs_of,
    simulated,
    small_trainer,
)

from trading_lib.account import AccountState, account_rules
from trading_lib.backtest import (
    CAPACITIES,
    STRESSES,
    VOLUME_LIMIT,
    greedy_actions,
    read_backtest,
    run_backtest,
    run_backtests,
    write_backtest,
)
from trading_lib.builder import BacktestObservationBuilder
from trading_lib.config import InputError
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data
from trading_lib.evaluation.baselines import buy_and_hold, moving_average_actions, oracle_actions, shifted
from trading_lib.evaluation.replay import decision_bars, replay, replay_and_keep
from trading_lib.features import fit_features
from trading_lib.networks import NativeActorCritic
from trading_lib.policy.factory import layout_of_env
from trading_lib.policy.recurrent import RecurrentActorCritic
from trading_lib.reporting.verdict import assess
from trading_lib.sources import simulate_bars
from trading_lib.version import MODEL_SPECS

BUY_75, SELL_75, CLOSE = 3, 6, 7


# one engine


@pytest.mark.slow
@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_the_equity_of_environment_backtest_and_slow_account_is_one(asset_class):
    "Random actions of 1,024 accounts; a backtest and the slow account give the same bits at every bar."
    market, steps = market_of(asset_class), 90
    env = GPUVectorizedTradingEnv(
        market,
        GPUEnvConfig(
            n_envs=1024,
            asset_class=asset_class,
            episode_length=steps,
            account=BROKER[asset_class],
            observations="indices",
        ),
    )
    env.reset(7)
    starts, equity, actions = (
        env.bar.clone(),
        [env.account.equity],
        torch.randint(8, (steps, 1024), generator=torch.Generator().manual_seed(8)),
    )
    for t in range(steps):
        *_, truncated, infos = env.step(actions[t])
        equity.append(infos["account"].equity)
    assert bool(truncated.all())
    equity = torch.stack(equity).numpy()
    moved = np.flatnonzero(equity[-1] != 1000)
    for i in (moved[0], moved[len(moved) // 2], moved[-1]):
        start = int(starts[i])
        result = backtest(asset_class, actions[:, i].numpy(), start=start, stop=start + steps + 1)
        assert np.array_equal(result.equity.to_numpy(), equity[:, i])
        assert (
            result.equity.index[0] == simulated(asset_class)[0].index[start] and len(result.actions) == steps
        )
        slow = ScalarAccount.of(BROKER[asset_class], asset_class, torch_root)
        for t in range(steps):
            units, exit_price = scalar_step(slow, market, start + t, int(actions[t, i]), 8)
            assert (
                slow.equity == result.equity.iloc[t + 1]
                and units == result.actions["quantity"].iloc[t]
                and (exit_price or 0) == result.actions["exit_price"].iloc[t]
            ), t
        assert (slow.commission, slow.spread, slow.slippage, slow.impact) == tuple(
            result.costs[name] for name in ("commission", "spread", "slippage", "impact")
        )


@pytest.mark.parametrize(
    "asset_class,version",
    [("crypto", "5.6.0"), ("equity", "5.3.0"), ("equity", "2.7.0"), ("crypto", "2.3.0")],
)
def test_a_replay_of_many_is_many_slow_accounts(asset_class, version):
    "Every variable of every account at every step, whatever the layout's actions."
    market, n_actions = (
        market_of(asset_class, version).span(FITTED, FITTED + 120),
        MODEL_SPECS[version].n_actions,
    )
    at = decision_bars(market)
    assert np.array_equal(at, np.arange(FITTED, FITTED + 119)), (
        "the last bar of a span is for filling and marking"
    )
    actions = torch.from_numpy(random_list((119, 5), 1, n_actions))
    slow = [ScalarAccount.of(BROKER[asset_class], asset_class, torch_root) for _ in range(5)]
    steps = list(replay(runs_of(market, BROKER[asset_class], actions)))
    assert [int(s.bar[0]) for s in steps] == at.tolist() and all(
        bool(s.active.all()) and s.settlement is None for s in steps
    )
    for t, step in enumerate(steps):
        for i, account in enumerate(slow):
            scalar_step(account, market, int(at[t]), int(actions[t, i]), n_actions)
        assert np.array_equal(
            torch.stack([getattr(step.account, name) for name in STATE], 1).numpy(),
            [account.state for account in slow],
        ), t
    assert sum(account.trades for account in slow) > 0


@pytest.mark.slow
def test_other_decisions_change_nothing_before_them():
    "Two lists that differ from the 60th decision on have one equity until then; so have two futures."
    first = random_list(119)
    second = np.concatenate([first[:60], random_list(59, 5)])
    bars = simulated("crypto")[0]
    other = bars.copy()
    other.iloc[FITTED + 61 :] *= 1.3
    a, b, c = (
        backtest(actions=actions, bars=data, start=FITTED, stop=FITTED + 120).equity
        for actions, data in ((first, bars), (second, bars), (first, other))
    )
    for equity in (b, c):
        assert np.array_equal(a[:61], equity[:61]) and not np.array_equal(a, equity)


# gaps


def test_a_gap_settles_the_position_and_nothing_trades_in_warm_up():
    "All is sold at the last close before a gap, with costs; decisions go on `min_history` bars later."
    market = market_data(gap_bars(), "5.6.0", fitted("crypto"), "15Min", "crypto").span(3300, 4100)
    at = decision_bars(market)
    assert np.array_equal(at, np.concatenate([np.arange(3300, 3399), np.arange(4000, 4099)]))
    actions = np.where(np.arange(len(at)) % 3 == 0, BUY_75, 0)
    result = backtest(bars=gap_bars(), actions=actions, start=3300, stop=4100)
    slow, equity = ScalarAccount.of(BROKER["crypto"], "crypto", torch_root), [1000.0]
    for bar, action in zip(at, actions):
        if bar == 4000:
            equity.append(slow.equity)
        scalar_step(slow, market, int(bar), int(action), 8)
        if bar == 3398:
            held, before, marked = slow.quantity, slow.costs, slow.equity
            assert held > 0
            slow.settle(
                *(
                    float(a[3399])
                    for a in (market.prices[3], market.daily_volatility, market.daily_dollar_volume)
                )
            )
            assert (
                slow.quantity == 0
                and slow.equity == pytest.approx(marked - (slow.costs - before), abs=1e-9)
                and slow.costs - before > held * market.prices[3, 3399] * 27e-4
            )
        equity.append(slow.equity)
    assert np.array_equal(result.equity.to_numpy(), equity) and np.array_equal(
        result.equity.index, gap_bars().index[[*range(3300, 3400), *range(4000, 4100)]]
    )
    assert result.position.iloc[99] == 0 and result.position.iloc[98] > 0 and result.position.iloc[100] == 0
    assert result.trades["exit"].tolist().count("gap in the data") == 1
    settled = result.trades[result.trades["exit"] == "gap in the data"].iloc[0]
    assert settled["exit_price"] == market.prices[3, 3399] and settled["exit_time"] == gap_bars().index[3399]
    assert result.trades["profit"].sum() == pytest.approx(result.metrics["net_profit"], abs=1e-9) and sum(
        result.costs.values()
    ) == pytest.approx(slow.costs, abs=1e-12)


def ruin_market():
    "A share at 1 that jumps to 8, and falls back before a gap; then it stays at 1."
    close = np.concatenate([np.full(20, 1.0), np.full(10, 8.0), np.full(10, 0.5), np.full(30, 1.0)])
    return hand_made_market(close, asset_class="equity", segment=np.repeat([0, 1], [40, 30]))


def test_a_bankrupt_account_stays_bankrupt():
    "A short that loses more than all stands still to the end, also where a gap settles the others."
    market, config = ruin_market(), replace(FREE, stop_pct=0.0, target_pct=0.0)
    at = decision_bars(market)
    orders = torch.from_numpy(np.where(at < 14, SELL_75, 0))

    def own(account, i):
        return [float(getattr(account, f.name)[i]) for f in fields(AccountState)]

    alone = list(replay(runs_of(market, config, orders[:, None])))
    assert int(alone[-1].bar[0]) == 19 and float(alone[-1].account.equity[0]) == -400
    lists = torch.stack(
        [orders, torch.from_numpy(np.where(at < 14, BUY_75, 0)), torch.from_numpy(random_list(len(at)))], 1
    )
    steps = list(replay(runs_of(market, config, lists)))
    assert int(steps[-1].bar[1]) == 68 and any(step.settlement for step in steps)
    for step in steps:
        assert bool(step.active[0]) == (step.bar[1] <= 19)
        if step.bar[1] >= 19:
            assert own(step.account, 0) == own(alone[-1].account, 0), int(step.bar[1])
    others = list(replay(runs_of(market, config, lists[:, 1:])))
    assert [own(step.account, 1) for step in steps] == [own(step.account, 0) for step in others], (
        "the others do not notice"
    )
    kept, _ = replay_and_keep(runs_of(market, config, lists))
    assert [len(path.bar) for path in kept] == [len(alone), len(at), len(at)] and kept[0].equity[-1] == -400


# the books


@pytest.mark.slow
@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_trades_and_costs_add_up_to_the_profit(asset_class):
    "Profits of trades are the net profit, their costs the costs, and counts agree with the account's."
    result, actions = long_run(asset_class)
    m, trades = result.metrics, result.trades
    assert m["net_profit"] == result.equity.iloc[-1] - 1000 and trades["profit"].sum() == pytest.approx(
        m["net_profit"], abs=1e-8
    )
    assert (
        sum(result.costs.values()) == pytest.approx(m["costs"], abs=1e-9)
        and trades["costs"].sum() == pytest.approx(m["costs"], abs=1e-9)
        and result.actions["costs"].sum() == pytest.approx(m["costs"], abs=1e-9)
    )
    assert (
        m["gross_profit"] == pytest.approx(m["net_profit"] + m["costs"], abs=1e-9)
        and min(v for name, v in result.costs.items() if asset_class == "crypto" or name != "commission") > 0
    )
    traded = (
        result.actions["quantity"].abs() * result.actions["fill_price"]
        + result.actions["exit_quantity"].abs() * result.actions["exit_price"]
    ).sum()
    assert m["turnover"] == pytest.approx(traded / 1000, rel=1e-12) and m[
        "break_even_cost_bps"
    ] == pytest.approx(m["gross_profit"] / traded * 1e4, rel=1e-9)
    closed = trades[trades["exit"] != "still open"]
    assert (
        m["trades"] == len(closed) > 15
        and m["win_rate"] == pytest.approx((closed["profit"] > 0).mean(), abs=1e-12)
        and m["open_trades"] == len(trades) - len(closed) <= 1
    )
    assert m["profit_factor"] == pytest.approx(
        closed["profit"].clip(lower=0).sum() / -closed["profit"].clip(upper=0).sum(), rel=1e-9
    )
    assert m["orders"] == (result.actions["quantity"] != 0).sum() and m["hold_share"] == pytest.approx(
        1 - m["orders"] / len(actions), abs=1e-12
    )
    assert (
        m["exposure"] == pytest.approx(result.position.abs().mean(), abs=1e-12)
        and len(result.equity) == len(actions) + 1
    )


@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_every_trade_is_found_again_in_the_actions(asset_class):
    "Flat to flat, rebuilt from fills alone: times, side, entry, exit, reason, largest position."
    result, _ = long_run(asset_class)
    prices, bars = result.actions, simulated(asset_class)[0]
    held, trades, now = 0.0, [], None
    for t, row in prices.iterrows():
        when = bars.index[FITTED + 1 + t]
        if row["gap_quantity"]:
            trades.append(now | {"exit_time": when, "exit_price": row["fill_price"]})
            held, now = 0.0, None
        if held == 0 and row["quantity"]:
            now = {
                "entry_time": when,
                "side": "long" if row["quantity"] > 0 else "short",
                "entry_price": row["fill_price"],
                "largest_quantity": 0.0,
            }
        fee = 0.0025 * row["quantity"] if asset_class == "crypto" and row["quantity"] > 0 else 0.0  # in kind
        if now:
            now["largest_quantity"] = max(now["largest_quantity"], abs(held))
        if row["quantity"]:
            held = round(held + row["quantity"] - fee, 9)
        if now:
            now["largest_quantity"] = max(now["largest_quantity"], abs(held))
        inside = row["exit_quantity"] != row["gap_quantity"]
        if now and (held == 0 or inside):
            price = row["exit_price"] if inside else row["fill_price"]
            trades.append(now | {"exit_time": when, "exit_price": price})
            held, now = 0.0, None
    closed = result.trades[result.trades["exit"] != "still open"].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        closed[list(trades[0])], pd.DataFrame(trades), rtol=1e-12, check_dtype=False
    )
    assert set(closed["exit"]) == {"order", "stop", "target"} and set(closed["side"]) == (
        {"long"} if asset_class == "crypto" else {"long", "short"}
    )
    assert (
        closed["bars"]
        == np.searchsorted(bars.index, closed["exit_time"])
        - np.searchsorted(bars.index, closed["entry_time"])
        + 1
    ).all()


def test_an_open_position_at_the_end_is_marked_and_named():
    "The last trade has no exit, its profit is what the account shows."
    result = backtest(
        actions=np.array([BUY_75, *[0] * 18]),
        start=FITTED,
        stop=FITTED + 20,
        account=replace(BROKER["crypto"], stop_pct=0.0, target_pct=0.0),
    )
    last = result.trades.iloc[-1]
    assert (
        len(result.trades) == 1
        and last["exit"] == "still open"
        and pd.isna(last["exit_time"])
        and last["profit"] == pytest.approx(result.equity.iloc[-1] - 1000, abs=1e-9)
    )
    assert result.metrics["trades"] == 0 and result.metrics["open_trades"] == 1 and last["bars"] == 19


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_a_list_may_be_a_column_of_a_table():
    "Of a series, of a read-only array, of plain numbers, of a tensor: one result, no warning."
    numbers, options = random_list(39, 6), dict(start=FITTED, stop=FITTED + 40)
    frozen = numbers.copy()
    frozen.flags.writeable = False
    results = [
        backtest(actions=given, **options).equity
        for given in (numbers, pd.Series(numbers), frozen, numbers.tolist(), torch.from_numpy(numbers))
    ]
    assert all(r.equals(results[0]) for r in results)


def test_doing_nothing_costs_nothing():
    "Holding cash from end to end: no order, no cost, no return, and metrics that are numbers or absent."
    result = backtest(actions=np.zeros(119, int), start=FITTED, stop=FITTED + 120, random_policies=20)
    m = result.metrics
    assert (
        (result.equity == 1000).all()
        and m["orders"] == 0
        and m["costs"] == 0
        and m["hold_share"] == 1
        and m["break_even_cost_bps"] is None
        and m["percentile_among_random"] == 50
    )
    assert len(result.trades) == 0 and all(
        v is None or math.isfinite(v)
        for v in [*m.pop("moments").values(), *m.values()]
        if not isinstance(v, str)
    )


# baselines


@pytest.mark.parametrize("asset_class,fee", [("crypto", 27e-4), ("equity", 2e-4)])
def test_buy_and_hold_by_hand(asset_class, fee):
    "Bought at the first open after the first decision, at full and at the agent's exposure; cash is cash."
    result, _ = long_run(asset_class)
    bars = simulated(asset_class)[0]
    growth = bars["close"].loc[result.equity.index[-1]] / bars["open"].loc[result.equity.index[1]]
    exposure = float(result.position.abs().mean())
    assert (
        result.baselines["buy_and_hold"] == pytest.approx(growth * (1 - fee) - 1, abs=1e-12)
        and result.baselines["cash"] == 0
    )
    assert (
        result.baselines["buy_and_hold_at_exposure"]
        == pytest.approx(exposure * (growth * (1 - fee) - 1), abs=1e-12)
        and 0 < exposure < 0.2
    )
    curve = result.curves["buy_and_hold"]
    assert (
        curve.iloc[0] == 1000
        and curve.iloc[1]
        == pytest.approx(
            1000 * (1 - fee) * bars["close"].loc[curve.index[1]] / bars["open"].loc[curve.index[1]]
        )
        and (result.curves["cash"] == 1000).all()
    )
    assert np.array_equal(result.curves["agent"], result.equity)


def test_buy_and_hold_earns_nothing_in_a_gap():
    "Neither the gap nor the warm-up after it is a return."
    market = hand_made_market(
        [10.0] * 6 + [11.0] * 4 + [50.0] * 6 + [55.0] * 4, segment=np.repeat([0, 1], 10)
    )
    index = pd.DatetimeIndex(market.timestamp[[*range(4, 10), *range(14, 20)]], tz="UTC")
    curve = buy_and_hold(market, index, account_rules(FREE, "crypto"))
    assert curve.tolist() == pytest.approx(
        [1000, 1000, 1100, 1100, 1100, 1100, 1100, 1100, 1210, 1210, 1210, 1210]
    )


@pytest.mark.slow
@pytest.mark.parametrize("asset_class,version", [("crypto", "5.6.0"), ("equity", "2.3.0")])
def test_moving_average_cross_by_hand(asset_class, version):
    "Mean close of 20 bars above that of 100: the largest purchase; else out. By the slow account."
    market = market_of(asset_class, version).span(FITTED, FITTED + 300)
    at, close, n_actions = decision_bars(market), market.prices[3], MODEL_SPECS[version].n_actions
    buy, out = (BUY_75, CLOSE) if n_actions == 8 else (1, 2)
    expected = [buy if close[i - 19 : i + 1].mean() > close[i - 99 : i + 1].mean() else out for i in at]
    assert (
        moving_average_actions(market, at, MODEL_SPECS[version]).tolist() == expected
        and len(set(expected)) == 2
    )
    slow = ScalarAccount.of(BROKER[asset_class], asset_class, torch_root)
    for bar, action in zip(at, expected):
        scalar_step(slow, market, int(bar), action, n_actions)
    result = backtest(asset_class, np.zeros(len(at), int), version=version, start=FITTED, stop=FITTED + 300)
    assert result.baselines["moving_average_cross"] == (slow.equity - 1000) / 1000
    assert slow.trades > 0


@pytest.mark.slow
@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_the_oracle_earns_where_there_is_an_edge_and_rests_where_there_is_none(asset_class):
    "Edge 0.2 at low costs: more than buy-and-hold and than its own shifts in time; edge 0: not one order."
    cheap = replace(FREE, half_spread_bps=1.0)
    for edge in (0.2, 0.0):
        bars, truth = simulated(asset_class, edge)
        actions = oracle_actions(
            truth, np.arange(FITTED, FITTED + 699), MODEL_SPECS["5.6.0"], asset_class == "equity"
        )
        result = run_backtest(
            None,
            bars,
            start=FITTED,
            stop=FITTED + 700,
            actions=actions,
            fit=fitted(asset_class),
            version="5.6.0",
            timeframe="15Min",
            asset_class=asset_class,
            account=cheap,
            truth=truth,
            random_policies=20,
        )
        if edge == 0:
            assert (
                not actions.any()
                and result.baselines["oracle"] == 0
                and result.metrics["net_profit"] == 0
                and result.metrics["share_of_oracle"] is None
            )
        else:
            assert (
                result.baselines["oracle"] > max(0.01, result.baselines["buy_and_hold_at_exposure"])
                and result.metrics["share_of_oracle"] == 1
                and result.metrics["percentile_among_random"] > 95
            )
            assert (
                result.baselines["oracle"] == pytest.approx(result.metrics["total_return"], abs=1e-12)
                and result.baselines["time_shifted_copies_median"] < result.baselines["oracle"]
            )


def test_the_oracle_leaves_the_old_side_before_it_takes_the_new():
    "An order never crosses zero: one bar to get out, then in; where shorts are not allowed it waits in cash."
    truth = pd.DataFrame({"expected_return": [0.0, 0.01, 0.01, 0.01, -0.01, -0.01, -0.01, 0.01, 0.01]})
    spec = MODEL_SPECS["5.6.0"]
    for allow_short, sell in ((True, SELL_75), (False, CLOSE)):
        taken = oracle_actions(truth, np.arange(9), spec, allow_short).tolist()
        assert (
            taken[0] == 0
            and taken[2:4] == [BUY_75, BUY_75]
            and taken[4] == CLOSE
            and taken[5:7] == [sell, sell]
            and taken[8] == BUY_75
        )


def test_shifted_copies_do_the_same_at_other_times():
    "The same multiset and cyclic order of actions, moved by at least a tenth of the span; seeded."
    actions = torch.from_numpy(random_list(200, 2))
    copies = shifted(actions, 300, 4)
    assert copies.shape == (200, 300) and torch.equal(
        copies.sort(0).values, actions.sort().values[:, None].expand(200, 300)
    )
    by = [
        next(k for k in range(200) if torch.equal(torch.roll(actions, k), copies[:, i])) for i in range(300)
    ]
    assert min(by) >= 20 and max(by) <= 180 and len(set(by)) > 80
    assert torch.equal(copies, shifted(actions, 300, 4)) and not torch.equal(copies, shifted(actions, 300, 5))


@pytest.mark.slow
def test_the_percentile_is_the_agents_place_among_its_shifts():
    "Counted by hand from walks of the shifted lists."
    result, actions = long_run("crypto")
    market = market_of("crypto").span(FITTED, FITTED + 700)
    _, account = replay_and_keep(
        runs_of(market, TIGHT["crypto"], shifted(torch.from_numpy(actions), 40, 0)), keep=0
    )
    luck, agent = account.equity.numpy() - 1000, result.metrics["net_profit"]
    assert result.metrics["percentile_among_random"] == pytest.approx(
        100 * ((luck < agent).sum() + 0.5 * (luck == agent).sum()) / 40
    ) and result.baselines["time_shifted_copies_median"] == pytest.approx(np.median(luck) / 1000)


# policies


@pytest.mark.slow
@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_a_policy_that_sees_its_account_is_asked_with_its_account(asset_class):
    "Layout 5.3.0: a policy's backtest is that of the list of its actions in the environment."
    trainer, n = small_trainer(asset_class, "5.3.0"), 120
    policy, account = trainer.policy.eval(), trainer.env.config.account
    options = dict(version="5.3.0", window=20, account=account, start=FITTED, stop=FITTED + n)
    result = backtest(asset_class, model=policy, **options)
    meanings = {name: i for i, name in MODEL_SPECS["5.3.0"].action_meanings.items()}
    taken = result.actions["action"].map(meanings).to_numpy()
    assert len(set(taken)) > 1 and result.metrics["orders"] > 3
    again = backtest(asset_class, taken, **options)
    pd.testing.assert_series_equal(result.equity, again.equity, check_exact=True)
    pd.testing.assert_frame_equal(result.trades, again.trades, check_exact=True)
    market = market_data(
        simulated(asset_class)[0], "5.3.0", fitted(asset_class, "5.3.0"), "15Min", asset_class, 20
    ).span(FITTED, FITTED + n)
    env = GPUVectorizedTradingEnv(market, replace(trainer.env.config, n_envs=1, reward_preset="equity"))
    obs, actions = env.reset_at([FITTED]), []
    with torch.no_grad():
        for _ in range(n - 1):
            actions.append(int(policy(obs)[0].argmax()))
            obs = env.step(torch.tensor(actions[-1:]))[0]
        builder = BacktestObservationBuilder(
            simulated(asset_class)[0],
            "5.3.0",
            fitted(asset_class, "5.3.0"),
            "15Min",
            asset_class,
            20,
            account,
        )
        blind = policy(
            builder.observations(
                np.arange(FITTED, FITTED + n - 1), AccountState.initial(account, n - 1)
            ).flatten(1)
        )[0].argmax(1)
    assert actions == taken.tolist()
    assert blind.tolist() != actions, "a fresh account at every bar would have decided otherwise"


def test_a_policy_without_its_account_is_asked_in_one_go():
    "Layout 5.6.0: the same as bar by bar."
    trainer = small_trainer("crypto", "5.6.0")
    policy = trainer.policy.eval()
    builder = BacktestObservationBuilder(
        simulated("crypto")[0], "5.6.0", fitted("crypto"), "15Min", "crypto", 20
    )
    at = np.arange(FITTED, FITTED + 60)
    together, small = greedy_actions(policy, builder, at), greedy_actions(policy, builder, at, batch=7)
    with torch.no_grad():
        alone = [
            int(policy(torch.from_numpy(builder.get_obs_at_bar(int(i))).flatten()[None])[0].argmax())
            for i in at
        ]
    assert together.tolist() == small.tolist() == alone and len(set(alone)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.6.0", "5.3.0"])
def test_a_recurrent_policy_remembers_from_bar_to_bar(version):
    "With and without an account in its sight: as in the environment; what it remembers matters."
    torch.manual_seed(3)
    env = GPUVectorizedTradingEnv(
        market_data(simulated("crypto")[0], version, fitted("crypto", version), "15Min", "crypto", 20).span(
            FITTED, FITTED + 80
        ),
        GPUEnvConfig(n_envs=1, version=version, window=20, reward_preset="equity", episode_length=100),
    )
    policy = RecurrentActorCritic(env.obs_dim, env.n_actions, 16, 1, layout=layout_of_env(env)).eval()
    with torch.no_grad():
        for p in policy.actor_head.parameters():
            p.mul_(3).add_(0.5 * torch.randn(p.shape))  # opinions
        for p in policy.encoder.parameters():
            p.mul_(2)
        result, obs, state, actions, forgetful = (
            backtest(model=policy, version=version, window=20, start=FITTED, stop=FITTED + 80),
            env.reset_at([FITTED]),
            policy.initial_state(1),
            [],
            [],
        )
        for _ in range(79):
            forgetful.append(
                int(policy.evaluate_step(policy.window_inputs(obs), policy.initial_state(1))[0].argmax())
            )
            logits, _, state = policy.evaluate_step(policy.window_inputs(obs), state)
            actions.append(int(logits.argmax()))
            obs = env.step(torch.tensor(actions[-1:]))[0]
    meanings = {name: i for i, name in MODEL_SPECS[version].action_meanings.items()}
    assert result.actions["action"].map(meanings).tolist() == actions != forgetful and len(set(actions)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.6.0", "5.3.0"])
def test_a_checkpoint_brings_everything_that_its_backtest_needs(tmp_path, version):
    "Layout, window, fit, account and symbol come from the file; the result is the network's."
    trainer = small_trainer("crypto", version)
    trainer.train(1)
    path = trainer.save(tmp_path / "SIM-USD_15Min.pt")
    options = dict(start=FITTED, stop=FITTED + 80)
    bars = simulated("crypto")[0]
    with pytest.warns(UserWarning, match="differs from the current") if version != "5.6.0" else np.errstate():
        result = run_backtest(path, bars, **options)
    expected = run_backtest(
        trainer.policy.eval(),
        bars,
        fit=fitted("crypto", version),
        version=version,
        timeframe="15Min",
        asset_class="crypto",
        window=20,
        account=trainer.env.config.account,
        **options,
    )
    assert (
        result.symbol == "SIM-USD"
        and result.equity.iloc[0] == 5000
        and result.provenance["version"] == version
    )
    pd.testing.assert_series_equal(result.equity, expected.equity, check_exact=True)
    pd.testing.assert_frame_equal(result.actions, expected.actions, check_exact=True)
    assert result.metrics["orders"] > 0


# many scenarios, many symbols: one replay


@pytest.mark.slow
def test_many_symbols_in_one_call_are_each_alone(monkeypatch):
    "Other markets, layouts, lists, policies, spans, and a gap: to the last bit what each gives by itself."
    trainer, seeing = small_trainer("crypto", "5.6.0"), small_trainer("equity", "5.3.0")

    def of(asset_class, version, **options):
        return {
            "fit": fitted(asset_class, version),
            "version": version,
            "timeframe": "15Min",
            "asset_class": asset_class,
            "bars": simulated(asset_class)[0],
            "model": None,
            "random_policies": 7,
        } | options

    jobs = [
        of(
            "crypto",
            "5.6.0",
            actions=random_list(699),
            start=FITTED,
            stop=FITTED + 700,
            account=TIGHT["crypto"],
        ),
        of(
            "equity",
            "2.3.0",
            actions=random_list(299, 5, 3),
            start=FITTED,
            stop=FITTED + 300,
            account=BROKER["equity"],
        ),
        of(
            "crypto",
            "5.6.0",
            model=trainer.policy.eval(),
            window=20,
            start=FITTED + 50,
            stop=FITTED + 130,
            account=trainer.env.config.account,
        ),
        of(
            "equity",
            "5.3.0",
            model=seeing.policy.eval(),
            window=20,
            start=FITTED,
            stop=FITTED + 60,
            account=seeing.env.config.account,
        ),
        of(
            "crypto",
            "5.6.0",
            bars=gap_bars(),
            actions=random_list(198, 9),
            start=3300,
            stop=4100,
            account=BROKER["crypto"],
        ),
    ]
    for together, job in zip(run_backtests(jobs), jobs):
        alone = run_backtest(**{"model": None} | job)
        for name in ("equity", "position", "price"):
            pd.testing.assert_series_equal(getattr(together, name), getattr(alone, name), check_exact=True)
        for name in ("actions", "trades", "curves"):
            pd.testing.assert_frame_equal(getattr(together, name), getattr(alone, name), check_exact=True)
        for name in ("metrics", "costs", "baselines", "stress", "capacity", "provenance"):
            assert getattr(together, name) == getattr(alone, name), name
        assert together.metrics["orders"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("asset_class,version", [("crypto", "5.6.0"), ("equity", "5.3.0")])
def test_each_stress_is_a_backtest_of_its_own(asset_class, version):
    "From a run with those very costs and sizes; a policy that sees its account is asked for each of them."
    trainer = small_trainer(asset_class, version)
    account, options = (
        trainer.env.config.account,
        dict(model=trainer.policy.eval(), version=version, window=20, start=FITTED, stop=FITTED + 90),
    )
    result = backtest(asset_class, account=account, **options)
    assert (
        [row["name"] for row in result.stress] == list(STRESSES)
        and [row["initial"] / 5000 for row in result.capacity] == list(CAPACITIES[: len(result.capacity)])
        and len(result.capacity) > 1
    )
    costs = ("commission_bps", "half_spread_bps", "slippage_bps", "impact_coefficient")
    for row, (times, late) in zip(result.stress, STRESSES.values()):
        if late:
            continue
        own = backtest(
            asset_class,
            account=replace(account, **{name: times * getattr(account, name) for name in costs}),
            **options,
        ).metrics
        for name in ("total_return", "net_profit", "costs", "sharpe", "max_drawdown", "trades"):
            assert row[name] == pytest.approx(own[name], rel=1e-12, abs=1e-9), (row["name"], name)
    for row in result.capacity[:4]:
        own = backtest(
            asset_class, account=replace(account, initial_account_value=row["initial"]), **options
        ).metrics
        for name in ("total_return", "net_profit", "costs", "trades"):
            assert row[name] == own[name], (row["initial"], name)
    assert (
        result.stress[1]["costs"] == 0
        and result.stress[0]["costs"] == result.metrics["costs"] > 0
        and result.stress[1]["net_profit"] > result.stress[0]["net_profit"] > result.stress[3]["net_profit"]
    )


@pytest.mark.slow
def test_a_late_order_is_the_same_list_shifted():
    "One, two, three bars; what was decided before a gap is not carried over it."
    actions = random_list(198, 9)
    result = backtest(bars=gap_bars(), actions=actions, start=3300, stop=4100)
    for late in (1, 2, 3):
        shifted_list = np.concatenate(
            [half for part in (actions[:99], actions[99:]) for half in (np.zeros(late, int), part[:-late])]
        )
        own = backtest(bars=gap_bars(), actions=shifted_list, start=3300, stop=4100).metrics
        row = result.stress[3 + late]
        assert (
            row["bars_late"] == late
            and row["net_profit"] == own["net_profit"] != result.metrics["net_profit"]
            and row["trades"] == own["trades"]
        )


def test_an_order_that_could_not_be_placed_is_not_placed_late():
    "Equities: what was decided on a session's last bar lapses, also for the account whose orders come late."
    n = 120
    market = market_of("equity").span(FITTED, FITTED + n)
    at = decision_bars(market)
    last = np.flatnonzero(~market.can_fill[at])
    assert len(last) > 2
    result = backtest(
        "equity", np.where(np.isin(np.arange(len(at)), last), BUY_75, 0), start=FITTED, stop=FITTED + n
    )
    assert result.metrics["orders"] == 0 and all(
        row["trades"] == 0 and row["net_profit"] == 0 for row in result.stress
    )
    before = backtest(
        "equity", np.where(np.arange(len(at)) == last[1] - 3, BUY_75, 0), start=FITTED, stop=FITTED + n
    )
    assert (
        all(row["net_profit"] != 0 for row in before.stress[4:6]) and before.stress[6]["net_profit"] == 0
    ), "three bars late it meets the session's end"


def test_a_model_on_bars_that_it_has_seen_is_no_evidence():
    "Told from the spans in the checkpoint: unseen after them, seen before, not known of a list."
    from trading_lib.reporting.verdict import assess

    content = small_trainer("crypto", "5.6.0").content()
    after, within = (
        run_backtest(content, simulated("crypto")[0], start=start, stop=start + 100)
        for start in (FITTED, 1500)
    )
    assert (
        after.provenance["unseen"] is True
        and "unseen simulated bars" in assess(after)["headline"]
        and not any("No evidence" in line for line in assess(after)["sentences"])
    )
    assert (
        within.provenance["unseen"] is False
        and "unseen" not in assess(within)["headline"]
        and f"bars up to {simulated('crypto')[0].index[FITTED - 1]:%Y-%m-%d %H:%M}"
        in assess(within)["sentences"][0]
    )
    assert backtest(actions=random_list(99), start=4000, stop=4100).provenance["unseen"] is None


def test_shorts_too_small_for_a_share_are_counted():
    "With 1,000 an order of 78.75 is less than one share at a higher price; with 100,000 it is placed."
    price = simulated("equity")[0]["close"].iloc[FITTED]
    for initial, refused in ((1.2 * price, True), (1000 * price, False)):  # 0.7 × 0.15 × 0.75 of it
        m = backtest(
            "equity",
            np.where(np.arange(99) == 40, SELL_75, 0),
            start=FITTED,
            stop=FITTED + 100,
            account=replace(BROKER["equity"], initial_account_value=initial),
        ).metrics
        assert (m["orders_below_one_share"], m["orders"]) == ((1, 0) if refused else (0, 1))


def test_a_late_order_of_a_policy_that_sees_its_account_is_its_own_decision():
    "Layout 5.3.0: the late account decides on what it sees; the order comes two bars later. By hand."
    trainer, n, late = small_trainer("crypto", "5.3.0"), 80, 2
    policy, account = trainer.policy.eval(), trainer.env.config.account
    result = backtest(
        model=policy, version="5.3.0", window=20, account=account, start=FITTED, stop=FITTED + n
    )
    market = market_data(
        simulated("crypto")[0], "5.3.0", fitted("crypto", "5.3.0"), "15Min", "crypto", 20
    ).span(FITTED, FITTED + n)
    env = GPUVectorizedTradingEnv(market, replace(trainer.env.config, n_envs=1, reward_preset="equity"))
    obs, decided = env.reset_at([FITTED]), []
    with torch.no_grad():
        for t in range(n - 1):
            decided.append(int(policy(obs)[0].argmax()))
            obs, *_, infos = env.step(torch.tensor([decided[t - late] if t >= late else 0]))
    assert (
        result.stress[5]["bars_late"] == late
        and result.stress[5]["net_profit"]
        == float(infos["account"].equity) - 5000
        != result.metrics["net_profit"]
    )


def test_capacity_falls_by_the_square_root_law():
    "Impact per unit of value grows tenfold where the account grows a hundredfold; all else is proportional."
    only_impact = replace(FREE, impact_coefficient=1.0, stop_pct=0.0, target_pct=0.0)
    deep = simulated("crypto")[0].assign(volume=1e9)
    result = backtest(
        bars=deep, actions=np.array([BUY_75, *[0] * 48]), start=FITTED, stop=FITTED + 50, account=only_impact
    )
    shares = [row["costs"] / row["initial"] for row in result.capacity]
    assert (
        all(b / a == pytest.approx(10**0.5, rel=1e-6) for a, b in zip(shares, shares[1:]))
        and shares[0] > 0
        and len(shares) == 6
    )


def test_the_curve_of_larger_accounts_ends_where_an_order_is_too_much_of_its_bar():
    "An order of 78.75 of 1,000 where 10,000 trade in a bar: of 10,000 it is 7.9 %, of 100,000 79 %."
    bars = simulated("crypto")[0].copy()
    bars["volume"] = 1e12 / bars["close"]
    bars.iloc[FITTED + 1, 4] = 1e4 / bars["close"].iloc[FITTED + 1]
    options = dict(
        actions=np.array([BUY_75, *[0] * 48]),
        start=FITTED,
        stop=FITTED + 50,
        account=replace(FREE, stop_pct=0.0, target_pct=0.0),
    )
    result = backtest(bars=bars, **options)
    assert [row["initial"] for row in result.capacity] == [1e3, 1e4] and [
        row["volume_share"] for row in result.capacity
    ] == pytest.approx([0.007875, 0.07875], rel=1e-6)
    assert (
        result.provenance["capacity_ends"]
        == {"initial": 1e5, "volume_share": pytest.approx(0.7875, rel=1e-6), "volume_limit": 0.10}
        == result.provenance["capacity_ends"] | {"volume_limit": VOLUME_LIMIT}
    )
    bars.iloc[FITTED + 1, 4] = 0.0  # nothing traded in it: the agent's own size is shown, no other
    result = backtest(bars=bars, **options)
    assert [row["initial"] for row in result.capacity] == [1e3] and result.provenance["capacity_ends"][
        "volume_share"
    ] is None
    assert (
        backtest(bars=bars, **options | {"actions": np.zeros(49, int)}).provenance["capacity_ends"] is None
    ), "an agent that does nothing can do so with any account"


def test_without_any_volume_no_impact_is_charged_and_that_is_said():
    "Costs are those without impact; a market that traded before it stands still charges all of it."
    bars, account = simulated("crypto")[0], replace(BROKER["crypto"], stop_pct=0.0, target_pct=0.0)
    options = dict(actions=random_list(99, 8), start=FITTED, stop=FITTED + 100)
    silent, free = (
        backtest(bars=bars.assign(volume=0.0), account=account, **options),
        backtest(account=replace(account, impact_coefficient=0.0), **options),
    )
    assert (
        silent.costs["impact"] == 0
        and np.array_equal(silent.equity, free.equity)
        and silent.metrics["costs"] > 0
    )
    assert (
        silent.provenance["has_volume"] is False
        and free.provenance["has_volume"] is True
        and len(silent.capacity) == 1
    )
    sentences = [" ".join(assess(result)["sentences"]) for result in (silent, free)]
    assert "no volume" in sentences[0] and "no volume" not in sentences[1]
    assert "with an account of" not in sentences[0]
    began = bars.assign(volume=np.where(np.arange(len(bars)) == 0, 1.0, 0.0))
    assert (
        backtest(bars=began, account=account, **options).costs["impact"]
        > 10 * backtest(account=account, **options).costs["impact"]
        > 0
    )


def test_other_baselines_are_replayed_under_the_agents_account():
    "A list that is given by name earns what the same list earns as the agent."
    own = backtest(actions=random_list(119, 8), start=FITTED, stop=FITTED + 120)
    result = backtest(
        actions=np.zeros(119, int), others={"dice": random_list(119, 8)}, start=FITTED, stop=FITTED + 120
    )
    assert result.baselines["dice"] == own.metrics["net_profit"] / 1000 != 0


def test_a_backtest_can_be_read_back(tmp_path):
    "Every table and figure, to the last bit; what is not one is named."
    result, _ = long_run("crypto")
    write_backtest(result, tmp_path)
    again = read_backtest(tmp_path)
    for name in ("equity", "position", "price"):
        pd.testing.assert_series_equal(
            getattr(again, name), getattr(result, name), check_exact=True, check_freq=False
        )
    for name in ("actions", "trades", "curves"):
        pd.testing.assert_frame_equal(
            getattr(again, name), getattr(result, name), check_exact=True, check_dtype=False
        )
    for name in ("metrics", "costs", "baselines", "stress", "capacity", "provenance"):
        assert getattr(again, name) == json.loads(json.dumps(getattr(result, name))), name
    (tmp_path / "metrics.json").write_text('{"agent": {}}')
    with pytest.raises(InputError, match="run the backtest stage again"):
        read_backtest(tmp_path)
    with pytest.raises(InputError, match="no such file; run the backtest stage"):
        read_backtest(tmp_path / "nothing")


def test_intervals_hold_what_they_are_about():
    "The 95 % intervals contain their figures, and are those of the `arch` package with the same blocks."
    from arch.bootstrap import StationaryBootstrap

    from trading_lib.metrics import optimal_block_length

    result, _ = long_run("crypto")
    m, returns = result.metrics, result.equity.pct_change().dropna().to_numpy()
    for name in ("total_return", "sharpe"):
        assert m["intervals"][name]["low"] < m[name] < m["intervals"][name]["high"]
    peer = (
        StationaryBootstrap(optimal_block_length(returns), returns, seed=1)
        .conf_int(
            lambda r: r.mean() / r.std(ddof=1) * m["periods_per_year"] ** 0.5, reps=4000, method="percentile"
        )
        .ravel()
    )
    width = peer[1] - peer[0]
    assert list(m["intervals"]["sharpe"].values()) == pytest.approx(peer, abs=0.12 * width)


def test_figures_by_bar_stand_beside_those_by_trade():
    "Counted in plain numpy from the equity curve; the entropy of the actions is scipy's."
    from scipy.stats import entropy

    result, actions = long_run("crypto")
    moves, m = np.diff(result.equity), result.metrics
    assert m["bar_profit_factor"] == pytest.approx(moves[moves > 0].sum() / -moves[moves < 0].sum()) and m[
        "bar_win_rate"
    ] == pytest.approx((moves > 0).sum() / (moves != 0).sum())
    assert m["average_bar_win"] == pytest.approx(moves[moves > 0].mean()) and m[
        "average_bar_loss"
    ] == pytest.approx(moves[moves < 0].mean())
    assert m["action_entropy"] == pytest.approx(
        entropy(np.bincount(actions, minlength=8)) / math.log(8)
    ) and m["cost_bps"] == pytest.approx(m["costs"] / (m["turnover"] * 1000) * 1e4)


# misuse


@pytest.mark.slow
@pytest.mark.parametrize(
    "misuse,words",
    [
        (
            lambda: backtest(actions=[1, 2], start=4000, stop=4100),
            "expected one row for each of 99 decision bars, was 2",
        ),
        (lambda: backtest(actions=[0], fit=None), "fit is missing"),
        (lambda: backtest(actions=[0], stop=99_999), "expected a span inside"),
        (
            lambda: run_backtest(None, simulated("crypto")[0], actions=[0]),
            "is missing; pass it, or a checkpoint",
        ),
        (lambda: run_backtest("nowhere.pt", simulated("crypto")[0]), "nowhere.pt: no such file"),
        (
            lambda: run_backtest(
                None,
                simulated("crypto")[0],
                actions=[0],
                fit=fitted("crypto"),
                version="5.6.0",
                timeframe="15Min",
                asset_class="stock",
            ),
            "'stock'",
        ),
        (lambda: backtest(actions=[0], start=100, stop=300), "warm-up"),
        (lambda: backtest(start=4000, stop=4100), "actions"),
        (lambda: backtest(actions=np.full(99, 9), start=4000, stop=4100), "actions"),
        (lambda: backtest(actions=np.full(99, -1), start=4000, stop=4100), "actions"),
        (lambda: backtest(actions=np.full(99, 1.7), start=4000, stop=4100), "actions"),
        (lambda: backtest(actions=np.zeros((99, 2), int), start=4000, stop=4100), "actions"),
        (lambda: backtest(actions=np.zeros(99, int), start=4000, stop=4100, window=0), "window"),
        (
            lambda: backtest(
                actions=np.zeros(99, int), start=4000, stop=4100, truth=simulated("crypto")[1][:50]
            ),
            "truth",
        ),
        (
            lambda: backtest(actions=np.zeros(99, int), others={"dice": [1]}, start=4000, stop=4100),
            "one row for each of 99",
        ),
        (lambda: run_backtests([]), "one backtest or more"),
        (
            lambda: backtest(actions=np.zeros(99, int), start=4000, stop=4100, random_policies=-1),
            "random_policies",
        ),
        (lambda: backtest(actions=[0], start=4000, stop=4000), "expected a span inside"),
        (lambda: backtest(actions=[0], start=4000, stop=4001), "no decision can be made"),
        (lambda: backtest(actions=[0], account=replace(FREE, initial_account_value=0)), "more than 0"),
        (lambda: backtest(actions=[0], account=replace(FREE, commission_bps=-1.0)), "0 or more"),
        (
            lambda: backtest(model=small_trainer("crypto", "5.6.0").content(), version="5.3.0"),
            "trained on layout 5.6.0",
        ),
        (lambda: backtest(model=small_trainer("crypto", "5.6.0").content(), window=50), "trained on 20 bars"),
        (
            lambda: backtest("equity", model=small_trainer("crypto", "5.6.0").content(), window=20),
            "asset_class: the model was trained on crypto",
        ),
    ],
    ids=[
        "short list",
        "no fit",
        "span",
        "no version",
        "no file",
        "asset class",
        "warm-up",
        "no model and no actions",
        "unknown action",
        "negative action",
        "fractional action",
        "two lists",
        "no window",
        "foreign truth",
        "short baseline",
        "no backtest",
        "negative luck",
        "empty span",
        "one bar",
        "no capital",
        "negative costs",
        "other layout",
        "other window",
        "other asset class",
    ],
)
def test_a_misuse_gets_one_line(misuse, words):
    "What was given, what was expected; never a traceback from within, never something else done instead."
    with pytest.raises(InputError) as e:
        misuse()
    assert words in str(e.value) and "\n" not in str(e.value)


# --- models of older systems ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("version, n_actions", [("2.3.0", 3), ("2.6.0", 3), ("2.7.0", 7)])
@pytest.mark.parametrize("names", ["", "_orig_mod.module."])
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_holds_weights_and_nothing_else_is_backtested(version, n_actions, names, tmp_path):
    "As 2.3.0 to 2.7.0 left them: no version, no configuration; features of the bars before the test."
    bars = simulate_bars("SIM-USD", "15Min", "2023-01-01", "2023-03-01", seed=1, asset_class="crypto")
    torch.manual_seed(0)
    policy = NativeActorCritic(MODEL_SPECS[version].obs_dim, n_actions, (16, 8))
    torch.save(
        {
            "policy_state_dict": {names + name: v for name, v in policy.state_dict().items()},
            "optimizer_state_dict": {},
            "global_step": 10,
            "config": {"hidden_dims": [16, 8]},
        },
        tmp_path / "old.pt",
    )
    given = dict(start=4000, stop=4300, timeframe="15Min", asset_class="crypto")
    result = run_backtest(tmp_path / "old.pt", bars, **given)
    same = run_backtest(
        policy,
        bars,
        **given,
        version=version,
        window=100,
        fit=fit_features(bars[:4000], version, "15Min", "crypto"),
    )
    assert (
        len(result.equity)
        and result.equity.equals(same.equity)
        and result.metrics["orders"] == same.metrics["orders"] > 0
    )
    with pytest.raises(InputError, match="timeframe is missing"):
        run_backtest(tmp_path / "old.pt", bars, start=4000)
    with pytest.raises(InputError, match="fit is missing"):
        run_backtest(tmp_path / "old.pt", bars, timeframe="15Min", asset_class="crypto")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.6.0", "2.7.0"])  # all bars at once, or one after another
def test_an_answer_that_is_not_finite_names_its_bar(version):
    bars = simulate_bars("SIM-USD", "15Min", "2023-01-01", "2023-02-10", seed=1, asset_class="crypto")
    policy = NativeActorCritic(100 * MODEL_SPECS[version].n_features, MODEL_SPECS[version].n_actions, (8,))
    with torch.no_grad():
        policy.actor_head.bias[2] = math.nan
    with pytest.raises(InputError, match="model: logits are not finite at bar 3000, in "):
        run_backtest(
            policy,
            bars,
            start=3000,
            stop=3100,
            version=version,
            window=100,
            timeframe="15Min",
            asset_class="crypto",
            fit=fit_features(bars[:3000], version, "15Min", "crypto"),
        )
