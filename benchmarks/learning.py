"""Is it as good when it is fast? What is fast beside what is plain, on a market with a planted edge: what
they earn unseen, and seconds to a stated validation result.

    python benchmarks/learning.py                # five seeds a way; about half an hour on two cores
    python benchmarks/learning.py --precision    # the shipped defaults beside plain float32
    python benchmarks/learning.py --minibatches  # minibatches of whole bars beside those of single samples
    python benchmarks/learning.py --kept         # trains nothing: tables of what is kept

`fast` is what `quick_test` does on this machine: products in bfloat16 where the chip has instructions for
them, hidden layers in few passes, compiled ones where that is faster, a compiled loss, and what a policy says
of bars known ahead. `float32` is the same network and the same settings by PyTorch's own operations, without
any of that. Both make the same number of steps from the same seeds. The dense network, which multiplies whole
windows, is too slow to train here: its seconds are those of one update times the updates that `float32`
needed.

`whole bars` and `samples` differ in what is shuffled: in rollouts that look at the same bars again and again,
the samples of a bar may stay together, so that the network computes it once an epoch. The sizes are those of
the training benchmark, 1,024 accounts × 24 steps and minibatches of 12,288, in float32.

Each run has one thread; seconds are its own processor time, so that what else the machine does counts less.
The result is the validation return after costs at which a seed is first at or above THRESHOLD; the share is
the part of the oracle's profit that the kept policy earns on the span that it never saw. Numbers are kept in
benchmarks/results/learning.json, one table for each precision of the fast way; the command fails where the
fast way earns less than the plain way by more than the seeds' spread.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from environment import processor

from trading_lib.backtest import run_backtest
from trading_lib.config import AccountConfig
from trading_lib.data.simulation import simulate_market
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data, split_bounds
from trading_lib.features import fit_features
from trading_lib.files import atomic_write
from trading_lib.policy import multilayer
from trading_lib.trainer import NativePPOTrainer
from trading_lib.training import ppo
from trading_lib.training.config import get_auto_config

RESULTS = Path(__file__).resolve().parent / "results" / "learning.json"
MARKET = dict(start="2023-01-01", end="2024-06-01", edge=0.2, recipe="lifelike")
VERSION, TIMEFRAME, ASSET_CLASS, WINDOW = "5.6.0", "15Min", "crypto", 100
SEEDS, STEPS, THRESHOLD = range(5), 1_500_000, 0.05
WIDE = dict(amp=False, n_envs=1_024, n_steps=24, minibatch_size=12_288)
# part -> what is fast and what is plain: settings that are not the mode's, and what a trainer does not do
PARTS = {
    "precision": {
        "fast": (dict(), ()),
        "float32": (dict(amp=False), ("few passes", "known bars", "whole bars")),
    },
    "minibatches": {"whole bars": (WIDE, ()), "samples": (WIDE, ("whole bars",))},
}
WAYS = {way: settings for ways in PARTS.values() for way, settings in ways.items()}


def plain_operations():
    "Hidden layers and the loss as PyTorch makes them."
    linear = torch.nn.functional.linear

    def hidden_layers(x, layers):
        for layer in layers:
            x = torch.relu(linear(x, *layer))
        return x

    def layers_and_heads(x, layers, heads):
        out = hidden_layers(x, layers)
        return [linear(out, *head) for head in heads]

    multilayer.hidden_layers, multilayer.layers_and_heads = hidden_layers, layers_and_heads
    ppo._is_compiled = lambda logits: False


class Watch:
    "Progress that notes when which validation result was there."

    def __init__(self):
        self.rows, self.began = [], time.thread_time()

    def start(self, trainer):
        pass

    def phase(self, name, done, total):
        pass

    def say(self, line):
        pass

    def updated(self, trainer, row):
        if "validation_return" in row:
            self.rows.append(
                {
                    "seconds": round(time.thread_time() - self.began, 2),
                    "update": row["update"],
                    "return": row["validation_return"],
                }
            )


def made(way: str, seed: int, dense: bool = False, **settings):
    "A trainer on its own history, and what its policy is judged by."
    bars, truth = simulate_market(
        "SIM-USD",
        TIMEFRAME,
        MARKET["start"],
        MARKET["end"],
        seed=seed,
        edge=MARKET["edge"],
        recipe=MARKET["recipe"],
    )
    spans = split_bounds(len(bars), 0.7, 0.15)
    market = market_data(
        bars,
        VERSION,
        fit_features(bars.iloc[slice(*spans["train"])], VERSION, TIMEFRAME, ASSET_CLASS),
        TIMEFRAME,
        ASSET_CLASS,
        WINDOW,
        "SIM-USD",
    )
    config = get_auto_config(STEPS, "quick_test", "cpu", **WAYS[way][0], seed=seed, **settings)
    env = GPUVectorizedTradingEnv(
        market.span(*spans["train"]),
        GPUEnvConfig(
            n_envs=config.n_envs,
            version=VERSION,
            window=WINDOW,
            timeframe=TIMEFRAME,
            asset_class=ASSET_CLASS,
            reward_preset="equity",
            account=AccountConfig(costs="broker"),
        ),
        device="cpu",
    )
    if dense:
        from _peers import DenseEnv

        env = DenseEnv(env)
    watch = Watch()
    return (
        NativePPOTrainer(env, config, None if dense else market.span(*spans["validation"]), watch),
        watch,
        lambda best: run_backtest(best, bars, start=spans["test"][0], truth=truth).metrics,
    )


def run(way: str, seed: int) -> dict:
    "One line of the results."
    torch.set_num_threads(1)
    if "few passes" in WAYS[way][1]:
        plain_operations()
    trainer, watch, judged = made(way, seed)
    if "known bars" in WAYS[way][1]:
        trainer.collector.known_of_bars = lambda: None
    if "whole bars" in WAYS[way][1]:
        trainer.learner.whole_bars = False
    trainer.train()
    figures = judged(trainer.best)
    first = next((row for row in watch.rows if row["return"] >= THRESHOLD), {"seconds": None, "update": None})
    return {
        "seed": seed,
        "share": figures["share_of_oracle"],
        "return": figures["total_return"],
        "precision": "bfloat16" if trainer.config.amp else "float32",
        "seconds": first["seconds"],
        "update": first["update"],
        "all_seconds": watch.rows[-1]["seconds"],
        "updates": trainer.updates,
        "whole_bars": trainer.learner.whole_bars,
        "computed_share": trainer.learner.computed_share,
    }


def dense_seconds(seed: int = 0) -> float:
    "One update of the dense network, in float32."
    torch.set_num_threads(1)
    plain_operations()
    trainer, *_ = made("float32", seed, dense=True)
    trainer.train(1)
    begin = time.thread_time()
    trainer.train(1)
    return time.thread_time() - begin


def table(part: dict) -> int:  # exit status
    "Print what came out."

    def median(values):
        return float(np.median([np.inf if v is None else v for v in values]))

    fast, plain = part["ways"]
    shares = {way: np.array([r["share"] for r in rows]) for way, rows in part["ways"].items()}
    print(
        f"{part['machine']}; {part['steps']:,} steps, planted edge {part['market']['edge']}, broker's costs\n"
        f"{'':10} {'precision':10} {'share of the oracle, unseen: mean, range':44} "
        f"seconds to a validation return of {THRESHOLD:.0%}: median, range; whole run"
    )
    for way, rows in part["ways"].items():
        own, seconds = shares[way], [r["seconds"] for r in rows]
        reached = [s for s in seconds if s is not None]
        unseen = f"{own.mean():.1%}, {own.min():.1%} to {own.max():.1%}"
        first, last = min(reached, default=np.inf), max(reached, default=np.inf)
        print(
            f"{way:10} {rows[0]['precision']:10} {unseen:44} "
            f"{median(seconds):.0f}, {first:.0f} to {last:.0f} "
            f"({len(reached)} of {len(rows)} seeds); {np.median([r['all_seconds'] for r in rows]):.0f}"
        )
    if "dense_seconds_per_update" in part:
        updates, seconds = (
            median([r["update"] for r in part["ways"][plain]]),
            part["dense_seconds_per_update"],
        )
        print(
            f"{'dense':10} {'float32':10} {'not trained':44} {seconds * updates:,.0f}, "
            f"from {seconds:.1f} s an update × {updates:.0f} updates"
        )
    spread, behind = float(shares[plain].std(ddof=1)), float(shares[plain].mean() - shares[fast].mean())
    where = "behind" if behind > 0 else "ahead"
    judged = "within it" if behind <= spread else "MISSED"
    print(
        f"{fast}: {abs(behind):.1%} {where} on average, "
        f"the seeds' standard deviation is {spread:.1%}: {judged}"
    )
    return int(behind > spread)


def read() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def kept_as(name: str, part: dict) -> str:
    "Its name among the results: another chip may have another precision."
    return f"{name}, {next(iter(part['ways'].values()))[0]['precision']}"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (fast, plain) in PARTS.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"only {fast} beside {plain}")
    parser.add_argument("--kept", action="store_true", help="train nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    given = parser.parse_args(arguments)
    names, shown = [name for name in PARTS if getattr(given, name)] or list(PARTS), []
    if not given.kept:
        with ProcessPoolExecutor(
            given.workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as pool:
            for name in names:
                running, dense = (
                    {way: [pool.submit(run, way, seed) for seed in SEEDS] for way in PARTS[name]},
                    pool.submit(dense_seconds) if name == "precision" else None,
                )
                part = {
                    "machine": f"{processor()}, one thread a run",
                    "torch": torch.__version__,
                    "market": MARKET,
                    "steps": STEPS,
                    "ways": {
                        way: [future.result() for future in futures] for way, futures in running.items()
                    },
                }
                if dense:
                    part["dense_seconds_per_update"] = dense.result()
                atomic_write(
                    RESULTS,
                    (
                        json.dumps(read() | {kept_as(name, part): part}, indent=1, default=float) + "\n"
                    ).encode(),
                )
                shown.append(kept_as(name, part))
    else:
        shown = [key for key in read() if key.split(", ")[0] in names]
    return max((table(read()[key]) for key in shown), default=0)


if __name__ == "__main__":
    sys.exit(main())
