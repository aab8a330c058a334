"""Parameters: every field is checked, every mistake is one line that names the field,
and text means what a person meant by it."""

import ast
import re
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml

from trading_lib import config as C
from trading_lib.config import (
    InputError,
    Parameters,
    check_notebook_parameters,
    checked,
    load_parameters,
    parse_parameters,
    typed,
)

NAN, INFINITE = float("nan"), float("inf")
REPOSITORY = Path(__file__).parents[2]
NOT_TEXT, NOT_WHOLE, NOT_A_NUMBER, NOT_A_FLAG = (
    [5, 1.5, True, [], {}],
    ["many", 2.5, True, NAN, INFINITE, [1], {}],
    ["much", True, NAN, INFINITE, -INFINITE, [1.0], {}, "nan", ".nan", ".inf"],
    ["maybe", 1, 0, 1.0, []],
)
SHARE, NOT_LESS = [-0.01, 1.01, *NOT_A_NUMBER], [-0.01, *NOT_A_NUMBER]
# section -> field -> values that must be refused
REFUSED = {
    "data": dict(
        source=["alpca", "", 1, None, ["files"]],
        timeframe=[*NOT_TEXT, None],
        start=NOT_TEXT,
        end=NOT_TEXT,
        seed=[*NOT_WHOLE, None],
        edge=[*NOT_LESS, None],
        recipe=["life", None, 1],
        path=[*NOT_TEXT, None],
        timezone=NOT_TEXT,
        labels=["open", None, 1],
        price_scale=[0, -1, *NOT_A_NUMBER],
        columns=["open", [], [1], {}],
        feed=["otc", 5, [], None],
        adjustment=["splits", None, 1],
        cache=[*NOT_TEXT, None],
        asset_classes=["equity", [], 5, True, {"BRK-B": "share"}, {"BRK-B": None}, {"BRK-B": ["equity"]}],
        allow_steps=[
            "maybe",
            5,
            None,
            ["soon"],
            [],
            ["2002-13"],
            {"EARN": "soon"},
            {"EARN": [5]},
            {"EARN": None},
        ],
        train_fraction=[0, 1, 0.85, -0.1, None, *NOT_A_NUMBER],
        validation_fraction=[0, 1, 0.30, -0.1, None, *NOT_A_NUMBER],
    ),
    "features": dict(version=[*NOT_TEXT, None, 5.6], window=[0, -1, None, *NOT_WHOLE]),
    "account": dict(
        initial_account_value=[0, -1, None, *NOT_A_NUMBER],
        safety_buffer_pct=[1, *SHARE],
        base_alloc=[0, *SHARE],
        max_position_pct=[0, *SHARE],
        stop_pct=SHARE,
        target_pct=SHARE,
        allow_short=NOT_A_FLAG,
        costs=["none", None, 0],
        impact_coefficient=NOT_LESS,
        minimum_order=[0, *NOT_LESS],
        size_decimals=[-1, 13, *NOT_WHOLE],
        **dict.fromkeys(("commission_bps", "half_spread_bps", "slippage_bps"), [10_000, *NOT_LESS]),
    ),
    "env": dict(
        episode_length=[1, 0, -1, None, *NOT_WHOLE],
        reward_preset=[*NOT_TEXT, None],
        reward_weights=["much", 1, [], {}, {"pnl": "x"}, {"pnl": NAN}, {"pnl": None}, {5: 1}],
    ),
    "train": dict(
        mode=[*NOT_TEXT, None, "quik_test"],
        seed=[*NOT_WHOLE, None],
        device=[*NOT_TEXT, None],
        hidden_dims=["big", 64, [], [0], [64, -1], [2.5], [True], [INFINITE], {}],
        shared_trunk=NOT_A_FLAG,
        total_timesteps=[0, -1, *NOT_WHOLE],
        n_envs=[0, -1, *NOT_WHOLE],
        n_steps=[0, -1, *NOT_WHOLE],
        minibatch_size=[0, -1, *NOT_WHOLE],
        n_epochs=[0, -1, *NOT_WHOLE],
        learning_rate=[0, -1, *NOT_A_NUMBER],
        **dict.fromkeys(("gamma", "gae_lambda", "warmup_fraction", "min_lr_fraction"), SHARE),
        dropout=[1, -0.01, *NOT_A_NUMBER],
        clip_range=[0, *NOT_LESS],
        entropy_coefficient=NOT_LESS,
        cost_warm_up=SHARE,
        amp=NOT_A_FLAG,
        network=["lstm", 1],
        amp_dtype=["fp8", 16],
        **dict.fromkeys(
            (
                "gru_hidden_dim",
                "n_gru_layers",
                "episodes",
                "iterations",
                "validation_interval",
                "keep_checkpoints",
                "patience",
            ),
            [0, -1, *NOT_WHOLE],
        ),
        critic_epochs=[-1, *NOT_WHOLE],
        checkpoint_interval=[-1, *NOT_WHOLE],
        **dict.fromkeys(
            (
                "critic_learning_rate",
                "value_clip_range",
                "max_grad_norm",
                "target_kl",
                "max_drawdown_threshold",
            ),
            [0, -1, *NOT_A_NUMBER],
        ),
        value_coefficient=NOT_LESS,
        drawdown_penalty_weight=NOT_LESS,
        **dict.fromkeys(
            ("separate_optimizers", "compile", "recovery", "early_stop", "high_vram", "low_vram"), NOT_A_FLAG
        ),
        **dict.fromkeys(("max_vram_gpu0", "max_vram_gpu1"), [0, -1, None, *NOT_A_NUMBER]),
    ),
    "backtest": dict(
        random_policies=[-1, *NOT_WHOLE, None], probes=[*NOT_A_FLAG, None], seed=[*NOT_WHOLE, None]
    ),
    "walk_forward": dict(
        symbols=["SPY", 5, [1], {}, None],
        folds=[0, -1, *NOT_WHOLE, None],
        scheme=["moving", None, 1],
        first_train_fraction=[0, 1, -0.1, None, *NOT_A_NUMBER],
        validation_fraction=[0, 1, None, *NOT_A_NUMBER],
        embargo=[-1, *NOT_WHOLE, None],
        model=NOT_TEXT,
    ),
    "seeds": dict(symbols=["SPY", 5, [1], {}, None], count=[1, 0, -1, *NOT_WHOLE, None]),
    "portfolio": dict(
        **dict.fromkeys(("universes", "walk_forward"), ["core", 5, [1], ["Core"], ["core", "core"], None]),
        own_universes=[["AAPL"], "tech", {"tech": 3}, {"tech": []}, {"Tech": ["AAPL", "MSFT", "NVDA"]}],
        initial_value=[0, -1, None, *NOT_A_NUMBER],
        frictions=["free", None, 1],
        fill=["open", None, 1],
        reward_preset=["profit", None, 1],
        whole_shares=[*NOT_A_FLAG, None],
        delisting_haircut=[-0.1, 1.1, None, *NOT_A_NUMBER],
        **dict.fromkeys(("min_notional", "cash_interest", "drawdown_penalty"), [-1, None, *NOT_A_NUMBER]),
        episode_length=[1, None, *NOT_WHOLE],
        assets=[2, 301, None, *NOT_WHOLE],
        years=[1, 26, None, *NOT_WHOLE],
        planted=[-1, 6, None, *NOT_A_NUMBER],
        random_accounts=[-1, None, *NOT_WHOLE],
    ),
}
MODE = dict(total_timesteps=5, validation_interval=1, checkpoint_interval=0)
REFUSED_OF_A_MODE = dict(
    total_timesteps=[0, -1, None, *NOT_WHOLE],
    validation_interval=[0, -1, None, *NOT_WHOLE],
    checkpoint_interval=[-1, None, *NOT_WHOLE],
)


def refusal(make, *arguments, **named) -> str:
    "The one line that a mistake gets."
    with pytest.raises(InputError) as e:
        make(*arguments, **named)
    assert "\n" not in str(e.value)
    return str(e.value)


def written(folder: Path, text: str) -> Path:
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    return folder / "params.yaml"


# --- every field has a check that can fail ------------------------------------------------------------------


def test_no_field_lacks_a_check():
    "The tables above name every field there is; a new field without values that are refused fails here."
    sections = {f.name: f.default for f in fields(Parameters) if f.name not in ("symbols", "modes")}
    assert {name: {f.name for f in fields(section)} for name, section in sections.items()} == {
        name: set(table) for name, table in REFUSED.items()
    }
    assert {f.name for f in fields(C.ModeParameters)} == set(REFUSED_OF_A_MODE) and all(
        v for table in REFUSED.values() for v in table.values()
    )


@pytest.mark.parametrize(
    "section, name", [(section, name) for section, table in REFUSED.items() for name in table]
)
def test_a_bad_value_is_refused_and_its_field_named(section, name):
    for bad in REFUSED[section][name]:
        message = refusal(parse_parameters, {section: {name: bad}})
        assert message.startswith(f"{section}.{name}: ") or (
            name.endswith("_fraction") and message.startswith("data: train_fraction and validation_fraction")
        ), (bad, message)


@pytest.mark.parametrize("name", REFUSED_OF_A_MODE)
def test_a_bad_value_of_a_mode_is_refused(name):
    for bad in REFUSED_OF_A_MODE[name]:
        assert re.match(
            r"modes(\.own\." + name + ")?: ",
            refusal(parse_parameters, {"modes": {"own": MODE | {name: bad}}}),
        ), bad
    assert "is missing" in refusal(
        parse_parameters, {"modes": {"own": {k: v for k, v in MODE.items() if k != name}}}
    )


def test_what_is_said_of_one_symbol():
    data = parse_parameters(
        yaml.safe_load(
            "data: {asset_classes: {BRK/B: equity}, allow_steps: {EARN: [2002-10-16, '2008-09-15'], "
            "A/B: true, ONE: 2020-03-16}}"
        )
    ).data
    assert (data.asset_class("BRK-B"), data.asset_class("SPY")) == ("equity", None)
    assert [data.steps(s) for s in ("EARN", "A-B", "ONE", "SPY")] == [
        ["2002-10-16", "2008-09-15"],
        True,
        ["2020-03-16"],
        False,
    ]
    assert [
        parse_parameters({"data": {"allow_steps": v}}).data.steps("SPY")
        for v in (True, "true", ["2002-10-16"], "[2002-10-16]")
    ] == [True, True, ["2002-10-16"], ["2002-10-16"]]


def test_the_defaults_pass_their_own_checks():
    assert parse_parameters({}) == Parameters() and Parameters().mode == C.MODES["quick_test"]
    for f in fields(Parameters):
        if f.name not in ("symbols", "modes"):
            assert (
                typed(type(f.default), {g.name: getattr(f.default, g.name) for g in fields(f.default)})
                == f.default
            )
    with pytest.raises(FrozenInstanceError):
        Parameters().train.seed = 1


def test_the_projects_own_file_states_the_defaults_of_the_modes():
    p = load_parameters(REPOSITORY / "params.yaml")
    assert p.modes == C.MODES and p == Parameters()
    by_hand = {
        "quick_test": (10_000_000, 5, 0),
        "standard": (50_000_000, 20, 50),
        "thorough": (100_000_000, 20, 75),
        "production": (200_000_000, 40, 75),
        "extended": (500_000_000, 100, 100),
        "auto": ({"crypto": 100_000_000, "equity": 50_000_000}, 40, 75),
    }
    assert {
        name: (m.total_timesteps, m.validation_interval, m.checkpoint_interval) for name, m in C.MODES.items()
    } == by_hand


def test_params_yaml_lists_every_setting_and_dvc_can_set_each(tmp_path):
    "`dvc exp run -S` refuses a name that is not in the file; what it writes is read as it was meant."
    from dvc.utils.hydra import apply_overrides

    document = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    for f in fields(Parameters):
        if f.name not in ("symbols", "modes"):
            assert set(document[f.name]) == {g.name for g in fields(f.default)}, f.name
    path = written(tmp_path, (REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    given = {
        "symbols": "[ON,NO,1810]",
        "train.learning_rate": "3e-4",
        "train.recovery": "false",
        "train.hidden_dims": "[8,8]",
        "train.mode": "auto",
        "account.max_position_pct": "0.5",
        "account.commission_bps": "0",
        "env.reward_weights": "{pnl:0.5}",
        "train.amp_dtype": "null",
        "data.start": "2023-01-01",
        "train.warmup_fraction": "0.1",
        "walk_forward.symbols": "[NO]",
    }

    def text(value) -> str:
        "As YAML has it."
        if value is None or isinstance(value, bool):
            return {None: "null", True: "true", False: "false"}[value]
        return str(list(value)) if isinstance(value, tuple) else str(value)

    everything = [
        f"{f.name}.{g.name}={text(getattr(f.default, g.name))}"
        for f in fields(Parameters)
        if f.name not in ("symbols", "modes")
        for g in fields(f.default)
    ]
    apply_overrides(path, everything)
    assert load_parameters(path) == Parameters()
    apply_overrides(path, [f"{name}={value}" for name, value in given.items()])
    p = load_parameters(path)
    assert (
        p.symbols == ["ON", "NO", "1810"]
        and p.walk_forward.symbols == ["NO"]
        and p.train.overrides()
        == dict(seed=0, learning_rate=3e-4, recovery=False, hidden_dims=[8, 8], warmup_fraction=0.1)
        and p.data.start == "2023-01-01"
    )
    assert (
        p.account == C.AccountConfig(max_position_pct=0.5, commission_bps=0)
        and p.env.reward_weights == {"pnl": 0.5}
        and (p.mode.steps("crypto"), p.mode.steps("equity")) == (100_000_000, 50_000_000)
    )


# --- types --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Every:
    "One field of each kind."

    whole: int = 1
    number: float = 1.0
    text: str = "a"
    flag: bool = False
    choice: Literal["x", "y", 3] = "x"
    listed: list[int] = field(default_factory=list)
    several: tuple[float, ...] = ()
    table: dict = field(default_factory=dict)
    maybe: int | None = None
    either: int | str = 0


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("whole", 3, 3),
        ("whole", 3.0, 3),
        ("whole", "3", 3),
        ("whole", "1_000", 1000),
        ("whole", -2, -2),
        ("number", 2, 2.0),
        ("number", "2.5", 2.5),
        ("number", "-1", -1.0),
        ("text", "3", "3"),
        ("text", "", ""),
        ("flag", True, True),
        ("flag", "true", True),
        ("flag", "false", False),
        ("choice", "y", "y"),
        ("choice", 3, 3),
        ("listed", [1, 2.0], [1, 2]),
        ("listed", (1, 2), [1, 2]),
        ("listed", "[64, 64]", [64, 64]),
        ("listed", ["64", 32], [64, 32]),
        ("several", [1, "2"], (1.0, 2.0)),
        ("several", "[1, 2.5]", (1.0, 2.5)),
        ("table", {"a": 1}, {"a": 1}),
        ("table", "{a: 1}", {"a": 1}),
        ("maybe", None, None),
        ("maybe", "7", 7),
        ("maybe", "null", None),
        ("either", 4, 4),
        ("either", "four", "four"),
    ],
)
def test_what_fits_is_converted_to_the_declared_type(name, given, expected):
    found = getattr(typed(Every, {name: given}), name)
    assert found == expected and type(found) is type(expected)
    if isinstance(expected, (list, tuple)):
        assert [type(v) for v in found] == [type(v) for v in expected]


@pytest.mark.parametrize(
    "name, given, words",
    [
        ("whole", True, "a whole number, was True"),
        ("whole", "many", "a whole number, was 'many'"),
        ("whole", 1e400, "a whole number, was inf"),
        ("whole", None, "a whole number, was None"),
        ("number", False, "a number, was False"),
        ("number", NAN, "a number, was nan"),
        ("number", INFINITE, "a number, was inf"),
        ("number", ".nan", "a number"),
        ("text", 3, "text, was 3"),
        ("text", True, "text, was True"),
        ("text", None, "text, was None"),
        ("flag", 1, "true or false, was 1"),
        ("flag", "3", "true or false"),
        ("choice", "z", "one of x, y, 3, was 'z'"),
        ("listed", [], r"a list such as \[256, 128\], was \[\]"),
        ("listed", 5, "a list such as"),
        ("listed", "[1, b]", "a list such as"),
        ("listed", "[1", "a list such as"),
        ("several", [NAN], "a list, each a number"),
        ("several", {}, "a list, each a number"),
        ("table", [1], "a table"),
        ("maybe", "x", "a whole number or null, was 'x'"),
        ("either", 1.5, "a whole number or text"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(name, given, words):
    assert re.search(f"^here.{name}: expected {words}", refusal(typed, Every, {name: given}, "here")), given


@pytest.mark.parametrize("text, value", [("3e-4", 3e-4), ("1e-3", 1e-3), ("1E-4", 1e-4), ("5e-05", 5e-5)])
def test_numbers_with_an_exponent_are_numbers(tmp_path, text, value):
    "YAML 1.1 reads 3e-4 as text, YAML 1.2 (DVC's) and people as a number."
    assert (
        load_parameters(written(tmp_path, f"train: {{learning_rate: {text}}}")).train.learning_rate == value
    )
    assert typed(Every, {"number": text}).number == value


def test_whole_numbers_with_an_exponent_are_whole_numbers(tmp_path):
    assert (
        load_parameters(written(tmp_path, "train: {total_timesteps: 1e6}")).train.total_timesteps == 1_000_000
    )
    assert "total_timesteps" in refusal(load_parameters, written(tmp_path, "train: {total_timesteps: 1e-6}"))


def test_dates_are_text_as_they_were_written(tmp_path):
    p = load_parameters(written(tmp_path, "data: {start: 2024-01-01, end: '2024-02-01'}"))
    assert (p.data.start, p.data.end) == ("2024-01-01", "2024-02-01")
    assert (
        load_parameters(written(tmp_path, "data: {start: null}")).data.start is None
        and load_parameters(written(tmp_path, "data:\n  start:\n")).data.start is None
    )


def test_a_required_field_must_be_given():
    @dataclass(frozen=True)
    class Needs:
        n: int
        m: float = 1.0

    assert (
        refusal(typed, Needs, {}) == "Needs.n: is missing; expected a whole number"
        and refusal(typed, Needs, None, "x") == "x.n: is missing; expected a whole number"
    )
    assert (
        typed(Needs, {"n": 2}) == Needs(2)
        and refusal(typed, Needs, [1], "x") == "x: expected a table of names and values, was [1]"
    )


def test_the_dataclass_owns_what_it_holds():
    "A list that was passed in can change afterwards without changing the parameters."
    given = [64, 64]
    p = typed(C.TrainParameters, {"hidden_dims": given})
    given.append(1)
    assert p.hidden_dims == [64, 64]


# --- unknown names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document, message",
    [
        ({"trian": {}}, "params.yaml: unknown name 'trian'; did you mean 'train'?"),
        ({"train": {"hiden_dims": [64]}}, "train: unknown name 'hiden_dims'; did you mean 'hidden_dims'?"),
        (
            {"train": {"mode": "produktion"}},
            "train.mode: unknown name 'produktion'; did you mean 'production'?",
        ),
        ({"modes": {"own": MODE | {"steps": 1}}}, "modes.own: unknown name 'steps'"),
        ({"account": {"stop_ptc": 0.1}}, "account: unknown name 'stop_ptc'; did you mean 'stop_pct'?"),
        ({"features": {"zzzz": 1}}, "features: unknown name 'zzzz'; known: version, window"),
        ({5: {}}, "params.yaml: unknown name '5'; known: "),
        ({"env": {3: 1}}, "env: unknown name '3'; known: episode_length, reward_preset"),
    ],
)
def test_an_unknown_name_gets_the_nearest_known_one(document, message):
    assert refusal(parse_parameters, document).startswith(message)


def test_no_misspelling_of_any_field_is_ignored():
    for section, table in REFUSED.items():
        for name in table:
            wrong = name[:-1] + name[-1] * 2
            assert f"did you mean '{name}'?" in refusal(parse_parameters, {section: {wrong: 1}}), wrong


@pytest.mark.parametrize(
    "document, words",
    [
        ([], "expected sections"),
        (None, "expected sections"),
        ({"train": [1]}, "train: expected a table"),
        ({"train": "fast"}, "train: expected a table"),
        ({"modes": ["own"]}, "modes: expected a table"),
        ({"modes": "own"}, "modes: expected a table"),
        ({"modes": {"own": 5}}, "modes.own: expected a table"),
        ({"modes": {"own": None}}, "modes.own.total_timesteps: is missing"),
        ({"symbols": "BTC-USD"}, "symbols: expected a list"),
        ({"symbols": None}, "symbols: expected a list"),
        ({"symbols": []}, "symbols: expected a list"),
        ({"symbols": [1]}, "symbols: expected a list"),
        ({"symbols": ["BTC/USD"]}, "write 'BTC-USD' for 'BTC/USD'"),
        ({"symbols": [" SPY"]}, "write 'SPY' for ' SPY'"),
        ({"symbols": [""]}, "symbols: "),
        ({"symbols": [".."]}, "symbols: expected a name such as BTC-USD"),
        ({"symbols": ["SPY", "QQQ", "SPY"]}, "'SPY' is listed 2 times"),
    ],
)
def test_a_document_of_the_wrong_shape_is_refused(document, words):
    assert words in refusal(parse_parameters, document)


# what a person writes as a symbol -> words of the line
NO_SYMBOLS = {
    "$SPX": "write 'SPX' for '$SPX'",
    "^GSPC": "write 'GSPC' for '^GSPC'",
    "M&M.NS": "write 'MM.NS' for 'M&M.NS'",
    "EURUSD=X": "write 'EURUSDX'",
    "BRK B": "write 'BRK.B'",
    "-SPY": "write 'SPY' for '-SPY'",
    ".SPX": "write 'SPX'",
    "SPY ": "write 'SPY' for 'SPY '",
    "SPY\n": "write 'SPY'",
    "\uff33\uff30\uff39": "write 'SPY'",
    "A;touch X": "expected a name",
    "SPY,QQQ": "expected a name",
    "SPY;QQQ": "expected a name",
    "GC=F": "write 'GCF'",
    "A|B": "expected a name",
    "x/../../../nbs/report": "expected a name",
    "../x": "expected a name",
    "S\u0420Y": "CYRILLIC CAPITAL LETTER ER",
    "\u0663": "ARABIC-INDIC DIGIT THREE",
    "a" * 41: "at most 40",
    "$(touch X)": "expected a name",
    "`id`": "expected a name",
    "index": "the list of all runs",
    "Index": "the list of all runs",
    "": "expected a name",
    "..": "expected a name",
    "A..B": "expected a name",
    "A\\B": "write 'AB'",
    "--help": "write 'help'",
    "\x1b[31mSPY": "expected a name",
    "SPY\0": "expected a name",
}


@pytest.mark.parametrize("symbol", NO_SYMBOLS)
def test_a_name_that_is_no_symbol_gets_one_line_at_every_door(symbol, tmp_path, monkeypatch, capsys):
    """params.yaml, its lists, the ledger, a notebook's parameter and every command that takes one:
    before anything is written or run."""
    from trading_lib.cli import main
    from trading_lib.ledger import ledger_path
    from trading_lib.pipeline.project import stage_parameters

    for name in ("params.yaml", "settings.ini"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    if symbol and "/" not in symbol:
        said = refusal(C.check_symbol, symbol)
        assert NO_SYMBOLS[symbol] in said and said.isprintable()
    for where in ("symbols", "walk_forward", "seeds"):
        line = refusal(
            parse_parameters, {"symbols": [symbol]} if where == "symbols" else {where: {"symbols": [symbol]}}
        )
        assert line.startswith(f"{where}{'' if where == 'symbols' else '.symbols'}: ")
    assert refusal(ledger_path, tmp_path, symbol).startswith("symbol: ") and refusal(
        stage_parameters, {"symbol": symbol, "out_dir": None}
    ).startswith("symbol: ")
    for command in (
        ["stage", "prepare", f"--symbol={symbol}"],
        *(
            [name, "--", symbol]
            for name in ("train", "seeds", "preflight", "backtest", "deploy", "trials", "history")
        ),
        ["data", "download", "--", symbol],
    ):
        assert main(command) == 2, command
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said, command
    assert sorted(p.name for p in tmp_path.iterdir()) == ["params.yaml", "settings.ini"]


@pytest.mark.parametrize(
    "symbol", ["SPY", "BTC-USD", "BRK.B", "BRK-B", "0700.HK", "1810", "ON", "M6E_F", "a", "A" * 40]
)
def test_names_of_real_markets_are_symbols(symbol):
    assert C.check_symbol(symbol) == symbol and parse_parameters({"symbols": [symbol]}).symbols == [symbol]


def test_symbols_that_differ_in_case_only_are_refused():
    assert "'SPY' and 'spy' differ in case only" in refusal(parse_parameters, {"symbols": ["SPY", "spy"]})


def test_what_is_not_listed_is_refused_and_the_listed_are_named():
    p = parse_parameters({"symbols": ["SPY", "BTC-USD"]})
    assert p.listed("BTC/USD") == "BTC-USD" and p.listed("SPY") == "SPY"
    assert refusal(p.listed, "QQQ", "--symbol") == (
        "--symbol: 'QQQ' is not among the symbols of params.yaml (SPY, BTC-USD); add it there: "
        "symbols: [SPY, BTC-USD, QQQ]"
    )
    assert refusal(p.listed, "spy").endswith("; write SPY")


def test_symbols_may_be_text_and_are_kept_in_order():
    assert parse_parameters({"symbols": "[SPY, BTC-USD]"}).symbols == ["SPY", "BTC-USD"] and parse_parameters(
        {}
    ).symbols == ["SIM-USD"]


def test_modes_of_the_file_are_added_to_the_known_ones_and_replace_them():
    p = parse_parameters(
        {"train": {"mode": "own"}, "modes": {"own": MODE, "standard": MODE | {"total_timesteps": 9}}}
    )
    assert (
        p.mode == C.ModeParameters(**MODE)
        and p.modes["standard"].total_timesteps == 9
        and p.modes["extended"] == C.MODES["extended"]
    )
    assert (
        C.MODES["standard"].total_timesteps == 50_000_000 and "own" not in C.MODES
    )  # the table itself is not touched


def test_overrides_are_what_a_person_has_set():
    assert C.TrainParameters().overrides() == {"seed": 0}
    set_by_hand = dict(
        hidden_dims=[8], amp=False, cost_warm_up=0.0, seed=3
    )  # false and 0 are values, not absences
    assert (
        typed(C.TrainParameters, set_by_hand | {"mode": "standard", "device": "cpu"}).overrides()
        == set_by_hand
    )


# --- checked: the same for constructors ---------------------------------------------------------------------


@checked
@dataclass(frozen=True)
class Strict:
    whole: int = 1
    number: float = 1.0
    flag: bool = True
    widths: tuple[int, ...] = (1,)
    account: C.AccountConfig = C.AccountConfig()


def test_a_checked_constructor_converts_and_replaces():
    account = C.AccountConfig(stop_pct=0)
    s = Strict(whole=2.0, number=3, widths=[4, 5], account=account)
    assert (
        s == Strict(whole=2, number=3.0, widths=(4, 5), account=account)
        and type(s.whole) is int
        and type(s.number) is float
        and s.account is account
    )
    assert replace(s, whole=7).whole == 7 and replace(s, whole=7).account is account
    assert refusal(replace, s, whole="many") == "Strict.whole: expected a whole number, was 'many'"


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(hole=1), "Strict: unknown name 'hole'; did you mean 'whole'?"),
        (dict(whole=1.5), "Strict.whole: expected a whole number, was 1.5"),
        (dict(flag=1), "Strict.flag: expected true or false"),
        (dict(widths=[]), "Strict.widths: expected a list"),
        (dict(number="much"), "Strict.number: expected a number"),
        (dict(account={"stop_pct": 0}), "Strict.account: expected"),
    ],
)
def test_a_checked_constructor_refuses(values, words):
    assert words in refusal(Strict, **values)


@pytest.mark.parametrize(
    "values",
    [
        dict(whole=True),
        dict(number=NAN),
        dict(number=INFINITE),
        dict(number=-INFINITE),
        dict(whole=NAN),
        dict(widths=[True]),
    ],
)
def test_a_checked_constructor_refuses_what_only_looks_like_a_number(values):
    assert refusal(Strict, **values).startswith(f"Strict.{next(iter(values))}: expected")


def test_an_account_of_infinite_value_is_refused():
    assert "initial_account_value" in refusal(
        C.AccountConfig, initial_account_value=INFINITE
    ) and "commission_bps" in refusal(C.AccountConfig, commission_bps=INFINITE)


@pytest.mark.parametrize(
    "text, widths",
    [("512,256,128", [512, 256, 128]), ("[512, 256]", [512, 256]), (" 64 ", [64]), ("64, 32", [64, 32])],
)
def test_widths_from_a_command_line(text, widths):
    assert C.parse_hidden_dims(text) == widths


@pytest.mark.parametrize(
    "text", ["", "big", "64,big", "[64", "64;32", "2.5", "64,,32", "true", "null", "{a: 1}"]
)
def test_bad_widths_from_a_command_line_are_refused(text):
    assert refusal(C.parse_hidden_dims, text).startswith(
        "hidden_dims: expected widths such as 512,256,128, was "
    )


# --- the file -----------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_null_leaves_it(tmp_path):
    path = written(tmp_path, "symbols: [SPY]\ntrain: {mode: standard, seed: 4}\n")
    p = load_parameters(
        path,
        **{
            "train.mode": "thorough",
            "train.seed": None,
            "data.seed": 9,
            "train.hidden_dims": "[8, 8]",
            "symbols": ["QQQ"],
        },
    )
    assert (p.train.mode, p.train.seed, p.data.seed, p.train.hidden_dims, p.symbols) == (
        "thorough",
        4,
        9,
        [8, 8],
        ["QQQ"],
    )
    assert (
        load_parameters(path).train.mode == "standard"
        and path.read_text() == "symbols: [SPY]\ntrain: {mode: standard, seed: 4}\n"
    )
    assert load_parameters(path, **{"modes.own": MODE, "train.mode": "own"}).mode == C.ModeParameters(**MODE)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"train.hiden_dims": [8]}, "did you mean 'hidden_dims'"),
        ({"trian.seed": 1}, "did you mean 'train'"),
        ({"symbols.first": "SPY"}, "symbols: expected a table"),
        ({"train": 5}, "train: expected a table"),
        ({"modes.standard.total_timesteps": 5}, "modes.standard.total_timesteps"),
        ({"train.seed": "x"}, "train.seed: expected a whole number"),
    ],
)
def test_a_bad_override_is_refused(tmp_path, overrides, words):
    assert words in refusal(
        load_parameters, written(tmp_path, "symbols: [SPY]\ntrain: {seed: 4}\n"), **overrides
    )


@pytest.mark.parametrize(
    "entry, symbol",
    [
        ("ON", "ON"),
        ("NO", "NO"),
        ("Y", "Y"),
        ("off", "off"),
        ("1810", "1810"),
        ("'0700'", "0700"),
        ("'TRUE'", "TRUE"),
        ('"null"', "null"),
        ("2024-01-01", "2024-01-01"),
        ("1e5x", "1e5x"),
    ],
)
def test_symbols_are_text_as_they_were_written(tmp_path, entry, symbol):
    for text in (f"symbols: [{entry}]", f"symbols:\n- {entry}\n", f"symbols:\n  - {entry} # a ticker"):
        assert load_parameters(written(tmp_path, text)).symbols == [symbol]
    assert load_parameters(
        written(tmp_path, f"symbols: [{entry}]\nwalk_forward: {{symbols: [{entry}]}}")
    ).walk_forward.symbols == [symbol]


@pytest.mark.parametrize(
    "entry", ["0700", "TRUE", "true", "null", "~", "0x1F", "0o17", "1e5", "1_000", "+5", ".5", ".inf"]
)
def test_a_symbol_that_yaml_and_dvc_change_must_be_quoted(tmp_path, entry):
    for section in ("symbols: [%s]", "symbols: [SPY]\nseeds: {symbols: [%s]}"):
        assert f"write '{entry}', in quotes" in refusal(load_parameters, written(tmp_path, section % entry))


@pytest.mark.parametrize(
    "text, value",
    [
        ("seed: 010", 10),
        ("seed: 0x10", 16),
        ("seed: 0o17", 15),
        ("seed: 1_000", 1000),
        ("total_timesteps: 1E3", 1000),
    ],
)
def test_whole_numbers_are_those_of_yaml_1_2(tmp_path, text, value):
    assert (
        getattr(load_parameters(written(tmp_path, f"train: {{{text}}}")).train, text.split(":")[0]) == value
    )


# what is wrong with the file -> its text, words of the line
FILES = {
    "a key twice": (
        "train: {seed: 1}\ndata: {}\ntrain: {seed: 2}\n",
        "params.yaml: 'train' is there twice, in line 1 and in line 3; keep one",
    ),
    "a key twice in a section": (
        "train:\n  seed: 1\n  mode: standard\n  seed: 2\n",
        "'seed' is there twice, in line 2 and in line 4",
    ),
    "a tab": (
        "train:\n\tseed: 1\n",
        (
            "line 2, column 1: while scanning for the next token found character '\\t' that cannot start "
            "any token; indent with blanks, not with tabs"
        ),
    ),
    "billions of laughs": (
        "x0: &x0 [a, b]\n"
        + "".join(f"x{i}: &x{i} [{', '.join(9 * [f'*x{i - 1}'])}]\n" for i in range(1, 30)),
        "holds more than 20,000 values when its anchors are expanded",
    ),
    "an anchor in itself": ("train: &t {seed: *t}\n", "is nested more than 30 levels"),
    "an anchor that is not there": ("train: *nothing\n", "undefined alias 'nothing'"),
    "deep lists": ("train: {hidden_dims: " + "[" * 5_000, "is nested more than 30 levels"),
    "deep tables": ("train: " + "{a: " * 40 + "1" + "}" * 40, "is nested more than 30 levels"),
    "an object": ("train: !!python/object/apply:os.system [id]\n", "could not determine a constructor"),
    "two documents": ("train: {}\n---\ntrain: {}\n", "expected a single document"),
    "a bracket too few": ("symbols: [SPY\ntrain: {}\n", "is not valid YAML: line "),
    "a control character": ("train: {mode: \x07}\n", "is not valid YAML: "),
    "a list as a key": ("? [a]\n: 1\n", "is not valid YAML: "),
    "a number without end": ("train: {seed: " + "9" * 5000 + "}\n", "is not valid YAML: line 1"),
    "a huge number": ("train: {seed: " + "9" * 30 + "}\n", "train.seed: expected a whole number"),
    "a flood of text": ("train: {mode: " + "a" * 10_000 + "}\n", "train.mode: unknown name"),
    "sixty minutes": ("train: {seed: 1:30}\n", "train.seed: expected a whole number, was '1:30'"),
    "a list where a table is": ("- SPY\n", "expected sections such as data"),
    "a word": ("SPY\n", "expected sections such as data"),
    "false": ("false\n", "expected sections such as data"),
    "a length that is a path": (
        "data: {timeframe: ../../x}\n",
        "data.timeframe: expected a length such as 15Min",
    ),
    "UTF-16": ("train: {seed: 1}\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "Latin-1": (
        "# one\n# caf\u00e9\ntrain: {seed: 1}\n".encode("latin-1"),
        "is not UTF-8 (line 2); save it as UTF-8",
    ),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 99, "save it as UTF-8"),
    "half a megabyte": ("# " + "x" * 500_000, "expected at most 262,144 of parameters"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_wrong_gets_one_line_quickly(tmp_path, name):
    import time

    text, words = FILES[name]
    (tmp_path / "params.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.process_time()
    line = refusal(load_parameters, tmp_path / "params.yaml")
    assert words in line and len(line) < 500 and time.process_time() - began < 10, line


def test_a_folder_that_is_gone_gets_one_line(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "has been removed" in refusal(load_parameters)


def test_a_file_that_is_no_file_gets_one_line(tmp_path):
    assert "is a folder" in refusal(load_parameters, tmp_path) and "no such file" in refusal(
        load_parameters, tmp_path / "no.yaml"
    )


def test_a_byte_order_mark_anchors_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "params.yaml").write_bytes(
        b"\xef\xbb\xbftrain: &t {seed: 3}\r\n"
        b"modes:\r\n"
        b"  own: &o {total_timesteps: 5, validation_interval: 1, checkpoint_interval: 0}\r\n"
        b"  two: {<<: *o, total_timesteps: 6}\r\n"
    )
    p = load_parameters(tmp_path / "params.yaml")
    assert p.train.seed == 3 and p.modes["two"] == C.ModeParameters(6, 1, 0)


def test_another_file_can_be_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(C.PARAMETERS_VARIABLE, str(written(tmp_path, "symbols: [QQQ]")))
    assert load_parameters().symbols == ["QQQ"] and C.parameters_path() == tmp_path / "params.yaml"


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    from trading_lib.pipeline.prepare import source_options
    from trading_lib.pipeline.project import artefacts

    monkeypatch.setenv("HOME", str(tmp_path))
    p = parse_parameters({"data": {"path": "~/bars", "cache": "~/cache"}})
    options = source_options(p, "SPY")
    assert (options["path"], options["cache"]) == (f"{tmp_path}/bars", f"{tmp_path}/cache") and artefacts(
        p, "SIM-USD", "~/out"
    ).root == tmp_path / "out"
    assert "no such home folder" in refusal(C.home_path, "~nobody-of-that-name/x")


@pytest.mark.parametrize(
    "given, meant",
    [
        ("false", False),
        ("no", False),
        ("False", False),
        ("off", False),
        (False, False),
        ("true", True),
        ("yes", True),
        (True, True),
        (None, None),
        ("null", None),
    ],
)
def test_a_notebooks_own_parameters_are_typed(given, meant):
    from trading_lib.pipeline.project import stage_parameters

    namespace = {"symbol": "SIM-USD", "out_dir": None, "resume": given}
    stage_parameters(namespace, resume=None)
    assert namespace["resume"] is meant
    assert refusal(
        stage_parameters, {"symbol": "SIM-USD", "out_dir": None, "resume": "maybe"}, resume=None
    ).startswith("resume: expected true or false")
    assert (
        refusal(stage_parameters, {"symbol": ["SIM-USD"], "out_dir": None}).startswith(
            "symbol: expected text"
        )
        and refusal(stage_parameters, {"symbol": None, "out_dir": 5})
        == "out_dir: expected text or null, was 5"
    )
    assert "train.seed: expected a whole number" in refusal(
        stage_parameters, {"symbol": None, "out_dir": None, "seed": "many"}, seed="train.seed"
    )


def test_a_symbol_that_papermill_takes_for_a_number_is_text(tmp_path, monkeypatch):
    from trading_lib.pipeline.project import stage_parameters

    written(tmp_path, "symbols: [1810]\ndata: {source: files}")
    (tmp_path / "settings.ini").write_bytes((REPOSITORY / "settings.ini").read_bytes())
    monkeypatch.chdir(tmp_path)
    for given in (1810, "1810", None):
        assert stage_parameters({"symbol": given, "out_dir": None})[1] == "1810"


def test_an_empty_file_and_an_empty_section_are_the_defaults(tmp_path):
    for text in ("", "# nothing\n", "train:\ndata: {}\nmodes:\n"):
        assert load_parameters(written(tmp_path, text)) == Parameters(), text


def test_an_empty_section_can_be_overridden(tmp_path):
    assert load_parameters(written(tmp_path, "data:\n"), **{"data.seed": 1}).data.seed == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", "params.yaml: is not valid YAML"),
        ("- a\n- b\n", "expected sections"),
        ("just text", "expected sections"),
        ("train: {mode: !!python/object:os.system x}", "is not valid YAML"),
        ("\ttrain: 1", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_parameters_file_is_refused(tmp_path, text, words):
    assert words in refusal(load_parameters, written(tmp_path, text))


def test_a_list_for_a_file_is_refused_with_an_override_too(tmp_path):
    assert "expected sections" in refusal(load_parameters, written(tmp_path, "- a\n"), **{"train.seed": 1})


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert str(tmp_path / "none.yaml") in refusal(load_parameters, tmp_path / "none.yaml")
    assert str(tmp_path) in refusal(load_parameters, tmp_path)


def test_the_project_is_found_from_any_folder_inside(tmp_path, monkeypatch):
    inner = tmp_path / "project" / "nbs" / "deep"
    inner.mkdir(parents=True)
    assert "no params.yaml beside a settings.ini" in refusal(C.project_root, inner)
    written(tmp_path / "project", "train: {seed: 8}")
    assert "no params.yaml" in refusal(C.project_root, inner)  # a params.yaml alone is somebody else's
    (tmp_path / "project" / "settings.ini").touch()
    assert (
        C.project_root(inner) == C.project_root(str(tmp_path / "project")) == (tmp_path / "project").resolve()
    )
    monkeypatch.chdir(inner)
    assert load_parameters().train.seed == 8 and load_parameters(**{"train.seed": 9}).train.seed == 9


def test_text_from_papermill_means_the_same_as_the_file(tmp_path):
    "Every value of the project's own file, handed over as text by dotted name, gives the same parameters."
    document = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    as_text = {
        f"{section}.{name}": str(value).lower() if value is None or isinstance(value, bool) else str(value)
        for section, table in document.items()
        if section not in ("symbols", "modes")
        for name, value in table.items()
    }
    as_text = {name: value for name, value in as_text.items() if value != "none"}
    assert len(as_text) > 12 and load_parameters(written(tmp_path, ""), **as_text) == load_parameters(
        REPOSITORY / "params.yaml"
    )


# --- under papermill ----------------------------------------------------------------------------------------


def test_a_notebook_parameter_that_nobody_knows_is_refused():
    known = ["mode", "hidden_dims"]
    namespace = {
        "mode": "standard",
        "hidden_dims": None,
        "Path": Path,
        "check": check_notebook_parameters,
        "_private": 1,
        "__name__": "__main__",
        "In": [""],
        "Out": {},
        "yaml": yaml,
    }
    assert check_notebook_parameters(namespace, known) == {"mode": "standard", "hidden_dims": None}
    for value in ("x", 1, 1.5, True, None, [64], {"a": 1}, (1,)):
        assert (
            refusal(check_notebook_parameters, namespace | {"hiden_dims": value}, known)
            == "notebook parameters: unknown name 'hiden_dims'; did you mean 'hidden_dims'?"
        ), value
    assert (
        refusal(check_notebook_parameters, {"mode": 1}, known)
        == "notebook parameters: 'hidden_dims' is missing from the parameters cell"
    )


def test_an_error_in_a_notebook_is_one_line():
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    assert InputError("train: what to do")._render_traceback_() == [
        "InputError: train: what to do"
    ] and issubclass(InputError, ValueError)
    shown, shell = [], InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    shell._showtraceback = lambda kind, error, lines: shown.extend(lines)
    shell.run_cell(
        "from trading_lib.config import InputError\nraise InputError('train: what to do')",
        store_history=False,
    )
    assert shown == ["InputError: train: what to do"]


@pytest.mark.slow
def test_errors_for_people_are_known_by_their_names():
    "An error of a notebook's process is known to who started it by its name alone."
    derived = {"InputError"}
    for path in (REPOSITORY / "trading_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & derived:
                derived.add(node.name)
    assert derived == set(C.FOR_PEOPLE)
