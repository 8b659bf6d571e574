"""docs/new_method.md, done as it is printed there: in a copy of the package, and as a package of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "new_method.md").read_text()
CODE, FROM_PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.S)
[RECIPE] = re.findall(r"```toml\n(.*?)```", PAGE, re.S)


def python(*arguments: str, path: Path, cwd: Path) -> str:
    """What a process says that finds `path` before all other packages."""
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    return f"{done.stdout}{done.stderr}"


def test_the_worked_example_is_a_method_of_the_package(tmp_path: Path) -> None:
    package = tmp_path / "src" / "peertune"
    shutil.copytree(ROOT / "src" / "peertune", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "algorithms" / "lazy_gossip.py").write_text(CODE)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    lines = (package / "algorithms" / "__init__.py").read_text()
    [added] = re.findall(r"^    (from peertune\.algorithms\.lazy_gossip \S+ \w+)", PAGE, re.M)
    [line] = re.findall(r'^    ("lazy_gossip": \w+,)$', PAGE, re.M)
    lines = lines.replace("from peertune.algorithms.local import", f"{added}\nfrom peertune.algorithms.local import")
    lines = lines.replace('    "deca": Deca,\n', f'    "deca": Deca,\n    {line}\n')
    (package / "algorithms" / "__init__.py").write_text(lines)
    said = python("-c", FROM_PYTHON, path=tmp_path / "src", cwd=tmp_path)
    loss, rounds = said.split()[-2:]
    assert (float(loss) < 5, rounds) == (True, "4"), said
    assert (tmp_path / "runs" / "lazy" / "model").is_dir()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder as pip would leave it: the method of the page in a package of its own."""
    (tmp_path / "my_methods").mkdir()
    (tmp_path / "my_methods" / "lazy_gossip.py").write_text(CODE)
    info = tmp_path / "my_methods-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.2\n")
    [head, line] = re.findall(r"^    (\[project\.entry-points\S+|lazy_gossip = \S+)$", PAGE, re.M)
    group = head.split('"')[1]
    (info / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    return tmp_path


def asked(code: str, installed: Path) -> str:
    path = f"{installed}{os.pathsep}{ROOT / 'src'}"
    return python("-c", code, path=Path(path), cwd=installed).strip()


def test_a_method_may_come_with_a_package_of_its_own(installed: Path) -> None:
    say = "from peertune.algorithms import METHODS; from peertune.plugins import code_version; import peertune;"
    found = asked(
        f"{say} print(METHODS['lazy_gossip'].__module__, code_version('lazy_gossip'), code_version('deca'))", installed
    )
    version = asked("import peertune; print(peertune.__version__)", installed)
    assert found == f"my_methods.lazy_gossip {version} with my-methods 1.2 {version}"
    assert "Share of the way to the mean" in asked("from peertune.cli import main; main(['run', '--help'])", installed)


def test_a_method_of_a_notebook_is_known_once_it_is_named(installed: Path) -> None:
    shutil.rmtree(installed / "my_methods-1.2.dist-info")
    [line] = re.findall(r"^`(ALGORITHMS\[.*)` \(both of `peertune\.algorithms`\)", PAGE, re.M)
    (installed / "cell.py").write_text(f"""
from my_methods.lazy_gossip import LazyGossip
from peertune.algorithms import ALGORITHMS, METHODS
from peertune.recipe import load_recipe
{line}
print(load_recipe(None, ["algorithm.name=lazy", "algorithm.tau=0.25"], METHODS)[0].algorithm.tau)
""")
    assert asked("import cell", installed) == "0.25"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lazy_gossip = my_methods.gone:LazyGossip", "my-methods 1.2 brings the method 'lazy_gossip' as"),
        ("deca = my_methods.lazy_gossip:LazyGossip", "expected another name"),
        ("lazy_gossip = my_methods.lazy_gossip:LazyGossipConfig", "expected a subclass of Algorithm"),
    ],
)
def test_a_package_that_cannot_bring_its_method_is_named(line: str, said: str, installed: Path) -> None:
    (installed / "my_methods-1.2.dist-info" / "entry_points.txt").write_text(f"[peertune.algorithms]\n{line}\n")
    (installed / "recipe.toml").write_text(RECIPE)
    told = asked("from peertune.cli import main; print('code', main(['run', 'recipe.toml']))", installed)
    assert said in told and "code 2" in told and "Traceback" not in told
