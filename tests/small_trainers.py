"""Small trainers that many tests share: markets, environments and configurations that train in seconds, and
what to compare."""

import functools
from types import SimpleNamespace

import pytest
import torch

from trading_lib.config import InputError
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data
from trading_lib.features import fit_features
from trading_lib.sources import simulate_bars
from trading_lib.trainer import NativePPOTrainer
from trading_lib.training.config import NativePPOConfig
from trading_lib.training.progress import LineProgress

# --- comparing ----------------------------------------------------------------------------------------------


def refusal(make, *arguments, **named) -> str:
    "The one line that a mistake gets."
    with pytest.raises(InputError) as e:
        make(*arguments, **named)
    assert "\n" not in str(e.value)
    return str(e.value)


def same(a, b) -> bool:
    "Equal to the last bit, containers included."
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def weights(trainer) -> dict:
    "A copy of a trainer's weights."
    return {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}


def everything(trainer) -> dict:
    "What the next update depends on."
    own = {id(p): name for name, p in trainer.policy.named_parameters()}
    return {
        "weights": weights(trainer),
        "buffers": dict(trainer.policy.named_buffers()),
        "moments": {own[id(p)]: s for p, s in trainer.optimizers[0].state.items()},
        "random": trainer.random.get_state(),
        "env": trainer.env.state_dict(),
        "obs": list(trainer.collector.obs),
        "rules": trainer.env.rules,
        "counters": [trainer.update, trainer.global_step],
    }


# --- a trading environment ----------------------------------------------------------------------------------


@functools.cache
def market(version="5.6.0"):
    "Three months of simulated bars; features fitted on the first two."
    bars = simulate_bars(
        "SIM-USD", "15Min", "2023-01-01", "2023-04-01", seed=1, edge=0.2, asset_class="crypto"
    )
    fit = fit_features(bars[:5500], version, "15Min", "crypto")
    return market_data(bars, version, fit, "15Min", "crypto", symbol="SIM-USD")


def trading_env(version="5.6.0", **settings):
    "Eight accounts on the first two months, episodes of twelve bars."
    plain = dict(n_envs=8, version=version, episode_length=12, reward_preset="equity")
    return GPUVectorizedTradingEnv(market(version).span(0, 5500), GPUEnvConfig(**{**plain, **settings}))


SMALL = dict(
    hidden_dims=(16,),
    n_steps=16,
    minibatch_size=48,
    n_epochs=2,
    total_timesteps=8 * 16 * 6,
    learning_rate=1e-3,
    validation_interval=2,
)


def trading_trainer(seed=0, validation=None, version="5.6.0", env=None, **settings):
    "Six updates of a small network."
    config = NativePPOConfig(**{**SMALL, "seed": seed, **settings})
    return NativePPOTrainer(env or trading_env(version), config, validation, progress=None)


# --- an environment without a market ------------------------------------------------------------------------


class Plain:
    "An environment of random dense observations."

    n_envs, n_actions, obs_dim, device = 8, 3, 6, "cpu"

    def reset(self, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        return torch.randn(8, 6, generator=self.random)

    def step(self, actions):
        obs, ended = torch.randn(8, 6, generator=self.random), torch.zeros(8, dtype=torch.bool)
        return obs, torch.randn(8, generator=self.random), ended, ended, {"final_obs": obs}


def plain_trainer(**settings):
    "Four updates of 96 samples."
    plain = dict(hidden_dims=(16, 8), n_steps=12, minibatch_size=40, n_epochs=2, total_timesteps=96 * 4)
    return NativePPOTrainer(Plain(), NativePPOConfig(**{**plain, **settings}), progress=None)


# --- scripted validations, spoilt policies ------------------------------------------------------------------


def scripted_figures(**figures):
    "What a validation might say."
    return {
        "return": 0.0,
        "run_return": 0.0,
        "win_rate": 0.0,
        "reward": 0.0,
        "reward_deviation": 1.0,
        "max_drawdown": 0.0,
    } | figures


def judged(drawdowns=(), sharpes=(), **settings):
    "A trainer whose validations are scripted, one after each update; and what it says."
    said, n = [], max(len(drawdowns), len(sharpes))
    trainer = plain_trainer(**{"total_timesteps": 96 * n, "validation_interval": 1, **settings})

    def say(line):
        if not line.startswith("update") or "|" not in line:
            said.append(line)

    trainer.progress = LineProgress(say)
    figures = zip(drawdowns or [0.0] * n, sharpes or [0.0] * n)
    script = iter([scripted_figures(max_drawdown=drawdown, sharpe=sharpe) for drawdown, sharpe in figures])
    trainer.validation = SimpleNamespace(
        play=lambda policy: None, summarise=lambda played: next(script), daily=lambda played: {}
    )
    return trainer, said


def overflowing(trainer):
    "Every weight is finite, and what they make of a bar is not."
    with torch.no_grad():
        for name, p in trainer.policy.named_parameters():
            p.fill_(0.0 if name.startswith("trunk.0.") and "bias" not in name else 1e30)
    return trainer
