"""Heavy end-to-end proofs: the whole pipeline on markets whose truth is known. `make prove` runs them and prints the figures."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from trading_lib.backtest import decision_bars, greedy_actions, run_backtest, walk
from trading_lib.builder import BacktestObservationBuilder
from trading_lib.checkpoint import load_checkpoint
from trading_lib.config import AccountConfig
from trading_lib.env import market_data
from trading_lib.features import FeatureFit
from trading_lib.metrics import block_bootstrap_interval
from trading_lib.pipeline import run_stage
from trading_lib.sources import simulate_market
from trading_lib.trainer import build_policy

pytestmark = pytest.mark.proof
ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A copy of the project's notebooks and parameters; `set_parameters` edits the latter."
    for name in ("params.yaml", "settings.ini", "nbs"): (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_parameters(project: Path, **dotted):
    document = yaml.safe_load((project / "params.yaml").read_text())
    for name, value in dotted.items():
        section, key = name.split("__")
        document[section][key] = value
    (project / "params.yaml").write_text(yaml.safe_dump(document))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_agent_learns_a_planted_edge(project, seed):
    "quick_test as shipped beats cash and buy-and-hold at its own exposure, after costs, on the span that it never saw."
    run_stage("prepare", "SIM-USD")
    run_stage("train", "SIM-USD", seed=seed, mode="quick_test")
    run_stage("backtest", "SIM-USD")
    metrics = json.loads((project / "reports/SIM-USD_15Min/metrics.json").read_text())
    agent, baselines = metrics["agent"], metrics["baselines"]
    print(f"\nseed {seed}: {metrics['verdict']}\n  share of the oracle's profit {agent['share_of_oracle']:.1%}, percentile among its time-shifted copies {agent['percentile_among_random']:.0f}")
    assert agent["total_return"] > baselines["cash"] and agent["total_return"] > baselines["buy_and_hold_at_exposure"]
    assert abs(agent["gross_profit"] - agent["costs"] - agent["net_profit"]) < 1e-6


PATHS, LEVEL = 100, 0.99  # fresh histories of two months; an honest run falls outside the interval once in a hundred times


@pytest.mark.parametrize("training_costs", ["broker", "zero"])
def test_nobody_earns_on_a_martingale(project, training_costs):
    "Pooled gross P&L of three agents over fresh paths has an interval that contains 0; net = gross - costs. Agents trained without costs do trade."
    set_parameters(project, data__edge=0.0, account__costs=training_costs)
    run_stage("prepare", "SIM-USD")
    agents = []
    for seed in SEEDS:
        run_stage("train", "SIM-USD", seed=seed, mode="quick_test")
        agents.append(load_checkpoint(project / "models/SIM-USD_15Min.pt"))
    gross, costs, trades, broker = np.zeros((len(agents), PATHS)), np.zeros((len(agents), PATHS)), 0, AccountConfig(costs="broker")
    fit, version = agents[0]["fit"], agents[0]["model_version"]
    for path in range(PATHS):
        bars, truth = simulate_market("SIM-USD", "15Min", "2024-01-01", "2024-03-01", seed=1000 + path, edge=0.0)
        assert (truth["expected_return"] == 0).all()
        market, builder = market_data(bars, version, FeatureFit.from_state(fit), "15Min", "crypto"), BacktestObservationBuilder(bars, version, fit, "15Min", "crypto")
        at = decision_bars(market)
        actions = torch.stack([greedy_actions(build_policy(agent), builder, at) for agent in agents], 1)
        for step in walk(market, broker, actions): account = step["account"]
        gross[:, path], costs[:, path] = (account.equity + account.costs - broker.initial_account_value).numpy(), account.costs.numpy()
        trades += int(account.trades.sum())
        if path == 0:  # the report of a single backtest says the same
            m = run_backtest(agents[0], bars, account=broker).metrics
            assert abs(m["gross_profit"] - gross[0, 0]) < 1e-9 and abs(m["gross_profit"] - m["costs"] - m["net_profit"]) < 1e-9
    pooled = gross.mean(0)  # agents share a path; paths are independent, so blocks of one
    low, high = block_bootstrap_interval(pooled, np.mean, level=LEVEL, block_length=1, n=5000, seed=0)
    print(f"\ntrained with {training_costs} costs: {len(agents)} agents × {PATHS} fresh paths, {trades} trades; gross P&L per path {pooled.mean():+.2f} [{low:+.2f}, {high:+.2f}] ({LEVEL:.0%}), costs {costs.mean():.2f}, net {(gross - costs).mean():+.2f}")
    assert low <= 0 <= high
    if training_costs == "zero": assert trades > 100, "agents that never trade prove nothing"
