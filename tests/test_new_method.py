"""The worked example of docs/new_method.md is run as it is printed there."""

import importlib.util
import re
from pathlib import Path

import pytest

from peertune import algorithms
from peertune.config import load_recipe
from peertune.run import run

PAGE = Path(__file__).parents[1] / "docs" / "new_method.md"


def test_the_worked_example_is_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text()
    [code], [toml] = (re.findall(rf"```{kind}\n(.*?)```", text, re.S) for kind in ("python", "toml"))
    (tmp_path / "lazy_gossip.py").write_text(code)
    (tmp_path / "recipe.toml").write_text(toml)
    spec = importlib.util.spec_from_file_location("lazy_gossip", tmp_path / "lazy_gossip.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    [line] = re.findall(r'^    "lazy_gossip": (\w+),$', text, re.M)
    method = getattr(module, line)
    monkeypatch.setitem(algorithms.ALGORITHMS, "lazy_gossip", method)
    methods = {**algorithms.METHODS, "lazy_gossip": method.Config}
    config, notes = load_recipe(
        tmp_path / "recipe.toml", [f"run.out={str(tmp_path / 'out')!r}", "run.threads=1"], methods
    )
    assert not notes
    summary = run(config)
    assert summary["algorithm"] == "lazy_gossip"
    assert summary["metrics"]["average_model"]["loss"] < summary["metrics"]["before"]["loss"]
    assert all(sent > 0 for sent in summary["bytes_sent_per_peer"])
