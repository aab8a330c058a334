"""PPO on tasks that everyone knows: steps until they are solved, beside stable-baselines3 (memory task:
sb3-contrib's recurrent PPO).

    python benchmarks/reference_tasks.py          # trains ours, thirty seeds a task, beside the kept peers
    python benchmarks/reference_tasks.py --peers  # and the peers: pip install stable-baselines3 sb3-contrib
    python benchmarks/reference_tasks.py --kept   # trains nothing: table and picture of what is kept

Each run has one thread on one core of its own; `--workers 2` uses two cores. A command that was cut goes on
where it was. Numbers are kept in benchmarks/results/reference_tasks.json and drawn to
docs/reference_tasks.png; the command fails where a bar is missed:

- our median at most 1.5 times theirs, of steps to the threshold, and more than half of our runs reach it;
- no significant difference: one-sided Mann-Whitney test of "ours needs more steps", p > 0.05.

Steps to the threshold are environment steps, all environments together, when the mean return of the last 100
finished training episodes (actions are drawn, not the most probable ones) first reaches it; there a run ends.
A run that never does counts as its whole budget, and is counted in the table.

Ten seeds were too few to tell: on the first ten of Acrobot ours needed 1.15 times the steps (p 0.018), on the
twenty that followed 1.01 times (p 0.27). So there are thirty on every task, and their p is that of all of
them.

Both sides have the same environments, network widths, ReLU, orthogonal initialisation, Adam with epsilon
1e-5, learning-rate schedule, batches, epochs, discount, lambda, clipping, entropy and gradient norm; ours
makes no epochs for the value alone. Random numbers cannot be the same: seed 100 means another run to each. On
the memory task the networks differ by design: ours has one GRU, orthogonally initialised, for policy and
value, behind an encoder of two layers; theirs has two LSTMs as PyTorch makes them, one for the policy and one
for the value, directly on the observation. Width and depth of the memory and of the heads are equal, but for
the layer normalisation that ours has.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from environment import processor
from scipy.stats import mannwhitneyu
from tensor_env import CueRecall, TensorEnv

from trading_lib.files import atomic_write
from trading_lib.trainer import NativePPOConfig, NativePPOTrainer
from trading_lib.training.ppo import learning_rate_at

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURE = (
    ROOT / "benchmarks" / "results" / "reference_tasks.json",
    ROOT / "docs" / "reference_tasks.png",
)
SEEDS = tuple(range(0, 3000, 100))  # environment i of a run has the seed's number plus i
EPISODES = 100  # finished episodes whose mean return must reach the threshold
LARGEST_RATIO, SMALLEST_P = 1.5, 0.05
MAKERS = {"CueRecall": CueRecall}  # environments that Gymnasium does not know by name

# what all runs have in common, by the names of NativePPOConfig
COMMON = dict(clip_range=0.2, value_coefficient=0.5, max_grad_norm=0.5)
TASKS = {
    "CartPole-v1": dict(
        threshold=475.0,
        total_timesteps=153_600,
        n_envs=8,
        n_steps=32,
        minibatch_size=256,
        n_epochs=20,
        learning_rate=1e-3,
        gamma=0.98,
        gae_lambda=0.8,
        entropy_coefficient=0.0,
        hidden_dims=[64, 64],
        **COMMON,
    ),
    "Acrobot-v1": dict(
        threshold=-100.0,
        total_timesteps=245_760,
        n_envs=16,
        n_steps=128,
        minibatch_size=128,
        n_epochs=4,
        learning_rate=1e-3,
        gamma=0.99,
        gae_lambda=0.94,
        entropy_coefficient=0.01,
        hidden_dims=[64, 64],
        **COMMON,
    ),
    "CueRecall": dict(
        threshold=0.95,
        total_timesteps=98_304,
        n_envs=16,
        n_steps=32,
        minibatch_size=128,
        n_epochs=4,
        learning_rate=1e-3,
        gamma=0.99,
        gae_lambda=0.95,
        entropy_coefficient=0.01,
        gru_hidden_dim=64,
        **COMMON,
    ),
}
SIDES = ("ours", "peers")


def is_recurrent(settings: dict) -> bool:
    return "gru_hidden_dim" in settings


def peer_of(settings: dict) -> str:
    if is_recurrent(settings):
        return "sb3-contrib RecurrentPPO"
    return "stable-baselines3 PPO"


def name_of(side: str, settings: dict) -> str:
    "Whose trainer it is, for people."
    if side == "ours":
        return "trading_lib"
    return peer_of(settings)


# --- one run ------------------------------------------------------------------------------------------------


def episodes_to_threshold(
    finished: list,  # (step of the run, return, …) of each finished episode, in order
    threshold: float,
    episodes: int = EPISODES,
) -> int | None:  # None: never
    "How many episodes it took until the mean return of the last ones first reached the threshold."
    if len(finished) < episodes:
        return None
    reached = np.flatnonzero(_running_means(finished, episodes) >= threshold)
    if not len(reached):
        return None
    return int(reached[0]) + episodes


def _running_means(finished: list, episodes: int) -> np.ndarray:  # the first is that of the first `episodes`
    total = np.concatenate([[0.0], np.cumsum([row[1] for row in finished])])
    return (total[episodes:] - total[:-episodes]) / episodes


def curve(
    finished: list, episodes: int = EPISODES, points: int = 60
) -> list:  # [step, mean return of the last episodes], thinned out
    "How a run learned."
    if len(finished) < episodes:
        return []
    means = _running_means(finished, episodes)
    places = np.unique(np.linspace(0, len(means) - 1, points).astype(int))
    return [[int(finished[i + episodes - 1][0]), round(float(means[i]), 3)] for i in places]


def our_trainer(task: str, settings: dict, seed: int) -> NativePPOTrainer:
    "Our side, ready to train."
    own = {name: value for name, value in settings.items() if name != "threshold"}
    network = dict(shared_trunk=False)
    if is_recurrent(settings):
        network = dict(network="gru", n_gru_layers=1)
    return NativePPOTrainer(
        TensorEnv(MAKERS.get(task, task), settings["n_envs"]),
        NativePPOConfig(**own, **network, critic_epochs=0, seed=seed),
        progress=None,
    )


def peer_algorithm(settings: dict) -> tuple:  # class, name of its policy, settings of the policy
    "What the peer calls a trainer and a network of these settings."
    from stable_baselines3 import PPO

    policy = dict(activation_fn=torch.nn.ReLU, ortho_init=True)
    if not is_recurrent(settings):
        widths = settings["hidden_dims"]
        return PPO, "MlpPolicy", policy | dict(net_arch=dict(pi=widths, vf=widths))
    from sb3_contrib import RecurrentPPO

    width = settings["gru_hidden_dim"]
    heads = dict(pi=[width // 2], vf=[width // 2])
    policy |= dict(lstm_hidden_size=width, n_lstm_layers=1, net_arch=heads)
    return RecurrentPPO, "MlpLstmPolicy", policy


def peer_model(task: str, settings: dict, seed: int):  # a PPO or RecurrentPPO
    "The peer's side, ready to train."
    from stable_baselines3.common.env_util import make_vec_env

    rollout, budget = settings["n_envs"] * settings["n_steps"], settings["total_timesteps"]

    def learning_rate(remaining: float) -> float:
        "Asked after each rollout, with the share of the budget that is left."
        return learning_rate_at(
            max(0, round((1 - remaining) * budget / rollout) - 1),
            budget // rollout,
            settings["learning_rate"],
        )

    algorithm, name, policy = peer_algorithm(settings)
    return algorithm(
        name,
        make_vec_env(MAKERS.get(task, task), settings["n_envs"], seed=seed),
        learning_rate=learning_rate,
        n_steps=settings["n_steps"],
        batch_size=settings["minibatch_size"],
        n_epochs=settings["n_epochs"],
        gamma=settings["gamma"],
        gae_lambda=settings["gae_lambda"],
        clip_range=settings["clip_range"],
        ent_coef=settings["entropy_coefficient"],
        vf_coef=settings["value_coefficient"],
        max_grad_norm=settings["max_grad_norm"],
        policy_kwargs=policy,
        seed=seed,
        device="cpu",
    )


def run_ours(task: str, settings: dict, seed: int) -> list:  # of finished episodes
    "Train until the threshold, or to the end of the budget."
    trainer = our_trainer(task, settings, seed)
    while (
        trainer.update < trainer.updates
        and episodes_to_threshold(trainer.env.finished, settings["threshold"]) is None
    ):
        trainer.train(1)
    return trainer.env.finished


def run_peer(task: str, settings: dict, seed: int) -> list:  # of finished episodes
    "The same with the peer's trainer."
    finished = []

    def watch(local, _) -> bool:
        "Called after each step: collect finished episodes, stop at the threshold."
        ended = [
            (local["self"].num_timesteps, float(info["episode"]["r"]), int(info["episode"]["l"]))
            for info in local["infos"]
            if "episode" in info
        ]
        finished.extend(ended)
        return (
            not ended
            or episodes_to_threshold(finished[-EPISODES - len(ended) + 1 :], settings["threshold"]) is None
        )

    peer_model(task, settings, seed).learn(settings["total_timesteps"], callback=watch)
    return finished


def run(side: str, task: str, settings: dict, seed: int) -> dict:
    "One line of the results."
    begin = time.thread_time()
    if side == "ours":
        finished = run_ours(task, settings, seed)
    else:
        finished = run_peer(task, settings, seed)
    n = episodes_to_threshold(finished, settings["threshold"])
    steps = settings["total_timesteps"]
    if n is not None:
        steps = finished[n - 1][0]
    return {
        "seed": seed,
        "steps": steps,
        "reached": n is not None,
        "seconds": round(time.thread_time() - begin, 1),
        "curve": curve(finished[:n]),
    }


# --- many runs ----------------------------------------------------------------------------------------------


def _pin(cores):
    "One thread, one core, for the whole life of a worker."
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})


def versions(side: str, settings: dict) -> dict:  # package -> version
    "What the numbers depend on."
    names = ["torch", "numpy", "gymnasium"]
    if side == "ours":
        names.append("trading_lib")
    else:
        names.append("stable-baselines3")
        if is_recurrent(settings):
            names.append("sb3-contrib")

    def of(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {"python": platform.python_version()} | {name: of(name) for name in names}


def read(path: Path) -> dict:
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: dict):
    "In one step, and each run on one line."
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(row) for sides in content.values() for part in sides.values() for row in part["runs"]]
    places = iter(range(len(lines)))
    numbered = {
        task: {
            side: part | {"runs": [f"run {next(places)}" for _ in part["runs"]]}
            for side, part in sides.items()
        }
        for task, sides in content.items()
    }
    text = re.sub(r'"run (\d+)"', lambda m: lines[int(m[1])], json.dumps(numbered, indent=1))
    atomic_write(path, (text + "\n").encode())


def _cores() -> list[int]:
    "Those that this process may use."
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def train(side: str, tasks: list, workers: int):
    "All runs that a command before did not finish; finished tasks replace those that were kept."
    unfinished = RESULTS.with_suffix(f".{side}.unfinished.json")
    parts, todo = read(unfinished), []
    for task in tasks:
        now = {
            "settings": TASKS[task],
            "versions": versions(side, TASKS[task]),
            "machine": f"{processor()}, one thread on one core a run",
        }
        part = parts.get(task, {}).get(side, {})
        if {name: part.get(name) for name in now} != now:
            part = {**now, "runs": []}  # none yet, or of other settings
        parts[task] = {side: part}
        todo += [(task, seed) for seed in SEEDS if seed not in [r["seed"] for r in part["runs"]]]
    context, cores = multiprocessing.get_context("spawn"), _cores()
    free = context.Queue()
    for i in range(workers):
        free.put(cores[i % len(cores)])
    with ProcessPoolExecutor(workers, context, _pin, (free,)) as pool:
        running = {pool.submit(run, side, task, TASKS[task], seed): task for task, seed in todo}
        for future in as_completed(running):
            task, row = running[future], future.result()
            parts[task][side]["runs"] = sorted([*parts[task][side]["runs"], row], key=itemgetter("seed"))
            write(unfinished, parts)
            failed = ", threshold not reached" * (not row["reached"])
            print(
                f"{task:12} {side:5} seed {row['seed']:3}: {row['steps']:>7,} steps{failed}, "
                f"{row['seconds']:.0f} s",
                flush=True,
            )
    kept = read(RESULTS)
    for task in tasks:
        kept[task] = kept.get(task, {}) | parts[task]
    write(
        RESULTS,
        {
            task: {side: kept[task][side] for side in SIDES if side in kept[task]}
            for task in TASKS
            if task in kept
        },
    )
    unfinished.unlink(missing_ok=True)


# --- what came out ------------------------------------------------------------------------------------------


def compared(
    ours: list,  # steps of each run
    theirs: list,
) -> dict:  # medians, their ratio, and p of "ours needs more steps"
    "The numbers that the bars are about."
    method = "exact"
    if len(set(ours) | set(theirs)) < len(ours) + len(theirs):  # ties
        method = "asymptotic"
    p = mannwhitneyu(ours, theirs, alternative="greater", method=method).pvalue
    return {
        "ours": float(np.median(ours)),
        "theirs": float(np.median(theirs)),
        "ratio": float(np.median(ours) / np.median(theirs)),
        "p": float(p),
    }


def misses(results: dict, task: str) -> list[str]:
    "What keeps a task from passing, in words."
    none = {"ours": "no runs of ours", "peers": "no runs of the peer; make them with --peers"}
    how = {"ours": "", "peers": " with --peers"}
    for side in SIDES:
        if side not in results.get(task, {}):
            return [none[side]]
        if results[task][side]["settings"] != TASKS[task]:
            return [f"the kept runs ({side}) are of other settings; make them anew{how[side]}"]
    ours, theirs = ([r["steps"] for r in results[task][side]["runs"]] for side in SIDES)
    c, out = compared(ours, theirs), []
    if c["ratio"] > LARGEST_RATIO:
        out.append(f"our median is {c['ratio']:.2f} times theirs, more than {LARGEST_RATIO}")
    if c["p"] <= SMALLEST_P:
        out.append(f"ours needs significantly more steps, p {c['p']:.3f}")
    if 2 * sum(r["reached"] for r in results[task]["ours"]["runs"]) <= len(ours):
        out.append("half of our runs or more never reached the threshold")
    return out


def table(results: dict) -> int:  # tasks that missed a bar
    "Print what came out."
    print(f"{'':12} {'':25} {'median':>8} {'range':>18} {'reached':>8} {'ratio':>6} {'p':>6}")
    missed = 0
    for task, settings in TASKS.items():
        wrong = misses(results, task)
        for side in SIDES:
            if side not in results.get(task, {}):
                continue
            runs = results[task][side]["runs"]
            steps = [r["steps"] for r in runs]
            figures = ""
            if (
                side == "ours"
                and "peers" in results[task]
                and all(results[task][other]["settings"] == settings for other in SIDES)
            ):
                c = compared(steps, [r["steps"] for r in results[task]["peers"]["runs"]])
                figures = f"{c['ratio']:>6.2f} {c['p']:>6.3f}"
            print(
                f"{task * (side == 'ours'):12} {name_of(side, settings):25} {np.median(steps):>8,.0f} "
                f"{f'{min(steps):,} to {max(steps):,}':>18} "
                f"{sum(r['reached'] for r in runs):>5}/{len(runs)} {figures}"
            )
        for words in wrong:
            print(f"{'':12} missed: {words}")
        missed += bool(wrong)
    return missed


def draw(results: dict):
    "Above how each run learned, below where it reached the threshold."
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(TASKS), sharex="col", height_ratios=(3, 1), squeeze=False)
    colours = {"ours": "tab:blue", "peers": "tab:orange"}
    for (task, settings), (above, below) in zip(TASKS.items(), axes.T):
        for height, side in enumerate(reversed(SIDES)):
            if side not in results.get(task, {}):
                continue
            runs, colour = results[task][side]["runs"], colours[side]
            labels = [name_of(side, settings)] + [None] * len(runs)  # each side once
            for r, label in zip(runs, labels):
                above.plot(*zip(*r["curve"]), color=colour, alpha=0.5, linewidth=1, label=label)
            steps = np.array([r["steps"] for r in runs])
            reached = np.array([r["reached"] for r in runs])
            places = height + np.linspace(-0.22, 0.22, len(runs))
            below.scatter(steps[reached], places[reached], color=colour, s=18, zorder=3)
            below.scatter(
                steps[~reached], places[~reached], color=colour, s=24, marker=">", facecolors="none", zorder=3
            )
            below.plot([np.median(steps)] * 2, [height - 0.36, height + 0.36], color=colour, linewidth=2.5)
        above.axhline(settings["threshold"], color="grey", linewidth=0.8, linestyle="--")
        above.set_title(f"{task}: {settings['threshold']:g} over {EPISODES} episodes", fontsize=10)
        above.legend(fontsize=8, loc="lower right")
        below.set_yticks([0, 1], ["peer", "ours"])
        below.set_ylim(-0.5, 1.5)
        below.set_xlim(left=0)
        below.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g} k")
        below.set_xlabel("environment steps")
    axes[0][0].set_ylabel(f"mean return of the last {EPISODES} episodes")
    figure.suptitle(
        f"{len(SEEDS)} seeds a side. Above: how each run learned. Below: when it reached the threshold, and "
        "the median; a hollow arrow never did.",
        fontsize=9,
    )
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


def main(arguments=None) -> int:  # exit status
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", action="store_true", help="train the peers anew as well")
    parser.add_argument("--only", choices=SIDES, help="train one side only")
    parser.add_argument("--kept", action="store_true", help="train nothing")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each on a core of its own")
    given = parser.parse_args(arguments)
    sides = ["ours"]
    if given.kept:
        sides = []
    elif given.only:
        sides = [given.only]
    elif given.peers:
        sides = list(SIDES)
    for side in sides:
        train(side, given.tasks, given.workers)
    results = read(RESULTS)
    draw(results)
    return int(table(results) > 0)


if __name__ == "__main__":
    sys.exit(main())
