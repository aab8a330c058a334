"""A model that is asked bar by bar: with a memory, and with what makes no decision."""

import numpy as np
import torch
from small_trainers import overflowing, refusal, trading_trainer

from trading_lib.live import NativeModelWrapper


def observations(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 100, 58)).astype(np.float32)


def test_a_recurrent_model_remembers_what_its_caller_keeps(tmp_path):
    "Step by step it says what it says of the whole sequence, and after None it begins anew."
    trainer = trading_trainer(network="gru", gru_hidden_dim=8, n_gru_layers=2)
    with torch.no_grad():
        for p in trainer.policy.actor_head.parameters():
            p.mul_(100)  # actions that differ
    model, obs, state, actions = (
        NativeModelWrapper(trainer.save(tmp_path / "model.pt")),
        observations(40),
        None,
        [],
    )
    for bar in obs:
        action, state = model.step(bar, state)
        actions.append(action)
    rows = model.policy.window_inputs(torch.as_tensor(obs).flatten(1))[:, None]
    with torch.no_grad():
        expected = (
            model.policy.evaluate_sequences(
                rows, model.policy.initial_state(1), torch.zeros(40, 1, dtype=torch.bool)
            )[0][:, 0]
            .argmax(1)
            .tolist()
        )
    assert actions == expected and len(set(actions)) > 1
    fresh = [model.step(bar)[0] for bar in obs]
    assert fresh[0] == actions[0] and fresh != actions  # memory is what makes the difference
    batch, states = model.step(obs[:3])
    assert batch.tolist() == fresh[:3] and states.shape == (2, 3, 8)
    assert "action, state = model.step(obs, state)" in refusal(model.predict, obs[0])
    assert (
        "state" in refusal(model.step, obs[0], torch.full((2, 1, 8), torch.nan))
        and "state" in refusal(model.step, obs[0], states)
        and "state" in refusal(model.step, obs[0], 3)
    )


def test_a_model_without_memory_is_stepped_too(tmp_path):
    model, obs = NativeModelWrapper(trading_trainer().save(tmp_path / "model.pt")), observations(5)
    assert (
        model.step(obs[0]) == (model.predict(obs[0]), None)
        and model.step(obs)[0].tolist() == model.predict(obs).tolist()
    )


def test_an_answer_that_is_not_finite_is_no_hold(tmp_path):
    model = NativeModelWrapper(overflowing(trading_trainer()).save(tmp_path / "model.pt"))
    for ask in (model.predict, model.step):
        assert "logits are not finite" in refusal(ask, observations(1)[0])
