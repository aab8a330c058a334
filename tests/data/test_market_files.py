"Market data files with lies in them: one line that names the file, and nothing in it is executed."

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from trading_lib.config import InputError
from trading_lib.data.simulation import simulate_bars
from trading_lib.env import MarketData, market_data
from trading_lib.features import fit_features

BARS = simulate_bars("SIM-USD", "15Min", "2023-01-01", "2023-01-16", 0, 0.0)
MARKET = market_data(
    BARS, "5.6.0", fit_features(BARS, "5.6.0", "15Min", "crypto"), "15Min", "crypto", 20, "SIM-USD"
)


def members(folder) -> dict[str, np.ndarray]:
    with np.load(MARKET.save(folder / "good.npz"), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def meta(**changes):
    return lambda m: (
        m | {"meta": np.frombuffer(json.dumps(json.loads(m["meta"].tobytes()) | changes).encode(), np.uint8)}
    )


def array(name, change):
    return lambda m: m | {name: change(m[name])}


def without(name):
    return lambda m: {k: v for k, v in m.items() if k != name}


class Runs:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRADING_LIB_MARK"],)


LIES = {
    "pickles": lambda m: m | {"features": np.array([Runs()], object)},
    **{
        f"no {name}": without(name)
        for name in ("meta", "timestamp", "features", "prices", "segment", "can_fill")
    },
    "one member more": lambda m: m | {"more": np.zeros(3)},
    "short times": array("timestamp", lambda a: a[:-1]),
    "times as text": array("timestamp", lambda a: a.astype(str)),
    "times as floats": array("timestamp", np.float64),
    "times backwards": array("timestamp", lambda a: a[::-1]),
    "no bars": lambda m: {
        k: v if k == "meta" else v[:, :0] if k == "prices" else v[:0] for k, v in m.items()
    },
    "one number for all times": array("timestamp", lambda a: a[0]),
    "four prices": array("prices", lambda a: a[:4]),
    "prices on their side": array("prices", lambda a: a.T),
    "halves": array("prices", lambda a: a.astype(np.float16)),
    "NaN in prices": array("prices", lambda a: np.where(a == a.max(), np.nan, a)),
    "a price of zero": array("prices", lambda a: a * (np.arange(5) != 3)[:, None]),
    "complex prices": array("prices", lambda a: a + 1j),
    "a column less": array("features", lambda a: a[:, 1:]),
    "wide features": array("features", np.float64),
    "flags as numbers": array("can_fill", lambda a: a.astype(np.int64)),
    "segments as floats": array("segment", np.float64),
    "volatility of another length": array("volatility", lambda a: np.repeat(a, 2)),
    "structured": array("segment", lambda a: np.zeros(len(a), [("a", "i8")])),
    "a layout that is none": meta(version="9.9.9"),
    "a layout that is a list": meta(version=["5.6.0"]),
    "a window of text": meta(window="20"),
    "a window below one": meta(window=0),
    "a window of true": meta(window=True),
    "a fit that is a list": meta(fit=[1]),
    "a span beyond": meta(stop=10**9),
    "a span backwards": meta(start=50, stop=10),
    "a span of text": meta(start="0"),
    "a class that is none": meta(asset_class="bond"),
    "a symbol that is a number": meta(symbol=5),
    "a field more": meta(more=1),
    "meta that is no JSON": lambda m: m | {"meta": np.frombuffer(b"{", np.uint8)},
    "meta nested deep": lambda m: m | {"meta": np.frombuffer(b"[" * 100_000, np.uint8)},
    "meta that is a list": lambda m: m | {"meta": np.frombuffer(b"[1]", np.uint8)},
    "a bomb": array("features", lambda a: np.zeros((400_000, 2), np.float32)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_market_file_with_a_lie_in_it_gets_one_line(tmp_path, monkeypatch, lie):
    monkeypatch.setenv("TRADING_LIB_MARK", str(tmp_path / "executed"))
    good = members(tmp_path)
    assert MarketData.load(tmp_path / "good.npz").fingerprint == MARKET.fingerprint
    file = tmp_path / "bad.npz"
    np.savez_compressed(file, allow_pickle=True, **LIES[lie](good))
    with pytest.raises(InputError) as e:
        MarketData.load(file)
    said = str(e.value)
    assert (
        said.startswith(f"{file}: ")
        and said.endswith("run the prepare stage again")
        and "\n" not in said
        and len(said) < 500
        and not (tmp_path / "executed").exists()
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"\x93NUMPY",
        os.urandom(2000),
        pickle.dumps({"a": 1}),
        "half",
        "header",
        "folder inside",
    ],
)
def test_what_is_no_market_file_gets_one_line(tmp_path, content):
    members(tmp_path)
    whole, file = (tmp_path / "good.npz").read_bytes(), tmp_path / "bad.npz"
    if content == "half":
        content = whole[: len(whole) // 2]
    if content == "header":  # claims 60,000 times 60,000 numbers
        packed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(packed, "w") as new:
            for name in old.namelist():
                new.writestr(
                    name,
                    old.read(name)
                    if name != "prices.npy"
                    else b"\x93NUMPY\x01\x00v\x00"
                    + b"{'descr': '<f8', 'fortran_order': False, 'shape': (60000, 60000), }".ljust(117)
                    + b"\n",
                )
        content = packed.getvalue()
    if content == "folder inside":
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as new:
            new.writestr("../timestamp.npy", b"x")
        content = packed.getvalue()
    file.write_bytes(content)
    with pytest.raises(InputError, match="run the prepare stage again") as e:
        MarketData.load(file)
    assert "\n" not in str(e.value)
