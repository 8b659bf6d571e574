"""Layers import only from layers above them in this list, a folder counting as one; and runs import what they need."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "peertune"
LAYERS = [
    "errors",
    "plugins",
    "logfields",
    "config",
    "recipe",
    "seeds",
    "memory",
    "flat",
    "storage",
    "lock",
    "identity",
    "charter",
    "ejection",
    "topology",
    "wire",
    "exchange",
    "codec",
    "robust",
    "link",
    "data",
    "model",
    "optim",
    "peer",
    "algorithms",
    "runtimes",
    "checkpoint",
    "run_folder",
    "evaluation",
    "formatting",
    "metric",
    "report",
    "watch",
    "audit",
    "progress",
    "prepare",
    "assemble",
    "average",
    "run_state",
    "records",
    "workload",
    "run_setup",
    "run_end",
    "run",
    "launch",
    "site",
    "consortium",
    "doctor",
    "export",
    "measure_files",
    "demo",
    "compare",
    "cli",
    "__main__",
]


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Layers a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("peertune."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "peertune":
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("peertune."))
    return found


def test_layers_import_only_from_layers_above() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        layer = layer_of(path)
        if layer == "__init__":
            continue
        assert layer in LAYERS, f"{path.name}: give the new layer a place in LAYERS"
        for other in imports_of(path):
            if other != layer and LAYERS.index(other) > LAYERS.index(layer):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert not wrong, wrong


def test_every_layer_exists() -> None:
    names = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p.is_dir() and (p / "__init__.py").exists())}
    assert set(LAYERS) == names - {"__init__"}


def test_a_model_without_an_adapter_does_not_wait_for_peft() -> None:
    """Its import takes more than a second, of every run and command that loads a model."""
    loads = (
        "import sys; from peertune.config import ModelSection; from peertune.model.language_model import LanguageModel;"
        " from peertune.model.load import load_model; import torch;"
        " LanguageModel(load_model(ModelSection(), torch.device('cpu')), ModelSection());"
        " sys.exit('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", loads], timeout=300).returncode == 0
