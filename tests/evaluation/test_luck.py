"""What luck would show: overfitting and deflated Sharpe ratio, against plain formulas and the ledger."""

import itertools
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from small_ledgers import DATA, day_names, sweep, trial, trials_of

from trading_lib import ledger as ledgers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ledger(tmp_path) -> Path:
    return ledgers.ledger_path(tmp_path, "SIM-USD")


# --- luck -----------------------------------------------------------------------------------------


def backtest_overfitting(matrix, n_blocks) -> float:
    "Bailey et al. 2017, algorithm 2.3, written plainly."
    blocks, overfitted, choices = np.array_split(np.arange(len(matrix)), n_blocks), 0, 0

    def sharpe(rows):
        return matrix[rows].mean(0) / matrix[rows].std(0, ddof=1)

    for chosen in itertools.combinations(range(n_blocks), n_blocks // 2):
        inside = sharpe(np.concatenate([blocks[i] for i in chosen]))
        outside = sharpe(np.concatenate([blocks[i] for i in range(n_blocks) if i not in chosen]))
        winner = inside.argmax()
        overfitted += (outside < outside[winner]).sum() + 1 <= (matrix.shape[1] + 1) / 2
        choices += 1
    return overfitted / choices


@pytest.mark.parametrize(
    "seed, n_days, n, blocks", [(0, 12, 5, 6), (1, 8, 3, 4), (2, 24, 7, 12), (3, 36, 4, 12)]
)
def test_probability_of_backtest_overfitting_of_a_known_matrix(seed, n_days, n, blocks):
    matrix = np.random.default_rng(seed).normal(0.0005, 0.01, (n_days, n)).round(6)
    found = ledgers.overfitting_probability(trials_of(matrix))
    usable = found.blocks
    assert (
        usable % 2 == 0
        and usable <= 16
        and n_days // usable >= 2
        and usable >= min(16, n_days // 4 * 2)
        and (found.trials, found.days, found.left_out, found.reason) == (n, n_days, 0, None)
    )
    if n_days % usable == 0:
        assert found.probability == backtest_overfitting(matrix, usable)
    assert usable == {12: 6, 8: 4, 24: 12, 36: 16}[n_days] and (n_days == 36 or usable == blocks)


def test_a_real_edge_is_not_overfitting_and_an_inverted_one_is():
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.01, (64, 6))
    assert ledgers.overfitting_probability(trials_of(noise + [0.02, 0, 0, 0, 0, 0])).probability == 0
    halves = np.where(np.arange(64) % 32 < 16, 1, -1)[:, None] * np.eye(2)[:, [0, 1]].sum(
        0
    )  # what wins in one half loses in the other
    flipping = np.hstack([halves[:, :1], -halves[:, :1]]) * 0.01 + noise[:, :2] * 0.01
    assert ledgers.overfitting_probability(trials_of(flipping)).probability > 0.5


def test_identical_and_flat_trials_do_not_break_it():
    matrix = np.random.default_rng(5).normal(0, 0.01, (12, 4)).round(6)
    flat = np.zeros((12, 3))
    alone = ledgers.overfitting_probability(trials_of(np.hstack([matrix, flat[:, :1]])))
    many = ledgers.overfitting_probability(trials_of(np.hstack([matrix, flat, matrix[:, :2]])))
    assert alone.probability == many.probability and (many.trials, many.left_out) == (5, 4)
    never = ledgers.overfitting_probability(trials_of(flat))
    assert never.probability is None and "nothing to choose" in never.reason
    # losers and two that never trade: not trading wins inside and outside
    assert (
        ledgers.overfitting_probability(trials_of(np.hstack([np.abs(matrix) * -1, flat[:, :2]]))).probability
        == 0
    )


def test_too_few_trials_or_days_give_the_reason():
    matrix = np.random.default_rng(0).normal(size=(20, 3)) / 100
    for trials, words in (
        ([], "0 trial"),
        (trials_of(matrix[:, :1]), "1 trial"),
        (trials_of(matrix[:7]), "7 days in common"),
        ([trial(seed=i, days=[], returns=[]) for i in range(3)], "0 trial"),
    ):
        found = ledgers.overfitting_probability(trials)
        assert (
            found.probability is None
            and words in found.reason
            and found.left_out + found.trials == len(trials)
        )
    assert (
        ledgers.overfitting_probability(trials_of(matrix[:8])).blocks == 4
        and ledgers.overfitting_probability(trials_of(np.random.default_rng(0).normal(size=(200, 3)))).blocks
        == 16
    )


def test_more_trials_than_days_are_thinned_and_counted():
    matrix = np.random.default_rng(0).normal(size=(10, 25)).round(6) / 100
    found = ledgers.overfitting_probability(trials_of(matrix))
    assert (found.trials, found.left_out, found.days) == (10, 15, 10) and 0 <= found.probability <= 1
    assert (
        found.probability
        == ledgers.overfitting_probability(
            trials_of(matrix[:, np.linspace(0, 24, 10).round().astype(int)])
        ).probability
    )


def test_returns_of_the_largest_group_over_its_common_days():
    matrix = np.arange(24).reshape(8, 3) / 1000
    group = trials_of(matrix)
    group[1] |= dict(days=group[1]["days"][2:], returns=group[1]["returns"][2:])
    other = trials_of(matrix[:, :2], data=DATA | {"sha256": "cd" * 32}) + [
        trial(seed=77, span=("2020-01-01", "2020-02-01")),
        trial(seed=78, days=[], returns=[]),
    ]
    found = ledgers.trial_returns(other[:1] + group + other[1:])
    assert (
        found.left_out == 4
        and found.days == day_names(8)[2:]
        and np.array_equal(found.matrix, matrix[2:])
        and found.keys == [ledgers.Trial(**t).key for t in group]
    )
    # of two equally large groups the later one
    assert ledgers.trial_returns(trials_of(matrix) + trials_of(matrix * 2, timeframe="1Hour")).matrix[
        1, 0
    ] == pytest.approx(0.006)
    assert ledgers.trial_returns([]).matrix.shape == (0, 0) and ledgers.trial_returns([]).left_out == 0


def by_hand(returns, n, variance) -> float:
    "Bailey & López de Prado 2014, equations 1 and 2."
    normal, r = NormalDist(), np.asarray(returns)
    z = (r - r.mean()) / r.std()
    sharpe, skewness, kurtosis = r.mean() / r.std(ddof=1), (z**3).mean(), (z**4).mean()
    expected = math.sqrt(variance) * (
        (1 - 0.5772156649015329) * normal.inv_cdf(1 - 1 / n)
        + 0.5772156649015329 * normal.inv_cdf(1 - 1 / (n * math.e))
    )
    return normal.cdf(
        (sharpe - expected)
        * math.sqrt(len(r) - 1)
        / math.sqrt(1 - skewness * sharpe + (kurtosis - 1) / 4 * sharpe**2)
    )


def test_deflated_sharpe_counts_the_ledger(ledger):
    ledgers.record_trials(ledger, sweep())
    trials = ledgers.read_trials(ledger)
    returns = np.random.default_rng(3).normal(0.0012, 0.02, 3000)
    found = ledgers.luck_adjusted(returns, trials)
    assert found["n_trials"] == 40 and found["deflated_sharpe"] == pytest.approx(
        by_hand(returns, 40, 1 / 2999), rel=1e-12
    )
    spread = np.var([0.01 * seed for seed in range(8) for _ in range(5)], ddof=1)
    assert found["deflated_sharpe_of_spread"] == pytest.approx(by_hand(returns, 40, spread), rel=1e-9)
    assert (
        found["overfitting_probability"] == ledgers.overfitting_probability(trials).probability is not None
        and found["overfitting_trials"] == 10
        and found["overfitting_left_out"] == 30
    )
    # every further trial lowers it, the same ones again do not
    ledgers.record_trials(ledger, sweep())
    assert ledgers.luck_adjusted(returns, ledgers.read_trials(ledger)) == found
    ledgers.record_trials(ledger, sweep(learning_rate=1e-3))
    assert (
        ledgers.luck_adjusted(returns, ledgers.read_trials(ledger))["deflated_sharpe"]
        < found["deflated_sharpe"]
        < ledgers.luck_adjusted(returns, [])["deflated_sharpe"]
    )


def test_sharpe_ratios_of_other_bars_are_not_compared_but_counted():
    quarter, hour = (
        trials_of(np.ones((3, 6)) / 100),
        [
            t | {"sharpe_per_bar": 9.0 * t["seed"]}
            for t in trials_of(np.ones((3, 4)) / 100, timeframe="1Hour")
        ],
    )
    quarter = [t | {"sharpe_per_bar": 0.01 * t["seed"]} for t in quarter]
    returns = np.random.default_rng(3).normal(0.0012, 0.02, 3000)
    found = ledgers.luck_adjusted(returns, quarter + hour, "15Min")
    assert found["n_trials"] == 10 and found["deflated_sharpe_of_spread"] == pytest.approx(
        by_hand(returns, 10, np.var([0.01 * i for i in range(6)], ddof=1)), rel=1e-9
    )
    assert (
        ledgers.luck_adjusted(returns, quarter + hour)["deflated_sharpe_of_spread"] < 1e-9
    )  # the last trial's bars
    none = ledgers.luck_adjusted(returns, [])
    assert (
        none["n_trials"] == 1
        and none["deflated_sharpe_of_spread"] is None
        and none["overfitting_reason"].startswith("0 trial")
    )
