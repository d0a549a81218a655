"""What an import loads, and which package may import which."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vocabpp_jax

ROOT = Path(__file__).parent.parent
FACADE = ROOT / "vocabpp_jax/__init__.py"  # names everything, loads nothing
SCRIPTS = "experiments|command_line|comparators|paper|parity_check|pytorch|reports|speed_measure|training_run"


def loaded(code, *names):
    """Which of the modules ``names`` a fresh process has after running ``code``."""
    script = f"{code}\nimport sys\nprint(*[name for name in {names!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_schedules_load_no_jax():
    heavy = ("jax", "jaxlib", "flax", "optax", "matplotlib")
    everything = (
        "import vocabpp_jax.schedules\nfrom vocabpp_jax.schedules.simulation import cost, formats, measured, pictures"
    )
    assert loaded(everything, *heavy, "vocabpp_jax.schedules") == ["vocabpp_jax.schedules"]


def test_the_package_is_lazy():
    assert loaded("import vocabpp_jax", "jax", "vocabpp_jax.models", "vocabpp_jax") == ["vocabpp_jax"]


@pytest.mark.parametrize("name", vocabpp_jax.__all__)
def test_a_public_name_is_the_first_import_of_a_process(name):
    assert loaded(f"from vocabpp_jax import {name}", "vocabpp_jax") == ["vocabpp_jax"]


def test_the_train_step_is_reached_as_train():
    from vocabpp_jax import train, training

    assert train is training
    assert callable(train.init_state) and callable(train.make_step) and callable(train.adamw)


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vocabpp_jax.nothing


def module_of(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ["vocabpp_jax", *parts] if parts[0] in ("models", "schedules") else parts


def imported(path):
    """The modules that a file imports anywhere, as absolute names."""
    package = module_of(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "folder, refused",
    [
        ("schedules", r"vocabpp_jax.(?!schedules)"),
        ("schedules/lowering", r"vocabpp_jax.schedules.simulation"),
        ("vocabpp_jax", SCRIPTS),
        ("vocabpp_jax", r"vocabpp_jax.models|flax"),
        ("vocabpp_jax/pipeline", r"vocabpp_jax.(training|checkpoints|compiled|data|runtime)"),
        (
            "vocabpp_jax/vocab",
            r"vocabpp_jax.(training|checkpoints|compiled|data|runtime)|vocabpp_jax.pipeline.(pipeline|executor)",
        ),
        ("vocabpp_jax/training", r"vocabpp_jax.(checkpoints|compiled|data|runtime)"),
        ("models", r"vocabpp_jax.(training|checkpoints|compiled|data|runtime)"),
    ],
)
def test_no_import_points_back(folder, refused):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    names = [(path, name) for path in files if path != FACADE for name in imported(path)]
    back = [f"{path.relative_to(ROOT)}: {name}" for path, name in names if re.match(refused, name)]
    assert not back


def test_no_two_modules_have_one_name():
    paths = [
        path
        for folder in ("vocabpp_jax", "models", "schedules", "experiments")
        for path in (ROOT / folder).rglob("*.py")
    ]
    names = [path.stem for path in paths if path.stem != "__init__"]
    assert sorted({name for name in names if names.count(name) > 1}) == []
