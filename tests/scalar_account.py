"""A slow account in plain Python floats, written from the description of the rules alone, to hold the vectorised account against; and small markets made by hand.

Where the rules leave a choice, this follows what nbs/08_account says:
- an order's value is a share of the equity at the decision's close; the room below the cap is measured there too, with the position at that close;
- an order to buy a long, or to sell some of it, is an amount of money: value / open units at the next open, whatever that open is;
- a short is stated in whole shares, counted at the decision's close and rounded down, when it is opened, added to or reduced; CLOSE flattens all of it;
- an opposite order is at most the position; only orders in the position's direction, or from flat, meet the cap;
- within a bar the order comes first, then stop or target, on the position and the average entry after that order;
- a reduction leaves the average entry as it is, an addition averages by units;
- a touched stop comes before a touched target, also where the bar opens beyond the target; a level that the open has passed fills at the open;
- costs never move the price: they are taken from cash, by component; the order and the exit of one bar are two fills, each with the impact of its own value;
- the share of the day's volume that the impact is taken on is at most 1, and a market without volume counts as 1 currency unit a day;
- a trade runs from flat to flat; it is won if its cash flow, costs included, is above zero.

Only + - * / and a square root are used, and what happens in one bar is booked at once (proceeds of both fills, then the bar's costs, then cash), so the vectorised account must agree to the
last bit. One exception: torch's square root of doubles may be a last bit off the nearest one on a CPU, and only the impact needs it. `root` says whose is taken: with `torch_root` everything
agrees to the last bit, with `math.sqrt` to 1e-9 of a currency unit.
"""
import math
from dataclasses import replace

import numpy as np
import torch

from trading_lib.config import AccountConfig
from trading_lib.env import MarketData
from trading_lib.layouts import LAYOUTS

# accounts that trade free of costs, and at a broker's
FREE = AccountConfig(commission_bps=0.0, half_spread_bps=0.0, slippage_bps=0.0, impact_coefficient=0.0)
BROKER = {"crypto": replace(FREE, commission_bps=25.0, half_spread_bps=1.0, slippage_bps=1.0, impact_coefficient=1.0),
          "equity": replace(FREE, half_spread_bps=1.0, slippage_bps=1.0, impact_coefficient=1.0)}

# number of actions -> (direction, size, close), from the table of the versions
SIZED = [(side, size, False) for side in (1, -1) for size in (0.25, 0.50, 0.75)]
ACTIONS = {3: [(0, 0.0, False), (1, 0.5, False), (-1, 0.5, False)], 7: [(0, 0.0, False), *SIZED], 8: [(0, 0.0, False), *SIZED, (0, 1.0, True)]}
STATE = ("cash", "quantity", "average_entry", "equity", "peak_equity", "trades", "wins", "trade_cash", "bars_held", "traded_value", "commission", "spread", "slippage", "impact")


def torch_root(x): return float(torch.sqrt(torch.tensor(x, dtype=torch.float64)))


class ScalarAccount:
    "One account, one bar at a time."

    def __init__(self, initial=1000.0, buffer=0.30, base=0.15, cap=0.20, stop=0.02, target=0.04, allow_short=False, commission=0.0, half_spread=0.0, slippage=0.0, impact=0.0, root=math.sqrt):
        self.full_order, self.cap, self.stop, self.target, self.allow_short = (1 - buffer) * base, cap, stop, target, allow_short
        self.rates, self.impact_coefficient, self.root = (commission, half_spread, slippage), impact, root
        self.cash = self.equity = self.peak_equity = self.initial = initial
        self.quantity = self.average_entry = self.trade_cash = self.traded_value = 0.0
        self.commission = self.spread = self.slippage = self.impact = 0.0
        self.trades = self.wins = self.bars_held = 0
        self.gross = 0.0  # P&L of the price moves alone, counted move by move and never from cash

    @classmethod
    def of(cls, config, asset_class, root=math.sqrt):
        "From a configuration whose costs are given number by number."
        c = config
        return cls(c.initial_account_value, c.safety_buffer_pct, c.base_alloc, c.max_position_pct, c.stop_pct, c.target_pct, asset_class == "equity" and c.allow_short is not False,
                   c.commission_bps * 1e-4, c.half_spread_bps * 1e-4, c.slippage_bps * 1e-4, c.impact_coefficient, root)

    @property
    def state(self): return tuple(float(getattr(self, name)) for name in STATE)

    @property
    def costs(self): return self.commission + self.spread + self.slippage + self.impact

    def _order(self, close, open_, direction, size, is_close):
        "Signed units to fill at the open."
        if is_close: return -self.quantity
        if direction == 0: return 0.0
        value = self.equity * self.full_order * size
        opposite = self.quantity * direction < 0
        if self.quantity == 0 and direction < 0 and not self.allow_short: return 0.0
        if not opposite: value = min(value, self.equity * self.cap - abs(self.quantity) * close)
        if value <= 0: return 0.0
        short = self.quantity < 0 or (self.quantity == 0 and direction < 0)
        units = float(math.floor(value / close)) if short else value / open_
        return direction * (min(units, abs(self.quantity)) if opposite else units)

    def _book(self, fills, daily_volatility, daily_dollar_volume):
        "Take the costs of a bar's fills, move cash."
        proceeds, paid, traded = 0.0, [0.0] * 4, 0.0
        for units, price in fills:
            value = abs(units) * price
            share = min(value / max(daily_dollar_volume, 1.0), 1.0)
            rates = (*self.rates, self.impact_coefficient * daily_volatility * self.root(share))
            paid = [p + value * rate for p, rate in zip(paid, rates)]
            proceeds, traded = proceeds - units * price, traded + value
        costs = paid[0] + paid[1] + paid[2] + paid[3]
        self.commission, self.spread, self.slippage, self.impact = (a + b for a, b in zip((self.commission, self.spread, self.slippage, self.impact), paid))
        self.cash += proceeds - costs
        self.trade_cash += proceeds - costs
        self.traded_value += traded

    def _exit_price(self, open_, high, low):
        "Where stop or target takes the position out inside this bar, or None."
        if self.quantity == 0: return None
        side = 1 if self.quantity > 0 else -1
        stop, target = self.average_entry * (1 - side * self.stop), self.average_entry * (1 + side * self.target)
        worst, best = (low, high) if side > 0 else (high, low)
        if self.stop and side * (worst - stop) <= 0: return min(open_, stop) if side > 0 else max(open_, stop)
        if self.target and side * (best - target) >= 0: return max(open_, target) if side > 0 else min(open_, target)
        return None

    def step(self, direction, size, is_close, close, open_, high, low, last, daily_volatility=0.0, daily_dollar_volume=1e12, can_fill=True):
        "Decide at `close`, fill at the next open, protect inside that bar, mark at its `last`; returns what filled and what left."
        held = self.quantity
        units = self._order(close, open_, direction, size, is_close) if can_fill else 0.0
        self.gross += held * (open_ - close)
        after, fills = held + units, []
        if units:
            fills.append((units, open_))
            if after == 0: self.average_entry = 0.0
            elif held * units >= 0: self.average_entry = (abs(held) * self.average_entry + abs(units) * open_) / abs(after)
        self.quantity = after
        exit_price = self._exit_price(open_, high, low)
        self.gross += after * ((last if exit_price is None else exit_price) - open_)
        if exit_price is not None:
            fills.append((-after, exit_price))
            self.quantity = self.average_entry = 0.0
        self._book(fills, daily_volatility, daily_dollar_volume)
        if fills and self.quantity == 0:
            self.trades, self.wins = self.trades + 1, self.wins + (self.trade_cash > 0)
            self.trade_cash = 0.0
        self.bars_held = self.bars_held + 1 if self.quantity else 0
        self.equity = self.cash + self.quantity * last
        self.peak_equity = max(self.peak_equity, self.equity)
        return units, exit_price

    def settle(self, close, daily_volatility, daily_dollar_volume):
        "Flatten at the close of a stretch's last bar, with costs."
        if self.quantity: self.step(0, 1.0, True, close, close, close, close, close, daily_volatility, daily_dollar_volume)


def scalar_step(account, market, bar, action, n_actions):
    "One step of an account at a bar of a market: decided at `bar`, filled in the next one."
    opening, high, low, close, _ = market.prices
    return account.step(*ACTIONS[n_actions][action], *(float(v) for v in (close[bar], opening[bar + 1], high[bar + 1], low[bar + 1], close[bar + 1], market.daily_volatility[bar], market.daily_dollar_volume[bar])), bool(market.can_fill[bar]))


def hand_made_market(close, open_=None, high=None, low=None, version="5.6.0", asset_class="crypto", window=4, volatility=0.01, daily_volatility=0.02, daily_dollar_volume=1e9, segment=None, can_fill=None):
    "A market from prices alone: its features are noise, the first `window` bars of each segment are warm-up."
    close = np.asarray(close, np.float64)
    n = len(close)
    opening = np.concatenate([close[:1], close[:-1]]) if open_ is None else np.asarray(open_, np.float64)
    high = np.maximum(opening, close) if high is None else np.asarray(high, np.float64)
    low = np.minimum(opening, close) if low is None else np.asarray(low, np.float64)
    segment = np.zeros(n, np.int64) if segment is None else np.asarray(segment, np.int64)
    follows = np.append(segment[1:] == segment[:-1], False)
    row = np.arange(n) - np.searchsorted(segment, segment)
    full = lambda x: np.broadcast_to(np.asarray(x, np.float64), n).copy()
    features = np.random.default_rng(0).standard_normal((n, len(LAYOUTS[version].market_columns))).astype(np.float32)
    return MarketData("HAND", "15Min", asset_class, version, window, 1_700_000_100_000_000_000 + np.arange(n) * 900_000_000_000, features, np.stack([opening, high, low, close, full(1e6)]),
                      full(volatility), full(daily_volatility), full(daily_dollar_volume), segment, row >= window, follows if can_fill is None else follows & np.asarray(can_fill), {}, {})
