"""The rooms of `recipes/`: pyproject.toml says who may import whom, each room's docstring says it to its reader."""

import importlib
import re

import grimp
import pytest

from tests.conftest import ROOT, run_command

ROOMS = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/__init__.py"))


def test_imports_follow_the_contracts_of_pyproject():
    run_command(["lint-imports", "--no-cache", "--no-logo"])


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("recipes", cache_dir=None)


def promised(room: str) -> set[str]:
    """What a room may import by its docstring: rooms and modules of `recipes`, or all of `recipes`."""
    docstring = " ".join(importlib.import_module(f"recipes.{room}").__doc__.split())
    name = r"`recipes\.[\w.]+`"
    found = re.search(rf"imports? (no other room|every room|{name}(?:(?:,? and |, ){name})*)", docstring)
    assert found, f"recipes/{room}/__init__.py does not say what the room may import"
    return {"recipes"} if found[1] == "every room" else set(re.findall(r"`([\w.]+)`", found[1]))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_its_docstring_says(graph, room):
    allowed = promised(room) | {f"recipes.{room}"}
    breaches = [
        f"{module} imports {imported}"
        for module in graph.find_descendants(f"recipes.{room}") | {f"recipes.{room}"}
        for imported in graph.find_modules_directly_imported_by(module)
        if not any(f"{imported}.".startswith(f"{name}.") for name in allowed)
    ]
    assert not breaches, f"recipes/{room}/__init__.py does not say: {'; '.join(sorted(breaches))}"
