"""A room of the package imports only from rooms before it; what its root holds is the ground."""

import ast
from pathlib import Path

import pytest

PACKAGE = "fsefs_nnunet"
ROOT = Path(__file__).parents[1]
GROUND = {"__init__", "errors", "files", "labels", "device", "workers"}
# rooms in one row do not import each other
ORDER = [
    ["cases"],
    ["backbones"],
    ["features"],
    ["losses"],
    ["methods"],
    ["priors"],
    ["inference"],
    ["planners", "trainers"],
    ["nnunet"],
    ["evaluation", "datasets"],
    ["adaptation"],
    ["benchmark", "synthetic"],
    ["cli"],
]
LEVEL = {room: level for level, row in enumerate(ORDER) for room in row}


def imported(source: str) -> set[str]:
    """Modules of ours that a file imports, inside functions, too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == PACKAGE}


def violations(room: str, source: str) -> list[str]:
    """Imports of a file of `room` ("" is the ground) from rooms that do not come before it."""
    wrong = []
    for name in sorted(imported(source)):
        parts = name.split(".")
        target = parts[1] if len(parts) > 1 else "__version__"
        if target == room or target in GROUND | {"__version__"}:
            continue
        if target not in LEVEL or not room or LEVEL[target] >= LEVEL[room]:
            wrong.append(name)
    return wrong


def files() -> dict[Path, str]:
    """Every file of the package and the room that it is in."""
    found = {}
    for file in (ROOT / PACKAGE).rglob("*.py"):
        parts = file.relative_to(ROOT / PACKAGE).parts
        found[file] = parts[0] if len(parts) > 1 else ""
    for room in ("planners", "trainers"):
        found |= dict.fromkeys((ROOT / room).glob("*.py"), room)
    return found


def test_rooms_import_from_rooms_before_them():
    wrong = {str(file): v for file, room in files().items() if (v := violations(room, file.read_text("utf-8")))}
    assert not wrong


def test_every_room_has_its_place_and_the_root_is_the_ground():
    assert set(files().values()) == {"", *LEVEL}
    assert {file.stem for file, room in files().items() if not room} == GROUND


@pytest.mark.parametrize(
    "room, source, found",
    [
        ("features", "from fsefs_nnunet.trainers import by_name", ["fsefs_nnunet.trainers.by_name"]),
        ("features", "def f():\n    import fsefs_nnunet.cli.main", ["fsefs_nnunet.cli.main"]),
        ("planners", "from fsefs_nnunet.trainers.scratch import A", ["fsefs_nnunet.trainers.scratch.A"]),
        ("", "from fsefs_nnunet.cases import splits", ["fsefs_nnunet.cases.splits"]),
        ("cli", "from fsefs_nnunet.utils import helpers", ["fsefs_nnunet.utils.helpers"]),
        ("features", "from fsefs_nnunet.backbones import maps\nfrom fsefs_nnunet import labels, __version__", []),
    ],
)
def test_a_violation_is_found(room, source, found):
    assert violations(room, source) == found
