"""A slow account in plain Python floats, written from the description of the rules alone, to hold the
vectorised account against; and small markets made by hand.

Where the rules leave a choice, this follows what nbs/03_env/00_account says:
- an order's value is a share of the equity at the decision's close; the room below the cap is measured
  there too, with the position at that close;
- an order to buy a long, or to sell some of it, is an amount of money: value / open units at the next
  open, whatever that open is, rounded down to the size grid;
- a short is stated in whole shares, counted at the decision's close and rounded down, when it is opened,
  added to or reduced; CLOSE flattens all of it;
- an order that opens or adds is placed if it is worth the broker's minimum at the open, and if the money
  is there, with the costs of an order that were all of the market: cash for a long; for a short, cash
  less twice what is short already (what it brought, and as much again);
- an opposite order is at least the smallest that the broker takes (the minimum on the grid, one share of
  a short), and at most the position; neither minimum nor funds keep anybody from leaving;
- only orders in the position's direction, or from flat, meet the cap;
- within a bar a stop or target that the open has passed comes first and fills at the open; then the
  order, sized at the decision, of which an opposite one finds nothing left; then stop or target inside
  the bar at their levels, on the position and the average entry after that order; of these a touched stop
  comes before a touched target;
- a reduction leaves the average entry as it is, an addition averages by units;
- costs never move the price: they are taken from cash, by component; each fill of one bar has the impact
  of its own value. Where the fee is taken in kind, a purchase pays its commission in units instead,
  rounded to the grid; at the price of the fill they are the commission. After an order a position is a
  number on the grid, not a sum that is nearly one;
- the share of the day's volume that the impact is taken on is at most 1, and a market without volume
  counts as 1 currency unit a day;
- a trade runs from flat to flat; it is won if its cash flow, costs included, is above zero.

Only + - * / and a square root are used, and what happens in one bar is booked at once (spendings of all
fills, then the bar's costs, then cash), so the vectorised account must agree to the last bit. One
exception: torch's square root of doubles may be a last bit off the nearest one on a CPU, and only the
impact needs it. `root` says whose is taken: with `torch_root` everything agrees to the last bit, with
`math.sqrt` to 1e-9 of a currency unit.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from trading_lib.config import AccountConfig
from trading_lib.env import MarketData
from trading_lib.market.layouts import LAYOUTS

# accounts that trade free of costs, and at a broker's
FREE = AccountConfig(commission_bps=0.0, half_spread_bps=0.0, slippage_bps=0.0, impact_coefficient=0.0)
BROKER = {
    "crypto": replace(
        FREE, commission_bps=25.0, half_spread_bps=1.0, slippage_bps=1.0, impact_coefficient=1.0
    ),
    "equity": replace(FREE, half_spread_bps=1.0, slippage_bps=1.0, impact_coefficient=1.0),
}

# asset class -> smallest order, whether the fee for buying is taken in kind; from the broker's documents
BROKER_TAKES = {"crypto": (10.0, True), "equity": (1.0, False)}

# number of actions -> (direction, size, close), from the table of the versions
SIZED = [(side, size, False) for side in (1, -1) for size in (0.25, 0.50, 0.75)]
ACTIONS = {
    3: [(0, 0.0, False), (1, 0.5, False), (-1, 0.5, False)],
    7: [(0, 0.0, False), *SIZED],
    8: [(0, 0.0, False), *SIZED, (0, 1.0, True)],
}
STATE = (
    "cash",
    "quantity",
    "average_entry",
    "equity",
    "peak_equity",
    "trades",
    "wins",
    "trade_cash",
    "bars_held",
    "traded_value",
    "commission",
    "spread",
    "slippage",
    "impact",
)


def torch_root(x):
    return float(torch.sqrt(torch.tensor(x, dtype=torch.float64)))


class ScalarAccount:
    "One account, one bar at a time."

    def __init__(
        self,
        initial=1000.0,
        buffer=0.30,
        base=0.15,
        cap=0.20,
        stop=0.02,
        target=0.04,
        allow_short=False,
        commission=0.0,
        half_spread=0.0,
        slippage=0.0,
        impact=0.0,
        root=math.sqrt,
        minimum=1.0,
        decimals=9,
        in_kind=False,
    ):
        self.full_order, self.cap, self.stop, self.target, self.allow_short = (
            (1 - buffer) * base,
            cap,
            stop,
            target,
            allow_short,
        )
        self.rates, self.impact_coefficient, self.root = (commission, half_spread, slippage), impact, root
        self.minimum, self.grid, self.in_kind = minimum, 10**decimals, in_kind
        self.cash = self.equity = self.peak_equity = self.initial = initial
        self.quantity = self.average_entry = self.trade_cash = self.traded_value = 0.0
        self.commission = self.spread = self.slippage = self.impact = 0.0
        self.trades = self.wins = self.bars_held = 0
        self.gross = 0.0  # P&L of the price moves alone, counted move by move and never from cash

    @classmethod
    def of(cls, config, asset_class, root=math.sqrt):
        "From a configuration whose costs are given number by number."
        c, minimum, in_kind = config, *BROKER_TAKES[asset_class]
        return cls(
            c.initial_account_value,
            c.safety_buffer_pct,
            c.base_alloc,
            c.max_position_pct,
            c.stop_pct,
            c.target_pct,
            asset_class == "equity" and c.allow_short is not False,
            c.commission_bps * 1e-4,
            c.half_spread_bps * 1e-4,
            c.slippage_bps * 1e-4,
            c.impact_coefficient,
            root,
            c.minimum_order or minimum,
            9 if c.size_decimals is None else c.size_decimals,
            in_kind,
        )

    @property
    def state(self):
        return tuple(float(getattr(self, name)) for name in STATE)

    @property
    def costs(self):
        return self.commission + self.spread + self.slippage + self.impact

    def _order(self, held, kept, cash, close, open_, direction, size, is_close, daily_volatility):
        "Signed units to fill at the open: sized with `held`, of which `kept` is left when the order arrives."
        if is_close:
            return -kept
        if direction == 0:
            return 0.0
        opposite, short = held * direction < 0, held < 0 or (held == 0 and direction < 0)
        if short and not opposite and not self.allow_short:
            return 0.0
        value = self.equity * self.full_order * size
        if not opposite:
            value = min(value, self.equity * self.cap - abs(held) * close)
        grid = 1 if short else self.grid
        units = math.floor(max(value, 0.0) / (close if short else open_) * grid) / grid
        least = math.ceil(self.minimum / open_ * grid) / grid
        if opposite:
            return direction * min(max(units, least), abs(kept))
        needed = units * open_ * (1.0 + sum(self.rates) + self.impact_coefficient * daily_volatility)
        return (
            direction * units if units >= least and cash + min(kept, 0.0) * (2.0 * open_) >= needed else 0.0
        )

    def _impact(self, value, daily_volatility, daily_dollar_volume):
        volume = max(daily_dollar_volume, 1.0)
        return value * (
            self.impact_coefficient * daily_volatility / self.root(volume) * self.root(min(value, volume))
        )

    def _inside(self, high, low):
        "Where stop or target takes the position out inside this bar, or None."
        if self.quantity == 0:
            return None
        side = 1 if self.quantity > 0 else -1
        stop, target = self._level(side, -self.stop), self._level(side, self.target)
        worst, best = (low, high) if side > 0 else (high, low)
        if self.stop and side * (worst - stop) <= 0:
            return stop
        if self.target and side * (best - target) >= 0:
            return target
        return None

    def _level(self, side, distance):
        return self.average_entry + side * (self.average_entry * distance)

    def _passed(self, open_):
        "Whether the open has passed stop or target."
        if self.quantity == 0:
            return False
        side = 1 if self.quantity > 0 else -1
        return bool(
            self.stop
            and side * (open_ - self._level(side, -self.stop)) <= 0
            or self.target
            and side * (open_ - self._level(side, self.target)) >= 0
        )

    def step(
        self,
        direction,
        size,
        is_close,
        close,
        open_,
        high,
        low,
        last,
        daily_volatility=0.0,
        daily_dollar_volume=1e12,
        can_fill=True,
    ):
        """Decide at `close`, fill at the next open, protect before and after, mark at the bar's `last`;
        returns what was ordered, and where the last exit was."""
        held, opened = self.quantity, self.trade_cash
        self.gross += held * (open_ - close)

        def impact(value):
            return self._impact(value, daily_volatility, daily_dollar_volume)

        passed = self._passed(open_)
        gap_paid = -held * open_ if passed else 0.0
        gap_value = abs(gap_paid)
        gap_spent = gap_paid + (
            gap_value * (self.rates[0] + self.rates[1] + self.rates[2]) + impact(gap_value)
        )
        if passed:
            self.quantity = self.average_entry = 0.0
            self._end(opened - gap_spent)
        kept = self.quantity

        units = (
            self._order(
                held, kept, self.cash - gap_spent, close, open_, direction, size, is_close, daily_volatility
            )
            if can_fill
            else 0.0
        )
        fee = round(units * (self.rates[0] * self.grid)) / self.grid if self.in_kind and units > 0 else 0.0
        received = units - fee
        after = round((kept + received) * self.grid) / self.grid if units else kept
        if units:
            if after == 0:
                self.average_entry = 0.0
            elif kept * units >= 0:
                self.average_entry = (abs(kept) * self.average_entry + abs(received) * open_) / abs(after)
        self.quantity = after

        inside = self._inside(high, low)
        self.gross += after * ((last if inside is None else inside) - open_)
        exit_paid = 0.0 if inside is None else -after * inside
        if inside is not None:
            self.quantity = self.average_entry = 0.0

        paid = units * open_
        value, exit_value = abs(paid), abs(exit_paid)
        traded = gap_value + value + exit_value
        in_kind = fee * open_
        commission, spread, slippage = (
            (traded - (paid if self.in_kind and units > 0 else 0.0)) * self.rates[0],
            traded * self.rates[1],
            traded * self.rates[2],
        )
        impacts = impact(gap_value) + impact(value) + impact(exit_value)
        spent = gap_paid + paid + exit_paid + (commission + spread + slippage + impacts)
        for name, paid_now in zip(
            ("commission", "spread", "slippage", "impact"), (commission + in_kind, spread, slippage, impacts)
        ):
            setattr(self, name, getattr(self, name) + paid_now)
        self.cash -= spent
        self.traded_value += traded
        self.trade_cash -= spent - gap_spent
        if self.quantity == 0 and (kept or units):
            self._end(self.trade_cash)
        if passed:
            self.bars_held = 0
        self.bars_held = self.bars_held + 1 if self.quantity else 0
        self.equity = self.cash + self.quantity * last
        self.peak_equity = max(self.peak_equity, self.equity)
        return units, inside if inside is not None else open_ if passed else None

    def _end(self, profit):
        "A trade is over."
        self.trades, self.wins, self.trade_cash = self.trades + 1, self.wins + (profit > 0), 0.0

    def settle(self, close, daily_volatility, daily_dollar_volume):
        "Flatten at the close of a stretch's last bar, with costs."
        if self.quantity:
            levels, self.stop, self.target = (self.stop, self.target), 0.0, 0.0  # a sale, and nothing else
            self.step(0, 1.0, True, close, close, close, close, close, daily_volatility, daily_dollar_volume)
            self.stop, self.target = levels


def scalar_step(account, market, bar, action, n_actions):
    "One step of an account at a bar of a market: decided at `bar`, filled in the next one."
    opening, high, low, close, _ = market.prices
    return account.step(
        *ACTIONS[n_actions][action],
        *(
            float(v)
            for v in (
                close[bar],
                opening[bar + 1],
                high[bar + 1],
                low[bar + 1],
                close[bar + 1],
                market.daily_volatility[bar],
                market.daily_dollar_volume[bar],
            )
        ),
        bool(market.can_fill[bar]),
    )


def hand_made_market(
    close,
    open_=None,
    high=None,
    low=None,
    version="5.6.0",
    asset_class="crypto",
    window=4,
    volatility=0.01,
    daily_volatility=0.02,
    daily_dollar_volume=1e9,
    segment=None,
    can_fill=None,
):
    "A market from prices alone: its features are noise, the first `window` bars of each segment are warm-up."
    close = np.asarray(close, np.float64)
    n = len(close)
    opening = np.concatenate([close[:1], close[:-1]]) if open_ is None else np.asarray(open_, np.float64)
    high = np.maximum(opening, close) if high is None else np.asarray(high, np.float64)
    low = np.minimum(opening, close) if low is None else np.asarray(low, np.float64)
    segment = np.zeros(n, np.int64) if segment is None else np.asarray(segment, np.int64)
    follows = np.append(segment[1:] == segment[:-1], False)
    row = np.arange(n) - np.searchsorted(segment, segment)

    def full(x):
        return np.broadcast_to(np.asarray(x, np.float64), n).copy()

    features = (
        np.random.default_rng(0).standard_normal((n, len(LAYOUTS[version].market_columns))).astype(np.float32)
    )
    return MarketData(
        "HAND",
        "15Min",
        asset_class,
        version,
        window,
        1_700_000_100_000_000_000 + np.arange(n) * 900_000_000_000,
        features,
        np.stack([opening, high, low, close, full(1e6)]),
        full(volatility),
        full(daily_volatility),
        full(daily_dollar_volume),
        segment,
        row >= window,
        follows if can_fill is None else follows & np.asarray(can_fill),
        {},
        {},
    )
