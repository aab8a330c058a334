"""One definition of what the model sees: a printed table of differences between its three readers, on
real bars. Run by `make prove`."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from trading_lib.account import AccountConfig, AccountState
from trading_lib.builder import BacktestObservationBuilder, InferenceObservationBuilder
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data
from trading_lib.evaluation.lookahead import check_lookahead
from trading_lib.features import fit_features
from trading_lib.market.layouts import LAYOUTS
from trading_lib.sources import load_bars

pytestmark = pytest.mark.proof
VERSIONS = ["2.3.0", "2.6.0", "2.7.0", "5.3.0", "5.5.0", "5.6.0"]
MARKETS = [("BTC-USDT", "crypto"), ("SPY", "equity")]
BARS = 500


def moving_accounts(env, steps: int = 40) -> AccountState:
    "Accounts that have traded at random for a while."
    random = torch.Generator().manual_seed(0)
    env.reset_index(0)
    for _ in range(steps):
        env.step_index(torch.randint(env.n_actions, (env.n_envs,), generator=random))
    return env.account


def one(accounts: AccountState, i: int) -> AccountState:
    "The i-th account alone."
    return AccountState(**{f.name: getattr(accounts, f.name)[i : i + 1] for f in fields(accounts)})


@pytest.mark.parametrize("symbol, asset_class", MARKETS)
def test_environment_backtest_and_live_see_the_same(real_bars_folder, symbol, asset_class):
    """Environment = backtest builder, exactly; the live builder from min_history bars within 1e-4, by
    column group."""
    bars = load_bars(symbol, "15Min", "files", path=str(real_bars_folder), asset_class=asset_class)
    print(
        f"\n{symbol} 15Min, {len(bars)} bars, {BARS} random ones, accounts that have traded: "
        "largest absolute difference"
    )
    print(f"{'layout':8} {'env - backtest':>15} {'live - backtest':>16}   by block")
    for version in VERSIONS:
        layout, split = LAYOUTS[version], int(0.6 * len(bars))
        fit = fit_features(bars.iloc[:split], version, "15Min", asset_class)
        market = market_data(bars, version, fit, "15Min", asset_class)
        env = GPUVectorizedTradingEnv(
            market,
            GPUEnvConfig(
                n_envs=BARS,
                version=version,
                asset_class=asset_class,
                account=AccountConfig(initial_account_value=100_000.0),
                episode_length=64,
            ),
        )
        accounts = moving_accounts(env)
        index = np.random.default_rng(0).choice(env.decision_bars, BARS, replace=False)
        seen = env.table.materialise(env.reset_at_index(index, account=accounts)).view(BARS, 100, -1)
        builder = BacktestObservationBuilder(
            bars, version, fit, "15Min", asset_class, account_config=env.config.account
        ).precompute()
        known = builder.observations(index, accounts)
        live = InferenceObservationBuilder(
            version, fit, "15Min", asset_class, account_config=env.config.account
        )
        built = torch.stack(
            [
                torch.as_tensor(live.build(bars.iloc[b - layout.min_history + 1 : b + 1], one(accounts, i)))
                for i, b in enumerate(index)
            ]
        )
        apart = (built - known).abs().amax((0, 1)).double()
        blocks = {name: float(apart[columns].max()) for name, columns in layout.slices.items()}
        print(
            f"{version:8} {float((seen - known).abs().max()):>15.1e} {float(apart.max()):>16.1e}   "
            + ", ".join(f"{name} {v:.0e}" for name, v in blocks.items())
        )
        assert torch.equal(seen, known) and float(apart.max()) <= 1e-4
        if layout.account_columns:
            assert (accounts.trades > 0).any() and accounts.quantity.std() > 0


@pytest.mark.parametrize("symbol, asset_class", MARKETS)
def test_no_lookahead_at_two_hundred_cuts(real_bars_folder, symbol, asset_class):
    """200 cuts × {NaN, noise, truncation} × six layouts: features, observations, masks and accounts
    bit-identical up to the cut."""
    bars = load_bars(symbol, "15Min", "files", path=str(real_bars_folder), asset_class=asset_class).iloc[
        -4000:
    ]
    for version in VERSIONS:
        report = check_lookahead(bars, version, "15Min", asset_class, cuts=200)
        print(f"\n{symbol}: {report}")
        assert report.passed and report.comparisons == 3 * 3 * 200 and report.refits == 15
