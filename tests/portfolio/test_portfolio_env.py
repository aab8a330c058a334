"""The portfolio environment keeps the tensor interface: episodes, seeds, indices, refusals; its observation
is layout P1, computed here a second time in plain loops; and one checkpoint serves universes of any size."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from trading_lib.checkpoint import load_checkpoint
from trading_lib.config import InputError
from trading_lib.data.simulated_panel import simulate_panel
from trading_lib.market.layouts import BLOCKS, PORTFOLIO_LAYOUTS, get_layout
from trading_lib.policy.factory import build_policy
from trading_lib.portfolio.market import portfolio_market
from trading_lib.portfolio.panel import PortfolioPanel
from trading_lib.portfolio.regimes import REGIMES
from trading_lib.portfolio_env import GPUPortfolioEnv, PortfolioConfig
from trading_lib.trainer import NativePPOTrainer
from trading_lib.training.config import NativePPOConfig
from trading_lib.training.portfolio_validation import PortfolioValidation, greedy

HOLD, FULL_CASH, EQUAL_WEIGHT = 0, 1, 4
COLUMN = {name: k for k, name in enumerate(get_layout("P1").columns)}


def weekdays(n: int, first: str = "2015-01-02") -> np.ndarray:
    dates = np.busday_offset(first, np.arange(n), roll="forward")
    return dates.astype("datetime64[ns]").astype(np.int64)


def panel_of(close: np.ndarray, **changes) -> PortfolioPanel:
    "A universe from closes alone: days open where the day before has closed."
    opening = np.concatenate([close[:1], close[:-1]])
    tables = dict(open=opening, close=close, raw_close=close, volume=np.full_like(close, 1e7))
    names = tuple(f"A{i:03d}" for i in range(close.shape[1]))
    return PortfolioPanel(
        names, weekdays(len(close)), **tables | {"member": np.ones_like(close, bool)} | changes
    )


@functools.cache
def walk(assets: int = 4, days: int = 300, seed: int = 0) -> PortfolioPanel:
    random = np.random.default_rng(seed)
    moves = 0.01 * random.standard_normal((days, assets)) + 0.005 * random.standard_normal((days, 1))
    return panel_of(40 * np.exp(np.cumsum(moves, 0)))


@functools.cache
def market(assets: int = 4):
    return portfolio_market(walk(assets))


def made(n_envs: int = 3, assets: int = 4, **settings) -> GPUPortfolioEnv:
    return GPUPortfolioEnv(market(assets), PortfolioConfig(n_envs=n_envs, **settings))


def all_choose(env: GPUPortfolioEnv, regime: int):
    return env.step(torch.full((env.n_envs,), regime))


def refusal(function, *args, **kwargs) -> str:
    "What an InputError says, in one line."
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- episodes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 5])
def test_a_reset_gives_accounts_of_cash_alone(n_envs):
    env = made(n_envs, initial_value=5_000.0)
    obs = env.reset(seed=3)
    assert obs.shape == (n_envs, 64) and obs.dtype == torch.float32 and obs.isfinite().all()
    assert (env.obs_dim, env.n_actions, env.n_assets) == (64, 12, 4)
    assert (env.account.equity == 5_000).all() and (env.account.units == 0).all()
    own = {name: obs[:, COLUMN[name]].tolist() for name in ("cash_share", "largest_weight", "was_hold")}
    assert own == {"cash_share": [1.0] * n_envs, "largest_weight": [0.0] * n_envs, "was_hold": [1.0] * n_envs}


def test_a_step_says_what_was_chosen_and_what_is_held():
    env = made(2, frictions="zero")
    env.reset(seed=0)
    obs, reward, terminated, truncated, infos = env.step(torch.tensor([EQUAL_WEIGHT, 2]))
    assert obs.shape == (2, 64) and reward.dtype == torch.float32 and not (terminated | truncated).any()
    assert obs[:, COLUMN["cash_share"]].tolist() == pytest.approx([0.0, 0.5], abs=1e-7)
    # four equal weights, of all and of a half
    assert obs[:, COLUMN["largest_weight"]].tolist() == pytest.approx([0.25, 0.125])
    assert obs[:, COLUMN["squared_weights"]].tolist() == pytest.approx([4 * 0.25**2, 4 * 0.125**2])
    assert obs[:, COLUMN["turnover_20"]].tolist() == pytest.approx([1.0, 0.5])
    chosen = obs[:, COLUMN["was_hold"] : COLUMN["was_risk_on"] + 1]
    assert chosen.argmax(1).tolist() == [EQUAL_WEIGHT, 2] and (chosen.sum(1) == 1).all()
    env.step(torch.tensor([HOLD, HOLD]))
    idle = env.step(torch.tensor([HOLD, HOLD]))[0][:, COLUMN["days_since_trade"]]
    assert idle.tolist() == pytest.approx([2 / 20] * 2)  # in units of 20 days


def test_an_episode_ends_after_its_length_and_the_next_begins_in_the_same_step():
    env = made(3, episode_length=5)
    env.reset_at([100, 120, 140], [105, 123, 145])
    seen = []
    for _ in range(5):
        obs, _, terminated, truncated, infos = all_choose(env, EQUAL_WEIGHT)
        assert not terminated.any()
        seen.append(truncated.tolist())
        over = truncated
        assert (infos["final_obs"][over] != obs[over]).any(1).all()
        assert torch.equal(infos["final_obs"][~over], obs[~over])
        # the last day shows what was held, the new one cash
        assert (infos["final_obs"][:, COLUMN["cash_share"]] < 1e-3).all()
        assert (obs[over, COLUMN["cash_share"]] == 1).all()
        assert (infos["account"].equity[over] != 100_000).all()
        assert (env.account.equity[over] == 100_000).all()
    first, second, third = zip(*seen)
    assert first == third == (False, False, False, False, True) and second[:3] == (False, False, True)


def test_the_span_is_the_last_limit_of_an_episode():
    env = made(2, episode_length=1000)
    first, last = int(env.decision_days[0]), int(env.decision_days[-1])
    assert last == 298  # its fill lies on day 299, the last of 300
    env.reset(seed=0)
    assert (env.bar == first).all()  # the only day from which an episode is as long as can be
    env.reset_at([last - 2, last])
    ends = [all_choose(env, HOLD)[3].tolist() for _ in range(3)]
    assert [e[0] for e in ends] == [False, False, True] and ends[0][1]


@pytest.mark.parametrize("share, ruined", [(0.009, True), (0.011, False)])
def test_an_account_that_has_lost_99_percent_is_at_its_end(share, ruined):
    "Everything is invested at the close of day 101, and on day 102 every price falls to a share of itself."
    close = np.array(walk(3).close)
    close[102:] = close[101] * share
    env = GPUPortfolioEnv(panel_of(close), PortfolioConfig(n_envs=2, frictions="zero"))
    env.reset_at([100, 100])
    actions = torch.tensor([EQUAL_WEIGHT, FULL_CASH])
    assert not env.step(actions)[2].any()
    obs, _, terminated, truncated, infos = env.step(torch.tensor([HOLD, HOLD]))
    assert infos["account"].equity.tolist() == pytest.approx([100_000 * share, 100_000])
    assert terminated.tolist() == [ruined, False] and not truncated.any()
    assert (obs[0, COLUMN["cash_share"]] == 1).item() == ruined  # it begins anew


# --- seeds and places ---------------------------------------------------------------------------------------


def played(env: GPUPortfolioEnv, seed, steps: int = 30) -> torch.Tensor:
    "Everything that is seen, account by account; the actions depend on the step and not on the account."
    seen = [env.reset(seed)]
    for step in range(steps):
        obs, reward, *_ = all_choose(env, (5 * step) % 12)
        seen.append(torch.cat([obs, reward[:, None]], 1))
    return torch.cat(seen, 1)


def test_a_seed_repeats_all_and_another_one_does_not():
    "With random slippage, so that more than the first days is drawn."
    settings = dict(frictions="reference", episode_length=8)
    first = played(made(4, **settings), 5)
    again = made(4, **settings)
    assert torch.equal(played(again, 5), first) and torch.equal(played(again, 5), first)
    assert not torch.equal(played(again, 6), first)
    assert not torch.equal(played(again, None), played(again, None))


def test_a_seed_for_each_group_makes_each_group_what_it_is_alone():
    settings = dict(frictions="reference", episode_length=8)
    both = played(made(6, **settings), [5, 9])
    assert torch.equal(both[:3], played(made(3, **settings), 5))
    assert torch.equal(both[3:], played(made(3, **settings), 9))
    assert "cannot be divided into 4" in refusal(made(6).reset, [1, 2, 3, 4])


def test_episodes_begin_on_stated_days_only_where_one_may():
    env = made(3)
    env.reset_at([100, 150, 200])
    assert env.bar.tolist() == [100, 150, 200]
    assert "3 first days" in refusal(env.reset_at, [100])
    for wrong in (10, 299, 10_000):  # before there is a history; nothing can be filled any more; no such day
        assert "warm-up, or outside the span" in refusal(env.reset_at, [100, 100, wrong])


def test_with_indices_the_same_is_seen_as_with_numbers():
    dense, index = made(5, episode_length=7), made(5, episode_length=7, observations="indices")
    random = torch.Generator().manual_seed(0)

    def agree(numbers, obs):
        assert torch.equal(index.table.materialise(obs), numbers)
        assert torch.equal(numbers[:, : len(features[0]) - 5], features[obs.rows][:, :-5])  # calendar is last

    features = torch.tensor(index.market.features)
    agree(dense.reset(seed=2), index.reset(seed=2))
    for _ in range(25):
        actions = torch.randint(12, (5,), generator=random)
        (a, *rest, infos), (b, *others, their) = dense.step(actions), index.step(actions)
        agree(a, b)
        agree(infos["final_obs"], their["final_obs"])
        assert all(torch.equal(x, y) for x, y in zip(rest, others))


@pytest.mark.parametrize(
    "actions, words",
    [
        ([0, 1, 12], "actions are 0 to 11, was 0 to 12"),
        ([-1, 0, 0], "actions are 0 to 11, was -1 to 0"),
        ([0.0, 1.0, 2.0], "3 whole-number actions, was torch.float32"),
        ([0, 1], "of shape (2,)"),
        (4, "of shape ()"),
    ],
)
def test_actions_that_do_not_exist_are_named(actions, words):
    env = made(3)
    assert "call reset(seed) first" in refusal(env.step, torch.tensor([0, 0, 0]))
    env.reset(seed=0)
    assert words in refusal(env.step, torch.tensor(actions))


# --- going on -----------------------------------------------------------------------------------------------


def test_an_environment_goes_on_where_its_state_was_taken():
    settings = dict(frictions="reference", episode_length=9, reward_preset="differential_sharpe")
    env, other = made(4, **settings), made(4, **settings)
    played(env, 1, 20)
    state = env.state_dict()
    other.load_state_dict(state)
    for step in range(20):  # episodes end and begin on the way
        a, b = all_choose(env, step % 12), all_choose(other, step % 12)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_the_state_of_other_accounts_or_assets_is_refused():
    env = made(4)
    env.reset(seed=0)
    assert "n_envs is 5 here, the state is of 4 accounts" in refusal(
        made(5).load_state_dict, env.state_dict()
    )
    other = made(4, assets=7)
    assert "7 assets here, the state is of 4" in refusal(other.load_state_dict, env.state_dict())


# --- layout P1 ----------------------------------------------------------------------------------------------


def test_the_layout_has_the_blocks_that_are_written_down():
    layout = PORTFOLIO_LAYOUTS["P1"]
    sizes = [len(BLOCKS[name].columns) for name in layout.blocks]
    assert sizes == [12, 9, 8, 10, 4, 4, 12, 5] and len(set(layout.columns)) == layout.n_features == 64
    sources = [BLOCKS[name].source for name in layout.blocks]
    assert sources == ["market"] * 4 + ["account"] * 3 + ["market"]
    words = "cash_share largest_weight squared_weights tradable_share drawdown episode_return"
    assert " ".join(layout.columns[39:45]) == words
    assert [f"was_{regime.name.lower()}" for regime in REGIMES] == list(layout.columns[47:59])


def by_hand(panel: PortfolioPanel, day: int) -> dict[str, float]:
    "Some of a day's columns, asset by asset, from closes up to that day."
    close, n = panel.close[: day + 1], len(panel.symbols)
    moves = [[close[t][i] / close[t - 1][i] - 1 for t in range(1, day + 1)] for i in range(n)]
    momentum = [close[day][i] / close[day - 20][i] - 1 for i in range(n)]
    calm, sharpe = [], []
    for own in moves:
        last = own[-20:]
        mean = sum(last) / 20
        deviation = math.sqrt(sum((x - mean) ** 2 for x in last) / 19)
        calm.append(1 / deviation)
        sharpe.append(mean / deviation * math.sqrt(252))
    index = [sum(own[t] for own in moves) / n for t in range(day)]
    fortnight = index[-14:]
    gains, losses = sum(x for x in fortnight if x > 0), -sum(x for x in fortnight if x < 0)
    best = sorted(momentum, reverse=True)
    half = (n + 1) // 2
    level = np.cumprod([1 + x for x in index[-60:]])
    date = np.datetime64(int(panel.day[day]), "ns").astype("datetime64[D]").item()
    return {
        "mean_momentum": sum(momentum) / n,
        "spread_momentum": sum(best[:half]) / half - sum(best[half:]) / (n - half),
        "deviation_momentum": float(np.std(momentum)),
        "mean_low_vol": sum(calm) / n,
        "mean_quality": sum(sharpe) / n,
        "mean_size": sum(1 / close[day][i] for i in range(n)) / n,
        "rising_1": sum(own[-1] > 0 for own in moves) / n,
        "mean_return_5": sum(close[day][i] / close[day - 5][i] - 1 for i in range(n)) / n,
        "index_volatility_20": float(np.std(index[-20:], ddof=1)),
        "index_return_60": level[-1] - 1,
        "index_rsi_14": gains / (gains + losses),
        "above_mean_50": sum(close[day][i] > close[day - 49 :, i].mean() for i in range(n)) / n,
        "return_equal_weight": float(np.prod([1 + x for x in index[-20:]])) - 1,
        "return_defensive": float(np.prod([1 + x / 2 for x in index[-20:]])) - 1,
        "weekday_sin": math.sin(2 * math.pi * date.weekday() / 7),
        "month_cos": math.cos(2 * math.pi * (date.month - 1) / 12),
    }


@pytest.mark.parametrize("assets, day", [(4, 150), (4, 298), (7, 222)])
def test_columns_are_what_loops_say(assets, day):
    env = made(1, assets)
    seen = env.reset_at([day])[0]
    expected = by_hand(walk(assets), day)
    assert {name: seen[COLUMN[name]].item() for name in expected} == pytest.approx(
        expected, rel=1e-5, abs=1e-7
    )


def test_the_last_weekday_of_a_month_is_told():
    env = made(1)
    dates = market().panel.day.astype("datetime64[ns]").astype("datetime64[D]")
    for day in range(100, 200):
        told = env.reset_at([day])[0, COLUMN["month_end"]].item()
        ahead = dates[day + 1].astype("datetime64[M]") != dates[day].astype("datetime64[M]")
        assert told == float(ahead)


# --- the map ------------------------------------------------------------------------------------------------


def test_the_map_is_of_the_training_span_alone():
    close = np.array(walk().close)
    later = close.copy()
    later[200:] *= np.exp(np.random.default_rng(1).normal(0, 0.1, (100, 4)).cumsum(0))
    earlier = close.copy()
    earlier[150] *= 1.5
    fits = [portfolio_market(panel_of(c).span(0, 200)).fit for c in (close, later, earlier)]
    assert fits[0] == fits[1] != fits[2]
    # it is the one that a later span is read with
    assert portfolio_market(panel_of(later).span(200, 300), fits[0]).fit == fits[0]


def test_the_map_makes_mean_0_and_deviation_1_of_the_market_and_leaves_the_account():
    own = portfolio_market(walk().span(0, 200))
    days, columns = own.decision_days, get_layout("P1").market_columns
    at = np.array([COLUMN[name] for name in columns])
    shift, scale = np.array(own.fit["shift"]), np.array(own.fit["scale"])
    assert days[-1] == 198  # the last whose fill is in the span
    mapped = (own.features[days].astype(float) - shift[at]) * scale[at]
    assert np.abs(mapped.mean(0)).max() < 1e-9 and np.abs(mapped.std(0) - 1).max() < 1e-9
    account = np.setdiff1d(np.arange(64), at)
    assert len(account) == 20 and (shift[account] == 0).all() and (scale[account] == 1).all()


# --- universes of any size ----------------------------------------------------------------------------------


@functools.cache
def universe(assets: int) -> PortfolioPanel:
    return simulate_panel(assets, years=1, seed=assets)


@pytest.mark.parametrize("network", ["gru", pytest.param("mlp", marks=pytest.mark.slow)])
def test_one_checkpoint_serves_3_13_and_300_assets(network, tmp_path):
    "Trained over 3 assets; the figures of its walk over the others are those of a walk done here by hand."
    env = GPUPortfolioEnv(universe(3), PortfolioConfig(n_envs=8, observations="indices"))
    small = dict(network=network, hidden_dims=(16,), gru_hidden_dim=16, n_gru_layers=1)
    config = NativePPOConfig(**small, n_steps=16, minibatch_size=64, n_epochs=1, total_timesteps=256)
    trainer = NativePPOTrainer(env, config, progress=None)
    trainer.train()
    content = load_checkpoint(trainer.save(tmp_path / "model.pt"))
    assert content["model_version"] == "P1" and content["n_features"] == 64
    policy = build_policy(content)
    for assets in (3, 13, 300):
        other = portfolio_market(universe(assets), content["fit"])
        path = PortfolioValidation(other, env.config, torch.device("cpu")).play(policy)
        assert path.value.shape[1:] == (1, assets) and np.isfinite(path.equity).all()
        walked = GPUPortfolioEnv(other, replace(env.config, n_envs=1))
        obs = walked.reset_at_index([int(walked.decision_days[0])])
        choose = greedy(policy, walked)
        for step, equity in enumerate(path.equity[1:, 0]):
            action = choose(obs, step)
            assert action.item() == path.action[step, 0]
            obs, *_, infos = walked.step_index(action)
            assert infos["account"].equity.item() == equity
        assert step == len(other.decision_days) - 1


def test_costs_rise_with_a_training_and_a_run_that_goes_on_pays_the_same():
    "Free at 0, the configured costs at 1, and the scale is part of the state."
    env = GPUPortfolioEnv(simulate_panel(3, years=1), PortfolioConfig(n_envs=4))
    buy = torch.full((4,), 4)
    paid = {}
    for scale in (0.0, 0.5, 1.0):
        env.set_cost_scale(scale)
        env.reset(seed=0)
        env.step(buy)
        paid[scale] = env.account.costs.clone()
    assert (paid[0.0] == 0).all() and (paid[0.5] > 0).all()
    assert torch.allclose(paid[0.5], paid[1.0] / 2, rtol=1e-3)
    env.set_cost_scale(0.0)
    env.reset(seed=0)
    other = GPUPortfolioEnv(simulate_panel(3, years=1), PortfolioConfig(n_envs=4))
    other.load_state_dict(env.state_dict())
    other.step(buy)
    assert (other.account.costs == 0).all()
