"""What a person sees of a run: in a log, in a terminal, in a notebook; and the choice between them."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
import textwrap
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from small_trainers import judged, plain_trainer, refusal, scripted_figures

from trading_lib.reporting.training_curves import Curves
from trading_lib.training.progress import (
    PROGRESS,
    BarProgress,
    LineProgress,
    NotebookProgress,
    Quiet,
    Verbose,
    progress_for,
)

HERE = Path(__file__).resolve()
PATHS = [str(HERE.parents[2]), str(HERE.parents[1]), str(HERE.parent)]


def shown(make, updates=40, every=8, **settings):
    "A run of so many updates that is validated at every eighth; what is said, line by line."
    said = []
    trainer, _ = judged(
        sharpes=[0.1 * i for i in range(updates // every + 1)],
        total_timesteps=96 * updates,
        validation_interval=every,
        n_epochs=1,
        minibatch_size=96,
        **settings,
    )
    summarise = trainer.validation.summarise
    trainer.validation.summarise = lambda played: (
        summarise(played) | scripted_figures(sharpe=1.5, run_return=0.01, win_rate=0.5) | {"return": 0.0123}
    )
    trainer.progress = make(said.append)
    trainer.train()
    return trainer, said


# --- lines --------------------------------------------------------------------------------------------------


def test_twenty_lines_whatever_the_length():
    for updates, lines in (
        (40, 20),
        (7, 7),
        (199, 23),
    ):  # at every second, every one, every ninth and the last
        _, said = shown(LineProgress, updates, every=updates)
        assert (
            len(said) == lines
            and said[-1].startswith(f"update {updates}/{updates} |")
            and all("\n" not in line for line in said)
        )
    trainer, said = shown(LineProgress, 40)
    row = trainer.history[-1]
    assert re.match(r"update 40/40 \| 0\.00 M steps, [\d,]+/s \| ", said[-1])
    assert (
        f" | reward {row['reward']:+.4f} | entropy {row['entropy']:.2f} | explained variance "
        f"{row['explained_variance']:+.2f} | validation return +1.23%, Sharpe +1.50, score "
        f"{row['validation_composite']:+.0f}" in said[-1]
    )
    assert "validation" not in said[0] and "validation" in said[4]  # from the first one on, at update 8


def test_quiet_is_a_line_for_each_validation():
    _, said = shown(Quiet, 40)
    assert [int(re.match(r"update (\d+)/40", line)[1]) for line in said] == [8, 16, 24, 32, 40]
    _, said = shown(Quiet, 41)
    assert [int(re.match(r"update (\d+)/41", line)[1]) for line in said] == [8, 16, 24, 32, 40, 41]


def test_verbose_is_two_lines_for_each_update_with_the_figures_of_its_row():
    trainer, said = shown(Verbose, 9, every=3)
    assert len(said) == 18 and [line.split(" |")[0] for line in said[::2]] == [
        f"update {n}/9" for n in range(1, 10)
    ]
    for row, line in zip(trainer.history, said[1::2]):
        numbers = [float(x) for x in re.findall(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?", line)]
        expected = [
            row["return_mean"],
            row["value_mean"],
            row["advantage_mean"],
            row["advantage_deviation"],
            row["policy_loss"],
            row["value_loss"],
            row["kl"],
            100 * row["clip_fraction"],
            row["learning_rate"],
        ]
        assert numbers == pytest.approx(expected, rel=0.05, abs=1.1e-3), line


def test_minibatches_move_the_bar_and_a_line_says_what_each_part_took():
    "And none of it is part of a run: its bytes do not depend on how long it took."
    seen = []

    class Watched(LineProgress):
        def phase(self, name, done, total):
            seen.append((name, done, total))

    said = []
    trainer = plain_trainer(
        total_timesteps=96 * 2, minibatch_size=20, n_epochs=3, critic_epochs=2
    )  # 96 samples: 5 minibatches
    trainer.progress = Watched(said.append)
    trainer.train()
    once = [
        *(("rollout", i, 12) for i in range(1, 13)),
        *(("epochs", i, 15) for i in range(1, 16)),
        *(("critic epochs", i, 10) for i in range(1, 11)),
    ]
    assert seen == once * 2
    assert (
        all(
            re.search(r" \| rollout \d+\.\d\d s, update \d+\.\d\d s, critic \d+\.\d\d s$", line)
            for line in said
        )
        and len(said) == 2
    )
    assert all(seconds > 0 for seconds in trainer.seconds.values()) and not any(
        "seconds" in name or name == "rollout" for name in {**trainer.content(), **trainer.history[-1]}
    )


# --- a terminal ---------------------------------------------------------------------------------------------


def test_bars_keep_validations_as_lines_and_close():
    stream = io.StringIO()
    trainer, _ = shown(lambda say: BarProgress(stream), 40)
    text = stream.getvalue()
    assert [int(n) for n in re.findall(r"update (\d+)/40 \|.*\n", text)] == [8, 16, 24, 32, 40]
    assert (
        "updates: 100%" in text
        and "40/40" in text
        and "steps/s, reward" in text
        and {"rollout", "epochs"} <= set(re.findall(r"(rollout|epochs|critic epochs):", text))
    )
    assert trainer.progress._run is None is trainer.progress._phase
    half = len(stream.getvalue())
    trainer.progress.say("one more line")
    assert stream.getvalue()[half:].strip() == "one more line"


def test_bars_go_on_where_a_run_goes_on():
    first, _ = judged(sharpes=[0.0] * 8, n_epochs=1)
    first.train(5)
    stream = io.StringIO()
    second, _ = judged(sharpes=[0.0] * 8, n_epochs=1)
    second.restore(first.content())
    second.progress = BarProgress(stream)
    second.train()
    assert "5/8" in stream.getvalue() and "8/8" in stream.getvalue() and " 0/8" not in stream.getvalue()


def test_bars_that_end_early_are_closed_too():
    trainer, _ = judged(sharpes=[2.0, 1.0, 1.0, 1.0], patience=2)
    trainer.progress = BarProgress(io.StringIO())
    trainer.train()
    assert trainer.update == 3 and trainer.progress._run is None is trainer.progress._phase


def in_a_terminal(code: str) -> str:
    "What a command leaves in a terminal of its own."
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (40, 160))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=inner,
        stderr=inner,
        stdin=inner,
        close_fds=True,
        env={name: v for name, v in os.environ.items() if name != "TRADING_LIB_PROGRESS"}
        | {
            "PYTHONPATH": os.pathsep.join(PATHS),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "160",
            "TERM": "xterm",
        },
    )
    os.close(inner)
    text = b""
    while True:
        try:
            piece = os.read(outer, 65536)
        except OSError:
            break  # nobody holds the other end any more
        if not piece:
            break
        text += piece
    os.close(outer)
    assert process.wait(timeout=60) == 0, text.decode()
    return text.decode()


def test_a_terminal_gets_bars_that_are_drawn_over_and_a_score_in_colour():
    text = in_a_terminal("""
        from test_progress import shown
        from trading_lib.training.progress import progress_for
        trainer, _ = shown(lambda say: progress_for(), 40)
        print("kind:", type(trainer.progress).__name__)
    """)
    assert (
        "kind: BarProgress" in text and "40/40" in text and "\x1b[A" in text
    )  # the second bar is below the first
    assert (
        len(re.findall(r"update \d+/40 \|", text)) == 5
        and len(re.findall("\x1b\\[(32|33|31)m[-+]\\d+\x1b\\[0m", text)) == 5
    )
    assert re.search(r"updates:\s+\d+%", text)


# --- a notebook ---------------------------------------------------------------------------------------------


def executed(folder: Path, *cells: str):
    "A notebook that papermill has run in a kernel of its own."
    import papermill

    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(textwrap.dedent(cell).strip()) for cell in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(book, folder / "in.ipynb")
    papermill.execute_notebook(
        folder / "in.ipynb", folder / "out.ipynb", progress_bar=False, kernel_name="python3"
    )
    return folder / "out.ipynb", nbformat.read(folder / "out.ipynb", 4)


@pytest.fixture
def kernel(monkeypatch):
    "The kernel of this environment, with the project on its path."
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRADING_LIB_PROGRESS", raising=False)


def text_of(output) -> str:
    return output.get("text") or "".join(output.get("data", {}).get("text/plain", ""))


def test_a_notebook_has_one_output_for_a_run_of_hundreds_of_updates(tmp_path, kernel):
    """It is replaced as the run goes on; what is said before the run stays, and a run that goes on in
    another cell has an output there."""
    path, book = executed(
        tmp_path,
        """
        import torch
        torch.set_num_threads(1)
        from small_trainers import judged
        from test_progress import shown
        from trading_lib.training.progress import progress_for
        trainer, _ = shown(lambda say: progress_for(), 400, every=10)
    """,
        """
        half, _ = judged(sharpes=[0.0] * 60, n_epochs=1, minibatch_size=96)
        half.progress = progress_for()
        half.progress.say("a table of ten lines, say\\nwhich is said before the run")
        rows = half.train(30)
    """,
        "rows = half.train(); print(type(half.progress).__name__)",
    )
    runs = [cell.outputs for cell in book.cells]
    assert path.stat().st_size < 100_000
    for outputs in runs:
        shown_once = [text_of(output) for output in outputs if "update " in text_of(output)]
        assert len(shown_once) == 1, [text_of(output) for output in outputs]
        lines = shown_once[0].splitlines()
        assert re.match(r"\[#+\.*\] update \d+/\d+, [\d,]+ steps/s", lines[0]) and len(lines) <= 12
    whole = text_of(runs[0][0]).splitlines()
    assert "[" + "#" * 30 + "] update 400/400" in whole[0] and [
        int(re.match(r"update (\d+)/400", line)[1]) for line in whole[1:]
    ] == [330, 340, 350, 360, 370, 380, 390, 400]
    assert (
        text_of(runs[1][0]) == "a table of ten lines, say\nwhich is said before the run\n"
        and "[" + "#" * 15 + "." * 15 + "] update 30/60" in text_of(runs[1][1])
        and "a table" not in text_of(runs[1][1])
    )
    assert "[" + "#" * 30 + "] update 60/60" in text_of(runs[2][0]) and len(runs[1]) == len(runs[2]) == 2
    assert text_of(runs[2][-1]).strip() == "NotebookProgress"


# --- the choice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("bars", BarProgress),
        ("cell", NotebookProgress),
        ("lines", LineProgress),
        ("quiet", Quiet),
        ("verbose", Verbose),
    ],
)
def test_a_name_chooses_and_so_does_the_environment(monkeypatch, kind, expected):
    monkeypatch.delenv("TRADING_LIB_PROGRESS", raising=False)
    assert (
        set(PROGRESS) == {"bars", "cell", "lines", "quiet", "verbose"}
        and type(progress_for(kind)) is expected
    )
    monkeypatch.setenv("TRADING_LIB_PROGRESS", kind)
    assert (
        type(progress_for()) is expected and type(progress_for("quiet")) is Quiet
    )  # what is asked for here comes first


def test_without_a_wish_a_log_gets_lines_and_a_terminal_bars(monkeypatch):
    monkeypatch.delenv("TRADING_LIB_PROGRESS", raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert type(progress_for()) is LineProgress
    monkeypatch.setenv("TRADING_LIB_PROGRESS", "")  # as a shell says that there is none
    assert type(progress_for()) is LineProgress
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert type(progress_for()) is BarProgress
    monkeypatch.setitem(
        sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace())
    )  # IPython in a terminal: no kernel
    assert type(progress_for()) is BarProgress
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert type(progress_for()) is BarProgress


def test_an_unknown_name_is_refused():
    assert "expected one of bars, cell, lines, quiet, verbose, was 'loud'" in refusal(progress_for, "loud")


# --- DVC's files beside it ----------------------------------------------------------------------------------


def test_curves_are_those_of_the_run_whether_it_was_interrupted_or_not(tmp_path):
    "One line for each update in DVCLive's files, and everything is still said."

    def run(folder, stops):
        said, trainer = [], plain_trainer(n_epochs=1)
        for stop in stops:
            fresh = plain_trainer(n_epochs=1)
            fresh.restore(trainer.content())
            fresh.progress = Curves(LineProgress(said.append), folder)
            fresh.train(stop)
            trainer = fresh
        files = {
            p.relative_to(folder): [line.split("\t")[1:] for line in p.read_text().splitlines()]
            for p in sorted(folder.rglob("*.tsv"))
        }
        return said, files, json.loads((folder / "metrics.json").read_text()), trainer

    said, files, last, trainer = run(tmp_path / "whole", [None])
    assert len(said) == 4 and {p.stem for p in files} == {
        "reward",
        "entropy",
        "explained_variance",
        "kl",
        "clip_fraction",
        "learning_rate",
    }
    for path, (head, *rows) in files.items():
        assert head[-1] == path.stem or path.stem in head[-1] and len(rows) == 4
        assert [float(row[-1]) for row in rows] == pytest.approx([row[path.stem] for row in trainer.history])
    assert last["step"] == 4 and last["reward"] == pytest.approx(trainer.history[-1]["reward"])
    _, parts, end, second = run(tmp_path / "parts", [1, 2, None])
    assert (
        all(len(rows) == 5 for rows in parts.values())
        and end["step"] == 4
        and [float(r[-1]) for r in parts[Path("plots/metrics/reward.tsv")][1:]]
        == pytest.approx([row["reward"] for row in second.history])
    )
