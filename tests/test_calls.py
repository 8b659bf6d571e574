"""Calls read from generated text, compared, and answers matched: real ones, broken ones, and any text at all."""

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
from peertune.evaluation import references
from peertune.evaluation.answers import answered_number, exact_match, last_number
from peertune.evaluation.calls import MAX_CHARS, Call, parse_calls, same_calls, same_names

CHAT = DataSection(task="chat")
F = Call("f", {"a": 1})
G = Call("g.h", {"b": "x", "c": [1, {"d": None}]})

OBJECT = '{"name": "f", "arguments": {"a": 1}}'
OPENAI = '[{"id": "call_0", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (OBJECT, [F]),
        (f"[{OBJECT}, {OBJECT}]", [F, F]),
        (OPENAI, [F]),
        ('{"tool_calls": ' + OPENAI + "}", [F]),
        ('{"function_call": ' + OBJECT + "}", [F]),
        ('{"tool_call": ' + OBJECT.replace('"f"', '" f "') + "}", [F]),
        ('{"name": "f", "parameters": {"a": 1}}', [F]),
        (f"Sure.\n<tool_call>\n{OBJECT}\n</tool_call>\n<tool_call>\n{OBJECT}\n</tool_call>", [F, F]),
        (f"```json\n[{OBJECT}]\n``` That is it {{or}} not", [F]),
        ('<function=g.h>{"b": "x", "c": [1, {"d": null}]}</function>', [G]),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}', [F]),
        (f"<function={'long.' * 50}f>{{}}", [Call("long." * 50 + "f", {})]),
        ("[TOOL_CALLS] [" + OBJECT + "]", [F]),
        ('{"name": "f", "arguments": {"a": "two\nlines"}}', [Call("f", {"a": "two\nlines"})]),
        ('{"name": "f", "arguments": ""}', [Call("f", {})]),
        ('{"name": "f", "arguments": null}', [Call("f", {})]),
    ],
)
def test_forms_that_are_read(text: str, expected: list[Call]) -> None:
    assert parse_calls(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("f(a=1)", []),
        ('{"name": "f"}', []),
        ('{"name": 3, "arguments": {}}', []),
        ('{"name": " ", "arguments": {}}', []),
        ('{"name": "f", "arguments": [1]}', []),
        ('{"name": "f", "arguments": "{\\"a\\": "}', []),
        ('{"name": "f", "arguments": "[1]"}', []),
        (f"[{OBJECT}, " + '{"name": "g", "argum', [F]),
        (OPENAI[:-2], [F]),
        (OPENAI[:-12], []),
        ('{"name": "f", "arguments": {"a": 1}', []),
        (OBJECT + "}}}]]] " + OBJECT, [F, F]),
        ("[" * 40_000, []),
        ('{"a":' * 8_000 + OBJECT, []),
        ('{"name": "f", "arguments": {"a": ' + "[" * 100 + "]" * 100 + "}}", []),
        ('{"name": "f", "arguments": {"a": ' + "9" * 5_000 + "}}", []),
        ("{" * 100 + OBJECT, [F]),
        ("[" * 100 + OBJECT + "]" * 100, []),
        (" " * MAX_CHARS + OBJECT, []),
    ],
)
def test_broken_text_gives_what_is_whole(text: str, expected: list[Call]) -> None:
    assert parse_calls(text) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
pieces = st.sampled_from(
    ['{"name": "f", "arguments": ', '"function": ', "[", "]", "{", "}", '"', ",", "\\", "<tool_call>", "NaN", "1e999"]
)


@given(st.lists(pieces | st.text(max_size=5), max_size=30).map("".join))
def test_no_text_raises(text: str) -> None:
    for call in parse_calls(text):
        assert isinstance(call.name, str) and call.name and isinstance(call.arguments, dict)
        hash(call.key())


@given(st.text(min_size=1, max_size=9).filter(str.strip), st.dictionaries(st.text(max_size=5), json_values, max_size=3))
def test_what_is_written_is_read(name: str, arguments: dict[str, Any]) -> None:
    for text in (
        json.dumps([{"name": name, "arguments": arguments}]),
        json.dumps({"function": {"name": name, "arguments": json.dumps(arguments)}}),
    ):
        [call] = parse_calls("so: " + text + " done")
        assert call.name == name.strip()
        if "NaN" not in text:
            assert call.arguments == arguments


def call(**arguments: Any) -> Call:
    return Call("f", arguments)


@pytest.mark.parametrize(
    ("made", "expected", "same"),
    [
        ([call(a=1, b="x")], [call(b=" x ", a=1.0)], True),
        ([call(a=1), call(a=2)], [call(a=2), call(a=1)], True),
        ([call(a={"x": [1.0], "y": None})], [call(a={"y": None, "x": [1]})], True),
        ([call(a=1), call(a=1)], [call(a=1)], False),
        ([], [call()], False),
        ([call(a=[1, 2])], [call(a=[2, 1])], False),
        ([call(a=1)], [call(a="1")], False),
        ([call(a=1)], [call(a=True)], False),
        ([call(a=0)], [call(a=None)], False),
        ([call(a="X")], [call(a="x")], False),
        ([call(a=1)], [call(a=1, b=2)], False),
    ],
)
def test_calls_are_compared_by_what_they_do(made: list[Call], expected: list[Call], same: bool) -> None:
    assert same_calls(made, expected) == same_calls(expected, made) == same
    assert same_names(made, expected) == (len(made) == len(expected))
    assert not same_calls([*made, Call("other", {})], expected)


@pytest.mark.parametrize("name", ["toolchat-bfcl", "toolchat-glaive"])
def test_real_calls_read_back_from_the_models_own_template(
    name: str, english: PreTrainedTokenizerBase, shared: Path
) -> None:
    rows = load_table(str(shared / "data" / f"{name}-test.jsonl.gz"), CHAT).rows
    samples = render(rows, CHAT, english, 100_000).samples
    checked = 0
    for sample, known in zip(samples, references(rows, samples, CHAT, english), strict=True):
        spoken = [m for m in rows[sample.row]["messages"] if m.get("tool_calls")]
        assert len(spoken) == len(sample.calls) and bool(known.calls) == bool(spoken)
        if not spoken:
            continue
        checked += 1
        assert known.readable
        functions = [c["function"] for c in spoken[-1]["tool_calls"]]
        assert [c.name for c in known.calls] == [f["name"] for f in functions]
        assert [c.arguments for c in known.calls] == [json.loads(f["arguments"]) for f in functions]
        assert known.prompt is not None and english.decode(known.prompt).endswith("<|assistant|>")
        start, end = sample.calls[-1]
        written = english.decode(sample.input_ids[start:end], clean_up_tokenization_spaces=False)
        assert written == json.dumps(spoken[-1]["tool_calls"], ensure_ascii=False)
        cut = parse_calls(str(written)[: len(str(written)) // 2])
        assert len(cut) < len(functions) or len(functions) > 1
    assert checked > 12


@pytest.mark.parametrize(
    ("generated", "expected", "same"),
    [
        ("2 + 2 = <<2+2=4>>4\n#### 4", "It is four.\n#### 4", True),
        ("#### 1,000", "#### 1000", True),
        ("so $1,000.00 in all.", "#### 1,000", True),
        ("#### 4\nQuestion: 5 apples? #### 5", "#### 4", True),
        ("it is 4 or 5", "#### 4", False),
        ("####", "#### 4", False),
        ("none", "#### 4", False),
        ("-3", "#### 3", False),
        ("The result is 12.", "12", True),
        ("The result is 12.", "12 apples", False),
        (" Paris. ", "paris", True),
        ("Paris, France", "Paris", False),
        ("so 12", "#### 12 apples", True),
        ("1", "#### 1e3", False),
        ("a thousand: 1000", "#### 1e3", True),
        ("-5", "#### \N{MINUS SIGN}5", True),
        ("5", "#### \N{MINUS SIGN}5", False),
        ("other words\n#### -3/4\nQuestion: 2?", "so\n#### -3/4", True),
        ("-3/4", "so\n#### -3/4", True),
        ("so\n#### 3/4", "so\n#### -3/4", False),
        ("Because.\n#### yes", "It is.\n#### Yes.", True),
        ("last 3", "intro\n#### Steps\n1. do\n2. go 3", False),
        ("last 3", "#### Step 3\ngo", False),
        ("25", "4 9 16 25", False),
        ("", "x", False),
        ("还有6个。答案是5。", "#### 5", True),
        ("答えは1,200円です", "1200", True),
        ("是5个", "5。", True),
        ("是的。", "是的", True),
        ("x2 H5", "5", False),
        ("it is 50", "50 %", True),
        ("5.00 in all", "€5", True),
    ],
)
def test_answers_match_by_their_final_number(generated: str, expected: str, same: bool) -> None:
    assert exact_match(generated, expected) == same


def test_numbers_are_found_where_they_stand() -> None:
    assert last_number("5-3=2") == 2 and last_number("x2 y") is None and last_number("7 .5") == 0.5
    assert last_number("1,234,567.5 m") == 1234567.5 and last_number("at -$20.") == -20
    assert last_number("1,2345") == 2345, "groups are of three"
    assert answered_number("3 #### none") == 3


def test_real_answers_match_themselves(shared: Path) -> None:
    rows = load_table(str(shared / "data" / "gsm8k-test.jsonl.gz"), DataSection(task="instruction")).rows
    for row in rows:
        assert exact_match(row["output"], row["output"])
        assert not exact_match(row["output"], row["output"] + "1")


@given(st.text(), st.text())
def test_any_answers_can_be_compared(generated: str, expected: str) -> None:
    assert exact_match(expected, expected)
    assert isinstance(exact_match(generated, expected), bool)
