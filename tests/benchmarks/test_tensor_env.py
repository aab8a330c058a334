"""Gymnasium environments on tensors: they are the plain environments and nothing else, a state goes on
bit for bit, and the memory task cannot be solved without memory."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from tensor_env import CueRecall, TensorEnv

from trading_lib.checkpoint import load_checkpoint, save_checkpoint
from trading_lib.config import InputError
from trading_lib.gymnasium_env import TradingVectorEnv
from trading_lib.trainer import NativePPOConfig, NativePPOTrainer


def refusal(make, *arguments, **named) -> str:
    "The one line that a mistake gets."
    with pytest.raises(InputError) as e:
        make(*arguments, **named)
    assert "\n" not in str(e.value)
    return str(e.value)


def random_actions(steps: int, n: int, n_actions: int, seed: int = 0):
    return torch.randint(n_actions, (steps, n), generator=torch.Generator().manual_seed(seed))


# --- the plain environments, and nothing else ---------------------------------------------------------------


@pytest.mark.parametrize(
    "make, n_actions, ends",
    [
        (partial(gym.make, "CartPole-v1", max_episode_steps=25), 2, "both"),
        (partial(gym.make, "Acrobot-v1", max_episode_steps=40), 3, "truncated"),
        (CueRecall, 4, "terminated"),
    ],
)
def test_it_is_the_plain_environments_stepped_one_by_one(make, n_actions, ends):
    "Three environments of Gymnasium's own, seeded with 5, 6 and 7 and reset by hand."
    env, plain, kinds = TensorEnv(make, 3), [make() for _ in range(3)], set()
    assert (
        env.n_envs == 3 and env.n_actions == n_actions and env.obs_dim == plain[0].observation_space.shape[0]
    )
    seen = env.reset(seed=5)
    assert (
        np.array_equal(seen, np.stack([e.reset(seed=5 + i)[0] for i, e in enumerate(plain)]))
        and seen.dtype == torch.float32
    )
    returns, lengths, finished = [0.0] * 3, [0] * 3, []
    for t, actions in enumerate(random_actions(400, 3, n_actions)):
        obs, rewards, terminated, truncated, infos = env.step(actions)
        assert (obs.dtype, rewards.dtype, terminated.dtype, truncated.dtype) == (
            torch.float32,
            torch.float32,
            torch.bool,
            torch.bool,
        )
        for i, e in enumerate(plain):
            theirs, reward, over, cut, _ = e.step(int(actions[i]))
            assert np.array_equal(infos["final_obs"][i], theirs) and (
                rewards[i],
                terminated[i],
                truncated[i],
            ) == (reward, over, cut)
            returns[i] += reward
            lengths[i] += 1
            if over or cut:
                kinds.add("terminated" if over else "truncated")
                finished.append((3 * (t + 1), returns[i], lengths[i]))
                returns[i], lengths[i], theirs = 0.0, 0, e.reset()[0]
            assert np.array_equal(obs[i], theirs)
    assert (
        env.finished == finished
        and len(finished) > 20
        and kinds == ({"terminated", "truncated"} if ends == "both" else {ends})
    )
    assert env.global_step == 1200


def test_a_step_leaves_what_was_handed_out_before_as_it_was():
    "A trainer keeps references to observations."
    env = TensorEnv("CartPole-v1", 4)
    kept = [env.reset(seed=0)]
    copies = [kept[0].clone()]
    for actions in random_actions(60, 4, 2):
        obs, _, _, _, infos = env.step(actions)
        kept += [obs, infos["final_obs"]]
        copies += [obs.clone(), infos["final_obs"].clone()]
    assert all(map(torch.equal, kept, copies))


class Numbered(gym.Env):
    "Observations of two dimensions; actions 3, 4 and 5, and the reward is the action."

    observation_space, action_space = (
        gym.spaces.Box(0, 9, (2, 3), np.float64),
        gym.spaces.Discrete(3, start=3),
    )

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.arange(6.0).reshape(2, 3), {}

    def step(self, action):
        self.t += 1
        return np.arange(6.0).reshape(2, 3) + self.t, action, False, self.t == 2, {}


def test_observations_are_flattened_and_actions_counted_from_zero():
    env = TensorEnv(Numbered, 2)
    assert (env.obs_dim, env.n_actions) == (6, 3) and env.reset().tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert env.step(torch.tensor([0, 2]))[1].tolist() == [3, 5]
    obs, rewards, _, truncated, infos = env.step(torch.tensor([1, 1]))
    assert (
        rewards.tolist() == [4, 4]
        and truncated.all()
        and obs[0].tolist() == [0, 1, 2, 3, 4, 5]
        and infos["final_obs"][1].tolist() == [2, 3, 4, 5, 6, 7]
    )
    assert env.finished == [(4, 7.0, 2), (4, 9.0, 2)]


@pytest.mark.slow
def test_vector_environments_are_taken_as_they_are():
    "Our own trading, which is one: what comes back is what Gymnasium's side shows."
    settings = dict(window=4, episode_length=5, flatten=True)
    env, plain = TensorEnv(TradingVectorEnv(3, **settings)), TradingVectorEnv(3, **settings)
    assert (env.n_envs, env.n_actions, env.obs_dim) == (3, 8, 4 * 58)
    assert np.array_equal(env.reset(seed=1), plain.reset(seed=1)[0])
    ended = 0
    for actions in random_actions(12, 3, 8):
        obs, rewards, terminated, truncated, infos = env.step(actions)
        theirs = plain.step(actions.numpy())
        assert (
            np.array_equal(obs, theirs[0])
            and np.allclose(rewards, theirs[1])
            and np.array_equal(truncated, theirs[3])
        )
        for i in torch.nonzero(terminated | truncated).ravel().tolist():
            assert np.array_equal(infos["final_obs"][i], theirs[4]["final_obs"][i])
            ended += 1
    assert ended >= 6 and not hasattr(env, "load_state_dict")


# --- going on from a state ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    ["CartPole-v1", "Acrobot-v1", partial(gym.make, "MountainCar-v0", max_episode_steps=30), CueRecall],
)
def test_a_state_from_a_checkpoint_goes_on_bit_for_bit(make, tmp_path):
    """From the middle of episodes, over several ends of them, in an environment that has gone elsewhere
    before."""
    env = TensorEnv(make, 4)
    actions = random_actions(700, 4, env.n_actions)
    env.reset(seed=3)
    for a in actions[:137]:
        env.step(a)
    save_checkpoint({"environment_state": env.state_dict()}, tmp_path / "state.pt")
    went_on = [env.step(a) for a in actions[137:]]
    other = TensorEnv(make, 4)
    other.reset(seed=99)
    for a in actions[:20]:
        other.step(a)
    state = load_checkpoint(tmp_path / "state.pt")["environment_state"]
    assert torch.equal(other.load_state_dict(state), state["obs"])
    for a, expected in zip(actions[137:], went_on, strict=True):
        for found, value in zip(other.step(a)[:4], expected):
            assert torch.equal(found, value)
    assert (
        other.finished == env.finished
        and other.global_step == env.global_step == 2800
        and len(env.finished) > (3 if make == "Acrobot-v1" else 20)
    )


@pytest.mark.parametrize(
    "env",
    [
        lambda: TensorEnv(lambda: gym.wrappers.TransformReward(gym.make("CartPole-v1"), lambda r: r), 2),
        lambda: TensorEnv(Numbered, 2),
        lambda: TensorEnv(
            RecordEpisodeStatistics(SyncVectorEnv([CueRecall], autoreset_mode=AutoresetMode.SAME_STEP))
        ),
    ],
)
def test_an_environment_with_hidden_state_offers_none(env):
    assert not hasattr(env(), "state_dict") and not hasattr(env(), "load_state_dict")


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, network",
    [
        ("CartPole-v1", dict(hidden_dims=(16,))),
        (CueRecall, dict(network="gru", gru_hidden_dim=16, n_gru_layers=1)),
    ],
)
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(make, network, tmp_path):
    def trainer():
        return NativePPOTrainer(
            TensorEnv(make, 4),
            NativePPOConfig(
                n_steps=24,
                minibatch_size=48,
                n_epochs=2,
                total_timesteps=96 * 6,
                learning_rate=1e-2,
                **network,
            ),
            progress=None,
        )

    whole, first, second = trainer(), trainer(), trainer()
    whole.train()
    first.train(3)
    first.save(tmp_path / "run.pt")
    second.load(tmp_path / "run.pt")
    second.train()
    assert (
        all(map(torch.equal, whole.policy.parameters(), second.policy.parameters()))
        and second.env.finished == whole.env.finished
        and len(whole.env.finished) > 15
    )


def test_a_state_before_the_first_episode_is_empty():
    assert TensorEnv(CueRecall, 2).state_dict() == {} and "empty" in refusal(
        TensorEnv(CueRecall, 2).load_state_dict, {}
    )


# --- the memory task ----------------------------------------------------------------------------------------


def episode(seed: int, policy=lambda obs: 0, **options):
    "Observations at which it acted, rewards, and what was seen last."
    game = CueRecall()
    obs, _ = game.reset(seed=seed, options=options or None)
    seen, rewards, over = [], [], False
    while not over:
        seen.append(obs)
        obs, reward, over, cut, _ = game.step(policy(obs))
        assert not cut
        rewards.append(reward)
    return np.stack(seen), rewards, obs


def test_the_memory_task_is_a_gymnasium_environment():
    check_env(CueRecall())


def test_a_cue_then_noise_then_the_question():
    delays, cues = set(), []
    for seed in range(300):
        seen, rewards, last = episode(seed)
        assert seen[0, :4].sum() == 1 and seen[0, 4] == 0 and set(seen[0, :4]) == {0, 1}
        assert not seen[1:, :4].any() and not seen[1:-1, 4].any() and seen[-1, 4] == 1 and not last[:5].any()
        assert len(set(seen[:, 5])) == len(seen) and np.abs(seen).max() <= 1
        assert rewards[:-1] == [0] * (len(seen) - 1) and rewards[-1] == seen[0, 0]  # the action was 0
        delays.add(len(seen) - 2)
        cues.append(int(seen[0].argmax()))
    assert delays == {4, 5, 6, 7, 8}
    assert np.abs(np.bincount(cues, minlength=4) - 75).max() < 3 * np.sqrt(300 * 0.25 * 0.75)


def test_nothing_after_the_first_step_depends_on_the_cue():
    """So an action at the question that is a function of what is seen there is independent of the cue,
    which is one of four with equal chances: 1 in 4 is the best."""
    for seed in range(100):
        others = [episode(seed, cue=cue) for cue in range(4)]
        assert all(
            np.array_equal(seen[1:], others[0][0][1:]) and np.array_equal(last, others[0][2])
            for seen, _, last in others
        )
        assert [int(seen[0].argmax()) for seen, _, _ in others] == [0, 1, 2, 3] and np.array_equal(
            episode(seed)[0][1:], others[0][0][1:]
        )  # nor on its being given
        assert (
            sum(
                rewards[-1]
                for _, rewards, _ in (
                    episode(seed, lambda obs: int(4 * (obs[5] + 1) / 2) % 4, cue=cue) for cue in range(4)
                )
            )
            == 1
        )  # any rule wins for one cue of four


SHORT = dict(
    hidden_dims=(32, 32),
    n_steps=64,
    minibatch_size=512,
    n_epochs=4,
    total_timesteps=40_000,
    learning_rate=3e-3,
)


@pytest.mark.slow
def test_a_network_without_memory_learns_no_more_than_to_guess():
    "40,000 steps of PPO, 5,000 episodes; the last 2,000 of which win 25 % with a deviation of 1 %."
    env = TensorEnv(CueRecall, 32)
    NativePPOTrainer(
        env,
        NativePPOConfig(**SHORT),
        progress=None,
    ).train()
    assert abs(np.mean([won for _, won, _ in env.finished[-2000:]]) - 0.25) < 0.04


@pytest.mark.slow
def test_where_nothing_is_to_remember_the_same_network_wins():
    """The flag of the question shows the cue in its place: the trainer and the adapter are not what fails
    above."""

    class Shown(CueRecall):
        def _observe(self):
            obs = super()._observe()
            if self._left == 0:
                obs[self._cue] = 1
            return obs

    env = TensorEnv(Shown, 32)
    NativePPOTrainer(
        env,
        NativePPOConfig(**SHORT),
        progress=None,
    ).train()
    assert np.mean([won for _, won, _ in env.finished[-500:]]) > 0.95


# --- careless use -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: TensorEnv("CartPole-v1"), ["n_envs", "None"]),
        (lambda: TensorEnv("CartPole-v1", 0), ["from 1", "0"]),
        (lambda: TensorEnv("CartPole-v1", 2.5), ["2.5"]),
        (lambda: TensorEnv("CartPol-v1", 2), ["CartPol", "CartPole"]),
        (lambda: TensorEnv(7, 2), ["an id", "7"]),
        (lambda: TensorEnv("Pendulum-v1", 2), ["Discrete"]),
        (lambda: TensorEnv(lambda: gym.make("FrozenLake-v1"), 2), ["Box"]),
        (lambda: TensorEnv(gym.make_vec("CartPole-v1", 2)), ["SAME_STEP", "NEXT_STEP"]),
        (
            lambda: TensorEnv(SyncVectorEnv([CueRecall], autoreset_mode=AutoresetMode.SAME_STEP), 2),
            ["has 1", "was 2"],
        ),
        (lambda: TensorEnv(CueRecall, 2).step(torch.zeros(2).long()), ["reset"]),
        (lambda: CueRecall(1), ["n_cues", "1"]),
        (lambda: CueRecall(delay=(5, 2)), ["delay", "(5, 2)"]),
    ],
)
def test_mistakes_are_named(make, words):
    message = refusal(make)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "actions", [torch.zeros(3).long(), torch.zeros(2), torch.tensor([0, 4]), torch.tensor([-1, 0])]
)
def test_wrong_actions_are_refused(actions):
    env = TensorEnv(CueRecall, 2)
    env.reset(seed=0)
    assert "2 whole numbers from 0 to 3" in refusal(env.step, actions)
