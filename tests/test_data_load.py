"""Loading: each format gives the same rows, and what is wrong is named with file and line."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peertune.config import DataSection
from peertune.data.load import load_table
from peertune.errors import DataError

TEXT = DataSection(task="text")
LABELS = DataSection(task="classification")
CHAT = DataSection(task="chat")
ROWS = [{"text": "née, \u2028 ß", "label": "1"}, {"text": 'a "b", c\r\nd', "label": "x"}]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_text(lines(ROWS), encoding="utf-8"),
    "crlf.jsonl": lambda path: path.write_bytes(lines(ROWS).replace("\n", "\r\n").encode()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(ROWS).encode())),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "a.csv": write_csv,
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats_agree(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    table = load_table(str(tmp_path / name), LABELS)
    assert table.rows == ROWS
    assert table.source == [0, 0]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_whole_numbers_beside_missing_labels_are_integers(missing: float | None, tmp_path: Path) -> None:
    """pandas makes floats of such a column, null or NaN where there is nothing; the test file's may have integers."""
    rows = [{"text": "a", "label": 1.0}, {"text": "b", "label": missing}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(lines(rows))
    for name in ("a.parquet", "a.jsonl"):
        assert [row["label"] for row in load_table(str(tmp_path / name), LABELS).rows] == ["1", ""]


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["x"], ["y"]], names=["text", "label", "label"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: two columns have the same name; got text, label, label"):
        load_table(str(tmp_path / "a.parquet"), LABELS)


def test_objects_in_parquet_have_their_own_keys_only(tmp_path: Path) -> None:
    """Arrow gives every object of a column the keys of all; the nulls would be learned as arguments of calls."""
    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]}], "tools": [tool]}
        for name, arguments, tool in (("a", {"x": 1}, {"name": "a"}), ("b", {"y": "z"}, {"name": "b", "doc": "d"}))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    found = load_table(str(tmp_path / "c.parquet"), DataSection(task="chat")).rows
    assert [row["messages"][0]["tool_calls"] for row in found] == [row["messages"][0]["tool_calls"] for row in rows]
    assert [row["tools"] for row in found] == [row["tools"] for row in rows]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_one_document(name: str, tmp_path: Path) -> None:
    raw = b"one\r\n\r\ntwo\n"
    (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith("gz") else raw)
    assert load_table(str(tmp_path / name), DataSection(text_field="body")).rows == [{"body": "one\r\n\r\ntwo\n"}]


def test_sources_are_told_apart_and_found_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, base = tmp_path / "here", tmp_path / "base"
    for folder, word in ((here, "here"), (base, "base")):
        folder.mkdir()
        (folder / "a.jsonl").write_text(lines([{"text": word}]))
    (base / "b.jsonl").write_text(lines([{"text": "b"}] * 2))
    monkeypatch.chdir(here)
    table = load_table(["a.jsonl", "b.jsonl"], TEXT, base=base)
    assert [row["text"] for row in table.rows] == ["here", "b", "b"]
    assert table.source == [0, 1, 1]
    assert load_table("a.jsonl", TEXT, base=tmp_path / "nowhere").rows == [{"text": "here"}]


def test_labels_become_text(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in (1, True, " x ", None)]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    assert [row["label"] for row in load_table(str(tmp_path / "a.jsonl"), LABELS).rows] == ["1", "True", "x", ""]


def test_messages_are_put_in_order(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ]
    expected = [{"role": "user", "content": "ab"}, {**messages[1], "content": ""}]
    (tmp_path / "a.jsonl").write_text(
        lines([{"messages": messages}, {"messages": json.dumps(messages), "tools": "[{}]"}])
    )
    plain, quoted = load_table(str(tmp_path / "a.jsonl"), CHAT).rows
    assert plain["messages"] == quoted["messages"] == expected
    assert quoted["tools"] == [{}]


def test_calls_are_read_in_every_form_they_come_in(tmp_path: Path) -> None:
    """As a list, one object, their JSON text, or the older field; an answer's role was another then, too."""
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    forms = [
        {"tool_calls": [call]}, {"tool_calls": call}, {"tool_calls": json.dumps([call])},
        {"function_call": call["function"]},
    ]  # fmt: skip
    rows = [
        {"messages": [{"role": "assistant", "content": "", **form}, {"role": "function", "name": "f", "content": "1"}]}
        for form in forms
    ]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    expected = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "1"},
    ]
    assert [row["messages"] for row in load_table(str(tmp_path / "a.jsonl"), CHAT).rows] == [expected] * 4


def test_conversations_as_sharegpt_has_them_are_read(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    says = [("system", "s"), ("human", "q"), ("function_call", json.dumps(call)), ("observation", "1"), ("gpt", "a")]
    says.append(("function_call", json.dumps([call, call])))
    row = {"conversations": [{"from": speaker, "value": value, "weight": 0} for speaker, value in says]}
    (tmp_path / "a.jsonl").write_text(lines([row]))
    config = DataSection(task="chat", messages_field="conversations")
    made = {"type": "function", "function": call}
    assert load_table(str(tmp_path / "a.jsonl"), config).rows[0]["conversations"] == [
        {"role": "system", "weight": 0, "content": "s"},
        {"role": "user", "weight": 0, "content": "q"},
        {"role": "assistant", "weight": 0, "tool_calls": [made], "content": ""},
        {"role": "tool", "weight": 0, "content": "1"},
        {"role": "assistant", "weight": 0, "content": "a"},
        {"role": "assistant", "weight": 0, "tool_calls": [made, made], "content": ""},
    ]
    row["conversations"][1]["from"] = "narrator"
    (tmp_path / "a.jsonl").write_text(lines([row]))
    with pytest.raises(DataError, match="message 2: field 'from' is 'narrator', expected one of system, human"):
        load_table(str(tmp_path / "a.jsonl"), config)


def test_a_system_turn_may_stand_beside_the_messages(tmp_path: Path) -> None:
    asked, told = {"role": "user", "content": "q"}, {"role": "system", "content": "own"}
    rows: list[dict[str, Any]] = [{"system": "s", "messages": [asked]}, {"system": "s", "messages": [told, asked]}]
    rows += [{"system": "", "messages": [asked]}, {"system": None, "messages": [asked]}, {"messages": [asked]}]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    first, *others = [row["messages"] for row in load_table(str(tmp_path / "a.jsonl"), CHAT).rows]
    assert first == [{"role": "system", "content": "s"}, asked]
    assert others == [[told, asked], [asked], [asked], [asked]]
    with pytest.raises(DataError, match=r"no row has the field 'prompt'.*data\.system_field"):
        load_table(str(tmp_path / "a.jsonl"), DataSection(task="chat", system_field="prompt"))
    (tmp_path / "a.jsonl").write_text(lines([{"system": {"os": "any"}, "messages": [asked]}]))
    [row] = load_table(str(tmp_path / "a.jsonl"), DataSection(task="chat", system_field="")).rows
    assert row["messages"] == [asked]


def test_long_cells_of_csv_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"' + "long " * 50_000 + '"\n')
    limit = csv.field_size_limit()
    assert len(load_table(str(tmp_path / "a.csv"), TEXT).rows[0]["text"]) == 250_000
    assert csv.field_size_limit() == limit


def test_a_column_alone_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text|raw\na\nb\n")
    config = DataSection(task="text", text_field="text|raw")
    assert load_table(str(tmp_path / "a.csv"), config).rows == [{"text|raw": "a"}, {"text|raw": "b"}]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_cells_may_have_what_spreadsheets_put_between_them(separator: str, tmp_path: Path) -> None:
    """Semicolons where a comma is the decimal point; texts may hold all of these, and line ends, in quotes."""
    path, text = tmp_path / ("a.tsv" if separator == "\t" else "a.csv"), 'one, two; three | \t "four"\nfive'
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows([["text", "label"], [text, "x"], ["1,5", "y"]])
    assert load_table(str(path), LABELS).rows == [{"text": text, "label": "x"}, {"text": "1,5", "label": "y"}]


@pytest.mark.parametrize(
    ("header", "cell"), [("text;label", '"' + "a, b\n" * 2**18 + '"'), ("text;label;length, cm", "a")]
)
def test_semicolons_between_cells_are_found_beside_commas_within(header: str, cell: str, tmp_path: Path) -> None:
    """Also past a first cell of a megabyte, and where a column's name and its decimal point are a comma alike."""
    end = ";1,5" * (header.count(";") - 1)
    (tmp_path / "a.csv").write_text(f"{header}\n{cell};x{end}\nb;y{end}\n")
    assert [row["label"] for row in load_table(str(tmp_path / "a.csv"), LABELS).rows] == ["x", "y"]


def test_columns_without_a_name_are_no_two_of_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",text,label,,\n0,a,x,,\n1,b,y,,\n")
    assert [row["label"] for row in load_table(str(tmp_path / "a.csv"), LABELS).rows] == ["x", "y"]


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder in the hub's layout with labels as class numbers."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    folder = tmp_path / "org" / "set"
    (folder / "data").mkdir(parents=True)
    for split, labels in (("train", [1, 0]), ("test", [1])):
        made = datasets.Dataset.from_dict({"text": ["t"] * len(labels), "label": labels}, features=features)
        made.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return folder


def test_folder_in_hub_layout(hub_folder: Path) -> None:
    rows = [{"text": "t", "label": "yes"}, {"text": "t", "label": "no"}]
    assert load_table(str(hub_folder), LABELS).rows == rows
    assert load_table(["org/set", "org/set:test"], LABELS).rows == [*rows, rows[0]]
    with pytest.raises(DataError, match=r"org/set:dev: .*dev"):
        load_table("org/set:dev", LABELS)


def test_folder_of_several_configurations(hub_folder: Path) -> None:
    """As GLUE, MMLU and GSM8K are on the hub: which there are is said, and one can be named."""
    (hub_folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: train\n    path: data/{split}-*\n"
            for name, split in (("one", "train"), ("two", "test"))
        )
        + "---\n"
    )
    assert [row["label"] for row in load_table("org/set:two:train", LABELS).rows] == ["yes"]
    with pytest.raises(DataError, match=r"org/set:train: .* configs: \['one', 'two'\]; expected NAME\[\[:CONFIG\]"):
        load_table("org/set", LABELS)


def test_folder_of_save_to_disk(hub_folder: Path) -> None:
    train, test = (datasets.load_dataset(str(hub_folder), split=split) for split in ("train", "test"))
    train.save_to_disk("alone")
    datasets.DatasetDict({"old": train, "new": test}).save_to_disk("both")
    rows = [{"text": "t", "label": "yes"}, {"text": "t", "label": "no"}]
    assert load_table("alone", LABELS).rows == load_table("both:old", LABELS).rows == rows
    assert load_table("both:new", LABELS).rows == rows[:1]
    with pytest.raises(DataError, match=r"both:train: .*there has old, new only"):
        load_table("both", LABELS)
    with pytest.raises(DataError, match=r"alone:test: .*there has train only"):
        load_table("alone:test", LABELS)
    for damaged in ("{}", "[]"):
        Path("alone", "state.json").write_text(damaged)
        with pytest.raises(DataError, match=r"alone:train: .*there is damaged .*; save it anew; expected NAME"):
            load_table("alone", LABELS)


def test_class_numbers_in_parquet_become_their_names(hub_folder: Path) -> None:
    """A file taken out of a hub's folder keeps them beside its schema; numbers may be prefixes of each other."""
    path = hub_folder / "data" / "train-00000-of-00001.parquet"
    assert [row["label"] for row in load_table(str(path), LABELS).rows] == ["yes", "no"]
    table = pq.read_table(path)
    for damaged in (b"", b"[]", b'{"info": {"features": {"label": {"names": 3}}}}'):
        pq.write_table(table.replace_schema_metadata({"huggingface": damaged}), path)
        assert [row["label"] for row in load_table(str(path), LABELS).rows] == ["1", "0"]


def test_a_broken_file_in_a_folder_is_told(hub_folder: Path) -> None:
    Path("rows").mkdir()
    Path("rows", "train.jsonl").write_text('{"text": "a"}\n{"text":\n')
    told = r"rows:train: no data set in this folder loads: .*generating the dataset: JSON parse error: .*row 1;"
    with pytest.raises(DataError, match=told):
        load_table("rows", TEXT)


def test_names_of_hub_data_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        if name == "org/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist\nmore")
        return datasets.Dataset.from_list([{"text": "t"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    assert load_table(["org/set", "org/set.v2:test", "org/set:main:test"], TEXT).source == [0, 1, 2]
    assert asked == [("org/set", None, "train"), ("org/set.v2", None, "test"), ("org/set", "main", "test")]
    with pytest.raises(DataError, match=r"org/none:train: no such file, and no data set of that name loads: .* exist"):
        load_table("org/none", TEXT)


def test_stdlib_rows_come_with_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    stdlib = pytest.importorskip("peertune.data.stdlib")
    asked = []

    def load(split: str) -> tuple[list[dict[str, Any]], list[int]]:
        asked.append(split)
        return [{"text": "a", "client": "x"}, {"text": "b", "client": "y"}], [0, 1]

    monkeypatch.setattr(stdlib, "load_stdlib", load)
    table = load_table("stdlib", DataSection(text_field="body"))
    assert table.source == [0, 1]
    assert table.rows[1] == {"body": "b", "text": "b", "client": "y"}
    assert load_table(["stdlib-test", "stdlib"], TEXT).source == [0, 0, 1, 1]
    assert asked == ["train", "test", "train"]


@pytest.mark.parametrize(
    ("name", "content", "section", "message"),
    [
        ("a.jsonl", b"", TEXT, "a.jsonl: is empty"),
        ("a.jsonl", b"\n\r\n", TEXT, "a.jsonl: is empty"),
        ("a.csv", b"text,label\n", TEXT, "a.csv: is empty"),
        ("a.txt", b" \n", TEXT, "a.txt: is empty"),
        ("a.json", b"[]", TEXT, "a.json: is empty"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', TEXT, "a.jsonl:3: broken JSON: Expecting value at column"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', TEXT, "a.jsonl:2: got a list, expected a JSON object"),
        ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]', TEXT, "a.jsonl:1: broken JSON: .* must be named .json"),
        ("a.jsonl", b'[{"text": "a"}]', TEXT, "a.jsonl:1: got a list, expected .*; a list .* must be named .json"),
        ("a.json", b'[["a"]]', TEXT, "a.json, row 1: got a list, .* a field for each column$"),
        ("a.json", b'{"text": "a"}', TEXT, "a.json: got an object, expected a list.*jsonl"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', TEXT, "a.json:2: broken JSON.*jsonl"),
        ("a.jsonl", b"[" * 100_000, TEXT, "a.jsonl:1: broken JSON"),
        ("a.csv", b"messages\n" + b"[" * 100_000, CHAT, "a.csv:2: field 'messages': broken JSON: nested too deeply"),
        ("a.csv", b"messages\n[" + b"1" * 5000 + b"]", CHAT, "a.csv:2: field 'messages': broken JSON: a number is"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', TEXT, "a.jsonl:2: field 'text' is an integer, expected text"),
        ("a.jsonl", b'{"txt": "a", "id": 1}', TEXT, r"a.jsonl:1: no field 'text' \(it has txt, id\).*data.text_field"),
        ("a.jsonl", b'{"text": "a"}', LABELS, "a.jsonl:1: no field 'label'.*data.label_field"),
        ("a.jsonl", b'{"text": "a", "label": 0.5}', LABELS, "a.jsonl:1: field 'label' is a number"),
        ("a.jsonl", b'{"text": "a", "label": 1, "text_b": []}', LABELS, "field 'text_b' is a list.*data.text_b_field"),
        ("a.csv", b"prompt,output\na,b\n", DataSection(task="instruction"), "a.csv:2: no field 'instruction'"),
        ("a.csv", b'text\n"two\nlines"\nb,c\n', TEXT, "a.csv:4: got 2 cells, expected 1"),
        ("a.csv", b"text,text\na,b\n", TEXT, "a.csv:1: two columns"),
        ("a.csv", b'text\n"a\n', TEXT, "a.csv:2: broken CSV"),
        ("a.txt", b"ok\nfine\n\xe9t\xe9", TEXT, "a.txt:3: not UTF-8 .byte 0xe9."),
        ("a.csv", "text,label\na,x\n".encode("utf-16-le"), LABELS, "a.csv:1: is UTF-16 or UTF-32, .*expected UTF-8"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), TEXT, "a.jsonl:1: is UTF-16 or UTF-32, .*expected UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', TEXT, "a.jsonl:1: holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a", "label": "\\udc00"}', LABELS, "a.jsonl:1: holds half of a surrogate pair"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            CHAT,
            "a.jsonl:1: holds half of a surrogate pair",
        ),
        ("a.jsonl.gz", b"plain", TEXT, "a.jsonl.gz: not a whole gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "abcdef"}' * 9, mtime=0)[:-12],
            TEXT,
            "a.jsonl.gz: not a whole gzip file",
        ),
        ("a.parquet", b"PAR1 no", TEXT, "a.parquet: not a readable Parquet file"),
        ("a.xlsx", b"text\n", TEXT, "a.xlsx: unknown type of file '.xlsx'; expected .jsonl"),
        ("a.parquet.gz", b"", TEXT, "unknown type of file '.parquet.gz'"),
        ("a.jsonl", b'{"messages": "hello"}', CHAT, "a.jsonl:1: field 'messages' is text, expected a list of objects"),
        ("a.jsonl", b'{"messages": ["hi"]}', CHAT, "a list that does not hold objects only"),
        (
            "a.jsonl",
            b'{"messages": [{"by": "x"}]}',
            CHAT,
            "a.jsonl:1, message 1: no text in field 'role' .it has by",
        ),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 1}]}', CHAT, "message 1: content is an integer"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": [{"image": 1}]}]}', CHAT, "a part that is not text"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "tool_calls": "f()"}]}',
            CHAT,
            "a.jsonl:1, message 1: field 'tool_calls' is text, expected a list of objects",
        ),
        ("a.jsonl", b'{"messages": [{"role": "a", "function_call": "f"}]}', CHAT, "'function_call' is text.*an object"),
        (
            "a.jsonl",
            b'{"text": "a", "label": "x"}',
            DataSection(task="classification", text_b_field="hypotesis"),
            "a.jsonl: no row has the field 'hypotesis' .the first has text, label.*data.text_b_field",
        ),
        ("a.csv", b"text;label\na;x\nb\n", LABELS, "a.csv:3: got 1 cells, expected 2 as in the first line, with ';'"),
        ("a.csv", b'text,label\n"a";"x"\n', LABELS, "a.csv:2: broken CSV: .* expected ',' between cells"),
        ("a.jsonl", b'{"messages": [], "tools": {"a": 1}}', CHAT, "field 'tools' is an object.*data.tools_field"),
    ],
)
def test_refusals_name_file_and_line(
    name: str, content: bytes, section: DataSection, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_table(name, section)
    assert "\n" not in str(caught.value)


def test_a_source_that_is_empty_beside_others_is_refused_by_name(tmp_path: Path) -> None:
    """With partition.kind = "files" its peer would have nothing."""
    (tmp_path / "a.jsonl").write_text(lines(ROWS), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"b\.jsonl: is empty"):
        load_table([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], TEXT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("rows.jsnl", "rows.jsnl: no such file.*did you mean rows.jsonl"),
        ("data/rows.tsv", "data/rows.tsv: no such file"),
        ("nothing", "nothing: no such file.*expected .jsonl"),
        ("", "expected a path"),
        ([], "expected a path"),
    ],
)
def test_refuses_what_is_not_there(
    source: str | list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("rows.jsonl").touch()
    with pytest.raises(DataError, match=message):
        load_table(source, TEXT, base=tmp_path)


@pytest.mark.parametrize(
    ("name", "task", "count"),
    [("mrpc", "classification", 4075), ("toolchat-glaive", "chat", 233), ("mts-dialog", "instruction", 1199)],
)
def test_real_files(name: str, task: str, count: int, shared: Path) -> None:
    section = DataSection.model_validate({"task": task})
    assert len(load_table(str(shared / "data" / f"{name}.jsonl.gz"), section).rows) == count
