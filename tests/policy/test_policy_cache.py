"""What is known of bars before an account is there, beside the policy that is asked at every step."""

import pytest
import torch
from small_trainers import market, trading_trainer
from test_layers import difference

from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, Obs
from trading_lib.networks import FoldedInputs, NativeActorCritic
from trading_lib.policy.cache import FirstLayerCache, PolicyOutputCache
from trading_lib.seeds import SeedsTrainer, StackedActorCritic
from trading_lib.training.config import NativePPOConfig
from trading_lib.training.rollout import RolloutCollector
from trading_lib.training.validation import Validation


@pytest.mark.parametrize("version", ["5.6.0", "2.7.0"])
@pytest.mark.parametrize(
    "settings", [dict(), dict(shared_trunk=False, hidden_dims=(32, 16))], ids=["shared", "separate"]
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_what_is_known_of_all_bars_is_what_the_policy_computes(version, settings, dtype, tolerance):
    t = trading_trainer(0, market(version).span(5500, 5700), version=version, **settings)
    with torch.no_grad():
        for p in t.policy.parameters():
            p.add_(
                0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            )  # a new head says nothing
        inputs = FoldedInputs(t.policy, t.table, dtype)
        bars = range(t.env.market.start + t.env.market.window, t.env.market.stop)
        obs = t.env.reset_index(3)
        for _ in range(20):
            obs, *_ = t.env.step_index(
                torch.randint(t.env.n_actions, (t.env.n_envs,))
            )  # accounts that own something
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            table = (
                FirstLayerCache(t.policy, inputs, bars)
                if inputs.n_account
                else PolicyOutputCache([t.policy], inputs, bars)
            )
            found, expected = table(obs), t.policy.evaluate(inputs(obs))
        assert (
            all(difference(*pair) < tolerance for pair in zip(found, expected))
            and float(expected[0].std()) > 1e-3
        )
        other = Obs(obs.index.roll(1), obs.dense)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            assert (
                difference(table(other)[0], expected[0]) > 2 * tolerance
            )  # of other bars it would be something else
        if inputs.n_account:
            assert difference(table(Obs(obs.index, obs.dense + 1.0))[0], expected[0]) > 2 * tolerance


def rollouts(
    monkeypatch, make
) -> tuple[
    dict, dict, list
]:  # with what is known of bars, without, and how many bars the network was shown each time
    "Two rollouts from the same beginning."
    shown, look = [], PolicyOutputCache._look_at
    monkeypatch.setattr(
        PolicyOutputCache, "_look_at", lambda self, k, bars: (shown.append(len(bars)), look(self, k, bars))[1]
    )
    out = []
    for most in (10**9, 0):
        monkeypatch.setattr(RolloutCollector, "cache_bytes", most)
        t = make()
        t.collector.begin()
        out.append({name: v.clone() for name, v in t._rollout().items()})
    return *out, shown


def assert_same(fast: dict, plain: dict):
    """The same actions; values, advantages and returns to rounding.

    The values of episodes that were cut among them.
    """
    assert set(fast) == set(plain)
    for name in ("index", "action", "ended"):
        assert torch.equal(fast[name], plain[name]), name
    for name in set(fast) - {"index", "action", "ended"}:
        assert difference(fast[name], plain[name]) < 1e-4, name
    cut = fast["ended"] == 2
    assert int(cut.sum()) > 10 and difference(fast["next_value"][cut], plain["next_value"][cut]) < 1e-4


@pytest.mark.parametrize("settings", [dict(), dict(shared_trunk=False)], ids=["shared", "separate"])
def test_a_rollout_with_it_is_the_rollout_without(monkeypatch, settings):
    fast, plain, shown = rollouts(
        monkeypatch, lambda: trading_trainer(0, market().span(5500, 5700), n_steps=1400, **settings)
    )
    assert_same(fast, plain)
    assert shown == [5500 - 99]  # 11,200 samples: all bars once


@pytest.mark.parametrize(
    "settings", [dict(), dict(shared_trunk=False, hidden_dims=(32, 16))], ids=["shared", "separate"]
)
def test_a_short_rollout_looks_at_the_bars_that_it_comes_to_and_at_no_others(monkeypatch, settings):
    """Episodes of twelve bars end again and again in it, and begin at bars that were not known before.

    Each bar is shown to the network once.
    """
    fast, plain, shown = rollouts(monkeypatch, lambda: trading_trainer(0, n_steps=64, **settings))
    assert_same(fast, plain)
    visited, after_cut = (
        set(fast["index"].flatten().tolist()),
        set((fast["index"][fast["ended"] > 0] + 1).tolist()),
    )
    following = set((fast["index"][-1] + 1).tolist())
    assert (
        5 < len(shown) < 12
        and len(visited | after_cut) <= sum(shown) <= len(visited | after_cut | following) + 8
    )  # and at the end eight accounts begin anew at most


def test_no_bar_is_shown_twice(monkeypatch):
    t, shown, look = trading_trainer(0), [], PolicyOutputCache._look_at
    monkeypatch.setattr(
        PolicyOutputCache,
        "_look_at",
        lambda self, k, bars: (shown.append((bars + 99).tolist()), look(self, k, bars))[1],
    )
    answers = PolicyOutputCache(
        [t.policy], t.runner.inputs, range(99, 5500), ends=lambda: torch.tensor([900, 807])
    )
    for first, left in (([800, 803], 5), ([798, 806], 4), ([800, 802], 9), ([900, 807], 3)):
        answers(Obs(torch.tensor(first), torch.empty(2, 0)), left)
    assert shown == [
        [800, 801, 802, 803, 804, 805, 806, 807],
        [798, 799],
        [900],
    ]  # the third time there is nothing to ask, though not all of what follows is known
    taken = sum(v.nbytes for v in (answers._row, answers._logits, answers._values))
    assert (
        4 * (5401 + 11 * 9)
        <= taken
        <= PolicyOutputCache.bytes(t.policy, range(99, 5500), 11)
        == 4 * (5401 + 22 * 9)
    )


@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("bar", [199, 300])
def test_a_bar_of_another_range_is_an_error(networks, bar):
    "With several networks too, where the answers of the next one lie behind."
    t = trading_trainer(0)
    answers = PolicyOutputCache([t.policy] * networks, t.runner.inputs, range(200, 300))
    answers(Obs(torch.tensor([200, 299] * networks), torch.empty(2 * networks, 0)))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        answers(Obs(torch.tensor([250, bar] + [250] * (2 * networks - 2)), torch.empty(2 * networks, 0)))


def test_an_account_that_ends_before_its_time_begins_where_nobody_expected_it(monkeypatch):
    "A terminated episode is the case that no plan knows of."

    def make():
        t = trading_trainer(0, n_steps=64)
        step = t.env.step_index

        def ruined(actions):
            obs, reward, terminated, truncated, infos = step(actions)
            lost = torch.arange(8) == int(actions.sum()) % 8  # somebody, whoever it is
            t.env.bar = torch.where(lost, 200 + 7 * (infos["final_obs"].index % 500), t.env.bar)
            t.env.end = torch.where(lost, t.env.bar + 5, t.env.end)
            return Obs(t.env.bar, obs.dense), reward, terminated | lost, truncated & ~lost, infos

        t.env.step_index = ruined
        return t

    fast, plain, shown = rollouts(monkeypatch, make)
    assert_same(fast, plain)
    assert int((fast["ended"] == 1).sum()) == 64 and len(shown) > 40


@pytest.mark.parametrize("n_steps", [64, 2000])
def test_several_seeds_know_their_bars_each_by_its_own_network(monkeypatch, n_steps):
    def make():
        env = GPUVectorizedTradingEnv(
            market().span(0, 5500), GPUEnvConfig(n_envs=18, episode_length=12, reward_preset="equity")
        )
        return SeedsTrainer(
            env,
            NativePPOConfig(hidden_dims=(16,), n_steps=n_steps, minibatch_size=48, total_timesteps=10**6),
            3,
            progress=None,
        )

    fast, plain, shown = rollouts(monkeypatch, make)
    assert_same(fast, plain)
    assert shown == [5500 - 99] * 3 if n_steps == 2000 else len(shown) % 3 == 0


@pytest.mark.parametrize("version", ["5.6.0", "2.7.0"])
@pytest.mark.parametrize("networks", [1, 3])
def test_validation_plays_what_the_policy_says_at_every_step(monkeypatch, version, networks):
    policies = [trading_trainer(seed, version=version).policy for seed in range(networks)]
    with torch.no_grad():
        for policy in policies:
            policy.actor_head.weight.mul_(1000)  # clear decisions: rounding changes none
    policy = policies[0] if networks == 1 else StackedActorCritic(policies)
    config = GPUEnvConfig(n_envs=1, version=version, episode_length=12, reward_preset="equity")
    validation = Validation(market(version).span(5500, 6500), config, torch.device("cpu"), networks)
    known = validation.play_each(policy)
    monkeypatch.setattr(
        Validation,
        "_acting",
        lambda self, policy: (
            lambda obs, state: policy.evaluate_step(policy.inputs(obs, self.env.table), state)[::2]
        ),
    )
    plain = validation.play_each(policy)
    assert len(known) == len(plain) == networks
    for a, b in zip(known, plain):
        assert a.keys() == b.keys() and len(a["return"]) == len(validation.bars) and a["order"].any()
        for name in a:
            assert (a[name] == b[name]).all(), name
    if networks > 1:
        assert (known[0]["return"] != known[1]["return"]).any()


def test_what_is_known_of_all_bars_takes_no_more_than_a_minibatch():
    """Which is not there meanwhile: 5.6.0 has 3 columns that change along the window and 55 that do not, 8
    actions and a value."""
    t = trading_trainer(0, n_steps=1400, minibatch_size=100, hidden_dims=(32, 16))
    assert t.collector.cache_bytes == 4 * 100 * (3 * t.env.config.window + 55 + 3 * (32 + 16 + 8 + 1))
    assert (
        trading_trainer(0, n_steps=1400, minibatch_size=10**9, hidden_dims=(32, 16)).collector.cache_bytes
        == t.collector.cache_bytes // 100 * t.env.n_envs * 1400
    )  # the whole rollout at most


def test_a_network_that_reads_whole_windows_is_validated_too():
    "As one is that was made without a layout; it is asked at every step."
    t = trading_trainer(0)
    with torch.no_grad():
        t.policy.input_shift.zero_(), t.policy.input_scale.fill_(1.0), t.policy.actor_head.weight.mul_(1000)
    plain = NativeActorCritic(t.env.obs_dim, t.env.n_actions, (16,))
    plain.load_state_dict(
        {name: v for name, v in t.policy.state_dict().items() if not name.startswith("input_")}
    )
    validation = Validation(
        market().span(5500, 5800), GPUEnvConfig(n_envs=1, reward_preset="equity"), torch.device("cpu")
    )
    folded, found = validation.run(t.policy), validation.run(plain)
    assert found == pytest.approx(folded, rel=1e-3, abs=1e-5)


def test_a_cut_episode_is_valued_by_its_own_last_observation():
    "Not by the first of the episode that follows: against the policy on every last observation, one by one."
    t = trading_trainer(0, market().span(5500, 5700), n_steps=300)
    t.collector.begin()
    step, seen = t.env.step_index, []
    t.env.step_index = lambda actions: (
        lambda out: (seen.append((out[3].clone(), out[4]["final_obs"])), out)[1]
    )(step(actions))
    rollout = t._rollout()
    checked = 0
    for at, (truncated, final) in enumerate(seen):
        for account in (truncated & (rollout["ended"][at] == 2)).nonzero().flatten().tolist():
            with torch.no_grad():
                value = t.policy.evaluate(
                    t.runner.inputs(
                        Obs(final.index[account : account + 1], final.dense[account : account + 1])
                    )
                )[1]
            assert abs(float(value) - float(rollout["next_value"][at, account])) < 1e-4
            checked += 1
    assert checked > 10
