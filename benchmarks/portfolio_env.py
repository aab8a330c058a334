"""The portfolio environment: steps per second on one core, beside a single environment in plain numpy and
pandas.

    python benchmarks/portfolio_env.py              # steps by plain torch, about ten seconds
    python benchmarks/portfolio_env.py --compiled   # torch.compile too: some minutes more

Random regimes, the broker's frictions, and episodes that restart at all times. The single environment is
our own minimal loop in the style of FinRL's portfolio environment (the day's rows of a pandas frame, weights
by softmax, no costs); it is not FinRL itself. Ratios between rows come from one run on one machine; absolute
rates depend on it.
"""

import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch

from trading_lib.data.simulated_panel import simulate_panel
from trading_lib.portfolio.market import PortfolioMarket, portfolio_market
from trading_lib.portfolio.panel import carried_forward
from trading_lib.portfolio_env import GPUPortfolioEnv, PortfolioConfig

ACCOUNTS = {3: 4_096, 12: 4_096, 300: 512}  # assets -> accounts
EPISODE, BEST_OF, SECONDS, WARM_UP = 64, 5, 0.7, 70


def rate(step: Callable[[int], object], per_call: int, repeats: int) -> float:
    "Steps per second of this core's time, in the least disturbed of some runs of `repeats` calls each."
    shortest, end, runs = float("inf"), time.perf_counter() + SECONDS, 0
    while time.perf_counter() < end or runs < BEST_OF:
        begin = time.thread_time()
        for i in range(repeats):
            step(i)
        shortest, runs = min(shortest, time.thread_time() - begin), runs + 1
    return per_call * repeats / shortest


def our_rate(market: PortfolioMarket, n_envs: int, compiled: bool) -> float:
    "Of accounts whose restarts are spread over all steps."
    config = PortfolioConfig(n_envs=n_envs, episode_length=EPISODE, observations="indices")
    env = GPUPortfolioEnv(market, config, compiled=compiled)
    random = torch.Generator().manual_seed(0)
    env.reset(seed=0)
    env.end = torch.minimum(env.end, env.bar + torch.randint(1, EPISODE + 1, (n_envs,), generator=random))
    actions = torch.randint(env.n_actions, (64, n_envs), generator=random)
    for i in range(WARM_UP):
        env.step(actions[i % 64])
    return rate(lambda i: env.step(actions[i % 64]), n_envs, 4)


def single_rate(market: PortfolioMarket) -> float:
    "Of the plain loop."
    close = carried_forward(market.panel.close)[market.decision_days]
    days, assets = close.shape
    frame = pd.DataFrame({"day": np.repeat(np.arange(days), assets), "close": close.ravel()}).set_index("day")
    actions = np.random.default_rng(0).standard_normal((64, assets))
    memory: list[float] = []
    state = {"day": 0, "value": 1e6}

    def step(i: int):
        now, after = (frame.loc[state["day"] + k, "close"].to_numpy() for k in (0, 1))
        weights = np.exp(actions[i % 64])
        weights /= weights.sum()
        memory.append(float((weights * (after / now - 1)).sum()))
        state["value"] *= 1 + memory[-1]
        state["day"] += 1
        if state["day"] == days - 1:
            memory.clear()
            state.update(day=0, value=1e6)

    return rate(step, 1, 500)


def main():
    torch.set_num_threads(1)
    print(f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, one core")
    kinds = {"plain torch": False}
    if "--compiled" in sys.argv[1:]:
        kinds["torch.compile"] = True
    print(f"{'':46} {'steps/s':>12} {'x single':>9}")
    for assets, n_envs in ACCOUNTS.items():
        market = portfolio_market(simulate_panel(assets, years=2, seed=1))
        single = single_rate(market)
        print(f"{f'{assets} assets, single, numpy and pandas':46} {single:>12,.0f} {1:>9.1f}")
        for kind, compiled in kinds.items():
            value = our_rate(market, n_envs, compiled)
            name = f"{assets} assets, {kind}, {n_envs:,} accounts"
            print(f"{name:46} {value:>12,.0f} {value / single:>9.1f}", flush=True)


if __name__ == "__main__":
    main()
