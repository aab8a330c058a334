"""The options of PPO, each against a plain reimplementation with autograd and torch.optim.Adam: optimizers,
critic epochs, recovery, precision, compilation, memory, what is saved and what is logged."""

import copy
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_trainers import (
    Plain,
    everything,
    judged,
    plain_trainer,
    refusal,
    same,
    scripted_figures,
    trading_trainer,
    weights,
)
from torch import nn

from trading_lib.env import Obs
from trading_lib.networks import NativeActorCritic
from trading_lib.trainer import NativePPOTrainer
from trading_lib.training.config import NativePPOConfig
from trading_lib.training.run_folder import RunFolder

# --- a plain reimplementation -------------------------------------------------------------------------------


def spied(trainer):
    "What a trainer learns from: every rollout, and the samples of every minibatch, in order."
    rollouts, batches, rollout, split = [], [], trainer._rollout, trainer.learner.epochs

    def roll():
        out = rollout()
        rollouts.append({name: v.clone() for name, v in out.items()})
        return out

    def cut(data, n):
        for epoch in split(data, n):
            batches.append([batch.samples for batch in epoch])
            yield epoch

    trainer._rollout, trainer.learner.epochs = roll, cut
    return rollouts, batches


class PlainPPO:
    "PPO for plain networks: autograd, torch.distributions, clip_grad_norm_ and torch.optim.Adam."

    def __init__(self, policy, separate, forward=None):
        self.policy, self.forward = (
            policy,
            forward or (lambda rollout, batch: policy(rollout["dense"].flatten(0, 1)[batch])),
        )
        head = list(policy.critic_head.parameters())
        body = [p for name, p in policy.named_parameters() if not name.startswith("critic_head")]
        self.head = head
        self.optimizers = [
            torch.optim.Adam(ps, eps=1e-5) for ps in ((body, head) if separate else (body + head,))
        ]

    def update(self, rollout, epochs, critic_epochs, config, rates, entropy_coefficient):
        "One update; what is watched, one row for each minibatch of each joint epoch."
        for optimizer, rate in zip(self.optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate
        flat = {
            name: rollout[name].flatten(0, 1)
            for name in ("action", "log_probability", "logits", "value", "advantage", "return")
        }
        watched = [
            [
                self._joint(
                    rollout, {name: v[batch] for name, v in flat.items()}, batch, config, entropy_coefficient
                )
                for batch in batches
            ]
            for batches in epochs
        ]
        for batches in critic_epochs:
            for batch in batches:
                loss = (
                    config.value_coefficient
                    * ((self.forward(rollout, batch)[1] - flat["return"][batch]) ** 2).mean()
                )
                for p, g in zip(self.head, torch.autograd.grad(loss, self.head)):
                    p.grad = g
                nn.utils.clip_grad_norm_(self.head, config.max_grad_norm)
                for p in self.policy.parameters():
                    if not any(p is q for q in self.head):
                        p.grad = None
                self.optimizers[-1].step()
        return watched

    def _joint(self, rollout, data, batch, config, entropy_coefficient):
        logits, value = self.forward(rollout, batch)
        distribution = torch.distributions.Categorical(logits=logits)
        ratio = (distribution.log_prob(data["action"]) - data["log_probability"]).exp()
        advantage = (data["advantage"] - data["advantage"].mean()) / (
            data["advantage"].std(unbiased=False) + 1e-8
        )
        policy_loss = -torch.minimum(
            ratio * advantage, ratio.clamp(1 - config.clip_range, 1 + config.clip_range) * advantage
        ).mean()
        value_loss, entropy = ((value - data["return"]) ** 2).mean(), distribution.entropy().mean()
        kl = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=data["logits"]), distribution
        ).mean()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (policy_loss + config.value_coefficient * value_loss - entropy_coefficient * entropy).backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return {
            "policy_loss": policy_loss.item(),
            "value_loss": value_loss.item(),
            "entropy": entropy.item(),
            "kl": kl.item(),
            "clip_fraction": ((ratio < 1 - config.clip_range) | (ratio > 1 + config.clip_range))
            .double()
            .mean()
            .item(),
        }


def close(policy, other, tolerance=2e-6):
    "Weights that moved by thousandths agree to a thousandth of that."
    for (name, a), b in zip(policy.named_parameters(), other.parameters()):
        assert torch.allclose(a, b, rtol=0, atol=tolerance), (name, float((a - b).abs().max()))


# --- two optimizers, epochs of the critic alone -------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, separate, critic_epochs",
    [
        (dict(separate_optimizers=True), True, 4),
        (dict(separate_optimizers=True, critic_epochs=0), True, 0),
        (dict(), False, 0),
        (dict(critic_epochs=3), False, 3),
        (dict(separate_optimizers=True, critic_epochs=1, shared_trunk=False, max_grad_norm=0.05), True, 1),
        (dict(learning_rate=0.01, critic_epochs=1), False, 1),
    ],
)
def test_updates_are_those_of_a_plain_reimplementation(settings, separate, critic_epochs):
    """The value head learns at 9e-4 and everything else at 3e-4, each times the schedule; what is logged is
    the mean over the minibatches of exact figures."""
    trainer = plain_trainer(**{"total_timesteps": 96 * 3, "warmup_fraction": 0, **settings})
    plain = PlainPPO(copy.deepcopy(trainer.policy), separate)
    before, peak = weights(trainer), trainer.config.learning_rate
    rollouts, batches = spied(trainer)
    for share in [1.0, 0.505, 0.01]:  # without warm-up, on paper
        row = trainer.train(1)[-1]
        epochs, own = batches[:2], batches[2:]
        assert len(own) == critic_epochs and all(
            torch.equal(torch.cat(epoch).sort().values, torch.arange(96)) for epoch in batches
        )
        watched = sum(
            plain.update(
                rollouts[-1], epochs, own, trainer.config, [peak * share, 9e-4 * share][: 1 + separate], 0.01
            ),
            [],
        )
        for name in watched[0]:
            assert math.isclose(row[name], np.mean([w[name] for w in watched]), rel_tol=1e-3, abs_tol=1e-7), (
                name
            )
        returns, values = (rollouts[-1][name].flatten().double().numpy() for name in ("return", "value"))
        assert math.isclose(
            row["explained_variance"], 1 - np.var(returns - values) / np.var(returns), rel_tol=1e-4
        ) and math.isclose(row["learning_rate"], peak * share)
        close(trainer.policy, plain.policy, 0.01 * peak)
        batches.clear()
    assert all((v - before[name]).abs().max() > 1e-4 for name, v in weights(trainer).items()) and max(
        r["kl"] for r in trainer.history
    ) > (1e-3 if peak == 0.01 else 1e-6)


def test_with_folded_inputs_too():
    "A trading environment: Adam on the dense network with whole, scaled windows."
    trainer = trading_trainer(
        separate_optimizers=True, critic_epochs=2, total_timesteps=8 * 16 * 3, warmup_fraction=0
    )
    dense = NativeActorCritic(5800, 8, (16,))
    dense.load_state_dict(
        {name: v for name, v in trainer.policy.state_dict().items() if not name.startswith("input_")}
    )
    shift, scale = (v.repeat(100) for v in (trainer.policy.input_shift, trainer.policy.input_scale))
    plain = PlainPPO(
        dense,
        True,
        lambda rollout, batch: dense(
            (
                trainer.table.materialise(Obs(rollout["index"].flatten()[batch], torch.empty(len(batch), 0)))
                - shift
            )
            * scale
        ),
    )
    rollouts, batches = spied(trainer)
    trainer.train(1)
    plain.update(rollouts[0], batches[:2], batches[2:], trainer.config, [1e-3, 9e-4], 0.01)
    found, expected = trainer.policy.state_dict(), dense.state_dict()
    start = NativePPOTrainer(trainer.env, trainer.config, progress=None).policy.state_dict()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=0, atol=2e-5), (
            name,
            float((found[name] - expected[name]).abs().max()),
        )
        assert (expected[name] - start[name]).abs().max() > 1e-3, name  # six steps of a thousandth


def test_critic_epochs_change_the_value_head_and_nothing_else():
    for settings in (
        dict(separate_optimizers=True),
        dict(critic_epochs=2),
        dict(network="gru", gru_hidden_dim=8, n_gru_layers=1),
    ):
        trainer, seen = plain_trainer(**settings), []
        learn = trainer.learner.learn_values

        def watch(data, phase, trainer=trainer, learn=learn, seen=seen):
            before = weights(trainer), copy.deepcopy([o.state_dict()["state"] for o in trainer.optimizers])
            learn(data, phase)
            after = weights(trainer), [o.state_dict()["state"] for o in trainer.optimizers]
            seen.append({name for name, v in after[0].items() if not same(v, before[0][name])})
            steps = sum(
                not same(a, b)
                for old, new in zip(before[1], after[1])
                for a, b in zip(old.values(), new.values())
            )
            assert steps == len(trainer.learner.head)  # nobody else's moments fade either

        trainer.learner.learn_values = watch
        trainer.train(2)
        assert seen == [{name for name in weights(trainer) if name.startswith("critic_head")}] * 2
        assert all(p.requires_grad for p in trainer.policy.parameters())


@pytest.mark.slow
def test_a_checkpoint_of_one_optimizer_goes_on_with_two_and_back():
    "All moments and all step counts, bit for bit; what comes back goes on as if it had never been away."
    one = trading_trainer(7)
    one.train(2)
    two = trading_trainer(7, separate_optimizers=True, critic_epochs=0)
    two.restore(one.content())

    def moments(trainer):
        names = {id(p): name for name, p in trainer.policy.named_parameters()}
        return {
            names[id(p)]: state for optimizer in trainer.optimizers for p, state in optimizer.state.items()
        }

    assert (
        len(two.optimizers) == 2
        and len(moments(one)) == len(list(one.policy.parameters()))
        and same(moments(one), moments(two))
        and all(float(m["step"]) == 12 and m["exp_avg_sq"].max() > 0 for m in moments(two).values())
    )
    back = trading_trainer(7)
    back.restore(two.content())
    assert same(moments(one), moments(back)) and same(everything(one), everything(back))
    one.train(2)
    back.train(2)
    assert same(everything(one), everything(back))
    two.train(2)  # and two optimizers with the moments of one train on
    assert all(torch.isfinite(v).all() for v in weights(two).values()) and not torch.equal(
        weights(two)["critic_head.weight"], weights(one)["critic_head.weight"]
    )
    assert {float(m["step"]) for m in moments(two).values()} == {24.0}


# --- stopping epochs ----------------------------------------------------------------------------------------


def test_epochs_end_where_the_exact_divergence_says_so():
    """The target lies between the divergences of the second and the third epoch: there are exactly three,
    and then those of the critic."""
    settings = dict(n_epochs=6, total_timesteps=96, learning_rate=3e-3, warmup_fraction=0)
    free = plain_trainer(**settings)
    plain = PlainPPO(copy.deepcopy(free.policy), False)
    rollouts, batches = spied(free)
    free.train(1)
    kl = [epoch[-1]["kl"] for epoch in plain.update(rollouts[0], batches, [], free.config, [3e-3], 0.01)]
    assert kl[0] < kl[1] < kl[2]
    held = plain_trainer(**settings, target_kl=(kl[1] + kl[2]) / 2 / 1.5, critic_epochs=2)
    other = PlainPPO(copy.deepcopy(held.policy), False)
    rollouts, batches = spied(held)
    held.train(1)
    assert len(batches) == 3 + 2
    other.update(rollouts[0], batches[:3], batches[3:], held.config, [3e-3], 0.01)
    close(held.policy, other.policy, 2e-5)


# --- recovery, ending early ---------------------------------------------------------------------------------


def rate_on_paper(update, updates, peak=3e-4):
    "Fewer than 40 updates: one at a tenth, then a cosine to a hundredth."
    return (
        peak / 10
        if update == 0
        else peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (update - 1) / (updates - 2))) / 2)
    )


def test_recovery_halves_the_learning_rate_and_raises_the_entropy_three_times():
    "After the second, third, fifth validation, and not after the sixth; both reach the loss."
    trainer, said = judged([0.15, 0.2, 0.16, 0.1, 0.5, 0.9, 0.9, 0.0], recovery=True)
    plain, counts = PlainPPO(copy.deepcopy(trainer.policy), False), [0, 0, 1, 2, 2, 3, 3, 3]
    rollouts, batches = spied(trainer)
    for update, n in enumerate(counts):
        row = trainer.train(1)[-1]
        assert math.isclose(row["learning_rate"], rate_on_paper(update, 8) / 2**n) and math.isclose(
            row["entropy_coefficient"], 0.01 * 1.5**n
        )
        plain.update(
            rollouts[-1], batches, [], trainer.config, [rate_on_paper(update, 8) / 2**n], 0.01 * 1.5**n
        )
        close(trainer.policy, plain.policy)
        batches.clear()
    assert (
        trainer.recoveries == 3
        and trainer.ended is None
        and len(said) == 3
        and all(f"({i + 1} of 3)" in line and "beyond 15%" in line for i, line in enumerate(said))
    )
    assert [line.split(":")[0] for line in said] == ["update 2", "update 3", "update 5"]


def test_without_the_option_a_drawdown_changes_nothing():
    trainer, said = judged([0.9] * 4)
    rows = trainer.train()
    assert (
        [r["entropy_coefficient"] for r in rows] == [0.01] * 4
        and said == []
        and trainer.recoveries == 0
        and math.isclose(rows[-1]["learning_rate"], 3e-6)
    )


@pytest.mark.parametrize("recovery, last", [(False, 2), (True, 6)])
def test_a_run_ends_early_at_a_drawdown_when_no_recovery_is_left(recovery, last):
    trainer, said = judged([0.15, 0.2, 0.2, 0.1, 0.2, 0.2, 0.2, 0.2], early_stop=True, recovery=recovery)
    assert (
        len(trainer.train()) == last == trainer.update
        and trainer.ended == "the validation's drawdown is beyond 15%" + " after 3 recoveries" * recovery
    )
    assert said[-1] == f"update {last}: ended early: {trainer.ended}"
    assert len(trainer.train()) == last  # it stays ended …
    again, _ = judged([0.0] * 8, early_stop=True, recovery=recovery)
    again.restore(trainer.content())
    assert len(again.train()) == last and again.recoveries == 3 * recovery  # … and its checkpoint says so


@pytest.mark.slow
def test_patience_counts_validations_without_a_better_score():
    trainer, said = judged(
        sharpes=[1.0, 2.0, 1.5, 2.0, 1.9, 9.0], patience=3
    )  # the second 2.0 is no better than the first
    assert (
        len(trainer.train()) == 5
        and trainer.best_update == 2
        and said == ["update 5: ended early: 3 validations without a better score"]
    )
    trainer, _ = judged(
        sharpes=[1.0, 0.5, 1.5, 0.5, 0.4, 9.0], patience=3
    )  # a better one begins the count anew
    assert len(trainer.train()) == 6 and trainer.ended is None and trainer.best_update == 6
    trainer, _ = judged(
        sharpes=[2.0, 1.0, 1.0, 9.0], patience=2, validation_interval=2, total_timesteps=96 * 8
    )
    assert len(trainer.train()) == 6  # validations, not updates


def test_patience_goes_on_counting_in_a_resumed_run():
    first, _ = judged(sharpes=[2.0, 1.0, 1.0, 1.0, 1.0, 9.0], patience=3)
    first.train(3)
    second, _ = judged(sharpes=[1.0, 9.0, 9.0, 9.0, 9.0, 9.0], patience=3)
    second.restore(first.content())
    assert len(second.train()) == 4 and second.ended == "3 validations without a better score"


def test_the_composite_score_of_a_validation_is_that_of_its_row():
    """40 points for the average return in percent times the win rate, 20 for the reward over its deviation,
    20 for explained variance, 10 for entropy, less 10 for instability."""
    trainer, _ = judged([0.0] * 3)
    trainer.validation.summarise = lambda played: scripted_figures(
        run_return=0.005, win_rate=0.6, reward=0.02, reward_deviation=0.1, sharpe=0.0
    )
    for row in trainer.train():
        unstable = (min(abs(row["kl"]) / 0.05, 1) + min(row["clip_fraction"] / 0.5, 1)) / 2
        expected = (
            40 * 0.5 * 0.6
            + 20 * 0.2
            + 20 * max(-1, row["explained_variance"])
            + 10 * min(1, row["entropy"] / math.log(3))
            - 10 * unstable
        )
        assert (
            math.isclose(row["validation_composite"], expected, rel_tol=1e-9)
            and row["validation_composite"] > 6
            and unstable > 0
        )


# --- precision ----------------------------------------------------------------------------------------------


def gradients_of(trainer, rollout=None, factor=1.0):
    """Of the first gradient step, before clipping matters; from the same rollout where one is given, and
    with a loss that is `factor` times as large."""
    found, losses, step = [], trainer.learner.losses, trainer.optimizers[0].step
    trainer.learner.losses = lambda *arguments: (lambda loss, watch: (factor * loss, watch))(
        *losses(*arguments)
    )

    def catch(*arguments, **named):
        if not found:
            found.append(torch.cat([p.grad.flatten().clone() for p in trainer.policy.parameters()]))
        return step(*arguments, **named)

    trainer.optimizers[0].step = catch
    if rollout is not None:
        trainer._rollout, trainer.collector.component_means = (
            lambda: {name: v.clone() for name, v in rollout.items()},
            None,
        )
    trainer.train(1)
    return found[0]


@pytest.mark.parametrize(
    "dtype, tolerance", [("bf16", 0.02), ("fp16", 0.003)]
)  # 8 and 11 bits: 0.4 % and 0.05 % a product
def test_half_precision_gradients_are_close_to_those_of_single_precision(dtype, tolerance):
    whole, settings = (
        plain_trainer(minibatch_size=96, max_grad_norm=1e9),
        dict(amp=True, amp_dtype=dtype, minibatch_size=96, max_grad_norm=1e9),
    )
    rollouts, _ = spied(whole)
    expected = gradients_of(whole)
    found = gradients_of(plain_trainer(**settings), rollouts[0])
    assert 0 < (found - expected).norm() < tolerance * expected.norm()


def test_small_gradients_survive_in_fp16():
    "A millionth of the loss: without a scaler most of its gradients are less than fp16 can say."

    def make(**settings):
        return plain_trainer(minibatch_size=96, max_grad_norm=1e9, **settings)

    whole, scaled, bare = make(), make(amp=True, amp_dtype="fp16"), make(amp=True, amp_dtype="fp16")
    rollouts, _ = spied(whole)
    expected = gradients_of(whole)
    bare.runner.scaler = None
    assert (
        scaled.runner.scaler is not None
        and whole.runner.scaler is None
        and plain_trainer(amp=True).runner.scaler is None
    )
    found, lost = (1e6 * gradients_of(trainer, rollouts[0], 1e-6) for trainer in (scaled, bare))
    assert (found - expected).norm() < 0.01 * expected.norm() and (
        lost - expected
    ).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("settings", [dict(), dict(separate_optimizers=True, critic_epochs=0)])
def test_an_overflow_in_fp16_is_no_step_and_a_smaller_scale(settings):
    "For all weights, whichever of them overflowed."
    trainer = plain_trainer(amp=True, amp_dtype="fp16", n_epochs=1, minibatch_size=96, **settings)
    trainer.runner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before, backward = weights(trainer), trainer.runner.scaler.scale

    def overflow(loss):
        for p in trainer.policy.trunk.parameters():
            p.register_hook(lambda grad: torch.full_like(grad, math.nan) if len(hooks) == 0 else grad)
        return backward(loss)

    hooks, trainer.runner.scaler.scale = [], overflow
    trainer.train(1)
    assert same(weights(trainer), before) and trainer.runner.scaler.get_scale() == 2.0**9
    hooks.append("from now on nothing overflows")
    trainer.train(1)
    assert all(
        not torch.equal(v, before[name]) and torch.isfinite(v).all() for name, v in weights(trainer).items()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(amp_dtype="bf16"),
        dict(amp_dtype="fp16"),
        dict(amp_dtype="fp16", separate_optimizers=True),
        dict(
            network="gru",
            gru_hidden_dim=16,
            n_gru_layers=1,
            n_epochs=4,
            critic_epochs=1,
            total_timesteps=128 * 20,
        ),
    ],
)
def test_half_precision_learns_what_single_precision_learns(settings):
    "The value of a reward of 1 for ever with gamma 0.9 is 10; the better of three actions is taken."

    class Choice(Plain):
        def step(self, actions):
            cut = torch.zeros(8, dtype=torch.bool)
            return torch.ones(8, 6), (actions == 1).float(), cut, cut, {"final_obs": torch.ones(8, 6)}

        def reset(self, seed=0):
            return torch.ones(8, 6)

    trainer = NativePPOTrainer(
        Choice(),
        NativePPOConfig(
            **{
                **dict(
                    hidden_dims=(16,),
                    n_steps=16,
                    minibatch_size=64,
                    n_epochs=8,
                    total_timesteps=128 * 30,
                    learning_rate=1e-2,
                    gamma=0.9,
                    amp=True,
                ),
                **settings,
            }
        ),
        progress=None,
    )
    rows = trainer.train()
    with torch.no_grad():
        logits, value, _ = trainer.policy.evaluate_step(torch.ones(1, 6), trainer.policy.initial_state(1))
    assert (
        all(p.dtype == torch.float32 for p in trainer.policy.parameters())
        and torch.softmax(logits, 1)[0, 1] > 0.9
        and math.isclose(rows[-1]["value_mean"], 10, rel_tol=0.15)
    )


def test_the_scale_of_fp16_is_resumed():
    trainer, other = (plain_trainer(amp=True, amp_dtype="fp16") for _ in range(2))
    trainer.runner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    trainer.train(1)
    other.restore(trainer.content())
    assert trainer.runner.scaler.get_scale() == other.runner.scaler.get_scale() == 2.0**7 and same(
        trainer.runner.scaler.state_dict(), other.runner.scaler.state_dict()
    )


# --- compilation --------------------------------------------------------------------------------------------

COMPILES = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from small_trainers import plain_trainer
from trading_lib.training.progress import LineProgress
said = []
trainer = plain_trainer(compile={compile}, total_timesteps=96 * 3)
trainer.progress = LineProgress(said.append)
trainer.train()
said = [line for line in said if not line.startswith("update")]
torch.save([dict(trainer.policy.state_dict()), said], {out!r})
"""


def compiled(folder, compile, **environment):
    "Weights, and what was said, of a run in a process of its own with an empty cache."
    out = folder / "out.pt"
    code = textwrap.dedent(COMPILES).format(
        tests=os.path.dirname(os.path.dirname(__file__)), compile=compile, out=str(out)
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        | environment,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.slow
def test_without_a_compiler_training_goes_on_and_says_so_in_one_line(tmp_path):
    found, said = compiled(tmp_path, True, CXX="/nonexistent")
    plain = plain_trainer(total_timesteps=96 * 3)
    plain.train()
    assert (
        len(said) == 1
        and said[0].startswith("torch.compile failed (")
        and said[0].endswith("training without it")
        and "\n" not in said[0]
    )
    for name, v in plain.policy.state_dict().items():
        assert torch.allclose(found[name], v, rtol=0, atol=2e-6), (
            name
        )  # a loss that is compiled here is PyTorch's there


@pytest.mark.proof
def test_a_compiled_run_has_the_same_weights(tmp_path):
    "To rounding: two updates move them by thousandths."
    (found, said), plain = compiled(tmp_path, True), plain_trainer(total_timesteps=96 * 3)
    plain.train()
    assert said == [] and list((tmp_path / "cache").rglob("*.so"))
    for name, v in plain.policy.state_dict().items():
        assert torch.allclose(found[name], v, rtol=0, atol=2e-6), name


# --- memory -------------------------------------------------------------------------------------------------


class Episodes:
    """Six accounts whose episodes end at random, some of them truncated; rewards and observations by the
    account's own numbers."""

    n_envs, n_actions, obs_dim, device = 6, 3, 4, "cpu"

    def reset(self, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        return self._draw()

    def _draw(self):
        return torch.randn(6, 4, generator=self.random)

    def step(self, actions):
        ends = torch.rand(6, generator=self.random)
        after, final = self._draw(), self._draw()
        terminated, truncated = ends < 0.12, (ends > 0.12) & (ends < 0.3)
        done = (terminated | truncated)[:, None]
        return (
            after,
            after[:, 0] + (actions == 1),
            terminated,
            truncated,
            {"final_obs": torch.where(done, final, after)},
        )


def gru_trainer(env=None, **settings):
    return NativePPOTrainer(
        env or Episodes(),
        NativePPOConfig(
            **{
                **dict(
                    network="gru",
                    gru_hidden_dim=8,
                    n_gru_layers=2,
                    n_steps=10,
                    minibatch_size=25,
                    n_epochs=2,
                    total_timesteps=60 * 3,
                    gamma=0.9,
                    gae_lambda=0.8,
                ),
                **settings,
            }
        ),
        progress=None,
    )


def remembers(weight, x, state):
    """One step of the network by its formulas: Linear-ReLU-LayerNorm twice, gated recurrent units (Cho et
    al. 2014, with the reset gate on the product as in cuDNN), two heads."""

    def w(name):
        return weight[name]

    def normal(x, name):
        return F.layer_norm(x, x.shape[-1:], w(name + ".weight"), w(name + ".bias"))

    def linear(x, name):
        return x @ w(name + ".weight").T + w(name + ".bias")

    for i in (0, 4):
        x = normal(torch.relu(linear(x, f"encoder.{i}")), f"encoder.{i + 2}")
    after = []
    for layer in range(len(state)):
        inputs, own = (
            v.chunk(3, 1)
            for v in (
                x @ w(f"gru.weight_ih_l{layer}").T + w(f"gru.bias_ih_l{layer}"),
                state[layer] @ w(f"gru.weight_hh_l{layer}").T + w(f"gru.bias_hh_l{layer}"),
            )
        )
        reset, update = torch.sigmoid(inputs[0] + own[0]), torch.sigmoid(inputs[1] + own[1])
        x = (1 - update) * torch.tanh(inputs[2] + reset * own[2]) + update * state[layer]
        after.append(x)
    heads = [
        linear(normal(torch.relu(linear(x, f"{name}.hidden")), f"{name}.norm"), f"{name}.{last}")
        for name, last in (("actor_head", "logits"), ("critic_head", "value"))
    ]
    return heads[0], heads[1][:, 0], torch.stack(after)


def replayed(policy, rollout, state, accounts):
    """Logits and values of some accounts, step by step, with nothing remembered from one episode to the
    next; and the state after the last step."""
    weight, logits, values, state = dict(policy.named_parameters()), [], [], state[:, accounts]
    for x, ended in zip(rollout["dense"][:, accounts], rollout["ended"][:, accounts]):
        some, value, state = remembers(weight, x, state)
        logits.append(some)
        values.append(value)
        state = torch.where((ended > 0)[:, None], torch.zeros(()), state)
    return torch.stack(logits).flatten(0, 1), torch.stack(values).flatten(), state


@pytest.mark.slow
def test_recurrent_updates_are_those_of_a_plain_reimplementation():
    """Two joint epochs and four of the critic, in three updates; states are taken along from one rollout
    into the next."""
    trainer = gru_trainer()
    state = torch.zeros(2, 6, 8)
    plain = PlainPPO(
        copy.deepcopy(trainer.policy),
        False,
        lambda rollout, batch: replayed(plain.policy, rollout, state, batch[: len(batch) // 10])[:2],
    )
    rollouts, batches = spied(trainer)
    for share in [0.1, 1.0, 0.01]:  # one update of warm-up, then the two ends of the cosine, on paper
        row = trainer.train(1)[-1]
        rollout = rollouts[-1]
        with torch.no_grad():
            logits, values, after = replayed(plain.policy, rollout, state, torch.arange(6))
        assert (
            torch.allclose(rollout["first_state"], state, atol=1e-5)
            and torch.allclose(rollout["logits"].flatten(0, 1), torch.log_softmax(logits, 1), atol=1e-5)
            and torch.allclose(rollout["value"].flatten(), values, atol=1e-4)
        )
        watched = sum(
            plain.update(rollout, batches[:2], batches[2:], trainer.config, [3e-4 * share], 0.01), []
        )
        for name in watched[0]:
            assert math.isclose(row[name], np.mean([w[name] for w in watched]), rel_tol=2e-3, abs_tol=1e-6), (
                name
            )
        close(trainer.policy, plain.policy, 1e-5)
        assert len(batches) == 2 + 4 and {0, 1, 2} == set(rollout["ended"].flatten().tolist())
        state = after
        batches.clear()


def test_a_minibatch_of_a_recurrent_policy_is_whole_sequences():
    "25 samples hold two sequences of ten steps; one sequence is the least."
    for size, sizes in ((25, [2, 2, 2]), (40, [4, 2]), (3, [1] * 6), (1000, [6])):
        trainer = gru_trainer(minibatch_size=size, total_timesteps=60)
        _, batches = spied(trainer)
        trainer.train(1)
        for epoch in batches:
            steps = [batch.view(10, -1) for batch in epoch]
            assert [s.shape[1] for s in steps] == sizes and torch.cat(
                [s[0] for s in steps]
            ).sort().values.tolist() == list(range(6))
            assert all(torch.equal(s, s[0] + 6 * torch.arange(10)[:, None]) for s in steps)


def test_advantages_of_a_recurrent_policy_remember_the_episode_that_was_cut():
    """The value of a truncated episode's last observation is that of its own memory; by a loop over accounts
    and steps."""
    trainer, finals = gru_trainer(), []
    step = trainer.env.step
    trainer.env.step = lambda actions: (finals.append(step(actions)), finals[-1])[1]
    trainer.collector.begin()
    rollout, weight, state = trainer._rollout(), dict(trainer.policy.named_parameters()), torch.zeros(2, 6, 8)
    values, follows = [], []
    with torch.no_grad():
        for t in range(10):
            _, value, state = remembers(weight, rollout["dense"][t], state)
            _, next_value, _ = remembers(
                weight, finals[t][4]["final_obs"], state
            )  # before anything is forgotten
            values.append(value)
            follows.append(next_value)
            state = torch.where((rollout["ended"][t] > 0)[:, None], torch.zeros(()), state)
    assert ((rollout["ended"] == 2).sum(0) > 0).any()
    for n in range(6):
        running = 0.0
        for t in range(9, -1, -1):
            ended = int(rollout["ended"][t, n])
            delta = (
                float(rollout["reward"][t, n])
                + (0.9 * float(follows[t][n]) if ended != 1 else 0.0)
                - float(values[t][n])
            )
            running = delta + 0.9 * 0.8 * running * (ended == 0)
            assert math.isclose(rollout["advantage"][t, n], running, rel_tol=1e-3, abs_tol=1e-5), (t, n)


class Recall:
    """The first observation of four shows one of two cues, the last one asks; a reward of 1 for the right
    name, at the end."""

    n_envs, n_actions, obs_dim, device = 32, 2, 3, "cpu"

    def reset(self, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        self.t, self.cue = torch.arange(32) % 4, torch.randint(2, (32,), generator=self.random)
        return self._observe()

    def _observe(self):
        shown = F.one_hot(self.cue, 2).float() * (self.t == 0)[:, None]
        return torch.cat([shown, (self.t == 3).float()[:, None]], 1)

    def step(self, actions):
        asked = self.t == 3
        reward = (asked & (actions == self.cue)).float()
        self.t = (self.t + 1) % 4
        self.cue = torch.where(asked, torch.randint(2, (32,), generator=self.random), self.cue)
        obs = self._observe()
        return obs, reward, asked, torch.zeros_like(asked), {"final_obs": obs}


@pytest.mark.slow
def test_a_task_that_needs_memory_is_learned_with_one_and_not_without():
    "A guess is right half of the time: 0.125 a step; 0.25 is the best there is."
    last = {}
    for network in ("gru", "mlp"):
        trainer = NativePPOTrainer(
            Recall(),
            NativePPOConfig(
                network=network,
                gru_hidden_dim=16,
                n_gru_layers=1,
                hidden_dims=(32,),
                n_steps=16,
                minibatch_size=256,
                n_epochs=4,
                total_timesteps=512 * 30,
                learning_rate=1e-2,
                gamma=0.9,
            ),
            progress=None,
        )
        last[network] = np.mean([row["reward"] for row in trainer.train()[-5:]])
    assert last["gru"] > 0.23 and abs(last["mlp"] - 0.125) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("settings", [dict(), dict(separate_optimizers=True)])
def test_a_recurrent_run_is_resumed_bit_for_bit(settings, tmp_path):
    def make():
        return trading_trainer(
            2, network="gru", gru_hidden_dim=8, n_gru_layers=2, total_timesteps=8 * 16 * 3, **settings
        )

    whole, first, second = make(), make(), make()
    whole.train()
    first.train(1)
    assert first.collector.state.abs().max() > 0
    second.load(first.save(tmp_path / "model.pt"))
    second.train()
    assert (
        same(everything(whole), everything(second))
        and same(whole.collector.state, second.collector.state)
        and whole.history == second.history
    )


def test_a_recurrent_network_of_another_size_is_refused_in_one_line(tmp_path):
    path = gru_trainer().save(tmp_path / "model.pt")
    for settings, words in (
        (dict(gru_hidden_dim=16), "16"),
        (dict(n_gru_layers=1), "1"),
        (dict(network="mlp"), "mlp"),
    ):
        line = refusal(gru_trainer(**settings).load, path)
        assert "holds a network of" in line and "gru" in line and words in line.partition("asked for")[2]


# --- what is kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "interval, keep, updates, expected",
    [(0, 3, 7, []), (1, 2, 5, [4, 5]), (2, 3, 7, [2, 4, 6]), (3, 1, 7, [6]), (10, 3, 7, [])],
)
def test_numbered_checkpoints_come_at_their_interval_and_the_newest_are_kept(
    tmp_path, interval, keep, updates, expected
):
    trainer = NativePPOTrainer(
        Plain(),
        NativePPOConfig(
            hidden_dims=(4,),
            n_steps=4,
            minibatch_size=32,
            n_epochs=1,
            total_timesteps=32 * updates,
            checkpoint_interval=interval,
            keep_checkpoints=keep,
        ),
        progress=None,
        folder=RunFolder(tmp_path / "run", keep),
    )
    trainer.train()
    assert sorted(p.name for p in (tmp_path / "run").glob("*")) == [
        f"checkpoint_{n:06d}.pt" for n in expected
    ]
    if expected:
        assert trainer.folder.newest_good()[1]["update"] == expected[-1]


def test_the_best_policy_is_a_file_beside_them(tmp_path):
    trainer, _ = judged(sharpes=[1.0, 3.0, 2.0, 2.5], checkpoint_interval=1)
    trainer.folder = RunFolder(tmp_path, 1)
    trainer.train()
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["best_000002.pt", "checkpoint_000004.pt"]
        and trainer.folder.best(2)["metrics"]["validation_score"] == 3.0
    )
