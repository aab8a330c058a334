"""The benchmark on reference tasks: its figures on paper, two sides that are alike, and the numbers that are
kept."""

import functools
import importlib
import itertools
import json
import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import log_softmax

from trading_lib.training.ppo import generalized_advantages, learning_rate_at

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("scipy.stats")


@pytest.fixture
def benchmark(monkeypatch):
    "The benchmark's module, as its workers import it."
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("reference_tasks")


# --- steps to the threshold ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returns, threshold, expected",
    [
        ([1, 2, 3, 4], 3.0, 4),  # means of three: 2 after three episodes, 3 after four
        ([1, 2, 3, 4], 2.0, 3),
        ([1, 2, 3, 4], 3.1, None),
        ([9, 9], 1.0, None),
        ([9, 0, 0, 9, 9], 3.0, 3),
        ([-5, -3, -1], -3.0, 3),
        ([-5.5, -3, -1], -3.0, None),
    ],
)
def test_episodes_until_a_mean_of_three_is_reached(benchmark, returns, threshold, expected):
    assert (
        benchmark.episodes_to_threshold(
            [(10 * (i + 1), r, 1) for i, r in enumerate(returns)], threshold, episodes=3
        )
        == expected
    )


def test_the_mean_is_over_the_last_hundred_episodes(benchmark):
    finished = [(i + 1, 0.0) for i in range(50)] + [(i + 51, 1.0) for i in range(150)]
    assert (
        benchmark.episodes_to_threshold(finished, 0.95) == 50 + 95
        and benchmark.episodes_to_threshold(finished, 1.0) == 150
        and benchmark.episodes_to_threshold(finished[:99], 0.0) is None
    )
    rows = benchmark.curve(finished)
    assert rows[0] == [100, 0.5] and rows[-1] == [200, 1.0] and len(rows) <= 60


# --- statistics ---------------------------------------------------------------------------------------------


def share_of_splits(ours, theirs) -> float:
    """Of all ways to deal these numbers to two sides, the share in which ours beat theirs in at least as many
    pairs as they did: the definition of the exact test."""
    both, n = np.array(ours + theirs), len(ours)
    wins = (both[:, None] > both[None]) * 1.0

    def count(chosen):
        return wins[np.ix_(chosen, np.setdiff1d(np.arange(len(both)), chosen))].sum()

    found = count(np.arange(n))
    return float(np.mean([count(np.array(c)) >= found for c in itertools.combinations(range(len(both)), n)]))


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ([1, 4, 6, 9, 12], [2, 3, 5, 7, 8]),
        ([10, 11, 12, 13, 14], [1, 2, 3, 4, 5]),
        ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]),
        ([3, 8, 20, 21, 30, 31], [1, 2, 4, 22, 25, 29]),
    ],
)
def test_p_is_the_share_of_all_splits_that_are_as_bad(benchmark, ours, theirs):
    c = benchmark.compared(ours, theirs)
    assert math.isclose(c["p"], share_of_splits(ours, theirs), rel_tol=1e-9) and (c["ours"], c["theirs"]) == (
        np.median(ours),
        np.median(theirs),
    )


def test_more_steps_than_theirs_give_a_small_p_and_fewer_a_large_one(benchmark):
    slow, fast = list(range(200, 300, 10)), list(range(100, 200, 10))
    assert (
        math.isclose(benchmark.compared(slow, fast)["p"], 1 / math.comb(20, 10), rel_tol=1e-9)
        and benchmark.compared(slow, fast)["ratio"] == 245 / 145
    )
    assert (
        math.isclose(benchmark.compared(fast, slow)["p"], 1.0)
        and benchmark.compared(fast, slow)["ratio"] == 145 / 245
    )


def test_p_with_ties_is_the_normal_approximation_on_paper(benchmark):
    "The budget, 9, is what three of ours and one of theirs came to."
    ours, theirs = [5, 9, 9, 9], [3, 4, 6, 9]
    u = sum((a > b) + 0.5 * (a == b) for a in ours for b in theirs)
    assert u == 2 + 3 * 3.5  # 5 beats 3 and 4; each 9 beats three and draws with one
    deviation = math.sqrt(4 * 4 / 12 * (9 - (4**3 - 4) / (8 * 7)))  # four nines are tied
    expected = 0.5 * math.erfc((u - 8 - 0.5) / deviation / math.sqrt(2))
    assert math.isclose(benchmark.compared(ours, theirs)["p"], expected, rel_tol=1e-9)


# --- the bars -----------------------------------------------------------------------------------------------


def results_of(benchmark, ours, theirs, reached=True, **changed):
    def part(steps, settings, reached):
        runs = [{"seed": i, "steps": s, "reached": reached, "curve": []} for i, s in enumerate(steps)]
        return {"settings": settings, "runs": runs}

    settings = benchmark.TASKS["CartPole-v1"]
    return {
        "CartPole-v1": {
            "ours": part(ours, settings, reached),
            "peers": part(theirs, settings | changed, True),
        }
    }


def test_what_misses_a_bar(benchmark):
    def misses(*sides, **changed):
        return benchmark.misses(results_of(benchmark, *sides, **changed), "CartPole-v1")

    near = list(range(100, 200, 10))
    assert misses(near, [s + 1 for s in near]) == [] and misses([s / 2 for s in near], near) == []
    assert any("1.60 times" in w for w in misses([1.6 * s for s in near], near))
    worse = misses([s + 101 for s in near], [s + 1 for s in near])
    assert any("significantly" in w for w in worse)
    assert any("never reached" in w for w in misses(near, near, reached=False))
    assert any("other settings" in w for w in misses(near, near, gamma=0.5)) and any(
        "no runs" in w for w in benchmark.misses({}, "CartPole-v1")
    )


# --- two sides that are alike -------------------------------------------------------------------------------


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("task", ["CartPole-v1", "Acrobot-v1"])
def test_both_sides_have_the_same_networks_and_the_same_settings(benchmark, task):
    pytest.importorskip("stable_baselines3")
    settings = benchmark.TASKS[task]
    ours, theirs = benchmark.our_trainer(task, settings, 0), benchmark.peer_model(task, settings, 0)

    def shapes(module):
        return sorted(tuple(p.shape) for p in module.parameters())

    # gains √2, 0.01 and 1: a matrix with orthonormal rows or columns has the norm √(smaller side)
    def norms(module):
        return sorted(round(float(p.detach().norm()), 4) for p in module.parameters() if p.ndim == 2)

    assert shapes(ours.policy) == shapes(theirs.policy)
    assert norms(ours.policy) == norms(theirs.policy) and not any(
        p.any() for m in (ours.policy, theirs.policy) for p in m.parameters() if p.ndim == 1
    )
    assert {type(m) for m in theirs.policy.mlp_extractor.modules()} >= {
        torch.nn.ReLU
    } and torch.nn.Tanh not in {type(m) for m in theirs.policy.modules()}
    own, adam = ours.config, theirs.policy.optimizer.defaults
    assert (
        len(ours.optimizers) == 1
        and adam["eps"] == ours.optimizers[0].defaults["eps"] == 1e-5
        and adam["betas"] == ours.optimizers[0].defaults["betas"]
        and adam["weight_decay"] == 0
    )
    assert (
        own.n_steps,
        own.minibatch_size,
        own.n_epochs,
        own.gamma,
        own.gae_lambda,
        own.entropy_coefficient,
        own.value_coefficient,
        own.max_grad_norm,
        own.clip_range,
    ) == (
        theirs.n_steps,
        theirs.batch_size,
        theirs.n_epochs,
        theirs.gamma,
        theirs.gae_lambda,
        theirs.ent_coef,
        theirs.vf_coef,
        theirs.max_grad_norm,
        theirs.clip_range(1.0),
    )
    assert (
        own.value_clip_range is theirs.clip_range_vf is own.target_kl is theirs.target_kl is None
        and own.critic_epochs_in_force == 0
        and theirs.normalize_advantage
        and theirs.n_envs == ours.env.n_envs == settings["n_envs"]
    )


@pytest.mark.parametrize("task", ["CartPole-v1", "Acrobot-v1"])
def test_the_same_steps_make_the_same_advantages_and_the_same_update(benchmark, monkeypatch, task):
    "The peer acts, with ends and time limits on the way; ours is given its weights and its actions."
    pytest.importorskip("stable_baselines3")
    monkeypatch.setitem(benchmark.MAKERS, task, functools.partial(gym.make, task, max_episode_steps=20))
    rollout = benchmark.TASKS[task]["n_envs"] * benchmark.TASKS[task]["n_steps"]
    settings = benchmark.TASKS[task] | dict(
        minibatch_size=rollout, total_timesteps=rollout
    )  # one batch: its order does not matter
    ours, theirs = benchmark.our_trainer(task, settings, 5), benchmark.peer_model(task, settings, 5)
    names = {
        "actor_trunk": "mlp_extractor.policy_net",
        "critic_trunk": "mlp_extractor.value_net",
        "actor_head": "action_net",
        "critic_head": "value_net",
    }

    def weights():
        state = theirs.policy.state_dict()
        return {
            name: state[names[name.split(".")[0]] + "." + name.split(".", 1)[1]].clone()
            for name in ours.policy.state_dict()
        }

    first = weights()
    ours.policy.load_state_dict(first)
    _, callback = theirs._setup_learn(rollout)
    theirs.collect_rollouts(theirs.env, callback, theirs.rollout_buffer, settings["n_steps"])
    theirs._update_current_progress_remaining(rollout, rollout)
    buffer = {
        name: torch.tensor(getattr(theirs.rollout_buffer, name))
        for name in ("observations", "actions", "values", "log_probs", "advantages", "returns")
    }
    actions, rows, obs = buffer["actions"].squeeze(2).long(), [], ours.env.reset(5)
    with torch.no_grad():
        for t in range(settings["n_steps"]):
            assert torch.equal(obs, buffer["observations"][t])
            (logits, value), (after, reward, terminated, truncated, infos) = (
                ours.policy(obs),
                ours.env.step(actions[t]),
            )
            rows.append(
                (
                    obs,
                    logits,
                    value,
                    reward,
                    ours.policy(infos["final_obs"])[1],
                    terminated,
                    terminated | truncated,
                )
            )
            obs = after
    dense, logits, value, reward, next_value, terminated, done = map(torch.stack, zip(*rows))
    assert terminated.any() == (task == "CartPole-v1") and (done & ~terminated).any()
    assert torch.allclose(value, buffer["values"], atol=1e-5)
    assert torch.allclose(
        log_softmax(logits, 2).gather(2, actions[:, :, None]).squeeze(2), buffer["log_probs"], atol=1e-5
    )
    advantage = generalized_advantages(
        reward, value, next_value, terminated, done, settings["gamma"], settings["gae_lambda"]
    )
    assert torch.allclose(advantage, buffer["advantages"], atol=1e-4) and torch.allclose(
        advantage + value, buffer["returns"], atol=1e-4
    )
    theirs.train()
    ours._learn(
        {
            "dense": dense,
            "action": actions,
            "log_probability": buffer["log_probs"],
            "logits": log_softmax(logits, 2),
            "value": value,
            "reward": reward,
            "advantage": advantage,
            "return": advantage + value,
        }
    )
    moved, apart = (
        math.sqrt(sum(float(((a[name] - b[name]) ** 2).sum()) for name in first))
        for a, b in ((weights(), first), (weights(), ours.policy.state_dict()))
    )
    assert moved > 1e-2 and apart < 3e-3 * moved, (
        moved,
        apart,
    )  # theirs divides advantages by a deviation with n - 1, 0.2 % more at 256


def test_the_peer_has_our_learning_rates(benchmark):
    pytest.importorskip("stable_baselines3")
    settings = benchmark.TASKS["CartPole-v1"] | dict(total_timesteps=8 * 32 * 40, n_epochs=1)
    model, seen = benchmark.peer_model("CartPole-v1", settings, 0), []
    model.learn(
        settings["total_timesteps"],
        callback=lambda local, _: (
            seen.append((model.num_timesteps, model.policy.optimizer.param_groups[0]["lr"])) or True
        ),
    )
    # what the update after rollout u used is seen at the first step of the next one
    used = [rate for step, rate in seen if step > 256 and step % 256 == 8]
    assert np.allclose(used, [learning_rate_at(u, 40, 1e-3) for u in range(39)], rtol=1e-12)


def test_budgets_are_whole_updates(benchmark):
    for settings in benchmark.TASKS.values():
        assert settings["total_timesteps"] % (settings["n_envs"] * settings["n_steps"]) == 0
    assert (
        benchmark.TASKS["CueRecall"]["total_timesteps"] <= 100_000
        and len(benchmark.SEEDS) == len(set(benchmark.SEEDS)) == 30
    )
    assert min(b - a for a, b in itertools.pairwise(benchmark.SEEDS)) > max(
        s["n_envs"] for s in benchmark.TASKS.values()
    )  # no two environments of different runs begin alike


# --- a command that was cut ---------------------------------------------------------------------------------


def test_a_cut_command_goes_on_and_keeps_what_others_measured(benchmark, monkeypatch, tmp_path):
    settings = benchmark.TASKS["CartPole-v1"] | dict(total_timesteps=5120, hidden_dims=[8], threshold=15.0)
    for name, value in dict(
        RESULTS=tmp_path / "r.json", SEEDS=(0, 100), TASKS={"CartPole-v1": settings}
    ).items():
        monkeypatch.setattr(benchmark, name, value)
    done = {"seed": 0, "steps": 123, "reached": True, "seconds": 1.0, "curve": [[123, 15.0]]}
    peers = {"settings": settings, "versions": {}, "machine": "another", "runs": [done]}
    benchmark.write(benchmark.RESULTS, {"CartPole-v1": {"peers": peers}})
    now = {
        "settings": settings,
        "versions": benchmark.versions("ours", settings),
        "machine": f"{benchmark.processor()}, one thread on one core a run",
    }
    benchmark.write(tmp_path / "r.ours.unfinished.json", {"CartPole-v1": {"ours": {**now, "runs": [done]}}})
    benchmark.train("ours", ["CartPole-v1"], 1)
    kept = json.loads(benchmark.RESULTS.read_text())["CartPole-v1"]
    assert (
        kept["peers"] == peers
        and kept["ours"]["runs"][0] == done
        and [r["seed"] for r in kept["ours"]["runs"]] == [0, 100]
        and not (tmp_path / "r.ours.unfinished.json").exists()
    )
    fresh = kept["ours"]["runs"][1]
    assert (
        fresh["reached"]
        and 100 * 8 < fresh["steps"] < 5120
        and fresh["steps"] == fresh["curve"][-1][0]
        and fresh["curve"][-1][1] >= 15.0
    )  # a random push lasts for about 22 steps
    assert len([line for line in benchmark.RESULTS.read_text().splitlines() if '"seed"' in line]) == 3


# --- what is kept -------------------------------------------------------------------------------------------


def kept():
    return json.loads((ROOT / "benchmarks" / "results" / "reference_tasks.json").read_text())


@pytest.mark.parametrize("side, packages", [("ours", ["trading_lib"]), ("peers", ["stable-baselines3"])])
@pytest.mark.parametrize("task", ["CartPole-v1", "Acrobot-v1", "CueRecall"])
def test_the_kept_numbers_are_complete(benchmark, task, side, packages):
    part, settings = kept()[task][side], benchmark.TASKS[task]
    assert part["settings"] == settings and part["machine"]
    wanted = ["python", "torch", "numpy", "gymnasium", *packages] + (
        ["sb3-contrib"] if (task, side) == ("CueRecall", "peers") else []
    )
    assert all(part["versions"][name][0].isdigit() for name in wanted)
    assert [r["seed"] for r in part["runs"]] == list(benchmark.SEEDS)
    for r in part["runs"]:
        assert (
            0 < r["steps"] <= settings["total_timesteps"]
            and r["steps"] % settings["n_envs"] == 0
            and r["seconds"] > 0
        )
        steps, means = zip(*r["curve"])
        assert list(steps) == sorted(steps)
        if r["reached"]:
            assert (
                steps[-1] == r["steps"]
                and means[-1] >= settings["threshold"] - 5e-4
                and max(means[:-1]) < settings["threshold"] + 5e-4
            )
        else:
            assert r["steps"] == settings["total_timesteps"] and max(means) < settings["threshold"]
    assert len({r["steps"] for r in part["runs"]}) > 20  # different runs


@pytest.mark.parametrize("task", ["CartPole-v1", "Acrobot-v1", "CueRecall"])
def test_the_kept_numbers_pass_the_bars(benchmark, task):
    assert benchmark.misses(kept(), task) == []


def test_the_picture_is_there():
    assert (ROOT / "docs" / "reference_tasks.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
