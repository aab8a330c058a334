"""Fast paths beside the plain ones: hidden layers in few passes, bars that are computed once."""

import functools
import math
import platform
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from small_trainers import trading_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from trading_lib.kernels import layers as fused
from trading_lib.kernels.layers import _medium_is_exact, fast_products, fuses, hidden_layers
from trading_lib.networks import NativeActorCritic
from trading_lib.policy.recurrent import RecurrentActorCritic
from trading_lib.training.ppo import Minibatch, group_minibatches
from trading_lib.training.rollout import decision_rows
from trading_lib.training.update import answers_of_samples, padded_rows

WIDTHS = [(1, 1, 1), (7, 355, 64), (300, 64, 5), (513, 33, 17)]


def difference(a, b) -> float:
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def layer(n, inputs, outputs, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((n, inputs), (outputs, inputs), (outputs,))
    ]


def gradients(f, arguments, weight):
    out = f(*arguments)
    return out, torch.autograd.grad((out.float() * weight).sum(), arguments)


# --- few passes ---


def linear_relu(x, weight, bias):
    return hidden_layers(x, [(weight, bias)])


@pytest.mark.parametrize("shape", WIDTHS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float64, 0.0)]
)
def test_a_hidden_layer_is_the_plain_one(shape, dtype, tolerance):
    "Output and gradients, against the same numbers in float64; float64 itself has no fast path."
    arguments = layer(*shape, dtype)
    weight = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(9))
    out, found = gradients(linear_relu, arguments, weight)
    exact = [v.detach().double().requires_grad_() for v in arguments]
    expected, of = gradients(lambda x, w, b: F.relu(F.linear(x, w, b)), exact, weight)
    assert out.dtype == dtype and out.shape == (shape[0], shape[2])
    assert difference(out, expected) <= tolerance and max(
        difference(*pair) for pair in zip(found, of)
    ) <= max(tolerance, 0.0)
    if out.any():
        assert difference(out, F.linear(*exact)) > 0.01 or bool(
            (F.linear(*exact) >= 0).all()
        )  # without the ReLU it would be seen


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float64, 0.0)]
)
@pytest.mark.parametrize("widths", [(355, 64), (20, 40, 1, 7), (33, 64, 32, 16)], ids=str)
def test_hidden_layers_are_the_plain_ones(widths, dtype, tolerance):
    """One after another, output and the gradients of everything that wants one.

    The gradient that came in is left as it was.
    """
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    layers = [(draw(b, a), draw(b)) for a, b in zip(widths, widths[1:])]
    arguments = [draw(200, widths[0]), *(v for layer in layers for v in layer)]
    exact = [v.detach().double().requires_grad_() for v in arguments]

    def plain(x, *parameters):
        for weight, bias in zip(parameters[::2], parameters[1::2]):
            x = F.relu(F.linear(x, weight, bias))
        return x

    def together(x, *parameters):
        return hidden_layers(x, [*zip(parameters[::2], parameters[1::2])])

    incoming = torch.randn(200, widths[-1], generator=generator).to(dtype)
    before, out, expected = incoming.clone(), together(*arguments), plain(*exact)
    found, of, rounded = (
        torch.autograd.grad(*given)
        for given in (
            (out, arguments, incoming),
            (expected, exact, incoming.double()),
            (plain(*arguments), arguments, incoming),
        )
    )
    assert out.dtype == dtype and difference(out, expected) <= tolerance and torch.equal(incoming, before)
    for a, b, c in zip(
        found, of, rounded
    ):  # where roundings let another unit through, they do so in plain layers too
        assert (
            a.dtype == dtype
            and a.shape == b.shape
            and bool(b.any())
            and difference(a, b) <= max(tolerance, 3 * difference(c, b))
        )
    with torch.no_grad():
        assert torch.equal(together(*arguments), out)
    wanted = torch.autograd.grad(together(arguments[0].detach(), *arguments[1:]), arguments[1:], incoming)
    assert all(
        torch.equal(a, b) for a, b in zip(wanted, found[1:])
    )  # whether the input wants a gradient changes no other


def test_no_hidden_layer_is_no_change():
    x = torch.randn(3, 4)
    assert hidden_layers(x, []) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "weight", "bias"])
def test_what_is_not_a_number_stays_so(dtype, which):
    "A ReLU that made 0 of it would hide what is wrong from everybody."
    arguments = [v.detach() for v in layer(20, 40, 16, dtype)]
    arguments[which].view(-1)[3] = float("nan")
    expected = F.relu(F.linear(*(v.float() for v in arguments))).isnan()
    assert torch.equal(linear_relu(*arguments).isnan(), expected) and expected.any()


def test_an_input_that_needs_no_gradient_gets_none_and_one_that_is_not_contiguous_is_read_rightly():
    x, weight, bias = layer(40, 12, 6)
    strided = torch.randn(12, 40).t()
    assert (
        not strided.is_contiguous()
        and difference(linear_relu(strided, weight, bias), F.relu(F.linear(strided, weight, bias))) < 1e-6
    )
    linear_relu(x.detach(), weight, bias).sum().backward()
    assert x.grad is None and weight.grad is not None and bias.grad is not None
    assert linear_relu(x[:0], weight, bias).shape == (0, 6)


@pytest.mark.skipif(not fuses(torch.bfloat16), reason="this CPU has no products in bfloat16")
def test_in_autocast_the_weights_stay_and_their_gradients_are_float32():
    x, weight, bias = layer(64, 32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_relu(x, weight, bias)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    plain = layer(64, 32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        F.relu(F.linear(*plain)).float().square().sum().backward()
    assert (
        weight.grad.dtype == x.grad.dtype == torch.float32
        and max(difference(a.grad, b.grad) for a, b in zip((x, weight, bias), plain)) < 1e-2
    )


def test_a_gradient_of_a_gradient_is_refused():
    x, weight, bias = layer(8, 4, 3)
    if not fuses(torch.float32):
        pytest.skip("plain layers have one")
    (first,) = torch.autograd.grad(linear_relu(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_float32_products_are_exact_and_the_setting_is_put_back():
    before = torch.get_float32_matmul_precision()
    a, b = torch.randn(500, 300), torch.randn(300, 200)
    with pytest.raises(ZeroDivisionError), fast_products(torch.device("cpu")):
        assert difference(a @ b, a.double() @ b.double()) < 1e-6
        assert (torch.get_float32_matmul_precision() == "medium") == _medium_is_exact()
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


# --- learning ---


def sample_by_sample(epochs, data, n):
    "The same minibatches, each sample with its own work."
    for epoch in epochs(data, n):
        yield [Minibatch(batch.samples) for batch in epoch]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(shared_trunk=False, separate_optimizers=True, critic_epochs=2),
        dict(value_clip_range=0.2, target_kl=0.01),
    ],
)
def test_each_bar_once_is_the_same_update(settings):
    """A layout without account columns: samples at one bar share the network's work, and their gradients are
    added up."""
    weights, rows = [], []
    for once in (True, False):
        t = trading_trainer(0, None, n_steps=600, minibatch_size=1500, **settings)
        assert t.table.n_account == 0 and t.learner.whole_bars
        if not once:
            t.learner.epochs = functools.partial(sample_by_sample, t.learner.epochs)
        rows.append(t.train(2)[-1])
        weights.append({name: v.detach().clone() for name, v in t.policy.named_parameters()})
    fresh = dict(
        trading_trainer(0, None, n_steps=600, minibatch_size=1500, **settings).policy.named_parameters()
    )
    for name, v in weights[0].items():
        moved = float((weights[1][name] - fresh[name]).abs().max())
        assert float((v - weights[1][name]).abs().max()) < 1e-3 * moved and moved > 0, name
    assert all(rows[0][name] == pytest.approx(rows[1][name], rel=1e-4, abs=1e-6) for name in rows[0])


def test_it_is_chosen_where_bars_repeat_and_nothing_else_is_seen():
    few = trading_trainer(0, None, n_steps=32)
    bars = len(decision_rows(few.env.market))
    # 256 of thousands of bars: hardly any twice
    assert not few.learner.whole_bars and few.learner.computed_share == 1
    many = trading_trainer(0, None, n_steps=bars // 8, minibatch_size=bars)
    assert many.learner.whole_bars and many.learner.computed_share == pytest.approx(
        1 - 1 / math.e, abs=1e-3
    )  # as many samples as bars: a share of 1 - 1/e of them is seen
    assert not trading_trainer(
        0, None, version="2.7.0", n_steps=bars // 8, minibatch_size=bars
    ).learner.whole_bars  # accounts are seen too
    first, some = decision_rows(many.env.market).start, torch.arange(3, 73)
    rows = padded_rows(some, 1000, first)
    assert (
        torch.equal(rows[:70], some + first) and len(rows) == 128 and bool((rows[70:] == 72 + first).all())
    )  # a handful of sizes, whatever is drawn
    assert torch.equal(padded_rows(some, 70, first), some + first)  # never more than there were samples


@pytest.mark.parametrize("shape", [(9, 4), (9,)])
def test_a_look_up_is_a_selection(shape):
    "The way that other devices take, on this one: the same answers, and the same gradients."
    place = torch.tensor([0, 0, 3, 8, 8, 8])
    answers = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight, found = torch.randn(6, *shape[1:], generator=torch.Generator().manual_seed(1)), []
    for device in ("cpu", "meta"):
        out = answers_of_samples(answers, place, torch.device(device))
        assert torch.equal(out, answers[place])
        found.append(torch.autograd.grad(out, answers, weight)[0])
    assert torch.equal(*found) and bool(found[0].any())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 500, 1999, 2000, 5000])
def test_whole_groups_stay_together(size):
    """2,000 samples of 300 groups, a third of which has none.

    Each sample once an epoch, in minibatches of that size, and a group in two of them only where one was
    full.
    """
    random = torch.Generator().manual_seed(2)
    group = torch.randint(200, (2000,), generator=random) * 3 // 2
    epochs, again = (
        [*group_minibatches(group, 300, size, 4, torch.Generator().manual_seed(seed))] for seed in (5, 5)
    )
    assert len(epochs) == 4
    for epoch, same in zip(epochs, again):
        samples = torch.cat([batch.samples for batch in epoch])
        assert torch.equal(samples.sort().values, torch.arange(2000)) and torch.equal(
            samples, torch.cat([batch.samples for batch in same])
        )
        assert [len(batch.samples) for batch in epoch] == [
            min(size, 2000 - at) for at in range(0, 2000, size)
        ]
        for batch in epoch:
            assert torch.equal(batch.groups[batch.place], group[batch.samples]) and len(batch.groups) == len(
                batch.groups.unique()
            ) == len(batch.place.unique())
        of = group[samples]
        assert int((of[1:] != of[:-1]).sum()) + 1 == len(
            group.unique()
        )  # side by side, so divided by the edges of minibatches alone
    orders = [torch.cat([batch.samples for batch in epoch]) for epoch in epochs]
    assert not any(torch.equal(a, b) for a, b in zip(orders, orders[1:]))


def test_every_order_of_groups_is_as_likely_as_another():
    """Three groups of 2, 1 and 1 samples: six orders in 3,000 epochs, 500 each, with a standard deviation of
    20."""
    group = torch.tensor([0, 2, 1, 0])
    seen = Counter(
        tuple(epoch[0].groups.tolist())
        for epoch in group_minibatches(group, 3, 4, 3000, torch.Generator().manual_seed(0))
    )
    assert len(seen) == 6 and all(abs(n - 500) < 100 for n in seen.values())


# --- memory that stays ---

FAULTS = """
import resource, torch
from trading_lib.kernels.layers import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20): torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back, known = faults(), keep_freed_memory()
faults()  # the first time they are fetched in any case
print(int(known), given_back, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not GNU's")
def test_pages_are_not_fetched_again():
    "40 MB twenty times over: 10,000 pages of 4 kB each time, or a twentieth of that where pages are large."
    known, given_back, kept = map(
        int,
        subprocess.run(
            [sys.executable, "-c", FAULTS], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.split(),
    )
    assert known and kept < 100 < given_back


# --- few sizes of half-precision products ---


def test_few_sizes_are_few_and_at_most_a_quarter_more():
    sizes = [fused.few_sizes(n) for n in range(1, 65_537)]
    assert (
        all(n <= size <= 1.25 * n for n, size in enumerate(sizes, 1))
        and len(set(sizes)) == 8 + 4 * 13
        and fused.few_sizes(0) == 0
    )
    assert all(fused.few_sizes(size) == size for size in set(sizes)) and {64, 2048, 8192} <= set(
        sizes
    )  # what runs are made of stays as it is


class Rows(TorchDispatchMode):
    "Numbers of rows of all half-precision products."

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in str(function) for word in ("mm", "linear")):
            self.seen |= {
                len(x)
                for x in args
                if torch.is_tensor(x)
                and x.ndim == 2
                and x.dtype == torch.bfloat16
                and x.shape[1] in (11, 12, 13)
            }
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: NativeActorCritic(11, 3, (12, 13)),
        lambda: NativeActorCritic(11, 3, (12, 13), shared_trunk=False),
        lambda: RecurrentActorCritic(11, 3, 12, 1),
    ],
)
def test_products_of_any_number_of_rows_are_of_few_sizes(make):
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(300, 11)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        answers = {n: net.evaluate_step(x[:n], net.initial_state(n))[:2] for n in range(1, 301, 7)}
        with Rows() as rows:
            for n in range(1, 301):
                net.evaluate_step(x[:n], net.initial_state(n))
    assert (
        rows.seen
        and rows.seen <= {3, 11, 12, 13} | {fused.few_sizes(n) for n in range(1, 301)}
        and len(rows.seen) < 35
    )
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        whole = net.evaluate_step(x, net.initial_state(300))[:2]
    for n, (logits, values) in answers.items():
        assert logits.shape == (n, 3) and values.shape == (n,)
        (
            torch.testing.assert_close(logits, whole[0][:n], rtol=0.02, atol=0.02),
            torch.testing.assert_close(values, whole[1][:n], rtol=0.02, atol=0.02),
        )


def test_rows_of_nothing_change_no_gradient():
    "37 rows are 40: weights learn the same as from 37 in the same precision, and float32 is left as it is."
    torch.manual_seed(0)
    x, layers, heads = (
        torch.randn(37, 11),
        [(torch.randn(12, 11) / 3, torch.randn(12))],
        [(torch.randn(3, 12) / 3, torch.zeros(3))],
    )
    found = {}
    for name in ("few", "as they are"):
        own = [
            [(w.clone().requires_grad_(), b.clone().requires_grad_()) for w, b in pairs]
            for pairs in (layers, heads)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            out = (
                fused.layers_and_heads(x, *own)[0]
                if name == "few"
                else F.linear(F.relu(F.linear(x, *own[0][0])), *own[1][0])
            )
        out.float().square().sum().backward()
        found[name] = [out.detach().float(), *(p.grad for pairs in own for pair in pairs for p in pair)]
    for a, b in zip(*found.values()):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03 * float(b.abs().max()))
    assert fused.rows_in_few_sizes(x) is x
