"""The repository as a whole: floors, a core that stands on torch and numpy, notebooks and code that agree,
stages that declare what they use."""

import ast
import asyncio
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from configparser import ConfigParser
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from trading_lib import config
from trading_lib.config import MODES, Parameters, TrainParameters, load_parameters
from trading_lib.pipeline.settings import notebook_settings

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "trading_lib"
SYMBOL_STAGES = ("prepare", "train", "backtest", "report", "walk_forward", "seeds")
UNIVERSE_STAGES = ("portfolio_prepare", "portfolio_train", "portfolio_backtest", "portfolio_report")
STAGES = SYMBOL_STAGES + UNIVERSE_STAGES
HELPERS = {
    "find": "trading-lib data find",
    "verdict": "trading-lib verdict",
}  # stages of DVC that are no notebooks -> their commands
CORE = {
    "parameters.errors",
    "parameters.documents",
    "parameters.fields",
    "parameters.symbols",
    "parameters.portfolio_sections",
    "parameters.sections",
    "parameters.train_sections",
    "config",
    "files",
    "market.layouts",
    "policy.weight_shapes",
    "version",
    "measures.equity",
    "measures.luck",
    "metrics",
    "market.rules",
    "market.trade_costs",
    "account",
    "market.market_data",
    "market.observations",
    "market.rewards",
    "market.step",
    "market.tensor_interface",
    "market.episodes",
    "market.bounds",
    "env",
    "policy.cache",
    "kernels.cpp",
    "kernels.cpp_loss",
    "kernels.cpp_library",
    "kernels.cpu",
    "kernels.layers",
    "networks",
    "checkpoint",
    "training.run_folder",
    "pipeline.stopping",
    "policy.archive",
    "policy.content",
    "policy.folding",
    "policy.multilayer",
    "policy.optimizer_state",
    "policy.recurrent",
    "policy.factory",
    "policy.stacked",
    "portfolio.panel",
    "portfolio.regimes",
    "portfolio.market",
    "portfolio.account",
    "portfolio.day_step",
    "portfolio.replay",
    "portfolio_env",
    "training.portfolio_validation",
    "training.policy_runner",
    "training.rollout",
    "training.optimizers",
    "training.update",
    "training.checkpoint_content",
    "training.run_state",
    "training.distributed",
    "training.progress",
    "training.validation",
    "training.memory",
    "training.ppo",
    "training.hardware",
    "training.settings",
    "training.budget",
    "training.sizes",
    "training.describe",
    "training.config",
    "trainer",
    "seeds",
    "market.regimes",
    "market.segments",
    "market.feature_blocks",
    "features",
}
BIN = Path(sys.executable).parent


def notebooks():
    return sorted(
        p
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts)
    )


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def code(path):
    return "\n".join(re.sub(r"(?m)^\s*[%!].*$", "", source(c)) for c in cells(path))


def floors() -> dict[str, int]:
    "Module -> floor: chapters in the order of their numbers, and in each its notebooks."
    numbered = sorted((ROOT / "nbs").glob("[0-9][0-9]_*/[0-9][0-9]_*.ipynb"))
    names = [re.search(r"(?m)^#\|\s*default_exp\s+([\w.]+)", code(p)) for p in numbered]
    return {m[1]: floor for floor, m in enumerate(names) if m}


def imported(tree: ast.AST, module: str = "config") -> set[str]:
    """Full names of imported modules, at any depth;
    in a module at the top `.bars` is read as trading_lib.bars."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = ["trading_lib", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def ours(names: set[str], known) -> set[str]:
    "Modules of this package among the names."
    return {n.removeprefix("trading_lib.") for n in names} & set(known)


def at_top_level(tree: ast.Module) -> ast.Module:
    "The tree without the bodies of functions: what runs when the module is imported."

    class Without(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return ast.Pass()

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    return Without().visit(ast.parse(ast.unparse(tree)))


MODULES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts): ast.parse(p.read_text(encoding="utf-8"))
    for p in sorted(PACKAGE.rglob("*.py"))
    if p.stem not in ("__init__", "_modidx")
}
SYMBOL_DVC, UNIVERSE_DVC = (
    yaml.safe_load((ROOT / folder / "dvc.yaml").read_text())["stages"] for folder in (".", "portfolio")
)
DVC = SYMBOL_DVC | UNIVERSE_DVC
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


def read_ini(path=ROOT / "settings.ini"):
    ini = ConfigParser(delimiters=["="])
    ini.read(path, encoding="utf-8")
    return ini["DEFAULT"]


# --- floors -------------------------------------------------------------------------------------------------


def test_every_module_has_one_notebook():
    names = [m[1] for p in notebooks() if (m := re.search(r"(?m)^#\|\s*default_exp\s+([\w.]+)", code(p)))]
    assert sorted(names) == sorted(MODULES) and sorted(floors()) == sorted(
        MODULES
    )  # none twice, and only numbered notebooks export


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_lower_floors_only(name):
    floor = floors()
    below = {other for other in floor if floor[other] < floor[name]}
    assert ours(imported(MODULES[name], name), MODULES) <= below, (
        "imports from its own or a higher floor, perhaps lazily"
    )


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_stands_on_torch_and_numpy(name):
    used = imported(at_top_level(MODULES[name]), name)
    assert ours(used, MODULES) <= CORE
    others = {n.split(".")[0] for n in used} - set(sys.stdlib_module_names) - {"trading_lib"}
    assert others <= {"torch", "numpy"}


def test_the_two_import_readers_tell_lazy_from_top_level():
    tree = ast.parse(
        "import a.b\n"
        "from .bars import x\n"
        "from . import env\n"
        "if 1:\n"
        "    import c\n"
        "def f():\n"
        "    from trading_lib.report import y\n"
        "    import d\n"
        "class K:\n"
        "    import e\n"
        "    g = lambda: __import__('z')"
    )
    known = {"bars", "env", "report", "data.bars"}
    assert ours(imported(tree), known) == {"bars", "env", "report"} and {"a.b", "c", "d", "e"} <= imported(
        tree
    )
    assert ours(imported(at_top_level(tree)), known) == {"bars", "env"} and imported(
        at_top_level(tree)
    ) & set("acde") == {"c", "e"}
    assert ours(imported(tree, "data.cache"), known) == {"data.bars", "report"}


# --- where only torch and numpy are installed ---------------------------------------------------------------


def _closure(names) -> set[str]:
    "Installed distributions that these need, themselves included."
    done, todo = set(), [canonicalize_name(n) for n in names]
    while todo:
        name = todo.pop()
        if name in done:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        done.add(name)
        todo += [
            canonicalize_name(r.name)
            for r in map(Requirement, needs)
            if r.marker is None or r.marker.evaluate({"extra": ""})
        ]
    return done


@pytest.fixture(scope="module")
def bare_site(tmp_path_factory) -> Path:
    """A folder that stands for site-packages: links to torch, numpy and what torch itself needs;
    nothing else can be found there."""
    site = tmp_path_factory.mktemp("site")
    for name in _closure(["torch", "numpy"]):
        files = importlib.metadata.distribution(name).files
        for top in {f.parts[0] for f in files if f.parts[0] not in ("..", "__pycache__")}:
            place = Path(importlib.metadata.distribution(name).locate_file(top))
            if place.exists() and not (site / top).exists():
                (site / top).symlink_to(place)
    (site / "trading_lib").symlink_to(PACKAGE)
    return site


def in_bare_site(site: Path, folder: Path, script: str, *arguments) -> subprocess.CompletedProcess:
    "Run a script without the site module, so that no other package is on the path."
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_trainer_can_be_imported_where_only_torch_and_numpy_are(bare_site, tmp_path):
    done = in_bare_site(bare_site, tmp_path, "import trading_lib.trainer")
    assert done.returncode == 0, done.stderr
    missing = in_bare_site(
        bare_site, tmp_path, "import trading_lib.bars"
    )  # the place is as bare as it claims
    assert missing.returncode != 0 and "No module named 'pandas'" in missing.stderr


@pytest.mark.slow
def test_training_and_saving_need_torch_and_numpy_only(bare_site, tmp_path):
    from trading_lib.env import market_data, split_bounds
    from trading_lib.features import fit_features
    from trading_lib.sources import simulate_bars

    bars = simulate_bars("SIM-USD", "15Min", "2023-01-01", "2023-01-13", seed=0, edge=0.2)
    spans = split_bounds(len(bars), 0.7, 0.3)
    fit = fit_features(bars.iloc[: spans["train"][1]], "5.6.0", "15Min", "crypto")
    market_data(bars, "5.6.0", fit, "15Min", "crypto", symbol="SIM-USD").save(tmp_path / "market.npz")
    done = in_bare_site(
        bare_site,
        tmp_path,
        """
        import sys
        from importlib.util import find_spec
        absent = "pandas yaml talib exchange_calendars pyarrow matplotlib papermill dvc alpaca nbdev"
        assert not any(map(find_spec, absent.split()))
        from trading_lib.checkpoint import inspect_checkpoint, load_checkpoint
        from trading_lib.env import GPUEnvConfig, GPUVectorizedTradingEnv, MarketData
        from trading_lib.trainer import NativePPOTrainer, get_auto_config
        market, cut = MarketData.load("market.npz"), int(sys.argv[1])
        config = get_auto_config(
            training_mode="quick_test", device="cpu", hidden_dims=[8],
            n_envs=4, n_steps=16, total_timesteps=128
        )
        env_config = GPUEnvConfig(
            n_envs=4, version="5.6.0", timeframe="15Min", asset_class="crypto", episode_length=64
        )
        env = GPUVectorizedTradingEnv(market.span(0, cut), env_config, device="cpu")
        trainer = NativePPOTrainer(env, config, market.span(cut, len(market.timestamp)), progress=None)
        rows = trainer.train(max_updates=2)
        trainer.save("model.pt")
        assert load_checkpoint("model.pt")["update"] == 2 == len(rows)
        assert inspect_checkpoint("model.pt")["hidden_dims"] == [8]
        assert all(abs(r["validation_sharpe"]) < 1e6 for r in rows)
        print("trained", sorted({m.partition(".")[0] for m in sys.modules} & {"pandas", "yaml"}))
    """,
        spans["train"][1],
    )
    assert (done.returncode, done.stdout) == (0, "trained []\n"), done.stderr


# --- notebooks and exported code ----------------------------------------------------------------------------


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob(pattern))
        if ".ipynb_checkpoints" not in p.parts
    }


@pytest.mark.slow
def test_exported_code_and_clean_notebooks_are_what_the_tools_write(tmp_path):
    for name in ("nbs", "trading_lib"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for module in (tmp_path / "trading_lib").rglob("*.py"):
        if module.name not in ("__init__.py", "_modidx.py"):
            module.unlink()  # all of it must come from the notebooks
    for tool in ("nbdev_export", "nbdev_clean"):
        subprocess.run([BIN / tool], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    for folder, pattern in (("trading_lib", "*.py"), ("nbs", "*.ipynb")):
        here, made = contents(ROOT / folder, pattern), contents(tmp_path / folder, pattern)
        assert [name for name in here.keys() | made.keys() if here.get(name) != made.get(name)] == [], (
            f"run nbdev_export and nbdev_clean: {folder} differs"
        )


def names_made_twice(tree: ast.Module) -> set[str]:
    "Names that a module gives to two things, so that the second takes the place of the first."
    made = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for node in tree.body:
        if isinstance(node, ast.Assign):
            made += [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return {name for name in made if made.count(name) > 1}


@pytest.mark.parametrize("name", MODULES)
def test_a_name_means_one_thing_in_a_module(name):
    assert names_made_twice(ast.parse("a = 1\ndef b(): pass\na, c = 2, 3")) == {"a"}
    assert names_made_twice(MODULES[name]) == set()


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_notebooks_are_saved_without_results(path):
    for cell in cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        assert set(cell["metadata"]) <= {"tags"}


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_notebooks_open_with_a_title_and_one_line(path):
    opening = source(json.loads(path.read_text())["cells"][0])
    assert re.match(r"# \S[^\n]*\n\n> \S", opening)


def test_a_notebook_has_the_title_of_its_module():
    modules = {p: re.search(r"(?m)^#\|\s*default_exp\s+([\w.]+)", code(p)) for p in notebooks()}
    titles = {p: source(cells(p, "markdown")[0]).splitlines()[0] for p, m in modules.items() if m}
    assert [p.stem for p, title in titles.items() if title != "# " + modules[p][1].split(".")[-1]] == []


def dead_links(text: str, folder: Path) -> list[str]:
    "Relative links and named notebooks of a Markdown text that are not there."
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text)
    links = [link for link in links if not re.match(r"\w+:", link)]
    named = re.findall(r"(?<![\w./])nbs/[\w./-]+\.ipynb", text)
    return [link for link in links if not (folder / link).exists()] + [
        name for name in named if not (ROOT / name).exists()
    ]


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_links_and_paths_of_notebooks_exist(path):
    dead = [link for cell in cells(path, "markdown") for link in dead_links(source(cell), path.parent)]
    named = re.findall(r"(?<![\w./])nbs/[\w./-]+\.ipynb", "\n".join(map(source, cells(path))))
    assert dead + [name for name in named if not (ROOT / name).exists()] == []


def test_a_dead_link_is_seen():
    text = "[a](env.ipynb#steps), [b](https://x.y/z), [c](07_env.ipynb), `nbs/train.ipynb`, nbs/none.ipynb"
    assert dead_links(text, ROOT / "nbs" / "03_env") == ["env.ipynb", "nbs/none.ipynb"]


def parameters_cell(stage: str) -> dict:
    "name -> value of the cell tagged `parameters`."
    tagged = [
        c for c in cells(ROOT / "nbs" / f"{stage}.ipynb") if "parameters" in c["metadata"].get("tags", [])
    ]
    assert len(tagged) == 1
    body = ast.parse(source(tagged[0])).body
    assert all(
        isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name) for s in body
    )
    return {s.targets[0].id: ast.literal_eval(s.value) for s in body}  # a name or a call is no literal


def test_the_stages_are_the_notebooks_without_a_number():
    from trading_lib.pipeline.stages import STAGES as declared

    assert (
        {p.stem for p in (ROOT / "nbs").glob("*.ipynb") if not p.stem[0].isdigit()}
        == set(STAGES)
        == set(declared)
        == set(DVC) - set(HELPERS)
    )


@pytest.mark.parametrize("stage", STAGES)
def test_stage_notebooks_have_one_cell_of_literal_parameters(stage):
    given, name = parameters_cell(stage), "universe" if stage in UNIVERSE_STAGES else "symbol"
    assert set(given) >= {name, "out_dir"} and all(
        v is None for v in given.values()
    )  # params.yaml is the one place for values
    calls = [
        n
        for n in ast.walk(ast.parse(code(ROOT / "nbs" / f"{stage}.ipynb")))
        if isinstance(n, ast.Call)
        and getattr(n.func, "id", "") in ("stage_parameters", "universe_parameters")
    ]
    assert len(calls) == 1
    declared = notebook_settings(stage)
    dotted = {k.arg: ast.literal_eval(k.value) for k in calls[0].keywords if k.arg} | declared
    assert bool(declared) == any(k.arg is None for k in calls[0].keywords)
    assert set(given) == {name, "out_dir", *dotted}
    for dotted_name in filter(None, dotted.values()):
        assert dotted_name.split(".")[1] in field_names(section_class(dotted_name.split(".")[0])), dotted_name


# --- stages and parameters ----------------------------------------------------------------------------------


def section_class(name: str):
    return type(getattr(Parameters(), name))


def field_names(cls) -> set[str]:
    return {f.name for f in fields(cls)}


def import_closure(stage: str) -> set[str]:
    """Modules that a stage's notebook imports, directly or through others, lazily or not;
    `find` goes by the rule that is in own_files."""
    found, todo = (
        set(),
        {"data.user_files"}
        if stage == "find"
        else ours(imported(ast.parse(code(ROOT / "nbs" / f"{stage}.ipynb"))), MODULES),
    )
    while todo:
        found.add(name := todo.pop())
        todo |= ours(imported(MODULES[name], name), MODULES) - found
    return found


def declared(stage: str, what: str) -> list[str]:
    return [
        next(iter(entry)) if isinstance(entry, dict) else entry for entry in DVC[stage]["do"].get(what, [])
    ]


def uncovered(stage: str, deps: list[str]) -> set[str]:
    "Modules that a stage can lead to, and none of its dependencies holds."
    covered = [Path(d) for d in deps]
    files = {Path("trading_lib", *name.split(".")).with_suffix(".py") for name in import_closure(stage)}
    return {str(file) for file in files if not any(file.is_relative_to(place) for place in covered)}


@pytest.mark.parametrize("stage", [*STAGES, "find"])
def test_what_a_stage_declares_covers_what_it_imports(stage):
    deps = declared(stage, "deps")
    assert len(deps) == len(set(deps))
    assert stage == "find" or f"nbs/{stage}.ipynb" in deps
    assert [d for d in deps if d.startswith("trading_lib") and not (ROOT / d).exists()] == []
    assert uncovered(stage, deps) == set()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "walk_forward", "seeds", "portfolio_train"])
def test_each_dependency_of_a_training_is_needed_and_its_absence_is_noticed(stage):
    deps = declared(stage, "deps")
    for taken_out in (d for d in deps if d.startswith("trading_lib")):
        assert uncovered(stage, [d for d in deps if d != taken_out]), taken_out


@pytest.mark.parametrize("stage", ["train", "walk_forward", "seeds", "portfolio_train"])
def test_what_downloads_bars_makes_no_training_stale(stage):
    deps = [Path(d) for d in declared(stage, "deps")]
    for file in ("data/alpaca.py", "data/cache.py", "data/user_files.py", "sources.py", "cli.py"):
        assert not any(Path("trading_lib", file).is_relative_to(place) for place in deps), file
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 160


def test_a_symbols_own_file_is_found_by_its_rule_and_never_kept_in_the_cache():
    (place,) = DVC["find"]["do"]["outs"]
    assert (
        set(place) <= set(declared("prepare", "deps"))
        and list(place.values()) == [{"cache": False, "persist": True}]
        and not any("data.path" in d for d in declared("prepare", "deps"))
    )


def made_for(stage: str) -> str:
    "How the names of files begin that a stage makes."
    return "portfolio_${item}" if stage in UNIVERSE_STAGES else "${item}_${data.timeframe}"


def test_tables_of_experiments_hold_a_handful_of_figures():
    from trading_lib.pipeline.project import _COMPARED

    for stage in STAGES:
        assert declared(stage, "metrics") == (
            [] if stage.endswith("prepare") else [f"reports/{made_for(stage)}/compared/{stage}.json"]
        )
    for stages in (SYMBOL_STAGES, UNIVERSE_STAGES):
        names = [name for stage in stages for name in _COMPARED.get(stage, ((), ()))[1]]
        assert len(names) == len(set(names))
        compared = [s for s in stages if s.endswith(("train", "backtest", "report"))]
        assert sum(len(_COMPARED[stage][1]) for stage in compared) <= 10


def test_stages_are_chained_by_their_files():
    made = {stage: set(declared(stage, "outs")) for stage in STAGES}
    needs = {stage: set(declared(stage, "deps")) for stage in STAGES}
    figures = {
        p
        for p in declared("backtest", "outs") + declared("backtest", "plots")
        if p.endswith((".csv", ".json"))
    }
    assert set(declared("verdict", "deps")) <= made["report"] and list(SYMBOL_DVC)[-1] == "verdict", (
        "the last to run, so that it holds what all others made"
    )
    assert (
        needs["train"] & made["prepare"]
        and needs["backtest"] & made["train"]
        and needs["backtest"] & made["prepare"]
        and needs["report"] & made["backtest"]
        and figures <= needs["report"]
        and needs["walk_forward"] & made["prepare"]
        and needs["seeds"] & made["prepare"]
        and needs["portfolio_train"] & made["portfolio_prepare"]
        and needs["portfolio_backtest"] >= made["portfolio_prepare"] & needs["portfolio_train"]
        and needs["portfolio_backtest"] & made["portfolio_train"]
        and needs["portfolio_report"] >= made["portfolio_backtest"]
    )
    assert "ledger" in needs["portfolio_report"]
    assert "ledger" in needs["report"] and not any(
        "ledger" in path for stage in STAGES for path in made[stage]
    ), "what was tried is an input, and nobody's output"
    assert (ROOT / "ledger" / "README.md").exists(), (
        "git knows no empty folders, and a dependency that is not there ends `dvc repro`"
    )
    assert "ledger/index.jsonl" in (ROOT / ".dvcignore").read_text().splitlines(), (
        "what reports write does not make other reports stale"
    )
    for stage in ("walk_forward", "seeds"):
        assert list(SYMBOL_DVC).index(stage) < list(SYMBOL_DVC).index("report"), (
            "the report reads the ledger that it adds to; stages that do not depend on each other "
            "run in the order of the file"
        )
    for stage in STAGES:
        lists = {"walk_forward": "walk_forward.symbols", "seeds": "seeds.symbols"}
        lists |= dict.fromkeys(UNIVERSE_STAGES, "portfolio.universes")
        assert (
            DVC[stage]["foreach"] == "${" + lists.get(stage, "symbols") + "}"
        )  # the list itself is no parameter of a stage, so a new symbol leaves the others alone
        assert not any(p.split(".")[0] == "symbols" for p in declared(stage, "params"))
        for file in made[stage] | set(declared(stage, "metrics")) | set(declared(stage, "plots")):
            assert made_for(stage) in file


def declared_parameters(stage: str) -> list[str]:
    return [
        re.sub(r"\$\{([\w.]+)\}", lambda m: str(looked_up(m[1])), name) for name in declared(stage, "params")
    ]


def looked_up(dotted: str):
    value = PARAMS
    for key in dotted.split("."):
        value = value[key]
    return value


@pytest.mark.parametrize("stage", DVC)
def test_no_text_from_params_yaml_reaches_a_shell(stage):
    """DVC names the stage, and with it the symbol, in the environment;
    quotes around a symbol could be broken out of."""
    assert (
        DVC[stage]["do"]["cmd"] == f"PATH=.venv/bin:$PATH {HELPERS.get(stage, f'trading-lib stage {stage}')}"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_declared_parameters_exist(stage):
    for name in declared_parameters(stage):
        assert looked_up(name) is not Ellipsis


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_parameters_its_notebook_reads(stage):
    tree, names = ast.parse(code(ROOT / "nbs" / f"{stage}.ipynb")), declared_parameters(stage)
    read = {
        m[1]
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and (m := re.match(r"parameters\.(\w+(?:\.\w+)?)$", ast.unparse(n)))
    }
    called = {
        m[1]
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and (m := re.match(r"parameters\.(\w+)\.\w+\(", ast.unparse(n)))
    }  # a method reads its whole section
    read = {
        name
        for name in read
        if name.split(".")[0] not in called and not any(other.startswith(name + ".") for other in read)
    } | called
    for name in read:
        assert any(
            (name + ".").startswith(d + ".") or (name == "modes" and d.startswith("modes.")) for d in names
        ), f"{name} is read but not declared"


def test_params_yaml_is_valid_and_its_modes_are_the_projects():
    parameters = load_parameters(ROOT / "params.yaml")
    assert (
        PARAMS["modes"] == {name: asdict(mode) for name, mode in MODES.items()} and parameters.modes == MODES
    )
    assert set(PARAMS) == field_names(Parameters)
    for section in set(PARAMS) - {"symbols", "modes"}:
        assert set(PARAMS[section]) == field_names(section_class(section)), (
            f"{section}: `dvc exp run -S` can set what is in params.yaml, so every field is there"
        )


def test_params_yaml_starts_with_a_simulated_market():
    p = load_parameters(ROOT / "params.yaml")
    assert (
        p.data.source == "simulated"
        and p.train.mode == "quick_test"
        and all(s.startswith("SIM") for s in p.symbols)
    )


def test_what_may_be_set_for_training_is_a_field_of_the_trainer():
    from trading_lib.training.config import NativePPOConfig, get_auto_config

    budget_and_memory = {"episodes", "iterations", "high_vram", "low_vram"}  # arguments of `get_auto_config`
    elsewhere = {"mode", "device", "max_vram_gpu0", "max_vram_gpu1"}
    assert field_names(TrainParameters) - elsewhere - budget_and_memory <= field_names(
        NativePPOConfig
    ) and budget_and_memory <= set(inspect.signature(get_auto_config).parameters)
    kinds = {
        "hidden_dims": [4],
        "gru_hidden_dim": 4,
        "dropout": 0.5,
        "network": "gru",
        "amp_dtype": "fp16",
    } | dict.fromkeys(
        (
            "shared_trunk",
            "separate_optimizers",
            "amp",
            "compile",
            "recovery",
            "early_stop",
            "high_vram",
            "low_vram",
        ),
        False,
    )
    everything = {f.name: kinds.get(f.name, 1) for f in fields(TrainParameters) if f.name not in elsewhere}
    overrides = config.parse_parameters({"train": everything | {"mode": "standard"}}).train.overrides()
    assert set(overrides) == set(everything)
    get_auto_config(device="cpu", **overrides)


# --- what is in the repository ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    "Files that git tracks, or would with the next `git add`."
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository here")
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_files_are_small_and_hold_no_market_data(tracked):
    assert [p.name for p in tracked if p.stat().st_size > 2 * 2**20] == []
    data = {
        ".parquet",
        ".pq",
        ".csv",
        ".tsv",
        ".npz",
        ".npy",
        ".pt",
        ".pth",
        ".pkl",
        ".pickle",
        ".feather",
        ".h5",
        ".hdf5",
        ".zip",
        ".gz",
        ".zst",
        ".xlsx",
        ".db",
        ".sqlite",
    }
    assert [p.name for p in tracked if p.suffix.lower() in data] == []
    for folder in ("data", "models", "reports"):
        assert {p.name for p in tracked if p.relative_to(ROOT).parts[0] == folder} == {".gitignore"}


# vendors' formats of keys, and long random values assigned to names that speak of secrets
_SECRETS = [
    r"\b[PA]K[A-Z0-9]{16,24}\b",
    r"\bAKIA[A-Z0-9]{16}\b",
    r"\bgh[pousr]_\w{30,}",
    r"\bgithub_pat_\w{30,}",
    r"\bsk-[\w-]{20,}",
    r"\bhf_[A-Za-z]{30,}",
    r"\bxox[abp]-[\w-]{10,}",
    "-----BEGIN [A-Z ]*PRIVATE KEY",
    r"(?i)(?:secret|api_?key|token|passw(?:or)?d)\w*[\"']?\s*[=:]\s*[\"'][A-Za-z0-9/+_\-]{20,}[\"']",
]


def secrets_in(text: str) -> list[str]:
    return [m[0] for pattern in _SECRETS for m in re.finditer(pattern, text)]


@pytest.mark.slow
def test_no_secrets(tracked):
    planted = [
        "PK" + "A1B2C3D4E5F6G7H8I9",
        "api_key = '" + "x9" * 12 + "'",
        '"APCA_API_SECRET_KEY": "' + "aB3" * 13 + '"',
        "-----BEGIN RSA " + "PRIVATE KEY-----",
    ]
    assert all(len(secrets_in(text)) == 1 for text in planted)
    assert {
        str(p): found
        for p in tracked
        if (found := secrets_in(p.read_text(encoding="utf-8", errors="replace")))
    } == {}
    assert [p.name for p in tracked if p.name.startswith(".env") or p.suffix in (".pem", ".key")] == []


def test_no_file_names_a_folder_of_one_machine(tracked):
    for path in tracked:
        if path.suffix in (".py", ".ipynb", ".yaml", ".ini", ".toml", ".md") or path.name == "Makefile":
            assert not re.search(r"(?<![\w.])/(?:home|Users|root)/\w", path.read_text(encoding="utf-8")), path


# --- commands -----------------------------------------------------------------------------------------------

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"(?m)^([a-z]+):", MAKEFILE))


def test_make_help_lists_every_target():
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (
        {line.split()[0] for line in done.stdout.splitlines()}
        == TARGETS
        >= {"help", "install", "run", "test"}
    )
    assert set(re.search(r"\.PHONY: (.+)", MAKEFILE)[1].split()) == TARGETS


def test_make_portfolio_lists_the_simulated_universe_where_none_is_listed(tmp_path):
    "Its recipe without the pipeline, on the project's own params.yaml: one value changes, and it is said."
    shutil.copy(ROOT / "params.yaml", tmp_path)
    recipe = re.search(r"(?m)^portfolio:.*\n((?:\t.*\n)+?)\t\$\(BIN\)/dvc", MAKEFILE)[1]
    (tmp_path / "Makefile").write_text(f"portfolio:\n{recipe}")
    said = [
        subprocess.run(["make", "-s", "portfolio"], cwd=tmp_path, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    before, after = PARAMS, yaml.safe_load((tmp_path / "params.yaml").read_text())
    assert after["portfolio"].pop("universes") == ["simulated"]
    assert after == before | {"portfolio": {k: v for k, v in before["portfolio"].items() if k != "universes"}}
    assert "is [simulated] now" in said[0].stdout and said[1].stdout == ""


@pytest.mark.parametrize("target, does", [("run", ["dvc repro"]), ("test", ["nbdev_test", "pytest"])])
def test_run_and_test_install_first(target, does, tmp_path):
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    lines = subprocess.run(
        ["make", "--no-print-directory", "-n", target],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    places = [
        lines.index(words)
        for words in ("-m venv --clear .venv", "pip install", "-c constraints.txt -e '.[dev]'", *does)
    ]
    assert places == sorted(places)


def test_an_environment_that_is_linked_from_another_project_is_left_alone(tmp_path):
    "A stand-in for Python makes the environment; what the link led to is as it was."
    project, other = tmp_path / "project", tmp_path / "other" / ".venv"
    (other / "bin").mkdir(parents=True)
    (other / ".installed").write_text(str(other.parent))
    (other / "bin" / "python").write_text("#!/bin/sh\n")
    (other / "bin" / "python").chmod(0o755)
    project.mkdir()
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, project)
    (project / ".venv").symlink_to(other)
    python = tmp_path / "python3"
    makes = 'if [ "$2" = venv ]; then rm -rf .venv/*; mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi'
    python.write_text(f"#!/bin/sh\n{makes}\n")
    python.chmod(0o755)
    subprocess.run(["make", "install", f"PYTHON={python}"], cwd=project, check=True, capture_output=True)
    assert (other / "bin" / "python").exists() and (other / ".installed").exists()
    assert not (project / ".venv").is_symlink()
    assert (project / ".venv" / ".installed").read_text().strip() == str(project)


@pytest.mark.parametrize("found", ["an older Python", "none", "a .venv of an older one"])
def test_a_python_that_is_too_old_is_one_line(found, tmp_path):
    "In a folder whose name has a blank; what is there is not touched."
    project = tmp_path / "my bars"
    project.mkdir()
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, project)
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.13" || exit 1\n')
    old.chmod(0o755)
    if found.startswith("a .venv"):
        (project / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(old, project / ".venv" / "bin" / "python")
    python = str(tmp_path / "nowhere") if found == "none" else str(old)
    done = subprocess.run(
        ["make", "--no-print-directory", "run", f"PYTHON={python}"],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.splitlines()[0] == (
        "trading_lib needs Python 3.11 or newer, found "
        f"{'none' if found == 'none' else 'Python 3.10.13'} as {python}; name another, such as: make "
        "run PYTHON=python3.12"
    )


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "exec make test" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


def test_the_readme_speaks_of_things_that_exist():
    from trading_lib.cli import COMMANDS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = "\n".join(re.findall(r"(?s)```.*?```|`[^`\n]+`", text))
    targets, commands = (
        set(re.findall(r"\bmake ([a-z]+)", shown)),
        set(re.findall(r"\btrading-lib ([a-z-]+)", shown)),
    )
    assert {"run", "test"} <= targets <= TARGETS and commands <= {name.split()[0] for name in COMMANDS}
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


# --- environment --------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = [line.split("==") for line in lines if line]
    assert all(len(pair) == 2 for pair in found)
    return {canonicalize_name(name): version for name, version in found}


def requirements() -> list[Requirement]:
    ini = read_ini()
    return [Requirement(r) for r in (ini["requirements"] + " " + ini["dev_requirements"]).split()]


def test_settings_keep_the_tools_that_work_together():
    ini = read_ini()
    assert {"nbdev==2.4.14", "execnb<0.2", "fastcore<2"} <= set(ini["dev_requirements"].split())
    expected = {
        "allowed_cell_metadata_keys": "tags",
        "allowed_metadata_keys": "",
        "clear_all": "False",
        "update_pyproject": "False",
        "min_python": "3.11",
        "lib_path": "trading_lib",
        "nbs_path": "nbs",
        "console_scripts": "trading-lib=trading_lib.cli:main",
    }
    assert {name: ini[name] for name in expected} == expected
    import trading_lib

    assert trading_lib.__version__ == ini["version"]


def test_constraints_pin_every_requirement_within_its_bounds():
    pinned = pins()
    for r in requirements():
        assert r.specifier.contains(pinned[canonicalize_name(r.name)]), r


def test_constraints_pin_what_requirements_bring_along():
    elsewhere = ("nvidia", "cuda", "triton")  # parts of a GPU build of torch
    tools = {"pip", "setuptools", "wheel"}  # what installs
    assert (
        sorted(
            n
            for n in _closure([r.name for r in requirements()]) - set(pins()) - tools
            if not n.startswith(elsewhere)
        )
        == []
    )


def test_every_pin_installs_on_the_oldest_python():
    """Debian's Python is 3.11.2: a release that asks for 3.11.5 stops the installation there."""
    oldest = read_ini()["min_python"] + ".0"
    refused = []
    for name in sorted(_closure([r.name for r in requirements()])):
        try:
            asked = importlib.metadata.metadata(name).get("Requires-Python") or ""
        except importlib.metadata.PackageNotFoundError:
            continue  # for another machine
        if not SpecifierSet(asked).contains(oldest):
            refused.append(f"{name} asks for Python {asked}")
    assert refused == []


# --- JupyterLab ---------------------------------------------------------------------------------------------


@pytest.fixture
def lab_contents(tmp_path):
    """The contents manager that JupyterLab uses,
    with the configuration of a project that has these notebooks, in that project's folder."""
    from jupyter_server.serverapp import ServerApp
    from traitlets.config import PyFileConfigLoader

    shutil.copytree(ROOT / ".jupyter", tmp_path / ".jupyter")
    for folder in ("explore", "03_env"):
        (tmp_path / "nbs" / folder).mkdir(parents=True)
    settings = PyFileConfigLoader("jupyter_server_config.py", str(tmp_path / ".jupyter")).load_config()
    return ServerApp.contents_manager_class.default_value(config=settings, root_dir=str(tmp_path))


def save(manager, content: dict | str, path: str):
    text = isinstance(content, str)
    saved = manager.save(
        {"type": "file" if text else "notebook", "format": "text" if text else "json", "content": content},
        path,
    )
    if asyncio.iscoroutine(saved):
        asyncio.run(saved)


def as_lab_would_save(path: Path) -> dict:
    "A stage notebook after it was opened and run in JupyterLab."
    content = json.loads(path.read_text(encoding="utf-8"))
    content["metadata"] |= {
        "kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"},
        "language_info": {
            "name": "python",
            "version": "3.11.9",
            "file_extension": ".py",
            "mimetype": "text/x-python",
            "codemirror_mode": {"name": "ipython", "version": 3},
        },
    }
    for number, cell in enumerate(content["cells"]):
        cell["source"] = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        cell["execution_count"] = number
        cell["metadata"] |= {
            "execution": {"iopub.execute_input": "2024-01-01T00:00:00Z"},
            "trusted": True,
            "scrolled": True,
            "collapsed": False,
            "jupyter": {"outputs_hidden": True},
        }
        cell["outputs"] = [
            {"output_type": "stream", "name": "stdout", "text": "seen\n"},
            {
                "output_type": "execute_result",
                "execution_count": number,
                "data": {"text/plain": "1"},
                "metadata": {},
            },
        ]
    return content


@pytest.mark.parametrize("stage", STAGES)
def test_running_and_saving_in_jupyterlab_changes_no_byte_of_a_stage_notebook(stage, lab_contents, tmp_path):
    before = ROOT / "nbs" / f"{stage}.ipynb"
    content = as_lab_would_save(before)
    content["metadata"]["kernelspec"]["name"] = "my-other-environment"
    save(lab_contents, content, f"nbs/{stage}.ipynb")
    written = tmp_path / "nbs" / f"{stage}.ipynb"
    for cell in cells(written):
        assert cell["outputs"] == [] and cell["execution_count"] is None
    assert [c["metadata"].get("tags") for c in cells(written)] == [
        c["metadata"].get("tags") for c in cells(before)
    ]
    assert written.read_bytes() == before.read_bytes()  # DVC goes by the bytes


def test_an_edit_in_jupyterlab_is_kept(lab_contents, tmp_path):
    content = as_lab_would_save(ROOT / "nbs" / "train.ipynb")
    content["cells"][-1]["source"] += "\nprint('edited')"
    save(lab_contents, content, "nbs/train.ipynb")
    save(lab_contents, "kept", "notes.txt")  # files that are no notebooks pass
    assert (
        source(cells(tmp_path / "nbs" / "train.ipynb")[-1]).endswith("print('edited')")
        and (tmp_path / "notes.txt").read_text() == "kept"
    )


@pytest.mark.parametrize(
    "path",
    [
        "research.ipynb",
        "train.ipynb",
        "nbs/research.ipynb",
        "nbs/03_env/00_account.ipynb",
        "nbs/explore/data.ipynb",
        "nbs/explore/train.ipynb",
    ],
)
def test_outputs_of_other_notebooks_are_kept(path, lab_contents, tmp_path):
    "One's own, those that explore, and the package's: only a stage's notebook is cleared."
    save(lab_contents, as_lab_would_save(ROOT / "nbs" / "train.ipynb"), path)
    assert all(cell["outputs"] and cell["execution_count"] is not None for cell in cells(tmp_path / path))


def test_the_hook_knows_the_stages():
    assert set(
        ast.literal_eval(
            re.search(r"(?m)^STAGES = (.+)$", (ROOT / ".jupyter" / "jupyter_server_config.py").read_text())[1]
        )
    ) == set(STAGES)


@pytest.mark.slow
def test_make_lab_uses_the_hook():
    recipe = re.search(r"(?m)^lab:.*\n((?:\t.*\n)+)", MAKEFILE)[1]
    assert 'JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter"' in recipe
    env = os.environ | {"JUPYTER_CONFIG_PATH": str(ROOT / ".jupyter"), "JUPYTER_PREFER_ENV_PATH": "1"}
    shown = subprocess.run(
        [BIN / "jupyter", "server", "--show-config"], env=env, capture_output=True, text=True, timeout=60
    )
    assert "clear_outputs" in shown.stdout, shown.stderr


# --- what `make check` runs ---------------------------------------------------------------------------------


def test_every_chapter_has_its_folder_of_tests():
    from changed import tests_of

    assert tests_of("nbs/03_env/07_env.ipynb") == "tests/env"
    assert tests_of("nbs/train.ipynb") == "tests/pipeline"
    assert tests_of("tests/use/test_cli.py") == "tests/use/test_cli.py"
    assert tests_of("README.md") is None
    chapters = {p.parent for p in (ROOT / "nbs").glob("[0-9][0-9]_*/*.ipynb")}
    missing = [p.name for p in chapters if not (ROOT / tests_of(f"nbs/{p.name}/x")).is_dir()]
    assert missing == []
