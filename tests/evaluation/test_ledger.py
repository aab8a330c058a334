"""Archive: every trial counted once whatever happens to its writer, and a deploy zip that is whole or refused."""

import fcntl
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from trading_lib import ledger as A
from trading_lib.checkpoint import Comparison, save_checkpoint
from trading_lib.config import InputError
from trading_lib.env import REWARD_COMPONENTS
from trading_lib.version import get_checkpoint_metadata

ROOT = Path(__file__).resolve().parents[2]
fork = multiprocessing.get_context("fork")  # torch need not be imported again in each process
DATA = {"sha256": "ab" * 32, "start": "2022-01-01T00:00:00Z", "end": "2023-12-31T23:45:00Z", "bars": 70_000}
SPAN = ("2023-05-28T00:00:00Z", "2023-09-13T23:45:00Z")


def day_names(n, first="2023-05-28"):
    return [str(d) for d in np.arange(first, np.datetime64(first) + n, dtype="datetime64[D]")]


def trial(**other) -> dict:
    fields = dict(
        symbol="SIM-USD",
        timeframe="15Min",
        kind="checkpoint",
        seed=0,
        update=5,
        parameters={"learning_rate": 3e-4},
        data=DATA,
        span=SPAN,
        sharpe_per_bar=0.01,
        bars=960,
        days=day_names(10),
        returns=[0.001 * i for i in range(10)],
    )
    return fields | other


def trials_of(matrix, **other) -> list[dict]:
    "Columns of a matrix of daily returns as trials."
    return [
        trial(seed=i, days=day_names(len(matrix)), returns=list(column), **other)
        for i, column in enumerate(np.asarray(matrix, dtype=float).T)
    ]


def quietly(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


@pytest.fixture
def ledger(tmp_path) -> Path:
    return A.ledger_path(tmp_path, "SIM-USD")


# --- what a trial is -----------------------------------------------------------------------------------------------


def test_the_key_is_the_hash_of_what_was_tried_and_of_what_it_showed():
    written = (
        '{"bars":960,"code":"c0de","data":{"first":"2022-01-01T00:00:00Z","last":"2023-12-31T23:45:00Z","sha256":"%s"},"kind":"checkpoint","parameters":{"learning_rate":0.0003},"returns":[0.0,0.1],"seed":0,'
        '"sharpe_per_bar":0.01,"span":["2023-05-28T00:00:00Z","2023-09-13T23:45:00Z"],"symbol":"SIM-USD","timeframe":"15Min","update":5}'
    ) % ("ab" * 32)
    written = written.replace('"kind"', '"days":["2023-05-28","2023-05-29"],"kind"')
    assert (
        A.Trial(
            **trial(
                code="c0de", days=day_names(2), returns=[-0.0, 0.1], libraries={"torch": "9"}, simulated=True
            )
        ).key
        == hashlib.sha256(written.encode()).hexdigest()
    )


@pytest.mark.parametrize(
    "other, new",
    [
        (dict(seed=1), True),
        (dict(update=10), True),
        (dict(parameters={"learning_rate": 1e-3}), True),
        (dict(parameters={"learning_rate": 3e-4, "gamma": 0.9}), True),
        (dict(symbol="SIMA"), True),
        (dict(timeframe="1Hour"), True),
        (dict(kind="probe"), True),
        (dict(data=DATA | {"sha256": "cd" * 32}), True),
        (dict(span=("2023-05-28T00:00:00Z", "2023-09-14T23:45:00Z")), True),
        (dict(seed=None), True),
        (dict(sharpe_per_bar=0.5), True),
        (dict(bars=1), True),
        (dict(returns=[0.0] * 10), True),
        (dict(days=day_names(10, "2020-01-01")), True),
        (dict(code="c0de"), True),
        (dict(span=list(SPAN)), False),
        (dict(parameters={"learning_rate": np.float64(3e-4)}), False),
        (dict(seed=np.int64(0)), False),
        (dict(data={"sha256": "ab" * 32, "first": DATA["start"], "last": DATA["end"]}), False),
    ],
)
def test_another_seed_parameter_checkpoint_code_or_outcome_is_a_new_trial(ledger, other, new):
    assert A.record_trials(ledger, [trial()]) == 1 and A.record_trials(ledger, [trial(**other)]) == new
    assert len(A.read_trials(ledger)) == 1 + new


def test_equal_numbers_are_equal_parameters():
    keys = {
        A.Trial(**trial(parameters=p)).key
        for p in (
            {"gae_lambda": 1, "a": [1, 2], "z": 0},
            {"z": -0.0, "gae_lambda": 1.0, "a": (1.0, 2.0)},
            {"a": [np.float32(1), np.int32(2)], "gae_lambda": np.float64(1), "z": 0.0},
        )
    }
    assert len(keys) == 1
    assert A.Trial(**trial(parameters={"flag": True})).key != A.Trial(**trial(parameters={"flag": 1})).key


def test_lines_hold_eight_significant_digits_and_nothing_about_when_or_where(tmp_path, ledger):
    odd = trial(returns=[1 / 3, 2e-9 / 3, -1 / 7, 0.0, -0.0, 1e-12, 0.1 + 0.2, 1, 2, 3], sharpe_per_bar=1 / 3)
    assert A.record_trials(ledger, [odd]) == 1
    line = json.loads(ledger.read_text())
    assert (
        line["returns"] == [0.33333333, 6.6666667e-10, -0.14285714, 0.0, 0.0, 1e-12, 0.3, 1.0, 2.0, 3.0]
        and line["sharpe_per_bar"] == 0.33333333
    )
    assert (
        set(line) == set(odd) | {"key", "line_sha256", "code", "libraries", "simulated"}
        and line["code"] is line["libraries"] is line["simulated"] is None
    )
    # another place, another time, another process, another hash seed: the same bytes
    time.sleep(0.01)
    script = "import sys; from tests_trial import t; from trading_lib import ledger as A; A.record_trials(sys.argv[1], [t])"
    (tmp_path / "tests_trial.py").write_text(f"t = {dict(reversed(odd.items()))!r}")
    other = tmp_path / "other" / "SIM-USD.jsonl"
    subprocess.run(
        [sys.executable, "-c", script, str(other)],
        check=True,
        env=os.environ
        | {
            "PYTHONHASHSEED": "7",
            "PYTHONPATH": f"{tmp_path}:{Path(A.__file__).parents[1]}",
            "TZ": "Asia/Tokyo",
        },
        cwd=tmp_path,
    )
    assert other.read_bytes() == ledger.read_bytes()
    back = A.read_trials(ledger)[0]
    assert A.Trial(**{k: v for k, v in back.items() if k != "key"}).key == back["key"]


@pytest.mark.parametrize(
    "other, words",
    [
        (dict(returns=[math.nan] * 10), "trial.returns: expected a finite number"),
        (dict(sharpe_per_bar=math.inf), "sharpe_per_bar"),
        (dict(parameters={"a": {"b": math.nan}}), r"trial.parameters.a.b: expected a finite"),
        (dict(parameters={"a": Path("x")}), "trial.parameters.a: expected numbers, text"),
        (dict(parameters=None), "trial.parameters: expected a table"),
        (dict(days=day_names(9)), "9 days and 10 returns"),
        (dict(days=day_names(10)[::-1]), "each day once and in order"),
        (dict(days=["x"] * 10), "expected days such as"),
        (dict(seed=0.5), "trial.seed: expected a whole number"),
        (dict(bars=None), "trial.bars"),
        (dict(data={"bars": 3}), "trial.data: expected sha256"),
        (dict(span=("a",)), "trial.span"),
        (dict(symbol=""), "trial.symbol"),
        (dict(sed=1), "did you mean 'seed'"),
        (dict(parameters={1: 2}), "names that are text"),
    ],
)
def test_what_is_not_a_trial_is_refused_in_one_line_and_nothing_is_written(ledger, other, words):
    with pytest.raises(InputError, match=words) as e:
        A.record_trials(ledger, [trial(), trial(**other)])
    assert "\n" not in str(e.value) and not ledger.exists()


def test_missing_fields_are_named(ledger):
    with pytest.raises(InputError, match="seed, update missing"):
        A.record_trials(ledger, [{k: v for k, v in trial().items() if k not in ("seed", "update")}])
    with pytest.raises(InputError, match=r"validations\[1\].*days missing"):
        A.run_trials(
            "SIM-USD",
            "15Min",
            DATA,
            SPAN,
            {},
            0,
            [
                v := dict(update=1, sharpe_per_bar=0, bars=1, days=[], returns=[]),
                {k: x for k, x in v.items() if k != "days"},
            ],
        )


@pytest.mark.parametrize("symbol", ["BTC/USD", "../x", "", ".", "a b", None, "index"])
def test_symbols_name_files(tmp_path, symbol):
    with pytest.raises(InputError, match="symbol:"):
        A.ledger_path(tmp_path, symbol)


def sweep(runs=8, checkpoints=5, **parameters) -> list:
    rows = lambda seed: [
        dict(
            update=5 * (i + 1),
            sharpe_per_bar=0.01 * seed,
            bars=960,
            days=day_names(10),
            returns=np.random.default_rng((seed, i)).normal(0, 0.01, 10),
        )
        for i in range(checkpoints)
    ]
    return [
        t
        for seed in range(runs)
        for t in A.run_trials(
            "SIM-USD",
            "15Min",
            DATA,
            SPAN,
            {"train": {"hidden_dims": (256, 128), "seed": seed, **parameters}, "seed": seed},
            seed,
            rows(seed),
        )
    ]


def test_a_sweep_of_8_runs_with_5_checkpoints_counts_as_8_and_40(ledger):
    assert A.record_trials(ledger, sweep()) == 40 and A.record_trials(ledger, sweep()) == 0
    assert A.ledger_summary(A.read_trials(ledger)) == {
        "n_trials": 40,
        "n_runs": 8,
        "n_seeds": 8,
        "n_parameter_sets": 1,
        "n_checkpoints": 40,
    }
    # two of the seeds with another learning rate, and a probe
    assert (
        A.record_trials(ledger, sweep(2, learning_rate=1e-3)) == 10
        and A.record_trials(ledger, [trial(kind="probe", seed=None, update=None)]) == 1
    )
    assert A.ledger_summary(A.read_trials(ledger)) == {
        "n_trials": 51,
        "n_runs": 11,
        "n_seeds": 9,
        "n_parameter_sets": 3,
        "n_checkpoints": 50,
    }
    assert A.ledger_summary([]) == {
        "n_trials": 0,
        "n_runs": 0,
        "n_seeds": 0,
        "n_parameter_sets": 0,
        "n_checkpoints": 0,
    }
    assert A.ledger_summary(sweep()) == A.ledger_summary(sweep() * 2)  # Trials, or the same twice


def test_the_seed_of_training_is_no_parameter_and_the_seed_of_the_data_is():
    run = A.run_trials(
        "SIM-USD",
        "15Min",
        DATA,
        SPAN,
        {"train": {"seed": 3, "gamma": 0.9}, "data": {"seed": 1}, "seed": 3},
        3,
        [dict(update=1, sharpe_per_bar=0, bars=1, days=[], returns=[])],
    )
    assert run[0].parameters == {"train": {"gamma": 0.9}, "data": {"seed": 1}} and (
        run[0].seed,
        run[0].update,
        run[0].kind,
    ) == (3, 1, "checkpoint")


def test_the_same_settings_with_other_outcomes_are_other_runs(ledger):
    "Thirty versions of a formula, tried one after the other: nobody said so but the outcomes."
    look = lambda update, drift: dict(
        update=update, sharpe_per_bar=0.01 + drift, bars=900, days=day_names(2), returns=[drift, 0.0]
    )
    of = lambda k: A.run_trials("BTC-USD", "15Min", DATA, SPAN, {}, 0, [look(u, 0.001 * k) for u in (5, 10)])
    assert [A.record_trials(ledger, of(k)) for k in [*range(30), 7]] == [2] * 30 + [0]
    assert A.ledger_summary(A.read_trials(ledger)) == {
        "n_trials": 60,
        "n_runs": 30,
        "n_seeds": 1,
        "n_parameter_sets": 1,
        "n_checkpoints": 60,
    }


def test_a_changed_formula_is_another_trial_whatever_it_shows(ledger, monkeypatch):
    assert [A.record_trials(ledger, sweep(1, 1)) for _ in range(2)] == [1, 0]
    monkeypatch.setitem(REWARD_COMPONENTS, "mine", lambda s: s.equity * 2)
    assert [A.record_trials(ledger, sweep(1, 1)) for _ in range(2)] == [1, 0]
    counted = A.read_trials(ledger)
    assert (
        A.ledger_summary(counted)["n_runs"] == 2
        and counted[0]["code"] != counted[1]["code"]
        and counted[0]["libraries"] == {"numpy": np.__version__, "torch": torch.__version__}
    )


@pytest.mark.parametrize(
    "source, symbol, simulated",
    [("simulated", "XYZ", True), ("alpaca", "SIM-USD", False), (None, "SIM-USD", True), (None, "SPY", False)],
)
def test_whether_bars_were_simulated_is_recorded(source, symbol, simulated):
    data = DATA | ({} if source is None else {"source": source})
    assert (
        A.run_trials(
            symbol,
            "15Min",
            data,
            SPAN,
            {},
            0,
            [dict(update=1, sharpe_per_bar=0, bars=1, days=[], returns=[])],
        )[0].simulated
        is simulated
    )


def test_an_older_ledger_is_read_with_its_own_keys(ledger):
    "Lines from before code and outcome were part of the key."
    old = trial(data={"sha256": "ab" * 32, "first": "a", "last": "b"}, span=list(SPAN)) | {"key": "ab" * 32}
    ledger.parent.mkdir()
    body = json.dumps(old, sort_keys=True, separators=(",", ":"))[:-1]
    ledger.write_text(body + ',"line_sha256":"' + hashlib.sha256(body.encode()).hexdigest() + '"}\n')
    assert A.read_trials(ledger) == [old] and A.record_trials(ledger, [old]) == 0
    assert (
        A.record_trials(ledger, sweep(1, 1)) == 1 and A.ledger_summary(A.read_trials(ledger))["n_trials"] == 2
    )
    assert A.luck_adjusted([0.1, 0.2, -0.1], A.read_trials(ledger))["n_trials"] == 2


# --- many writers, killed writers, damage ---------------------------------------------------------------------------


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().decode().splitlines()]  # no code of the module


def write_25(path, number, counts):
    mine = [trial(seed=number, update=i) for i in range(20)] + [trial(seed=1000, update=i) for i in range(5)]
    random.Random(number).shuffle(mine)
    for t in mine:
        counts.put(A.record_trials(path, [t]))


def test_eight_processes_at_once_lose_tear_and_double_nothing(ledger):
    counts = fork.SimpleQueue()
    processes = [fork.Process(target=write_25, args=(ledger, i, counts)) for i in range(8)]
    for p in processes:
        p.start()
    told = [counts.get() for _ in range(200)]
    for p in processes:
        p.join()
    assert all(p.exitcode == 0 for p in processes)
    rows = lines_of(ledger)
    assert len(rows) == len({r["key"] for r in rows}) == sum(told) == 8 * 20 + 5
    assert {(r["seed"], r["update"]) for r in rows} == {(s, u) for s in range(8) for u in range(20)} | {
        (1000, u) for u in range(5)
    }
    assert len(A.read_trials(ledger)) == 165


def write_for_ever(path, number, base, begun):
    for batch in itertools.count():
        A.record_trials(
            path, [base | {"key": f"{number}/{batch}/{i}", "seed": number} for i in range(8)]
        )  # a third of a megabyte at once
        if batch == 0:
            begun.put(True)


def test_killed_writers_leave_a_ledger_that_can_be_read_and_added_to(ledger):
    generator, base = (
        random.Random(0),
        A.Trial(**trial(days=day_names(1500), returns=[1 / 7] * 1500)).record(),
    )
    for number in range(30):
        begun = fork.SimpleQueue()
        process = fork.Process(target=quietly, args=(write_for_ever, ledger, number, base, begun))
        process.start()
        begun.get()
        time.sleep(generator.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        trials = quietly(A.read_trials, ledger)
        assert {f"{number}/0/{i}" for i in range(8)} <= {
            t["key"] for t in trials
        }  # what was acknowledged is there
        assert {t["seed"] for t in trials} == {*range(number // 5 * 5, number + 1)} | (
            {-1} if number % 5 else set()
        )
        assert quietly(A.record_trials, ledger, [trial(seed=-1, update=number)]) == 1
        rows = lines_of(ledger)
        assert len(rows) == len({r["key"] for r in rows}) == len(trials) + 1 and all(
            len(r["returns"]) in (10, 1500) for r in rows
        )
        if number % 5 == 4:
            ledger.unlink()  # keep it small


def test_a_last_line_torn_at_any_byte_costs_that_line_alone(ledger):
    A.record_trials(ledger, [trial(seed=i) for i in range(3)])
    whole = ledger.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in [
        *range(start, start + 40),
        *range(start + 40, len(whole) - 40, 37),
        *range(len(whole) - 40, len(whole) + 1),
    ]:
        ledger.write_bytes(whole[:cut])
        complete = cut >= len(whole) - 1  # without its line feed it is still whole
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert [t["seed"] for t in A.read_trials(ledger)] == [0, 1, 2][: 3 if complete else 2]
            if cut != start and not complete:
                assert f"{ledger}: its last line is torn after {cut - start} bytes" in str(told[0].message)
            else:
                assert not told
            assert A.record_trials(ledger, [trial(seed=2), trial(seed=3)]) == (1 if complete else 2)
        assert [r["seed"] for r in lines_of(ledger)] == [0, 1, 2, 3] and ledger.read_bytes()[
            : len(whole)
        ] == whole


def test_zeros_at_the_end_of_a_file_are_a_torn_line(ledger):  # what a power cut leaves on some file systems
    A.record_trials(ledger, [trial()])
    with open(ledger, "ab") as file:
        file.write(bytes(4096))
    with pytest.warns(UserWarning, match="torn after 4096 bytes"):
        assert A.record_trials(ledger, [trial(seed=1)]) == 1
    assert len(lines_of(ledger)) == 2


def test_any_changed_byte_in_the_middle_is_an_error_that_names_file_and_line(ledger):
    A.record_trials(ledger, [trial(seed=i) for i in range(4)])
    whole, generator = ledger.read_bytes(), random.Random(1)
    last = whole[:-1].rindex(b"\n")
    for at in generator.sample(range(last), 300):
        ledger.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << generator.randrange(8))]) + whole[at + 1 :])
        line = whole[:at].count(b"\n") + 1
        with pytest.raises(InputError, match=f"SIM-USD.jsonl: line {line} is damaged") as e:
            A.read_trials(ledger)
        assert str(ledger) in str(e.value) and "\n" not in str(e.value)
    # a run that took hours does not lose its own trials to that
    assert A.record_trials(ledger, [trial(seed=9)]) == 1
    assert b'"seed":9,' in ledger.read_bytes()


@pytest.mark.parametrize("line", [b"{}", b"null", b'{"key":"x"}', b"<<<<<<< HEAD", b"\xff\xfe"])
def test_lines_of_another_hand_are_refused(ledger, line):
    A.record_trials(ledger, [trial(seed=0), trial(seed=1)])
    first, second = ledger.read_bytes().splitlines()
    ledger.write_bytes(first + b"\n" + line + b"\n" + second + b"\n")
    with pytest.raises(InputError, match="line 2 is damaged"):
        A.read_trials(ledger)


def test_blank_lines_mean_nothing(ledger):
    A.record_trials(ledger, [trial(seed=0), trial(seed=1)])
    ledger.write_bytes(b"\n" + ledger.read_bytes().replace(b"\n", b"\r\n \n\n") + b"\n  ")
    assert A.record_trials(ledger, [trial(seed=1), trial(seed=2)]) == 1 and [
        t["seed"] for t in A.read_trials(ledger)
    ] == [0, 1, 2]


def test_lines_that_were_merged_twice_count_once(ledger):
    A.record_trials(ledger, [trial(seed=0), trial(seed=1)])
    ledger.write_bytes(ledger.read_bytes() * 2)
    assert [t["seed"] for t in A.read_trials(ledger)] == [0, 1]


def test_an_index_is_no_ledger_and_a_ledger_no_index(tmp_path, ledger):
    A.record_trials(ledger, [trial()]), A.record_run(A.index_path(tmp_path), run())
    with pytest.raises(InputError, match="not trials"):
        A.read_trials(A.index_path(tmp_path))
    with pytest.raises(InputError, match="not runs"):
        A.index_runs(ledger)


def write_on_a_full_disk(path, limit, answer):
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit)
    )  # the system cuts the write short, as a full disk does
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        A.record_trials(path, [trial(seed=i) for i in range(1, 50)])
    except InputError as e:
        answer.put(str(e))
    else:
        answer.put("written")


@pytest.mark.parametrize("room", [0, 1, 700, 5000])
def test_a_full_disk_leaves_the_ledger_as_it_was(ledger, room):
    A.record_trials(ledger, [trial(seed=0)])
    before, answer = ledger.read_bytes(), fork.SimpleQueue()
    process = fork.Process(target=write_on_a_full_disk, args=(ledger, len(before) + room, answer))
    process.start()
    said = answer.get()
    process.join()
    assert "cannot be written" in said and "\n" not in said and ledger.read_bytes() == before


def test_a_file_that_was_replaced_while_waiting_is_the_one_that_is_written(ledger, tmp_path):
    A.record_trials(ledger, [trial(seed=0)])
    A.record_trials(other := tmp_path / "other.jsonl", [trial(seed=1)])
    with open(ledger) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer = threading.Thread(target=A.record_trials, args=(ledger, [trial(seed=2)]))
        writer.start()
        time.sleep(0.05)
        os.replace(other, ledger)  # as a checkout does
    writer.join()
    assert [r["seed"] for r in lines_of(ledger)] == [1, 2]


def replace_again_and_again(path, stop):
    other = path.with_suffix(".new")
    while stop.empty():
        with open(path, "rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(held.fileno()), os.stat(path)):
                continue
            other.write_bytes(held.read())
            os.replace(other, path)


def write_100(path, number):
    for i in range(100):
        A.record_trials(path, [trial(seed=number, update=i, days=[], returns=[])])


def test_no_line_goes_to_a_file_that_is_no_longer_there(ledger):
    A.record_trials(ledger, [trial(days=[], returns=[])])
    stop = fork.SimpleQueue()
    replacer, writers = (
        fork.Process(target=replace_again_and_again, args=(ledger, stop)),
        [fork.Process(target=write_100, args=(ledger, i + 1)) for i in range(3)],
    )
    for p in (replacer, *writers):
        p.start()
    for p in writers:
        p.join()
    stop.put(True)
    replacer.join()
    assert len(lines_of(ledger)) == 301 and all(p.exitcode == 0 for p in (replacer, *writers))


def test_trials_that_cannot_be_written_wait_beside_the_model(tmp_path, ledger):
    "And count, and are added by the next training."
    ledger.mkdir(parents=True)  # a folder where the file should be
    said = A.add_trials(tmp_path, "SIM-USD", [trial(seed=0), trial(seed=1)])
    kept = tmp_path / "models" / "SIM-USD.trials.jsonl"
    assert "cannot be written" in said and f"2 trials are kept in {kept}" in said and "\n" not in said
    ledger.rmdir()
    assert [t["seed"] for t in A.read_trials(ledger)] == [0, 1] and not ledger.exists()
    assert {s: len(t) for s, t in A.project_trials(tmp_path).items()} == {"SIM-USD": 2}
    assert (
        A.add_trials(tmp_path, "SIM-USD", [trial(seed=1), trial(seed=2)])
        == "ledger of SIM-USD: 1 new trials, 3 in all"
    )
    assert not kept.exists() and {r["seed"] for r in lines_of(ledger)} == {0, 1, 2}


def unwritable(path):
    path.mkdir(parents=True)


def damaged(path):
    A.record_trials(path, [trial(seed=0), trial(seed=1)])
    path.write_bytes(path.read_bytes().replace(b'"seed":0', b'"seed":5'))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (unwritable, "SIM-USD.jsonl: cannot be read"),
        (damaged, "SIM-USD.jsonl: line 1 is damaged"),
        (lambda p: p.parent.write_text(""), "ledger: is no folder"),
    ],
)
def test_a_ledger_that_could_not_take_a_trainings_trials_is_found_before_it(tmp_path, ledger, spoil, words):
    A.check_ledger(tmp_path, "SIM-USD")
    assert not list(tmp_path.iterdir())
    spoil(ledger)
    with pytest.raises(InputError, match=words) as e:
        A.check_ledger(tmp_path, "SIM-USD")
    assert "\n" not in str(e.value)


def test_a_full_disk_is_found_before_a_training(tmp_path, ledger):
    A.record_trials(ledger, [trial()])
    script = f"import resource, signal; from trading_lib import ledger as A; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN); A.check_ledger({str(tmp_path)!r}, 'SIM-USD')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(A.__file__).parents[1])},
    )
    assert done.returncode and "SIM-USD.jsonl: cannot be written" in done.stderr.splitlines()[-1]


def git(folder, *command):
    who = {
        f"GIT_{role}_{what}": "n@example.org"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    return subprocess.run(
        ["git", *command],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | who | {"GIT_CONFIG_GLOBAL": os.devnull},
    ).stdout


def repository(folder, **files) -> Path:
    folder.mkdir(exist_ok=True)
    git(folder, "init", "-q", "-b", "main")
    for name in (".gitattributes", ".gitignore"):
        (folder / name).write_text((ROOT / name).read_text())
    git(folder, "add", "."), git(folder, "commit", "-qm", "start")
    return folder


def seeds(root) -> set:
    return {t["seed"] for t in A.read_trials(A.ledger_path(root, "SIM-USD"))}


def commit(root):
    git(root, "add", "ledger"), git(root, "commit", "-qm", "tried")


@pytest.mark.parametrize(
    "lose",
    [
        ("stash", "-u"),
        ("checkout", "--", "."),
        ("reset", "-q", "--hard"),
        ("checkout", "-q", "start"),
        ("clean", "-qfd", "ledger"),
    ],
)
def test_nothing_that_git_does_to_the_projects_files_loses_a_trial(tmp_path, lose):
    root = repository(tmp_path / "p")
    ledger = A.ledger_path(root, "SIM-USD")
    git(root, "branch", "start")
    A.record_trials(ledger, [trial(seed=0)])
    if lose[0] != "clean":
        commit(root)
    A.record_trials(ledger, [trial(seed=1)])
    if lose[-1] == "start":
        commit(root)
    git(root, *lose)
    assert not ledger.exists() or len(lines_of(ledger)) < 2
    assert seeds(root) == {0, 1}
    A.record_trials(ledger, [trial(seed=2)])
    assert {r["seed"] for r in lines_of(ledger)} == {0, 1, 2}  # and the project's file has them again


def test_ledgers_of_two_people_merge_into_all_their_trials(tmp_path):
    a = repository(tmp_path / "a")
    A.record_trials(A.ledger_path(a, "SIM-USD"), [trial(seed=0)])
    commit(a)
    git(tmp_path, "clone", "-q", "a", "b")
    b = tmp_path / "b"
    A.record_trials(A.ledger_path(a, "SIM-USD"), [trial(seed=1), trial(seed=2)])
    A.record_trials(A.ledger_path(b, "SIM-USD"), [trial(seed=3), trial(seed=2)])
    commit(a), commit(b)
    git(b, "pull", "-q", "--no-rebase", "--no-edit", "origin", "main")
    assert seeds(b) == {0, 1, 2, 3} and seeds(tmp_path / "a") == {0, 1, 2}
    assert not git(b, "status", "--porcelain")


def test_work_trees_of_a_repository_know_each_others_trials(tmp_path):
    root = repository(tmp_path / "p")
    git(root, "worktree", "add", "-q", str(tmp_path / "w"), "-b", "other")
    A.record_trials(A.ledger_path(root, "SIM-USD"), [trial(seed=0)])
    A.record_trials(A.ledger_path(tmp_path / "w", "SIM-USD"), [trial(seed=1)])
    assert seeds(root) == seeds(tmp_path / "w") == {0, 1}


def test_every_symbol_of_a_project_counts_and_simulated_ones_apart(tmp_path):
    for symbol, n, simulated in (("SPY", 2, False), ("QQQ", 3, None), ("SIM-USD", 4, None), ("XYZ", 5, True)):
        A.record_trials(
            A.ledger_path(tmp_path, symbol),
            [trial(symbol=symbol, seed=i, simulated=simulated) for i in range(n)],
        )
    A.record_run(A.index_path(tmp_path), run())
    assert {s: len(t) for s, t in A.project_trials(tmp_path).items()} == {
        "SPY": 2,
        "QQQ": 3,
        "SIM-USD": 4,
        "XYZ": 5,
    }
    assert (len(A.comparable_trials(tmp_path, False)), len(A.comparable_trials(tmp_path, True))) == (5, 9)
    assert A.project_trials(tmp_path / "none") == {}


SIZED = """
import resource, sys, time
from trading_lib import ledger as A
from trading_lib.evaluation.code_identity import code_identity
root, trial, base, told = sys.argv[1], eval(sys.argv[2]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
for what in (lambda: A.add_trials(root, "SIM-USD", [trial]), lambda: A.luck_adjusted([0.01, -0.01, 0.02], A.comparable_trials(root, True))):
    begun = time.process_time()
    what()
    told += [time.process_time() - begun, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024]
print(*told)
"""


def test_a_long_ledger_is_added_to_without_reading_what_it_says(tmp_path, ledger):
    "20,000 lines, 80 MB: seconds of this process alone, and MB beyond what the modules take. It was 2 s and 640 MB."
    ledger.parent.mkdir()
    returns = np.random.default_rng(0).normal(0, 0.01, 100).round(8).tolist()
    record = A.Trial(
        **trial(days=day_names(100), returns=returns, parameters={f"setting_{i}": i for i in range(60)})
    ).record()
    before, after = A._line(record)[:-83].split(record["key"].encode())
    with open(ledger, "wb") as file:
        for i in range(20_000):
            body = before + b"%064x" % i + after
            file.write(body + b',"line_sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n')
    done = subprocess.run(
        [sys.executable, "-c", SIZED, str(tmp_path), repr(trial(seed=-1))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(A.__file__).parents[1])},
    )
    print(done.stdout, done.stderr)
    adding, added, _, read = map(float, done.stdout.split())
    assert (
        adding < 0.7
        and added < 30
        and read < 250
        and len(ledger.read_bytes().splitlines()) == 20_001 == len(A.read_trials(ledger))
    )


def test_places_that_cannot_be_written_or_read_are_named(tmp_path):
    (tmp_path / "ledger").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="ledger: is no folder"):
        A.record_trials(A.ledger_path(tmp_path, "SPY"), [trial()])
    with pytest.raises(InputError, match="ledger: is no folder"):
        A.read_trials(A.ledger_path(tmp_path, "SPY"))
    assert A.read_trials(tmp_path / "none.jsonl") == []


def test_what_is_tried_in_a_temporary_copy_reaches_the_project(tmp_path):
    project, copy = tmp_path, tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1a2b"
    outer, inner = A.ledger_path(project, "SPY"), A.ledger_path(copy, "SPY")
    assert A.record_trials(outer, [trial(seed=0)]) == 1
    assert (
        A.record_trials(inner, [trial(seed=0), trial(seed=1)]) == 1
    )  # one of them the project knows already
    assert [r["seed"] for r in lines_of(outer)] == [0, 1] and [t["seed"] for t in A.read_trials(inner)] == [
        0,
        1,
    ]
    assert (
        A.record_trials(outer, [trial(seed=2)]) == 1 and len(A.read_trials(inner)) == 3
    )  # others run meanwhile
    assert A.record_run(A.index_path(copy), run()) and len(A.index_runs(A.index_path(project))) == 1 == len(
        A.index_runs(A.index_path(copy))
    )


@pytest.mark.proof
def test_what_dvc_tries_is_known_wherever_it_puts_the_projects_files(tmp_path):
    "In the workspace, in copies of it, after another experiment was applied and after a stash; a stage that depends on the ledgers then runs again, once."

    def sh(*command):
        return subprocess.run(
            command,
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
            env=os.environ
            | {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(Path(A.__file__).parents[1]),
                "GIT_AUTHOR_NAME": "n",
                "GIT_AUTHOR_EMAIL": "n@example.org",
                "GIT_COMMITTER_NAME": "n",
                "GIT_COMMITTER_EMAIL": "n@example.org",
            },
        ).stdout

    (tmp_path / "tried.py").write_text(
        f"import yaml; from trading_lib import ledger as A\nt = {trial()!r}\nt['seed'] = yaml.safe_load(open('params.yaml'))['seed']\nA.add_trials('.', 'SIM-USD', [t])\nopen('out.json', 'w').write(str(t['seed']))\n"
    )
    (tmp_path / "judged.py").write_text(
        "from trading_lib import ledger as A\nopen('said.json', 'w').write(str(len(A.comparable_trials('.', True))))\n"
    )
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    for name in (".gitattributes", ".dvcignore"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "README.md").write_text("")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  try:\n    cmd: python tried.py\n    deps: [tried.py]\n    params: [seed]\n    metrics: [out.json: {cache: false}]\n"
        "  judge:\n    cmd: python judged.py\n    deps: [ledger, out.json]\n    metrics: [said.json: {cache: false}]\n"
    )
    (
        sh("git", "init", "-q", "-b", "main"),
        sh("dvc", "init", "-q"),
        sh("git", "add", "."),
        sh("git", "commit", "-qm", "start"),
    )
    sh("dvc", "exp", "run", "-q", "-S", "seed=1"), sh("git", "add", "."), sh("git", "commit", "-qm", "one")
    sh("dvc", "exp", "run", "-q", "-S", "seed=2")
    for seed in (3, 4, 3):
        sh("dvc", "exp", "run", "--temp", "-q", "--force", "-n", f"exp{seed}", "-S", f"seed={seed}")
    assert seeds(tmp_path) == {1, 2, 3, 4}
    sh("dvc", "exp", "apply", "exp3")
    assert seeds(tmp_path) == {1, 2, 3, 4}
    A.gather_ledgers(tmp_path)
    sh("dvc", "repro", "-q")
    assert (tmp_path / "said.json").read_text() == "4" and "up to date" in sh("dvc", "status")
    sh("git", "stash", "-q")
    assert seeds(tmp_path) == {1, 2, 3, 4} and len(lines_of(A.ledger_path(tmp_path, "SIM-USD"))) == 1


# --- luck -----------------------------------------------------------------------------------------------------------


def backtest_overfitting(matrix, n_blocks) -> float:
    "Bailey et al. 2017, algorithm 2.3, written plainly."
    blocks, overfitted, choices = np.array_split(np.arange(len(matrix)), n_blocks), 0, 0
    sharpe = lambda rows: matrix[rows].mean(0) / matrix[rows].std(0, ddof=1)
    for chosen in itertools.combinations(range(n_blocks), n_blocks // 2):
        inside = sharpe(np.concatenate([blocks[i] for i in chosen]))
        outside = sharpe(np.concatenate([blocks[i] for i in range(n_blocks) if i not in chosen]))
        winner = inside.argmax()
        overfitted += (outside < outside[winner]).sum() + 1 <= (matrix.shape[1] + 1) / 2
        choices += 1
    return overfitted / choices


@pytest.mark.parametrize(
    "seed, n_days, n, blocks", [(0, 12, 5, 6), (1, 8, 3, 4), (2, 24, 7, 12), (3, 36, 4, 12)]
)
def test_probability_of_backtest_overfitting_of_a_known_matrix(seed, n_days, n, blocks):
    matrix = np.random.default_rng(seed).normal(0.0005, 0.01, (n_days, n)).round(6)
    found = A.overfitting_probability(trials_of(matrix))
    usable = found.blocks
    assert (
        usable % 2 == 0
        and usable <= 16
        and n_days // usable >= 2
        and usable >= min(16, n_days // 4 * 2)
        and (found.trials, found.days, found.left_out, found.reason) == (n, n_days, 0, None)
    )
    if n_days % usable == 0:
        assert found.probability == backtest_overfitting(matrix, usable)
    assert usable == {12: 6, 8: 4, 24: 12, 36: 16}[n_days] and (n_days == 36 or usable == blocks)


def test_a_real_edge_is_not_overfitting_and_an_inverted_one_is():
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.01, (64, 6))
    assert A.overfitting_probability(trials_of(noise + [0.02, 0, 0, 0, 0, 0])).probability == 0
    halves = np.where(np.arange(64) % 32 < 16, 1, -1)[:, None] * np.eye(2)[:, [0, 1]].sum(
        0
    )  # what wins in one half loses in the other
    flipping = np.hstack([halves[:, :1], -halves[:, :1]]) * 0.01 + noise[:, :2] * 0.01
    assert A.overfitting_probability(trials_of(flipping)).probability > 0.5


def test_identical_and_flat_trials_do_not_break_it():
    matrix = np.random.default_rng(5).normal(0, 0.01, (12, 4)).round(6)
    flat = np.zeros((12, 3))
    alone = A.overfitting_probability(trials_of(np.hstack([matrix, flat[:, :1]])))
    many = A.overfitting_probability(trials_of(np.hstack([matrix, flat, matrix[:, :2]])))
    assert alone.probability == many.probability and (many.trials, many.left_out) == (5, 4)
    never = A.overfitting_probability(trials_of(flat))
    assert never.probability is None and "nothing to choose" in never.reason
    # losers and two that never trade: not trading wins inside and outside
    assert (
        A.overfitting_probability(trials_of(np.hstack([np.abs(matrix) * -1, flat[:, :2]]))).probability == 0
    )


def test_too_few_trials_or_days_give_the_reason():
    matrix = np.random.default_rng(0).normal(size=(20, 3)) / 100
    for trials, words in (
        ([], "0 trial"),
        (trials_of(matrix[:, :1]), "1 trial"),
        (trials_of(matrix[:7]), "7 days in common"),
        ([trial(seed=i, days=[], returns=[]) for i in range(3)], "0 trial"),
    ):
        found = A.overfitting_probability(trials)
        assert (
            found.probability is None
            and words in found.reason
            and found.left_out + found.trials == len(trials)
        )
    assert (
        A.overfitting_probability(trials_of(matrix[:8])).blocks == 4
        and A.overfitting_probability(trials_of(np.random.default_rng(0).normal(size=(200, 3)))).blocks == 16
    )


def test_more_trials_than_days_are_thinned_and_counted():
    matrix = np.random.default_rng(0).normal(size=(10, 25)).round(6) / 100
    found = A.overfitting_probability(trials_of(matrix))
    assert (found.trials, found.left_out, found.days) == (10, 15, 10) and 0 <= found.probability <= 1
    assert (
        found.probability
        == A.overfitting_probability(
            trials_of(matrix[:, np.linspace(0, 24, 10).round().astype(int)])
        ).probability
    )


def test_returns_of_the_largest_group_over_its_common_days():
    matrix = np.arange(24).reshape(8, 3) / 1000
    group = trials_of(matrix)
    group[1] |= dict(days=group[1]["days"][2:], returns=group[1]["returns"][2:])
    other = trials_of(matrix[:, :2], data=DATA | {"sha256": "cd" * 32}) + [
        trial(seed=77, span=("2020-01-01", "2020-02-01")),
        trial(seed=78, days=[], returns=[]),
    ]
    found = A.trial_returns(other[:1] + group + other[1:])
    assert (
        found.left_out == 4
        and found.days == day_names(8)[2:]
        and np.array_equal(found.matrix, matrix[2:])
        and found.keys == [A.Trial(**t).key for t in group]
    )
    # of two equally large groups the later one
    assert A.trial_returns(trials_of(matrix) + trials_of(matrix * 2, timeframe="1Hour")).matrix[
        1, 0
    ] == pytest.approx(0.006)
    assert A.trial_returns([]).matrix.shape == (0, 0) and A.trial_returns([]).left_out == 0


def by_hand(returns, n, variance) -> float:
    "Bailey & López de Prado 2014, equations 1 and 2."
    normal, r = NormalDist(), np.asarray(returns)
    z = (r - r.mean()) / r.std()
    sharpe, skewness, kurtosis = r.mean() / r.std(ddof=1), (z**3).mean(), (z**4).mean()
    expected = math.sqrt(variance) * (
        (1 - 0.5772156649015329) * normal.inv_cdf(1 - 1 / n)
        + 0.5772156649015329 * normal.inv_cdf(1 - 1 / (n * math.e))
    )
    return normal.cdf(
        (sharpe - expected)
        * math.sqrt(len(r) - 1)
        / math.sqrt(1 - skewness * sharpe + (kurtosis - 1) / 4 * sharpe**2)
    )


def test_deflated_sharpe_counts_the_ledger(ledger):
    A.record_trials(ledger, sweep())
    trials = A.read_trials(ledger)
    returns = np.random.default_rng(3).normal(0.0012, 0.02, 3000)
    found = A.luck_adjusted(returns, trials)
    assert found["n_trials"] == 40 and found["deflated_sharpe"] == pytest.approx(
        by_hand(returns, 40, 1 / 2999), rel=1e-12
    )
    spread = np.var([0.01 * seed for seed in range(8) for _ in range(5)], ddof=1)
    assert found["deflated_sharpe_of_spread"] == pytest.approx(by_hand(returns, 40, spread), rel=1e-9)
    assert (
        found["overfitting_probability"] == A.overfitting_probability(trials).probability is not None
        and found["overfitting_trials"] == 10
        and found["overfitting_left_out"] == 30
    )
    # every further trial lowers it, the same ones again do not
    A.record_trials(ledger, sweep())
    assert A.luck_adjusted(returns, A.read_trials(ledger)) == found
    A.record_trials(ledger, sweep(learning_rate=1e-3))
    assert (
        A.luck_adjusted(returns, A.read_trials(ledger))["deflated_sharpe"]
        < found["deflated_sharpe"]
        < A.luck_adjusted(returns, [])["deflated_sharpe"]
    )


def test_sharpe_ratios_of_other_bars_are_not_compared_but_counted():
    quarter, hour = (
        trials_of(np.ones((3, 6)) / 100),
        [
            t | {"sharpe_per_bar": 9.0 * t["seed"]}
            for t in trials_of(np.ones((3, 4)) / 100, timeframe="1Hour")
        ],
    )
    quarter = [t | {"sharpe_per_bar": 0.01 * t["seed"]} for t in quarter]
    returns = np.random.default_rng(3).normal(0.0012, 0.02, 3000)
    found = A.luck_adjusted(returns, quarter + hour, "15Min")
    assert found["n_trials"] == 10 and found["deflated_sharpe_of_spread"] == pytest.approx(
        by_hand(returns, 10, np.var([0.01 * i for i in range(6)], ddof=1)), rel=1e-9
    )
    assert (
        A.luck_adjusted(returns, quarter + hour)["deflated_sharpe_of_spread"] < 1e-9
    )  # the last trial's bars
    none = A.luck_adjusted(returns, [])
    assert (
        none["n_trials"] == 1
        and none["deflated_sharpe_of_spread"] is None
        and none["overfitting_reason"].startswith("0 trial")
    )


# --- index ----------------------------------------------------------------------------------------------------------


def run(**other) -> dict:
    fields = dict(
        symbol="SIM-USD",
        timeframe="15Min",
        parameters={"train": {"seed": 0, "gamma": 0.99}},
        data=DATA,
        metrics={
            "total_return": -0.0123,
            "sharpe": -0.4,
            "max_drawdown": 0.081,
            "deflated_sharpe": 0.1114,
            "trades": 1204,
            "profit_factor": math.inf,
            "sortino": math.nan,
        },
        verdict="DROP",
        model_sha256="3f" * 32,
        commit="0a1b2c3d" * 5,
    )
    return fields | other


def test_index_lists_each_run_once_in_order(tmp_path):
    path = A.index_path(tmp_path)
    assert A.index_runs(path) == [] and A.format_history([]) == "no runs yet"
    assert (
        A.record_run(path, run())
        and not A.record_run(path, run())
        and A.record_run(path, run(symbol="SIMA"))
        and A.record_run(path, run(commit="f" * 40))
        and A.record_run(path, run(verdict="REVIEW"))
    )
    runs = A.index_runs(path)
    assert [(r["symbol"], r["verdict"]) for r in runs] == [
        ("SIM-USD", "DROP"),
        ("SIMA", "DROP"),
        ("SIM-USD", "DROP"),
        ("SIM-USD", "REVIEW"),
    ]
    assert (
        runs[0]["metrics"]["profit_factor"] is None
        and runs[0]["metrics"]["sortino"] is None
        and runs[0]["data"] == DATA
    )
    assert (
        A.symbol_history(path, "SIM-USD") == [runs[0], runs[2], runs[3]]
        and A.symbol_history(path, "SPY") == []
    )
    with pytest.raises(InputError, match="verdict, commit missing"):
        A.record_run(path, {k: v for k, v in run().items() if k not in ("verdict", "commit")})
    with pytest.raises(InputError, match="run.metrics.equity: expected numbers"):
        A.record_run(path, run(metrics={"equity": np.ones(3)}))


def test_history_is_a_table_for_people():
    rows = [
        run(),
        run(symbol="SIMA", metrics={}, commit=None, verdict=None),
        run(parameters={"train": {"seed": 1, "gamma": 0.9}}, verdict={"verdict": "APPROVED"}),
        run(parameters={"train": {f"name_{i}": i for i in range(30)}}, data=DATA | {"sha256": "cd" * 32}),
    ]
    head, rule, *body = A.format_history(rows).splitlines()
    assert head.split() == [
        "run",
        "symbol",
        "bars",
        "data",
        "return",
        "Sharpe",
        "drawdown",
        "deflated",
        "trades",
        "verdict",
        "model",
        "commit",
        "changed",
    ] and set(rule) == {"-"}
    assert body[0].split() == [
        "1",
        "SIM-USD",
        "15Min",
        "2022-01-01",
        "…",
        "2023-12-31",
        "-1.23%",
        "-0.40",
        "8.10%",
        "0.111",
        "1,204",
        "DROP",
        "3f3f3f3f",
        "0a1b2c3d",
    ]
    assert (
        body[1].split()[1] == "SIMA"
        and body[1].split()[6:12] == ["-"] * 6
        and "APPROVED" in body[2]
        and body[2].endswith("train.seed 0 -> 1; train.gamma 0.99 -> 0.9")
    )
    assert "other data; train.seed 1 -> None" in body[3] and body[3].endswith("…")
    for name in ("verdict", "model", "commit"):
        assert all(
            line[head.index(name) - 1] == " " != line[head.index(name)] for line in body
        )  # columns stand below their names
    assert len({len(line) for line in body[:1]} | {len(rule)}) == 2 and all(
        len(line) <= len(rule) for line in [head, *body]
    )


def test_a_run_on_a_simulated_market_says_so_in_the_history():
    rows = [
        run(data=DATA | {"source": source}, verdict=verdict)
        for source in ("simulated", "alpaca")
        for verdict in ("REVIEW", "SIMULATED PASS")
    ]
    assert [("(simulated)" in line) for line in A.format_history(rows).splitlines()[2:]] == [
        True,
        True,
        False,
        False,
    ]


def write_runs(path, number):
    for i in range(25):
        A.record_run(path, run(model_sha256=f"{number}-{i}"))


def test_runs_that_end_at_the_same_time_are_all_listed(tmp_path):
    path = A.index_path(tmp_path)
    processes = [fork.Process(target=write_runs, args=(path, i)) for i in range(4)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert {r["model_sha256"] for r in A.index_runs(path)} == {
        f"{n}-{i}" for n in range(4) for i in range(25)
    } and len(lines_of(path)) == 100


# --- deploy zip -----------------------------------------------------------------------------------------------------

FACTS = {"verdict": {"verdict": "REVIEW", "failed": {"APPROVED": ["fitness is 0.61, APPROVED needs >= 0.7"]}}}


@pytest.fixture
def model(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "trunk.0.weight": torch.randn(4, 58, generator=generator),
        "trunk.0.bias": torch.zeros(4),
        "actor_head.weight": torch.randn(8, 4, generator=generator),
        "critic_head.weight": torch.randn(1, 4, generator=generator),
    }
    return save_checkpoint(
        {
            "policy_state_dict": weights,
            **get_checkpoint_metadata(window=1),
            "data": {"symbol": "SIM-USD", "timeframe": "15Min", "asset_class": "crypto", **DATA},
            "git": {"commit": "0a1b2c3d" * 5, "dirty": False},
            "libraries": {"python": "3.11.7", "torch": "2.13.0"},
        },
        tmp_path / "best.pt",
    )


@pytest.fixture
def files(tmp_path) -> dict:
    for name, text in {
        "report.html": "<html>" + "x" * 3000,
        "metrics.json": '{"sharpe": 1.2}',
        "params.yaml": "symbols: [SIM-USD]\n",
    }.items():
        (tmp_path / name).write_text(text)
    return {name: tmp_path / name for name in ("report.html", "metrics.json", "params.yaml")}


@pytest.fixture
def deploy(tmp_path, model, files) -> Path:
    return A.write_deploy_zip(model, tmp_path / "deploy" / "SIM-USD.zip", files, FACTS)


def parts_of(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts, compression=zipfile.ZIP_STORED) -> bytes:
    "An archive as any other program would make it."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def sealed(parts) -> bytes:
    "An archive by somebody who knows how its own digest is made."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
        archive.comment = b"x" * 71
    body = buffer.getvalue()[:-71]
    return body + b"sha256:" + hashlib.sha256(body).hexdigest().encode()


def relisted(parts, **changes) -> dict[str, bytes]:
    "With a manifest that fits the files."
    listed = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in parts.items()
        if name != "manifest.json"
    }
    return parts | {
        "manifest.json": json.dumps(json.loads(parts["manifest.json"]) | {"files": listed} | changes).encode()
    }


def refused(path, data, words, **options):
    path.write_bytes(data)
    with pytest.raises(InputError, match=words) as e:
        A.load_deploy_zip(path, **options)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


def test_a_deploy_zip_comes_back_and_any_zip_program_can_check_it(deploy, model, files):
    with zipfile.ZipFile(deploy) as archive:
        assert archive.testzip() is None and archive.namelist() == sorted(archive.namelist()) == [
            "README.md",
            "manifest.json",
            "metrics.json",
            "model.pt",
            "params.yaml",
            "report.html",
        ]
        assert all(e.date_time == (1980, 1, 1, 0, 0, 0) for e in archive.infolist())
        manifest = json.loads(archive.read("manifest.json"))
        for name, entry in manifest["files"].items():
            assert entry == {
                "sha256": hashlib.sha256(archive.read(name)).hexdigest(),
                "bytes": len(archive.read(name)),
            }
    assert (
        set(manifest["files"]) == {"README.md", "model.pt", *files}
        and manifest["format_version"] == 1
        and manifest["libraries"]["torch"] == "2.13.0"
    )
    assert (
        manifest["symbol"],
        manifest["timeframe"],
        manifest["asset_class"],
        manifest["model_version"],
        manifest["commit"],
        manifest["data"]["bars"],
    ) == ("SIM-USD", "15Min", "crypto", "5.6.0", "0a1b2c3d" * 5, 70_000)
    loaded = A.load_deploy_zip(deploy)
    assert (
        loaded["manifest"] == manifest
        and loaded["files"]["model.pt"] == model.read_bytes()
        and {n: loaded["files"][n] for n in files} == {n: p.read_bytes() for n, p in files.items()}
    )
    assert torch.equal(
        loaded["content"]["policy_state_dict"]["trunk.0.weight"],
        torch.load(model, weights_only=True)["policy_state_dict"]["trunk.0.weight"],
    )
    text = loaded["files"]["README.md"].decode()
    for words in (
        "REVIEW",
        "fitness is 0.61",
        "not a promise",
        "load_deploy_zip",
        "ab" * 32,
        "2022-01-01",
        "70000 bars",
        "5.6.0",
    ):
        assert words in text


def test_equal_inputs_give_equal_bytes_anywhere(tmp_path, deploy, model, files):
    for path in (model, *files.values()):
        os.utime(path, (1, 1)), path.chmod(0o600)
    script = "import sys, json, os; from trading_lib import ledger as A; os.umask(0o077); A.write_deploy_zip(sys.argv[1], sys.argv[2], dict(reversed(json.loads(sys.argv[3]).items())), json.loads(sys.argv[4]))"
    elsewhere = tmp_path / "x" / "other.zip"
    subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            str(model),
            str(elsewhere),
            json.dumps({n: str(p) for n, p in files.items()}),
            json.dumps(FACTS),
        ],
        check=True,
        cwd="/",
        env=os.environ
        | {"PYTHONHASHSEED": "5", "TZ": "Asia/Tokyo", "PYTHONPATH": str(Path(A.__file__).parents[1])},
    )
    assert elsewhere.read_bytes() == deploy.read_bytes()


def test_every_flipped_bit_is_noticed(deploy, tmp_path):
    data, generator, bad = deploy.read_bytes(), random.Random(0), tmp_path / "bad.zip"
    for at in {*generator.sample(range(len(data)), 200), *range(8), *range(len(data) - 93, len(data))}:
        refused(
            bad, data[:at] + bytes([data[at] ^ (1 << generator.randrange(8))]) + data[at + 1 :], "bad.zip"
        )


def test_a_flipped_byte_under_a_new_digest_changes_no_file(
    deploy, tmp_path
):  # damage before packing, or a forger: no traceback, no changed model
    data, generator, bad, whole, through = (
        deploy.read_bytes()[:-71],
        random.Random(1),
        tmp_path / "bad.zip",
        A.load_deploy_zip(deploy),
        0,
    )
    for at in {
        *generator.sample(range(len(data)), 200),
        *range(data.index(b"manifest.json"), data.index(b"manifest.json") + 300, 3),
        *range(len(data) - 300, len(data) - 22, 2),
    }:
        body = data[:at] + bytes([data[at] ^ (1 << generator.randrange(8))]) + data[at + 1 :]
        bad.write_bytes(body + b"sha256:" + hashlib.sha256(body).hexdigest().encode())
        try:
            found = A.load_deploy_zip(bad)
        except InputError as e:
            assert "\n" not in str(e)
        else:
            through += 1
            assert (
                found["files"] == whole["files"] and found["manifest"] == whole["manifest"]
            )  # the CRC-32 of each entry guards even the manifest
    assert through < 150


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_truncated(deploy, tmp_path, share):
    data = deploy.read_bytes()
    refused(
        tmp_path / "bad.zip", data[: int(len(data) * share)], "is truncated or corrupted|is empty|not a zip"
    )


@pytest.mark.parametrize("cut", range(1, 100, 7))
def test_truncated_by_a_few_bytes(deploy, tmp_path, cut):
    refused(tmp_path / "bad.zip", deploy.read_bytes()[:-cut], "is truncated or corrupted")


def test_truncated_at_the_end_of_the_model_which_is_an_archive_itself(deploy, model, tmp_path):
    data, inner = deploy.read_bytes(), model.read_bytes()
    end = data.index(inner) + len(inner)
    refused(tmp_path / "bad.zip", data[:end], "is corrupted: its SHA-256")
    refused(
        tmp_path / "bad.zip", data[: end - 73] + b"\0\0", "not a plain file name"
    )  # its end without the comment


@pytest.mark.parametrize("pack", [zipped, sealed])
def test_names_and_manifest_must_fit(deploy, tmp_path, pack):
    parts, bad = parts_of(deploy), tmp_path / "bad.zip"
    without = lambda name: {n: d for n, d in parts.items() if n != name}
    refused(bad, pack(without("manifest.json")), "has no manifest.json")
    refused(bad, pack(without("metrics.json")), "lacks metrics.json")
    refused(bad, pack(without("model.pt")), "lacks model.pt")
    refused(bad, pack(parts | {"run.sh": b"echo"}), "holds run.sh, which its manifest does not list")
    refused(
        bad, pack(parts | {"metrics.json": b'{"sharpe": 9.9}'}), "metrics.json is not what its manifest says"
    )
    refused(
        bad, pack(parts | {"metrics.json": b'{"sharpe": 1.3}'}), "metrics.json is not what its manifest says"
    )  # the same size
    refused(bad, pack(relisted(parts, format_version=2)), "format 2 is newer than this library's 1; update")
    for name in (
        "../x",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "..\\x",
        "C:x",
        "a\nb",
        ".hidden",
        "é",
        "x" * 101,
        "a/",
        "model.pt/../x",
    ):
        refused(bad, pack(parts | {name: b"x"}), "not a plain file name")
    for manifest in (
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff",
        b"{}",
        b'{"format_version": true}',
        b'{"format_version": 1}',
        b'{"format_version": 1, "files": []}',
        b'{"format_version": 1, "files": {"model.pt": 3}}',
        b'{"format_version": "1", "files": {}}',
        b'{"format_version": 1, "files": {}}',
        b"[" * 100_000,
    ):
        refused(
            bad, pack(parts | {"manifest.json": manifest}), "its manifest.json|its manifest does not list"
        )
    assert not list(tmp_path.glob("../x")) and not (tmp_path / "x").exists()


def test_a_name_that_is_there_twice(deploy, tmp_path):
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")
        for name, data in [*parts_of(deploy).items(), ("metrics.json", b"{}")]:
            archive.writestr(name, data)
    refused(tmp_path / "bad.zip", buffer.getvalue(), "metrics.json more than once")


def test_packed_again_by_another_program(deploy, tmp_path):
    refused(tmp_path / "bad.zip", zipped(parts_of(deploy)), "packed again by another program")


def test_bombs_are_refused_before_they_are_unpacked(deploy, tmp_path):
    bad, parts = tmp_path / "bad.zip", parts_of(deploy)
    bomb = zipped({"model.pt": bytes(300_000_000)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 400_000
    refused(bad, bomb, "compressed or overlapping")
    refused(bad, bomb, "claim 300,000,000 bytes, more than the 1,000,000 that are read", limit=1_000_000)
    refused(bad, deploy.read_bytes(), "bytes, more than the 1,000 that an archive may have", limit=1_000)
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refused(bad, zipped(parts, kind), "compressed or overlapping")
    # a stored entry that claims 4 GB, and a directory whose entries all point at the same bytes
    data = bytearray(zipped(parts))
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 20 : directory + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    refused(bad, bytes(data), "claim 4,29")
    data = zipped({"a": bytes(100_000)})
    start = data.index(b"PK\x01\x02")
    entry, end = data[start : data.index(b"PK\x05\x06")], data[data.index(b"PK\x05\x06") :]
    entries = b"".join(entry[:46] + name for name in (b"b", b"c", b"d", b"e"))
    refused(
        bad,
        data[:start] + entries + end[:8] + struct.pack("<HHII", 4, 4, len(entries), start) + b"\0\0",
        "compressed or overlapping",
    )


def judged_files(model, **other) -> dict:
    "verdict.json and metrics.json about a model, as the backtest writes them."
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    said = {
        "verdict": "REVIEW",
        "failed": FACTS["verdict"]["failed"],
        "headline": "a line",
        "model_sha256": digest,
    } | other
    return {
        "verdict.json": json.dumps(said).encode(),
        "metrics.json": json.dumps({"provenance": {"model_sha256": said["model_sha256"]}}).encode(),
    }


def test_verdict_and_model_belong_together_when_a_zip_is_written_and_when_it_is_read(tmp_path, model):
    facts, out, bad = FACTS | {"headline": "a line"}, tmp_path / "out.zip", tmp_path / "bad.zip"
    whole = A.load_deploy_zip(A.write_deploy_zip(model, out, judged_files(model), facts))
    assert (
        json.loads(whole["files"]["verdict.json"])["model_sha256"]
        == whole["manifest"]["files"]["model.pt"]["sha256"]
    )
    parts = parts_of(out)
    for other, words in (
        (dict(model_sha256="0" * 64), "is about another model"),
        (dict(verdict="APPROVED"), "the manifest's verdict is 'REVIEW', and verdict.json has 'APPROVED'"),
        (dict(failed={}), "the manifest's failed"),
        (dict(headline="a better line"), "the manifest's headline"),
        (dict(model_sha256=None), "is about another model"),
    ):
        changed = judged_files(model, **other)
        with pytest.raises(InputError, match=words) as e:
            A.write_deploy_zip(model, tmp_path / "none.zip", changed, facts)
        assert "\n" not in str(e.value) and not (tmp_path / "none.zip").exists()
        refused(bad, sealed(relisted(parts | changed)), words)
    # a manifest that praises what its verdict.json does not; a verdict that is no table; a model of somebody else
    refused(
        bad,
        sealed(relisted(parts, verdict={"verdict": "APPROVED", "failed": {}})),
        "the manifest's verdict is 'APPROVED'",
    )
    refused(bad, sealed(relisted(parts | {"verdict.json": b"[" * 100_000})), "is not a table in JSON")
    other = save_checkpoint(torch.load(model, weights_only=True) | {"global_step": 7}, tmp_path / "other.pt")
    refused(bad, sealed(relisted(parts | {"model.pt": other.read_bytes()})), "is about another model")


def test_text_of_others_stays_text_in_the_readme_of_a_zip(tmp_path, model, files):
    evil = "<script>x</script> [a](http://b) \x1b[2J\n# BIG *bold*"
    facts = {
        "verdict": {"verdict": "REVIEW", "failed": {"APPROVED": [evil]}},
        "data": DATA | {"start": evil},
        "commit": evil,
    }
    readme = parts_of(A.write_deploy_zip(model, tmp_path / "out.zip", files, facts))["README.md"].decode()
    assert (
        readme.count("&lt;script>x") == 3
        and "<script" not in readme
        and "](" not in readme
        and "\x1b" not in readme
        and "\n# BIG" not in readme
        and "*bold*" not in readme.replace("\\*", "")
    )


def test_what_ledgers_and_checkpoints_say_moves_no_cursor(tmp_path, model):
    evil = "A\x1b[31m\x9bB\r\u202eC"
    row = run(
        symbol=evil,
        verdict=evil,
        commit=evil,
        model_sha256=evil,
        parameters={evil: evil},
        data=DATA | {"start": evil},
    )
    compared = Comparison(
        {f"x {evil}": (evil, None), "y": (1, evil)}
    )  # `load_checkpoint` refuses such text; what other code puts together is shown all the same
    for text in (A.format_history([row, row | {"parameters": {evil: 2}}]), str(compared)):
        assert "A [31m" in text and all(c.isprintable() or c == "\n" for c in text)


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_hostile_model_runs_no_code(deploy, tmp_path):
    parts, bad, mark = parts_of(deploy), tmp_path / "bad.zip", tmp_path / "executed"
    hostile = io.BytesIO()
    torch.save({"policy_state_dict": Hostile(f"touch {mark}")}, hostile)
    for data in (
        pickle.dumps(Hostile(f"touch {mark}")),
        hostile.getvalue(),
        parts["model.pt"][:-1],
        b"",
        b"PK\x03\x04",
    ):
        refused(bad, sealed(relisted(parts | {"model.pt": data})), "bad.zip: model.pt: ")
    refused(bad, zipped(parts | {"model.pt": hostile.getvalue()}), "model.pt is not what its manifest says")
    (tmp_path / "hostile.pt").write_bytes(hostile.getvalue())
    with pytest.raises(InputError, match="hostile.pt: refused without running"):
        A.write_deploy_zip(tmp_path / "hostile.pt", tmp_path / "o.zip", {}, FACTS)
    assert not mark.exists() and not (tmp_path / "o.zip").exists()


def test_another_model_under_the_manifest_is_noticed(deploy, tmp_path):
    parts = parts_of(deploy)
    for changes in (dict(symbol="SPY"), dict(model_version="5.5.0"), dict(asset_class="equity")):
        refused(
            tmp_path / "bad.zip",
            sealed(relisted(parts, **changes)),
            f"its manifest says {next(iter(changes))} .*its model says",
        )


def test_not_an_archive(tmp_path):
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "none.zip", "no such file")):
        with pytest.raises(InputError, match=words):
            A.load_deploy_zip(path)
    refused(tmp_path / "bad.zip", b"timestamp,open\n", "not a zip archive")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(files={"../x": "metrics.json"}), "plain file names"),
        (dict(files={"a/b.json": "metrics.json"}), "plain file names"),
        (dict(files={"manifest.json": "metrics.json"}), "written by itself"),
        (dict(files={"Readme.md": "metrics.json"}), "written by itself"),
        (dict(files={"none.json": "none.json"}), "none.json: no such file"),
        (dict(files={"a.json": "metrics.json", "A.json": "metrics.json"}), "ignore case"),
        (dict(facts={}), "facts need a verdict"),
        (dict(facts=None), "facts need a verdict"),
        (dict(facts=FACTS | {"symbol": "SPY"}), "facts.symbol is 'SPY', but .*best.pt says 'SIM-USD'"),
        (dict(facts=FACTS | {"files": {}}), "facts.files is written by itself"),
        (dict(facts=FACTS | {"x": object()}), "facts.x: expected numbers"),
        (dict(model="none.pt"), "none.pt: no such file"),
        (dict(model="metrics.json"), "metrics.json: is not a checkpoint"),
    ],
)
def test_what_cannot_be_packed_is_refused_and_leaves_the_old_archive(
    tmp_path, deploy, model, files, changes, words
):
    before = deploy.read_bytes()
    with pytest.raises(InputError, match=words) as e:
        A.write_deploy_zip(
            tmp_path / changes.get("model", "best.pt"),
            deploy,
            {n: tmp_path / p for n, p in changes.get("files", {}).items()},
            changes.get("facts", FACTS),
        )
    assert (
        "\n" not in str(e.value)
        and deploy.read_bytes() == before
        and [p.name for p in deploy.parent.iterdir()] == [deploy.name]
    )


def test_facts_that_the_model_does_not_know_may_be_given(tmp_path, files):
    bare = save_checkpoint(
        {
            "policy_state_dict": {
                "trunk.0.weight": torch.zeros(4, 58),
                "actor_head.weight": torch.zeros(8, 4),
            },
            **get_checkpoint_metadata(window=1),
        },
        tmp_path / "bare.pt",
    )
    loaded = A.load_deploy_zip(
        A.write_deploy_zip(
            bare,
            tmp_path / "bare.zip",
            {},
            {
                "verdict": "DROP",
                "symbol": "SPY",
                "asset_class": "equity",
                "metrics": {"profit_factor": math.inf},
                "data": {"sha256": "cd" * 32, "first": "2020-01-01", "last": "2021-01-01"},
            },
        )
    )
    assert (
        loaded["manifest"]["symbol"] == "SPY"
        and loaded["manifest"]["metrics"]["profit_factor"] is None
        and "2020-01-01 to 2021-01-01, SHA-256 " + "cd" * 32 in loaded["files"]["README.md"].decode()
    )
