"""The recurrent actor-critic against the formulas in numpy, one account and one step at a time.

The reference below is written from the definitions (gated recurrent unit as in the documentation of
torch.nn.GRU, layer normalisation as in Ba et al. 2016) and knows only the state dict.
"""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from trading_lib.checkpoint import inspect_checkpoint, load_checkpoint, save_checkpoint
from trading_lib.config import InputError
from trading_lib.env import Obs, ObservationTable
from trading_lib.market.layouts import LAYOUTS
from trading_lib.networks import (
    FoldedInputs,
    clip_gradients,
    folded_sums,
    input_layout,
    load_folded_sums,
    load_plain_optimizer_state,
    parameter_groups,
    plain_optimizer_state,
)
from trading_lib.policy.recurrent import RecurrentActorCritic, episode_pieces, estimate_recurrent

T, N, WIDTH, ACTIONS, HIDDEN, LAYERS = 17, 6, 5, 3, 12, 2


def policy_of(seed=0, layers=LAYERS, dropout=0.1, dtype=torch.float64):
    "A small policy with every parameter away from its initial value, biases and norms included."
    torch.manual_seed(seed)
    policy = RecurrentActorCritic(WIDTH, ACTIONS, HIDDEN, layers, dropout).to(dtype).eval()
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.2 * torch.randn_like(p)
    return policy


def sequences(seed=0, layers=LAYERS, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(T, N, WIDTH, generator=random, dtype=dtype), torch.randn(
        layers, N, HIDDEN, generator=random, dtype=dtype
    )


def boundaries(kind, seed=0):
    "Starts of episodes, (T, N)."
    starts = torch.zeros(T, N, dtype=torch.bool)
    if kind == "first":
        starts[0] = True
    if kind == "last":
        starts[-1] = True
    if kind == "consecutive":
        starts[5:8] = True
    if kind == "every":
        starts[:] = True
    if kind == "one account":
        starts[:, 2] = True  # one at every step, the others never
    if kind == "random":
        starts = torch.rand(T, N, generator=torch.Generator().manual_seed(seed)) < torch.linspace(
            0.05, 0.7, N
        )
    if kind == "mixed":
        starts[[0, 4, 4, 9, T - 1], [0, 0, 1, 2, 3]] = True
        starts[[6, 7, 8], 4] = True
    return starts


KINDS = ["none", "first", "last", "consecutive", "every", "one account", "random", "mixed"]


# --- the formulas, in numpy ---


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normalize(x, weight, bias):
    centred = x - x.mean()
    return weight * centred / np.sqrt((centred**2).mean() + 1e-5) + bias


def by_hand(state_dict, x, state, starts):
    "One account, one step, one layer at a time."
    w, (x, state, starts) = (
        {name: v.double().numpy() for name, v in state_dict.items()},
        (v.double().numpy() for v in (x, state, starts)),
    )

    def affine(name, v):
        return w[f"{name}.weight"] @ v + w[f"{name}.bias"]

    layers, out = len(state), (np.empty((len(x), x.shape[1], ACTIONS)), np.empty(x.shape[:2]))
    after = state.copy()
    for account in range(x.shape[1]):
        h = [layer[account] for layer in state]
        for t in range(len(x)):
            if starts[t, account]:
                h = [np.zeros(HIDDEN) for _ in range(layers)]
            v = x[t, account]
            for place in (0, 4):
                v = normalize(
                    np.maximum(affine(f"encoder.{place}", v), 0),
                    w[f"encoder.{place + 2}.weight"],
                    w[f"encoder.{place + 2}.bias"],
                )
            for k in range(layers):
                from_input, from_state = (
                    np.split(w[f"gru.weight_{s}_l{k}"] @ u + w[f"gru.bias_{s}_l{k}"], 3)
                    for s, u in (("ih", v), ("hh", h[k]))
                )
                r, z = sigmoid(from_input[0] + from_state[0]), sigmoid(from_input[1] + from_state[1])
                v = h[k] = (1 - z) * np.tanh(from_input[2] + r * from_state[2]) + z * h[k]
            for head, last, result in (("actor_head", "logits", out[0]), ("critic_head", "value", out[1])):
                u = normalize(
                    np.maximum(affine(f"{head}.hidden", v), 0),
                    w[f"{head}.norm.weight"],
                    w[f"{head}.norm.bias"],
                )
                u = affine(f"{head}.{last}", u)
                result[t, account] = u if head == "actor_head" else u[0]
        for k in range(layers):
            after[k, account] = h[k]
    return *out, after


def step_by_step(policy, x, state, starts):
    "A loop over `evaluate_step`, with the state set to zero at starts."
    logits, values = [], []
    for observation, start in zip(x, starts):
        before = torch.where(start[:, None], torch.zeros_like(state), state)
        *output, state = policy.evaluate_step(observation, before)
        logits.append(output[0])
        values.append(output[1])
    return torch.stack(logits), torch.stack(values), state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_sequences_are_the_formulas(layers, kind):
    policy, (x, state), starts = policy_of(layers=layers), sequences(layers=layers), boundaries(kind)
    got, expected = (
        policy.evaluate_sequences(x, state, starts),
        by_hand(policy.state_dict(), x, state, starts),
    )
    assert [tuple(g.shape) for g in got] == [(T, N, ACTIONS), (T, N), (layers, N, HIDDEN)]
    for g, e in zip(got, expected):
        assert np.abs(g.detach().numpy() - e).max() < 1e-12
    assert min(np.std(e) for e in expected[:2]) > 0.01  # not constant


def test_a_step_is_the_formula():
    policy, (x, state) = policy_of(), sequences()
    got, expected = (
        policy.evaluate_step(x[0], state),
        by_hand(policy.state_dict(), x[:1], state, boundaries("none")[:1]),
    )
    assert [tuple(g.shape) for g in got] == [(N, ACTIONS), (N,), (LAYERS, N, HIDDEN)]
    for g, e in zip(got, (expected[0][0], expected[1][0], expected[2])):
        assert np.abs(g.detach().numpy() - e).max() < 1e-12


# --- sequences and steps ---


def gradients(policy, x, state, starts, run):
    "Gradients of a loss that weighs every output differently, of the parameters and of the state."
    policy.zero_grad()
    state = state.clone().requires_grad_()
    weights = torch.Generator().manual_seed(9)
    out = run(policy, x, state, starts)
    sum((o * torch.randn(o.shape, generator=weights, dtype=o.dtype)).sum() for o in out).backward()
    return [o.detach() for o in out], {name: p.grad.clone() for name, p in policy.named_parameters()} | {
        "state": state.grad.clone()
    }


@pytest.mark.parametrize(
    "kind, seed", [(kind, 0) for kind in KINDS] + [("random", seed) for seed in range(1, 8)]
)
def test_sequences_are_the_steps_and_so_are_their_gradients(kind, seed):
    policy, (x, state), starts = policy_of(seed), sequences(seed), boundaries(kind, seed)
    steps, step_gradients = gradients(policy, x, state, starts, step_by_step)
    got, got_gradients = gradients(policy, x, state, starts, RecurrentActorCritic.evaluate_sequences)
    for g, s in zip(got, steps):
        assert (g - s).abs().max() < 1e-12
    for name, s in step_gradients.items():
        assert (got_gradients[name] - s).abs().max() < 1e-10 * (1 + s.abs().max()), name
    reached = step_gradients["state"].abs().sum((0, 2)) > 0
    assert torch.equal(
        reached, ~starts[0]
    )  # an account that starts an episode at once is not touched by its old state


def test_sequences_are_the_steps_in_single_precision():
    "At the network's default size."
    torch.manual_seed(0)
    policy = RecurrentActorCritic(64, 16).eval()
    x, state, starts = torch.randn(40, 32, 64), torch.randn(2, 32, 256), torch.rand(40, 32) < 0.1
    with torch.no_grad():
        for g, s in zip(policy.evaluate_sequences(x, state, starts), step_by_step(policy, x, state, starts)):
            assert (g - s).norm() / s.norm() < 1e-6


def test_two_halves_are_the_whole():
    policy, (x, state), starts = policy_of(), sequences(), boundaries("random", 3)
    whole = policy.evaluate_sequences(x, state, starts)
    first = policy.evaluate_sequences(x[:7], state, starts[:7])
    second = policy.evaluate_sequences(x[7:], first[2], starts[7:])
    for place in (0, 1):
        assert (torch.cat([first[place], second[place]]) - whole[place]).abs().max() < 1e-12
    assert (second[2] - whole[2]).abs().max() < 1e-12


def test_accounts_may_be_taken_in_any_order():
    "Minibatches are subsets of accounts."
    policy, (x, state), starts = policy_of(), sequences(), boundaries("mixed")
    whole, some = policy.evaluate_sequences(x, state, starts), torch.tensor([4, 0, 3])
    got = policy.evaluate_sequences(x[:, some], state[:, some], starts[:, some])
    for g, w in zip(got, (whole[0][:, some], whole[1][:, some], whole[2][:, some])):
        assert (g - w).abs().max() < 1e-12


def test_pieces_by_hand():
    """Two accounts, four steps: A goes on for two steps and then starts an episode of two, B starts at once
    and again at the last step."""
    pieces = episode_pieces(torch.tensor([[False, True], [False, False], [True, False], [False, True]]))
    # pieces: A's first two steps (0), A's last two (1), B's three (2), B's last one (3); 3 = 2 + 1
    assert (
        pieces.account.tolist() == [0, 0, 1, 1]
        and pieces.begins.tolist() == [False, True, True, True]
        and pieces.last.tolist() == [1, 3]
    )
    assert [(length, which.tolist()) for length, which in pieces.chunks] == [(2, [0, 1, 2]), (1, [2, 3])]
    # steps in time order: 0 = A0, 1 = B0, 2 = A1, 3 = B1, 4 = A2, 5 = B2, 6 = A3, 7 = B3
    assert pieces.source.tolist() == [0, 4, 1, 2, 6, 3, 5, 7] and pieces.place[
        pieces.source
    ].tolist() == list(range(8))


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_read_once(kind):
    "Nothing is padded, and a sequence of T steps takes as many calls as T has binary digits, at most."
    pieces = episode_pieces(boundaries(kind))
    assert sum(
        length * len(which) for length, which in pieces.chunks
    ) == T * N and pieces.source.sort().values.tolist() == list(range(T * N))
    lengths = [length for length, _ in pieces.chunks]
    assert set(lengths) <= {16, 8, 4, 2, 1} and lengths == sorted(lengths, reverse=True)
    assert len(pieces.account) == len(pieces.begins) == int(boundaries(kind)[1:].sum()) + N


# --- memory ---


@pytest.mark.parametrize("what", ["observations", "state"])
def test_an_episode_knows_nothing_of_the_one_before(what):
    """Everything before the start is replaced by noise, infinities and NaN.

    What follows is the same to the last bit.
    """
    policy, (x, state), starts = (
        policy_of(dtype=torch.float32),
        sequences(dtype=torch.float32),
        boundaries("none"),
    )
    starts[8, :3], starts[0, 3:] = True, True  # three accounts start within, three at the beginning
    before = policy.evaluate_sequences(x, state, starts)
    for noise in (1e3, math.inf, math.nan):
        other_x, other_state = x.clone(), state.clone()
        if what == "observations":
            other_x[:8, :3] = noise
        other_state[:] = noise
        after = policy.evaluate_sequences(other_x, other_state, starts)
        for a, b in zip(after[:2], before[:2]):
            assert torch.equal(a[8:], b[8:]) and torch.equal(a[:, 3:], b[:, 3:])
        assert torch.equal(after[2], before[2]) and not torch.equal(after[0][:8, :3], before[0][:8, :3])


def test_no_gradient_crosses_a_start():
    policy, (x, state), starts = policy_of(), sequences(), boundaries("none")
    starts[8] = True
    x.requires_grad_()
    logits, values, _ = policy.evaluate_sequences(x, state, starts)
    (logits[8:].sum() + values[8:].sum()).backward()
    assert (x.grad[:8] == 0).all() and (x.grad[8] != 0).any()


def test_without_a_start_it_does_remember():
    policy, (x, state), starts = policy_of(), sequences(), boundaries("none")
    other = x.clone()
    other[0] += 1
    a, b = policy.evaluate_sequences(x, state, starts)[0], policy.evaluate_sequences(other, state, starts)[0]
    assert ((a - b)[-1].abs() > 1e-9).any() and (
        (policy.evaluate_sequences(x, 0 * state, starts)[0] - a)[-1].abs() > 1e-9
    ).any()


def test_nothing_is_known_before_the_first_observation():
    policy = policy_of()
    state = policy.initial_state(N)
    assert (
        state.shape == (LAYERS, N, HIDDEN)
        and (state == 0).all()
        and state.dtype == torch.float64
        and policy.float().initial_state(2, "meta").device.type == "meta"
    )
    x, _ = sequences(dtype=torch.float32)
    a, b = (
        policy.evaluate_sequences(x, policy.initial_state(N), boundaries("none")),
        policy.evaluate_sequences(x, torch.randn(LAYERS, N, HIDDEN), boundaries("first")),
    )
    assert all(torch.equal(u, v) for u, v in zip(a, b))


# --- size and weights ---


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_by_part():
    "The published counts; the two heads are separate, and with the two other parts they are the whole."
    policy = RecurrentActorCritic(64, 16)
    assert {name: count(module) for name, module in policy.named_children()} == {
        "encoder": 83_456,
        "gru": 789_504,
        "actor_head": 35_216,
        "critic_head": 33_281,
    }
    assert (
        count(policy) == 941_457
        and policy.hidden_dims == (256,)
        and (policy.obs_dim, policy.n_actions, policy.hidden_dim, policy.n_gru_layers, policy.folds)
        == (64, 16, 256, 2, False)
    )
    assert policy.actor_head.logits.weight.shape == (16, 128) and policy.critic_head.value.weight.shape == (
        1,
        128,
    )


def test_the_estimate_of_the_published_network():
    estimate = estimate_recurrent(64, 16)
    assert estimate == {
        "parameters": 941_457,
        "layers": {"encoder": 83_456, "gru": 789_504, "actor_head": 35_216, "critic_head": 33_281},
        "first_layer_share": 65 * 256 / 941_457,
        "checkpoint_bytes": 11_297_484,
    }


@pytest.mark.parametrize(
    "obs_dim, n_actions, hidden, layers", [(64, 16, 256, 2), (7, 3, 10, 1), (5800, 8, 64, 2), (30, 2, 33, 3)]
)
def test_estimates_are_the_counts_of_real_networks(obs_dim, n_actions, hidden, layers):
    policy, estimate = (
        RecurrentActorCritic(obs_dim, n_actions, hidden, layers),
        estimate_recurrent(obs_dim, n_actions, hidden, layers),
    )
    assert estimate["layers"] == {
        name: count(module) for name, module in policy.named_children()
    } and estimate["parameters"] == count(policy) == sum(estimate["layers"].values())
    assert math.isclose(estimate["first_layer_share"], count(policy.encoder[0]) / count(policy))


def test_a_checkpoint_weighs_what_was_estimated(tmp_path):
    "Within 5 % of a real file, and it comes back bit for bit."
    layout = input_layout("5.6.0", WINDOW)
    policy = RecurrentActorCritic(WINDOW * 58, 8, 64, layout=layout)
    optimizer = torch.optim.Adam(parameter_groups(policy, 3e-4), eps=1e-5)
    for p in policy.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    file = save_checkpoint(
        {
            "policy_state_dict": policy.state_dict(),
            "folded_sums": folded_sums(policy),
            "optimizer_state_dict": plain_optimizer_state(policy, [optimizer]),
        },
        tmp_path / "model.pt",
    )
    estimate, facts = estimate_recurrent(WINDOW * 58, 8, 64), inspect_checkpoint(file)
    assert (
        facts["parameters"] == estimate["parameters"]
        and abs(facts["bytes"] / estimate["checkpoint_bytes"] - 1) < 0.05
    )
    other, content = RecurrentActorCritic(WINDOW * 58, 8, 64, layout=layout), load_checkpoint(file)
    other.load_state_dict(content["policy_state_dict"])
    load_folded_sums(other, content["folded_sums"])
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters()))
    again = torch.optim.Adam(parameter_groups(other, 3e-4), eps=1e-5)
    load_plain_optimizer_state(other, [again], content["optimizer_state_dict"])
    assert all(
        torch.equal(again.state[b][name], v)
        for a, b in zip(policy.parameters(), other.parameters())
        for name, v in optimizer.state[a].items()
    )


def test_initial_weights_are_orthogonal():
    torch.manual_seed(0)
    policy = RecurrentActorCritic(64, 16)
    gain = {"actor_head.logits": 0.01, "critic_head.value": 1.0} | {
        name: math.sqrt(2) for name in ("encoder.0", "encoder.4", "actor_head.hidden", "critic_head.hidden")
    }
    seen = 0
    for name, p in policy.named_parameters():
        if p.ndim == 1:
            assert (p == (1 if "weight" in name else 0)).all(), name  # layer norms 1, biases 0
        else:
            for block in p.double().chunk(3) if name.startswith("gru") else [p.double()]:
                expected = 1.0 if name.startswith("gru") else gain[name.removesuffix(".weight")]
                assert torch.allclose(
                    torch.linalg.svdvals(block), torch.tensor(expected, dtype=torch.float64), rtol=1e-5
                ), name
                seen += 1
    assert seen == 6 + 2 * 2 * 3


def test_the_state_dict_comes_back():
    a, b = policy_of(1), policy_of(2)
    (x, state), starts = sequences(), boundaries("random")
    assert not torch.equal(
        a.evaluate_sequences(x, state, starts)[0], b.evaluate_sequences(x, state, starts)[0]
    )
    b.load_state_dict(a.state_dict())
    for copied in (b, copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert all(
            torch.equal(u, v)
            for u, v in zip(
                a.evaluate_sequences(x, state, starts), copied.evaluate_sequences(x, state, starts)
            )
        )


# --- modes and precision ---


@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_is_off_in_evaluation_mode_and_on_in_training_mode(layers):
    policy, (x, state), starts = policy_of(layers=layers), sequences(layers=layers), boundaries("random")

    def log_probabilities():
        return policy.evaluate_sequences(x, state, starts)[0].log_softmax(-1)

    assert torch.equal(log_probabilities(), log_probabilities())
    policy.train()
    assert not torch.equal(log_probabilities(), log_probabilities())
    policy.eval()
    assert torch.equal(log_probabilities(), log_probabilities()) and not policy.training


def test_each_kind_of_dropout_works_alone():
    "That of the encoder, and that between the layers of the GRU."
    (x, state), starts = sequences(), boundaries("random")
    for parts in (("encoder",), ("gru",)):
        policy = policy_of().train()
        if "encoder" not in parts:
            policy.encoder.eval()
        if "gru" not in parts:
            policy.gru.dropout = 0.0
        assert not torch.equal(
            policy.evaluate_sequences(x, state, starts)[1], policy.evaluate_sequences(x, state, starts)[1]
        ), parts


def test_without_dropout_the_modes_agree():
    policy, (x, state), starts = policy_of(dropout=0.0), sequences(), boundaries("random")
    a = policy.evaluate_sequences(x, state, starts)
    assert all(torch.equal(u, v) for u, v in zip(a, policy.train().evaluate_sequences(x, state, starts)))


def test_the_gru_can_always_compute_gradients():
    "cuDNN refuses them to a GRU in evaluation mode; its dropout is what the mode switches."
    policy = RecurrentActorCritic(WIDTH, ACTIONS, HIDDEN)
    for mode, dropout in ((True, 0.1), (False, 0.0), (True, 0.1)):
        policy.train(mode)
        assert (
            policy.gru.training
            and policy.gru.dropout == dropout
            and policy.encoder[3].training == policy.training == mode
        )
    one_layer = RecurrentActorCritic(WIDTH, ACTIONS, HIDDEN, 1)  # nothing lies between its layers
    assert one_layer.train().gru.dropout == 0


def test_precision():
    """Outputs and state in the weights' own precision.

    Under autocast close to it, in the same way for steps and for sequences.
    """
    policy, (x, state), starts = (
        policy_of(dtype=torch.float32),
        sequences(dtype=torch.float32),
        boundaries("random"),
    )
    exact = policy.evaluate_sequences(x, state, starts)
    assert {o.dtype for o in exact} == {torch.float32} and {
        o.dtype for o in policy_of().evaluate_sequences(*sequences(), starts)
    } == {torch.float64}
    for inputs in (x, x.bfloat16()):  # the trainer's inputs are rounded already
        with torch.autocast("cpu", torch.bfloat16):
            rounded, steps = (
                policy.evaluate_sequences(inputs, state, starts),
                step_by_step(policy, inputs, state, starts),
            )
            assert sum(o.sum() for o in rounded).requires_grad
        for r, s, e in zip(rounded, steps, exact):
            assert r.dtype == s.dtype == torch.float32 and 1e-5 < (r - e).norm() / e.norm() < 0.03
            assert (r - s).norm() / s.norm() < 0.01
    sum(o.sum() for o in rounded).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in policy.parameters())


def test_the_recurrence_is_not_rounded():
    """Where the encoder's output is the same in both precisions, so is the state, to the last bit, though
    products are in bf16."""
    policy, (x, state), starts = (
        policy_of(dtype=torch.float32),
        sequences(dtype=torch.float32),
        boundaries("random"),
    )
    with torch.no_grad():
        policy.encoder[6].weight.zero_()
        policy.encoder[6].bias.copy_(policy.encoder[6].bias.bfloat16())
    exact = policy.evaluate_sequences(x, state, starts)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = policy.evaluate_sequences(x, state, starts)
    assert torch.equal(rounded[2], exact[2]) and not torch.equal(rounded[0], exact[0])


# --- inputs of a market ---

WINDOW = 20


class Market:
    "A random market, an affine map of its columns, and one policy that folds beside one that does not."

    def __init__(self, version="5.6.0", seed=0):
        layout, random = LAYOUTS[version], np.random.default_rng(seed)
        n = layout.n_features
        shift, scale = (
            np.float32(a).astype(float)
            for a in (0.5 * random.standard_normal(n), np.exp(0.5 * random.standard_normal(n)))
        )
        features = random.standard_normal((200, len(layout.market_columns))).astype(np.float32)
        self.table = ObservationTable(features, version, WINDOW)
        first = random.integers(WINDOW, 150, N)
        account = random.standard_normal((T, N, len(layout.account_columns))).astype(np.float32)
        self.obs = [Obs(torch.as_tensor(first + t), torch.as_tensor(account[t])) for t in range(T)]
        # windows by hand, column by column
        windows = np.empty((T, N, WINDOW, n))
        for place, (name, windowed) in enumerate(zip(layout.columns, layout.windowed)):
            for t in range(T):
                for j, bar in enumerate(first + t):
                    if name in layout.account_columns:
                        windows[t, j, :, place] = account[t, j, layout.account_columns.index(name)]
                    else:
                        column = features[:, layout.market_columns.index(name)]
                        windows[t, j, :, place] = (
                            column[bar - WINDOW + 1 : bar + 1] if windowed else column[bar]
                        )
        self.windows = torch.as_tensor(((windows - shift) * scale).reshape(T, N, -1))
        torch.manual_seed(seed)
        self.layout = input_layout(version, WINDOW, shift, scale)
        self.folded = RecurrentActorCritic(WINDOW * n, 8, HIDDEN, layout=self.layout).double().eval()
        self.dense = RecurrentActorCritic(WINDOW * n, 8, HIDDEN).double().eval()
        self.dense.load_state_dict(
            {name: v for name, v in self.folded.state_dict().items() if not name.startswith("input_")}
        )


@pytest.mark.parametrize("version", ["5.6.0", "5.3.0"])  # without and with columns of the account
def test_folded_and_dense_sequences_agree(version):
    m = Market(version)
    x = torch.stack([m.folded.inputs(obs, m.table) for obs in m.obs])
    windowed = int(LAYOUTS[version].windowed.sum())
    assert (
        x.shape == (T, N, windowed * WINDOW + LAYOUTS[version].n_features - windowed)
        and m.folded.folds
        and m.folded.window == WINDOW
    )
    state, starts = torch.randn(LAYERS, N, HIDDEN, dtype=torch.float64), boundaries("random")
    for a, b in zip(
        m.folded.evaluate_sequences(x, state, starts), m.dense.evaluate_sequences(m.windows, state, starts)
    ):
        assert (a - b).abs().max() < 1e-9
    rolled = m.folded.evaluate_sequences(x.roll(1, 0), state, starts)
    assert (
        rolled[1] - m.dense.evaluate_sequences(m.windows, state, starts)[1]
    ).abs().max() > 1e-2  # the comparison can fail


def test_inputs_scaled_once_are_the_inputs_scaled_at_every_gather():
    m = Market("5.3.0")
    policy = m.folded.float()
    for obs in m.obs[:3]:
        assert torch.equal(FoldedInputs(policy, m.table)(obs), policy.inputs(obs, m.table))
    assert torch.equal(m.dense.inputs(Obs(None, m.windows[0]), None), m.windows[0])


@pytest.mark.slow
def test_folded_training_is_that_of_the_dense_network():
    """50 steps of Adam on whole sequences with clipping, against plain torch on plain windows.

    Steps ten times as large are chaotic here: the last bits of a sum grow to 1e-4.
    """
    m, state, starts = Market(), torch.zeros(LAYERS, N, HIDDEN, dtype=torch.float64), boundaries("random")
    x, target = (
        torch.stack([m.folded.inputs(obs, m.table) for obs in m.obs]),
        torch.randn(T, N, 8, dtype=torch.float64),
    )

    def loss(logits, values, _):
        return (logits - target).square().mean() + (values - target[..., 0]).square().mean()

    plain, adam = (
        torch.optim.Adam(m.dense.parameters(), lr=1e-4, eps=1e-5),
        torch.optim.Adam(parameter_groups(m.folded, 1e-4), eps=1e-5),
    )
    start = loss(*m.dense.evaluate_sequences(m.windows, state, starts)).item()
    for _ in range(50):
        plain.zero_grad()
        loss(*m.dense.evaluate_sequences(m.windows, state, starts)).backward()
        torch.nn.utils.clip_grad_norm_(m.dense.parameters(), 0.5)
        plain.step()
        adam.zero_grad()
        loss(*m.folded.evaluate_sequences(x, state, starts)).backward()
        clip_gradients(adam.param_groups, 0.5)
        adam.step()
    a, b = m.folded.evaluate_sequences(x, state, starts), m.dense.evaluate_sequences(m.windows, state, starts)
    assert (a[0] - b[0]).norm() / b[0].norm() < 1e-8 and loss(*b).item() < 0.9 * start


# --- what is refused ---


@pytest.mark.parametrize(
    "mistake, says",
    [
        (
            lambda p, x, h, s: p.evaluate_step(x[0, :, :4], h),
            r"x: expected shape \(accounts, inputs\) with 5 inputs, as `inputs` returns them, was \(6, 4\)",
        ),
        (
            lambda p, x, h, s: p.evaluate_step(x, h),
            r"x: expected shape \(accounts, inputs\).*was \(17, 6, 5\)",
        ),
        (
            lambda p, x, h, s: p.evaluate_sequences(x[0], h, s),
            r"x: expected shape \(steps, accounts, inputs\).*was \(6, 5\)",
        ),
        (lambda p, x, h, s: p.evaluate_sequences(x[:0], h, s[:0]), r"x: expected.*was \(0, 6, 5\)"),
        (
            lambda p, x, h, s: p.evaluate_step(x[0], h[:, :5]),
            r"state: expected shape \(layers, accounts, hidden\) = \(2, 6, 12\), was \(2, 5, 12\); "
            "begin with `initial_state`",
        ),
        (lambda p, x, h, s: p.evaluate_sequences(x, h[:1], s), r"state: expected.*was \(1, 6, 12\)"),
        (
            lambda p, x, h, s: p.evaluate_step(x[0], None),
            "state: expected.*was None; begin with `initial_state`",
        ),
        (
            lambda p, x, h, s: p.evaluate_sequences(x, h, s[:5]),
            r"starts: expected bool of shape \(17, 6\), was bool of shape \(5, 6\)",
        ),
        (
            lambda p, x, h, s: p.evaluate_sequences(x, h, s.t()),
            r"starts: expected bool of shape \(17, 6\), was bool of shape \(6, 17\)",
        ),
        (
            lambda p, x, h, s: p.evaluate_sequences(x, h, s.float()),
            r"starts: expected bool of shape \(17, 6\), was float32",
        ),
        (
            lambda p, x, h, s: RecurrentActorCritic(5, 3, hidden_dim=1),
            "hidden_dim: expected a whole number of 2 or more, was 1",
        ),
        (
            lambda p, x, h, s: RecurrentActorCritic(5, 3, n_gru_layers=0),
            "n_gru_layers: expected a whole number of 1 or more, was 0",
        ),
        (
            lambda p, x, h, s: RecurrentActorCritic(5, 3, dropout=1.0),
            "dropout: expected 0 or more and less than 1, was 1.0",
        ),
        (
            lambda p, x, h, s: RecurrentActorCritic(57, 3, layout=input_layout("5.6.0", 20)),
            "obs_dim: expected 20 bars × 58 columns = 1160, was 57",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(mistake, says):
    with pytest.raises(InputError, match=says) as e:
        mistake(policy_of(), *sequences(), boundaries("none"))
    assert "\n" not in str(e.value)
