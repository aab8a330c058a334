"""What of an update the host must wait for where the work is done by a GPU, counted without one: on torch's
device that has shapes and no data."""

import contextlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data
from trading_lib.features import fit_features
from trading_lib.sources import simulate_bars
from trading_lib.trainer import NativePPOConfig, NativePPOTrainer
from trading_lib.training.rollout import RolloutCollector


class Waits(TorchDispatchMode):
    "Counts the operations for which a host must wait, and answers them: all true, or all false."

    def __init__(self, answer: bool):
        super().__init__()
        self.answer, self.seen = answer, Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name, options = str(function), options or {}
        to_host = (
            name == "aten._to_copy.default"
            and options.get("device") == torch.device("cpu")
            and arguments[0].device.type == "meta"
        )
        by_mask = name.startswith("aten.index") and any(
            torch.is_tensor(x) and x.dtype == torch.bool
            for part in arguments[1:]
            if isinstance(part, (list, tuple))
            for x in part
        )
        if (
            name == "aten._local_scalar_dense.default"
            or to_host
            or by_mask
            or any(kind in name for kind in ("nonzero", "masked_select", "unique", "bincount"))
        ):
            self.seen[name] += 1
        if name == "aten._local_scalar_dense.default":
            return self.answer if arguments[0].dtype == torch.bool else 1.0
        if to_host:
            return torch.ones(arguments[0].shape, dtype=arguments[0].dtype)
        return function(*arguments, **options)


class HostGenerator(torch.Generator):
    "There are no random numbers on a device without data."

    def __new__(cls, device=None):
        return super().__new__(cls, "cpu")


@pytest.fixture
def without_data(monkeypatch):
    "Lets the paths of another device than the CPU run without one."
    from torch.fx.experimental import _config

    monkeypatch.setattr(torch, "Generator", HostGenerator)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, fused, **options: adam(groups, **options))
    monkeypatch.setattr(RolloutCollector, "cache_bytes", 10**9)
    monkeypatch.setattr(
        RolloutCollector, "race", lambda self, logits: torch.empty_like(logits).exponential_()
    )
    with _config.patch(meta_nonzero_assume_all_nonzero=True):
        yield


def waits(version: str, n_steps: int, n_epochs: int) -> dict[str, int]:  # phase of an update -> waits
    bars = simulate_bars("SIM-USD", "15Min", "2022-01-01", "2022-02-01", seed=3)
    market = market_data(bars, version, fit_features(bars, version, "15Min", "crypto"), "15Min", "crypto", 8)
    env = GPUVectorizedTradingEnv(
        market, GPUEnvConfig(n_envs=240, version=version, window=8, episode_length=10), device="meta"
    )
    trainer = NativePPOTrainer(
        env,
        NativePPOConfig(
            hidden_dims=[16, 8],
            n_steps=n_steps,
            minibatch_size=1000,
            n_epochs=n_epochs,
            total_timesteps=10**6,
        ),
        progress=None,
    )
    for optimizer in trainer.optimizers:
        optimizer.step = lambda: (
            None
        )  # a GPU has the fused one, which waits for nothing; without data there is none
    trainer.collector.begin()
    counts = {}
    for phase, answer, work in (
        ("rollout", False, trainer._rollout),
        ("check", True, lambda: trainer._check(rollout)),  # noqa: B023
        ("learn", True, lambda: trainer._learn(rollout)),  # noqa: B023
    ):
        with Waits(answer) as counting:
            result = work()
        if phase == "rollout":
            rollout = result
        counts[phase] = sum(counting.seen.values())
    assert rollout["reward"].device.type == "meta" and rollout["reward"].shape == (n_steps, 240)
    return counts


@pytest.mark.parametrize(
    "version, bars", [("5.6.0", 2), ("5.3.0", 0)]
)  # which bars there are and how minibatches divide them, where each is computed once
def test_waits_do_not_grow_with_steps_or_epochs(without_data, version, bars):
    few, many = waits(version, 24, 2), waits(version, 72, 9)
    print(f"{version}: {few}")
    assert (
        few == many == {"rollout": 1, "check": 1, "learn": 5 + bars}
    )  # which episodes were cut; whether all is finite; an update's figures


def test_a_question_at_every_step_is_seen(without_data, monkeypatch):
    draw = RolloutCollector.race

    def asking(self, logits):
        assert not bool((logits > 1e9).any())
        return draw(self, logits)

    monkeypatch.setattr(RolloutCollector, "race", asking)
    assert waits("5.6.0", 24, 1)["rollout"] == 1 + 24
