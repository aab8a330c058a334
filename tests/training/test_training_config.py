"""What a run is made of, and who decided it:
tiers, modes, durations and explicit numbers, on devices that need not be here; what does not fit is cut."""

import math
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest
import torch

from trading_lib.config import MODES, InputError, ModeParameters
from trading_lib.networks import NativeActorCritic, input_layout
from trading_lib.policy.recurrent import RecurrentActorCritic
from trading_lib.training.config import (
    CPU_STEP_SHARE,
    DEVICES,
    HIGH_VRAM,
    LOW_VRAM,
    TIERS,
    NativePPOConfig,
    budget_warnings,
    config_rows,
    config_table,
    describe,
    fit_config,
    get_a100_config,
    get_auto_config,
    hardware_tier,
    interval_in_force,
    is_due,
    layer_widths,
    memory_of,
    parameters_of,
    resolve_device,
    tier_of,
    training_budget,
)
from trading_lib.training.memory import RolloutShape, allocate_rollout, device_cap


def refusal(make, *arguments, **named) -> str:
    "The one line that a mistake gets."
    with pytest.raises(InputError) as e:
        make(*arguments, **named)
    assert "\n" not in str(e.value)
    return str(e.value)


# --- the numbers --------------------------------------------------------------------------------------------


def test_the_defaults_are_the_stated_ones():
    c = NativePPOConfig()
    assert (
        c.gamma,
        c.clip_range,
        c.entropy_coefficient,
        c.value_coefficient,
        c.max_grad_norm,
        c.n_epochs,
        c.learning_rate,
        c.gae_lambda,
    ) == (0.99, 0.2, 0.01, 0.5, 0.5, 10, 3e-4, 0.95)
    assert (
        c.max_drawdown_threshold,
        c.drawdown_penalty_weight,
        c.shared_trunk,
        c.target_kl,
        c.value_clip_range,
    ) == (0.15, 0.2, True, None, None)


NOT_WHOLE, NOT_A_NUMBER, NOT_A_FLAG = ["many", 1.5], ["much", [1.0]], ["maybe", 2]
REFUSED = dict(
    hidden_dims=["big", [], [1.5], 64],
    shared_trunk=NOT_A_FLAG,
    network=["lstm", None, 1],
    gru_hidden_dim=[0, 1, *NOT_WHOLE, None],
    n_gru_layers=[0, *NOT_WHOLE, None],
    dropout=[-0.1, 1.0, *NOT_A_NUMBER, None],
    n_envs=[0, -1, *NOT_WHOLE],
    n_steps=[0, *NOT_WHOLE, None],
    minibatch_size=[0, *NOT_WHOLE],
    n_epochs=[0, *NOT_WHOLE],
    critic_epochs=[-1, *NOT_WHOLE],
    total_timesteps=[0, *NOT_WHOLE],
    learning_rate=[0, -1e-3, *NOT_A_NUMBER],
    separate_optimizers=NOT_A_FLAG,
    critic_learning_rate=[0, -1e-3, *NOT_A_NUMBER, None],
    gamma=[-0.1, 1.1, *NOT_A_NUMBER],
    gae_lambda=[-0.1, 1.1, *NOT_A_NUMBER],
    clip_range=[*NOT_A_NUMBER, None],
    value_clip_range=NOT_A_NUMBER,
    entropy_coefficient=[*NOT_A_NUMBER, None],
    value_coefficient=[*NOT_A_NUMBER, None],
    max_grad_norm=[0, *NOT_A_NUMBER],
    target_kl=NOT_A_NUMBER,
    cost_warm_up=[-0.1, 1.1, *NOT_A_NUMBER],
    warmup_fraction=[-0.1, 1.1, *NOT_A_NUMBER, None],
    min_lr_fraction=[-0.1, 1.1, *NOT_A_NUMBER, None],
    amp=NOT_A_FLAG,
    amp_dtype=["fp32", None],
    compile=NOT_A_FLAG,
    seed=[*NOT_WHOLE, None],
    validation_interval=[0, *NOT_WHOLE],
    checkpoint_interval=[-1, *NOT_WHOLE, None],
    keep_checkpoints=[0, *NOT_WHOLE, None],
    recovery=NOT_A_FLAG,
    early_stop=NOT_A_FLAG,
    patience=[0, -1, *NOT_WHOLE],
    max_drawdown_threshold=[*NOT_A_NUMBER, None],
    drawdown_penalty_weight=[*NOT_A_NUMBER, None],
    tier=[1, None],
    mode=[1, None],
    mode_timesteps=[0, -1, *NOT_WHOLE],
)


def test_every_field_of_the_configuration_is_checked():
    assert set(REFUSED) == {f.name for f in fields(NativePPOConfig)}
    for name, values in REFUSED.items():
        for bad in values:
            assert refusal(NativePPOConfig, **{name: bad}).startswith(f"NativePPOConfig.{name}: expected"), (
                name,
                bad,
            )
    assert "did you mean 'hidden_dims'" in refusal(NativePPOConfig, hiden_dims=[64])


@pytest.mark.parametrize(
    "name, bad",
    [
        ("hidden_dims", [0]),
        ("clip_range", 0),
        ("clip_range", -0.2),
        ("value_clip_range", -0.2),
        ("target_kl", -0.01),
        ("checkpoint_interval", -1),
        ("max_drawdown_threshold", 0),
    ],
)
def test_numbers_that_make_no_sense_are_refused(name, bad):
    assert name in refusal(NativePPOConfig, **{name: bad})


GPUS = [
    ("NVIDIA H200", 150.8, "h200", (1024, 512, 256), 2048, 512, 8192),
    ("NVIDIA H100 80GB HBM3", 85.0, "h200", (1024, 512, 256), 2048, 512, 8192),
    ("NVIDIA A100-SXM4-80GB", 85.1, "a100-80", (1024, 512, 256), 2048, 512, 8192),
    ("NVIDIA A100-SXM4-40GB", 42.3, "a100-40", (1024, 512, 256), 1024, 512, 4096),
    ("NVIDIA L40S", 47.7, "high", (512, 256, 128), 1024, 512, 4096),
    ("NVIDIA RTX A6000", 50.9, "high", (512, 256, 128), 1024, 512, 4096),
    ("NVIDIA GeForce RTX 4090", 25.4, "medium", (512, 256, 128), 512, 512, 2048),
    ("Tesla V100-SXM2-32GB", 34.1, "medium", (512, 256, 128), 512, 512, 2048),
    ("Tesla T4", 15.8, "low", (256, 128, 64), 256, 512, 2048),
    ("NVIDIA GeForce RTX 3060", 12.6, "low", (256, 128, 64), 256, 512, 2048),
]


def simulate_gpu(monkeypatch, name, gigabytes):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(name=name, total_memory=int(gigabytes * 1e9)),
    )


@pytest.mark.parametrize("name, gigabytes, tier, hidden_dims, n_envs, n_steps, minibatch_size", GPUS)
def test_the_tier_of_a_gpu(monkeypatch, name, gigabytes, tier, hidden_dims, n_envs, n_steps, minibatch_size):
    simulate_gpu(monkeypatch, name, gigabytes)
    for mode in MODES:  # a mode never resets what the tier chose
        c = get_auto_config(training_mode=mode)
        assert (c.tier, c.hidden_dims, c.n_envs, c.n_steps, c.minibatch_size, c.amp) == (
            tier,
            hidden_dims,
            n_envs,
            n_steps,
            minibatch_size,
            True,
        )
    assert get_auto_config(device="cuda:1").tier == tier and get_auto_config(device="cpu").tier == "cpu"


@pytest.mark.parametrize(
    "name, gigabytes, tier",
    [
        ("NVIDIA RTX A1000 Laptop GPU", 4.2, "low"),
        ("NVIDIA RTX A1000", 8.3, "low"),
        ("NVIDIA GH200 480GB", 101.5, "h200"),
    ],
)
def test_a_name_that_contains_another_does_not_mislead(monkeypatch, name, gigabytes, tier):
    simulate_gpu(monkeypatch, name, gigabytes)
    assert hardware_tier() == tier


def test_the_cpu_tier_is_sized_for_two_cores():
    for mode in MODES:
        c = get_auto_config(training_mode=mode, device="cpu")
        assert (c.tier, c.hidden_dims, c.n_envs, c.n_steps, c.minibatch_size) == (
            "cpu",
            (256, 128, 64),
            64,
            128,
            2048,
        )
        assert (
            c.total_timesteps
            == int(MODES[mode].steps("crypto") * CPU_STEP_SHARE)
            < MODES[mode].steps("crypto")
            and c.mode == mode
        )


@pytest.mark.parametrize(
    "mode, steps, interval, saving",
    [
        ("quick_test", 10_000_000, 1, 0),
        ("standard", 50_000_000, 4, 50),
        ("thorough", 100_000_000, 9, 75),
        ("production", 200_000_000, 19, 75),
        ("extended", 500_000_000, 47, 100),
    ],
)
def test_the_budget_of_a_mode_on_a_big_gpu(monkeypatch, mode, steps, interval, saving):
    "2,048 × 512 steps an update: 500 M are 477 updates, and every run has about ten validations."
    simulate_gpu(monkeypatch, "NVIDIA H200", 150.8)
    c = get_auto_config(training_mode=mode)
    updates = math.ceil(steps / (2048 * 512))
    assert (c.total_timesteps, c.validation_interval, c.checkpoint_interval, c.mode) == (
        steps,
        interval,
        saving,
        mode,
    ) and interval == max(1, updates // 10)
    assert mode != "extended" or updates == 477


@pytest.mark.parametrize(
    "updates, expected", [(1, 1), (9, 1), (19, 1), (20, 2), (49, 4), (50, 5), (51, 5), (1000, 5)]
)
def test_the_validation_interval_is_the_modes_or_a_tenth_of_the_updates(updates, expected):
    c = get_auto_config(updates * 64 * 128, "quick_test", "cpu")
    assert (
        c.validation_interval
        == expected
        == max(1, min(MODES["quick_test"].validation_interval, updates // 10))
    )
    assert (
        get_auto_config(updates * 64 * 128 - 1, "quick_test", "cpu").validation_interval == expected
    )  # updates are counted by ceil
    assert (
        get_auto_config(updates * 64 * 128, "quick_test", "cpu", validation_interval=7).validation_interval
        == 7
    )


def test_tier_then_mode_then_explicit_values():
    modes = {**MODES, "own": ModeParameters(8_000_000, 3, 4)}
    c = get_auto_config(
        training_mode="own",
        device="cpu",
        modes=modes,
        hidden_dims=[8],
        n_envs=4,
        learning_rate=1e-3,
        seed=None,
        checkpoint_interval=9,
    )
    assert (
        c.hidden_dims,
        c.n_envs,
        c.n_steps,
        c.learning_rate,
        c.seed,
        c.checkpoint_interval,
        c.total_timesteps,
    ) == ((8,), 4, 128, 1e-3, 0, 9, int(8_000_000 * CPU_STEP_SHARE))
    assert (
        get_auto_config(1234, "own", "cpu", modes=modes).total_timesteps == 1234
    )  # explicit: not scaled down
    assert (
        get_auto_config(training_mode="own", device="cpu", modes=modes, cost_warm_up=0.0).cost_warm_up == 0.0
        and get_auto_config(training_mode="own", device="cpu", modes=modes).checkpoint_interval == 4
    )
    assert (
        get_auto_config(training_mode="quick_test", device="cpu", amp=True).amp is True
        and get_auto_config(training_mode="quick_test", device="cpu", amp=False).amp is False
    )


@pytest.mark.parametrize(
    "mode, crypto, equity",
    [("quick_test", 0, 0), ("thorough", 0, 0), ("auto", 0, 0), ("production", 1, 0), ("extended", 1, 0)],
)
def test_a_budget_that_crypto_overtrains_with_is_said_in_one_line(mode, crypto, equity):
    assert (len(budget_warnings(mode, "crypto")), len(budget_warnings(mode, "equity"))) == (crypto, equity)
    for line in budget_warnings(mode, "crypto"):
        assert line == (
            f"mode {mode}: crypto agents peak at 50 M to 100 M steps and overtrade at 200 M; `auto` "
            "has the budget that suits crypto"
        )
    assert "did you mean 'production'" in refusal(
        budget_warnings, "produktion", "crypto"
    ) and "did you mean 'equity'" in refusal(budget_warnings, mode, "equities")


def test_a_mode_may_have_a_budget_for_each_asset_class():
    modes = {"own": ModeParameters({"crypto": 7_000, "equity": 9_000}, 3, 0)}
    assert [
        get_auto_config(training_mode="own", tier="h200", asset_class=kind, modes=modes).total_timesteps
        for kind in ("crypto", "equity")
    ] == [7_000, 9_000]
    assert "unknown name 'crypto'" in refusal(
        get_auto_config,
        training_mode="own",
        device="cpu",
        asset_class="crypto",
        modes={"own": ModeParameters({"equity": 5}, 3, 0)},
    )


def test_auto_takes_the_budget_of_the_asset_class_and_the_intervals_of_production(monkeypatch):
    simulate_gpu(monkeypatch, "NVIDIA GeForce RTX 4090", 25.4)
    crypto, equity = get_auto_config(), get_auto_config(asset_class="equity")
    assert (crypto.total_timesteps, equity.total_timesteps) == (100_000_000, 50_000_000)
    assert (
        crypto.mode == equity.mode == "auto"
        and crypto.checkpoint_interval == 75
        and crypto.validation_interval == min(40, 382 // 10) == 38
        and equity.validation_interval == 191 // 10
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            dict(training_mode="produktion"),
            "train.mode: unknown name 'produktion'; did you mean 'production'?",
        ),
        (dict(training_mode="zzzz"), "auto, extended, production"),
        (dict(asset_class="stocks"), "asset"),
        (dict(n_envs=0), "n_envs"),
        (dict(n_steps=0), "n_steps"),
        (dict(hiden_dims=[8]), "did you mean 'hidden_dims'"),
        (dict(total_timesteps=0), "total_timesteps"),
        (dict(total_timesteps=-5), "total_timesteps"),
        (dict(device="gpu"), "expected auto, cpu, cuda"),
    ],
)
def test_a_bad_request_is_refused(arguments, words):
    assert words in refusal(get_auto_config, **{"device": "cpu", **arguments})


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        "no GPU" in refusal(get_auto_config, device="cuda")
        and get_auto_config(training_mode="quick_test", device="auto").tier == "cpu"
    )


@pytest.mark.parametrize(
    "vram_gb, hidden_dims, n_envs, minibatch_size",
    [(80, (1024, 512, 256), 2048, 8192), (40, (512, 256, 128), 1024, 4096)],
)
def test_a100_configurations(vram_gb, hidden_dims, n_envs, minibatch_size):
    c = get_a100_config(vram_gb)
    assert (c.hidden_dims, c.n_envs, c.n_steps, c.minibatch_size, c.amp) == (
        hidden_dims,
        n_envs,
        512,
        minibatch_size,
        True,
    )
    assert "expected 40 or 80" in refusal(get_a100_config, 60)


# --- what is left to the class ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, n_epochs, critic_epochs",
    [
        ({}, 10, 0),
        ({"network": "gru"}, 4, 4),
        ({"separate_optimizers": True}, 10, 4),
        ({"network": "gru", "n_epochs": 10}, 10, 4),
        ({"network": "gru", "critic_epochs": 0}, 4, 0),
        ({"critic_epochs": 2}, 10, 2),
        ({"separate_optimizers": True, "critic_epochs": 0}, 10, 0),
    ],
)
def test_epochs_that_are_not_given(settings, n_epochs, critic_epochs):
    for c in (NativePPOConfig(**settings), get_auto_config(1000, "quick_test", "cpu", **settings)):
        assert (c.n_epochs, c.critic_epochs_in_force) == (n_epochs, critic_epochs)


def test_the_defaults_of_the_options():
    c = NativePPOConfig()
    assert (
        c.network,
        c.gru_hidden_dim,
        c.n_gru_layers,
        c.dropout,
        c.separate_optimizers,
        c.critic_learning_rate,
        c.amp_dtype,
        c.compile,
        c.recovery,
        c.early_stop,
        c.patience,
        c.keep_checkpoints,
    ) == ("mlp", 256, 2, 0.1, False, 9e-4, "bf16", False, False, False, None, 3)
    assert c.state_shape is None and NativePPOConfig(network="gru", n_gru_layers=3).state_shape == (3, 256)


def test_every_careless_number_is_refused_by_an_automatic_configuration_too():
    for name, bad in (
        ("learning_rate", -3e-4),
        ("n_envs", 0),
        ("minibatch_size", 0),
        ("network", "lstm"),
        ("critic_epochs", -1),
        ("patience", 0),
        ("dropout", 1),
        ("amp_dtype", "int8"),
    ):
        assert refusal(get_auto_config, device="cpu", **{name: bad}).startswith(
            f"NativePPOConfig.{name}: expected"
        )


def test_a_minibatch_of_more_than_the_rollout_is_allowed():
    "It is the whole rollout, and a line says so."
    c = get_auto_config(1000, "quick_test", "cpu", n_envs=4, n_steps=16, minibatch_size=8192)
    assert c.minibatch_size == 8192
    cut, lines = fit_config(c, RolloutShape(10, 2), None)
    assert cut.minibatch_size == 64 and len(lines) == 1 and "8,192 is more than the 64 samples" in lines[0]


@pytest.mark.parametrize(
    "interval, due", [(0, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (5, [5]), (7, [])]
)
def test_what_is_due_at_an_interval(interval, due):
    assert [u for u in range(1, 7) if is_due(u, interval)] == due


@pytest.mark.parametrize(
    "steps, n_envs, n_steps, updates",
    [(500_000_000, 2048, 512, 477), (1, 64, 128, 1), (8192, 64, 128, 1), (8193, 64, 128, 2)],
)
def test_updates_are_counted_by_ceil(steps, n_envs, n_steps, updates):
    c = NativePPOConfig(total_timesteps=steps, n_steps=n_steps)
    assert c.n_updates(n_envs) == updates == replace(
        c, n_envs=n_envs
    ).n_updates() and "n_envs: is null" in refusal(c.n_updates)


def test_memory_asks_for_the_number_of_accounts_too():
    c, shape = NativePPOConfig(), RolloutShape(300, 5)
    assert "n_envs: is null" in refusal(memory_of, c, shape)
    assert "n_envs: is null" in refusal(fit_config, c, shape, None)
    assert memory_of(c, shape, 64) == memory_of(replace(c, n_envs=64), shape)


def test_who_decided_is_no_setting():
    a, b = get_auto_config(1000, "quick_test", "cpu", n_envs=64), get_auto_config(1000, "quick_test", "cpu")
    assert (
        a == b
        and "decided_by" not in asdict(a)
        and a.decided_by["n_envs"] == "you"
        and b.decided_by["n_envs"] == "tier cpu"
    )
    assert NativePPOConfig().decided_by == {} == NativePPOConfig(**asdict(a)).decided_by


# --- devices that are not here ------------------------------------------------------------------------------


@pytest.mark.parametrize("name, gigabytes, tier, hidden_dims, n_envs, n_steps, minibatch_size", GPUS)
def test_a_tier_needs_a_name_and_a_number_only(
    name, gigabytes, tier, hidden_dims, n_envs, n_steps, minibatch_size
):
    c = get_auto_config(training_mode="standard", tier=tier_of(name, gigabytes))
    assert (c.tier, c.hidden_dims, c.n_envs, c.n_steps, c.minibatch_size, c.amp, c.amp_dtype) == (
        tier,
        hidden_dims,
        n_envs,
        n_steps,
        minibatch_size,
        True,
        "bf16",
    )
    assert c.compile == (tier == "h200")  # H100 and H200 with compile


@pytest.mark.parametrize(
    "name, gigabytes, tier",
    [
        (None, 0, "cpu"),
        ("NVIDIA RTX A1000", 8.3, "low"),
        ("NVIDIA GH200 480GB", 101.5, "h200"),
        ("NVIDIA RTX 6000 Ada", 51.5, "high"),
        ("x", 40, "high"),
        ("x", 39.9, "medium"),
        ("x", 20, "medium"),
        ("x", 19.9, "low"),
    ],
)
def test_tiers_at_their_borders(name, gigabytes, tier):
    assert tier_of(name, gigabytes) == tier


def test_a_tier_that_does_not_exist_is_refused():
    assert "did you mean 'h200'" in refusal(get_auto_config, tier="h300") and "network" not in TIERS


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_the_device_that_is_here(device):
    assert (
        resolve_device(device).type in ("cpu", "cuda")
        and hardware_tier(device) in TIERS
        and (device != "cpu" or hardware_tier(device) == "cpu")
    )


# updates, validation interval and checkpoint interval, on paper:
# ceil(steps / (n_envs × n_steps)); min(mode's, updates // 10); the mode's
SAVING = {"quick_test": 0, "standard": 50, "thorough": 75, "production": 75, "extended": 100, "auto": 75}
BUDGET = {
    "quick_test": 10e6,
    "standard": 50e6,
    "thorough": 100e6,
    "production": 200e6,
    "extended": 500e6,
    "auto": 100e6,
}
PAPER = {
    "H200": ((2048, 512, 8192), [(10, 1), (48, 4), (96, 9), (191, 19), (477, 47), (96, 9)]),
    "A100-80": ((2048, 512, 8192), [(10, 1), (48, 4), (96, 9), (191, 19), (477, 47), (96, 9)]),
    "A100-40": ((1024, 512, 4096), [(20, 2), (96, 9), (191, 19), (382, 38), (954, 95), (191, 19)]),
    "24 GB": ((512, 512, 2048), [(39, 3), (191, 19), (382, 20), (763, 40), (1908, 100), (382, 38)]),
    "16 GB": ((256, 512, 2048), [(77, 5), (382, 20), (763, 20), (1526, 40), (3815, 100), (763, 40)]),
    "CPU": ((64, 128, 2048), [(184, 5), (916, 20), (1832, 20), (3663, 40), (9156, 100), (1832, 40)]),
}


def test_all_devices_in_all_modes_on_paper():
    rows = config_rows()
    assert [(r["device"], r["mode"]) for r in rows] == [(device, mode) for device in PAPER for mode in SAVING]
    for r in rows:
        sizes, expected = PAPER[r["device"]]
        assert (r["environments"], r["steps"], r["minibatch"]) == sizes and r["warnings"] == []
        assert (r["updates"], r["validation"]) == expected[list(SAVING).index(r["mode"])], r
        assert r["checkpoints"] == SAVING[r["mode"]] and r["timesteps"] == BUDGET[r["mode"]] * (
            0.15 if r["device"] == "CPU" else 1
        )
    table = config_table()
    assert (
        table.count("\n") == 6 * 7 - 1 + 5
        and "extended       500 M steps   477 updates, validated every  47, saved every 100" in table
        and "quick_test     1.5 M steps   184 updates, validated every   5, saved at the end" in table
    )


def test_recurrent_runs_on_all_gpus_start_alike():
    for r in config_rows(network="gru"):
        assert (r["environments"], r["steps"], r["minibatch"]) == (
            (64, 128, 2048) if r["device"] == "CPU" else (16_384, 256, 8192)
        ) and r["network"] == "2 × 256"
    assert (
        get_auto_config(training_mode="standard", tier="h200", network="gru", n_envs=512).n_envs == 512
    )  # what you say wins


# --- durations and presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "durations, steps, who",
    [
        (dict(total_timesteps=500, episodes=9, iterations=7), 500, "you"),
        (dict(episodes=9, iterations=7, episode_length=100), 900, "you: 9 episodes of 100"),
        (dict(episodes=9), 9 * 256, "you: 9 episodes of 256"),
        (dict(iterations=7), 7 * 64 * 128, "you: 7 iterations"),
        (dict(iterations=7, n_envs=10, n_steps=20), 1400, "you: 7 iterations"),
        ({}, 7_500_000, "mode standard: 15% of 50 M on a CPU"),
    ],
)
def test_a_duration_by_timesteps_then_episodes_then_iterations_then_the_mode(durations, steps, who):
    c = get_auto_config(training_mode="standard", device="cpu", **durations)
    assert c.total_timesteps == steps and c.decided_by["total_timesteps"] == who
    if "iterations" in durations and "episodes" not in durations:
        assert c.n_updates() == 7


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(episodes=0), "train.episodes: expected a whole number above 0, was 0"),
        (dict(iterations=-3), "train.iterations: expected a whole number above 0, was -3"),
        (dict(iterations=1.5), "was 1.5"),
        (dict(episodes="ten"), "was 'ten'"),
        (dict(episodes=3, episode_length=0), "train.episode_length"),
        (dict(high_vram=True, low_vram=True), "choose one"),
    ],
)
def test_a_bad_duration_or_preset_is_refused(arguments, words):
    assert words in refusal(get_auto_config, device="cpu", **arguments)


@pytest.mark.parametrize(
    "preset, expected", [("high_vram", (65_536, 512, 65_536)), ("low_vram", (256, 256, 1024))]
)
@pytest.mark.parametrize("network", ["mlp", "gru"])
@pytest.mark.parametrize("tier", ["h200", "low"])
def test_presets_of_memory_come_before_the_recurrent_start_and_after_you(preset, expected, network, tier):
    c = get_auto_config(training_mode="standard", tier=tier, network=network, **{preset: True})
    assert (
        (c.n_envs, c.n_steps, c.minibatch_size) == expected
        and c.hidden_dims == TIERS[tier]["hidden_dims"]
        and c.decided_by["n_envs"] == preset.replace("_vram", " VRAM")
    )
    assert (
        get_auto_config(
            training_mode="standard", tier=tier, network=network, n_steps=7, **{preset: True}
        ).n_steps
        == 7
    )
    assert HIGH_VRAM["n_envs"] == 65_536 and set(LOW_VRAM) == {"n_envs", "n_steps", "minibatch_size"}


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_the_low_preset_fits_on_eight_gigabytes_whatever_is_stored(network):
    """Whole windows of 5,800 numbers: 65,536 × 23,253 × 1.5 = 2.3 GB; the largest preset network:
    14,637,065 × 20 = 0.3 GB."""
    use = memory_of(
        get_auto_config(tier="low", low_vram=True, network=network, hidden_dims=(2048, 1024, 512, 256)),
        RolloutShape(5800, 8),
    )
    assert (
        abs(use.rollout - 65_536 * 23_253 * 1.5) < 1e6 + (network == "gru") * 2 * 256 * 256 * 4 * 1.5
        and use.total < 3e9
    )
    assert network == "gru" or use.model == 20 * 14_637_065


def test_tier_then_preset_then_mode_then_you_and_who_it_was():
    c = get_auto_config(
        training_mode="thorough", tier="a100-40", network="gru", minibatch_size=1024, recovery=True
    )
    assert c.decided_by == {
        "hidden_dims": "tier a100-40",
        "amp": "tier a100-40",
        "n_envs": "recurrent start",
        "n_steps": "recurrent start",
        "minibatch_size": "you",
        "network": "you",
        "recovery": "you",
        "cost_warm_up": "project",
        "total_timesteps": "mode thorough",
        "validation_interval": "mode thorough",
        "checkpoint_interval": "mode thorough",
    }
    assert (
        get_auto_config(tier="high", asset_class="equity").decided_by["total_timesteps"]
        == "mode auto, equity"
    )
    assert (
        interval_in_force(40, 382) == 38 and interval_in_force(40, 9) == 1 and interval_in_force(5, 1000) == 5
    )


# --- memory -------------------------------------------------------------------------------------------------


def test_widths_of_the_layers():
    assert layer_widths(NativePPOConfig(hidden_dims=(32, 16)), 3) == (32, 16, 3, 1) and layer_widths(
        NativePPOConfig(hidden_dims=(32, 16), shared_trunk=False), 3
    ) == (32, 16, 32, 16, 3, 1)
    assert layer_widths(NativePPOConfig(network="gru", gru_hidden_dim=64), 3) == (
        64,
        64,
        256,
        256,
        32,
        32,
        3,
        1,
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(hidden_dims=(32, 16)),
        dict(hidden_dims=(32, 16), shared_trunk=False),
        dict(network="gru", gru_hidden_dim=32),
        dict(network="gru", gru_hidden_dim=16, n_gru_layers=1),
    ],
)
@pytest.mark.parametrize("folded", [False, True])
def test_parameters_are_those_of_the_network_that_is_trained(settings, folded):
    "Folded or not: an index environment trains 3 × 10 + 55 columns of a window of 10 bars."
    c, layout = NativePPOConfig(**settings), input_layout("5.6.0", 10) if folded else None
    policy = (
        RecurrentActorCritic(580, 8, c.gru_hidden_dim, c.n_gru_layers, c.dropout, layout)
        if c.network == "gru"
        else NativeActorCritic(580, 8, c.hidden_dims, c.shared_trunk, layout)
    )
    assert parameters_of(c, 85 if folded else 580, 8) == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize(
    "settings, shape",
    [
        (dict(), RolloutShape(300, 5)),
        (dict(), RolloutShape(300, 5, 2, 40)),
        (dict(network="gru", gru_hidden_dim=32), RolloutShape(300, 5, 0, 40)),
    ],
)
def test_a_prediction_is_what_the_buffers_take(settings, shape):
    c = get_auto_config(10_000, "quick_test", "cpu", **settings)
    buffers = allocate_rollout(c.n_envs, c.n_steps, shape.fields, "cpu", c.state_shape)
    assert memory_of(c, shape).rollout == int(1.5 * sum(t.nbytes for t in buffers.values())) and (
        "state" in buffers
    ) == (c.network == "gru")


def test_an_absurd_request_is_cut_and_its_intervals_follow():
    """65,536 × 512 whole windows are 1,175 GB;
    of 45 GB 2,048 × 512 are used, and 50 M steps are 48 updates instead of 2."""
    greedy = get_auto_config(training_mode="standard", tier="h200", high_vram=True)
    c, lines = fit_config(greedy, RolloutShape(5800, 8), device_cap(0, 150 * 10**9))
    assert (
        (c.n_envs, c.n_steps, c.minibatch_size, c.total_timesteps) == (2048, 512, 65_536, 50_000_000)
        and len(lines) == 1
        and "1,175 GB" in lines[0]
        and "2,048 is used instead" in lines[0]
    )
    assert (greedy.n_updates(), greedy.validation_interval, c.n_updates(), c.validation_interval) == (
        2,
        1,
        48,
        4,
    )
    assert (
        c.decided_by["n_envs"] == "memory"
        and c.decided_by["n_steps"] == "high VRAM"
        and memory_of(c, RolloutShape(5800, 8)).total <= 45e9
    )
    assert replace(c, n_envs=65_536, validation_interval=1) == greedy  # nothing else changed
    assert fit_config(greedy, RolloutShape(5800, 8, 0, 355), device_cap(0, 150 * 10**9)) == (greedy, [])
    explicit = fit_config(replace(greedy, validation_interval=1), RolloutShape(5800, 8), 45 * 10**9)[0]
    assert explicit.validation_interval == 1
    assert (
        fit_config(
            get_auto_config(training_mode="standard", tier="h200", high_vram=True, validation_interval=1),
            RolloutShape(5800, 8),
            45 * 10**9,
        )[0].validation_interval
        == 1
    )  # what you said stays


def test_an_environment_that_stands_keeps_its_accounts():
    c = NativePPOConfig(n_steps=512, minibatch_size=4096)
    cut, lines = fit_config(c, RolloutShape(5800, 8), 10**9, n_envs=1024)
    assert (
        cut.n_envs is None and cut.n_steps == 16 and lines[0].startswith("n_steps: 512 would take")
    )  # 1,024 × 16 × 23,253 × 1.5 = 571 MB, and as much again for 32


# --- said at the start --------------------------------------------------------------------------------------


def lines_of(text):
    return {line[:14].strip(): line[14:] for line in text.splitlines() if not line.startswith("note")}


def test_the_table_at_the_start_says_what_and_who():
    c = get_auto_config(
        training_mode="extended",
        tier="h200",
        minibatch_size=4096,
        separate_optimizers=True,
        patience=5,
        recovery=True,
    )
    text = describe(c, "cpu", RolloutShape(5800, 8, 0, 355), limit=45 * 10**9)
    said = lines_of(text)
    expected = {
        "tier": "h200",
        "mode": "extended",
        "network": "mlp 1024-512-256, shared trunk, 6,598,665 parameters | tier h200",
        "environments": "2,048 × 512 steps = 1,048,576 samples | tier h200",
        "minibatch": "4,096, 256 to a rollout | you",
        "epochs": "10, then 4 of the critic alone | default",
        "precision": "bf16, compiled | tier h200",
        "learning rate": "0.0003, value head 0.0009 | default",
        "budget": "500 M steps, 477 updates | mode extended",
        "validation": "every 47 updates | mode extended",
        "checkpoints": "every 100 updates, the newest 3 kept | mode extended",
        "stopping": "recovery beyond 15% drawdown; after 5 validations without a better score | you, default",
    }
    for name, words in expected.items():
        assert [part.strip() for part in said[name].split("  ") if part.strip()] == words.split(" | "), name
    assert (
        said["device"].startswith("cpu, ")
        and said["memory"].startswith("predicted ")
        and "45.0 GB may be used" in said["memory"]
        and "note" not in text
    )


def test_the_table_of_a_recurrent_run_and_of_one_that_nobody_decided():
    said = lines_of(
        describe(
            get_auto_config(training_mode="quick_test", device="cpu", network="gru"),
            shape=RolloutShape(64, 16),
        )
    )
    assert (
        said["network"].split("  ")[0] == "gru 2 × 256, 941,457 parameters"
        and said["epochs"].startswith("4, then 4 of the critic alone")
        and "15% of 10 M on a CPU" in said["budget"]
        and said["checkpoints"].startswith("the best and the last only")
    )
    bare = lines_of(describe(NativePPOConfig()))
    assert (
        "given" in bare["budget"]
        and "device" not in bare
        and "memory" not in bare
        and bare["budget"].startswith("1 M steps ")
        and "stopping" not in bare
    )
    assert lines_of(describe(NativePPOConfig(), shape=RolloutShape(64, 16), n_envs=8))["budget"].startswith(
        "1 M steps, 977 updates"
    ) and "123 parameters" in describe(NativePPOConfig(), parameters=123)


def test_the_table_warns_of_a_rollout_beyond_the_budget_and_repeats_what_was_cut():
    c = get_auto_config(training_mode="quick_test", tier="h200", high_vram=True)
    text = describe(c, warnings=["n_envs: cut"])
    assert "note: one rollout is 33.55 M steps, more than the whole budget of 10 M" in text and text.endswith(
        "note: n_envs: cut"
    )


def test_devices_for_planning():
    assert [tier_of(*d) for d in DEVICES.values()] == ["h200", "a100-80", "a100-40", "medium", "low", "cpu"]


# --- was it enough? -----------------------------------------------------------------------------------------

MADE = {"mode": "standard", "tier": "cpu", "mode_timesteps": 7_500_000, "total_timesteps": 7_500_000}


@pytest.mark.parametrize(
    "train, run, smoke, words",
    [
        (MADE, {"steps": 7_500_000}, False, None),
        (
            MADE,
            {"steps": 7_499_999},
            True,
            "7,499,999 of the 7,500,000 steps that mode standard stands for on tier cpu",
        ),
        (MADE | {"mode": "quick_test"}, {"steps": 10**9}, True, "mode quick_test, 1,000,000,000 steps"),
        (MADE | {"mode": "quick_test", "mode_timesteps": None}, {}, True, "mode quick_test, at most"),
        (
            MADE | {"mode_timesteps": 1_000},
            {"steps": 1_000},
            True,
            "1,000 of the 7,500,000 steps",
        ),  # a project that calls less standard
        (
            MADE | {"tier": "h200", "mode_timesteps": None},
            {"steps": 7_500_000},
            True,
            "of the 50,000,000 steps that mode standard stands for on tier h200",
        ),
        (MADE | {"mode": "mine", "mode_timesteps": 1_000}, {"steps": 1_000}, False, None),
        (
            MADE | {"mode": "mine", "mode_timesteps": 1_000},
            {"steps": 999},
            True,
            "999 of the 1,000 steps that mode mine",
        ),
        (MADE | {"mode": "auto", "mode_timesteps": None}, {"steps": 15_000_000}, False, None),
        (MADE | {"mode": "auto", "mode_timesteps": None}, {"steps": 14_999_999}, True, "15,000,000"),
        (MADE, {}, None, "mode (standard) stands for is not known"),
        (
            MADE | {"total_timesteps": 20_000},
            {},
            True,
            "at most 20,000 of the 7,500,000",
        ),  # older checkpoints: only the plan is known
        (
            MADE | {"mode": "custom", "mode_timesteps": None},
            {"steps": 20_000},
            None,
            "mode (custom) stands for is not known; it was trained for 20,000 steps",
        ),
        (
            {},
            {},
            None,
            "mode (not recorded) stands for is not known; it was trained for an unknown number of steps",
        ),
    ],
)
def test_what_was_trained_is_held_to_what_its_mode_stands_for(train, run, smoke, words):
    "Whatever the project calls its budgets, and whatever an older checkpoint does not know."
    found = training_budget(
        {"config": {"train": train, "env": {"asset_class": "crypto"}}} | ({"run": run} if run else {})
    )
    assert found["smoke"] is smoke and (found["said"] is None if words is None else words in found["said"])


def test_the_configuration_records_what_its_mode_stands_for():
    "On this hardware, also where a person asked for less."
    for tier, steps in (("cpu", 7_500_000), ("h200", 50_000_000)):
        for asked in (None, 500):
            assert get_auto_config(asked, "standard", tier=tier).mode_timesteps == steps
    assert NativePPOConfig().mode_timesteps is None


@pytest.mark.parametrize("mode", [*MODES, "auto"])
@pytest.mark.parametrize("tier", list(TIERS))
def test_every_run_has_ten_validations_or_more(mode, tier):
    "The mode's interval, or a tenth of the updates: big tiers make few."
    config = get_auto_config(training_mode=mode, tier=tier)
    interval, updates = (
        MODES["production" if mode == "auto" else mode].validation_interval,
        config.n_updates(),
    )
    assert config.validation_interval == max(
        1, min(interval, updates // 10)
    ) and updates // config.validation_interval >= min(10, updates)
