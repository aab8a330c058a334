"""Backtests on small simulated markets, and what makes them, for tests."""

import functools
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scalar_account import BROKER

from trading_lib.account import account_rules
from trading_lib.backtest import (
    run_backtest,
)
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data
from trading_lib.evaluation.replay import Run
from trading_lib.features import fit_features
from trading_lib.sources import simulate_market
from trading_lib.trainer import NativePPOTrainer
from trading_lib.training.config import NativePPOConfig

MARKETS = {"crypto": ("SIM-USD", "2023-01-01", "2023-02-20"), "equity": ("SIMA", "2023-01-01", "2023-09-30")}
FITTED = 3000  # bars of the training span
TIGHT = {name: replace(config, stop_pct=0.006, target_pct=0.008) for name, config in BROKER.items()}


@functools.cache
def simulated(asset_class, edge=0.1):
    symbol, first, last = MARKETS[asset_class]
    return simulate_market(symbol, "15Min", first, last, 3, edge, asset_class)


@functools.cache
def fitted(asset_class, version="5.6.0"):
    return fit_features(simulated(asset_class)[0][:FITTED], version, "15Min", asset_class)


@functools.cache
def market_of(asset_class, version="5.6.0"):
    return market_data(
        simulated(asset_class)[0],
        version,
        fitted(asset_class, version),
        "15Min",
        asset_class,
        symbol=MARKETS[asset_class][0],
    )


@functools.cache
def gap_bars():
    "Simulated crypto bars with a hole of two days and a half, after bar 3399."
    bars = simulated("crypto")[0]
    return pd.concat([bars[:3400], bars[3640:]])


def backtest(asset_class="crypto", actions=None, model=None, version="5.6.0", bars=None, **options):
    options = {
        "fit": fitted(asset_class, version),
        "version": version,
        "timeframe": "15Min",
        "asset_class": asset_class,
        "account": BROKER[asset_class],
        "symbol": MARKETS[asset_class][0],
    } | options
    return run_backtest(
        model, simulated(asset_class)[0] if bars is None else bars, actions=actions, **options
    )


def runs_of(market, config, actions):
    "One account for each column of a table of actions."
    return [
        Run(market, account_rules(config, market.asset_class), column)
        for column in torch.as_tensor(actions).unbind(1)
    ]


def random_list(n, seed=0, n_actions=8):
    return np.random.default_rng(seed).integers(0, n_actions, n)


@functools.cache
def long_run(asset_class):
    actions = np.where(
        np.random.default_rng(4).random(699) < 0.8, 0, random_list(699, 3)
    )  # rare enough that stops and targets are met
    return backtest(
        asset_class,
        actions,
        start=FITTED,
        stop=FITTED + 700,
        account=TIGHT[asset_class],
        truth=simulated(asset_class)[1],
        random_policies=40,
    ), actions


def small_trainer(asset_class, version, **env_changes):
    "A small untrained network that does different things at different bars."
    settings = (
        dict(
            n_envs=8,
            version=version,
            asset_class=asset_class,
            window=20,
            episode_length=16,
            account=replace(BROKER[asset_class], initial_account_value=5000.0, stop_pct=0.03),
        )
        | env_changes
    )
    bars = simulated(asset_class)[0]
    market = market_data(
        bars,
        version,
        fitted(asset_class, version),
        "15Min",
        asset_class,
        settings["window"],
        MARKETS[asset_class][0],
    ).span(0, FITTED)
    trainer = NativePPOTrainer(
        GPUVectorizedTradingEnv(market, GPUEnvConfig(**settings)),
        NativePPOConfig(
            hidden_dims=(16,),
            n_steps=8,
            minibatch_size=32,
            n_epochs=1,
            total_timesteps=256,
            learning_rate=1e-2,
        ),
        progress=None,
    )
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(
                0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return trainer
