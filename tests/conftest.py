"""Shared fixtures. Real market bars are used where TRADING_LIB_BARS names a folder that holds them; they are not part of the project."""
import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def real_bars_folder() -> Path:
    "Folder with {asset_class}/{timeframe}/{SYMBOL}.parquet; tests that need it are skipped, with the reason, where there is none."
    folder = os.environ.get("TRADING_LIB_BARS")
    if not folder: pytest.skip("TRADING_LIB_BARS is not set: no folder of real market bars here")
    return Path(folder)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    "Small tensors gain nothing from more, and wait for them on a busy machine."
    torch.set_num_threads(1)
