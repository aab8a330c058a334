"""The index of runs lists each once, and a deploy zip is whole or refused."""

import hashlib
import io
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from small_ledgers import DATA, fork, lines_of, run

from trading_lib import ledger as ledgers
from trading_lib.checkpoint import Comparison, save_checkpoint
from trading_lib.config import InputError
from trading_lib.reporting import registry
from trading_lib.version import get_checkpoint_metadata

ROOT = Path(__file__).resolve().parents[2]


# --- index ----------------------------------------------------------------------------------------


def test_index_lists_each_run_once_in_order(tmp_path):
    path = ledgers.index_path(tmp_path)
    assert registry.index_runs(path) == [] and registry.format_history([]) == "no runs yet"
    assert (
        registry.record_run(path, run())
        and not registry.record_run(path, run())
        and registry.record_run(path, run(symbol="SIMA"))
        and registry.record_run(path, run(commit="f" * 40))
        and registry.record_run(path, run(verdict="REVIEW"))
    )
    runs = registry.index_runs(path)
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
        registry.symbol_history(path, "SIM-USD") == [runs[0], runs[2], runs[3]]
        and registry.symbol_history(path, "SPY") == []
    )
    with pytest.raises(InputError, match="verdict, commit missing"):
        registry.record_run(path, {k: v for k, v in run().items() if k not in ("verdict", "commit")})
    with pytest.raises(InputError, match="run.metrics.equity: expected numbers"):
        registry.record_run(path, run(metrics={"equity": np.ones(3)}))


def test_history_is_a_table_for_people():
    rows = [
        run(),
        run(symbol="SIMA", metrics={}, commit=None, verdict=None),
        run(parameters={"train": {"seed": 1, "gamma": 0.9}}, verdict={"verdict": "APPROVED"}),
        run(parameters={"train": {f"name_{i}": i for i in range(30)}}, data=DATA | {"sha256": "cd" * 32}),
    ]
    head, rule, *body = registry.format_history(rows).splitlines()
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
    assert [("(simulated)" in line) for line in registry.format_history(rows).splitlines()[2:]] == [
        True,
        True,
        False,
        False,
    ]


def write_runs(path, number):
    for i in range(25):
        registry.record_run(path, run(model_sha256=f"{number}-{i}"))


def test_runs_that_end_at_the_same_time_are_all_listed(tmp_path):
    path = ledgers.index_path(tmp_path)
    processes = [fork.Process(target=write_runs, args=(path, i)) for i in range(4)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert {r["model_sha256"] for r in registry.index_runs(path)} == {
        f"{n}-{i}" for n in range(4) for i in range(25)
    } and len(lines_of(path)) == 100


# --- deploy zip -----------------------------------------------------------------------------------

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
    return registry.write_deploy_zip(model, tmp_path / "deploy" / "SIM-USD.zip", files, FACTS)


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
        registry.load_deploy_zip(path, **options)
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
    loaded = registry.load_deploy_zip(deploy)
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


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes_anywhere(tmp_path, deploy, model, files):
    for path in (model, *files.values()):
        os.utime(path, (1, 1)), path.chmod(0o600)
    script = (
        "import sys, json, os; from trading_lib.reporting.registry import write_deploy_zip; os.umask(0o077); "
        "files = dict(reversed(json.loads(sys.argv[3]).items())); "
        "write_deploy_zip(sys.argv[1], sys.argv[2], files, json.loads(sys.argv[4]))"
    )
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
        | {"PYTHONHASHSEED": "5", "TZ": "Asia/Tokyo", "PYTHONPATH": str(Path(ledgers.__file__).parents[1])},
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
        registry.load_deploy_zip(deploy),
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
            found = registry.load_deploy_zip(bad)
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

    def without(name):
        return {n: d for n, d in parts.items() if n != name}

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
    verdict = {
        "verdict": "REVIEW",
        "failed": FACTS["verdict"]["failed"],
        "headline": "a line",
        "model_sha256": digest,
    } | other
    return {
        "verdict.json": json.dumps(verdict).encode(),
        "metrics.json": json.dumps({"provenance": {"model_sha256": verdict["model_sha256"]}}).encode(),
    }


def test_verdict_and_model_belong_together_when_a_zip_is_written_and_when_it_is_read(tmp_path, model):
    facts, out, bad = FACTS | {"headline": "a line"}, tmp_path / "out.zip", tmp_path / "bad.zip"
    whole = registry.load_deploy_zip(registry.write_deploy_zip(model, out, judged_files(model), facts))
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
            registry.write_deploy_zip(model, tmp_path / "none.zip", changed, facts)
        assert "\n" not in str(e.value) and not (tmp_path / "none.zip").exists()
        refused(bad, sealed(relisted(parts | changed)), words)
    # a manifest that praises what its verdict.json does not; a verdict that is no table; another model
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
    readme = parts_of(registry.write_deploy_zip(model, tmp_path / "out.zip", files, facts))[
        "README.md"
    ].decode()
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
    for text in (registry.format_history([row, row | {"parameters": {evil: 2}}]), str(compared)):
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
        registry.write_deploy_zip(tmp_path / "hostile.pt", tmp_path / "o.zip", {}, FACTS)
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
            registry.load_deploy_zip(path)
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
        registry.write_deploy_zip(
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
    loaded = registry.load_deploy_zip(
        registry.write_deploy_zip(
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
