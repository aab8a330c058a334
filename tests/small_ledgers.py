"""Trials, runs and what reads their files, for tests."""

import json
import math
import multiprocessing
import warnings

import numpy as np

from trading_lib import ledger

fork = multiprocessing.get_context("fork")  # torch need not be imported again in each process
DATA = {"sha256": "ab" * 32, "start": "2022-01-01T00:00:00Z", "end": "2023-12-31T23:45:00Z", "bars": 70_000}
SPAN = ("2023-05-28T00:00:00Z", "2023-09-13T23:45:00Z")


def day_names(n, first="2023-05-28"):
    return [str(d) for d in np.arange(first, np.datetime64(first) + n, dtype="datetime64[D]")]


def trial(**other) -> dict:
    fields = dict(
        symbol="SIM-USD",
        timeframe="15Min",
        kind="checkpoint",
        seed=0,
        update=5,
        parameters={"learning_rate": 3e-4},
        data=DATA,
        span=SPAN,
        sharpe_per_bar=0.01,
        bars=960,
        days=day_names(10),
        returns=[0.001 * i for i in range(10)],
    )
    return fields | other


def trials_of(matrix, **other) -> list[dict]:
    "Columns of a matrix of daily returns as trials."
    return [
        trial(seed=i, days=day_names(len(matrix)), returns=list(column), **other)
        for i, column in enumerate(np.asarray(matrix, dtype=float).T)
    ]


def quietly(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().decode().splitlines()]  # no code of the module


def sweep(runs=8, checkpoints=5, **parameters) -> list:
    trials = []
    for seed in range(runs):
        settings = {"train": {"hidden_dims": (256, 128), "seed": seed, **parameters}, "seed": seed}
        validations = [
            dict(
                update=5 * (i + 1),
                sharpe_per_bar=0.01 * seed,
                bars=960,
                days=day_names(10),
                returns=np.random.default_rng((seed, i)).normal(0, 0.01, 10),
            )
            for i in range(checkpoints)
        ]
        trials += ledger.run_trials("SIM-USD", "15Min", DATA, SPAN, settings, seed, validations)
    return trials


def run(**other) -> dict:
    fields = dict(
        symbol="SIM-USD",
        timeframe="15Min",
        parameters={"train": {"seed": 0, "gamma": 0.99}},
        data=DATA,
        metrics={
            "total_return": -0.0123,
            "sharpe": -0.4,
            "max_drawdown": 0.081,
            "deflated_sharpe": 0.1114,
            "trades": 1204,
            "profit_factor": math.inf,
            "sortino": math.nan,
        },
        verdict="DROP",
        model_sha256="3f" * 32,
        commit="0a1b2c3d" * 5,
    )
    return fields | other
