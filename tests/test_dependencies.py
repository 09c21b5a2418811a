"""The requirements files say what the code imports: no more, no less."""

import ast
import re
import sys
from importlib.metadata import packages_distributions, version

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

FILES = ("requirements.txt", "requirements-extra.txt", "requirements-dev.txt")
# Declared though no file here imports them.
NOT_IMPORTED = {
    "protobuf": "the version tensorboard_logger's generated files need",
    "ruff": "a command",
    "pytest-xdist": "scripts/test.sh runs the tests in two processes",
    "playwright": "tests that need it are skipped without it",
    "eccv-caption": "scripts/eccv_caption.py, whose own name it is, loads it by name",
}


def canonical(name):
    return re.sub("[-_.]+", "-", name).lower()


def requirements(file):
    lines = (ROOT / file).read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def declared(file):
    return {canonical(re.match(r"[A-Za-z0-9_.-]+", line)[0]) for line in requirements(file)}


def imported(*folders, at_once=False):
    """The distributions that the files of some folders import; or `at_once`, when loaded."""
    ours = {"scripts"} | {
        file.stem for folder in (".", "scripts", "tests") for file in (ROOT / folder).glob("*.py")
    }
    owners, found = packages_distributions(), set()
    for folder in folders:
        for file in (ROOT / folder).glob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for node in tree.body if at_once else ast.walk(tree):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                tops = {name.partition(".")[0] for name in names}
                for top in tops - ours - set(sys.stdlib_module_names):
                    assert top in owners, f"{file.name} imports {top}, which is not installed"
                    found |= {canonical(name) for name in owners[top]}
    return found


def test_what_users_run_imports_what_requirements_declare():
    declared_for_users = declared("requirements.txt") | declared("requirements-extra.txt")
    assert imported(".", "scripts") <= declared_for_users


def test_optional_packages_are_imported_where_they_are_used_only():
    assert imported(".", "scripts", at_once=True) <= declared("requirements.txt")
    assert not declared("requirements.txt") & declared("requirements-extra.txt")


def test_what_tests_import_is_declared():
    assert imported("tests") <= set().union(*map(declared, FILES))


def test_what_is_declared_is_imported():
    assert set().union(*map(declared, FILES)) == (
        imported(".", "scripts", "tests") | NOT_IMPORTED.keys()
    )


@pytest.mark.parametrize("file", FILES)
def test_every_requirement_has_bounds(file):
    for line in requirements(file):
        assert re.match(r"[A-Za-z0-9_-]+(==|>=)[0-9]", line), line


def test_the_lock_holds_a_version_within_the_bounds_for_every_requirement():
    lines = (ROOT / "requirements-lock.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    locked = {canonical(name): number for name, number in locked.items()}
    for file in FILES:
        for line in requirements(file):
            wanted = Requirement(line.partition("#")[0])
            assert wanted.specifier.contains(locked[canonical(wanted.name)]), line


def test_torch_is_the_tested_one():
    assert version("torch").partition("+")[0] == "2.13.0"
