"""The probe finds what is planted, finds nothing in a martingale, trades through the real account, and
never sees what comes later.
"""

import functools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from trading_lib.account import AccountState, settle
from trading_lib.bars import validate_bars
from trading_lib.config import AccountConfig, InputError
from trading_lib.data.simulation import simulate_market
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, decision_span, market_data, split_bounds
from trading_lib.evaluation.forecasts import PROBES, probe_features, probe_target, rank_correlation
from trading_lib.evaluation.supervised import (
    SupervisedBaseline,
    fit_supervised,
    probe_actions,
    probe_figures,
)
from trading_lib.features import fit_features
from trading_lib.market.layouts import LAYOUTS

# large enough to sell whole shares short
BROKER = AccountConfig(initial_account_value=100_000.0)
FREE, DEAR = replace(BROKER, costs="zero"), replace(BROKER, commission_bps=200.0)
DATES = {"SIM-USD": ("crypto", "2023-01-01", "2023-05-01"), "SIMA": ("equity", "2022-01-01", "2023-06-30")}
HOLD, BUY_75, SELL_75, CLOSE = 0, 3, 6, 7


@functools.cache
def simulated(symbol, edge, seed=5):
    asset_class, first, last = DATES[symbol]
    return simulate_market(symbol, "15Min", first, last, seed, edge, asset_class)


@functools.cache
def spans_of(symbol):
    return split_bounds(len(simulated(symbol, 0.0)[0]), 0.70, 0.15)


def made(bars, symbol, fitted=None):
    "Market data of bars, with features fitted on the training span of `fitted`."
    asset_class, train = DATES[symbol][0], slice(*spans_of(symbol)["train"])
    fit = fit_features((bars if fitted is None else fitted).iloc[train], "5.6.0", "15Min", asset_class)
    return market_data(bars, "5.6.0", fit, "15Min", asset_class, symbol=symbol)


@functools.cache
def market_of(symbol, edge, seed=5):
    return made(simulated(symbol, edge, seed)[0], symbol)


@functools.cache
def probe_of(symbol, edge, kind, account, seed=5):
    spans = spans_of(symbol)
    return fit_supervised(market_of(symbol, edge, seed), spans["train"], spans["validation"], account, kind)


def span_for_test(symbol, edge, seed=5):
    test = market_of(symbol, edge, seed).span(*spans_of(symbol)["test"])
    return test, np.flatnonzero(decision_span(test)[0])


def environment_walk(market, account, actions=None, decide=None):
    """One account through all decision bars of a span, in the training environment.

    (bar decided at, action, state before, state after).
    """
    env = GPUVectorizedTradingEnv(
        market,
        GPUEnvConfig(
            n_envs=1,
            version=market.version,
            window=market.window,
            timeframe=market.timeframe,
            asset_class=market.asset_class,
            reward_preset="equity",
            observations="indices",
            account=account,
        ),
    )
    state, number, steps = AccountState.initial(env.rules), 0, []
    for stretch in np.split(env.decision_bars, np.flatnonzero(np.diff(env.decision_bars) != 1) + 1):
        env.reset_at_index(stretch[:1], stretch[-1:] + 1, state)
        for bar in stretch.tolist():
            action = int(actions[number]) if actions is not None else decide(bar, float(state.quantity))
            after = env.step_index(torch.tensor([action]))[4]["account"]
            steps.append((bar, action, state, after))
            state, number = after, number + 1
        if float(state.quantity) != 0:
            columns = (market.prices[3], market.daily_volatility, market.daily_dollar_volume)
            last = (torch.tensor([a[stretch[-1] + 1]], dtype=torch.float64) for a in columns)
            state = settle(state, *last, env.rules)[0]
    return steps, state


def profit(market, account, actions):
    return float(environment_walk(market, account, actions)[1].equity) / account.initial_account_value - 1


def rule(forecast, held, entry, exit, allow_short, buy, sell, leave_long, leave_short):
    "The trading rule in plain words."
    if held > 0:
        return leave_long if forecast < exit else buy if forecast > entry else HOLD
    if held < 0:
        return leave_short if forecast > -exit else sell if forecast < -entry else HOLD
    if forecast > entry:
        return buy
    return sell if allow_short and forecast < -entry else HOLD


def same(a: SupervisedBaseline, b: SupervisedBaseline, market, bars):
    "Two probes are one, to the last bit."
    return (a.setting, a.rows, a.target_mean, a.entry, a.exit, a.candidates, a.skill) == (
        b.setting,
        b.rows,
        b.target_mean,
        b.entry,
        b.exit,
        b.candidates,
        b.skill,
    ) and np.array_equal(a.predict(market, bars), b.predict(market, bars))


# what it sees and what it predicts


@pytest.mark.slow
def test_target_is_the_return_from_the_next_open_in_units_of_volatility():
    market = market_of("SIM-USD", 0.0)
    prices, volatility = market.prices.copy(), market.volatility.copy()
    prices[0, 2001], prices[3, 2000], prices[3, 2004], volatility[2000] = (
        100.0,
        90.0,
        103.0,
        0.01,
    )  # open 100, close four bars later 103: +3 %, one bar's volatility 1 %
    target = probe_target(replace(market, prices=prices, volatility=volatility), np.array([2000]), 4)
    assert target == pytest.approx([0.03 / (0.01 * 2)], rel=1e-12)
    volatility[2000] = 0.0  # prices have stood still
    assert probe_target(replace(market, prices=prices, volatility=volatility), np.array([2000]), 4) == [8.0]


@pytest.mark.parametrize("version", LAYOUTS)
def test_lags_are_earlier_bars_of_the_windowed_columns(version):
    layout, market = LAYOUTS[version], market_of("SIM-USD", 0.0)
    width = len(layout.market_columns)
    numbered = np.arange(3000 * width, dtype=np.float32).reshape(
        3000, width
    )  # each entry says where it stands
    small = replace(
        market,
        version=version,
        features=numbered,
        prices=market.prices[:, :3000],
        stop=3000,
        **{
            name: getattr(market, name)[:3000]
            for name in (
                "timestamp",
                "volatility",
                "daily_volatility",
                "daily_dollar_volume",
                "segment",
                "can_decide",
                "can_fill",
            )
        },
    )
    windowed = [
        i for i, name in enumerate(layout.market_columns) if layout.windowed[layout.columns.index(name)]
    ]
    row = probe_features(small, np.array([700, 2999]))[1]
    assert row.tolist() == [2999 * width + i for i in range(width)] + [
        (2999 - k) * width + i for k in (1, 2, 4, 8, 16) for i in windowed
    ]
    assert (
        probe_features(replace(small, window=5), np.array([2999]))[0].tolist()
        == row[: width + 3 * len(windowed)].tolist()
    )  # only what lies in the agent's window


@pytest.mark.slow
def test_targets_stop_before_gaps_span_ends_and_orders_that_cannot_fill():
    "Everything that a fit may not read is broken: not a number comes of it, and the fit is the same."
    market, spans = market_of("SIMA", 0.0), spans_of("SIMA")
    segment = market.segment + (np.arange(len(market.segment)) >= 5000)  # a gap before bar 5000
    can_decide = market.can_decide & ~np.isin(np.arange(len(segment)), range(5000, 5600))
    can_fill = market.can_fill & (np.arange(len(segment)) != 4999)
    gapped = replace(market, segment=segment, can_decide=can_decide, can_fill=can_fill)
    train, validation = (spans["train"][0], spans["train"][1] - 50), spans["validation"]
    prices = market.prices.copy()
    for part in (slice(train[1], validation[0]), slice(validation[1], None), slice(5000, 5600)):
        prices[:, part] = np.nan
    last_of_session = np.flatnonzero(~market.can_fill)[100]
    volatility = market.volatility.copy()
    volatility[last_of_session] = np.nan  # the unit of a target whose order could not fill
    broken = replace(gapped, prices=prices, volatility=volatility)
    for kind in reversed(PROBES):
        whole, other = (fit_supervised(m, train, validation, BROKER, kind) for m in (gapped, broken))
        assert same(whole, other, gapped, np.arange(*spans["test"]))
        assert whole.rows == sum(
            (gapped.can_decide & gapped.can_fill)[t] and segment[t + 4] == segment[t]
            for t in range(train[1] - 4)
        )
    inside = market.prices.copy()
    inside[3, train[1] - 1] *= 1.01  # the last close that a target may read
    assert not same(
        whole,
        fit_supervised(replace(gapped, prices=inside), train, validation, BROKER, kind),
        gapped,
        np.arange(*spans["test"]),
    )


# the learners and their figures


@pytest.mark.slow
def test_ridge_is_least_squares_with_rows_for_the_penalty():
    market, probe = market_of("SIM-USD", 0.2), probe_of("SIM-USD", 0.2, "ridge", BROKER)
    bounded = market.span(*spans_of("SIM-USD")["train"])
    at = np.flatnonzero(decision_span(bounded, 4)[0])
    x, y, penalty = (
        probe_features(market, at),
        probe_target(market, at, 4),
        probe.setting["penalty"] * len(at),
    )
    scale = np.where(x.std(0) > 1e-9, x.std(0), 1.0)
    standard = (x - x.mean(0)) / scale
    rows = np.vstack([standard, math.sqrt(penalty) * np.eye(x.shape[1])])
    weights = np.linalg.lstsq(rows, np.concatenate([y - y.mean(), np.zeros(x.shape[1])]), rcond=None)[0]
    test, bars = span_for_test("SIM-USD", 0.2)
    expected = (
        ((probe_features(test, bars) - x.mean(0)) / scale @ weights + y.mean()) * test.volatility[bars] * 2
    )
    np.testing.assert_allclose(probe.predict(test, bars), expected, rtol=1e-6, atol=1e-9)
    assert probe.rows == len(at) and np.abs(expected).max() > 1e-3
    assert np.array_equal(
        probe.predict(test, bars[:7]), probe.predict(test, bars)[:7]
    )  # whoever asks for fewer gets the same


@pytest.mark.slow
def test_the_penalty_and_the_trees_are_the_best_on_the_validation_span():
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.linear_model import Ridge
    from sklearn.metrics import mean_squared_error

    market, spans = market_of("SIM-USD", 0.2), spans_of("SIM-USD")
    (x, y), (vx, vy) = (
        ((probe_features(market, at), probe_target(market, at, 4)))
        for at in (
            np.flatnonzero(decision_span(market.span(*spans[name]), 4)[0]) for name in ("train", "validation")
        )
    )
    mean, scale = x.mean(0), np.where(x.std(0) > 1e-9, x.std(0), 1.0)
    errors = {
        p: mean_squared_error(vy, Ridge(p * len(y)).fit((x - mean) / scale, y).predict((vx - mean) / scale))
        for p in 10.0 ** np.arange(-4, 3)
    }
    assert probe_of("SIM-USD", 0.2, "ridge", BROKER).setting["penalty"] == pytest.approx(
        min(errors, key=errors.get)
    )
    boosted = probe_of("SIM-USD", 0.2, "boosting", BROKER)
    trees = boosted.setting["trees"]

    def alike(n):
        learner = HistGradientBoostingRegressor(
            max_iter=n,
            learning_rate=0.05,
            max_leaf_nodes=8,
            min_samples_leaf=200,
            early_stopping=False,
            random_state=0,
        )
        return learner.fit(x, y).predict(vx)

    errors = {
        n: mean_squared_error(vy, alike(n)) for n in {1, trees - 1, trees, trees + 1, 80} if 1 <= n <= 80
    }
    assert min(errors, key=errors.get) == trees and 1 < trees < 80
    at = np.flatnonzero(decision_span(market.span(*spans["validation"]), 4)[0])
    np.testing.assert_allclose(
        boosted.predict(market, at), alike(trees) * market.volatility[at] * 2, rtol=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROBES)
def test_figures_agree_with_independent_ones(kind):
    from scipy.stats import spearmanr
    from sklearn.metrics import r2_score

    test, bars = span_for_test("SIMA", 0.3)
    probe = probe_of("SIMA", 0.3, kind, BROKER)
    figures, forecast = probe_figures(probe, test, bars), probe.predict(test, bars)
    last = spans_of("SIMA")["test"][1] - 1
    fillable = np.array(
        [
            t
            for t in bars.tolist()
            if t + 4 <= last
            and pd.Timestamp(test.timestamp[t]).date() == pd.Timestamp(test.timestamp[t + 1]).date()
        ]
    )  # a session lies within one day of UTC
    unit = test.volatility[fillable] * 2
    target = np.clip(
        [(test.prices[3, t + 4] / test.prices[0, t + 1] - 1) / u for t, u in zip(fillable, unit)], -8, 8
    )
    predicted = np.round(forecast[np.isin(bars, fillable)] / unit, 12)  # equal forecasts of a tree stay equal
    assert figures["bars"] == len(fillable)
    assert figures["information_coefficient"] == pytest.approx(
        spearmanr(predicted, target).statistic, abs=1e-12
    )
    # scikit-learn measures against the mean of the bars themselves, the probe against the training span's
    own, trained = np.sum((target - target.mean()) ** 2), np.sum((target - probe.target_mean) ** 2)
    assert figures["r_squared"] == pytest.approx(
        1 - (1 - r2_score(target, predicted)) * own / trained, abs=1e-12
    )
    assert figures["information_coefficient_error"] == pytest.approx(2 / math.sqrt(len(fillable)))
    assert figures["round_trip"] == pytest.approx(4e-4) and figures["entry"] == probe.entry
    assert figures["share_beyond_entry"] == pytest.approx(
        np.mean([abs(f) > probe.entry * 4e-4 for f in forecast.tolist()])
    )  # longs and shorts


def test_rank_correlation_with_ties():
    from scipy.stats import spearmanr

    random = np.random.default_rng(0)
    for n in (3, 10, 500):
        a, b = random.integers(0, 5, n), random.standard_normal(n)
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]) == 1.0 and math.isnan(
        rank_correlation([1, 1], [1, 2])
    )


# two markets whose truth is known


@functools.cache
def oracle_profit(symbol, edge):
    "What someone makes who knows the hidden trend, by the same rule."
    test, bars = span_for_test(symbol, edge)
    known, allow_short = (
        dict(zip(bars.tolist(), simulated(symbol, edge)[1]["expected_return"].to_numpy()[bars].tolist())),
        symbol == "SIMA",
    )
    return (
        float(
            environment_walk(
                test,
                FREE,
                decide=lambda bar, held: rule(
                    known[bar], held, 0.0, 0.0, allow_short, BUY_75, SELL_75, CLOSE, CLOSE
                ),
            )[1].equity
        )
        / FREE.initial_account_value
        - 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("symbol", DATES)
def test_a_planted_edge_is_found_in_bars_never_seen(symbol, kind):
    test, bars = span_for_test(symbol, 0.3)
    probe, truth = (
        probe_of(symbol, 0.3, kind, FREE),
        simulated(symbol, 0.3)[1]["expected_return"].to_numpy()[bars],
    )
    figures, forecast = probe_figures(probe, test, bars), probe.predict(test, bars)
    assert (
        figures["information_coefficient"] > 3 * figures["information_coefficient_error"]
        and figures["r_squared"] > 0.02
    )
    strong = np.abs(forecast) > np.quantile(np.abs(forecast), 0.5)
    assert (np.sign(forecast) == np.sign(truth))[strong].mean() > 0.75
    actions = probe_actions(probe, test, bars)
    earned = profit(test, FREE, actions)
    best = oracle_profit(symbol, 0.3)
    assert probe.trades and 0.2 * best < earned < 1.05 * best


@pytest.mark.parametrize("symbol", DATES)
@pytest.mark.parametrize("seed", [5, pytest.param(6, marks=pytest.mark.proof)])
def test_a_martingale_holds_nothing(symbol, seed):
    test, bars = span_for_test(symbol, 0.0, seed=seed)
    probe = probe_of(symbol, 0.0, "ridge", BROKER, seed=seed)
    figures = probe_figures(probe, test, bars)
    assert (
        abs(figures["information_coefficient"]) < 3 * figures["information_coefficient_error"]
        and figures["r_squared"] < 0.01
    )
    assert not probe.trades and figures["entry"] is None and figures["share_beyond_entry"] == 0
    assert not probe_actions(probe, test, bars).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROBES)
def test_a_leak_is_exploited_without_measure(kind):
    """The probe can fail the other way.

    A column that knows the next return makes a fortune where there is none.
    """
    market, spans = market_of("SIM-USD", 0.0), spans_of("SIM-USD")
    known = np.zeros(len(market.timestamp), np.float32)
    known[:-4] = market.prices[3, 4:] / market.prices[0, 1:-3] - 1
    features = market.features.copy()
    features[:, list(LAYOUTS["5.6.0"].market_columns).index("stoch_k")] = known / market.volatility.clip(1e-5)
    leaking = replace(market, features=features)
    probe, test = (
        fit_supervised(leaking, spans["train"], spans["validation"], BROKER, kind),
        leaking.span(*spans["test"]),
    )
    bars = np.flatnonzero(decision_span(test)[0])
    assert probe_figures(probe, test, bars)["information_coefficient"] > 0.95
    assert probe.trades and profit(test, BROKER, probe_actions(probe, test, bars)) > 0.05


# nothing from the future


@functools.cache
def changed_after(cut):
    "The market with every later bar multiplied by a number of its own."
    bars = simulated("SIM-USD", 0.3)[0].copy()
    bars.iloc[cut + 1 :] *= np.exp(np.random.default_rng(0).normal(0, 0.02, (len(bars) - cut - 1, 1)))
    return made(bars, "SIM-USD", simulated("SIM-USD", 0.3)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROBES)
def test_later_bars_change_neither_the_fit_nor_earlier_actions(kind):
    spans, market, probe = (
        spans_of("SIM-USD"),
        market_of("SIM-USD", 0.3),
        probe_of("SIM-USD", 0.3, kind, BROKER),
    )
    (test, decisions), rest = span_for_test("SIM-USD", 0.3), np.arange(*spans["test"])
    actions = probe_actions(probe, test, decisions)
    for cut in (spans["validation"][1] - 1, spans["test"][0] + 1300):
        other = changed_after(cut)
        assert not np.array_equal(other.features[rest], market.features[rest])
        refitted, known = (
            fit_supervised(other, spans["train"], spans["validation"], BROKER, kind),
            np.arange(spans["validation"][0], cut + 1),
        )
        assert same(probe, refitted, market, rest) and np.array_equal(
            refitted.predict(other, known), probe.predict(market, known)
        )
    now, n = probe_actions(refitted, other.span(*spans["test"]), decisions), int((decisions <= cut).sum())
    assert torch.equal(now[:n], actions[:n]) and not torch.equal(now, actions) and bool(actions[:n].any())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_probe():
    market, spans = market_of("SIM-USD", 0.2), spans_of("SIM-USD")
    for kind in PROBES:
        assert same(
            probe_of("SIM-USD", 0.2, kind, BROKER),
            fit_supervised(market, spans["train"], spans["validation"], BROKER, kind, seed=0),
            market,
            np.arange(*spans["test"]),
        )


@pytest.mark.slow
def test_a_long_history_is_thinned_evenly(monkeypatch):
    market, spans = market_of("SIM-USD", 0.2), spans_of("SIM-USD")
    monkeypatch.setattr("trading_lib.evaluation.supervised._ROWS", 3000)
    usable = np.flatnonzero(decision_span(market.span(*spans["train"]), 4)[0])
    every = -(-len(usable) // 3000)
    probe = fit_supervised(market, spans["train"], spans["validation"], FREE, "ridge")
    assert (
        every == 3
        and probe.rows == len(usable[::3])
        and probe.target_mean == pytest.approx(probe_target(market, usable[::3], 4).mean(), rel=1e-12)
    )


# orders

CASES = [("SIM-USD", "5.6.0"), ("SIM-USD", "2.3.0"), ("SIMA", "5.6.0"), ("SIMA", "2.7.0"), ("SIMA", "2.3.0")]


@pytest.mark.slow
@pytest.mark.parametrize("symbol, version", CASES)
def test_actions_are_the_rule_applied_to_the_environments_own_account(symbol, version):
    asset_class, history = DATES[symbol][0], simulated(symbol, 0.3)[0].iloc[-4000:]
    market = market_data(
        history,
        version,
        fit_features(history.iloc[:2500], version, "15Min", asset_class),
        "15Min",
        asset_class,
    )
    test = market.span(3300, 4000)
    bars = np.flatnonzero(decision_span(test)[0])
    probe = replace(fit_supervised(market, (0, 2500), (2500, 3300), BROKER, "ridge"), entry=0.2, exit=-0.1)
    actions, short = probe_actions(probe, test, bars), symbol == "SIMA"
    buy, sell = {"5.6.0": (3, 6), "2.7.0": (3, 6), "2.3.0": (1, 2)}[version]
    leave_long, leave_short = (CLOSE, CLOSE) if version == "5.6.0" else (sell, buy)
    forecast, cost = dict(zip(bars.tolist(), probe.predict(test, bars).tolist())), 4e-4 if short else 54e-4
    steps, _ = environment_walk(test, BROKER, actions)
    expected = [
        rule(
            forecast[bar],
            float(before.quantity),
            0.2 * cost,
            -0.1 * cost,
            short,
            buy,
            sell,
            leave_long,
            leave_short,
        )
        for bar, _, before, _ in steps
    ]
    assert [bar for bar, *_ in steps] == bars.tolist() and actions.tolist() == expected
    assert actions.dtype == torch.int64 and set(actions.tolist()) == {HOLD, buy, leave_long} | (
        {sell, leave_short} if short else set()
    )
    held = np.array([[float(before.quantity), float(after.quantity)] for _, _, before, after in steps])
    assert (
        (held.min() < 0) == short and held.max() > 0 and (held[:, 0] * held[:, 1] >= 0).all()
    )  # shorts in equities only, and no order crosses zero


@pytest.mark.slow
def test_no_shorts_where_the_account_says_so():
    long_only = replace(FREE, allow_short=False)
    test, bars = span_for_test("SIMA", 0.3)
    actions = probe_actions(replace(probe_of("SIMA", 0.3, "ridge", FREE), account=long_only), test, bars)
    assert SELL_75 not in actions.tolist() and BUY_75 in actions.tolist()
    assert min(float(after.quantity) for _, _, _, after in environment_walk(test, long_only, actions)[0]) == 0


@pytest.mark.slow
def test_a_gap_is_crossed_flat():
    "What follows a gap is decided from a flat account: there is nothing to close."
    test, bars = span_for_test("SIM-USD", 0.3)
    probe = replace(probe_of("SIM-USD", 0.3, "ridge", FREE), entry=0.0, exit=0.0)
    forecast = probe.predict(test, bars)
    m = next(
        m for m in range(100, len(bars) - 5) if forecast[m - 1] > 0 > forecast[m + 5]
    )  # buys on the last bar before the gap, and would leave on the first one behind it
    chosen = np.delete(bars, range(m, m + 5))
    actions = probe_actions(probe, test, chosen)
    assert actions[m - 1] == BUY_75 and actions[m] == HOLD
    assert torch.equal(actions[:m], probe_actions(probe, test, chosen[:m])) and torch.equal(
        actions[m:], probe_actions(probe, test, chosen[m:])
    )


@pytest.mark.slow
def test_each_candidates_profit_is_that_of_the_environments_account():
    market, spans = market_of("SIM-USD", 0.3), spans_of("SIM-USD")
    probe = probe_of("SIM-USD", 0.3, "ridge", BROKER)
    assert len({(c["entry"], c["exit"]) for c in probe.candidates}) == len(probe.candidates) == 37
    first, stop = spans["validation"]
    entry, exit, total, squares = 0.125, -0.0625, 0.0, 0.0
    for a in range(first, stop - 1, 512):
        run = market.span(a, min(a + 512, stop - 1) + 1)  # 512 decisions, and the bar after the last
        bars = np.arange(a, run.stop - 1)
        forecast = dict(zip(bars.tolist(), probe.predict(run, bars).tolist()))
        steps, end = environment_walk(
            run,
            BROKER,
            decide=lambda bar, held, forecast=forecast: rule(
                forecast[bar], held, entry * 54e-4, exit * 54e-4, False, BUY_75, SELL_75, CLOSE, CLOSE
            ),
        )
        equity = np.array([1e5] + [float(after.equity) for *_, after in steps] + [float(end.equity)]) / 1e5
        total, squares = total + equity[-1] - 1, squares + sum(np.diff(equity) ** 2)
    row = next(c for c in probe.candidates if (c["entry"], c["exit"]) == (entry, exit))
    assert (
        row["profit"] == pytest.approx(total, abs=1e-12)
        and row["error"] == pytest.approx(math.sqrt(squares), rel=1e-12)
        and abs(total) > 1e-4
    )


@pytest.mark.slow
def test_a_probe_trades_if_it_can_foretell_and_if_that_pays():
    from scipy.stats import spearmanr

    outcomes = set()
    for symbol, edge, account in (
        ("SIM-USD", 0.3, FREE),
        ("SIM-USD", 0.2, BROKER),
        ("SIMA", 0.3, BROKER),
        ("SIM-USD", 0.0, FREE),
        ("SIM-USD", 0.0, BROKER),
        ("SIMA", 0.0, FREE),
        ("SIM-USD", 0.3, DEAR),
    ):
        probe, span = (
            probe_of(symbol, edge, "ridge", account),
            market_of(symbol, edge).span(*spans_of(symbol)["validation"]),
        )
        bars = np.flatnonzero(decision_span(span, 4)[0] & span.can_fill)
        target = probe_target(span, bars, 4)
        coefficient = spearmanr(probe.predict(span, bars) / (span.volatility[bars] * 2), target).statistic
        assert probe.skill == (pytest.approx(coefficient, abs=1e-12), pytest.approx(math.sqrt(4 / len(bars))))
        best = max(probe.candidates, key=lambda c: c["profit"])
        foretells, pays = coefficient > 2 * probe.skill[1], best["profit"] > best["error"]
        outcomes.add((bool(foretells), pays))
        assert (probe.entry, probe.exit) == (
            (best["entry"], best["exit"]) if foretells and pays else (math.inf, math.inf)
        )
    assert len(outcomes) == 4  # each case has been met


# what people get wrong


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(kind="rigde"), "did you mean 'ridge'"),
        (dict(kind="forest"), "known: boosting, ridge"),
        (dict(horizon=0), "horizon: expected 1 or more bars, was 0"),
        (dict(validation=(8000, 9000)), "spans must not overlap"),
        (dict(train=(500, 500)), "spans must not overlap"),
        (dict(validation=(9000, 99999)), "inside 0..11520"),
        (dict(train=(0, 640)), "are too few"),
        (dict(validation=(9000, 9060)), "are too few"),
        (dict(train=(0, 300)), "no decision can be made"),
    ],
)
def test_bad_input_is_one_line(change, words):
    given = dict(train=(0, 8064), validation=(8064, 9792), account=BROKER, kind="ridge", horizon=4) | change
    with pytest.raises(InputError, match=words) as error:
        fit_supervised(market_of("SIM-USD", 0.0), **given)
    assert "\n" not in str(error.value)


def test_a_probe_serves_its_own_kind_of_market_only():
    probe, (test, bars) = probe_of("SIM-USD", 0.2, "ridge", BROKER), span_for_test("SIM-USD", 0.2)
    for call, words in (
        (
            lambda: probe.predict(replace(test, window=50), bars),
            "fitted for window 100, the market data has 50",
        ),
        (lambda: probe.predict(test, np.array([10])), "warm-up"),
        (lambda: probe.predict(test, np.array([10**6])), "expected numbers from 0"),
        (lambda: probe.predict(test, bars / 2), "bar numbers"),
        (lambda: probe_actions(probe, test, bars[::-1]), "in order"),
        (lambda: probe_figures(probe, test, bars[-2:]), "two or more"),
    ):
        with pytest.raises(InputError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("asset_class, symbol", [("crypto", "BTC-USDT"), ("equity", "AAPL")])
def test_real_bars(real_bars_folder, asset_class, symbol):
    bars, _ = validate_bars(
        pd.read_parquet(real_bars_folder / asset_class / "15Min" / f"{symbol}.parquet"), "15Min", asset_class
    )
    bars = bars.iloc[-8_000:]
    spans = split_bounds(len(bars), 0.70, 0.15)
    fit = fit_features(bars.iloc[slice(*spans["train"])], "5.6.0", "15Min", asset_class)
    market = market_data(bars, "5.6.0", fit, "15Min", asset_class, symbol=symbol)
    test = market.span(*spans["test"])
    decisions = np.flatnonzero(decision_span(test)[0])
    for kind in PROBES:
        probe = fit_supervised(market, spans["train"], spans["validation"], BROKER, kind)
        figures = probe_figures(probe, test, decisions)
        print(symbol, kind, figures)
        assert (
            abs(figures["information_coefficient"] or 0) < 0.25 and figures["r_squared"] < 0.05
        )  # more would be a leak
        assert len(probe_actions(probe, test, decisions)) == len(decisions)
