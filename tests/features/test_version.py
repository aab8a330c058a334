"""The version protocol: one table, one decoder, no silent mismatch."""

import warnings

import numpy as np
import pytest
import torch

from trading_lib import version as V
from trading_lib.config import FeatureParameters, InputError
from trading_lib.market.layouts import LAYOUTS

# typed from the specification, on purpose not derived from the code: version -> features, actions, inputs,
# lowest trader
RELEASED = {
    "2.3.0": (53, 3, 5300, "2.3.0"),
    "2.4.0": (56, 3, 5600, "2.4.0"),
    "2.5.0": (56, 3, 5600, "2.4.0"),
    "2.6.0": (56, 3, 5600, "2.4.0"),
    "2.7.0": (59, 7, 5900, "2.7.0"),
    "5.3.0": (65, 8, 6500, "5.3.0"),
    "5.5.0": (51, 8, 5100, "5.5.0"),
    "5.6.0": (58, 8, 5800, "5.6.0"),
}
LEGACY = [(0, 0.0, "HOLD"), (1, 0.5, "BUY"), (-1, 0.5, "SELL")]
SIZED = [
    (0, 0.0, "HOLD"),
    (1, 0.25, "BUY_25%"),
    (1, 0.5, "BUY_50%"),
    (1, 0.75, "BUY_75%"),
    (-1, 0.25, "SELL_25%"),
    (-1, 0.5, "SELL_50%"),
    (-1, 0.75, "SELL_75%"),
]
MEANINGS = {3: LEGACY, 7: SIZED, 8: [*SIZED, (0, 1.0, "CLOSE")]}


def policy(inputs, actions, names=("trunk.0", "trunk.2", "actor_head", "critic_head"), **fields):
    "A checkpoint with weights of these shapes."
    shapes = [(12, inputs), (6, 12), (actions, 6), (1, 6)]
    state = {}
    for name, shape in zip(names, shapes):
        state |= {f"{name}.weight": torch.zeros(shape), f"{name}.bias": torch.zeros(shape[0])}
    return {"policy_state_dict": state, **fields}


def test_released_versions_are_those_of_the_specification():
    assert {
        v: (s.n_features, s.n_actions, s.obs_dim, V.MODEL_TRADER_COMPATIBILITY[v])
        for v, s in V.MODEL_SPECS.items()
    } == RELEASED
    assert (
        V.CURRENT_MODEL_VERSION,
        V.CURRENT_TRADER_VERSION,
        FeatureParameters().version,
        FeatureParameters().window,
    ) == ("5.6.0", "5.6.0", "5.6.0", 100)
    for v, s in V.MODEL_SPECS.items():
        assert s.action_meanings == {i: name for i, (_, _, name) in enumerate(MEANINGS[RELEASED[v][1]])}


@pytest.mark.parametrize("version", RELEASED)
def test_every_version_is_complete(version):
    assert V.missing_parts(version) == []


@pytest.mark.parametrize(
    "table, part",
    [
        ("LAYOUTS", "layout"),
        ("MODEL_SPECS", "spec"),
        ("MODEL_TRADER_COMPATIBILITY", "compatibility row"),
        ("RELEASE_NOTES", "notes"),
    ],
)
def test_a_missing_part_is_named(monkeypatch, table, part):
    monkeypatch.setattr(
        V, table, {k: v for k, v in getattr(V, table).items() if k != V.CURRENT_MODEL_VERSION}
    )
    assert V.missing_parts() == [part]


def test_every_layout_is_a_version_and_every_new_one_collides_with_none():
    assert set(LAYOUTS) == set(V.MODEL_SPECS)
    shapes = [
        (s.n_features, s.n_actions) for v, s in V.MODEL_SPECS.items() if v not in ("2.4.0", "2.5.0")
    ]  # these share 2.6.0's
    assert len(set(shapes)) == len(shapes)


def test_versions_compare_as_numbers():
    assert sorted(["2.10.0", "2.9.0", "10.0.0", "2.9.10"], key=V.parse_version) == [
        "2.9.0",
        "2.9.10",
        "2.10.0",
        "10.0.0",
    ]
    for bad in ("", "5.6.x", "v5", "5.6.0.1", 5.6, None):
        with pytest.raises(InputError, match="version: expected three numbers"):
            V.parse_version(bad)


@pytest.mark.parametrize("version", RELEASED)
def test_decoder_over_all_versions_and_actions(version):
    spec, expected = V.MODEL_SPECS[version], MEANINGS[RELEASED[version][1]]
    direction, size, is_close = V.action_table(spec)
    for i, meaning in enumerate(expected):
        for form in (i, np.int64(i), torch.tensor(i)):
            assert V.interpret_action(form, spec) == meaning
        assert (direction[i], size[i], is_close[i]) == (meaning[0], meaning[1], meaning[2] == "CLOSE")
        if "BUY" in meaning[2]:
            assert direction[i] > 0  # BUY was once read as SELL
        if "SELL" in meaning[2]:
            assert direction[i] < 0
    for bad in (len(expected), -1, 1.0, "1", None, True, torch.tensor(1.0), torch.tensor([1, 2])):
        with pytest.raises(InputError, match=f"from 0 to {len(expected) - 1}"):
            V.interpret_action(bad, spec)


def test_close_is_not_hold():
    hold, close = V.interpret_action(0, "5.6.0"), V.interpret_action(7, "5.6.0")
    assert hold == (0, 0.0, "HOLD") and close == (0, 1.0, "CLOSE")


def test_unknown_version_of_a_spec_names_the_nearest():
    with pytest.raises(InputError, match="did you mean '5.6.0'"):
        V.interpret_action(0, "5.6.1")


# --- detection
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs, actions, version",
    [(5900, 7, "2.7.0"), (5300, 3, "2.3.0"), (6500, 8, "5.3.0"), (5100, 8, "5.5.0"), (5800, 8, "5.6.0")],
)
def test_detection_from_structure(inputs, actions, version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert V.detect_version_from_checkpoint(policy(inputs, actions)) == (version, V.MODEL_SPECS[version])


def test_ambiguous_structure_warns():
    with pytest.warns(UserWarning, match="fit 2.4.0, 2.5.0, 2.6.0: taken as 2.6.0"):
        assert V.detect_version_from_checkpoint(policy(5600, 3))[0] == "2.6.0"


@pytest.mark.parametrize(
    "names",
    [
        ("actor_trunk.0", "actor_trunk.2", "actor_head", "critic_head"),
        ("module.trunk.0", "module.trunk.2", "module.actor_head", "module.critic_head"),
        ("_orig_mod.trunk.0", "_orig_mod.trunk.2", "_orig_mod.actor_head", "_orig_mod.critic_head"),
        ("shared.0", "shared.2", "actor", "critic"),
        ("features.0", "features.2", "policy", "value"),
        ("0", "2", "4", "5"),
        ("pi.0", "pi.1", "pi.2", "vf.2"),
    ],
)
def test_detection_under_other_names(names):
    assert V.detect_version_from_checkpoint(policy(5900, 7, names))[0] == "2.7.0"


@pytest.mark.parametrize(
    "ours",
    [("actor_trunk.0", "actor_trunk.2", "actor_head", "extra"), ("actor.0", "actor.2", "actor.4", "extra")],
)
def test_detection_does_not_mistake_the_critic(ours):
    before, after = (
        {f"{prefix}.0.weight": torch.zeros(12, 777), f"{prefix}.2.weight": torch.zeros(8, 12)}
        for prefix in ("critic_trunk", "value_net")
    )
    assert V.policy_widths(
        {"policy_state_dict": before | policy(5900, 7, ours)["policy_state_dict"] | after}
    ) == (5900, 7)


@pytest.mark.parametrize("shared", [True, False])
def test_detection_of_the_real_network(shared):
    networks = pytest.importorskip("trading_lib.networks")
    state = networks.NativeActorCritic(5800, 8, (16, 8), shared_trunk=shared).state_dict()
    assert V.policy_widths({"policy_state_dict": state}) == (5800, 8)


def test_explicit_version_comes_first():
    for fields in (
        {"model_version": "2.4.0"},
        {"version": "2.4.0"},
        {"metadata": {"model_version": "2.4.0"}},
        {"version_metadata": {"model_version": "2.4.0"}},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert V.detect_version_from_checkpoint(policy(5600, 3, **fields))[0] == "2.4.0"


@pytest.mark.parametrize(
    "checkpoint, words",
    [
        (policy(5800, 7), ["5800 inputs & 7 actions", "5800 & 8 (5.6.0)", "5600 & 3 (2.4.0/2.5.0/2.6.0)"]),
        (policy(6400, 8), ["6400 inputs & 8 actions"]),
        ({}, ["neither model_version nor matrices"]),
        ({"policy_state_dict": {}}, ["neither"]),
        (policy(5800, 8, model_version="6.0.0"), ["6.0.0 is newer", "update"]),
        (policy(5800, 8, model_version="5.10.0"), ["newer"]),
        (policy(5800, 8, model_version="5.4.0"), ["unknown model version 5.4.0", "5.5.0"]),
        (policy(5800, 8, model_version="banana"), ["'banana'"]),
        ([1], ["expected a dictionary"]),
    ],
)
def test_what_cannot_be_detected_is_an_error_with_words(checkpoint, words):
    with pytest.raises(InputError) as e:
        V.detect_version_from_checkpoint(checkpoint)
    for word in words:
        assert word in str(e.value)
    assert "\n" not in str(e.value)


# --- compatibility
# -------------------------------------------------------------------------------------------------


def current(**fields):
    return policy(5800, 8, **{**V.get_checkpoint_metadata(), **fields})


def test_current_model_passes_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for strict in (False, True):
            assert V.assert_compatibility(current(), strict) == V.MODEL_SPECS["5.6.0"]


@pytest.mark.parametrize("version", [v for v in RELEASED if v != "5.6.0"])
def test_old_models_warn_or_raise(version):
    old = policy(RELEASED[version][2], RELEASED[version][1], **V.get_checkpoint_metadata(version))
    with pytest.warns(UserWarning, match=f"{version} differs from the current 5.6.0"):
        assert V.assert_compatibility(old) == V.MODEL_SPECS[version]
    with pytest.raises(InputError, match="differs from the current"):
        V.assert_compatibility(old, strict=True)


@pytest.mark.filterwarnings("ignore:checkpoint. model version")
def test_legacy_checkpoints_warn_or_raise():
    for legacy, version in (
        (policy(5900, 7), "2.7.0"),
        (policy(5600, 3), "2.6.0"),
        (policy(5800, 8), "5.6.0"),
    ):
        with pytest.warns(UserWarning, match="has no model_version"):
            assert V.assert_compatibility(legacy).version == version
        with pytest.raises(InputError, match="has no model_version"):
            V.assert_compatibility(legacy, strict=True)


def test_a_trader_that_is_too_old(monkeypatch):
    monkeypatch.setattr(V, "CURRENT_TRADER_VERSION", "5.5.0")
    with pytest.warns(UserWarning, match="needs trader 5.6.0 or newer"):
        V.assert_compatibility(current())
    with pytest.raises(InputError, match="needs trader"):
        V.assert_compatibility(current(), strict=True)


COLUMNS = list(LAYOUTS["5.6.0"].columns)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "checkpoint",
    [
        policy(5900, 8, **V.get_checkpoint_metadata()),
        policy(5800, 7, **V.get_checkpoint_metadata()),
        current(n_features=59),
        current(n_actions=7),
        current(obs_dim=5900),
        current(obs_dim=5801),
        current(action_meanings={0: "HOLD", 1: "SELL_25%"}),
        current(feature_columns=[*COLUMNS[1::-1], *COLUMNS[2:]]),
        current(feature_columns=COLUMNS[:-1]),
        current(layout_hash="0" * 64),
        current(model_version="2.7.0"),
    ],
    ids=[
        "inputs",
        "outputs",
        "n_features",
        "n_actions",
        "obs_dim",
        "obs_dim no multiple",
        "actions",
        "columns swapped",
        "column missing",
        "layout hash",
        "wrong version",
    ],
)
def test_what_would_give_wrong_numbers_always_raises(checkpoint, strict):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError):
            V.assert_compatibility(checkpoint, strict)


def test_swapped_columns_are_named():
    with pytest.raises(InputError, match=f"first at column 0: {COLUMNS[1]} instead of {COLUMNS[0]}"):
        V.assert_compatibility(current(feature_columns=[*COLUMNS[1::-1], *COLUMNS[2:]]))


def test_another_window_is_declared_and_served():
    checkpoint = policy(50 * 58, 8, **V.get_checkpoint_metadata(window=50))
    assert V.assert_compatibility(checkpoint, strict=True).obs_dim == 2900


def test_metadata_has_what_a_trader_needs():
    m = V.get_checkpoint_metadata()
    assert (m["model_version"], m["n_features"], m["n_actions"], m["obs_dim"], m["min_trader_version"]) == (
        "5.6.0",
        58,
        8,
        5800,
        "5.6.0",
    )
    assert m["action_meanings"][7] == "CLOSE" and m["feature_columns"] == COLUMNS
    with pytest.raises(InputError, match="did you mean"):
        V.get_checkpoint_metadata("5.6.1")
