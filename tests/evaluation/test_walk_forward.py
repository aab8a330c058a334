"""Folds by arithmetic and against skfolio, folds that are one direct backtest each to the last bit,
models that have seen too much, runs that are killed and go on.
"""

import functools
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
import torch
from skfolio.model_selection import CombinatorialPurgedCV

from trading_lib.backtest import run_backtest, training_span
from trading_lib.checkpoint import save_checkpoint
from trading_lib.config import AccountConfig, InputError
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data, split_bounds
from trading_lib.features import fit_features
from trading_lib.metrics import block_bootstrap_interval, sharpe_ratio
from trading_lib.reporting.walk_forward import plot_walk_forward, summary_rows, write_walk_forward
from trading_lib.sources import simulate_market
from trading_lib.trainer import NativePPOConfig, NativePPOTrainer
from trading_lib.walk_forward import (
    Fold,
    WalkForwardResult,
    chain_curves,
    check_folds,
    combinatorial_paths,
    combinatorial_purged_folds,
    walk_forward,
    walk_forward_folds,
)

ACCOUNT = AccountConfig(costs="conservative")
MARKET = dict(version="5.6.0", timeframe="15Min", asset_class="crypto")
# a window of 20: spans lie 21 bars apart or more
FOLDS = [
    Fold(1, (0, 1400), (1421, 1600), (1621, 1750)),
    Fold(2, (0, 1529), (1550, 1729), (1750, 1880)),
    Fold(3, (0, 1650), (1671, 1850), (1880, 2000)),
]
SHORT = [
    replace(f, test=(f.test[0], f.test[0] + 25)) for f in FOLDS
]  # where it does not matter what the agent does
SETTINGS = dict(
    hidden_dims=(8,), n_steps=16, minibatch_size=64, n_epochs=1, total_timesteps=512, validation_interval=1
)


@functools.cache
def simulated():
    return simulate_market(
        "SIM-USD", "15Min", "2023-01-01", "2023-01-24", seed=3, edge=0.2, asset_class="crypto"
    )


def bars():
    return simulated()[0]


def walk(folds=FOLDS, **options):
    return walk_forward(
        options.pop("bars", bars()),
        folds,
        **{
            **MARKET,
            "account": ACCOUNT,
            "window": 20,
            "symbol": "SIM-USD",
            "random_policies": 0,
            "progress": None,
        }
        | options,
    )


def env_of(market, n_envs=16):
    return GPUVectorizedTradingEnv(
        market,
        GPUEnvConfig(
            n_envs=n_envs, window=market.window, episode_length=32, reward_preset="equity", account=ACCOUNT
        ),
    )


def untrained(market, fold=None, seed=2):
    "A network with random weights: it trades, and costs nothing to make."
    content = NativePPOTrainer(
        env_of(market, 1), NativePPOConfig(hidden_dims=(8,), seed=seed), progress=None
    ).content()
    del content["data"]["spans"]  # as if nobody had recorded them
    return content


@functools.cache
def model(train=(0, 1400), end=1600, seed=2):
    "A model whose features were fitted on one span, from a history that ends with another."
    fit = fit_features(bars().iloc[slice(*train)], *MARKET.values())
    return untrained(
        market_data(bars().iloc[:end], MARKET["version"], fit, "15Min", "crypto", 20, "SIM-USD").span(*train),
        seed=seed,
    )


@functools.cache
def retrained(folds=None):
    return walk(list(folds or FOLDS), train=untrained)


# folds, on paper


def test_expanding_folds_on_paper():
    """1000 bars, tests from the middle, a fifth of what lies before them to choose; the purge is 10 + 2
    + 3 = 15. Tests begin at 500, 666 and 833; a fifth of those is 100, 133 and 166.
    """
    assert walk_forward_folds(
        1000,
        3,
        "expanding",
        window=10,
        horizon=2,
        embargo=3,
        first_train_fraction=0.5,
        validation_fraction=0.2,
    ) == [
        Fold(1, (0, 385), (400, 485), (500, 666)),
        Fold(2, (0, 518), (533, 651), (666, 833)),
        Fold(3, (0, 652), (667, 818), (833, 1000)),
    ]


def test_rolling_folds_on_paper():
    "The same, with 500 bars before each test: 385 train, 85 choose, twice 15 are purged."
    assert walk_forward_folds(
        1000, 3, "rolling", window=10, horizon=2, embargo=3, first_train_fraction=0.5, validation_fraction=0.2
    ) == [
        Fold(1, (0, 385), (400, 485), (500, 666)),
        Fold(2, (166, 551), (566, 651), (666, 833)),
        Fold(3, (333, 718), (733, 818), (833, 1000)),
    ]


def test_one_fold_is_the_usual_split_less_its_purge():
    "Half before the test, half of that to choose."
    for n in (5000, 7760, 12_440):
        (fold,), spans = (
            walk_forward_folds(n, 1, first_train_fraction=0.5, validation_fraction=0.5),
            split_bounds(n, 0.25, 0.25),
        )
        assert (
            (fold.train[0], fold.train[1] + 101) == spans["train"]
            and (fold.validation[0], fold.validation[1] + 101) == spans["validation"]
            and fold.test == spans["test"]
        )


def settings():
    "Random settings, possible and impossible ones."
    draw = random.Random(0)
    for _ in range(600):
        yield dict(
            n_bars=draw.randint(50, 6000),
            n_folds=draw.randint(1, 9),
            scheme=draw.choice(["expanding", "rolling"]),
            window=draw.choice([1, 5, 20, 100]),
            horizon=draw.choice([1, 4]),
            embargo=draw.choice([0, 7, 50]),
            first_train_fraction=draw.choice([0.2, 0.35, 0.5, 0.7]),
            validation_fraction=draw.choice([0.05, 0.15, 0.25]),
            warm_up=draw.choice([None, 10, 150]),
        )


def test_folds_keep_apart_whatever_is_asked_for():
    """No bar that a sample of a later span sees has paid a training sample; tests follow each other to
    the end; what the error says would fit, fits.
    """
    refused = 0
    for s in settings():
        try:
            folds = walk_forward_folds(**s)
        except InputError as e:
            refused += 1
            s = s | {"n_bars": int(re.search(r"([\d,]+) bars would fit", str(e))[1].replace(",", ""))}
            folds = walk_forward_folds(**s)
        w, h = s["window"], s["horizon"]
        assert [f.number for f in folds] == list(range(1, s["n_folds"] + 1))
        for f in folds:
            for (a, b), (c, d) in ((f.train, f.validation), (f.validation, f.test)):
                seen_later, paid_before = (
                    range(c - w + 1, d),
                    range(a, b + h),
                )  # bars in windows of the later span; bars that pay decisions of the earlier one
                assert (
                    0 <= a < b
                    and c < d
                    and not set(seen_later) & set(paid_before)
                    and c - b == w + h + s["embargo"]
                )
            assert (
                f.train[1] - f.train[0] > max(w, s["warm_up"] or 0) + h
                and f.test[1] - f.test[0] > h
                and f.validation[1] - f.validation[0] > h
            )
        assert (
            all(a.test[1] == b.test[0] for a, b in itertools.pairwise(folds))
            and folds[-1].test[1] == s["n_bars"]
        )
        lengths, tests = [f.train[1] - f.train[0] for f in folds], [f.test[1] - f.test[0] for f in folds]
        assert max(tests) - min(tests) <= 1
        if s["scheme"] == "expanding":
            assert all(f.train[0] == 0 for f in folds) and lengths == sorted(lengths)
        else:
            assert folds[0].train[0] == 0 and len(set(lengths)) == 1
        assert check_folds(folds, w, h, s["embargo"], s["n_bars"]) == folds
    assert 100 < refused < 500


def hand(train=(0, 500), validation=(601, 800), test=(901, 1000), number=1):
    return Fold(number, train, validation, test)


CARELESS_FOLDS = {
    "no folds": (lambda: walk_forward_folds(5000, 0), "n_folds: expected a whole number of 1 or more"),
    "half a fold": (lambda: walk_forward_folds(5000, 2.5), "n_folds: expected a whole number"),
    "negative embargo": (
        lambda: walk_forward_folds(5000, embargo=-1),
        "embargo: expected a whole number of 0 or more",
    ),
    "no window": (lambda: walk_forward_folds(5000, window=0), "window: expected a whole number of 1 or more"),
    "no horizon": (lambda: walk_forward_folds(5000, horizon=0), "horizon: expected"),
    "scheme with a typo": (lambda: walk_forward_folds(5000, scheme="roling"), "did you mean 'rolling'"),
    "percent": (
        lambda: walk_forward_folds(5000, first_train_fraction=50),
        "first_train_fraction: expected a share between 0 and 1",
    ),
    "no validation": (
        lambda: walk_forward_folds(5000, validation_fraction=0.0),
        "validation_fraction: expected a share",
    ),
    "nothing to test on": (
        lambda: walk_forward_folds(5000, first_train_fraction=1.0),
        "first_train_fraction: expected a share between 0 and 1, was 1.0",
    ),
    "bars themselves": (lambda: walk_forward_folds([1, 2, 3]), "n_bars: expected a whole number"),
    "too few bars": (lambda: walk_forward_folds(200), "bars would fit"),
    "more folds than bars": (lambda: walk_forward_folds(2000, 900), "for each test span"),
    "rolling window below the warm-up": (
        lambda: walk_forward_folds(1000, scheme="rolling", warm_up=600),
        "for training after a purge of 101.*602 are needed",
    ),
    "train and validation too close": (
        lambda: check_folds([hand(train=(0, 501))]),
        r"train ends at bar 501 and validation begins at bar 601.*end train at bar 500",
    ),
    "validation and test too close": (lambda: check_folds([hand(test=(900, 1000))]), "begin test at bar 901"),
    "spans that overlap": (lambda: check_folds([hand(validation=(400, 800))]), "an overlap"),
    "a larger embargo": (lambda: check_folds([hand()], embargo=1), "window 100 \\+ horizon 1 \\+ embargo 1"),
    "test spans that overlap": (
        lambda: check_folds([hand(), hand(test=(990, 1100), number=2)]),
        "folds 1 and 2: test spans",
    ),
    "one number twice": (lambda: check_folds([hand(), hand(test=(1000, 1100))]), "a number of its own"),
    "an empty span": (lambda: check_folds([hand(test=(950, 950))]), "test is \\(950, 950\\)"),
    "a test before its training": (lambda: check_folds([hand(train=(1200, 1500))]), "an overlap"),
    "beyond the history": (lambda: check_folds([hand()], n_bars=999), "the history has 999"),
    "tuples": (lambda: check_folds([((0, 1), (2, 3), (4, 5))]), "expected a list of Fold"),
    "none": (lambda: check_folds([]), "expected a list of Fold"),
    "all blocks tested": (lambda: combinatorial_purged_folds(6000, 6, 6), "expected 1 to 5 of 6"),
    "one block": (lambda: combinatorial_purged_folds(6000, 1, 1), "n_blocks: expected"),
    "blocks that the purge takes": (lambda: combinatorial_purged_folds(600, 6, 2), "612 bars would fit"),
    "millions of choices": (lambda: combinatorial_paths(40, 20), "choices"),
}


@pytest.mark.parametrize("case", CARELESS_FOLDS)
def test_what_cannot_be_folded_is_said_in_one_line(case):
    call, words = CARELESS_FOLDS[case]
    with pytest.raises(InputError, match=words) as e:
        call()
    assert "\n" not in str(e.value)


def test_the_last_bar_that_is_too_few():
    """The blocks of 612 bars are just long enough, those of 611 are not; so are hand-written spans at
    just the distance.
    """
    assert len(combinatorial_purged_folds(612)) == 15 and check_folds([hand()])
    with pytest.raises(InputError):
        combinatorial_purged_folds(611)


# combinatorial folds


GRID = [
    (n, blocks, tested, window, horizon, embargo)
    for n in (400, 613, 1000)
    for blocks, tested in ((3, 2), (5, 2), (6, 2), (6, 4), (7, 3))
    for window in (1, 10, 30)
    for horizon in (1, 4)
    for embargo in (0, 9)
]


def test_combinatorial_folds_are_those_of_skfolio():
    """Purging `horizon` on both sides and an embargo of `window - 1 + embargo` is what skfolio is told.

    The same rows in the same order, the same tests, the same paths.
    """
    compared = 0
    for n, blocks, tested, window, horizon, embargo in GRID:
        peer = CombinatorialPurgedCV(
            n_folds=blocks, n_test_folds=tested, purged_size=horizon, embargo_size=window - 1 + embargo
        )
        if horizon + window - 1 + embargo >= n // blocks - 1:
            continue  # skfolio refuses
        folds = combinatorial_purged_folds(n, blocks, tested, window, horizon, embargo)
        assert len(folds) == peer.get_n_splits() == math.comb(blocks, tested)
        for fold, (train, tests) in zip(folds, peer.split(np.zeros((n, 1)))):
            assert np.array_equal(np.concatenate([np.arange(*span) for span in fold.train]), train)
            assert [list(range(*span)) for span in fold.test] == [t.tolist() for t in tests]
        assert (
            np.array_equal(np.array(combinatorial_paths(blocks, tested)).T, peer.recombined_paths)
            and len(combinatorial_paths(blocks, tested)) == peer.n_test_paths
        )
        compared += len(folds)
    assert compared > 1500


def test_where_skfolio_alone_would_leave_windows_over_the_tests():
    """Told the horizon and the embargo only, it keeps window - 1 rows behind every test block whose
    windows reach into the block.
    """
    folds, peer = (
        combinatorial_purged_folds(1000, 5, 2, 30, 2, 4),
        CombinatorialPurgedCV(5, 2, purged_size=2, embargo_size=4),
    )
    for fold, (train, _) in zip(folds, peer.split(np.zeros((1000, 1)))):
        left = sorted(set(train) - {t for span in fold.train for t in range(*span)})
        ends = [
            b for (a, b), after in zip(fold.test, [*(a for a, _ in fold.test[1:]), 1000]) if b < after
        ]  # test blocks that training follows
        assert left == [t for end in ends for t in range(end + 2 + 4, end + 2 + 4 + 29)]


@pytest.mark.parametrize(
    "blocks,tested,window,horizon", [(4, 1, 7, 3), (5, 2, 1, 1), (5, 3, 12, 1), (6, 2, 5, 4)]
)
def test_no_training_sample_touches_a_tested_bar_and_no_more_than_those_are_left_out(
    blocks, tested, window, horizon
):
    """Sample by sample.

    What it sees and what pays it, against bars that were decided at or paid a tested decision.
    """
    n = 203
    for fold in combinatorial_purged_folds(n, blocks, tested, window, horizon):
        used = {bar for a, b in fold.test for bar in range(a, b + horizon)}
        at = {bar for a, b in fold.test for bar in range(a, b)}
        free = [t for t in range(n) if t not in at and not used & set(range(t - window + 1, t + horizon + 1))]
        assert [t for a, b in fold.train for t in range(a, b)] == free


def test_an_embargo_follows_the_test_only():
    plain, held = (combinatorial_purged_folds(600, 6, 1, 10, 2, e) for e in (0, 20))
    assert (
        plain[2].train == [(0, 198), (311, 600)]
        and held[2].train == [(0, 198), (331, 600)]
        and held[2].test == [(200, 300)]
    )


@pytest.mark.parametrize("blocks,tested", [(2, 1), (6, 2), (7, 3), (10, 8)])
def test_paths_use_every_tested_block_once(blocks, tested):
    "C(N, k) k / N paths; on each, every block comes from a fold that tests it."
    paths, chosen = combinatorial_paths(blocks, tested), list(itertools.combinations(range(blocks), tested))
    assert len(paths) == math.comb(blocks, tested) * tested // blocks and all(len(p) == blocks for p in paths)
    assert all(k in chosen[fold] for path in paths for k, fold in enumerate(path))
    assert len({(k, fold) for path in paths for k, fold in enumerate(path)}) == len(chosen) * tested


# running


@pytest.mark.slow
def test_a_fold_is_a_direct_backtest_to_the_last_bit():
    """Every fold of a fixed model, through the whole history at once, with another account than it was
    trained with.
    """
    account = AccountConfig(costs="broker", initial_account_value=5000.0)
    result = walk(models=model(), account=account, truth=simulated()[1], random_policies=20, seed=5)
    assert len(result.folds) == 3 and (result.folds["trades"] > 0).all()
    for k, fold in enumerate(FOLDS):
        direct, row = (
            run_backtest(
                model(),
                bars(),
                start=fold.test[0],
                stop=fold.test[1],
                account=account,
                truth=simulated()[1],
                random_policies=20,
                seed=5,
            ),
            result.folds.iloc[k],
        )
        part = result.curves["model 1"][result.curves["model 1"]["fold"] == fold.number]
        for name in ("agent", "buy_and_hold", "buy_and_hold_at_exposure"):
            assert (
                np.array_equal(
                    part[name] / part[name].iloc[0], direct.curves[name] / direct.curves[name].iloc[0]
                )
                if k == 0
                else np.allclose(
                    part[name] / part[name].iloc[0],
                    direct.curves[name] / direct.curves[name].iloc[0],
                    rtol=1e-14,
                )
            )
        if k == 0:
            assert np.array_equal(part["agent"], direct.equity)
        assert part.index.equals(direct.equity.index) and row["return"] == direct.metrics["total_return"]
        for column, figure in (
            ("sharpe", "sharpe"),
            ("max_drawdown", "max_drawdown"),
            ("trades", "trades"),
            ("costs", "costs"),
            ("exposure", "exposure"),
            ("hold_share", "hold_share"),
            ("percentile_among_random", "percentile_among_random"),
        ):
            assert row[column] == direct.metrics[figure], column
        for column in ("buy_and_hold", "buy_and_hold_at_exposure", "oracle"):
            assert row[column] == direct.baselines[column]
        assert (row["test_first"], row["test_last"]) == (
            bars().index[fold.test[0]],
            bars().index[fold.test[1] - 1],
        ) and row["bars"] == fold.test[1] - fold.test[0]


@pytest.mark.slow
def test_a_retrained_agent_is_trained_and_tested_fold_by_fold():
    """A real, very short training for each fold; each fold is the direct backtest of that fold's own
    model, and the account starts afresh.
    """
    made, config = {}, NativePPOConfig(**SETTINGS)

    def train(market, fold):
        trainer = NativePPOTrainer(env_of(market), config, market.span(*fold.validation), progress=None)
        assert len(trainer.train()) == 2
        made[fold.number] = trainer.best
        return trainer.best

    result = walk(train=train)
    assert (
        list(made) == [1, 2, 3]
        and result.models == ["retrained"]
        and not result.notes
        and (result.folds["unseen"] == "yes").all()
    )
    for k, fold in enumerate(FOLDS):
        direct, row = (
            run_backtest(made[fold.number], bars(), start=fold.test[0], stop=fold.test[1], account=ACCOUNT),
            result.folds.iloc[k],
        )
        assert (
            row["return"] == direct.metrics["total_return"]
            and row["trades"] == direct.metrics["trades"]
            and row["costs"] == direct.metrics["costs"]
        )
        assert (
            made[fold.number]["fit"]
            == fit_features(bars().iloc[slice(*fold.train)], *MARKET.values()).to_state()
        )
        assert (row["train_first"], row["train_last"], row["validation_last"]) == (
            bars().index[0],
            bars().index[fold.train[1] - 1],
            bars().index[fold.validation[1] - 1],
        )
    assert walk(FOLDS[2:], train=train).folds.equals(result.folds[2:].reset_index(drop=True)), (
        "the same seed, the same fold"
    )


@pytest.mark.slow
def test_train_is_given_nothing_from_after_validation():
    """Bars after each fold's validation multiplied by noise.

    Every array, the fit and the fingerprint that train receives have the same bits, and no row from
    later.
    """
    got, noise = [[], []], np.random.default_rng(0)
    for fold in FOLDS:
        end, other = fold.validation[1], bars().copy()
        other.iloc[end:] *= 3.0 ** noise.uniform(-1, 1, (len(other) - end, 1))
        for received, history in zip(got, (bars(), other)):
            walk(
                [replace(fold, test=(fold.test[0], fold.test[0] + 5))],
                bars=history,
                train=lambda market, fold, got=received: got.append(market) or untrained(market),
            )
    for fold, market, changed in zip(FOLDS, *got):
        assert len(market.timestamp) == fold.validation[1] and (market.start, market.stop) == fold.train
        for name, value in vars(market).items():
            same = (
                value.tobytes() == getattr(changed, name).tobytes()
                if isinstance(value, np.ndarray)
                else value == getattr(changed, name)
            )
            assert same, name
        fit = fit_features(bars().iloc[slice(*fold.train)], *MARKET.values())
        assert market.fit == fit.to_state() and np.array_equal(
            market.features,
            market_data(bars(), MARKET["version"], fit, "15Min", "crypto", 20).features[: fold.validation[1]],
        )


def test_a_rolling_fold_is_fitted_on_its_own_span():
    fold = Fold(1, (500, 1400), (1421, 1600), (1621, 1700))
    seen = []
    walk([fold], train=lambda market, f: seen.append(market) or untrained(market))
    assert (
        seen[0].fit["first"] == bars().index[500].isoformat()
        and seen[0].fit["bars"] == 900
        and seen[0].start == 500
    )


# who has seen what


@pytest.mark.slow
def test_a_model_that_has_seen_a_test_is_refused_by_name(tmp_path):
    """By the span of its fit, as content, from a file, from the past's future, or by what it says about
    validation.
    """
    path = save_checkpoint(model((0, 1700), 1700), tmp_path / "eager.pt")
    told = {
        **model(),
        "data": {
            **model()["data"],
            "spans": {
                "train": {"first": str(bars().index[0]), "last": str(bars().index[1399])},
                "validation": {"first": str(bars().index[1421]), "last": str(bars().index[1621])},
            },
        },
    }
    for models, words in (
        (
            path,
            "eager: was trained or chosen on bars up to 2023-01-18 16:45 UTC, "
            "and the test of fold 1 begins at 2023-01-17 21:15",
        ),
        ({"honest": model(), "peeker": model((0, 1622), 1700)}, "peeker: .* fold 1"),
        ([model(), model((0, 1881), 1900)], "model 2: .* fold 1"),
        (model((1000, 2150), 2180), "model 1: .*what comes after"),
        ({"chosen": told}, "chosen: .*up to 2023-01-17 21:15"),
    ):
        with pytest.raises(InputError, match=words):
            walk(models=models)
    assert walk(SHORT[1:2], models=path).folds["unseen"].tolist() == ["yes"], (
        "the same file may be tested on later folds"
    )
    with pytest.raises(InputError, match="test of fold 3"):
        walk(FOLDS[2:], models=model((0, 1881), 1900))


@pytest.mark.slow
def test_what_is_not_recorded_is_said():
    """A model from a longer history than it was fitted on may have been chosen on the test; one that
    says nothing may have seen anything.
    """
    result = walk(
        SHORT,
        models={
            "usual": model((0, 1400), 1800),
            "silent": {name: value for name, value in model().items() if name != "data"},
            "honest": model(),
        },
    )
    assert result.folds.groupby("model")["unseen"].agg(list).to_dict() == {
        "honest": ["yes"] * 3,
        "silent": ["not known"] * 3,
        "usual": ["not known", "not known", "yes"],
    }
    assert (
        len(result.notes) == 2
        and "fold 1, 2." in result.notes[0]
        and result.notes[0].startswith("usual")
        and result.notes[1].startswith("silent")
        and "1 thing not known" in result["usual"].verdict
    )
    assert (
        result["honest"].verdict == walk(SHORT, models={"honest": model()}).verdict
        and result["usual"].notes == result.notes[:1]
    )
    assert "never saw" not in result["usual"].verdict and "never saw" in walk(SHORT, models=model()).verdict
    elsewhere = walk(SHORT, models=model(), symbol="OTHER-USD")
    assert elsewhere.notes == ["model 1: was trained on SIM-USD, and is tested on OTHER-USD."]


@pytest.mark.slow
def test_a_train_that_returns_a_model_from_elsewhere_is_found_out():
    with pytest.raises(InputError, match="train gave for fold 1: was trained or chosen"):
        walk(train=lambda market, fold: model((0, 2100), 2180))
    with pytest.raises(InputError, match="was trained or chosen"):
        walk([FOLDS[0]], train=lambda market, fold: model((0, 1622), 1700))
    usual = walk(SHORT[1:], train=lambda market, fold: model((0, 1400), 1800))
    assert (
        usual.folds["unseen"].tolist() == ["not known", "yes"]
        and len(usual.notes) == 1
        and "fold 2" in usual.notes[0]
        and "never saw" not in usual.verdict
    )
    told = {
        **model(),
        "data": {
            **model()["data"],
            "spans": {"validation": {"first": None, "last": str(bars().index[1621])}},
        },
    }
    with pytest.raises(InputError, match="up to 2023-01-17 21:15"):
        walk(SHORT[:1], train=lambda market, fold: told)


@pytest.mark.slow
def test_models_of_train_say_what_they_have_seen(tmp_path):
    "Kept models carry the spans of their fold, and are refused over earlier ones."
    walk(SHORT, train=untrained, folder=tmp_path, train_settings={})
    second = next(tmp_path.glob("fold_02_*.pt"))
    with pytest.raises(InputError, match=f"{second.stem}: .* up to {bars().index[1728]:%Y-%m-%d %H:%M}"):
        walk(models=second)
    assert walk(SHORT[2:], models=second).folds["unseen"].tolist() == ["yes"]


# the whole


def test_chaining_by_hand():
    "Returns follow each other over fresh accounts; ruin is the end."
    assert chain_curves([[1000, 1250, 1500], [1000, 500], [1000, 1000, 4000]]).tolist() == [
        1000,
        1250,
        1500,
        1500,
        750,
        750,
        750,
        3000,
    ]
    assert chain_curves([[1000, 500], [1000, -10], [1000, 9000]]).tolist() == [1000, 500, 500, -5, 0, 0]


@pytest.mark.slow
def test_the_chained_curve_and_its_figures():
    "Product of the folds' returns; one point a bar; figures from pandas and numpy."
    result = retrained()
    s, rows, returns = result.summary, result.folds, result.equity.pct_change().dropna().to_numpy()
    assert (
        result.equity.index.equals(bars().index[[i for f in FOLDS for i in range(*f.test)]])
        and result.equity.iloc[0] == 1000
    )
    assert (
        s["total_return"]
        == pytest.approx((1 + rows["return"]).prod() - 1, abs=1e-12)
        == pytest.approx(result.metrics["total_return"], abs=1e-12)
    )
    for name in ("buy_and_hold", "buy_and_hold_at_exposure"):
        assert s[name] == pytest.approx((1 + rows[name]).prod() - 1, abs=1e-12)
    assert (
        s["positive_folds"] == (rows["return"] > 0).mean()
        and s["beat_buy_and_hold_at_exposure"] == (rows["return"] > rows["buy_and_hold_at_exposure"]).mean()
    )
    assert s["sharpe_mean"] == pytest.approx(np.mean(rows["sharpe"])) and s[
        "sharpe_deviation"
    ] == pytest.approx(np.std(rows["sharpe"], ddof=1))
    assert result.metrics["sharpe"] == pytest.approx(
        returns.mean() / returns.std(ddof=1) * math.sqrt(365.0 * 96), rel=0.01
    )
    assert result.metrics["max_drawdown"] == pytest.approx(
        float((1 - result.equity / result.equity.cummax()).max()), abs=1e-12
    )
    profits = result.profits["retrained"]
    assert len(profits) == rows["trades"].sum() == s["trades"] == result.metrics["trades"] and s[
        "profit_factor"
    ] == pytest.approx(profits[profits > 0].sum() / -profits[profits < 0].sum())
    assert (s["mean_return_low"], s["mean_return_high"]) == pytest.approx(
        block_bootstrap_interval(returns), abs=1e-12
    ) and s["mean_return_low"] <= s["mean_return"] <= s["mean_return_high"]
    year = result.metrics["periods_per_year"]
    assert (s["sharpe_low"], s["sharpe_high"]) == pytest.approx(
        block_bootstrap_interval(returns, lambda r: sharpe_ratio(r, year)), abs=1e-6
    )


def made_of(returns, n_folds=4, seed=0):
    "A result whose bars' returns are given."
    index = pd.date_range("2024-01-01", periods=len(returns) + 1, freq="15min", tz="UTC")
    equity = 1000 * np.cumprod(np.concatenate([[1.0], 1 + np.asarray(returns)]))
    rows = pd.DataFrame(
        {
            "fold": range(1, n_folds + 1),
            "model": "retrained",
            "return": 0.01,
            "buy_and_hold_at_exposure": [0.02, 0.02, 0.0, 0.0],
            "sharpe": [1.0, 2.0, 3.0, 4.0],
            "costs": 1.0,
            "unseen": "yes",
        }
    )
    curve = pd.DataFrame(
        {
            "agent": equity,
            "buy_and_hold": 1000.0,
            "buy_and_hold_at_exposure": 1000.0,
            "fold": np.arange(len(index)) * n_folds // len(index) + 1,
        },
        index,
    )
    return WalkForwardResult(
        rows,
        {"retrained": curve},
        {"retrained": np.array([3.0, -1.0, 2.0])},
        [],
        dict(symbol="S", timeframe="15Min", asset_class="crypto", seed=seed),
    )


@pytest.mark.parametrize(
    "drift,words", [(3e-4, "more than luck"), (0.0, "luck would do as well"), (-3e-4, "it loses")]
)
def test_the_verdict_tells_skill_from_luck(drift, words):
    "Two thousand returns of 0.1 % noise: a drift of 0.03 % is thirteen standard errors, none is none."
    noise = np.random.default_rng(1).normal(0, 1e-3, 2000)
    result = made_of(noise - noise.mean() + drift)
    assert (
        words in result.verdict
        and "\n" not in result.verdict
        and "Positive in 4 of 4, better than buy-and-hold at its exposure in 2" in result.verdict
    )
    assert (
        result.summary["profit_factor"] == 5.0
        and result.summary["sharpe_mean"] == 2.5
        and result.summary["beat_buy_and_hold_at_exposure"] == 0.5
    )


def with_rivals(**columns):
    "The made-up result, with what baselines did in its folds, and how the models were trained."
    result = made_of(np.random.default_rng(1).normal(1e-4, 1e-3, 2000))
    return replace(
        result, folds=result.folds.assign(**({"training": "as its mode says", "said": None} | columns))
    )


def test_the_verdict_names_what_did_better():
    """Altogether, by the product of the folds' returns, and in how many folds; what did worse everywhere
    is not named.
    """
    result = with_rivals(
        moving_average_cross=[0.02, 0.03, -0.5, 0.0],
        ridge=[0.0, 0.0, 0.0, 0.0],
        boosting=[0.5, 0.5, 0.5, 0.5],
    )
    chained = {
        name: float(np.prod(1 + result.folds[name]) - 1) for name in ("moving_average_cross", "boosting")
    }
    words = (
        "What did better, altogether or in folds: "
        f"the moving-average cross {chained['moving_average_cross']:+.2%}, in 2 of 4, "
        f"gradient boosting {chained['boosting']:+.2%}, in 4 of 4."
    )
    assert words in result.verdict.replace("buy-and-hold at its own exposure +0.00%, in 2 of 4, ", "")
    assert (
        "ridge" not in result.verdict
        and result.summary["baselines"]["ridge"] == {"total_return": 0.0, "better_in": 0}
        and result.summary["baselines"]["moving_average_cross"]["better_in"] == 2
    )
    assert "did better" not in with_rivals(buy_and_hold_at_exposure=0.0).verdict


def test_one_fold_that_is_a_smoke_test_is_enough():
    said = "mode quick_test, 1,000 steps: shows that the machinery runs, and says nothing about the strategy"
    result = with_rivals(
        training=["as its mode says", "smoke test", "not known", "smoke test"],
        said=[None, said, None, "other"],
    )
    assert (
        result.verdict.startswith(f"SMOKE TEST: {said}. S: ")
        and result.summary["smoke_test"]
        and not with_rivals().summary["smoke_test"]
        and not with_rivals().verdict.startswith("SMOKE")
    )


@pytest.mark.slow
def test_bounds_that_say_nothing_are_not_written():
    """Twenty bars of large noise: a year of them might end anywhere.

    In the line, and in the page's rows; nor is a profit factor of three trades.
    """
    wide, narrow = (
        made_of(np.random.default_rng(1).normal(0, 0.01, 20)),
        made_of(np.random.default_rng(1).normal(0, 1e-4, 20_000)),
    )
    for result, says in ((wide, False), (narrow, True)):
        rows = dict(summary_rows(result))
        labels = [text for label, text in summary_rows(result) if label == "95 % interval"]
        assert (
            ("95 % interval: too wide to say anything" in result.verdict) != says
            and ("too wide to say anything" in labels) != says
            and rows["profit factor, all trades"] == "too few trades to say (3)"
        )


@pytest.mark.slow
def test_each_fold_is_beside_what_needs_no_agent(tmp_path):
    """The moving-average cross as in a backtest of the fold; ridge regression and boosting where they
    are asked for, on the fold's own spans; who did better is named; and the page shows it all, escaped.
    """
    longer = [Fold(1, (0, 1300), (1321, 1700), (1721, 2000))]
    result = walk(longer, train=untrained, probes=("ridge",), truth=simulated()[1])
    row, test = (
        result.folds.iloc[0],
        run_backtest(
            model((0, 1300), 1700), bars().iloc[:2000], start=1721, symbol="SIM-USD", account=ACCOUNT
        ),
    )
    assert (
        row["moving_average_cross"] == test.baselines["moving_average_cross"]
        and np.isfinite(row["ridge"])
        and np.isnan(row["boosting"])
        and row["training"] == "not known"
    )
    rivals = {
        "the moving-average cross": row["moving_average_cross"],
        "ridge regression": row["ridge"],
        "buy-and-hold": row["buy_and_hold"],
        "buy-and-hold at its own exposure": row["buy_and_hold_at_exposure"],
    }
    assert set(filter(None, row["better"].split(", "))) == {
        name for name, value in rivals.items() if value > row["return"]
    }
    assert " simulated bars" in result.verdict
    evil = "<img src=x onerror=alert(1)>$a$"
    result = replace(
        result,
        folds=result.folds.assign(better=evil, model=evil),
        curves={evil: result.curves["retrained"]},
        profits={evil: result.profits["retrained"]},
        notes=[evil],
        provenance=result.provenance | {"symbol": evil},
    )
    page = write_walk_forward(result, tmp_path, {"source": evil})["walk_forward.html"].read_text()
    assert "<img src=x" not in page and page.count("&lt;img src=x") >= 5


def test_probes_that_a_fold_is_too_short_for_are_said_to_be_missing():
    result = walk(
        [Fold(1, (0, 200), (1321, 1600), (1621, 1650))], models=model(), probes=("ridge", "boosting")
    )
    assert (
        result.folds["ridge"].isna().all()
        and len(result.notes) == 1
        and "ridge regression and gradient boosting would do: SIM-USD: no decision can be made"
        in result.notes[0]
        and "use more history" in result.notes[0]
    )


def test_an_agent_that_does_nothing():
    "No trade, no cost, no spread: numbers or nothing, and words that say so."
    result = made_of(np.zeros(500))
    result = replace(
        result,
        folds=result.folds.assign(
            **{"return": 0.0, "sharpe": 0.0, "costs": 0.0, "buy_and_hold_at_exposure": 0.0}
        ),
        profits={"retrained": np.array([])},
    )
    assert (
        "it made no trade" in result.verdict
        and result.summary["profit_factor"] is None
        and result.summary["positive_folds"] == result.summary["beat_buy_and_hold_at_exposure"] == 0
    )


@pytest.mark.slow
def test_a_batch_has_a_row_for_each_model_and_fold(tmp_path):
    """From files and from memory; each model's part is what it is alone; nothing is averaged over
    models, and nothing speaks for all of them.
    """
    path = save_checkpoint(model(), tmp_path / "one.pt")
    batch = walk(SHORT, models=[path, model(seed=5)])
    assert batch.models == ["one", "model 2"] and batch.folds[["fold", "model"]].values.tolist() == [
        [f, m] for f in (1, 2, 3) for m in batch.models
    ]
    for name, alone in (
        ("one", walk(SHORT, models=path)),
        ("model 2", walk(SHORT, models={"model 2": model(seed=5)})),
    ):
        assert (
            batch[name].folds.equals(alone.folds)
            and batch[name].equity.equals(alone.equity)
            and batch[name].verdict == alone.verdict
        )
    assert not batch["one"].equity.equals(batch["model 2"].equity)
    for name in ("equity", "metrics", "summary"):
        with pytest.raises(InputError, match=f"has 2 models.*{name}"):
            getattr(batch, name)
    assert batch.verdict.startswith("The best of 2 models, ") and "\n" not in batch.verdict
    with pytest.raises(InputError, match="did you mean 'one'"):
        batch["on"]
    assert walk(SHORT[:1], models=[path, str(path)]).models == ["one", str(path)], (
        "one file twice is two rows"
    )


def test_the_best_of_many_is_deflated():
    """Five worthless agents.

    The best one's Sharpe ratio against what the best of five shows by luck, from the formulas of Bailey
    & López de Prado (2014).
    """
    noise = np.random.default_rng(5).normal(0, 1e-3, (5, 1500))
    parts = {f"agent {k}": made_of(r) for k, r in enumerate(noise)}
    many = WalkForwardResult(
        pd.concat([p.folds.assign(model=m) for m, p in parts.items()]),
        {m: p.curves["retrained"] for m, p in parts.items()},
        {m: p.profits["retrained"] for m, p in parts.items()},
        [],
        parts["agent 0"].provenance,
    )
    sharpes, quantile, normal, n, gamma = (
        noise.mean(1) / noise.std(1, ddof=1),
        NormalDist().inv_cdf,
        NormalDist().cdf,
        1500,
        0.5772156649015329,
    )
    best, z = int(sharpes.argmax()), (noise - noise.mean(1, keepdims=True)) / noise.std(1, keepdims=True)
    luck = ((1 - gamma) * quantile(1 - 1 / 5) + gamma * quantile(1 - 1 / (5 * math.e))) / math.sqrt(n - 1)
    probability = normal(
        (sharpes[best] - luck)
        * math.sqrt(n - 1)
        / math.sqrt(
            1 - (z[best] ** 3).mean() * sharpes[best] + ((z[best] ** 4).mean() - 1) / 4 * sharpes[best] ** 2
        )
    )
    assert (
        many.verdict.startswith(
            f"The best of 5 models, agent {best}, has been chosen on the tests themselves"
        )
        and f"with a probability of {probability:.1%}" in many.verdict
        and probability < 0.9
    )


# going on


def counting(calls, stop_at=None, how=None):
    def train(market, fold):
        if fold.number == stop_at:
            how()
        calls.append(fold.number)
        return untrained(market)

    return train


def stop():
    raise KeyboardInterrupt


def killed(folder):
    walk(
        SHORT,
        train=counting([], 2, lambda: os.kill(os.getpid(), signal.SIGKILL)),
        folder=folder,
        train_settings={"seed": 1},
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_missing_folds(tmp_path):
    "SIGKILL in the second of three trainings, in a process of its own; then the same call, here."
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch; torch.set_num_threads(1); import test_walk_forward as t; "
            f"t.killed({str(tmp_path)!r})",
        ],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name[:7] for p in tmp_path.glob("*.json")] == ["fold_01"]
    calls = []
    result = walk(SHORT, train=counting(calls), folder=tmp_path, train_settings={"seed": 1})
    assert (
        calls == [2, 3]
        and result.folds.equals(retrained(tuple(SHORT)).folds)
        and result.equity.equals(retrained(tuple(SHORT)).equity)
        and result.verdict == retrained(tuple(SHORT)).verdict
    )
    calls.clear()
    lines = []
    again = walk(
        SHORT, train=counting(calls), folder=tmp_path, train_settings={"seed": 1}, progress=lines.append
    )
    assert (
        calls == []
        and again.equity.equals(result.equity)
        and len(lines) == 3
        and all("kept from an earlier run" in line for line in lines)
    )


@pytest.mark.slow
def test_a_fold_that_was_trained_but_not_tested_is_not_trained_again(tmp_path):
    walk(SHORT, train=counting([]), folder=tmp_path, train_settings={})
    next(tmp_path.glob("fold_02_*.json")).unlink()
    next(tmp_path.glob("fold_03_*.json")).write_text('{"key": "cut o')
    calls = []

    def whole():
        result = walk(SHORT, train=counting(calls), folder=tmp_path, train_settings={})
        return result.folds.equals(retrained(tuple(SHORT)).folds)

    assert whole() and calls == []
    next(tmp_path.glob("fold_02_*.json")).write_bytes(next(tmp_path.glob("fold_01_*.json")).read_bytes())
    assert whole() and calls == [], "a result under another's name is not taken for it"


@pytest.mark.slow
def test_another_input_is_not_mistaken_for_the_old_one(tmp_path):
    """Settings of train, account, seeds, name, truth, one volume of one bar, a span.

    Trained again where it matters; a history that ends elsewhere: not.
    """
    calls = []
    options = dict(train=counting(calls), folder=tmp_path, train_settings={"seed": 1})
    with pytest.raises(KeyboardInterrupt):
        walk(SHORT, **options | {"train": counting(calls, 3, stop)})
    assert calls == [1, 2]

    def again(**changed):
        calls.clear()
        walk(**{"folds": SHORT} | options | changed)
        return list(calls)

    touched = bars().copy()
    touched.iloc[1760, touched.columns.get_loc("volume")] *= 1.5
    assert again() == [3] and again() == []
    assert again(bars=touched) == [2, 3], "bar 1760 lies in the test of fold 2; fold 1 has never heard of it"
    assert (
        again(train_settings={"seed": 2}) == [1, 2, 3]
        and again(account=AccountConfig(costs="zero")) == [1, 2, 3]
        and again(random_policies=3) == [1, 2, 3]
        and again(seed=4) == [1, 2, 3]
        and again(symbol="OTHER-USD") == [1, 2, 3]
    )
    assert again(truth=simulated()[1]) == [1, 2, 3] and again(bars=bars().iloc[:1905]) == []
    assert again(folds=[SHORT[0], replace(SHORT[1], test=(1751, 1775)), SHORT[2]]) == [2]
    assert again() == [], "and the first is still there"


@pytest.mark.slow
def test_kept_results_of_fixed_models_know_their_model(tmp_path):
    "The same weights from memory and from a file are one model; other weights, another fit are not."
    walk(SHORT, models={"m": model()}, folder=tmp_path)

    def names():
        return {p.name for p in tmp_path.glob("*.json")}

    before = names()
    walk(SHORT, models={"m": save_checkpoint(model(), tmp_path / "m.pt")}, folder=tmp_path)
    assert names() == before and len(before) == 3
    walk(SHORT, models={"m": model(seed=5)}, folder=tmp_path)
    assert len(names()) == 6
    shifted = {**model(), "fit": {**model()["fit"], "shift": [x + 0.1 for x in model()["fit"]["shift"]]}}
    walk(SHORT, models={"m": shifted}, folder=tmp_path)
    assert len(names()) == 9


# careless calls


CARELESS = {
    "neither": (dict(), "neither was given"),
    "both": (dict(train=untrained, models="x.pt"), "both were given"),
    "no models": (dict(models=[]), "models: expected one model or more"),
    "a policy": (
        dict(models=torch.nn.Linear(2, 2)),
        "expected the path or the content of a checkpoint, was Linear",
    ),
    "no such file": (dict(models="nowhere.pt"), "no such file"),
    "half a checkpoint": (dict(models=[{"policy_state_dict": {}}]), "a table without model_version"),
    "train is a table": (dict(train={}), "train: expected a function"),
    "train gives nothing": (
        dict(train=lambda market, fold: None),
        "train, fold 1: expected the content of a checkpoint.*was NoneType",
    ),
    "another window": (
        dict(models=model, window=21, folds=walk_forward_folds(2208, 2, window=21)),
        "was trained with window 20",
    ),
    "another layout": (dict(models=model, version="5.5.0"), "was trained with version 5.6.0"),
    "another timeframe": (dict(models=model, timeframe="1Hour"), "was trained with timeframe 15Min"),
    "no layout": (dict(models=model, version="9.9"), "features.version"),
    "folds of a longer history": (
        dict(models=model, folds=[replace(FOLDS[0], test=(1621, 9999))]),
        "the history has 2208",
    ),
    "folds too close": (dict(models=model, embargo=1), "embargo 1"),
    "no bars": (dict(models=model, bars=None), "bars: expected a DataFrame"),
    "account of text": (dict(models=model, account="broker"), "account: expected an AccountConfig"),
    "truth of another market": (
        dict(models=model, truth=pd.DataFrame({"expected_return": [0.0]})),
        "truth: expected one row for each",
    ),
    "folder without settings": (dict(train=untrained, folder="kept"), "train_settings: is missing"),
    "settings that are not plain": (
        dict(train=untrained, folder="kept", train_settings={"f": print}),
        "train_settings: expected plain values",
    ),
    "training too short for the layout": (
        dict(train=untrained, folds=[Fold(1, (0, 650), (700, 900), (1000, 1100))]),
        "650 bars of training, layout 5.6.0 needs 700",
    ),
    "only warm-up to test on": (
        dict(
            train=untrained,
            folds=[Fold(1, (0, 750), (800, 900), (1000, 1100))],
            bars=lambda: pd.concat([bars()[:950], bars()[960:]]),
        ),
        "no decision can be made in its test span, bars 1000 to 1099",
    ),
}


@pytest.mark.parametrize("case", CARELESS)
def test_careless_calls_get_one_line(case, tmp_path, monkeypatch):
    "Before anything is trained, and without leaving a folder behind."
    monkeypatch.chdir(tmp_path)
    options, words = CARELESS[case]
    made = {
        name: value() if value is model or name == "bars" and value is not None else value
        for name, value in options.items()
    }
    with pytest.raises(InputError, match=words) as e:
        walk(**made)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_all_folds_are_fitted_before_the_first_is_trained():
    "An impossible last fold must not come to light after hours of training."
    calls, gap = (
        [],
        pd.concat([bars()[:1300], bars()[1310:]]),
    )  # 600 bars of the second training span lie before the gap, and 200 after it
    folds = [Fold(1, (0, 750), (780, 900), (930, 1000)), Fold(2, (700, 1500), (2000, 2050), (2080, 2180))]
    assert len(walk(folds[:1], bars=gap, train=counting(calls)).folds) == 1 and calls == [1]
    with pytest.raises(InputError, match="longest unbroken stretch of the training span has 600 bars"):
        walk(folds, bars=gap, train=counting(calls))
    assert calls == [1]


# what is left behind


@pytest.mark.slow
def test_artefacts(tmp_path):
    "Four files, the same bytes each time; the page stands alone and says what the bars are."
    result = retrained()
    simulated_data, real = (
        {"source": "simulated", "edge": 0.2, "seed": 3},
        {"source": "alpaca", "feed": "sip"},
    )
    first, again = (
        {
            name: path.read_bytes()
            for name, path in write_walk_forward(result, tmp_path / k, simulated_data).items()
        }
        for k in "ab"
    )
    assert (
        first == again
        and sorted(first)
        == ["walk_forward.csv", "walk_forward.html", "walk_forward.json", "walk_forward.png"]
        and first["walk_forward.png"][:8] == b"\x89PNG\r\n\x1a\n"
    )
    page, whole, table = (
        first["walk_forward.html"].decode(),
        json.loads(first["walk_forward.json"]),
        pd.read_csv(tmp_path / "a" / "walk_forward.csv"),
    )
    assert (
        "Simulated data" in page
        and "planted edge of 0.2" in page
        and "http" not in page
        and 'src="data:image/png;base64,' in page
        and page.count("<tr><td>") >= 3
    )
    assert (
        whole["verdict"] == result.verdict
        and whole["summary"]["retrained"] == result.summary
        and len(whole["folds"]) == 3
        and whole["folds"][0]["test_first"] == bars().index[1621].isoformat()
        and whole["data"] == simulated_data
    )
    assert table["return"].tolist() == result.folds["return"].tolist()
    real_page = write_walk_forward(result, tmp_path / "c", real)["walk_forward.html"].read_text()
    assert "Real data" in real_page and "Simulated" not in real_page
    noted = write_walk_forward(walk(SHORT, models=model((0, 1400), 1800)), tmp_path / "d", real)[
        "walk_forward.html"
    ].read_text()
    assert (
        "Not known" in noted and "it is not recorded which bars chose it" in noted and "Not known" not in page
    )
    other = replace(result, provenance=result.provenance | {"symbol": "OWN-USD"})
    unknown = write_walk_forward(other, tmp_path / "e", {})["walk_forward.html"].read_text()
    assert (
        "Data of unknown origin" in unknown and "Real data" not in unknown and "Simulated data" not in unknown
    )
    with pytest.raises(InputError, match="data: expected a table that says where the bars come from"):
        write_walk_forward(result, tmp_path / "f", None)


def test_the_picture_says_what_it_shows():
    import matplotlib.pyplot as plt

    result = retrained()
    titles = []
    own = replace(result, provenance=result.provenance | {"symbol": "OWN-USD"})
    for shown_result, data in (
        (result, {"source": "simulated", "edge": 0.2}),
        (own, {"source": "files"}),
        (own, None),
        (result, {"source": "files"}),
        (result, None),
    ):
        figure = plot_walk_forward(shown_result, data)
        titles.append(figure.axes[0].get_title("left"))
        shown = {
            line.get_label().rsplit(" ", 2)[0]: line.get_ydata()
            for line in figure.axes[0].lines
            if "agent" in line.get_label()
        }
        assert shown["agent, retrained for each fold"][-1] == pytest.approx(
            100 * result.summary["total_return"]
        ) and shown["buy and hold at the agent's exposure"][-1] == pytest.approx(
            100 * result.summary["buy_and_hold_at_exposure"]
        )
        assert (
            sorted(p.get_height() for p in figure.axes[2].patches)[0]
            == pytest.approx(
                100 * min(result.folds["return"].min(), result.folds["buy_and_hold_at_exposure"].min())
            )
            and len(figure.axes[3].patches) == 9
        )
        plt.close(figure)
    assert (
        titles[0].endswith("simulated bars")
        and titles[1].endswith("real bars")
        and titles[2].endswith("bars of unknown origin")
        and all(t.endswith("simulated bars") for t in titles[3:])
        and all("3 folds" in t for t in titles)
    )


def test_the_span_of_a_model_as_it_is_recorded():
    "Fit, history and spans; what is absent is None."
    span = training_span(model())
    assert (span["first"], span["last"], span["possible"]) == (
        bars().index[0],
        bars().index[1399],
        bars().index[1599],
    )
    assert training_span({}) == {"first": None, "last": None, "possible": None}
    fit = fit_features(bars().iloc[:1400], *MARKET.values())
    market = market_data(bars().iloc[:1600], MARKET["version"], fit, "15Min", "crypto", 20, "SIM-USD")
    trainer = NativePPOTrainer(
        env_of(market.span(0, 1400), 1),
        NativePPOConfig(hidden_dims=(8,)),
        market.span(1421, 1550),
        progress=None,
    )
    recorded = training_span(trainer.content())
    assert recorded["last"] == recorded["possible"] == bars().index[1549], (
        "a trainer records what it was validated on"
    )
    assert asdict(FOLDS[0]) == {
        "number": 1,
        "train": (0, 1400),
        "validation": (1421, 1600),
        "test": (1621, 1750),
    }
