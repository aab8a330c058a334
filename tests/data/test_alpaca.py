"""Alpaca's bars, fetched by the real client from a server on this computer that misbehaves on demand."""

import importlib.util
import json
import logging
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
from alpaca_server import FAULTS, HTTP_FAULTS, PAYLOAD_FAULTS, AlpacaServer

from trading_lib.bars import TIMEFRAMES, validate_bars, write_bars
from trading_lib.config import InputError
from trading_lib.data import alpaca_http
from trading_lib.data.alpaca import Keys, environment_keys, fetch_bars, fetch_with_report
from trading_lib.data.simulation import simulate_bars

pytestmark = pytest.mark.filterwarnings("ignore:websockets.legacy is deprecated")  # alpaca-py's own

START, END = "2024-03-04", "2024-03-16"
STOCKS = {(s, "15Min"): simulate_bars(s, "15Min", START, END, seed=1, edge=0.0) for s in ("SIMA", "SIMB")}
COINS = {
    (s, "15Min"): simulate_bars(s.replace("/", "-"), "15Min", "2024-01-01", "2024-01-04", seed=1, edge=0.0)
    for s in ("SIM/USD", "SIMC/USD", "SIMD/USD")
}
KEYS = Keys("key-of-tests", "secret-of-tests")
QUICK = {"request_s": 0.35, "deadline_s": 1.2, "attempts": 4, "back_off_s": 0.02, "page_size": 100}
PATIENT = {"request_s": 30, "deadline_s": 120}  # a busy machine is no fault of the answer
SLACK_S = 2.5  # of a busy computer; what is not cut off takes 30 s


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in alpaca_http.KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with AlpacaServer(STOCKS | COINS) as s:
        s.retry_after_s = 0
        yield s


def stocks(server, **options):
    return fetch_with_report(
        ["SIMA", "SIMB"], "15Min", START, END, "equity", **{"keys": KEYS, "url": server.url} | QUICK | options
    )


def coin(server, **options):
    return fetch_with_report(
        ["SIM/USD"], "15Min", "2024-01-01", "2024-01-04", "crypto", **{"url": server.url} | QUICK | options
    )


def same(frame, expected):
    pd.testing.assert_frame_equal(frame, expected, check_freq=False, rtol=0, atol=0)


def one_line(error) -> str:
    assert (
        "\n" not in str(error)
        and str(error).startswith("alpaca")
        and error.__cause__ is None
        and (error.__context__ is None or error.__suppress_context__)
    )
    return str(error)


# --- the whole table of faults
# ---------------------------------------------------------------------------------------

GOOD = "all bars"
BAR = "SIMA: bar 4 of a page, 2024-03-04T15:15:00"
# fault: (where it happens once, where it stays): all bars, or words of the error. The third: requests, where
# it stays
OUTCOMES = {
    "429 once": (GOOD, None),
    "429 forever": (None, "too many requests .429.*4 times.*wait a minute", 4),
    "429 without headers": (GOOD, "too many requests .429", 4),
    "500": (GOOD, r"troubles of its own \(500: internal server error\), 4 times", 4),
    "502 HTML": (GOOD, r"troubles of its own \(502\),", 4),
    "503": (GOOD, r"\(503", 4),
    "504": (GOOD, r"\(504", 4),
    "401": (r"\(401.*check APCA_API_KEY_ID and APCA_API_SECRET_KEY",) * 2 + (1,),
    "403 SIP": ("recent SIP data.*set feed to iex, or end to 15 minutes ago",) * 2 + (1,),
    "403 funds": (r"\(403: insufficient buying power\)",) * 2 + (1,),
    "404 position": (r"\(404: position does not exist\)",) * 2 + (1,),
    "422 duplicate id": (r"\(422: client_order_id must be unique\)",) * 2 + (1,),
    "refused": (GOOD, "no connection, 3 times", 0),
    "reset": (GOOD, "the connection broke off, 4 times", 4),
    "silent": (GOOD, "no answer in time, . times", 3),
    "drip": (GOOD, "no answer in time, . times", 3),
    "short body": (GOOD, "the connection broke off", 4),
    "cut JSON": (GOOD, "no JSON, or was cut off, 3 times", 3),
    "empty 200": (GOOD, r"no bars \(200\)", 3),
    "redirect": (r"elsewhere.*\(301\); check url",) * 2 + (1,),
    "oversize": ("larger than 64 MB",) * 2 + (1,),
    "bars null": (GOOD, "holds no table of bars, 3 times", 3),
    "symbol null": (GOOD, "no list of bars for SIMA", 3),
    "symbol absent": ("no 15Min bars of SIMA.*check the spelling",) * 2 + (5,),
    "repeated token": (GOOD, "leads back to a page", 4),
    "empty token": (GOOD, "does not say whether more pages follow", 3),
    "page N fails": (GOOD, r"\(500", 5),
    "duplicate across pages": (GOOD, GOOD, 6),
    "disorder": (GOOD, GOOD, 6),
    "missing field": (f"{BAR}Z, has no high",) * 2 + (1,),
    "unknown enum or field": (GOOD, GOOD, 6),
    "naive time": (f"{BAR}, has a time without a zone",) * 2 + (1,),
    "NaN literal": (f"{BAR}Z, has no number as low, was .nan.",) * 2 + (1,),
}
# requests reads with simplejson where that is installed, and it takes NaN for what it is: no JSON
if importlib.util.find_spec("simplejson"):
    OUTCOMES["NaN literal"] = OUTCOMES["cut JSON"]


def test_the_table_is_whole():
    assert (len(HTTP_FAULTS), len(PAYLOAD_FAULTS)) == (21, 12) and set(OUTCOMES) == set(FAULTS)


@pytest.mark.parametrize(
    "kind, stays",
    [(kind, stays) for kind, outcome in OUTCOMES.items() for stays in (False, True) if outcome[stays]],
    ids=lambda v: {True: "stays", False: "once"}.get(v, v),
)
def test_faults(server, kind, stays):
    "Kind, outcome, seconds; none goes past its deadline."
    # a busy machine may need longer than the others' request to read what is too much
    options = {
        "refused": {"back_off_s": 0.25},
        "symbol absent": {"allow_empty": False},
        "oversize": {"request_s": 5, "deadline_s": 10},
    }.get(kind, {})
    pages = -(-sum(map(len, STOCKS.values())) // QUICK["page_size"])
    assert pages == 6
    server.inject(kind, None if stays or kind == "symbol absent" else 1)
    begun = time.monotonic()
    try:
        bars, report = stocks(server, **options)
        outcome = GOOD
        for symbol in ("SIMA", "SIMB"):
            same(bars[symbol], STOCKS[symbol, "15Min"])
        assert report["pages"] == pages and report["requests"] >= pages and report["empty"] == []
    except InputError as e:
        outcome = one_line(e)
    seconds = time.monotonic() - begun
    print(f"{kind:>24} {'stays' if stays else 'once':>6} {seconds:6.2f} s  {outcome}")
    expected = OUTCOMES[kind][stays]
    assert outcome == GOOD if expected == GOOD else re.search(expected, outcome), outcome
    assert seconds < QUICK["deadline_s"] + SLACK_S
    if stays and kind not in ("silent", "drip", "symbol absent"):
        assert len(server.requests) == OUTCOMES[kind][2]
    if stays and kind in ("silent", "drip"):
        assert OUTCOMES[kind][2] <= len(server.requests) <= 4
    if kind == "redirect":
        assert [r.path for r in server.requests] == ["/v2/stocks/bars"]
    if stays:
        return
    # nobody is asked for what we have: the same page again, and no other
    asked = [r.query.get("page_token") for r in server.requests]
    if outcome == GOOD:
        assert (
            len(set(asked)) == pages
            and len(asked) <= pages + 1 + (kind == "repeated token")
            and asked == sorted(asked, key=asked.index)
        )


@pytest.mark.parametrize(
    "kind, words",
    [
        ("drip of headers", "no answer in time"),
        ("gzip bomb", "larger than 64 MB"),
        (
            "conflict across pages",
            r"SIMA: the bar of 2024-03-0\d \d\d:\d\dZ came twice with different values",
        ),
        ("other symbol", "bars of 'ZZZZ', which were not asked for"),
        ("ever new token", "pages come to no end: 7 of them"),
        ("empty pages", "pages come to no end: 6 of them"),
        ("ever later bars", r"pages come to no end: \d\d of them, .* where 2,308 fit"),
        ("price null", f"{BAR}Z, has no close"),
        ("price text", "has no number as close, was 'cheap'"),
        ("time text", "has no time, was 'yesterday'"),
        ("leap day", "2024-02-30T15:15:00Z, has a time that does not exist"),
        ("price huge", "has no number as open"),
        ("price flag", "has no number as volume, was 'True'"),
        ("400", r"does not take the question \(400: invalid symbol: ZZZZ\)"),
        ("bars list", "holds no table of bars"),
        ("number token", "does not say whether more pages follow"),
    ],
)
def test_more_faults(server, kind, words):
    server.inject(kind, None)
    with pytest.raises(InputError, match=words) as error:
        stocks(server, **({} if words == "no answer in time" else PATIENT))
    one_line(error.value)


@pytest.mark.parametrize("kind", ["no counts", "offset time", "bars outside"])
def test_differences_that_do_not_matter(server, kind):
    server.inject(kind, None)
    bars, report = stocks(server)
    for symbol in ("SIMA", "SIMB"):
        same(bars[symbol], STOCKS[symbol, "15Min"])
    assert sum(report["outside"].values()) == (
        7 if kind == "bars outside" else 0
    )  # 3 + 4 pages hold bars of SIMA, SIMB


def test_a_missing_token_is_the_end(server):
    server.inject("no token", None)
    same(coin(server, page_size=1000)[0]["SIM/USD"], COINS["SIM/USD", "15Min"])


def test_what_was_mended_is_counted(server):
    server.inject("duplicate across pages", None)
    report = stocks(server, **PATIENT)[1]
    assert report["duplicates"] == {
        "SIMA": 2,
        "SIMB": 3,
    }  # 260 bars each: pages 2 and 3 begin with SIMA's again, 4 to 6 with SIMB's
    server.heal()
    server.inject("disorder", 1)
    assert stocks(server)[1]["disorder"] == {"SIMA": 2, "SIMB": 0}
    server.heal()
    server.inject("symbol absent", None)
    bars, report = stocks(server)
    assert report["empty"] == ["SIMA"] and len(bars["SIMA"]) == 0
    same(bars["SIMA"], STOCKS["SIMA", "15Min"].iloc[:0])


def threads_left(seconds: float) -> int:
    "Threads of ours that are alive after so long."
    until = time.monotonic() + seconds
    while (left := sum(t.name == "alpaca" for t in threading.enumerate())) and time.monotonic() < until:
        time.sleep(0.02)
    return left


def test_threads_that_were_given_up_end():
    with AlpacaServer(COINS) as server:
        for kind in ("silent", "drip"):
            server.heal()
            server.inject(kind, None)
            with pytest.raises(InputError):
                coin(server, attempts=2, request_s=0.2)
            assert threads_left(1) == 0
        server.heal()
        server.inject("drip of headers", None)
        with pytest.raises(InputError):
            coin(server, attempts=2, request_s=0.2)
    assert threads_left(2) == 0  # with the connection


# --- waits
# -----------------------------------------------------------------------------------------------------------


class Clock:
    "Time that passes in waits alone; each is recorded with the number of requests that were made before it."

    def __init__(self, server):
        self.server, self.waits = server, []

    def __getattr__(self, name):
        return getattr(time, name)

    def monotonic(self):
        return sum(wait for wait, _ in self.waits)

    def sleep(self, seconds):
        self.waits.append((seconds, len(self.server.requests)))


@pytest.fixture
def clock(server, monkeypatch):
    monkeypatch.setattr(alpaca_http, "time", Clock(server))
    return alpaca_http.time


def test_waits_double_and_vary(server, clock, monkeypatch):
    "Drawn between half of it and all of it."
    server.inject("503", None)
    for draw, expected in (
        (lambda least, most: least, [0.05, 0.1, 0.2]),
        (lambda least, most: most, [0.1, 0.2, 0.4]),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(random, "uniform", draw)
            with pytest.raises(InputError, match="4 times"):
                coin(server, attempts=4, back_off_s=0.1, deadline_s=10)
        waits, before = zip(*clock.waits)
        assert waits == pytest.approx(expected) and before == (1, 2, 3) and len(server.requests) == 4
        clock.waits.clear()
        server.requests.clear()
    for _ in range(2):
        with pytest.raises(InputError):
            coin(server, attempts=4, back_off_s=0.1, deadline_s=10)
    waits = [wait / (0.05 * 2 ** (k % 3)) for k, (wait, _) in enumerate(clock.waits)]
    assert len(set(waits)) == 6 and all(1 <= wait <= 2 for wait in waits)


def test_no_wait_goes_past_the_deadline(server, clock):
    server.inject("503", None)
    with pytest.raises(InputError, match="503"):
        coin(server, attempts=99, back_off_s=0.1, deadline_s=2)
    assert (
        clock.monotonic() < 2 <= clock.monotonic() + 4 * clock.waits[-1][0]
        and len(server.requests) == len(clock.waits) + 1
    )


def test_the_server_says_when(server, clock):
    server.retry_after_s = 1
    server.inject("429 once")
    coin(server, deadline_s=5)
    assert clock.waits == [(1.0, 1)]
    server.retry_after_s = 3600
    clock.waits.clear()
    server.requests.clear()
    server.inject("429 forever", None)
    with pytest.raises(InputError, match="asks to wait for 3600 s; wait a minute"):
        coin(server, deadline_s=5)
    assert clock.waits == [] and len(server.requests) == 1


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"Retry-After": "12"}, 12),
        (
            {
                "Retry-After": lambda: time.strftime(
                    "%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 12)
                )
            },
            12,
        ),
        ({"X-Ratelimit-Reset": lambda: str(int(time.time()) + 12)}, 12),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "tomorrow"}, None),
        ({"X-Ratelimit-Reset": "1"}, 0),
        ({"X-Ratelimit-Reset": "nan"}, None),
        ({}, None),
    ],
)
def test_wishes(headers, seconds):
    wish = alpaca_http._wished_wait({k: v() if callable(v) else v for k, v in headers.items()})
    assert wish is None if seconds is None else seconds - 1.5 <= wish <= seconds


# --- what is asked, what comes
# ---------------------------------------------------------------------------------------


def test_many_symbols_in_pages(server):
    names = ["SIMD-USD", "SIM/USD", "SIMC/USD"]
    lines = []
    bars, report = fetch_with_report(
        names,
        "15Min",
        "2024-01-01",
        "2024-01-04",
        "crypto",
        url=server.url,
        page_size=137,
        progress=lines.append,
    )
    assert list(bars) == names and report["requests"] == report["pages"] == len(server.requests) == len(
        lines
    ) == -(-3 * 288 // 137)
    for name in names:
        same(bars[name], COINS[name.replace("-", "/"), "15Min"])
    assert {r.path for r in server.requests} == {"/v1beta3/crypto/us/bars"} and {
        r.query["symbols"] for r in server.requests
    } == {"SIM/USD,SIMC/USD,SIMD/USD"}
    assert "page_token" not in server.requests[0].query and len(
        {r.query.get("page_token") for r in server.requests}
    ) == len(server.requests)
    frame = bars["SIM/USD"]
    assert (
        frame.index.name == "timestamp"
        and frame.index.dtype == "datetime64[ns, UTC]"
        and (frame.dtypes == "float64").all()
        and frame.attrs == {}
    )


@pytest.mark.parametrize(
    "start, end",
    [
        ("2024-01-02", "2024-01-03"),
        ("2024-01-02 00:00:01", "2024-01-02 00:15"),
        ("2024-01-02 00:15", "2024-01-02 00:15:00.000001"),
        ("2024-01-02 03:07", "2024-01-02 18:59:59.999999999"),
        ("2024-01-02T00:00-05:00", "2024-01-02T09:00+01:00"),
        ("2023-06-01", "2025-06-01"),
        ("2023-06-01", "2023-06-02"),
    ],
)
def test_from_start_to_before_end(server, start, end):
    bars, report = fetch_with_report("SIM/USD", "15Min", start, end, "crypto", url=server.url)
    low, high = (
        pd.Timestamp(t).tz_localize("UTC") if pd.Timestamp(t).tz is None else pd.Timestamp(t)
        for t in (start, end)
    )
    whole = COINS["SIM/USD", "15Min"]
    same(bars["SIM/USD"], whole.loc[[t for t in whole.index if low <= t < high]])
    assert report["outside"] == {"SIM/USD": 0}  # the question was exact as well
    asked = server.requests[0].query
    assert (
        pd.Timestamp(asked["start"]) == low
        and high - pd.Timedelta("1us") <= pd.Timestamp(asked["end"]) < high
    )


@pytest.mark.slow
@pytest.mark.parametrize("timeframe", TIMEFRAMES)
def test_timeframes(timeframe):
    made = {
        s: simulate_bars(s.replace("/", "-"), timeframe, "2024-03-04", "2024-03-16", seed=1, edge=0.0)
        for s in ("SIM/USD", "SIMA")
    }
    with AlpacaServer({(s, timeframe): frame for s, frame in made.items()}) as server:
        same(
            fetch_bars("SIM/USD", timeframe, START, END, "crypto", url=server.url)["SIM/USD"], made["SIM/USD"]
        )
        raw = fetch_bars("SIMA", timeframe, START, END, "equity", url=server.url, keys=KEYS)["SIMA"]
        assert [r.query["timeframe"] for r in server.requests[-2:]] == [timeframe] * 2
    if timeframe == "1Day":
        assert set(raw.index.hour) == {4, 5}  # midnight in New York, before and after the change of the clock
    same(validate_bars(raw, timeframe, "equity", allow_steps=True)[0], made["SIMA"])


def test_feed_and_adjustment(server):
    server.splits["SIMA"] = [("2024-03-08", 4.0)]
    raw, sip, iex, split = (
        fetch_bars("SIMA", "15Min", START, END, "equity", keys=KEYS, url=server.url, **o)["SIMA"]
        for o in ({}, {"feed": "sip"}, {"feed": "iex"}, {"adjustment": "split"})
    )
    assert [(r.query.get("feed"), r.query.get("adjustment")) for r in server.requests] == [
        (None, "raw"),
        ("sip", "raw"),
        ("iex", "raw"),
        (None, "split"),
    ]
    same(sip, raw)
    assert iex.volume.sum() < raw.volume.sum() / 30 and (raw.close / split.close).round(
        9
    ).unique().tolist() == [4.0, 1.0]


def test_the_same_as_alpaca_py_itself(server):
    "The client's own paging and parsing, where nothing goes wrong."
    from alpaca.data.historical import StockHistoricalDataClient
    from alpaca.data.requests import StockBarsRequest
    from alpaca.data.timeframe import TimeFrame, TimeFrameUnit

    ours = stocks(server)[0]
    question = StockBarsRequest(
        symbol_or_symbols=["SIMA", "SIMB"],
        timeframe=TimeFrame(15, TimeFrameUnit.Minute),
        start=pd.Timestamp(START).to_pydatetime(),
        end=pd.Timestamp(END).to_pydatetime(),
    )
    theirs = (
        StockHistoricalDataClient("key-of-tests", "secret-of-tests", url_override=server.url)
        .get_stock_bars(question)
        .data
    )
    for symbol, frame in ours.items():
        assert [tuple(row) for row in frame.itertuples()] == [
            (b.timestamp, b.open, b.high, b.low, b.close, b.volume) for b in theirs[symbol]
        ] and len(frame) == 260


def test_the_servers_own_time_is_told(server):
    before = pd.Timestamp.now("UTC").floor("s")
    _, report = stocks(server)
    assert before <= pd.Timestamp(report["server_time"]) <= pd.Timestamp.now("UTC") and report["pages"] > 1
    for said in ("", "soon", "Mon, 99 Nov 2026 25:00:00 GMT", "9" * 100):
        assert alpaca_http._told_time({"Date": said}) is None
    assert alpaca_http._told_time({"Date": "Sun, 06 Nov 1994 08:49:37 GMT"}) == pd.Timestamp(
        "1994-11-06 08:49:37", tz="UTC"
    )  # RFC 9110, 5.6.7


def test_a_class_of_shares_is_asked_for_as_alpaca_writes_it():
    bars = STOCKS["SIMA", "15Min"]
    with AlpacaServer({("SIM.B", "15Min"): bars}) as server:
        for name in ("SIM-B", "SIM.B"):
            same(
                fetch_bars(name, "15Min", START, END, "equity", **{"keys": KEYS, "url": server.url} | QUICK)[
                    name
                ],
                bars,
            )
        assert {r.query["symbols"] for r in server.requests} == {"SIM.B"}


def test_the_server_sorts_downwards_too(server):
    from alpaca.common.enums import Sort
    from alpaca.data.historical import CryptoHistoricalDataClient
    from alpaca.data.requests import CryptoBarsRequest
    from alpaca.data.timeframe import TimeFrame, TimeFrameUnit

    rows = CryptoHistoricalDataClient(url_override=server.url, raw_data=True).get_crypto_bars(
        CryptoBarsRequest(
            symbol_or_symbols="SIM/USD",
            timeframe=TimeFrame(15, TimeFrameUnit.Minute),
            sort=Sort.DESC,
            limit=5,
        )
    )
    assert [pd.Timestamp(r["t"]) for r in rows["SIM/USD"]] == list(COINS["SIM/USD", "15Min"].index[:-6:-1])


def test_in_threads(server):
    for _ in range(4):
        server.inject("500")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: coin(server)[0]["SIM/USD"], range(16)))
    for frame in results:
        same(frame, COINS["SIM/USD", "15Min"])
    assert len(server.requests) == 16 * 3 + 4


# --- refusals before anything is sent
# --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"feed": "ixe"}, "did you mean 'iex'"),
        ({"adjustment": "splits"}, "did you mean 'split'"),
        ({"asset_class": "stocks"}, "asset_class: unknown name 'stocks'"),
        ({"timeframe": "7Min"}, "unknown name '7Min'"),
        ({"symbols": []}, "was none"),
        ({"symbols": ["sima"]}, "in capitals, was 'sima'"),
        ({"symbols": ["SIM/USD"]}, "expected a stock such as AAPL"),
        ({"symbols": ["A,B"]}, "letters, digits"),
        ({"end": START}, "start before end"),
        ({"start": "soon"}, "expected a date"),
        ({"url": "http://data.alpaca.markets"}, "expected https://host"),
        ({"url": "http://127.0.0.1.example.com"}, "expected https://host"),
        ({"url": "https://data.alpaca.markets/v2"}, "leave out the version"),
        ({"url": "ftp://x"}, "expected https://host"),
        ({"page_size": 10_001}, "page_size: expected 1 to 10000"),
        ({"attempts": 0}, "attempts: expected 1 to 100"),
        ({"deadline_s": float("nan")}, "deadline_s: expected"),
        ({"keys": None}, "APCA_API_KEY_ID and APCA_API_SECRET_KEY .crypto needs none"),
        ({"asset_class": "crypto", "symbols": "SIM/USD", "feed": "iex"}, "crypto has one feed"),
        ({"asset_class": "crypto", "symbols": "SIM/USD", "adjustment": "split"}, "nothing to adjust"),
        ({"asset_class": "crypto"}, "expected a pair"),
    ],
)
def test_refused_before_any_request(server, change, words):
    question = {
        "symbols": ["SIMA"],
        "timeframe": "15Min",
        "start": START,
        "end": END,
        "asset_class": "equity",
        "keys": KEYS,
        "url": server.url,
    } | change
    with pytest.raises(InputError, match=words) as error:
        fetch_bars(**question)
    assert "\n" not in str(error.value) and server.requests == []


# --- keys
# ------------------------------------------------------------------------------------------------------------


def sent_keys(request):
    return {k.upper(): v for k, v in request.headers.items() if k.upper().startswith("APCA")}


def test_keys_come_from_the_environment_and_crypto_needs_none(server, monkeypatch):
    assert environment_keys() is None
    coin(server)
    assert all(sent_keys(r) == {} for r in server.requests)
    monkeypatch.setenv("APCA_API_KEY_ID", "first")
    with pytest.raises(InputError, match="APCA_API_SECRET_KEY is not set"):
        coin(server)
    monkeypatch.setenv("APCA_API_SECRET_KEY", "second")
    server.keys = "first", "second"
    server.requests.clear()
    coin(server)
    stocks(server, keys=None)
    assert all(
        sent_keys(r) == {"APCA-API-KEY-ID": "first", "APCA-API-SECRET-KEY": "second"} for r in server.requests
    )
    server.keys = "first", "third"
    with pytest.raises(InputError, match=r"refuses access \(403: forbidden\.\); check APCA_API_KEY_ID"):
        stocks(server, keys=None)


def fake_keys() -> tuple[str, str]:
    rng = random.Random(11)
    return "PK" + "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", k=18)), "".join(
        rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=40)
    )


def told(server, **options) -> tuple[str, ...]:
    "All that an error may say: message, traceback, traceback with the variables of each frame."
    try:
        stocks(server, keys=None, **options)
    except InputError as e:
        assert e.__cause__ is None and e.__context__ is None and e.__dict__ == {}
        return (
            str(e),
            repr(e),
            traceback.format_exc(),
            "".join(traceback.TracebackException.from_exception(e, capture_locals=True).format()),
        )
    raise AssertionError("no error")


def test_keys_appear_nowhere(server, monkeypatch, caplog, capfd, tmp_path):
    "Messages, tracebacks with and without the variables of each frame, logs, printed objects, files."
    secrets = fake_keys()
    for name, value in zip(alpaca_http.KEY_VARIABLES, secrets):
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG)
    found, lines = [], []
    bars, report = stocks(server, keys=None, progress=lines.append)
    assert all(sorted(sent_keys(r).values()) == sorted(secrets) for r in server.requests)  # they were used
    found += [
        repr(bars),
        json.dumps(report),
        repr(environment_keys()),
        str(environment_keys()),
        f"{environment_keys()!r:>10}",
    ]
    write_bars(bars["SIMA"], tmp_path / "SIMA.parquet")
    (tmp_path / "report.json").write_text(json.dumps(report))
    failures = [
        "401",
        "403 SIP",
        "502 HTML",
        "key echo",
        "reset",
        "silent",
        "drip",
        "short body",
        "cut JSON",
        "empty 200",
        "redirect",
        "oversize",
        "bars null",
        "repeated token",
        "NaN literal",
        "naive time",
        "conflict across pages",
        "price text",
        "refused",
    ]
    for kind in failures:
        server.heal()
        server.inject(kind, None)
        found += told(server, progress=lambda line: lines.append(line), attempts=2, request_s=0.2)
        if kind == "key echo":
            assert "APCA-API-KEY-ID=*** APCA-API-SECRET-KEY=***" in found[-4]
    # keys that cannot be keys: requests would quote them
    for bad in (secrets[1] + "\n", secrets[1] + " ", secrets[1] + "é", "\t" + secrets[1]):
        monkeypatch.setenv("APCA_API_SECRET_KEY", bad)
        found += told(server)
        assert "copy both anew" in found[-4]
    service = alpaca_http.PatientClient("equity", Keys(*secrets), server.url, "alpaca", 1, 1, 1, 1, print)
    service.connect()
    found += [
        repr(service),
        repr(service.client),
        str(service.client),
        repr(service.transport),
        repr(service.client._session),
        repr(service.client._session.headers),
    ]
    output = capfd.readouterr()
    texts = (
        found
        + lines
        + [caplog.text, output.out, output.err]
        + [p.read_bytes().decode("latin1") for p in tmp_path.rglob("*") if p.is_file()]
    )
    assert (
        "urllib3.connectionpool" in caplog.text
        and len(found) > 4 * len(failures)
        and any("keys = Keys()" in t for t in found)
    )
    for secret in secrets:
        assert [t for t in texts if secret in t or repr(secret.encode()) in t or secret[4:] in t] == []


@pytest.mark.slow
def test_keys_appear_in_no_output_of_a_program(server, tmp_path):
    "A script that nobody guards, with all logs on, one run that works and one that fails."
    secrets = fake_keys()
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import logging, sys

        logging.basicConfig(level=logging.DEBUG)
        from trading_lib.data.alpaca import fetch_bars

        bars = fetch_bars(
            "SIMA",
            "15Min",
            "2024-03-04",
            "2024-03-16",
            "equity",
            url=sys.argv[1],
            attempts=2,
            back_off_s=0.01,
            progress=print,
        )
        bars["SIMA"].to_csv("bars.csv")
    """)
    )
    for fault in (None, "key echo", "reset"):
        if fault:
            server.inject(fault, None)
        env = (
            os.environ
            | dict(zip(alpaca_http.KEY_VARIABLES, secrets))
            | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
        )
        done = subprocess.run(
            [sys.executable, "-X", "dev", "script.py", server.url],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, "page 1" in done.stdout, "InputError: alpaca" in done.stderr) == (
            (1, False, True) if fault else (0, True, False)
        ), done.stderr
        server.heal()
        for text in (done.stdout, done.stderr, *(p.read_text() for p in tmp_path.iterdir())):
            assert not any(s in text for s in secrets)
    assert (
        sorted(sent_keys(server.requests[-1]).values()) == sorted(secrets)
        and (tmp_path / "bars.csv").exists()
    )
