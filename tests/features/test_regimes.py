"The chains against a slow filter written from the definition, and what the feature table needs of them."

import math

import numpy as np
import pytest

from trading_lib.market.regimes import TRANSITION_FLOOR, MarkovChains, filter_chains, fit_chains, state_ages


def planted(chains=2, bars=6000, seed=0):
    "Observations of chains with known parameters."
    rng = np.random.default_rng(seed)
    parameters = MarkovChains(
        np.tile([-1.2, 0.1, 1.5], (chains, 1)),
        np.tile([0.3, 0.4, 0.5], (chains, 1)),
        np.tile([[0.89, 0.09, 0.02], [0.02, 0.89, 0.09], [0.09, 0.02, 0.89]], (chains, 1, 1)),
    )
    observations = np.empty((bars, chains))
    for c in range(chains):
        state = 1
        for t in range(bars):
            state = rng.choice(3, p=parameters.transitions[c, state])
            observations[t, c] = rng.normal(
                parameters.means[c, state], math.sqrt(parameters.variances[c, state])
            )
    return parameters, observations


def slow_filter(chains, observations):
    "Bayes' rule bar by bar, with the densities written out."
    rows = np.empty(observations.shape + (3,))
    for c in range(observations.shape[1]):
        matrix = chains.transitions[c]
        belief = np.linalg.matrix_power(matrix, 5000)[0]  # the stationary distribution, by waiting
        for t, x in enumerate(observations[:, c]):
            belief = [sum(belief[i] * matrix[i, j] for i in range(3)) for j in range(3)]
            if not math.isnan(x):
                x = min(
                    max(x, chains.means[c, 0] - 3 * math.sqrt(chains.variances[c, 0])),
                    chains.means[c, 2] + 3 * math.sqrt(chains.variances[c, 2]),
                )  # no further out than this
                belief = [
                    b * math.exp(-((x - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
                    for b, m, v in zip(belief, chains.means[c], chains.variances[c])
                ]
            belief = [b / sum(belief) for b in belief]
            rows[t, c] = belief
    return rows


def slow_log_likelihood(chains, observations):
    "Of the first chain, by the forward recursion."
    belief, total = chains.stationary[0], 0.0
    for x in observations[:, 0]:
        joint = (
            (belief @ chains.transitions[0])
            * np.exp(-((x - chains.means[0]) ** 2) / (2 * chains.variances[0]))
            / np.sqrt(2 * np.pi * chains.variances[0])
        )
        total += math.log(joint.sum())
        belief = joint / joint.sum()
    return total / len(observations)


def test_filter_equals_bayes_by_hand():
    parameters, observations = planted(bars=800)
    observations[:30], observations[200:210, 1], observations[300:305, 0] = np.nan, np.nan, -9.0
    assert (
        np.abs(filter_chains(parameters, observations) - slow_filter(parameters, observations)).max() < 1e-12
    )


def test_the_future_never_changes_the_past():
    parameters, observations = planted(bars=700)
    rows = filter_chains(parameters, observations)
    for cut in range(0, 699, 23):
        later = observations.copy()
        for change in (np.nan, np.inf, 1e300, -7.0):
            later[cut + 1 :] = change
            assert np.array_equal(filter_chains(parameters, later)[: cut + 1], rows[: cut + 1])
        assert np.array_equal(filter_chains(parameters, observations[: cut + 1]), rows[: cut + 1])


def test_probabilities_are_probabilities_even_for_absurd_observations():
    parameters, observations = planted(bars=300)
    observations[50:60], observations[100], observations[150] = 1e200, -1e9, np.inf
    rows = filter_chains(parameters, observations)
    assert np.isfinite(rows).all() and rows.min() >= 0 and np.abs(rows.sum(-1) - 1).max() < 1e-12


def test_the_filter_forgets():
    "Opposite certainties agree after 400 bars without information, thanks to the floor on transitions."
    sticky = MarkovChains(
        np.zeros((1, 3)),
        np.ones((1, 3)),
        np.array([[[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.01, 0.01, 0.98]]]),
    )
    silent = np.full((400, 1), np.nan)
    strong = MarkovChains(np.array([[-1.0, 0.0, 1.0]]), np.full((1, 3), 1e-2), sticky.transitions)
    low, high = (filter_chains(strong, np.concatenate([[[x]], silent]))[-1] for x in (-1.0, 1.0))
    assert 0 < np.abs(low - high).max() < 1e-5


def test_fit_finds_planted_parameters_and_orders_states_by_mean():
    parameters, observations = planted(bars=12_000)
    fitted = fit_chains(observations)
    assert np.abs(fitted.means - parameters.means).max() < 0.06
    assert np.abs(fitted.variances - parameters.variances).max() < 0.05
    assert np.abs(fitted.transitions - parameters.transitions).max() < 0.02
    assert (np.diff(fitted.means) > 0).all()


def test_fit_is_at_a_maximum():
    "No small step in any mean or variance makes the data more likely; the likelihood is computed bar by bar."
    _, observations = planted(chains=1, bars=1500)
    fitted = fit_chains(observations, iterations=1000, tolerance=1e-12)
    best = slow_log_likelihood(fitted, observations)
    for name in ("means", "variances"):
        for state in range(3):
            for step in (-0.05, 0.05):
                moved = {n: getattr(fitted, n).copy() for n in ("means", "variances", "transitions")}
                moved[name][0, state] += step
                assert slow_log_likelihood(MarkovChains(**moved), observations) < best


def test_chunks_make_no_difference():
    "A bar's state is known from its neighbours only: eight bars to a chunk find what one chunk finds."
    observations = planted(chains=1, bars=400)[1] + np.random.default_rng(1).normal(0, 0.7, (400, 1))
    whole, cut = (
        fit_chains(observations, chunk=chunk, iterations=200, tolerance=1e-13) for chunk in (400, 8)
    )
    for name in ("means", "variances", "transitions"):
        assert np.abs(getattr(whole, name) - getattr(cut, name)).max() < 1e-4


def test_transition_floor_binds_where_the_data_would_go_lower():
    observations = np.repeat([-1.0, 1.0, 0.0, 1.0, -1.0], 400)[:, None] + 0.05 * np.random.default_rng(
        0
    ).standard_normal((2000, 1))  # states that last 400 bars
    fitted = fit_chains(observations)
    assert (
        fitted.transitions.min() == pytest.approx(TRANSITION_FLOOR)
        and np.abs(fitted.transitions.sum(-1) - 1).max() < 1e-12
    )
    assert np.abs(fitted.means[0] - [-1, 0, 1]).max() < 0.02


def test_fit_is_deterministic_and_chains_do_not_mix():
    _, observations = planted(bars=4000)
    a, b = fit_chains(observations), fit_chains(observations)
    assert all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("means", "variances", "transitions"))
    other = observations.copy()
    other[:, 1] = other[::-1, 1] * 3
    assert np.abs(fit_chains(other).means[0] - a.means[0]).max() < 1e-2  # up to when the iteration stops


def test_segments_are_not_neighbours():
    "One state per segment of two bars: no transition is seen, though states alternate between segments."
    observations = np.repeat(np.tile([-1.0, 0.0, 1.0], 400), 2)[:, None] + 0.01 * np.random.default_rng(
        0
    ).standard_normal((2400, 1))
    fitted = fit_chains(observations, segment=np.arange(2400) // 2)
    assert np.diagonal(fitted.transitions[0]).min() > 0.97
    assert np.diagonal(fit_chains(observations).transitions[0]).max() < 0.6


def test_the_order_of_segments_does_not_matter():
    observations = (
        planted(chains=1, bars=1600)[1] + np.random.default_rng(1).normal(0, 0.7, (1600, 1))
    ).reshape(200, 8, 1)
    other = observations[np.random.default_rng(2).permutation(200)]
    a, b = (
        fit_chains(
            x.reshape(1600, 1), segment=np.repeat(np.arange(200), 8), chunk=8, iterations=60, tolerance=0
        )
        for x in (observations, other)
    )
    for name in ("means", "variances", "transitions"):
        assert np.abs(getattr(a, name) - getattr(b, name)).max() < 1e-9


@pytest.mark.parametrize(
    "observations",
    [
        np.zeros((500, 2)),
        np.full((500, 2), np.nan),
        np.r_[np.zeros((499, 2)), np.ones((1, 2))],
        np.full((1, 2), 3.0),
        np.full((64, 2), 1e-9),
    ],
)
def test_degenerate_data_give_finite_chains(observations):
    fitted = fit_chains(observations)
    rows = filter_chains(fitted, observations)
    assert (
        all(np.isfinite(getattr(fitted, n)).all() for n in ("means", "variances", "transitions"))
        and np.isfinite(rows).all()
    )
    assert np.abs(fitted.transitions.sum(-1) - 1).max() < 1e-12 and fitted.variances.min() > 0


def test_ages():
    rows = np.eye(3)[np.array([2, 2, 2, 0, 0, 1, 1, 1, 1])][:, None]
    assert state_ages(rows)[:, 0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
