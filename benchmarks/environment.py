"""The environment: steps per second on one core, beside two single environments from elsewhere, and
whether compiled code agrees with plain code.

    python benchmarks/environment.py            # about four minutes, most of them compiling

Random actions, every feature on: all rewards of v2.4.5, costs with impact, stops and targets, shorts of
equity, and episodes that restart at all times. Ratios between rows come from one run on one machine;
absolute rates depend on it.
"""

import os
import platform
import time
import warnings
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch

torch.set_num_threads(1)

from trading_lib.config import InputError
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data
from trading_lib.features import fit_features
from trading_lib.sources import simulate_bars
from trading_lib.version import MODEL_SPECS

ACCOUNTS = (1_024, 4_096, 8_192, 16_384, 32_768)
WINDOWED = 1_024  # accounts whose windows are made
WINDOW, EPISODE, BEST_OF, SECONDS = 100, 256, 20, 2.0
COMPARED = (512, 2_100)  # accounts and steps compared, plain with compiled
KINDS = {False: "plain", True: "compiled"}


def processor() -> str:
    "The processor's name, where the system tells it."
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def rate(step, per_call: int, repeats: int) -> float:
    "Steps per second of this core's time, in the least disturbed of some runs of `repeats` calls each."
    shortest, end, runs = float("inf"), time.perf_counter() + SECONDS, 0
    while time.perf_counter() < end or runs < BEST_OF:
        begin = time.thread_time()  # what others do on this machine in the meantime does not count
        for i in range(repeats):
            step(i)
        shortest, runs = min(shortest, time.thread_time() - begin), runs + 1
    return per_call * repeats / shortest


def environment(market, n_envs: int, compiled: bool, **options) -> GPUVectorizedTradingEnv:
    """Accounts in the middle of their episodes, so that restarts are spread over all steps as they are in a
    long run."""
    env = GPUVectorizedTradingEnv(
        market,
        GPUEnvConfig(
            n_envs=n_envs, window=WINDOW, asset_class=market.asset_class, episode_length=EPISODE, **options
        ),
        compiled=compiled,
    )
    env.reset_index(0)
    env.end = torch.minimum(
        env.end,
        env.bar + torch.randint(1, EPISODE + 1, (n_envs,), generator=torch.Generator().manual_seed(0)),
    )
    return env


def actions_of(env, steps: int) -> torch.Tensor:
    return torch.randint(env.n_actions, (steps, env.n_envs), generator=torch.Generator().manual_seed(1))


def our_rate(market, n_envs: int, compiled: bool, windows: bool) -> float:
    env = environment(market, n_envs, compiled, observations="windows" if windows else "indices")
    actions, step = actions_of(env, 64), env.step if windows else env.step_index
    for action in actions[:8]:
        step(action)
    return rate(lambda i: step(actions[i % 64]), n_envs, 1 if windows else 8)


def anytrading_rate(close: np.ndarray) -> float:
    with warnings.catch_warnings():
        from gym_anytrading.envs import StocksEnv
    env = StocksEnv(pd.DataFrame({"Close": close}), WINDOW, (WINDOW, len(close)))
    return single_rate(env, 2)


def trading_env_rate(close: np.ndarray) -> float:
    with warnings.catch_warnings():
        from gym_trading_env.environments import TradingEnv  # makes every warning an error
    frame = pd.DataFrame(
        {
            "open": close,
            "high": close,
            "low": close,
            "close": close,
            "feature_return": np.diff(close, prepend=close[0]),
        },
        pd.date_range("2022", periods=len(close), freq="15min"),
    )
    return single_rate(
        TradingEnv(
            frame,
            positions=[-1, 0, 1],
            windows=WINDOW,
            trading_fees=0.0027,
            max_episode_duration=EPISODE,
            verbose=0,
        ),
        3,
    )


def single_rate(env, n_actions: int) -> float:
    "Of one environment, restarts included."
    actions = np.random.default_rng(0).integers(0, n_actions, 1000).tolist()
    env.reset(seed=0)

    def step(i):
        _, _, terminated, truncated, _ = env.step(actions[i])
        if terminated or truncated:
            env.reset()

    return rate(step, 1, 1000)


def largest_difference(market) -> tuple[float, int]:
    """Largest difference, relative where they exceed 1, of any variable of any account, and of any reward,
    in a long run of plain and compiled steps, and how many restarts it had."""
    plain, compiled = (environment(market, COMPARED[0], c, observations="indices") for c in (False, True))
    largest, restarts = 0.0, 0
    for action in actions_of(plain, COMPARED[1]):
        (_, reward, terminated, truncated, infos), (_, other_reward, *_, other) = (
            plain.step_index(action),
            compiled.step_index(action),
        )
        assert torch.equal(plain.bar, compiled.bar)
        restarts += int((terminated | truncated).sum())
        here, there = (
            torch.stack([*vars(i["account"]).values(), *i["fills"], *i["reward_components"].T, r.double()])
            for i, r in ((infos, reward), (other, other_reward))
        )
        largest = max(largest, float(((here - there).abs() / here.abs().clamp(min=1)).max()))
    return largest, restarts


def main():
    markets = {}
    for asset_class, symbol, last in (("crypto", "SIM-USD", "2023-01-01"), ("equity", "SIMA", "2025-01-01")):
        bars = simulate_bars(symbol, "15Min", "2022-01-01", last, seed=0, asset_class=asset_class)
        markets[asset_class] = market_data(
            bars, "5.6.0", fit_features(bars, "5.6.0", "15Min", asset_class), "15Min", asset_class, WINDOW
        )
    close = markets["crypto"].prices[3]
    print(
        f"{processor()}, {os.cpu_count()} cores of which one is used, load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, torch {torch.__version__} "
        f"({torch.backends.cpu.get_cpu_capability()})"
    )
    rows = []

    def row(name: str, measure):
        try:
            rows.append((name, measure()))
        except (ImportError, InputError) as e:
            print(f"{name:58} is left out: {str(e).splitlines()[0]}")

    row("gym-anytrading StocksEnv, single, window 100", lambda: anytrading_rate(close))
    row("gym-trading-env TradingEnv, single, window 100", lambda: trading_env_rate(close))
    for asset_class, market in markets.items():
        for compiled in (False, True):
            for n in ACCOUNTS:
                row(
                    f"{asset_class}, {KINDS[compiled]}, {n:,} accounts, indices",
                    partial(our_rate, market, n, compiled, False),
                )
    width = WINDOW * MODEL_SPECS["5.6.0"].n_features
    for compiled in (False, True):
        row(
            f"crypto, {KINDS[compiled]}, {WINDOWED:,} accounts, windows of {width:,}",
            partial(our_rate, markets["crypto"], WINDOWED, compiled, True),
        )
    reference = dict(rows).get("gym-anytrading StocksEnv, single, window 100")
    print(f"{'':58} {'steps/s':>12}" + (f" {'x gym-anytrading':>17}" if reference else ""))
    for name, value in rows:
        print(f"{name:58} {value:>12,.0f}" + (f" {value / reference:>17,.1f}" if reference else ""))
    for asset_class, market in markets.items():
        try:
            largest, restarts = largest_difference(market)
        except InputError as e:
            print(f"{asset_class}: plain and compiled steps are not compared: {e}")
        else:
            print(
                f"{asset_class}: plain and compiled steps differ by {largest:.1e} at most (relative above 1) "
                f"in {COMPARED[0] * COMPARED[1]:,} steps with {restarts:,} restarts"
            )


if __name__ == "__main__":
    main()
