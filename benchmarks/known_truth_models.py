"""The three kinds of markets of known_truth.py, and what one small network makes of each.

The network is small on purpose: a seed of any kind takes less than 25 seconds on one core, training and
evaluation together. It reads 32 bars of layout 5.6.0 where the pipeline's reads 100, and has two narrow
layers. Steps are a fixed number, so that a faster machine proves the same thing sooner. Rewards, costs and
the choice of the checkpoint on a validation span are the pipeline's. History, steps and drift were chosen on
other seeds.
"""

from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import torch

from trading_lib import features
from trading_lib.account import account_rules
from trading_lib.backtest import run_backtest
from trading_lib.config import AccountConfig
from trading_lib.data.simulation import simulate_market
from trading_lib.env import (
    GPUEnvConfig,
    GPUVectorizedTradingEnv,
    MarketData,
    Obs,
    ObservationTable,
    layout_of,
    market_data,
    split_bounds,
)
from trading_lib.evaluation.lookahead import check_lookahead
from trading_lib.evaluation.replay import AccountPath, Run, decision_bars, replay_and_keep
from trading_lib.features import FeatureFit, fit_features
from trading_lib.metrics import equity_returns, sharpe_moments, summarise_equity
from trading_lib.policy.factory import build_policy
from trading_lib.reporting.verdict import SIMULATED_PASS, judge
from trading_lib.trainer import NativePPOTrainer
from trading_lib.training.config import COST_WARM_UP, NativePPOConfig

KINDS = ("edge", "martingale", "leak")
INITIAL = AccountConfig().initial_account_value  # of every account, in its currency
SEEDS_APART = 1_000  # seeds of the kinds and of fresh paths never meet: equal seeds share their noise
PATHS_APART = 1_000
_VERSION, _SYMBOL, _TIMEFRAME, _ASSET_CLASS = "5.6.0", "SIM-USD", "15Min", "crypto"
_FIRST_SEED = {kind: place * SEEDS_APART for place, kind in enumerate(KINDS)}
_FIRST_PATH = 1_000_000


@dataclass(frozen=True)
class ProofSettings:
    "Everything that shapes the proofs, beside the seeds and the number of paths."

    network_hidden_dims: tuple[int, ...] = (64, 32)  # widths of the hidden layers
    network_window: int = 32  # bars in one observation
    network_n_envs: int = 256  # accounts stepped together
    network_n_steps: int = 64  # steps of each per rollout
    network_minibatch_size: int = 2048
    network_n_epochs: int = 4  # passes over a rollout
    network_learning_rate: float = 1e-3
    network_episode_length: int = 256  # bars
    edge_planted: float = 0.3  # drift in units of volatility per bar
    edge_start: str = "2023-01-01"  # of each seed's history
    edge_end: str = "2024-01-01"
    edge_fractions: tuple[float, float] = (0.7, 0.15)  # of training and validation; the rest is never seen
    edge_steps: int = 500_000  # environment steps of a training
    martingale_start: str = "2023-01-01"  # of each seed's history
    martingale_end: str = "2023-07-01"
    martingale_fractions: tuple[float, float] = (0.8, 0.2)
    martingale_steps: int = 300_000
    martingale_paths_start: str = "2024-01-01"  # fresh paths follow each other
    martingale_path_days: int = 28
    leak_noise: float = 0.25  # of the planted column, in standard deviations of a bar's return


# --- training -----------------------------------------------------------------------------------------------
# The trainer, environment and cost warm-up of the pipeline, with another budget. What counts is the
# checkpoint that did best on the validation span.


def _settings_of(settings: ProofSettings, prefix: str) -> dict:
    "The settings whose names begin with a prefix, by the rest of their names."
    return {
        name.removeprefix(prefix): value
        for name, value in asdict(settings).items()
        if name.startswith(prefix)
    }


def _history(
    kind: str, seed: int, settings: ProofSettings
) -> tuple[pd.DataFrame, pd.DataFrame, dict, FeatureFit]:
    "Bars, truth, the spans' bounds and the fit of the training span."
    edge = kind == "edge"
    own = _settings_of(settings, "edge_" if edge else "martingale_")
    bars, truth = simulate_market(
        _SYMBOL,
        _TIMEFRAME,
        own["start"],
        own["end"],
        seed=_FIRST_SEED[kind] + seed,
        edge=settings.edge_planted if edge else 0.0,
    )
    spans = split_bounds(len(bars), *own["fractions"])
    fit = fit_features(bars.iloc[slice(*spans["train"])], _VERSION, _TIMEFRAME, _ASSET_CLASS)
    return bars, truth, spans, fit


def _trained(
    market: MarketData, spans: dict, seed: int, steps: int, costs: str, settings: ProofSettings
) -> NativePPOTrainer:
    "A trainer that has done its steps."
    own = _settings_of(settings, "network_")
    window, episode_length = own.pop("window"), own.pop("episode_length")
    env = GPUVectorizedTradingEnv(
        market.span(*spans["train"]),
        GPUEnvConfig(
            n_envs=own["n_envs"],
            version=_VERSION,
            window=window,
            timeframe=_TIMEFRAME,
            asset_class=_ASSET_CLASS,
            episode_length=episode_length,
            reward_preset="equity",
            account=AccountConfig(costs=costs),
        ),
        device="cpu",
    )
    updates = -(-steps // (own["n_envs"] * own["n_steps"]))
    config = NativePPOConfig(
        **own,
        total_timesteps=steps,
        seed=seed,
        cost_warm_up=COST_WARM_UP,
        validation_interval=max(1, updates // 10),
    )
    trainer = NativePPOTrainer(env, config, market.span(*spans["validation"]), None)
    trainer.train()
    return trainer


# --- the planted edge ---------------------------------------------------------------------------------------
# Each seed is a history of its own and a network of its own. The figure is the agent's profit after costs on
# the unseen span, as a share of what the oracle makes there under the same account: the oracle knows the
# market's state but not its noise, and places the same kinds of orders.

_OF_THE_AGENT = (
    "share_of_oracle",
    "total_return",
    "net_profit",
    "gross_profit",
    "costs",
    "exposure",
    "trades",
    "bars",
    "start",
    "end",
)
_OF_OTHERS = ("oracle", "buy_and_hold", "buy_and_hold_at_exposure", "moving_average_cross")


def prove_edge(
    seed: int,
    settings: ProofSettings | None = None,  # None: the defaults
) -> dict:  # figures
    "One network on one history with a planted edge, judged on the span that it has never seen."
    settings = settings or ProofSettings()
    bars, truth, spans, fit = _history("edge", seed, settings)
    market = market_data(bars, _VERSION, fit, _TIMEFRAME, _ASSET_CLASS, settings.network_window, _SYMBOL)
    trainer = _trained(market, spans, _FIRST_SEED["edge"] + seed, settings.edge_steps, "broker", settings)
    result = run_backtest(trainer.best, bars, start=spans["test"][0], truth=truth)
    return (
        {name: result.metrics[name] for name in _OF_THE_AGENT}
        | {name: result.baselines[name] for name in _OF_OTHERS}
        | {"chosen_update": trainer.best["update"], "updates": trainer.updates}
    )


# --- the martingale -----------------------------------------------------------------------------------------
# A model's fifty paths are months of their own, each simulated from its own seed, with the features that were
# fitted on the model's training span. All of them are replayed together.
#
# Agents are trained without costs: with costs they learn to stay out, and an agent that does not
# trade proves nothing.
# They are then evaluated with the broker's costs.


def gross_profit(
    walked: AccountPath,
    market: MarketData,  # that it walked through
) -> float:
    """Profit before costs, from the fills alone: what was bought and sold at which open, stop or close, and
    what the rest is worth at the end. That the account ended with this less its costs can then fail."""
    opening, close = market.prices[0][walked.bar + 1], market.prices[3][walked.bar + 1]
    arrived = (
        np.diff(walked.held, prepend=0.0) - walked.exit_quantity - walked.settled_quantity
    )  # of the orders: a fee in kind is a cost
    spent = (
        (arrived + walked.gap_quantity) @ opening
        + walked.inside_quantity @ walked.exit_price
        + walked.settled_quantity @ close
    )
    return float(walked.held[-1] * close[-1] - spent)


def _pooled_verdict(walks: list[tuple[AccountPath, MarketData]]) -> dict:
    """The gate on all paths of a model, one after the other, as leniently as it can be: as if nothing else
    had been tried."""
    returns = [equity_returns(np.append(INITIAL, w.equity)) for w, _ in walks]
    moments = np.concatenate([m.timestamp[w.bar + 1] for w, m in walks])
    equity = INITIAL * np.cumprod(np.append(1.0, 1 + np.concatenate(returns)))
    profits = np.concatenate([w.profits for w, _ in walks])
    first = walks[0][1].timestamp[walks[0][0].bar[0]]
    figures = summarise_equity(equity, np.append(first, moments), _TIMEFRAME, _ASSET_CLASS, profits)
    judged = judge(figures | {"moments": sharpe_moments(np.concatenate(returns))}, best=SIMULATED_PASS)
    return {"verdict": judged["verdict"], "deflated_sharpe": judged["deflated_sharpe"]} | {
        name: figures[name]
        for name in ("fitness", "profit_factor", "consistency", "max_drawdown", "total_return")
    }


def _fresh_path(number: int, seed: int, settings: ProofSettings) -> pd.DataFrame:
    "A month that nobody has seen."
    days = settings.martingale_path_days
    begin = pd.Timestamp(settings.martingale_paths_start) + pd.Timedelta(days * number, "D")
    end = begin + pd.Timedelta(days, "D")
    bars, _ = simulate_market(_SYMBOL, _TIMEFRAME, str(begin.date()), str(end.date()), seed=seed, edge=0.0)
    return bars


def _greedy(policy, market: MarketData, window: int) -> torch.Tensor:  # one action per decision
    table, at = ObservationTable(market.features, _VERSION, window), decision_bars(market)
    with torch.no_grad():
        obs = Obs(torch.as_tensor(at), torch.empty(len(at), 0))
        return policy.evaluate(policy.inputs(obs, table))[0].argmax(1)


def prove_martingale(
    seed: int,
    paths: int = 50,  # fresh histories to walk through
    settings: ProofSettings | None = None,  # None: the defaults
    leak: bool = False,  # plant one
) -> dict:  # figures
    "One network trained on a market without any edge, and what it makes of fresh paths of the same kind."
    settings, kind = settings or ProofSettings(), "leak" if leak else "martingale"
    bars, _, spans, fit = _history(kind, seed, settings)
    number, window = _FIRST_SEED[kind] + seed, settings.network_window
    first_path = _FIRST_PATH + PATHS_APART * number

    def market_of(bars, noise_seed):
        market = market_data(bars, _VERSION, fit, _TIMEFRAME, _ASSET_CLASS, window, _SYMBOL)
        return plant_leak(market, settings.leak_noise, noise_seed) if leak else market

    trainer = _trained(market_of(bars, number), spans, number, settings.martingale_steps, "zero", settings)
    policy = build_policy(trainer.best)
    rules = account_rules(AccountConfig(costs="broker"), _ASSET_CLASS)
    runs = []
    for path in range(paths):
        market = market_of(_fresh_path(path, first_path + path, settings), first_path + path)
        runs.append(Run(market, rules, _greedy(policy, market, window)))
    walked, account = replay_and_keep(runs)
    walks = [(w, run.market) for w, run in zip(walked, runs)]
    return {
        "gross": [gross_profit(w, market) for w, market in walks],
        "costs": [float((w.costs + w.settled_costs).sum()) for w in walked],
        "net": [float(w.equity[-1]) - INITIAL for w in walked],
        "trades": account.trades.tolist(),
        "decisions": [len(w.bar) for w in walked],
        "pooled": _pooled_verdict(walks),
        "chosen_update": trainer.best["update"],
        "updates": trainer.updates,
    }


# --- the planted leak ---------------------------------------------------------------------------------------
# A column of the feature table, the bar's own return, is replaced by the next bar's return with noise. The
# honest fit stays: fitting a leaking table would refuse it at once. Networks of the same kind must now show a
# profit before costs that no chance explains. Separately, the lookahead check gets a feature function with
# this leak, and must name this column and no other; without the leak it must name none.

_LEAKING = "returns"  # the column that the leak replaces


def _next_return(close: np.ndarray, noise: float, seed: int) -> np.ndarray:
    "The next bar's return, with noise that does not depend on it."
    ahead = np.append(close[1:] / close[:-1] - 1, 0.0)
    return ahead + noise * np.nanstd(ahead) * np.random.default_rng(seed).standard_normal(len(ahead))


def plant_leak(
    market: MarketData,
    noise: float,  # in standard deviations of a bar's return
    seed: int,  # of the noise
) -> MarketData:
    "The same market with a column that tells the next bar."
    table = market.features.copy()
    column = list(layout_of(market.version).market_columns).index(_LEAKING)
    table[:, column] = _next_return(market.prices[3], noise, seed)
    return replace(market, features=table)


@contextmanager
def leaking_feature():
    "While it lasts, the feature table itself looks one bar ahead."
    honest = features.BLOCK_FUNCTIONS["price_6"]
    place = list(layout_of(_VERSION).market_columns).index(_LEAKING)

    def dishonest(segment):
        columns = list(honest(segment))
        columns[place] = np.append(segment.close[1:] / segment.close[:-1] - 1, 0.0)
        return columns

    features.BLOCK_FUNCTIONS["price_6"] = dishonest
    try:
        yield
    finally:
        features.BLOCK_FUNCTIONS["price_6"] = honest


def prove_leak(
    seed: int = 0,
    paths: int = 50,  # fresh histories to walk through
    settings: ProofSettings | None = None,  # None: the defaults
) -> dict:  # figures
    "Both checks on a market with a planted leak."
    settings = settings or ProofSettings()
    bars, _ = simulate_market(
        _SYMBOL, _TIMEFRAME, "2023-01-01", "2023-02-01", seed=_FIRST_SEED["leak"] + seed, edge=0.0
    )
    fit = fit_features(bars.iloc[: int(0.6 * len(bars))], _VERSION, _TIMEFRAME, _ASSET_CLASS)

    def named():  # columns that the check finds looking ahead
        report = check_lookahead(bars, _VERSION, _TIMEFRAME, _ASSET_CLASS, cuts=4, refits=0, fit=fit)
        return sorted({leak["column"] for leak in report.leaks})

    honest = named()
    with leaking_feature():
        dishonest = named()
    return prove_martingale(seed, paths, settings, leak=True) | {
        "lookahead": {"honest": honest, "leaking": dishonest},
        "planted": _LEAKING,
    }
