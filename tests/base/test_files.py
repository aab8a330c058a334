"Outputs that cannot be written: one line that names the file, and nothing of what was there is lost."

import os
import resource
import signal
import stat

import pytest

from trading_lib.bars import read_bars, write_bars
from trading_lib.cli import main
from trading_lib.config import InputError
from trading_lib.data.simulation import simulate_bars
from trading_lib.files import atomic_write
from trading_lib.sources import load_bars

BARS = simulate_bars("SIM-USD", "15Min", "2023-01-01", "2023-01-11", 0, 0.0)


def in_a_child(act) -> str:
    "What it says to a pipe, of a process whose limits are its own."
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, str(act()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    said = os.read(reader, 10_000).decode()
    os.close(reader), os.waitpid(child, 0)
    return said


def a_full_disk(path):
    "A limit on the size of files stands for it."

    def act():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            return atomic_write(path, b"x" * 5000)
        except InputError as e:
            return e

    return in_a_child(act)


def a_closed_folder(path):
    def act():
        if os.geteuid() == 0:
            os.setuid(65534)  # nothing is closed to root
        try:
            return atomic_write(path, b"new")
        except InputError as e:
            return e

    for folder in path.parents[:3]:
        folder.chmod(stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
    return in_a_child(act)


def raised(path):
    with pytest.raises(OSError) as e:
        atomic_write(path, "new")  # for those who can go on without the file
    assert isinstance(e.value, InputError)
    return str(e.value)


PLACES = {  # how it fails, words of the line
    "a folder": (lambda file: raised(file.parent), "it is a folder; name a file in it"),
    "the folder above": (lambda file: raised(file.parent / ".."), "it is a folder"),
    "a file as a folder": (lambda file: raised(file / "b.txt"), "a file stands where its folder should be"),
    "a file far above": (
        lambda file: raised(file / "b" / "c" / "d.txt"),
        "a file stands where its folder should be",
    ),
    "a name that is too long": (lambda file: raised(file.parent / ("n" * 300)), "File name too long"),
    "a full disk": (a_full_disk, "make room, or choose another place; what was there before is kept"),
    "a closed folder": (a_closed_folder, "check the permissions"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_cannot_be_written_is_one_line_and_loses_nothing(tmp_path, place):
    file = atomic_write(tmp_path / "kept" / "a.txt", "old")
    act, words = PLACES[place]
    said = act(file)
    assert str(file.parent) in said and "cannot be written (" in said and words in said and "\n" not in said
    assert file.read_text() == "old" and [p.name for p in file.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "out, words",
    [
        ("..", "ends with .parquet or .csv"),
        ("file/x.parquet", "a file stands where its folder should be"),
        ("here.parquet", "it is a folder"),
        ("x.txt", "ends with .parquet or .csv"),
        ("x", "ends with .parquet or .csv"),
    ],
)
def test_simulated_bars_are_written_or_one_line_is(tmp_path, monkeypatch, capsys, out, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept"), (tmp_path / "here.parquet").mkdir()
    assert main(["data", "simulate", "SIM-USD", out, "--end", "2022-01-05"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith(f"error: {out}: ")
        and words in said
        and said.count("\n") == 1
        and (tmp_path / "file").read_text() == "kept"
    )


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, capsys):
    file = write_bars(BARS, tmp_path / "SIM-USD.parquet")
    assert main(["data", "check", str(file), "--out", str(file)]) == 2
    assert "a file stands where its folder should be" in capsys.readouterr().err
    (tmp_path / "out" / "SIM-USD_15Min.png").mkdir(parents=True)
    assert main(["data", "check", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "SIM-USD_15Min.png: cannot be written (Is a directory)" in capsys.readouterr().err


def test_a_csv_that_was_asked_for_is_a_csv_and_holds_the_same_bars(tmp_path):
    assert (
        main(
            [
                "data",
                "simulate",
                "SIM-USD",
                str(tmp_path / "SIM-USD.csv"),
                "--start",
                "2023-01-01",
                "--end",
                "2023-01-11",
            ]
        )
        == 0
    )
    assert (
        (tmp_path / "SIM-USD.csv")
        .read_text()
        .startswith("timestamp,open,high,low,close,volume\n2023-01-01T00:00:00Z,")
    )
    assert load_bars("SIM-USD", "15Min", "files", path=tmp_path / "SIM-USD.csv").equals(
        BARS
    )  # to the last digit
    assert read_bars(write_bars(BARS, tmp_path / "b.parquet")).equals(BARS)
