"""Does it learn when there is something to learn, and earn nothing when there is not?

On real data nobody knows what an agent should have earned. On a simulated market everybody does, and three
questions have an answer that can be checked:

1. Planted edge. The market carries a drift that an oracle knows. Does a small network find some of it, after
   costs, on bars it has never seen? Twenty networks on twenty histories: the share of the oracle's profit,
   with its interval.
2. Martingale. The market carries nothing. Twenty networks, fifty fresh paths each: the pooled profit before
   costs must have an interval that contains 0, what is left after costs must be that profit less the costs,
   and no model may pass every gate.
3. Planted leak. The martingale again, but one column tells the next bar. If the second proof still passed, it
   would prove nothing; and the lookahead check must name the column.

`trading-lib prove` runs this file. The markets and networks are in known_truth_models.py, what must hold and
the lines and the picture are in known_truth_report.py.

Each result is a file: `edge-00.json`, `martingale-00.json`, `leak-00.json`. It holds figures, seed, settings
and an identity: the hash of the settings of this kind, of the libraries, and of all code that takes part. A
file with another identity is computed again. Files are written in one step each by the process that computed
them: after a kill, in whatever moment, what is there is whole, and the next call goes on. The same seed gives
the same bytes, the two times at the end aside.
"""

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch
from known_truth_models import (
    KINDS,
    PATHS_APART,
    SEEDS_APART,
    ProofSettings,
    prove_edge,
    prove_leak,
    prove_martingale,
)
from known_truth_report import line_of, plot_proofs, summarise_proofs, summary_lines

import trading_lib
from trading_lib.checkpoint import library_versions
from trading_lib.config import InputError
from trading_lib.evaluation.code_identity import package_closure, package_imports
from trading_lib.files import atomic_write
from trading_lib.reporting.figures import figure_bytes

LEAK_MODELS = 3  # that are shown the future; fewer where there are fewer seeds


# --- the code that takes part -------------------------------------------------------------------------------

_OWN = ("known_truth", "known_truth_models", "known_truth_report")


def sources() -> dict[str, bytes]:  # name -> source
    """These files and all of the package that they lead to, found by following imports: a change to the
    command line does not throw results away, and a change to the account does."""
    package = Path(trading_lib.__file__).parent
    own = {name: Path(__file__).with_name(f"{name}.py").read_bytes() for name in _OWN}
    first = set()
    for name, source in own.items():
        first |= package_imports(source.decode(), name, package)
    return package_closure(*first, folder=package) | {f"benchmarks.{name}": own[name] for name in own}


def code_hash() -> str:  # 64 hexadecimal digits
    """Of all code that takes part in the proofs. It takes bytes, and so is stricter than `code_identity`: a
    proof should speak of exactly the code that ran."""
    digest = hashlib.sha256()
    for name, source in sorted(sources().items()):
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


# --- one result, one file -----------------------------------------------------------------------------------

_FIELDS_OF = {
    "edge": ("network", "edge"),
    "martingale": ("network", "martingale"),
    "leak": ("network", "martingale", "leak"),
}
_LIBRARIES = ("python", "torch", "numpy", "pandas", "TA-Lib")


def described(
    kind: str,  # of KINDS
    seed: int,
    paths: int,  # fresh histories; they do not matter to the planted edge
    settings: ProofSettings,
    code: str,  # from `code_hash`
) -> dict:
    "What a result file says of itself, before its figures."
    versions = library_versions()
    own = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(settings).items()
        if name.partition("_")[0] in _FIELDS_OF[kind]
    }
    if kind != "edge":
        own["paths"] = paths
    head = {
        "kind": kind,
        "seed": seed,
        "settings": own,
        "libraries": {name: versions[name] for name in _LIBRARIES},
        "code": code,
    }
    return head | {"identity": hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()}


def finished(
    path: Path,  # of a result, which may be torn or of other settings
    head: dict,  # from `described`
) -> dict | None:
    "The result in a file, if it is the one that is asked for."
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict) or "figures" not in result:
        return None
    return result if result.get("identity") == head["identity"] else None


def _figures(kind: str, seed: int, paths: int, settings: ProofSettings) -> dict:
    if kind == "edge":
        return prove_edge(seed, settings)
    if kind == "leak":
        return prove_leak(seed, paths, settings)
    return prove_martingale(seed, paths, settings)


def _do(path: Path, head: dict, paths: int, settings: ProofSettings) -> dict:
    "Compute one result and write it."
    threads, wall, processor = torch.get_num_threads(), time.perf_counter(), time.process_time()
    torch.set_num_threads(1)  # the order of a sum must not depend on the machine
    try:
        figures = _figures(head["kind"], head["seed"], paths, settings)
    finally:
        torch.set_num_threads(threads)
    result = head | {
        "figures": figures,
        "processor_seconds": round(time.process_time() - processor, 2),
        "seconds": round(time.perf_counter() - wall, 2),
    }
    atomic_write(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


# --- several processes --------------------------------------------------------------------------------------
# They share the work, each on one core. They are started afresh rather than forked, which is safe beside
# torch on every system, and end with the process that started them, however that ends.

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def _end_with_parent():
    "A worker does not outlive the process it works for."

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _results(jobs: list[tuple], workers: int) -> Iterator[dict]:  # as they are done
    "Do jobs, here or in several processes."
    if workers == 1:
        for job in jobs:
            yield _do(*job)
        return
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update({name: "1" for name in _THREADS})
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        for future in as_completed([pool.submit(_do, *job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# --- all of it ----------------------------------------------------------------------------------------------


def _check_asked(seeds, paths, workers):
    "Whole numbers that make sense, or an `InputError`."
    if not (isinstance(seeds, int) and 2 <= seeds <= SEEDS_APART):
        raise InputError(
            f"prove: expected 2 to {SEEDS_APART:,} seeds, was {seeds!r}; an interval needs several"
        )
    if not (isinstance(paths, int) and 2 <= paths <= PATHS_APART):
        raise InputError(f"prove: expected 2 to {PATHS_APART:,} paths, was {paths!r}")
    if workers is not None and not (isinstance(workers, int) and workers >= 1):
        raise InputError(f"prove: expected 1 or more workers, was {workers!r}")


def _quiet(line: str):
    "Show nothing."


def _asked(
    folder: Path, seeds: int, paths: int, settings: ProofSettings, code: str
) -> tuple[list[dict], list[tuple]]:
    "Results that are there already, and the jobs that are missing."
    results, jobs = [], []
    models = {"edge": seeds, "martingale": seeds, "leak": min(seeds, LEAK_MODELS)}
    for kind in KINDS:
        for seed in range(models[kind]):
            path, head = folder / f"{kind}-{seed:02d}.json", described(kind, seed, paths, settings, code)
            if result := finished(path, head):
                results.append(result)
            else:
                jobs.append((path, head, paths, settings))
    return results, jobs


def prove(
    folder: str | Path,  # for the results; those already there are kept
    seeds: int = 20,  # of the planted edge, and as many models of the martingale
    paths: int = 50,  # fresh histories for each model of the martingale
    progress: Callable[[str], None] | None = print,  # called with one line after the other; None: silent
    workers: int | None = None,  # processes; None: one for each core
    settings: ProofSettings | None = None,  # None: the defaults
) -> dict:  # passed, failed (sentences), edge, martingale, leak, bands, …: also in summary.json
    "Run all proofs, or what is missing of them, and say whether they hold."
    _check_asked(seeds, paths, workers)
    folder, settings, progress = Path(folder), settings or ProofSettings(), progress or _quiet
    began, code = time.perf_counter(), code_hash()
    results, jobs = _asked(folder, seeds, paths, settings, code)
    if results:
        progress(f"{len(results)} of {len(results) + len(jobs)} results are there already")
    for result in _results(jobs, min(workers or os.cpu_count() or 1, max(1, len(jobs)))):
        results.append(result)
        progress(line_of(result))
    times = [r["processor_seconds"] for r in results]
    summary = summarise_proofs(results) | {
        "seeds": seeds,
        "paths": paths,
        "code": code,
        "processor_seconds": round(sum(times), 2),
        "slowest_seed_seconds": max(times),
        "seconds": round(time.perf_counter() - began, 2),
    }
    atomic_write(folder / "proofs.png", figure_bytes(plot_proofs(results, summary)))
    atomic_write(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    for line in summary_lines(summary):
        progress(line)
    progress(
        f"{summary['processor_seconds']:,.0f} s of one core in all, {max(times):.1f} s for the slowest seed; "
        f"{folder / 'summary.json'}, {folder / 'proofs.png'}"
    )
    return summary
