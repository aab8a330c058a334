"""Checkpoints: whole or not at all, verified to the bit, never run."""

import hashlib
import io
import os
import pickle
import random
import re
import subprocess
import sys
import textwrap
import warnings
import zipfile
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from trading_lib import checkpoint as C
from trading_lib.config import InputError
from trading_lib.policy import archive
from trading_lib.version import get_checkpoint_metadata


def small(**fields) -> dict:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "trunk.0.weight": torch.randn(4, 58, generator=generator),
        "trunk.0.bias": torch.zeros(4),
        "actor_head.weight": torch.randn(8, 4, generator=generator),
        "critic_head.weight": torch.randn(1, 4, generator=generator),
        "input_shift": torch.zeros(58),
    }
    return {
        "policy_state_dict": weights,
        "global_step": 7,
        "config": {"hidden_dims": [4], "learning_rate": 3e-4, "nothing": None},
        **get_checkpoint_metadata(window=1),
        **fields,
    }


@pytest.fixture
def saved(tmp_path) -> Path:
    return C.save_checkpoint(small(), tmp_path / "model.pt")


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# --- what goes in comes out ---


def test_round_trip_of_every_plain_kind(tmp_path):
    content = small(
        rng={
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.default_rng(3).bit_generator.state,
        },
        text="é",
        raw=b"\0\xff",
        empty=[{}, (), []],
        numbers=[1, -(2**100), 0.1, float("inf"), True, None],
        keys={1: "a", None: "b", "1": "c"},
        kinds=[
            torch.arange(3),
            torch.ones(2, dtype=torch.bfloat16),
            torch.tensor(5),
            torch.zeros(0),
            torch.tensor([True]),
        ],
    )
    path = C.save_checkpoint(content, tmp_path / "model.pt")
    assert same(content, C.load_checkpoint(path)) and same(content, torch.load(path, weights_only=True))
    random.setstate(C.load_checkpoint(path)["rng"]["python"])
    np.random.default_rng().bit_generator.state = C.load_checkpoint(path)["rng"]["numpy"]


def test_optimizer_and_module_state_load_back(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    path = C.save_checkpoint(
        {"policy_state_dict": net.state_dict(), "optimizer_state_dict": [optimizer.state_dict()]},
        tmp_path / "m.pt",
    )
    loaded = C.load_checkpoint(path)
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    other.load_state_dict(loaded["policy_state_dict"])
    torch.optim.Adam(other.parameters()).load_state_dict(loaded["optimizer_state_dict"][0])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    assert same(loaded["optimizer_state_dict"][0], optimizer.state_dict())


Point = namedtuple("Point", "x y")


@dataclass
class Config:
    width: int = 3


@pytest.mark.parametrize(
    "value, words",
    [
        (np.arange(3), "numpy.ndarray.*torch.from_numpy"),
        (np.float64(1.0), r"numpy.float64.*x.item\(\)"),
        (np.random.RandomState(0).get_state(), r"\['odd'\]\[0\]\[1\] is a numpy.ndarray"),
        (Path("x"), "PosixPath.*str"),
        ({1, 2}, "set.*sorted"),
        (Config(), "asdict"),
        (Point(1, 2), "Point"),
        (torch.float32, "torch.dtype"),
        (torch.device("cpu"), "torch.device"),
        (print, "builtin_function"),
        ({(1, 2): 3}, r"the key"),
        (torch.eye(2).to_sparse(), "Tensor"),
        (torch.__version__, "TorchVersion"),
    ],
)
def test_what_could_not_be_read_back_is_refused_by_name(tmp_path, value, words):
    with pytest.raises(InputError, match=words) as e:
        C.save_checkpoint(small(odd=[value]), tmp_path / "model.pt")
    assert "content['odd'][0]" in str(e.value) and list(tmp_path.iterdir()) == []


def test_content_that_contains_itself_is_refused(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(InputError, match="contain itself"):
        C.save_checkpoint({"a": loop}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="expected a dictionary"):
        C.save_checkpoint([1], tmp_path / "model.pt")
    with pytest.raises(InputError, match="is a folder"):
        C.save_checkpoint(small(), tmp_path)


def test_bytes_depend_on_the_content_alone(tmp_path):
    symbol = "SIM-USD"
    a = C.save_checkpoint(small(symbols=[symbol, symbol]), tmp_path / "a.pt").read_bytes()
    assert (
        a
        == C.save_checkpoint(
            small(symbols=[symbol, symbol]), tmp_path / "folder" / "another-name.pt"
        ).read_bytes()
    )
    # which objects are shared, in what wrapper, and whether a tensor is a view, is not content
    half, text = 3e-4, "".join(["hid", "den_dims"])
    content = small()
    content["symbols"] = ["".join(["SIM", "-USD"]) for _ in range(2)]  # equal, but two objects
    content["config"] = OrderedDict([(text, list([4])), ("learning_rate", half), ("nothing", None)])
    big = torch.cat([content["policy_state_dict"]["trunk.0.bias"], torch.ones(1000)])
    content["policy_state_dict"]["trunk.0.bias"] = torch.nn.Parameter(big[:4])
    content["policy_state_dict"]["actor_head.weight"] = (
        content["policy_state_dict"]["actor_head.weight"].t().contiguous().t()
    )
    assert a == C.save_checkpoint(content, tmp_path / "b.pt").read_bytes()
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import test_checkpoint
content = test_checkpoint.small(symbols=["SIM-USD"] * 2)
test_checkpoint.C.save_checkpoint(content, sys.argv[2])
"""
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "c.pt")]
    subprocess.run(command, check=True)
    assert a == (tmp_path / "c.pt").read_bytes()
    assert a != C.save_checkpoint(small(global_step=8), tmp_path / "a.pt").read_bytes()


# --- damage ---


def refused(path: Path, data: bytes) -> str:
    "The message that the damaged file gets."
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError) as e:
            C.load_checkpoint(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def test_every_bit_flip_is_detected(saved, tmp_path):
    data, generator = saved.read_bytes(), random.Random(0)
    size = len(data)
    places = (
        {generator.randrange(8 * size) for _ in range(500)}
        | {8 * (size - 1 - i) + b for i in range(100) for b in (0, 5, 7)}
        | {8 * i for i in range(64)}
    )
    for bit in places:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(tmp_path / "flipped.pt", bytes(flipped))
    assert len(places) > 800
    print(f"bit flips: {len(places)} of {len(places)} detected")


def test_plain_torch_would_not_notice(saved, tmp_path):
    "Shows that the test above can fail: without the digest most flips are read as numbers."
    data, generator, unnoticed = saved.read_bytes(), random.Random(0), 0
    for _ in range(50):
        flipped = bytearray(data)
        flipped[generator.randrange(len(data))] ^= 1
        try:
            torch.load(io.BytesIO(bytes(flipped)), weights_only=True)
        except Exception:
            continue
        unnoticed += 1
    assert unnoticed > 25


def test_every_truncation_and_addition_is_detected(saved, tmp_path):
    data, generator = saved.read_bytes(), random.Random(1)
    lengths = (
        {generator.randrange(len(data)) for _ in range(50)}
        | {len(data) - i for i in range(1, 100)}
        | set(range(10))
    )
    for keep in lengths:
        refused(tmp_path / "short.pt", data[:keep])
    print(f"truncations: {len(lengths)} of {len(lengths)} detected")
    for extra in (b"\0", b"\n", data, b"x" * 93):
        refused(tmp_path / "long.pt", data + extra)


def test_a_changed_number_with_matching_zip_checksums_is_detected(saved, tmp_path):
    "A zip tool that rewrites a record keeps the archive valid, not the digest."
    buffer = io.BytesIO()
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(buffer, "w") as new:
        for record in old.infolist():
            new.writestr(
                record.filename,
                old.read(record).replace(b"\0\0\0\0", b"\0\0\0\1")
                if "/data/" in record.filename
                else old.read(record),
            )
        new.comment = old.comment
    assert "corrupted" in refused(tmp_path / "edited.pt", buffer.getvalue())


def zipped(**records) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name, data in records.items():
            z.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda d: b"", "is empty"),
        (lambda d: d[: len(d) // 2], "truncated or corrupted"),
        (lambda d: b"timestamp,open,high\n" * 9, "not a checkpoint"),
        (lambda d: pickle.dumps({"a": 1}), "bare pickle"),
        (lambda d: (20).to_bytes(8, "little") + b'{"a": {}}' + b" " * 99, "safetensors"),
        (lambda d: zipped(readme="hello"), "not a torch file"),
        (lambda d: d[:500] + b"\1\2" + d[502:], "corrupted"),
    ],
)
def test_broken_and_foreign_files_get_a_clear_error(saved, tmp_path, make, words):
    message = refused(tmp_path / "broken.pt", make(saved.read_bytes()))
    assert words in message
    print(message.rsplit("/", 1)[1])


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(InputError, match="none.pt: no such file; train a model first"):
        C.load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(InputError, match="is a folder"):
        C.load_checkpoint(tmp_path)


def test_future_versions_are_refused(tmp_path):
    path = C.save_checkpoint(small(model_version="5.10.0"), tmp_path / "m.pt")
    with pytest.raises(
        InputError, match="m.pt: model version 5.10.0 is newer than this library's 5.6.0; update trading_lib"
    ):
        C.load_checkpoint(path)


def test_files_without_a_digest(tmp_path):
    torch.save({"policy_state_dict": small()["policy_state_dict"]}, tmp_path / "old.pt")
    with pytest.warns(UserWarning, match="old.pt: carries no SHA-256"):
        assert "policy_state_dict" in C.load_checkpoint(tmp_path / "old.pt")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="without policy_state_dict"):
        C.load_checkpoint(tmp_path / "other.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(InputError, match="holds a Tensor"):
        C.load_checkpoint(tmp_path / "tensor.pt")
    torch.save({"policy_state_dict": {}, "config": Config()}, tmp_path / "pickled.pt")
    with pytest.raises(InputError, match="it holds 'test_checkpoint.Config', which is not plain data"):
        C.load_checkpoint(tmp_path / "pickled.pt")


# --- hostile files ---


def sign(data: bytes) -> bytes:
    "The digest is no secret: whoever makes a file can add it."
    data = data[:-2] + archive._COMMENT_SIZE.to_bytes(2, "little")
    return data + b"sha256:" + hashlib.sha256(data).hexdigest().encode()


def with_pickle(code: bytes, **more) -> bytes:
    return zipped(
        **{"archive__data.pkl": code, "archive__version": b"3\n", "archive__byteorder": b"little", **more}
    )


class Reduce:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_pickles(mark: Path) -> dict[str, bytes]:
    "Pickles that leave a mark when they are run."
    run, code = f"touch {mark}", f"open({str(mark)!r}, 'w')"

    class State:
        def __reduce__(self):
            return OrderedDict, (), {"x": Reduce(os.system, run)}

    return {
        "os.system": pickle.dumps({"policy_state_dict": Reduce(os.system, run)}, 2),
        "eval": pickle.dumps(Reduce(eval, code), 2),
        "exec in a list": pickle.dumps([1, [Reduce(exec, code)]], 2),
        "protocol 0": f"cos\nsystem\n(S'{run}'\ntR.".encode(),
        "inst": f"(S'{run}'\nios\nsystem\n.".encode(),
        "obj": b"(cos\nsystem\nV" + run.encode() + b"\no.",
        "inside a state": pickle.dumps(State(), 2),
        "subprocess": pickle.dumps(Reduce(subprocess.call, ["touch", str(mark)]), 2),
        "protocol 4": pickle.dumps(Reduce(os.system, run), 4),
        "inside an allowed rebuild": b"\x80\x02ctorch._utils\n_rebuild_parameter\n"
        + pickle.dumps(Reduce(os.system, run), 2)[2:-1]
        + b"\x89N\x87R.",
    }


NAMES = list(hostile_pickles(Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_hostile_pickles_run_nothing(tmp_path, name):
    mark = tmp_path / "mark"
    code = hostile_pickles(mark)[name]
    files = (sign(with_pickle(code)), with_pickle(code), code)
    for data in files:
        message = refused(tmp_path / "hostile.pt", data)
        assert (
            not mark.exists()
            and ("refused without running anything" in message or "not a checkpoint" in message)
            and "weights_only" not in message
        )
        if data is files[0]:
            print(f"{name:26} {message.rsplit('/', 1)[1]}")
    # it is a real threat: an ordinary unpickler runs it
    try:
        pickle.loads(code)
    except Exception:
        pass
    assert mark.exists()


def test_hostile_pickles_run_nothing_under_torchs_override(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = tmp_path / "mark"
    refused(tmp_path / "hostile.pt", sign(with_pickle(hostile_pickles(mark)["os.system"])))
    assert not mark.exists()


def test_archives_that_unpack_to_more_than_they_are(saved, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        with zipfile.ZipFile(saved) as old:
            for record in old.infolist():
                z.writestr(record.filename, old.read(record))
        z.writestr("archive/data/99", bytes(50_000_000))
    assert (
        len(buffer.getvalue()) < 100_000
        and "compressed" in refused(tmp_path / "bomb.pt", buffer.getvalue())
        and "compressed" in refused(tmp_path / "bomb.pt", sign(buffer.getvalue()))
    )
    # compressed at all, though small
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", b"\x80\x02}.")
    assert "compressed" in refused(tmp_path / "small.pt", sign(buffer.getvalue()))
    # a tensor of a billion numbers over one
    buffer = io.BytesIO()
    torch.save({"policy_state_dict": {"w": torch.zeros(1).expand(1_000_000_000)}}, buffer)
    assert "claims 4,000,000,000 bytes" in refused(tmp_path / "wide.pt", sign(buffer.getvalue()))


def test_nested_lists_that_share_themselves_take_no_time(tmp_path):
    nested = []
    for _ in range(60):
        nested = [nested, nested]  # 2^60 paths, 60 objects
    buffer = io.BytesIO()
    torch.save({"policy_state_dict": {}, "nested": nested}, buffer)
    (tmp_path / "m.pt").write_bytes(sign(buffer.getvalue()))
    assert len(C.load_checkpoint(tmp_path / "m.pt")["nested"]) == 2


def test_an_unsafe_torch_is_refused(saved, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(InputError, match="install torch 2.10.0 or newer"):
        C.load_checkpoint(saved)


# --- kill during save ---

KILLER = """
import os, random, signal, sys, time, warnings
import torch
from trading_lib.checkpoint import load_checkpoint, save_checkpoint
path, kills, plain = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "plain"
torch.set_num_threads(1)
def content(step):
    weights = {str(i): torch.full((65536,), float(step)) for i in range(8)}
    return {"policy_state_dict": weights, "global_step": step}
save = (lambda content, path: torch.save(content, path)) if plain else save_checkpoint
generator, good, newest = random.Random(0), 0, 0
save(content(0), path)
for kill in range(kills):
    child = os.fork()
    if child == 0:
        step = newest
        while True:
            step += 1
            save(content(step), path)
    time.sleep(0.02 + 0.1 * generator.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try: loaded = torch.load(path, weights_only=True) if plain else load_checkpoint(path)
    except Exception: save(content(newest), path); continue
    step, tensors = loaded["global_step"], loaded["policy_state_dict"].values()
    good += all(bool((t == step).all()) for t in tensors) and step >= newest
    newest = step
print(good, newest)
"""


def survived(folder: Path, kills: int, how: str) -> tuple[int, int]:
    """Kills after which a complete checkpoint, not older than before, loads.

    And the number of saves that got through.
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), str(folder / f"{how}.pt"), str(kills), how],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return tuple(map(int, result.stdout.split()))


@pytest.mark.slow
def test_a_kill_during_a_save_leaves_a_good_file(tmp_path):
    good, saves = survived(tmp_path, 12, "ours")
    assert good == 12 and saves > 0
    assert survived(tmp_path, 12, "plain")[0] < 12  # the same kills with a plain torch.save


@pytest.mark.proof
def test_a_hundred_kills_during_saves(tmp_path):
    good, saves = survived(tmp_path, 100, "ours")
    print(f"\nkills during a save: a good file after {good} of 100, {saves} saves got through")
    assert good == 100


def test_a_failing_write_leaves_the_old_file_and_no_litter(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(os, name, full)
            with pytest.raises(OSError):
                C.save_checkpoint(small(global_step=8), saved)
        assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == ["model.pt"]


# --- provenance, inspect, compare ---


def test_git_state(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
        )

    assert C.git_state(tmp_path) == {"commit": None, "dirty": None}
    git("init")
    assert C.git_state(tmp_path) == {"commit": None, "dirty": None}  # no commit yet
    for name in ("trading_lib/a.py", "nbs/a.ipynb", "params.yaml", "settings.ini", "dvc.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    state = C.git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "dvc.lock").write_text("2")  # a pipeline rewrites it while it runs
    assert C.git_state(tmp_path) == state
    for name in ("params.yaml", "trading_lib/new.py"):
        (tmp_path / name).write_text("2")
        assert C.git_state(tmp_path) == {**state, "dirty": True}
        with monkeypatch.context() as m:
            m.chdir(tmp_path / "nbs")  # where notebooks run
            assert C.git_state() == {**state, "dirty": True}
        git("add", ".")
        git("commit", "-m", "more")
        state = C.git_state(tmp_path)


def test_git_state_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert C.git_state(tmp_path) == {"commit": None, "dirty": None}


def test_library_versions_are_plain_text(tmp_path):
    versions = C.library_versions()
    assert versions["torch"] == torch.__version__ and versions["numpy"] == np.__version__
    C.save_checkpoint({"libraries": versions, "git": C.git_state()}, tmp_path / "m.pt")


def test_inspect_counts_what_is_trained(tmp_path):
    path = C.save_checkpoint(
        small(data={"symbol": "BTC-USD", "timeframe": "15Min", "sha256": "x"}, metrics={"sharpe": 1.0}),
        tmp_path / "m.pt",
    )
    facts = C.inspect_checkpoint(path)
    assert facts["parameters"] == 4 * 58 + 4 + 8 * 4 + 4  # not the 58 numbers of input_shift
    assert (facts["hidden_dims"], facts["obs_dim"], facts["n_actions"], facts["model_version"]) == (
        [4],
        58,
        8,
        "5.6.0",
    )
    assert (facts["symbol"], facts["timeframe"], facts["global_step"], facts["metrics"], facts["bytes"]) == (
        "BTC-USD",
        "15Min",
        7,
        {"sharpe": 1.0},
        path.stat().st_size,
    )


@pytest.mark.parametrize("shared", [True, False])
def test_inspect_the_real_network(tmp_path, shared):
    networks = pytest.importorskip("trading_lib.networks")
    policy = networks.NativeActorCritic(580, 8, (16, 8), shared_trunk=shared)
    facts = C.inspect_checkpoint(
        C.save_checkpoint({"policy_state_dict": policy.state_dict()}, tmp_path / "m.pt")
    )
    assert (
        facts["hidden_dims"] == [16, 8]
        and facts["parameters"] == sum(p.numel() for p in policy.parameters())
        and facts["model_version"] is None
    )


def test_compare(saved, tmp_path):
    other = small(global_step=9)
    other["policy_state_dict"]["critic_head.weight"][0, 0] += 0.25
    comparison = C.compare_checkpoints(saved, C.save_checkpoint(other, tmp_path / "b.pt"))
    assert comparison.differences == {
        "global_step": (7, 9),
        "largest change of a weight": (0.0, pytest.approx(0.25)),
    }
    assert any(line.startswith("* global_step") for line in str(comparison).splitlines()) and any(
        line.startswith("  model_version") for line in str(comparison).splitlines()
    )
    assert C.compare_checkpoints(saved, saved).differences == {}
    wider = small()
    wider["policy_state_dict"]["trunk.0.weight"] = torch.zeros(5, 58)
    comparison = C.compare_checkpoints(saved, C.save_checkpoint(wider, tmp_path / "c.pt"))
    assert (
        comparison.differences["hidden_dims"] == ([4], [5]) and "largest change of a weight" not in comparison
    )


# --- files that say what cannot be ---


def signed_file(content) -> bytes:
    "As somebody would write it who does not ask `save_checkpoint`; the digest is right."
    buffer, limit = io.BytesIO(), sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    try:
        torch.save(content, buffer)
    finally:
        sys.setrecursionlimit(limit)
    return sign(buffer.getvalue())


def fitted(**changes) -> dict:
    "A fitted state as `FeatureFit.to_state` gives it, of 58 columns."
    chains = {
        "means": [[-1.0, 0.0, 1.0]] * 4,
        "variances": [[0.1, 0.2, 0.3]] * 4,
        "transitions": [[[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]]] * 4,
    }
    fit = {
        "version": "5.6.0",
        "chains": chains | {name: v for name, v in changes.items() if name in chains},
        "shift": [0.0] * 58,
        "scale": [2.0] * 58,
    }
    return fit | {name: v for name, v in changes.items() if name not in chains}


def first(values, value):
    "The same, but for the first number."
    return [value, *values[1:]]


ROWS = [[0.1, 0.2, 0.3]] * 3
LIES = {
    "NaN shift": (
        fitted(shift=first([0.0] * 58, float("nan"))),
        r"content\['fit'\]\['shift'\]\[0\] holds NaN",
    ),
    "infinite scale": (
        fitted(scale=first([1.0] * 58, float("inf"))),
        r"\['scale'\]\[0\] holds NaN or infinity",
    ),
    "negative scale": (
        fitted(scale=first([1.0] * 58, -1.0)),
        r"\['scale'\]: expected numbers from 1e-15.*such as \[-1.0\]",
    ),
    "scale 0": (fitted(scale=first([1.0] * 58, 0.0)), "scale"),
    "scale 1e300": (fitted(scale=first([1.0] * 58, 1e300)), r"\[1e\+300\]"),
    "shift of a googol": (fitted(shift=first([0.0] * 58, 10**400)), "shift"),
    "words": (fitted(shift=["much"] * 58), "expected numbers"),
    "one number": (fitted(scale=1.0), "expected a list"),
    "another kind": (fitted(chains=[1.0]), "expected a table"),
    "NaN means": (
        fitted(means=[[float("nan"), 0.0, 1.0]] * 4),
        r"\['chains'\]\['means'\]\[0\]\[0\] holds NaN",
    ),
    "negative variance": (fitted(variances=[[-0.1, 0.2, 0.3]] * 4), "variances.*above 0"),
    "a variance that is next to none": (fitted(variances=[[1e-320, 0.2, 0.3]] * 4), "variances"),
    "chains of nothing": (fitted() | {"chains": {}}, "expected a table of means"),
    "a list": ([1.0, 2.0], "expected a table of fitted features"),
    "no variance": (fitted(variances=[[0.0, 0.2, 0.3]] * 4), "variances"),
    "probability of -1": (fitted(transitions=[[[-1.0, 1.0, 1.0]] * 3] * 4), "transitions.*adds up to 1"),
    "rows of 2": (fitted(transitions=[[[1.0, 1.0, 0.0]] * 3] * 4), "transitions"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_fitted_state_that_lies_is_refused_by_name(tmp_path, name):
    fit, words = LIES[name]
    with pytest.raises(InputError, match=words):
        C.save_checkpoint(small(fit=fit), tmp_path / "model.pt")
    assert re.search(words, refused(tmp_path / "model.pt", signed_file(small(fit=fit))))


def test_an_honest_fit_loads_and_is_that_of_the_network(tmp_path):
    content = small(fit=fitted())
    content["policy_state_dict"] |= {"input_scale": torch.full((58,), 2.0)}
    assert C.load_checkpoint(C.save_checkpoint(content, tmp_path / "model.pt"))["fit"] == fitted()
    content["policy_state_dict"]["input_scale"][7] = 2.5
    assert "input_scale is not the scale of the fitted features" in refused(
        tmp_path / "model.pt", signed_file(content)
    )


NUMBERS = [
    ("policy_state_dict", {"trunk.0.weight": torch.full((4, 58), float("nan"))}),
    ("policy_state_dict", {"actor_head.bias": torch.tensor([1.0, float("inf")])}),
    ("folded_sums", {"trunk.0": torch.tensor([float("nan")])}),
    ("optimizer_state_dict", {"state": {0: {"exp_avg": torch.tensor([float("nan")])}}, "param_groups": []}),
    ("optimizer_state_dict", {"state": {}, "param_groups": [{"lr": float("inf")}]}),
    ("config", {"train": {"gamma": float("nan")}}),
]


@pytest.mark.parametrize("part, value", NUMBERS)
def test_every_number_of_a_model_is_finite(tmp_path, part, value):
    message = refused(tmp_path / "model.pt", signed_file(small() | {part: small().get(part, {}) | value}))
    assert f"content['{part}']" in message and "NaN or infinity" in message


def nested(depth: int):
    inner: list = []
    for _ in range(depth):
        inner = [inner]
    return inner


def claims_much(content: dict) -> dict:
    content["policy_state_dict"]["trunk.0.weight"] = torch.zeros(1).expand(60_000, 60_000)
    return content


STRANGE = {
    "3,000 deep": (lambda: small(config={"a": nested(3000)}), "nested more than 100 deep"),
    "names 3,000 deep": (lambda: small(config=nested(3000)), "nested more than 100 deep"),
    "claims 60,000 squared": (lambda: claims_much(small()), "claims 14,400,000,000 bytes"),
    "without numbers": (lambda: small(odd=torch.empty(60_000, 60_000, device="meta")), "without numbers"),
    "quantised": (lambda: small(odd=torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)), ""),
    "sparse": (lambda: small(odd=torch.eye(3).to_sparse()), ""),
    "sparse rows": (lambda: small(odd=torch.eye(3).to_sparse_csr()), ""),
    "ragged": (
        lambda: small(odd=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        "without numbers",
    ),
    "complex": (lambda: small(odd=torch.ones(3, dtype=torch.complex64)), "complex"),
    "escapes in a value": (lambda: small(symbol="\x1b[31mTSLA\x1b[0m"), r"'\x1b[31mTSLA\x1b[0m'"),
    "escapes in a name": (lambda: small(**{"\x1b]0;hello\x07": 1}), "terminal would obey"),
    "escapes below": (
        lambda: small(config={"train": {"tier": "\x9b2J"}}),
        r"content['config']['train']['tier']",
    ),
    "a name that is none": (lambda: small(config={(1, 2): 3}), "a name that is a tuple"),
    "a list of data": (lambda: small(data=[1]), "content['data']: expected a table"),
    "spans that are text": (
        lambda: small(data={"spans": "all"}),
        "content['data']['spans']: expected a table",
    ),
    "an environment that is a number": (
        lambda: small(config={"env": 5}),
        "content['config']['env']: expected a table",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.filterwarnings(
    "ignore:Sparse CSR:UserWarning",
    "ignore:.*quantize:DeprecationWarning",
    "ignore:.*quantize:UserWarning",
    "ignore:The PyTorch API of nested:UserWarning",
)
def test_strange_contents_get_one_printable_line(tmp_path, name):
    make, words = STRANGE[name]
    message = refused(tmp_path / "model.pt", signed_file(make()))
    assert words in message and message.isprintable() and len(message) < 600
    if name == "claims 60,000 squared":
        return  # saving would try to write it all
    with pytest.raises(InputError):
        C.save_checkpoint(make(), tmp_path / "other.pt")  # what would not be read is not written


def test_text_of_several_lines_is_content(tmp_path):
    assert C.load_checkpoint(C.save_checkpoint(small(notes="é\n\tb"), tmp_path / "m.pt"))["notes"] == "é\n\tb"
