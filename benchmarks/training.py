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
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from training_measure import cores, work
from training_report import (
    draw_scaling,
    draw_training,
    print_limits,
    print_memory,
    print_scaling,
    print_seeds,
    print_training,
)
from training_rows import (
    DEFAULTS,
    FEW,
    LARGE,
    ROLLOUT,
    ROWS,
    SCALED,
    SCALED_ROW,
    SCALING,
    SCALING_SECONDS,
    SECONDS,
    SEEDS,
    SEEDS_SECONDS,
    SETTINGS,
    SHAPES,
    SMALL,
    TURNS,
    WIDTHS,
    default_row,
    kind_of,
)

from trading_lib.env import market_data
from trading_lib.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURES = ROOT / "benchmarks" / "results", ROOT / "docs"


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


# --- what is kept -------------------------------------------------------------------------------------------

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
