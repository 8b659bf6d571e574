"""Shipped recipes and the README's commands run, on real data, made short."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from peertune.algorithms import METHODS
from peertune.cli import main
from peertune.config import RunConfig, Section
from peertune.recipe import keys_of, load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SHORT = [
    part
    for text in (
        "algorithm.outer_rounds=1",
        "algorithm.inner_steps=1",
        "algorithm.rounds=2",
        "algorithm.local_steps=1",
        "data.max_samples=16",
        "data.batch_size=2",
        "eval.max_samples=8",
        "eval.generate_samples=1",
        "eval.max_new_tokens=4",
        "eval.choice_samples=1",
    )
    for part in ("--set", text)
]


@pytest.fixture
def workplace(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with models/, data/ and recipes/, as the README supposes."""
    (tmp_path / "models").symlink_to(shared / "models")
    (tmp_path / "data").symlink_to(shared / "data")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.removeprefix(".venv/bin/") for line in lines if "peertune " in line and "demo" not in line]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_runs(path: Path, workplace: Path) -> None:
    assert main(["run", str(path), *SHORT, "--out", "out"]) == 0


def test_the_readmes_cluster_command_runs(workplace: Path) -> None:
    """With two processes and peers in place of eight."""
    (command,) = (line for line in readme_commands() if line.startswith("torchrun "))
    _, *arguments = shlex.split(command.replace("--nproc-per-node 8", "--standalone --nproc-per-node 2"))
    launcher = [sys.executable, "-m", "torch.distributed.run", *arguments]
    ran = subprocess.run([*launcher, *SHORT, "--set=run.num_peers=2"], capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr


def test_the_readmes_commands_run_in_their_order(workplace: Path) -> None:
    commands = [line for line in readme_commands() if not line.startswith("torchrun ")]
    assert len(commands) >= 4
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "peertune"
        assert main([*arguments, *(SHORT if arguments[0] in ("run", "compare") else [])]) == 0, command


def test_the_readmes_scripts_exist_and_its_tree_is_true() -> None:
    text = (ROOT / "README.md").read_text()
    for script in re.findall(r"scripts/\w+(?:\.py)?", text):
        assert (ROOT / script).exists(), script
    tree = next(body for _, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M) if "errors.py" in body)
    named = {name for name in re.findall(r"^ {2,4}(\w+(?:\.py|/))", tree, re.M)}
    package = ROOT / "src" / "peertune"
    there = {p.name + ("/" if p.is_dir() else "") for p in package.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert {n for n in there if not n.startswith("__")} <= named


def test_the_readmes_recipe_keys_exist() -> None:
    known = set(keys_of(RunConfig)) | {f"algorithm.{k}" for m in METHODS.values() for k in m.model_fields}
    for key in re.findall(r"--set (\w+(?:\.\w+)+)=", (ROOT / "README.md").read_text()):
        assert key in known, key


def test_every_key_says_what_it_means() -> None:
    """`peertune run --help` shows it."""

    def silent(section: type[Section], prefix: str) -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found += silent(field.annotation, f"{prefix}{name}.")
            elif not (field.description or "").strip():
                found.append(prefix + name)
        return found

    assert silent(RunConfig, "") == []
    for method, config in METHODS.items():
        assert silent(config, f"{method}: algorithm.") == []


def test_the_demos_recipe_is_valid() -> None:
    config, notes = load_recipe(ROOT / "src" / "peertune" / "demo.toml", [], METHODS)
    assert config.algorithm.name == "deca" and not notes


def test_the_tables_cells_trained_alike() -> None:
    """What a comparison's cells drew is in its file: methods with half of the others' samples do not compare."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("compare-*.csv")):
        with path.open() as file:
            samples = {float(row["samples"]) for row in csv.DictReader(file) if "samples" in row}
        assert not samples or max(samples) <= 1.05 * min(samples), path.name
