"""The Gymnasium environments: they promise what Gymnasium asks, they are the tensor environment and
nothing else, and a foreign library learns on them.

Gymnasium's and stable-baselines3's own checkers judge the interface, Gymnasium's own SyncVectorEnv the
form of what comes out of many accounts, and paper the sums.
"""

import copy
import functools
import itertools
import pickle
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_match import check_environments_match
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics
from scalar_account import hand_made_market

from trading_lib import gymnasium_env
from trading_lib.bars import validate_bars
from trading_lib.config import AccountConfig, InputError
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data
from trading_lib.features import fit_features
from trading_lib.gymnasium_env import ENV_ID, TradingEnv, TradingVectorEnv, column_bounds
from trading_lib.market import bounds
from trading_lib.market.layouts import LAYOUTS
from trading_lib.sources import simulate_bars, simulate_market

BUY_50, BUY_75, SELL_75, CLOSE = 2, 3, 6, 7
FREE = {"costs": "zero", "stop_pct": 0, "target_pct": 0}


@functools.cache
def simulated(asset_class):
    symbol, last = {"crypto": ("SIM-USD", "2023-01-25"), "equity": ("SIMA", "2023-05-01")}[asset_class]
    return simulate_bars(symbol, "15Min", "2023-01-01", last, seed=3, asset_class=asset_class)


@functools.cache
def market_of(asset_class, version, window=8):
    fit = fit_features(simulated(asset_class)[:1500], version, "15Min", asset_class)
    return market_data(simulated(asset_class), version, fit, "15Min", asset_class, window, "SIM")


def by_hand(close, **changes):
    "A market from prices alone; zeros lie within the bounds of every column."
    market = hand_made_market(close, window=4, **changes)
    return replace(market, features=np.zeros_like(market.features))


def tensors(market, n_envs, **changes):
    config = dict(
        n_envs=n_envs,
        version=market.version,
        window=market.window,
        timeframe=market.timeframe,
        asset_class=market.asset_class,
    )
    return GPUVectorizedTradingEnv(market, GPUEnvConfig(**config | changes))


def refusal(function, *args, **kwargs) -> str:
    "What an InputError says, in one line."
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def warned(function, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    return [str(w.message) for w in caught]


def arrays_in(thing):
    "Every array of a result, however deep."
    if isinstance(thing, np.ndarray):
        yield from (arrays_in(list(thing)) if thing.dtype == object else [thing])
    elif isinstance(thing, (tuple, list)):
        yield from itertools.chain.from_iterable(map(arrays_in, thing))
    elif isinstance(thing, dict):
        yield from itertools.chain.from_iterable(map(arrays_in, thing.values()))


# what others say


@pytest.mark.slow
def test_it_is_made_by_name_alone_in_a_fresh_python_and_nothing_else_here_needs_gymnasium():
    code = """
        import sys, gymnasium as gym
        env = gym.make("trading_lib.gymnasium_env:trading_lib/Trading-v0")
        assert env.reset(seed=0)[0].shape == (100, 58) and env.action_space.n == 8
        envs = gym.make_vec("trading_lib/Trading-v0", num_envs=3, window=5)
        assert type(envs).__name__ == "TradingVectorEnv" and envs.reset(seed=0)[0].shape == (3, 5, 58)
    """
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)], check=True, timeout=120
    )
    users = {
        p.name
        for p in Path(gymnasium_env.__file__).parent.rglob("*.py")
        if "gymnasium" in p.read_text() and p.name != "_modidx.py"
    }
    assert users == {"gymnasium_accounts.py", "gymnasium_env.py", "gymnasium_portfolio.py"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(flatten=True),
        dict(scaled=True, bars=("equity", "5.3.0")),
        dict(bars=("crypto", "2.7.0"), reward_preset="v2.5.0", render_mode="ansi"),
    ],
)
def test_gymnasiums_checker_passes_with_no_remark_but_that_some_columns_have_no_bounds(changes):
    if "bars" in changes:
        changes = changes | {"bars": market_of(*changes["bars"])}
    else:
        changes = {"window": 8} | changes
    remarks = warned(check_env, gym.make(ENV_ID, **changes).unwrapped)
    assert (
        sorted("maximum value is infinity" in r for r in remarks) == [False, True]
        and sum("minimum value is -infinity" in r for r in remarks) == 1
    ), remarks


def test_gymnasiums_wrappers_find_no_fault_in_any_step():
    """The passive checker looks at every observation, reward and info; two makes of one spec are one
    environment."""
    env = gym.make(ENV_ID, bars=market_of("equity", "5.3.0"), episode_length=40)

    def play():
        env.action_space.seed(0)
        env.reset(seed=0)
        for _ in range(150):
            if any(env.step(env.action_space.sample())[2:4]):
                env.reset()

    assert warned(play) == []
    again = gym.make(env.spec)
    check_environments_match(env, again, num_steps=60, seed=4)


def test_stable_baselines_checker_passes_without_a_remark():
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    assert warned(sb3_check_env, gym.make(ENV_ID, bars=market_of("equity", "5.3.0"), flatten=True)) == []
    (remark,) = warned(sb3_check_env, TradingEnv(window=8))  # a table of bars and columns is no picture
    assert "flatten" in remark


def test_registered_environments_say_what_they_are():
    env, envs = gym.make(ENV_ID, window=8), gym.make_vec(ENV_ID, num_envs=3, window=8)
    assert isinstance(env.unwrapped, TradingEnv) and isinstance(envs, TradingVectorEnv) and envs.num_envs == 3
    assert (
        env.observation_space.shape == (8, 58)
        and env.observation_space.dtype == np.float32
        and env.action_space == gym.spaces.Discrete(8)
    )
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert (
        envs.single_observation_space == env.observation_space
        and envs.single_action_space == env.action_space
    )
    assert envs.observation_space == gym.vector.utils.batch_space(
        env.observation_space, 3
    ) and envs.action_space == gym.spaces.MultiDiscrete([8] * 3)
    assert gym.make(ENV_ID, window=8, flatten=True).observation_space.shape == (464,)
    assert (
        env.unwrapped.tensor_env.market.symbol == "SIM-USD"
        and "simulated" in TradingEnv.__doc__
        and "simulated" in TradingVectorEnv.__doc__
    )
    for e in (env, envs, TradingEnv(window=8)):
        e.close()
        e.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "asset_class, timeframe",
    [("crypto", "1Min"), ("equity", "1Hour"), ("equity", "1Day"), ("crypto", "1Day")],
)
def test_the_simulated_market_is_there_for_every_bar_length_and_asset_class(asset_class, timeframe):
    market = TradingEnv(
        window=8, asset_class=asset_class, timeframe=timeframe, version="2.3.0"
    ).tensor_env.market
    assert len(market.timestamp) == 4000 and (market.asset_class, market.timeframe) == (
        asset_class,
        timeframe,
    )


# it is the tensor environment


@pytest.mark.parametrize(
    "asset_class, version, preset",
    [
        ("crypto", "5.6.0", "v2.4.5"),
        ("equity", "5.3.0", "v2.5.0"),
        ("equity", "2.3.0", "differential_sharpe"),
    ],
)
def test_one_account_is_the_tensor_environment_step_for_step(asset_class, version, preset):
    market = market_of(asset_class, version)
    env, reference = (
        TradingEnv(market, episode_length=50, reward_preset=preset),
        tensors(market, 1, episode_length=50, reward_preset=preset),
    )
    random, ends = np.random.default_rng(0), 0
    for episode in range(3):
        if episode == 0:
            observation, info, expected = *env.reset(seed=9), reference.reset(9)
        else:
            start = int(random.choice(env.decision_bars[:500]))
            observation, info, expected = (
                *env.reset(options={"start": start}),
                reference.reset_at([start], [start + 50]),
            )
            assert info["bar"] == start
        assert np.array_equal(observation, expected[0].numpy().reshape(8, -1)) and info["equity"] == 1000
        for _ in range(50):
            action = int(random.integers(env.action_space.n))
            _, reward, terminated, truncated, infos = reference.step(torch.tensor([action]))
            observation, mine, *over, info = env.step(action)
            assert (
                np.array_equal(observation, infos["final_obs"][0].numpy().reshape(8, -1))
                and observation in env.observation_space
            )
            assert (mine, *over) == (reward.item(), terminated.item(), truncated.item()) and [
                type(v) for v in (mine, *over)
            ] == [float, bool, bool]
            account = infos["account"]
            assert (
                info["equity"] == account.equity.item()
                and info["quantity"] == account.quantity.item()
                and info["drawdown"] == account.drawdown.item()
            )
            assert (
                list(info["reward_components"].values()) == infos["reward_components"][0].tolist()
                and list(info["reward_components"]) == reference.reward_names
            )
            assert sum(
                w * info["reward_components"][name] for name, w in env.reward_weights.items()
            ) == pytest.approx(mine, rel=1e-6, abs=1e-7)
            # the infos speak of the bar that the observation ends with
            bar, bars = info["bar"], simulated(asset_class)
            assert (
                info["timestamp"] == bars.index[bar].tz_localize(None)
                and info["price"] == bars["close"].iloc[bar]
            )
            assert np.array_equal(
                observation[-1, np.isin(LAYOUTS[version].columns, LAYOUTS[version].market_columns)],
                market.features[bar],
            )
        ends += truncated.item()
        assert over == [False, True]
    assert ends == 3


def test_many_accounts_are_the_tensor_environment_step_for_step():
    market, n = market_of("equity", "5.3.0"), 6
    envs, reference = TradingVectorEnv(n, market, episode_length=23), tensors(market, n, episode_length=23)
    observations, infos = envs.reset(seed=7)
    assert np.array_equal(observations, reference.reset(7).numpy().reshape(n, 8, -1))
    random, ends = np.random.default_rng(1), 0
    for _ in range(80):
        actions = random.integers(8, size=n)
        expected, reward, terminated, truncated, tensor_infos = reference.step(torch.as_tensor(actions))
        observations, mine, *over, infos = envs.step(actions)
        assert (
            np.array_equal(observations, expected.numpy().reshape(n, 8, -1))
            and observations in envs.observation_space
        )
        assert (
            np.array_equal(mine, reward.numpy())
            and np.array_equal(over[0], terminated.numpy())
            and np.array_equal(over[1], truncated.numpy())
        )
        assert mine.dtype == np.float32 and [v.dtype for v in over] == [bool, bool]
        assert (
            np.array_equal(infos["equity"], reference.account.equity.numpy())
            and np.array_equal(infos["bar"], reference.bar.numpy())
            and infos["_equity"].all()
        )
        done = over[0] | over[1]
        assert ("final_obs" in infos) == ("final_info" in infos) == done.any()
        for i in np.flatnonzero(done):
            ends += 1
            assert np.array_equal(infos["final_obs"][i], tensor_infos["final_obs"][i].numpy().reshape(8, -1))
            assert (
                infos["final_info"]["equity"][i] == tensor_infos["account"].equity[i].item()
                and infos["equity"][i] == 1000
            )
    assert ends == 6 * (80 // 23)


def test_many_accounts_come_out_in_the_form_of_gymnasiums_own_vector_environment():
    """SyncVectorEnv resets in the same step as well: every name, mask, value and type is its; only second
    episodes begin at other random bars."""
    market, lengths, start = market_of("equity", "5.3.0"), np.array([3, 5, 5, 9]), 900
    theirs = SyncVectorEnv(
        [functools.partial(TradingEnv, market, episode_length=int(length)) for length in lengths],
        autoreset_mode="SameStep",
    )
    mine = TradingVectorEnv(4, market)

    def compare(a, b, rows, where):
        assert set(a) == set(b), where
        for name, value in a.items():
            if isinstance(value, dict):
                compare(value, b[name], slice(None) if name == "final_info" else rows, f"{where} {name}")
            elif name == "final_obs":
                assert all(
                    (x is None) == (y is None) and (x is None or np.array_equal(x, y))
                    for x, y in zip(value, b[name], strict=True)
                ), where
            elif name.startswith("_"):
                assert value.dtype == b[name].dtype == bool and np.array_equal(value, b[name]), (where, name)
            elif name == "timestamp":
                assert all(x is None or x == y for x, y in zip(value[rows], b[name][rows], strict=True)), (
                    where,
                    name,
                )  # theirs are objects
            else:
                assert value.dtype == b[name].dtype and np.array_equal(value[rows], b[name][rows]), (
                    where,
                    name,
                )

    (obs, infos), (obs_, infos_) = (
        theirs.reset(seed=0, options={"start": start}),
        mine.reset(seed=0, options={"start": start, "end": start + lengths}),
    )
    assert np.array_equal(obs, obs_)
    compare(infos, infos_, slice(None), "reset")
    for step in range(1, 6):
        actions = np.random.default_rng(step).integers(1, 7, size=4)
        (obs, reward, *over, infos), (obs_, reward_, *over_, infos_) = (
            theirs.step(actions),
            mine.step(actions),
        )
        first, begun = lengths >= step, lengths <= step  # still in the first episode, in the second by now
        assert np.array_equal(over, over_) and over[1].tolist() == (lengths == step).tolist()
        assert np.array_equal(reward[first].astype(np.float32), reward_[first]) and np.array_equal(
            obs[~begun], obs_[~begun]
        )
        compare(infos, infos_, ~begun, f"step {step}")
        assert ("final_obs" in infos_) == (step in (3, 5)) and (infos_["equity"][begun & first] == 1000).all()


def test_gymnasiums_vector_wrappers_work_on_it():
    "Returns and lengths of episodes, counted by Gymnasium, are those of the rewards."
    market = market_of("equity", "5.3.0")
    envs = RecordEpisodeStatistics(TradingVectorEnv(3, market, episode_length=10))
    envs.reset(seed=0)
    total = np.zeros(3)
    for _ in range(10):
        _, rewards, _, truncated, infos = envs.step(envs.action_space.sample())
        total += rewards
    assert (
        truncated.all()
        and infos["episode"]["r"] == pytest.approx(total, abs=1e-5)
        and infos["episode"]["l"].tolist() == [10] * 3
    )
    listed = DictInfoToList(TradingVectorEnv(3, market, episode_length=2))
    one = listed.reset(seed=0)[1]
    assert len(one) == 3 and one[1]["equity"] == 1000 and {"bar", "timestamp", "position"} <= set(one[2])
    listed.step(np.zeros(3, int))
    assert "final_info" in listed.step(np.zeros(3, int))[4][0]


# what leaves is the caller's


@pytest.mark.parametrize(
    "make",
    [
        lambda m: TradingEnv(m, episode_length=12),
        lambda m: TradingVectorEnv(3, m, episode_length=12),
        lambda m: TradingVectorEnv(3, m, episode_length=12, scaled=True, flatten=True),
    ],
)
def test_no_array_is_shared_with_another_step_or_with_the_insides(make):
    "Whoever scribbles over everything that was returned changes nothing that comes later."
    market, random, kept = market_of("equity", "5.3.0"), np.random.default_rng(0), []
    env, torn = make(market), make(market)

    def action():
        return random.integers(8, size=getattr(env, "num_envs", ()))

    for call in range(30):
        a = action()
        results = [e.reset(seed=call) if call % 12 == 0 else e.step(a) for e in (env, torn)]
        mine, theirs = (list(arrays_in(result)) for result in results)
        assert len(mine) == len(theirs) >= 1 and all(map(np.array_equal, mine, theirs))
        for array in theirs:
            array[...] = np.ones_like(array)
        inside = [
            t.numpy()
            for t in (
                *vars(env.tensor_env.account).values(),
                env.tensor_env.bar,
                env.tensor_env.table.features,
            )
        ] + [market.features, market.prices, market.timestamp]
        assert not any(np.shares_memory(x, y) for x in mine for y in [*inside, *kept])
        assert not any(np.shares_memory(x, y) for x, y in itertools.combinations(mine, 2))
        kept += mine


# repeating


def trajectory(env, seed, steps=40):
    out, random = [env.reset(seed=seed)[0]], np.random.default_rng(0)
    for _ in range(steps):
        observation, reward, terminated, truncated, info = env.step(
            random.integers(8) if isinstance(env, TradingEnv) else random.integers(8, size=env.num_envs)
        )
        out.append(np.append(observation.ravel(), reward))
        if isinstance(env, TradingEnv) and (terminated or truncated):
            out.append(env.reset()[0])
    return np.concatenate([o.ravel() for o in out])


@pytest.mark.parametrize(
    "make",
    [
        lambda: TradingEnv(market_of("crypto", "5.5.0"), episode_length=12),
        lambda: TradingVectorEnv(4, market_of("crypto", "5.5.0"), episode_length=12),
    ],
)
def test_a_seed_repeats_everything_and_no_seed_nothing(make):
    first = trajectory(make(), 5)
    env = make()
    assert np.array_equal(trajectory(env, 5), first) and np.array_equal(trajectory(env, 5), first)
    assert not np.array_equal(trajectory(env, 6), first)
    assert len({tuple(np.ravel(make().reset()[1]["bar"])) for _ in range(4)}) > 1  # as Gymnasium has it
    assert trajectory(env, 2**70).shape == first.shape  # any whole number is a seed


def test_episodes_begin_all_over_the_span():
    env = TradingEnv(market_of("crypto", "5.5.0"), episode_length=64)
    starts, last = (
        {int(env.reset(seed=s if s == 0 else None)[1]["bar"]) for s in range(300)},
        env.decision_bars[-1],
    )
    assert len(starts) > 250 and min(starts) < 750 and max(starts) > last - 200 and max(starts) <= last - 60


def test_an_environment_can_be_pickled_and_copied_in_the_middle_of_an_episode():
    for env in (
        TradingEnv(market_of("equity", "5.3.0")),
        TradingVectorEnv(3, market_of("equity", "5.3.0"), episode_length=30),
    ):
        env.reset(seed=1)
        action = BUY_50 if isinstance(env, TradingEnv) else np.array([1, 2, 6])
        for _ in range(20):
            env.step(action)
        others = pickle.loads(pickle.dumps(env)), copy.deepcopy(env)
        for _ in range(30):
            expected = env.step(action)
            for other in others:
                found = other.step(action)
                assert (
                    np.array_equal(found[0], expected[0])
                    and np.array_equal(found[1], expected[1])
                    and np.array_equal(found[4]["equity"], expected[4]["equity"])
                )


# on paper


def test_an_episode_on_paper():
    """1,000 x 0.7 x 0.15 x 0.5 = 52.50 at 100; +2 %: 1.05; BUY_75% at 102 adds 1,001.05 x 0.07875 = 78.83;
    a fall of 1 % costs 1 % of 132.38."""
    env = TradingEnv(
        by_hand([100.0] * 6 + [102.0] + [102.0 * 0.99] * 20),
        account=FREE,
        reward_preset="equity",
        render_mode="ansi",
    )
    _, info = env.reset(options={"start": 5})
    assert (info["bar"], info["equity"], info["position"], info["trades"]) == (
        5,
        1000,
        0,
        0,
    ) and "reward_components" not in info
    _, reward, terminated, truncated, info = env.step(BUY_50)
    assert (
        info["equity"] == pytest.approx(1001.05, abs=1e-9)
        and info["quantity"] == pytest.approx(0.525)
        and info["position"] == pytest.approx(53.55 / 1001.05)
    )
    assert info["price"] == 102 and info["drawdown"] == 0 and info["bar"] == 6
    assert set(info) == {*gymnasium_env.INFOS, "reward_components"}  # each has its meaning written down
    assert info["timestamp"] == np.datetime64(
        1_700_000_100 + 6 * 900, "s"
    )  # 2023-11-14 22:15 and six quarter-hours
    assert env.render() == "2023-11-14 23:45  price 102.00  position +5.3 %  equity 1,001.05"
    # the unit of the equity reward: the share an account may hold, times a bar's volatility of 1 %
    assert reward == pytest.approx(np.log(1.00105) / (0.20 * 0.01), rel=1e-6) and info[
        "reward_components"
    ] == {"equity": pytest.approx(reward)}
    _, _, _, _, info = env.step(BUY_75)
    held = 53.55 + 1001.05 * 0.07875
    assert info["equity"] == pytest.approx(1001.05 - 0.01 * held, abs=1e-9) and info[
        "drawdown"
    ] == pytest.approx(0.01 * held / 1001.05)
    _, _, terminated, truncated, info = env.step(CLOSE)
    assert (
        info["trades"] == 1
        and info["position"] == info["quantity"] == info["costs"] == 0
        and not terminated
        and not truncated
    )


def test_costs_are_told():
    "25 + 1 + 1 basis points of 52.50; without impact."
    env = TradingEnv(by_hand([100.0] * 30), account={"impact_coefficient": 0})
    env.reset(options={"start": 5})
    info = env.step(BUY_50)[4]
    assert info["costs"] == pytest.approx(0.0027 * 52.5) and info["equity"] == pytest.approx(
        1000 - 0.0027 * 52.5
    )


def test_an_account_that_is_bankrupt_has_terminated_and_one_that_is_out_of_time_was_truncated():
    "75 of 1,000 / 10 shares are sold at 10 and stand at 40: 1,750 - 3,000."
    market = by_hand([10.0] * 6 + [40.0] * 20, asset_class="equity")
    bold = dict(costs="zero", stop_pct=0, target_pct=0, safety_buffer_pct=0, base_alloc=1, max_position_pct=1)
    env = TradingEnv(market, account=bold, episode_length=4, reward_preset="equity")
    env.reset(options={"start": 5})
    _, _, terminated, truncated, info = env.step(SELL_75)
    assert (terminated, truncated, info["equity"]) == (True, False, -1250)
    assert "call reset" in refusal(env.step, 0)
    env.reset(options={"start": 5})
    assert [env.step(0)[2:4] for _ in range(4)] == [(False, False)] * 3 + [(False, True)]

    envs = TradingVectorEnv(2, market, account=bold, episode_length=4, reward_preset="equity")
    envs.reset(seed=0, options={"start": 5})
    _, _, terminated, truncated, infos = envs.step(np.array([SELL_75, 0]))
    assert terminated.tolist() == [True, False] and truncated.tolist() == [False, False]
    assert (
        infos["final_info"]["equity"].tolist() == [-1250, 0]
        and infos["_final_info"].tolist() == [True, False]
        and infos["equity"].tolist() == [1000, 1000]
    )
    assert (
        infos["final_obs"][0].shape == (4, 58)
        and infos["final_obs"][1] is None
        and infos["reward_components"]["_equity"].tolist() == [False, True]
    )


def test_no_episode_leaves_its_span():
    """40 bars whose close says where they are: the last bar that is seen, and whose price counts, lies
    before the span's end."""
    market = by_hand(100.0 + np.arange(40))
    env = TradingEnv(market, span=(10, 30), episode_length=1000, reward_preset="equity")
    seen = set()
    for seed in range(30):
        over, (_, info) = False, env.reset(seed=seed)
        while not over:
            seen.add(info["price"])
            _, _, terminated, over, info = env.step(BUY_75)
            assert not terminated
        seen.add(info["price"])
        assert info["price"] == 129
    assert min(seen) == 110 and max(seen) == 129
    assert env.decision_bars.tolist() == list(range(10, 29))
    _, info = env.reset(options={"start": 10, "end": 15})
    assert [env.step(0)[3] for _ in range(5)] == [False] * 4 + [True]
    env.reset(options={"start": 10, "end": 500})  # as far as the span goes
    assert [env.step(0)[3] for _ in range(19)] == [False] * 18 + [True]
    assert (
        TradingEnv(market, episode_length=1000, reward_preset="equity").decision_bars[-1] == 38
    )  # without a span: to the end


# what is seen


def test_bounds_are_named_for_columns_that_exist_and_none_is_promised_that_has_none():
    known = {c for layout in LAYOUTS.values() for c in layout.columns}
    assert set(bounds._BOUNDS_OF) <= known and len(bounds._BOUNDS_OF) == sum(
        len(names.split()) for names in bounds._BOUNDS.values()
    )
    free = known - set(bounds._BOUNDS_OF)
    assert free == {
        "log_returns",
        "volume_proxy",
        "macd",
        "macd_signal",
        "macd_hist",
        "bb_percent_b",
        "zscore_20",
        "zscore_50",
        "zscore_100",
        "h1_momentum",
        "position_pct",
    }
    low, high = column_bounds(LAYOUTS["5.6.0"])
    assert low.dtype == high.dtype == np.float32 and low.shape == high.shape == (58,) and (low < high).all()


WILD = {  # what prices may do at worst
    "up": lambda n: np.exp(0.05 * np.arange(n)),
    "down": lambda n: np.exp(-0.02 * np.arange(n)),
    "flat": lambda n: np.ones(n),
    "jumps": lambda n: np.exp(0.35 * np.random.default_rng(0).choice([-1, 0, 0, 0, 1], n)),
    "calm, then a jump": lambda n: np.where(np.arange(n) % 150 < 149, 1.0, 1.45),
}


@pytest.mark.parametrize("asset_class", ["crypto", "equity"])
@pytest.mark.parametrize("kind", WILD)
def test_observations_of_a_wild_market_keep_the_bounds(asset_class, kind):
    "Closes as extreme as bars may be, opens at the previous close, a volume that comes and goes."
    index = simulated(asset_class).index[:1400]
    close, n = 100 * WILD[kind](1400), 1400
    opening = np.append(close[:1], close[:-1])
    bars = pd.DataFrame(
        {
            "open": opening,
            "high": np.maximum(opening, close),
            "low": np.minimum(opening, close),
            "close": close,
            "volume": 10.0 ** (np.arange(n) % 9),
        },
        index=index,
    )
    rng = np.random.default_rng(1)
    # fitted on ordinary bars: a market that stands still has no states to be fitted
    ordinary = simulated(asset_class)[:1500]
    for version in ("5.3.0", "5.6.0"):
        fit = fit_features(ordinary, version, "15Min", asset_class)
        envs = TradingVectorEnv(16, market_data(bars, version, fit, "15Min", asset_class, 8), scaled=True)
        envs.reset(seed=0)
        assert all(envs.step(rng.integers(8, size=16))[0] in envs.observation_space for _ in range(40))


@pytest.mark.parametrize("asset_class, symbol", [("crypto", "BTC-USDT"), ("equity", "SPY")])
def test_observations_of_a_real_market_keep_the_bounds(real_bars_folder, asset_class, symbol):
    bars = pd.read_parquet(real_bars_folder / asset_class / "15Min" / f"{symbol}.parquet").set_index(
        "timestamp"
    )[["open", "high", "low", "close", "volume"]]
    env = gym.make(
        ENV_ID,
        bars=validate_bars(bars, "15Min", asset_class)[0][:5000],
        asset_class=asset_class,
        version="5.3.0",
        window=8,
    )
    env.reset(seed=0)
    assert all(env.step(env.action_space.sample())[0] in env.observation_space for _ in range(100))


def test_scaled_columns_have_mean_0_and_deviation_1_over_the_training_span():
    bars = simulated("crypto")[:1500]
    env, raw = (
        TradingEnv(bars, version="5.5.0", window=8, scaled=True),
        TradingEnv(bars, version="5.5.0", window=8),
    )
    seen = np.stack([env.reset(seed=0, options={"start": int(bar)})[0][-1] for bar in env.decision_bars[::3]])
    clock = np.isin(
        LAYOUTS["5.5.0"].columns,
        "hour_sin hour_cos weekday_sin weekday_cos month_sin month_cos session_progress".split(),
    )
    assert np.abs(seen[:, ~clock].mean(0)).max() < 0.1 and np.abs(seen[:, ~clock].std(0) - 1).max() < 0.1
    plain = raw.reset(options={"start": 900})[0]
    assert np.array_equal(
        env.reset(options={"start": 900})[0][:, clock], plain[:, clock]
    ) and not np.allclose(env.reset(options={"start": 900})[0], plain)


# where bars come from


def test_bars_may_be_a_frame_market_data_or_a_file(tmp_path):
    bars, market = simulated("crypto"), market_of("crypto", "5.5.0")
    path = market.save(tmp_path / "market.npz")
    fit = fit_features(bars[:1500], "5.5.0", "15Min", "crypto")
    expected = trajectory(TradingEnv(market, episode_length=12), 3)
    for env in (
        gym.make(ENV_ID, bars=str(path), episode_length=12),
        gym.make(ENV_ID, bars=path, version="5.5.0", window=8, episode_length=12),
        gym.make(ENV_ID, bars=bars, fit=fit, version="5.5.0", window=8, episode_length=12),
    ):
        assert np.array_equal(trajectory(env.unwrapped, 3), expected)
    bound = gym.make_vec(ENV_ID, num_envs=4, bars=path, span=(700, 1000))
    assert bound.unwrapped.decision_bars[[0, -1]].tolist() == [
        700,
        995,
    ]  # four bars of reward horizon, and the bars end at 999
    account = AccountConfig(costs="zero", stop_pct=0.01)
    assert (
        gym.make(ENV_ID, bars=market, account=account).unwrapped.tensor_env.config
        == gym.make(
            ENV_ID, bars=market, account={"costs": "zero", "stop_pct": 0.01}
        ).unwrapped.tensor_env.config
    )


def test_gymnasiums_vector_environment_takes_the_single_one():
    envs = gym.make_vec(
        ENV_ID, num_envs=3, vectorization_mode="sync", bars=market_of("equity", "5.3.0"), episode_length=4
    )
    assert isinstance(envs, SyncVectorEnv) and envs.reset(seed=0)[0].shape == (3, 8, 65)
    ends = sum(envs.step(envs.action_space.sample())[3].sum() for _ in range(10))
    assert ends == 6


# showing


def test_the_picture_is_a_picture_and_lines_are_lines():
    env = gym.make(ENV_ID, bars=market_of("equity", "5.3.0"), render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    for _ in range(20):
        env.step(BUY_75)
    second = env.render()
    assert (
        first.dtype == np.uint8
        and first.ndim == 3
        and first.shape[2] == 3
        and second.shape == first.shape
        and (first != second).mean() > 0.005
    )
    env.reset(seed=0)
    assert np.array_equal(env.render(), first)  # the new episode alone
    envs = TradingVectorEnv(2, by_hand([100.0] * 30), render_mode="ansi")
    envs.reset(options={"start": [5, 6]})
    assert envs.render() == (
        "2023-11-14 23:30  price 100.00  position +0.0 %  equity 1,000.00",
        "2023-11-14 23:45  price 100.00  position +0.0 %  equity 1,000.00",
    )
    assert TradingEnv(by_hand([100.0] * 30)).render() is None and "call reset" in refusal(
        TradingEnv(by_hand([100.0] * 30), render_mode="ansi").render
    )


# careless people


@pytest.mark.parametrize(
    "action, words",
    [
        (8, "was 8"),
        (-1, "from 0 to 7 (HOLD, BUY_25%"),
        (1.5, "was 1.5"),
        (None, "was None"),
        ("BUY", "was 'BUY'"),
        (np.array([1]), "was array([1])"),
    ],
)
def test_an_action_that_does_not_exist_is_one_clear_line(action, words):
    env = TradingEnv(by_hand([100.0] * 30))
    env.reset(seed=0)
    assert words in refusal(env.step, action)


@pytest.mark.parametrize(
    "actions, words",
    [
        ([0, 8], "actions are 0 to 7"),
        ([0, -1], "actions are 0 to 7"),
        ([0.0, 1.0], "2 whole-number actions, was float64"),
        ([0], "shape (1,)"),
        (3, "shape ()"),
        (None, "whole-number"),
    ],
)
def test_actions_that_do_not_exist_are_one_clear_line(actions, words):
    envs = TradingVectorEnv(2, by_hand([100.0] * 30))
    assert "call reset" in refusal(envs.step, [0, 0])
    envs.reset(seed=0)
    assert words in refusal(envs.step, actions)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(widnow=8), "TradingEnv: unknown name 'widnow'; did you mean 'window'?"),
        (dict(flaten=True), "did you mean 'flatten'?"),
        (dict(n_envs=4), "unknown name 'n_envs'"),
        (dict(observations="indices"), "unknown name 'observations'"),
        (dict(version="5.6"), "did you mean '5.6.0'?"),
        (dict(window=5000), "a window of 5000"),
        (dict(window=0), "expected 1 or more bars"),
        (dict(reward_preset="v2.4"), "did you mean 'v2.4.5'?"),
        (dict(asset_class="stock"), "asset_class"),
        (dict(account={"cost": "zero"}), "did you mean 'costs'?"),
        (dict(account=3), "account"),
        (dict(render_mode="human"), "ansi or rgb_array"),
        (dict(device="gpu"), "expected cpu"),
        (dict(bars=[1, 2, 3]), "expected a DataFrame of validated bars or MarketData"),
        (dict(bars="nowhere.npz"), "no such file"),
        (dict(bars=pd.DataFrame({"close": [1.0]})), "column open"),
        (dict(bars=by_hand([100.0] * 30), window=8), "made for 4, was 8"),
        (dict(bars=by_hand([100.0] * 30), span=(0, 3)), "no decision can be made"),
        (dict(bars=by_hand([100.0] * 30), span=5), "span: expected two bars"),
        (dict(bars=by_hand([100.0] * 30), span=(0, 99)), "span"),
        (dict(bars=by_hand([100.0] * 30), fit=3), "carries the fit"),
        (dict(bars=by_hand([100.0] * 30), scaled=True), "holds no fit"),
        (dict(bars=hand_made_market([100.0] * 30)), "outside of what its formula allows"),
        (
            dict(bars=replace(by_hand([100.0] * 30), features=np.full((30, 58), np.nan, np.float32))),
            "not finite",
        ),
    ],
)
def test_a_careless_construction_is_one_clear_line(settings, words):
    assert words in refusal(TradingEnv, **settings)
    if "n_envs" not in settings:
        refusal(TradingVectorEnv, 2, **settings)


def test_more_careless_constructions():
    assert "give span only together with market data" in refusal(
        TradingEnv, simulated("crypto"), span=(700, 900), version="5.5.0"
    )
    assert "did you mean 'num_envs'?" in refusal(gym.make_vec, ENV_ID, num_envs=2, n_envs=4)
    for n in (0, -1, 2.5, "3"):
        assert "num_envs: expected a whole number from 1" in refusal(
            TradingVectorEnv, n, by_hand([100.0] * 30)
        )
    assert "did you mean 'window'?" in refusal(gym.make, ENV_ID, windw=8)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"strat": 5}, "did you mean 'start'?"),
        ({"start": 2}, "no episode can start at bar [2]; expected one of decision_bars, from 4 to 25"),
        ({"start": 29}, "no episode"),
        ({"start": 5.0}, "expected a bar"),
        ({"start": [5, 6, 7]}, "expected a bar"),
        ({"end": 9}, "needs a start"),
        ({"start": 9, "end": 9}, "an end after the start"),
        ({"start": "2023-01-01"}, "expected a bar"),
    ],
)
def test_a_careless_reset_is_one_clear_line(options, words):
    market = by_hand([100.0] * 30)
    for env in (TradingEnv(market), TradingVectorEnv(2, market)):
        assert words in refusal(env.reset, options=options)
        assert env.reset(options={"start": 5})[1]["price"] is not None
    assert "one seed for all accounts" in refusal(TradingVectorEnv(2, market).reset, seed=[1, 2])


# a foreign library learns


EDGE = dict(version="5.5.0", window=8, episode_length=128, reward_preset="equity", account=FREE, flatten=True)
PPO_SETTINGS = dict(batch_size=128, n_epochs=6, learning_rate=1e-3, gamma=0.9, seed=0, device="cpu")


TRAINING, LATER = (700, 3300), (3300, 4400)  # bars


@functools.cache
def market_with_an_edge():
    "Drift of a whole volatility per bar, up or down for 200 bars at a time; and which."
    bars, truth = simulate_market("SIM-USD", "15Min", "2023-01-01", "2023-02-20", seed=1, edge=1.0)
    return market_data(
        bars, "5.5.0", fit_features(bars[: TRAINING[1]], "5.5.0", "15Min", "crypto"), "15Min", "crypto", 8
    ), truth["state"].to_numpy()


def mean_reward(policy):
    "Reward per bar of one walk through the later bars; a policy sees the observation, and an oracle the bar."
    env = gym.make(ENV_ID, bars=market_with_an_edge()[0], span=LATER, **EDGE)
    observation, info = env.reset(seed=0, options={"start": LATER[0], "end": LATER[1]})
    rewards, over = [], False
    while not over:
        observation, reward, terminated, truncated, info = env.step(policy(observation, info["bar"]))
        rewards.append(reward)
        over = terminated or truncated
    assert len(rewards) == LATER[1] - LATER[0] - 1
    return float(np.mean(rewards))


@functools.cache
def yardsticks():
    "A random policy, one that always holds all it may, and one that knows the state."
    random, state = np.random.default_rng(0), market_with_an_edge()[1]
    return (
        mean_reward(lambda o, bar: int(random.integers(8))),
        mean_reward(lambda o, bar: BUY_75),
        mean_reward(lambda o, bar: BUY_75 if state[bar] > 0 else CLOSE),
    )


def has_learned(model):
    "On bars after those that it was trained on."
    trained, (random, holding, oracle) = (
        mean_reward(lambda o, bar: int(model.predict(o, deterministic=True)[0])),
        yardsticks(),
    )
    print(
        f"\nreward per bar: trained {trained:.3f}, random {random:.3f}, buy and hold {holding:.3f}, "
        f"oracle {oracle:.3f}"
    )
    return (
        trained > random + 0.5 * (oracle - random)
        and trained > holding + 0.5 * (oracle - holding)
        and 0.2 < oracle
    )


@pytest.mark.slow
def test_ppo_of_stable_baselines_learns_on_the_registered_environment():
    from stable_baselines3 import PPO

    env = gym.make(ENV_ID, bars=market_with_an_edge()[0], span=TRAINING, **EDGE)
    assert has_learned(PPO("MlpPolicy", env, n_steps=512, **PPO_SETTINGS).learn(3072))


def as_sb3(envs):
    "stable-baselines3 has a vector interface of its own."
    from stable_baselines3.common.vec_env import VecEnv

    class Adapter(VecEnv):
        def __init__(self):
            super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

        def reset(self):
            return envs.reset()[0]

        def step_async(self, actions):
            self.actions = actions

        def step_wait(self):
            observations, rewards, terminated, truncated, infos = envs.step(self.actions)
            out = [{"TimeLimit.truncated": bool(t and not e)} for t, e in zip(truncated, terminated)]
            for i in np.flatnonzero(infos.get("_final_obs", ())):
                out[i]["terminal_observation"] = infos["final_obs"][i]
            return observations, rewards, terminated | truncated, out

        def close(self):
            envs.close()

        def get_attr(self, name, indices=None):
            return [getattr(envs, name)] * envs.num_envs

        def set_attr(self, name, value, indices=None):
            raise NotImplementedError

        def env_method(self, name, *args, indices=None, **kwargs):
            raise NotImplementedError

        def env_is_wrapped(self, wrapper, indices=None):
            return [False] * envs.num_envs

    return Adapter()


@pytest.mark.slow
def test_ppo_of_stable_baselines_learns_on_the_vector_environment():
    from stable_baselines3 import PPO

    envs = gym.make_vec(ENV_ID, num_envs=16, bars=market_with_an_edge()[0], span=TRAINING, **EDGE)
    envs.reset(seed=0)
    assert has_learned(PPO("MlpPolicy", as_sb3(envs), n_steps=64, **PPO_SETTINGS).learn(6144))
