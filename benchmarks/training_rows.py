"""What training.py measures: settings, rows, goals, and what a chip's defaults are."""

import re

import torch

from trading_lib.networks import HIDDEN_DIMS

# a row is measured for so many seconds in all, but at least once in each of its turns
SECONDS, MOST_ITERATIONS, TURNS = 60, 15, 3

PPO = dict(
    learning_rate=3e-4,
    gamma=0.99,
    gae_lambda=0.95,
    clip_range=0.2,
    entropy_coefficient=0.01,
    value_coefficient=0.5,
    max_grad_norm=0.5,
)
SETTINGS = dict(
    n_envs=1_024,
    n_steps=24,
    minibatch_size=12_288,
    n_epochs=10,
    hidden_dims=[512, 256, 128],
    version="5.6.0",
    window=100,
    bars=20_000,
    episode_length=256,
    **PPO,
)
SMALL = dict(
    n_envs=32, n_steps=8, minibatch_size=128, n_epochs=2, hidden_dims=[32, 16], window=10, bars=4_000
)

# one line a row: `peer` is a name of `_peers.PEERS`; without it the trainer is ours, `dense` reads whole
# windows, `every_sample` computes each bar as often as it is looked at, `settings` replace some above,
# `matmul` sets torch.set_float32_matmul_precision, and all else goes to NativePPOConfig
ROWS = {
    "stable-baselines3": dict(peer="stable-baselines3"),
    "CleanRL-style": dict(peer="CleanRL-style"),
    "sbx": dict(peer="sbx"),
    "TorchRL": dict(peer="TorchRL"),
    "ours: dense, two trunks": dict(dense=True, shared_trunk=False),
    "ours: folded, two trunks, samples apart": dict(shared_trunk=False, every_sample=True),
    "ours: folded, two trunks": dict(shared_trunk=False),
    "ours: folded, shared trunk": dict(shared_trunk=True),
    "ours: folded, two trunks, bf16": dict(shared_trunk=False, amp=True),
    "ours: folded, shared trunk, bf16": dict(shared_trunk=True, amp=True),
}
DEFAULTS = "ours: folded, shared trunk, bf16"
# on a GPU also these
LARGE = {
    f"ours: 1,024 × 256, {'-'.join(map(str, HIDDEN_DIMS[size]))}": dict(
        shared_trunk=True, amp=True, settings=dict(n_steps=256, hidden_dims=list(HIDDEN_DIMS[size]))
    )
    for size in ("small", "medium", "large")
}
# row -> compared with -> at least so many times as fast; None: steps per second
GOALS = {
    "ours: folded, two trunks": {"stable-baselines3": 12, "CleanRL-style": 11, "sbx": 6.5},
    DEFAULTS: {"stable-baselines3": 40},
}
GOALS |= {name: {None: rate} for name, rate in zip(LARGE, (3e6, 1.4e6, 0.6e6))}
SMALLEST_SHARE = 0.55  # of the limit, for the rows that are compared

# the memory of a rollout does not depend on how often it is learnt from
ROLLOUT = dict(n_steps=256, n_epochs=1)
MOST_MEMORY = 200e6

SCALED = dict(n_steps=48)  # 49,152 samples in every row
SCALING = {  # label -> settings that change
    "n_envs": {n: dict(n_envs=n, n_steps=49_152 // n) for n in (64, 256, 1_024, 4_096, 16_384)},
    "bars": {n: dict(bars=n) for n in (10_000, 100_000, 1_000_000)},
    "bars, every sample computed": {n: dict(bars=n) for n in (10_000, 100_000, 1_000_000)},
    "hidden_dims": {
        "-".join(map(str, HIDDEN_DIMS[size])): dict(hidden_dims=list(HIDDEN_DIMS[size]))
        for size in ("tiny", "small", "medium", "large")
    },
    "window": {n: dict(window=n) for n in (10, 50, 100, 200)},
}
# without what makes few bars cheap: a bar that several samples look at is computed once
SCALED_ROW = {"bars, every sample computed": dict(every_sample=True)}
SCALING_SECONDS = 10
# of any row, relative to the row before it with the least cost
MOST_COST = {"n_envs": 1.2, "bars": 1.5, "bars, every sample computed": 1.5}

# seeds at once and alone: the sizes of a quick test on a CPU, and widths of small networks
SEEDS, MOST_SECONDS, SEEDS_SECONDS = 8, 3.0, 10
FEW = dict(n_envs=64, n_steps=128, minibatch_size=2_048)
WIDTHS = {"64-64": [64, 64], "128-64": [128, 64], "tiny, 256-128-64": list(HIDDEN_DIMS["tiny"])}

SHAPES = [(12_288, 355, 512), (12_288, 5_800, 512), (4_096, 4_096, 4_096)]
# how products are asked for: torch.set_float32_matmul_precision and the numbers' type
PATHS = {
    "float32, torch's default": ("highest", torch.float32),
    "float32, precision high": ("high", torch.float32),
    "float32, precision medium": ("medium", torch.float32),
    "float32, oneDNN by name": ("highest", torch.float32),
    "bfloat16": ("highest", torch.bfloat16),
}


# --- the chip -----------------------------------------------------------------------------------------------


def kind_of(device: str) -> str:
    """What sets it apart from others, as part of a file's name: a GPU's name, or a CPU's instructions for
    matrices and vectors."""
    if device != "cpu":
        return re.sub(r"\W+", "_", torch.cuda.get_device_name(device)).lower()
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    if torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    return torch.backends.cpu.get_cpu_capability().lower()


def default_row(device: str) -> str:
    "What the trainer's defaults are there."
    if device != "cpu" or kind_of(device) in ("amx", "avx512_bf16"):
        return DEFAULTS
    return "ours: folded, shared trunk"
