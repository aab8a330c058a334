"""The ledger: every trial counted once, whatever happens to its writer."""

import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from small_ledgers import DATA, SPAN, day_names, fork, lines_of, quietly, run, sweep, trial

from trading_lib import ledger as ledgers
from trading_lib.config import InputError
from trading_lib.env import REWARD_COMPONENTS
from trading_lib.evaluation import ledger_file
from trading_lib.reporting import registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ledger(tmp_path) -> Path:
    return ledgers.ledger_path(tmp_path, "SIM-USD")


# --- what a trial is ------------------------------------------------------------------------------


def test_the_key_is_the_hash_of_what_was_tried_and_of_what_it_showed():
    written = (
        '{"bars":960,"code":"c0de",'
        '"data":{"first":"2022-01-01T00:00:00Z","last":"2023-12-31T23:45:00Z","sha256":"%s"},'
        '"kind":"checkpoint","parameters":{"learning_rate":0.0003},"returns":[0.0,0.1],"seed":0,'
        '"sharpe_per_bar":0.01,"span":["2023-05-28T00:00:00Z","2023-09-13T23:45:00Z"],'
        '"symbol":"SIM-USD","timeframe":"15Min","update":5}'
    ) % ("ab" * 32)
    written = written.replace('"kind"', '"days":["2023-05-28","2023-05-29"],"kind"')
    assert (
        ledgers.Trial(
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
    assert (
        ledgers.record_trials(ledger, [trial()]) == 1
        and ledgers.record_trials(ledger, [trial(**other)]) == new
    )
    assert len(ledgers.read_trials(ledger)) == 1 + new


def test_equal_numbers_are_equal_parameters():
    keys = {
        ledgers.Trial(**trial(parameters=p)).key
        for p in (
            {"gae_lambda": 1, "a": [1, 2], "z": 0},
            {"z": -0.0, "gae_lambda": 1.0, "a": (1.0, 2.0)},
            {"a": [np.float32(1), np.int32(2)], "gae_lambda": np.float64(1), "z": 0.0},
        )
    }
    assert len(keys) == 1
    assert (
        ledgers.Trial(**trial(parameters={"flag": True})).key
        != ledgers.Trial(**trial(parameters={"flag": 1})).key
    )


@pytest.mark.slow
def test_lines_hold_eight_significant_digits_and_nothing_about_when_or_where(tmp_path, ledger):
    odd = trial(returns=[1 / 3, 2e-9 / 3, -1 / 7, 0.0, -0.0, 1e-12, 0.1 + 0.2, 1, 2, 3], sharpe_per_bar=1 / 3)
    assert ledgers.record_trials(ledger, [odd]) == 1
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
    script = (
        "import sys; from tests_trial import t; from trading_lib.ledger import record_trials; "
        "record_trials(sys.argv[1], [t])"
    )
    (tmp_path / "tests_trial.py").write_text(f"t = {dict(reversed(odd.items()))!r}")
    other = tmp_path / "other" / "SIM-USD.jsonl"
    subprocess.run(
        [sys.executable, "-c", script, str(other)],
        check=True,
        env=os.environ
        | {
            "PYTHONHASHSEED": "7",
            "PYTHONPATH": f"{tmp_path}:{Path(ledgers.__file__).parents[1]}",
            "TZ": "Asia/Tokyo",
        },
        cwd=tmp_path,
    )
    assert other.read_bytes() == ledger.read_bytes()
    back = ledgers.read_trials(ledger)[0]
    assert ledgers.Trial(**{k: v for k, v in back.items() if k != "key"}).key == back["key"]


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
        ledgers.record_trials(ledger, [trial(), trial(**other)])
    assert "\n" not in str(e.value) and not ledger.exists()


@pytest.mark.slow
def test_missing_fields_are_named(ledger):
    with pytest.raises(InputError, match="seed, update missing"):
        ledgers.record_trials(ledger, [{k: v for k, v in trial().items() if k not in ("seed", "update")}])
    with pytest.raises(InputError, match=r"validations\[1\].*days missing"):
        ledgers.run_trials(
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
        ledgers.ledger_path(tmp_path, symbol)


@pytest.mark.slow
def test_a_sweep_of_8_runs_with_5_checkpoints_counts_as_8_and_40(ledger):
    assert ledgers.record_trials(ledger, sweep()) == 40 and ledgers.record_trials(ledger, sweep()) == 0
    assert ledgers.ledger_summary(ledgers.read_trials(ledger)) == {
        "n_trials": 40,
        "n_runs": 8,
        "n_seeds": 8,
        "n_parameter_sets": 1,
        "n_checkpoints": 40,
    }
    # two of the seeds with another learning rate, and a probe
    assert (
        ledgers.record_trials(ledger, sweep(2, learning_rate=1e-3)) == 10
        and ledgers.record_trials(ledger, [trial(kind="probe", seed=None, update=None)]) == 1
    )
    assert ledgers.ledger_summary(ledgers.read_trials(ledger)) == {
        "n_trials": 51,
        "n_runs": 11,
        "n_seeds": 9,
        "n_parameter_sets": 3,
        "n_checkpoints": 50,
    }
    assert ledgers.ledger_summary([]) == {
        "n_trials": 0,
        "n_runs": 0,
        "n_seeds": 0,
        "n_parameter_sets": 0,
        "n_checkpoints": 0,
    }
    assert ledgers.ledger_summary(sweep()) == ledgers.ledger_summary(sweep() * 2)  # Trials, or the same twice


def test_the_seed_of_training_is_no_parameter_and_the_seed_of_the_data_is():
    run = ledgers.run_trials(
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


@pytest.mark.slow
def test_the_same_settings_with_other_outcomes_are_other_runs(ledger):
    "Thirty versions of a formula, tried one after the other: nobody said so but the outcomes."

    def tried(k):
        shown = dict(sharpe_per_bar=0.01 + 0.001 * k, bars=900, days=day_names(2), returns=[0.001 * k, 0.0])
        validations = [dict(update=update, **shown) for update in (5, 10)]
        return ledgers.run_trials("BTC-USD", "15Min", DATA, SPAN, {}, 0, validations)

    assert [ledgers.record_trials(ledger, tried(k)) for k in [*range(30), 7]] == [2] * 30 + [0]
    assert ledgers.ledger_summary(ledgers.read_trials(ledger)) == {
        "n_trials": 60,
        "n_runs": 30,
        "n_seeds": 1,
        "n_parameter_sets": 1,
        "n_checkpoints": 60,
    }


def test_a_changed_formula_is_another_trial_whatever_it_shows(ledger, monkeypatch):
    assert [ledgers.record_trials(ledger, sweep(1, 1)) for _ in range(2)] == [1, 0]
    monkeypatch.setitem(REWARD_COMPONENTS, "mine", lambda s: s.equity * 2)
    assert [ledgers.record_trials(ledger, sweep(1, 1)) for _ in range(2)] == [1, 0]
    counted = ledgers.read_trials(ledger)
    assert (
        ledgers.ledger_summary(counted)["n_runs"] == 2
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
        ledgers.run_trials(
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
    assert ledgers.read_trials(ledger) == [old] and ledgers.record_trials(ledger, [old]) == 0
    assert (
        ledgers.record_trials(ledger, sweep(1, 1)) == 1
        and ledgers.ledger_summary(ledgers.read_trials(ledger))["n_trials"] == 2
    )
    assert ledgers.luck_adjusted([0.1, 0.2, -0.1], ledgers.read_trials(ledger))["n_trials"] == 2


# --- many writers, killed writers, damage ---------------------------------------------------------


def write_25(path, number, counts):
    mine = [trial(seed=number, update=i) for i in range(20)] + [trial(seed=1000, update=i) for i in range(5)]
    random.Random(number).shuffle(mine)
    for t in mine:
        counts.put(ledgers.record_trials(path, [t]))


@pytest.mark.slow
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
    assert len(ledgers.read_trials(ledger)) == 165


def write_for_ever(path, number, base, begun):
    for batch in itertools.count():
        ledgers.record_trials(
            path, [base | {"key": f"{number}/{batch}/{i}", "seed": number} for i in range(8)]
        )  # a third of a megabyte at once
        if batch == 0:
            begun.put(True)


@pytest.mark.slow
def test_killed_writers_leave_a_ledger_that_can_be_read_and_added_to(ledger):
    generator, base = (
        random.Random(0),
        ledgers.Trial(**trial(days=day_names(1500), returns=[1 / 7] * 1500)).record(),
    )
    for number in range(30):
        begun = fork.SimpleQueue()
        process = fork.Process(target=quietly, args=(write_for_ever, ledger, number, base, begun))
        process.start()
        begun.get()
        time.sleep(generator.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        trials = quietly(ledgers.read_trials, ledger)
        assert {f"{number}/0/{i}" for i in range(8)} <= {
            t["key"] for t in trials
        }  # what was acknowledged is there
        assert {t["seed"] for t in trials} == {*range(number // 5 * 5, number + 1)} | (
            {-1} if number % 5 else set()
        )
        assert quietly(ledgers.record_trials, ledger, [trial(seed=-1, update=number)]) == 1
        rows = lines_of(ledger)
        assert len(rows) == len({r["key"] for r in rows}) == len(trials) + 1 and all(
            len(r["returns"]) in (10, 1500) for r in rows
        )
        if number % 5 == 4:
            ledger.unlink()  # keep it small


def test_a_last_line_torn_at_any_byte_costs_that_line_alone(ledger):
    ledgers.record_trials(ledger, [trial(seed=i) for i in range(3)])
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
            assert [t["seed"] for t in ledgers.read_trials(ledger)] == [0, 1, 2][: 3 if complete else 2]
            if cut != start and not complete:
                assert f"{ledger}: its last line is torn after {cut - start} bytes" in str(told[0].message)
            else:
                assert not told
            assert ledgers.record_trials(ledger, [trial(seed=2), trial(seed=3)]) == (1 if complete else 2)
        assert [r["seed"] for r in lines_of(ledger)] == [0, 1, 2, 3] and ledger.read_bytes()[
            : len(whole)
        ] == whole


def test_zeros_at_the_end_of_a_file_are_a_torn_line(ledger):  # what a power cut leaves on some file systems
    ledgers.record_trials(ledger, [trial()])
    with open(ledger, "ab") as file:
        file.write(bytes(4096))
    with pytest.warns(UserWarning, match="torn after 4096 bytes"):
        assert ledgers.record_trials(ledger, [trial(seed=1)]) == 1
    assert len(lines_of(ledger)) == 2


def test_any_changed_byte_in_the_middle_is_an_error_that_names_file_and_line(ledger):
    ledgers.record_trials(ledger, [trial(seed=i) for i in range(4)])
    whole, generator = ledger.read_bytes(), random.Random(1)
    last = whole[:-1].rindex(b"\n")
    for at in generator.sample(range(last), 300):
        ledger.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << generator.randrange(8))]) + whole[at + 1 :])
        line = whole[:at].count(b"\n") + 1
        with pytest.raises(InputError, match=f"SIM-USD.jsonl: line {line} is damaged") as e:
            ledgers.read_trials(ledger)
        assert str(ledger) in str(e.value) and "\n" not in str(e.value)
    # a run that took hours does not lose its own trials to that
    assert ledgers.record_trials(ledger, [trial(seed=9)]) == 1
    assert b'"seed":9,' in ledger.read_bytes()


@pytest.mark.parametrize("line", [b"{}", b"null", b'{"key":"x"}', b"<<<<<<< HEAD", b"\xff\xfe"])
def test_lines_of_another_hand_are_refused(ledger, line):
    ledgers.record_trials(ledger, [trial(seed=0), trial(seed=1)])
    first, second = ledger.read_bytes().splitlines()
    ledger.write_bytes(first + b"\n" + line + b"\n" + second + b"\n")
    with pytest.raises(InputError, match="line 2 is damaged"):
        ledgers.read_trials(ledger)


def test_blank_lines_mean_nothing(ledger):
    ledgers.record_trials(ledger, [trial(seed=0), trial(seed=1)])
    ledger.write_bytes(b"\n" + ledger.read_bytes().replace(b"\n", b"\r\n \n\n") + b"\n  ")
    assert ledgers.record_trials(ledger, [trial(seed=1), trial(seed=2)]) == 1 and [
        t["seed"] for t in ledgers.read_trials(ledger)
    ] == [0, 1, 2]


def test_lines_that_were_merged_twice_count_once(ledger):
    ledgers.record_trials(ledger, [trial(seed=0), trial(seed=1)])
    ledger.write_bytes(ledger.read_bytes() * 2)
    assert [t["seed"] for t in ledgers.read_trials(ledger)] == [0, 1]


def test_an_index_is_no_ledger_and_a_ledger_no_index(tmp_path, ledger):
    ledgers.record_trials(ledger, [trial()]), registry.record_run(ledgers.index_path(tmp_path), run())
    with pytest.raises(InputError, match="not trials"):
        ledgers.read_trials(ledgers.index_path(tmp_path))
    with pytest.raises(InputError, match="not runs"):
        registry.index_runs(ledger)


def write_on_a_full_disk(path, limit, answer):
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit)
    )  # the system cuts the write short, as a full disk does
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        ledgers.record_trials(path, [trial(seed=i) for i in range(1, 50)])
    except InputError as e:
        answer.put(str(e))
    else:
        answer.put("written")


@pytest.mark.parametrize("room", [0, 1, 700, 5000])
def test_a_full_disk_leaves_the_ledger_as_it_was(ledger, room):
    ledgers.record_trials(ledger, [trial(seed=0)])
    before, answer = ledger.read_bytes(), fork.SimpleQueue()
    process = fork.Process(target=write_on_a_full_disk, args=(ledger, len(before) + room, answer))
    process.start()
    message = answer.get()
    process.join()
    assert "cannot be written" in message and "\n" not in message and ledger.read_bytes() == before


def test_a_file_that_was_replaced_while_waiting_is_the_one_that_is_written(ledger, tmp_path):
    ledgers.record_trials(ledger, [trial(seed=0)])
    ledgers.record_trials(other := tmp_path / "other.jsonl", [trial(seed=1)])
    with open(ledger) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer = threading.Thread(target=ledgers.record_trials, args=(ledger, [trial(seed=2)]))
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
        ledgers.record_trials(path, [trial(seed=number, update=i, days=[], returns=[])])


@pytest.mark.slow
def test_no_line_goes_to_a_file_that_is_no_longer_there(ledger):
    ledgers.record_trials(ledger, [trial(days=[], returns=[])])
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
    message = ledgers.add_trials(tmp_path, "SIM-USD", [trial(seed=0), trial(seed=1)])
    kept = tmp_path / "models" / "SIM-USD.trials.jsonl"
    assert (
        "cannot be written" in message and f"2 trials are kept in {kept}" in message and "\n" not in message
    )
    ledger.rmdir()
    assert [t["seed"] for t in ledgers.read_trials(ledger)] == [0, 1] and not ledger.exists()
    assert {s: len(t) for s, t in ledgers.project_trials(tmp_path).items()} == {"SIM-USD": 2}
    assert (
        ledgers.add_trials(tmp_path, "SIM-USD", [trial(seed=1), trial(seed=2)])
        == "ledger of SIM-USD: 1 new trials, 3 in all"
    )
    assert not kept.exists() and {r["seed"] for r in lines_of(ledger)} == {0, 1, 2}


def unwritable(path):
    path.mkdir(parents=True)


def damaged(path):
    ledgers.record_trials(path, [trial(seed=0), trial(seed=1)])
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
    ledgers.check_ledger(tmp_path, "SIM-USD")
    assert not list(tmp_path.iterdir())
    spoil(ledger)
    with pytest.raises(InputError, match=words) as e:
        ledgers.check_ledger(tmp_path, "SIM-USD")
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_a_full_disk_is_found_before_a_training(tmp_path, ledger):
    ledgers.record_trials(ledger, [trial()])
    script = (
        "import resource, signal; from trading_lib.ledger import check_ledger; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"check_ledger({str(tmp_path)!r}, 'SIM-USD')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(ledgers.__file__).parents[1])},
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
    return {t["seed"] for t in ledgers.read_trials(ledgers.ledger_path(root, "SIM-USD"))}


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
    ledger = ledgers.ledger_path(root, "SIM-USD")
    git(root, "branch", "start")
    ledgers.record_trials(ledger, [trial(seed=0)])
    if lose[0] != "clean":
        commit(root)
    ledgers.record_trials(ledger, [trial(seed=1)])
    if lose[-1] == "start":
        commit(root)
    git(root, *lose)
    assert not ledger.exists() or len(lines_of(ledger)) < 2
    assert seeds(root) == {0, 1}
    ledgers.record_trials(ledger, [trial(seed=2)])
    assert {r["seed"] for r in lines_of(ledger)} == {0, 1, 2}  # and the project's file has them again


def test_ledgers_of_two_people_merge_into_all_their_trials(tmp_path):
    a = repository(tmp_path / "a")
    ledgers.record_trials(ledgers.ledger_path(a, "SIM-USD"), [trial(seed=0)])
    commit(a)
    git(tmp_path, "clone", "-q", "a", "b")
    b = tmp_path / "b"
    ledgers.record_trials(ledgers.ledger_path(a, "SIM-USD"), [trial(seed=1), trial(seed=2)])
    ledgers.record_trials(ledgers.ledger_path(b, "SIM-USD"), [trial(seed=3), trial(seed=2)])
    commit(a), commit(b)
    git(b, "pull", "-q", "--no-rebase", "--no-edit", "origin", "main")
    assert seeds(b) == {0, 1, 2, 3} and seeds(tmp_path / "a") == {0, 1, 2}
    assert not git(b, "status", "--porcelain")


def test_work_trees_of_a_repository_know_each_others_trials(tmp_path):
    root = repository(tmp_path / "p")
    git(root, "worktree", "add", "-q", str(tmp_path / "w"), "-b", "other")
    ledgers.record_trials(ledgers.ledger_path(root, "SIM-USD"), [trial(seed=0)])
    ledgers.record_trials(ledgers.ledger_path(tmp_path / "w", "SIM-USD"), [trial(seed=1)])
    assert seeds(root) == seeds(tmp_path / "w") == {0, 1}


def test_every_symbol_of_a_project_counts_and_simulated_ones_apart(tmp_path):
    for symbol, n, simulated in (("SPY", 2, False), ("QQQ", 3, None), ("SIM-USD", 4, None), ("XYZ", 5, True)):
        ledgers.record_trials(
            ledgers.ledger_path(tmp_path, symbol),
            [trial(symbol=symbol, seed=i, simulated=simulated) for i in range(n)],
        )
    registry.record_run(ledgers.index_path(tmp_path), run())
    assert {s: len(t) for s, t in ledgers.project_trials(tmp_path).items()} == {
        "SPY": 2,
        "QQQ": 3,
        "SIM-USD": 4,
        "XYZ": 5,
    }
    assert (
        len(ledgers.comparable_trials(tmp_path, False)),
        len(ledgers.comparable_trials(tmp_path, True)),
    ) == (5, 9)
    assert ledgers.project_trials(tmp_path / "none") == {}


SIZED = """
import resource, sys, time
from trading_lib import ledger as ledgers
from trading_lib.evaluation.code_identity import code_identity
root, trial, told = sys.argv[1], eval(sys.argv[2]), []
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def add():
    ledgers.add_trials(root, "SIM-USD", [trial])

def judge():
    ledgers.luck_adjusted([0.01, -0.01, 0.02], ledgers.comparable_trials(root, True))

for what in (add, judge):
    begun = time.process_time()
    what()
    told += [time.process_time() - begun, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024]
print(*told)
"""


@pytest.mark.slow
def test_a_long_ledger_is_added_to_without_reading_what_it_says(tmp_path, ledger):
    "20,000 lines, 80 MB: seconds of this process alone, and MB beyond what the modules take."
    ledger.parent.mkdir()
    returns = np.random.default_rng(0).normal(0, 0.01, 100).round(8).tolist()
    record = ledgers.Trial(
        **trial(days=day_names(100), returns=returns, parameters={f"setting_{i}": i for i in range(60)})
    ).record()
    before, after = ledger_file.sealed_line(record)[:-83].split(record["key"].encode())
    with open(ledger, "wb") as file:
        for i in range(20_000):
            body = before + b"%064x" % i + after
            file.write(body + b',"line_sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n')
    done = subprocess.run(
        [sys.executable, "-c", SIZED, str(tmp_path), repr(trial(seed=-1))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(ledgers.__file__).parents[1])},
    )
    print(done.stdout, done.stderr)
    adding, added, _, read = map(float, done.stdout.split())
    assert (
        adding < 0.7
        and added < 30
        and read < 250
        and len(ledger.read_bytes().splitlines()) == 20_001 == len(ledgers.read_trials(ledger))
    )


def test_places_that_cannot_be_written_or_read_are_named(tmp_path):
    (tmp_path / "ledger").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="ledger: is no folder"):
        ledgers.record_trials(ledgers.ledger_path(tmp_path, "SPY"), [trial()])
    with pytest.raises(InputError, match="ledger: is no folder"):
        ledgers.read_trials(ledgers.ledger_path(tmp_path, "SPY"))
    assert ledgers.read_trials(tmp_path / "none.jsonl") == []


def test_what_is_tried_in_a_temporary_copy_reaches_the_project(tmp_path):
    project, copy = tmp_path, tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1a2b"
    outer, inner = ledgers.ledger_path(project, "SPY"), ledgers.ledger_path(copy, "SPY")
    assert ledgers.record_trials(outer, [trial(seed=0)]) == 1
    assert (
        ledgers.record_trials(inner, [trial(seed=0), trial(seed=1)]) == 1
    )  # one of them the project knows already
    assert [r["seed"] for r in lines_of(outer)] == [0, 1] and [
        t["seed"] for t in ledgers.read_trials(inner)
    ] == [
        0,
        1,
    ]
    assert (
        ledgers.record_trials(outer, [trial(seed=2)]) == 1 and len(ledgers.read_trials(inner)) == 3
    )  # others run meanwhile
    assert registry.record_run(ledgers.index_path(copy), run()) and len(
        registry.index_runs(ledgers.index_path(project))
    ) == 1 == len(registry.index_runs(ledgers.index_path(copy)))


@pytest.mark.proof
def test_what_dvc_tries_is_known_wherever_it_puts_the_projects_files(tmp_path):
    "In the workspace, in copies of it, after `exp apply`, after a stash; what depends on it runs once."

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
                "PYTHONPATH": str(Path(ledgers.__file__).parents[1]),
                "GIT_AUTHOR_NAME": "n",
                "GIT_AUTHOR_EMAIL": "n@example.org",
                "GIT_COMMITTER_NAME": "n",
                "GIT_COMMITTER_EMAIL": "n@example.org",
            },
        ).stdout

    (tmp_path / "tried.py").write_text(
        "import yaml; from trading_lib.ledger import add_trials\n"
        f"t = {trial()!r}\nt['seed'] = yaml.safe_load(open('params.yaml'))['seed']\n"
        "add_trials('.', 'SIM-USD', [t])\nopen('out.json', 'w').write(str(t['seed']))\n"
    )
    (tmp_path / "judged.py").write_text(
        "from trading_lib.ledger import comparable_trials\n"
        "open('said.json', 'w').write(str(len(comparable_trials('.', True))))\n"
    )
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    for name in (".gitattributes", ".dvcignore"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "README.md").write_text("")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  try:\n    cmd: python tried.py\n    deps: [tried.py]\n    params: [seed]\n"
        "    metrics: [out.json: {cache: false}]\n  judge:\n    cmd: python judged.py\n"
        "    deps: [ledger, out.json]\n    metrics: [said.json: {cache: false}]\n"
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
    ledgers.gather_ledgers(tmp_path)
    sh("dvc", "repro", "-q")
    assert (tmp_path / "said.json").read_text() == "4" and "up to date" in sh("dvc", "status")
    sh("git", "stash", "-q")
    assert seeds(tmp_path) == {1, 2, 3, 4} and len(lines_of(ledgers.ledger_path(tmp_path, "SIM-USD"))) == 1
