"""One measurement of training.py, in a process of its own."""

import ctypes
import json
import os
import resource
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from training_rows import MOST_ITERATIONS, PATHS, PPO

from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, MarketData
from trading_lib.trainer import NativePPOConfig, NativePPOTrainer

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
