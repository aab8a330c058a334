"""The vectorised account against a slow one in plain floats, and the rules of orders, costs and stops one
by one."""

import math
from dataclasses import fields, replace
from decimal import Decimal

import numpy as np
import pytest
import torch
from scalar_account import BROKER, FREE, STATE, ScalarAccount, torch_root

from trading_lib.account import (
    AccountState,
    NextBar,
    account_columns,
    account_rules,
    account_step,
    settle,
    stack_rules,
)
from trading_lib.config import AccountConfig, InputError

NO_EXITS = replace(FREE, stop_pct=0.0, target_pct=0.0)
HOLD, CLOSE = (0, 0.0, False), (0, 1.0, True)
BUY_25, BUY_50, BUY_75, SELL_25, SELL_50, SELL_75 = (
    (side, size, False) for side in (1, -1) for size in (0.25, 0.5, 0.75)
)
CHOICES = (HOLD, BUY_25, BUY_50, BUY_75, SELL_25, SELL_50, SELL_75, CLOSE)


def tensor(x):
    return torch.as_tensor(np.atleast_1d(np.asarray(x)).astype(np.float64))


def bar_of(
    close,
    open_=None,
    high=None,
    low=None,
    last=None,
    daily_volatility=0.0,
    daily_dollar_volume=1e12,
    can_fill=True,
):
    "A next bar; what is not given did not move."
    open_ = close if open_ is None else open_
    last = open_ if last is None else last
    high, low = (
        np.maximum(open_, last) if high is None else high,
        np.minimum(open_, last) if low is None else low,
    )
    return NextBar(
        *map(tensor, (close, open_, high, low, last, daily_volatility, daily_dollar_volume)),
        torch.as_tensor(np.atleast_1d(can_fill)),
    )


def do(state, action, bar, rules):
    "One step of accounts that all act alike, or each on its own."
    direction, size, is_close = (
        (np.array(column) for column in zip(*action)) if isinstance(action, list) else action
    )
    n = len(state.cash)

    def spread(x, kind):
        return torch.as_tensor(np.broadcast_to(np.asarray(x, kind), n).copy())

    return account_step(
        state, spread(direction, np.float64), spread(size, np.float64), spread(is_close, bool), bar, rules
    )


def start(config, asset_class="equity", n=1):
    return AccountState.initial(config, n), account_rules(config, asset_class)


def values(state):
    return torch.stack([getattr(state, name) for name in STATE], 1).numpy()


def random_path(seed, steps, n, calm=0.008):
    "Prices of n markets with gaps and wide bars, and what the costs need; each (steps, n)."
    rng = np.random.default_rng(seed)
    gap = np.where(rng.random((steps, n)) < 0.15, 0.03, 0.002) * rng.standard_normal((steps, n))
    move = np.where(rng.random((steps, n)) < 0.2, 4 * calm, calm) * rng.standard_normal((steps, n))
    close = np.exp(rng.uniform(1.0, 5.0, n)) * np.exp(np.cumsum(gap + move, 0))
    before = np.concatenate([close[:1] / np.exp(gap + move)[:1], close[:-1]])
    open_ = before * np.exp(gap)
    high, low = (
        f(open_, close) * np.exp(sign * calm * rng.exponential(size=(steps, n)))
        for f, sign in ((np.maximum, 1), (np.minimum, -1))
    )
    volume = np.where(rng.random((steps, n)) < 0.05, 0.0, np.exp(rng.uniform(5, 20, (steps, n))))
    return (
        before,
        open_,
        high,
        low,
        close,
        rng.uniform(0, 0.1, (steps, n)),
        volume,
        rng.random((steps, n)) < 0.9,
    )


def random_actions(seed, steps, n):
    "Numbers into `CHOICES`, in runs, so that positions grow to the cap and are sold again."
    rng = np.random.default_rng(seed)
    drawn, kept = rng.integers(0, 8, (steps, n)), rng.random((steps, n)) < 0.5
    for t in range(1, steps):
        drawn[t] = np.where(kept[t], drawn[t - 1], drawn[t])
    return drawn


# against the slow account


# nearly all at once, and so little that many orders are below the minimum or without funds
ALL_IN = dict(safety_buffer_pct=0.0, base_alloc=1.0, max_position_pct=1.0)
POOR = {
    "crypto": ALL_IN | dict(initial_account_value=35.0, size_decimals=4),
    "equity": ALL_IN | dict(initial_account_value=60.0, minimum_order=12.0),
}


def compare_with_scalar(config, asset_class, seed, steps, n, root=torch_root, rare=()):
    """Both accounts side by side through random steps: the largest difference of any variable, and how
    often each thing happened. Every fill must agree."""
    state, rules = start(config, asset_class, n)
    slow, path, actions = (
        [ScalarAccount.of(config, asset_class, root) for _ in range(n)],
        random_path(seed, steps, n),
        random_actions(seed + 1, steps, n),
    )
    worst, seen = (
        0.0,
        dict.fromkeys(
            (
                "buys",
                "sales",
                "shorts",
                "covers",
                "capped",
                "stops",
                "targets",
                "gaps",
                "closed",
                "refused",
                "order and exit",
                "no volume",
                "gap and order",
                "three fills",
            ),
            0,
        ),
    )
    for t in range(steps):
        rows, choices = (
            list(zip(*(values_at[t].tolist() for values_at in path))),
            [CHOICES[a] for a in actions[t]],
        )
        held, equity = state.quantity.tolist(), state.equity.tolist()
        state, fills = do(
            state,
            choices,
            NextBar(*map(tensor, (values_at[t] for values_at in path[:7])), torch.as_tensor(path[7][t])),
            rules,
        )
        filled = [account.step(*choice, *row) for account, choice, row in zip(slow, choices, rows)]
        worst = max(worst, float(np.abs(values(state) - np.array([account.state for account in slow])).max()))
        assert root is not torch_root or worst == 0, (
            t,
            [
                STATE[j]
                for j in np.flatnonzero(
                    (values(state) != np.array([account.state for account in slow])).any(0)
                )
            ],
        )
        assert fills.quantity.tolist() == [units for units, _ in filled] and (
            worst > 0 or fills.exit_price.tolist() == [price or 0.0 for _, price in filled]
        )
        for h, e, (side, size, is_close), (_, open_, *_, volume, can_fill), (
            units,
            price,
        ), stopped, gapped in zip(
            held, equity, choices, rows, filled, fills.stopped.tolist(), fills.gap_quantity.tolist()
        ):
            sizing = units != 0 and not is_close
            for name, happened in {
                "buys": sizing and h >= 0 < side,
                "sales": sizing and h > 0 > side,
                "shorts": sizing and h <= 0 > side,
                "covers": sizing and h < 0 < side,
                "capped": sizing and h * side > 0 and abs(units) * open_ < 0.8 * e * rules.full_order * size,
                "stops": stopped,
                "targets": price and not stopped,
                "gaps": gapped,
                "gap and order": gapped and units,
                "three fills": gapped and price != open_,
                "closed": is_close and units,
                "refused": side and not units and can_fill,
                "order and exit": units and price,
                "no volume": units and not volume,
            }.items():
                seen[name] += bool(happened)
    never = (
        {name for name, times in seen.items() if times < 5}
        - ({"shorts", "covers"} if asset_class == "crypto" else set())
        - set(rare)
    )
    assert not never, f"the random steps never show {never}: {seen}"
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_every_variable_equals_the_slow_account_to_the_last_bit(asset_class):
    """15,000 random steps per asset class: broker's costs, gaps, stops, targets, empty markets, and bars at
    which nothing can be filled."""
    assert compare_with_scalar(BROKER[asset_class], asset_class, 1, 300, 50) == 0


@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_a_poor_account_equals_the_slow_one_as_well(asset_class):
    """Where the broker refuses much: minimum, funds, a coarse grid, opposite orders that are raised to the
    smallest."""
    assert (
        compare_with_scalar(
            replace(BROKER[asset_class], **POOR[asset_class]), asset_class, 21, 200, 40, rare=("capped",)
        )
        == 0
    )


@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_other_square_roots_change_nothing_that_matters(asset_class):
    "With the nearest square root instead of torch's: every fill alike, and money to a billionth."
    assert compare_with_scalar(BROKER[asset_class], asset_class, 2, 150, 30, math.sqrt) < 1e-9
    without = replace(BROKER[asset_class], impact_coefficient=0.0)
    assert compare_with_scalar(without, asset_class, 3, 150, 30, math.sqrt) == 0, "only the impact has a root"


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_a_million_steps_equal_the_slow_account(asset_class, seed):
    "100,000 random steps a time."
    worst = compare_with_scalar(BROKER[asset_class], asset_class, 100 + seed, 500, 200)
    print(
        f"{asset_class}, seed {seed}: 100,000 random steps, {len(STATE)} variables, "
        f"largest difference {worst}"
    )
    assert worst == 0


@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_results_do_not_depend_on_how_many_accounts_step_together(asset_class):
    "1,000 accounts at once, one by one, and 7 at a time: the same bits."
    n, steps = 1000, 40
    path, actions = random_path(5, steps, n), random_actions(6, steps, n)

    def run(which):
        state, rules = start(BROKER[asset_class], asset_class, len(which))
        for t in range(steps):
            bar = NextBar(
                *(tensor(values_at[t][which]) for values_at in path[:7]), torch.as_tensor(path[7][t][which])
            )
            state, _ = do(state, [CHOICES[a] for a in actions[t][which]], bar, rules)
        return values(state)

    together = run(np.arange(n))
    assert np.ptp(together[:, STATE.index("equity")]) > 1 and together[:, STATE.index("impact")].max() > 0
    for size, first in ((1, 12), (7, 77)):
        for begin in range(0, first, size):
            assert np.array_equal(run(np.arange(begin, begin + size)), together[begin : begin + size]), size


# rules side by side


MIXED = [
    (BROKER["crypto"], "crypto"),
    (BROKER["equity"], "equity"),
    (replace(BROKER["equity"], allow_short=False), "equity"),
    (replace(BROKER["equity"], stop_pct=0.005, target_pct=0.0), "equity"),
    (replace(BROKER["crypto"], stop_pct=0.0, target_pct=0.01), "crypto"),
    (NO_EXITS, "equity"),
    (AccountConfig(costs="conservative", initial_account_value=50_000.0), "equity"),
    (
        AccountConfig(
            costs="zero",
            initial_account_value=200.0,
            max_position_pct=0.9,
            safety_buffer_pct=0.0,
            base_alloc=0.7,
        ),
        "crypto",
    ),
]


@pytest.mark.slow
def test_accounts_under_different_rules_step_as_if_alone():
    """Crypto and equity, shorts and none, other stops, costs and sizes: every variable and every fill, to
    the last bit; and so does a settlement."""
    steps, n = 250, 6  # accounts per set of rules
    each = [account_rules(*which) for which in MIXED]
    stacked = stack_rules([rules for rules in each for _ in range(n)])
    together, alone = (
        AccountState.initial(stacked, n * len(each)),
        [AccountState.initial(rules, n) for rules in each],
    )
    path, actions, seen = (
        random_path(13, steps, n * len(each)),
        random_actions(14, steps, n * len(each)),
        np.zeros((len(each), 4)),
    )

    def bar_at(t, rows):
        return NextBar(
            *(tensor(values_at[t][rows]) for values_at in path[:7]), torch.as_tensor(path[7][t][rows])
        )

    for t in range(steps):
        choices = [CHOICES[a] for a in actions[t]]
        together, fills = do(together, choices, bar_at(t, slice(None)), stacked)
        for k, rules in enumerate(each):
            rows = slice(k * n, (k + 1) * n)
            alone[k], own = do(alone[k], choices[rows], bar_at(t, rows), rules)
            assert np.array_equal(values(together)[rows], values(alone[k])), (t, k)
            assert all(torch.equal(a[rows], b) for a, b in zip(fills, own)), (t, k)
            seen[k] += [
                float((own.quantity != 0).sum()),
                float(own.stopped.sum()),
                float(own.targeted.sum()),
                float((alone[k].quantity < 0).sum()),
            ]
    assert (
        (seen[:, 0] > 100).all()
        and (seen[:, 1] > 0).tolist() == [bool(r.stop) for r in each]
        and (seen[:, 2] > 0).tolist() == [bool(r.target) for r in each]
        and (seen[:, 3] > 0).tolist() == [r.allow_short for r in each]
    )
    assert together.equity[-1] < 1000 < together.equity[-2 * n]
    last = [tensor(path[i][-1]) for i in (4, 5, 6)]
    settled, fills = settle(together, *last, stacked)
    for k, rules in enumerate(each):
        rows = slice(k * n, (k + 1) * n)
        assert np.array_equal(
            values(settled)[rows], values(settle(alone[k], *(x[rows] for x in last), rules)[0])
        )


def test_other_costs_are_all_costs_and_nothing_else():
    """Commission, half spread, slippage and impact are scaled; half of each is charged; a scale for each
    account works too."""
    rules = account_rules(AccountConfig(costs="conservative"), "crypto")
    half = rules.with_costs(0.5)
    assert (half.commission, half.half_spread, half.slippage, half.impact) == (
        12.5e-4,
        0.5e-4,
        10e-4,
        0.5,
    ) and rules.with_costs(1.0) == rules
    assert (
        replace(
            half,
            commission=rules.commission,
            half_spread=rules.half_spread,
            slippage=rules.slippage,
            impact=rules.impact,
        )
        == rules
    )
    assert half.round_trip == pytest.approx(46e-4, abs=1e-15) and rules.with_costs(0.0).round_trip == 0
    bar = bar_of(10.0, daily_volatility=0.03, daily_dollar_volume=1e5)
    paid = [
        do(AccountState.initial(r, 3), BUY_75, bar, r)[1].costs
        for r in (
            rules,
            half,
            rules.with_costs(0.0),
            rules.with_costs(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)),
        )
    ]
    assert paid[0].tolist() == pytest.approx(
        [78.75 * (46e-4 + 0.03 * math.sqrt(78.75 / 1e5))] * 3, rel=1e-12
    ) and paid[2].tolist() == [0, 0, 0]
    assert torch.allclose(paid[1], paid[0] / 2, rtol=1e-14, atol=0) and torch.equal(
        paid[3], torch.stack([paid[0][0], paid[1][1], paid[2][2]])
    )


# the books


@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_the_books_close_at_every_step(asset_class):
    """Cash + position + costs = initial + gross P&L, which is added up from price moves alone: open to
    close of what is held, close to open of what was."""
    n, steps = 500, 300
    state, rules = start(BROKER[asset_class], asset_class, n)
    gross, path, actions = np.zeros(n), random_path(7, steps, n), random_actions(8, steps, n)
    for t in range(steps):
        close, open_, _, _, last = (values_at[t] for values_at in path[:5])
        held = state.quantity.numpy()
        state, fills = do(
            state,
            [CHOICES[a] for a in actions[t]],
            NextBar(*map(tensor, (values_at[t] for values_at in path[:7])), torch.as_tensor(path[7][t])),
            rules,
        )
        inside = (fills.exit_quantity - fills.gap_quantity).numpy()
        position = np.where(inside != 0, -inside, state.quantity.numpy())  # after the order
        gross += held * (open_ - close) + position * (
            np.where(inside != 0, fills.exit_price.numpy(), last) - open_
        )
        books = (
            state.cash.numpy()
            + state.quantity.numpy() * last
            + (state.commission + state.spread + state.slippage + state.impact).numpy()
        )
        assert np.abs(books - 1000 - gross).max() < 1e-9 * (t + 10)
        assert np.array_equal(state.equity.numpy(), state.cash.numpy() + state.quantity.numpy() * last)
        assert np.array_equal(
            state.costs.numpy(), (state.commission + state.spread + state.slippage + state.impact).numpy()
        )
    assert state.costs.min() > 0 and np.abs(gross).max() > 10


@pytest.mark.parametrize("asset_class,action", [("crypto", BUY_50), ("equity", BUY_75), ("equity", SELL_75)])
def test_a_round_trip_loses_exactly_the_costs(asset_class, action):
    "At an unchanged price: the fees of both fills by component, and the square-root impact of each."
    state, rules = start(BROKER[asset_class], asset_class)
    bar = bar_of(7.0, daily_volatility=0.04, daily_dollar_volume=1e6)
    opened, placed = do(state, action, bar, rules)
    value, fee = float(placed.quantity.abs()) * 7, 25e-4 if asset_class == "crypto" else 0.0
    assert value == pytest.approx(
        math.floor(78.75 / 7) * 7 if action is SELL_75 else 1000 * 0.7 * 0.15 * action[1], abs=1e-8
    )
    sold = float(opened.quantity.abs()) * 7  # crypto: the fee for buying has been taken from what was bought
    assert sold == pytest.approx(value * (1 - fee), abs=1e-8)
    after, fills = do(opened, CLOSE, bar, rules)
    assert float(after.commission) == pytest.approx(value - sold + sold * fee, rel=1e-13)
    for name, share in {
        "spread": lambda v: 1e-4,
        "slippage": lambda v: 1e-4,
        "impact": lambda v: 0.04 * math.sqrt(v / 1e6),
    }.items():
        assert float(getattr(after, name)) == pytest.approx(
            value * share(value) + sold * share(sold), rel=1e-13
        ), name
    assert (
        1000 - float(after.equity) == pytest.approx(float(after.costs), abs=1e-12)
        and float(after.quantity) == 0
        and float(fills.trade_profit) == pytest.approx(-float(after.costs), abs=1e-12)
    )
    assert (
        int(after.trades),
        int(after.wins),
        float(after.average_entry),
        float(after.bars_held),
        float(after.trade_cash),
    ) == (1, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "preset,asset_class,side",
    [
        ("broker", "crypto", 27.0),
        ("broker", "equity", 2.0),
        ("conservative", "crypto", 46.0),
        ("conservative", "equity", 11.0),
        ("zero", "crypto", 0.0),
        ("zero", "equity", 0.0),
    ],
)
def test_presets_charge_what_the_broker_does(preset, asset_class, side):
    """Basis points of one fill in a market so large that there is no impact; a number of one's own wins
    over the preset."""
    for config, expected in (
        (AccountConfig(costs=preset), side),
        (
            AccountConfig(costs=preset, slippage_bps=7.0),
            side
            + 7
            - {"broker": 1, "conservative": 20 if asset_class == "crypto" else 10, "zero": 0}[preset],
        ),
    ):
        state, rules = start(config, asset_class)
        after, fills = do(state, BUY_75, bar_of(100.0), rules)
        assert float(fills.costs / fills.traded_value) == pytest.approx(
            expected * 1e-4, abs=1e-15
        ) and rules.round_trip == pytest.approx(2e-4 * expected, abs=1e-15)


# sizing


def test_worked_example():
    "1,000 -> 700 -> 105 -> 52.50; +2 % is 1.05; then 78.83 of 1,001.05 makes 132.38."
    state, rules = start(AccountConfig(costs="zero"), "crypto")
    state, fills = do(state, BUY_50, bar_of(100.0, last=102.0), rules)
    assert float(fills.traded_value) == pytest.approx(52.50, abs=1e-12) and float(
        state.equity
    ) == pytest.approx(1001.05, abs=1e-12)
    assert float(state.equity / 1000 - 1) == pytest.approx(0.00105, abs=1e-15)
    state, fills = do(state, BUY_75, bar_of(102.0), rules)
    assert round(float(fills.traded_value), 2) == 78.83 and round(float(state.position_value), 2) == 132.38


def test_consecutive_orders_scale_in_up_to_the_cap():
    "52.50 a time at an unchanged price, until 200 of 1,000 are held."
    state, rules = start(NO_EXITS, "equity")
    sizes = []
    for _ in range(6):
        state, fills = do(state, BUY_50, bar_of(10.0), rules)
        sizes.append(float(fills.traded_value))
    assert sizes == pytest.approx([52.5, 52.5, 52.5, 42.5, 0, 0], abs=1e-9) and float(
        state.position_value
    ) == pytest.approx(200)


def test_the_cap_binds_when_ordering_and_at_no_other_time():
    """A position that grows beyond the cap is left alone; an order that gaps away from the decision's price
    may end beyond it."""
    state, rules = start(NO_EXITS, "crypto")
    for _ in range(3):
        state, _ = do(state, BUY_75, bar_of(10.0), rules)
    state, _ = do(state, HOLD, bar_of(10.0, last=20.0), rules)
    assert float(state.position_value) == pytest.approx(400) and float(state.equity) == pytest.approx(1200)
    for action in (BUY_25, HOLD):
        assert float(do(state, action, bar_of(20.0), rules)[1].quantity) == 0
    state, _ = do(
        state, HOLD, bar_of(20.0, last=11.0), rules
    )  # 220 of 1,020: no room either, until it falls below 20 %
    assert float(do(state, BUY_25, bar_of(11.0), rules)[1].quantity) == 0
    state, _ = do(state, HOLD, bar_of(11.0, last=10.0), rules)
    state, _ = do(state, (-1, 0.25, False), bar_of(10.0), rules)  # 26.25 less
    gapped, fills = do(state, BUY_75, bar_of(10.0, 12.0, last=12.0), rules)
    assert float(fills.traded_value) == pytest.approx(26.25, abs=1e-9), (
        "the room at the decision's close, in money"
    )
    assert float(gapped.position_value / gapped.equity) > 0.2


@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_an_order_never_crosses_zero(asset_class):
    """Over random steps: the sign of a position never turns within an order, an opposite order larger than
    the position closes it, and crypto is never short."""
    n, steps = 1000, 120
    state, rules = start(replace(BROKER[asset_class], stop_pct=0.0, target_pct=0.0), asset_class, n)
    path, actions, flattened = random_path(9, steps, n), random_actions(10, steps, n), 0
    for t in range(steps):
        held, choices = state.quantity, [CHOICES[a] for a in actions[t]]
        state, fills = do(
            state,
            choices,
            NextBar(*map(tensor, (values_at[t] for values_at in path[:7])), torch.as_tensor(path[7][t])),
            rules,
        )
        assert bool((held * state.quantity >= 0).all()), t
        flattened += int(
            ((held != 0) & (state.quantity == 0) & torch.tensor([not c for *_, c in choices])).sum()
        )
    assert flattened > 100 and bool((state.quantity >= 0).all()) == (asset_class == "crypto")


def test_an_opposite_order_larger_than_the_position_closes_it():
    "Bought 26.25, sold 78.75: flat, not short; the same for a short."
    for first, second in ((BUY_25, SELL_75), (SELL_25, BUY_75)):
        state, rules = start(NO_EXITS, "equity")
        state, _ = do(state, first, bar_of(2.0), rules)
        state, fills = do(state, second, bar_of(2.0), rules)
        assert float(state.quantity) == 0 and bool(fills.trade_closed) and float(state.equity) == 1000


def test_crypto_and_accounts_without_shorts_sell_only_what_they_hold():
    "From flat a sale does nothing; asking for crypto shorts is an error."
    for config, asset_class in ((NO_EXITS, "crypto"), (replace(NO_EXITS, allow_short=False), "equity")):
        state, rules = start(config, asset_class)
        after, fills = do(state, SELL_75, bar_of(2.0), rules)
        assert float(fills.quantity) == 0 and float(after.cash) == 1000 and float(after.quantity) == 0
    with pytest.raises(InputError, match="crypto cannot be sold short"):
        account_rules(replace(NO_EXITS, allow_short=True), "crypto")
    with pytest.raises(InputError, match="expected crypto or equity, was 'stock'"):
        account_rules(NO_EXITS, "stock")


def test_shorts_are_whole_shares_counted_at_the_decision():
    """78.75 at 25 is 3 shares, whatever the open; at 80 it is none; adding to, reducing and covering are
    whole shares too; longs are fractional."""
    state, rules = start(NO_EXITS, "equity")
    short, fills = do(state, SELL_75, bar_of(25.0, 20.0), rules)
    assert float(fills.quantity) == -3 and float(short.cash) == 1060 and float(short.equity) == 1000
    assert float(do(state, SELL_75, bar_of(80.0, 10.0), rules)[1].quantity) == 0
    assert float(do(short, SELL_75, bar_of(25.0), rules)[1].quantity) == -3
    assert float(do(short, BUY_75, bar_of(79.0), rules)[1].quantity) == 1, (
        "an order below one share covers one"
    )
    assert (
        float(do(short, BUY_50, bar_of(25.0), rules)[1].quantity) == 2
        and float(do(short, BUY_75, bar_of(5.0), rules)[1].quantity) == 3
    )
    assert float(do(state, BUY_75, bar_of(25.0, 20.0), rules)[1].quantity) == pytest.approx(
        78.75 / 20, abs=1e-14
    )


def test_where_no_order_can_fill_none_is_placed():
    "Orders and CLOSE do nothing; a stop still works."
    state, rules = start(replace(FREE, stop_pct=0.02), "equity")
    held, _ = do(state, BUY_75, bar_of(100.0), rules)
    for action in CHOICES:
        after, fills = do(held, action, bar_of(100.0, last=101.0, can_fill=False), rules)
        assert (
            float(fills.quantity) == 0
            and float(after.quantity) == float(held.quantity)
            and float(after.cash) == float(held.cash)
        )
        assert float(do(state, action, bar_of(100.0, can_fill=False), rules)[0].cash) == 1000
    after, fills = do(held, BUY_75, bar_of(100.0, 95.0, can_fill=False), rules)
    assert bool(fills.stopped) and float(fills.exit_price) == 95


# what the broker takes


@pytest.mark.parametrize("asset_class,least", [("crypto", 10), ("equity", 1)])
def test_an_order_below_the_minimum_is_not_placed(asset_class, least):
    "A hundredth below it nothing happens at all, at it the order fills; a minimum of one's own wins."
    config = AccountConfig(
        costs="broker",
        safety_buffer_pct=0.0,
        base_alloc=1.0,
        max_position_pct=1.0,
        initial_account_value=4.0 * least,
    )
    for open_ in (100.0, 100.01, 400.0):
        state, rules = start(config, asset_class)
        after, happened = do(state, BUY_25, bar_of(100.0, open_), rules)
        # the order is money: at another open it is as much, but for what the grid takes away
        assert (float(happened.quantity) * open_ == pytest.approx(least, abs=1e-6)) or float(
            happened.quantity
        ) == 0
    for value, placed in ((least - 0.01, False), (least + 0.01, True)):
        state, rules = start(replace(config, initial_account_value=4.0 * value), asset_class)
        after, happened = do(state, BUY_25, bar_of(100.0), rules)
        assert (float(happened.quantity) > 0) == placed == (float(after.cash) < 4 * value) and (
            float(happened.costs) > 0
        ) == placed
        state, rules = start(
            replace(config, initial_account_value=4.0 * value, minimum_order=0.5), asset_class
        )
        assert float(do(state, BUY_25, bar_of(100.0), rules)[1].quantity) > 0
    with pytest.raises(InputError, match=f"the broker takes no {asset_class} order below {least}; raise"):
        account_rules(replace(config, initial_account_value=0.9 * least), asset_class)


def test_small_positions_can_always_be_left():
    """A remainder below the minimum: CLOSE sells it, an opposite order too; a sale below the minimum
    becomes the smallest sale there is."""
    rules = account_rules(replace(NO_EXITS, initial_account_value=200.0), "crypto")
    held, fills = do(AccountState.initial(rules), BUY_75, bar_of(100.0), rules)
    assert (
        float(fills.quantity) == 0.1575 and float(do(held, SELL_25, bar_of(100.0), rules)[1].quantity) == -0.1
    ), "5.25 would be refused, 10 is sold"
    rest, _ = do(held, SELL_25, bar_of(100.0), rules)
    for action in (CLOSE, SELL_25, SELL_75):
        after, fills = do(rest, action, bar_of(100.0), rules)
        assert float(after.quantity) == 0 and float(fills.quantity) == -0.0575 and bool(fills.trade_closed)
    for n_actions in (3, 7):  # versions without CLOSE, an account that has lost nearly everything
        held, _ = do(AccountState.initial(rules), (1, 0.75, False), bar_of(100.0), rules)
        poor = replace(held, cash=held.cash - 180.0, equity=held.equity - 180.0)
        after, _ = do(poor, (-1, 0.5 if n_actions == 3 else 0.25, False), bar_of(50.0), rules)
        assert float(after.quantity) == 0


@pytest.mark.parametrize("size", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("shares,price", [(1, 70.0), (2, 35.0), (7, 11.0), (3, 25.0)])
def test_a_short_can_always_be_closed(shares, price, size):
    """Sold in whole shares, then the share becomes dear: orders of any size cover at least one a time,
    until none is left, and never one too many."""
    state, rules = start(NO_EXITS, "equity")
    state, fills = do(state, SELL_75, bar_of(price), rules)
    assert float(fills.quantity) == -shares
    covered = []
    while float(state.quantity) and len(covered) < 20:
        state, fills = do(state, (1, size, False), bar_of(3 * price), rules)
        covered.append(float(fills.quantity))
    assert (
        sum(covered) == shares
        and float(state.quantity) == 0
        and all(c >= 1 and c == round(c) for c in covered)
        and int(state.trades) == 1
    )


@pytest.mark.parametrize(
    "asset_class,decimals", [("crypto", None), ("equity", None), ("crypto", 4), ("equity", 0)]
)
def test_every_order_and_every_position_is_on_the_grid(asset_class, decimals):
    """Random steps: quantities have at most nine decimals, or as many as the asset takes; shorts are whole
    shares."""
    config = replace(BROKER[asset_class], size_decimals=decimals, max_position_pct=0.9)
    n, steps = 300, 120
    state, rules = start(config, asset_class, n)
    path, actions, grid, orders = (
        random_path(31, steps, n, 0.004),
        random_actions(32, steps, n),
        9 if decimals is None else decimals,
        0,
    )
    for t in range(steps):
        state, fills = do(
            state,
            [CHOICES[a] for a in actions[t]],
            NextBar(*map(tensor, (values_at[t] for values_at in path[:7])), torch.as_tensor(path[7][t])),
            rules,
        )
        for quantity in (fills.quantity, state.quantity):
            assert np.array_equal(
                quantity.numpy(), [round(q, grid) for q in quantity.tolist()]
            ) and np.array_equal(
                state.quantity[state.quantity < 0].numpy() % 1, 0 * state.quantity[state.quantity < 0].numpy()
            )
        orders += int((fills.quantity != 0).sum())
    assert orders > 5000


def test_the_fee_for_buying_crypto_is_taken_in_kind():
    """A purchase of 1.0 leaves 0.9975, and the money is that of the whole; the fee for selling it is money.
    Worked out with decimal fractions; equities pay money both ways."""
    config = replace(
        NO_EXITS, commission_bps=25.0, safety_buffer_pct=0.0, base_alloc=0.4, max_position_pct=0.9
    )
    state, rules = start(config, "crypto")
    held, fills = do(state, (1, 0.25, False), bar_of(100.0), rules)
    assert (
        float(fills.quantity) == 1.0
        and float(held.quantity) == 0.9975
        and float(held.cash) == 900.0
        and float(held.equity) == 999.75
        and float(held.commission) == 0.25 == float(fills.costs)
    )
    assert float(held.average_entry) == 100.0 and float(held.traded_value) == 100.0
    sold, fills = do(held, CLOSE, bar_of(100.0, 120.0), rules)
    proceeds = Decimal("0.9975") * 120 * (1 - Decimal("0.0025"))
    assert (
        float(fills.quantity) == -0.9975
        and float(sold.cash) == pytest.approx(float(900 + proceeds), abs=1e-12)
        and float(fills.trade_profit) == pytest.approx(float(proceeds - 100), abs=1e-12)
    )
    held, _ = do(start(config, "equity")[0], (1, 0.25, False), bar_of(100.0), account_rules(config, "equity"))
    assert float(held.quantity) == 1.0 and float(held.cash) == 899.75
    free, fills = do(state, (1, 0.25, False), bar_of(100.0), rules.with_costs(0.0))
    assert float(free.quantity) == 1.0 and float(fills.costs) == 0


@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
def test_nobody_buys_with_money_that_is_not_there(asset_class):
    """All in, with costs: the last purchase is refused, and cash never falls below nothing, whatever the
    next open is; a long position never costs more than there is."""
    config = replace(
        BROKER[asset_class],
        safety_buffer_pct=0.0,
        base_alloc=1.0,
        max_position_pct=1.0,
        stop_pct=0.0,
        target_pct=0.0,
        allow_short=None if asset_class == "crypto" else False,
    )
    state, rules = start(config, asset_class)
    first, fills = do(state, BUY_75, bar_of(10.0), rules)
    assert float(fills.quantity) == 75
    second, fills = do(first, BUY_75, bar_of(10.0), rules)
    assert float(fills.quantity) == 0 and float(second.cash) == float(first.cash) > 240, (
        "250 less the costs does not pay 250"
    )
    third, fills = do(first, BUY_75, bar_of(10.5), replace(rules, max_position=0.95))
    assert float(fills.quantity) > 0 and float(third.cash) > 0
    n, steps = 300, 150
    state, path, actions = (
        AccountState.initial(rules, n),
        random_path(41, steps, n),
        random_actions(42, steps, n),
    )
    for t in range(steps):
        state, _ = do(
            state,
            [CHOICES[a] for a in actions[t]],
            NextBar(*map(tensor, (values_at[t] for values_at in path[:7])), torch.as_tensor(path[7][t])),
            rules,
        )
        assert float(state.cash.min()) >= 0, t


def test_a_short_needs_as_much_as_it_is_worth():
    """Shares are counted at the decision: where they open twice as dear, 80 % of an account of 1,000 would
    be short 1,600, and nothing is sold."""
    config = replace(NO_EXITS, safety_buffer_pct=0.0, base_alloc=1.0, max_position_pct=0.8)
    state, rules = start(config, "equity")
    assert (
        float(do(state, SELL_75, bar_of(10.0, 20.0), rules)[1].quantity) == 0
        and float(do(state, SELL_75, bar_of(10.0, 13.0), rules)[1].quantity) == -75
    )
    short, _ = do(state, SELL_75, bar_of(10.0), rules)  # 750 short; 250 are free
    assert float(do(short, SELL_75, bar_of(10.0), rules)[1].quantity) == -5, "the cap leaves 50"
    assert float(do(short, SELL_75, bar_of(10.0, 12.0), rules)[1].quantity) == 0, (
        "at 12 it is 900 short of 850"
    )


# stops and targets


@pytest.mark.parametrize(
    "side,open_,high,low,last,exit_price,kind",
    [
        ("long", 100, 101, 99, 100, 0, None),
        ("long", 100, 101, 98, 100, 98, "stop"),
        ("long", 100, 104, 99, 100, 104, "target"),
        ("long", 100, 105, 97, 105, 98, "stop"),
        ("long", 95, 96, 94, 96, 95, "stop"),
        ("long", 106, 107, 105, 106, 106, "target"),
        ("long", 98, 99, 98, 99, 98, "stop"),
        ("long", 100, 103.99, 98.01, 100, 0, None),
        ("short", 100, 101, 99, 100, 0, None),
        ("short", 100, 102, 99, 100, 102, "stop"),
        ("short", 100, 101, 96, 100, 96, "target"),
        ("short", 100, 103, 95, 95, 102, "stop"),
        ("short", 105, 106, 104, 104, 105, "stop"),
        ("short", 94, 95, 93, 94, 94, "target"),
        ("short", 100, 101.99, 96.01, 100, 0, None),
    ],
)
def test_stop_and_target(side, open_, high, low, last, exit_price, kind):
    """Entered at 100: stop 2 % and target 4 % away; both in range, the stop; a gap through a level fills at
    the open; touching is enough."""
    state, rules = start(replace(FREE, initial_account_value=10_000.0), "equity")
    held, _ = do(state, BUY_75 if side == "long" else SELL_75, bar_of(100.0), rules)
    after, fills = do(held, HOLD, bar_of(100.0, float(open_), float(high), float(low), float(last)), rules)
    assert (bool(fills.stopped), bool(fills.targeted)) == (kind == "stop", kind == "target")
    assert float(fills.exit_price) == pytest.approx(exit_price, abs=1e-12)
    expected = 10_000 + float(held.quantity) * ((exit_price or last) - 100)
    assert float(after.equity) == pytest.approx(expected, abs=1e-9) and (float(after.quantity) == 0) == (
        kind is not None
    )
    assert int(after.trades) == (kind is not None) and int(after.wins) == (kind == "target")


LONG_LEAVES, SHORT_LEAVES = (
    {"HOLD": 0, "BUY": 1, "SELL": 0, "CLOSE": 0},
    {"HOLD": 0, "BUY": 0, "SELL": -1, "CLOSE": 0},
)


@pytest.mark.parametrize("order", ["HOLD", "BUY", "SELL", "CLOSE"])
@pytest.mark.parametrize(
    "side,open_,stopped",
    [
        ("long", 97.0, True),
        ("long", 98.0, True),
        ("long", 106.0, False),
        ("short", 103.0, True),
        ("short", 95.0, False),
        ("short", 96.0, False),
    ],
)
def test_what_the_open_has_passed_leaves_first(side, open_, stopped, order):
    """Entered at 100, whatever is ordered: all of it leaves at the open. An order in its direction is a new
    trade with its own entry; an opposite one, or CLOSE, finds nothing left."""
    state, rules = start(replace(FREE, initial_account_value=10_000.0), "equity")
    held, _ = do(state, BUY_75 if side == "long" else SELL_75, bar_of(100.0), rules)
    action = {"HOLD": HOLD, "BUY": BUY_75, "SELL": SELL_75, "CLOSE": CLOSE}[order]
    after, fills = do(held, action, bar_of(100.0, open_), rules)
    sign = 1 if side == "long" else -1
    assert (bool(fills.stopped), bool(fills.targeted), bool(fills.gap_stopped)) == (
        stopped,
        not stopped,
        stopped,
    )
    assert (
        float(fills.gap_quantity) == float(fills.exit_quantity) == -float(held.quantity)
        and float(fills.exit_price) == open_
    )
    profit = sign * abs(float(held.quantity)) * (open_ - 100)
    assert float(fills.gap_profit) == float(fills.trade_profit) == pytest.approx(profit, abs=1e-9) and float(
        after.equity
    ) == pytest.approx(10_000 + profit, abs=1e-9)
    reopens = (LONG_LEAVES if side == "long" else SHORT_LEAVES)[order]
    units = math.floor(787.5 / open_ * 1e9) / 1e9 if side == "long" else math.floor(787.5 / 100)
    assert (
        float(after.quantity) == float(fills.quantity) == reopens * units
        and float(after.average_entry) == abs(reopens) * open_
        and float(after.bars_held) == abs(reopens)
    )
    assert (
        int(after.trades) == 1
        and int(after.wins) == (not stopped)
        and float(after.trade_cash) == pytest.approx(-reopens * units * open_, abs=1e-9)
    )


def test_three_fills_in_one_bar():
    """Stopped at the open, bought again, stopped again: two trades, each with its own profit, and every
    fill pays."""
    state, rules = start(BROKER["crypto"], "crypto")
    rules = replace(rules, impact=0.0)
    held, _ = do(state, BUY_50, bar_of(100.0), rules)
    equity = float(held.equity)
    after, fills = do(held, BUY_50, bar_of(100.0, 97.0, 97.5, 94.0, 95.0), rules)
    bought = math.floor(equity * 0.0525 / 97 * 1e9) / 1e9
    first, second = (
        0.525 * 0.9975 * 97 * (1 - 27e-4) - 52.5 * (1 + 2e-4),
        bought * 0.9975 * 97 * 0.98 * (1 - 27e-4) - bought * 97 * (1 + 2e-4),
    )
    assert float(fills.gap_profit) == pytest.approx(first, abs=1e-6) and float(
        fills.trade_profit
    ) == pytest.approx(first + second, abs=1e-6)
    assert (int(after.trades), int(after.wins), float(after.quantity), float(after.bars_held)) == (
        2,
        0,
        0,
        0,
    ) and float(after.equity) == pytest.approx(1000 + first + second, abs=1e-6)
    assert float(fills.exit_price) == pytest.approx(97 * 0.98, abs=1e-12) and float(
        fills.traded_value
    ) == pytest.approx(0.525 * 0.9975 * 97 + bought * 97 * (1 + 0.9975 * 0.98), abs=1e-5)
    assert 0 < float(fills.gap_costs) < float(fills.costs) and float(fills.gap_costs) == pytest.approx(
        0.525 * 0.9975 * 97 * 27e-4, abs=1e-6
    )


def test_an_order_in_the_bar_of_its_own_stop_loses_both_ways():
    "Bought at the open, stopped in the same bar, at 2 % below the fill; both fills are paid for."
    state, rules = start(BROKER["crypto"], "crypto")
    after, fills = do(state, BUY_50, bar_of(100.0, 110.0, 111.0, 100.0, 105.0), rules)
    assert (
        float(fills.exit_price) == pytest.approx(107.8, abs=1e-12)
        and float(after.quantity) == 0
        and int(after.trades) == 1
    )
    sold = 0.98 * 0.9975  # of what was paid: 2 % less, and the fee in kind
    assert float(fills.traded_value) == pytest.approx(52.5 * (1 + sold), abs=1e-6) and float(
        fills.costs
    ) == pytest.approx(52.5 * (1 + sold) * 27e-4, rel=1e-6)


def test_protection_lies_around_the_average_entry():
    "Averaging in moves the levels, a partial sale does not: 5.25 units at 100 and 263.88 of money at 110."
    state, rules = start(
        replace(FREE, initial_account_value=10_000.0, stop_pct=0.10, target_pct=0.50), "crypto"
    )
    state, _ = do(state, BUY_50, bar_of(100.0, last=110.0), rules)
    assert float(state.quantity) == pytest.approx(5.25, abs=1e-12) and float(
        state.average_entry
    ) == pytest.approx(100, abs=1e-12)
    added = 10_052.5 * 0.7 * 0.15 * 0.25 / 110
    entry = (5.25 * 100 + added * 110) / (5.25 + added)
    state, _ = do(state, BUY_25, bar_of(110.0), rules)
    assert float(state.average_entry) == pytest.approx(entry, abs=1e-8) and 103 < entry < 104
    sold, _ = do(state, SELL_25, bar_of(110.0), rules)
    assert float(sold.average_entry) == float(state.average_entry) and 0 < float(sold.quantity) < float(
        state.quantity
    )
    entry = float(state.average_entry)  # units are rounded to the grid
    for low, price in ((0.9 * entry - 0.001, 0.9 * entry), (0.9 * entry + 0.001, 0)):
        assert float(do(sold, HOLD, bar_of(110.0, low=low), rules)[1].exit_price) == pytest.approx(
            price, abs=1e-10
        )
    for high, price in ((1.5 * entry + 0.001, 1.5 * entry), (1.5 * entry - 0.001, 0)):
        assert float(do(sold, HOLD, bar_of(110.0, high=high), rules)[1].exit_price) == pytest.approx(
            price, abs=1e-10
        )


def test_no_stop_and_no_target_mean_none():
    "0 switches each off."
    state, rules = start(NO_EXITS, "equity")
    held, _ = do(state, BUY_75, bar_of(100.0), rules)
    after, fills = do(held, HOLD, bar_of(100.0, 100.0, 500.0, 1.0, 100.0), rules)
    assert not bool(fills.stopped) and not bool(fills.targeted) and float(after.quantity) > 0


# trades, peaks, ruin


def test_a_trade_runs_from_flat_to_flat():
    "Two purchases, a partial and a full sale are one trade; its bars, profit and win are counted once."
    state, rules = start(NO_EXITS, "crypto")
    for action, last in ((BUY_50, 101.0), (BUY_25, 102.0), (SELL_25, 103.0)):
        state, fills = do(
            state,
            action,
            bar_of(100.0 if action is BUY_50 else float(state.position_value / state.quantity), last=last),
            rules,
        )
        assert int(state.trades) == 0 and float(fills.trade_profit) == 0
    assert float(state.bars_held) == 3
    state, fills = do(state, CLOSE, bar_of(103.0), rules)
    assert (int(state.trades), int(state.wins), bool(fills.trade_closed)) == (1, 1, True)
    assert (
        float(fills.trade_profit) == pytest.approx(float(state.equity) - 1000, abs=1e-10)
        and float(state.bars_held) == 0
    )
    state, fills = do(state, CLOSE, bar_of(103.0), rules)
    assert int(state.trades) == 1 and not bool(fills.trade_closed), "closing nothing is no trade"


def test_peak_and_drawdown():
    "Up 10 %, down 10 %: the high-water mark stays, the drawdown is the drop from it."
    state, rules = start(
        replace(NO_EXITS, safety_buffer_pct=0.0, base_alloc=1.0, max_position_pct=1.0), "crypto"
    )
    state, _ = do(state, (1, 1.0, False), bar_of(10.0, last=11.0), rules)
    state, _ = do(state, HOLD, bar_of(11.0, last=9.9), rules)
    assert float(state.peak_equity) == 1100 and float(state.drawdown) == pytest.approx(0.1, abs=1e-12)


def test_a_short_can_lose_more_than_everything():
    "Equity below 0 is reported as it is, and no order can be sized on it; CLOSE still flattens."
    state, rules = start(NO_EXITS, "equity")
    for _ in range(3):
        state, _ = do(state, SELL_75, bar_of(1.0), rules)
    assert float(state.quantity) == -200
    ruined, _ = do(state, HOLD, bar_of(1.0, last=7.0), rules)
    assert float(ruined.equity) == -200
    assert (
        float(do(ruined, SELL_75, bar_of(7.0), rules)[1].quantity) == 0
        and float(do(ruined, BUY_75, bar_of(7.0), rules)[1].quantity) == 1
    ), "out is always possible"
    after, _ = do(ruined, CLOSE, bar_of(7.0), rules)
    assert (
        float(after.equity) == -200
        and float(after.quantity) == 0
        and bool(torch.isfinite(torch.from_numpy(values(after))).all())
    )


def test_settling_sells_at_the_close_and_pays():
    "Long and short accounts become flat at the price given; flat ones are not touched."
    state, rules = start(BROKER["equity"], "equity", 3)
    state, _ = do(state, [BUY_75, SELL_75, HOLD], bar_of(np.full(3, 10.0), last=np.full(3, 10.1)), rules)
    after, fills = settle(state, tensor([10.1] * 3), tensor([0.02] * 3), tensor([1e6] * 3), rules)
    assert after.quantity.tolist() == [0, 0, 0] and fills.quantity.tolist() == (-state.quantity).tolist()
    paid = state.quantity.abs() * 10.1 * (2e-4 + 0.02 * torch.sqrt(state.quantity.abs() * 10.1 / 1e6))
    assert (
        torch.allclose(state.equity - after.equity, paid, rtol=1e-9, atol=0)
        and float(after.equity[2]) == 1000
        and after.trades.tolist() == [1, 1, 0]
    )


def test_columns_are_those_of_the_account():
    "What a model sees, computed in plain floats."
    config = replace(BROKER["equity"], initial_account_value=2000.0)
    state, rules = start(config, "equity", 60)
    path, actions = random_path(11, 80, 60), random_actions(12, 80, 60)
    for t in range(80):
        state, _ = do(
            state,
            [CHOICES[a] for a in actions[t]],
            NextBar(*map(tensor, (values_at[t] for values_at in path[:7])), torch.as_tensor(path[7][t])),
            rules,
        )
    columns = account_columns(state, config)
    for i in range(60):
        cash, _, _, equity, peak, trades, wins, *_ = values(state)[i].tolist()
        position = equity - cash
        expected = {
            "pnl": math.tanh(10 * (equity - 2000) / 2000),
            "win_rate": wins / trades if trades else 0.5,
            "drawdown": (peak - equity) / peak,
            "position_pct": position / equity / 0.20,
            "available_pct": 1 - abs(position) / equity,
            "account_change": math.log10(equity / 2000),
        }
        assert {name: float(columns[name][i]) for name in columns} == pytest.approx(expected, abs=1e-12)
    fresh = account_columns(AccountState.initial(config), config)
    assert {name: float(v) for name, v in fresh.items()} == {
        "pnl": 0,
        "win_rate": 0.5,
        "drawdown": 0,
        "position_pct": 0,
        "available_pct": 1,
        "account_change": 0,
    }


def test_states_mix_by_account():
    "`where` takes every field of the other state where the mask holds."
    a, b = AccountState.initial(n=3), AccountState.initial(AccountConfig(initial_account_value=5.0), 3)
    mixed = a.where(torch.tensor([False, True, False]), b)
    assert mixed.cash.tolist() == [1000, 5, 1000] and all(
        getattr(mixed, f.name).dtype == torch.float64 for f in fields(AccountState)
    )
