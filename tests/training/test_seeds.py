"""Several seeds at once: each is the run it would be alone."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from prepared import prepare
from scipy import stats
from test_pipeline import edit

from trading_lib.checkpoint import load_checkpoint
from trading_lib.cli import main
from trading_lib.config import InputError
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data, split_bounds
from trading_lib.features import fit_features
from trading_lib.networks import NativeActorCritic, clip_gradients, parameter_groups
from trading_lib.policy.factory import build_policy
from trading_lib.seeds import SeedsTrainer, StackedActorCritic, clip_each, mean_interval
from trading_lib.sources import simulate_bars
from trading_lib.trainer import Diverged, NativePPOConfig, NativePPOTrainer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = NativePPOConfig(
    hidden_dims=[16, 8],
    n_steps=24,
    minibatch_size=100,
    n_epochs=3,
    total_timesteps=24 * 12 * 20,
    learning_rate=3e-3,
    validation_interval=2,
)
SEEDS = [5, 0, 11]
ACCOUNT = "5.3.0"  # a layout with columns of the account


@pytest.fixture(scope="module")
def markets():
    "Version -> the same bars as it sees them; those of 5.6.0 are of the market alone."
    bars = simulate_bars("SIM-USD", "15Min", "2022-01-01", "2022-02-21", seed=3, edge=0.2)
    spans = split_bounds(len(bars), 0.7, 0.2)
    made = {
        version: market_data(
            bars,
            version,
            fit_features(bars.iloc[slice(*spans["train"])], version, "15Min", "crypto"),
            "15Min",
            "crypto",
            8,
        )
        for version in ("5.6.0", ACCOUNT)
    }
    return {
        version: {name: market.span(*spans[name]) for name in ("train", "validation")}
        for version, market in made.items()
    }


def env_of(markets, n_envs, version="5.6.0", **options):
    "Episodes of ten bars: every rollout cuts some, and begins others."
    return GPUVectorizedTradingEnv(
        markets[version]["train"],
        GPUEnvConfig(n_envs=n_envs, version=version, window=8, **({"episode_length": 10} | options)),
    )


def trained(markets, config, updates=4, version="5.6.0", validated=True):
    "Several at once, and each of them alone."
    market = markets[version]["validation"] if validated else None
    together = SeedsTrainer(env_of(markets, 12 * len(SEEDS), version), config, SEEDS, market, progress=None)
    alone = [
        NativePPOTrainer(env_of(markets, 12, version), replace(config, seed=seed), market, progress=None)
        for seed in SEEDS
    ]
    for trainer in (together, *alone):
        trainer.train(updates)
    return together, alone


def largest_difference(a, b) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters()))


# --- the environment ----------------------------------------------------------------------------------------


def test_a_group_of_accounts_is_an_environment_of_its_own(markets):
    groups, own = env_of(markets, 12 * 3), [env_of(markets, 12) for _ in SEEDS]
    actions, ended = torch.Generator().manual_seed(0), 0
    seen, alone = groups.reset_index(SEEDS), [env.reset_index(seed) for env, seed in zip(own, SEEDS)]
    for step in range(60):
        assert torch.equal(seen.index, torch.cat([obs.index for obs in alone]))
        action = torch.randint(groups.n_actions, (36,), generator=actions)
        if step == 30:  # from a file, into an environment that had another seed
            state, groups = groups.state_dict(), env_of(markets, 12 * 3)
            groups.reset(99)
            groups.load_state_dict(state)
        seen, reward, _, truncated, _ = groups.step_index(action)
        steps = [env.step_index(of) for env, of in zip(own, action.split(12))]
        alone = [step[0] for step in steps]
        assert torch.equal(reward, torch.cat([step[1] for step in steps]))
        ended += int(truncated.sum())
    assert ended > 100
    with pytest.raises(InputError, match="36 accounts cannot be divided into 5 equal groups"):
        groups.reset([1, 2, 3, 4, 5])


# --- the same numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version, settings",
    [
        ("5.6.0", {}),
        ("5.6.0", dict(shared_trunk=False, value_clip_range=0.1)),
        ("5.6.0", dict(minibatch_size=10**6, cost_warm_up=0.5)),
        ("account", dict(shared_trunk=False)),
        ("account", {}),
        ("5.6.0", dict(n_steps=300, minibatch_size=1000, total_timesteps=300 * 12 * 8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "defaults",
)
def test_each_seed_is_the_run_it_would_be_alone(markets, version, settings):
    version = ACCOUNT if version == "account" else version
    together, alone = trained(markets, replace(CONFIG, **settings), version=version)
    assert {trainer.learner.whole_bars for trainer in (together, *alone)} == {
        "n_steps" in settings
    }  # as many samples as bars: those of a bar are learnt from together
    for k, single in enumerate(alone):
        policy = together.policy.network(k)
        begun = NativePPOTrainer(env_of(markets, 12, version), single.config, progress=None).policy
        assert (
            largest_difference(policy, single.policy) < 2e-5 < 2e-3 < largest_difference(begun, single.policy)
        )  # they have moved a hundred times as far
        assert largest_difference(policy, alone[k - 1].policy) > 0.01  # and another seed's is another
        mine = together.collector.buffer["action"][:, 12 * k : 12 * k + 12]
        assert torch.equal(mine, single.collector.buffer["action"]) and torch.equal(
            together.collector.buffer["index"][:, 12 * k : 12 * k + 12], single.collector.buffer["index"]
        )
        assert len(together.histories[k]) == len(single.history) == 4
        for row, of_one in zip(together.histories[k], single.history):
            assert set(of_one) >= {
                "policy_loss",
                "kl",
                "entropy",
                "explained_variance",
                "reward",
                "reward_pnl",
            } and row == pytest.approx(of_one, rel=1e-3, abs=1e-5)
        assert together.bests[k]["update"] == single.best["update"] and together.bests[k]["metrics"][
            "validation"
        ] == pytest.approx(single.best["metrics"]["validation"], rel=1e-3, abs=1e-5)
        assert [row["days"] for row in together.each_validations[k]] == [
            row["days"] for row in single.validations
        ]


def test_in_bfloat16_each_seed_is_near_the_run_it_would_be_alone(markets):
    "Nearer than float32 is: roundings of single products, not another update."
    together, alone = trained(markets, replace(CONFIG, amp=True), updates=1, validated=False)
    _, exact = trained(markets, CONFIG, updates=1, validated=False)
    for k, (single, other) in enumerate(zip(alone, exact)):
        assert (
            largest_difference(together.policy.network(k), single.policy)
            < 1e-4
            < largest_difference(single.policy, other.policy)
        )


def test_the_mean_is_what_is_shown(markets):
    together, _ = trained(markets, CONFIG, updates=2)
    row = together.history[-1]
    for name in ("entropy", "kl", "validation_sharpe", "explained_variance"):
        assert row[name] == pytest.approx(np.mean([history[-1][name] for history in together.histories]))
    assert (
        row["update"] == 2 and row["timesteps"] == 2 * 24 * 12 == together.histories[1][-1]["timesteps"]
    )  # of each seed


def test_gradients_are_clipped_one_network_at_a_time():
    policies = [NativeActorCritic(6, 3, [5, 4]) for _ in range(3)]
    stack = StackedActorCritic(policies)
    groups = stack.groups(1e-3)
    of_all = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        * torch.tensor([0.01, 1.0, 100.0]).view(-1, *[1] * (p.ndim - 1))
        for i, p in enumerate(stack.stacked)
    ]
    for p, gradient in zip(stack.stacked, of_all):
        p.grad = gradient.clone()
    norms = clip_each(groups, 0.5)
    for k, policy in enumerate(policies):
        for p, gradient in zip(policy.parameters(), of_all):
            p.grad = gradient[k].clone()
        assert float(clip_gradients(parameter_groups(policy, 1e-3), 0.5)) == pytest.approx(
            float(norms[k]), rel=1e-5
        )
        for p, stacked in zip(policy.parameters(), stack.stacked):
            torch.testing.assert_close(stacked.grad[k], p.grad)
    assert norms[0] < 0.5 < norms[1] < norms[2]  # one of them was left as it was


# --- what comes out -----------------------------------------------------------------------------------------


def test_each_best_policy_is_a_file_that_plays_as_it_was_judged(markets, tmp_path):
    together, alone = trained(markets, CONFIG)
    paths = together.save(tmp_path)
    assert [path.name for path in paths] == ["seed_000005.pt", "seed_000000.pt", "seed_000011.pt"]
    for path, seed, single in zip(paths, SEEDS, alone):
        content = load_checkpoint(path)
        assert (
            content["config"]["train"]["seed"] == seed
            and content["config"]["train"]["n_envs"] == content["config"]["env"]["n_envs"] == 12
        )
        judged = {
            name: value for name, value in content["metrics"]["validation"].items() if name != "composite"
        }  # which is of the training's course too
        assert single.validation.run(build_policy(content)) == pytest.approx(judged, rel=1e-3, abs=1e-5)
    with pytest.raises(InputError, match="holds no state to go on from"):
        alone[0].load(paths[0])
    with pytest.raises(InputError, match="several seeds at once cannot go on"):
        together.load(paths[0])


def test_results_are_of_the_best_policies(markets):
    together, _ = trained(markets, CONFIG)
    out, values = (
        together.results("sharpe")["sharpe"],
        [best["metrics"]["validation"]["sharpe"] for best in together.bests],
    )
    assert (
        out["seeds"] == values
        and out["mean"] == pytest.approx(sum(values) / 3)
        and (out["least"], out["most"]) == (min(values), max(values))
    )
    assert tuple(out["interval_95"].values()) == pytest.approx(
        stats.t.interval(0.95, 2, np.mean(values), stats.sem(values)), rel=1e-3
    )
    json.dumps(together.results())


def test_the_interval_is_students_and_holds_what_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4_000, 60))
    for n in (2, 3, 8, 31, 32, 60):
        assert mean_interval(draws[0, :n]) == pytest.approx(
            stats.t.interval(0.95, n - 1, draws[0, :n].mean(), stats.sem(draws[0, :n])), rel=2e-3
        ), n
    low, high = np.array([mean_interval(row[:5]) for row in draws]).T
    assert ((low < 3) & (3 < high)).mean() == pytest.approx(
        0.95, abs=0.012
    )  # 3.5 standard errors of 4,000 draws
    with pytest.raises(InputError, match="one value has no interval"):
        mean_interval([1.0])


def test_nan_is_named_with_its_seed(markets, monkeypatch):
    env = env_of(markets, 36)
    trainer = SeedsTrainer(env, CONFIG, SEEDS, progress=None)
    trainer.train(1)
    plain = env.step_index

    def step(actions):
        obs, reward, *rest = plain(actions)
        reward[25] = torch.nan
        return obs, reward, *rest

    monkeypatch.setattr(env, "step_index", step)
    with pytest.raises(
        Diverged, match="update 2 the rewards became nan, first of account 1 of seed 11 at step 0"
    ):
        trainer.train(1)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(network="gru"), "network: expected 'mlp' with several seeds, was 'gru'"),
        (dict(target_kl=0.01), "target_kl: expected None with several seeds"),
        (dict(separate_optimizers=True), "separate_optimizers"),
        (dict(critic_epochs=2), "critic_epochs_in_force: expected 0"),
        (dict(early_stop=True), "early_stop"),
        (dict(recovery=True), "recovery"),
        (dict(patience=3), "patience"),
        (dict(amp=True, amp_dtype="fp16"), "expected 'bf16'"),
        (dict(n_envs=7), r"n_envs = 3 seeds × 7, was 36"),
    ],
)
def test_what_would_make_seeds_part_ways_is_refused(markets, change, message):
    with pytest.raises(InputError, match=message):
        SeedsTrainer(env_of(markets, 36), replace(CONFIG, **change), SEEDS, progress=None)


@pytest.mark.parametrize(
    "seeds, message",
    [
        ([1, 2, 1], "different"),
        ([], "one or more"),
        (0, "one or more"),
        ([-1, 0, 11], "from 0 on"),
        (5, "5 seeds × equally many, was 36"),
    ],
)
def test_misused_seeds(markets, seeds, message):
    with pytest.raises(InputError, match=message):
        SeedsTrainer(env_of(markets, 36), CONFIG, seeds, progress=None)


def test_what_one_seed_may_ask_for_and_several_need_not(markets):
    """A tier that compiles, and critic epochs that are none: settings stay what they were, so the ledger
    counts a checkpoint once."""
    trainer = SeedsTrainer(
        env_of(markets, 36),
        replace(CONFIG, compile=True, critic_epochs=0, checkpoint_interval=2),
        SEEDS,
        progress=None,
    )
    trainer.train(1)
    assert trainer.config.compile and trainer.update == 1


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_trains_what_train_would_and_leaves_models_alone(tmp_path, monkeypatch, capsys):
    for name in ("params.yaml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    edit(
        tmp_path / "params.yaml",
        **{
            "data.start": "2023-01-01",
            "data.end": "2023-01-25",
            "features.window": 20,
            "train.device": "cpu",
            "train.hidden_dims": [8],
            "train.iterations": 6,
            "train.n_envs": 8,
            "train.n_steps": 32,
            "train.amp": False,
        },
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRADING_LIB_PROGRESS", "quiet")
    prepare()
    assert main(["seeds", "SIM-USD", "--seeds", "3"]) == 0
    shown, report = capsys.readouterr().out, tmp_path / "reports" / "SIM-USD_15Min" / "own"
    content = json.loads((report / "seeds.json").read_text())
    assert (
        content["seeds"] == [0, 1, 2]
        and (report / "seeds.png").read_bytes().startswith(b"\x89PNG")
        and not list(tmp_path.glob("models/**/*.pt"))
    )
    at = [line.split()[0] for line in shown.splitlines()].index("seed,")
    assert [line.split()[0] for line in shown.splitlines()[at:]] == [
        "seed,",
        "0,",
        "1,",
        "2,",
        "mean",
        "95",
        "validation",
        "written",
        "ledger",
    ]
    assert main(["train", "SIM-USD", "--seed", "1"]) == 0
    alone = json.loads((report / "train.json").read_text())
    assert content["best_updates"][1] == alone["best_update"] and content["validation"]["sharpe"]["seeds"][
        1
    ] == pytest.approx(alone["best"]["sharpe"], rel=1e-3)
    told = re.search(r"ledger of SIM-USD: (\d+) new trials, (\d+) in all", capsys.readouterr().out)
    seen = re.search(r"ledger of SIM-USD: (\d+) new trials, (\d+) in all", shown)
    assert (
        int(seen[1]) == 3 * len(content["course"][0]) and int(told[1]) == 0 and told[2] == seen[2]
    )  # the same checkpoints of the same seed are no new trials
    assert (
        main(["seeds", "SIM-USD", "--seeds", "1"]) == 2
        and "--seeds: expected 2 or more, was 1" in capsys.readouterr().err
    )
    assert (
        main(["seeds", "SIM-USD", "--n-envs", "100000000"]) == 2
        and "8 at once would take" in capsys.readouterr().err
    )


def test_a_stop_ends_the_command_and_says_so(tmp_path, monkeypatch, capsys):
    "Of two symbols the second is not begun; what an earlier study left is not shown as this one's."
    for name in ("params.yaml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    edit(
        tmp_path / "params.yaml",
        **{
            "symbols": ["SIM-USD", "SIMB-USD"],
            "data.start": "2023-01-01",
            "data.end": "2023-01-25",
            "features.window": 20,
            "train.device": "cpu",
            "train.hidden_dims": [8],
            "train.iterations": 40,
            "train.n_envs": 8,
            "train.n_steps": 32,
        },
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRADING_LIB_PROGRESS", "quiet")
    prepare()
    plain = NativePPOTrainer._learn

    def interrupted(self, rollout):
        if self.update == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, rollout)

    monkeypatch.setattr(NativePPOTrainer, "_learn", interrupted)
    report = tmp_path / "reports" / "SIM-USD_15Min" / "own"
    for at, said in (
        (7, "stopped after update 8 of 40: what follows is of an unfinished study"),
        (0, "stopped before the first validation"),
    ):
        assert main(["seeds", "--seeds", "2"]) == 143
        shown = capsys.readouterr().out
        assert said in shown and "SIMB-USD" not in shown and (report / "seeds.json").exists() == (at == 7)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["seeds"]) == 2 and "start it without torchrun" in capsys.readouterr().err
