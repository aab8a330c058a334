"""Shared fixtures. Real market bars are used where TRADING_LIB_BARS names a folder that holds them; they are not part of the project."""

import os
import signal
from pathlib import Path

import pytest
import torch

# a job that a shell has put into the background ignores Ctrl+C, and so would every process that a test starts and interrupts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_bars_folder() -> Path:
    "Folder with {asset_class}/{timeframe}/{SYMBOL}.parquet; tests that need it are skipped, with the reason, where there is none."
    folder = os.environ.get("TRADING_LIB_BARS")
    if not folder:
        pytest.skip("TRADING_LIB_BARS is not set: no folder of real market bars here")
    return Path(folder)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    "Small tensors gain nothing from more, and wait for them on a busy machine."
    torch.set_num_threads(1)
