"""Our figures beside other libraries', live, on results of real backtests of intraday bars: the same number
to twelve digits, or the definition that differs, named, and the same number once it is taken away. Run with
-s for the tables."""

import functools
import math
import warnings

import numpy as np
import pandas as pd
import pytest

from trading_lib import metrics as M
from trading_lib.backtest import run_backtest
from trading_lib.config import AccountConfig, InputError
from trading_lib.env import market_data
from trading_lib.evaluation.replay import decision_bars
from trading_lib.features import fit_features
from trading_lib.sources import load_bars, simulate_market

arch_bootstrap, empyrical, ffn, purgedcv, quantstats, scipy_stats, skfolio_measures, calendars = (
    pytest.importorskip(name, reason=f"{name}, of the test extras, is not installed")
    for name in (
        "arch.bootstrap",
        "empyrical",
        "ffn",
        "purgedcv",
        "quantstats",
        "scipy.stats",
        "skfolio.measures",
        "exchange_calendars",
    )
)
VERSION = "5.6.0"
# span of real bars; of SPY there is no 2025 here, so QQQ stands for that year
CASES = {
    "SIM-USD": None,
    "SIMA": None,
    "BTC-USDT": ("2025-04-20", "2025-06-25"),
    "SPY": ("2024-03-26", "2024-12-31"),
    "QQQ": ("2025-05-12", "2025-11-28"),
}


@functools.cache
def result_of(symbol: str, folder: str):
    """A backtest of a moving-average cross that also sells short where it may; long enough for weeks of both
    signs."""
    asset_class = "crypto" if "-" in symbol else "equity"
    if folder:
        bars = load_bars(symbol, "15Min", "files", path=folder, asset_class=asset_class).loc[
            slice(*CASES[symbol])
        ]
    else:
        bars = simulate_market(
            symbol,
            "15Min",
            "2023-01-01",
            "2023-03-12" if asset_class == "crypto" else "2023-08-31",
            3,
            0.1,
            asset_class,
        )[0]
    fit = fit_features(bars[:1500], VERSION, "15Min", asset_class)
    at = decision_bars(market_data(bars, VERSION, fit, "15Min", asset_class))
    fast, slow = (bars["close"].rolling(n).mean().to_numpy()[at] for n in (24, 96))
    up = fast > slow
    turned = np.append(False, up[1:] != up[:-1])
    actions = np.where(turned, 7, np.where(up, 3, 6))  # CLOSE, BUY_75%, SELL_75%
    return run_backtest(
        None,
        bars,
        actions=actions,
        version=VERSION,
        fit=fit,
        timeframe="15Min",
        asset_class=asset_class,
        symbol=symbol,
        account=AccountConfig(
            costs="broker", initial_account_value=100_000.0, stop_pct=0.01, target_pct=0.02
        ),
    )


def backtest_of(request):
    return result_of(
        request.param, str(request.getfixturevalue("real_bars_folder")) if CASES[request.param] else ""
    )


@pytest.fixture(params=CASES)
def result(request):
    return backtest_of(request)


@pytest.fixture(params=["SIM-USD", "BTC-USDT", "SPY"])
def one_of_three(request):
    return backtest_of(request)


def returns_of(result) -> pd.Series:
    return result.equity.pct_change().dropna()


def compared(title: str, rows):
    "Print ours, theirs and the difference; each must be the same number."
    print(f"\n{title}\n  {'figure':32} {'ours':>24} {'theirs':>24} {'difference':>11}  library")
    for name, ours, theirs, library in rows:
        ours, theirs = float(ours), float(theirs)
        print(f"  {name:32} {ours:24.16g} {theirs:24.16g} {abs(ours - theirs):11.1e}  {library}")
    for name, ours, theirs, library in rows:
        assert math.isfinite(theirs) and math.isclose(ours, theirs, rel_tol=1e-12, abs_tol=1e-15), (
            name,
            ours,
            theirs,
            library,
        )


# time


def sessions_and_bars(year: int, minutes: int = 15) -> tuple[int, int]:
    "Sessions of the New York Stock Exchange and the bars that begin in them, by exchange_calendars alone."
    schedule = calendars.get_calendar("XNYS", start=f"{year}-01-01", end=f"{year}-12-31").schedule
    return len(schedule), int(((schedule["close"] - schedule["open"]) // pd.Timedelta(minutes=minutes)).sum())


def test_a_year_has_as_many_bars_as_the_exchange_has():
    "2025: 250 sessions, three of them end at 13:00; 6,464 bars of 15 minutes, not 252 × 26."
    schedule = calendars.get_calendar("XNYS", start="2025-01-01", end="2025-12-31").schedule
    lengths = schedule["close"] - schedule["open"]
    assert (
        len(schedule) == 250
        and (lengths < pd.Timedelta("6.5h")).sum() == 3
        and sessions_and_bars(2025) == (250, 6464)
        and 247 * 26 + 3 * 14 == 6464
    )
    assert M.periods_per_year("15Min", "equity", "2025-01-01", "2026-01-01") == 6464
    for year in (2023, 2024):
        for minutes, timeframe in ((5, "5Min"), (15, "15Min")):
            assert (
                M.periods_per_year(timeframe, "equity", f"{year}-01-01", f"{year + 1}-01-01")
                == sessions_and_bars(year, minutes)[1]
            )


# figures of a backtest


def test_figures_of_a_backtest_are_the_libraries_own(result):
    "Everything that a report says about an equity curve, from its returns, with the number of periods said."
    ours, returns, equity = result.metrics, returns_of(result), result.equity
    periods = 96 * 365 if "-" in result.symbol else sessions_and_bars(equity.index[0].year)[1]
    assert ours["periods_per_year"] == periods
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q, e = quantstats.stats, empyrical
        pnl = result.trades.loc[result.trades["exit"] != "still open", "profit"].reset_index(drop=True)

        def of_weeks(values):
            return (np.diff(np.r_[values.iloc[0], values.resample("W-SUN").last().dropna()]) > 0).mean()

        day = 96 if "-" in result.symbol else 26
        below = equity < equity.cummax()
        run = below.groupby((~below).cumsum()).sum().max()
        high_at = equity.index.to_series().where(~below).ffill()
        rows = [
            ("total return", ours["total_return"], q.comp(returns), "quantstats"),
            ("total return", ours["total_return"], e.cum_returns_final(returns), "empyrical"),
            ("annual return", ours["annual_return"], q.cagr(returns, periods=periods), "quantstats"),
            (
                "annual return",
                ours["annual_return"],
                e.annual_return(returns, annualization=periods),
                "empyrical",
            ),
            ("volatility", ours["volatility"], q.volatility(returns, periods=periods), "quantstats"),
            (
                "volatility",
                ours["volatility"],
                e.annual_volatility(returns, annualization=periods),
                "empyrical",
            ),
            ("Sharpe ratio", ours["sharpe"], q.sharpe(returns, periods=periods), "quantstats"),
            ("Sharpe ratio", ours["sharpe"], e.sharpe_ratio(returns, annualization=periods), "empyrical"),
            ("Sharpe ratio", ours["sharpe"], ffn.calc_sharpe(returns, nperiods=periods), "ffn"),
            ("Sortino ratio", ours["sortino"], q.sortino(returns, periods=periods), "quantstats"),
            ("Sortino ratio", ours["sortino"], e.sortino_ratio(returns, annualization=periods), "empyrical"),
            ("Calmar ratio", ours["calmar"], q.calmar(returns, periods=periods), "quantstats"),
            ("Calmar ratio", ours["calmar"], e.calmar_ratio(returns, annualization=periods), "empyrical"),
            ("maximum drawdown", ours["max_drawdown"], -q.max_drawdown(equity), "quantstats"),
            ("maximum drawdown", ours["max_drawdown"], -e.max_drawdown(returns), "empyrical"),
            ("maximum drawdown", ours["max_drawdown"], -ffn.calc_max_drawdown(equity), "ffn"),
            ("drawdown, bars", ours["drawdown_bars"], run, "pandas"),
            (
                "drawdown, days",
                ours["drawdown_days"],
                (equity.index.to_series() - high_at).max() / pd.Timedelta("1D"),
                "pandas",
            ),
            ("skewness, adjusted for size", ours["skewness"], q.skew(returns), "quantstats"),
            (
                "skewness, third moment",
                M.skewness(returns, adjusted=False),
                scipy_stats.skew(returns),
                "scipy",
            ),
            ("kurtosis, raw", M.kurtosis(returns), scipy_stats.kurtosis(returns, fisher=False), "scipy"),
            ("tail ratio", ours["tail_ratio"], q.tail_ratio(returns), "quantstats"),
            ("tail ratio", ours["tail_ratio"], e.tail_ratio(returns), "empyrical"),
            ("profit factor of returns", M.profit_factor(returns), q.profit_factor(returns), "quantstats"),
            (
                "profit factor of trades",
                ours["profit_factor"],
                q.profit_factor(pnl, prepare_returns=False),
                "quantstats",
            ),
            (
                "win rate of returns not 0",
                M.win_rate(returns[returns != 0]),
                q.win_rate(returns),
                "quantstats",
            ),
            ("win rate of trades", ours["win_rate"], q.win_rate(pnl, prepare_returns=False), "quantstats"),
            ("average win", ours["average_win"], pnl[pnl > 0].mean(), "pandas"),
            ("average loss", ours["average_loss"], pnl[pnl < 0].mean(), "pandas"),
            ("consistency, weeks", ours["consistency"], of_weeks(equity), "pandas"),
            *(
                (
                    f"  of closes, from day {k + 1}",
                    M.consistency(closes := result.price.iloc[k * day :], closes.index),
                    of_weeks(closes),
                    "pandas",
                )
                for k in range(5)
            ),
            (
                "probability of Sharpe > 0",
                ours["probabilistic_sharpe"],
                skfolio_measures.probabilistic_sharpe_ratio(returns.to_numpy()),
                "skfolio",
            ),
        ]
    compared(
        f"{result.symbol} 15Min, {ours['bars']} bars from {equity.index[0]:%Y-%m-%d} to "
        f"{equity.index[-1]:%Y-%m-%d}, {ours['trades']} trades, {periods} periods a year",
        rows,
    )
    assert 0 < ours["win_rate"] < 1


# luck


TRIALS = 24


def trials_of(returns: pd.Series, edge: float = 0.0) -> pd.DataFrame:
    """Worthless variations of one strategy: its returns, each bar's sign drawn anew; the first may have an
    edge."""
    signs = np.random.default_rng(11).choice([-1.0, 1.0], (len(returns), TRIALS))
    table = pd.DataFrame(returns.to_numpy()[:, None] * signs, returns.index)
    table[0] += edge * returns.std()
    return table


@pytest.mark.parametrize("length", [600, None], ids=["600 bars", "all bars"])
def test_deflated_sharpe_ratio_of_four_libraries(one_of_three, length):
    """vectorbt and skfolio: ours. ffn: ours with the moments adjusted for the sample's size. purgedcv: that,
    and the divisor n in the standard deviation. Each difference is taken away in turn."""
    table = trials_of(returns_of(one_of_three).iloc[:length], edge=0.05)
    returns, sharpes = table[0], (table.mean() / table.std(ddof=1)).to_numpy()
    n, variance, theirs = len(returns), sharpes.var(ddof=1), scipy_stats
    vectorbt = pytest.importorskip("vectorbt", reason="vectorbt, of the test extras, is not installed")
    luck = M.expected_maximum_sharpe(TRIALS, variance)
    plain = dict(skewness=M.skewness(returns, adjusted=False), kurtosis=M.kurtosis(returns))
    adjusted = dict(
        skewness=theirs.skew(returns, bias=False), kurtosis=theirs.kurtosis(returns, bias=False, fisher=False)
    )
    sharpe, divisor_n = returns.mean() / returns.std(ddof=1), returns.mean() / returns.std(ddof=0)
    ours = M.deflated_sharpe_ratio(returns, TRIALS, sharpes)
    with_both = purgedcv.deflated_sharpe_ratio(returns.to_numpy(), TRIALS, variance)
    rows = [
        (
            "expected maximum of the trials",
            luck,
            ffn.core.calc_expected_max_sharpe(TRIALS, math.sqrt(variance)),
            "ffn",
        ),
        (
            "expected maximum of the trials",
            luck,
            skfolio_measures.expected_max_sharpe_ratio(TRIALS, math.sqrt(variance)),
            "skfolio",
        ),
        (
            "deflated Sharpe ratio",
            ours,
            table.vbt.returns(freq="15min", year_freq="365D").deflated_sharpe_ratio()[0],
            "vectorbt, of the whole table",
        ),
        (
            "deflated Sharpe ratio",
            ours,
            vectorbt.returns.metrics.deflated_sharpe_ratio(
                est_sharpe=sharpe,
                var_sharpe=variance,
                nb_trials=TRIALS,
                backtest_horizon=n,
                skew=plain["skewness"],
                kurtosis=plain["kurtosis"],
            ),
            "vectorbt, raw kurtosis",
        ),
        (
            "deflated Sharpe ratio",
            ours,
            skfolio_measures.deflated_sharpe_ratio(returns.to_numpy(), sharpes),
            "skfolio",
        ),
        (
            "  moments adjusted",
            M.sharpe_probability(sharpe, luck, n, **adjusted),
            ffn.core.calc_deflated_sharpe_ratio(returns, sharpes, nperiods=35040, annualized_trials=False),
            "ffn",
        ),
        (
            "  moments adjusted, divisor n",
            M.sharpe_probability(divisor_n, luck, n, **adjusted),
            with_both,
            "purgedcv",
        ),
    ]
    compared(f"{one_of_three.symbol}, {n} bars, {TRIALS} trials", rows)
    steps = {
        "as they are": abs(ours - with_both),
        "without the divisor": abs(M.sharpe_probability(divisor_n, luck, n, **plain) - with_both),
        "without the moments": abs(M.sharpe_probability(sharpe, luck, n, **adjusted) - with_both),
    }
    excess = vectorbt.returns.metrics.deflated_sharpe_ratio(
        est_sharpe=sharpe,
        var_sharpe=variance,
        nb_trials=TRIALS,
        backtest_horizon=n,
        skew=plain["skewness"],
        kurtosis=plain["kurtosis"] - 3,
    )
    print(
        "  apart from purgedcv: "
        + ", ".join(f"{name} {value:.1e}" for name, value in steps.items())
        + f"; with excess kurtosis vectorbt would be {abs(excess - ours):.1e} away"
    )
    assert (
        0.01 < ours < 0.99
        and 1e-12 < steps["without the divisor"]
        and 1e-12 < steps["without the moments"]
        and abs(excess - ours) > 1e-9
    )


def overfitting_matrices(returns: pd.Series) -> dict:
    """name -> (observations, configurations); 480 observations, so that eight or ten blocks are of equal
    length."""
    noise, random = trials_of(returns.iloc[:480]).to_numpy(), np.random.default_rng(12)
    edge = trials_of(returns.iloc[:480], edge=0.4).to_numpy()
    return {
        "noise": noise[:, :12],
        "noise, 11": noise[:, :11],
        "an edge": edge[:, :12],
        "ties": np.repeat(noise[:, :6], 2, axis=1),
        "ties, 9": np.repeat(noise[:, :3], 3, axis=1),
        "ties, 11 uneven": np.repeat(
            noise[:, :5], [1, 4, 2, 3, 1], axis=1
        ),  # the rank that ties share is what decides here
        "drifting": noise[:, :12]
        + 0.3 * noise.std() * np.sin(np.arange(480)[:, None] / 60 + random.random(12) * 6),
        "few": noise[:, :2],
    }


def test_overfitting_probability_of_two_libraries(one_of_three):
    """ffn: ours. purgedcv wants configurations × observations, and does not count a winner that is exactly
    the median of an odd number of configurations: counted from its own logits, ours."""
    rows, medians, blocks = [], 0.0, 10 if one_of_three.symbol == "SIM-USD" else 8
    for name, matrix in overfitting_matrices(returns_of(one_of_three)).items():
        ours, theirs = (
            M.probability_of_backtest_overfitting(matrix, blocks),
            purgedcv.probability_of_backtest_overfitting(np.ascontiguousarray(matrix.T), blocks),
        )
        at_median = float((theirs.logits == 0).mean())
        medians += at_median
        rows += [
            (name, ours, ffn.core.calc_prob_backtest_overfitting(pd.DataFrame(matrix), blocks), "ffn"),
            (
                name,
                ours,
                (theirs.logits <= 0).mean(),
                f"purgedcv, {at_median:.3f} at the median: {theirs.pbo:.4f}",
            ),
        ]
        assert (
            theirs.n_combos == math.comb(blocks, blocks // 2)
            and (matrix.shape[1] % 2 or "ties" in name or at_median == 0)
            and math.isclose(ours, theirs.pbo + at_median)
        )
        with pytest.raises(InputError, match="transposed"):
            M.probability_of_backtest_overfitting(matrix.T, blocks)
    compared(f"{one_of_three.symbol}, probability of overfitting, {blocks} blocks", rows)
    assert medians > 0 and next(ours for name, ours, *_ in rows if name == "an edge") < 0.1 < next(
        ours for name, ours, *_ in rows if name == "noise"
    )


def test_a_configuration_that_never_trades_ranks_by_a_ratio_of_0(one_of_three):
    "As purgedcv has it; ffn gives no number."
    matrix = overfitting_matrices(returns_of(one_of_three))["noise"].copy()
    matrix[:, 3] = 0.0
    ours, theirs = (
        M.probability_of_backtest_overfitting(matrix, 8),
        purgedcv.probability_of_backtest_overfitting(np.ascontiguousarray(matrix.T), 8),
    )
    assert ours == pytest.approx((theirs.logits <= 0).mean(), rel=1e-12) and math.isnan(
        ffn.core.calc_prob_backtest_overfitting(pd.DataFrame(matrix), 8)
    )


# bootstrap


def test_optimal_block_length_is_that_of_arch(one_of_three):
    "On returns, on their size and on parts of different lengths. A mean length below one bar is one, here."
    returns = returns_of(one_of_three)
    series = {
        "returns": returns,
        "absolute returns": returns.abs(),
        "first 200": returns.iloc[:200],
        "last 1000, absolute": returns.iloc[-1000:].abs(),
        "equity": one_of_three.equity,
    }
    compared(
        f"{one_of_three.symbol}, optimal block length",
        [
            (
                name,
                M.optimal_block_length(x),
                max(1.0, arch_bootstrap.optimal_block_length(x.to_numpy())["stationary"].iloc[0]),
                "arch",
            )
            for name, x in series.items()
        ],
    )


def exact_deviation(values: np.ndarray, block_length: float) -> float:
    """Standard deviation of the mean over all stationary resamples, in closed form (Politis & Romano 1994):
    circular autocovariances, weighted by the chance that two values are from one block."""
    n, p = len(values), 1 / block_length
    spectrum = np.abs(np.fft.fft(values - values.mean())) ** 2
    covariance, lag = np.fft.ifft(spectrum).real / n, np.arange(1, n)
    return math.sqrt((covariance[0] + 2 * ((1 - lag / n) * (1 - p) ** lag * covariance[1:]).sum()) / n)


@pytest.mark.parametrize("block_length", [1.0, 25.0])
def test_bootstrap_interval_is_that_of_arch(one_of_three, block_length):
    """Two streams of random numbers: the ends agree within a quarter of a standard deviation of the mean, and
    its spread with the closed form."""
    values, n = (
        np.abs(returns_of(one_of_three).to_numpy()[:1500]),
        4000,
    )  # the size of returns hangs together, so that the length of blocks matters
    ours = M.block_bootstrap_interval(values, block_length=block_length, n=n)
    theirs = (
        arch_bootstrap.StationaryBootstrap(block_length, values, seed=1)
        .conf_int(np.mean, n, method="percentile")
        .ravel()
    )
    exact = exact_deviation(values, block_length)
    spread = (
        values[M.stationary_bootstrap_indices(len(values), block_length, n, np.random.default_rng(5))]
        .mean(1)
        .std()
    )
    apart = np.abs(np.array(ours) - theirs) / exact
    print(
        f"\n{one_of_three.symbol}, mean size of 1500 returns, blocks of {block_length:g}: "
        f"ours {ours[0]:.3e} to {ours[1]:.3e}, arch {theirs[0]:.3e} to {theirs[1]:.3e}; "
        f"ends apart {apart[0]:.3f} and {apart[1]:.3f} standard deviations;"
        f" spread {spread:.3e}, closed form {exact:.3e}"
    )
    assert apart.max() < 0.25 and abs(spread / exact - 1) < 0.05
