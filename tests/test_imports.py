"""The directory listing is the architecture: which room may use which, and what importing costs."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pamm

SOURCE = Path(pamm.__file__).parent

MAY_USE = {
    "files": set(),
    "images": set(),
    "config": {"files"},
    "runtime": {"config", "files"},
    "tasks": {"files", "images", "runtime"},
    "ops": {"files"},
    "nn": {"runtime"},
    "data": {"config", "files", "images", "runtime", "tasks"},
    "models": {"config", "drawing", "files", "nn", "ops", "runtime", "tasks"},
    "kernels": {"config", "models", "nn", "ops", "runtime"},
    "build": {"config", "data", "models", "nn", "tasks"},
    "official": {"config", "data", "files", "models", "nn", "tasks"},
    "drawing": {"data", "files", "tasks"},
    "evaluation": {"build", "config", "data", "drawing", "files", "images", "kernels", "models", "runtime", "tasks"},
    "prediction": {"config", "data", "drawing", "files", "images", "kernels", "models", "runtime", "tasks"},
    "training": {
        "build",
        "config",
        "data",
        "drawing",
        "evaluation",
        "files",
        "kernels",
        "models",
        "nn",
        "runtime",
        "tasks",
    },
    "look": {
        "build",
        "config",
        "data",
        "drawing",
        "evaluation",
        "files",
        "kernels",
        "models",
        "nn",
        "prediction",
        "tasks",
    },
    "ablate": {
        "build",
        "config",
        "data",
        "drawing",
        "evaluation",
        "files",
        "kernels",
        "models",
        "nn",
        "ops",
        "runtime",
        "tasks",
        "training",
    },
    "doctor": set(),
    "command_line": {"build", "config", "files", "runtime"},
    "cli": set(),
    "__init__": set(),
    "__main__": {"cli"},
}
"""Room → the rooms it may import."""

COMMANDS = {"cli.py", "command.py", "doctor.py"}
"""Command lines, which put rooms together."""


def imports_of(file: Path) -> set[str]:
    """The rooms of this package that a file imports, anywhere in it but for type checkers only."""
    return {name.split(".")[1] for name in imported_by(file)} - {"PammError"}


def imported_by(file: Path) -> set[str]:
    """What a file imports of this package: names of modules, or of what is in them."""
    found, waiting = set(), [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        waiting += ast.iter_child_nodes(node)
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name}: relative imports hide from this test"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name for name in names if name.startswith("pamm.")}
    return found


def test_rooms_do_not_use_each_other_in_a_circle():
    assert TopologicalSorter(MAY_USE).prepare() is None  # else it raises


def test_modules_import_each_other_in_one_circle_only():
    """`MultiTaskModel.from_pretrained` loads a model, which `saved` builds by the registry of models."""
    files = {}
    for file in SOURCE.rglob("*.py"):
        *folders, name = file.relative_to(SOURCE.parent).with_suffix("").parts
        files[".".join(folders if name == "__init__" else [*folders, name])] = file
    graph = {}
    for module, file in files.items():
        names = imported_by(file)
        graph[module] = {name if name in files else name.rpartition(".")[0] for name in names} - {module, "pamm"}
    assert "pamm.models.saved" in graph["pamm.models.model"]
    graph["pamm.models.model"].remove("pamm.models.saved")
    assert TopologicalSorter(graph).prepare() is None  # else it raises


def test_every_room_is_known():
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms == MAY_USE.keys()


@pytest.mark.parametrize("room", MAY_USE)
def test_arrows(room):
    files = [SOURCE / f"{room}.py"] if (SOURCE / f"{room}.py").exists() else sorted((SOURCE / room).rglob("*.py"))
    assert files
    for file in files:
        if file.name not in COMMANDS:
            assert imports_of(file) - {room} <= MAY_USE[room], file.name


@pytest.mark.parametrize(("package", "home"), [("lightning_fabric", "distributed.py"), ("tyro", "command_line.py")])
def test_a_framework_is_imported_in_one_file(package, home):
    users = [
        file.name
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package))
        or (isinstance(node, ast.Import) and any(alias.name.startswith(package) for alias in node.names))
    ]
    allowed = {home} | (
        {"evaluate.py", "loop.py", "run.py"} if package == "lightning_fabric" else set()
    )  # there for its type only
    assert set(users) <= allowed and home in users


def test_the_base_install_suffices():
    """Prediction and models need none of the extras."""
    modules = "pamm.tasks, pamm.data, pamm.models.registry, pamm.prediction, pamm.ops, pamm.official"
    extras = [
        "lightning_fabric",
        "torchmetrics",
        "skimage",
        "tensorboard",
        "trimesh",
        "embreex",
        "scipy",
        "cv2",
        "matplotlib",
        "triton",
    ]
    block = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); import {modules}"
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", pamm.__all__)
def test_public_names(name):
    assert getattr(pamm, name).__doc__


def test_every_error_of_this_package_is_a_pamm_error():
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    known = {"PammError"}
    while more := {name for name, own in bases.items() if own & known} - known:
        known |= more
    errors = {name for name, own in bases.items() if any(base.endswith(("Error", "Exception")) for base in own)}
    assert errors - {"PammError"} <= known and len(errors) > 15


def test_import_is_lazy():
    code = "import sys, pamm; sys.exit(bool({'torch', 'numpy', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_told():
    with pytest.raises(AttributeError, match=r"no attribute 'Predicter'; it has: .*Predictor"):
        _ = pamm.Predicter


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"]], ids=" ".join)
def test_help_does_not_wait_for_torch(arguments):
    """The budgets are 0.3 s and 0.5 s; what keeps them is that nothing heavy is imported."""
    code = f"""
import sys
from pamm.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
sys.exit("torch" in sys.modules or "tyro" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage: pamm" in done.stdout


def test_pictures_are_opened_in_one_room():
    """There they are opened as one of the listed formats; elsewhere Pillow might start other programs for them."""
    for file in SOURCE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        opened = [
            call
            for call in calls
            if isinstance(call, ast.Attribute)
            and call.attr == "open"
            and ast.unparse(call.value) in ("Image", "PIL.Image")
        ]
        assert not opened or file.parent.name == "images", file
