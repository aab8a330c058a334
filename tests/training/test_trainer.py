"""PPO: each piece against arithmetic or plain torch, an exact resume, budgets as data, and tasks that only a
working whole solves."""

import copy
import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from small_trainers import (
    SMALL,
    Plain,
    everything,
    market,
    overflowing,
    plain_trainer,
    refusal,
    same,
    scripted_figures,
    trading_env,
    trading_trainer,
    weights,
)
from torch import nn

from trading_lib.account import account_rules
from trading_lib.checkpoint import inspect_checkpoint, load_checkpoint
from trading_lib.config import AccountConfig, InputError
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, MarketData, market_data
from trading_lib.evaluation.replay import Run, replay_and_keep
from trading_lib.features import fit_features
from trading_lib.market.layouts import LAYOUTS
from trading_lib.networks import estimate_model, finite_logits
from trading_lib.policy.factory import build_policy
from trading_lib.sources import simulate_bars
from trading_lib.trainer import NativePPOTrainer
from trading_lib.training.config import NativePPOConfig, get_auto_config
from trading_lib.training.ppo import Minibatch, generalized_advantages, learning_rate_at, minibatches
from trading_lib.training.progress import LineProgress
from trading_lib.training.validation import Validation, chunks_of


@functools.cache
def gapped():
    "Bars with a day missing in the validation span."
    bars = simulate_bars(
        "SIM-USD", "15Min", "2023-01-01", "2023-03-15", seed=2, edge=0.2, asset_class="crypto"
    )
    bars = bars.drop(bars.index[5200:5296])
    return market_data(
        bars, "5.6.0", fit_features(bars[:3000], "5.6.0", "15Min", "crypto"), "15Min", "crypto"
    )


# --- learning rate, minibatches -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "updates, expected", [(1, [0.1]), (2, [0.1, 1.0]), (3, [0.1, 1.0, 0.01]), (4, [0.1, 1.0, 0.505, 0.01])]
)
def test_learning_rates_of_the_shortest_runs(updates, expected):
    assert np.allclose([learning_rate_at(u, updates, 1.0) for u in range(updates)], expected, rtol=1e-12)


@pytest.mark.parametrize(
    "updates, fraction, least, expected",
    [
        (3, 0.0, 0.01, [1.0, 0.505, 0.01]),
        (5, 0.4, 0.2, [0.1, 0.55, 1.0, 0.6, 0.2]),
        (4, 0.0, 1.0, [1.0] * 4),
        (2, 1.0, 0.5, [0.1, 0.55]),
    ],
)
def test_warm_up_and_end_of_the_learning_rate_are_settings(updates, fraction, least, expected):
    assert np.allclose(
        [learning_rate_at(u, updates, 1.0, fraction, least) for u in range(updates)], expected, rtol=1e-12
    )
    trainer = plain_trainer(
        total_timesteps=96 * updates, warmup_fraction=fraction, min_lr_fraction=least, learning_rate=1e-3
    )
    assert np.allclose(
        [row["learning_rate"] for row in trainer.train()], 1e-3 * np.array(expected), rtol=1e-12
    )


@pytest.mark.parametrize("updates, warm_up", [(20, 1), (477, 23), (40, 2), (100, 5), (7, 1), (19, 1)])
def test_learning_rates_are_torchs_linear_warm_up_and_cosine(updates, warm_up):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedules = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, warm_up),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates - 1 - warm_up, 3e-6),
    ]
    schedule, expected = torch.optim.lr_scheduler.SequentialLR(optimizer, schedules, [warm_up]), []
    for _ in range(updates):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    found = [learning_rate_at(u, updates, 3e-4) for u in range(updates)]
    assert np.allclose(found, expected, rtol=1e-9)
    assert (
        math.isclose(found[0], 3e-5)
        and math.isclose(found[warm_up], 3e-4)
        and math.isclose(found[-1], 3e-6)
        and min(found) > 0
        and np.argmax(found) == warm_up
    )
    assert all(a < b for a, b in zip(found[:warm_up], found[1:])) and all(
        a > b for a, b in zip(found[warm_up:], found[warm_up + 1 :])
    )


def test_the_schedule_is_stepped_once_per_update_and_sums_take_window_times_it():
    trainer, seen = trading_trainer(total_timesteps=8 * 16 * 20, n_epochs=1, minibatch_size=128), []
    (optimizer,) = trainer.optimizers
    step = optimizer.step
    optimizer.step = lambda: (seen.append({g["factor"]: g["lr"] for g in optimizer.param_groups}), step())
    rows = trainer.train(4)
    expected = [learning_rate_at(u, 20, 1e-3) for u in range(4)]
    assert [r["learning_rate"] for r in rows] == expected and seen == [
        {1: rate, 100: rate * 100} for rate in expected
    ]


def test_minibatches_are_by_ceil_division():
    batches = minibatches(262_144, 12_288, torch.Generator().manual_seed(0))
    assert len(batches) == 22 and [len(b) for b in batches] == [12_288] * 21 + [4096]
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(262_144)) and not torch.equal(
        torch.cat(batches), torch.arange(262_144)
    )
    assert [len(b) for b in minibatches(5, 8, torch.Generator())] == [5] and [
        len(b) for b in minibatches(8, 4, torch.Generator())
    ] == [4, 4]
    again, other = (
        minibatches(100, 30, torch.Generator().manual_seed(3)),
        minibatches(100, 30, torch.Generator().manual_seed(4)),
    )
    assert same(again, minibatches(100, 30, torch.Generator().manual_seed(3))) and not same(again, other)


def test_every_sample_is_used_once_per_epoch():
    "96 samples in minibatches of 40: 40, 40 and 16."
    trainer, used = plain_trainer(n_epochs=3), []
    losses = trainer.learner.losses
    trainer.learner.losses = lambda data, batch, coefficient: (
        used.append(batch.samples),
        losses(data, batch, coefficient),
    )[1]
    trainer.train(1)
    assert [len(b) for b in used] == [40, 40, 16] * 3 and all(
        torch.equal(torch.cat(used[i : i + 3]).sort().values, torch.arange(96)) for i in (0, 3, 6)
    )


# --- advantages ---------------------------------------------------------------------------------------------


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def flags(*places):
    return torch.tensor([i in places for i in range(5)])[:, None]


@pytest.mark.parametrize(
    "lam, expected",
    [
        # rewards 1..5, gamma 0.5; the second step terminates, the fourth is truncated with a value of 8 left
        # one-step errors: 1 + 0.5×4 - 2 = 1; 2 - 4 = -2; 3 + 0.5×2 - 6 = -2; 4 + 0.5×8 - 2 = 6; 5 + 0.5×10 -
        # 4 = 6
        (0.0, [1, -2, -2, 6, 6]),
        (1.0, [1 + 0.5 * -2, -2, -2 + 0.5 * 6, 6, 6]),
        (0.95, [1 + 0.475 * -2, -2, -2 + 0.475 * 6, 6, 6]),
    ],
)
def test_advantages_of_five_steps_on_paper(lam, expected):
    rewards, values, next_values = column(1, 2, 3, 4, 5), column(2, 4, 6, 2, 4), column(4, 99, 2, 8, 10)
    found = generalized_advantages(rewards, values, next_values, flags(1), flags(1, 3), 0.5, lam)
    assert torch.allclose(found[:, 0], torch.tensor(expected, dtype=torch.float64), atol=1e-6)
    unbroken = generalized_advantages(rewards, values, next_values, flags(), flags(), 0.5, 1.0)[:, 0]
    delta = [1, 2 + 0.5 * 99 - 4, -2, 6, 6]
    assert torch.allclose(
        unbroken,
        torch.tensor(
            [sum(0.5 ** (k - t) * delta[k] for k in range(t, 5)) for t in range(5)], dtype=torch.float64
        ),
    )


def test_advantages_with_lambda_one_are_returns_less_values():
    "In each of two accounts, episode by episode, by a loop over the future."
    random = torch.Generator().manual_seed(0)
    rewards, values, last = (
        torch.randn(30, 2, generator=random),
        torch.randn(30, 2, generator=random),
        torch.randn(2, generator=random),
    )
    terminated, truncated = (
        torch.rand(30, 2, generator=random) < 0.15,
        torch.rand(30, 2, generator=random) < 0.15,
    )
    truncated &= ~terminated
    left = torch.randn(30, 2, generator=random)  # value of the last observation of a truncated episode
    next_values = torch.where(truncated, left, torch.cat([values[1:], last[None]]))
    found = generalized_advantages(rewards, values, next_values, terminated, terminated | truncated, 0.9, 1.0)
    for n in range(2):
        for t in range(30):
            total, weight, k = 0.0, 1.0, t
            while True:
                total += weight * rewards[k, n].item()
                weight *= 0.9
                if terminated[k, n]:
                    break
                if truncated[k, n]:
                    total += weight * left[k, n].item()
                    break
                if k == 29:
                    total += weight * last[n].item()
                    break
                k += 1
            assert math.isclose(found[t, n], total - values[t, n].item(), rel_tol=1e-4, abs_tol=1e-5)
    assert terminated.sum() > 3 and truncated.sum() > 3


class Scripted:
    """Two accounts; the observation is the value. Account 0 is truncated at every third step, account 1
    terminates at every second."""

    n_envs, n_actions, obs_dim, device = 2, 2, 1, "cpu"

    def reset(self, seed=0):
        self.t, self.obs = 0, torch.tensor([[1.0], [2.0]])
        return self.obs

    def step(self, actions):
        self.t += 1
        final = self.obs + 10  # what the episode went on to
        truncated, terminated = torch.tensor([self.t % 3 == 0, False]), torch.tensor([False, self.t % 2 == 0])
        self.obs = torch.where(
            (truncated | terminated)[:, None], torch.tensor([[-5.0], [-7.0]]) - self.t, final
        )
        return self.obs, torch.tensor([float(self.t), 1.0]), terminated, truncated, {"final_obs": final}


def test_a_rollout_bootstraps_from_the_last_observation_of_a_truncated_episode():
    "Seven steps, the last of them inside an episode; by a loop with the value of `final_obs`."
    trainer = NativePPOTrainer(
        Scripted(),
        NativePPOConfig(
            hidden_dims=(4,), n_steps=7, minibatch_size=14, total_timesteps=14 * 3, gamma=0.8, gae_lambda=0.6
        ),
        progress=None,
    )
    trainer.runner.policy = SimpleNamespace(
        inputs=lambda obs, table: obs.dense,
        initial_state=lambda n, device: None,
        evaluate_step=lambda x, state: (torch.zeros(len(x), 2), x[:, 0], None),
    )
    trainer.collector.begin()
    rollout, env = trainer._rollout(), Scripted()
    env.reset()
    steps = [(env.obs.clone(), *env.step(None)) for _ in range(7)]
    for n in range(2):
        running = 0.0
        for t in range(6, -1, -1):
            before, after, reward, terminated, truncated, infos = steps[t]
            follows = 0.0 if terminated[n] else infos["final_obs"][n, 0] if truncated[n] else after[n, 0]
            delta = reward[n] + 0.8 * follows - before[n, 0]
            running = delta + 0.8 * 0.6 * running * (not (terminated[n] or truncated[n]))
            assert math.isclose(rollout["advantage"][t, n], running, rel_tol=1e-5), (t, n)
            assert math.isclose(rollout["return"][t, n], running + before[n, 0], rel_tol=1e-5, abs_tol=1e-5)
    assert math.isclose(
        trainer.collector.obs.dense[0, 0], env.obs[0, 0]
    )  # the next rollout goes on where this one stopped


class Endless:
    "One reward a step for ever; cut after four steps, and called either a truncation or an end."

    n_envs, n_actions, obs_dim, device = 8, 2, 1, "cpu"

    def __init__(self, ends):
        self.ends = ends

    def reset(self, seed=0):
        self.t = torch.arange(8) % 4
        return torch.ones(8, 1)

    def step(self, actions):
        self.t = self.t + 1
        cut = self.t % 4 == 0
        return (
            torch.ones(8, 1),
            torch.ones(8),
            cut & self.ends,
            cut & (not self.ends),
            {"final_obs": torch.ones(8, 1)},
        )


@pytest.mark.slow
@pytest.mark.parametrize("ends, expected", [(False, 10.0), (True, (1 + 1.9 + 2.71 + 3.439) / 4)])
def test_values_see_past_a_truncation_and_not_past_an_end(ends, expected):
    """With gamma 0.9 an endless reward of 1 is worth 1 / (1 - 0.9); four steps at a random moment are worth
    2.26."""
    trainer = NativePPOTrainer(
        Endless(ends),
        NativePPOConfig(
            hidden_dims=(8,),
            n_steps=16,
            minibatch_size=64,
            n_epochs=10,
            total_timesteps=128 * 40,
            learning_rate=1e-2,
            gamma=0.9,
        ),
        progress=None,
    )
    trainer.train()
    with torch.no_grad():
        value = trainer.policy(torch.ones(1, 1))[1].item()
    assert math.isclose(value, expected, rel_tol=0.1)


# --- the loss -----------------------------------------------------------------------------------------------


def plain_loss(policy, data, config):
    "The PPO loss, sample by sample, with torch.distributions."
    hidden = policy.trunk(data["dense"])
    distribution, values = (
        torch.distributions.Categorical(logits=policy.actor_head(hidden)),
        policy.critic_head(hidden)[:, 0],
    )
    log_probability, advantages = distribution.log_prob(data["action"]), data["advantage"].double()
    advantages = (
        (advantages - advantages.mean())
        / (math.sqrt(float(((advantages - advantages.mean()) ** 2).mean())) + 1e-8)
    ).tolist()
    gains, squares, divergences, clipped = [], [], [], 0
    for i, a in enumerate(advantages):
        ratio = torch.exp(log_probability[i] - data["log_probability"][i])
        r, lowest, highest = ratio.item(), 1 - config.clip_range, 1 + config.clip_range
        # nothing is gained by moving further out; what got worse counts in full
        gains.append(
            ratio * a
            if (r <= highest if a > 0 else r >= lowest)
            else torch.tensor((highest if a > 0 else lowest) * a)
        )
        error, change = (values[i] - data["return"][i]) ** 2, (values[i] - data["value"][i]).item()
        if config.value_clip_range is not None and abs(change) > config.value_clip_range:
            other = (
                data["value"][i] + math.copysign(config.value_clip_range, change) - data["return"][i]
            ) ** 2
            error = error if error.item() >= other.item() else other
        squares.append(error)
        divergences.append(
            torch.distributions.kl_divergence(
                torch.distributions.Categorical(logits=data["logits"][i]),
                torch.distributions.Categorical(logits=distribution.logits[i]),
            ).item()
        )
        clipped += not lowest <= r <= highest
    policy_loss, value_loss, entropy = (
        -torch.stack(gains).mean(),
        torch.stack(squares).mean(),
        distribution.entropy().mean(),
    )
    return policy_loss + config.value_coefficient * value_loss - config.entropy_coefficient * entropy, dict(
        policy_loss=policy_loss.item(),
        value_loss=value_loss.item(),
        entropy=entropy.item(),
        kl=float(np.mean(divergences)),
        clip_fraction=clipped / len(values),
    )


@pytest.mark.parametrize(
    "settings",
    [{}, dict(value_clip_range=0.3), dict(clip_range=0.05, value_coefficient=1.7, entropy_coefficient=0.2)],
)
def test_every_term_of_the_loss_equals_a_plain_reimplementation(settings):
    trainer, random = plain_trainer(**settings), torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    with torch.no_grad():
        for p in trainer.policy.parameters():
            p += 0.3 * draw(*p.shape)  # away from the uniform policy
        data = {
            "dense": draw(64, 6),
            "action": torch.randint(3, (64,), generator=random),
            "advantage": 2 + 3 * draw(64),
        }
        logits, values = trainer.policy(data["dense"])
        data |= {
            "logits": torch.log_softmax(logits + draw(64, 3), 1),
            "log_probability": torch.log_softmax(logits, 1).gather(1, data["action"][:, None])[:, 0]
            + 0.3 * draw(64),
            "value": values + 0.5 * draw(64),
            "return": values + draw(64),
        }
    other = copy.deepcopy(trainer.policy)
    batch = torch.randperm(64, generator=random)[:50]
    loss, watched = trainer.learner.losses(data, Minibatch(batch), trainer.config.entropy_coefficient)
    expected, terms = plain_loss(other, {name: v[batch] for name, v in data.items()}, trainer.config)
    loss.backward()
    expected.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5) and watched.keys() == terms.keys()
    for name in terms:
        assert math.isclose(float(watched[name]), terms[name], rel_tol=1e-4, abs_tol=1e-6), name
    for (name, a), b in zip(trainer.policy.named_parameters(), other.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name
    assert 0.2 < terms["clip_fraction"] < 0.95 and terms["kl"] > 0.01


def test_gradients_are_clipped_before_every_step():
    for max_norm in (0.05, 0.5):
        trainer, norms = plain_trainer(max_grad_norm=max_norm, learning_rate=1e-2), []
        step = trainer.optimizers[0].step

        def measured(trainer=trainer, norms=norms, step=step):
            norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in trainer.policy.parameters())))
            step()

        trainer.optimizers[0].step = measured
        trainer.train(3)
        assert (
            len(norms) == 3 * 2 * 3
            and max(norms) <= max_norm * 1.00001
            and sum(n > 0.999 * max_norm for n in norms) > 3
        )


def test_a_target_divergence_stops_the_epochs_of_a_rollout():
    "It is looked at after each epoch; rollouts go on."
    steps = {}
    for target in (None, 1e-9, 1e9):
        trainer, counted = plain_trainer(n_epochs=5, target_kl=target, learning_rate=1e-2), []
        step = trainer.optimizers[0].step
        trainer.optimizers[0].step = lambda counted=counted, step=step: (counted.append(1), step())
        trainer.train(2)
        steps[target] = len(counted)
    assert steps[None] == steps[1e9] == 2 * 5 * 3 and 2 * 1 * 3 <= steps[1e-9] <= 2 * 2 * 3


def test_explained_variance_is_that_of_the_values_before_the_update():
    trainer = plain_trainer()
    rollout, seen = trainer._rollout, []
    trainer._rollout = lambda: (seen.append(rollout()), seen[-1])[1]
    row = trainer.train(1)[0]
    returns, values = (seen[0][name].flatten().double().numpy() for name in ("return", "value"))
    assert math.isclose(
        row["explained_variance"], 1 - np.var(returns - values) / np.var(returns), rel_tol=1e-4
    ) and math.isclose(row["reward"], float(seen[0]["reward"].mean()), rel_tol=1e-5)


def test_actions_are_drawn_with_the_policys_probabilities():
    trainer = plain_trainer(n_steps=2000)
    logits = torch.tensor([0.0, 1.0, -1.0])
    trainer.runner.policy = SimpleNamespace(
        inputs=lambda obs, table: obs.dense,
        initial_state=lambda n, device: None,
        evaluate_step=lambda x, state: (logits.expand(len(x), 3), x[:, 0], None),
    )
    trainer.collector.begin()
    rollout, probabilities = trainer._rollout(), torch.softmax(logits, 0)
    shares = torch.bincount(rollout["action"].flatten(), minlength=3) / 16_000
    assert ((shares - probabilities).abs() < 4 * (probabilities * (1 - probabilities) / 16_000).sqrt()).all()
    assert torch.allclose(rollout["log_probability"].exp(), probabilities[rollout["action"]])


def test_actions_are_drawn_by_the_seed():
    def drawn(seed):
        trainer = plain_trainer(seed=seed)
        trainer.runner.policy = SimpleNamespace(
            inputs=lambda obs, table: obs.dense,
            initial_state=lambda n, device: None,
            evaluate_step=lambda x, state: (torch.zeros(len(x), 3), x[:, 0], None),
        )  # the same for every seed
        trainer.collector.begin()
        return trainer._rollout()["action"]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


# --- repeatable, and resumed exactly ------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    runs = []
    for seed, noise in ((5, 1), (5, 2), (6, 1)):
        torch.manual_seed(noise)
        np.random.seed(noise)  # whatever else draws numbers in the process
        before = torch.get_rng_state()
        trainer = trading_trainer(seed)
        trainer.train(2)
        assert torch.equal(before, torch.get_rng_state())  # and nobody else's numbers are used up
        runs.append(weights(trainer))
    assert same(runs[0], runs[1]) and not any(
        torch.equal(runs[0][name], runs[2][name]) for name in runs[0] if name.endswith("weight")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed, settings", [(0, {}), (1, dict(shared_trunk=False)), (2, dict(version="2.7.0"))]
)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(seed, settings, tmp_path):
    """Stopped after one update, while costs still rise, and after three; weights, optimizer, random numbers,
    accounts, and every figure that is shown."""
    settings = settings | dict(cost_warm_up=0.5, total_timesteps=8 * 16 * 4)
    reward = dict(reward_preset="v2.5.0", n_envs=8)  # its exploration component remembers 64 actions

    def make():
        return trading_trainer(
            seed,
            market().span(5500, 5700) if seed == 0 else None,
            env=trading_env(settings.get("version", "5.6.0"), **reward),
            **{k: v for k, v in settings.items() if k != "version"},
        )

    whole = make()
    whole.train()
    assert whole.update == 4 and whole.env._full_rules == whole.env.rules
    for stop in (1, 3):
        first = make()
        first.train(stop)
        scales_differ = first.env.rules != first.env._full_rules
        assert scales_differ == (stop == 1) and not same(weights(first), weights(whole))
        first.save(tmp_path / "model.pt")
        second = make()
        second.train(1)  # a trainer that has already been somewhere else
        second.load(tmp_path / "model.pt")
        assert same(everything(second) | {"rules": 0}, everything(first) | {"rules": 0})
        second.train()
        found, expected = everything(second), everything(whole)
        assert [name for name in expected if not same(found[name], expected[name])] == []
        assert [row for row in second.history if row["update"] > stop][-(4 - stop) :] == whole.history[stop:]


def test_saving_does_not_disturb_the_run(tmp_path):
    whole, saving = trading_trainer(3), trading_trainer(3)
    whole.train(3)
    for _ in range(3):
        saving.train(1)
        saving.save(tmp_path / "model.pt")
    assert same(everything(whole), everything(saving)) and whole.history == saving.history
    with torch.no_grad():
        saved = load_checkpoint(tmp_path / "model.pt")
    assert (
        saved["update"] == 3
        and saved["global_step"] == 3 * 8 * 16
        and saved["config"]["train"]["hidden_dims"] in ((16,), [16])
    )


class BreaksOff(LineProgress):
    "Raises when so much of a phase is done."

    def __init__(self, *at):
        super().__init__(lambda line: None)
        self.at = at

    def phase(self, name, done, total):
        if (name, done) == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_a_rollout_that_was_broken_off_is_begun_anew(network, tmp_path):
    """Accounts have moved on meanwhile: an observation from before must not meet a reward from after, here
    or in a file."""
    trainer = trading_trainer(0, network=network, gru_hidden_dim=8)
    trainer.train(1)
    trainer.progress, before = BreaksOff("rollout", 5), trainer.env.bar.clone()
    with pytest.raises(KeyboardInterrupt):
        trainer.train(1)
    trainer.progress = LineProgress(lambda line: None)
    assert not torch.equal(trainer.env.bar, before)
    resumed = trading_trainer(0, network=network, gru_hidden_dim=8)
    resumed.load(trainer.save(tmp_path / "a.pt"))
    for t in (trainer, resumed):
        t.train(1)
        index, ended = t.collector.buffer["index"], t.collector.buffer["ended"] > 0
        assert (
            t.update == 2
            and torch.equal(index[1:] == index[:-1] + 1, ~ended[:-1])
            and torch.equal(t.collector.obs.index, t.env.bar)
        )
    assert all(torch.equal(*pair) for pair in zip(weights(trainer).values(), weights(resumed).values()))


def test_after_critic_epochs_that_were_broken_off_everything_learns():
    trainer = trading_trainer(0, critic_epochs=2)
    trainer.progress = BreaksOff("critic epochs", 1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(1)
    trainer.progress, before = LineProgress(lambda line: None), weights(trainer)
    trainer.train(1)
    assert not any(torch.equal(before[name], after) for name, after in weights(trainer).items())


def test_a_run_can_be_resumed_before_its_first_update(tmp_path):
    whole, second = trading_trainer(4), trading_trainer(4)
    trading_trainer(4).save(tmp_path / "model.pt")
    second.load(tmp_path / "model.pt")
    whole.train(2)
    second.train(2)
    assert same(everything(whole), everything(second))


@pytest.mark.slow
def test_a_resumed_run_remembers_the_best_policy(tmp_path):
    "Otherwise the first validation after a resume is always the best so far, and the better policy is lost."
    validation = market().span(5500, 6500)

    def make():
        return trading_trainer(0, validation, validation_interval=1)

    scripted = iter([3.0, 1.0, 2.0])

    def run(trainer):
        trainer.validation.summarise = lambda played: scripted_figures(sharpe=next(scripted))
        return trainer

    first = run(make())
    first.train(1)
    first.save(tmp_path / "model.pt")
    second = run(make())
    second.load(tmp_path / "model.pt")
    second.train(2)
    assert second.best_score == 3.0 and (second.best is None or second.best["update"] == 1)


def test_a_served_policy_is_the_trained_one(tmp_path):
    trainer = trading_trainer()
    trainer.train(2)
    trainer.save(tmp_path / "model.pt")
    policy, obs = build_policy(load_checkpoint(tmp_path / "model.pt")), trainer.collector.obs
    with torch.no_grad():
        expected = trainer.policy.evaluate(trainer.policy.inputs(obs, trainer.table))
        for out in (
            policy.evaluate(policy.inputs(obs, trainer.table)),
            policy(trainer.table.materialise(obs)),
        ):
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(out, expected))
    assert not policy.training
    plain = plain_trainer()
    plain.save(tmp_path / "plain.pt")
    x = torch.randn(5, 6)
    assert same(list(build_policy(load_checkpoint(tmp_path / "plain.pt"))(x)), list(plain.policy(x)))


def test_a_loaded_policy_reads_the_table_with_the_scale_it_was_trained_with(tmp_path):
    first = trading_trainer()
    first.save(tmp_path / "model.pt")
    other = replace(
        market(),
        fit=market().fit
        | {"scale": [3 * v for v in market().fit["scale"]], "shift": [v + 1 for v in market().fit["shift"]]},
    )
    second = NativePPOTrainer(
        GPUVectorizedTradingEnv(other.span(0, 5500), first.env.config), first.config, progress=None
    )
    first.collector.begin()
    obs = first.collector.obs
    with torch.no_grad():
        assert not same(list(first.collector.acting()(obs, None)), list(second.collector.acting()(obs, None)))
        second.load(tmp_path / "model.pt")
        assert same(list(first.collector.acting()(obs, None)), list(second.collector.acting()(obs, None)))


def test_a_real_checkpoint_weighs_what_was_estimated(tmp_path):
    trainer = trading_trainer(hidden_dims=(64, 32))
    trainer.train(1)
    facts, estimate = (
        inspect_checkpoint(trainer.save(tmp_path / "model.pt")),
        estimate_model(5800, (64, 32), 8),
    )
    assert (
        facts["parameters"] == estimate["parameters"]
        and abs(facts["bytes"] / estimate["checkpoint_bytes"] - 1) < 0.05
    ), f"{facts['bytes']:,} bytes, estimated {estimate['checkpoint_bytes']:,}"


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(hidden_dims=(16, 8)), [r"\[16\]", r"\[16, 8\]"]),
        (dict(version="2.7.0"), ["5800 inputs", "5900 inputs", "8 actions", "7 actions"]),
        (dict(version="5.5.0"), ["5800 inputs", "5100 inputs"]),
        (dict(shared_trunk=False), ["shared_trunk"]),
    ],
)
def test_a_network_of_another_shape_is_refused_with_both_shapes(tmp_path, settings, words):
    trading_trainer().save(tmp_path / "model.pt")
    other = trading_trainer(**settings)
    before = weights(other)
    with pytest.raises(InputError) as e:
        other.load(tmp_path / "model.pt")
    message = str(e.value)
    assert (
        str(tmp_path / "model.pt") in message
        and "size mismatch" not in message
        and "\n" not in message
        and same(before, weights(other))
    )
    for word in words:
        assert word.replace("\\", "") in message


def test_another_number_of_accounts_is_refused(tmp_path):
    trainer = trading_trainer()
    trainer.train(1)
    trainer.save(tmp_path / "model.pt")
    other = trading_trainer(env=trading_env(n_envs=4))
    assert "n_envs" in refusal(other.load, tmp_path / "model.pt")


# --- running ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_counters_budget_and_rows():
    lines, trainer = [], plain_trainer(total_timesteps=96 * 3 + 1)  # a partial update is made whole
    trainer.progress = LineProgress(lines.append)
    assert (
        trainer.updates == 4 and [r["update"] for r in trainer.train(1)] == [1] and trainer.global_step == 96
    )
    rows = trainer.train()
    assert (
        [r["timesteps"] for r in rows] == [96, 192, 288, 384]
        and trainer.update == 4
        and trainer.train() is trainer.history
        and len(trainer.history) == 4
    )  # the budget is spent
    assert (
        all(math.isfinite(v) for r in rows for v in r.values())
        and lines[-1].startswith("update 4/4 |")
        and len(lines) == 4
    )
    long = plain_trainer(total_timesteps=96 * 100, n_epochs=1, n_steps=12)
    long.progress = LineProgress((lines := []).append)
    long.train(60)
    assert len(lines) <= 20 and all("\n" not in line for line in lines)
    assert "n_envs: the environment has 8, was 4" in refusal(plain_trainer, n_envs=4)


@pytest.mark.parametrize(
    "settings",
    [dict(amp=False), dict(amp=True), dict(shared_trunk=False), dict(shared_trunk=False, amp=True)],
)
def test_every_kind_of_network_trains(settings):
    trainer = trading_trainer(n_epochs=4, **settings)
    before = weights(trainer)
    rows = trainer.train(2)
    assert all(
        not torch.equal(v, before[name]) and v.dtype == torch.float32 and torch.isfinite(v).all()
        for name, v in weights(trainer).items()
    )
    assert (
        all(math.isfinite(v) for r in rows for v in r.values())
        and {"reward_equity", "entropy", "kl"} <= rows[0].keys()
    )
    assert any("critic_trunk" in name for name in before) == (settings.get("shared_trunk") is False)


def test_mixed_precision_is_at_work_and_close():
    a, b = trading_trainer(amp=False), trading_trainer(amp=True)
    a.collector.begin()
    with torch.no_grad():
        plain, mixed = (
            a.collector.acting()(a.collector.obs, None)[:2],
            b.collector.acting()(a.collector.obs, None)[:2],
        )
    assert all(v.dtype == torch.float32 for v in mixed) and not torch.equal(plain[1], mixed[1])
    assert (plain[1] - mixed[1]).norm() < 0.02 * plain[1].norm() and (
        plain[0] - mixed[0]
    ).norm() < 0.02 * plain[0].norm()


@pytest.mark.parametrize(
    "share, updates, expected",
    [
        (0.5, 6, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        (0.5, 1, [1]),
        (1.0, 4, [0.25, 0.5, 0.75, 1]),
        (0.25, 5, [0.8, 1, 1, 1, 1]),
        (0.1, 5, [1, 1, 1, 1, 1]),
        (0.3, 10, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_costs_rise_to_exactly_their_full_size(share, updates, expected):
    trainer, scales = (
        trading_trainer(total_timesteps=8 * 16 * updates, cost_warm_up=share, n_epochs=1, minibatch_size=128),
        [],
    )
    set_cost_scale = trainer.env.set_cost_scale
    trainer.env.set_cost_scale = lambda scale: (scales.append(scale), set_cost_scale(scale))
    trainer.train()
    assert np.allclose(scales, expected, atol=1e-12) and scales[-1] == 1.0
    assert trainer.env.rules == account_rules(AccountConfig(), "crypto")  # to the bit


def test_without_a_warm_up_costs_are_full_from_the_start():
    trainer = trading_trainer(cost_warm_up=0.0)
    trainer.env.set_cost_scale = None  # not called
    trainer.train(1)
    assert trainer.env.rules == account_rules(AccountConfig(), "crypto")


def test_an_environment_without_costs_trains_with_an_automatic_configuration():
    "The trainer trains any environment that speaks the interface; `get_auto_config` sets a warm-up of costs."
    trainer = NativePPOTrainer(
        Plain(),
        get_auto_config(96 * 2, "quick_test", "cpu", n_envs=8, n_steps=12, hidden_dims=[8]),
        progress=None,
    )
    assert trainer.config.cost_warm_up > 0 and len(trainer.train()) == 2


# --- validation ---------------------------------------------------------------------------------------------


class ByBar:
    "A policy that takes a random but fixed action at each bar."

    def __init__(self, bars, seed=0):
        self.actions = torch.as_tensor(
            np.random.default_rng(seed).choice(8, bars, p=[0.6, 0.05, 0.05, 0.1, 0.05, 0.05, 0.05, 0.05])
        )

    def inputs(self, obs, table):
        return obs.index

    def initial_state(self, n, device):
        return None

    def evaluate_step(self, index, state):
        return nn.functional.one_hot(self.actions[index], 8).float(), torch.zeros(len(index)), state


def walks(history, start, stop, config, policy):
    """Independent single-account walks over the span's decisions, 512 bars at most, found by a loop over the
    bars."""
    history, runs = history.span(start, stop), []
    for t in range(start, stop - 1):
        if not (history.can_decide[t] and history.segment[t] == history.segment[t + 1]):
            continue
        if runs and runs[-1][-1] == t - 1 and len(runs[-1]) < 512:
            runs[-1].append(t)
        else:
            runs.append([t])
    env = GPUVectorizedTradingEnv(history, replace(config, n_envs=1))
    returns, profits, exposure, rewards, orders = [], [], [], [], 0
    for run in runs:
        env.reset_at([run[0]], [run[-1] + 1])
        before = config.account.initial_account_value
        for t in run:
            _, reward, terminated, truncated, infos = env.step(policy.actions[t][None])
            account = infos["account"]
            after = float(account.equity)
            returns.append(after / before - 1)
            exposure.append(abs(float(account.position_value)) / after)
            rewards.append(float(reward))
            orders += float(infos["fills"].quantity) != 0
            if infos["fills"].trade_closed:
                profits.append(float(infos["fills"].trade_profit))
            before = after
            assert bool(truncated) == (t == run[-1]) and not terminated
    equity = np.concatenate([[1.0], np.cumprod(1 + np.array(returns))])
    years = (history.timestamp[stop - 1] - history.timestamp[start]) / 1e9 / 86_400 / 365.25
    wins, losses = sum(p for p in profits if p > 0), -sum(p for p in profits if p < 0)
    parts = equity[
        np.round(np.linspace(0, len(returns), 11)).astype(int)
    ]  # less than eight weeks: ten equal parts
    fitness = (
        0.4 * min(wins / losses / 2.5, 1)
        + 0.3 * np.mean(np.diff(parts) > 0)
        + 0.3 * (1 - min(max(1 - equity / np.maximum.accumulate(equity)) / 0.2, 1))
    )
    by_day = pd.Series(returns, pd.to_datetime(history.timestamp[np.concatenate(runs) + 1]).date)
    return (
        runs,
        by_day,
        {
            "fitness": fitness,
            "return": equity[-1] - 1,
            "sharpe": np.mean(returns) / np.std(returns, ddof=1) * math.sqrt((stop - start) / years),
            "max_drawdown": max(1 - equity / np.maximum.accumulate(equity)),
            "exposure": np.mean(exposure),
            "hold_share": 1 - orders / len(returns),
            "trades": len(profits),
            "win_rate": np.mean(np.array(profits) > 0),
            "profit_factor": wins / losses,
            "consistency": np.mean(np.diff(parts) > 0),
            "run_return": np.mean(
                [
                    np.prod(1 + np.array(some)) - 1
                    for some in np.split(np.array(returns), np.cumsum([len(run) for run in runs])[:-1])
                ]
            ),
            "reward": np.mean(rewards),
            "reward_equity": np.mean(rewards),
            "reward_deviation": np.std(rewards),
            "reward_magnitude": np.mean(np.abs(rewards)),
            "reward_skew": pd.Series(rewards).skew(),
        },
    )


@pytest.mark.slow
def test_a_validation_equals_independent_walks_chained_in_time():
    "Across a gap in the history and with runs of unequal length, after costs."
    history, config, (start, stop) = gapped(), GPUEnvConfig(reward_preset="equity"), (4500, 6700)
    validation, policy = (
        Validation(history.span(start, stop), config, torch.device("cpu")),
        ByBar(len(history.timestamp)),
    )
    runs, by_day, expected = walks(history, start, stop, config, policy)
    assert (
        validation.starts.tolist() == [r[0] for r in runs]
        and validation.ends.tolist() == [r[-1] + 1 for r in runs]
        and len({len(r) for r in runs}) > 2
        and len({history.segment[r[0]] for r in runs}) == 2
    )
    found = validation.run(policy)
    assert found.keys() == expected.keys() and found["trades"] > 20
    for name in expected:
        assert math.isclose(found[name], expected[name], rel_tol=2e-3 if name == "sharpe" else 1e-6), (
            name
        )  # one degree of freedom in 1,600
    assert validation.run(policy) == found  # and again
    daily, product = validation.daily(validation.play(policy)), (1 + by_day).groupby(level=0).prod() - 1
    assert (
        daily["days"] == [str(day) for day in product.index]
        and np.allclose(daily["returns"], product, rtol=0, atol=1e-9)
        and daily["bars"] == len(by_day)
    )
    assert math.isclose(daily["sharpe_per_bar"], by_day.mean() / by_day.std(), rel_tol=1e-6)
    assert validation.run(ByBar(len(history.timestamp), 1)) != found


class Seller:
    "Asks to be as short as it can be, at every bar."

    def initial_state(self, n, device):
        return None

    def inputs(self, obs, table):
        return obs.index

    def evaluate_step(self, x, state):
        return F.one_hot(torch.full_like(x, 6), 8).float(), torch.zeros(len(x)), state


@pytest.mark.slow
def test_nobody_comes_back_from_bankruptcy_in_a_validation():
    """Prices rise to 3.5 times over a bar and a short account owes more than it has: the run is over, as in
    a walk; the next ones have nothing to go on with."""
    plain, jump = market(), 5700
    prices, seller = plain.prices.copy(), Seller()
    prices[:4, jump:] *= 3.5
    history = replace(plain, asset_class="equity", prices=prices).span(5500, 6500)
    account = AccountConfig(
        allow_short=True, stop_pct=0.0, max_position_pct=1.0, safety_buffer_pct=0.0, base_alloc=1.0
    )
    validation = Validation(
        history,
        GPUEnvConfig(n_envs=1, asset_class="equity", reward_preset="equity", account=account),
        torch.device("cpu"),
    )
    first, second, *_ = zip(validation.starts.tolist(), validation.ends.tolist())
    assert first[0] < jump < first[1]
    (alone,), _ = replay_and_keep(
        [Run(history.span(first[0], first[1] + 1), account_rules(account, "equity"))],
        lambda number, state: torch.tensor([6]),
    )
    played = validation.play(seller)
    lived, length = len(alone.equity), first[1] - first[0]
    assert (
        alone.bar[0] == first[0] and lived < length and alone.equity[-1] < 0 and alone.bar[-1] == jump - 1
    )  # the walk is over there
    assert (
        math.isclose(
            played["run_return"][0], alone.equity[-1] / account.initial_account_value - 1, rel_tol=1e-9
        )
        and played["run_return"][0] < -1
    )
    for name in ("return", "held", "reward", "order"):
        assert (
            (played[name][lived:length] == 0).all()
            and played[name][:lived].any()
            and played[name][length:].any()
        ), name
    assert (
        played["return"][lived - 1] == -1
        and len(played["return"]) == len(validation.bars)
        and np.isfinite(played["held"]).all()
    )
    figures = validation.summarise(played)
    assert (
        figures["return"] == -1
        and figures["max_drawdown"] == 1
        and all(np.isfinite(v) or name == "profit_factor" for name, v in figures.items())
    )
    assert all(
        (again == played[name]).all() for name, again in validation.play(seller).items()
    )  # nothing is drawn


def test_runs_cover_every_decision_once_and_cross_no_gap():
    history = gapped()
    env = GPUVectorizedTradingEnv(history, GPUEnvConfig(n_envs=1, reward_preset="v2.4.5"))
    for length in (512, 100, None):
        starts, ends = chunks_of(env, length)
        assert (
            np.concatenate([np.arange(a, b) for a, b in zip(starts, ends)]).tolist()
            == env.decision_bars.tolist()
        )
        assert all(history.segment[a] == history.segment[b - 1] for a, b in zip(starts, ends)) and (
            length is None or max(ends - starts) <= length
        )
    assert len(chunks_of(env, None)[0]) == 2


@pytest.mark.slow
def test_validation_always_pays_full_costs():
    "While the training environment still trades for a part of them."
    trainer = trading_trainer(0, market().span(5500, 6500), cost_warm_up=1.0, validation_interval=1)
    full, policy = account_rules(AccountConfig(), "crypto"), ByBar(len(market().timestamp))
    trainer.train(1)
    rules = trainer.env.rules
    assert (
        0 < rules.round_trip < full.round_trip / 2
        and trainer.validation.env.rules == full
        and full.round_trip > 0.005
    )
    own = trainer.validation.run(policy)
    fresh = Validation(market().span(5500, 6500), trainer.env.config, torch.device("cpu")).run(policy)
    free = Validation(
        market().span(5500, 6500),
        replace(trainer.env.config, account=AccountConfig(costs="zero")),
        torch.device("cpu"),
    ).run(policy)
    assert own == fresh and free["return"] > own["return"] + 0.001


@pytest.mark.slow
def test_the_best_policy_by_validation_score_is_kept():
    trainer, kept = (
        trading_trainer(0, market().span(5500, 6500), validation_interval=1, total_timesteps=8 * 16 * 5),
        {},
    )
    sharpe, drawdown = [0.5, 1.9, 2.0, 1.0, 1.9], [0.0, 0.15, 0.30, 0.0, 0.10]

    def summarise(played):
        kept[trainer.update] = copy.deepcopy(trainer.policy.state_dict())
        return scripted_figures(sharpe=sharpe[trainer.update - 1], max_drawdown=drawdown[trainer.update - 1])

    trainer.validation.summarise = summarise
    rows = trainer.train()
    # beyond 15 % each further 15 % of drawdown costs 0.2
    assert np.allclose(
        [r["validation_score"] for r in rows], [0.5, 1.9, 1.8, 1.0, 1.9]
    )  # the first of two equals stays
    assert (
        trainer.best_score == max(r["validation_score"] for r in rows)
        and trainer.best["update"] == 2
        and trainer.best["metrics"]["validation_score"] == trainer.best_score
    )
    assert (
        same(dict(trainer.best["policy_state_dict"]), dict(kept[2]))
        and not same(dict(kept[2]), dict(kept[3]))
        and trainer.best["metrics"]["validation"]["max_drawdown"] == 0.15
    )


@pytest.mark.slow
def test_validation_comes_at_its_interval_and_at_the_end():
    trainer = trading_trainer(
        0, market().span(5500, 6500), validation_interval=2, total_timesteps=8 * 16 * 5, n_epochs=1
    )
    rows = trainer.train()
    assert [r["update"] for r in rows if "validation_score" in r] == [2, 4, 5] and all(
        math.isfinite(r["validation_score"]) for r in rows if "validation_score" in r
    )
    assert (
        trading_trainer(0).train(1)[0].keys() & {"validation_score", "validation_return"} == set()
        and trading_trainer(0).best is None
    )


# --- does it learn? -----------------------------------------------------------------------------------------


def signalled(informative, bars=3000, window=5):
    "A coin-flip market of ±1 % whose next move one broadcast column tells, or does not."
    random, layout = np.random.default_rng(0), LAYOUTS["5.6.0"]
    up = random.choice([-1.0, 1.0], bars)
    close = 100 * np.cumprod(1 + 0.01 * up)
    opening = np.concatenate([close[:1], close[:-1]])
    prices = np.stack(
        [opening, np.maximum(opening, close), np.minimum(opening, close), close, np.full(bars, 1e6)]
    )
    features = random.standard_normal((bars, len(layout.market_columns))).astype(np.float32)
    if informative:
        features[:-1, layout.market_columns.index("rsi")] = up[1:]
    flat, t = np.full(bars, 0.01), np.arange(bars)
    return MarketData(
        "HAND-USD",
        "15Min",
        "crypto",
        "5.6.0",
        window,
        t * 900_000_000_000,
        features,
        prices,
        flat,
        flat,
        np.full(bars, 1e9),
        np.zeros(bars, np.int64),
        t >= window,
        t < bars - 1,
        {},
        {},
    ), up


@pytest.mark.slow
@pytest.mark.parametrize("informative", [True, False])
def test_a_signal_is_learned_and_noise_is_not(informative):
    """On bars never seen: what an oracle earns that buys before each rise and closes before each fall, at
    least nine tenths of it; without the signal next to nothing."""
    history, up = signalled(informative)
    config = GPUEnvConfig(
        n_envs=64,
        window=5,
        episode_length=64,
        reward_preset="equity",
        account=AccountConfig(costs="zero", stop_pct=0, target_pct=0),
    )
    env = GPUVectorizedTradingEnv(history.span(0, 2000), config)
    trainer = NativePPOTrainer(
        env,
        NativePPOConfig(
            hidden_dims=(16,),
            n_steps=16,
            minibatch_size=256,
            n_epochs=4,
            total_timesteps=64 * 16 * 25,
            learning_rate=5e-3,
            gamma=0.5,
            validation_interval=100,
        ),
        progress=None,
    )
    rows = trainer.train()
    validation, oracle = Validation(history.span(2000, 3000), config, torch.device("cpu")), ByBar(3000)
    oracle.actions = torch.as_tensor(np.where(np.append(up[1:], 0) > 0, 3, 7))  # BUY_75%, CLOSE
    earned, best = validation.run(trainer.policy)["return"], validation.run(oracle)["return"]
    assert best > 0.3 and abs(rows[0]["reward"]) < 0.1
    if informative:
        assert earned > 0.9 * best and rows[-1]["reward"] > 0.25
    else:
        assert abs(earned) < 0.25 * best


class CartPole:
    """Barto, Sutton and Anderson 1983, with the constants of Gymnasium's CartPole-v0: 200 steps, ±12
    degrees, ±2.4 units."""

    n_envs, n_actions, obs_dim, device, limit = 16, 2, 4, "cpu", 200

    def __init__(self, bootstrap=True):
        self.bootstrap, self.finished = bootstrap, []

    def _fresh(self):
        return 0.1 * torch.rand(self.n_envs, 4, generator=self.random) - 0.05

    def reset(self, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        self.state, self.steps = self._fresh(), torch.zeros(self.n_envs)
        return self.state

    def step(self, actions):
        x, speed, angle, spin = self.state.unbind(1)
        force, sin, cos = 20.0 * actions - 10.0, angle.sin(), angle.cos()
        push = (force + 0.05 * spin**2 * sin) / 1.1
        turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        after = torch.stack(
            [
                x + 0.02 * speed,
                speed + 0.02 * (push - 0.05 * turn * cos / 1.1),
                angle + 0.02 * spin,
                spin + 0.02 * turn,
            ],
            1,
        )
        self.steps = self.steps + 1
        terminated = (after[:, 0].abs() > 2.4) | (after[:, 2].abs() > 12 * math.pi / 180)
        done = terminated | (self.steps >= self.limit)
        self.finished += self.steps[done].tolist()
        self.state, self.steps = (
            torch.where(done[:, None], self._fresh(), after),
            torch.where(done, 0.0, self.steps),
        )
        if not self.bootstrap:
            terminated = done
        return self.state, torch.ones(self.n_envs), terminated, done & ~terminated, {"final_obs": after}


@pytest.mark.slow
@pytest.mark.parametrize("bootstrap", [True, False])
def test_cartpole_is_balanced_and_its_value_sees_past_the_time_limit(bootstrap):
    """A balanced pole earns 1 / (1 - 0.99) = 100 for ever; where the time limit counts as a fall, no state
    is worth more than (1 - 0.99^200) × 100 = 87."""
    env = CartPole(bootstrap)
    trainer = NativePPOTrainer(
        env,
        NativePPOConfig(
            hidden_dims=(64, 64),
            n_steps=64,
            minibatch_size=256,
            total_timesteps=114_688,
            learning_rate=2.5e-3,
            entropy_coefficient=0.0,
        ),
        progress=None,
    )
    trainer.train()
    with torch.no_grad():
        value = trainer.policy(torch.zeros(1, 4))[1].item()
    assert np.mean(env.finished[:100]) < 50 and np.mean(env.finished[-50:]) > 150
    assert value > 90 if bootstrap else value < 87


def test_a_rollout_of_one_sample_trains_and_is_judged():
    "One account, one step: there is nothing to vary, and nothing that is not a number."
    trainer = NativePPOTrainer(
        trading_env(n_envs=1),
        NativePPOConfig(
            **{**SMALL, "n_steps": 1, "minibatch_size": 1, "total_timesteps": 4, "validation_interval": 2}
        ),
        market().span(5500, 5800),
        progress=None,
    )
    history = trainer.train()
    assert (
        len(history) == 4
        and trainer.best is not None
        and all(
            math.isfinite(v)
            for row in history
            for name, v in row.items()
            if not name.startswith("validation")
        )
    )
    assert all(row["advantage_deviation"] == 0 for row in history) and math.isfinite(
        history[-1]["validation_composite"]
    )


# --- a policy that answers NaN ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "version", ["5.6.0", "2.7.0"]
)  # bars are looked at before they are played, or one after another
def test_a_policy_that_answers_nan_is_not_one_that_holds(version):
    trainer = trading_trainer(0, market(version).span(5500, 6000), version=version)
    trainer.validation.play(trainer.policy)
    first = int(trainer.validation.starts[0])
    assert f"model: logits are not finite at bar {first}, in " in refusal(
        overflowing(trainer).validation.run, trainer.policy
    )


def test_finite_logits_name_the_first_bar():
    logits = torch.zeros(4, 3)
    assert finite_logits(logits, [7, 8, 9, 10]) is logits and finite_logits(logits[:0]).shape == (0, 3)
    logits[2, 1] = math.nan
    logits[3, 0] = -math.inf
    for bars, said in (
        ([7, 8, 9, 10], " at bar 9,"),
        (torch.tensor([7, 8, 9, 10]), " at bar 9,"),
        (np.array(["a", "b", "2024-01-02", "c"]), " at bar 2024-01-02,"),
        (None, " finite,"),
    ):
        message = refusal(finite_logits, logits, bars)
        assert said in message and "in 2 of 4 answers" in message and "\n" not in message


# --- a network from its weights alone -----------------------------------------------------------------------

NETWORKS = [
    dict(hidden_dims=(16, 8)),
    dict(hidden_dims=(8,), shared_trunk=False),
    dict(network="gru", gru_hidden_dim=8, n_gru_layers=1),
    dict(network="gru", gru_hidden_dim=6, n_gru_layers=3),
]


@pytest.mark.parametrize("settings", NETWORKS)
@pytest.mark.parametrize("make", [plain_trainer, trading_trainer])
@pytest.mark.filterwarnings("ignore:checkpoint")
def test_a_network_is_what_its_weights_are(make, settings):
    "Older files say nothing of it; what a file claims beside its weights is not believed."
    trainer = make(**settings)
    content = trainer.content()
    claims = content["config"]["train"] | {
        "hidden_dims": [60_000, 60_000],
        "gru_hidden_dim": 60_000,
        "n_gru_layers": 60_000,
        "shared_trunk": "perhaps",
    }
    x = torch.randn(5, trainer.env.obs_dim, generator=torch.Generator().manual_seed(0))

    def answer(policy):
        return (
            policy(x)
            if settings.get("network") != "gru"
            else policy.evaluate_step(policy.window_inputs(x), policy.initial_state(5))[:2]
        )

    expected = answer(trainer.policy)
    for changes in (
        {},
        {
            "config": content["config"] | {"train": claims},
            "policy_obs_dim": 60_000,
            "policy_n_actions": 60_000,
        },
        {
            "policy_state_dict": {
                f"_orig_mod.module.{name}": v for name, v in content["policy_state_dict"].items()
            }
        },
    ):
        for a, b in zip(answer(build_policy(content | changes)), expected):
            assert torch.equal(a, b) or torch.allclose(
                a, b, rtol=1e-5, atol=1e-6
            )  # folded sums are added up anew
    bare = {"policy_state_dict": content["policy_state_dict"]} | (
        {} if make is plain_trainer else {"model_version": "5.6.0", "obs_dim": trainer.env.obs_dim}
    )
    for a, b in zip(answer(build_policy(bare)), expected):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "state, words",
    [
        (None, "holds no weights"),
        ({}, "holds no weights"),
        ({"linear.weight": torch.zeros(3, 4)}, "no network that this library makes"),
        (
            {"trunk.0.weight": torch.zeros(8, 4), "actor_head.weight": torch.zeros(2, 8)},
            "not those of one network",
        ),
        (
            {
                "trunk.0.weight": torch.zeros(8, 4),
                "trunk.2.weight": torch.zeros(8, 9),
                "actor_head.weight": torch.zeros(2, 8),
            },
            "not those of one network",
        ),
    ],
)
def test_weights_of_no_network_are_one_line(state, words):
    message = refusal(build_policy, {"policy_state_dict": state})
    assert words in message and "\n" not in message and len(message) < 500
