"""The card of a checkpoint:
it names every number that it must, follows the content, and no text from elsewhere breaks it."""

import copy
import functools
import hashlib
import re
import shlex
from dataclasses import asdict

import numpy as np
import pytest
import torch

from trading_lib import cli
from trading_lib.checkpoint import flat_facts, inspect_checkpoint, load_checkpoint, save_checkpoint
from trading_lib.config import InputError
from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, market_data
from trading_lib.features import fit_features
from trading_lib.pipeline.model_card import model_card, write_model_card
from trading_lib.sources import simulate_bars
from trading_lib.trainer import NativePPOConfig, NativePPOTrainer

COMMAND = "trading-lib train SIM-USD --mode quick_test --hidden-dims 16,8 --seed 3"


@functools.cache
def trained() -> dict:
    "The best policy of a run of 7 updates that validates after 2, 4, 6 and 7."
    bars = simulate_bars(
        "SIM-USD", "15Min", "2023-01-01", "2023-03-01", seed=1, edge=0.2, asset_class="crypto"
    )
    market = market_data(
        bars,
        "5.6.0",
        fit_features(bars[:4000], "5.6.0", "15Min", "crypto"),
        "15Min",
        "crypto",
        symbol="SIM-USD",
    )
    config = NativePPOConfig(
        hidden_dims=(16, 8),
        n_steps=16,
        minibatch_size=64,
        n_epochs=1,
        total_timesteps=7 * 8 * 16 - 5,
        learning_rate=2.5e-4,
        validation_interval=2,
        seed=3,
    )
    trainer = NativePPOTrainer(
        GPUVectorizedTradingEnv(
            market.span(0, 4000),
            GPUEnvConfig(n_envs=8, version="5.6.0", episode_length=24, reward_preset="equity"),
        ),
        config,
        market.span(4000, 5000),
        progress=None,
    )
    trainer.train()
    assert trainer.updates == 7 and [v["update"] for v in trainer.validations] == [
        2,
        4,
        6,
        7,
    ]  # what the card must count
    return trainer.best | {"last": trainer.content()}


@pytest.fixture
def content() -> dict:
    content = copy.deepcopy({name: v for name, v in trained().items() if name != "last"})
    content["data"] |= {"source": "simulated", "edge": 0.2, "seed": 1, "recipe": "lifelike"}
    content["git"] = {"commit": "5e8b2116ceadc135725a9269c8605fea8471c149", "dirty": False}
    return content


def set_in(content: dict, path: str, value) -> dict:
    "A copy with one entry changed."
    content = copy.deepcopy(content)
    *outer, last = path.split("/")
    place = content
    for name in outer:
        place = place[name]
    place[last] = value
    return content


# --- read by somebody else's parser -------------------------------------------------------------------------


def parsed(card: str):
    """Sections, as an independent implementation of CommonMark and GitHub's tables reads them:
    title -> (text, tables, code); a cell is its literal text."""
    MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt

    def literal(token):
        return "".join(
            child.content if child.type == "text" else f"<{child.type}>" for child in token.children
        )

    sections, title, tokens, row = (
        {},
        None,
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card),
        None,
    )
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            title = literal(tokens[i + 1])
            sections[title] = ([], [], [])
        elif token.type == "table_open":
            sections[title][1].append([])
        elif token.type == "tr_open":
            sections[title][1][-1].append(row := [])
        elif token.type in ("th_open", "td_open"):
            row.append(literal(tokens[i + 1]))
        elif token.type == "fence":
            sections[title][2].append((token.info, token.content))
        elif token.type == "html_block":
            pytest.fail(f"HTML: {token.content}")
        elif token.type == "inline" and tokens[i - 1].type == "paragraph_open":
            sections[title][0].append(literal(token))
    return sections


def rows(card: str, section: str) -> dict[str, str]:
    "The rows of a section's table."
    ((header, *body),) = parsed(card)[section][1]
    assert all(len(row) == 2 for row in [header, *body])
    assert len({name for name, _ in body}) == len(body)
    return dict(body)


SECTIONS = [
    "SIM-USD 15Min: a PPO policy, of a simulated market",
    "Command",
    "Budget",
    "Network",
    "Data",
    "Results on the validation span",
    "Parameters",
    "Made with",
    "How to use it",
    "Limits",
]


# --- every number -------------------------------------------------------------------------------------------


def test_sections_and_the_sentence(content):
    sections = parsed(model_card(content, COMMAND))
    assert list(sections) == SECTIONS
    (sentence,) = sections[SECTIONS[0]][0]
    assert sentence == (
        "A policy trained with PPO to trade SIM-USD 15Min bars, for the observation layout 5.6.0: "
        "5,800 inputs, 8 actions, 93,033 parameters, "
        f"after update {content['update']} of 7."
    )
    assert sections["Command"][2] == [("sh", COMMAND + "\n")]


def test_budget_by_hand(content):
    """8 accounts × 16 bars are 128 steps; 891 steps need 7 updates;
    validation looks at 2, 4, 6 and, because it is the last, at 7."""
    for update, looks in ((0, 0), (1, 0), (2, 1), (3, 1), (6, 3), (7, 4)):
        content |= {"update": update, "global_step": 128 * update}
        assert rows(model_card(content, COMMAND), "Budget") == {
            "environment steps": f"{128 * update} of 891",
            "updates": f"{update} of 7",
            "validations": f"{looks} of 4",
        }


def test_network_against_the_weights(content, tmp_path):
    "5,800 × 16 + 16, 16 × 8 + 8, 8 × 8 + 8 and 8 + 1 are 93,033."
    found, digest = rows(model_card(content, COMMAND), "Network"), hashlib.sha256()
    assert (
        found["inputs"] == "5,800"
        and found["actions"].startswith("8: HOLD, BUY_25%, ")
        and found["parameters"] == "93,033" == f"{5800 * 16 + 16 + 16 * 8 + 8 + 8 * 8 + 8 + 8 + 1:,}"
    )
    assert (
        found["parameters"]
        == f"{inspect_checkpoint(save_checkpoint(content, tmp_path / 'm.pt'))['parameters']:,}"
    )
    assert [v for n, v in found.items() if n.startswith("weights of")] == [
        "5,800 → 16",
        "16 → 8",
        "8 → 8",
        "8 → 1",
    ]
    for name in sorted(content["policy_state_dict"]):
        tensor = content["policy_state_dict"][name]
        digest.update(
            f"{name} torch.float32 {list(tensor.shape)}\n".encode()
            + np.ascontiguousarray(tensor.numpy()).tobytes()
        )
    assert found["SHA-256 of the weights"] == digest.hexdigest()


def test_every_parameter_is_there_with_its_value(content):
    table = rows(model_card(content, COMMAND), "Parameters")
    config = content["config"]
    assert (
        list(table) == list(flat_facts(config))
        and {f"train.{name}" for name in asdict(NativePPOConfig())} <= table.keys()
        and "env.account.stop_pct" in table
    )

    def words(v):
        if v is None or isinstance(v, bool):
            return {None: "null", True: "true", False: "false"}[v]
        return str(list(v)) if isinstance(v, (list, tuple)) else str(v)

    assert table == {name: words(v) for name, v in flat_facts(config).items()}
    assert (
        table["train.learning_rate"],
        table["train.hidden_dims"],
        table["train.target_kl"],
        table["env.account.costs"],
    ) == ("0.00025", "[16, 8]", "null", "broker")


def test_data_results_and_origin(content):
    card, data = model_card(content, COMMAND), content["data"]
    assert rows(card, "Data") == {
        "symbol": "SIM-USD",
        "timeframe": "15Min",
        "asset class": "crypto",
        "source": "simulated market (recipe lifelike, edge 0.2, seed 1)",
        "bars": "5,664",
        "span of the bars": "2023-01-01 00:00Z to 2023-02-28 23:45Z",
        "SHA-256 of the bars": data["sha256"],
        "training span": "2023-01-01T00:00:00Z to 2023-02-11T15:45:00Z",
        "validation span": "2023-02-11T16:00:00Z to 2023-02-22T01:45:00Z",
    }
    assert rows(card, "Results on the validation span") == {
        name: f"{v:.6g}" if isinstance(v, float) else str(v)
        for name, v in flat_facts(content["metrics"]).items()
    }
    assert {"validation.sharpe", "validation.max_drawdown", "validation.trades", "validation_score"} <= rows(
        card, "Results on the validation span"
    ).keys()
    assert rows(card, "Made with") == {"git commit": "5e8b2116ceadc135725a9269c8605fea8471c149"} | {
        name: v or "not recorded" for name, v in content["libraries"].items()
    }


def test_changes_to_the_code_are_confessed(content):
    def made(git):
        return rows(model_card(content | {"git": git}, COMMAND), "Made with")["git commit"]

    assert (
        made({"commit": "abc", "dirty": True}) == "abc, with uncommitted changes"
        and made({"commit": None, "dirty": None}) == made({}) == made(None) == "not recorded"
    )


@pytest.mark.parametrize(
    "source, row, limit",
    [
        (
            {"source": None},
            "not recorded",
            "nothing here says anything about any real market",
        ),  # it is called SIM-USD
        (
            {"source": None, "symbol": "BTC-USD"},
            "not recorded",
            "Whether its bars are simulated or real is not recorded.",
        ),
        (
            {
                "source": "alpaca",
                "feed": "sip",
                "adjustment": "split",
                "edge": None,
                "seed": None,
                "recipe": None,
            },
            "real market, from alpaca (feed sip, adjustment split)",
            "One span of one market",
        ),
        (
            {"source": "files", "edge": None, "seed": None, "recipe": None},
            "simulated market, by the name of its bars, from files",
            "nothing here says anything about any real market",
        ),
        (
            {"source": "simulated", "edge": 0, "seed": None, "recipe": None},
            "simulated market (edge 0)",
            "nothing here says anything about any real market",
        ),
    ],
)
def test_simulated_or_real(content, source, row, limit):
    content["data"] |= source
    card = model_card(content, COMMAND)
    assert rows(card, "Data")["source"] == row and limit in card.partition("## Limits")[2]
    assert ("of a simulated market" in card.partition("\n")[0]) == limit.startswith("nothing here")


# --- limits -------------------------------------------------------------------------------------------------


def limits(content) -> list[str]:
    return parsed(model_card(content, COMMAND))["Limits"][0]


def test_limits_say_among_how_many_it_was_chosen(content):
    said = limits(content | {"update": 4})
    assert said[0].startswith(
        "Validation chose it, on one span, among the checkpoints of its run: 2 looked at up to this "
        "one, 4 in the whole run."
    )
    assert said[1] == "It is the policy of update 4 of 7, not of the end of the run." and len(said) == 5
    assert any("other markets and other timeframes were not tested" in line for line in said) and any(
        "with the cost preset broker; no order of it was ever filled by a broker" in line for line in said
    )
    assert len(limits(content | {"update": 7})) == 4
    assert "how many is not recorded" in limits(set_in(content, "config/train/validation_interval", None))[0]


def test_a_checkpoint_without_validation_claims_none():
    last = trained()["last"]
    card = model_card(last, COMMAND)
    assert (
        parsed(card)["Results on the validation span"][0] == ["None: this checkpoint was not validated."]
        and limits(last)[0]
        == "No validation figures belong to this checkpoint: validation did not choose it."
    )
    assert "| updates | 7 of 7 |" in card


# --- it follows the content, and nothing else ---------------------------------------------------------------

CHANGES = {
    "global_step": 5,
    "update": 1,
    "model_version": "5.5.0",
    "policy_n_actions": 3,
    "policy_obs_dim": 99,
    "config/train/learning_rate": 1e-5,
    "config/train/seed": 9,
    "config/train/total_timesteps": 1000,
    "config/env/episode_length": 11,
    "config/env/account/commission_bps": 3.5,
    "data/symbol": "SIMA",
    "data/timeframe": "1Hour",
    "data/sha256": "0" * 64,
    "data/bars": 17,
    "data/end": "2030-01-01",
    "data/spans/train/last": "2022-01-01",
    "data/spans/validation/first": "2022-01-01",
    "data/source": "files",
    "metrics/validation/sharpe": -1.25,
    "metrics/validation_score": 0.5,
    "git/commit": "f" * 40,
    "git/dirty": True,
    "libraries/torch": "1.0",
    "action_meanings": {0: "WAIT"},
}


@pytest.mark.parametrize("path", CHANGES)
def test_the_card_changes_with_the_content(content, path):
    assert model_card(content, COMMAND) != model_card(set_in(content, path, CHANGES[path]), COMMAND)


def test_one_bit_of_one_weight_changes_the_card(content):
    before, name = model_card(content, COMMAND), "actor_head.bias"
    content["policy_state_dict"][name] = torch.nextafter(
        content["policy_state_dict"][name], torch.tensor(1.0)
    )
    assert model_card(content, COMMAND) != before


def test_the_same_content_makes_the_same_card_elsewhere_and_later(content, tmp_path, monkeypatch):
    card = model_card(content, COMMAND, "m.pt")
    monkeypatch.chdir(tmp_path)
    assert model_card(load_checkpoint(save_checkpoint(content, tmp_path / "m.pt")), COMMAND, "m.pt") == card
    for folder in ("a", "b"):
        assert (
            write_model_card(tmp_path / folder / "m.pt", content, COMMAND).read_text(encoding="utf-8") == card
        )
    assert (
        str(tmp_path) not in card
        and not re.search(r"(?<![\w.])/[a-z]+/", card)
        and re.search(r"\b(20[3-9]\d|2026)-\d\d", card) is None
    )  # figures and hashes hold any digits


def test_the_card_lies_beside_its_checkpoint(content, tmp_path):
    for name, card in (
        ("SIM-USD_15Min.pt", "SIM-USD_15Min.md"),
        ("BRK.B_1Day.pt", "BRK.B_1Day.md"),
        ("best_000040.pt", "best_000040.md"),
    ):
        written = write_model_card(str(tmp_path / name), content, COMMAND)
        assert (
            written == tmp_path / card
            and f"trading-lib backtest SIM-USD --model {name}\n" in written.read_text(encoding="utf-8")
        )
    with pytest.raises(InputError, match="is the name of a card; expected that of its checkpoint"):
        write_model_card(tmp_path / "m.md", content, COMMAND)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_commands_it_recommends_exist(content, tmp_path, capsys):
    ((language, block),) = parsed(model_card(content, COMMAND, "it's a model.pt"))["How to use it"][2]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert language == "sh" and commands == [
        ["trading-lib", "inspect", "it's a model.pt"],
        ["trading-lib", "backtest", "SIM-USD", "--model", "it's a model.pt"],
        ["trading-lib", "trials", "SIM-USD"],
    ]
    for _, name, *arguments in commands:
        with pytest.raises(SystemExit) as e:
            cli.main([name, *arguments, "--help"])
        assert e.value.code == 0
    save_checkpoint(content, path := tmp_path / "it's a model.pt")
    assert cli.main(["inspect", str(path)]) == 0 and "SIM-USD" in capsys.readouterr().out


# --- text from elsewhere ------------------------------------------------------------------------------------

HOSTILE = [
    "A|B",
    "A\\|B",
    "A\\",
    "`A|B`",
    "``",
    "**A** __B__ *C* _d_",
    "A\n| x | y |\n# title",
    "<script>alert(1)</script>",
    "<!-- A",
    "&lt;",
    "[A](http://example.org)",
    "![A](http://example.org/a.png)",
    "[A][b]",
    "<http://a.b>",
    "~~A~~",
    "A\r\n\r\nB",
    "a_b_c",
    "| --- | --- |",
    "A\u202eB",
    "\tA",
    "# A",
    "- A",
    "```\nA",
    "$x$",
    "S&P 500",
    "日本 é",
]


def literal(text: str) -> str:
    "What a reader should see: one line, without what cannot be seen."
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_elsewhere_is_shown_and_does_nothing(content, text):
    def shape(card):
        return [
            (len(texts), [[len(row) for row in table] for table in tables], len(code))
            for texts, tables, code in parsed(card).values()
        ]

    plain, expected = shape(model_card(content, COMMAND)), literal(text)
    hostile = content | {
        "data": content["data"] | {"symbol": text, "timeframe": text, "source": text},
        "libraries": content["libraries"] | {"torch": text},
        "model_version": text,
    }
    hostile["config"] = content["config"] | {text: text}
    hostile["metrics"] = content["metrics"] | {"note": text}
    card = model_card(hostile, COMMAND, text + ".pt")
    found = parsed(card)
    # a configuration and a figure more, and nothing else
    plain[5][1][0].append(2)
    plain[6][1][0].append(2)
    assert (
        shape(card) == plain
        and list(found)[1:] == SECTIONS[1:]
        and list(found)[0] == f"{expected} {expected}: a PPO policy"
    )
    assert (
        rows(card, "Data")["symbol"]
        == rows(card, "Data")["timeframe"]
        == rows(card, "Made with")["torch"]
        == rows(card, "Parameters")[expected]
        == rows(card, "Results on the validation span")["note"]
        == expected
    )
    assert (
        rows(card, "Data")["source"] == f"real market, from {expected} (recipe lifelike, edge 0.2, seed 1)"
        and f"to trade {expected} {expected} bars, for the observation layout {expected}:"
        in found[list(found)[0]][0][0]
    )


@pytest.mark.parametrize(
    "command",
    [
        "echo ```; rm -rf ~",
        "a\n```\n# title\n````sh\nb",
        "x | y > z",
        "trading-lib train 'A B' --note \"<b>\"",
    ],
)
def test_the_command_is_shown_exactly(content, command):
    sections = parsed(model_card(content, command))
    assert list(sections) == SECTIONS and sections["Command"][2] == [("sh", command + "\n")]


# --- what is missing ----------------------------------------------------------------------------------------


def test_nothing_at_all_still_makes_a_card():
    card = model_card({}, "python train.py")
    found = parsed(card)
    assert list(found)[0] == "a PPO policy" and list(found)[1:] == SECTIONS[1:]
    assert rows(card, "Budget") == {
        "environment steps": "not recorded",
        "updates": "not recorded",
        "validations": "not recorded",
    }
    assert found["Parameters"][0] == ["Not recorded."] and found["Limits"][0] == [
        "No validation figures belong to this checkpoint: validation did not choose it."
    ]


def test_an_environment_that_is_no_market():
    "CartPole: 4 inputs, 2 actions; no symbol, no data, nothing to backtest."
    content = {
        "policy_state_dict": {
            "trunk.0.weight": torch.zeros(8, 4),
            "trunk.0.bias": torch.zeros(8),
            "actor_head.weight": torch.zeros(2, 8),
            "critic_head.weight": torch.zeros(1, 8),
        },
        "policy_obs_dim": 4,
        "policy_n_actions": 2,
        "global_step": 2048,
        "update": 4,
        "config": {"train": asdict(NativePPOConfig(total_timesteps=10_000))},
        "metrics": {},
        "git": {"commit": None, "dirty": None},
        "libraries": {"torch": "2.13.0"},
    }
    card = model_card(content, "python cartpole.py")
    found = parsed(card)
    assert found["a PPO policy"][0] == [
        "A policy trained with PPO: 4 inputs, 2 actions, 64 parameters, after update 4 of 20."
    ]  # 512 steps each; 8 × 4 + 8 + 2 × 8 + 8
    assert (
        found["Data"][0] == ["The environment was no market; there is no data to record."]
        and "backtest" not in card
    )
