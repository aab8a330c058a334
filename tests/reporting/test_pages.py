"""What a backtest is worth, in words and on a page.

Judgement, stress, capacity, and a report that stands alone.
"""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from markupsafe import escape
from scipy.stats import norm
from small_backtests import FITTED, TIGHT, backtest, long_run, market_of, random_list, simulated

from trading_lib.backtest import read_backtest, write_backtest
from trading_lib.metrics import GATES
from trading_lib.reporting import pages as report
from trading_lib.reporting.pages import comparison_table, describe_source, render_report, write_report
from trading_lib.reporting.verdict import (
    VERDICTS,
    assess,
    capacity_limit,
    headline,
    judge,
    judge_stress,
    worst_verdict,
)

GOOD = {
    "profit_factor": 2.5,
    "consistency": 0.9,
    "max_drawdown": 0.05,
    "win_rate": 0.6,
    "moments": {"sharpe": 0.05, "n": 10_000, "skewness": 0.0, "kurtosis": 3.0},
}  # five standard errors


# judgement


def test_the_deflated_sharpe_ratio_is_the_papers():
    """Bailey and López de Prado 2014, with scipy's normal distribution.

    The expected maximum of n worthless trials, each with the standard error of a Sharpe ratio.
    """
    for n in (2, 8, 200):
        luck = (
            (1 - np.euler_gamma) * norm.ppf(1 - 1 / n) + np.euler_gamma * norm.ppf(1 - 1 / (n * math.e))
        ) / math.sqrt(9_999)
        expected = norm.cdf((0.05 - luck) * math.sqrt(9_999) / math.sqrt(1 + (3 - 1) / 4 * 0.05**2))
        assert judge(GOOD, n)["deflated_sharpe"] == pytest.approx(expected, abs=1e-12)


def test_what_one_trial_approves_many_do_not():
    """The same figures are APPROVED as the only trial.

    After a thousand the deflated Sharpe ratio is named as what failed.
    """
    weak = GOOD | {"moments": GOOD["moments"] | {"sharpe": 0.03}}
    assert judge(weak)["verdict"] == "APPROVED"
    said = judge(weak, 1000)
    assert (
        said["verdict"] == "REVIEW"
        and [r.split()[0] for r in said["failed"]["APPROVED"]] == ["deflated_sharpe"]
        and said["n_trials"] == 1000
    )


def scripted(**rows):
    """A result on real bars, better than every baseline, whose stress rows are given by name; the others
    are as good as the agent.
    """
    base = long_run("crypto")[0]
    return replace(
        base,
        metrics=base.metrics | {"fitness": None, "total_return": 0.5} | GOOD,
        provenance=base.provenance | {"data": {"source": "alpaca"}, "simulated": None},
        stress=[
            row | {"fitness": None} | GOOD | rows.get(row["name"].replace(" ", "_").replace("×", "x"), {})
            for row in base.stress
        ],
    )


@pytest.mark.slow
def test_a_verdict_that_turns_when_costs_double_says_so():
    "And one that does not turn says nothing; that it would be better without costs is no news."
    assert judge_stress(scripted(no_costs={"profit_factor": 9.0})) == (
        {row["name"]: "APPROVED" for row in long_run("crypto")[0].stress},
        [],
    )
    turned = scripted(costs_x_2={"profit_factor": 1.5}, orders_1_bar_late={"max_drawdown": 0.5})
    verdicts, sentences = judge_stress(turned)
    assert (
        verdicts["costs × 2"] == "REVIEW"
        and verdicts["orders 1 bar late"] == "DROP"
        and verdicts["costs × 3"] == "APPROVED"
    )
    assert sentences == [
        "The verdict turns from APPROVED to REVIEW with costs × 2.",
        "The verdict turns from APPROVED to DROP with orders 1 bar late.",
    ]
    assert set(sentences) <= set(assess(turned)["sentences"])


@pytest.mark.parametrize(
    "returns,expected",
    [
        ([0.10, 0.10, 0.10], math.inf),
        ([-0.10, -0.2, -0.3], None),
        ([0.0, 0.0, 0.0], None),
        ([0.10, 0.05, 0.01], 1e4 * 10**0.0),
        ([0.10, 0.00, -0.1], 1e3 * 10**0.5),
        ([0.10, 0.08, 0.04], 1e4 * 10**0.75),
    ],
)
def test_capacity_is_where_half_of_the_return_is_gone(returns, expected):
    "Between two sizes on a logarithmic scale, on paper."
    result = replace(
        long_run("crypto")[0],
        capacity=[{"initial": 1e3 * 10**k, "total_return": r} for k, r in enumerate(returns)],
    )
    assert capacity_limit(result) == (expected if expected is None else pytest.approx(expected))


def test_the_headline_names_what_is_beaten_and_what_is_not():
    "After costs, against cash and buy-and-hold."
    result, _ = long_run("crypto")
    # a return, buy-and-hold's, and that at the agent's exposure
    for r, bh, exposed in ((0.05, 0.10, 0.01), (-0.05, -0.10, -0.01), (0.05, 0.01, 0.01), (-0.05, 0.01, 0.0)):
        made = replace(
            result,
            metrics=result.metrics | {"total_return": r},
            baselines=result.baselines | {"buy_and_hold": bh, "buy_and_hold_at_exposure": exposed},
        )
        words = headline(made)
        beaten, _, rest = (
            words.partition("Beats ")[2].partition("Does not beat ")
            if "Beats" in words
            else ("", "", words.partition("Does not beat ")[2])
        )
        for name, value in (("cash", 0), ("buy-and-hold,", bh), ("at its own exposure", exposed)):
            here = (beaten if r > value else rest).replace(".", ",")
            assert name in here, (name, words)


# what no figure makes up for


@pytest.fixture
def no_pictures(monkeypatch):
    "Words alone: pictures take seconds."
    for name in ("plot_backtest", "plot_stress"):
        monkeypatch.setattr(report, name, lambda *_: None)
    monkeypatch.setattr(report, "figure_bytes", lambda figure: b"")


SIMULATED = {"data": {"source": "simulated", "edge": 0.1, "seed": 0}}
SMOKE = {
    "training": {
        "smoke": True,
        "said": "trained for 20,000 of the 7,500,000 steps that mode standard stands for on tier cpu",
    }
}
UNKNOWN = {
    "training": {
        "smoke": None,
        "said": "how much training its mode (custom) stands for is not known; "
        "it was trained for 20,000 steps",
    }
}


def changed(provenance=(), metrics=(), baselines=()):
    "The good result on real bars, with something else in it."
    base = scripted()
    return replace(
        base,
        provenance=base.provenance | dict(provenance),
        metrics=base.metrics | dict(metrics),
        baselines=base.baselines | dict(baselines),
    )


@pytest.mark.parametrize(
    "result, verdict, words",
    [
        (dict(), "APPROVED", ""),
        (dict(provenance=SIMULATED), "SIMULATED PASS", ""),
        (dict(provenance={"data": {"source": "alpaca"}, "simulated": True}), "SIMULATED PASS", ""),
        (dict(provenance={"data": {}}), "SIMULATED PASS", ""),
        (dict(provenance={"data": {"source": "files"}}), "SIMULATED PASS", ""),  # it is called SIM-USD
        (
            dict(provenance=SIMULATED, metrics={"max_drawdown": 0.12}),
            "REVIEW",
            "SIMULATED PASS needs <= 0.08",
        ),
        (dict(provenance=SIMULATED, metrics={"max_drawdown": 0.5}), "DROP", "REVIEW needs <= 0.15"),
        (dict(provenance=SMOKE), "SMOKE TEST", "trained for 20,000 of the 7,500,000 steps"),
        (dict(provenance=SMOKE | SIMULATED), "SMOKE TEST", "trained for 20,000"),
        (dict(provenance=SMOKE, metrics={"max_drawdown": 0.5}), "SMOKE TEST", "trained for 20,000"),
        (
            dict(provenance=SMOKE | {"unseen": False, "seen_to": "2023-02-01 00:00"}),
            "SMOKE TEST",
            "unseen bars are needed",
        ),
        (dict(provenance=UNKNOWN), "APPROVED", "How much training its mode (custom) stands for is not known"),
        (dict(metrics={"trades": 9}), "REVIEW", "too few trades to say (9)"),
        (dict(metrics={"trades": 10}), "APPROVED", ""),
        *(
            (
                dict(baselines={name: 0.51}, provenance=data),
                "REVIEW",
                f"simple baselines did better than its +50.00%: {called} +51.00%",
            )
            for data in ({}, SIMULATED)
            for name, called in (
                ("buy_and_hold", "buy-and-hold"),
                ("buy_and_hold_at_exposure", "buy-and-hold at its own exposure"),
                ("moving_average_cross", "the moving-average cross"),
                ("ridge", "ridge regression"),
                ("boosting", "gradient boosting"),
                ("a_rule_of_mine", "a rule of mine"),
            )
        ),
        (dict(baselines={"oracle": 9.0, "cash": 0.0, "ridge": 0.5}), "APPROVED", ""),
    ],
)
def test_what_no_figure_makes_up_for(no_pictures, result, verdict, words):
    """Figures that pass every gate are APPROVED on real bars alone, of a model that was trained as long
    as its mode says, where no simple thing did better; and every reason is said, in the report and under
    stress as well.
    """
    result = changed(**result)
    said, page = assess(result), render_report(result)
    assert said["verdict"] == verdict and (not words or any(words in line for line in said["reasons"])), (
        said["verdict"],
        said["reasons"],
    )
    assert f"<b>{verdict}</b>" in page and all(str(escape(line)) in page for line in said["reasons"])
    simulated = said["simulated"]
    assert simulated == ("simulated bars" in said["headline"]) == ("Simulated data." in page) == (
        " simulated " in comparison_table([result], [said])
    ) and not (simulated and "APPROVED" in json.dumps(said) + page)
    assert verdict != "SMOKE TEST" or set(said["stress"].values()) == {"SMOKE TEST"}
    for name, value in result.baselines.items():
        if name not in ("oracle", "cash"):
            assert f"{value:+.2%}" in said["headline"], name


def test_every_verdict_has_a_meaning_and_the_worst_decides():
    assert (
        set(GATES) < set(VERDICTS)
        and worst_verdict("REVIEW", "SMOKE TEST", "APPROVED") == "SMOKE TEST"
        and worst_verdict("SIMULATED PASS", "REVIEW") == "REVIEW"
        and worst_verdict("DROP", "REVIEW") == "DROP"
    )


@pytest.mark.parametrize("trades", [0, 2, 9, 10])
def test_figures_of_few_trades_are_not_written(no_pictures, trades):
    "Neither in the table nor in the reasons, nor under stress."
    own = {
        "trades": trades,
        "profit_factor": 1.2345,
        "win_rate": 0.4321,
        "average_win": 12.345,
        "average_loss": -6.789,
    }
    base = scripted()
    result = replace(base, metrics=base.metrics | own, stress=[row | own for row in base.stress])
    page = re.sub('base64,[^"]+', "", render_report(result))
    assert ((f"too few trades to say ({trades})" in page) == (trades < 10)) and all(
        (text in page) == (trades >= 10) for text in ("1.23", "43.2%", "12.35", "-6.79")
    )


def test_intervals_that_say_nothing_are_not_written(no_pictures):
    "Not below what can be lost, and not where every opinion fits in."
    for interval, words in (
        ((-0.4, 0.1), "-40.00% to +10.00%"),
        ((-1.2, 0.1), "too wide to say anything"),
        ((-0.9, 0.9), "too wide to say anything"),
    ):
        result = changed(
            metrics={
                "intervals": {
                    "total_return": dict(zip(("low", "high"), interval)),
                    "sharpe": {"low": -0.5, "high": 1.25},
                }
            }
        )
        assert words in render_report(result) and "-0.50 to 1.25" in render_report(result)
    wide = changed(
        metrics={
            "intervals": {"total_return": {"low": -0.4, "high": 0.1}, "sharpe": {"low": -9.5, "high": 31.25}}
        }
    )
    assert "31.25" not in render_report(wide)


@pytest.mark.slow
def test_text_from_outside_stays_text():
    """Of checkpoints, ledgers, files and verdicts.

    Nothing of it is markup in the page, and a picture is drawn of it.
    """
    evil = "<script>alert(1)</script>|$x$"
    result = changed(
        provenance={
            "data": {"source": evil, "feed": evil},
            "symbol": evil,
            "timeframe": evil,
            "version": evil,
            "model": {evil: evil},
            "bars": {"bars": evil, "start": evil, "end": evil, "sha256": evil},
        }
    )
    result.symbol, result.baselines = evil, result.baselines | {evil: 0.1}
    page = render_report(result, assess(scripted()) | {"verdict": evil, "headline": evil, "reasons": [evil]})
    assert "<script" not in page and page.count("&lt;script&gt;") >= 10


def test_an_agent_that_never_trades_is_dropped_and_says_so():
    result = backtest(actions=np.zeros(119, int), start=FITTED, stop=FITTED + 120)
    said = assess(result)
    assert (
        said["verdict"] == "DROP"
        and "It made no trade" in said["headline"]
        and said["capacity"] is None
        and said["deflated_sharpe"] == pytest.approx(0.5)
    )
    assert all(row["net_profit"] == 0 for row in result.stress + result.capacity)
    json.dumps(said, allow_nan=False)


def test_an_agent_that_holds_is_called_one_that_holds():
    """Buying once and holding on correlates with buy-and-hold by construction; an agent at random does
    not. The coefficient is pandas'.
    """
    holds = backtest(
        actions=np.array([3, *[0] * 298]),
        start=FITTED,
        stop=FITTED + 300,
        account=replace(TIGHT["crypto"], stop_pct=0.0, target_pct=0.0),
    )
    assert any("It holds more than it trades" in line for line in assess(holds)["sentences"]) and not any(
        "holds more" in line for line in assess(long_run("crypto")[0])["sentences"]
    )
    returns = long_run("crypto")[0].curves.pct_change().dropna()
    assert long_run("crypto")[0].metrics["correlation_with_holding"] == pytest.approx(
        returns["agent"].corr(returns["buy_and_hold"]), abs=1e-12
    )


def test_an_earlier_checkpoint_that_was_fitter_is_named():
    said = assess(scripted(), history=[("update 5", 0.9), ("update 10", 0.8)])
    assert any("'update 5' is the better checkpoint" in flag for flag in said["flags"])


@pytest.mark.slow
def test_no_gate_is_passed_on_bars_that_training_saw():
    """Figures that are APPROVED on unseen bars, and where it is not known, are DROP where the model was
    trained or chosen on them; under every stress as well.
    """
    base = scripted()
    said = {
        unseen: assess(
            replace(base, provenance=base.provenance | {"unseen": unseen, "seen_to": "2023-02-01 00:00:00"})
        )
        for unseen in (True, None, False)
    }
    assert [said[unseen]["verdict"] for unseen in (True, None, False)] == ["APPROVED", "APPROVED", "DROP"]
    assert (
        set(said[True]["stress"].values()) == {"APPROVED"}
        and set(said[False]["stress"].values()) == {"DROP"}
        and said[False]["stress"].keys() == said[True]["stress"].keys()
    )
    assert (
        said[True]["failed"] == {}
        and said[False]["failed"].keys() == GATES.keys()
        and all(
            len(reasons) == 1 and "unseen bars are needed" in reasons[0]
            for reasons in said[False]["failed"].values()
        )
    )
    weak = scripted()
    weak.metrics["max_drawdown"] = 0.12  # a gate that fails by itself is named as well
    weak.provenance = weak.provenance | {"unseen": False, "seen_to": "2023-02-01 00:00:00"}
    assert [reason.split()[0] for reason in assess(weak)["failed"]["APPROVED"]] == ["unseen", "max_drawdown"]
    assert assess(weak)["reasons"][
        0
    ] == "unseen bars are needed, and the model was trained or chosen on some of these" and assess(weak)[
        "reasons"
    ][1].startswith("No evidence")  # max_drawdown 0.12 is good enough for REVIEW
    assert "<b>DROP</b>" in render_report(weak) and "unseen bars are needed" in render_report(weak)


# the page


def outside_references(page):
    "Everything in a page that a browser would fetch."
    found = re.findall(
        r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)|url\(([^)]+)\)|@import\s+([^;]+)""", page
    )
    return [
        r for group in found for r in group if r and not r.startswith("data:image/png;base64,")
    ] + re.findall(r"<script|<iframe|<link|https?://", page)


@pytest.mark.slow
def test_the_report_stands_alone_and_says_on_what(tmp_path):
    """Simulated or real, verdict, span, fingerprint, figures, stress and capacity are in one page that
    fetches nothing; the other files hold the same numbers.
    """
    result = replace(long_run("crypto")[0])
    result.provenance = result.provenance | {
        "data": {"source": "simulated", "edge": 0.1, "seed": 3},
        "model": {"note <b>": "a & b"},
        "probes": {},
    }
    written = write_backtest(result, tmp_path) | write_report(result, tmp_path)
    page, figures, said = (
        written["report.html"].read_text(),
        json.loads(written["metrics.json"].read_text()),
        json.loads(written["verdict.json"].read_text()),
    )
    assert (
        outside_references(page) == []
        and page.startswith("<!doctype html>")
        and page.count("data:image/png") == 2
    )
    bars = simulated("crypto")[0]
    for words in (
        "Simulated data",
        "planted edge of 0.1",
        "seed 3",
        str(result.equity.index[0])[:16],
        str(result.equity.index[-1])[:16],
        market_of("crypto").fingerprint["sha256"],
        f"{len(bars)} from",
        f"{result.metrics['costs']:.2f}",
        headline(result).split(";")[0],
        "note &lt;b&gt;",
        "a &amp; b",
        f"<b>{said['verdict']}</b>",
        "costs × 2",
        "orders 3 bars late",
        f"{result.capacity[-1]['initial']:,.0f}",
        *(f"{row['total_return']:+.2%}" for row in result.stress),
    ):
        assert words in page, words
    for reason in said["failed"]["REVIEW"]:
        assert reason.replace(">", "&gt;").replace("<", "&lt;") in page
    assert (
        "Real data" not in page
        and figures["agent"]["net_profit"] == result.metrics["net_profit"]
        and figures["costs"] == result.costs
        and figures["baselines"] == result.baselines
    )
    assert render_report(read_backtest(tmp_path)) == page, "the page is made of what is kept"


@pytest.mark.slow
def test_a_report_on_real_bars_says_so():
    "It never calls them simulated; a martingale is called one; what nobody knows is said."
    short = backtest(actions=random_list(59), start=FITTED, stop=FITTED + 60)
    short.provenance["data"] = {"source": "files of <us>"}
    page = render_report(short)
    body = re.sub(r"base64,[^\"]+", "", page).split("</style>")[1]
    assert (
        "Real data" in body
        and "files of &lt;us&gt;" in body
        and "simulated" not in body.lower()
        and outside_references(page) == []
    )
    assert "martingale: there is nothing to learn" in describe_source(
        {"source": "simulated", "edge": 0, "seed": 1}
    ) and "not known" in describe_source({})


def test_many_results_are_one_table():
    "One line each, with the verdict of each."
    results = [
        backtest(
            actions=random_list(119, seed),
            start=FITTED,
            stop=FITTED + 120,
            account=TIGHT["crypto"],
            symbol=f"SIM{seed}-USD",
        )
        for seed in (1, 2)
    ]
    lines = comparison_table(results, [assess(r) for r in results]).splitlines()
    assert (
        len(lines) == 3
        and lines[1].split()[0] == "SIM1-USD"
        and lines[2].split()[-1] in {*GATES, "DROP"}
        and len({len(line) for line in lines}) == 1
    )
