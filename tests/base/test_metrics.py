"""Metrics against other libraries' numbers, the papers' own examples, brute force, and arithmetic on
paper."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from trading_lib import metrics as M
from trading_lib.config import InputError

# 600 deterministic returns; no generator, so that other libraries saw the same ones
STEP = np.arange(600)
RETURNS = 0.004 * np.sin(STEP * STEP * 0.7) + 0.003 * np.sin(STEP * 0.05) + 0.0002 + 0.01 * (STEP % 97 == 0)
PERIODS = 6464.0  # 15Min bars of 2025 at the New York Stock Exchange
EQUITY = np.cumprod(np.r_[1.0, 1 + RETURNS])


@pytest.mark.parametrize(
    "ours, theirs, library",
    [
        (lambda: M.sharpe_ratio(RETURNS, PERIODS), 7.108985464657349, "quantstats 0.0.86"),
        (lambda: M.sharpe_ratio(RETURNS, PERIODS), 7.1089854646573585, "empyrical-reloaded 0.7.1"),
        (lambda: M.sortino_ratio(RETURNS, PERIODS), 11.273580363218962, "quantstats 0.0.86"),
        (lambda: M.sortino_ratio(RETURNS, PERIODS), 11.273580363218977, "empyrical-reloaded 0.7.1"),
        (
            lambda: M.volatility(RETURNS, PERIODS),
            0.29447873028639904,
            "quantstats 0.0.86, empyrical-reloaded 0.7.1",
        ),
        (lambda: M.annual_return(RETURNS, PERIODS), 6.76693009243635, "empyrical-reloaded 0.7.1"),
        (lambda: M.calmar_ratio(RETURNS, PERIODS), 61.14669706823022, "empyrical-reloaded 0.7.1"),
        (lambda: M.max_drawdown(EQUITY), 0.11066714012182055, "quantstats 0.0.86, empyrical-reloaded 0.7.1"),
        (lambda: M.skewness(RETURNS), 0.2687787070812895, "quantstats 0.0.86"),
        (lambda: M.skewness(RETURNS, adjusted=False), 0.26810629313875517, "scipy 1.17.1"),
        (lambda: M.kurtosis(RETURNS), 2.838478569223055, "scipy 1.17.1, fisher=False"),
        (lambda: M.tail_ratio(RETURNS), 1.1365743337306593, "quantstats 0.0.86, empyrical-reloaded 0.7.1"),
        (lambda: M.profit_factor(RETURNS), 1.2419123206349891, "quantstats 0.0.86"),
        (lambda: M.optimal_block_length(RETURNS), 36.941445, "arch 8.0.0"),
    ],
)
def test_agrees_with_other_libraries(ours, theirs, library):
    assert math.isclose(ours(), theirs, rel_tol=1e-7 if "arch" in library else 1e-12), library


def test_lists_arrays_and_tensors_are_the_same():
    expected = M.sharpe_ratio(RETURNS, PERIODS)
    assert (
        expected
        == M.sharpe_ratio(RETURNS.tolist(), PERIODS)
        == M.sharpe_ratio(torch.tensor(RETURNS, requires_grad=True), PERIODS)
        == M.sharpe_ratio(pd.Series(RETURNS), PERIODS)
    )
    assert type(expected) is float


@pytest.mark.parametrize(
    "function",
    [
        M.sharpe_ratio,
        M.sortino_ratio,
        M.max_drawdown,
        M.profit_factor,
        M.win_rate,
        M.skewness,
        M.tail_ratio,
        M.probabilistic_sharpe_ratio,
        M.block_bootstrap_interval,
    ],
)
def test_nan_is_an_error_with_its_count(function):
    with pytest.raises(InputError, match="2 of 4 values are NaN or infinite"):
        function([1.0, float("nan"), float("inf"), 2.0])


def test_defined_cases():
    for flat in ([], [0.0], [0.01], [0.0] * 9, [0.01] * 9):
        assert (
            M.sharpe_ratio(flat, 252) == 0.0 == M.volatility(flat, 252)
            and M.probabilistic_sharpe_ratio(flat) == 0.5
            and M.skewness(flat) == 0.0
            and M.kurtosis(flat) == 3.0
        )
    for nothing in ([], [0.0], [0.0] * 9):
        assert (
            M.sortino_ratio(nothing, 252)
            == M.calmar_ratio(nothing, 252)
            == M.annual_return(nothing, 252)
            == 0.0
            and M.tail_ratio(nothing) == 1.0
        )
    assert M.sortino_ratio([0.1, 0.2], 252) == M.calmar_ratio([0.1, 0.2], 252) == math.inf
    assert M.annual_return([-1.0, 0.5], 252) == -1.0 and M.annual_return([0.5], 1e6) == math.inf
    assert (
        M.profit_factor([]) == 0.0
        and M.profit_factor([0.0]) == 0.0
        and M.profit_factor([2.0]) == math.inf
        and M.profit_factor([-2.0]) == 0.0
    )
    assert M.max_drawdown([3.0]) == 0.0 and M.drawdown_length([3.0]) == 0 and M.max_drawdown([100, 0]) == 1.0
    with pytest.raises(InputError, match="at least 1 value"):
        M.max_drawdown([])
    with pytest.raises(InputError, match="start above 0"):
        M.max_drawdown([0.0, 1.0])
    # rounding alone is not volatility
    assert M.sharpe_ratio(M.equity_returns(np.full(50, 1000.0) * (1 + 1e-16 * np.arange(50))), 252) == 0.0


def test_drawdown_length_counts_bars_below_a_high():
    assert (
        M.drawdown_length([5, 4, 5, 3, 3, 4, 5, 6]) == 3
        and M.drawdown_length([5, 6, 4, 4, 4]) == 3
        and M.drawdown_length([1, 2, 3]) == 0
    )


# --- time ---------------------------------------------------------------------------------------------------


def test_periods_per_year_are_the_calendars():
    assert M.periods_per_year("15Min", "equity", "2025-01-01", "2026-01-01") == 6464.0 != 252 * 26
    assert M.periods_per_year("15Min", "crypto", "2025-01-01", "2026-01-01") == 365 * 96
    assert M.periods_per_year("1Day", "equity", "2025-01-01", "2026-01-01") == 250.0


def test_consistency_counts_calendar_weeks():
    # hourly values; week k of 9 ends k % 3 above or below its start
    index = pd.date_range("2024-01-01", "2024-03-04", freq="1h", tz="UTC", inclusive="left")
    week = np.arange(len(index)) // 168
    gain = np.where(week % 3 == 0, -1.0, 1.0)
    equity = 1000 + np.cumsum(gain * 0.1)
    equity[0] = 1000
    assert M.consistency(equity, index) == 6 / 9
    for form in (
        index.tz_convert("America/New_York"),
        index.as_unit("ns").asi8,
        index.tz_localize(None).to_numpy(),
    ):
        assert M.consistency(equity, form) == 6 / 9
    # by resampling, the slow way
    ends = pd.Series(equity, index).resample("W-SUN").last()
    assert (ends.diff().fillna(ends.iloc[0] - 1000) > 0).mean() == 6 / 9
    # fewer than eight weeks: ten parts of equal length
    short = slice(0, 5 * 168)
    parts = [equity[short][round(k * (5 * 168 - 1) / 10)] for k in range(11)]
    assert M.consistency(equity[short], index[short]) == np.mean(np.diff(parts) > 0)


def test_consistency_across_a_gap_and_bad_times():
    days = np.datetime64("2024-01-01") + np.r_[0:30, 60:100]  # a month without data is no week
    assert (
        M.consistency(np.linspace(1, 2, 70), days) == 1.0
        and M.consistency(np.linspace(2, 1, 70), days) == 0.0
    )
    with pytest.raises(InputError, match="rise strictly"):
        M.consistency([1, 2, 3], days[[0, 2, 1]])
    with pytest.raises(InputError, match="one for each of 3"):
        M.consistency([1, 2, 3], days[:2])


# --- bootstrap ----------------------------------------------------------------------------------------------


def autoregressive() -> np.ndarray:
    x = [0.0]
    for k in range(1, 900):
        x.append(0.6 * x[-1] + math.sin(k * k * 0.37))
    return np.array(x)


def test_bootstrap_agrees_with_arch():
    x = autoregressive()
    assert math.isclose(M.optimal_block_length(x), 14.482218, rel_tol=1e-7)  # arch 8.0.0
    # arch 8.0.0, StationaryBootstrap(7, x, seed=1).conf_int(np.mean, 20000, method="percentile"):
    # -0.14918941, 0.06216934
    low, high = M.block_bootstrap_interval(x, block_length=7, n=10000)
    assert abs(low + 0.14918941) < 0.005 and abs(high - 0.06216934) < 0.005
    assert (
        M.block_bootstrap_interval(x, n=200)
        == M.block_bootstrap_interval(x, n=200)
        != M.block_bootstrap_interval(x, n=200, seed=1)
    )


def test_bootstrap_blocks_have_the_stated_mean_length_and_cover_evenly():
    indices = M.stationary_bootstrap_indices(500, 10.0, 400, np.random.default_rng(0))
    assert indices.shape == (400, 500) and indices.min() == 0 and indices.max() == 499
    continued = (np.diff(indices, axis=1) % 500 == 1).mean()
    assert (
        abs(continued - (0.9 + 0.1 / 500)) < 0.003
    )  # a new block starts at the next value by chance once in 500
    counts = np.bincount(indices.ravel(), minlength=500)
    assert abs(counts - 400).max() < 400 * 0.6


def test_bootstrap_interval_covers_as_often_as_it_says():
    generator, covered = np.random.default_rng(3), 0
    for _ in range(200):
        low, high = M.block_bootstrap_interval(generator.normal(size=200), n=200, block_length=3)
        covered += low <= 0 <= high
    assert 0.89 <= covered / 200 <= 0.985


def test_bootstrap_refuses_nonsense():
    for wrong in (dict(level=1.5), dict(block_length=0.5), dict(n=0)):
        with pytest.raises(InputError):
            M.block_bootstrap_interval([1.0, 2.0, 3.0], **wrong)
    with pytest.raises(InputError, match="at least 2"):
        M.block_bootstrap_interval([1.0])


# --- luck ---------------------------------------------------------------------------------------------------


def test_probabilistic_sharpe_ratio_by_hand():
    n, s = len(RETURNS), RETURNS.mean() / RETURNS.std(ddof=1)
    z = (
        (s - 0.05)
        * math.sqrt(n - 1)
        / math.sqrt(1 - 0.26810629313875517 * s + (2.838478569223055 - 1) / 4 * s * s)
    )  # moments by scipy 1.17.1
    assert math.isclose(
        M.probabilistic_sharpe_ratio(RETURNS, 0.05), 0.5 * (1 + math.erf(z / math.sqrt(2))), rel_tol=1e-12
    )
    # quantstats 0.0.86 and purgedcv 0.1.11 take other estimators of the moments
    assert (
        abs(M.probabilistic_sharpe_ratio(RETURNS) - 0.985599851433436) < 1e-5
        and abs(M.probabilistic_sharpe_ratio(RETURNS) - 0.9856669767804628) < 1e-4
    )
    # given purgedcv's (divisor n, adjusted skewness and kurtosis), its numbers to rounding
    theirs = RETURNS.mean() / RETURNS.std(), 0.2687787070812895, 3 - 0.15280850618272376
    for benchmark, expected in (
        (0.0, 0.9856669767804628),
        (0.05, 0.8293993769176197),
        (M.expected_maximum_sharpe(20, 0.002), 0.5344102306919216),
    ):
        assert math.isclose(
            M.sharpe_probability(theirs[0], benchmark, n, *theirs[1:]), expected, rel_tol=1e-12
        )


def test_deflated_sharpe_ratio_of_the_paper():
    "Bailey & López de Prado 2014, the numerical example: 0.1132, 0.9004, and 0.9505 with 46 trials."
    assert round(M.expected_maximum_sharpe(100, 0.5 / 250), 4) == 0.1132
    for trials, expected in ((100, 0.9004), (46, 0.9505)):
        assert (
            round(
                M.sharpe_probability(
                    2.5 / math.sqrt(250), M.expected_maximum_sharpe(trials, 0.5 / 250), 1250, -3, 10
                ),
                4,
            )
            == expected
        )
    # raw kurtosis: excess would give another number
    assert (
        round(
            M.sharpe_probability(
                2.5 / math.sqrt(250), M.expected_maximum_sharpe(100, 0.5 / 250), 1250, -3, 7
            ),
            4,
        )
        != 0.9004
    )


def test_deflated_sharpe_ratio_falls_with_the_number_of_trials():
    values = [M.deflated_sharpe_ratio(RETURNS, n) for n in (1, 2, 10, 100, 10_000)]
    assert (
        values == sorted(values, reverse=True)
        and len(set(values)) == 5
        and values[0] == M.probabilistic_sharpe_ratio(RETURNS)
    )
    trials = [0.01, 0.03, -0.02, 0.05]
    benchmark = M.expected_maximum_sharpe(4, float(np.var(trials, ddof=1)))
    assert math.isclose(
        M.deflated_sharpe_ratio(RETURNS, 4, trials),
        M.probabilistic_sharpe_ratio(RETURNS, benchmark),
        rel_tol=1e-12,
    )
    assert (
        M.deflated_sharpe_ratio(M.sharpe_moments(RETURNS), 4, trials)
        == M.deflated_sharpe_ratio(RETURNS, 4, trials)
        and M.deflated_sharpe_ratio(M.sharpe_moments(RETURNS), 10) == values[2]
    )
    with pytest.raises(InputError, match="n_trials"):
        M.deflated_sharpe_ratio(RETURNS, 0)


# --- overfitting --------------------------------------------------------------------------------------------

ROWS, COLUMNS = np.arange(240)[:, None], np.arange(12)[None, :]
TRIALS = 0.01 * np.sin((ROWS * ROWS * 0.7) * (COLUMNS + 1) + COLUMNS) + 0.0005 * np.cos(COLUMNS * 2.1)
EDGE = TRIALS + 0.006 * (COLUMNS == 4)
DRIFTING = TRIALS + 0.0011 * np.cos(COLUMNS * 1.3 + ROWS * 0.02)


@pytest.mark.parametrize(
    "matrix, blocks, expected",
    [
        (TRIALS, 10, 0.42063492063492064),
        (TRIALS, 8, 0.44285714285714284),
        (EDGE, 10, 0.0),
        (EDGE, 8, 0.0),
        (DRIFTING, 8, 0.5),
    ],
)
def test_overfitting_probability_agrees_with_two_libraries(matrix, blocks, expected):
    "purgedcv 0.1.11 (transposed) and ffn 1.4.1 both give these."
    assert math.isclose(M.probability_of_backtest_overfitting(matrix, blocks), expected, rel_tol=1e-12)


def test_overfitting_probability_by_brute_force():
    matrix, blocks = np.random.default_rng(5).normal(size=(103, 6)), 6  # blocks of unequal length
    edges = [round(k * 103 / blocks) for k in range(blocks + 1)]
    parts = [np.arange(a, b) for a, b in itertools.pairwise(edges)]
    bad = []

    def sharpes(rows):
        return [matrix[rows, c].mean() / matrix[rows, c].std(ddof=1) for c in range(6)]

    for chosen in itertools.combinations(range(blocks), blocks // 2):
        inside = np.concatenate([parts[k] for k in chosen])
        outside = np.setdiff1d(np.arange(103), inside)
        best, scores = int(np.argmax(sharpes(inside))), sharpes(outside)
        rank = sorted(scores).index(scores[best]) + 1
        bad.append(math.log(rank / 7 / (1 - rank / 7)) <= 0)
    assert math.isclose(M.probability_of_backtest_overfitting(matrix, blocks), np.mean(bad), rel_tol=1e-12)


def test_overfitting_probability_of_flat_configurations_is_defined():
    assert (
        M.probability_of_backtest_overfitting(np.zeros((64, 3)), 8) == 1.0
    )  # all tied: the winner is no better than the median
    with_constant = np.c_[TRIALS, np.full(240, 0.001)]
    assert 0 <= M.probability_of_backtest_overfitting(with_constant, 8) <= 1


@pytest.mark.parametrize(
    "matrix, blocks, words",
    [
        (TRIALS.T, 10, "looks transposed"),
        (TRIALS[:19], 10, "at least 20 observations"),
        (TRIALS[:, :1], 10, "at least 2 configurations"),
        (TRIALS[:, 0], 10, "matrix"),
        (TRIALS, 7, "even"),
        (np.where(ROWS == 3, np.nan, TRIALS), 10, "NaN"),
    ],
)
def test_overfitting_probability_refuses_what_it_would_get_wrong(matrix, blocks, words):
    with pytest.raises(InputError, match=words):
        M.probability_of_backtest_overfitting(matrix, blocks)


# --- gate ---------------------------------------------------------------------------------------------------

GOOD = {"profit_factor": 2.0, "consistency": 0.85, "max_drawdown": 0.08, "deflated_sharpe": 0.95}


def test_fitness_on_paper():
    assert math.isclose(M.fitness(2.0, 0.85, 0.08), 0.4 * 0.8 + 0.3 * 0.85 + 0.3 * 0.6)
    assert (
        math.isclose(M.fitness(math.inf, 1.0, 0.0), 1.0)
        and math.isclose(M.fitness(0.0, 0.0, 0.5), 0.0, abs_tol=1e-15)
        and M.fitness(5.0, 0, 1) == 0.4
    )


@pytest.mark.parametrize(
    "change, verdict, failed",
    [
        ({}, "APPROVED", []),
        ({"max_drawdown": 0.0801}, "REVIEW", ["max_drawdown"]),
        ({"consistency": 0.849}, "REVIEW", ["consistency"]),
        ({"deflated_sharpe": 0.9499}, "REVIEW", ["deflated_sharpe"]),
        ({"deflated_sharpe": None}, "REVIEW", ["deflated_sharpe"]),
        ({"profit_factor": 1.79, "consistency": 1.0}, "REVIEW", ["profit_factor"]),
        ({"fitness": 0.69}, "REVIEW", ["fitness"]),
        ({"fitness": 0.49}, "DROP", ["fitness"]),
        ({"max_drawdown": 0.151}, "DROP", ["fitness", "max_drawdown"]),
        ({"profit_factor": 1.29}, "DROP", ["fitness", "profit_factor"]),
        ({"consistency": 0.649}, "DROP", ["consistency"]),
        ({"profit_factor": None}, "DROP", ["fitness", "profit_factor"]),
        ({"consistency": float("nan")}, "DROP", ["fitness", "consistency"]),
    ],
)
def test_gate(change, verdict, failed):
    result = M.assess_model_quality({**GOOD, **change})
    assert result["verdict"] == verdict
    if verdict == "APPROVED":
        assert result["failed"] == {}
    else:
        assert [reason.split()[0] for reason in result["failed"]["APPROVED"]] == failed or verdict == "DROP"
    if verdict == "DROP":
        assert (
            set(failed) >= {reason.split()[0] for reason in result["failed"]["REVIEW"]}
            and result["failed"]["REVIEW"]
        )


def test_gate_reasons_are_words():
    assert M.assess_model_quality({**GOOD, "max_drawdown": 0.1})["failed"]["APPROVED"] == [
        "max_drawdown 0.1, APPROVED needs <= 0.08"
    ]
    assert "profit_factor is unknown, REVIEW needs >= 1.3" in M.assess_model_quality({})["failed"]["REVIEW"]


def test_gate_reads_none_after_json_as_no_losing_trade_only_where_it_was():
    assert M.assess_model_quality({**GOOD, "profit_factor": None, "win_rate": 1.0})["verdict"] == "APPROVED"
    assert M.assess_model_quality({**GOOD, "profit_factor": None, "win_rate": None})["verdict"] == "DROP"


@pytest.mark.parametrize(
    "values, words",
    [
        ([0.6, 0.8, 0.77], []),
        ([0.7, 0.8, 0.75], ["declined 6.2%", "'b' is the better"]),
        ([0.5, 0.8, 0.5, 0.8], ["oscillates: 30.8%"]),
        ([0.1, 0.3, 0.5, 0.8], []),
        ([0.8], []),
        ([], []),
    ],
)
def test_flags(values, words):
    flags = M.assess_model_quality(GOOD, list(zip("abcd", values)))["flags"]
    assert all(any(w in f for f in flags) for w in words) and bool(flags) == bool(words)


def test_composite_score_weights_and_range():
    zero = dict(average_return=0, win_rate=0, normalised_reward=0, explained_variance=0, entropy_ratio=0)

    def score(**changes):
        return M.composite_score(**zero | changes)

    assert score() == 0 and score(average_return=1, win_rate=1) == 40
    assert score(normalised_reward=1) == 20 == score(explained_variance=1) and score(entropy_ratio=1) == 10
    assert score(kl=0.05) == -5 == score(clip_fraction=0.5) and score(kl=9, clip_fraction=1) == -10
    assert M.composite_score(99, 1, 99, 1, 1) == 90 and M.composite_score(-99, 1, -99, -99, 0, 9, 9) == -90
    with pytest.raises(InputError, match="NaN"):
        score(explained_variance=float("nan"))
    assert [M.score_colour(s) for s in (20.1, 20, 0, -0.1)] == ["green", "yellow", "yellow", "red"]


# --- report -------------------------------------------------------------------------------------------------


def test_summary_is_json_and_agrees_with_its_parts():
    index = pd.date_range("2025-01-02", periods=601, freq="15min", tz="UTC")
    figures = M.summarise_equity(1000 * EQUITY, index, "15Min", "equity", trades=[30.0, -10.0, 5.0])
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert all(type(v) in (float, int, str, type(None)) for v in figures.values())
    assert (
        figures["periods_per_year"] == PERIODS
        and math.isclose(figures["sharpe"], 7.108985464657349, rel_tol=1e-9)
        and math.isclose(figures["calmar"], 61.14669706823022, rel_tol=1e-9)
    )
    assert (
        math.isclose(figures["total_return"], EQUITY[-1] - 1)
        and figures["bars"] == 600
        and figures["initial_equity"] == 1000
    )
    assert (
        figures["trades"],
        figures["profit_factor"],
        figures["win_rate"],
        figures["average_win"],
        figures["average_loss"],
    ) == (3, 3.5, 2 / 3, 17.5, -10.0)
    assert math.isclose(figures["fitness"], M.fitness(3.5, figures["consistency"], figures["max_drawdown"]))
    assert figures["drawdown_days"] * 96 == figures["drawdown_bars"] == M.drawdown_length(EQUITY)


def test_summary_of_degenerate_runs():
    index = pd.date_range("2025-01-02", periods=20, freq="1D", tz="UTC")

    def run(equity, **options):
        return M.summarise_equity(equity, index[: len(equity)], "1Day", "crypto", **options)

    cases = {
        "flat": run([5.0] * 20),
        "one value": run([5.0]),
        "two values": run([5.0, 6.0]),
        "winning": run(np.linspace(1, 2, 20), trades=[1.0]),
        "bankrupt": run([5.0, 2.0, 0.0, 0.0], trades=[-5.0]),
    }
    for figures in cases.values():
        json.dumps(figures, allow_nan=False)
    flat, winning = cases["flat"], cases["winning"]
    assert flat["sharpe"] == 0.0 and flat["trades"] == 0
    assert flat["profit_factor"] is None and flat["win_rate"] is None
    assert winning["sortino"] is None and winning["calmar"] is None
    assert winning["profit_factor"] is None and winning["win_rate"] == 1.0
    assert math.isclose(cases["winning"]["fitness"], 1.0)  # no losing trade is the best, not the worst
    assert (
        cases["bankrupt"]["total_return"] == -1.0 == cases["bankrupt"]["annual_return"]
        and cases["bankrupt"]["max_drawdown"] == 1.0
    )
    with pytest.raises(InputError, match="timestamps"):
        M.summarise_equity([1.0, 2.0], index[:1], "1Day", "crypto")


@pytest.mark.slow
def test_core_needs_neither_pandas_nor_scipy():
    import subprocess
    import sys

    without = "import sys; sys.modules['pandas'] = sys.modules['scipy'] = None"
    code = f"{without}; import trading_lib.metrics, trading_lib.version, trading_lib.checkpoint"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
