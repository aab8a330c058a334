"""Real signals to real processes:
the first one asks, the second one insists, and the handlers of before come back."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import pytest

from trading_lib.config import InputError
from trading_lib.pipeline import stopping
from trading_lib.pipeline.stopping import StopRequest

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
DEFAULTS = [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL]
LINE = "{}: the iteration is being finished; a second one quits at once"


@pytest.fixture(autouse=True)
def handlers():
    "Those of a terminal at the start; the same ones at the end of each test."
    kept = [signal.signal(number, default) for number, default in zip(SIGNALS, DEFAULTS)]
    yield
    found = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in zip(SIGNALS, kept):
        signal.signal(number, handler)
    assert found == DEFAULTS


def send(number):
    signal.raise_signal(
        number
    )  # to this very thread: os.kill may choose another one, and then it takes a moment


# --- in this process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_raises_the_flag_and_says_one_line(number):
    said = []
    with StopRequest(said.append) as stop:
        assert stop.requested is False and stop.signal is None
        send(number)
        assert stop.requested is True and stop.signal is number
    assert said == [LINE.format(number.name)] and stop.requested and stop.signal is number


def test_without_a_signal_nothing_is_said():
    said = []
    with StopRequest(said.append) as stop:
        pass
    assert said == [] and not stop.requested


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_quits_at_once_each_in_its_way(first, second, monkeypatch):
    monkeypatch.setattr(stopping, "_TOGETHER", 0.0)
    said, reached = [], []
    with pytest.raises(KeyboardInterrupt if second is signal.SIGINT else SystemExit) as e:
        with StopRequest(said.append):
            send(first)
            reached.append("between")
            try:
                send(second)
            finally:
                reached += [
                    signal.getsignal(number) for number in SIGNALS
                ]  # a third one would meet the default
            reached.append("after")
    assert reached == ["between", *DEFAULTS] and len(said) == 1
    if second is not signal.SIGINT:
        assert e.value.code == 128 + second


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_handlers_come_back_after_an_exception(error):
    def mine(number, frame):
        pass

    for number in SIGNALS:
        signal.signal(number, mine)
    with pytest.raises(error):
        with StopRequest(lambda line: None):
            assert all(signal.getsignal(number) is not mine for number in SIGNALS)
            raise error
    assert all(signal.getsignal(number) is mine for number in SIGNALS)
    for number, handler in zip(SIGNALS, DEFAULTS):
        signal.signal(number, handler)


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest(lambda line: None) as stop:
        send(signal.SIGINT)
        assert not stop.requested and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        send(signal.SIGTERM)
        assert stop.signal is signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_in_another_thread_it_does_nothing_but_works():
    results = queue.Queue()

    def work():
        with StopRequest(results.put) as stop:
            results.put((stop.requested, stop.signal))
        results.put("end")

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert results.get_nowait() == (False, None) and results.get_nowait() == "end" and results.empty()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_stop_of_the_inner_one_is_a_stop_of_the_outer_ones():
    said = []
    with (
        StopRequest(lambda line: said.append("outermost")) as outermost,
        StopRequest(lambda line: said.append("outer")) as outer,
    ):
        with StopRequest(lambda line: said.append("inner")) as first:
            assert not first.requested
        with StopRequest(lambda line: said.append("inner")) as inner:
            send(signal.SIGTERM)
            assert inner.requested
        assert (
            outer.requested
            and outermost.requested
            and outer.signal is outermost.signal is signal.SIGTERM
            and not first.requested
        )
        with StopRequest(lambda line: said.append("late")) as late:
            assert late.requested and late.signal is signal.SIGTERM  # asked for before it began
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)  # the second one, whoever takes it
    assert said == ["inner"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_sent_twice_at_once_is_one_but_for_a_persons(number):
    "As `timeout` and a terminal that closes send theirs: to the process, and to its group."
    with (
        pytest.raises(KeyboardInterrupt) if number is signal.SIGINT else contextlib.nullcontext(),
        StopRequest(lambda line: None) as stop,
    ):
        for _ in range(3):
            send(number)
    assert (
        stop.requested
        and stop.status == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}[number]
    )


def test_the_second_signal_leaves_all_nested_ones(monkeypatch):
    monkeypatch.setattr(stopping, "_TOGETHER", 0.0)
    with pytest.raises(SystemExit) as e:
        with StopRequest(lambda line: None), StopRequest(lambda line: None):
            send(signal.SIGINT)
            send(signal.SIGTERM)
    assert e.value.code == 143


def test_one_after_the_other_begins_anew():
    said = []
    stop = StopRequest(said.append)
    with stop:
        send(signal.SIGINT)
    assert stop.requested
    with stop:
        assert not stop.requested and stop.signal is None
        send(signal.SIGTERM)
    assert len(said) == 2 and stop.signal is signal.SIGTERM


def test_the_same_one_cannot_be_entered_twice():
    stop = StopRequest(lambda line: None)
    with stop:
        with pytest.raises(InputError, match="in use already"):
            stop.__enter__()
        send(signal.SIGINT)
        assert stop.requested


def test_no_thread_and_no_open_file_is_left():
    def open_files():
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    with StopRequest(lambda line: None):
        pass
    threads, files = threading.active_count(), open_files()
    for signalled in (False, True) * 20:
        with StopRequest(lambda line: None):
            if signalled:
                send(signal.SIGINT)
    assert (threading.active_count(), open_files()) == (threads, files)


# --- in a process of its own --------------------------------------------------------------------------------


def run(code: str, then=lambda process: None) -> tuple[int, str, str]:
    "Exit status and what was printed; `then` is called once the process has said ready."
    head = (
        "import os, signal, sys, threading, time\n"
        "from trading_lib.pipeline.stopping import StopRequest\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    )
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", head + textwrap.dedent(code)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        limit = threading.Timer(30, process.kill)
        limit.start()
        try:
            assert process.stdout.readline() == "ready\n"
            then(process)
            out = (
                process.stdout.read()
            )  # not `communicate`, which knows nothing of what `readline` has read ahead
            process.wait()
        finally:
            process.kill()
            limit.cancel()
        errors.seek(0)
        error = errors.read()
    return process.returncode, out, error


LOOP = """
with StopRequest() as stop:
    print("ready")
    for i in range(2000):
        for _ in range(10): time.sleep(0.001)
        if stop.requested: break
print("saved after", "all" if i == 1999 else "a part")
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_loop_ends_in_good_order(number):
    status, out, error = run(LOOP, lambda p: p.send_signal(number))
    assert (status, error) == (0, "") and out == f"{LINE.format(number.name)}\nsaved after a part\n"


STUBBORN = """
with StopRequest() as stop:
    print("ready")
    while not stop.requested: time.sleep(0.001)
    while True: time.sleep(0.001)  # an iteration that takes for ever
"""


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_two_signals_end_a_loop_that_does_not_look(number, status):
    def twice(process):
        process.send_signal(number)
        assert process.stdout.readline() == LINE.format(number.name) + "\n"
        time.sleep(1.1)
        process.send_signal(number)

    found, out, error = run(STUBBORN, twice)
    assert found == status and out == "" and ("KeyboardInterrupt" in error) == (number is signal.SIGINT)


def test_without_a_request_the_same_signal_ends_the_loop():
    "Shows that the tests above can fail."
    assert (
        run(
            "print('ready')\nfor _ in range(20_000): time.sleep(0.001)",
            lambda p: p.send_signal(signal.SIGTERM),
        )[0]
        == -signal.SIGTERM
    )


def test_the_line_waits_for_a_lock_that_the_interrupted_code_holds():
    "A handler that said it itself would wait for its own thread, for ever."
    status, out, _ = run("""
    lock = threading.Lock()
    def say(line):
        with lock: print(line)
    print("ready")
    with StopRequest(say) as stop:
        with lock:
            signal.raise_signal(signal.SIGINT)
            print("still here", stop.requested)
    """)
    assert status == 0 and out == f"still here True\n{LINE.format('SIGINT')}\n"


def test_signals_in_the_middle_of_a_flood_of_prints():
    "`print` is not reentrant: a handler that prints into the middle of another print fails."
    status, out, error = run("""
    sys.stdout = open(1, "w", buffering=65536, closefd=False)
    print("ready", flush=True)
    for i in range(200):
        with StopRequest() as stop:
            threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            while not stop.requested: print("x" * 5000)
    print("end", flush=True)
    """)
    assert (status, error) == (0, "") and out.count(LINE.format("SIGTERM")) == 200 and out.endswith("end\n")


def test_a_line_that_cannot_be_said_does_not_stop_the_loop_from_ending():
    "Nobody reads the output any more."
    status, _, _ = run("""
    def say(line): raise BrokenPipeError
    print("ready")
    with StopRequest(say) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
    """)
    assert status == 0


# --- in a Jupyter kernel ------------------------------------------------------------------------------------


@pytest.fixture
def short_folder():
    "The path of a socket has room for some hundred characters."
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def test_in_a_jupyter_kernel(short_folder, monkeypatch):
    """The stop button sends SIGINT to the kernel:
    the cell's loop ends in good order, and the next cell is interrupted as ever."""
    manager = pytest.importorskip("jupyter_client.manager")
    pytest.importorskip("ipykernel")
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, short_folder)
    kernels = manager.KernelManager(kernel_name="python3", transport="ipc", ip=f"{short_folder}/kernel")
    kernels.start_kernel(cwd=short_folder)
    client = kernels.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)

        def cell(code: str, interrupt: bool = False) -> tuple[dict, str]:
            "Reply and printed text of a cell; interrupted after it has said ready."
            printed, told, asked = "", False, client.execute(textwrap.dedent(code))
            while True:
                message = client.get_iopub_msg(timeout=30)
                if message["parent_header"].get("msg_id") != asked:
                    continue
                if message["msg_type"] == "stream":
                    printed += message["content"]["text"]
                if interrupt and not told and "ready" in printed:
                    kernels.interrupt_kernel()
                    told = True
                if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                    break
            while True:
                reply = client.get_shell_msg(timeout=30)
                if reply["parent_header"].get("msg_id") == asked:
                    return reply["content"], printed

        reply, _ = cell(
            "import signal, time\n"
            "from trading_lib.pipeline.stopping import StopRequest\n"
            "before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)"
        )
        assert reply["status"] == "ok"
        reply, printed = cell(
            """
        with StopRequest() as stop:
            print("ready", flush=True)
            for i in range(20_000):
                time.sleep(0.001)
                if stop.requested: break
        time.sleep(0.2)
        print("saved", stop.signal.name, i < 19_999, flush=True)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        """,
            interrupt=True,
        )
        assert reply["status"] == "ok" and "saved SIGINT True" in printed and LINE.format("SIGINT") in printed
        reply, _ = cell(
            "print('ready', flush=True)\nfor i in range(20_000): time.sleep(0.001)", interrupt=True
        )
        assert reply["status"] == "error" and reply["ename"] == "KeyboardInterrupt"
        assert cell("print(1 + 1)")[1] == "2\n"
    finally:
        client.stop_channels()
        kernels.shutdown_kernel(now=True)
