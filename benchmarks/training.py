"""Whole PPO training, rollout and update, beside other people's trainers: steps per second, share of what the
chip can multiply, and memory.

    python benchmarks/training.py                # all of it; three quarters of an hour on two cores
    python benchmarks/training.py --training     # ours and the peers; rows without package are left out:
                                                 # pip install stable-baselines3 sbx-rl torchrl
    python benchmarks/training.py --memory       # what a long rollout takes
    python benchmarks/training.py --scaling      # a transition's cost as each size grows
    python benchmarks/training.py --seeds        # eight seeds at once beside one
    python benchmarks/training.py --kept         # measures nothing: tables and pictures of what is kept
    python benchmarks/training.py --rows NAME …  # some rows of ROWS, or of LARGE; not kept
    python benchmarks/training.py --small        # tiny sizes, to see that it runs; not kept

Every row has a process of its own, one after another, with all cores (`--threads`), the GPU where there is
one. All trainers get the same bars, the same accounts and the same hyper-parameters; the peers read the dense
windows of the same environment. Machines that are shared are now fast and now slow: so all rows have their
turn, and then another and another. In each a row runs one iteration to warm up and then some more; its time
is the median of all of them. What others did on the machine meanwhile shows in the column `busy`: processor
time by time and threads.

FLOPs are those that are done, counted from the layers' shapes: acting, and forward and backward of each
epoch, without the gradient of the inputs, which nobody needs. Where samples of a rollout look at the same
bars, and at nothing else, ours learns from those of one bar together and computes it once: with 24,576
samples of 20,000 bars that is 57 % of them. The row `samples apart` shuffles sample by sample, as the peers
do, and computes every one. The limit is the best rate of a matrix product of the same precision, over shapes
that occur in training, measured in the same run; which precision a product really has is told by its error.
Memory is the kernel's own peak of the process (VmHWM), which is set back when the environment stands, or when
model and table do; whatever is allocated then counts: gradients, moments, the rollout, work areas of the
libraries. Numbers are kept in benchmarks/results/training_KIND.json, a file for each kind of chip (amx,
avx512, …), and drawn to docs/training_speed_KIND.png and docs/training_scaling_KIND.png.
"""

import argparse
import ctypes
import datetime
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, MarketData, market_data
from trading_lib.files import atomic_write
from trading_lib.networks import HIDDEN_DIMS
from trading_lib.trainer import NativePPOConfig, NativePPOTrainer

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURES = ROOT / "benchmarks" / "results", ROOT / "docs"
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


# --- arithmetic ---------------------------------------------------------------------------------------------


def flops_per_step(
    inputs: int,  # that the first layer reads
    hidden_dims,
    n_actions: int,
    trunks: int,  # 1: shared by policy and value, 2: one each
    n_epochs: int,
) -> dict[str, int]:  # forward, backward, and all of a step: acting and every epoch
    "Multiplications and additions of the layers."
    widths = [inputs, *hidden_dims]
    first = trunks * 2 * inputs * widths[1]
    forward = trunks * sum(2 * a * b for a, b in zip(widths, widths[1:])) + 2 * widths[-1] * (n_actions + 1)
    backward = 2 * forward - first  # gradients of weights and of inputs, but for those of the observation
    return {"forward": forward, "backward": backward, "step": forward + n_epochs * (forward + backward)}


def precision_of(error: float) -> str:
    """What a product's relative error says about the numbers that were multiplied: 24, 11 or 8 significant
    bits."""
    if error < 5e-6:
        return "float32"
    if error < 1e-3:
        return "tf32"
    return "bf16"


def limit_of(limits: list[dict], precision: str) -> float | None:  # FLOP/s; None: not measured
    "The best rate of a matrix product of this precision."
    return max(
        (rate for row in limits if row["precision"] == precision for rate in row["rates"]), default=None
    )


def _share(rate: float, limit: float | None) -> float | None:
    "Of the limit; None: not measured."
    if not limit:
        return None
    return rate / limit


def compared(part: dict) -> list[dict]:  # one row for each trainer that was measured
    "What the table shows."
    rates = {
        name: row["samples"] / statistics.median(row["seconds"])
        for name, row in part["rows"].items()
        if "seconds" in row
    }
    out = []
    for name, rate in rates.items():
        row, flops = part["rows"][name], part["rows"][name]["flops"]
        limit = limit_of(part["limits"], row["precision"])
        out.append(
            {
                "name": name,
                "rate": rate,
                "ratios": {
                    peer: rate / rates[peer] for peer in ROWS if "peer" in ROWS[peer] and peer in rates
                },
                "flops": flops,
                "flop_rate": rate * flops,
                "share": _share(rate * flops, limit),
                "busy": row["busy"],
                "peak": row["peak"],
                "precision": row["precision"],
            }
        )
    return out


def verdict(reached: bool) -> str:
    "Of equal width, for the left of a table."
    return {True: "met   ", False: "missed"}[bool(reached)]


def judged(rows: list[dict]) -> list[str]:
    "Each goal in words."
    by_name, lines = {row["name"]: row for row in rows}, []
    for name, goals in GOALS.items():
        if name not in by_name:
            continue
        row = by_name[name]
        for peer, least in goals.items():
            if peer is None:
                reached = row["rate"]
                text = f"{least:,.0f} steps/s, is {reached:,.0f}"
            elif peer in row["ratios"]:
                reached = row["ratios"][peer]
                text = f"{least:g} times {peer}, is {reached:,.1f}"
            else:
                continue
            lines.append(f"{verdict(reached >= least)} {name}: {text}")
        if row["share"] is not None and None not in goals:
            met = verdict(row["share"] >= SMALLEST_SHARE)
            lines.append(f"{met} {name}: {SMALLEST_SHARE:.0%} of the limit, is {row['share']:.0%}")
    return lines


def costs(
    rows: list[dict],
) -> list[dict]:  # with `cost`, seconds per transition, and `relative`, to the least of the rows before
    "What a transition costs, row by row."
    out, least = [], float("inf")
    for row in rows:
        cost = statistics.median(row["seconds"]) / row["samples"]
        relative = cost / least or 1.0  # the first has nothing before it
        out.append(row | {"cost": cost, "relative": relative})
        least = min(least, cost)
    return out


# --- in the process of a row --------------------------------------------------------------------------------


def seconds(function, device: torch.device) -> float:
    "How long a call takes; on a GPU until its work there is done, by events."
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def peak_memory() -> int:  # bytes
    """The most that this process ever had in memory; `ru_maxrss` of a new process may begin with what its
    parent had."""
    try:
        return 1024 * next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
    except (OSError, StopIteration):
        unit = {"darwin": 1}.get(sys.platform, 1024)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_now() -> int:  # bytes
    """What this process has in memory, with nothing kept that was given back: from here on `peak_memory` is
    that of what follows, where the system can forget older peaks."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not GNU's C library
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return 1024 * next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmRSS")
        )
    except (OSError, StopIteration):
        return peak_memory()


def make_env(job: dict) -> GPUVectorizedTradingEnv:
    s, market = job["settings"], MarketData.load(job["market"])
    if market.window != s["window"]:
        # features do not depend on it, and indicators are warm after 600 bars in any case
        market = replace(market, window=s["window"])
    return GPUVectorizedTradingEnv(
        market,
        GPUEnvConfig(
            n_envs=s["n_envs"],
            version=s["version"],
            window=s["window"],
            timeframe=market.timeframe,
            asset_class=market.asset_class,
            episode_length=s["episode_length"],
        ),
        device=job["device"],
    )


def our_trainer(env, settings: dict, **config) -> NativePPOTrainer:
    "Ours, silent, and with no end."
    names = ("n_steps", "minibatch_size", "n_epochs", "hidden_dims", *PPO)
    return NativePPOTrainer(
        env,
        NativePPOConfig(
            **{name: settings[name] for name in names} | config,
            total_timesteps=1000 * settings["n_envs"] * settings["n_steps"],
        ),
        progress=None,
    )


def iteration_of(row: dict, env, settings: dict, device: torch.device):  # called with a number of epochs
    "What runs one iteration of a row's trainer."
    import _peers

    if "peer" in row:
        return _peers.PEERS[row["peer"]](env, settings, device)
    config = {
        name: value
        for name, value in row.items()
        if name not in ("dense", "settings", "matmul", "every_sample")
    }
    if row.get("dense"):
        env = _peers.DenseEnv(env)
    trainer = our_trainer(env, settings, **config)
    if row.get("every_sample"):
        trainer.learner.whole_bars = False

    def iterate(n_epochs: int):
        trainer.train(1)

    return iterate


def flops_of(row: dict, env, settings: dict) -> int:  # per step
    folded = "peer" not in row and not row.get("dense")
    inputs = env.obs_dim
    if folded:
        windowed = int(env.layout.windowed.sum())
        inputs = windowed * env.config.window + env.layout.n_features - windowed
    trunks = 2
    if "peer" not in row and row.get("shared_trunk", True):
        trunks = 1
    share = 1.0  # of the samples, that are computed
    if folded and not row.get("every_sample"):
        share = our_trainer(env, settings).learner.computed_share
    flops = flops_per_step(inputs, settings["hidden_dims"], env.n_actions, trunks, settings["n_epochs"])
    return round(flops["forward"] + (flops["step"] - flops["forward"]) * share)


def product_error(
    multiply, m: int, k: int, n: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[float, torch.Tensor, torch.Tensor]:  # and the factors
    "How far a product is from the exact one, relative."
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=random).to(device, dtype) for shape in ((m, k), (n, k)))
    exact = a[:256].double() @ b.double().T
    return float((multiply(a, b)[:256].double() - exact).norm() / exact.norm()), a, b


def peak_of(device: torch.device) -> int:  # bytes
    "The most that was reserved on a GPU, or that this process had in memory."
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return peak_memory()


def precision_here(row: dict, device: torch.device) -> str:
    "What a row's products are made of: bf16, or what torch makes of float32 now."
    if row.get("amp"):
        return "bf16"
    return precision_of(product_error(torch.nn.functional.linear, 1_024, 355, 512, device)[0])


def measure_row(job: dict) -> dict:
    "Time a trainer's iterations."
    row, s, device = job["row"], job["settings"], torch.device(job["device"])
    torch.set_float32_matmul_precision(row.get("matmul", "highest"))
    env = make_env(job)
    before = memory_now()
    iterate = iteration_of(row, env, s, device)
    iterate(1)  # to warm up: compilers, allocators and caches
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    times, begin, processor_begin = [], time.perf_counter(), time.process_time()
    while not times or (sum(times) < job["seconds"] and len(times) < MOST_ITERATIONS):
        times.append(seconds(partial(iterate, s["n_epochs"]), device))
    busy = (time.process_time() - processor_begin) / (time.perf_counter() - begin) / torch.get_num_threads()
    peak = above = peak_of(device)
    if device.type != "cuda":
        above = peak - before
    return {
        "seconds": [round(t, 5) for t in times],
        "samples": s["n_envs"] * s["n_steps"],
        "flops": flops_of(row, env, s),
        "precision": precision_here(row, device),
        "busy": round(busy, 3),
        "peak": peak,
        "above_environment": above,
    }


def measure_memory(job: dict) -> dict:
    "What one update takes above the model and the table, which stand when it begins."
    env, device = make_env(job), torch.device(job["device"])
    trainer = our_trainer(env, job["settings"], **job["row"])
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = memory_now()
    trainer.train(1)
    peak = peak_memory()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return {
        "before": before,
        "peak": peak,
        "above": peak - before,
        "samples": job["settings"]["n_envs"] * job["settings"]["n_steps"],
        "inputs": env.obs_dim,
    }


def measure_seeds(job: dict) -> dict:
    "One iteration of several seeds and of one, in turns."
    from trading_lib.seeds import SeedsTrainer

    s, times = job["settings"], {"alone": [], "together": []}
    names = ("n_steps", "minibatch_size", "n_epochs", "hidden_dims", *PPO)
    config = NativePPOConfig(
        **{name: s[name] for name in names}, amp=job["amp"], total_timesteps=1000 * s["n_envs"] * s["n_steps"]
    )

    def env(seeds: int):
        return make_env(job | {"settings": s | {"n_envs": seeds * s["n_envs"]}})

    trainers = {
        "alone": NativePPOTrainer(env(1), config, progress=None),
        "together": SeedsTrainer(env(job["seeds"]), config, job["seeds"], progress=None),
    }
    for trainer in trainers.values():
        trainer.train(1)
    while not times["alone"] or (
        sum(times["together"]) < job["seconds"] and len(times["alone"]) < MOST_ITERATIONS
    ):
        for name, trainer in trainers.items():
            times[name].append(round(seconds(partial(trainer.train, 1), torch.device(job["device"])), 5))
    return {**times, "seeds": job["seeds"], "samples": s["n_envs"] * s["n_steps"]}


def _by_name(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    "A product by oneDNN."
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def measure_limits(job: dict) -> dict:
    "How fast this machine multiplies, and how exactly."
    device, rows = torch.device(job["device"]), []
    for path, (precision, dtype) in PATHS.items():
        rates, errors = [], []
        for m, k, n in job["shapes"]:
            torch.set_float32_matmul_precision(precision)
            if path != "float32, oneDNN by name":
                multiply = torch.nn.functional.linear
            elif device.type == "cpu" and torch.backends.mkldnn.is_available():
                multiply = _by_name
            else:
                continue
            error, a, b = product_error(multiply, m, k, n, device, dtype)
            errors.append(error)
            shortest, end = float("inf"), time.perf_counter() + job["seconds"]
            while time.perf_counter() < end:
                shortest = min(shortest, seconds(partial(multiply, a, b), device))
            rates.append(2 * m * k * n / shortest)
        if rates:
            rows.append(
                {"path": path, "rates": rates, "error": max(errors), "precision": precision_of(max(errors))}
            )
    return {"shapes": job["shapes"], "rows": rows}


MEASURES = {"row": measure_row, "memory": measure_memory, "seeds": measure_seeds, "limits": measure_limits}


def cores() -> list[int]:
    "Those that this process may use."
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def work(job: dict):
    "One measurement, as a line for the parent."
    allowed = cores()
    if job["threads"] < len(allowed) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, allowed[: job["threads"]])  # for libraries that take every core they see
    torch.set_num_threads(job["threads"])
    try:
        result = MEASURES[job["measure"]](job)
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as e:
        said = str(e).splitlines() or [""]
        result = {"left_out": f"{type(e).__name__}: {said[0]}"}
    print("\n" + json.dumps(result), flush=True)


# --- in the parent ------------------------------------------------------------------------------------------


def measured(job: dict) -> dict:
    "A measurement in a process of its own."
    variables = {
        "OMP_NUM_THREADS": str(job["threads"]),
        "MKL_NUM_THREADS": str(job["threads"]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "RL_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(job)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"left_out": f"ended with status {done.returncode}: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


class Markets:
    """Simulated bars with their features as files, made when they are first asked for. Columns are scaled
    already, so that all trainers read the same numbers."""

    def __init__(self, folder: str | Path):
        self.folder, self.fit = Path(folder), None

    def of(self, settings: dict) -> str:  # file
        import numpy as np
        import pandas as pd

        from trading_lib.features import fit_features
        from trading_lib.sources import simulate_bars

        path = self.folder / f"{settings['version']}-{settings['bars']}.npz"
        if path.exists():
            return str(path)
        kind = (settings["version"], "15Min", "crypto")
        bars = simulate_bars(
            "SIM-USD",
            "15Min",
            "2000-01-01",
            pd.Timestamp("2000-01-01") + pd.Timedelta(15 * settings["bars"], "min"),
            seed=0,
        )
        if self.fit is None:
            self.fit = fit_features(bars.iloc[: SETTINGS["bars"]], *kind)
        market = market_data(
            bars, settings["version"], self.fit, "15Min", "crypto", settings["window"], "SIM-USD"
        )
        shift, scale = (np.asarray(market.fit[name]) for name in ("shift", "scale"))
        if market.features.shape[1] == len(shift):  # no columns of the account among them
            market = replace(
                market,
                features=((market.features - shift) * scale).astype(np.float32),
                fit={name: v for name, v in market.fit.items() if name not in ("shift", "scale")},
            )
        market.save(path)
        return str(path)


def about(settings: dict, device: str, threads: int) -> dict:
    "What the numbers depend on."

    def of(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    if device == "cpu":
        done = subprocess.run(
            [sys.executable, "-c", "from environment import processor; print(processor())"],
            cwd=ROOT / "benchmarks",
            stdout=subprocess.PIPE,
            text=True,
        )  # by a process: it sets threads
        chip = f"{done.stdout.strip()}, {threads} of {os.cpu_count()} cores, {kind_of(device).upper()}"
    else:
        chip = torch.cuda.get_device_name(device)
    commit = (
        subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ).stdout.strip()
        or None
    )
    packages = {
        name: of(name)
        for name in ("torch", "numpy", "stable-baselines3", "sbx-rl", "jax", "torchrl", "trading_lib")
    }
    return {
        "settings": settings,
        "machine": chip,
        "commit": commit,
        "device": device,
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()} | packages,
    }


def with_turns_before(result: dict, before: dict | None, turn: int) -> dict:
    "A turn's result together with those of the turns before."
    if not before or "seconds" not in result:
        return result
    busy = (turn * before["busy"] + result["busy"]) / (turn + 1)
    peaks = {peak: max(before[peak], result[peak]) for peak in ("peak", "above_environment")}
    return result | {"seconds": before["seconds"] + result["seconds"], "busy": round(busy, 3)} | peaks


class Bench:
    "One run on one machine."

    def __init__(self, folder: str, small: bool, threads: int):
        self.markets, self.small, self.threads = Markets(folder), small, threads
        self.device = "cpu"
        if torch.cuda.is_available():
            self.device = "cuda"

    def duration(self, full: float) -> float:
        "How long to measure: a small run does it to see that it runs."
        if self.small:
            return 0.1
        return full

    def settings(self, *changes: dict) -> dict:
        "The sizes of a job; small ones keep what a small run cannot."
        out = SETTINGS | {name: value for change in changes for name, value in change.items()}
        if self.small:
            out |= SMALL
        return out

    def measure(self, name: str, what: str, settings: dict, **job) -> dict:
        job |= {"measure": what, "settings": settings, "device": self.device, "threads": self.threads}
        if what != "limits":
            job["market"] = self.markets.of(settings)
        result = measured(job)
        if "left_out" in result:
            print(f"  {name} is left out: {result['left_out']}", flush=True)
        return result

    def limits(self) -> list[dict]:
        shapes = SHAPES
        if self.small:
            shapes = [(64, 32, 16)]
        limits = self.measure("limits", "limits", self.settings(), shapes=shapes, seconds=self.duration(2.0))
        print_limits(limits)
        return limits

    def training(self, names: list[str] | None = None) -> dict:
        part = about(self.settings(), self.device, self.threads) | {"rows": {}}
        print(
            f"{part['machine']}, load {part['load']}; "
            + ", ".join(f"{name} {v}" for name, v in part["versions"].items() if v),
            flush=True,
        )
        limits = self.limits()
        part |= {"shapes": limits["shapes"], "limits": limits["rows"]}
        wanted, turns = list(ROWS), TURNS
        if self.device == "cuda":
            wanted += LARGE
        if self.small:
            turns = 1
        rows = {name: row for name, row in (ROWS | LARGE).items() if name in (names or wanted)}
        for turn in range(turns):
            for name, row in rows.items():
                before = part["rows"].get(name)
                if before and "left_out" in before:
                    continue
                part["rows"][name] = with_turns_before(self.turn(name, row, names), before, turn)
        return part

    def turn(self, name: str, row: dict, names: list[str] | None) -> dict:
        "One turn of a row; a row that nobody asked for by name is left out where it makes no sense."
        if names is None and row.get("amp") and default_row(self.device) != DEFAULTS:
            return {"left_out": "this CPU has no bfloat16 instructions"}
        settings = self.settings(row.get("settings", {}))
        result = self.measure(name, "row", settings, row=row, seconds=self.duration(SECONDS / TURNS))
        if "seconds" in result:
            rate = result["samples"] / statistics.median(result["seconds"])
            print(f"  {name:40} {rate:>12,.0f} steps/s", flush=True)
        return result

    def memory(self) -> dict:
        part = about(self.settings(ROLLOUT), self.device, self.threads) | {"rows": {}}
        for name in (default_row(self.device), "ours: folded, two trunks"):
            part["rows"][name] = self.measure(name, "memory", part["settings"], row=ROWS[name])
        return part

    def scaling(self) -> dict:
        part = about(self.settings(SCALED), self.device, self.threads) | {
            "row": default_row(self.device),
            "tables": {},
        }
        for axis, changes in SCALING.items():
            rows = part["tables"][axis] = []
            for label, change in changes.items():
                if self.small:
                    change = {}
                result = self.measure(
                    f"{axis} {label}",
                    "row",
                    self.settings(SCALED, change),
                    row=ROWS[part["row"]] | SCALED_ROW.get(axis, {}),
                    seconds=self.duration(SCALING_SECONDS),
                )
                if "seconds" not in result:
                    continue
                rows.append({"label": label, **result})
                print(
                    f"  {axis:28} {label!s:>20} "
                    f"{1e6 * statistics.median(result['seconds']) / result['samples']:>9.2f} µs a transition",
                    flush=True,
                )
        return part

    def seeds(self) -> dict:
        part = about(self.settings(FEW), self.device, self.threads) | {"rows": []}
        for label, widths in WIDTHS.items():
            for precision, amp in (("float32", False), ("bf16", True)):
                settings = self.settings(FEW, {"hidden_dims": widths})
                result = self.measure(
                    f"{SEEDS} seeds, {label}",
                    "seeds",
                    settings,
                    seeds=SEEDS,
                    amp=amp,
                    seconds=self.duration(SEEDS_SECONDS),
                )
                if "alone" in result:
                    part["rows"].append({"label": label, "precision": precision, **result})
        return part


# --- what came out ------------------------------------------------------------------------------------------


def flop_text(rate: float) -> str:
    if rate >= 1e13:
        return f"{rate / 1e12:,.1f} TFLOP/s"
    return f"{rate / 1e9:,.0f} GFLOP/s"


def print_limits(limits: dict):
    "How fast the machine multiplies."
    print(
        f"{'matrix products, GFLOP/s':28}"
        + "".join(f"{'×'.join(map(str, shape)):>18}" for shape in limits["shapes"])
        + f"{'error':>10}  is"
    )
    for row in limits["rows"]:
        print(
            f"{row['path']:28}"
            + "".join(f"{rate / 1e9:>18,.0f}" for rate in row["rates"])
            + f"{row['error']:>10.1e}  {row['precision']}"
        )
    print(flush=True)


def print_training(part: dict):
    "The table, and the goals."
    rows, peers = compared(part), [name for name, row in ROWS.items() if "peer" in row]
    print(
        f"\n{'':40}{'steps/s':>12}"
        + "".join(f"{'× ' + name:>{len(name) + 4}}" for name in peers)
        + f"{'MFLOP/step':>12}{'rate':>16}{'of limit':>14}{'busy':>6}{'peak':>9}"
    )
    for row in rows:
        texts = {name: f"{ratio:.1f}" for name, ratio in row["ratios"].items()}
        ratios = "".join(texts.get(name, "").rjust(len(name) + 4) for name in peers)
        share = ""
        if row["share"]:
            share = f"{row['share']:.0%} {row['precision']}"
        print(
            f"{row['name']:40}{row['rate']:>12,.0f}{ratios}{row['flops'] / 1e6:>12.1f}"
            f"{flop_text(row['flop_rate']):>16}{share:>14}"
            f"{row['busy']:>6.0%}{row['peak'] / 1e9:>6.1f} GB"
        )
    for name, row in part["rows"].items():
        if "left_out" in row:
            print(f"{name:40} left out: {row['left_out']}")
    if part["settings"] == SETTINGS:
        for line in judged(rows):
            print(line)


def print_memory(part: dict):
    for name, row in part["rows"].items():
        if "above" not in row:
            continue
        print(
            f"{verdict(row['above'] <= MOST_MEMORY)} {name}: {row['above'] / 1e6:.0f} MB "
            f"above model and table ({row['before'] / 1e6:.0f} MB) in an update of {row['samples']:,} steps "
            f"with {row['inputs']:,} inputs, at most {MOST_MEMORY / 1e6:.0f}"
        )


def print_scaling(part: dict):
    for axis, rows in part["tables"].items():
        rows = costs(rows)
        print(f"\n{axis:>28}{'µs a transition':>18}{'relative':>10}{'MFLOP/step':>12}")
        for row in rows:
            print(
                f"{row['label']!s:>28}{1e6 * row['cost']:>18.2f}{row['relative']:>10.2f}"
                f"{row['flops'] / 1e6:>12.1f}"
            )
        if axis in MOST_COST and rows:
            worst = max(row["relative"] for row in rows)
            print(
                f"{verdict(worst <= MOST_COST[axis])} {axis}: at most {MOST_COST[axis]:g} "
                f"times the least cost of the rows before, is {worst:.2f}"
            )


def print_seeds(part: dict):
    "Eight beside one."
    seeds = next((row["seeds"] for row in part["rows"]), SEEDS)
    print(
        f"\n{'hidden layers':>20}{'':>9}{'one seed':>11}{seeds:>4} at once{'times':>8}{'steps/s of all':>16}"
    )
    for row in part["rows"]:
        alone, together = (statistics.median(row[name]) for name in ("alone", "together"))
        print(
            f"{row['label']:>20}{row['precision']:>9}{alone:>9.3f} s{together:>10.3f} "
            f"s{together / alone:>8.2f}{row['seeds'] * row['samples'] / together:>16,.0f}  "
            f"{verdict(together <= MOST_SECONDS * alone).strip()}: at most {MOST_SECONDS:g}"
        )


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_training(part: dict, path: Path):
    "Steps per second as bars."
    rows = compared(part)[::-1]
    figure = _figure(10, 0.42 * len(rows) + 1.4)
    axes = figure.subplots()
    first = next(iter(ROWS))
    colours = {True: "tab:blue", False: "tab:orange"}  # ours, and the peers'
    bars = axes.barh(
        [row["name"] for row in rows],
        [row["rate"] for row in rows],
        color=[colours[row["name"].startswith("ours")] for row in rows],
    )

    def text(row: dict) -> str:
        said = f"{row['rate']:,.0f}"
        if first in row["ratios"] and row["name"] != first:
            said += f", {row['ratios'][first]:.1f} × {first}"
        if row["share"]:
            said += f", {row['share']:.0%} of the {row['precision']} limit"
        return said

    axes.bar_label(bars, [text(row) for row in rows], padding=3, fontsize=8)
    axes.set_xlim(0, 1.95 * max(row["rate"] for row in rows))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g} k")
    axes.set_xlabel("environment steps a second, rollout and update")
    s = part["settings"]
    axes.set_title(
        f"{s['n_envs']:,} × {s['n_steps']} steps, minibatch {s['minibatch_size']:,}, {s['n_epochs']} "
        f"epochs, {s['hidden_dims']}, windows of {s['window']} bars\n{part['machine']}, {part['date']}",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def label_text(label: int | str) -> str:
    if isinstance(label, str):
        return label
    return f"{label:,}"


def draw_scaling(part: dict, path: Path):
    "What a transition costs, a panel for each thing that grows."
    figure = _figure(15, 3.6)
    for axes, (axis, rows) in zip(figure.subplots(1, len(part["tables"])), part["tables"].items()):
        rows = costs(rows)
        axes.plot(
            [label_text(row["label"]) for row in rows],
            [1e6 * row["cost"] for row in rows],
            marker="o",
        )
        axes.set_title(axis, fontsize=10)
        axes.set_ylim(0, 1.1e6 * max(row["cost"] for row in rows))
        axes.tick_params(axis="x", labelsize=8, rotation=20)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("µs a transition")
    s = part["settings"]
    figure.suptitle(
        f"{part['row']}, {s['n_envs'] * s['n_steps']:,} samples, minibatch {s['minibatch_size']:,}, "
        f"{s['n_epochs']} epochs; {part['machine']}, {part['date']}",
        fontsize=9,
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


SHOW = {
    "training": (print_training, draw_training, "speed"),
    "memory": (print_memory, None, None),
    "scaling": (print_scaling, draw_scaling, "scaling"),
    "seeds": (print_seeds, None, None),
}


def file_of(kind: str) -> Path:
    return RESULTS / f"training_{kind}.json"


def read(path: Path) -> dict:
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def show(name: str, part: dict, kind: str | None):
    "A part's table, and its picture where it is kept."
    say, draw, picture = SHOW[name]
    say(part)
    if kind and draw:
        draw(part, PICTURES / f"training_{picture}_{kind}.png")


def show_kept(names: list[str]):
    for path in sorted(RESULTS.glob("training_*.json")):
        for name, part in read(path).items():
            if name not in names:
                continue
            print(f"\n{part['machine']}, {part['date']}, commit {part['commit']}")
            if name == "training":
                print_limits({"shapes": part["shapes"], "rows": part["limits"]})
            show(name, part, path.stem.removeprefix("training_"))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in SHOW:
        parser.add_argument(f"--{name}", action="store_true", help="measure this part only")
    parser.add_argument("--kept", action="store_true", help="measure nothing")
    parser.add_argument("--small", action="store_true", help="tiny sizes; not kept")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=[*ROWS, *LARGE],
        metavar="NAME",
        help="trainers to measure; not kept: " + "; ".join([*ROWS, *LARGE]),
    )
    parser.add_argument("--threads", type=int, default=len(cores()))
    parser.add_argument("--job", help=argparse.SUPPRESS)  # a measurement as JSON: how this file calls itself
    given = parser.parse_args(arguments)
    if given.job:
        return work(json.loads(given.job))
    parts = [name for name in SHOW if getattr(given, name)] or list(SHOW)
    if given.rows:
        parts = ["training"]
    if given.kept:
        return show_kept(parts)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, given.small, given.threads)
        measures = {
            "training": partial(bench.training, given.rows),
            "memory": bench.memory,
            "scaling": bench.scaling,
            "seeds": bench.seeds,
        }
        kind = None  # not kept
        if not given.small and not given.rows:
            kind = kind_of(bench.device)
        for name in parts:
            part = measures[name]()
            if kind:
                RESULTS.mkdir(exist_ok=True)
                kept = read(file_of(kind)) | {name: part}
                atomic_write(
                    file_of(kind),
                    (json.dumps({n: kept[n] for n in SHOW if n in kept}, indent=1) + "\n").encode(),
                )
            show(name, part, kind)


if __name__ == "__main__":
    main()
