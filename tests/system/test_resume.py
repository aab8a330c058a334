"""Stopped and gone on with: the resumed run is the uninterrupted one to the last bit.

Through real files, real signals and the real command. `pytest -s` prints the counts."""

import contextlib
import functools
import hashlib
import io
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from trading_lib.checkpoint import load_checkpoint, save_checkpoint
from trading_lib.cli import main
from trading_lib.config import InputError, load_parameters
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data
from trading_lib.features import fit_features
from trading_lib.ledger import ledger_path, read_trials
from trading_lib.pipeline.prepare import prepare_symbol
from trading_lib.pipeline.project import artefacts
from trading_lib.pipeline.train import resume
from trading_lib.sources import simulate_bars
from trading_lib.trainer import NativePPOTrainer
from trading_lib.training.config import NativePPOConfig
from trading_lib.training.memory import memory_text
from trading_lib.training.progress import LineProgress
from trading_lib.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


# --- 5 stopping points × 3 seeds ----------------------------------------------------------------------------

UPDATES, SEEDS, N_ENVS, N_STEPS = 6, (0, 1, 2), 8, 16
KINDS = {
    "mlp": dict(hidden_dims=(16,)),
    "mlp, whole bars": dict(
        hidden_dims=(16,), n_steps=160, minibatch_size=300, total_timesteps=N_ENVS * 160 * UPDATES
    ),
    "mlp, two optimizers": dict(
        hidden_dims=(16,), separate_optimizers=True, critic_epochs=1, value_clip_range=0.3
    ),
    "mlp, two trunks, recovery": dict(
        hidden_dims=(16,), shared_trunk=False, recovery=True, max_drawdown_threshold=1e-6
    ),
    "gru": dict(network="gru", gru_hidden_dim=16, n_gru_layers=2, critic_epochs=1, minibatch_size=64),
    "gru, two optimizers": dict(network="gru", gru_hidden_dim=16, n_gru_layers=1, separate_optimizers=True),
}


@functools.cache
def market():
    "Two weeks of simulated bars; features fitted on the first ten days."
    bars = simulate_bars(
        "SIM-USD", "15Min", "2023-01-01", "2023-01-18", seed=1, edge=0.2, asset_class="crypto"
    )
    return market_data(
        bars,
        "5.6.0",
        fit_features(bars[:1200], "5.6.0", "15Min", "crypto"),
        "15Min",
        "crypto",
        window=5,
        symbol="SIM-USD",
    )


def trainer_in(folder: Path, seed: int, said: list | None = None, **settings) -> NativePPOTrainer:
    """Costs rise over the first three of six updates, episodes are shorter than a rollout, the exploration
    component of the reward remembers 64 actions."""
    env = GPUVectorizedTradingEnv(
        market().span(0, 1200),
        GPUEnvConfig(n_envs=N_ENVS, version="5.6.0", window=5, episode_length=12, reward_preset="v2.5.0"),
    )
    config = NativePPOConfig(
        **dict(
            n_steps=N_STEPS,
            minibatch_size=48,
            n_epochs=2,
            total_timesteps=N_ENVS * N_STEPS * UPDATES,
            learning_rate=3e-3,
            cost_warm_up=0.5,
            validation_interval=2,
            seed=seed,
        )
        | settings
    )
    made = NativePPOTrainer(env, config, market().span(1200, 1220), None, RunFolder(folder))
    if said is not None:
        made.progress.say = said.append
    return made


def sha256(value) -> str:
    """Of plain values, containers and tensors, to the last bit; written here, not taken from the
    checkpoint's code."""
    digest = hashlib.sha256()

    def add(v):
        if torch.is_tensor(v):
            v = v.detach().cpu().contiguous()
            digest.update(
                f"{v.dtype} {tuple(v.shape)} ".encode() + v.reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        elif isinstance(v, dict):
            digest.update(f"dict {len(v)} ".encode())
            for name in sorted(v, key=str):
                add(str(name))
                add(v[name])
        elif isinstance(v, (list, tuple)):
            digest.update(f"list {len(v)} ".encode())
            for one in v:
                add(one)
        elif is_dataclass(v):
            add({f.name: getattr(v, f.name) for f in fields(v)})
        else:
            digest.update(f"{type(v).__name__} {v!r};".encode())  # repr of a float is exact

    add(value)
    return digest.hexdigest()


def digests(trainer: NativePPOTrainer) -> dict[str, str]:
    """SHA-256 of each part of a run, read from the live objects: what a checkpoint forgets to hold is not
    forgotten here."""
    name_of, env = {id(p): name for name, p in trainer.policy.named_parameters()}, trainer.env
    moments = {
        name_of[id(p)]: dict(state)
        for optimizer in trainer.optimizers
        for p, state in optimizer.state.items()
    }
    assert moments.keys() == set(name_of.values()) and all(
        set(m) == {"step", "exp_avg", "exp_avg_sq"} for m in moments.values()
    )
    best = trainer.best
    return {
        name: sha256(value)
        for name, value in {
            "model": [dict(trainer.policy.named_parameters()), dict(trainer.policy.named_buffers())],
            "optimizers": moments,
            "scheduler": [
                trainer.update,
                trainer.updates,
                trainer.global_step,
                [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
                trainer.recoveries,
            ],
            "RNG": [trainer.random.get_state(), *(random.get_state() for random in env._random)],
            "environment": [
                env.state_dict(),
                env.rules,
                env.account,
                env.bar,
                env.end,
                list(trainer.collector.obs),
                trainer.collector.state,
            ],
            "best": [
                trainer.best_score,
                trainer.best_update,
                trainer.without_better,
                best
                and {
                    name: best[name]
                    for name in (
                        "policy_state_dict",
                        "update",
                        "metrics",
                        "history",
                        "optimizer_state_dict",
                        "processes",
                    )
                },
            ],
            "validations": trainer.validations,
            "history": trainer.history,
        }.items()
    }


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=[pytest.mark.proof] if kind in ("mlp, two trunks, recovery", "gru, two optimizers") else [],
        )
        for kind in KINDS
    ],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(kind, tmp_path, monkeypatch):
    """Five stopping points, three seeds; half of them go on from an interrupted file, half from a numbered
    one."""
    monkeypatch.chdir(tmp_path)  # no git here to be asked at each checkpoint
    equal, differing, seen = (
        0,
        [],
        {"cost": set(), "best is": set(), "recoveries": set(), "remembered": set()},
    )
    for seed in SEEDS:
        whole = trainer_in(tmp_path / f"whole {seed}", seed, **KINDS[kind])
        assert whole.learner.whole_bars == (kind == "mlp, whole bars")
        whole.train()
        expected, first = digests(whole), trainer_in(tmp_path / f"first {seed}", seed, **KINDS[kind])
        assert whole.update == UPDATES and [v["update"] for v in whole.validations] == [2, 4, 6]
        for stop in range(1, UPDATES):
            first.train(stop=lambda: True)
            at_stop = digests(first)
            assert first.update == stop and not any(
                at_stop[name] == expected[name] for name in expected if name not in ("best", "validations")
            )
            folder, interrupted, said = tmp_path / f"{seed} {stop}", (seed + stop) % 2 == 0, []
            if first.folder.path.exists():
                shutil.copytree(first.folder.path, folder)  # the best policy so far
            written = (
                RunFolder(folder).save_interrupted(first.content(), datetime(2026, 1, 31, 12))
                if interrupted
                else RunFolder(folder).save(first.content())
            )
            torch.manual_seed(1000 * seed + stop)
            np.random.seed(stop)  # a process has its own
            second = trainer_in(folder, seed, said, **KINDS[kind])
            assert (
                resume(second)
                and said == [f"going on from {written}, after update {stop} of {UPDATES}"]
                and interrupted == ("interrupted" in written.name)
            )
            again = digests(second)
            second.train()
            found = digests(second)
            wrong = [f"{name} at once" for name in at_stop if again[name] != at_stop[name]] + [
                name for name in expected if found[name] != expected[name]
            ]
            if wrong:
                differing.append(f"seed {seed}, stopped after {stop}: {', '.join(wrong)}")
            else:
                equal += 1
            seen["cost"].add(first.env.rules != first.env._full_rules)
            seen["recoveries"].add(first.recoveries)
            seen["best is"].add(
                "unknown"
                if first.best is None
                else "behind"
                if first.best_update == whole.best_update
                else "ahead"
            )
            seen["remembered"].add(
                first.collector.state is not None and bool(first.collector.state.abs().sum() > 0)
            )
    print(f"\n{kind}: {equal} of {len(SEEDS) * (UPDATES - 1)}")
    assert differing == [] and equal == 15
    # the runs were worth stopping: while costs rose and after; with the best policy unknown, ahead and
    # behind; between recoveries; in the middle of a memory
    assert (
        seen["cost"] == {True, False}
        and seen["best is"] >= {"unknown", "behind"}
        and (len(seen["recoveries"]) > 1) == ("recovery" in kind)
        and (True in seen["remembered"]) == kind.startswith("gru")
    ), seen


# --- the real command in a project --------------------------------------------------------------------------

COMMAND = Path(sys.executable).parent / "trading-lib"
PROJECT = {
    "data.start": "2022-01-01",
    "data.end": "2022-01-17",
    "features.window": 20,
    "env.episode_length": 50,
    "train.device": "cpu",
    "train.amp": False,
    "train.hidden_dims": [16],
    "train.n_envs": 8,
    "train.n_steps": 32,
    "train.iterations": 12,
    "train.validation_interval": 3,
    "train.checkpoint_interval": 2,
}
LAST, LOOKS = 12, 4  # updates, validations


class Project:
    "A folder in which the command works; it runs the code beside this test."

    def __init__(self, root: Path):
        self.root = root

    @property
    def runs(self) -> Path:
        return self.root / "models" / "runs" / "SIM-USD_15Min"

    def edit(self, **changes):
        path = self.root / "params.yaml"
        document = yaml.safe_load(path.read_text())
        document["train"] |= changes
        path.write_text(yaml.safe_dump(document))

    @property
    def kept(self) -> Path:
        return self.root / "models" / "kept" / "SIM-USD_15Min"

    def model(self, end: str = "") -> Path:
        "The newest that the command has left."
        return max(
            (p for p in self.kept.glob("*.pt") if re.fullmatch(rf"[0-9a-f]{{8}}{end}", p.stem)),
            key=lambda p: p.stat().st_mtime_ns,
        )

    def models(self) -> list[bytes]:
        return [self.model(end).read_bytes() for end in ("", "_last")]

    def reports(self) -> dict[Path, bytes]:
        return {
            p.relative_to(self.root): p.read_bytes()
            for p in (self.root / "reports").rglob("*")
            if p.is_file()
        }

    def trials(self) -> list[str]:
        return [t["key"] for t in read_trials(ledger_path(self.root, "SIM-USD"))]

    def copied(self, path: Path) -> "Project":
        return Project(Path(shutil.copytree(self.root, path)))

    def start(self, *arguments) -> subprocess.Popen:
        "The command in a process of its own, with a terminal's signal handlers."
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "TRADING_LIB_PROGRESS": "lines",
        }
        return subprocess.Popen(
            [str(COMMAND), *arguments],
            cwd=self.root,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def run(self, *arguments) -> tuple[int, str, str]:
        "The command in a process of its own, to its end: status, output, errors."
        process = self.start(*arguments)
        out, error = process.communicate(timeout=300)
        return process.returncode, out, error

    def main(self, *arguments) -> tuple[int, str, str]:
        "The same command in this process."
        out, error = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.root), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = main(list(arguments))
        return status, out.getvalue(), error.getvalue()

    def signalled(
        self, *arguments, numbers=(signal.SIGINT,), when: str = "update ", wait: float = 0.0
    ) -> tuple[int, str, str]:
        """The same; after a line that begins with `when` the first signal is sent, and each further one when
        the line that answers it has come."""
        process, seen, left = self.start(*arguments), [], [*numbers]
        try:
            for line in process.stdout:
                seen.append(line)
                if left and line.startswith(when if len(left) == len(numbers) else "SIG"):
                    time.sleep(wait)
                    process.send_signal(left.pop(0))
            error = process.stderr.read()
            process.wait(60)
        finally:
            process.kill()
        assert not left, "".join(seen) + error
        return process.returncode, "".join(seen), error


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    "Prepared, not trained."
    root = tmp_path_factory.mktemp("resume") / "project"
    root.mkdir()
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    document["symbols"] = ["SIM-USD"]
    for name, value in PROJECT.items():
        section, key = name.split(".")
        document[section][key] = value
    (root / "params.yaml").write_text(yaml.safe_dump(document))
    (root / "settings.ini").touch()
    with contextlib.chdir(root):
        parameters = load_parameters()
        prepare_symbol(parameters, "SIM-USD", artefacts(parameters, "SIM-USD"))
    return Project(root)


@pytest.fixture(scope="module")
def whole(project) -> Project:
    "The uninterrupted run."
    done = project.copied(project.root.parent / "whole")
    assert (
        done.main("train")[0] == 0
        and load_checkpoint(done.model("_last"))["update"] == LAST
        and not list(done.runs.iterdir())
    )
    return done


@pytest.fixture(scope="module")
def stopped(project) -> tuple[Project, tuple]:
    "A run that got a SIGINT after a validation; status, output, errors. To be copied, not changed."
    left = project.copied(project.root.parent / "stopped")
    return left, left.signalled("train", when="update 5/")


def interrupted_files(project: Project) -> list[Path]:
    return sorted(project.runs.glob("model_interrupted_*.pt"))


def is_left_to_go_on_from(project: Project, done: tuple, name: str, earlier: list) -> dict:
    "What a stopped run leaves behind; the content of its checkpoint."
    status, out, error = done
    (path,) = set(interrupted_files(project)) - set(earlier)
    content = load_checkpoint(path)
    assert (
        (status, error) == (128 + signal.Signals[name], "")
        and re.fullmatch(r"model_interrupted_\d{8}_\d{6}\.pt", path.name)
        and 0 < content["update"] < LAST
    )
    assert out.splitlines().count(f"{name}: the iteration is being finished; a second one quits at once") == 1
    assert (
        out.splitlines()[-1]
        == f"stopped after update {content['update']} of {LAST}; saved {path}; go on with `trading-lib "
        "train SIM-USD --resume`"
    )
    card = path.with_suffix(".md").read_text()
    assert (
        "trading-lib train" in card and f"{content['update']} of {LAST}" in card and not project.kept.exists()
    )
    # the iteration that was being made when the signal came is complete: its row is there, and the ledger has
    # what was validated
    assert [row["update"] for row in content["history"]] == list(range(1, content["update"] + 1)) and len(
        project.trials()
    ) == len(content["validations"]) == content["update"] // 3
    return content


def ends_as(project: Project, whole: Project):
    "The same bytes of models and reports, and the same trials. Cards differ in the command that they name."
    for found, expected in zip(project.models(), whole.models()):
        assert hashlib.sha256(found).hexdigest() == hashlib.sha256(expected).hexdigest()
    assert project.reports() == whole.reports() and {"train.csv", "train.json"} <= {
        path.name for path in whole.reports()
    }
    assert (
        project.trials() == whole.trials()
        and len(whole.trials()) == LOOKS
        and not list(project.runs.iterdir())
    )


@pytest.mark.slow
def test_an_interrupted_and_terminated_command_goes_on_to_the_same_bytes(whole, stopped, tmp_path):
    "A real SIGINT; `--resume` in a new process, which gets a real SIGTERM; `--resume` again."
    first, left = is_left_to_go_on_from(*stopped, "SIGINT", []), stopped[0].copied(tmp_path / "left")
    earlier = interrupted_files(left)
    again = left.signalled(
        "train", "--resume", numbers=[signal.SIGTERM], when=f"update {first['update'] + 1}/"
    )
    second = is_left_to_go_on_from(left, again, "SIGTERM", earlier)
    assert (
        f"going on from {earlier[0]}, after update {first['update']} of {LAST}" in again[1].splitlines()
        and second["update"] > first["update"]
    )
    (newest,) = set(interrupted_files(left)) - set(earlier)
    status, out, error = left.main("train", "--resume")
    assert (status, error) == (
        0,
        "",
    ) and f"going on from {newest}, after update {second['update']} of {LAST}" in out.splitlines()
    # the ledger counts a checkpoint once, whoever has looked at it, and says what was new
    counts, before = [content["update"] // 3 for content in (first, second)] + [LOOKS], 0
    for count, said in zip(counts, (stopped[1][1], again[1], out)):
        assert f"ledger of SIM-USD: {count - before} new trials, {count} in all" in said.splitlines()
        before = count
    ends_as(left, whole)
    print(
        f"\nSIGINT after update {first['update']}, SIGTERM after {second['update']} of {LAST}, resumed: "
        "SHA-256 of both models equal"
    )


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["mlp", "gru"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_ends_at_any_moment_goes_on_to_the_same_bytes(project, whole, tmp_path, kind, number):
    "All in processes of their own; a kill leaves the numbered checkpoints."
    change = {
        "mlp": {},
        "gru": {"network": "gru", "gru_hidden_dim": 8, "separate_optimizers": True, "seed": 3},
    }[kind]
    expected, left = (p.copied(tmp_path / name) for p, name in ((project, "whole"), (project, "left")))
    for p in (expected, left):
        p.edit(**change)
    expected.run("train")
    wait = random.Random(f"{kind} {number}").uniform(0, 0.5)
    done = left.signalled("train", numbers=[number], when="update 4/", wait=wait)
    assert done[0] == (-number if number == signal.SIGKILL else 0) and len(interrupted_files(left)) == (
        number != signal.SIGKILL
    )
    status, out, error = left.run("train", "--resume")
    assert (status, error) == (0, "") and out.count("going on from") == 1
    ends_as(left, expected)
    if kind == "mlp":
        ends_as(left, whole)
    print(
        f"\n{kind}, {number.name}: "
        f"{next(line for line in out.splitlines() if line.startswith('going on')).rpartition('/')[2]}; "
        "SHA-256 of both models equal"
    )


@pytest.mark.proof
def test_ctrl_c_at_a_terminal(project, whole, tmp_path):
    "The key itself, while bars are drawn."
    import fcntl
    import pty
    import struct
    import termios

    left = project.copied(tmp_path / "left")
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
        os.chdir(left.root)
        os.execve(
            COMMAND,
            [str(COMMAND), "train"],
            {name: v for name, v in os.environ.items() if name != "TRADING_LIB_PROGRESS"}
            | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    seen, pressed = b"", False
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(terminal, 1000):
            seen += data
            if not pressed and re.search(rb"updates: [^\r]*\b[4-7]/12 ", seen):
                pressed = os.write(terminal, b"\x03") == 1
    status, text = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), seen.decode()
    (path,) = interrupted_files(left)
    assert (
        status == 0
        and pressed
        and "rollout: " in text
        and "SIGINT: the iteration is being finished" in text
        and f"saved {path}; go on with `trading-lib train SIM-USD --resume`" in text
    )
    update = load_checkpoint(path)["update"]
    assert left.main("train", "--resume")[0] == 0
    ends_as(left, whole)
    print(
        f"\nCtrl+C at a terminal after update {update} of {LAST}: exit status {status}, resumed: "
        "SHA-256 of both models equal"
    )


@pytest.mark.slow
def test_a_second_interrupt_quits_at_once_and_checkpoints_stay(project, tmp_path):
    "In the middle of a rollout of 800 steps; the ledger knows what the first one showed."
    left = project.copied(tmp_path / "left")
    status, out, error = left.signalled(
        "train",
        "--n-steps",
        "800",
        "--checkpoint-interval",
        "1",
        "--n-epochs",
        "1",
        numbers=[signal.SIGINT] * 2,
        when="update 1/",
    )
    assert (
        status in (130, -signal.SIGINT)
        and "interrupt" in error.splitlines()[-1].lower()
        and "update 1/12" in out
        and "update 2/12" not in out
        and "stopped after" not in out
        and interrupted_files(left) == []
    )
    path, content = RunFolder(left.runs).newest_good(pytest.fail)
    assert path.name == "checkpoint_000001.pt" and content["update"] == 1
    print(f"\nsecond SIGINT: exit status {status}, {path.name} intact")


# --- damage, other networks, foreign files, nothing ---------------------------------------------------------


def flipped(data: bytes, place: float) -> bytes:
    at = int(len(data) * place)
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: data[:-1000], "is truncated"),
        (lambda data: flipped(data, 0.5), "is corrupted: its SHA-256 is not"),
    ],
    ids=["truncated", "a flipped bit"],
)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_line(whole, stopped, tmp_path, damage, words):
    "The run goes on from the older one, and loses nothing but time."
    left = stopped[0].copied(tmp_path / "left")
    (path,) = interrupted_files(left)
    numbered = sorted(left.runs.glob("checkpoint_*.pt"))
    newest = load_checkpoint(numbered[-1])["update"]
    assert 4 <= newest <= load_checkpoint(path)["update"]
    path.write_bytes(damage(path.read_bytes()))
    status, out, error = left.main("train", "--resume")
    said = [line for line in out.splitlines() if line.startswith(("skipped", "going on", "resume:"))]
    assert (
        (status, error) == (0, "")
        and len(said) == 2
        and said[0].startswith(f"skipped: {path}: {words}")
        and said[1] == f"going on from {numbered[-1]}, after update {newest} of {LAST}"
    )
    ends_as(left, whole)


def test_a_checkpoint_of_another_network_starts_fresh_with_a_message_that_names_both(stopped, tmp_path):
    left = stopped[0].copied(tmp_path / "left")
    path, before = interrupted_files(left)[0], {p.name: p.read_bytes() for p in stopped[0].runs.iterdir()}
    status, out, error = left.main("train", "--resume", "--hidden-dims", "8,4", "--iterations", "1")
    said = [
        line
        for line in out.splitlines()
        if line.startswith(("skipped", "going on", "resume:", "an unfinished"))
    ]
    aside = left.runs.with_name("SIM-USD_15Min.1")
    assert (status, error) == (0, "") and said == [
        f"resume: {path}: holds a network of 1160 inputs, mlp, hidden [16], 8 actions; asked for 1160 "
        "inputs, mlp, hidden [8, 4], 8 actions; starting fresh",
        f"an unfinished run was there: put aside as {aside} (`--resume` would have gone on with it); "
        f"what is put aside as {left.runs}.1 and so on, "
        f"{memory_text(sum(map(len, map(Path.read_bytes, aside.iterdir()))))} by now, may be deleted",
    ]
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == before  # nothing is lost
    content = load_checkpoint(left.model("_last"))
    assert (
        content["update"] == 1
        and list(content["config"]["train"]["hidden_dims"]) == [8, 4]
        and [row["update"] for row in content["history"]] == [1]
    )


@pytest.mark.slow
def test_a_fresh_start_puts_an_unfinished_run_aside(project, stopped, tmp_path):
    "Twice; each gets a folder of its own, and the fresh run is that of an empty project."
    left, empty = stopped[0].copied(tmp_path / "left"), project.copied(tmp_path / "empty")
    before = {p.name: p.read_bytes() for p in left.runs.iterdir()}
    for n in (1, 2):
        status, out, _ = left.main("train", "--iterations", "1")
        aside, size = (
            left.runs.with_name(f"SIM-USD_15Min.{n}"),
            memory_text(n * sum(map(len, before.values()))),
        )
        assert (
            status == 0
            and [line for line in out.splitlines() if "put aside as" in line]
            == [
                f"an unfinished run was there: put aside as {aside} (`--resume` would have gone on with "
                f"it); what is put aside as {left.runs}.1 and so on, {size} by now, may be deleted"
            ]
            and "going on from" not in out
        )
        assert {p.name: p.read_bytes() for p in aside.iterdir()} == before and not list(left.runs.iterdir())
        left.runs.rmdir()
        shutil.copytree(stopped[0].runs, left.runs)
    assert empty.main("train", "--iterations", "1")[0] == 0 and left.models() == empty.models()


def test_with_nothing_to_resume_nothing_begins(project, whole, tmp_path):
    "An error, with what a person may have meant: the last complete run."
    left = project.copied(tmp_path / "left")
    status, out, error = left.main("train", "--resume", "--iterations", "1")
    assert (
        status == 2
        and error.startswith(
            f"error: SIM-USD: there is nothing to resume in {left.runs}; train without --resume"
        )
        and "update 1/" not in out
        and not left.kept.exists()
    )
    done = whole.copied(tmp_path / "done")
    status, _, error = done.main("train", "--resume")
    assert (
        status == 2
        and f"the last complete run left {done.model()} "
        f"(--checkpoint {done.model('_last')} with a larger budget extends it)"
        in error
        and error.count("\n") == 1
    )


def test_extending_a_complete_run_keeps_its_best_policy(whole, tmp_path):
    "Without its folder of checkpoints, which is tidied up: the best policy lies beside the last one."
    left = whole.copied(tmp_path / "left")
    best, first = load_checkpoint(left.model()), left.model()
    status, out, error = left.main("train", "--checkpoint", str(left.model("_last")), "--iterations", "13")
    assert (
        (status, error) == (0, "")
        and "looked for anew" not in out
        and load_checkpoint(left.model("_last"))["update"] == 13
    )
    assert (
        load_checkpoint(left.model())["metrics"]["validation_score"] >= best["metrics"]["validation_score"]
        and first.exists()
        and len(list(left.kept.glob("*_last.pt"))) == 2
    )


class Bomb:
    "Runs a command where it is unpickled."

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def written(path: Path, content) -> Path:
    torch.save(content, path)
    return path


def with_a_short_moment(source, path):
    content = load_checkpoint(source)
    content["optimizer_state_dict"]["state"][0]["exp_avg"] = torch.zeros(1)
    return save_checkpoint(content, path)


OTHERS = {  # what --checkpoint is given -> the file, further arguments, words of the answer
    "of another network": (
        lambda project, path: interrupted_files(project)[0],
        ["--hidden-dims", "8"],
        [
            "holds a network of 1160 inputs, mlp, hidden [16], 8 actions; asked for 1160 inputs, mlp, "
            "hidden [8], 8 actions"
        ],
    ),
    "of another number of accounts": (
        lambda project, path: interrupted_files(project)[0],
        ["--n-envs", "4"],
        ["n_envs is 4 here, the state is of 8 accounts"],
    ),
    "of a recurrent policy": (
        lambda project, path: interrupted_files(project)[0],
        ["--network", "gru"],
        ["mlp, hidden [16]", "gru, hidden"],
    ),
    "a text file": (
        lambda project, path: (path.write_text("weights, honestly\n"), path)[1],
        [],
        ["is not a checkpoint"],
    ),
    "with a moment of another shape": (
        lambda project, path: with_a_short_moment(interrupted_files(project)[0], path),
        [],
        ["exp_avg of weight 0: expected shape", "was (1,)"],
    ),
    "a bare pickle": (
        lambda project, path: (path.write_bytes(pickle.dumps({"update": 3})), path)[1],
        [],
        ["a bare pickle, which could run code"],
    ),
    "a pickle bomb": (
        lambda project, path: written(
            path, {"update": 3, "policy_state_dict": Bomb(path.with_name("executed"))}
        ),
        [],
        ["refused without running anything from it"],
    ),
    "somebody's own weights": (
        lambda project, path: written(path, {"update": 3, "layer.weight": torch.zeros(3, 4)}),
        [],
        [],
    ),
    "a truncated one": (
        lambda project, path: (path.write_bytes(interrupted_files(project)[0].read_bytes()[:-1]), path)[1],
        [],
        ["is truncated"],
    ),
    "none": (lambda project, path: path, [], ["no such file"]),
    "a folder": (lambda project, path: project.runs, [], ["is a folder"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_cannot_be_gone_on_from_is_one_line_and_changes_nothing(stopped, tmp_path, name):
    left, (make, arguments, words) = stopped[0], OTHERS[name]
    path, before = (
        make(left, tmp_path / "file.pt"),
        {p: p.read_bytes() for p in left.root.rglob("*") if p.is_file()},
    )
    status, out, error = left.main("train", "--checkpoint", str(path), *arguments)
    assert (
        status == 2
        and error.startswith("error: ")
        and error.count("\n") == 1
        and str(path) in error
        and "going on" not in out
        and "starting fresh" not in out
    )
    for word in words:
        assert word in error
    assert {p: p.read_bytes() for p in left.root.rglob("*") if p.is_file()} == before and not (
        tmp_path / "executed"
    ).exists()
    print(f"\n{name:30} {error.strip()}")


@pytest.mark.slow
def test_a_given_checkpoint_is_gone_on_from(whole, stopped, tmp_path):
    "An older one than the newest, by name."
    left = stopped[0].copied(tmp_path / "left")
    path = sorted(left.runs.glob("checkpoint_*.pt"))[0]
    assert path.name in ("checkpoint_000002.pt", "checkpoint_000004.pt")
    status, out, _ = left.main("train", "--checkpoint", str(path))
    assert (
        status == 0
        and out.splitlines().count(f"going on from {path}, after update {int(path.stem[-6:])} of {LAST}") == 1
    )
    ends_as(left, whole)


# --- what a checkpoint is of --------------------------------------------------------------------------------


@pytest.fixture
def ran(tmp_path):
    "Makes a folder with a run of that kind after one update."

    def make(**settings):
        trainer = trainer_in(tmp_path / "runs", 0, **settings)
        trainer.train(1)
        trainer.folder.save(trainer.content())
        return trainer.folder.path

    return make


GRU = dict(network="gru", gru_hidden_dim=16, n_gru_layers=2)


@pytest.mark.parametrize(
    "settings, words",
    [(GRU | dict(gru_hidden_dim=8), ("16", "8")), (GRU | dict(n_gru_layers=1), ("2 layers", "1 layer"))],
    ids=["width", "layers"],
)
def test_a_recurrent_policy_of_another_size_starts_fresh_with_a_message(ran, settings, words):
    folder, said = ran(**GRU), []
    trainer = trainer_in(folder, 0, said, **settings)
    before = sha256(dict(trainer.policy.named_parameters()))
    assert (
        resume(trainer) is False
        and len(said) == 1
        and said[0].endswith("; starting fresh")
        and "\n" not in said[0]
        and trainer.update == 0
        and sha256(dict(trainer.policy.named_parameters())) == before
    )
    theirs, asked = said[0].split("asked for")
    assert words[0] in theirs and words[1] in asked


@pytest.mark.parametrize(
    "content",
    [{"update": 3}, {"update": 3, "policy_state_dict": {}, "config": {"train": {}}}],
    ids=["an update alone", "weights alone"],
)
def test_a_whole_file_that_is_no_runs_state_is_refused_in_one_line(tmp_path, content):
    path, said = save_checkpoint(content, tmp_path / "runs" / "checkpoint_000003.pt"), []
    trainer = trainer_in(path.parent, 0, said, **KINDS["mlp"])
    with pytest.raises(InputError, match="no state to go on from") as e:
        resume(trainer, path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert (
        resume(trainer) is False
        and said == [f"skipped: {e.value}", f"resume: no checkpoint in {path.parent}"]
        and trainer.update == 0
    )


def test_another_run_is_not_gone_on_from(ran):
    """Of another seed it would be counted as what it is not; on other bars it would stand at places that
    mean nothing."""
    folder, said = ran(**KINDS["mlp"]), []
    assert (
        resume(trainer_in(folder, 1, said, **KINDS["mlp"])) is False
        and "seed 0" in said[0]
        and "seed 1" in said[0]
    )
    other = trainer_in(folder, 0, said, **KINDS["mlp"])
    other.env.market = replace(other.env.market, fingerprint=market().fingerprint | {"sha256": "f" * 64})
    assert resume(other) is False and "other bars" in said[1] and len(said) == 2


@pytest.mark.slow
def test_a_run_can_be_gone_on_with_from_another_folder(project, whole, stopped, tmp_path):
    "Such as one that a fresh start has put aside: its best policy lies beside it."
    left = stopped[0].copied(tmp_path / "left")
    aside = left.runs.rename(left.runs.with_name("SIM-USD_15Min.1"))
    (path,) = aside.glob("model_interrupted_*.pt")
    status, out, error = left.main("train", "--checkpoint", str(path))
    assert (status, error) == (0, "") and "is looked for anew" not in out and path.exists()
    ends_as(left, whole)


@pytest.mark.slow
def test_the_best_policy_can_be_gone_on_from(project, tmp_path):
    """It is the state after its update: the rest of the run follows again. Of a seed whose best policy is
    not its last."""
    whole, left = (project.copied(tmp_path / name) for name in ("whole", "left"))
    for p in (whole, left):
        p.edit(seed=1)
    assert whole.main("train")[0] == 0
    content = load_checkpoint(whole.model())
    assert content["update"] < LAST
    status, out, error = left.main("train", "--checkpoint", str(whole.model()))
    assert (
        (status, error) == (0, "")
        and f"after update {content['update']} of {LAST}" in out
        and "is looked for anew" not in out
    )
    ends_as(left, whole)


def test_the_end_of_a_run_is_nothing_to_go_on_from(project, whole, tmp_path):
    left, path = project.copied(tmp_path / "left"), whole.model("_last")
    status, out, error = left.main("train", "--checkpoint", str(path))
    assert (
        status == 2
        and error.startswith(f"error: {path}: ")
        and f"update {LAST} of {LAST}" in error
        and not left.kept.exists()
    )


@pytest.mark.slow
def test_a_duration_of_the_command_line_comes_before_those_of_params_yaml(project, tmp_path):
    left = project.copied(tmp_path / "left")
    left.edit(total_timesteps=8 * 32 * 5, iterations=None)
    status, out, _ = left.main("train", "--iterations", "1")
    assert status == 0 and "update 1/1 |" in out


def test_lines_come_through_a_pipe_as_they_are_said():
    "A log of a long run is read while it goes on."
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with open(reading, "rb") as log, open(writing, "w") as pipe, contextlib.redirect_stdout(pipe):
        LineProgress().say("a line")
        assert log.read() == b"a line\n"


@pytest.mark.slow
def test_a_damaged_best_policy_is_said_and_looked_for_anew(whole, stopped, tmp_path):
    left = stopped[0].copied(tmp_path / "left")
    best = RunFolder(left.runs)._best_path(load_checkpoint(interrupted_files(left)[0])["best_update"])
    best.write_bytes(best.read_bytes()[:-1])
    status, out, error = left.main("train", "--resume")
    assert (
        (status, error) == (0, "")
        and out.count(f"skipped: {best}: is truncated") == 1
        and out.count("the best is looked for anew") == 1
    )
    ours, theirs = (load_checkpoint(p.model("_last")) for p in (left, whole))
    assert sha256(ours["policy_state_dict"]) == sha256(theirs["policy_state_dict"]) and load_checkpoint(
        left.model()
    )["update"] > int(best.stem[-6:])


@pytest.mark.slow
def test_a_step_back_puts_aside_what_came_after(tmp_path):
    "Else the next resume would take the course that was left for the newest."
    first, said = trainer_in(tmp_path / "runs", 0, **KINDS["mlp"]), []
    for _ in range(3):
        first.train(1)
        first.folder.save(first.content())
    back = trainer_in(tmp_path / "runs", 0, said, **KINDS["mlp"])
    assert (
        resume(back, tmp_path / "runs" / "checkpoint_000001.pt")
        and f"what came after update 1: put aside as {tmp_path / 'runs.1'}" in said
    )

    def names(folder):
        return sorted(p.name for p in folder.glob("checkpoint*.pt"))

    assert names(tmp_path / "runs") == ["checkpoint_000001.pt"] and names(tmp_path / "runs.1") == [
        "checkpoint_000002.pt",
        "checkpoint_000003.pt",
    ]
    # both courses can be gone on with, each with its best policy
    for folder, update in (("runs", 1), ("runs.1", 3)):
        said.clear()
        other = trainer_in(tmp_path / folder, 0, said, **KINDS["mlp"])
        assert (
            resume(other)
            and other.update == update
            and not any("is looked for anew" in line for line in said)
        )


def test_other_settings_are_said(ran):
    "They are a wish, not a mistake: a schedule made longer, a gentler rate."
    said = []
    trainer = trainer_in(ran(**KINDS["mlp"]), 0, said, **KINDS["mlp"] | dict(learning_rate=1e-5))
    assert resume(trainer) and [
        line
        for line in said
        if "goes on with other settings than before: learning_rate" in line and "→ 1e-05" in line
    ]
    assert (
        trainer.optimizers[0].param_groups[0]["lr"] != 1e-5
        and trainer.train(1)
        and trainer.history[-1]["learning_rate"] <= 1e-5
    )


# --- what cannot be gone on from changes nothing ------------------------------------------------------------


@functools.cache
def run_content() -> dict:
    "Of a run after two of its updates."
    with contextlib.chdir(ROOT):
        trainer = trainer_in(ROOT / "models" / "never made", 0, hidden_dims=(16,))
        trainer.folder = None
        trainer.train(2)
        return trainer.content()


def without(content: dict, part: str) -> dict:
    "A copy that lacks one part; dots go into tables."
    copied = dict(content)
    *tables, last = part.split(".")
    inner = copied
    for name in tables:
        inner[name] = list(inner[name]) if isinstance(inner[name], list) else dict(inner[name])
        if isinstance(inner[name], list):
            inner[name][0] = dict(inner[name][0])
        inner = inner[name][0] if isinstance(inner[name], list) else inner[name]
    del inner[last]
    return copied


def changed(**parts):
    return lambda content: content | parts


SPOILT = {
    f"no {part}": functools.partial(without, part=part)
    for part in (
        "update",
        "global_step",
        "history",
        "validations",
        "processes",
        "optimizer_state_dict",
        "policy_state_dict",
        "config",
        "best_score",
        "best_update",
        "recoveries",
        "without_better",
        "ended",
        "metrics",
        "scaler_state_dict",
        "policy_obs_dim",
        "processes.rng_state",
        "processes.observation",
        "processes.environment_state",
        "processes.recurrent_state",
        "config.train",
        "config.train.seed",
        "config.train.hidden_dims",
    )
}
SPOILT |= {
    "update is text": changed(update="3"),
    "history is a number": changed(history=7),
    "no processes": changed(processes=[]),
    "a process of nothing": changed(processes=[None]),
    "moments without a shape": lambda c: (
        c | {"optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}}
    ),
    "weights of another shape": lambda c: (
        c | {"policy_state_dict": c["policy_state_dict"] | {"actor_head.weight": torch.zeros(2, 2)}}
    ),
    "a weight too few": lambda c: (
        c
        | {
            "policy_state_dict": {
                name: v for name, v in c["policy_state_dict"].items() if name != "critic_head.weight"
            }
        }
    ),
    "random numbers of nowhere": lambda c: (
        c
        | {
            "processes": [
                c["processes"][0] | {"rng_state": torch.full_like(c["processes"][0]["rng_state"], 255)}
            ]
        }
    ),
    "an account too few": lambda c: (
        c
        | {
            "processes": [
                c["processes"][0]
                | {
                    "environment_state": {
                        name: v
                        for name, v in c["processes"][0]["environment_state"].items()
                        if name != "account"
                    }
                }
            ]
        }
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_checkpoint_that_lacks_something_is_one_line_and_changes_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = trainer_in(tmp_path / "run", 0, hidden_dims=(16,))
    trainer.train(1)
    before, obs = (
        sha256([trainer.content(), list(trainer.collector.obs), dict(trainer.policy.named_buffers())]),
        trainer.collector.obs,
    )
    with pytest.raises(InputError) as e:
        trainer.restore(SPOILT[name](run_content()), "spoilt.pt")
    assert str(e.value).startswith("spoilt.pt: ") and "\n" not in str(e.value) and len(str(e.value)) < 500
    assert (
        sha256([trainer.content(), list(trainer.collector.obs), dict(trainer.policy.named_buffers())])
        == before
        and trainer.collector.obs is obs
    )


def test_resume_skips_what_lacks_something_and_goes_on_from_the_one_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, said, good = RunFolder(tmp_path / "run"), [], run_content()
    folder.save(good)
    for update, name in ((3, "no history"), (4, "no processes.rng_state"), (5, "a process of nothing")):
        save_checkpoint(
            SPOILT[name](good) | {"update": update}, tmp_path / "run" / f"checkpoint_{update:06d}.pt"
        )
    (tmp_path / "run" / "checkpoint_000006.pt").write_bytes(b"PK\3\4")
    trainer = trainer_in(tmp_path / "run", 0, said, hidden_dims=(16,))
    assert resume(trainer) and trainer.update == 2
    assert [
        re.match(r"skipped: .*checkpoint_(\d+).pt: ", line)[1] for line in said if line.startswith("skipped")
    ] == ["000006", "000005", "000004", "000003"] and not any("\n" in line for line in said)
