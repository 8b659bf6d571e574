"""Rendering: what is to be predicted is exactly the label or the answer, and cutting spares it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from peertune import data
from peertune.config import DataSection
from peertune.data.chat import ChatRenderer, plain_template
from peertune.data.load import load_table
from peertune.data.render import Rendered, Sample, find_labels, label_tokens, render
from peertune.data.tokens import encode
from peertune.data.tools import signature
from peertune.errors import DataError

TEXT = DataSection(task="text")
LABELS = DataSection(task="classification")
INSTRUCTION = DataSection(task="instruction")
CHAT = DataSection(task="chat")

CHATML = """\
{%- if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}\n{{ m.content }}
{%- for call in m.tool_calls or [] %}<call>{{ call.function.arguments | tojson }}</call>{% endfor -%}
<|im_end|>{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"""

# Every turn but the last loses its reasoning; the last gets an empty one, which the generation prompt does not have.
REASONING = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].strip() }}
{%- elif m.role == 'assistant' and '<think>' not in m.content %}{{ '<think>\n\n</think>\n\n' + m.content }}
{%- else %}{{ m.content }}{% endif -%}
<|im_end|>{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"""

# No generation prompt, texts trimmed, no system turn.
INST = """\
{%- for m in messages -%}
{%- if m.role == 'system' %}{{ raise_exception('no system turn here') }}{% endif -%}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif -%}
{%- endfor -%}"""

text = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=60)
words = st.text("abc é\r\n", min_size=1, max_size=60).filter(str.strip)
with_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def targets(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """What is to be predicted, as text."""
    decoded = tokenizer.decode(sample.input_ids[sample.loss_mask], clean_up_tokenization_spaces=False)
    assert isinstance(decoded, str)
    return decoded


def full(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    decoded = tokenizer.decode(sample.input_ids, clean_up_tokenization_spaces=False)
    assert isinstance(decoded, str)
    return decoded


def check_counts(rendered: Rendered, max_length: int) -> None:
    for sample in rendered.samples:
        assert sample.input_ids.dtype == np.int32 and sample.loss_mask.dtype == np.bool_
        assert sample.input_ids.shape == sample.loss_mask.shape
        assert 2 <= len(sample.input_ids) <= max_length
        assert sample.loss_mask.any() and not sample.loss_mask[0]
    assert rendered.num_tokens == sum(len(sample.input_ids) for sample in rendered.samples)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {})}


def chat(*messages: dict[str, Any], **row: Any) -> dict[str, Any]:
    return {"messages": list(messages), **row}


# text


@with_fixtures
@given(st.lists(text, min_size=1, max_size=6).filter(lambda t: any(map(str.strip, t))), st.integers(8, 50))
def test_text_is_packed_without_loss(byte_tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> None:
    rendered = render([{"text": t} for t in texts], TEXT, byte_tokenizer, length)
    check_counts(rendered, length)
    kept = [t for t in texts if t.strip()]
    expected = [i for t in kept for i in (1, *byte_tokenizer(t, add_special_tokens=False)["input_ids"], 2)]
    stream = np.concatenate([sample.input_ids for sample in rendered.samples]).tolist()
    assert len(expected) - len(stream) in (0, 1)  # a single token at the end has nothing to be predicted from
    assert stream == expected[: len(stream)]
    assert all(len(sample.input_ids) == length for sample in rendered.samples[:-1])
    assert all(sample.loss_mask[1:].all() for sample in rendered.samples)
    assert (rendered.num_cut, rendered.num_dropped) == (0, len(texts) - len(kept))


# classification


def labelled(words: str, label: str, second: str | None = None) -> dict[str, Any]:
    return {"text": words, "label": label, **({"text_b": second} if second is not None else {})}


def test_classification_prompt_ends_in_the_label(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [labelled("A\r\nb", "yes"), labelled("c", "no", "d"), labelled(" ", "no"), labelled("e", "")]
    rendered = render(rows, LABELS, byte_tokenizer, 64)
    check_counts(rendered, 64)
    assert [full(byte_tokenizer, s) for s in rendered.samples] == ["<s>A\r\nb\nLabel: yes", "<s>c\nd\nLabel: no"]
    assert [targets(byte_tokenizer, s) for s in rendered.samples] == [" yes", " no"]
    assert [s.label for s in rendered.samples] == [1, 0]
    assert (rendered.num_cut, rendered.num_dropped) == (0, 2)


@with_fixtures
@given(words, words, st.booleans(), st.sampled_from(["no", "maybe"]), st.integers(20, 70))
def test_cutting_never_touches_the_label(
    byte_tokenizer: PreTrainedTokenizerBase, first: str, second: str, pair: bool, label: str, length: int
) -> None:
    # "\nLabel:" is 7 tokens, " maybe" 6, <s> 1
    row = labelled(first, label, second if pair else None)
    rendered = render([row], LABELS, byte_tokenizer, length, ["maybe", "no"])
    [sample] = rendered.samples
    size, size_b = len(first.encode()), len(second.encode()) + 1 if pair else 0
    room = length - 14
    ids = sample.input_ids[: sample.prompt_length].tolist()
    body = byte_tokenizer(first, add_special_tokens=False)["input_ids"]
    body_b = byte_tokenizer("\n" + second, add_special_tokens=False)["input_ids"] if pair else []
    assert targets(byte_tokenizer, sample) == " " + label
    assert byte_tokenizer.decode(ids[-7:]) == "\nLabel:"
    kept = len(ids) - 8
    assert kept == min(room, size + size_b)
    kept_text = next(
        n for n in range(size, -1, -1) if ids[1 : 1 + n] == body[:n] and ids[1 + n : -7] == body_b[: kept - n]
    )
    if size + size_b > room:  # the longer of the two was cut first
        assert kept_text == size or kept - kept_text == size_b or abs(2 * kept_text - kept) <= 1
    assert rendered.num_cut == (size + size_b > room)


def test_a_row_is_cut_alike_whatever_its_label(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [labelled("x" * 99, "b"), labelled("x" * 99, "a much longer one")]
    short, long = render(rows, LABELS, byte_tokenizer, 50).samples
    assert short.prompt_length == long.prompt_length
    assert (short.input_ids[: short.prompt_length] == long.input_ids[: long.prompt_length]).all()
    assert len(long.input_ids) == 50


def test_long_texts_are_encoded_a_few_at_a_time(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """What a tokenizer holds while it works is many times its texts."""
    taken: list[int] = []

    def noting(texts: list[str], **options: Any) -> Any:
        taken.append(len(texts))
        return byte_tokenizer(texts, **options)

    texts = ["a" * 400_000, *["b" * 400_000] * 3, *["c"] * 2000]
    found = encode(noting, texts)  # type: ignore[arg-type]
    assert [len(ids) for ids in found] == [len(text) for text in texts]
    assert taken == [3, 1024, 977]


def test_label_tokens_are_what_samples_end_in(english: PreTrainedTokenizerBase, shared: Path) -> None:
    rows = load_table(str(shared / "data" / "agnews-test.jsonl.gz"), LABELS).rows[:50]
    labels = find_labels(rows, LABELS)
    tokens = label_tokens(english, labels)
    assert labels == ["Business", "Sci/Tech", "Sports", "World"]
    for row, sample in zip(rows, render(rows, LABELS, english, 48, labels).samples, strict=True):
        assert labels[sample.label] == row["label"]
        assert sample.input_ids[sample.prompt_length :].tolist() == tokens[sample.label]
        assert targets(english, sample) == " " + row["label"]


def test_labels_that_cannot_be_used_are_refused(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"only the class 'a' in field 'label' of 2 rows.*data.label_field"):
        find_labels([labelled("x", "a"), labelled("y", "a")], LABELS)
    with pytest.raises(DataError, match="no label at all"):
        find_labels([labelled("x", "")], LABELS)
    with pytest.raises(DataError, match="got label 'NaN' in field 'label', which stands for a missing cell"):
        find_labels([labelled("x", "0"), labelled("x", "1"), labelled("y", "NaN")], LABELS)
    with pytest.raises(DataError, match=r"got labels '1' and '1\.0' in field 'label', expected one name for a class"):
        find_labels([labelled("x", "0"), labelled("x", "1.0"), labelled("y", "1")], LABELS)
    assert find_labels([labelled("x", "1.0"), labelled("y", "1.1")], LABELS) == ["1.0", "1.1"]
    with pytest.raises(DataError, match="row 2 has label 'c', expected one of the training rows' labels: a, b"):
        render([labelled("x", "a"), labelled("x", "c")], LABELS, byte_tokenizer, 64, ["a", "b"])
    with pytest.raises(DataError, match="label 'a' the same tokens as 'a'"):
        label_tokens(byte_tokenizer, ["a", "b", "a"])


def test_labels_that_begin_one_another_end_with_the_texts_end(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """Numbers, where each digit is a token: without an end 1 would be at least as likely as 10 for every text."""
    end = byte_tokenizer.eos_token_id
    assert [ids[-1] for ids in label_tokens(byte_tokenizer, ["1", "10", "2"])] == [end] * 3
    assert all(end not in ids for ids in label_tokens(byte_tokenizer, ["1", "2"]))
    rendered = render([labelled("x", "1"), labelled("x", "10")], LABELS, byte_tokenizer, 64, ["1", "10"])
    assert [targets(byte_tokenizer, sample) for sample in rendered.samples] == [
        f" {label}{byte_tokenizer.eos_token}" for label in ("1", "10")
    ]


def test_labels_follow_the_cue_in_tokenizers_that_open_each_text_with_a_space() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "▁Label:", "▁yes", "▁no", "▁", "yes", "no"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    assert label_tokens(PreTrainedTokenizerFast(tokenizer_object=core), ["yes", "no"]) == [[2], [3]]
    with pytest.raises(DataError, match="label 'no yes' with all tokens of label 'no', "):
        label_tokens(PreTrainedTokenizerFast(tokenizer_object=core), ["no", "no yes"])


# instruction and chat


def test_plain_template_where_the_model_has_none(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"instruction": "Add.\r\nNow", "input": "1 2", "output": "3\n"}
    [sample] = render([row], INSTRUCTION, byte_tokenizer, 99).samples
    assert full(byte_tokenizer, sample) == "<s>### Request:\nAdd.\r\nNow\n1 2\n\n### Reply:\n3\n</s>"
    assert targets(byte_tokenizer, sample) == "3\n</s>"
    assert sample.prompt_length == int(np.argmax(sample.loss_mask))
    prompt = byte_tokenizer.apply_chat_template(
        [user("Add.\r\nNow\n1 2")],
        chat_template=plain_template(byte_tokenizer),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert sample.input_ids[: sample.prompt_length].tolist() == prompt


@pytest.mark.parametrize("name", ["alpaca", "dolly3k"])
def test_real_instructions_learn_exactly_the_answer(name: str, english: PreTrainedTokenizerBase, shared: Path) -> None:
    rows = load_table(str(shared / "data" / f"{name}-test.jsonl.gz"), INSTRUCTION).rows[:60]
    rendered = render(rows, INSTRUCTION, english, 4096)
    check_counts(rendered, 4096)
    for row, sample in zip(rows, rendered.samples, strict=True):
        assert targets(english, sample) == row["output"] + "</s>"
        request = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        assert full(english, sample) == f"<|user|>{request}</s><|assistant|>{row['output']}</s>"
    for row, sample in zip(rows, render(rows, INSTRUCTION, english, 64).samples, strict=True):
        answer = english(row["output"], add_special_tokens=False)["input_ids"]
        if len(answer) <= 44:  # then a quarter of the room is left for the request
            assert targets(english, sample) == row["output"] + "</s>"
        prompt = full(english, sample).partition("</s>")[0]
        assert f"<|user|>{row['instruction']}".startswith(prompt) or prompt.startswith(f"<|user|>{row['instruction']}")


@pytest.mark.parametrize("name", ["toolchat-bfcl", "toolchat-glaive"])
def test_real_conversations_learn_exactly_the_assistants_turns(
    name: str, english: PreTrainedTokenizerBase, shared: Path
) -> None:
    rows = load_table(str(shared / "data" / f"{name}-test.jsonl.gz"), CHAT).rows[:30]
    rendered = render(rows, CHAT, english, 100_000)
    check_counts(rendered, 100_000)
    for row, sample in zip(rows, rendered.samples, strict=True):
        spoken = [m for m in row["messages"] if m["role"] == "assistant"]
        calls = [json.dumps(m["tool_calls"]) if m.get("tool_calls") else "" for m in spoken]
        said = [m["content"] + call + "</s>" for m, call in zip(spoken, calls, strict=True)]
        assert targets(english, sample) == "".join(said)
        assert int((np.diff(sample.loss_mask.astype(int)) == 1).sum()) == len(said)
        assert full(english, sample)[-len(said[-1]) :] == said[-1]
        assert english.decode(sample.input_ids[: sample.prompt_length]).endswith("<|assistant|>")
        for tool in row.get("tools") or []:  # english-4m's template leaves tools out
            assert signature(tool) in full(english, sample)


@pytest.mark.parametrize("length", [48, 128])
def test_real_conversations_cut_to_their_last_turn(length: int, english: PreTrainedTokenizerBase, shared: Path) -> None:
    rows = load_table(str(shared / "data" / "toolchat-glaive-test.jsonl.gz"), CHAT).rows
    rendered = render(rows, CHAT, english, length)
    check_counts(rendered, length)
    assert rendered.num_cut > 20 and rendered.num_dropped == 0
    checked = 0
    for row, sample in zip(rows, rendered.samples, strict=True):
        *before, last = row["messages"]
        answer = last["content"] + "</s>"
        # a quarter of the room is kept for what comes before the answer
        if (
            before[-1]["role"] == "user"
            and len(english(answer, add_special_tokens=False)["input_ids"]) <= length * 3 // 4
        ):
            checked += 1
            assert targets(english, sample).endswith(answer)
            assert full(english, sample).endswith("</s><|assistant|>" + answer)
    assert checked >= 5


@pytest.mark.parametrize("template", [CHATML, INST, None])
def test_only_the_assistant_is_learned(template: str | None, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    byte_tokenizer.chat_template = template
    end = "<|im_end|>" if template == CHATML else "</s>"
    space = " " if template == INST else ""
    row = chat(user("same"), assistant("same"), user("one\r\n two"), assistant("last é"), user("unanswered"))
    [sample] = render([row], CHAT, byte_tokenizer, 400).samples
    assert targets(byte_tokenizer, sample) == f"{space}same{space}{end}{space}last é{space}{end}"
    assert "unanswered" not in full(byte_tokenizer, sample)
    assert full(byte_tokenizer, sample).endswith(f"last é{space}{end}")
    last = sample.input_ids[sample.prompt_length :]
    assert byte_tokenizer.decode(last) == f"{space}last é{space}{end}", "what generation is asked for"
    assert sample.calls == (), "rows without calls are no part of the calls' metrics"
    row["messages"][1]["weight"] = 0  # OpenAI's way to say that a turn is read, not learned
    [sample] = render([row], CHAT, byte_tokenizer, 400).samples
    assert targets(byte_tokenizer, sample) == f"{space}last é{space}{end}"


def test_a_first_token_is_never_learned(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """There is nothing to predict it from, not even where the assistant begins and nothing stands before it."""
    byte_tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    [sample] = render([chat(assistant("hello"))], CHAT, byte_tokenizer, 64).samples
    assert (full(byte_tokenizer, sample), targets(byte_tokenizer, sample)) == ("hello</s>", "ello</s>")


def test_where_no_token_ends_a_turn_its_line_break_is_learned(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """Nothing else tells the model to stop; behind an end token it is the template's, and no generation reaches it."""
    byte_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt else '' }}"
    )
    [sample] = render(
        [chat(user("one"), assistant("two"), user("x"), assistant("y"))], CHAT, byte_tokenizer, 99
    ).samples
    assert targets(byte_tokenizer, sample) == "two\ny\n"


@with_fixtures
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.integers(40, 200))
def test_any_words_in_any_turn(
    byte_tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], length: int
) -> None:
    byte_tokenizer.chat_template = CHATML
    row = chat(*(m for asked, said in turns for m in (user(asked), assistant(said))))
    [sample] = render([row], CHAT, byte_tokenizer, 10_000).samples
    assert targets(byte_tokenizer, sample) == "".join(said + "<|im_end|>" for _, said in turns)
    rendered = render([row], CHAT, byte_tokenizer, length)
    check_counts(rendered, length)
    assert rendered.num_cut == (len(sample.input_ids) > length)
    last = turns[-1][1] + "<|im_end|>"
    if len(last.encode()) < length // 2:
        assert targets(byte_tokenizer, rendered.samples[0]).endswith(last)


def test_reasoning_that_is_left_out_of_earlier_turns(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    byte_tokenizer.chat_template = REASONING
    row = chat(user("q"), assistant("<think>hm</think>\n\nfirst"), user("first"), assistant("second"))
    [sample] = render([row], CHAT, byte_tokenizer, 400).samples
    assert targets(byte_tokenizer, sample) == "first<|im_end|><think>\n\n</think>\n\nsecond<|im_end|>"
    [same] = render([chat(*row["messages"], user("not answered"))], CHAT, byte_tokenizer, 400).samples
    assert np.array_equal(same.input_ids, sample.input_ids)


@pytest.mark.parametrize(
    "template",
    [
        # The generation prompt opens a thought, which turns of the past have no trace of.
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
        "{% else %}|{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}|<think>{% endif %}",
        # The last turn has one.
        "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.role == 'assistant' and loop.last %}<think></think>"
        "{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant <think>{% endif %}",
    ],
)
def test_an_answer_that_stands_in_its_own_question_is_marked_where_it_is_given(
    template: str, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    byte_tokenizer.chat_template = template
    row = chat(user("Paris or Rome"), assistant("Rome"), user("sure"), assistant("quite sure"))
    [sample] = render([row], CHAT, byte_tokenizer, 400).samples
    assert targets(byte_tokenizer, sample).replace("</think>", "") == "Rome<|im_end|>quite sure<|im_end|>"
    starts = np.flatnonzero(np.diff(sample.loss_mask.astype(int)) == 1)
    assert len(starts) == 2 and "Paris or Rome" in byte_tokenizer.decode(sample.input_ids[: starts[0] + 1])


def test_what_the_user_says_is_never_learned_where_turns_close_otherwise(
    byte_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The last turn closes with another token, and ends with the words of the first."""
    byte_tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}"
        "{{ '<|return|>' if loop.last else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    row = chat(user("2+2?"), assistant("4"), user("8-4?"), assistant("It is 4"))
    with pytest.raises(DataError, match="renders an assistant turn otherwise"):
        render([row], CHAT, byte_tokenizer, 400)


def test_a_turn_that_cannot_be_found_is_refused(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    byte_tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content | upper }};{% endfor %}"
    with pytest.raises(DataError, match=r"row 2: the model's chat template renders an assistant turn otherwise.*split"):
        render([chat(), chat(user("q"), assistant("a"), user("b"), assistant("c"))], CHAT, byte_tokenizer, 99)


TOOL = {"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_tools_go_where_the_template_puts_them(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    byte_tokenizer.chat_template = CHATML
    [sample] = render([chat(user("q"), assistant("", CALL), tools=[TOOL])], CHAT, byte_tokenizer, 400).samples
    assert full(byte_tokenizer, sample).startswith("<|im_start|>system\nTools: [{")
    # arguments given as JSON text are not quoted a second time
    assert targets(byte_tokenizer, sample) == '<call>{"a": 1}</call><|im_end|>'


def test_a_template_that_names_the_day_says_the_same_on_any(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """As Llama 3.2's and SmolLM3's do: else a run could not be resumed after midnight, as its rows would be others."""
    byte_tokenizer.chat_template = (
        "\n{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ day + strftime_now(' %Y-%m-%d') }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    for template in (byte_tokenizer.chat_template, {"default": byte_tokenizer.chat_template, "tool_use": ""}):
        byte_tokenizer.chat_template = template
        [sample] = render([chat(user("q"), assistant("a"))], CHAT, byte_tokenizer, 400).samples
        assert full(byte_tokenizer, sample) == "\n26 Jul 2024 2024-07-26[q][a]"


@pytest.mark.parametrize("system", [True, False])
def test_tools_that_the_template_leaves_out_are_listed(
    system: bool, english: PreTrainedTokenizerBase, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    schema = "f() - é"
    opening = [{"role": "system", "content": "Be kind."}] if system else []
    [sample] = render([chat(*opening, user("q"), assistant("a"), tools=[TOOL])], CHAT, english, 400).samples
    kind = "Be kind.\n\n" if system else ""
    assert full(english, sample) == (
        f"<|system|>{kind}Functions that may be called:\n{schema}</s><|user|>q</s><|assistant|>a</s>"
    )
    assert targets(english, sample) == "a</s>"
    row = chat(*opening, user("old " * 50), assistant("old"), user("q"), assistant("a"), tools=[TOOL])
    [cut] = render([row], CHAT, english, len(sample.input_ids)).samples
    assert full(english, cut) == full(english, sample).replace(schema, "f()"), "listed once, also in what is left"
    if not system:
        byte_tokenizer.chat_template = INST
        [sample] = render([chat(user("q"), assistant("a"), tools=[TOOL])], CHAT, byte_tokenizer, 400).samples
        assert full(byte_tokenizer, sample).startswith(
            f"<s>[INST] Functions that may be called:\n{schema}\n\nq [/INST]"
        )
        assert targets(byte_tokenizer, sample) == " a </s>"


@pytest.mark.parametrize("template", [INST, REASONING])
@pytest.mark.parametrize("length", [400, 130])
def test_calls_that_a_template_leaves_out_follow_the_text(
    template: str, length: int, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Else a model would learn to say nothing where it is to call; also once the oldest exchange is gone."""
    byte_tokenizer.chat_template = template
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    old = [user("o" * 60), assistant("old")]
    [sample] = render([chat(*old, user("q"), assistant("", call))], CHAT, byte_tokenizer, length).samples
    assert ("old" in full(byte_tokenizer, sample)) == (length == 400)
    [(start, end)] = sample.calls
    assert byte_tokenizer.decode(sample.input_ids[start:end]) == json.dumps([call], ensure_ascii=False)
    assert sample.loss_mask[start:end].all()


@pytest.mark.parametrize("kind", ["none", "plain", "left out"])
def test_a_calls_id_is_not_learned_where_we_write_the_call(kind: str, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """OpenAI's are two dozen random letters, more than many a call, and no model can know them."""
    byte_tokenizer.chat_template = {"plain": plain_template(byte_tokenizer), "left out": INST}.get(kind)
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    rows = [chat(user("q"), assistant("", {**more, **call}, call)) for more in ({"id": "call_Ab3dEf9h"}, {})]
    drawn, bare = render(rows, CHAT, byte_tokenizer, 400).samples
    assert drawn.input_ids.tolist() == bare.input_ids.tolist() and drawn.calls == bare.calls
    if kind == "plain":  # as whoever loads the exported model has it
        texts = [byte_tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
        assert texts[0] == texts[1] and '}}, {"type"' in texts[0]


def test_history_goes_first_then_the_longest_text(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    byte_tokenizer.chat_template = CHATML
    system = {"role": "system", "content": "s" * 20}
    row = chat(system, user("old"), assistant("old answer"), user("u" * 100), assistant("new answer"))
    rendered = render([row], CHAT, byte_tokenizer, 100)
    [sample] = rendered.samples
    assert rendered.num_cut == 1 and not rendered.tools_cut
    shown = full(byte_tokenizer, sample)
    head, tail = (
        f"<|im_start|>system\n{'s' * 20}<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\nnew answer<|im_end|>",
    )
    assert shown.startswith(head) and shown.endswith(tail)
    assert set(shown[len(head) : -len(tail)]) == {"u"}
    assert len(sample.input_ids) == 100
    assert targets(byte_tokenizer, sample) == "new answer<|im_end|>"


def test_what_a_turn_without_calls_begins_with_is_tokenised_once(
    byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start is where its calls begin and end, too."""
    told: list[str] = []
    monkeypatch.setattr(data.chat, "encode", lambda own, texts: told.extend(texts) or data.tokens.encode(own, texts))
    render([{"instruction": "a", "output": "b"}], INSTRUCTION, byte_tokenizer, 100)
    assert len(told) == 2 and told[0].startswith(told[1])  # the whole, and what comes before the answer


def test_turns_are_looked_for_only_in_what_stays(
    byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a conversation of n exchanges is rendered n n times, each time as a whole."""
    byte_tokenizer.chat_template = CHATML
    num, renderer = 40, ChatRenderer(byte_tokenizer)
    messages = [turn for i in range(num) for turn in (user(f"question {i:02d}"), assistant(f"answer {i:02d}"))]
    rendered: list[int] = []
    one = ChatRenderer._render
    monkeypatch.setattr(
        ChatRenderer, "_render", lambda self, *given, **named: rendered.append(1) or one(self, *given, **named)
    )
    [whole] = renderer.tokenize([transcript := renderer.transcribe(messages, None, "row 1")])
    at_first = len(rendered)
    assert renderer.shorten(transcript, whole, 200).turns  # the last four exchanges
    assert len(rendered) <= at_first + 3 * num


def test_an_answer_longer_than_its_room_loses_its_end(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    byte_tokenizer.chat_template = CHATML
    row = {"instruction": "i" * 100, "input": None, "output": "o" * 500}
    rendered = render([row], INSTRUCTION, byte_tokenizer, 200)
    [sample] = rendered.samples
    assert sample.prompt_length == 50 and set(targets(byte_tokenizer, sample)) == {"o"}
    assert "iiiiiiiii" in full(byte_tokenizer, sample)
    assert len(sample.input_ids) == 200 and rendered.num_cut == 1


@pytest.mark.parametrize(
    ("section", "rows", "length"),
    [
        (TEXT, [{"text": ""}, {"text": None}], 64),
        (LABELS, [labelled("abc", "a"), labelled("abc", "b")], 10),
        (INSTRUCTION, [{"instruction": "a", "output": " "}, {"instruction": "", "output": "b"}], 64),
        (INSTRUCTION, [{"instruction": "a", "output": "b"}], 8),
        (CHAT, [chat(assistant("")), chat(user("a"))], 64),
    ],
)
def test_nothing_left_to_learn_from(
    section: DataSection, rows: list[dict[str, Any]], length: int, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(
        DataError, match=f"none of {len(rows)} rows .*model.max_length = {length}.*raise model.max_length"
    ):
        render(rows, section, byte_tokenizer, length)


def test_rows_with_nothing_to_learn_from_are_dropped_and_counted(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"instruction": "a", "input": "", "output": output} for output in ("b", "", None, "c", "  ")]
    rendered = render(rows, INSTRUCTION, byte_tokenizer, 64)
    assert (len(rendered.samples), rendered.num_dropped, rendered.num_cut) == (2, 3, 0)
    assert [sample.row for sample in rendered.samples] == [0, 3], "by which clients and references are found"
    classes = [labelled(" ", "no"), labelled("a", "no"), labelled("b", ""), labelled("c", "yes")]
    assert [sample.row for sample in render(classes, LABELS, byte_tokenizer, 64).samples] == [1, 3]


def test_a_refusing_template_names_the_row(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    byte_tokenizer.chat_template = INST
    rows = [chat(user("a"), assistant("b")), chat({"role": "system", "content": "s"}, user("a"), assistant("b"))]
    with pytest.raises(DataError, match="row 2: the model's chat template refuses this conversation: no system turn"):
        render(rows, CHAT, byte_tokenizer, 64)


def test_conversations_without_an_assistant_name_the_roles_they_have(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [chat(user("a"), {"role": "model", "content": "b"})]
    with pytest.raises(DataError, match=r"no turn of 1 conversations has the role 'assistant'.*; got model, user;"):
        render(rows, CHAT, byte_tokenizer, 64)
