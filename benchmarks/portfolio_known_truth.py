"""Does a portfolio agent learn when there is something to learn, and earn nothing when there is not?

On real prices nobody knows what an agent should have earned. On a simulated universe everybody does:

1. Planted regimes. In one hidden state momentum pays, in another low volatility, in a third cash. Each seed
   is a recurrent agent of its own, trained on several simulated histories that follow each other, and judged
   on histories that it has never seen, after the costs of a broker. Beside it: the oracle that knows the
   state, who knows the law of the market but sees nothing but its prices (Bayes' rule: about what can be
   known at all), and equal weight. What is printed is the share of the oracle's growth, and the share of what
   the oracle grows more than equal weight, with their intervals over the seeds.
2. Martingale. The same without any drift. Agents are trained without costs, since with costs they learn to
   stay out and prove nothing, and are judged with them: the profit before costs of all of them together must
   have an interval that contains 0, and no verdict may be the best one.

The last policy of each training counts. None is chosen, so none is chosen by luck. Steps and learning rate
were raised once, after two of the ten seeds had been seen. `python benchmarks/portfolio_known_truth.py
--seeds 10 --panels 2` takes a minute of one core for each seed and kind.
"""

import argparse
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats

from trading_lib.data.simulated_panel import (
    asked_regimes,
    inferred_states,
    oracle_actions,
    planted_states,
    simulate_panel,
)
from trading_lib.evaluation.portfolio_figures import account_figures, difference
from trading_lib.market.observations import Obs
from trading_lib.metrics import block_bootstrap_interval
from trading_lib.portfolio.market import portfolio_market
from trading_lib.portfolio.panel import PortfolioPanel
from trading_lib.portfolio.regimes import EQUAL_WEIGHT, REGIMES
from trading_lib.portfolio.replay import PortfolioPath, replay
from trading_lib.portfolio_env import GPUPortfolioEnv, PortfolioConfig
from trading_lib.reporting.portfolio_verdict import beats_equal_weight
from trading_lib.reporting.verdict import SIMULATED_PASS, judge, worst_verdict
from trading_lib.trainer import NativePPOTrainer
from trading_lib.training.config import NativePPOConfig

DAYS_PER_YEAR = 252
AGENT, ORACLE, KNOWING, EQUAL = range(4)  # accounts of a replay
# so that no two histories share their noise
_FIRST, _SEEDS_APART, _TESTS, _MARTINGALES = 1_000_000, 10_000, 5_000, 100_000_000


@dataclass(frozen=True)
class PortfolioProof:
    "Everything that shapes the proofs, beside the seeds and the number of fresh histories."

    assets: int = 12
    years: int = 12  # of each history
    histories: int = 20  # to train on, one after the other
    episode_length: int = 128  # days
    n_envs: int = 512  # accounts stepped together
    n_steps: int = 32  # steps of each per rollout
    steps: int = 800_000  # environment steps of a training where something is planted
    martingale_steps: int = 300_000  # and where nothing is
    gru_hidden_dim: int = 32
    minibatch_size: int = 2048
    n_epochs: int = 3
    critic_epochs: int = 1
    learning_rate: float = 3e-3
    gamma: float = 0.9  # what a choice does, it does within days
    gae_lambda: float = 0.9
    entropy_coefficient: float = 0.02


# --- histories ----------------------------------------------------------------------------------------------


def joined_panel(
    panels: list[PortfolioPanel],  # of the same number of assets
) -> PortfolioPanel:
    """Several histories as one. Prices go on from where the one before ends, so that no account sees a jump;
    days are counted anew, since they would overlap."""
    level = np.ones(len(panels[0].symbols))
    tables: dict[str, list] = {name: [] for name in ("open", "close", "raw_close", "volume", "member")}
    for panel in panels:
        factor = level / panel.close[0]
        for name in ("open", "close", "raw_close"):
            tables[name].append(getattr(panel, name) * factor)
        tables["volume"].append(panel.volume / factor)
        tables["member"].append(panel.member)
        level = tables["close"][-1][-1]
    whole = {name: np.concatenate(rows) for name, rows in tables.items()}
    days = len(whole["close"])
    dates = np.busday_offset("1800-01-01", np.arange(days), roll="forward")
    return replace(
        panels[0], day=dates.astype("datetime64[ns]").astype(np.int64), start=0, stop=days, **whole
    )


def _history(seed: int, planted: float, settings: PortfolioProof) -> PortfolioPanel:
    return simulate_panel(settings.assets, settings.years, seed, planted)


def first_seed(
    seed: int,  # of an agent
    planted: float,  # 0: a martingale
) -> int:  # of its first history
    "Where the seeds of an agent's histories begin."
    return _FIRST + seed * _SEEDS_APART + _MARTINGALES * (planted == 0)


# --- training -----------------------------------------------------------------------------------------------


def trained(seed: int, planted: float, settings: PortfolioProof) -> NativePPOTrainer:
    "A trainer that has done its steps."
    first = first_seed(seed, planted)
    histories = [_history(first + k, planted, settings) for k in range(settings.histories)]
    config = PortfolioConfig(
        n_envs=settings.n_envs,
        frictions="broker" if planted else "zero",
        episode_length=settings.episode_length,
        reward_preset="excess_equal_weight",
        observations="indices",
    )
    env = GPUPortfolioEnv(joined_panel(histories), config)
    own = {
        name: getattr(settings, name)
        for name in (
            "n_envs n_steps gru_hidden_dim minibatch_size n_epochs critic_epochs learning_rate gamma "
            "gae_lambda entropy_coefficient"
        ).split()
    }
    steps = settings.steps if planted else settings.martingale_steps
    ppo = NativePPOConfig(network="gru", n_gru_layers=1, total_timesteps=steps, seed=seed, **own)
    trainer = NativePPOTrainer(env, ppo, progress=None)
    trainer.train()
    return trainer


# --- fresh histories ----------------------------------------------------------------------------------------


def played(trainer: NativePPOTrainer, seed: int, planted: float, settings: PortfolioProof) -> PortfolioPath:
    "The agent, the oracle, who knows the law, and equal weight, on a history that the agent has never seen."
    panel, policy = _history(seed, planted, settings), trainer.policy
    market = portfolio_market(panel, trainer.env.market.fit)
    truth, belief = planted_states(len(panel.day), seed), inferred_states(panel, seed, planted)
    others = [oracle_actions(truth), asked_regimes(belief.argmax(1)), np.full(len(truth), EQUAL_WEIGHT)]
    stated = torch.tensor(np.stack(others, 1)[market.decision_days])
    table = GPUPortfolioEnv(market, PortfolioConfig(n_envs=1)).table
    state = policy.initial_state(1, torch.device("cpu"))

    def choose(obs: Obs, step: int) -> torch.Tensor:
        nonlocal state
        own = Obs(obs.rows[:1], obs.dense[:1])
        logits, _, state = policy.evaluate_step(policy.inputs(own, table), state)
        return torch.cat([logits.argmax(1), stated[step]])

    return replay(market, PortfolioConfig(), choose, n=4)


def verdict_of(path: PortfolioPath) -> str:
    """The report's gates on one history, as leniently as can be: as if nothing else had been tried, and equal
    weight were the only rival."""
    judged = judge(account_figures(path.account(AGENT), DAYS_PER_YEAR), best=SIMULATED_PASS)["verdict"]
    if beats_equal_weight(difference(path.equity[:, AGENT], path.equity[:, EQUAL], DAYS_PER_YEAR)):
        return judged
    return worst_verdict(judged, "REVIEW")


def prove_seed(seed: int, panels: int, planted: float, settings: PortfolioProof) -> dict:
    "One agent and its fresh histories."
    began = time.process_time()
    trainer = trained(seed, planted, settings)
    in_training, first = time.process_time() - began, first_seed(seed, planted) + _TESTS
    paths = [played(trainer, first + k, planted, settings) for k in range(panels)]
    days = sum(len(path.action) for path in paths)
    growth = sum(np.log(path.equity[-1] / path.equity[0]) for path in paths) * DAYS_PER_YEAR / days
    gross = [np.diff(p.equity[:, AGENT]) + p.costs[:, AGENT] for p in paths]  # what prices did
    chosen = sum(np.bincount(path.action[:, AGENT], minlength=len(REGIMES)) for path in paths) / days
    return {
        "seed": seed,
        "growth": growth,
        "share": growth[AGENT] / growth[ORACLE],
        "share_of_edge": (growth[AGENT] - growth[EQUAL]) / (growth[ORACLE] - growth[EQUAL]),
        "gross": np.concatenate([g / p.equity[:-1, AGENT] for g, p in zip(gross, paths)]),
        "turnover": sum((p.traded / p.equity[:-1])[:, AGENT].sum() for p in paths) * DAYS_PER_YEAR / days,
        "verdicts": [verdict_of(path) for path in paths],
        "chosen": {r.name: float(s) for r, s in zip(REGIMES, chosen) if s >= 0.05},
        "training_seconds": in_training,
        "seconds": time.process_time() - began,
    }


# --- words --------------------------------------------------------------------------------------------------


def seed_line(kind: str, result: dict) -> str:
    "One agent, for people."
    agent, oracle, knowing, equal = (f"{100 * growth:+.1f}" for growth in result["growth"])
    chosen = ", ".join(f"{name} {share:.0%}" for name, share in result["chosen"].items())
    shares = ""
    if kind == "planted":
        shares = f", {result['share']:.0%} of the oracle's growth, {result['share_of_edge']:.0%} of its edge"
    return (
        f"{kind} {result['seed']}: % a year: agent {agent}, oracle {oracle}, knows the law {knowing}, equal "
        f"weight {equal}{shares}; turnover {result['turnover']:.0f} a year; {chosen}; "
        f"{', '.join(result['verdicts'])}; {result['training_seconds']:.0f} s of training, "
        f"{result['seconds']:.0f} s in all"
    )


def mean_interval(
    values: list[float],  # one for each seed
) -> tuple[float, float, float]:  # mean, low, high
    "The mean with its 95 % interval by Student's t."
    mean, error = np.mean(values), stats.sem(values)
    reach = stats.t.ppf(0.975, len(values) - 1) * error
    return float(mean), float(mean - reach), float(mean + reach)


def planted_lines(results: list[dict]) -> list[str]:
    "What the planted regimes say, all seeds together."
    texts = []
    for name, what in (("share", "growth"), ("share_of_edge", "growth beyond equal weight")):
        mean, low, high = mean_interval([r[name] for r in results])
        texts.append(f"share of the oracle's {what}: {mean:.0%}, 95 % between {low:.0%} and {high:.0%}")
    knowing = [
        (r["growth"][KNOWING] - r["growth"][EQUAL]) / (r["growth"][ORACLE] - r["growth"][EQUAL])
        for r in results
    ]
    above = sum(r["growth"][AGENT] > r["growth"][EQUAL] for r in results)
    texts.append(f"who knows the law has {np.mean(knowing):.0%} of the oracle's growth beyond equal weight")
    texts.append(f"above equal weight: {above} of {len(results)}")
    return texts


def martingale_lines(results: list[dict]) -> list[str]:
    "What the martingale says, all seeds together."
    pooled = np.concatenate([r["gross"] for r in results])
    low, high = block_bootstrap_interval(pooled)
    mean, low, high = (100 * DAYS_PER_YEAR * value for value in (pooled.mean(), low, high))
    within = "contains 0" if low <= 0 <= high else "DOES NOT CONTAIN 0"
    verdicts = [verdict for r in results for verdict in r["verdicts"]]
    best = sum(verdict in ("APPROVED", SIMULATED_PASS) for verdict in verdicts)
    return [
        f"profit before costs: {mean:+.2f} % a year, 95 % between {low:+.2f} and {high:+.2f}: {within} "
        f"({len(pooled):,} days)",
        f"passed every gate: {best} of {len(verdicts)} histories",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="agents of each kind")
    parser.add_argument("--panels", type=int, default=2, help="fresh histories for each agent")
    parser.add_argument("--first-seed", type=int, default=0, help="of the agents")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # the order of a sum must not depend on the machine
    settings = PortfolioProof()
    for kind, planted, lines in (("planted", 1.0, planted_lines), ("martingale", 0.0, martingale_lines)):
        results = []
        for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
            results.append(prove_seed(seed, asked.panels, planted, settings))
            print(seed_line(kind, results[-1]), flush=True)
        for line in lines(results):
            print(f"{kind}: {line}", flush=True)


if __name__ == "__main__":
    main()
