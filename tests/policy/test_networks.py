"""The folded first layer against plain torch: the same function, the same gradients, the same training, the
same files.

The reference is torch.nn.Sequential on windows put together in numpy, torch.optim.Adam and
torch.nn.utils.clip_grad_norm_; it shares no code with trading_lib.networks.
"""

import copy
import functools
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from trading_lib.checkpoint import inspect_checkpoint, save_checkpoint
from trading_lib.config import InputError
from trading_lib.env import Obs, ObservationTable
from trading_lib.market.layouts import LAYOUTS
from trading_lib.networks import (
    HIDDEN_DIMS,
    FoldedInputs,
    NativeActorCritic,
    clip_gradients,
    estimate_model,
    folded_sums,
    input_layout,
    load_folded_sums,
    load_plain_optimizer_state,
    parameter_groups,
    plain_optimizer_state,
)
from trading_lib.version import MODEL_SPECS

WINDOW, BARS, N, HIDDEN, RATE, MAX_NORM = 20, 200, 32, (16, 12), 3e-4, 5.0
VERSIONS = [
    "5.6.0",
    "5.3.0",
    "2.7.0",
    "2.3.0",
]  # without and with columns of the account, and one with windowed columns in the middle
CASES = [(version, shared) for version in VERSIONS for shared in (True, False)]


class Case:
    """A random market, observations of it as indices and as windows, and one folded network with a plain copy
    of its weights."""

    def __init__(self, version, shared, seed=0):
        layout, random = LAYOUTS[version], np.random.default_rng(seed)
        self.version, self.shared, self.n_features, self.n_actions = version, shared, layout.n_features, 8
        features = random.standard_normal((BARS, len(layout.market_columns))).astype(np.float32)
        self.index, account = (
            random.integers(WINDOW - 1, BARS, N),
            random.standard_normal((N, len(layout.account_columns))).astype(np.float32),
        )
        self.shift, self.scale = (
            np.float32(a).astype(float)
            for a in (
                0.5 * random.standard_normal(layout.n_features),
                np.exp(0.5 * random.standard_normal(layout.n_features)),
            )
        )  # as the network keeps them
        self.table, self.obs = (
            ObservationTable(features, version, WINDOW),
            Obs(torch.as_tensor(self.index), torch.as_tensor(account)),
        )
        # windows by hand, column by column
        self.raw = np.empty((N, WINDOW, layout.n_features))
        for place, (name, windowed) in enumerate(zip(layout.columns, layout.windowed)):
            if name in layout.account_columns:
                self.raw[:, :, place] = account[:, [layout.account_columns.index(name)]]
            else:
                column = features[:, layout.market_columns.index(name)]
                for row, t in enumerate(self.index):
                    self.raw[row, :, place] = column[t - WINDOW + 1 : t + 1] if windowed else column[t]
        self.windows = torch.as_tensor((self.raw - self.shift) * self.scale).flatten(
            1
        )  # what a plain network reads
        torch.manual_seed(seed)
        self.folded = NativeActorCritic(
            WINDOW * layout.n_features,
            8,
            HIDDEN,
            shared,
            input_layout(version, WINDOW, self.shift, self.scale),
        ).double()
        self.target = torch.as_tensor(random.standard_normal((N, 8)))

    def reference(self):
        "Plain trunks and heads with the same weights, from the state dict."
        state, d = self.folded.state_dict(), self.n_features * WINDOW
        nets = []
        for trunk, head, outputs in (
            ("trunk" if self.shared else "actor_trunk", "actor_head", 8),
            ("trunk" if self.shared else "critic_trunk", "critic_head", 1),
        ):
            net = nn.Sequential(
                nn.Linear(d, HIDDEN[0]),
                nn.ReLU(),
                nn.Linear(HIDDEN[0], HIDDEN[1]),
                nn.ReLU(),
                nn.Linear(HIDDEN[1], outputs),
            ).double()
            for place, name in ((0, f"{trunk}.0"), (2, f"{trunk}.2"), (4, head)):
                for kind in ("weight", "bias"):
                    getattr(net[place], kind).data.copy_(state[f"{name}.{kind}"])
            nets.append(net)
        if self.shared:
            nets[1] = nn.Sequential(*nets[0][:4], nets[1][4])  # one trunk
        return nets


@functools.cache
def case(version, shared):
    return Case(version, shared)


def places(version):
    "Where the windowed columns are, and the broadcast ones: the market's, then the account's."
    layout = LAYOUTS[version]

    def by_kind(source, kind):
        return [
            i
            for i, (name, windowed) in enumerate(zip(layout.columns, layout.windowed))
            if name in source and bool(windowed) == kind
        ]

    return by_kind(layout.market_columns, True), by_kind(layout.market_columns, False) + by_kind(
        layout.account_columns, False
    )


def loss_of(logits, value, target):
    return ((logits - target) ** 2).mean() + 5 * ((value - target[:, 0]) ** 2).mean()


def distance(a, b):
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def evaluate(policy, x):
    "`policy.evaluate` without its cast to float32, where a test needs all digits."
    out = [
        trunk(x)
        for trunk in ([policy.trunk] if policy.shared_trunk else [policy.actor_trunk, policy.critic_trunk])
    ]
    return policy.actor_head(out[0]), policy.critic_head(out[-1]).squeeze(-1)


# --- the same function ---


@pytest.mark.parametrize("version, shared", CASES)
def test_folded_and_dense_outputs_agree_in_float32(version, shared):
    c = case(version, shared)
    policy, (actor, critic) = copy.deepcopy(c.folded).float(), c.reference()
    for logits, value in (
        policy.evaluate(policy.inputs(c.obs, c.table)),
        policy(torch.as_tensor(c.raw, dtype=torch.float32).flatten(1)),
        policy(c.table.materialise(c.obs)),
    ):
        assert logits.dtype == value.dtype == torch.float32 and logits.shape == (N, 8) and value.shape == (N,)
        assert (
            distance(logits, actor(c.windows)) < 1e-6 and distance(value, critic(c.windows).squeeze(1)) < 1e-6
        )


@pytest.mark.parametrize("version, shared", CASES)
def test_folded_and_dense_outputs_agree_in_float64(version, shared):
    c = case(version, shared)
    actor, critic = c.reference()
    logits, value = evaluate(c.folded, c.folded.inputs(c.obs, c.table))
    assert (
        distance(logits, actor(c.windows)) < 1e-12 and distance(value, critic(c.windows).squeeze(1)) < 1e-12
    )


def test_outputs_keep_the_precision_of_the_inputs():
    "A cast to float32 is for bf16; in float64 it would round 8 digits away, gradients included."
    c = case("5.6.0", True)
    logits, value = c.folded.evaluate(c.folded.inputs(c.obs, c.table))
    actor, critic = c.reference()
    assert (
        logits.dtype == value.dtype == torch.float64
        and distance(logits, actor(c.windows)) < 1e-12
        and distance(value, critic(c.windows).squeeze(1)) < 1e-12
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits, value = case("5.6.0", True).folded.float().evaluate(c.folded.inputs(c.obs, c.table).float())
    c.folded.double()
    assert logits.dtype == value.dtype == torch.float32


@pytest.mark.parametrize("version", VERSIONS)
def test_the_folded_layer_reads_each_input_once(version):
    c = case(version, True)
    windowed = int(LAYOUTS[version].windowed.sum())
    assert c.folded.inputs(c.obs, c.table).shape == (N, windowed * WINDOW + c.n_features - windowed)
    assert {
        v: int(LAYOUTS[v].windowed.sum()) * 100 + LAYOUTS[v].n_features - int(LAYOUTS[v].windowed.sum())
        for v in ("5.6.0", "2.3.0")
    } == {"5.6.0": 355, "2.3.0": 845}


@pytest.mark.parametrize("version, shared", CASES)
def test_folded_and_dense_gradients_agree(version, shared):
    c = case(version, shared)
    policy, (actor, critic) = copy.deepcopy(c.folded).float(), c.reference()
    loss_of(*policy.evaluate(policy.inputs(c.obs, c.table)), c.target.float()).backward()
    loss_of(actor(c.windows), critic(c.windows).squeeze(1), c.target).backward()
    windowed, broadcast = places(version)
    for trunk, net in zip(policy._trunks(), (actor, critic)):
        dense = net[0].weight.grad.view(HIDDEN[0], WINDOW, -1)
        assert (
            distance(trunk[0].windowed_weight.grad, dense[:, :, windowed].flatten(1)) < 1e-6
            and distance(trunk[0].bias.grad, net[0].bias.grad) < 1e-6
        )
        for bar in (0, WINDOW - 1):
            assert (
                distance(trunk[0].broadcast_weight.grad, dense[:, bar, broadcast]) < 1e-6
            )  # every weight of a repeated input has the gradient of the sum
        assert distance(trunk[2].weight.grad, net[2].weight.grad) < 1e-6
    assert (
        distance(policy.actor_head.weight.grad, actor[4].weight.grad) < 1e-6
        and distance(policy.critic_head.weight.grad, critic[4].weight.grad) < 1e-6
    )


def test_the_comparison_can_fail():
    "Negative controls: inputs rolled by one bar, one row shifted, or one column unscaled are seen at once."
    c = case("5.3.0", True)
    actor, _ = c.reference()
    x = c.folded.inputs(c.obs, c.table)
    windowed = int(LAYOUTS["5.3.0"].windowed.sum()) * WINDOW
    rolled = torch.cat([x[:, :windowed].roll(int(LAYOUTS["5.3.0"].windowed.sum()), 1), x[:, windowed:]], 1)
    one_column = x.clone()
    one_column[:, -1] *= 1.5
    for wrong in (rolled, x.roll(1, 0), one_column):
        assert distance(evaluate(c.folded, wrong)[0], actor(c.windows)) > 1e-3
    later = Obs(c.obs.index.clamp(max=BARS - 2) + 1, c.obs.dense)
    assert distance(evaluate(c.folded, c.folded.inputs(later, c.table))[0], actor(c.windows)) > 1e-2


@pytest.mark.parametrize("version", ["5.6.0", "2.7.0"])
def test_the_map_of_the_columns_is_shift_then_scale(version):
    "With weights that pick one input, the layer returns (x - shift) × scale of that column."
    c = Case(version, True)
    first, layout = c.folded.trunk[0], LAYOUTS[version]
    for place in range(0, c.n_features, 3):
        weight = torch.zeros(HIDDEN[0], WINDOW, c.n_features, dtype=torch.float64)
        weight[0, -1, place], weight[1, 0, place] = 1.0, 1.0  # the last and the first bar
        state = c.folded.state_dict() | {
            "trunk.0.weight": weight.flatten(1),
            "trunk.0.bias": torch.zeros(HIDDEN[0], dtype=torch.float64),
        }
        c.folded.load_state_dict(state)
        out = first(c.folded.inputs(c.obs, c.table)).detach().numpy()
        for unit, bar in ((0, -1), (1, 0)):
            expected = (c.raw[:, bar, place] - c.shift[place]) * c.scale[place]
            assert np.allclose(out[:, unit], expected, rtol=1e-12, atol=1e-12), (layout.columns[place], bar)


@pytest.mark.parametrize("version", VERSIONS)
def test_inputs_scaled_once_are_the_inputs_scaled_at_every_gather(version):
    "To the bit in float32, to its rounding in bf16; the table itself stays as it was."
    c = case(version, True)
    policy, rows = (
        copy.deepcopy(c.folded).float(),
        (c.table._windowed_rows.clone(), c.table._broadcast_rows.clone()),
    )
    x = FoldedInputs(policy, c.table)(c.obs)
    assert (
        torch.equal(x, policy.inputs(c.obs, c.table))
        and torch.equal(c.table._windowed_rows, rows[0])
        and torch.equal(c.table._broadcast_rows, rows[1])
    )
    windows, (windowed, broadcast) = c.windows.view(N, WINDOW, -1), places(version)
    assert distance(x, torch.cat([windows[:, :, windowed].flatten(1), windows[:, -1, broadcast]], 1)) < 1e-6
    small = FoldedInputs(policy, c.table, torch.bfloat16)(c.obs)
    assert small.dtype == torch.bfloat16 and torch.equal(small, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        logits, value = policy.evaluate(small)
    assert logits.dtype == value.dtype == torch.float32 and distance(value, policy.evaluate(x)[1]) < 0.02


def test_shift_and_scale_travel_with_the_weights():
    c, other = Case("5.6.0", True, seed=1), Case("5.6.0", True, seed=2)
    assert not torch.equal(c.folded.input_scale, other.folded.input_scale)
    other.folded.load_state_dict(c.folded.state_dict())
    assert (
        distance(
            evaluate(other.folded, other.folded.inputs(c.obs, c.table))[0],
            evaluate(c.folded, c.folded.inputs(c.obs, c.table))[0],
        )
        < 1e-12
    )
    plain = NativeActorCritic(WINDOW * 58, 8, HIDDEN, layout=input_layout("5.6.0", WINDOW))
    assert (plain.input_shift == 0).all() and (plain.input_scale == 1).all()
    assert not {"input_shift", "input_scale"} & {
        name for name, _ in c.folded.named_parameters()
    }  # nobody trains them


# --- the same training ---


def train_dense(c, steps=200):
    "Plain torch."
    actor, critic = c.reference()
    parameters = list(dict.fromkeys([*actor.parameters(), *critic.parameters()]))
    optimizer, norms = torch.optim.Adam(parameters, lr=RATE, eps=1e-5), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(actor(c.windows), critic(c.windows).squeeze(1), c.target).backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, MAX_NORM)))
        optimizer.step()
    return actor(c.windows).detach(), critic(c.windows).squeeze(1).detach(), norms


def train_folded(c, steps=200, factors=True, clip=clip_gradients, fused=False):
    policy, norms = copy.deepcopy(c.folded), []
    groups = parameter_groups(policy, RATE)
    if not factors:
        groups = [g | {"lr": RATE} for g in groups]
    optimizer, x = torch.optim.Adam(groups, eps=1e-5, fused=fused), policy.inputs(c.obs, c.table)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(*evaluate(policy, x), c.target).backward()
        norms.append(float(clip(optimizer.param_groups, MAX_NORM)))
        optimizer.step()
    return (*(out.detach() for out in evaluate(policy, x)), norms)


@functools.cache
def dense_run(version, shared):
    return train_dense(case(version, shared))


@pytest.mark.slow
@pytest.mark.parametrize(
    "version, shared, fused",
    [
        ("5.6.0", True, True),
        ("5.6.0", True, False),
        ("5.6.0", False, True),
        ("5.3.0", True, True),
        ("2.7.0", False, True),
    ],
)
def test_200_steps_of_adam_with_clipping_are_those_of_the_dense_network(version, shared, fused):
    dense, folded = dense_run(version, shared), train_folded(case(version, shared), fused=fused)
    assert np.allclose(folded[2], dense[2], rtol=1e-8) and min(dense[2]) < MAX_NORM < max(
        dense[2]
    )  # clipped in some steps, not in others
    assert distance(folded[0], dense[0]) < 1e-9 and distance(folded[1], dense[1]) < 1e-9
    start = evaluate(
        case(version, shared).folded,
        case(version, shared).folded.inputs(case(version, shared).obs, case(version, shared).table),
    )
    assert distance(start[0], dense[0]) > 0.5  # there was something to learn


def plain_norm(groups, max_norm):
    "Clipping that counts each sum once."
    return nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], max_norm)


@pytest.mark.parametrize("wrong", [dict(factors=False), dict(clip=plain_norm)])
def test_training_without_one_of_the_two_rules_departs(wrong):
    dense, other = dense_run("5.6.0", True), train_folded(case("5.6.0", True), **wrong)
    assert distance(other[0], dense[0]) > 1e-3


def test_gradients_are_clipped_to_the_norm_of_the_dense_network():
    c = case("5.3.0", False)
    actor, critic = c.reference()
    loss_of(actor(c.windows), critic(c.windows).squeeze(1), 50 * c.target).backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in [*actor.parameters(), *critic.parameters()]))
    policy = copy.deepcopy(c.folded)
    loss_of(*evaluate(policy, policy.inputs(c.obs, c.table)), 50 * c.target).backward()
    before = [p.grad.clone() for p in policy.parameters()]
    groups = parameter_groups(policy, RATE)
    assert math.isclose(float(clip_gradients(groups, 1e9)), norm, rel_tol=1e-10) and all(
        torch.equal(a, p.grad) for a, p in zip(before, policy.parameters())
    )  # a short one stays
    assert norm > 10 and math.isclose(float(clip_gradients(groups, 0.5)), norm, rel_tol=1e-10)
    assert all(
        torch.allclose(p.grad, g * (0.5 / norm), rtol=1e-6) for g, p in zip(before, policy.parameters())
    )
    assert math.isclose(float(clip_gradients(groups, 0.5)), 0.5, rel_tol=1e-6)


def moments(net, optimizer):
    return [optimizer.state[p] for p in net.parameters()]


@pytest.mark.parametrize("version, shared", [("5.6.0", True), ("5.3.0", False)])
def test_the_optimizers_state_is_that_of_adam_on_the_plain_network(version, shared):
    """Names, order, shapes and numbers; then plain torch goes on from it, and the folded network from plain
    torch's, each as the other would have."""
    c = case(version, shared)
    plain = NativeActorCritic(WINDOW * c.n_features, 8, HIDDEN, shared).double()
    plain.load_state_dict(
        {name: v for name, v in c.folded.state_dict().items() if not name.startswith("input_")}
    )
    folded = copy.deepcopy(c.folded)
    x, adam, other = (
        folded.inputs(c.obs, c.table),
        torch.optim.Adam(plain.parameters(), lr=RATE, eps=1e-5),
        torch.optim.Adam(parameter_groups(folded, RATE), eps=1e-5),
    )

    def step(net, optimizer, inputs, clip):
        optimizer.zero_grad()
        loss_of(*evaluate(net, inputs), c.target).backward()
        clip()
        optimizer.step()

    def dense_step(net, optimizer):
        return step(net, optimizer, c.windows, lambda: nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM))

    def folded_step(net, optimizer):
        return step(net, optimizer, x, lambda: clip_gradients(optimizer.param_groups, MAX_NORM))

    assert plain_optimizer_state(folded, [other])["state"] == {}
    for _ in range(20):
        dense_step(plain, adam)
        folded_step(folded, other)
    mine, theirs = plain_optimizer_state(folded, [other]), adam.state_dict()
    assert (
        mine["state"].keys() == theirs["state"].keys()
        and mine["param_groups"][0].keys() == theirs["param_groups"][0].keys()
        and math.isclose(mine["param_groups"][0]["lr"], RATE)
    )
    for i, state in theirs["state"].items():
        assert {name: v.shape for name, v in mine["state"][i].items()} == {
            name: v.shape for name, v in state.items()
        } and mine["state"][i]["step"] == state["step"] == 20
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(mine["state"][i][name], state[name], rtol=1e-7, atol=1e-12), (i, name)
    # crosswise: plain torch goes on from the folded network's checkpoint, and the other way round
    crossed, crossed_adam = copy.deepcopy(plain), None
    crossed.load_state_dict(
        {name: v for name, v in folded.state_dict().items() if not name.startswith("input_")}
    )
    crossed_adam = torch.optim.Adam(crossed.parameters(), lr=RATE, eps=1e-5)
    crossed_adam.load_state_dict(mine)
    back = copy.deepcopy(c.folded)
    back.load_state_dict(
        plain.state_dict() | {name: v for name, v in folded.state_dict().items() if name.startswith("input_")}
    )
    back_adam = torch.optim.Adam(parameter_groups(back, RATE), eps=1e-5)
    load_plain_optimizer_state(back, [back_adam], theirs)
    for _ in range(20):
        dense_step(plain, adam)
        dense_step(crossed, crossed_adam)
        folded_step(back, back_adam)
    for out in (evaluate(crossed, c.windows), evaluate(back, x)):
        assert (
            distance(out[0], evaluate(plain, c.windows)[0]) < 1e-9
            and distance(out[1], evaluate(plain, c.windows)[1]) < 1e-9
        )


@pytest.mark.parametrize("weight", [0, 1, 2])
@pytest.mark.parametrize(
    "name, shape", [("exp_avg", (1,)), ("exp_avg_sq", (3, 3)), ("exp_avg", ()), ("step", (2,))]
)
def test_a_moment_of_another_shape_is_refused_and_changes_nothing(weight, name, shape):
    "The fused step takes its length from the weight, and would write beyond a shorter moment."
    policy = copy.deepcopy(case("5.3.0", False).folded).float()
    optimizer = torch.optim.Adam(parameter_groups(policy, RATE), eps=1e-5, fused=True)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state, before = plain_optimizer_state(policy, [optimizer]), copy.deepcopy(moments(policy, optimizer))
    state["state"][weight][name] = torch.zeros(shape)
    state["param_groups"][0]["lr"] = 7.0
    expected = re.escape(f"optimizer state: {name} of weight {weight}: expected shape")
    with pytest.raises(InputError, match=expected):
        load_plain_optimizer_state(policy, [optimizer], state)
    for a, b in zip(before, moments(policy, optimizer)):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(group["lr"] < 1 for group in optimizer.param_groups)


def test_the_optimizers_state_loads_back_bit_for_bit():
    policy = copy.deepcopy(case("5.3.0", False).folded).float()
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(parameter_groups(policy, RATE), eps=1e-5, fused=True)

    def go(net, opt, seed):
        random.manual_seed(seed)
        for _ in range(5):
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=random)
            opt.step()

    go(policy, optimizer, 0)
    again = copy.deepcopy(policy)
    other = torch.optim.Adam(parameter_groups(again, RATE), eps=1e-5, fused=True)
    load_plain_optimizer_state(again, [other], plain_optimizer_state(policy, [optimizer]))
    for a, b in zip(moments(policy, optimizer), moments(again, other)):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for own in plain_optimizer_state(policy, [optimizer])["state"].values():
        for v in own.values():
            v.zero_()  # a copy: the optimizer does not notice
    go(policy, optimizer, 1)
    go(again, other, 1)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters()))


def test_every_parameter_is_in_one_group():
    for shared in (True, False):
        policy = NativeActorCritic(WINDOW * 58, 8, HIDDEN, shared, input_layout("5.6.0", WINDOW))
        groups = parameter_groups(policy, RATE)
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, policy.parameters()))
        assert {g["factor"]: g["lr"] for g in groups} == {1: RATE, WINDOW: RATE * WINDOW}
        sums = next(g["params"] for g in groups if g["factor"] == WINDOW)
        assert len(sums) == len(policy._trunks()) and all(p.shape == (HIDDEN[0], 55) for p in sums)
    assert [g["factor"] for g in parameter_groups(NativeActorCritic(10, 2, (4,)), RATE)] == [1]


# --- state dicts ---


@pytest.mark.parametrize("version, shared", CASES)
def test_state_dicts_of_folded_and_plain_load_in_each_other(version, shared):
    c = case(version, shared)
    plain = NativeActorCritic(WINDOW * c.n_features, 8, HIDDEN, shared).double()
    state = {name: value for name, value in c.folded.state_dict().items() if not name.startswith("input_")}
    assert {name: tuple(v.shape) for name, v in state.items()} == {
        name: tuple(v.shape) for name, v in plain.state_dict().items()
    }  # those of nn.Linear
    plain.load_state_dict(state)
    assert (
        distance(evaluate(plain, c.windows)[0], evaluate(c.folded, c.folded.inputs(c.obs, c.table))[0])
        < 1e-12
    )
    torch.manual_seed(5)
    other = NativeActorCritic(WINDOW * c.n_features, 8, HIDDEN, shared).double()
    folded = copy.deepcopy(c.folded)
    folded.load_state_dict(
        other.state_dict() | {"input_shift": c.folded.input_shift, "input_scale": c.folded.input_scale}
    )
    assert distance(evaluate(folded, folded.inputs(c.obs, c.table))[1], evaluate(other, c.windows)[1]) < 1e-12
    for mine, theirs in zip(folded._trunks(), other._trunks()):
        assert torch.allclose(
            mine[0].broadcast_weight,
            theirs[0].weight.view(HIDDEN[0], WINDOW, -1).sum(1)[:, places(version)[1]],
        )


@pytest.mark.parametrize("window, shared", [(1, True), (3, True), (100, True), (100, False)])
def test_weights_load_back_bit_for_bit(window, shared):
    """Spread over the window and added up again a float32 may move by its last bit.

    With the sums beside the state dict it does not. An exact resume rests on it.
    """

    def make():
        return NativeActorCritic(window * 58, 8, (64, 8), shared, input_layout("5.6.0", window))

    torch.manual_seed(window)
    policy = make()
    again = make()
    again.load_state_dict(policy.state_dict())
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(policy.parameters(), again.parameters())
    )
    sums = folded_sums(policy)
    assert set(sums) == {"trunk.0"} if shared else {"actor_trunk.0", "critic_trunk.0"}
    load_folded_sums(again, sums)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters()))
    for v in sums.values():
        v.zero_()
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters()))  # they are copies
    assert folded_sums(NativeActorCritic(10, 2, (4,))) == {}


def test_a_state_dict_does_not_write_through():
    policy = case("5.6.0", True).folded
    state = {name: v.clone() for name, v in policy.state_dict().items()}
    state["trunk.0.weight"].zero_()
    policy.state_dict()["trunk.0.weight"].zero_()
    assert policy.state_dict()["trunk.0.weight"].abs().sum() > 0


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("trunk.0.weight"), r'Missing key.*"trunk\.0\.weight"'),
        (lambda s: s.pop("trunk.0.bias"), r'Missing key.*"trunk\.0\.bias"'),
        (
            lambda s: s.update({"trunk.0.weight": torch.zeros(16, 7)}),
            r"trunk\.0\.weight: expected shape \(16, 1160\), was \(16, 7\)",
        ),
        (
            lambda s: s.update({"trunk.0.weight": torch.zeros(15, 1160)}),
            r"expected shape \(16, 1160\), was \(15, 1160\)",
        ),
        (
            lambda s: s.update({"trunk.0.bias": torch.zeros(15)}),
            r"trunk\.0\.bias: expected shape \(16,\), was \(15,\)",
        ),
        (
            lambda s: s.update({"trunk.0.bias": torch.zeros(1)}),
            r"trunk\.0\.bias: expected shape \(16,\), was \(1,\)",
        ),
        (lambda s: s.update({"trunk.0.gain": torch.zeros(1)}), r'Unexpected key.*"trunk\.0\.gain"'),
        (lambda s: s.pop("actor_head.weight"), r'Missing key.*"actor_head\.weight"'),
        (lambda s: s.update({"input_scale": torch.zeros(7)}), "input_scale"),
    ],
)
def test_a_state_dict_that_does_not_fit_says_what_differs(change, words):
    policy = NativeActorCritic(WINDOW * 58, 8, HIDDEN, layout=input_layout("5.6.0", WINDOW))
    state = policy.state_dict()
    change(state)
    with pytest.raises(RuntimeError) as e:
        policy.load_state_dict(state)
    assert re.search(words, str(e.value))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: NativeActorCritic(10, 2, ()), "hidden_dims: expected widths"),
        (lambda: NativeActorCritic(10, 2, (8, 0)), "hidden_dims: expected widths"),
        (lambda: NativeActorCritic(10, 2, (8, 2.5)), "hidden_dims: expected widths"),
        (
            lambda: NativeActorCritic(100, 2, (8,), layout=input_layout("5.6.0", WINDOW)),
            "obs_dim: expected 20 bars × 58 columns = 1160, was 100",
        ),
        (lambda: input_layout("5.6", 20), "did you mean '5.6.0'"),
    ],
)
def test_shapes_that_cannot_be_are_named(make, words):
    with pytest.raises(InputError) as e:
        make()
    assert words in str(e.value)


def test_shift_and_scale_need_one_value_per_column():
    for name, values in (("shift", np.zeros(57)), ("scale", np.ones(59))):
        with pytest.raises(InputError, match=f"{name}.* 58 .*{len(values)}"):
            NativeActorCritic(WINDOW * 58, 8, HIDDEN, layout=input_layout("5.6.0", WINDOW, **{name: values}))


# --- initialisation ---


@pytest.mark.parametrize("shared", [True, False])
def test_initial_weights_are_orthogonal_with_the_stated_gains(shared):
    """Singular values are the gain, all of them.

    √2 in the trunk, 0.01 for the actor, 1 for the critic; biases are 0.
    """
    for layout in (None, input_layout("5.6.0", 20)):
        policy = NativeActorCritic(1160, 8, (64, 96, 32), shared, layout)
        names = ["trunk"] if shared else ["actor_trunk", "critic_trunk"]
        gains = (
            {f"{name}.{i}": math.sqrt(2) for name in names for i in (2, 4)}
            | {"actor_head": 0.01, "critic_head": 1.0}
            | ({f"{name}.0": math.sqrt(2) for name in names} if layout is None else {})
        )
        for name, gain in gains.items():
            values = torch.linalg.svdvals(policy.state_dict()[f"{name}.weight"].double())
            assert torch.allclose(values, torch.full_like(values, gain), rtol=1e-5), name
        assert all((v == 0).all() for name, v in policy.state_dict().items() if name.endswith("bias"))
        assert {name for name in policy.state_dict() if name.endswith("weight")} == {
            f"{name}.{i}.weight" for name in names for i in (0, 2, 4)
        } | {"actor_head.weight", "critic_head.weight"}


def test_the_folded_layer_begins_as_the_sum_of_an_orthogonal_one():
    "The same seed gives the plain layer whose singular values are √2, and its fold."
    torch.manual_seed(3)
    plain = NativeActorCritic(1160, 8, (64, 32))
    torch.manual_seed(3)
    folded = NativeActorCritic(1160, 8, (64, 32), layout=input_layout("5.6.0", 20))
    weight, (windowed, broadcast) = plain.trunk[0].weight.detach().view(64, 20, 58), places("5.6.0")
    assert torch.allclose(
        torch.linalg.svdvals(weight.flatten(1).double()),
        torch.full((64,), math.sqrt(2), dtype=torch.float64),
        rtol=1e-5,
    )
    assert torch.equal(folded.trunk[0].windowed_weight, weight[:, :, windowed].flatten(1)) and torch.allclose(
        folded.trunk[0].broadcast_weight, weight[:, :, broadcast].sum(1), atol=1e-6
    )
    assert all(
        torch.equal(v, folded.state_dict()[name])
        for name, v in plain.state_dict().items()
        if name != "trunk.0.weight"
    )
    # a sum of 20 draws of a unit that reads a 1160-wide observation: √20 × √2 / √1160
    assert math.isclose(
        float(folded.trunk[0].broadcast_weight.detach().std()), math.sqrt(20 * 2 / 1160), rel_tol=0.05
    )
    actor, critic = NativeActorCritic(1160, 8, (64, 32), False, input_layout("5.6.0", 20))._trunks()
    assert not torch.equal(actor[0].windowed_weight, critic[0].windowed_weight)


# --- sizing ---


@pytest.mark.parametrize(
    "name, legacy, current",
    [
        ("large", 13_611_780, 14_637_065),
        ("medium", 6_085_380, 6_598_665),
        ("small", 2_878_852, 3_135_497),
        ("tiny", 1_398_468, 1_526_793),
    ],
)
def test_estimates_are_the_exact_counts(name, legacy, current):
    widths = {
        "large": (2048, 1024, 512, 256),
        "medium": (1024, 512, 256),
        "small": (512, 256, 128),
        "tiny": (256, 128, 64),
    }[name]
    assert HIDDEN_DIMS[name] == widths
    for obs_dim, n_actions, exact in ((5300, 3, legacy), (5800, 8, current)):
        estimate = estimate_model(obs_dim, widths, n_actions)
        assert (
            estimate["parameters"] == exact == sum(estimate["layers"].values())
            and 0.795 <= estimate["first_layer_share"] < 0.98
        )
        assert math.isclose(estimate["first_layer_share"], (obs_dim + 1) * widths[0] / exact)


@pytest.mark.parametrize(
    "obs_dim, widths, n_actions, shared",
    [
        (60, (16, 8), 8, True),
        (60, (16, 8), 8, False),
        (7, (5,), 3, True),
        (7, (5,), 3, False),
        (12, (9, 4, 6, 2), 2, True),
    ],
)
def test_estimates_are_the_counts_of_real_networks(obs_dim, widths, n_actions, shared):
    policy, estimate = (
        NativeActorCritic(obs_dim, n_actions, widths, shared),
        estimate_model(obs_dim, widths, n_actions, shared),
    )

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert estimate["parameters"] == count(policy)
    assert estimate["layers"] == {
        f"hidden_{i + 1}": sum(count(trunk[2 * i]) for trunk in policy._trunks()) for i in range(len(widths))
    } | {"actor_head": count(policy.actor_head), "critic_head": count(policy.critic_head)}


def test_the_estimate_is_the_count_of_the_folded_networks_state_dict():
    for shared in (True, False):
        state = NativeActorCritic(WINDOW * 58, 8, HIDDEN, shared, input_layout("5.6.0", WINDOW)).state_dict()
        assert estimate_model(WINDOW * 58, HIDDEN, 8, shared)["parameters"] == sum(
            v.numel() for name, v in state.items() if not name.startswith("input_")
        )


def saved(policy, folder):
    "Weights and two Adam moments, in a real file."
    optimizer = torch.optim.Adam(parameter_groups(policy, RATE), eps=1e-5)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return save_checkpoint(
        {
            "policy_state_dict": policy.state_dict(),
            "folded_sums": folded_sums(policy),
            "optimizer_state_dict": plain_optimizer_state(policy, [optimizer]),
        },
        folder / "model.pt",
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("folds", [False, True])
def test_a_checkpoint_weighs_what_was_estimated(tmp_path, folds, shared):
    "Within 5 % of a real file, at the width of the current layout: 12 bytes a parameter."
    file = saved(
        NativeActorCritic(5800, 8, (64, 32), shared, input_layout("5.6.0", 100) if folds else None), tmp_path
    )
    estimate, facts = estimate_model(5800, (64, 32), 8, shared), inspect_checkpoint(file)
    assert (
        facts["parameters"] == estimate["parameters"]
        and estimate["checkpoint_bytes"] == 12 * estimate["parameters"]
    )
    assert abs(facts["bytes"] / estimate["checkpoint_bytes"] - 1) < 0.05, (
        f"{facts['bytes']:,} bytes, estimated {estimate['checkpoint_bytes']:,}"
    )


@pytest.mark.slow
def test_the_estimate_holds_for_twenty_random_shapes(tmp_path, capsys):
    "Count exact, file within 5 %, over layouts, depths and widths."
    random, worst = np.random.default_rng(0), 0.0
    for _ in range(20):
        version, shared = str(random.choice(VERSIONS)), bool(random.integers(2))
        widths, layout, n_actions = (
            random.integers(32, 400, random.integers(1, 5)).tolist(),
            LAYOUTS[version],
            MODEL_SPECS[version].n_actions,
        )
        policy = NativeActorCritic(layout.obs_dim(100), n_actions, widths, shared, input_layout(version, 100))
        estimate, facts = (
            estimate_model(layout.obs_dim(100), widths, n_actions, shared),
            inspect_checkpoint(saved(policy, tmp_path)),
        )
        apart = abs(facts["bytes"] / estimate["checkpoint_bytes"] - 1)
        worst = max(worst, apart)
        assert facts["parameters"] == estimate["parameters"] and apart < 0.05, (version, shared, widths)
    with capsys.disabled():
        print(f" [20 shapes: counts exact, file size at most {worst:.2%} off]", end="")
