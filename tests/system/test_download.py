"""Downloads from end to end:
the command line, the real client, the cache and the prepare stage, against a server on this computer."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from alpaca_server import AlpacaServer

from trading_lib.bars import fingerprint
from trading_lib.data.simulation import simulate_bars
from trading_lib.env import MarketData
from trading_lib.sources import load_with_report

ROOT = Path(__file__).resolve().parents[2]
COMMAND = str(Path(sys.executable).parent / "trading-lib")
KEY, SECRET = "PK" + "SEEDED" * 3, "sEEded" * 6  # made up, and never written out
START, END = "2022-01-01", "2024-01-01"


@pytest.fixture
def project(tmp_path):
    "A project folder with the notebooks, and no data."
    for name in ("params.yaml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    return tmp_path


def configured(project: Path, symbols: list[str], **data):
    document = yaml.safe_load((project / "params.yaml").read_text())
    document["symbols"] = symbols
    document["data"] |= data
    (project / "params.yaml").write_text(yaml.safe_dump(document))


def environment(server, **more) -> dict:
    return (
        os.environ
        | {
            "APCA_API_KEY_ID": KEY,
            "APCA_API_SECRET_KEY": SECRET,
            "APCA_API_DATA_URL": server.url,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        | more
    )


def run(project: Path, server, *arguments, fails: bool = False, **more) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [COMMAND, *arguments],
        cwd=project,
        env=environment(server, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, (
        f"{arguments} gave {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    )
    return done


def files(folder: Path) -> dict[str, str]:
    "Hash of every file of bars, by its name."
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*.parquet")
    }


MARKET = {"SIMA": "equity", "SIM-USD": "crypto", "SIM2-USD": "crypto"}


def served(until: str, timeframe: str = "15Min") -> dict:
    return {
        (symbol.replace("-", "/"), timeframe): simulate_bars(
            symbol, timeframe, START, until, 0, 0.0, asset_class
        )
        for symbol, asset_class in MARKET.items()
    }


def test_download_fetches_once_and_then_only_what_is_new(project):
    with AlpacaServer(served("2022-03-05"), keys=(KEY, SECRET)) as server:

        def ask(end):
            span = ("--start", START, "--end", end)
            return run(project, server, "data", "download", *MARKET, *span, "--adjustment", "raw").stdout

        first = ask("2022-03-01")
        assert len(server.requests) == 3 and all(f"{symbol}: " in first for symbol in MARKET)
        ask("2022-03-01")
        assert len(server.requests) == 3
        ask("2022-03-02")
        new = server.requests[3:]
        assert len(new) == 3 and all(
            r.query["start"].startswith("2022-03-01T00:00")
            and r.query["end"].startswith("2022-03-01T23:59:59")
            for r in new
        )
        shown = run(project, server, "data", "info").stdout
        assert all(symbol in shown for symbol in MARKET)
        # what was kept is what was served
        for (name, timeframe), bars in server.bars.items():
            got, report = load_with_report(
                name,
                timeframe,
                "alpaca",
                start=START,
                end="2022-03-02",
                cache=project / "data/cache",
                adjustment="raw",
                url=server.url,
            )
            pd.testing.assert_frame_equal(
                got, bars[bars.index < "2022-03-02"], check_freq=False, rtol=0, atol=0
            )
        assert len(server.requests) == 6


def test_the_prepare_stage_downloads_and_no_key_is_written_anywhere(project, monkeypatch):
    "After a run that succeeds and one that is refused: files, executed notebooks, what was printed."

    def clean(done):
        texts = [done.stdout, done.stderr] + [
            p.read_bytes().decode("latin-1") for p in project.rglob("*") if p.is_file()
        ]
        assert not any(secret in text for text in texts for secret in (KEY, SECRET)), "a key was written"

    configured(project, ["SIM-USD"], source="alpaca", start=START, end="2022-03-01")
    with AlpacaServer(served("2022-03-05"), keys=(KEY, SECRET)) as server:
        clean(run(project, server, "stage", "prepare", "--symbol", "SIM-USD"))
        market, bars = MarketData.load(project / "data/SIM-USD_15Min.npz"), server.bars["SIM/USD", "15Min"]
        assert market.fingerprint["sha256"] == fingerprint(bars[bars.index < "2022-03-01"])["sha256"]
        report = (project / "reports/SIM-USD_15Min/data.json").read_text()
        assert (
            '"source": "alpaca"' in report and '"simulated": false' in report and "downloaded" not in report
        )
        configured(project, ["SIM2-USD"])
        refused = run(
            project,
            server,
            "stage",
            "prepare",
            "--symbol",
            "SIM2-USD",
            fails=True,
            APCA_API_SECRET_KEY=SECRET[::-1],
        )
        clean(refused)
        assert (
            SECRET[::-1] not in refused.stdout + refused.stderr
            and "APCA_API_SECRET_KEY" in refused.stderr.splitlines()[-1]
        )
        assert not (project / "data/SIM2-USD_15Min.npz").exists()
        # the search can find: the server has seen the keys
        assert any(SECRET in str(r.headers) for r in server.requests)


def test_stocks_without_keys_and_a_start_that_is_missing_get_one_line(project):
    with AlpacaServer(served("2022-02-01")) as server:
        said = run(
            project,
            server,
            "data",
            "download",
            "SIMA",
            "--start",
            START,
            "--end",
            "2022-02-01",
            fails=True,
            APCA_API_KEY_ID="",
            APCA_API_SECRET_KEY="",
        ).stderr
        assert said.startswith("error: ") and said.count("\n") == 1 and "APCA_API_KEY_ID" in said
        said = run(project, server, "data", "download", "SIMA", fails=True).stderr
        assert (
            said.startswith("error: ")
            and said.count("\n") == 1
            and "data.start" in said
            and server.requests == []
        )


@pytest.mark.proof
def test_twenty_kills_leave_the_files_of_an_undisturbed_download(project):
    """Three symbols × two years of 15Min bars, in pages;
    then nothing is asked for again, and one more day is exactly that day."""
    generator = random.Random(0)
    arguments = ["data", "download", *MARKET, "--start", START, "--adjustment", "raw"]
    with AlpacaServer(served("2024-01-03"), keys=(KEY, SECRET)) as server:
        whole = project / "undisturbed"
        whole.mkdir()
        for name in ("params.yaml", "settings.ini"):
            shutil.copy(project / name, whole / name)
        run(whole, server, *arguments, "--end", END)
        expected, undisturbed = files(whole / "data"), len(server.requests)
        kills, asked = 0, 0
        while kills < 20:  # a download that gets through in spite of all kills is compared, and begun anew
            shutil.rmtree(project / "data", ignore_errors=True)
            begun, code = len(server.requests), -signal.SIGKILL
            while kills < 20 and code == -signal.SIGKILL:
                seen = len(server.requests)
                child = subprocess.Popen(
                    [COMMAND, *arguments, "--end", END],
                    cwd=project,
                    env=environment(server),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                while child.poll() is None and len(server.requests) == seen:
                    time.sleep(0.002)
                time.sleep(0.25 * generator.random())
                child.send_signal(signal.SIGKILL)
                code = child.wait()
                kills += code == -signal.SIGKILL
            killed = len(server.requests)
            run(project, server, *arguments, "--end", END)
            assert files(project / "data") == expected and len(expected) == 3
            asked, finished = asked + killed - begun, len(server.requests)
        run(project, server, *arguments, "--end", END)
        assert len(server.requests) == finished
        run(project, server, *arguments, "--end", "2024-01-02")
        new = [
            (r.query["symbols"], r.query["start"][:16], r.query["end"][:16])
            for r in server.requests[finished:]
        ]
        print(
            "\n"
            f"undisturbed: {undisturbed} requests; {kills} kills during {asked} requests, then "
            f"{finished - killed} more; the same {len(expected)} files, byte for byte; again: 0 "
            f"requests; one more day: {new}"
        )
        assert sorted(new) == sorted(
            (symbol.replace("-", "/"), "2024-01-01T00:00", "2024-01-01T23:59") for symbol in MARKET
        )
