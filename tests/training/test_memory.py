"""What a rollout takes: bytes on paper, bytes that buffers and networks really take, and requests that are
cut until they fit."""

import functools
import json
import os
import random
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trading_lib.config import InputError
from trading_lib.kernels import layers as fused
from trading_lib.networks import NativeActorCritic
from trading_lib.policy.recurrent import RecurrentActorCritic
from trading_lib.training.memory import (
    BYTES_PER_PARAMETER,
    MemoryUse,
    RolloutShape,
    allocate_rollout,
    buffer_bytes,
    device_cap,
    fit_to_memory,
    memory_in_use,
    memory_limit,
    memory_text,
    memory_use,
    rollout_bytes,
    sample_bytes,
    sample_fields,
)

GB = 10**9


def refusal(make, *arguments, **named) -> str:
    "The one line that a mistake gets."
    with pytest.raises(InputError) as e:
        make(*arguments, **named)
    assert "\n" not in str(e.value)
    return str(e.value)


# --- one sample ---


@pytest.mark.parametrize(
    "dense_floats, n_actions, indexed, expected",
    [
        # observation + action 8 + log-probability 4 + value 4 + reward 4 + ended 1 + logits 4 each
        (64, 16, False, 64 * 4 + 8 + 4 + 4 + 4 + 1 + 16 * 4),
        (64, 16, False, 341),
        (5800, 8, False, 23_253),
        (0, 8, True, 61),
        (6, 7, True, 81),
        (1, 2, False, 33),
    ],
)
def test_bytes_of_a_sample_on_paper(dense_floats, n_actions, indexed, expected):
    assert sample_bytes(dense_floats, n_actions, indexed) == expected


def test_what_is_stored_of_a_sample():
    assert sample_fields(3, 5, indexed=True) == {
        "index": (torch.int64, 0),
        "dense": (torch.float32, 3),
        "action": (torch.int64, 0),
        "log_probability": (torch.float32, 0),
        "value": (torch.float32, 0),
        "reward": (torch.float32, 0),
        "ended": (torch.uint8, 0),
        "logits": (torch.float32, 5),
    }
    assert "index" not in sample_fields(3, 5) and "dense" not in sample_fields(0, 5, indexed=True)
    assert RolloutShape(5800, 8).fields == sample_fields(5800, 8) and RolloutShape(
        5900, 7, own_columns=6, folded_inputs=860
    ).fields == sample_fields(6, 7, indexed=True)
    assert RolloutShape(5800, 8).inputs == 5800 and RolloutShape(5800, 8, 0, 355).inputs == 355


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((0, 8), "dense_floats: expected more than 0"),
        ((-1, 8, True), "was -1"),
        ((4, 0), "n_actions: expected 1 or more, was 0"),
    ],
)
def test_a_sample_of_nothing_is_refused(arguments, words):
    assert words in refusal(sample_fields, *arguments)


# --- buffers ---


@pytest.mark.parametrize(
    "n_envs, n_steps, dense_floats, n_actions, indexed, state",
    [
        (4, 6, 10, 3, False, None),
        (5, 1, 0, 8, True, None),
        (1, 7, 6, 1, True, (2, 16)),
        (64, 128, 64, 16, False, (1, 256)),
    ],
)
def test_buffers_take_the_predicted_bytes(n_envs, n_steps, dense_floats, n_actions, indexed, state):
    fields = sample_fields(dense_floats, n_actions, indexed)
    buffers = allocate_rollout(n_envs, n_steps, fields, "cpu", state)
    taken = sum(t.untyped_storage().nbytes() for t in buffers.values())
    remembered = 4 * state[0] * n_envs * state[1] if state else 0
    assert (
        taken
        == n_envs * n_steps * sample_bytes(dense_floats, n_actions, indexed) + remembered
        == buffer_bytes(n_envs, n_steps, fields, state)
    )
    assert rollout_bytes(n_envs, n_steps, fields, state) == 3 * taken // 2
    assert buffers.keys() == fields.keys() | ({"state"} if state else set())
    for name, (dtype, width) in fields.items():
        assert buffers[name].dtype == dtype and tuple(buffers[name].shape) == (
            n_steps,
            n_envs,
            *([width] if width else []),
        ), name
    if state:
        assert (
            tuple(buffers["state"].shape) == (state[0], n_envs, state[1])
            and buffers["state"].dtype == torch.float32
        )


def test_a_rollout_on_paper():
    assert rollout_bytes(64, 128, sample_fields(64, 16)) == 64 * 128 * 341 * 1.5 == 4_190_208


@pytest.mark.slow
def test_the_operating_system_hands_out_what_was_predicted():
    """Pages that are written are resident: 150 MB of whole windows, in a process that keeps nothing of what
    others freed in it."""
    if memory_in_use() is None:
        pytest.skip("this system does not say how much memory a process holds")
    code = """
from trading_lib.training.memory import *
before, buffers = memory_in_use(), allocate_rollout(64, 100, sample_fields(5800, 8))
for t in buffers.values():
    t.fill_(1)
print(memory_in_use() - before)
"""
    predicted, taken = (
        buffer_bytes(64, 100, sample_fields(5800, 8)),
        int(
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
        ),
    )
    assert predicted == 148_819_200 and abs(taken - predicted) < 0.02 * predicted


def test_memory_that_is_not_to_be_had_is_one_line():
    words = refusal(allocate_rollout, 2**40, 64, sample_fields(64, 16))  # 24 petabytes
    assert "on cpu" in words and "use fewer" in words and f"{2**40:,}" in words


# --- the rest of a run ---


class Peak(TorchDispatchMode):
    "Bytes of all storages that torch makes while this is on, at their highest."

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def _drop(self, key):
        self.now -= self.live.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor):
                continue
            storage = t.untyped_storage()
            if storage._cdata in self.live:
                continue
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata)
        return out


def peak_of_a_step(policy, evaluate, samples, inputs):
    """A gathered minibatch of `samples`, a PPO-like loss, gradients and an Adam step.

    The second one, when the moments stand.
    """
    optimizer, data, action = (
        torch.optim.Adam(policy.parameters(), fused=True),
        torch.randn(samples, inputs),
        torch.randint(2, (samples, 1)),
    )
    for _ in range(2):
        with Peak() as measured:
            optimizer.zero_grad(set_to_none=True)
            batch = torch.randperm(samples)
            logits, value = evaluate(data[batch])
            log_probabilities = logits.log_softmax(-1)
            ratio = (log_probabilities.gather(1, action[batch]).squeeze(1) + 0.7).exp()
            loss = (
                -torch.minimum(ratio, ratio.clamp(0.8, 1.2)).mean()
                + 0.5 * (value**2).mean()
                + 0.01 * (log_probabilities.exp() * log_probabilities).sum(1).mean()
            )
            loss.backward()
            optimizer.step()
    return measured.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs, hidden_dims, shared_trunk",
    [
        (355, (512, 256, 128), True),
        (355, (512, 256, 128), False),
        (355, (1024, 512, 256), True),
        (64, (256, 128, 64), True),
        (5800, (256, 128, 64), True),
    ],
)
def test_activations_of_a_real_minibatch_are_within_the_estimate(
    inputs, hidden_dims, shared_trunk, monkeypatch
):
    """And the estimate is about twice what they take at most, where PyTorch alone computes.

    With two trunks the gradients of one are gone when those of the other come.
    """
    monkeypatch.setattr(fused, "compiles", lambda *given: False)
    samples, policy = 2048, NativeActorCritic(inputs, 8, hidden_dims, shared_trunk)
    n = sum(p.numel() for p in policy.parameters())
    widths = (*hidden_dims * (1 if shared_trunk else 2), 8, 1)
    predicted = memory_use(
        1, samples, samples, sample_fields(inputs, 8), inputs=inputs, widths=widths
    ).minibatch
    assert predicted == samples * (inputs + 3 * sum(widths)) * 4
    taken = peak_of_a_step(policy, policy.evaluate, samples, inputs)
    # weights and moments are no news in that step; its gradients, and a copy while they are made, are the
    # model's
    assert (
        0.5 if shared_trunk else 0.48
    ) * predicted < taken - 4 * n < predicted + 4 * n and taken < predicted + (BYTES_PER_PARAMETER - 12) * n


COMPILED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_memory import peak_of_a_step
from trading_lib.kernels.layers import compiles
from trading_lib.networks import NativeActorCritic
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
samples, inputs, hidden_dims = {samples}, {inputs}, {hidden_dims}
policy = NativeActorCritic(inputs, 8, hidden_dims)
peak_of_a_step(policy, policy.evaluate, 512, inputs)  # what libraries take once
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
peak_of_a_step(policy, policy.evaluate, samples, inputs)
weights = sum(weight.numel() for weight, _ in policy.trunk.layers)
compiled = compiles(torch.device("cpu"), torch.float32, samples, weights)
data = 4 * samples * inputs  # of which a minibatch is gathered
print(int(compiled), status("VmHWM") - before - data)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not forget a memory peak"
)
@pytest.mark.parametrize(
    "inputs, hidden_dims",
    [(355, (512, 256, 128)), (355, (256, 128, 64)), (1000, (256, 128, 64)), (20, (64, 64))],
    ids=str,
)
def test_compiled_layers_take_no_more(inputs, hidden_dims):
    "With all that they allocate themselves, as the system counts it, in a process of its own."
    samples = 12_288
    code = COMPILED.format(
        tests=os.path.dirname(__file__), samples=samples, inputs=inputs, hidden_dims=hidden_dims
    )
    compiled, taken = map(
        int,
        subprocess.run(
            [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.split(),
    )
    if not compiled:
        pytest.skip("this machine has no compiled layers")
    n = sum(p.numel() for p in NativeActorCritic(inputs, 8, hidden_dims).parameters())
    least = samples * sum(hidden_dims) * 4  # the outputs, without which there is no way back
    assert (
        least
        < taken
        < memory_use(
            1, samples, samples, sample_fields(inputs, 8), inputs=inputs, widths=(*hidden_dims, 8, 1)
        ).minibatch
        + BYTES_PER_PARAMETER * n
    )


@pytest.mark.slow
@pytest.mark.parametrize("inputs, width, layers", [(64, 256, 2), (64, 128, 1), (355, 128, 2)])
def test_activations_of_a_recurrent_minibatch_are_within_the_estimate(inputs, width, layers):
    steps, accounts = 32, 64
    policy = RecurrentActorCritic(inputs, 8, width, layers).eval()
    n, state, starts = (
        sum(p.numel() for p in policy.parameters()),
        policy.initial_state(accounts),
        torch.rand(steps, accounts) < 0.05,
    )
    widths = (width, width, *[4 * width] * layers, width // 2, width // 2, 8, 1)
    predicted = memory_use(
        1, steps * accounts, steps * accounts, sample_fields(inputs, 8), inputs=inputs, widths=widths
    ).minibatch

    def flat(x):
        return (lambda logits, values, _: (logits.flatten(0, 1), values.flatten()))(
            *policy.evaluate_sequences(x.view(steps, accounts, inputs), state, starts)
        )

    taken = peak_of_a_step(policy, flat, steps * accounts, inputs)
    assert 0.5 * predicted < taken - 4 * n < predicted + 4 * n


def test_steps_and_minibatches_take_turns():
    fields = sample_fields(0, 8, indexed=True)
    use = memory_use(1000, 10, 100, fields, model_bytes=7, inputs=50, widths=(20, 10))
    # 1,000 × 10 × 61 × 1.5; 3 × 1,000 × 50 × 4; 100 × (50 + 3 × 30) × 4
    assert use == (915_000, 600_000, 56_000, 7) and use.total == 915_000 + 600_000 + 7
    assert (
        memory_use(10, 1000, 10_000, fields, model_bytes=7, inputs=50, widths=(20, 10)).total
        == 915_000 + 5_600_000 + 7
    )
    assert (
        memory_use(10, 10, 10_000, fields, inputs=50, widths=(20, 10)).minibatch == 100 * 140 * 4
    )  # a minibatch is never more than the rollout
    assert memory_use(1000, 10, 100, fields, inputs=50, widths=(20, 60), number_bytes=2)[1:3] == (
        3 * 1000 * 60 * 2,
        100 * (50 + 240) * 2,
    )
    assert (
        str(MemoryUse(2 * GB, 3 * GB, 4 * GB, 5_000_000))
        == "6.0 GB: rollout 2.0 GB, step 3.0 GB or minibatch 4.0 GB, model 5 MB"
    )


@pytest.mark.parametrize(
    "n, words",
    [
        (341, "0 kB"),
        (999_000, "1 MB"),
        (4_190_208, "4 MB"),
        (999_400_000, "999 MB"),
        (999_600_000, "1.0 GB"),
        (45 * GB, "45.0 GB"),
        (99_940_000_000, "99.9 GB"),
        (1_175_300_000_000, "1,175 GB"),
    ],
)
def test_bytes_in_words(n, words):
    assert memory_text(n) == words


# --- limits ---


@pytest.mark.parametrize(
    "index, free, caps, expected",
    [
        (0, 150 * GB, {}, 45 * GB),
        (1, 150 * GB, {}, 20 * GB),
        (7, 150 * GB, {}, 20 * GB),
        (0, 12 * GB, {}, 12 * GB),
        (1, 12 * GB, {}, 12 * GB),
        (0, 150 * GB, {"max_vram_gpu0": 140}, 140 * GB),
        (1, 150 * GB, {"max_vram_gpu0": 140}, 20 * GB),
        (2, 150 * GB, {"max_vram_gpu1": 30.5}, 30_500_000_000),
    ],
)
def test_the_cap_of_a_gpu(index, free, caps, expected):
    assert device_cap(index, free, **caps) == expected


@pytest.mark.parametrize("caps", [{"max_vram_gpu0": 0}, {"max_vram_gpu1": -5}])
def test_a_cap_of_nothing_is_refused(caps):
    assert f"train.{next(iter(caps))}: expected more than 0 GB" in refusal(device_cap, 0, GB, **caps)


def test_a_cpu_may_use_four_fifths_of_what_is_available():
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("not Linux")
    numbers = {
        line.split(":")[0]: 1024 * int(line.split()[1])
        for line in meminfo.read_text().splitlines()
        if len(line.split()) > 1
    }
    limit = memory_limit("cpu")
    assert 0 < limit <= 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not Path("/sys/fs/cgroup/memory.max").exists():
        assert abs(limit - 0.8 * numbers["MemAvailable"]) < 0.5 * GB


# --- cut until it fits ---

WINDOWS, INDICES = sample_fields(5800, 8), sample_fields(0, 8, indexed=True)
ABSURD = dict(
    n_envs=65_536,
    n_steps=512,
    minibatch_size=65_536,
    fields=WINDOWS,
    inputs=5800,
    widths=(1024, 512, 256, 8, 1),
    model_bytes=20 * 6_598_665,
)


def test_an_absurd_request_is_cut_with_a_line():
    """65,536 × 512 samples of 23,253 bytes, and half as much again, are 1,170 GB. Each halving of the
    environments halves that: 4,096 of them still take 73 GB, 2,048 take 36.6; minibatch 2.9 and model 0.1
    come on top.
    """
    asked = (
        65_536 * 512 * 23_253 * 1.5 + max(3 * 65_536 * 5800, 65_536 * (5800 + 3 * 1801)) * 4 + 20 * 6_598_665
    )
    used = 2048 * 512 * 23_253 * 1.5 + 65_536 * (5800 + 3 * 1801) * 4 + 20 * 6_598_665
    fit = fit_to_memory(**ABSURD, limit=45 * GB)
    assert fit[:3] == (2048, 512, 65_536) and 2 * 36.5e9 > 45e9 > used
    assert (
        fit.warnings
        == [
            f"n_envs: 65,536 would take {asked / 1e9:,.0f} GB with the rest as asked, "
            f"and 45.0 GB may be used; 2,048 is used instead ({used / 1e9:.1f} GB in all)"
        ]
        and "1,175 GB" in fit.warnings[0]
    )
    assert fit_to_memory(**{**ABSURD, "fields": INDICES, "inputs": 355}, limit=45 * GB) == (
        65_536,
        512,
        65_536,
        [],
    )  # indices of the same are 3 GB


def test_less_memory_cuts_all_three():
    fit = fit_to_memory(**ABSURD, limit=2 * GB)
    assert (
        [line.split(":")[0] for line in fit.warnings] == ["n_envs", "n_steps", "minibatch_size"]
        and fit.n_envs * fit.n_steps < 2048 * 512 / 16
        and fit.minibatch_size < 65_536
    )
    for line, name in zip(fit.warnings, ("n_envs", "n_steps", "minibatch_size")):
        assert (
            f"{ABSURD[name]:,} would take 1,175 GB" in line
            and f"2.0 GB may be used; {getattr(fit, name):,} is used" in line
        )


def test_what_fits_is_left_alone():
    assert fit_to_memory(2048, 512, 8192, INDICES, GB) == (2048, 512, 8192, []) and fit_to_memory(
        2048, 512, 8192, WINDOWS, None
    ) == (2048, 512, 8192, [])


@pytest.mark.parametrize("limit", [None, GB])
def test_a_minibatch_of_more_than_the_rollout_is_the_rollout(limit):
    fit = fit_to_memory(4, 16, 2048, INDICES, limit)
    assert fit[:3] == (4, 16, 64) and fit.warnings == [
        "minibatch_size: 2,048 is more than the 64 samples of a rollout (4 environments × 16 steps); "
        "all of them are one minibatch"
    ]
    assert fit_to_memory(4, 16, 64, INDICES, limit) == (4, 16, 64, [])


def test_a_minibatch_that_outweighs_the_rollout_is_cut_alone():
    "1,024 × 64 indices take 6 MB; a minibatch of all of them through a layer of 4,096 takes 3.3 GB."
    fit = fit_to_memory(1024, 64, 65_536, INDICES, GB, inputs=355, widths=(4096, 8, 1))
    assert (
        fit[:3] == (1024, 64, 65_536 // 4)
        and len(fit.warnings) == 1
        and fit.warnings[0].startswith("minibatch_size: 65,536 would take 3.3 GB")
    )


def test_an_environment_that_stands_keeps_its_accounts():
    fit = fit_to_memory(**ABSURD, limit=45 * GB, fixed_envs=True)
    assert fit[:3] == (65_536, 16, 65_536) and fit.warnings[0].startswith("n_steps: 512 would take 1,175 GB")


@pytest.mark.parametrize("settings", [{}, {"fixed_envs": True}])
def test_a_model_that_does_not_fit_is_said_plainly(settings):
    words = refusal(fit_to_memory, **ABSURD, limit=10**8, **settings)
    assert "the model takes 132 MB" in words and "100 MB may be used" in words and "smaller network" in words


@pytest.mark.parametrize("name", ["n_envs", "n_steps", "minibatch_size"])
def test_a_size_of_nothing_is_refused(name):
    assert f"train.{name}: expected 1 or more, was 0" in refusal(
        fit_to_memory, **{**ABSURD, name: 0}, limit=GB
    )


def total_use(settings, sizes):
    return memory_use(**sizes, **settings).total


def test_whatever_is_asked_it_fits_and_not_by_more_than_it_must():
    """Thousand random requests: within the limit, never more than asked, and a halving less would not have
    done."""
    draw, cut = random.Random(0), 0
    for _ in range(1000):
        asked = dict(
            n_envs=draw.randint(1, 100_000),
            n_steps=draw.randint(1, 4096),
            minibatch_size=draw.randint(1, 100_000),
        )
        rest = dict(
            fields=sample_fields(draw.choice([4, 64, 5800]), 8),
            inputs=draw.choice([4, 355, 5800]),
            widths=(draw.choice([16, 1024]), 8, 1),
            state=draw.choice([None, (2, 256)]),
        )
        limit = int(10 ** draw.uniform(7, 11))
        try:
            fit = fit_to_memory(**asked, **rest, limit=limit)
        except InputError:
            assert memory_use(1, 1, 1, **rest).total > limit
            continue
        found, total = dict(zip(asked, fit[:3])), functools.partial(total_use, rest)
        assert (
            total(found) <= limit
            and all(1 <= found[k] <= asked[k] for k in asked)
            and fit.minibatch_size <= fit.n_envs * fit.n_steps
        )
        assert bool(fit.warnings) == (found != asked) and len(fit.warnings) <= 3
        if total(asked) <= limit:
            assert found == asked | {
                "minibatch_size": min(asked["minibatch_size"], asked["n_envs"] * asked["n_steps"])
            }
            continue
        # the last halving was needed; one of environments or steps may have taken the minibatch with it
        whole = (
            {"minibatch_size": 2 * found["minibatch_size"]}
            if found["minibatch_size"] >= fit.n_envs * fit.n_steps - 1
            else {}
        )
        assert any(
            total(found | whole | {k: 2 * found[k] + 1}) > limit for k in asked if found[k] != asked[k]
        )
        cut += 1
    assert cut > 200


# --- what a run keeps, over thousands of updates ---

LONG_RUN = """
import json, os, sys
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data
from trading_lib.features import fit_features
from trading_lib.training.memory import memory_in_use
from trading_lib.training.run_folder import RunFolder
from trading_lib.sources import simulate_bars
from trading_lib.training.config import NativePPOConfig
from trading_lib.trainer import NativePPOTrainer

network, version, updates = sys.argv[1], sys.argv[2], int(sys.argv[3])
bars = simulate_bars("SIM-USD", "15Min", "2023-01-01", "2023-03-01", seed=1, asset_class="crypto")
fit = fit_features(bars[:4000], version, "15Min", "crypto")
market = market_data(bars, version, fit, "15Min", "crypto", window=10, symbol="SIM-USD")
of_accounts = GPUEnvConfig(n_envs=8, version=version, window=10, episode_length=37)
env = GPUVectorizedTradingEnv(market.span(0, 4000), of_accounts)
config = NativePPOConfig(
    network=network,
    hidden_dims=(32, 16),
    gru_hidden_dim=16,
    n_gru_layers=1,
    n_steps=64,
    minibatch_size=200,
    n_epochs=1,
    critic_epochs=0,
    total_timesteps=512 * updates,
    amp=True,
    validation_interval=100,
    checkpoint_interval=200,
)
trainer = NativePPOTrainer(env, config, market.span(4000, 4400), None, RunFolder("run"))
seen = {}
while trainer.update < updates:
    trainer.train(updates // 20)
    seen[trainer.update] = (memory_in_use() / 1e6, len(os.listdir("/proc/self/fd")))
print(json.dumps(seen))
"""


@pytest.mark.proof
@pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="this system does not say what a process holds"
)
@pytest.mark.parametrize("network, version", [("mlp", "5.6.0"), ("mlp", "2.7.0"), ("gru", "5.6.0")])
def test_a_long_run_in_half_precision_grows_by_nothing(network, version, tmp_path):
    """2,000 updates, in a process of their own: what oneDNN keeps for each new number of rows came to a
    gigabyte."""
    code = subprocess.run(
        [sys.executable, "-c", LONG_RUN, network, version, "2000"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert code.returncode == 0, code.stderr[-2000:]
    seen = {int(update): of for update, of in json.loads(code.stdout.splitlines()[-1]).items()}
    print(network, version, {update: f"{mb:.0f} MB, {files} files" for update, (mb, files) in seen.items()})
    early, late = seen[1000], seen[2000]
    assert late[0] - early[0] < 20 and late[1] == early[1], seen
