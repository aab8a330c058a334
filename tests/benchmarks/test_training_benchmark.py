"""The benchmark of whole training: FLOPs and ratios on paper, peers that learn what ours learns, and the
numbers that are kept."""

import functools
import importlib
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensor_env import TensorEnv
from torch.utils.flop_counter import FlopCounterMode

from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data
from trading_lib.features import fit_features
from trading_lib.sources import simulate_bars
from trading_lib.trainer import NativePPOConfig, NativePPOTrainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def imported(monkeypatch):
    "A module of the benchmarks by its name."
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def benchmark(imported):
    "The names of its modules."
    parts = (imported(f"training{part}") for part in ("_rows", "_measure", "_report", ""))
    return SimpleNamespace(**{name: value for part in parts for name, value in vars(part).items()})


@pytest.fixture
def peers(imported):
    return imported("_peers")


@pytest.fixture(scope="module")
def env():
    "Twelve accounts whose episodes end after five bars."
    bars = simulate_bars("SIM-USD", "15Min", "2022-01-01", "2022-01-21", seed=0)
    market = market_data(bars, "5.6.0", fit_features(bars, "5.6.0", "15Min", "crypto"), "15Min", "crypto", 8)
    return lambda: GPUVectorizedTradingEnv(market, GPUEnvConfig(n_envs=12, window=8, episode_length=5))


# --- arithmetic ---------------------------------------------------------------------------------------------


def test_flops_of_a_small_network_on_paper(benchmark):
    # 10 inputs, hidden 4 and 3, 2 actions and a value: 10·4 + 4·3 + 3·(2 + 1) = 61 products, each with an
    # addition
    one = benchmark.flops_per_step(10, [4, 3], 2, trunks=1, n_epochs=3)
    # backwards as many for the weights, and for the inputs of all but the first layer: 61 - 40 = 21
    assert one == {"forward": 122, "backward": 122 + 42, "step": 122 + 3 * (122 + 164)}
    # two trunks: 2·(40 + 12) + 9 = 113 products; inputs of all but the first layers: 113 - 80 = 33
    assert benchmark.flops_per_step(10, [4, 3], 2, trunks=2, n_epochs=1) == {
        "forward": 226,
        "backward": 226 + 66,
        "step": 2 * 226 + 292,
    }


class OneTrunk(torch.nn.Module):
    "Shared hidden layers and two heads, of torch's own linear layers, whose products torch counts."

    def __init__(self, inputs, actions, hidden):
        super().__init__()
        widths = [inputs, *hidden]
        self.trunk = torch.nn.Sequential(
            *(m for a, b in zip(widths, widths[1:]) for m in (torch.nn.Linear(a, b), torch.nn.ReLU()))
        )
        self.heads = torch.nn.ModuleList([torch.nn.Linear(widths[-1], n) for n in (actions, 1)])

    def forward(self, x):
        x = self.trunk(x)
        return [head(x) for head in self.heads]


def counted(network, inputs, n) -> tuple[int, int]:  # of a sample: forward, backward
    "What torch counts as it runs."
    x = torch.randn(n, inputs)
    with FlopCounterMode(display=False) as forward:
        logits, value = network(x)
    with FlopCounterMode(display=False) as backward:
        (logits.sum() + value.sum()).backward()
    return forward.get_total_flops() // n, backward.get_total_flops() // n


@pytest.mark.parametrize("inputs, hidden, actions", [(10, [4, 3], 2), (355, [64, 32, 16], 8), (7, [5], 3)])
def test_flops_are_those_that_torch_counts(benchmark, peers, inputs, hidden, actions):
    for trunks, network in (
        (1, OneTrunk(inputs, actions, hidden)),
        (2, peers.TwoNetworks(inputs, actions, hidden)),
    ):
        flops = benchmark.flops_per_step(inputs, hidden, actions, trunks, 10)
        assert counted(network, inputs, 6) == (flops["forward"], flops["backward"])


def test_flops_of_a_row_are_those_of_its_inputs(benchmark, env):
    settings = benchmark.SETTINGS | dict(
        hidden_dims=[4], n_epochs=1, minibatch_size=64
    )  # of thousands of bars: hardly any twice

    # 3 of 58 columns change along the window: 3 · 8 + 55 = 79 inputs; 8 · 58 = 464 dense ones; 8 actions
    def per(inputs, trunks):
        return benchmark.flops_per_step(inputs, [4], 8, trunks, 1)["step"]

    rows = {
        "ours: folded, shared trunk": (79, 1),
        "ours: folded, two trunks": (79, 2),
        "ours: dense, two trunks": (464, 2),
        "stable-baselines3": (464, 2),
        "CleanRL-style": (464, 2),
        benchmark.DEFAULTS: (79, 1),
    }
    for name, shape in rows.items():
        assert benchmark.flops_of(benchmark.ROWS[name], env(), settings) == per(*shape)


def test_bars_that_are_computed_once_count_once(benchmark, env):
    """A sample for each bar: 1 - 1/e of the bars are seen, but for the few bars that do not divide by the
    accounts. The dense row and the peers compute every sample."""
    one = env()
    bars = one.market.stop - max(one.market.start, one.market.window - 1)
    settings = benchmark.SETTINGS | dict(
        hidden_dims=[4], n_epochs=1, n_envs=one.n_envs, n_steps=bars // one.n_envs, minibatch_size=bars
    )
    flops = benchmark.flops_per_step(79, [4], 8, 1, 1)
    assert math.isclose(
        benchmark.our_trainer(one, settings).learner.computed_share, 1 - 1 / math.e, rel_tol=0.01
    )
    assert math.isclose(
        benchmark.flops_of(benchmark.ROWS[benchmark.DEFAULTS], one, settings),
        flops["forward"] + (1 - 1 / math.e) * (flops["forward"] + flops["backward"]),
        rel_tol=0.01,
    )
    assert (
        benchmark.flops_of(benchmark.ROWS["CleanRL-style"], one, settings)
        == benchmark.flops_per_step(464, [4], 8, 2, 1)["step"]
    )


def test_the_error_of_a_product_tells_its_precision(benchmark):
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 300, generator=random), torch.randn(300, 32, generator=random)

    def rounded(x, bits):  # to so many significant bits
        mantissa, exponent = torch.frexp(x.double())
        return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)

    exact = a.double() @ b.double()

    def error(product):
        return float((product.double() - exact).norm() / exact.norm())

    assert [
        benchmark.precision_of(error(p))
        for p in (
            a @ b,
            rounded(a, 11) @ rounded(b, 11),
            rounded(a, 8) @ rounded(b, 8),
            a.bfloat16() @ b.bfloat16(),
        )
    ] == ["float32", "tf32", "bf16", "bf16"]


# --- results that were made up ------------------------------------------------------------------------------


def made_up(**rows) -> dict:
    def row(seconds, flops, precision="float32"):
        return {
            "seconds": seconds,
            "samples": 1000,
            "flops": flops,
            "precision": precision,
            "busy": 0.9,
            "peak": 10**9,
        }

    return {
        "settings": {},
        "limits": [
            {"path": "slow", "rates": [1e9, 2e9], "precision": "float32"},
            {"path": "fast", "rates": [4e9, 3e9], "precision": "float32"},
            {"path": "half", "rates": [1e10], "precision": "bf16"},
        ],
        "rows": {
            "stable-baselines3": row([10.0], 2_000_000),
            "CleanRL-style": row([8.0, 4.0, 5.0], 2_000_000),
            "sbx": {"left_out": "no such module"},
            "ours: folded, two trunks": row([1.0, 0.5, 0.2, 0.4], 1_000_000),
            "ours: folded, shared trunk, bf16": row([0.25], 500_000, "bf16"),
        },
    }


def test_rates_ratios_and_shares(benchmark):
    rows = {row["name"]: row for row in benchmark.compared(made_up())}
    assert set(rows) == {
        "stable-baselines3",
        "CleanRL-style",
        "ours: folded, two trunks",
        "ours: folded, shared trunk, bf16",
    }
    assert {name: row["rate"] for name, row in rows.items()} == {
        "stable-baselines3": 100,
        "CleanRL-style": 200,
        "ours: folded, two trunks": 1000 / 0.45,
        "ours: folded, shared trunk, bf16": 4000,
    }
    assert (
        rows["ours: folded, shared trunk, bf16"]["ratios"] == {"stable-baselines3": 40, "CleanRL-style": 20}
        and rows["CleanRL-style"]["ratios"]["stable-baselines3"] == 2
    )
    # 100 · 2 MFLOP = 0.2 of 4 GFLOP/s; 4,000 · 0.5 MFLOP = 2 of 10 GFLOP/s
    assert math.isclose(rows["stable-baselines3"]["share"], 0.05) and math.isclose(
        rows["ours: folded, shared trunk, bf16"]["share"], 0.2
    )
    assert benchmark.limit_of([], "bf16") is None


def test_goals_are_met_or_missed(benchmark):
    lines = benchmark.judged(benchmark.compared(made_up()))

    def starts(words):
        return [line.split()[0] for line in lines if words in line]

    assert (
        starts("12 times stable-baselines3, is 22.2") == ["met"]
        and starts("11 times CleanRL-style, is 11.1") == ["met"]
        and starts("40 times stable-baselines3, is 40.0") == ["met"]
    )
    assert (
        starts("sbx") == []
        and starts("of the limit, is 56%") == ["met"]
        and starts("of the limit, is 20%") == ["missed"]
    )
    slower = made_up()
    slower["rows"]["ours: folded, two trunks"]["seconds"] = [1.0]
    assert [
        line.split()[0] for line in benchmark.judged(benchmark.compared(slower)) if "two trunks" in line
    ] == ["missed"] * 3


def test_costs_are_relative_to_the_least_before(benchmark):
    rows = benchmark.costs(
        [
            {"label": n, "samples": 100, "seconds": [t, t, 9.0]}
            for n, t in ((1, 2.0), (2, 1.0), (3, 1.1), (4, 3.0))
        ]
    )
    assert np.allclose([row["cost"] for row in rows], [0.02, 0.01, 0.011, 0.03]) and np.allclose(
        [row["relative"] for row in rows], [1, 0.5, 1.1, 3.0]
    )


def test_tables_and_pictures(benchmark, capsys, tmp_path):
    part = made_up() | {
        "settings": benchmark.SETTINGS,
        "machine": "a chip",
        "date": "2026-01-01",
        "row": benchmark.DEFAULTS,
    }
    benchmark.print_training(part)
    shown = capsys.readouterr().out
    assert (
        any(line.split(maxsplit=1) == ["sbx", "left out: no such module"] for line in shown.splitlines())
        and "2,222" in shown
        and "missed" in shown
    )
    part["tables"] = {
        axis: [
            {"label": n, "samples": 100, "seconds": [t], "flops": 10**6} for n, t in ((64, 1.0), (256, 2.0))
        ]
        for axis in benchmark.SCALING
    }
    benchmark.print_scaling(part)
    assert (
        "missed n_envs: at most 1.2 times the least cost of the rows before, is 2.00"
        in capsys.readouterr().out
    )
    for draw in (benchmark.draw_training, benchmark.draw_scaling):
        draw(part, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not forget older peaks")
def test_the_peak_is_that_of_what_follows():
    "In a process of its own, as every row has: what others free meanwhile would count against what is held."
    code = """if True:
        import numpy as np, training_measure
        for megabytes in (200, 50):
            before = training_measure.memory_now()
            held = np.ones(megabytes * 125_000)
            print(training_measure.peak_memory() - before)
            del held
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", check=True, stdout=subprocess.PIPE, text=True
    )
    first, second = map(int, done.stdout.split())
    assert 0.99 * 200e6 < first < 1.1 * 200e6 and 0.99 * 50e6 < second < 1.1 * 50e6


# --- peers that do the same ---------------------------------------------------------------------------------


class Recorded:
    "An environment that keeps what passes through it."

    def __init__(self, env):
        self.env, self.n_envs, self.n_actions, self.obs_dim, self.device, self.rows = (
            env,
            env.n_envs,
            env.n_actions,
            env.obs_dim,
            env.device,
            [],
        )

    def reset(self, seed=None):
        self.obs = self.env.reset(seed)
        return self.obs

    def step(self, actions):
        after, reward, terminated, truncated, infos = self.env.step(actions)
        self.rows.append(
            dict(
                obs=self.obs,
                action=actions,
                reward=reward,
                terminated=terminated,
                done=terminated | truncated,
                final=infos["final_obs"],
            )
        )
        self.obs = after
        return after, reward, terminated, truncated, infos

    def stacked(self) -> dict:
        return {name: torch.stack([row[name] for row in self.rows]) for name in self.rows[0]}


def test_the_single_file_loop_learns_what_ours_learns(benchmark, peers):
    """The steps that our trainer made are given to the loop, with the same first weights. One batch: its
    order does not matter."""
    settings = benchmark.SETTINGS | dict(
        n_envs=16, n_steps=16, minibatch_size=256, n_epochs=10, hidden_dims=[32, 16], learning_rate=3e-3
    )
    ours = Recorded(TensorEnv(functools.partial(gym.make, "CartPole-v1", max_episode_steps=12), 16))
    trainer = NativePPOTrainer(
        ours,
        NativePPOConfig(
            **{
                name: settings[name]
                for name in ("n_steps", "minibatch_size", "n_epochs", "hidden_dims", *benchmark.PPO)
            },
            shared_trunk=False,
            total_timesteps=256,
            warmup_fraction=0.0,
            seed=3,
        ),
        progress=None,
    )
    first = {name: v.clone() for name, v in trainer.policy.state_dict().items()}
    trainer.train()
    data = ours.stacked()
    assert data["terminated"].any() and (data["done"] & ~data["terminated"]).any()

    def distance(a, b):
        return math.sqrt(sum(float(((a[name] - b[name]) ** 2).sum()) for name in first))

    def learnt(**changed) -> dict:  # weights
        loop = peers.SingleFilePPO(TensorEnv("CartPole-v1", 16), settings | changed, torch.device("cpu"))
        loop.network.load_state_dict(first)
        with torch.no_grad():
            logits, value = loop.network(data["obs"])
            log_probability = logits.log_softmax(2).gather(2, data["action"][:, :, None]).squeeze(2)
            stored = data | {
                "value": value,
                "log_probability": log_probability,
                "next_value": loop.network.value(data["final"]),
            }
        loop.learn(stored, settings["n_epochs"])
        return loop.network.state_dict()

    moved = distance(first, trainer.policy.state_dict())
    assert moved > 0.01 and distance(learnt(), trainer.policy.state_dict()) < 1e-4 * moved
    # any setting that is not the same shows
    for changed in (
        dict(gae_lambda=0.9),
        dict(max_grad_norm=0.1),
        dict(value_coefficient=0.25),
        dict(entropy_coefficient=0.05),
        dict(clip_range=0.001),
        dict(learning_rate=2.9e-3),
    ):
        assert distance(learnt(**changed), trainer.policy.state_dict()) > 1e-3 * moved, changed


def test_the_single_file_loop_stores_what_happened(benchmark, peers, env):
    """Values of what followed are those of the true next observations, over ends of episodes and across
    rollouts."""
    settings = benchmark.SETTINGS | dict(n_envs=12, n_steps=7, hidden_dims=[8])
    recorded = Recorded(peers.DenseEnv(env()))
    loop = peers.SingleFilePPO(recorded, settings, torch.device("cpu"))
    for _ in range(2):
        recorded.rows.clear()
        stored, happened = loop.rollout(), recorded.stacked()
        for name in ("obs", "action", "reward", "terminated", "done"):
            assert torch.equal(stored[name], happened[name])
        with torch.no_grad():
            logits, value = loop.network(happened["obs"])
            assert torch.allclose(stored["value"], value, atol=1e-6) and torch.allclose(
                stored["next_value"], loop.network.value(happened["final"]), atol=1e-6
            )
        assert torch.allclose(
            stored["log_probability"],
            logits.log_softmax(2).gather(2, happened["action"][:, :, None]).squeeze(2),
            atol=1e-6,
        )
        assert stored["done"].any()


def test_the_adapter_gives_stable_baselines3_what_the_environment_gives(peers, env):
    pytest.importorskip("stable_baselines3")
    plain, adapter = env(), peers._vec_env(env())
    assert np.array_equal(adapter.reset(), plain.reset(0).numpy())
    random = np.random.default_rng(0)
    for _ in range(12):
        actions = random.integers(plain.n_actions, size=12)
        obs, reward, terminated, truncated, infos = plain.step(torch.as_tensor(actions))
        theirs, their_reward, done, rows = adapter.step(actions)
        assert (
            np.array_equal(theirs, obs.numpy())
            and np.array_equal(their_reward, reward.numpy())
            and np.array_equal(done, (terminated | truncated).numpy())
        )
        for i, row in enumerate(rows):
            assert bool(row) == done[i]
            if row:
                assert np.array_equal(row["terminal_observation"], infos["final_obs"][i].numpy()) and row[
                    "TimeLimit.truncated"
                ] == bool(truncated[i])
    assert (
        adapter.num_envs == 12 and adapter.observation_space.shape == (464,) and adapter.action_space.n == 8
    )


def test_all_trainers_have_the_same_networks_and_settings(benchmark, peers, env):
    pytest.importorskip("stable_baselines3")
    settings = benchmark.SETTINGS | dict(n_envs=12, n_steps=4, minibatch_size=24, hidden_dims=[8, 6])
    model = peers.stable_baselines3(env(), settings, torch.device("cpu")).__closure__
    model = next(cell.cell_contents for cell in model if hasattr(cell.cell_contents, "policy"))
    ours = benchmark.our_trainer(peers.DenseEnv(env()), settings, shared_trunk=False)
    loop = peers.SingleFilePPO(peers.DenseEnv(env()), settings, torch.device("cpu"))

    def shapes(module):
        return sorted(tuple(p.shape) for p in module.parameters())

    assert shapes(model.policy) == shapes(loop.network) == shapes(ours.policy)
    c = ours.config
    assert (
        model.n_steps,
        model.batch_size,
        model.n_epochs,
        model.gamma,
        model.gae_lambda,
        model.ent_coef,
        model.vf_coef,
        model.max_grad_norm,
        model.clip_range(1.0),
        model.learning_rate,
    ) == (
        c.n_steps,
        c.minibatch_size,
        c.n_epochs,
        c.gamma,
        c.gae_lambda,
        c.entropy_coefficient,
        c.value_coefficient,
        c.max_grad_norm,
        c.clip_range,
        c.learning_rate,
    )
    assert {o.defaults["eps"] for o in (model.policy.optimizer, loop.optimizer)} == {
        1e-5
    } and model.target_kl is model.clip_range_vf is c.target_kl is c.value_clip_range is None


# --- the command, and what it kept --------------------------------------------------------------------------


def test_a_small_run_from_end_to_end(benchmark, capsys):
    def files():
        return {path.name: path.read_bytes() for path in benchmark.RESULTS.iterdir()}

    before = files()
    benchmark.main(["--small", "--threads", "1", "--rows", "CleanRL-style", benchmark.DEFAULTS])
    shown = capsys.readouterr().out
    rows = [
        line
        for line in shown.splitlines()
        if "GFLOP/s " in line and ("CleanRL-style" in line[:20] or line.startswith("ours"))
    ]
    assert len(rows) == 2 and "bf16" in rows[1] and "left out" not in shown and "bfloat16" in shown
    assert before == files()  # small numbers are not kept


KEPT = sorted((ROOT / "benchmarks" / "results").glob("training_*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_the_kept_results_are_of_the_settings_here(benchmark, capsys, path):
    kept = benchmark.read(path)
    wanted = {
        "training": benchmark.SETTINGS,
        "memory": benchmark.SETTINGS | benchmark.ROLLOUT,
        "scaling": benchmark.SETTINGS | benchmark.SCALED,
        "seeds": benchmark.SETTINGS | benchmark.FEW,
    }
    for name, part in kept.items():
        assert (
            part["settings"] == wanted[name]
            and part["machine"]
            and part["date"]
            and part["commit"]
            and part["versions"]["torch"]
        )
    if "training" in kept:
        # bfloat16 is measured where the chip has it
        measured = {row["name"] for row in benchmark.compared(kept["training"])}
        assert {
            "stable-baselines3",
            "CleanRL-style",
            "ours: folded, two trunks",
            "ours: folded, shared trunk",
        } <= measured <= set(benchmark.ROWS) and (benchmark.DEFAULTS in measured) == (
            "avx512.json" not in path.name
        )
        benchmark.print_training(kept["training"])
        assert capsys.readouterr().out.count("steps/s") >= 1
    if "seeds" in kept:
        assert [(row["label"], row["precision"]) for row in kept["seeds"]["rows"]] == [
            (label, precision) for label in benchmark.WIDTHS for precision in ("float32", "bf16")
        ]
        benchmark.print_seeds(kept["seeds"])
        assert capsys.readouterr().out.count("at most 3") == 6
    if "scaling" in kept:
        assert set(kept["scaling"]["tables"]) == set(benchmark.SCALING)
        for axis, rows in kept["scaling"]["tables"].items():
            assert [row["label"] for row in rows] == list(benchmark.SCALING[axis])


def test_there_are_kept_results():
    assert KEPT
