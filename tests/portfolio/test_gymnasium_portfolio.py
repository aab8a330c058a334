"""The portfolio's Gymnasium environments: they promise what Gymnasium asks, and they are the tensor
environment and nothing else.

Gymnasium's and stable-baselines3's own checkers judge the interface, and Gymnasium's own SyncVectorEnv the
form of what comes out of many accounts; it has no checker for those."""

import copy
import functools
import pickle
import subprocess
import sys
import textwrap
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_match import check_environments_match
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from trading_lib.config import InputError
from trading_lib.data.simulated_panel import simulate_panel
from trading_lib.gymnasium_portfolio import ENV_ID, INFOS, PortfolioEnv, PortfolioVectorEnv, portfolio_bounds
from trading_lib.market.layouts import get_layout
from trading_lib.portfolio.market import portfolio_market
from trading_lib.portfolio.panel import PortfolioPanel
from trading_lib.portfolio_env import GPUPortfolioEnv, PortfolioConfig

EQUAL_WEIGHT = 4


@functools.cache
def market(assets: int = 5):
    return portfolio_market(simulate_panel(assets, years=2, seed=4))


def refusal(function, *args, **kwargs) -> str:
    "What an InputError says, in one line."
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def warned(function, *args) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    return [str(w.message) for w in caught]


# --- what others say ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_made_by_name_alone_in_a_fresh_python():
    code = """
        import gymnasium as gym
        env = gym.make("trading_lib.gymnasium_portfolio:trading_lib/Portfolio-v0")
        assert env.reset(seed=0)[0].shape == (64,) and env.action_space.n == 12
        envs = gym.make_vec("trading_lib/Portfolio-v0", num_envs=3)
        assert type(envs).__name__ == "PortfolioVectorEnv" and envs.reset(seed=0)[0].shape == (3, 64)
        assert envs.unwrapped.tensor_env.market.symbol == "simulated"
    """
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)], check=True, timeout=120
    )


@pytest.mark.parametrize("changes", [{}, dict(scaled=True, fill="next_open", render_mode="ansi")])
def test_gymnasiums_checker_passes_with_no_remark_but_that_some_columns_have_no_bounds(changes):
    remarks = warned(check_env, gym.make(ENV_ID, panel=market(), **changes).unwrapped)
    assert sorted("maximum value is infinity" in r for r in remarks) == [False, True], remarks
    assert sum("minimum value is -infinity" in r for r in remarks) == 1


def test_gymnasiums_wrappers_find_no_fault_in_any_step():
    env = gym.make(ENV_ID, panel=market(), episode_length=40, frictions="reference")

    def play():
        env.action_space.seed(0)
        env.reset(seed=0)
        for _ in range(150):
            if any(env.step(env.action_space.sample())[2:4]):
                env.reset()

    assert warned(play) == []
    check_environments_match(env, gym.make(env.spec), num_steps=60, seed=4)


def test_stable_baselines_checker_passes_without_a_remark():
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    assert warned(checker.check_env, gym.make(ENV_ID, panel=market())) == []


@pytest.mark.slow
def test_ppo_of_stable_baselines_trains_on_it():
    "2,000 steps over the simulated universe: every weight is finite and has moved."
    ppo = pytest.importorskip("stable_baselines3").PPO
    env = gym.make(ENV_ID, scaled=True, episode_length=64, reward_preset="excess_equal_weight")
    model = ppo("MlpPolicy", env, n_steps=250, batch_size=125, n_epochs=2, seed=0, device="cpu")
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(2_000)
    assert model.num_timesteps == 2_000
    assert all(p.isfinite().all() for p in model.policy.parameters())
    assert sum(bool((p != old).any()) for p, old in zip(model.policy.parameters(), before)) == len(before)
    observation, over = env.reset(seed=1)[0], False
    while not over:
        action = model.predict(observation, deterministic=True)[0]
        observation, _, terminated, truncated, info = env.step(int(action))
        over = terminated or truncated
    assert truncated and info["equity"] > 0


# --- it is the tensor environment ---------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["log_return", "differential_sharpe"])
def test_one_account_is_the_tensor_environment_step_for_step(preset):
    settings = dict(episode_length=50, reward_preset=preset, frictions="reference")
    env = PortfolioEnv(market(), **settings)
    reference = GPUPortfolioEnv(market(), PortfolioConfig(n_envs=1, **settings))
    random, close = np.random.default_rng(0), market().panel.close
    observation, info = env.reset(seed=9)
    expected = reference.reset(9)
    assert np.array_equal(observation, expected[0].numpy()) and info["equity"] == 100_000
    for _ in range(50):
        action = int(random.integers(12))
        _, reward, terminated, truncated, infos = reference.step(torch.tensor([action]))
        observation, mine, *over, info = env.step(action)
        assert np.array_equal(observation, infos["final_obs"][0].numpy())
        assert observation in env.observation_space
        assert (mine, *over) == (reward.item(), terminated.item(), truncated.item())
        assert [type(v) for v in (mine, *over)] == [float, bool, bool]
        account, bar = infos["account"], info["bar"]
        assert (info["equity"], info["regime"]) == (account.equity.item(), action)
        assert info["costs"] == account.costs.item()
        # the infos speak of the close that is seen
        assert info["timestamp"] == market().timestamp[bar].astype("datetime64[ns]")
        held = account.units[0].numpy() * close[bar] / account.equity.item()
        assert info["weights"] == pytest.approx(held, abs=1e-12)
        assert info["cash"] + info["weights"].sum() == pytest.approx(1, abs=1e-12)
        assert set(info) == {*INFOS, "reward_components"}
        assert info["reward_components"] == {preset: mine}
    assert over == [False, True]
    assert "no episode is running" in refusal(env.step, 0)


def test_many_accounts_are_the_tensor_environment_step_for_step():
    n, settings = 6, dict(episode_length=23, frictions="reference")
    envs = PortfolioVectorEnv(n, market(), **settings)
    reference = GPUPortfolioEnv(market(), PortfolioConfig(n_envs=n, **settings))
    assert np.array_equal(envs.reset(seed=7)[0], reference.reset(7).numpy())
    random, ends = np.random.default_rng(1), 0
    for _ in range(80):
        actions = random.integers(12, size=n)
        expected, reward, terminated, truncated, theirs = reference.step(torch.as_tensor(actions))
        observations, mine, *over, infos = envs.step(actions)
        assert np.array_equal(observations, expected.numpy()) and observations in envs.observation_space
        assert np.array_equal(mine, reward.numpy()) and mine.dtype == np.float32
        assert np.array_equal(over, [terminated.numpy(), truncated.numpy()])
        assert np.array_equal(infos["equity"], reference.account.equity.numpy())
        done = over[0] | over[1]
        assert ("final_obs" in infos) == ("final_info" in infos) == done.any()
        for i in np.flatnonzero(done):
            ends += 1
            assert np.array_equal(infos["final_obs"][i], theirs["final_obs"][i].numpy())
            assert infos["final_info"]["equity"][i] == theirs["account"].equity[i].item()
            assert infos["equity"][i] == 100_000 and infos["weights"][i].sum() == 0
    assert ends == 6 * (80 // 23)


def compare(theirs: dict, mine: dict, rows, where: str):
    "Names, masks, types, shapes, and values where both speak of the same days."
    assert set(theirs) == set(mine), where
    for name, value in theirs.items():
        own = mine[name]
        if isinstance(value, dict):
            compare(value, own, slice(None) if name == "final_info" else rows, f"{where} {name}")
        elif name == "final_obs":
            assert [v is None for v in value] == [v is None for v in own], where
            assert all(np.array_equal(v, o) for v, o in zip(value, own) if v is not None), where
        elif name == "timestamp":  # theirs are objects
            assert all(v is None or v == o for v, o in zip(value[rows], own[rows])), where
        else:
            assert value.dtype == own.dtype and value.shape == own.shape, (where, name)
            assert np.array_equal(value[rows], own[rows]), (where, name)


def test_many_accounts_come_out_in_the_form_of_gymnasiums_own_vector_environment():
    "SyncVectorEnv resets in the same step as well; only second episodes begin on other random days."
    lengths, start = np.array([3, 5, 5, 9]), 150
    one = [functools.partial(PortfolioEnv, market(), episode_length=int(length)) for length in lengths]
    theirs, mine = SyncVectorEnv(one, autoreset_mode="SameStep"), PortfolioVectorEnv(4, market())
    assert mine.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert mine.observation_space == theirs.observation_space and mine.action_space == theirs.action_space
    obs, infos = theirs.reset(seed=0, options={"start": start})
    obs_, infos_ = mine.reset(seed=0, options={"start": start, "end": start + lengths})
    assert np.array_equal(obs, obs_)
    compare(infos, infos_, slice(None), "reset")
    for step in range(1, 6):
        actions = np.random.default_rng(step).integers(1, 12, size=4)
        (obs, reward, *over, infos), (obs_, reward_, *over_, infos_) = (
            theirs.step(actions),
            mine.step(actions),
        )
        first, begun = lengths >= step, lengths <= step  # still in the first episode, in the second by now
        assert np.array_equal(over, over_) and over[1].tolist() == (lengths == step).tolist()
        assert np.array_equal(reward[first].astype(np.float32), reward_[first])
        assert np.array_equal(obs[~begun], obs_[~begun])
        compare(infos, infos_, ~begun, f"step {step}")


# --- what leaves, what repeats ------------------------------------------------------------------------------


def test_what_leaves_is_the_callers():
    "Whoever scribbles over what was returned changes nothing that comes later."
    env, torn = PortfolioEnv(market(), episode_length=12), PortfolioEnv(market(), episode_length=12)
    for call in range(30):
        a, b = [e.reset(seed=call) if call % 12 == 0 else e.step(call % 12) for e in (env, torn)]
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[-1]["weights"], b[-1]["weights"])
        b[0][:], b[-1]["weights"][:] = 7, 7
        assert np.array_equal(env._state["weights"], torn._state["weights"])  # what a picture is made of


def trajectory(env, seed, steps=40) -> np.ndarray:
    seen = [env.reset(seed=seed)[0].ravel()]
    for step in range(steps):
        action = step % 12
        if isinstance(env, PortfolioVectorEnv):
            action = np.full(env.num_envs, action)
        observation, reward, terminated, truncated, _ = env.step(action)
        seen.append(np.append(observation.ravel(), reward))
        if isinstance(env, PortfolioEnv) and (terminated or truncated):
            seen.append(env.reset()[0])
    return np.concatenate(seen)


@pytest.mark.parametrize("make", [PortfolioEnv, functools.partial(PortfolioVectorEnv, 4)])
def test_a_seed_repeats_everything_and_no_seed_nothing(make):
    def made():
        return make(panel=market(), episode_length=12, frictions="reference")

    first, env = trajectory(made(), 5), made()
    assert np.array_equal(trajectory(env, 5), first) and np.array_equal(trajectory(env, 5), first)
    assert not np.array_equal(trajectory(env, 6), first)
    assert len({tuple(np.ravel(made().reset()[1]["bar"])) for _ in range(4)}) > 1
    other = pickle.loads(pickle.dumps(env)), copy.deepcopy(env)
    action = EQUAL_WEIGHT if isinstance(env, PortfolioEnv) else np.full(4, EQUAL_WEIGHT)
    expected = env.step(action)
    assert all(np.array_equal(o.step(action)[0], expected[0]) for o in other)


# --- bounds and scale ---------------------------------------------------------------------------------------


WILD = {  # what prices may do at worst, asset by asset
    "up": lambda t, i: np.exp(0.02 * t + 0.1 * i),
    "down": lambda t, i: np.exp(-0.02 * t + 0.1 * i),
    "flat": lambda t, i: np.ones_like(t + i),
    "jumps": lambda t, i: np.exp(0.4 * np.sin(17 * t * (i + 1))),
    "calm, then a jump": lambda t, i: np.where(t % 90 < 89, 1.0, 1.9) + i,
}


@pytest.mark.parametrize("kind", WILD)
def test_observations_of_a_wild_universe_keep_the_bounds(kind):
    close = WILD[kind](np.arange(300.0)[:, None], np.arange(4.0)[None])
    base = simulate_panel(4, years=2)
    tables = dict.fromkeys(("open", "close", "raw_close"), close)
    volume = 10.0 ** (np.arange(300)[:, None] % 7 + np.zeros(4))
    panel = PortfolioPanel(
        base.symbols, base.day[:300], **tables, volume=volume, member=np.ones((300, 4), bool)
    )
    envs, random = PortfolioVectorEnv(16, panel, frictions="reference"), np.random.default_rng(1)
    envs.reset(seed=0)
    assert all(envs.step(random.integers(12, size=16))[0] in envs.observation_space for _ in range(100))


def test_bounds_are_promised_where_a_formula_gives_them():
    low, high = portfolio_bounds()
    free = [c for c, a, b in zip(get_layout("P1").columns, low, high) if np.isinf(a) and np.isinf(b)]
    # a sum of returns, a Sharpe ratio, differences of scores
    assert free == ["mean_momentum", "spread_momentum", "spread_low_vol", "mean_quality", "spread_quality",
                    "spread_size"]  # fmt: skip
    assert low.dtype == high.dtype == np.float32 and (low < high).all()


def test_scaled_columns_are_those_that_networks_read():
    raw, scaled = PortfolioEnv(market()), PortfolioEnv(market(), scaled=True)
    shift, scale = (np.array(market().fit[key], np.float32) for key in ("shift", "scale"))
    for start in (100, 250):
        seen = raw.reset(options={"start": start})[0]
        assert np.array_equal(scaled.reset(options={"start": start})[0], (seen - shift) * scale)


# --- where the universe comes from --------------------------------------------------------------------------


def test_a_universe_may_be_a_panel_its_tables_or_a_file(tmp_path):
    panel = market().panel
    path = panel.save(tmp_path / "panel.npz")
    expected = trajectory(PortfolioEnv(market(), episode_length=12), 3)
    for given in (panel, path, str(path)):
        assert np.array_equal(trajectory(PortfolioEnv(given, episode_length=12), 3), expected)
    bound = PortfolioVectorEnv(2, path, span=(100, 200))
    assert bound.decision_bars[[0, -1]].tolist() == [100, 198]
    own = bound.tensor_env.market.fit
    assert own != market().fit  # fitted on the span that training stays in
    assert PortfolioEnv(path, span=(200, 300), fit=own).tensor_env.market.fit == own


# --- showing ------------------------------------------------------------------------------------------------


def test_the_picture_is_a_picture_and_lines_are_lines():
    env = PortfolioEnv(market(), render_mode="rgb_array")
    assert "call reset" in refusal(env.render)
    env.reset(seed=0)
    first = env.render()
    for _ in range(20):
        env.step(EQUAL_WEIGHT)
    second = env.render()
    assert first.dtype == np.uint8 and first.shape == second.shape and first.shape[2] == 3
    assert (first != second).mean() > 0.005
    env.reset(seed=0)
    assert np.array_equal(env.render(), first)  # the new episode alone
    envs = PortfolioVectorEnv(2, market(), render_mode="ansi")
    envs.reset(options={"start": [100, 101]})
    days = [str(market().timestamp[bar].astype("datetime64[ns]"))[:10] for bar in (100, 101)]
    assert envs.render() == tuple(f"{day}  HOLD  cash 100.0 %  equity 100,000.00" for day in days)
    assert PortfolioEnv(market()).render() is None


# --- careless people ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action, words",
    [(12, "was 12"), (-1, "from 0 to 11 (HOLD, FULL_CASH"), (1.5, "was 1.5"), ("HOLD", "was 'HOLD'")],
)
def test_an_action_that_does_not_exist_is_one_clear_line(action, words):
    env = PortfolioEnv(market())
    assert "call reset" in refusal(env.step, 0)
    env.reset(seed=0)
    assert words in refusal(env.step, action)


@pytest.mark.parametrize(
    "actions, words",
    [([0, 12], "actions are 0 to 11"), ([0.0, 1.0], "2 whole-number actions"), ([0], "shape (1,)")],
)
def test_actions_that_do_not_exist_are_one_clear_line(actions, words):
    envs = PortfolioVectorEnv(2, market())
    assert "call reset" in refusal(envs.step, [0, 0])
    envs.reset(seed=0)
    assert words in refusal(envs.step, actions)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(filll="close"), "unknown name 'filll'; did you mean 'fill'?"),
        (dict(panl=3), "did you mean 'panel'?"),
        (dict(observations="indices"), "unknown name 'observations'"),
        (dict(window=5), "unknown name 'window'"),
        (dict(frictions="brokre"), "expected one of broker, reference, zero"),
        (dict(reward_preset="sharpe"), "PortfolioConfig.reward_preset"),
        (dict(render_mode="human"), "ansi or rgb_array"),
        (dict(device="gpu"), "expected cpu"),
        (dict(panel=[1, 2, 3]), "panel: expected a PortfolioPanel"),
        (dict(panel="nowhere.npz"), "no such file"),
        (dict(span=5), "span: expected two bars"),
        (dict(span=(0, 10**6)), "expected a span inside"),
        (dict(fit={"shift": []}), "carry the fit"),
    ],
)
def test_a_careless_construction_is_one_clear_line(settings, words):
    assert words in refusal(PortfolioEnv, **settings)


def test_more_careless_uses():
    for n in (0, 2.5, "3"):
        assert "num_envs: expected a whole number from 1" in refusal(PortfolioVectorEnv, n, market())
    assert "did you mean 'num_envs'?" in refusal(gym.make_vec, ENV_ID, num_envs=2, num_env=4)
    env = PortfolioEnv(market())
    assert "did you mean 'start'?" in refusal(env.reset, options={"strat": 5})
    assert "no episode can start at bar [2]" in refusal(env.reset, options={"start": 2})
    assert "one seed for all accounts" in refusal(PortfolioVectorEnv(2, market()).reset, seed=[1, 2])
