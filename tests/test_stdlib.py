"""The standard library as data, the shipped base model, and the script that made it."""

import importlib.util
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import peertune
from peertune.data import stdlib
from peertune.data.stdlib import GROUPS, cut, group_files, load_stdlib, stdlib_root
from peertune.errors import DataError

TINY = Path(peertune.__file__).parent / "tiny"
SCRIPT = Path(__file__).parents[1] / "scripts" / "make_tiny_model.py"


@pytest.fixture(scope="module")
def make() -> Iterator[ModuleType]:
    """scripts/make_tiny_model.py, imported."""
    spec = importlib.util.spec_from_file_location("make_tiny_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tiny_model"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_tiny_model"]


def test_eight_groups_share_no_file() -> None:
    files = [path for group in GROUPS for path in group_files(stdlib_root(), group)]
    assert len(GROUPS) == 8
    assert len(files) == len(set(files))


def test_pretrain_text_is_no_peers_text() -> None:
    root = stdlib_root()
    rows, groups = load_stdlib("pretrain")
    modules = [row["module"] for row in rows]
    held = {stdlib._dotted(root, path) for group in GROUPS for path in group_files(root, group)}
    assert set(groups) == {0}
    assert {row["client"] for row in rows} == {"pretrain"}
    assert len(modules) == len(set(modules))
    assert held.isdisjoint(modules)
    assert {"typing", "logging"} <= set(modules)
    assert not [name for name in modules if name.startswith(("encodings", "test.", "site-packages", "_sysconfigdata"))]
    assert sum(len(row["text"]) for row in rows) > 3_000_000


def test_train_and_test_share_no_chunk() -> None:
    train, train_groups = load_stdlib("train")
    test, test_groups = load_stdlib("test")
    assert {row["text"] for row in train}.isdisjoint(row["text"] for row in test)
    assert set(train_groups) == set(test_groups) == set(range(8))
    for rows, groups in ((train, train_groups), (test, test_groups)):
        names = list(GROUPS)
        assert [row["client"] for row in rows] == [names[index] for index in groups]


def test_test_lines_are_seldom_in_train() -> None:
    """Reference text repeats itself; a held-out chunk must not be a copy of a training chunk in other words."""
    train: dict[str, set[str]] = {group: set() for group in GROUPS}
    for row in load_stdlib("train")[0]:
        train[row["client"]] |= {line.strip() for line in row["text"].splitlines() if len(line.strip()) > 30}
    lines = [
        line.strip() in train[row["client"]]
        for row in load_stdlib("test")[0]
        for line in row["text"].splitlines()
        if len(line.strip()) > 30
    ]
    assert sum(lines) / len(lines) < 0.1


def test_groups_are_about_equal() -> None:
    rows, groups = load_stdlib("train")
    sizes = [sum(len(row["text"]) for row, index in zip(rows, groups, strict=True) if index == g) for g in range(8)]
    assert all(150_000 < size < 250_000 for size in sizes), sizes
    assert max(len(row["text"]) for row in rows) < 6_000


def test_rows_are_repeatable() -> None:
    assert load_stdlib("train") == load_stdlib("train")
    assert load_stdlib("pretrain") == load_stdlib("pretrain")


def test_missing_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUPS, "xml", ("xml", "no_such_module"))
    with pytest.raises(DataError, match=r"'no_such_module'.*Python 3\.\d+\.\d+.*install") as error:
        load_stdlib("train")
    assert "\n" not in str(error.value)


def test_module_may_be_file_or_package_and_undecodable_files_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pathlib` became a package in 3.13; a Latin-1 file is skipped; tests and installed packages are not taken."""
    (tmp_path / "alone.py").write_text("x = 1\n")
    for name in ("package", "package/test", "site-packages"):
        (tmp_path / name).mkdir()
    (tmp_path / "package" / "__init__.py").write_text("y = 2\n")
    (tmp_path / "package" / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "package" / "test" / "inner.py").write_text("t = 3\n")
    (tmp_path / "site-packages" / "other.py").write_text("o = 4\n")
    (tmp_path / "rest.py").write_text("r = 5\n")
    monkeypatch.setattr(stdlib, "GROUPS", {"both": ("package", "alone")})
    monkeypatch.setattr(stdlib, "stdlib_root", lambda: tmp_path)
    assert [(row["module"], row["text"]) for row in load_stdlib("train")[0]] == [
        ("alone", "x = 1\n"),
        ("package", "y = 2\n"),
    ]
    assert [row["module"] for row in load_stdlib("pretrain")[0]] == ["rest"]


@given(
    st.lists(
        st.sampled_from(["def f():\n", "    def g(self):\n", "@wraps\n", "\n", "    x = 1\n" * 90, "#" * 5000]),
        max_size=40,
    )
)
def test_chunks_join_to_the_text(parts: list[str]) -> None:
    text = "".join(parts)
    chunks = cut(text)
    assert "".join(chunks) == text
    assert all(chunks)
    assert all(len(chunk) >= 2000 for chunk in chunks[:-1])


def test_chunks_end_before_top_level_definitions() -> None:
    text = "".join(f"@cached\ndef f{i}():\n" + "    return 'some value'\n" * 50 for i in range(10))
    chunks = cut(text)
    assert len(chunks) > 1
    assert all(chunk.startswith("@cached\ndef ") for chunk in chunks)


def test_shipped_model_loads_and_is_better_than_chance() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 4_000_000
    assert not [path for path in TINY.iterdir() if path.suffix not in {".json", ".safetensors", ".jinja"}]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert model.config.tie_word_embeddings is False
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    ids = tokenizer(load_stdlib("test")[0][0]["text"], return_tensors="pt", truncation=True, max_length=256)[
        "input_ids"
    ]
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    assert torch.isfinite(output.logits).all()
    assert output.logits.shape == (1, 256, len(tokenizer))
    assert float(output.loss) < 0.7 * math.log(len(tokenizer))


def test_shipped_tokenizer_round_trips_python() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = Path(__file__).read_text(encoding="utf-8") + "\té→🐍\r\n  <x> don't , do .\x00"
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_chat_template_has_one_token_a_role() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    messages = [{"role": role, "content": f"I am {role}"} for role in ("system", "user", "assistant")]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<s>" + "".join(f"<|{m['role']}|>\n{m['content']}</s>\n" for m in messages)
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert [len(tokenizer(f"<|{role}|>", add_special_tokens=False)["input_ids"]) for role in ("user", "tool")] == [1, 1]


def test_script_lowers_the_loss_and_repeats_bitwise(make: ModuleType, tmp_path: Path) -> None:
    texts = [row["text"] for row in load_stdlib("test")[0][:6]]
    tokenizer = make.train_tokenizer(texts, vocab_size=300)
    config = make.model_config(
        tokenizer,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    ids = make.pack(tokenizer, texts)
    runs = [
        make.train(config, ids, num_steps=20, context=32, batch_size=4, peak_lr=1e-2, log_every=0) for _ in range(2)
    ]
    losses = runs[0][1]
    assert losses == runs[1][1]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    assert make.evaluate(runs[0][0], ids, context=32) < math.log(300)
    make.save(runs[0][0], tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path)("def f():")["input_ids"] == tokenizer("def f():")["input_ids"]


def test_windows_see_the_whole_text_and_refuse_too_little(make: ModuleType) -> None:
    batches = make.windows(torch.arange(1000), context=10, batch_size=7, seed=0)
    epoch = torch.cat([next(batches) for _ in range(14)])
    assert len(set(epoch.flatten().tolist())) == epoch.numel() == 980
    assert (epoch.diff(dim=1) == 1).all()
    with pytest.raises(ValueError, match="too few"):
        next(make.windows(torch.arange(50), context=10, batch_size=7, seed=0))


def test_learning_rate_warms_up_and_falls_to_zero(make: ModuleType) -> None:
    rates = [make.learning_rate(step, 100, 1.0, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == rates[9] == 1.0
    assert rates[100] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(rates[10:]))
