"""Markets whose truth is known. The heavy proofs are run by `make prove`; that the machinery around them
stops, goes on and judges as it says is tested in every run."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from known_truth import code_hash, described, finished, prove, sources
from known_truth_models import ProofSettings, gross_profit, leaking_feature, plant_leak
from known_truth_report import BANDS, plot_proofs, summarise_proofs, summary_lines

import trading_lib
from trading_lib import features
from trading_lib.account import account_rules
from trading_lib.backtest import greedy_actions, run_backtest
from trading_lib.builder import BacktestObservationBuilder
from trading_lib.checkpoint import load_checkpoint
from trading_lib.cli import main
from trading_lib.config import AccountConfig, InputError
from trading_lib.env import market_data
from trading_lib.evaluation.replay import Run, decision_bars, replay_and_keep
from trading_lib.features import FeatureFit, fit_features
from trading_lib.metrics import block_bootstrap_interval
from trading_lib.pipeline.stages import run_stage
from trading_lib.policy.factory import build_policy
from trading_lib.sources import simulate_market

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2)


# --- the proofs with small networks -------------------------------------------------------------------------


@pytest.mark.proof
def test_all_proofs_hold(tmp_path):
    """Twenty networks learn a planted edge, twenty earn nothing on a martingale, a planted leak is found.
    TRADING_LIB_PROOFS names a folder to keep the results in, and to go on in."""
    summary = prove(
        os.environ.get("TRADING_LIB_PROOFS") or tmp_path, progress=lambda line: print(line, flush=True)
    )
    edge, martingale, leak = summary["edge"], summary["martingale"], summary["leak"]
    assert edge["seeds"] == martingale["models"] == 20 and martingale["paths"] == 1000
    assert (
        edge["interval_95"][0] >= BANDS["edge_share"] > 0
        and min(edge["seeds_that_beat"].values()) >= BANDS["edge_seeds"]
    )
    assert (
        martingale["interval_99"][0] <= 0 <= martingale["interval_99"][1]
        and martingale["largest_error"] < 1e-9
        and not {"APPROVED", "SIMULATED PASS"} & set(martingale["verdicts"])
    )
    assert martingale["trades_per_path"] >= 1, "agents that never trade prove nothing"
    assert (
        leak["found_by_martingale"]
        and leak["found_by_lookahead"]
        and leak["interval_99"][0] > martingale["interval_99"][1]
    )
    assert summary["passed"] and not summary["failed"]


# --- stopping and going on ----------------------------------------------------------------------------------


TINY = ProofSettings(
    edge_start="2023-11-01",
    edge_steps=16_384,
    martingale_start="2023-06-01",
    martingale_steps=16_384,
    martingale_path_days=10,
)
RESULTS = {
    "edge-00.json",
    "edge-01.json",
    "martingale-00.json",
    "martingale-01.json",
    "leak-00.json",
    "leak-01.json",
}
ASKED = dict(seeds=2, paths=3, settings=TINY)


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*-*.json")}


def without_times(content: bytes) -> str:
    return content.decode().partition('"processor_seconds"')[0]


def children_of(process) -> list[int]:
    "Its processes; none where the system does not say."
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in listed.read_text().split()] if listed.exists() else []


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict:
    """A run with two processes that gets a SIGKILL once the first result is there, and another in this
    process that goes on."""
    place = tmp_path_factory.mktemp("proofs")
    folder, program = place / "results", place / "program.py"
    program.write_text(
        f"import sys\nsys.path.append({str(ROOT / 'benchmarks')!r})\n"
        "from known_truth import ProofSettings, prove\n"
        "if __name__ == '__main__':\n"
        f"    prove({str(folder)!r}, seeds=2, paths=3, workers=2, settings={TINY!r})\n"
    )
    process = subprocess.Popen([sys.executable, program], cwd=ROOT)
    try:
        patience = time.monotonic() + 300
        while not contents(folder):
            assert process.poll() is None and time.monotonic() < patience, "it ended, or wrote nothing"
            time.sleep(0.02)
        children = children_of(process)
    finally:
        process.kill()
    process.wait()
    patience = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < patience:
        time.sleep(0.02)
    left = [child for child in children if Path(f"/proc/{child}").exists()]
    before, lines = {path.name: path.stat().st_mtime_ns for path in folder.glob("*-*.json")}, []
    summary = prove(folder, workers=1, progress=lines.append, **ASKED)
    return {"folder": folder, "summary": summary, "lines": lines, "left": left, "before": before}


@pytest.fixture
def small_run(run):
    return run["folder"], run["summary"]


@pytest.mark.slow
def test_a_small_run_writes_a_file_for_each_seed_and_says_what_holds(small_run):
    folder, summary = small_run
    assert set(contents(folder)) == RESULTS and (folder / "proofs.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for name, content in contents(folder).items():
        result = json.loads(content)
        assert (
            list(result)[-2:] == ["processor_seconds", "seconds"]
            and f"{result['kind']}-{result['seed']:02d}.json" == name
            and result["code"] == code_hash()
        )
        if result["kind"] == "edge":
            continue
        gross, costs, net = (np.array(result["figures"][name]) for name in ("gross", "costs", "net"))
        assert (
            len(gross) == 3
            and np.abs(gross - costs - net).max() < 1e-9
            and (costs[np.array(result["figures"]["trades"]) > 0] > 0).all()
        )
    edge = [json.loads(contents(folder)[f"edge-0{seed}.json"])["figures"] for seed in (0, 1)]
    assert summary["edge"]["share_of_oracle"] == pytest.approx(
        sum(e["total_return"] for e in edge) / sum(e["oracle"] for e in edge)
    )
    assert edge[0]["oracle"] != edge[1]["oracle"], "each seed has its own history"


def test_after_a_kill_it_goes_on_where_it_was(run):
    assert not run["left"], "a worker outlives the process that it worked for, and would go on writing"
    assert 0 < len(run["before"]) < len(RESULTS)
    assert run["lines"][0] == f"{len(run['before'])} of 6 results are there already"
    assert {name: (run["folder"] / name).stat().st_mtime_ns for name in run["before"]} == run["before"], (
        "what was finished is not done again"
    )


@pytest.mark.slow
def test_another_process_computes_the_same_bytes(run, tmp_path):
    "What the killed run's workers had written, computed again in this process."
    shutil.copytree(run["folder"], tmp_path / "proofs")
    for name in run["before"]:
        (tmp_path / "proofs" / name).unlink()
    prove(tmp_path / "proofs", workers=1, progress=None, **ASKED)
    assert {name: without_times(content) for name, content in contents(tmp_path / "proofs").items()} == {
        name: without_times(content) for name, content in contents(run["folder"]).items()
    }


@pytest.mark.slow
def test_what_was_changed_is_run_again_and_nothing_else(small_run, tmp_path):
    shutil.copytree(small_run[0], tmp_path / "proofs")
    before = contents(tmp_path / "proofs")
    prove(
        tmp_path / "proofs", workers=1, progress=None, **ASKED | {"settings": replace(TINY, edge_planted=0.2)}
    )
    assert {name for name, content in contents(tmp_path / "proofs").items() if content != before[name]} == {
        "edge-00.json",
        "edge-01.json",
    }


@pytest.mark.slow
def test_a_result_of_other_code_settings_paths_or_a_torn_file_does_not_count(small_run, tmp_path):
    path = small_run[0] / "martingale-01.json"
    here = code_hash()

    def asked(kind="martingale", paths=3, settings=TINY, code=here):
        return described(kind, 1, paths, settings, code)

    assert finished(path, asked()) is not None
    for other in (
        asked(code="0" * 64),
        asked(paths=4),
        asked(settings=replace(TINY, martingale_steps=32_768)),
        asked(settings=replace(TINY, network_window=16)),
    ):
        assert finished(path, other) is None
    assert finished(path, asked(settings=replace(TINY, edge_planted=0.1, leak_noise=0.1))) is not None, (
        "other kinds' settings do not matter"
    )
    assert asked("edge", paths=4) == asked("edge"), "paths do not matter to the planted edge"
    (tmp_path / "torn.json").write_bytes(path.read_bytes()[:-100])
    assert (
        finished(tmp_path / "torn.json", asked()) is None
        and finished(tmp_path / "none.json", asked()) is None
    )


@pytest.mark.slow
def test_the_hash_of_the_code_follows_the_account_and_not_the_command_line(tmp_path, monkeypatch):
    shutil.copytree(
        Path(trading_lib.__file__).parent,
        tmp_path / "trading_lib",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    here = code_hash()
    monkeypatch.setattr(trading_lib, "__file__", str(tmp_path / "trading_lib/__init__.py"))
    assert code_hash() == here

    def append(name, text="# changed\n"):
        (tmp_path / "trading_lib" / name).open("a").write(text)

    append("cli.py")
    assert code_hash() == here
    append("bars.py")
    seen = [here, code_hash()]
    append("account.py", "def later():\n    from trading_lib import cli\n")
    seen.append(code_hash())
    append("cli.py")  # takes part from now on, if only inside a function
    assert len({*seen, code_hash()}) == 4


def test_these_files_and_all_that_they_lead_to_take_part():
    own = {"benchmarks.known_truth", "benchmarks.known_truth_models", "benchmarks.known_truth_report"}
    package = {"account", "env", "trainer", "features", "bars", "data.simulation"}
    assert own | package <= set(sources()), "of the package, what the account and the training need"
    assert not {"cli", "live", "commands.training"} & set(sources())


def test_finding_everything_done_changes_nothing_but_the_time(small_run):
    folder, summary = small_run
    before, lines = contents(folder), []
    again = prove(folder, workers=1, progress=lines.append, **ASKED)
    assert lines[0] == "6 of 6 results are there already" and contents(folder) == before
    assert {**again, "seconds": 0} == {**json.loads(json.dumps(summary)), "seconds": 0}


def test_the_command_runs_the_proofs_of_its_project(small_run, tmp_path, monkeypatch, capsys):
    "Beside results of these settings, so that nothing is trained; without the file it says so in one line."
    known_truth = sys.modules["known_truth"]
    folder, _ = small_run
    monkeypatch.setattr(known_truth, "ProofSettings", lambda: TINY)
    monkeypatch.chdir(ROOT)
    line = ["prove", "--seeds", "2", "--paths", "3", "--workers", "1", "--out", str(folder)]
    assert main(line) in (0, 1)
    assert capsys.readouterr().out.startswith("6 of 6 results are there already\nPlanted edge: 2 seeds")
    for name in ("params.yaml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    assert f"{tmp_path}/benchmarks/known_truth.py: is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [dict(seeds=1), dict(seeds="20"), dict(paths=1), dict(paths=10**6), dict(workers=0)]
)
def test_bad_input_is_one_line(tmp_path, wrong):
    with pytest.raises(InputError, match="prove: expected") as caught:
        prove(tmp_path, **wrong)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# --- profit before costs ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "symbol, asset_class, end", [("SIM-USD", "crypto", "2023-02-15"), ("SIM", "equity", "2023-06-01")]
)
def test_profit_before_costs_from_the_fills_is_what_an_account_without_costs_earns(symbol, asset_class, end):
    """The account keeps its own books, in cash: what it ends with, less what it began with, and the costs it
    reports, added again. One that pays nothing ends with the gross profit itself."""
    bars, _ = simulate_market(symbol, "15Min", "2023-01-01", end, seed=5, edge=0.0)
    bars = bars.drop(bars.index[-1200:-1080])  # a gap: positions are settled before it
    market = market_data(
        bars,
        "5.6.0",
        fit_features(bars.iloc[:-1210], "5.6.0", "15Min", asset_class),
        "15Min",
        asset_class,
        32,
        symbol,
    ).span(0, len(bars))
    at, random = decision_bars(market), np.random.default_rng(0)
    rules = account_rules(AccountConfig(costs="conservative"), asset_class)
    runs = [
        Run(
            market,
            r,
            torch.as_tensor(np.where(random.random(len(at)) < 0.05, random.integers(0, 8, len(at)), 0)),
        )
        for r in [rules] * 8
    ]
    runs += [run._replace(rules=rules.with_costs(0)) for run in runs]
    walked, account = replay_and_keep(runs)
    gross = np.array([gross_profit(w, market) for w in walked])
    assert (
        (account.trades > 5).all()
        and any((w.settled_quantity != 0).any() for w in walked)
        and any((w.exit_quantity != 0).any() for w in walked)
    )
    assert np.abs(gross - (account.equity + account.costs).numpy() + 1000).max() < 1e-9
    assert (
        np.abs(gross[8:] - (account.equity[8:] - 1000).numpy()).max() < 1e-9
        and (account.costs[:8] > 0.5).all()
        and (account.costs[8:] == 0).all()
    )


# --- the leak -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_planted_column_tells_the_next_bar_and_nothing_else_changes():
    bars, _ = simulate_market("SIM-USD", "15Min", "2023-01-01", "2023-03-01", seed=1, edge=0.0)
    market = market_data(bars, "5.6.0", fit_features(bars, "5.6.0", "15Min", "crypto"), "15Min", "crypto", 32)
    leaking, honest = plant_leak(market, 0.5, 7), market.features.copy()
    changed = np.flatnonzero((leaking.features != market.features).any(0))
    assert len(changed) == 1 and np.array_equal(market.features, honest), "one column, and only in the copy"
    ahead, column = (
        (bars["close"].shift(-1) / bars["close"] - 1).to_numpy()[:-1],
        leaking.features[:-1, changed[0]],
    )
    assert np.corrcoef(ahead, column)[0, 1] == pytest.approx(
        1 / np.sqrt(1 + 0.5**2), abs=0.01
    )  # noise of half the signal's size
    assert abs(np.corrcoef(ahead, market.features[:-1, changed[0]])[0, 1]) < 0.05
    assert np.array_equal(plant_leak(market, 0.5, 7).features, leaking.features) and not np.array_equal(
        plant_leak(market, 0.5, 8).features, leaking.features
    )


def test_the_leaking_feature_function_is_gone_afterwards():
    honest = features.BLOCK_FUNCTIONS["price_6"]
    with pytest.raises(ZeroDivisionError), leaking_feature():
        assert features.BLOCK_FUNCTIONS["price_6"] is not honest
        raise ZeroDivisionError
    assert features.BLOCK_FUNCTIONS["price_6"] is honest


# --- the verdict --------------------------------------------------------------------------------------------


def made_up(
    share=0.4,
    spread=0.1,
    gross=0.0,
    leak=10.0,
    verdict="DROP",
    error=0.0,
    trades=20,
    named=("returns",),
    honest=(),
    models=20,
) -> list[dict]:
    "Results as files would hold them."
    random = np.random.default_rng(3)
    agents = share + spread * random.standard_normal(models)
    cross = 0.5 + 0.1 * np.random.default_rng(4).standard_normal(models)

    def model(kind, seed, mean):
        values = random.standard_normal(50) * 15
        values += mean - (0 if kind == "leak" else values.mean())
        figures = {
            "gross": values.tolist(),
            "costs": [5.0] * 50,
            "net": (values - 5.0 + (error if seed == 3 else 0)).tolist(),
            "trades": [trades] * 50,
            "pooled": {"verdict": verdict if seed == 7 else "DROP"},
        }
        return {
            "kind": kind,
            "seed": seed,
            "figures": figures
            | (
                {"lookahead": {"leaking": list(named), "honest": list(honest)}, "planted": "returns"}
                if kind == "leak"
                else {}
            ),
        }

    edge = [
        {
            "kind": "edge",
            "seed": i,
            "figures": {
                "share_of_oracle": a,
                "total_return": 0.3 * a,
                "oracle": 0.3,
                "buy_and_hold_at_exposure": 0.01,
                "moving_average_cross": 0.3 * cross[i],
            },
        }
        for i, a in enumerate(agents)
    ]
    return (
        edge
        + [model("martingale", i, gross) for i in range(models)]
        + [model("leak", i, leak) for i in range(3)]
    )


@pytest.mark.slow
def test_figures_inside_the_bands_pass():
    results = made_up()
    summary = summarise_proofs(results)
    assert summary["passed"] and summary["failed"] == []
    assert (
        summary["leak"]["models"] == 3
        and summary["leak"]["paths"] == 150
        and summary["martingale"]["paths"] == 1000
    )
    # normal theory is a second source for the intervals of means of many independent values
    gross = np.concatenate([r["figures"]["gross"] for r in results if r["kind"] == "martingale"])
    error = gross.std(ddof=1) / np.sqrt(len(gross))
    assert summary["martingale"]["interval_99"] == pytest.approx(
        [gross.mean() - 2.576 * error, gross.mean() + 2.576 * error], abs=0.25 * error
    )
    shares = np.array([r["figures"]["share_of_oracle"] for r in results if r["kind"] == "edge"])
    error = shares.std() / np.sqrt(len(shares))
    assert summary["edge"]["interval_95"] == pytest.approx(
        [shares.mean() - 1.96 * error, shares.mean() + 1.96 * error], abs=0.25 * error
    )


@pytest.mark.slow
def test_the_cross_stands_beside_the_agents():
    """Its share of the oracles' profit, of each seed and together, in the summary, in the line and in the
    picture; it is no band, and the agents may be worse."""
    results = made_up()
    summary = summarise_proofs(results)
    beside, own = (
        summary["edge"]["moving_average_cross"],
        [r["figures"]["moving_average_cross"] / 0.3 for r in results if r["kind"] == "edge"],
    )
    assert (
        beside["share_of_oracle"] == pytest.approx(np.mean(own))
        and beside["shares"] == pytest.approx(own)
        and beside["interval_95"][0] < np.mean(own) < beside["interval_95"][1]
    )
    assert summary["passed"] and beside["seeds_that_beat_it"] == pytest.approx(
        np.mean([r["figures"]["share_of_oracle"] > c for r, c in zip(results, own)])
    )
    assert f"a moving-average cross without any training {np.mean(own):.1%} (" in summary_lines(summary)[0]
    figure = plot_proofs(results, summary)
    assert len(figure.axes[0].patches) >= 40 and any(
        "moving-average cross together" in t.get_text() for t in figure.axes[0].get_legend().get_texts()
    )


@pytest.mark.slow
def test_bounds_that_say_nothing_are_not_in_the_lines():
    "A martingale of two models and two paths: its interval is wider than a fifth of the account."
    summary = summarise_proofs(made_up())
    lines = "\n".join(
        summary_lines(
            summary
            | {
                "martingale": summary["martingale"] | {"interval_99": [-150.0, 170.0]},
                "edge": summary["edge"] | {"interval_95": [-0.5, 1.9]},
            }
        )
    )
    assert (
        lines.count("too wide to say anything") == 2
        and "-150" not in lines
        and "190.0%" not in lines
        and "too wide" not in "\n".join(summary_lines(summary))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(share=BANDS["edge_share"], spread=0.02), "edge: the share"),
        (dict(share=0.0), "beat cash"),
        (dict(share=0.02, spread=0.001), "beat buy_and_hold_at_exposure"),
        (dict(gross=2.0), "interval that contains 0|contains 0"),
        (dict(gross=-2.0), "contains 0"),
        (dict(verdict="SIMULATED PASS"), "1 of 20 models pass every gate"),
        (dict(error=1e-8), "net differs from gross less costs"),
        (dict(trades=0), "agents that do not trade prove nothing"),
        (dict(leak=0.0), "leak: not found by the martingale"),
        (dict(leak=-10.0), "leak: not found by the martingale"),
        (dict(named=()), "leak: not found by the lookahead check"),
        (dict(named=("returns", "momentum")), "leak: not found by the lookahead check"),
        (dict(honest=("h1_range",)), "leak: not found by the lookahead check"),
    ],
)
def test_figures_outside_the_bands_fail(wrong, sentence):
    summary = summarise_proofs(made_up(**wrong))
    assert not summary["passed"]
    assert any(part in failed for failed in summary["failed"] for part in sentence.split("|")), summary[
        "failed"
    ]
    if not set(wrong) & {"share", "gross"}:
        assert len(summary["failed"]) == 1, "one thing is wrong, one sentence says so"


def test_results_that_are_missing_are_not_a_pass():
    for kind in ("edge", "martingale", "leak"):
        with pytest.raises(InputError, match=f"kind {kind}"):
            summarise_proofs([r for r in made_up() if r["kind"] != kind])


# --- the whole pipeline, as shipped -------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A copy of the project's notebooks and parameters; `set_parameters` edits the latter."
    for name in ("params.yaml", "settings.ini", "nbs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_parameters(project: Path, **dotted):
    document = yaml.safe_load((project / "params.yaml").read_text())
    for name, value in dotted.items():
        section, key = name.split("__")
        document[section][key] = value
    (project / "params.yaml").write_text(yaml.safe_dump(document))


@pytest.mark.proof
@pytest.mark.parametrize("seed", SEEDS)
def test_the_agent_learns_a_planted_edge(project, seed):
    """quick_test as shipped beats cash and buy-and-hold at its own exposure, after costs, on the span that it
    never saw."""
    run_stage("prepare", "SIM-USD")
    run_stage("train", "SIM-USD", seed=seed, mode="quick_test")
    run_stage("backtest", "SIM-USD")
    metrics = json.loads((project / "reports/SIM-USD_15Min/metrics.json").read_text())
    agent, baselines = metrics["agent"], metrics["baselines"]
    print(
        f"\nseed {seed}: agent {agent['total_return']:+.2%}, buy-and-hold at its exposure "
        f"{baselines['buy_and_hold_at_exposure']:+.2%}\n  share of the oracle's profit "
        f"{agent['share_of_oracle']:.1%}, percentile among its time-shifted copies "
        f"{agent['percentile_among_random']:.0f}"
    )
    assert (
        agent["total_return"] > baselines["cash"]
        and agent["total_return"] > baselines["buy_and_hold_at_exposure"]
    )
    assert abs(agent["gross_profit"] - agent["costs"] - agent["net_profit"]) < 1e-6


PATHS, LEVEL = (
    100,
    0.99,
)  # fresh histories of two months; an honest run falls outside the interval once in a hundred times


@pytest.mark.proof
@pytest.mark.parametrize("training_costs", ["broker", "zero"])
def test_nobody_earns_on_a_martingale(project, training_costs):
    """Pooled gross P&L of three agents over fresh paths has an interval that contains 0; net = gross - costs.
    Agents trained without costs do trade."""
    set_parameters(project, data__edge=0.0, account__costs=training_costs)
    run_stage("prepare", "SIM-USD")
    agents = []
    for seed in SEEDS:
        run_stage("train", "SIM-USD", seed=seed, mode="quick_test")
        agents.append(load_checkpoint(project / "models/SIM-USD_15Min.pt"))
    gross, costs, trades, broker = (
        np.zeros((len(agents), PATHS)),
        np.zeros((len(agents), PATHS)),
        0,
        AccountConfig(costs="broker"),
    )
    fit, version = agents[0]["fit"], agents[0]["model_version"]
    for path in range(PATHS):
        bars, truth = simulate_market(
            "SIM-USD", "15Min", "2024-01-01", "2024-03-01", seed=1000 + path, edge=0.0
        )
        assert (truth["expected_return"] == 0).all()
        market, builder = (
            market_data(bars, version, FeatureFit.from_state(fit), "15Min", "crypto"),
            BacktestObservationBuilder(bars, version, fit, "15Min", "crypto"),
        )
        at = decision_bars(market)
        runs = [
            Run(market, account_rules(broker, "crypto"), greedy_actions(build_policy(agent), builder, at))
            for agent in agents
        ]
        _, account = replay_and_keep(runs, keep=0)
        gross[:, path], costs[:, path] = (
            (account.equity + account.costs - broker.initial_account_value).numpy(),
            account.costs.numpy(),
        )
        trades += int(account.trades.sum())
        if path == 0:  # the report of a single backtest says the same
            m = run_backtest(agents[0], bars, account=broker).metrics
            assert (
                abs(m["gross_profit"] - gross[0, 0]) < 1e-9
                and abs(m["gross_profit"] - m["costs"] - m["net_profit"]) < 1e-9
            )
    pooled = gross.mean(0)  # agents share a path; paths are independent, so blocks of one
    low, high = block_bootstrap_interval(pooled, np.mean, level=LEVEL, block_length=1, n=5000, seed=0)
    print(
        f"\ntrained with {training_costs} costs: {len(agents)} agents × {PATHS} fresh paths, {trades} "
        f"trades; gross P&L per path {pooled.mean():+.2f} [{low:+.2f}, {high:+.2f}] ({LEVEL:.0%}), costs "
        f"{costs.mean():.2f}, net {(gross - costs).mean():+.2f}"
    )
    assert low <= 0 <= high
    if training_costs == "zero":
        assert trades > 100, "agents that never trade prove nothing"
