"""Hidden layers and the loss compiled for this CPU, beside plain ones in float64.

And how the library comes to be.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_trainers import trading_trainer
from test_layers import difference

from trading_lib.config import InputError
from trading_lib.kernels import cpp_library
from trading_lib.kernels import cpu as cpu_kernels
from trading_lib.kernels import layers as fused
from trading_lib.kernels.layers import hidden_layers, layers_and_heads
from trading_lib.training import ppo

if torch.backends.cpu.get_cpu_capability() != "AVX512":
    pytest.skip("this CPU has no AVX-512", allow_module_level=True)
needs_them = pytest.mark.skipif(
    not cpu_kernels.available(), reason=f"no compiled layers here: {cpu_kernels.missing()}"
)
# one column, panels and tiles that are full and that are not, weights that stay in the cache and weights that
# do not
WIDTHS = [
    (1, 1),
    (33, 64),
    (355, 64, 17),
    (20, 40, 1, 7),
    (14, 32, 32),
    (100, 128, 96, 65),
    (64, 700, 500, 33),
]
ROWS = [256, 257, 269, 509, 1021]


def made(rows, widths, seed=0):
    "Inputs, weights, biases and a gradient."
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    return (
        draw(rows, widths[0]),
        [draw(b, a) / a**0.5 for a, b in zip(widths, widths[1:])],
        [draw(b) / 3 for b in widths[1:]],
        draw(rows, widths[-1]),
    )


def plain(x, weights, biases, gradient):
    "Output and gradients by PyTorch."
    weights, biases = ([v.clone().requires_grad_() for v in values] for values in (weights, biases))
    for weight, bias in zip(weights, biases):
        x = F.relu(F.linear(x, weight, bias))
    return x.detach(), torch.autograd.grad(x, [*weights, *biases], gradient)


def compiled(x, weights, biases, gradient):
    outputs = cpu_kernels.forward(x, weights, biases, keep=True)
    of_weights, of_biases = cpu_kernels.backward(x, weights, outputs, gradient)
    return outputs[-1], [*of_weights, *of_biases]


@needs_them
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_they_are_the_plain_layers(rows, widths):
    """Against the same numbers in float64.

    Gradients are sums over the rows that may nearly vanish, so their errors are measured by what went in too;
    a rounding may let another unit through, as it may in plain layers.
    """
    given = made(rows, widths)
    out, found = compiled(*given)
    exact, expected = plain(
        *([v.double() for v in value] if isinstance(value, list) else value.double() for value in given)
    )
    _, rounded = plain(*given)
    assert difference(out, exact) < 1e-6 and bool((out == 0).any()) and bool((out > 0).any())
    for a, b, c in zip(found, expected, rounded, strict=True):
        error, of_plain = (float((v - b).norm() / (b.norm() + given[-1].norm())) for v in (a, c))
        assert a.shape == b.shape and bool(b.any())
        assert error <= max(1e-6, 3 * of_plain)


@needs_them
@pytest.mark.parametrize("rows", [300, 1021, 5041])
@pytest.mark.parametrize("threads", [2, 5])
def test_the_same_numbers_give_the_same_bits(threads, rows):
    "Again and again, whether outputs are kept or not, and with any number of threads."
    before, given = torch.get_num_threads(), made(rows, (355, 64, 17))
    try:
        torch.set_num_threads(threads)
        (out, first), *others = [compiled(*given) for _ in range(5)]
        assert all(torch.equal(out, again) and all(map(torch.equal, first, found)) for again, found in others)
        assert torch.equal(cpu_kernels.forward(*given[:3], keep=False)[-1], out)
        torch.set_num_threads(1)
        alone, found = compiled(*given)
        assert torch.equal(alone, out) and all(map(torch.equal, first, found))
    finally:
        torch.set_num_threads(before)


@needs_them
@pytest.mark.parametrize("place", ["input", "weight", "bias", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(place, value):
    "Wherever plain layers say so, these do."
    x, weights, biases, gradient = made(300, (20, 40, 33))
    passes = int(
        plain(x, weights, biases, gradient)[0].flatten().nonzero()[0]
    )  # a gradient that no ReLU stops
    {"input": x, "weight": weights[0], "bias": biases[0], "gradient": gradient}[place].view(-1)[
        passes if place == "gradient" else 7
    ] = value
    (out, found), (expected, of) = (how(x, weights, biases, gradient) for how in (compiled, plain))
    for a, b in zip((out, *found), (expected, *of)):
        assert torch.equal(a.isfinite(), b.isfinite()) and torch.equal(a.isnan(), b.isnan())
    assert not all(bool(v.isfinite().all()) for v in (expected, *of))


@needs_them
@pytest.mark.parametrize("rows", [300, 5041])
@pytest.mark.parametrize(
    "widths, heads", [((20, 40, 33), (8, 1)), ((355, 64, 32), (1,)), ((5, 7), (40,))], ids=str
)
def test_linear_heads_are_part_of_it(rows, widths, heads):
    "Against float64; their gradients are not cut."
    x, weights, biases, _ = made(rows, widths)
    _, head_weights, head_biases, gradient = made(rows, (widths[-1], sum(heads)), seed=1)
    given = [
        v.clone().requires_grad_()
        for v in (*weights, *head_weights[0].split(heads), *biases, *head_biases[0].split(heads))
    ]
    pairs = list(zip(given[: len(given) // 2], given[len(given) // 2 :]))
    layers, of_heads = pairs[: len(weights)], pairs[len(weights) :]
    answers = layers_and_heads(x, layers, of_heads)
    assert [a.shape for a in answers] == [(rows, n) for n in heads] and bool(
        (torch.cat(answers, 1) < 0).any()
    )
    found = torch.autograd.grad(torch.cat(answers, 1), given, gradient)
    exact, out = [v.detach().double().requires_grad_() for v in given], x.double()
    pairs = list(zip(exact[: len(exact) // 2], exact[len(exact) // 2 :]))
    for weight, bias in pairs[: len(weights)]:
        out = F.relu(F.linear(out, weight, bias))
    expected = torch.cat([F.linear(out, *head) for head in pairs[len(weights) :]], 1)
    assert difference(torch.cat(answers, 1), expected) < 1e-6
    for a, b in zip(found, torch.autograd.grad(expected, exact, gradient.double()), strict=True):
        assert bool(b.any()) and difference(a, b) < 1e-5
    with torch.no_grad():
        assert torch.equal(torch.cat(layers_and_heads(x, layers, of_heads), 1), torch.cat(answers, 1))


@needs_them
def test_what_is_cut_off_gets_no_gradient():
    "Not at exactly zero either, as in PyTorch."
    x, weights, biases, gradient = made(256, (20, 40, 33))
    biases[1][:] = -100.0
    out, found = compiled(x, weights, biases, gradient)
    assert not out.any() and not any(v.any() for v in found)
    weights[1][:], biases[1][:] = 0.0, 0.0
    out, found = compiled(x, weights, biases, gradient)
    assert not out.any() and not any(v.any() for v in found)


@needs_them
def test_hidden_layers_take_them_for_many_rows_and_small_networks_in_float32(monkeypatch):
    calls, original = [], cpu_kernels.forward
    monkeypatch.setattr(
        cpu_kernels, "forward", lambda *given, **more: (calls.append(given[3]), original(*given, **more))[1]
    )
    x, weights, biases, gradient = made(300, (20, 40, 33))
    parameters = [v.clone().requires_grad_() for pair in zip(weights, biases) for v in pair]
    layers = [*zip(parameters[::2], parameters[1::2])]
    out = hidden_layers(x.t().contiguous().t(), layers)  # as it may come
    found = torch.autograd.grad(out, parameters, gradient.t().contiguous().t())
    expected, of = plain(x, weights, biases, gradient)
    assert (
        calls == [True]
        and difference(out, expected) < 1e-6
        and max(map(difference, found, [of[0], of[2], of[1], of[3]])) < 1e-5
    )
    with torch.no_grad():
        assert torch.equal(hidden_layers(x, layers), out) and calls == [True, False]
    hidden_layers(x[:256], layers)
    hidden_layers(x.double(), [(weight.double(), bias.double()) for weight, bias in layers])
    hidden_layers(x.clone().requires_grad_(), layers)
    hidden_layers(x, [(torch.ones(1000, 20), torch.ones(1000)), (torch.ones(600, 1000), torch.ones(600))])
    with torch.autocast("cpu", torch.bfloat16):
        hidden_layers(x, layers)
    assert calls == [True, False]
    (first,) = torch.autograd.grad(hidden_layers(x, layers).square().sum(), parameters[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@needs_them
@pytest.mark.parametrize(
    "shapes, named",
    [
        (((300, 5), (2, 4), (2,)), "weight 0"),
        (((300, 4), (2, 4), (1,)), "bias 0"),
        (((13, 4), (2, 4), (2,)), "14 rows"),
        (((300, 0), (2, 0), (2,)), "inputs"),
        (((300,), (2, 4), (2,)), "14 rows"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, named):
    "Instead of being read or written beyond its end."
    x, weight, bias = (torch.ones(shape) for shape in shapes)
    with pytest.raises(InputError, match=named):
        cpu_kernels.forward(x, [weight], [bias], keep=False)


@needs_them
@pytest.mark.parametrize(
    "change",
    [
        dict(gradient=torch.ones(300, 3)),
        dict(outputs=[torch.ones(299, 2)]),
        dict(x=torch.ones(300, 4, dtype=torch.float64)),
        dict(gradient=torch.ones(2, 300).t()),
    ],
)
def test_nor_does_the_way_back_take_what_does_not_fit(change):
    given = dict(
        x=torch.ones(300, 4),
        weights=[torch.ones(2, 4)],
        outputs=[torch.ones(300, 2)],
        gradient=torch.ones(300, 2),
    )
    cpu_kernels.backward(**given)
    with pytest.raises(InputError, match="expected contiguous float32 numbers of shape"):
        cpu_kernels.backward(**given | change)


# --- the library ---

TELLS = """
import torch
from trading_lib.kernels import cpu as cpu_kernels
from trading_lib.kernels.layers import hidden_layers, why_slower
out = hidden_layers(torch.ones(300, 4), [(torch.ones(2, 4), torch.zeros(2))])
slower = why_slower(torch.device("cpu"), torch.float32, 300, 8)
print(cpu_kernels.available(), cpu_kernels.missing(), slower, float(out.sum()), sep="|")
"""


def tells(folder, **environment) -> list[str]:
    "Available, why not, what a training would say, and a sum of outputs, in a process of its own."
    return started(folder, **environment).communicate()[0].strip().split("|")


def started(folder, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", TELLS],
        env=os.environ | {"XDG_CACHE_HOME": str(folder)} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_this_machine_has_them_where_it_has_a_compiler():
    "A source that does not compile would otherwise skip the tests that it should fail."
    assert cpu_kernels.available() or not any(map(shutil.which, cpp_library._COMPILERS))


@pytest.mark.slow
@needs_them
def test_it_is_compiled_once_and_lies_in_the_cache_whole(tmp_path):
    "By a compiler that counts its calls; two processes at once both find it."
    counts, compiler = tmp_path / "counts", tmp_path / "counting"
    compiler.write_text(f'#!/bin/sh\necho called >> {counts}\nexec {cpp_library._compiler()[0]} "$@"\n')
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    both = [started(cache, CXX=str(compiler)) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["True|None|None|2400.0"] * 2
    assert 1 <= len(counts.read_text().split()) <= 2
    counts.unlink()
    assert tells(cache, CXX=str(compiler)) == ["True", "None", "None", "2400.0"] and not counts.exists()
    (folder,) = cache.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and [path.suffix for path in folder.iterdir()] == [
        ".so"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler, why", [("/nonexistent", "no C++ compiler was found"), ("false", "ended with status 1")]
)
def test_without_a_compiler_that_works_the_layers_are_torchs(tmp_path, compiler, why):
    available, missing, slower, total = tells(tmp_path, CXX=compiler)
    assert available == "False" and why in missing and missing in slower and float(total) == 2400.0


@pytest.mark.slow
def test_another_cpu_has_none_and_says_nothing(tmp_path):
    assert tells(tmp_path, ATEN_CPU_CAPABILITY="avx2") == ["False", "None", "None", "2400.0"] and not any(
        tmp_path.iterdir()
    )


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("")
    available, missing, slower, total = tells(tmp_path / "file")
    assert available == "False" and "NotADirectoryError" in missing and float(total) == 2400.0


@pytest.mark.slow
def test_a_cache_that_others_can_write_is_not_trusted(tmp_path):
    "Or somebody else's code would run in its place."
    folder = tmp_path / "trading_lib"
    folder.mkdir()
    folder.chmod(0o777)
    available, missing, slower, total = tells(tmp_path)
    assert (
        available == "False"
        and "not this user's alone" in missing
        and str(folder) in missing
        and float(total) == 2400.0
        and not any(folder.iterdir())
    )


@pytest.mark.slow
@needs_them
def test_a_damaged_library_is_made_anew(tmp_path):
    assert tells(tmp_path)[0] == "True"
    (path,) = (tmp_path / "trading_lib").iterdir()
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    assert tells(tmp_path) == ["True", "None", "None", "2400.0"] and path.stat().st_size == whole


@pytest.mark.slow
@needs_them
def test_a_compiler_may_be_a_command_with_arguments(tmp_path):
    assert tells(tmp_path, CXX=f"{cpp_library._compiler()[0]} -g0")[0] == "True"


# --- compilers and caches that are not what they seem ---


def tried(monkeypatch, cache: Path, compiler: str | None = None) -> str | None:
    "What is said of a cache and a compiler; None: the library is there."
    if compiler is not None:
        monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    library, missing = cpp_library.library.__wrapped__()
    assert (library is None) != (missing is None) and (missing is None or missing.isprintable())
    return missing


def program(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def instead(code: str) -> str:
    "A compiler that makes a library of this C instead of what it is given."
    make = f"""echo '{code}' | ${{REAL:-c++}} -shared -fPIC -x c -o "$2" -"""
    return f"""while [ $# -gt 0 ]; do [ "$1" = -o ] && {make}; shift; done\n"""


NOTHING = "int forward(void){return 0;} int backward(void){return 0;} int ppo_loss(void){return 0;}"
COMPILERS = {
    "garbage": (
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo garbage > "$2"; shift; done\n',
        "not what PyTorch computes",
    ),
    "an empty library": (instead("int x;"), "not what PyTorch computes.*forward"),
    "wrong code": (instead(NOTHING), "forward is wrong"),
    "code that ends the process": (
        instead(NOTHING.replace("return 0", "*(volatile int*)0 = 1; return 0", 1)),
        "not what PyTorch computes.*status -11",
    ),
    "nothing at all": ("exit 0\n", "made no library"),
    "a failure": ("echo 'no such \033[31moption' >&2; exit 3\n", "status 3: no such"),
}


@pytest.mark.slow
@needs_them
@pytest.mark.parametrize("name", COMPILERS)
def test_what_a_compiler_makes_is_compared_before_it_is_kept(name, tmp_path, monkeypatch):
    text, words = COMPILERS[name]
    assert re.search(words, tried(monkeypatch, tmp_path / "cache", program(tmp_path / "cc", text)))
    assert not any((tmp_path / "cache" / "trading_lib").iterdir())


@pytest.mark.slow
@needs_them
def test_a_compiler_that_is_repaired_or_replaced_compiles_anew(tmp_path, monkeypatch):
    "And what it made lies under a name of its own: for each compiler file, and for each kind of CPU."
    compiler = program(tmp_path / "cc", "exit 1\n")
    assert "status 1" in tried(monkeypatch, tmp_path / "cache", compiler)
    program(tmp_path / "cc", 'exec c++ "$@"\n')
    assert tried(monkeypatch, tmp_path / "cache") is None
    names = {cpp_library._path([compiler], tmp_path)}
    program(tmp_path / "cc", 'exec c++ "$@" # newer\n')
    names.add(cpp_library._path([compiler], tmp_path))
    monkeypatch.setattr(cpp_library, "_cpu", lambda: "flags: avx512f of another kind")
    names.add(cpp_library._path([compiler], tmp_path))
    assert len(names) == 3
    # what has its digest and is of no use is made anew
    path = next((tmp_path / "cache" / "trading_lib").iterdir())
    monkeypatch.undo()
    program(tmp_path / "cc", 'exec c++ "$@"\n')
    os.utime(tmp_path / "cc", ns=(0, 0))
    monkeypatch.setenv("CXX", compiler)
    path.rename(own := cpp_library._path([compiler], path.parent))
    own.write_bytes(b"useless" + cpp_library._digest(b"useless"))
    assert tried(monkeypatch, tmp_path / "cache") is None and own.stat().st_size > 10_000


@needs_them
def test_a_compiler_that_hangs_is_given_up_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_library, "_PATIENCE", 0.5)
    compiler = program(tmp_path / "cc", f"sleep 300 & echo $! > {tmp_path}/child; wait\n")
    assert tried(monkeypatch, tmp_path / "cache", compiler) == f"{compiler} did not end within 0.5 seconds"
    child = int((tmp_path / "child").read_text())
    for _ in range(200):
        if (
            not Path(f"/proc/{child}/status").exists()
            or "State:\tZ" in Path(f"/proc/{child}/status").read_text()
        ):
            return
        time.sleep(0.05)
    raise AssertionError("what the compiler started goes on")


@needs_them
@pytest.mark.parametrize(
    "chosen, words",
    [
        (" ", "no C"),
        ("g++ '", "no command"),
        ("g++;touch MARK", "no C++ compiler was found: $CXX is"),
        ("$(touch MARK)", "$CXX is"),
        ("c++ -O2 -ffast-math", "-ffast-math"),
        ("c++ -Ofast", "-Ofast"),
        ("c++ -ffinite-math-only", "-ffinite-math-only"),
        ("c++\x1b[31m", "$CXX is"),
    ],
)
def test_a_compiler_that_makes_no_sense_is_a_line(chosen, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in tried(monkeypatch, tmp_path / "cache", chosen) and not (tmp_path / "MARK").exists()


@needs_them
def test_a_relative_cache_counts_as_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "rel")
    assert cpp_library._folder() == Path.home() / ".cache" / "trading_lib"


def given_away(path: Path):
    os.chown(path, 12_345, -1)


PLACES = {
    "the folder, by all": lambda cache, folder, file: folder.chmod(0o777),
    "the folder, though sticky": lambda cache, folder, file: folder.chmod(0o1777),
    "the file, by its group": lambda cache, folder, file: file.chmod(0o664),
    "what the folder lies in": lambda cache, folder, file: cache.chmod(0o777),
    "the file of somebody else": lambda cache, folder, file: given_away(file),
    "the folder of somebody else": lambda cache, folder, file: given_away(folder),
    "what the folder lies in, of somebody else": lambda cache, folder, file: given_away(cache),
}


@needs_them
@pytest.mark.parametrize("place", PLACES)
def test_only_this_user_can_have_put_a_library_there(place, tmp_path, monkeypatch):
    "A library with the right name and digest that leaves a mark when it is loaded."
    if "somebody" in place and os.getuid() != 0:
        pytest.skip("only the administrator can give files away")
    folder, mark = tmp_path / "cache" / "trading_lib", tmp_path / "mark"
    folder.mkdir(parents=True, mode=0o700)
    file = cpp_library._path(compiler := cpp_library._compiler(), folder)
    (tmp_path / "evil.c").write_text(
        "#include <stdio.h>\n"
        f'__attribute__((constructor)) void f(void) {{ fopen("{mark}", "w"); }}\n{NOTHING}\n'
    )
    subprocess.run(
        [compiler[0], "-shared", "-fPIC", "-x", "c", tmp_path / "evil.c", "-o", tmp_path / "evil.so"],
        check=True,
    )
    library = (tmp_path / "evil.so").read_bytes()
    file.write_bytes(library + cpp_library._digest(library))
    file.chmod(0o644)
    PLACES[place](tmp_path / "cache", folder, file)
    assert "not this user's alone to write" in tried(monkeypatch, tmp_path / "cache") and not mark.exists()
    for path, mode in ((tmp_path / "cache", 0o700), (folder, 0o700), (file, 0o644)):
        os.chown(path, os.getuid(), -1)
        path.chmod(mode)
    assert (
        tried(monkeypatch, tmp_path / "cache") is None and mark.exists()
    )  # the test can fail: its owner may keep there what he likes


def test_only_a_training_that_could_use_them_says_that_they_are_missing(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "missing", lambda: "no compiler")
    assert "no compiler" in fused.why_slower(torch.device("cpu"), torch.float32, 257, 2**19)
    assert [
        fused.why_slower(*given)
        for given in (
            (torch.device("cpu"), torch.float32, 256, 8),
            (torch.device("cpu"), torch.bfloat16, 257, 8),
            (torch.device("meta"), torch.float32, 257, 8),
            (torch.device("cpu"), torch.float32, 257, 2**19 + 1),
        )
    ] == [None] * 4


ALONE = """
import ctypes, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
assert "torch" not in sys.modules
x, out = np.ones((900, 4), "f4"), np.empty((900, 2), "f4")
weight, bias = np.ones((2, 4), "f4"), np.zeros(2, "f4")
sums, more = np.empty((2, 4), "f4"), np.empty(2, "f4")

def address(a):
    return ctypes.c_void_p(a.ctypes.data)

def addresses(a):
    return (ctypes.c_void_p * 1)(a.ctypes.data)

sizes = ctypes.c_int64(1), (ctypes.c_int64 * 2)(4, 2), ctypes.c_int64(900)
failed = library.forward(*sizes, address(x), addresses(weight), addresses(bias), addresses(out), 0, 3)
given = address(x), addresses(weight), addresses(out), address(out)
failed += library.backward(*sizes, *given, addresses(sums), addresses(more), 0, 3)
print(failed, (out == 4).all() and (sums == 3600).all() and (more == 3600).all())
"""


@needs_them
def test_without_torchs_threads_it_starts_its_own():
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(cpp_library._path(cpp_library._compiler(), cpp_library._folder()))],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout.split() == ["0", "True"]


# --- the loss ---


def samples(n, actions, seed=0, scale=1.0):
    "Logits and values now, and what acted: of samples on both sides of every clip."
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    before = torch.log_softmax(scale * draw(n, actions), 1)
    action = torch.randint(actions, (n,), generator=random)
    data = {
        "action": action,
        "log_probability": before.gather(1, action[:, None]).squeeze(1),
        "logits": before,
        "value": draw(n),
        "advantage": draw(n),
        "return": draw(n),
    }
    return before + 0.3 * draw(n, actions) + draw(n, 1), data["value"] + 0.3 * draw(n), data


def loss_settings(value_clip=None, clip=0.2):
    return SimpleNamespace(clip_range=clip, value_clip_range=value_clip, value_coefficient=0.5)


def loss_of(function, logits, value, data, config, entropy_coefficient=0.01):
    "Loss, what is watched, gradients."
    logits, value = (v.clone().requires_grad_() for v in (logits, value))
    loss, watch = function(logits, value, data, config, entropy_coefficient)
    return loss.detach(), watch, *torch.autograd.grad(loss, (logits, value))


def in_double(logits, value, data):
    return (
        logits.double(),
        value.double(),
        {name: v if name == "action" else v.double() for name, v in data.items()},
    )


@needs_them
@pytest.mark.parametrize("n", [1, 15, 16, 17, 511, 512, 513, 2051])
@pytest.mark.parametrize("actions, scale", [(1, 1.0), (2, 1.0), (8, 1.0), (8, 30.0), (19, 3.0)])
@pytest.mark.parametrize("value_clip", [None, 0.0, 0.2])
def test_the_loss_is_the_plain_one(n, actions, scale, value_clip):
    "Against autograd of the plain formula in float64; as exact as that is in float32, or nearly."
    given, config = samples(n, actions, n, scale), loss_settings(value_clip)
    loss, watch, *found = loss_of(ppo.ppo_loss, *given, config)
    exact, expected, *gradients = loss_of(ppo.plain_ppo_loss, *in_double(*given), config)
    _, rounded, *plain = loss_of(ppo.plain_ppo_loss, *given, config)
    assert list(watch) == list(expected) and abs(float(loss - exact)) < 2e-6 * max(1, abs(float(exact)))
    for name in watch:
        assert abs(float(watch[name] - expected[name])) <= max(
            2e-6 * max(1, abs(float(expected[name]))), 3 * abs(float(rounded[name] - expected[name]))
        ), name
    for a, b, c in zip(found, gradients, plain, strict=True):
        error, of_plain = (float((v - b).norm() / (b.norm() + 1e-3 / n)) for v in (a, c))
        assert a.shape == b.shape and a.dtype == torch.float32
        assert error <= max(1e-6, 3 * of_plain)
    if n > 500:
        assert 0.05 < float(watch["clip_fraction"]) < 0.95 or actions == 1


@needs_them
@pytest.mark.parametrize("actions, action", [(8, -1), (8, 8), (2, 5)])
def test_an_action_that_there_is_not_is_refused(actions, action):
    logits, value, data = samples(40, actions)
    data["action"][33] = action
    with pytest.raises(InputError, match=rf"^loss: action: expected 0 to {actions - 1}, was "):
        ppo.ppo_loss(logits, value, data, loss_settings(), 0.01)


@needs_them
@pytest.mark.parametrize("name", ["log_probability", "logits", "value", "advantage", "return"])
@pytest.mark.parametrize(
    "change",
    [lambda v: v[:-1], lambda v: v.double(), lambda v: v.repeat_interleave(2, 0)[::2]],
    ids=["short", "double", "strided"],
)
def test_what_is_not_as_the_loss_takes_it_is_refused(name, change):
    logits, value, data = samples(40, 3)
    data[name] = change(data[name])
    with pytest.raises(InputError, match="^loss: .*expected contiguous float32 numbers of shape"):
        ppo.ppo_loss(logits, value, data, loss_settings(), 0.01)


@needs_them
def test_at_the_edges_gradients_are_shared_as_autograd_shares_them():
    """Advantages of 0, ratios within and beyond.

    A value that is as wrong clipped as it is unclipped gets half of its gradient.
    """
    even = torch.full((6, 2), 0.5).log()
    data = {
        "action": torch.zeros(6, dtype=torch.int64),
        "log_probability": torch.tensor([0.5, 0.5, 0.25, 0.25, 1.0, 1.0]).log(),
        "logits": even,
        "value": torch.tensor([1.0, 1.0, 5.0, 2.0, 2.0, 3.0]),
        "advantage": torch.tensor([1.0, 0.0, 1.0, 0.0, -1.0, 1.0]),
        "return": torch.tensor([2.5, 0.0, 2.5, 2.5, 2.5, 2.0]),
    }
    value, config = torch.tensor([3.0, 3.0, 3.0, 3.0, 3.0, 3.0]), loss_settings(1.0, 0.4)
    assert loss_of(ppo.plain_ppo_loss, even, value, data, config)[3][0] == pytest.approx(
        0.5 * 0.5 * 2 * 0.5 / 6
    )  # on paper: 3 and 2 are both half a unit from 2.5
    for a, b in zip(
        loss_of(ppo.ppo_loss, even, value, data, config),
        loss_of(ppo.plain_ppo_loss, even, value, data, config),
    ):
        if not isinstance(a, dict):
            assert torch.allclose(a, b, atol=1e-7)
        else:
            assert all(abs(float(a[name] - b[name])) < 1e-6 for name in a)


@needs_them
@pytest.mark.parametrize("value_clip", [None, 0.2])
@pytest.mark.parametrize(
    "place", ["now", "values now", "log_probability", "logits", "value", "advantage", "return"]
)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_told(place, number, value_clip):
    """Wherever the plain one says so, and in the very gradients.

    A gradient of what is NaN may be NaN where PyTorch's is not.
    """
    logits, value, data = samples(40, 3)
    target = {"now": logits, "values now": value}.get(place, data.get(place))
    if target.ndim > 1:
        target[20, 1] = number
    else:
        target[20] = number
    found, expected = (
        loss_of(f, logits, value, data, loss_settings(value_clip)) for f in (ppo.ppo_loss, ppo.plain_ppo_loss)
    )
    assert bool(found[0].isfinite()) == bool(expected[0].isfinite())
    for name, v in expected[1].items():
        assert bool(found[1][name].isfinite()) == bool(v.isfinite()), name
    for a, b in zip(found[2:], expected[2:]):
        assert (
            bool((b.isfinite() | ~a.isfinite()).all())
            and torch.allclose(a[a.isfinite()], b[a.isfinite()], atol=1e-6)
            and int((~a.isfinite()).sum()) <= a[0].numel()
        )


@needs_them
@pytest.mark.parametrize("threads", [2, 5])
def test_the_same_samples_give_the_same_loss_to_the_bit(threads):
    before, given = torch.get_num_threads(), samples(5000, 8)

    def flat(found):
        return [found[0], *found[1].values(), *found[2:]]

    try:
        torch.set_num_threads(1)
        alone = flat(loss_of(ppo.ppo_loss, *given, loss_settings(0.2)))
        torch.set_num_threads(threads)
        for _ in range(5):
            assert all(map(torch.equal, alone, flat(loss_of(ppo.ppo_loss, *given, loss_settings(0.2)))))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("compiled", [True, False])
def test_losses_of_several_networks_are_each_its_own(monkeypatch, compiled):
    if compiled and not cpu_kernels.available():
        pytest.skip(f"no compiled kernels here: {cpu_kernels.missing()}")
    if not compiled:
        monkeypatch.setattr(ppo, "_is_compiled", lambda logits: False)
    each, config = [samples(300, 4, seed) for seed in range(3)], loss_settings()
    logits, value = (torch.stack([own[i] for own in each]).requires_grad_() for i in range(2))
    losses, watch = ppo.ppo_losses(
        logits,
        value,
        {name: torch.stack([data[name] for *_, data in each]) for name in each[0][2]},
        config,
        0.01,
    )
    gradients = torch.autograd.grad(losses.sum(), (logits, value))
    for k, own in enumerate(each):
        loss, watched, *found = loss_of(ppo.plain_ppo_loss, *own, config)
        assert torch.allclose(losses[k], loss, atol=1e-6) and all(
            abs(float(watch[name][k] - v)) < 1e-6 for name, v in watched.items()
        )
        assert all(torch.allclose(of_all[k], one, atol=1e-7) for of_all, one in zip(gradients, found))


@pytest.mark.slow
@needs_them
@pytest.mark.parametrize("settings", [dict(), dict(value_clip_range=0.1, entropy_coefficient=0.1)])
def test_training_by_it_is_training_by_the_plain_one(monkeypatch, settings):
    "Three updates of the same run; another coefficient leads elsewhere."

    def weights(plain, **more):
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(ppo, "_is_compiled", lambda logits: False)
            trainer = trading_trainer(0, **settings | more)
            trainer.train(3)
        return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]), trainer.history

    (fast, rows), (plain, expected), (other, _) = (
        weights(False),
        weights(True),
        weights(True, value_coefficient=0.4),
    )
    assert difference(fast, plain) < 1e-5 < 1e-3 < difference(other, plain)
    for row, of_plain in zip(rows, expected, strict=True):
        assert row == pytest.approx(of_plain, rel=1e-3, abs=1e-5)
