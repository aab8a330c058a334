"""A setting is declared in one line of code; file, notebook, command line and messages follow from it."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from trading_lib.config import InputError, Parameters, load_parameters
from trading_lib.pipeline.settings import (
    NOTEBOOK_SETTINGS,
    SECTIONS,
    parameters_text,
    settings_text,
    write_settings,
)

ROOT = Path(__file__).parents[2]
OWN = (ROOT / "params.yaml").read_text(encoding="utf-8")


def parameters_cell(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ()))


# --- the project's own files ----------------------------------------------------------------------------


def test_the_projects_files_hold_what_is_declared():
    "`trading-lib settings --write` mends what this finds."
    assert write_settings(ROOT, write=False) == []


def test_every_setting_of_training_is_in_its_notebook():
    for stage, names in NOTEBOOK_SETTINGS.items():
        cell = parameters_cell(ROOT / "nbs" / f"{stage}.ipynb")
        assert all(f"\n{name} = None  # " in cell for name in names)


# --- params.yaml ----------------------------------------------------------------------------------------


def without(text: str, *names: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip().split(":")[0] not in names) + "\n"


def test_a_missing_line_comes_back_where_it_was():
    missing = without(OWN, "edge", "gamma", "patience", "version", "count")
    assert missing.count("\n") == OWN.count("\n") - 5
    assert settings_text(missing) == OWN
    assert yaml.safe_load(settings_text("")) == {
        name: section for name, section in yaml.safe_load(OWN).items() if name not in ("symbols", "modes")
    }


def test_values_and_lines_of_a_persons_own_stay():
    mine = OWN.replace("  window: 100 ", "  window:    64 ").replace(
        "  start: null               # first day", "  # my years\n  start: 2019-01-01 # was 2018"
    )
    mine = mine.replace("  path: data/raw ", "  path: bars/o'neil/it's # all mine, ")
    written = settings_text(mine)
    before, after = yaml.safe_load(mine), yaml.safe_load(written)
    assert before == after and before["features"]["window"] == 64
    assert "  # my years\n  start: 2019-01-01 # first day; null" in written, "remarks are the declaration's"
    assert settings_text(written) == written


@pytest.mark.parametrize(
    "text, line",
    [
        ("data:\n  path: 'a # b'\n", "  path: 'a # b'             # files: the folder"),
        ("data:\n  path: a#b # here\n", "  path: a#b # files: the folder"),
        ('data:\n    path: "a \\" # b"\n', '    path: "a \\" # b"        # files: the folder'),
        (
            "data:\n  columns:   # in order\n    - open\n    - close\n",
            "  columns:   # files: names of the columns",
        ),
        ("data:\n  path: it's # mine\n", "  path: it's # mine"),
        ("data: # where from\n  seed: 1\n", "  seed: 1"),
        ("data: null\n", "  seed: 0"),
    ],
)
def test_a_line_is_taken_apart_as_yaml_has_it(text, line):
    written = settings_text(text)
    assert any(w.startswith(line) for w in written.splitlines()), written[:1500]
    given = yaml.safe_load(text)["data"] or {}
    found = yaml.safe_load(written)["data"]
    assert found | given == found and set(found) == {f.name for f in fields(SECTIONS["data"])}
    assert settings_text(written) == written


def test_a_section_on_one_line_is_left_to_the_person():
    with pytest.raises(InputError, match="mine.yaml: line 2 holds all of data; write its settings below it"):
        settings_text("symbols: [A]\ndata: {seed: 3}\n", "mine.yaml")


def test_what_is_written_is_read_as_the_defaults(tmp_path):
    (tmp_path / "params.yaml").write_text(settings_text("symbols: [SIM-USD]\n"))
    assert load_parameters(tmp_path / "params.yaml") == Parameters()


def test_a_value_in_a_parameters_cell_stays():
    cell = "symbol = None\ncount = 3  # mine\nout_dir = None"
    assert parameters_text(cell, "seeds") == cell
    assert "count = None  # how many" in parameters_text("symbol = None\n", "seeds")


# --- one line adds an option ----------------------------------------------------------------------------

LINE = '    td_cap: float | None = setting(None, "largest temporal difference", above=0, null="none")'
AFTER = '    gae_lambda: float = setting(0.95, "1: Monte Carlo, 0: TD(0)", at_least=0, at_most=1)'


def test_an_option_of_training_is_one_line(tmp_path):
    "A copy of the project gets one line more, and everything else follows from it."
    for name in ("trading_lib", "nbs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    declared = next((tmp_path / "nbs" / "00_base").glob("*_train_sections.ipynb"))
    notebook = json.loads(declared.read_text(encoding="utf-8"))
    places = [c for c in notebook["cells"] if f"{AFTER}\n" in c["source"]]
    (place,) = places
    place["source"].insert(place["source"].index(f"{AFTER}\n") + 1, f"{LINE}\n")
    declared.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def run(code: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    command = "import sys; from trading_lib.cli import main; sys.exit(main({}))"
    exported = run(f"from nbdev.export import nb_export; nb_export({str(declared)!r}, 'trading_lib')")
    assert exported.returncode == 0, exported.stderr
    differs = run(command.format(["settings"]))
    assert differs.returncode == 1 and "params.yaml: differs" in differs.stdout, differs.stderr
    assert "train.ipynb: differs" in differs.stdout
    assert run(command.format(["settings", "--write"])).returncode == 0

    added = set((tmp_path / "params.yaml").read_text().splitlines()) - set(OWN.splitlines())
    assert added == {"  td_cap: null                # largest temporal difference; null: none"}
    cell = parameters_cell(tmp_path / "nbs" / "train.ipynb")
    assert "\ntd_cap = None  # largest temporal difference\n" in cell
    helped = " ".join(run(command.format(["train", "--help"])).stdout.split())
    assert "--td-cap TD_CAP largest temporal difference (default: train.td_cap of params.yaml)" in helped
    refused = run(command.format(["train", "--td-cap", "-1"]))
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: train.td_cap: expected more than 0, was -1.0\n",
    )
    trainers = "from trading_lib.trainer import NativePPOConfig as C; print(C(td_cap=2).td_cap)"
    assert run(trainers).stdout == "2.0\n"
    assert run(command.format(["settings"])).returncode == 0
