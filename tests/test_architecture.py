"""The house's plan, read from the imports: floors, rooms, and what the package keeps away from."""

import ast
import inspect
import subprocess
import sys
from collections import Counter
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

import captum_classfilters

PACKAGE = "captum_classfilters"
ROOT = Path(captum_classfilters.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Rooms by floor; imports point down
FLOORS = {
    "core": 0,
    "class_filters": 1,
    "assets": 1,
    "heads": 2,
    "cam": 2,
    "attacks": 2,
    "skipping": 2,
    "influential": 3,
    "gating": 3,
    "decoupling": 3,
    "splitting": 3,
    "metrics": 4,
    "concepts": 4,
    "visualize": 5,
    "detection": 4,
    "comparison": 5,
    "report": 5,
    "cli": 6,
    "_version": 0,
    "__init__": 6,
    "__main__": 6,
}
MOST_NAMES = 101
# Rooms of these floors know nothing of one another
APART = (2, 3)
PRIVATE_CAPTUM = "core/captum_compat.py"


def room_of(path):
    """The room a file is in: its folder under the package, or itself."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(source, package=PACKAGE):
    """Dotted names imported anywhere in ``source``, relative ones from ``package``; of ``from a import b``: ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def package_of(path):
    return ".".join([PACKAGE, *path.relative_to(ROOT).parts[:-1]])


def breaches(room, names):
    """What a room imports of its own package against the plan."""
    for name in names:
        parts = name.split(".")
        if parts[0] != PACKAGE or len(parts) == 1:
            continue
        other = parts[1] if parts[1] in FLOORS else "__init__"
        if other == room:
            continue
        if FLOORS[other] > FLOORS[room]:
            yield f"{room} (floor {FLOORS[room]}) imports {name}, which is above it (floor {FLOORS[other]})"
        elif FLOORS[other] == FLOORS[room] and FLOORS[room] in APART:
            yield f"{room} imports {name}, a room of its own floor {FLOORS[room]}"


def private_captum(names):
    for name in names:
        parts = name.split(".")
        if parts[0] == "captum" and (parts[1:2] == ["log"] or any(part.startswith("_") for part in parts)):
            yield name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path):
    """Each file: its room is on a floor, it imports down, and keeps the rules of the house."""
    source = path.read_text(encoding="utf-8")
    names = list(imports(source, package_of(path)))
    assert room_of(path) in FLOORS, "give the new room a floor"
    assert not list(breaches(room_of(path), names))
    if path.relative_to(ROOT).as_posix() != PRIVATE_CAPTUM:
        assert not list(private_captum(names)), f"import it through {PRIVATE_CAPTUM}"
    assert not {name.split(".")[0] for name in names} & {"pickle", "cPickle", "cloudpickle", "dill", "joblib"}
    lines = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    assert not lines, f"assert statements in lines {lines}: raise an error that says what to do"
    assert len(source.splitlines()) <= 620


def cycle(edges):
    """Names that lead back to the first along ``edges``, a dict of sets; empty if there are none."""
    done = set()

    def visit(name, trail):
        if name in trail:
            return trail[trail.index(name) :]
        if name in done:
            return []
        done.add(name)
        return next((circle for other in sorted(edges.get(name, ())) if (circle := visit(other, [*trail, name]))), [])

    return next((circle for name in sorted(edges) if (circle := visit(name, []))), [])


def test_no_file_imports_itself_through_others():
    names = {".".join([package_of(path), path.stem]).removesuffix(".__init__"): path for path in FILES}
    edges = {}
    for name, path in names.items():
        imported = imports(path.read_text(encoding="utf-8"), package_of(path))
        edges[name] = {other if other in names else other.rpartition(".")[0] for other in imported} & names.keys()
        edges[name].discard(PACKAGE)  # its names are loaded when they are asked for
    assert cycle(edges) == []


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c"]),
        ({"a": {"b"}, "b": {"a"}}, ["a", "b"]),
    ],
)
def test_a_cycle_is_found(edges, expected):
    assert cycle(edges) == expected


def test_no_name_stands_twice():
    """One file of a name, one class of a name: a reader who is told of it finds it."""
    stems, classes = Counter(), Counter()
    for path in FILES:
        stems[path.stem] += not path.stem.startswith("__")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            classes[getattr(node, "name", "")] += isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    assert {name for name, times in classes.items() if times > 1} == set()
    assert {name for name, times in stems.items() if times > 1} == set()


def public_calls():
    """Every public function, class and method of the rooms' ``__all__``, by its dotted name."""
    for room in sorted(FLOORS):
        module = import_module(f"{PACKAGE}.{room}") if room not in ("__init__", "__main__", "_version") else None
        for name in getattr(module, "__all__", ()) if module else ():
            value = getattr(module, name)
            if isinstance(value, type):
                yield f"{room}.{name}", value.__init__, value
                for method, function in vars(value).items():
                    function = getattr(function, "__func__", function)
                    if not method.startswith("_") and callable(function):
                        yield f"{room}.{name}.{method}", function, value
            elif callable(value):
                yield f"{room}.{name}", value, None


def test_no_public_call_takes_more_than_eight_parameters():
    """Captum's own signatures, those of ``attribute``, are the exception."""
    long = {}
    for name, function, owner in public_calls():
        if name.endswith(".attribute"):
            continue
        parameters = list(inspect.signature(inspect.unwrap(function)).parameters)
        count = len(parameters) - (owner is not None and parameters[:1] in (["self"], ["cls"]))
        if count > 8 and not (owner is not None and is_dataclass(owner)):
            long[name] = count
    assert long == {}


def test_public_names_are_few():
    """Whatever a room's ``__all__`` gains is one more concept for every reader: look for one that it can replace."""
    rooms = [import_module(f"{PACKAGE}.{name}") for name in FLOORS if name[0] != "_"]
    names = [f"{room.__name__}.{name}" for room in rooms for name in getattr(room, "__all__", ())]
    assert len(names) <= MOST_NAMES, f"{len(names)} public names: {names}"


def test_imports_are_read_wherever_they_stand():
    source = """
import captum.log
from captum_classfilters.core import head
from . import selectors
from ..metrics.curves import curve
def f():
    from captum._utils.common import _select_targets
if TYPE_CHECKING:
    import captum_classfilters.visualize as v
"""
    assert set(imports(source, f"{PACKAGE}.influential")) == {
        "captum.log",
        "captum_classfilters.core.head",
        "captum_classfilters.influential.selectors",
        "captum_classfilters.metrics.curves.curve",
        "captum_classfilters.visualize",
        "captum._utils.common._select_targets",
    }


@pytest.mark.parametrize(
    ("room", "name", "allowed"),
    [
        ("influential", "captum_classfilters.core.head.Head", True),
        ("influential", "captum_classfilters.heads.decompose", True),
        ("influential", "captum_classfilters.gating.Gate", False),
        ("influential", "captum_classfilters.metrics", False),
        ("influential", "captum_classfilters.InfluentialFeatures", False),
        ("influential", "captum_classfilters.influential.running_sums.Tables", True),
        ("heads", "captum_classfilters.cam.Cam", False),
        ("core", "captum_classfilters.class_filters.ClassFilters", False),
        ("metrics", "captum_classfilters.visualize.curve", False),
        ("core", "captum.attr", True),
    ],
)
def test_the_plan_can_be_breached(room, name, allowed):
    assert (list(breaches(room, [name])) == []) is allowed


@pytest.mark.parametrize(
    ("name", "private"),
    [
        ("captum.attr.LayerAttribution", False),
        ("captum.log.log_usage", True),
        ("captum.log", True),
        ("captum._utils.common", True),
        ("captum.attr._core.layer", True),
        ("captum.attr._select", True),
        ("torch._dynamo", False),
    ],
)
def test_private_names_of_captum_are_seen(name, private):
    assert (list(private_captum([name])) == [name]) is private


def test_importing_the_package_loads_no_heavy_room():
    heavy = ("captum", "matplotlib", "pandas", "sklearn", "scipy")
    code = f"import sys, {PACKAGE}; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert found.stdout.strip() == "[]"


def test_every_public_name_has_a_home():
    assert {name for name in dir(captum_classfilters) if not name.startswith("_")} == {
        name for name in captum_classfilters.__all__ if not name.startswith("_")
    }
    for name in captum_classfilters.__all__:
        assert name == "__version__" or name in captum_classfilters._HOMES
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = captum_classfilters.nothing
