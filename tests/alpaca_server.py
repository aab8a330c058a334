"""A server on this computer that speaks the wire format of Alpaca's bars, and misbehaves on demand.

    with AlpacaServer({("AAPL", "15Min"): bars}) as server:  # labelled by start, UTC
        server.inject("429 once")  # a name in FAULTS or MORE
        fetch_bars(["AAPL"], "15Min", start, end, "equity", url=server.url, ...)
        assert [r.query["symbols"] for r in server.requests] == ["AAPL", "AAPL"]

`times=None` injects a fault for ever, `after=2` once the first two answers were good.

It serves /v2/stocks/bars and /v1beta3/crypto/us/bars: symbols, timeframe, start, end (inclusive), limit
(over all symbols), page_token, sort, feed, adjustment. Results sort by symbol, then time; daily bars of
stocks are labelled with midnight in New York, as Alpaca's are. `feed=iex` has a fortieth of the volume.
`splits` divides earlier prices where `adjustment` is split or all; both `bars` and `splits` may be changed
while the server runs. Pass `keys` to have them checked. Every request is kept in `requests`.
"""

import base64
import gzip
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

import pandas as pd

PATHS = {"/v2/stocks/bars": "equity", "/v1beta3/crypto/us/bars": "crypto"}
FIELDS = {"o": "open", "h": "high", "l": "low", "c": "close", "v": "volume"}
LONGEST_S = 30.0  # no fault holds a connection longer
OVERSIZE = 256 * 2**20  # bytes, then it ends all the same


@dataclass(frozen=True)
class Request:
    "What a client asked."

    path: str
    query: dict
    headers: dict
    at: float  # time.monotonic()


class _Bad(Exception):
    "Status and message of an error answer."


def _stamp(t: pd.Timestamp) -> str:
    return t.strftime("%Y-%m-%dT%H:%M:%SZ")


def _whole(bars: dict, i: int, symbol: str | None = None):
    "The i-th bar of an answer."
    return bars[symbol or next(iter(bars))][i]


# --- faults: functions of (handler, payload)
# -------------------------------------------------------------------------
# An HTTP fault answers by itself and returns True. A payload fault changes the good payload in place and
# returns False. None: does not apply to this request, and is kept for another.


def _status(
    code: int,
    message: str | None = None,
    number: int | None = None,
    body: bytes | None = None,
    kind: str = "application/json",
    **headers,
):
    def fault(handler, payload):
        content = (
            body
            if body is not None
            else json.dumps({"code": number or code * 100000, "message": message}).encode()
        )
        handler.answer(
            code, content, kind, {k.replace("_", "-"): v() if callable(v) else v for k, v in headers.items()}
        )
        return True

    return fault


def _rate_limit(headers: bool):
    def fault(handler, payload):
        known = {
            "Retry-After": str(handler.owner.retry_after_s),
            "X-Ratelimit-Limit": "200",
            "X-Ratelimit-Remaining": "0",
            "X-Ratelimit-Reset": str(int(time.time()) + handler.owner.retry_after_s),
        }
        handler.answer(
            429, b'{"code":42910000,"message":"too many requests."}', headers=known if headers else {}
        )
        return True

    return fault


def _reset(handler, payload):
    handler.connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )  # close() sends RST
    handler.close_connection = True
    handler.connection.close()
    return True


def _silent(handler, payload):
    handler.owner.closing.wait(LONGEST_S)
    handler.close_connection = True
    return True


def _trickle(handler, content: bytes):
    "A byte each `drip_s`."
    handler.close_connection = True
    for byte in content[: int(LONGEST_S / handler.owner.drip_s)]:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        if handler.owner.closing.wait(handler.owner.drip_s):
            break
    return True


def _drip(handler, payload):
    content = json.dumps(payload).encode()
    handler.head(200, {"Content-Type": "application/json", "Content-Length": str(len(content))})
    return _trickle(handler, content)


def _drip_of_headers(handler, payload):
    return _trickle(handler, b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 100_000)


def _short_body(handler, payload):
    content = json.dumps(payload).encode()
    handler.head(200, {"Content-Type": "application/json", "Content-Length": str(len(content) + 1000)})
    handler.wfile.write(content)  # valid JSON, and shorter than announced
    handler.close_connection = True
    return True


def _cut_json(handler, payload):
    content = json.dumps(payload).encode()
    handler.answer(200, content[: len(content) // 2])
    return True


def _redirect(handler, payload):
    handler.answer(
        301, b"", headers={"Location": f"http://localhost:{handler.owner.port}/elsewhere"}
    )  # another host name
    return True


def _oversize(handler, payload):
    handler.close_connection = True
    handler.head(200, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"})
    spaces = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    for _ in range(OVERSIZE // 2**20):
        if handler.owner.closing.is_set():
            return True
        handler.wfile.write(spaces)
    handler.wfile.write(b"2\r\n{}\r\n0\r\n\r\n")
    return True


def _gzip_bomb(handler, payload):
    content = gzip.compress(b" " * 2**24, 1) * (OVERSIZE >> 24)
    handler.answer_as_is(200, content, {"Content-Encoding": "gzip"})
    return True


def _key_echo(handler, payload):
    handler.answer(
        403,
        json.dumps(
            {
                "message": "rejected: "
                + " ".join(f"{k}={v}" for k, v in handler.headers.items() if k.upper().startswith("APCA"))
            }
        ).encode(),
    )
    return True


def _bars_null(handler, payload):
    payload["bars"] = None
    return False


def _symbol_null(handler, payload):
    if not payload["bars"]:
        return None
    payload["bars"][next(iter(payload["bars"]))] = None
    return False


def _symbol_absent(handler, payload):
    if not payload["bars"]:
        return None
    del payload["bars"][next(iter(payload["bars"]))]
    return False


def _other_symbol(handler, payload):
    payload["bars"] = {"ZZZZ" if "/" not in s else "ZZZZ/USD": rows for s, rows in payload["bars"].items()}
    return False


def _repeated_token(handler, payload):
    if "page_token" not in handler.query:
        return None
    payload["next_page_token"] = handler.query["page_token"]
    return False


def _empty_token(handler, payload):
    if not payload["next_page_token"]:
        return None
    payload["next_page_token"] = ""
    return False


def _page_fails(handler, payload):
    return _status(500, "internal server error")(handler, payload) if "page_token" in handler.query else None


def _across_pages(change=None):
    "The first bar of a later page is the last one of the page before."

    def fault(handler, payload):
        if "page_token" not in handler.query or not payload["bars"]:
            return None
        symbol, when = handler.owner.last_served(handler.query)
        again = handler.owner.bar(handler.query, symbol, when)
        payload["bars"] = {symbol: [again | (change or {}), *payload["bars"].pop(symbol, [])]} | payload[
            "bars"
        ]
        return False

    return fault


def _disorder(handler, payload):
    rows = next(iter(payload["bars"].values()), [])
    if len(rows) < 3:
        return None
    rows[0], rows[2] = rows[2], rows[0]
    return False


def _edit(i: int, **fields):
    "Change the i-th bar; Ellipsis takes a field away."

    def fault(handler, payload):
        if not payload["bars"]:
            return None
        bar = _whole(payload["bars"], i)
        for name, value in fields.items():
            if value is ...:
                del bar[name]
            else:
                bar[name] = value(bar[name]) if callable(value) else value
        return False

    return fault


def _unknown_fields(handler, payload):
    payload |= {"currency": "GALACTIC", "market": {"tape": "Q"}}
    for rows in payload["bars"].values():
        for bar in rows:
            bar |= {"x": "ZZ", "cond": ["@", "?"], "session": "lunch"}
    return False


def _without_counts(handler, payload):
    for rows in payload["bars"].values():
        for bar in rows:
            del bar["n"], bar["vw"]
    return False


def _ever_new_token(handler, payload):
    "The first page for ever, each with a token that was never seen."
    payload["next_page_token"] = handler.owner.token("AAAA", f"{len(handler.owner.requests):06d}")
    payload["bars"] = handler.owner.page({k: v for k, v in handler.query.items() if k != "page_token"})[
        "bars"
    ]
    return False


def _ever_later_bars(handler, payload):
    "Pages of bars that nobody asked for, each later than the one before."
    n = len(handler.owner.requests)
    rows = handler.owner.page({k: v for k, v in handler.query.items() if k != "page_token"})["bars"]
    payload |= {
        "bars": {
            s: [bar | {"t": _stamp(pd.Timestamp(bar["t"]) + pd.Timedelta(365 * n, "D"))} for bar in bars]
            for s, bars in rows.items()
        },
        "next_page_token": handler.owner.token("AAAA", f"{n:06d}"),
    }
    return False


def _bars_outside(handler, payload):
    "A bar at `end`, and one before `start`, as coarser reading of dates would bring."
    for rows in payload["bars"].values():
        if "page_token" in handler.query:
            rows.append(
                rows[-1]
                | {"t": _stamp((pd.Timestamp(handler.query["end"]) + pd.Timedelta(1, "us")).ceil("s"))}
            )
        else:
            rows.insert(
                0, rows[0] | {"t": _stamp(pd.Timestamp(handler.query["start"]) - pd.Timedelta(1, "s"))}
            )
    return False


def _empty_pages(handler, payload):
    payload |= {
        "bars": {},
        "next_page_token": handler.owner.token("AAAA", f"{len(handler.owner.requests):06d}"),
    }
    return False


HTTP_FAULTS = {
    "429 once": _rate_limit(True),
    "429 forever": _rate_limit(True),
    "429 without headers": _rate_limit(False),
    "500": _status(500, "internal server error"),
    "502 HTML": _status(
        502,
        body=b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>",
        kind="text/html",
    ),
    "503": _status(503, "service unavailable"),
    "504": _status(504, "request timed out", Retry_After="0"),
    "401": _status(401, "request is not authorized", 40110000),
    "403 SIP": _status(403, "subscription does not permit querying recent SIP data", 42210000),
    "403 funds": _status(403, "insufficient buying power", 40310000),
    "404 position": _status(404, "position does not exist", 40410000),
    "422 duplicate id": _status(422, "client_order_id must be unique", 40010001),
    "refused": None,
    "reset": _reset,
    "silent": _silent,
    "drip": _drip,
    "short body": _short_body,
    "cut JSON": _cut_json,
    "empty 200": _status(200, body=b""),
    "redirect": _redirect,
    "oversize": _oversize,
}
PAYLOAD_FAULTS = {
    "bars null": _bars_null,
    "symbol null": _symbol_null,
    "symbol absent": _symbol_absent,
    "repeated token": _repeated_token,
    "empty token": _empty_token,
    "page N fails": _page_fails,
    "duplicate across pages": _across_pages(),
    "disorder": _disorder,
    "missing field": _edit(3, h=...),
    "unknown enum or field": _unknown_fields,
    "naive time": _edit(3, t=lambda t: t.removesuffix("Z")),
    "NaN literal": _edit(3, l=float("nan")),
}
FAULTS = HTTP_FAULTS | PAYLOAD_FAULTS
MORE = {  # beyond the list
    "drip of headers": _drip_of_headers,
    "gzip bomb": _gzip_bomb,
    "key echo": _key_echo,
    "conflict across pages": _across_pages({"c": 1.0}),
    "other symbol": _other_symbol,
    "no counts": _without_counts,
    "ever new token": _ever_new_token,
    "bars outside": _bars_outside,
    "ever later bars": _ever_later_bars,
    "empty pages": _empty_pages,
    "price null": _edit(3, c=None),
    "price text": _edit(3, c="cheap"),
    "time text": _edit(3, t="yesterday"),
    "leap day": _edit(3, t="2024-02-30T15:15:00Z"),
    "price huge": _edit(3, o=10**400),
    "price flag": _edit(3, v=True),
    "offset time": _edit(3, t=lambda t: t.replace("Z", "+00:00")),
    "400": _status(400, "invalid symbol: ZZZZ"),
    "bars list": lambda handler, payload: payload.update(bars=[]) or False,
    "no token": lambda handler, payload: (payload.pop("next_page_token"), False)[1],
    "number token": lambda handler, payload: payload.update(next_page_token=7) or False,
}


SLOW = {
    f for f in (*HTTP_FAULTS.values(), _drip_of_headers, _gzip_bomb, _key_echo, MORE["400"]) if f
}  # they answer by themselves, and may take their time


class _Server(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 32

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the plan


class AlpacaServer:
    "The server, a context manager. Its threads end with it."

    def __init__(
        self,
        bars: dict,  # (symbol, timeframe) -> DataFrame; symbols as on the wire, such as "BTC/USD"
        splits: dict | None = None,  # symbol -> [(date, ratio)]: 2.0 is two for one
        keys: tuple[str, str] | None = None,  # None: any keys will do, and none
    ):
        self.bars, self.splits, self.keys = dict(bars), splits or {}, keys
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self.retry_after_s, self.drip_s = 1, 0.1
        self._faults, self._lock, self._timer, self.port, self._server = [], threading.RLock(), None, 0, None

    # life

    def __enter__(self):
        self._listen()
        return self

    def __exit__(self, *_):
        self.closing.set()
        if self._timer:
            self._timer.cancel()
            self._timer.join()
        self._hang_up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _listen(self):
        owner = self

        class Handler(_Handler):
            pass

        Handler.owner = owner
        with self._lock:
            self._server = _Server(("127.0.0.1", self.port), Handler)
            self.port = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def _hang_up(self):
        with self._lock:
            server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()

    # faults

    def inject(self, name: str, times: int | None = 1, after: int = 0):
        "Misbehave `times` times (None: always), after so many good answers; `refused`: nobody listens."
        if name == "refused":
            self._hang_up()
            if times is not None:
                self._timer = threading.Timer(0.15 * times, self._listen)
                self._timer.start()
            return
        with self._lock:
            self._faults.append({"fault": (FAULTS | MORE)[name], "left": times, "after": after})

    def heal(self):
        "Behave from now on."
        with self._lock:
            self._faults.clear()
        if self._server is None:
            self._listen()

    def misbehave(self, handler, payload) -> bool:
        "Apply the first fault that applies; True: the request has been answered."
        with self._lock:
            for entry in self._faults:
                if entry["left"] == 0:
                    continue
                if entry["after"] > 0:
                    entry["after"] -= 1
                    return False
                fault = entry["fault"]
                if fault in SLOW:
                    entry["left"] = entry["left"] and entry["left"] - 1
                    break
                done = fault(handler, payload)
                if done is None:
                    continue
                entry["left"] = entry["left"] and entry["left"] - 1
                return done
            else:
                return False
        return fault(handler, payload)  # may take its time: outside the lock

    # bars

    def token(self, symbol: str, when: str) -> str:
        return base64.urlsafe_b64encode(f"{symbol}|{when}".encode()).decode()

    def last_served(self, query) -> tuple[str, str]:
        return tuple(base64.urlsafe_b64decode(query["page_token"]).decode().split("|"))

    def _frame(self, query, symbol) -> pd.DataFrame | None:
        frame = self.bars.get((symbol, query["timeframe"]))
        if frame is None:
            return None
        if "/" not in symbol:
            if query["timeframe"] == "1Day":
                frame = frame.set_axis(
                    frame.index.tz_localize(None)
                    .normalize()
                    .tz_localize("America/New_York")
                    .tz_convert("UTC")
                )
            if query.get("adjustment") in ("split", "all"):
                for date, ratio in self.splits.get(symbol, ()):
                    early = frame.index < pd.Timestamp(date, tz="UTC")
                    frame = frame.assign(
                        **{
                            c: frame[c].where(~early, frame[c] / ratio)
                            for c in ("open", "high", "low", "close")
                        },
                        volume=frame.volume.where(~early, frame.volume * ratio),
                    )
            if query.get("feed") == "iex":
                frame = frame.assign(volume=(frame.volume / 40).round())
        return frame

    def _rows(self, frame: pd.DataFrame) -> list[dict]:
        columns = {k: frame[c].tolist() for k, c in FIELDS.items()}
        return [
            {"t": t, **dict(zip(FIELDS, values)), "n": 1 + i % 100, "vw": values[3]}
            for i, (t, values) in enumerate(zip(map(_stamp, frame.index), zip(*columns.values())))
        ]

    def bar(self, query, symbol: str, when: str) -> dict:
        return self._rows(self._frame(query, symbol).loc[[pd.Timestamp(when)]])[0]

    def page(self, query) -> dict:
        "One page, as Alpaca would answer."
        limit = int(query.get("limit", 1000))
        if not 1 <= limit <= 10_000:
            raise _Bad(400, "invalid limit")
        if not query.get("symbols") or not query.get("timeframe"):
            raise _Bad(400, "symbols and timeframe are required")
        start, end = (
            pd.Timestamp(query.get(k, default))
            for k, default in (("start", "2016-01-01T00:00:00Z"), ("end", "2100-01-01T00:00:00Z"))
        )
        start, end = (t.tz_localize("UTC") if t.tz is None else t for t in (start, end))
        descending = query.get("sort") == "desc"
        reached, bars, last = self.last_served(query) if "page_token" in query else None, {}, None
        for symbol in sorted(set(query["symbols"].split(","))):
            if reached and symbol < reached[0]:
                continue
            frame = self._frame(query, symbol)
            if frame is None:
                continue
            frame = frame[(frame.index >= start) & (frame.index <= end)]
            if descending:
                frame = frame.iloc[::-1]
            if reached and symbol == reached[0]:
                frame = (
                    frame[frame.index < pd.Timestamp(reached[1])]
                    if descending
                    else frame[frame.index > pd.Timestamp(reached[1])]
                )
            if not len(frame):
                continue
            if limit == 0:
                return {"bars": bars, "next_page_token": self.token(*last)}
            bars[symbol] = self._rows(frame.iloc[:limit])
            last = symbol, bars[symbol][-1]["t"]
            if len(frame) > limit:
                return {"bars": bars, "next_page_token": self.token(*last)}
            limit -= len(frame)
        return {"bars": bars, "next_page_token": None}


class _Handler(BaseHTTPRequestHandler):
    protocol_version, timeout, disable_nagle_algorithm, owner = "HTTP/1.1", LONGEST_S, True, None

    def log_message(self, *_):
        pass

    def head(self, status: int, headers: dict):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def answer(
        self, status: int, content: bytes, kind: str = "application/json", headers: dict | None = None
    ):
        if len(content) > 256 and "gzip" in self.headers.get("Accept-Encoding", ""):
            content, headers = gzip.compress(content, 1), (headers or {}) | {"Content-Encoding": "gzip"}
        self.answer_as_is(status, content, {"Content-Type": kind} | (headers or {}))

    def answer_as_is(self, status: int, content: bytes, headers: dict):
        self.head(status, {"Content-Type": "application/json", "Content-Length": str(len(content))} | headers)
        self.wfile.write(content)

    def do_GET(self):
        parts, owner = urlsplit(self.path), self.owner
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        with owner._lock:
            owner.requests.append(Request(parts.path, self.query, dict(self.headers), time.monotonic()))
        sent = self.headers.get("APCA-API-KEY-ID"), self.headers.get("APCA-API-SECRET-KEY")
        try:
            if parts.path not in PATHS:
                raise _Bad(404, "endpoint not found")
            if owner.keys and sent != owner.keys and (PATHS[parts.path] == "equity" or any(sent)):
                raise _Bad(403, "forbidden.")
            payload = owner.page(self.query)
            if not owner.misbehave(self, payload):
                self.answer(200, json.dumps(payload).encode())
        except _Bad as e:
            self.answer(e.args[0], json.dumps({"message": e.args[1]}).encode())
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
