"""The trainer over the portfolio environment: stopped and gone on with, the run is the uninterrupted one to
the last bit; a kill at any moment of a save leaves a checkpoint to go on from."""

import functools
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from small_trainers import refusal, same

from trading_lib.checkpoint import load_checkpoint
from trading_lib.data.simulated_panel import simulate_panel
from trading_lib.portfolio.market import PortfolioMarket, portfolio_market
from trading_lib.portfolio_env import GPUPortfolioEnv, PortfolioConfig
from trading_lib.trainer import NativePPOTrainer
from trading_lib.training.config import NativePPOConfig
from trading_lib.training.portfolio_validation import PortfolioValidation

UPDATES, N_ENVS, N_STEPS = 6, 8, 16
KINDS = {
    "mlp": dict(hidden_dims=(16,)),
    "gru": dict(network="gru", gru_hidden_dim=16, n_gru_layers=2, critic_epochs=1),
}


@functools.cache
def market(assets: int = 4) -> PortfolioMarket:
    "Two years; columns fitted on the first 400 days."
    return portfolio_market(simulate_panel(assets, years=2, seed=1).span(0, 400))


def trainer_of(kind: str, seed: int = 0, assets: int = 4, **settings) -> NativePPOTrainer:
    """Slippage is drawn, and episodes are shorter than a rollout: what a checkpoint forgets of the
    environment changes everything that follows."""
    config = PortfolioConfig(
        n_envs=N_ENVS, frictions="reference", episode_length=11, reward_preset="differential_sharpe"
    )
    plain = dict(
        n_steps=N_STEPS,
        minibatch_size=48,
        n_epochs=2,
        total_timesteps=N_ENVS * N_STEPS * UPDATES,
        learning_rate=3e-3,
        validation_interval=2,
        seed=seed,
    )
    env = GPUPortfolioEnv(market(assets), config)
    validation = PortfolioValidation(market(assets).span(420, 440), config, torch.device("cpu"))
    ppo = NativePPOConfig(**plain | KINDS[kind] | settings)
    return NativePPOTrainer(env, ppo, validation, progress=None)


def state_of(trainer: NativePPOTrainer) -> dict:
    "What the next update depends on and what the run has found, read from the live objects."
    name_of = {id(p): name for name, p in trainer.policy.named_parameters()}
    moments = {name_of[id(p)]: dict(s) for o in trainer.optimizers for p, s in o.state.items()}
    assert moments.keys() == set(name_of.values())
    memory = trainer.collector.state
    return {
        "weights": {name: p.detach().clone() for name, p in trainer.policy.named_parameters()},
        "map": dict(trainer.policy.named_buffers()),
        "moments": moments,
        "random": [trainer.random.get_state(), *(r.get_state() for r in trainer.env._random)],
        "environment": trainer.env.state_dict(),
        "seen": list(trainer.collector.obs),
        "memory": memory if memory is None else memory.clone(),
        "counters": [trainer.update, trainer.global_step, trainer.without_better],
        "history": trainer.history,
        "validations": trainer.validations,
        "best": [trainer.best_score, trainer.best_update],
        "best weights": trainer.best and dict(trainer.best["policy_state_dict"]),
    }


# --- stopped and gone on with -------------------------------------------------------------------------------


def differing(kind: str, seed: int, folder: Path) -> list[str]:
    "Of five stopping points, what differs at once or in the end."
    whole, first, found = trainer_of(kind, seed), trainer_of(kind, seed), []
    whole.train()
    expected = state_of(whole)
    assert whole.update == UPDATES and [v["update"] for v in whole.validations] == [2, 4, 6]
    for stop in range(1, UPDATES):
        first.train(max_updates=1)
        at_stop = state_of(first)
        assert first.update == stop and not same(at_stop["weights"], expected["weights"])
        path = first.save(folder / f"{seed}_{stop}.pt")
        torch.manual_seed(1000 * seed + stop)  # a process has its own
        second = trainer_of(kind, seed)
        second.best = first.best  # it lies in a file of its own, which the tests of run folders are about
        second.load(path)
        again = state_of(second)
        found += [
            f"seed {seed}, {stop}: {name} at once" for name in at_stop if not same(again[name], at_stop[name])
        ]
        second.train()
        ended = state_of(second)
        found += [
            f"seed {seed}, {stop}: {name}" for name in expected if not same(ended[name], expected[name])
        ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_the_uninterrupted_one(kind, tmp_path):
    assert differing(kind, 0, tmp_path) == []


@pytest.mark.proof
@pytest.mark.parametrize("kind", KINDS)
def test_fifteen_resumed_runs_end_as_the_uninterrupted_ones(kind, tmp_path):
    found = [line for seed in (1, 2, 3) for line in differing(kind, seed, tmp_path)]
    cases = {line.rpartition(":")[0] for line in found}
    print(f"\nportfolio, {kind}: {15 - len(cases)} of 15")
    assert found == []


def test_what_is_forgotten_would_be_seen(tmp_path):
    "The same comparison finds an environment whose random numbers were not put back."
    whole, first = trainer_of("mlp"), trainer_of("mlp")
    whole.train()
    first.train(max_updates=3)
    first.env._seed([7])
    first.train()
    assert not same(state_of(first)["weights"], state_of(whole)["weights"])


def test_a_run_over_other_assets_is_another_run(tmp_path):
    "Weights serve any universe, but a run goes on with the accounts that it had."
    trainer = trainer_of("gru")
    trainer.train(max_updates=1)
    path = trainer.save(tmp_path / "model.pt")
    other = trainer_of("gru", assets=5)
    before = {name: p.detach().clone() for name, p in other.policy.named_parameters()}
    assert str(path) in refusal(other.load, path)
    assert same(before, {name: p.detach() for name, p in other.policy.named_parameters()})


# --- killed while saving ------------------------------------------------------------------------------------


def live(path: Path, tell: int):
    "Go on from the checkpoint and save after every update, which is then safe."
    trainer = trainer_of("gru", total_timesteps=10**9, validation_interval=10**6)
    if path.exists():
        trainer.load(path)
    while True:
        trainer.train(max_updates=1)
        trainer.save(path)
        os.write(tell, f"{trainer.update}\n".encode())


def in_a_child(path: Path) -> tuple[int, int]:
    "Process id of one that lives, and the end of the pipe at which it tells what is safe."
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            live(path, writing)
        finally:
            os._exit(4)
    os.close(writing)
    return child, reading


def is_caught_saving(child: int, half_written) -> bool:
    "Hold the process still and look."
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    caught = half_written()
    if not caught:
        os.kill(child, signal.SIGCONT)
    return caught


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_during_saves_leave_a_checkpoint_to_go_on_from(tmp_path):
    "Killed six times in the middle of a save; what is left ends where a run that nobody killed ends."
    path, generator, torn = tmp_path / "model.pt", random.Random(0), 0
    market()  # made once, before there are children
    for _ in range(6):
        earlier = set(tmp_path.glob(".*.tmp"))

        def half_written(earlier=earlier) -> bool:
            return not earlier.issuperset(tmp_path.glob(".*.tmp"))

        child, reading = in_a_child(path)
        told = os.read(reading, 100)
        assert told  # it has saved at least once
        while not is_caught_saving(child, half_written):
            time.sleep(generator.uniform(0, 0.002))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with os.fdopen(reading) as pipe:
            safe = int((told.decode() + pipe.read()).split()[-1])
        torn += half_written()
        assert load_checkpoint(path)["update"] >= safe
    last = trainer_of("gru", total_timesteps=10**9, validation_interval=10**6)
    last.load(path)
    undisturbed = trainer_of("gru", total_timesteps=10**9, validation_interval=10**6)
    undisturbed.train(max_updates=last.update)
    assert torn == 6 and last.update >= 6
    assert same(state_of(last), state_of(undisturbed))
