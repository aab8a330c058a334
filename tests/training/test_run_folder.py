"""The folder of a run: after a kill at any moment, and with damaged files, there is something whole to go on
from, and nothing else is touched."""

import io
import os
import pickle
import random
import re
import signal
import sys
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from trading_lib.checkpoint import load_checkpoint, save_checkpoint
from trading_lib.config import InputError
from trading_lib.training.run_folder import RunFolder, _glance

NOON = datetime(2026, 1, 31, 12, 0, 0)


def content(update, best_update=None, **fields) -> dict:
    "A state of a run whose weights tell its update."
    return {
        "update": update,
        "best_update": best_update,
        "policy_state_dict": {"actor_head.weight": torch.full((8, 16), float(update))},
        **fields,
    }


def whole(found: dict, update: int) -> bool:
    return found["update"] == update and torch.equal(
        found["policy_state_dict"]["actor_head.weight"], torch.full((8, 16), float(update))
    )


def names(run: RunFolder) -> set[str]:
    return {p.name for p in run.path.iterdir()}


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "SIM-USD")


def newest(run: RunFolder) -> tuple[str, int, list[str]]:
    "Name and update of what a run would go on from, and the lines that were said."
    lines = []
    path, found = run.newest_good(say=lines.append)
    assert all("\n" not in line for line in lines)
    return path.name, found["update"], lines


# --- names and numbers --------------------------------------------------------------------------------------


def test_an_empty_or_missing_folder_holds_nothing(run):
    assert (
        run.newest_good() is None and run.best(3) is None and run.best(None) is None and not run.path.exists()
    )
    run.finished()
    assert not run.path.exists()
    run.path.mkdir(parents=True)
    assert run.newest_good() is None


@pytest.mark.parametrize(
    "update, name",
    [
        (0, "checkpoint_000000.pt"),
        (50, "checkpoint_000050.pt"),
        (999_999, "checkpoint_999999.pt"),
        (1_000_000, "checkpoint_1000000.pt"),
    ],
)
def test_the_update_names_the_file(run, update, name):
    path = run.save(content(update))
    assert path.name == name and whole(load_checkpoint(path), update)
    assert run.save_best(content(update)).name == name.replace("checkpoint", "best") and whole(
        run.best(update), update
    )
    assert newest(run) == (name, update, [])


@pytest.mark.parametrize("update", [None, -1, 1.0, True, "5"])
def test_a_content_without_a_sound_update_is_refused(run, update):
    for save in (run.save, run.save_best, lambda c: run.save_interrupted(c, NOON)):
        with pytest.raises(InputError, match="content\\['update'\\] to be a whole number of 0 or more, was"):
            save(content(0) | {"update": update})
    assert not run.path.exists()


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, None])
def test_keep_is_a_whole_number_of_one_or_more(tmp_path, keep):
    with pytest.raises(InputError, match="keep 1 or more"):
        RunFolder(tmp_path, keep)


def test_an_interrupted_file_never_overwrites_another(run):
    paths = [run.save_interrupted(content(n), NOON) for n in (7, 8, 9)]
    assert [p.name for p in paths] == [
        "model_interrupted_20260131_120000.pt",
        "model_interrupted_20260131_120000_2.pt",
        "model_interrupted_20260131_120000_3.pt",
    ]
    assert [load_checkpoint(p)["update"] for p in paths] == [7, 8, 9]
    assert (
        run.save_interrupted(content(1), datetime(2026, 2, 1, 3, 4, 5, 678, UTC)).name
        == "model_interrupted_20260201_030405.pt"
    )
    assert newest(run) == (paths[2].name, 9, [])


# --- what stays ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_the_last_numbered_ones_stay(tmp_path, keep):
    run = RunFolder(tmp_path, keep)
    for n in range(10, 80, 10):
        run.save(content(n))
        assert names(run) == {f"checkpoint_{m:06d}.pt" for m in range(10, n + 10, 10)[-keep:]}


def test_order_is_by_number_not_by_text(tmp_path):
    run = RunFolder(tmp_path, keep=2)
    for n in (999_998, 999_999, 1_000_000, 1_000_001):
        run.save(content(n))
    assert names(run) == {"checkpoint_1000000.pt", "checkpoint_1000001.pt"} and newest(run)[1] == 1_000_001


def test_saving_again_replaces_the_file_and_counts_once(tmp_path):
    run = RunFolder(tmp_path, keep=2)
    for n in (1, 2, 2, 2):
        run.save(content(n, note=n))
    assert names(run) == {"checkpoint_000001.pt", "checkpoint_000002.pt"}


def test_what_was_just_saved_stays_beside_later_ones_of_a_run_that_was_left(tmp_path):
    """Somebody went back to update 50 with --checkpoint: its checkpoints must not fall to the higher numbers
    that lie there."""
    run = RunFolder(tmp_path, keep=2)
    for n in (300, 400, 500):
        run.save(content(n))
    for n in (60, 70, 80):
        run.save(content(n))
    assert names(run) == {f"checkpoint_{n:06d}.pt" for n in (70, 80, 400, 500)}


def test_interrupted_ones_stay_until_the_run_is_finished(tmp_path):
    run = RunFolder(tmp_path, keep=1)
    stopped = run.save_interrupted(content(3), NOON)
    for n in (10, 20, 30):
        run.save(content(n))
    assert names(run) == {stopped.name, "checkpoint_000030.pt"}


def test_a_best_policy_stays_as_long_as_something_refers_to_it(tmp_path):
    run = RunFolder(tmp_path, keep=2)

    def best():
        return {n for n in names(run) if n.startswith("best")}

    run.save_best(content(5))
    run.save(content(10, 5))
    run.save_best(content(15))
    run.save(content(20, 15))
    assert best() == {"best_000005.pt", "best_000015.pt"}  # 10 is kept and refers to 5
    run.save_best(content(25))
    assert best() == {"best_000005.pt", "best_000015.pt", "best_000025.pt"}
    run.save(content(30, 25))  # 10 is gone, and 5 with it
    assert best() == {"best_000015.pt", "best_000025.pt"}
    stopped = run.save_interrupted(content(35, 25), NOON)
    for n in (40, 50, 60):
        run.save_best(content(n - 2))
        run.save(content(n, n - 2))
    assert best() == {
        "best_000025.pt",
        "best_000048.pt",
        "best_000058.pt",
    }  # the interrupted one still refers to 25
    stopped.unlink()
    run.save(content(70, 58))
    assert best() == {"best_000058.pt"}


def test_the_newest_of_several_bests_between_two_checkpoints_is_enough(tmp_path):
    run = RunFolder(tmp_path)
    run.save_best(content(2))
    run.save(content(4, 2))
    for n in (5, 6, 7):
        run.save_best(content(n, n - 1))
    assert {n for n in names(run) if n.startswith("best")} == {
        "best_000002.pt",
        "best_000006.pt",
        "best_000007.pt",
    }  # 7 came with a content that still named 6
    run.save(content(8, 7))
    assert {n for n in names(run) if n.startswith("best")} == {"best_000002.pt", "best_000007.pt"}


def test_references_are_read_from_files_of_an_earlier_process(tmp_path):
    first = RunFolder(tmp_path)
    first.save_best(content(5))
    first.save(content(10, 5))
    second = RunFolder(tmp_path)
    second.save_best(content(15))
    assert {"best_000005.pt", "best_000015.pt"} <= names(second)


FOREIGN = (
    "checkpoint_000001.pt.bak",
    "checkpoint_1.pt",
    "checkpoint_0000001.pt",
    "my_checkpoint_000001.pt",
    "checkpoint_000001.pth",
    "best_model.pt",
    "best_000001.pt.old",
    "model_interrupted.pt",
    "model_interrupted_20260131_1200.pt",
    "SIM-USD_15Min.pt",
    "notes.md",
    "CHECKPOINT_000001.PT",
    ".other.pt.abcdefgh.tmp",
    "checkpoint_000001\n.pt",
)


def test_nothing_else_is_touched(tmp_path):
    run = RunFolder(tmp_path, keep=1)
    for name in FOREIGN:
        (tmp_path / name).write_text("mine")
    (tmp_path / "best_000001.pt").mkdir()
    (tmp_path / "best_000001.pt" / "a.txt").write_text("mine")
    (tmp_path / "checkpoint_000002.pt").mkdir()
    for n in (3, 4, 5):
        run.save_best(content(n))
        run.save(content(n, n))
    run.save_interrupted(content(6, 5), NOON)
    assert newest(run)[1:] == (6, [])
    run.finished()
    assert (
        names(run) == {*FOREIGN, "best_000001.pt", "checkpoint_000002.pt"}
        and all((tmp_path / n).read_text() == "mine" for n in FOREIGN)
        and (tmp_path / "best_000001.pt" / "a.txt").exists()
    )


def test_a_card_goes_with_its_checkpoint(tmp_path):
    run = RunFolder(tmp_path, keep=1)
    for n in (1, 2):
        for path in (run.save_best(content(n)), run.save(content(n, n))):
            path.with_suffix(".md").write_text("card")
    run.save(content(2, 2))
    assert names(run) == {f"{kind}_000002.{end}" for kind in ("checkpoint", "best") for end in ("pt", "md")}
    run.finished()
    assert names(run) == set()


def test_finished_leaves_nothing_of_its_own_and_is_idempotent(run):
    for n in (1, 2, 3):
        run.save_best(content(n))
        run.save(content(n, n))
    run.save_interrupted(content(3, 3), NOON)
    (run.path / ".checkpoint_000003.pt.x1_y2z3a.tmp").write_text("what a killed writer left")
    (run.path / "model_interrupted_20260131_130000.pt").write_text("damaged")
    run.finished()
    assert names(run) == set()
    run.finished()


# --- which one ----------------------------------------------------------------------------------------------


def test_the_update_decides_between_numbered_and_interrupted(run):
    run.save(content(10))
    stopped = run.save_interrupted(content(17), NOON)
    assert newest(run) == (stopped.name, 17, [])
    run.save(content(20))
    assert newest(run) == ("checkpoint_000020.pt", 20, [])


def test_the_content_decides_not_the_name(run):
    run.save(content(10))
    os.rename(run.save(content(4)), run.path / "checkpoint_000900.pt")
    assert newest(run) == ("checkpoint_000010.pt", 10, [])


@pytest.mark.parametrize("later", [0, 1])
def test_the_later_file_decides_where_updates_are_equal(run, later):
    paths = run.save(content(10)), run.save_interrupted(content(10), NOON)
    for i, path in enumerate(paths):
        os.utime(path, ns=(0, 1_000_000_000 + 1 if i == later else 1_000_000_000))  # a nanosecond
    assert newest(run)[0] == paths[later].name


# --- damage -------------------------------------------------------------------------------------------------


class Bomb:
    "Runs a command where it is unpickled."

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def bomb(witness: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"update": 99, "policy_state_dict": Bomb(witness)}, stream)
    return stream.getvalue()


def packed(data: bytes) -> bytes:
    "The same archive with its pickle compressed, and 50 MB of zeros in it."
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
        new.writestr("archive/data/zeros", bytes(50_000_000))
    return stream.getvalue()


def flipped(data: bytes, bit: int) -> bytes:
    return bytes(b ^ (1 << bit % 8) if i == bit // 8 else b for i, b in enumerate(data))


DAMAGE = {
    "truncated by a byte": lambda data, at: data[:-1],
    "cut in half": lambda data, at: data[: len(data) // 2],
    "empty": lambda data, at: b"",
    "zeros": lambda data, at: bytes(len(data)),
    "a bit of a weight": lambda data, at: flipped(
        data, 8 * data.index(torch.full((4,), 30.0).numpy().tobytes())
    ),
    "a bit of the pickle": lambda data, at: flipped(data, 8 * data.index(b"best_update")),
    "a pickle bomb": lambda data, at: bomb(at / "executed"),
    "a bare pickle": lambda data, at: pickle.dumps({"update": 99}),
    "a zip bomb": lambda data, at: packed(data),
    "text": lambda data, at: b"hello",
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_damaged_newest_one_is_skipped_with_a_line(run, tmp_path, kind, interrupted):
    run.save(content(10))
    run.save(content(20))
    path = run.save_interrupted(content(30), NOON) if interrupted else run.save(content(30))
    path.write_bytes(DAMAGE[kind](path.read_bytes(), tmp_path))
    name, update, lines = newest(run)
    assert (
        (name, update) == ("checkpoint_000020.pt", 20)
        and len(lines) == 1
        and str(path) in lines[0]
        and lines[0].startswith("skipped: ")
    )
    with pytest.raises(InputError) as e:
        load_checkpoint(path)
    assert (
        lines[0] == f"skipped: {e.value}" and not (tmp_path / "executed").exists()
    )  # the cause, in the words of the checkpoint module


def test_what_would_unpack_to_more_than_the_file_is_not_unpacked(run):
    assert _glance(run.save(content(20))) == {"update": 20}  # no best policy yet
    path = run.save(content(30, 20))
    assert _glance(path) == {"update": 30, "best_update": 20}
    path.write_bytes(packed(path.read_bytes()))
    assert path.stat().st_size < 100_000 and _glance(path) == {}


def test_every_damaged_one_is_named_and_all_damaged_is_nothing(run):
    for n in (10, 20, 30):
        path = run.save(content(n))
        path.write_bytes(path.read_bytes()[:-1])
    lines = []
    assert run.newest_good(say=lines.append) is None
    assert sorted(re.search(r"checkpoint_0000(\d\d)\.pt: is truncated", line)[1] for line in lines) == [
        "10",
        "20",
        "30",
    ]


def test_a_whole_file_without_an_update_is_skipped_with_a_line(run):
    run.save(content(10))
    path = save_checkpoint({"policy_state_dict": {}}, run.path / "checkpoint_000020.pt")
    name, _, lines = newest(run)
    assert name == "checkpoint_000010.pt" and lines == [
        f"skipped: {path}: does not say which update it is of; expected the checkpoint of a training run"
    ]


def test_lines_are_printed_where_nobody_listens(run, capsys):
    run.save(content(10))
    run.save(content(20)).write_bytes(b"x")
    assert run.newest_good()[1]["update"] == 10
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "checkpoint_000020.pt" in said


def test_a_damaged_best_policy_is_none_with_a_line(run):
    path, lines = run.save_best(content(5)), []
    assert whole(run.best(5, lines.append), 5) and run.best(6, lines.append) is None and lines == []
    path.write_bytes(path.read_bytes()[:-1])
    assert run.best(5, lines.append) is None and len(lines) == 1 and f"{path}: is truncated" in lines[0]


def test_a_damaged_one_does_not_hold_a_best_policy(run):
    "Nobody can go on from it."
    run.save_best(content(5))
    run.save(content(10, 5)).write_bytes(b"x")
    run.save_best(content(15))
    assert {n for n in names(run) if n.startswith("best")} == {"best_000015.pt"}


# --- reading no more than needed ----------------------------------------------------------------------------


def bytes_read() -> int:
    return next(
        int(line.split()[1])
        for line in Path("/proc/self/io").read_text().splitlines()
        if line.startswith("rchar")
    )


@pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="the system does not count what a process reads"
)
def test_one_file_is_read_of_four_and_none_to_tidy_up(run):
    def big(n):
        return content(n, None) | {"policy_state_dict": {"w": torch.full((1_000_000,), float(n))}}  # 4 MB

    for n in (1, 2, 3):
        run.save(big(n))
    run.save_interrupted(big(2), NOON)
    start = bytes_read()
    assert run.newest_good()[1]["update"] == 3
    found = bytes_read()
    run.save_best(big(4))
    tidied = bytes_read()
    assert 4_000_000 < found - start < 5_000_000 and tidied - found < 1_000_000


# --- kill -9 ------------------------------------------------------------------------------------------------


def live(path: Path, acknowledged: int, until: int = 10**9):
    """A run in a process of its own: goes on from what there is, validates now and then, saves, and tells
    what is safe."""
    run = RunFolder(path, keep=2)
    found = run.newest_good(say=lambda line: os._exit(3))
    update, best = (found[1]["update"], found[1]["best_update"]) if found else (0, None)
    while update < until:
        update += 1
        if update % 3 == 1:
            best = update
            run.save_best(content(update, best))
        if update % 7 == 0:
            run.save_interrupted(content(update, best), datetime(2026, 1, 1, 0, 0, update % 60))
        run.save(content(update, best))
        os.write(acknowledged, f"{update}\n".encode())


def in_a_child(work) -> tuple[int, int]:
    """Process id of a child that does `work(pipe)`, and the end of the pipe at which to read which updates
    are safe."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            work(writing)
            os._exit(0)
        except BaseException:
            os._exit(4)
    os.close(writing)
    return child, reading


def the_end(child: int, reading: int) -> tuple[int, int]:
    "Exit status and the last update that was safe, 0 where none was told."
    with os.fdopen(reading) as pipe:
        told = pipe.read().split()
    return os.waitpid(child, 0)[1], int(told[-1]) if told else 0


def is_resumable(run: RunFolder, safe: int) -> int:
    """What is found is whole, as new as what was safe, and has the best policy that belongs to it; returns
    its update."""
    found = run.newest_good(say=pytest.fail)
    if found is None:
        assert safe == 0
        return 0
    update, best = found[1]["update"], found[1]["best_update"]
    assert (
        safe <= update
        and whole(found[1], update)
        and best == update - (update - 1) % 3
        and whole(run.best(best, say=pytest.fail), best)
    )
    return update


def is_caught_saving(child: int, is_half_written) -> bool:
    "Hold the process still and look. Chance alone meets no save where writing is short beside the syncs."
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    caught = is_half_written()
    if not caught:
        os.kill(child, signal.SIGCONT)
    return caught


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_any_moment_leaves_a_run_to_go_on_from(tmp_path):
    run, generator, safe, torn = RunFolder(tmp_path), random.Random(0), 0, 0
    for kill in range(40):
        earlier = set(tmp_path.glob(".*.tmp"))  # of those killed before; they go with the finished run

        def is_half_written(earlier=earlier):
            return not earlier.issuperset(tmp_path.glob(".*.tmp"))

        child, reading = in_a_child(lambda pipe: live(tmp_path, pipe))
        first = int(os.read(reading, 100).split()[-1])
        time.sleep(generator.uniform(0, 0.03))
        if kill % 4 == 0:  # ten of the forty in the middle of a save for certain
            while not is_caught_saving(child, is_half_written):
                time.sleep(generator.uniform(0, 0.001))
        os.kill(child, signal.SIGKILL)
        status, told = the_end(child, reading)
        assert status == signal.SIGKILL
        torn += is_half_written()
        safe = is_resumable(run, max(safe, first, told))
    assert safe >= 40 and torn >= 10  # there was life between the kills, and a quarter of them cut a save
    assert len(list(tmp_path.glob("checkpoint_*.pt"))) <= 3  # one too many at most
    print(f"40 kills, {safe} updates, {torn} of them in the middle of a save")
    run.finished()
    assert names(run) == set()


def kill_at(n: int):
    "Let this process kill itself just before its n-th look at or change of a file in the folder."
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in (
            "open",
            "os.rename",
            "os.remove",
            "os.chmod",
            "os.mkdir",
            "os.listdir",
            "os.scandir",
            "tempfile.mkstemp",
        ):
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def copied(run: RunFolder, folder: Path) -> Path:
    "The folder with the same files; nothing ever writes into a file that is there, so links will do."
    folder.mkdir()
    for path in run.path.iterdir():
        os.link(path, folder / path.name)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("start, until", [(0, 2), (6, 7)])
def test_kill_before_every_single_file_operation(tmp_path, start, until):
    """Updates that save a best policy, numbered ones, and the last an interrupted state too; one process for
    each place at which it dies."""
    source, n, killed = RunFolder(tmp_path / "source", keep=2), 1, 0
    source.path.mkdir()
    if start:
        assert the_end(*in_a_child(lambda pipe: live(source.path, pipe, start))) == (0, start)
    while True:
        folder = copied(source, tmp_path / str(n))

        def die(pipe, n=n, folder=folder):
            kill_at(n)
            live(folder, pipe, until)

        status, told = the_end(*in_a_child(die))
        assert status in (0, signal.SIGKILL) and is_resumable(RunFolder(folder), max(start, told)) >= start
        if status == 0:
            break
        n, killed = n + 1, killed + 1
    assert killed > 20 and is_resumable(RunFolder(folder), until) == until
    print(f"{killed} places to die")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_while_tidying_up_leaves_something_whole_or_nothing(tmp_path):
    source, n, left = RunFolder(tmp_path / "source"), 1, []
    for update in range(1, 6):
        if update % 3 == 1:
            source.save_best(content(update, update))
        source.save(content(update, update - (update - 1) % 3))
    source.save_interrupted(content(4, 4), NOON)
    while True:
        folder = copied(source, tmp_path / str(n))

        def die(pipe, n=n, folder=folder):
            kill_at(n)
            RunFolder(folder).finished()

        status, _ = the_end(*in_a_child(die))
        assert status in (0, signal.SIGKILL)
        if status == 0:
            break
        left.append(is_resumable(RunFolder(folder), 0))
        n += 1
    assert (
        set(left) == {5, 0} and left == sorted(left, reverse=True) and names(RunFolder(folder)) == set()
    )  # the newest one until the last moment
