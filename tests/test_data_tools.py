"""Function schemas as signatures, and what they lose step by step."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from peertune.config import DataSection
from peertune.data.load import load_table
from peertune.data.render import render
from peertune.data.tools import LOSSES, function_name, prune, signature

CHAT = DataSection(task="chat")
WEATHER = {
    "type": "function",
    "function": {
        "name": "Weather.get",
        "description": "Weather of a city.  Past\nor future. Up to a week.",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {
                "city": {"type": "string", "description": "Its name."},
                "day": {"type": "string", "enum": ["today", "é"], "default": "today", "description": "When."},
                "spots": {
                    "type": "array",
                    "items": {"type": "object", "properties": {"x": {"type": "number", "description": "km"}}},
                },
                "unit": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
                "left_by_another_row": None,
            },
        },
    },
}


def test_a_signature_says_what_the_schema_says() -> None:
    said = "Weather of a city. Past or future. Up to a week."
    rest = "spots?: {x?: number}[], unit?: string|null)"
    assert [signature(prune(WEATHER, step)) for step in range(len(LOSSES))] == [
        f'Weather.get(city: string, day?: "today"|"é" = "today", {rest} - {said}\n  city - Its name.\n  day - When.',
        f'Weather.get(city: string, day?: "today"|"é" = "today", {rest} - {said}',
        f'Weather.get(city: string, day?: "today"|"é" = "today", {rest} - Weather of a city.',
        f'Weather.get(city: string, day?: "today"|"é" = "today", {rest}',
        f"Weather.get(city: string, day?: string, {rest}",
        "Weather.get(city, day?, spots?, unit?)",
        "Weather.get()",
    ]


@pytest.mark.parametrize(
    ("key", "parameters"),
    [
        ("input_schema", {"type": "object", "properties": {"city": {"type": "str"}}, "required": ["city"]}),
        ("inputSchema", {"properties": {"city": {"type": "str"}}, "required": ["city"]}),
        ("parameters", {"city": {"type": "str"}}),
    ],
)
def test_arguments_are_found_where_others_write_them(key: str, parameters: dict[str, Any]) -> None:
    tool = {"name": "get", key: parameters}
    assert [signature(prune(tool, step)) for step in (0, 4, 5, 6)] == ["get(city: str)"] * 2 + ["get(city)", "get()"]


def test_a_bare_table_of_arguments_says_by_its_types_what_is_optional() -> None:
    day = {"type": "str, optional", "description": "When.", "default": "today"}
    tool = {"name": "get", "parameters": {"type": {"type": "str", "description": "Of what."}, "day": day}}
    assert signature(tool).splitlines() == [
        'get(type: str, day?: str, optional = "today")',
        "  type - Of what.",
        "  day - When.",
    ]
    assert signature(prune(tool, 1)) == 'get(type: str, day?: str, optional = "today")'


def test_what_a_schema_refers_to_stands_in_its_place() -> None:
    """As pydantic writes nested arguments; one that holds itself, or refers to what is not there, keeps its name."""
    parameters = {
        "type": "object",
        "$defs": {
            "Geo": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
            "Place": {"properties": {"city": {"type": "string"}, "geo": {"$ref": "#/$defs/Geo"}}, "description": "Of."},
            "Kind": {"enum": ["a", "b"], "type": "string"},
            "Tree": {"properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}}},
        },
        "properties": {
            "to": {"$ref": "#/$defs/Place"},
            "by": {"allOf": [{"$ref": "#/$defs/Geo"}], "description": "Whence."},
            "kinds": {"type": "array", "items": {"$ref": "#/$defs/Kind"}},
            "tree": {"$ref": "#/$defs/Tree"},
            "definitions": {"$ref": "#/$defs/None"},
        },
        "required": ["to"],
    }
    tool = {"name": "f", "parameters": parameters}
    place = "{city?: string, geo?: {lat: number}}"
    assert signature(tool) == (
        f'f(to: {place}, by?: {{lat: number}}, kinds?: ("a"|"b")[], tree?: {{kids?: Tree[]}}, definitions?: None)\n'
        "  to - Of.\n  by - Whence."
    )
    assert signature(prune(tool, 4)) == (
        f"f(to: {place}, by?: {{lat: number}}, kinds?: string[], tree?: {{kids?: any[]}}, definitions?)"
    )
    assert "Of." not in json.dumps(prune(tool, 1))
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"properties": {"x": deep}}
    assert signature({"name": "f", "parameters": deep}).startswith("f(x?: {x?: {")


def test_definitions_are_read_only_where_something_refers_to_them() -> None:
    """Each by itself with all that it refers to would be more than a machine's memory holds."""

    class Unread(dict[str, Any]):
        def items(self) -> Any:
            raise AssertionError("read, though nothing refers to it")

    parameters = {"$defs": {"A": {"type": "string"}, "B": Unread()}, "properties": {"x": {"$ref": "#/$defs/A"}}}
    tool = {"name": "f", "parameters": parameters}
    assert signature(tool) == signature(prune(tool, 1)) == "f(x?: string)"


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ({"type": ["string", "null"]}, "string|null"),
        ({"enum": [1, 2.5, None]}, "1|2.5|null"),
        ({"const": True}, "true"),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, '("a"|"b")[]'),
        ({"type": "array"}, "array"),
        ({"type": "array", "items": {}}, "any[]"),
        ({"oneOf": [{"type": "integer"}, {}]}, "integer|any"),
        ({"$ref": "#/$defs/Place"}, "Place"),
        ({"type": "object"}, "object"),
    ],
)
def test_types(kind: dict[str, Any], shown: str) -> None:
    tool = {"name": "f", "parameters": {"properties": {"a": kind}, "required": ["a"]}}
    assert signature(tool) == f"f(a: {shown})"


@pytest.mark.parametrize("name", ["toolchat-bfcl-test", "toolchat-glaive-test"])
def test_every_step_of_real_schemas_is_shorter_and_keeps_the_name(name: str, shared: Path) -> None:
    rows = load_table(str(shared / "data" / f"{name}.jsonl.gz"), CHAT).rows
    tools = [tool for row in rows for tool in row.get("tools") or []]
    assert len(tools) > 5
    raw = sum(len(json.dumps(tool["function"])) for tool in tools)
    before = sum(len(signature(tool)) for tool in tools)
    assert before < 0.75 * raw
    for step in range(1, len(LOSSES)):
        pruned = [prune(tool, step) for tool in tools]
        assert [function_name(tool) for tool in pruned] == [tool["function"]["name"] for tool in tools]
        size = sum(map(len, map(signature, pruned)))
        assert size < before or (name.startswith("toolchat-glaive") and size == before)
        before = size
        for tool, short in zip(tools, pruned, strict=True):
            kept = short["function"]["parameters"]["properties"]
            assert list(kept) == ([] if step == 6 else list(tool["function"]["parameters"]["properties"]))
            assert '"description": "' not in json.dumps(kept).replace('"description": {', "")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "name",
                    "function",
                    "parameters",
                    "properties",
                    "type",
                    "items",
                    "enum",
                    "anyOf",
                    "description",
                    "required",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(json_values)
def test_no_schema_raises(tool: Any) -> None:
    for step in range(len(LOSSES)):
        assert isinstance(signature(prune(tool, step)), str)
    assert function_name(prune(tool, len(LOSSES) - 1)) == function_name(tool)


def test_rows_lose_no_more_than_they_must(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    call = {"name": "Weather.get", "arguments": {"city": "Bonn"}}
    other = {"name": "other", "description": "Else.", "parameters": {"properties": {"q": {"type": "string"}}}}
    row = {
        "messages": [{"role": "user", "content": "Bonn?"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [WEATHER, other],
    }
    sizes = []
    for step in range(len(LOSSES)):
        tools = [prune(tool, step) for tool in row["tools"]]
        [sample] = render([{**row, "tools": tools}], CHAT, byte_tokenizer, 2000).samples
        sizes.append(len(sample.input_ids))
    assert sizes == sorted(sizes, reverse=True)
    for step, size in enumerate(sizes):
        rendered = render([row], CHAT, byte_tokenizer, size)
        assert rendered.tools_cut == ({LOSSES[step]: 1} if step else {})
        assert rendered.num_cut == 0 and len(rendered.samples[0].input_ids) == size
    # less room than the names need: the user's words go, not the names
    rendered = render([row], CHAT, byte_tokenizer, sizes[-1] - 3)
    shown = byte_tokenizer.decode(rendered.samples[0].input_ids)
    assert rendered.num_cut == 1 and "Weather.get()\nother()" in shown


def test_a_template_that_takes_schemas_gets_shorter_ones(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    byte_tokenizer.chat_template = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
        "{{ 'assistant' if add_generation_prompt else '' }}"
    )
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": [WEATHER]}
    length = len(render([row], CHAT, byte_tokenizer, 2000).samples[0].input_ids)
    rendered = render([row], CHAT, byte_tokenizer, length - 1)
    shown = str(byte_tokenizer.decode(rendered.samples[0].input_ids))
    assert rendered.tools_cut == {LOSSES[1]: 1}
    assert json.loads(shown.partition("userq")[0]) == [prune(WEATHER, 1)]
