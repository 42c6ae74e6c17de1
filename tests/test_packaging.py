"""What is packed, what it needs, and what importing it costs."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import peft_layerrope
from peft_layerrope.cli import SUMMARIES, app

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_layerrope"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"pyyaml": "yaml", "lm-eval": "lm_eval"}  # where a distribution's module has another name


def _distributions(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0].replace("_", "-").lower() for requirement in requirements}


def _third_party_imports() -> dict[str, set[str]]:
    """Module outside the standard library -> the files of the package that import it."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top != "peft_layerrope":
                    found.setdefault(top, set()).add(str(path.relative_to(PACKAGE)))
    return found


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    declared = _distributions(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    optional = _distributions(
        [needed for name in ("datasets", "lm-eval", "mlx", "ray", "vllm") for needed in extras[name]]
    )
    assert not declared & optional
    modules = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in declared | optional}
    imported = _third_party_imports()
    assert set(imported) - modules == set(), imported
    assert modules - set(imported) == set()


def test_extras():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"all", "datasets", "docs", "lm-eval", "mlx", "ray", "test", "vllm"}
    named = re.fullmatch(r"peft-layerrope\[(.+)\]", extras["all"][0])[1].split(",")
    assert set(named) == set(extras) - {"all", "docs", "test", "mlx", "vllm"}  # which want a place of their own


def test_every_dependency_has_a_lower_bound_that_can_be_installed_as_it_stands():
    """In the one form that `.ci/lowest` turns into a version; it runs the tests with those of the core and `test`."""
    extras = [needed for name, extra in PROJECT["optional-dependencies"].items() if name != "all" for needed in extra]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for requirement in [*build, *PROJECT["dependencies"], *extras]:
        assert re.fullmatch(r"[\w-]+(\[[\w,-]+\])?>=\d+(\.\d+)*", requirement), requirement
    assert re.fullmatch(r">=3\.\d+", PROJECT["requires-python"])


def _pinned() -> dict[str, str]:
    """What `constraints.txt` says, by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def _needed(requirements: list[str]) -> dict[str, str]:
    """The installed version of everything that these need, directly or not, but torch itself."""
    found: dict[str, str] = {}
    waiting = [Requirement(requirement) for requirement in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found[name] = importlib.metadata.version(name)
        for needed in map(Requirement, importlib.metadata.requires(name) or ()):
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return {name: version for name, version in found.items() if name != "torch"}


def test_the_pinned_versions_are_allowed():
    pinned = _pinned()
    assert "torch" not in pinned  # which build it is depends on the machine
    extras = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras["test"] + extras["docs"]):
        if requirement.name != "torch":
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_all_that_the_test_command_installs_is_pinned():
    needed = _needed(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
    pinned = _pinned()
    if any(pinned[name] != version for name, version in needed.items() if name in pinned):
        pytest.skip("these are not the pinned versions")
    assert needed.keys() - pinned.keys() == {name for name in needed if name.startswith(("nvidia-", "cuda-", "triton"))}


def test_what_the_readme_installs_is_pinned():
    commands = re.findall(r"^.*pip install .* -e .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    assert all(" -c constraints.txt " in command for command in commands)


def test_the_version_is_written_once():
    assert importlib.metadata.version("peft-layerrope") == peft_layerrope.__version__
    assert "version" not in PROJECT
    texts = [path.read_text() for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert not any(f'"{peft_layerrope.__version__}"' in text for text in texts)


LIGHT = """
import json, sys
import peft, transformers
before = set(sys.modules)
import peft_layerrope
peft_layerrope.LayerRopeConfig(layer_factors=[1.0, 1.5])
print(json.dumps(sorted(set(sys.modules) - before)))
"""
"""What transformers and PEFT import anyway costs nothing more."""


def test_importing_the_package_loads_only_what_serving_needs():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    heavy = {"deap", "ray", "matplotlib", "scipy", "typer", "rich", "jinja2", "datasets", "lm_eval", "yaml"}
    assert {name.split(".")[0] for name in loaded} & heavy == set()
    assert {f"peft_layerrope.tuner.{name}" for name in ("model", "rotary", "config")} <= set(loaded)
    own = {name.split(".")[1] for name in loaded if name.startswith("peft_layerrope.")}
    assert own & {"searcher", "cli", "report", "cards", "experiments", "comparison", "hub", "evaluation"} == set()


AFTER = """
import sys
import peft_layerrope
assert not {"torch", "peft"} & set(sys.modules)
from peft import PeftConfig
print(PeftConfig.from_pretrained(sys.argv[1]).layer_factors)
"""
BEFORE = """
import sys
from peft import PeftConfig
import peft_layerrope
print(PeftConfig.from_pretrained(sys.argv[1]).layer_factors)
"""


@pytest.mark.parametrize("code", [AFTER, BEFORE], ids=["after", "before"])
def test_the_adapter_type_is_registered_whichever_is_imported_first(code):
    adapter = ROOT / "hub_configs" / "demo-plain"
    done = subprocess.run([sys.executable, "-c", code, str(adapter)], capture_output=True, text=True, check=True)
    factors = json.loads((adapter / "adapter_config.json").read_text())["layer_factors"]
    assert json.loads(done.stdout) == factors


COMMAND = """
import runpy, sys
try:
    runpy.run_module("peft_layerrope", run_name="__main__", alter_sys=True)
finally:
    assert not {"torch", "transformers", "peft", "numpy"} & set(sys.modules)
"""


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_wait_for_nothing_heavy(option):
    done = subprocess.run([sys.executable, "-c", COMMAND, option], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("sensitivity" if option == "--help" else peft_layerrope.__version__) in done.stdout


def test_a_slip_waits_for_nothing_heavy_either():
    done = subprocess.run([sys.executable, "-c", COMMAND, "evalute"], capture_output=True, text=True, check=False)
    assert (done.returncode, "Did you mean 'evaluate'?" in done.stderr) == (2, True)


def test_the_help_lists_the_commands_with_their_own_first_sentences():
    group = typer.main.get_command(app)
    with group.make_context("layerrope", ["verify"]) as context:
        group.resolve_command(context, ["verify"])
    helps = {name: " ".join(command.help.split("\n\n")[0].split()) for name, command in group.commands.items()}
    assert helps == SUMMARIES


def test_the_workflow_has_the_interpreters_of_the_classifiers():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["run"]
    prefix = "Programming Language :: Python :: 3."
    assert [f"{prefix}{version.removeprefix('3.')}" for version in workflow["strategy"]["matrix"]["python"]] == [
        classifier for classifier in PROJECT["classifiers"] if classifier.startswith(prefix)
    ]
    assert ".ci/run" in [step.get("run") for step in workflow["steps"]]


def test_every_public_name_can_be_had_and_is_known_to_type_checkers():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imported = {one.asname: f".{node.module}" for node in stub.body if hasattr(node, "names") for one in node.names}
    assert sorted([*imported, "__version__"]) == peft_layerrope.__all__
    for name, module in imported.items():
        assert getattr(import_module(module, "peft_layerrope"), name) is getattr(peft_layerrope, name)
    for name in peft_layerrope.__all__:
        assert getattr(peft_layerrope, name) is not None, name


def _setuptools_version() -> int:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the sdist of a copy of the sources, built without a network."""
    if _setuptools_version() < 77:
        pytest.skip("building needs setuptools 77 in this environment")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, source, ignore=skipped, dirs_exist_ok=True)
    (source / "scratch").mkdir()
    (source / "scratch" / "notes.txt").write_text("not to be shipped")
    build = f"from setuptools.build_meta import *; build_sdist({str(output)!r}); build_wheel({str(output)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(output.glob("*.whl")), next(output.glob("*.tar.gz"))


def _package_files() -> set[str]:
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in files}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
    wheel, _ = built
    assert wheel.name == f"peft_layerrope-{peft_layerrope.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
        scripts = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == _package_files()
    assert {"peft_layerrope/py.typed", "peft_layerrope/demo/model.safetensors"} <= packed
    assert {Path(name).suffix for name in packed} >= {".j2", ".yaml"}  # templates, the harness's tasks
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "layerrope = peft_layerrope.cli:run" in scripts


@pytest.mark.slow
def test_the_sdist_builds_the_same_and_holds_no_tests(built):
    _, sdist = built
    with tarfile.open(sdist) as archive:
        names = {"/".join(Path(member.name).parts[1:]) for member in archive if member.isfile()}
    assert _package_files() | {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= names
    tops = {name.split("/")[0] for name in names if "/" in name}
    assert tops == {"peft_layerrope", "peft_layerrope.egg-info"}
