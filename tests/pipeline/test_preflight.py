"""The preflight: it passes on a sound run, names the check that does not pass,
and comes before every long run and no short one."""

import contextlib
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from prepared import prepare
from small_trainers import Plain, market, plain_trainer, refusal, trading_trainer
from test_pipeline import edit

from trading_lib.cli import main
from trading_lib.env import market_data
from trading_lib.features import fit_features
from trading_lib.pipeline.preflight import preflight
from trading_lib.sources import simulate_bars
from trading_lib.trainer import NativePPOTrainer
from trading_lib.training.config import NativePPOConfig

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ["make", "2 updates", "validation", "save and load", "observations", "memory"]


def bars():
    return simulate_bars(
        "SIM-USD", "15Min", "2023-01-01", "2023-04-01", seed=1, edge=0.2, asset_class="crypto"
    )  # those of `market`


def sound(validation=(5500, 5700), **settings):
    return trading_trainer(0, market().span(*validation), **settings)


# --- a sound run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(network="gru", gru_hidden_dim=8, n_gru_layers=1, separate_optimizers=True),
        dict(amp=True, amp_dtype="fp16"),
        dict(version="2.7.0"),
    ],
)
def test_a_sound_run_passes_every_check(settings):
    "And says so in a line each; nothing of the run itself is touched."
    said = []
    version = settings.get("version", "5.6.0")

    def fresh():
        return trading_trainer(0, market(version).span(5500, 5700), **settings)

    found = preflight(fresh, bars(), said.append)
    assert [name for name, *_ in found] == CHECKS == [
        re.match(r"preflight: (.*?)\s+[\d.]+ s  ", line)[1] for line in said
    ] and all("\n" not in line for line in said)
    facts = dict((name, fact) for name, _, fact in found)
    assert (
        facts["2 updates"].startswith("256 steps, reward")
        and facts["observations"].startswith("5 bars, largest difference")
        and "identical after a round trip" in facts["save and load"]
        and re.match(r"[\d.]+ [MG]B in use", facts["memory"])
    )
    assert re.match(r"\d+ bars, return [+-][\d.]+%, \d+ trades", facts["validation"])


def test_what_cannot_be_compared_is_said():
    found = {name: fact for name, _, fact in preflight(sound, None, lambda line: None)}
    assert found["observations"] == "no bars to compare with"

    class Kept(Plain):
        def state_dict(self):
            return {"random": self.random.get_state()}

        def load_state_dict(self, state):
            self.random = torch.Generator()
            self.random.set_state(state["random"])

    def plain():
        "One update is all there is."
        return NativePPOTrainer(
            Kept(),
            NativePPOConfig(hidden_dims=(4,), n_steps=4, minibatch_size=32, n_epochs=1, total_timesteps=32),
            progress=None,
        )

    found = {name: fact for name, _, fact in preflight(plain, bars(), lambda line: None)}
    assert (
        found["validation"] == "no validation span"
        and found["observations"] == "no bars to compare with"
        and found["2 updates"].startswith("32 steps")
    )


# --- what does not pass -------------------------------------------------------------------------------------


def failing(fresh, given=None) -> tuple[str, list[str]]:
    "The one line, and the checks that had passed before."
    said = []
    return refusal(preflight, fresh, given, said.append), [
        re.match(r"preflight: (.*?)\s+[\d.]+ s  ", line)[1] for line in said
    ]


@pytest.mark.parametrize("column, change", [("close", 1.001), ("low", 0.999), ("high", 1.0005)])
def test_observations_that_differ_are_found(column, change):
    "Bars that were downloaded again and are not quite those that the table was built from."
    other = bars()
    other.loc[other.index[600::2], column] *= change
    if column == "close":
        other["high"] = other[["high", "close"]].max(axis=1)
    line, passed = failing(sound, other)
    assert (
        line.startswith("preflight: observations: observations of training and of live trading differ by")
        and "stage prepare" in line
        and passed == CHECKS[:4]
    )


def test_another_fit_is_found():
    "The table is from what one span says, the model would be served with what another one says."
    other = market_data(
        bars(), "5.6.0", fit_features(bars()[:3000], "5.6.0", "15Min", "crypto"), "15Min", "crypto"
    ).fit

    def fresh():
        trainer = sound()
        trainer.env.market = replace(trainer.env.market, fit=other)
        return trainer

    line, passed = failing(fresh, bars())
    assert (
        line.startswith("preflight: save and load: ")
        and "is not the shift of the fitted features" in line
        and passed == CHECKS[:3]
    )


def test_an_environment_whose_state_cannot_be_restored_is_found():
    "None at all, or one that forgets something."
    line, passed = failing(plain_trainer)
    assert (
        line.startswith(
            "preflight: save and load: a checkpoint that was loaded and saved again has other bytes; "
            "a resumed run would not be the same run"
        )
        and passed == CHECKS[:3]
    )

    class Forgetful(Plain):
        def state_dict(self):
            return {"random": self.random.get_state(), "steps": 7}

        def load_state_dict(self, state):
            self.random = torch.Generator().manual_seed(0)

    line, passed = failing(lambda: NativePPOTrainer(Forgetful(), plain_trainer().config, progress=None))
    assert line.startswith("preflight: save and load:") and passed == CHECKS[:3]


def test_a_validation_span_that_is_too_short_is_found():
    line, passed = failing(lambda: sound((5500, 5501)))
    assert (
        line.startswith("preflight: make: ")
        and "no decision can be made in bars 5500..5500" in line
        and passed == []
    )


def test_what_is_not_finite_is_found():
    class Broken(Plain):
        def step(self, actions):
            obs, reward, *rest = super().step(actions)
            return obs, reward.fill_(float("nan")), *rest

    line, passed = failing(lambda: NativePPOTrainer(Broken(), plain_trainer().config, progress=None))
    assert (
        line.startswith("preflight: 2 updates: training: in update 1 the rewards became nan")
        and passed == CHECKS[:1]
    )


def test_what_nobody_expected_is_named_too():
    "Any error of a check comes with the check's name, in one line."

    class Fails(Plain):
        def step(self, actions):
            raise RuntimeError("the exchange\nis closed")

    line, passed = failing(lambda: NativePPOTrainer(Fails(), plain_trainer().config, progress=None))
    assert (
        line.startswith("preflight: 2 updates: RuntimeError: the exchange is closed") and passed == CHECKS[:1]
    )


# --- when it is made ----------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with a small simulated market and a tiny budget."
    for name in ("params.yaml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    edit(
        tmp_path / "params.yaml",
        **{
            "data.start": "2023-01-01",
            "data.end": "2023-01-20",
            "features.window": 20,
            "train.device": "cpu",
            "train.hidden_dims": [8],
            "train.total_timesteps": 512,
            "train.n_envs": 8,
            "train.n_steps": 32,
        },
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRADING_LIB_PROGRESS", "lines")
    prepare()
    return tmp_path


def command(*words) -> tuple[int, str, str]:
    "Exit status, and what was printed."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(words))
    return status, out.getvalue(), err.getvalue()


def test_a_long_run_begins_with_it_and_a_short_one_does_not(project):
    "By the mode, whatever the budget; what went before is not in the run."
    _, short, _ = command("train", "SIM-USD")
    _, long, _ = command("train", "SIM-USD", "--mode", "standard")

    def made(text):
        return [
            re.match(r"preflight: (.*?)\s+[\d.]+ s  ", line)[1]
            for line in text.splitlines()
            if line.startswith("preflight")
        ]

    assert made(short) == [] and made(long) == CHECKS and "5 bars, largest difference" in long

    def results(text):
        return [
            re.sub(r", [\d,]+/s| \| rollout .*", "", line)
            for line in text.splitlines()
            if line.startswith("update ")
        ]

    assert len(results(long)) == 2 and results(long) == results(
        short
    )  # weights, accounts and random numbers are those of a run without it


def test_a_long_run_that_would_fail_does_not_begin(project):
    "One line and exit status 2; no model, no checkpoint, no trial in the ledger."
    status, _, _ = command("preflight", "SIM-USD")
    assert status == 0
    path = project / "data" / "SIM-USD_15Min.parquet"
    changed = pd.read_parquet(path)
    changed.loc[changed.index[600::2], ["open", "high", "low", "close"]] *= 1.01
    changed.to_parquet(path)
    for words in (("preflight", "SIM-USD"), ("train", "SIM-USD", "--mode", "standard")):
        status, _, err = command(*words)
        assert status == 2 and err.startswith("error: preflight: observations: ") and err.count("\n") == 1
    assert (
        not list(project.glob("models/*.pt"))
        and not list(project.glob("models/runs/**/*.pt"))
        and not list(project.glob("ledger/*"))
    )


def test_the_command_alone(project):
    status, out, _ = command("preflight", "SIM-USD", "--network", "gru", "--iterations", "2")
    assert (
        status == 0
        and [line.split()[1] for line in out.splitlines() if line.startswith("preflight")]
        == [name.split()[0] for name in CHECKS]
        and not list(project.glob("models/**/*.pt"))
    )
