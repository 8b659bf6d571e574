"""Every kind of bad input ends in one clear line and exit code 2, with nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from peertune.algorithms import METHODS
from peertune.cli import main
from peertune.errors import ConfigError, DataError
from peertune.prepare import prepare_data
from peertune.recipe import from_dict
from tests.recipes import tree

Recipe = dict[str, dict[str, Any]]


def rows(recipe: Recipe, text: str) -> None:
    Path(recipe["data"]["train"]).write_text(text)


def line(text: str, label: str = "red") -> str:
    return json.dumps({"text": text, "label": label}) + "\n"


def renamed(recipe: Recipe, name: str) -> None:
    recipe["data"]["train"] = str(Path(recipe["data"]["train"]).rename(name))


def damaged_model(recipe: Recipe) -> None:
    folder = Path(recipe["run"]["out"]).parent / "damaged"
    shutil.copytree(recipe["model"]["path"], folder)
    module = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        module.lm_head.weight[0, 0] = float("nan")
    module.save_pretrained(folder)
    recipe["model"]["path"] = str(folder)


def adapter_for_a_base(recipe: Recipe) -> None:
    """transformers loads it on its base, unasked; a run of hours could not write its model."""
    from peft import LoraConfig, get_peft_model

    from peertune.model.adapters import peft_is_quiet

    folder = Path(recipe["run"]["out"]).parent / "adapter"
    shutil.copytree(recipe["model"]["path"], folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    module = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"])
    with peft_is_quiet():
        get_peft_model(module, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    recipe["model"]["path"] = str(folder)


def pointers_for_weights(recipe: Recipe) -> None:
    folder = Path(recipe["run"]["out"]).parent / "cloned"
    shutil.copytree(recipe["model"]["path"], folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    recipe["model"]["path"] = str(folder)


def file_in_the_way(recipe: Recipe) -> None:
    blocker = Path(recipe["run"]["out"]).parent / "blocker"
    blocker.write_text("")
    recipe["run"]["out"] = str(blocker / "out")


def another_run(recipe: Recipe) -> None:
    out = Path(recipe["run"]["out"])
    out.mkdir()
    (out / "recipe.json").write_text("{}")


class Case(NamedTuple):
    spoil: Callable[[Recipe], Any]
    message: list[str]
    """Texts that the line must hold: the key or file, what was got, what to do."""


def put(section: str, **keys: Any) -> Callable[[Recipe], None]:
    def spoil(recipe: Recipe) -> None:
        recipe.setdefault(section, {}).update(keys)

    return spoil


CASES = {
    "missing file": Case(put("data", train="no-such.jsonl"), ["no-such.jsonl"]),
    "no training file": Case(put("data", train=""), ["data: got ''", "expected a path"]),
    "missing test file": Case(put("data", test="no-such.jsonl"), ["no-such.jsonl"]),
    "empty file": Case(lambda r: rows(r, ""), ["train.jsonl", "empty"]),
    "broken JSON line": Case(lambda r: rows(r, line("a") + '{"text": '), ["train.jsonl:2"]),
    "row is no object": Case(lambda r: rows(r, line("a") + "[1]\n"), ["train.jsonl:2"]),
    "label missing": Case(lambda r: rows(r, line("a") + '{"text": "b"}\n'), ["train.jsonl:2", "label"]),
    "field of another name": Case(put("data", text_field="sentence"), ["sentence", "data.text_field"]),
    "a number of thousands of digits": Case(
        lambda r: rows(r, '{"text": "x", "label": ' + "9" * 5000 + "}\n"), [":1", "broken JSON", "too long"]
    ),
    "one class only": Case(lambda r: rows(r, "".join(line(f"x{i}") for i in range(30))), ["red"]),
    "test label never seen": Case(lambda r: Path(r["data"]["test"]).write_text(line("a", "violet")), ["violet"]),
    "unknown extension": Case(lambda r: renamed(r, "rows.xyz"), ["rows.xyz"]),
    "unknown key": Case(put("algorithm", inner_step=3), ["algorithm.inner_step", "did you mean algorithm.inner_steps"]),
    "unknown section": Case(put("algoritm", lr=3.0), ["algoritm", "did you mean algorithm?"]),
    "key of another section": Case(put("algorithm", batch_size=2), ["did you mean data.batch_size? [algorithm] has"]),
    "key in capitals": Case(put("topology", KIND="ring"), ["topology.KIND", "did you mean topology.kind?"]),
    "unknown part of a section": Case(
        put("data", partitoin={"kind": "iid"}), ["did you mean data.partition?", "[data] has partition, train"]
    ),
    "key in the wrong section": Case(put("run", lr=0.1), ["run.lr", "did you mean algorithm.lr"]),
    "unknown method": Case(put("algorithm", name="decca"), ["algorithm.name", "deca"]),
    "wrong type": Case(put("run", num_peers="four"), ["run.num_peers", '"four"', "integer"]),
    "boolean for a number": Case(put("algorithm", lr=True), ["algorithm.lr", "true", "number"]),
    "personal part that is not trained": Case(
        put("algorithm", local_modules=["lm_head", "no_such_part"]), ["local_modules", "no_such_part", "lm_head."]
    ),
    "personal parts where nothing travels": Case(
        put("algorithm", name="local", local_modules=["lm_head"]), ["local_modules", "'local'", "nothing travels"]
    ),
    "one factor of a pair personal": Case(
        put("algorithm", name="decaf", local_modules=["lora_A"]), ["local_modules", "lora_A", "both or neither"]
    ),
    "impossible value": Case(put("algorithm", lr=-1.0), ["algorithm.lr", "-1.0", "greater than or equal to 1e-30"]),
    "outer rate beyond float32": Case(put("algorithm", name="diloco", server_lr=1e38), ["server_lr", "1e+38"]),
    "rate of a server that only averages": Case(
        put("algorithm", name="fedavg", server_lr=0.5), ["server_lr", "0.5", "left out", "average"]
    ),
    "key of another server optimiser": Case(
        put("algorithm", name="diloco", server_tau=0.5), ["server_tau", "0.5", "left out", "nesterov"]
    ),
    "rate of SCAFFOLD's server": Case(put("algorithm", name="scaffold", server_lr=0.5), ["server_lr", "left out"]),
    "adapter on a base that never learned": Case(
        lambda r: (r["model"].update(init="random"), r["algorithm"].update(name="dec_lora")),
        ["model.init", "random", "adapter", "lora", "pretrained"],
    ),
    "embedding's LoRA under a method of two factors": Case(
        put("algorithm", name="decaf", target_modules=["embed_tokens", "q_proj"]), ["target_modules", "lora_embedding"]
    ),
    "rate that float32 takes for none": Case(put("algorithm", lr=1e-300), ["algorithm.lr", "1e-300", "greater"]),
    "batch beyond any memory": Case(put("data", batch_size=10**30), ["data.batch_size", "less than or equal to 65536"]),
    "rank beyond any memory": Case(
        put("algorithm", name="dec_lora", rank=10**9), ["algorithm.rank", "less than or equal to 65536"]
    ),
    "bottleneck beyond any memory": Case(
        put("algorithm", name="dec_adapter", bottleneck_size=10**9), ["bottleneck_size", "less than or equal to 65536"]
    ),
    "rate beyond float32": Case(put("algorithm", lr=1e38), ["algorithm.lr", "1e+38", "less than or equal to 1e+30"]),
    "divisor that float32 takes for zero": Case(put("algorithm", eps=1e-50), ["algorithm.eps", "1e-50", "greater"]),
    "divisor whose square no number holds": Case(
        put("algorithm", name="fedavg", server_optimizer="adam", server_tau=1e200), ["algorithm.server_tau", "1e+200"]
    ),
    "unknown choice": Case(put("topology", kind="rign"), ["topology.kind", "rign", "did you mean ring"]),
    "disconnected graph": Case(put("topology", kind="edges", edges=[[0, 1], [2, 3]]), ["connected"]),
    "edge out of range": Case(put("topology", kind="edges", edges=[[0, 9]]), ["9"]),
    "irregular uniform": Case(put("topology", kind="star", weights="uniform"), ["uniform", "metropolis"]),
    "more peers than rows": Case(put("run", num_peers=500), ["500", "60"]),
    "column that no row has": Case(
        lambda r: r["data"].update(partition={"kind": "column", "column": "site"}), ["site"]
    ),
    "fewer files than peers": Case(lambda r: r["data"].update(partition={"kind": "files"}), ["4"]),
    "NaN weights": Case(damaged_model, ["lm_head.weight", "NaN"]),
    "adapter for a base": Case(adapter_for_a_base, ["model.path", "is an adapter", "merge it into its base"]),
    "weights not fetched": Case(pointers_for_weights, ["model.path", "Git LFS", "git lfs pull"]),
    "file for a model": Case(lambda r: r["model"].update(path=r["data"]["train"]), ["model.path", "this is a file"]),
    "no such model": Case(put("model", path="no/such-model"), ["model.path", "no/such-model"]),
    "no position left for a prompt": Case(
        put("algorithm", name="dec_lora", adapter="prompt", num_virtual_tokens=60),
        ["model.max_length", "40", "60", "96"],
    ),
    "more virtual tokens than positions": Case(
        put("algorithm", name="dec_lora", adapter="prompt", num_virtual_tokens=200), ["96 positions for both; take"]
    ),
    "more than the model's positions": Case(put("model", max_length=4096), ["model.max_length", "4096", "96"]),
    "nothing left after cutting": Case(
        lambda r: (rows(r, "".join(line("x", "l" * 60 + str(i % 2)) for i in range(30)))), ["max_length"]
    ),
    "no such device": Case(put("run", device="cuda:99"), ["run.device", "cuda:99"]),
    "out under a file": Case(file_in_the_way, ["run.out", "is a file"]),
    "out holds another run": Case(another_run, ["already holds a run", "--resume"]),
    "too little disk": Case(put("run"), ["run.out", "MB free"]),
}  # fmt: skip


def write_toml(recipe: Recipe, path: Path) -> None:
    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{k} = {value(v)}" for k, v in item.items()) + "}"
        return json.dumps(item, ensure_ascii=False)

    lines = []
    for section, keys in recipe.items():
        lines += [f"[{section}]", *(f"{key} = {value(item)}" for key, item in keys.items())]
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_one_line_exit_2_nothing_written(
    name: str, tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tree(tmp_path, micro_model)
    CASES[name].spoil(recipe)
    if name == "too little disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    write_toml(recipe, tmp_path / "recipe.toml")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["run", "recipe.toml"]) == 2
    errors = [
        text for text in capsys.readouterr().err.splitlines() if not text.startswith(("note:", "Loading", "Writing"))
    ]
    assert len(errors) == 1, errors
    assert errors[0].startswith("peertune: error: ")
    for part in CASES[name].message:
        assert part in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "missing.toml"], "missing.toml"),
        (["run", "broken.toml"], "not valid TOML"),
        (["run", "empty.toml", "--set", "nonsense"], "section.key=value"),
        (["run", "empty.toml", "--set", f"run.seed={'9' * 5000}"], "run.seed"),
        (["run", "empty.toml", "--set", "run.num_peers=[1"], "run.num_peers"),
        (["run", "empty.toml", "--set", "algorithm.betas=[0.9]"], "algorithm.betas"),
        (["run", "empty.toml", "--set", "data.labels=[yes,no]"], "put the texts of a list into double quotes"),
        (["run", "empty.toml", "--set", "algorithm.local_modules=lm_head"], 'expected a list, such as ["lm_head"]'),
        (["report", "."], "no run"),
        (["export", ".", "--to", "there"], "holds no run"),
        (["eval", "m", "--data", "d.jsonl", "--task", "text", "--set", "run.seed=1"], "expected a key of [data]"),
        (["eval", "no-model", "--data", "no-data.jsonl", "--task", "text"], "no-data.jsonl"),
    ],
)
def test_the_command_line_too(
    arguments: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.toml").write_text("[run\n")
    (tmp_path / "empty.toml").write_text("")
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and part in errors[0], errors


def test_a_key_of_another_method_is_only_noted(
    tmp_path: Path, micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tree(tmp_path, micro_model, algorithm={"name": "local", "discrepancy": "none", "inner_steps": 1})
    write_toml(recipe, tmp_path / "recipe.toml")
    assert main(["run", str(tmp_path / "recipe.toml")]) == 0
    assert "algorithm.discrepancy is not used by local" in capsys.readouterr().err


def test_a_key_of_a_choice_that_is_not_made_is_noted() -> None:
    """A rank without LoRA, edges under another kind of graph; but nothing of a recipe that is written out whole."""
    unused = {"topology": {"kind": "ring", "edges": [[0, 1]]}, "algorithm": {"rank": 4}, "exchange": {"trim": 1}}
    assert from_dict(unused, METHODS)[1] == [
        "topology.edges is not used with topology.kind = 'ring' (but with 'edges')",
        "algorithm.rank is not used with algorithm.adapter = 'none' (but with 'lora')",
    ]
    used = {"topology": {"kind": "edges", "edges": [[0, 1]]}, "algorithm": {"name": "dec_lora", "rank": 4}}
    assert from_dict(from_dict(used, METHODS)[0].to_dict(), METHODS)[1] == []


def test_a_site_may_hold_one_class_but_not_other_ones_than_its_test_file(tmp_path: Path, micro_model: Path) -> None:
    """It is one of several, and its file works in their simulation."""
    data = tree(tmp_path, micro_model)
    own, test = tmp_path / "own.jsonl", tmp_path / "measured.jsonl"
    own.write_text("".join(json.dumps({"text": f"x{i}", "label": "red"}) + "\n" for i in range(12)))
    data["data"] |= {"train": str(own), "test": "", "validation_rows": 0}
    assert len(prepare_data(from_dict(data, METHODS)[0], None, 0).train[0].samples) == 12
    test.write_text("".join(json.dumps({"text": f"y{i}", "label": i % 2}) + "\n" for i in range(4)))
    data["data"]["test"] = str(test)
    with pytest.raises(DataError, match=r"data.test: its labels \(0, 1\) are none of the training rows' \(red\)"):
        prepare_data(from_dict(data, METHODS)[0], None, 0)


def test_a_recipe_names_no_column_that_a_sites_log_would_list(tmp_path: Path, micro_model: Path) -> None:
    data, own = tree(tmp_path, micro_model), tmp_path / "own.jsonl"
    rows = [{"text": f"x{i}", "label": i % 2, "patient": f"name {i}"} for i in range(8)]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partition = {"kind": "column", "column": "patient"}
    data["data"] |= {"train": str(own), "test": "", "validation_rows": 0, "partition": partition}
    (held,) = prepare_data(from_dict(data, METHODS)[0], None, 0).holdings
    assert held == {"samples": 8, "classes": {"0": 4, "1": 4}, "others": 0}


def test_classes_that_a_recipe_names_are_those_of_every_site(tmp_path: Path, micro_model: Path) -> None:
    """A site that lacks a long one still cuts texts to leave room for it, and ends 1 as where there is a 10."""
    data = tree(tmp_path, micro_model, model={"path": str(micro_model), "max_length": 24})
    files = {"one": ["1"], "other": ["10", "a long name"], "both": ["1", "10", "a long name"]}
    for name, labels in files.items():
        rows = [json.dumps({"text": f"word {i} " * 9, "label": label}) for label in labels for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    data["data"] |= {"test": "", "partition": {"kind": "files"}, "train": [str(tmp_path / f"{n}.jsonl") for n in files]}
    data["run"]["num_peers"] = 3

    def ids(site: int | None, labels: list[str]) -> list[list[list[int]]]:
        tree = {**data, "data": {**data["data"], "labels": labels}}
        if site is not None:
            tree["data"]["train"] = data["data"]["train"][site]
        found = prepare_data(from_dict(tree, METHODS)[0], None, site)
        assert not labels or list(found.label_names) == labels
        return [[sample.input_ids.tolist() for sample in part.samples] for _, part in sorted(found.train.items())]

    named = ["a long name", "1", "10"]
    assert [ids(site, named)[0] for site in range(3)] == ids(None, named)
    assert ids(0, [])[0] != ids(None, [])[0]
    with pytest.raises(
        DataError, match=r"data.labels: got 12 rows with label .10. in field .label., expected one of a lo"
    ):
        ids(None, ["a long name", "1"])
    for wrong in (["1"], ["1", " 1"]):
        with pytest.raises(
            ConfigError, match=r"data.labels: got .*, expected two names or more, all different, or none"
        ):
            ids(None, wrong)


def test_a_server_needs_no_rows(tmp_path: Path, micro_model: Path) -> None:
    data = tree(tmp_path, micro_model)
    data["data"] |= {"train": "", "test": ""}
    assert prepare_data(from_dict(data, METHODS)[0], None, 4).train == {}
    data["data"]["labels"] = ["yes", "no"]
    assert prepare_data(from_dict(data, METHODS)[0], None, 4).label_names == ["yes", "no"], (
        "its model comes with them too"
    )
