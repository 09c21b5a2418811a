"""The requirements files say what the code imports: no more, no less."""

import ast
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

FILES = ("requirements.txt", "requirements-extra.txt", "requirements-dev.txt")
# Declared though no file here imports them.
NOT_IMPORTED = {
    "ruff": "a command",
    "pytest-xdist": "scripts/test.sh runs the tests in two processes",
}
COMES_WITH = {"kagglesdk": "kagglehub"}  # imported, and a dependency of what is declared


def requirements(file):
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def declared(*files):
    return {canonical(requirement.name) for file in files for requirement in requirements(file)}


def modules(node):
    """The modules that a statement imports; import_extra("name") imports one too."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_extra"):
        return [x.value for x in node.args[:1] if isinstance(x, ast.Constant)]
    return []


def imported(*folders, at_once=False):
    """The distributions that the files of some folders import; or `at_once`, when loaded."""
    files = {folder: [*(ROOT / folder).glob("*.py")] for folder in (".", "scripts", "tests")}
    ours = {"scripts"} | {file.stem for of_folder in files.values() for file in of_folder}
    owners, found = packages_distributions(), set()
    for file in (file for folder in folders for file in files[folder]):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in tree.body if at_once else ast.walk(tree):
            tops = {module.partition(".")[0] for module in modules(node)}
            for top in tops - ours - set(sys.stdlib_module_names):
                assert top in owners, f"{file.name} imports {top}, which is not installed"
                found |= {COMES_WITH.get(name, name) for name in map(canonical, owners[top])}
    return found


def test_what_is_declared_is_what_is_imported():
    assert declared(*FILES) == imported(".", "scripts", "tests") | NOT_IMPORTED.keys()
    assert imported(".", "scripts") <= declared(*FILES[:2])


def test_optional_packages_are_imported_where_they_are_used_only():
    assert imported(".", "scripts", at_once=True) <= declared("requirements.txt")
    assert not declared("requirements.txt") & declared("requirements-extra.txt")


@pytest.mark.parametrize("file", FILES)
def test_every_requirement_has_a_lower_bound_and_a_locked_version(file):
    lines = (ROOT / "requirements-lock.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    locked = {canonical(name): number for name, number in locked.items()}
    for requirement in requirements(file):
        assert {bound.operator for bound in requirement.specifier} & {"==", ">="}, requirement
        assert requirement.specifier.contains(locked[canonical(requirement.name)]), requirement
