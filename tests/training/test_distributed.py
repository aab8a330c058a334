"""Two real processes, started by torchrun, that train one policy: the same update as one process with all
accounts, one writer, one end, and an exact resume."""

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from prepared import prepare
from test_pipeline import edit

from trading_lib.checkpoint import load_checkpoint
from trading_lib.trainer import NativePPOTrainer
from trading_lib.training.config import NativePPOConfig

TESTS = Path(__file__).resolve().parent


class Ledger:
    """Accounts that are told apart by their number: what each sees, earns and how its episodes end follows
    from it and the step alone."""

    n_actions, obs_dim, device = 3, 4, "cpu"

    def __init__(self, first, n):
        self.first, self.n_envs = first, n

    def _observe(self):
        account = self.first + torch.arange(self.n_envs)[:, None]
        return torch.sin((account + 1) * 0.7 + self.t * torch.tensor([[0.3, 0.5, 0.7, 1.1]])).float()

    def reset(self, seed=0):
        self.t = 0
        return self._observe()

    def step(self, actions):
        self.t += 1
        account, obs = self.first + torch.arange(self.n_envs), self._observe()
        return (
            obs,
            torch.cos(account + 2.0 * self.t),
            (account + self.t) % 5 == 0,
            (account + self.t) % 7 == 0,
            {"final_obs": obs},
        )


def act_by_number(trainer):
    "Actions follow from account and step too, so that it does not matter who draws them."
    rollout, env = trainer._rollout, trainer.env

    def acted():
        out = rollout()
        out["action"] = (
            torch.arange(len(out["reward"]))[:, None] * 5 + env.first + torch.arange(env.n_envs)
        ) ** 2 % 3
        out["log_probability"] = torch.log_softmax(out["logits"], 2).gather(2, out["action"][..., None])[
            ..., 0
        ]
        return out

    trainer._rollout = acted


OPTIONS = {
    "plain": dict(),
    "two optimizers": dict(
        separate_optimizers=True, critic_epochs=2, value_clip_range=0.2, shared_trunk=False
    ),
    "recurrent": dict(network="gru", gru_hidden_dim=8, n_gru_layers=1, critic_epochs=1),
}


def ledger_trainer(first, n, options):
    "All samples of a process are one minibatch."
    trainer = NativePPOTrainer(
        Ledger(first, n),
        NativePPOConfig(
            **{
                **dict(
                    hidden_dims=(16,),
                    n_steps=8,
                    minibatch_size=8 * n,
                    n_epochs=3,
                    total_timesteps=8 * 8,
                    learning_rate=1e-3,
                    warmup_fraction=0.0,
                ),
                **options,
            }
        ),
        progress=None,
    )
    act_by_number(trainer)
    return trainer


# what every process says at its end: the file {name}_{rank}.pt holds it
BEGIN = f"""
import sys
from datetime import datetime
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = {[str(TESTS), str(TESTS.parent), str(TESTS.parent / "system")]!r}
from test_distributed import *
from small_trainers import Plain, market, trading_trainer, weights
from trading_lib.config import InputError
from trading_lib.training.distributed import join_processes, processes
from trading_lib.training.run_folder import RunFolder
from trading_lib.training.progress import LineProgress
from trading_lib.pipeline.train import resume
assert join_processes(torch.device("cpu"))
rank, world = processes()
assert world == 2
out = Path(sys.argv[1])
def say(name, value): torch.save(value, out / f"{{name}}_{{rank}}.pt")
"""


TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run"),
    *("--nproc-per-node", "2"),
    *("--rdzv-backend", "c10d"),
    *("--rdzv-endpoint", "127.0.0.1:0"),
]


def torchrun(folder: Path, code: str):
    "Two processes that run a script; what they say lies in the folder."
    script = folder / "script.py"
    script.write_text(BEGIN + textwrap.dedent(code))
    command = [
        *TORCHRUN,
        str(script),
        str(folder),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def said(folder: Path, name: str) -> list:
    "By the first process and by the second."
    return [torch.load(folder / f"{name}_{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """Two processes: an update of each kind, the seeds that their environments are given, and a reward that
    becomes NaN in one of them."""
    folder = tmp_path_factory.mktemp("updates")
    torchrun(
        folder,
        """
        for name, options in OPTIONS.items():
            trainer = ledger_trainer(4 * rank, 4, options)
            row = trainer.train()[-1]
            say(name, {"weights": weights(trainer), "row": row, "updates": trainer.updates})
        class Seeds(Plain):
            def reset(self, seed=0):
                say("seeds", list(range(seed, seed + self.n_envs)))
                return super().reset(seed)
        small = dict(hidden_dims=(8,), n_epochs=1)
        config = NativePPOConfig(**small, n_steps=2, minibatch_size=16, total_timesteps=32, seed=3)
        NativePPOTrainer(Seeds(), config, progress=None).train()
        class Broken(Plain):
            def step(self, actions):
                obs, reward, *rest = super().step(actions)
                self.steps = getattr(self, "steps", 0) + 1
                if self.steps == 30 and rank == who: reward[5] = float("nan")
                return obs, reward, *rest
        for who in (0, 1):
            config = NativePPOConfig(**small, n_steps=12, minibatch_size=96, total_timesteps=192 * 5)
            folder = RunFolder(out / f"run_{who}")
            trainer = NativePPOTrainer(Broken(), config, progress=None, folder=folder)
            try: trainer.train()
            except InputError as e: say(f"end_{who}", str(e))
    """,
    )
    return folder


@pytest.mark.parametrize("name", OPTIONS)
def test_a_full_batch_update_of_two_processes_is_that_of_one(updates, name):
    """Four accounts each, or all eight in one: weights that move by thousandths agree to a millionth, and so
    do the figures that are logged."""
    single = ledger_trainer(0, 8, OPTIONS[name])
    before = {key: p.detach().clone() for key, p in single.policy.named_parameters()}
    row = single.train()[-1]
    first, second = said(updates, name)
    assert (
        all(torch.equal(v, second["weights"][key]) for key, v in first["weights"].items())
        and first["row"] == second["row"]
        and first["updates"] == 1
    )
    assert first["row"]["timesteps"] == row["timesteps"] == 64
    for key, p in single.policy.named_parameters():
        assert torch.allclose(first["weights"][key], p, rtol=0, atol=1e-6), (
            key,
            float((first["weights"][key] - p).abs().max()),
        )
        assert (p - before[key]).abs().max() > 1e-3, key
    for key in (
        "policy_loss",
        "value_loss",
        "entropy",
        "kl",
        "clip_fraction",
        "reward",
        "advantage_mean",
        "return_mean",
        "value_mean",
    ):
        assert np.isclose(first["row"][key], row[key], rtol=1e-4, atol=1e-6), key


def test_each_process_has_accounts_of_its_own(updates):
    """Environments of Gymnasium have the seeds that follow the first one's: those of the second process
    begin where those of the first end."""
    first, second = said(updates, "seeds")
    assert first[0] == 3 and not set(first) & set(second)


@pytest.mark.parametrize("who", [0, 1])
def test_what_goes_wrong_in_one_process_ends_both_with_the_same_words(updates, who):
    "And the good weights are kept, by the first process; nobody waits for the other one for ever."
    first, second = said(updates, f"end_{who}")
    assert (
        "the rewards became nan, first of account 5 at step 5 of the rollout" in first
        and "in update 3" in first
        and "The weights are those of update 2" in first
        and first.partition("; kept")[0] == second.partition("; kept")[0]
    )
    assert load_checkpoint(updates / f"run_{who}" / "checkpoint_000002.pt")["update"] == 2


# environments of a simulated market; 20 updates, or 12 of the recurrent policy, validated at every fourth
RUN = """
    lines, written = [], []
    class Watched(RunFolder):
        def save(self, content): written.append(content["update"]); return super().save(content)
        def save_best(self, content): written.append(-content["update"]); return super().save_best(content)
    def make(folder, options):
        written.clear()
        trainer = trading_trainer(0, market().span(5500, 5600), validation_interval=4, n_epochs=1, **options)
        trainer.folder, trainer.progress = Watched(out / folder, 3), LineProgress(lines.append)
        return trainer
    budget = lambda updates: dict(total_timesteps=2 * 8 * 16 * updates, checkpoint_interval=updates)
    GRU = dict(network="gru", gru_hidden_dim=8, n_gru_layers=1, separate_optimizers=True, critic_epochs=1)
    NETWORKS = {"mlp": budget(20), "gru": dict(budget(12), **GRU)}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A whole run; one that was stopped after seven updates because the second process was asked to; the
    rest of that in two new processes."""
    folder = tmp_path_factory.mktemp("runs")
    torchrun(
        folder,
        RUN
        + """
    for name, options in NETWORKS.items():
        whole = make(name, options)
        whole.train()
        ran = {"weights": weights(whole), "written": list(written), "history": whole.history}
        say(name, ran | {"best": whole.best_update})
        half = make("half_" + name, options)
        half.train(stop=lambda: rank == 1 and half.update >= 7)
        content = half.content()
        if rank == 0: half.folder.save_interrupted(content, datetime.now())
        say("half_" + name, {"update": half.update, "written": list(written)})
    """,
    )
    torchrun(
        folder,
        RUN
        + """
    for name, options in NETWORKS.items():
        again = make("half_" + name, options)
        assert resume(again) and again.update == 7
        again.train()
        ran = {"weights": weights(again), "history": again.history, "score": again.best_score}
        say("again_" + name, ran | {"best": again.best_update})
    """,
    )
    return folder


@pytest.mark.parametrize("name, updates", [("mlp", 20), ("gru", 12)])
def test_a_run_of_two_processes_is_written_once(runs, name, updates):
    "By the first of them; both end with the same weights and the same figures."
    first, second = said(runs, name)
    assert (
        all(torch.equal(v, second["weights"][key]) for key, v in first["weights"].items())
        and first["history"] == second["history"]
        and first["best"] == second["best"]
    )
    assert (
        second["written"] == []
        and [n for n in first["written"] if n > 0] == [updates]
        and -first["best"] in first["written"]
        and len(first["written"]) == len(set(first["written"]))
    )
    assert sorted(p.name for p in (runs / name).iterdir()) == [
        f"best_{first['best']:06d}.pt",
        f"checkpoint_{updates:06d}.pt",
    ]
    assert [row["update"] for row in first["history"] if "validation_score" in row] == list(
        range(4, updates + 1, 4)
    ) and first["history"][-1]["timesteps"] == 2 * 8 * 16 * updates
    own = [
        state["environment_state"]["random"]
        for state in load_checkpoint(runs / name / f"checkpoint_{updates:06d}.pt")["processes"]
    ]
    assert len(own) == 2 and not torch.equal(*own)  # each process has accounts of its own


@pytest.mark.parametrize("name", ["mlp", "gru"])
def test_a_run_of_two_processes_stops_together_and_is_resumed_exactly(runs, name):
    whole = said(runs, name)[0]
    assert [half["update"] for half in said(runs, f"half_{name}")] == [7, 7] and said(runs, f"half_{name}")[
        1
    ]["written"] == []
    for found in said(runs, f"again_{name}"):
        assert all(torch.equal(v, found["weights"][key]) for key, v in whole["weights"].items())
        assert found["history"] == whole["history"] and found["best"] == whole["best"]


def test_another_number_of_processes_is_refused(runs):
    "In one line, before anything is taken over."
    from small_trainers import market, refusal, trading_trainer, weights

    trainer = trading_trainer(0, market().span(5500, 5600))
    before = weights(trainer)
    assert "was trained by 2 processes, here are 1; start as many with torchrun" in refusal(
        trainer.load, runs / "mlp" / "checkpoint_000020.pt"
    )
    assert all(torch.equal(v, before[key]) for key, v in weights(trainer).items()) and trainer.update == 0


@pytest.mark.proof
def test_the_command_trains_with_two_processes(tmp_path):
    "One model, one table, one line for each thing; a checkpoint of both is gone on from by both."
    for name in ("params.yaml", "settings.ini"):
        shutil.copy(TESTS.parents[1] / name, tmp_path / name)
    edit(
        tmp_path / "params.yaml",
        **{
            "data.start": "2023-01-01",
            "data.end": "2023-01-20",
            "features.window": 20,
            "train.device": "cpu",
            "train.hidden_dims": [8],
            "train.n_envs": 8,
            "train.n_steps": 32,
            "train.total_timesteps": 2 * 8 * 32 * 6,
        },
    )
    with contextlib.chdir(tmp_path):
        prepare()
    command = [
        *TORCHRUN,
        str(Path(sys.executable).parent / "trading-lib"),
        "train",
        "SIM-USD",
    ]

    def run(*more):
        return subprocess.run(
            [*command, *more],
            cwd=tmp_path,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(TESTS.parents[1])},
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run("--checkpoint-interval", "4")

    def newest():
        return max(tmp_path.glob("models/kept/SIM-USD_15Min/*_last.pt"), key=lambda p: p.stat().st_mtime_ns)

    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        done.stdout.count("network       mlp") == 1
        and done.stdout.count("update 6/6 |") == 1
        and done.stdout.count("saved ") == 1
    )
    content = load_checkpoint(newest())
    assert (
        content["update"] == 6 and content["global_step"] == 2 * 8 * 32 * 6 and len(content["processes"]) == 2
    )
    again = run("--checkpoint", str(newest()), "--timesteps", str(2 * 8 * 32 * 8))
    assert (
        again.returncode == 0
        and again.stdout.count("going on from") == 1
        and load_checkpoint(newest())["update"] == 8
    )
    refused = run("--learning-rate", "-1")
    assert refused.returncode != 0 and "train.learning_rate: expected more than 0, was -1.0" in refused.stderr
