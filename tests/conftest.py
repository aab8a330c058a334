"""Shared fixtures. Real market bars are used where TRADING_LIB_BARS names a folder that holds them;
they are not part of the project."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

# a job that a shell has put into the background ignores Ctrl+C,
# and so would every process that a test starts and interrupts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_bars_folder() -> Path:
    """Folder with {asset_class}/{timeframe}/{SYMBOL}.parquet;
    tests that need it are skipped, with the reason, where there is none."""
    folder = os.environ.get("TRADING_LIB_BARS")
    if not folder:
        pytest.skip("TRADING_LIB_BARS is not set: no folder of real market bars here")
    return Path(folder)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    "Small tensors gain nothing from more, and wait for them on a busy machine."
    torch.set_num_threads(1)


ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "data.start": "2023-01-01",
    "data.end": "2023-01-20",
    "features.window": 20,
    "train.device": "cpu",
    "train.hidden_dims": [8],
    "train.total_timesteps": 512,
    "train.n_envs": 8,
    "train.n_steps": 32,
}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    "A folder with the project's parameters, for a small simulated market, in which the test stands."
    from test_pipeline import edit

    for name in ("params.yaml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    edit(tmp_path / "params.yaml", **TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path
