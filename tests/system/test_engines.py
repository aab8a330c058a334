"""Another engine keeps the books of our backtests: vectorbt is given the same orders, and must have the same
equity to the cent at every close; or decides by itself where stops and targets take a position out.

Each bar becomes several rows of the engine's, so that what happens in it has an order there too: first what
stop or target sell at the open, then the order at the open, then stop or target inside the bar, then the
close. The engine keeps cash, position, fees and trades by itself. Costs are not taken from our result either:
commission, spread and slippage are percentages, as the `broker` preset is documented, and the impact of each
order is worked out here, with pandas. The engine knows no fee in kind. Of a purchase of crypto it is told the
units that arrive, and the price of those that the broker keeps as a fee in cash: that is the same money and
the same units. Where the data break off, our backtest sells at the last close before; the engine is told to
be flat there. In crypto a bar opens where the last one closed, so gaps through a level are looked for in
equities. Run with -s for the tables.
"""

import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from trading_lib.account import account_rules
from trading_lib.backtest import run_backtest
from trading_lib.config import AccountConfig
from trading_lib.env import market_data
from trading_lib.evaluation.replay import Run, decision_bars, replay
from trading_lib.features import fit_features
from trading_lib.sources import load_bars, simulate_market

vectorbt = pytest.importorskip("vectorbt", reason="vectorbt, of the test extras, is not installed")

CENT, INITIAL, VERSION = 0.005, 100_000.0, "5.6.0"
COMMISSION, AROUND = (
    {"crypto": 25e-4, "equity": 0.0},
    (1 + 1) * 1e-4,
)  # of the broker preset; half spread and slippage
FEES = {name: commission + AROUND for name, commission in COMMISSION.items()}
BARS_A_DAY = {"crypto": 96, "equity": 26}
HOLD, BUY_75, CLOSE = 0, 3, 7
# odd distances: no level falls on a price, where the last bit would decide
ACCOUNT = dict(costs="broker", initial_account_value=INITIAL, stop_pct=0.00613, target_pct=0.00837)


# bars, actions and our backtest


@functools.cache
def market_of(symbol: str, folder: str, length: str) -> SimpleNamespace:
    "Bars and the span to trade in: crypto with a gap inside, equities with their nights."
    asset_class = "crypto" if "-" in symbol else "equity"
    if not folder:
        bars = simulate_market(
            symbol,
            "15Min",
            "2023-01-01",
            {"crypto": "2023-02-14", "equity": "2023-08-15"}[asset_class],
            3,
            0.1,
            asset_class,
        )[0]
        if asset_class == "crypto":
            bars = pd.concat([bars[:2300], bars[2540:]])  # a hole of two days and a half
    else:
        bars = load_bars(symbol, "15Min", "files", path=folder, asset_class=asset_class)
        if length == "short" and asset_class == "crypto":
            bars = bars.loc["2024-08-18":"2025-01-20"]  # 115 days are missing inside
    span = (700, len(bars) if length == "whole" or asset_class == "crypto" else 3200)
    return SimpleNamespace(
        symbol=symbol,
        asset_class=asset_class,
        bars=bars,
        span=span,
        fit=fit_features(bars[:1500], VERSION, "15Min", asset_class),
    )


def backtest(market, actions, **account):
    return run_backtest(
        None,
        market.bars,
        actions=actions,
        version=VERSION,
        fit=market.fit,
        timeframe="15Min",
        asset_class=market.asset_class,
        account=AccountConfig(**ACCOUNT | account),
        start=market.span[0],
        stop=market.span[1],
        symbol=market.symbol,
    )


def eventful_actions(market, seed=0) -> np.ndarray:
    """One side for some thirty bars, then the other.

    Mostly waiting, so that stops and targets have time; now and then against that side, or CLOSE.
    """
    table = market_data(market.bars, VERSION, market.fit, "15Min", market.asset_class).span(*market.span)
    at, random = decision_bars(table), np.random.default_rng(seed)
    number = len(at)
    side = np.cumsum(random.random(number) < 1 / 30) % 2
    kind, bucket = random.choice(4, number, p=[0.78, 0.16, 0.03, 0.03]), random.integers(0, 3, number)
    with_side, against = 1 + 3 * side + bucket, 4 - 3 * side + bucket
    actions = np.select([kind == 1, kind == 2, kind == 3], [with_side, against, CLOSE], HOLD)
    for last in np.flatnonzero(np.diff(at) > 1):
        actions[last - 1 : last + 1] = BUY_75  # something is held where the data break off
    return actions


def table_of(result, bars) -> pd.DataFrame:
    "Our backtest bar by bar: what was ordered at its open, what left inside, what was settled at its close."
    rows = bars.loc[result.equity.index].copy()
    fills = result.actions.set_index(bars.index[bars.index.get_indexer(result.actions["timestamp"]) + 1])
    for name in ("action", "quantity", "exit_quantity", "exit_price", "gap_quantity"):
        rows[name] = fills[name].reindex(rows.index)
    rows[["quantity", "exit_quantity", "exit_price", "gap_quantity"]] = rows[
        ["quantity", "exit_quantity", "exit_price", "gap_quantity"]
    ].fillna(0.0)
    rows["settled"] = rows.index.isin(
        result.trades.loc[result.trades["exit"] == "gap in the data", "exit_time"]
    )
    # of a purchase of crypto the broker keeps a quarter of a percent of the units
    rows["kept"] = (
        rows["quantity"].clip(lower=0).mul(COMMISSION["crypto"] * 1e9).round().div(1e9)
        if bars_are_crypto(bars)
        else 0.0
    )
    rows["inside"] = rows["exit_quantity"] != rows["gap_quantity"]
    before, average_before, held, average = np.zeros(
        (4, len(rows))
    )  # when the bar opens; after the order, before any exit inside the bar
    position = entry = 0.0
    for k, (quantity, kept, price, gap, inside, settle) in enumerate(
        rows[["quantity", "kept", "open", "gap_quantity", "inside", "settled"]].itertuples(index=False)
    ):
        before[k], average_before[k] = position, entry
        if gap:
            position = entry = 0.0
        if quantity and quantity * position >= 0:
            entry = (entry * position + price * (quantity - kept)) / (position + quantity - kept)
        if quantity:
            position = round(position + quantity - kept, 9)
        held[k], average[k] = position, entry if position else 0.0
        if inside or settle:
            position = entry = 0.0
    return rows.assign(
        before=before,
        average_before=average_before,
        held=held,
        average=average,
        equity=result.equity,
        value=result.position * result.equity,
    )


def bars_are_crypto(bars) -> bool:
    return bool((bars.index.dayofweek >= 5).any())


def levels_of(side, average, stop: float, target: float):
    return average * (1 - side * stop), average * (1 + side * target)


def exits_by_the_rule(table, stop: float, target: float) -> pd.DataFrame:
    """Where a position must leave, and at what price.

    At the open, if that has passed a level; after the order, inside the bar, at a level in reach, the stop
    first.
    """
    side = np.sign(table["before"])
    levels = levels_of(side, table["average_before"], stop, target)
    gap = [
        (side != 0) & (side * table["open"] <= side * levels[0]),
        (side != 0) & (side * table["open"] >= side * levels[1]),
    ]
    side = np.sign(table["held"])
    levels = levels_of(side, table["average"], stop, target)
    worst, best = table["low"].where(side > 0, table["high"]), table["high"].where(side > 0, table["low"])
    stopped = (side != 0) & (side * worst <= side * levels[0])
    in_reach = (side != 0) & (side * best >= side * levels[1])
    price = np.select([stopped, in_reach, gap[0] | gap[1]], [levels[0], levels[1], table["open"]], 0.0)
    return pd.DataFrame(
        {
            "price": price,
            "stopped": stopped,
            "targeted": in_reach & ~stopped,
            "both": stopped & in_reach,
            "gap through the stop": gap[0],
            "gap through the target": gap[1],
        },
        table.index,
    )


def impact_rates(bars, asset_class: str) -> pd.DataFrame:
    """What the square-root law needs, known at each close.

    Volatility and value traded of a day, over five days.
    """
    per_day = BARS_A_DAY[asset_class]
    starts = (
        bars.index.to_series().diff() > pd.Timedelta("15min")
        if asset_class == "crypto"
        else pd.Series(False, bars.index)
    )
    stretch = starts.cumsum()

    def mean(values):
        return values.groupby(stretch).transform(lambda v: v.rolling(5 * per_day, min_periods=1).mean())

    returns = bars["close"].groupby(stretch).pct_change().fillna(0.0)
    return pd.DataFrame(
        {
            "volatility": np.sqrt(mean(returns**2) * per_day),
            "volume": mean(bars["close"] * bars["volume"]) * per_day,
        }
    )


# the other engine


# rows of the engine for each bar: stop or target at the open, the order, stop or target inside, the close
ROWS = 4


def replay_in_vectorbt(table, rates, asset_class: str):
    "Orders into vectorbt. What leaves is for the engine to know: exits and settlements only say flat."
    known = rates.shift(1).loc[table.index]  # an order is charged by what was known when it was decided
    at_close = rates.loc[table.index]
    flat = (table["gap_quantity"] != 0, table["inside"], table["settled"])
    price = np.stack(
        [table["open"], table["open"], np.where(flat[1], table["exit_price"], table["open"]), table["close"]],
        1,
    )
    arrives = table["quantity"] - table["kept"]
    leaves = [np.where(f, 0.0, np.nan) for f in flat]
    size = np.stack([leaves[0], arrives.where(arrives != 0), *leaves[1:]], 1)
    kinds = vectorbt.portfolio.enums.SizeType
    size_type = np.tile(
        [kinds.TargetAmount, kinds.Amount, kinds.TargetAmount, kinds.TargetAmount], (len(table), 1)
    )
    units = np.stack(
        [
            np.where(flat[0], table["before"].abs(), 0.0),
            table["quantity"].abs(),
            *(np.where(f, table["held"].abs(), 0.0) for f in flat[1:]),
        ],
        1,
    )
    value = units * price
    volatility, volume = (
        np.stack([*3 * [known[name]], at_close[name]], 1) for name in ("volatility", "volume")
    )
    in_kind = np.zeros_like(value)
    in_kind[:, 1] = table["kept"]
    commission = np.where(in_kind > 0, in_kind * price, COMMISSION[asset_class] * value)
    costs = commission + AROUND * value + value * volatility * np.sqrt(value / volume)

    def rows(array):
        return pd.Series(array.ravel())

    return vectorbt.Portfolio.from_orders(
        rows(price),
        size=rows(size),
        size_type=rows(size_type),
        price=rows(price),
        fees=0.0,
        fixed_fees=rows(np.nan_to_num(costs)),
        direction="both",
        init_cash=INITIAL,
        allow_partial=False,
        raise_reject=True,
        freq="5min",
    )


def counted(table, rule) -> dict:
    "What occurred."
    quantity, before = table["quantity"], table["before"].where(table["gap_quantity"] == 0, 0.0)
    ordered = quantity != 0
    return {
        "orders": int(ordered.sum()),
        "scale-ins": int((ordered & (before * quantity > 0)).sum()),
        "reductions": int((ordered & (before * quantity < 0) & (table["held"] != 0)).sum()),
        "CLOSE": int((ordered & (table["action"] == "CLOSE")).sum()),
        "short entries": int((ordered & (before == 0) & (quantity < 0)).sum()),
        "settlements": int(table["settled"].sum()),
        **{
            {"stopped": "stops", "targeted": "targets"}.get(name, name): int(rule[name].sum())
            for name in rule.columns[1:]
        },
    }


CASES = [("SIM-USD", False), ("SIMA", False), ("BTC-USDT", True), ("SPY", True)]
CASES_OF_BOTH_LENGTHS = [
    *(pytest.param((symbol, real, "short"), id=symbol) for symbol, real in CASES),
    *(
        pytest.param((symbol, real, "whole"), id=f"{symbol}-whole", marks=pytest.mark.proof)
        for symbol, real in CASES
        if real
    ),
]


@pytest.fixture
def case(request):
    "A market by name; the real ones are skipped where there is no folder of them."
    symbol, real, length = request.param
    return market_of(symbol, str(request.getfixturevalue("real_bars_folder")) if real else "", length)


@pytest.mark.parametrize("case", CASES_OF_BOTH_LENGTHS, indirect=True)
def test_an_engine_that_replays_our_orders_has_our_equity_to_the_cent(case):
    """Seeded random actions with everything in them.

    Cash, position, equity, fees and each trade's profit are the engine's own.
    """
    result = backtest(case, eventful_actions(case))
    table = table_of(result, case.bars)
    rule = exits_by_the_rule(table, ACCOUNT["stop_pct"], ACCOUNT["target_pct"])
    engine = replay_in_vectorbt(table, impact_rates(case.bars, case.asset_class), case.asset_class)
    equity, cash, units = (
        getattr(engine, name)().to_numpy()[ROWS - 1 :: ROWS] for name in ("value", "cash", "assets")
    )
    trades, positions, costs = result.trades, engine.positions.records, sum(result.costs.values())
    counts, exits = counted(table, rule), int((table["gap_quantity"] != 0).sum() + table["inside"].sum())
    apart = {
        "equity": np.abs(equity - table["equity"]).max(),
        "cash": np.abs(cash - (table["equity"] - table["value"])).max(),
        "units": np.abs(units - table["value"] / table["close"]).max(),
        "profit of a trade": np.abs(positions["pnl"].to_numpy() - trades["profit"].to_numpy()).max(),
        "costs": abs(engine.orders.records["fees"].sum() - costs),
    }
    print(
        f"\n{case.symbol} 15Min, {len(table)} bars "
        f"from {table.index[0]:%Y-%m-%d} to {table.index[-1]:%Y-%m-%d}; "
        + ", ".join(f"{name} {number}" for name, number in counts.items())
        + "\n  largest difference at any close: "
        + ", ".join(f"{name} {value:.0e}" for name, value in apart.items())
        + f"\n  trades: ours {len(trades)}, engine {len(positions)}; costs {costs:.2f}; "
        + f"final equity: ours {result.equity.iloc[-1]:.6f}, engine {equity[-1]:.6f}"
    )
    assert max(value for name, value in apart.items() if name != "units") < CENT and apart["units"] < 1e-9
    assert (
        len(trades) == len(positions)
        and len(engine.orders.records) == counts["orders"] + exits + counts["settlements"]
    )
    assert (positions["status"] == 1).sum() == (trades["exit"] != "still open").sum() == result.metrics[
        "trades"
    ] and (positions["direction"] == 1).tolist() == (trades["side"] == "short").tolist()

    # protective exits where the rule wants them, no other ones, on the engine's average entry
    assert (table["exit_price"] - rule["price"]).abs().max() < 1e-9 * table[
        "close"
    ].max() and exits == counts["stops"] + counts["targets"] + counts["gap through the stop"] + counts[
        "gap through the target"
    ]
    books = engine.exit_trades.records
    for row, average in ((0, "average_before"), (2, "average")):
        left = books[(books["exit_idx"] % ROWS == row) & (books["status"] == 1)]
        assert np.allclose(
            left["entry_price"], table[average].to_numpy()[left["exit_idx"] // ROWS], rtol=1e-9, atol=0
        )

    needed = [
        "orders",
        "scale-ins",
        "reductions",
        "CLOSE",
        "stops",
        "targets",
        *{
            "equity": ["short entries", "gap through the stop", "gap through the target"],
            "crypto": ["settlements"],
        }[case.asset_class],
    ]
    assert all(counts[name] > 0 for name in needed) and (counts["short entries"] > 0) == (
        case.asset_class == "equity"
    )


# the engine decides


# both within reach of one bar now and then; no impact: an engine that finds exits by itself cannot be told
# what each will cost in cash
TIGHT = dict(stop_pct=0.00231, target_pct=0.00317, impact_coefficient=0.0)


def plain_actions(market, seed=1) -> np.ndarray:
    """Open when flat, sometimes CLOSE when not, nothing else.

    No scale-ins, so that the entry price is that of one fill. Nothing is held where the data break off.
    """
    table = market_data(market.bars, VERSION, market.fit, "15Min", market.asset_class).span(*market.span)
    at, random = decision_bars(table), np.random.default_rng(seed)
    opens = np.where(
        random.random(len(at)) < 0.25,
        random.integers(1, 7 if market.asset_class == "equity" else 4, len(at)),
        HOLD,
    )
    closes = np.where(random.random(len(at)) < 0.08, CLOSE, HOLD)
    for last in np.flatnonzero(np.diff(at) > 1):
        opens[last - 1 : last + 1], closes[last - 1 : last + 1] = HOLD, CLOSE

    def decide(k, account):
        return torch.as_tensor(np.where(account.quantity.numpy() == 0, opens[k], closes[k]))

    return np.array(
        [
            int(step.action[0])
            for step in replay(
                [Run(table, account_rules(AccountConfig(**ACCOUNT | TIGHT), market.asset_class))], decide
            )
        ]
    )


def signals(table, asset_class: str, rows: int):
    """Entries and CLOSE as signals, stop and target as distances.

    With two rows a bar, the first holds nothing but the open.
    """
    opens, enums = table["open"].to_numpy(), vectorbt.portfolio.enums
    arrives = table["quantity"] - table["kept"]
    paid = (
        (table["kept"] + AROUND * table["quantity"]).div(arrives).where(table["kept"] > 0, FEES[asset_class])
    )  # of what arrives: the engine knows no fee in kind

    def first(values, rest):
        return pd.Series(np.stack([values, np.full(len(table), rest)][:rows], 1).ravel())

    def within(name):
        return pd.Series(np.stack([opens, table[name]][2 - rows :], 1).ravel())

    # a session's last bar cannot order: its fill would be tomorrow's open
    day = table.index.tz_convert("America/New_York").date
    fillable = np.append(False, day[1:] == day[:-1]) if asset_class == "equity" else True
    entry, leave = (
        (table["quantity"] != 0) & (table["action"] != "CLOSE"),
        first((table["action"] == "CLOSE") & fillable, False),
    )
    return vectorbt.Portfolio.from_signals(
        within("close"),
        open=first(opens, np.nan) if rows == 1 else pd.Series(np.repeat(opens, 2)),
        high=within("high"),
        low=within("low"),
        price=first(opens, np.nan),
        entries=first(entry & (table["quantity"] > 0), False),
        short_entries=first(entry & (table["quantity"] < 0), False),
        exits=leave,
        short_exits=leave,
        size=first(arrives.abs(), np.nan),
        sl_stop=TIGHT["stop_pct"],
        tp_stop=TIGHT["target_pct"],
        stop_entry_price=enums.StopEntryPrice.FillPrice,
        stop_exit_price=enums.StopExitPrice.StopLimit,
        accumulate=False,
        upon_opposite_entry=enums.OppositeEntryMode.Ignore,
        fees=first(paid, FEES[asset_class]),
        init_cash=INITIAL,
        allow_partial=False,
        raise_reject=True,
        freq="5min",
    )


def trades_of(engine, table, rows: int) -> pd.DataFrame:
    "The engine's positions by bar of the table."
    books = engine.positions.records
    return pd.DataFrame(
        {
            "exit_bar": (books["exit_idx"] // rows).to_numpy(),
            "exit_price": books["exit_price"].to_numpy(),
            "profit": books["pnl"].to_numpy(),
            "open": (books["status"] == 0).to_numpy(),
        },
        (books["entry_idx"] // rows).to_numpy(),
    )


@pytest.mark.parametrize("case", CASES_OF_BOTH_LENGTHS, indirect=True)
def test_an_engine_that_finds_stops_and_targets_itself_finds_ours(case):
    """It knows when we enter, how much, and when we say CLOSE.

    In which bars stop and target take the position out, and at what price, it works out from the bars.
    """
    result = backtest(case, plain_actions(case), **TIGHT)
    table = table_of(result, case.bars)
    rule = exits_by_the_rule(table, TIGHT["stop_pct"], TIGHT["target_pct"])
    counts, needed = (
        counted(table, rule),
        [
            "CLOSE",
            "stops",
            "targets",
            "both",
            *["short entries", "gap through the stop", "gap through the target"]
            * (case.asset_class == "equity"),
        ],
    )
    assert counts["scale-ins"] == counts["reductions"] == counts["settlements"] == 0 and all(
        counts[name] > 0 for name in needed
    ), counts
    bar = pd.Series(range(len(table)), table.index)
    ours = result.trades[result.trades["exit"] != "still open"]
    ours = pd.DataFrame(
        {
            "exit_bar": bar[ours["exit_time"]].to_numpy(),
            "exit_price": ours["exit_price"].to_numpy(),
            "profit": ours["profit"].to_numpy(),
            "exit": ours["exit"].to_numpy(),
        },
        bar[ours["entry_time"]].to_numpy(),
    )

    # in the order of our rules, first the open and then the bar: the same trades, the same money
    engine = signals(table, case.asset_class, 2)
    theirs, equity = trades_of(engine, table, 2), engine.value().to_numpy()[1::2]
    closed = theirs[~theirs["open"]]
    apart = {
        "equity": np.abs(equity - table["equity"]).max(),
        "exit price": np.abs(closed["exit_price"] - ours["exit_price"]).max(),
        "profit of a trade": np.abs(closed["profit"] - ours["profit"]).max(),
    }
    print(
        f"\n{case.symbol} 15Min, {len(table)} bars "
        f"from {table.index[0]:%Y-%m-%d} to {table.index[-1]:%Y-%m-%d}; "
        + ", ".join(f"{name} {number}" for name, number in counts.items() if number)
        + f"\n  trades: ours {len(ours)}, engine {len(closed)}; largest difference: "
        + ", ".join(f"{name} {value:.0e}" for name, value in apart.items())
        + f"; final equity: ours {result.equity.iloc[-1]:.6f}, engine {equity[-1]:.6f}"
    )
    assert (
        closed.index.equals(ours.index)
        and (closed["exit_bar"] == ours["exit_bar"]).all()
        and len(theirs) - len(closed) == result.metrics["open_trades"]
    )
    assert max(apart.values()) < CENT and apart["exit price"] < 1e-9 * table["close"].max()

    # as its users write it, one row a bar, it does not look into the bar of an entry, and lets stop and
    # target go before an order at the open: each trade that differs is of one of these kinds, and ours is by
    # the rule
    theirs = trades_of(signals(table, case.asset_class, 1), table, 1)
    assert theirs.index.isin(
        [*ours.index, *bar[result.trades.loc[result.trades["exit"] == "still open", "entry_time"]]]
    ).all()
    kinds = {
        "same": 0,
        "left in the bar of its entry": 0,
        "CLOSE at the open, level reached later in that bar": 0,
        "engine still in the trade before": 0,
    }
    busy_until = -1
    for entry, trade in ours.iterrows():
        if entry not in theirs.index:
            assert entry <= busy_until, "an entry is missing, and nothing was in its way"
            kind = "engine still in the trade before"
        else:
            other, left = theirs.loc[entry], trade["exit_bar"]
            busy_until = other["exit_bar"] if not other["open"] else len(table)
            if (
                other["exit_bar"] == left
                and abs(other["exit_price"] - trade["exit_price"]) < 1e-9 * trade["exit_price"]
            ):
                kind = "same"
            elif left == entry:
                kind = "left in the bar of its entry"
                assert (
                    trade["exit"] in ("stop", "target")
                    and trade["exit_price"] == pytest.approx(rule["price"].iloc[left], rel=1e-12)
                    and (other["open"] or other["exit_bar"] > left)
                )
            else:
                kind = "CLOSE at the open, level reached later in that bar"
                assert (
                    trade["exit"] == "order"
                    and trade["exit_price"] == table["open"].iloc[left]
                    and other["exit_bar"] == left
                    and table["low"].iloc[left] <= other["exit_price"] <= table["high"].iloc[left]
                )
        kinds[kind] += 1
    print("  one row a bar: " + ", ".join(f"{name} {number}" for name, number in kinds.items()))
    assert all(number > 0 for number in kinds.values()), (
        "a market in which the conventions cannot be told apart shows nothing"
    )
