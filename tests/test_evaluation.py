"""Generation, metrics of calls and answers, by client, and public benchmarks through a package that may be missing."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from peertune.cli import main
from peertune.config import DataSection, EvalSection, ModelSection
from peertune.data.batches import collate
from peertune.data.load import load_table
from peertune.data.render import Sample, render
from peertune.errors import ConfigError
from peertune.evaluation import HeldOut, generation, measure, references, remarks, run_harness
from peertune.evaluation import metrics as measuring
from peertune.evaluation.generation import generate
from peertune.evaluation.likelihood import evaluate
from peertune.evaluation.references import Reference, _choices, end_tokens, only_calls
from peertune.model.language_model import LanguageModel
from peertune.model.load import load_model
from peertune.run import run
from tests.conftest import make_byte_tokenizer
from tests.recipes import recipe
from tests.shapes import ARCHITECTURES, make_model

CHAT = DataSection(task="chat")
INSTRUCTION = DataSection(task="instruction")
TEMPLATE = (
    "{% for m in messages %}{{ {'system': '', 'user': '?', 'assistant': '!'}[m.role] + (m.content or '') }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>' if m.role == 'assistant' else '' }}"
    "{% endfor %}{{ '!' if add_generation_prompt else '' }}"
)


def tool(name: str, *arguments: str) -> dict[str, Any]:
    properties = {a: {"type": "string", "description": f"what {a} is"} for a in arguments}
    return {"name": name, "description": f"Does {name}.", "parameters": {"type": "object", "properties": properties}}


def row(asked: str, name: str, offered: Sequence[str] = ("on", "off"), client: str = "", **arguments: Any) -> Any:
    call = {"name": name, "arguments": arguments}
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": messages, "tools": [tool(f) for f in offered], **({"client": client} if client else {})}


ROWS = [row("a", "on", client="x"), row("bb", "off", client="y", n=1), row("ccc", "on", client="y", n=2)]


def held_out(rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, length: int = 96) -> HeldOut:
    samples = render(rows, CHAT, tokenizer, length).samples
    return HeldOut(samples, references(rows, samples, CHAT, tokenizer), tokenizer)


@pytest.fixture
def chatty() -> PreTrainedTokenizerBase:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def micro(micro_model: Path) -> LanguageModel:
    section = ModelSection(path=str(micro_model), max_length=96)
    return LanguageModel(load_model(section, torch.device("cpu")), section)


# generation


def greedily(model: LanguageModel, prompt: np.ndarray, num: int, ends: set[int]) -> list[int]:
    """The reference: no cache, no padding."""
    ids, new = torch.as_tensor(prompt.astype(np.int64))[None], []
    model.module.eval()
    with torch.no_grad():
        for _ in range(num):
            token = int(model.module(input_ids=ids, use_cache=False).logits[0, -1].argmax())
            if token in ends:
                break
            new.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return new


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_is_greedy_in_any_batch(name: str, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    model = LanguageModel(make_model(name), ModelSection())
    model.module.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 61, n).astype(np.int32) for n in (5, 12, 5, 9, 1)]
    expected = [greedily(model, prompt, 8, {2, 7}) for prompt in prompts]
    got = generate(model, byte_tokenizer, prompts, max_new_tokens=8, stop=[7], batch_size=3)
    assert got == [byte_tokenizer.decode(ids) for ids in expected]
    assert len({len(ids) for ids in expected}) > 1 or len(expected[0]) == 8


def test_prompts_go_alone_where_padding_changes_what_is_said(
    byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel(make_model("llama"), ModelSection())
    sizes = []
    original, forward = generation._continue, model.module.forward

    def blind(*args: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)  # as models with a running state: padding is read like text

    def counted(model: Any, tokenizer: Any, prompts: Any, ends: Any, limit: int, **options: Any) -> Any:
        sizes.append(len(prompts))
        return original(model, tokenizer, prompts, ends, limit, **options)

    monkeypatch.setattr(generation, "_continue", counted)
    prompts = [np.arange(3, 3 + n, dtype=np.int32) for n in (4, 9, 6)]
    generate(model, byte_tokenizer, prompts, max_new_tokens=3)
    assert sizes == [1, 2, 3]
    monkeypatch.setattr(model.module, "forward", blind)
    expected = [greedily(model, prompt, 3, {2}) for prompt in prompts]
    assert generate(model, byte_tokenizer, prompts, max_new_tokens=3) == list(map(byte_tokenizer.decode, expected))
    assert sizes[3:] == [1, 2, 1, 1, 1]


def test_no_answer_is_kept_with_the_logits_of_all_its_steps(
    byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a vocabulary of 150,000 they are more than a gigabyte; the trial of two tokens alone looks at them."""
    model = LanguageModel(make_model("llama"), ModelSection())
    kept, original = [], generation._continue

    def noted(*args: Any, **options: Any) -> Any:
        made = original(*args, **options)
        kept.append((args[-1], made.logits is not None))
        return made

    monkeypatch.setattr(generation, "_continue", noted)
    generate(model, byte_tokenizer, [np.arange(3, 3 + n, dtype=np.int32) for n in (4, 9)], max_new_tokens=5)
    assert kept == [(2, True), (2, True), (5, False)]


def test_an_end_token_at_once_and_the_models_own_settings_change_nothing(
    byte_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The trial of padding then had one step alone and two padded; settings may suppress tokens or ask for more."""
    model = LanguageModel(make_model("llama"), ModelSection())
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 61, n).astype(np.int32) for n in range(4, 24)]
    [first] = greedily(model, prompts[0], 1, set())
    prompts = [prompts[0], *[prompt for prompt in prompts if greedily(model, prompt, 1, set()) != [first]][:3]]
    byte_tokenizer.eos_token_id = model.module.generation_config.eos_token_id = first
    expected = [greedily(model, prompt, 6, {first}) for prompt in prompts]
    model.module.generation_config.min_new_tokens = 4
    model.module.generation_config.suppress_tokens = [expected[1][0]]
    own = model.module.generation_config
    got = generate(model, byte_tokenizer, prompts, max_new_tokens=6)
    assert got == [byte_tokenizer.decode(ids) for ids in expected] and got[0] == "" and got[1]
    assert model.module.generation_config is own


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_ends_where_positions_do(name: str, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    model = LanguageModel(make_model(name), ModelSection())
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 61, n).astype(np.int32) for n in (10, 62, 64, 70, 0, 30)]
    rooms = (8, 2, 0, 0, 0, 8)
    expected = [greedily(model, p, room, {2}) if room else [] for p, room in zip(prompts, rooms, strict=True)]
    model.module.train()
    got = generate(model, byte_tokenizer, prompts, max_new_tokens=8)
    assert got == [byte_tokenizer.decode(ids) if ids else "" for ids in expected]
    assert model.module.training
    model.num_virtual = 64 - 10  # a prompt's, which stand before all others
    assert generate(model, byte_tokenizer, prompts[:1], max_new_tokens=8) == [""]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_generation_with_adapters(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model = LanguageModel(adapted, ModelSection())
    for own in (adapted.generation_config, model.core.generation_config):
        own.repetition_penalty = 9.0
    prompts = [np.arange(3, 3 + n, dtype=np.int32) for n in (4, 9)]
    expected = [greedily(model, prompt, 8, {2}) for prompt in prompts]
    assert generate(model, byte_tokenizer, prompts, max_new_tokens=8) == list(map(byte_tokenizer.decode, expected))


# metrics of calls


def test_only_the_calls_count_in_their_loss(micro: LanguageModel, chatty: PreTrainedTokenizerBase) -> None:
    said = row("q", "on")
    said["messages"][1]["content"] = "Well: "
    silent = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}], "tools": None}
    data = held_out([said, silent], chatty)
    [calling] = only_calls(data.samples)
    assert chatty.decode(calling.input_ids[calling.loss_mask]) == '[{"name": "on", "arguments": {}}]'
    assert chatty.decode(data.samples[0].input_ids[data.samples[0].loss_mask]).startswith("Well: [{")
    assert data.references[0].num_tokens == len("Well: ") + int(calling.loss_mask.sum()), "all that is to be generated"
    [first] = only_calls([replace(calling, calls=((0, 3),))])
    assert np.flatnonzero(first.loss_mask).tolist() == [1, 2], "nothing predicts the first token"
    with torch.no_grad():
        loss, count = micro.loss_sum(collate([calling], 0))
    metrics = measure(micro, data, EvalSection()).overall
    assert metrics["call_loss"] == pytest.approx(float(loss) / count, rel=1e-5)
    assert metrics["loss"] == evaluate(micro, data.samples, 0)["loss"] != metrics["call_loss"]
    assert set(metrics) == {"loss", "perplexity", "call_loss"}
    assert "call_loss" not in measure(micro, held_out([silent], chatty), EvalSection()).overall
    parts = [({"loss": 1.0, "call_loss": 1.0}, data.samples[:1]), ({"loss": 2.0}, data.samples[1:])]
    assert measuring._combine(parts)["call_loss"] == 1.0, "who makes no calls has no part in it"
    assert end_tokens(data.samples, chatty) == [4]
    assert end_tokens(held_out(ROWS, chatty, 60).samples, chatty) == [], "where all are cut, no letter ends an answer"


def test_a_perplexity_beyond_all_numbers_ends_no_run(
    micro: LanguageModel, chatty: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro, "loss_sum", lambda batch: (torch.tensor(1e6), 1))
    assert 1e300 < measure(micro, held_out(ROWS, chatty), EvalSection()).overall["perplexity"] < float("inf")


def test_all_of_a_classification_is_measured_together_and_some_rows_spread_over_the_file(micro: LanguageModel) -> None:
    """Macro F1 is no mean of the clients'."""
    samples = [Sample(np.arange(3, 9 + i, dtype=np.int32), np.ones(6 + i, bool), i % 2, 5) for i in range(4)]
    known = [Reference(client) for client in "xyxy"]
    data = HeldOut(samples, known, make_byte_tokenizer(), [[5], [6]])
    found = measure(micro, data, EvalSection(), by_client=True)
    assert found.overall == evaluate(micro, samples, 0, labels=data.labels) and found.by_client.keys() == {"x", "y"}
    assert measuring._spread(known * 2, 2, lambda reference: reference.client == "y") == [1, 5]


def test_a_client_may_be_called_0(chatty: PreTrainedTokenizerBase) -> None:
    data = held_out([{**ROWS[0], "client": 0}], chatty)
    assert data.references[0].client == "0"
    packed = replace(data.samples[0], row=-1)
    assert references(ROWS, [packed], DataSection(task="text"), chatty)[0].client == "", "of several rows, nobody's"


def test_calls_in_text_are_counted(
    micro: LanguageModel, chatty: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = ['[{"name": "on", "arguments": {}}]', '[{"name": "off", "arguments": {"n": 2}}]', "[{"]
    prompts: list[str] = []

    def answer(model: Any, tokenizer: Any, given: Any, **options: Any) -> list[str]:
        prompts.extend(tokenizer.decode(prompt) for prompt in given)
        assert options == {"max_new_tokens": 7, "stop": [4]}
        return written[: len(given)]

    data = held_out(ROWS, chatty, 200)
    whole = measure(micro, data, EvalSection()).overall
    monkeypatch.setattr(measuring, "generate", answer)
    found = measure(micro, data, EvalSection(generate_samples=3, max_new_tokens=7), by_client=True)
    assert prompts == [
        f"Functions that may be called:\non() - Does on.\noff() - Does off.?{q}!" for q in ("a", "bb", "ccc")
    ]
    assert found.overall["calls_parsed"] == found.overall["function_name_accuracy"] == pytest.approx(2 / 3)
    assert found.overall["call_accuracy"] == pytest.approx(1 / 3)
    assert [found.by_client[c]["call_accuracy"] for c in ("x", "y")] == [1.0, 0.0]
    assert [found.by_client[c]["function_name_accuracy"] for c in ("x", "y")] == [1.0, 0.5]
    counts = [sum(int(s.loss_mask.sum()) for s in part) for part in (data.samples[:1], data.samples[1:])]
    weighted = sum(n * found.by_client[c]["loss"] for n, c in zip(counts, ("x", "y"), strict=True)) / sum(counts)
    assert found.overall["loss"] == pytest.approx(weighted, rel=1e-5)
    assert {name: found.overall[name] for name in whole} == pytest.approx(whole, rel=1e-5)
    written[:] = ['[{"name": "off", "arguments": {"n": 1.0}}]']
    one = EvalSection(generate_samples=1, max_new_tokens=7)
    few = measure(micro, data, one)
    assert few.overall["function_name_accuracy"] == 0.0 and few.overall["calls_parsed"] == 1.0 and not few.by_client
    mixed = held_out([*ROWS[:2], row("d", "on")], chatty, 200)  # the last is nobody's
    assert measure(micro, mixed, one, by_client=True).by_client.keys() == {"x", "y"}


def test_functions_are_chosen_by_their_likelihood(
    micro: LanguageModel, chatty: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("a", "on", ("on", "on_off", "o")), row("b", "off", ("on", "off")), row("c", "on", ("on",))]
    data = held_out(rows, chatty, 200)
    names = [[name for name, _ in known.choices] for known in data.references]
    assert names == [["on", "on_off", "o"], ["off", "on"], []]
    right = []
    for known in data.references[:2]:
        scores = []
        for name, sample in known.choices:
            assert chatty.decode(sample.input_ids).endswith('[{"name": "' + name + '"')
            text = chatty.decode(sample.input_ids[sample.loss_mask])
            # what all names begin with tells nothing
            assert (name + '"').endswith(text) and ('"' + name).startswith('"o')
            logits = micro.module(input_ids=torch.as_tensor(sample.input_ids.astype(np.int64))[None]).logits[0]
            where = np.flatnonzero(sample.loss_mask)
            scores.append(float(logits.log_softmax(-1)[where - 1, sample.input_ids[where]].sum()))
        right.append(scores[0] == max(scores))
    sum_loss = micro.loss_sum

    def without_dropout(batch: Any) -> Any:
        assert not micro.module.training
        return sum_loss(batch)

    monkeypatch.setattr(micro, "loss_sum", without_dropout)
    micro.module.train()
    metrics = measure(micro, data, EvalSection(choice_samples=9)).overall
    assert metrics["function_name_choice_accuracy"] == pytest.approx(np.mean(right))
    both = [row("a", "on"), row("a", "off")]
    for here, there in (both, both[::-1]):
        here["messages"][1]["tool_calls"].append({**there["messages"][1]["tool_calls"][0]})
    data = held_out(both, chatty, 200)
    assert [known.choices[0][0] for known in data.references] == ["on", "off"], "chosen where the first call stands"
    either = measure(micro, data, EvalSection(choice_samples=2)).overall
    assert either["function_name_choice_accuracy"] == 1.0, "calls are made in any order"


def test_a_model_that_learned_its_calls_makes_them(micro: LanguageModel, chatty: PreTrainedTokenizerBase) -> None:
    rows = [row(asked, name, ("on", "of"), n=number) for asked, name, number in (("aa", "on", 1), ("zz", "of", 2))]
    data = held_out(rows, chatty, 160)
    micro.module.requires_grad_(True)
    micro.module.config.max_position_embeddings = 256
    optimizer = torch.optim.Adam(micro.module.parameters(), lr=1e-2)
    batch = collate(data.samples, 0)
    settings = EvalSection(generate_samples=2, choice_samples=2, max_new_tokens=60)
    before = measure(micro, data, settings).overall
    assert before["call_accuracy"] == before["calls_parsed"] == 0
    for _ in range(200):
        loss, count = micro.loss_sum(batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = measure(micro, data, settings).overall
    assert after["call_loss"] < 0.1 < before["call_loss"]
    for name in ("call_accuracy", "function_name_accuracy", "calls_parsed", "function_name_choice_accuracy"):
        assert after[name] == 1.0, name


def test_references_that_cannot_be_read_are_told(chatty: PreTrainedTokenizerBase) -> None:
    data = held_out(ROWS, chatty)
    [said] = remarks(data, EvalSection())
    assert "3 held-out rows make calls, but eval.generate_samples is 0" in said
    assert remarks(data, EvalSection(generate_samples=1)) == []
    lengths = sorted(reference.num_tokens for reference in data.references if reference.calls)
    assert lengths[0] > 1 and remarks(data, EvalSection(generate_samples=1, max_new_tokens=lengths[-1])) == []
    [said] = remarks(data, EvalSection(generate_samples=1, max_new_tokens=lengths[0] - 1))
    assert said.startswith(
        f"the answers of 3 of {len(data.references)} held-out rows are longer than eval.max_new_tokens"
    )
    chatty.chat_template = TEMPLATE.replace("m.tool_calls | tojson", "m.tool_calls[0].name + '()'")
    [said] = remarks(held_out(ROWS, chatty), EvalSection(generate_samples=1))
    assert "the calls of 3 of 3 held-out rows do not read back" in said
    chatty.chat_template = TEMPLATE
    assert remarks(HeldOut([], [], chatty, (), 60, 40, 3), EvalSection()) == [
        "40 of 60 held-out rows were cut to model.max_length: what they are measured by may lack its end, or its"
        " question",
        "3 of 60 held-out rows have nothing to predict and were left out",
    ]
    [said] = remarks(held_out(ROWS, chatty, 60), EvalSection(generate_samples=1))
    assert "the calls of 3 of 3 held-out rows do not read back" in said and "cut off" in said


def test_calls_that_no_row_or_text_has_whole_are_not_expected(chatty: PreTrainedTokenizerBase) -> None:
    broken = row("a", "on")
    broken["messages"][1]["tool_calls"][0]["arguments"] = "[1]"
    assert held_out([broken], chatty).references == [Reference(readable=False)]
    chatty.chat_template = TEMPLATE.replace("m.tool_calls | tojson", "'it calls'")
    assert held_out(ROWS[:1], chatty).references == [Reference("x", readable=False)]


def test_functions_are_offered_only_where_their_names_can_be_told_apart(chatty: PreTrainedTokenizerBase) -> None:
    [sample] = held_out(ROWS[:1], chatty, 200).samples
    start, end = sample.calls[-1]
    written = str(chatty.decode(sample.input_ids[start:end]))
    for changed, num in ((0, 0), (12, 0), (13, 2)):  # of [{"name": "on", whose last token may hold more
        ids = sample.input_ids.copy()
        ids[start + changed] = 9
        assert len(_choices(replace(sample, input_ids=ids), start, end, written, "on", ["off"], chatty)) == num
    text = "it calls on"
    ids = np.array(chatty.encode(text, add_special_tokens=False), dtype=np.int32)
    whole = Sample(ids, np.ones(len(ids), bool))
    assert _choices(whole, 0, len(ids), text, "on", ["on_off"], chatty) == (), "the one begins with the other"
    assert len(_choices(whole, 0, len(ids), text, "on", ["off"], chatty)) == 2


def test_that_nothing_can_be_generated_is_told(chatty: PreTrainedTokenizerBase) -> None:
    """As where calls stand in a turn's text, as in many ShareGPT data sets."""
    said = '<tool_call>{"name": "on", "arguments": {}}</tool_call>'
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]}]
    data = held_out(rows, chatty)
    assert remarks(data, EvalSection()) == []
    assert remarks(HeldOut([], [], chatty), EvalSection(generate_samples=3)) == []
    [told] = remarks(data, EvalSection(generate_samples=3))
    assert told.startswith("eval.generate_samples = 3 does nothing here")


def test_the_calls_expected_are_those_of_the_last_turn_that_is_left(chatty: PreTrainedTokenizerBase) -> None:
    """Turns after it may be cut off or have a weight of 0, and call the same function with other arguments."""
    turns = [row("", "on", n=n)["messages"][1] for n in range(3)]
    messages = [{"role": "user", "content": "q"}, *turns]
    left = set()
    for length in range(40, 150):
        data = held_out([{"messages": messages}], chatty, length)
        [sample], [known] = data.samples, data.references
        assert [call.arguments for call in known.calls] in ([], [{"n": len(sample.calls) - 1}])
        left.add(len(known.calls) * len(sample.calls))
    assert left == {0, 1, 2, 3}
    [known] = held_out([{"messages": [*messages[:2], {**turns[1], "weight": 0}]}], chatty).references
    assert known.readable and [call.arguments for call in known.calls] == [{"n": 0}]


@pytest.mark.parametrize("length", [256, 512])
def test_real_rows_always_offer_every_function(length: int, english: PreTrainedTokenizerBase, shared: Path) -> None:
    rows = load_table(str(shared / "data" / "toolchat-bfcl-test.jsonl.gz"), CHAT).rows[:120]
    rendered = render(rows, CHAT, english, length)
    assert rendered.tools_cut and rendered.num_cut < len(rows) // 4
    for sample, known in zip(rendered.samples, references(rows, rendered.samples, CHAT, english), strict=True):
        shown = english.decode(sample.input_ids)
        for offered in rows[sample.row]["tools"]:
            assert f"\n{offered['function']['name']}(" in shown
        if known.calls and known.readable:
            assert {name for name, _ in known.choices} >= {known.calls[0].name} or len(rows[sample.row]["tools"]) == 1
        assert known.client == rows[sample.row]["client"]


# answers


def test_answers_of_instructions_are_matched(
    micro: LanguageModel, byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"{n} and {n}?", "output": f"Sum.\n#### {2 * n}"} for n in range(4)]
    samples = render(rows, INSTRUCTION, byte_tokenizer, 96).samples
    data = HeldOut(samples, references(rows, samples, INSTRUCTION, byte_tokenizer), byte_tokenizer)
    monkeypatch.setattr(measuring, "generate", lambda *_, **__: ["#### 0", "so 2", "4 or 5", "none"])
    assert measure(micro, data, EvalSection(generate_samples=4)).overall["exact_match"] == 0.5
    monkeypatch.setattr(measuring, "generate", lambda model, tokenizer, given, **_: [""] * len(given))
    assert "exact_match" not in measure(micro, data, EvalSection()).overall
    assert remarks(data, EvalSection(generate_samples=1)) == []
    [said] = remarks(data, EvalSection(generate_samples=1, max_new_tokens=3))
    assert said.startswith("the answers of 4 of 4 held-out rows are longer than eval.max_new_tokens = 3")
    empty = [{**rows[0], "output": None}]
    assert references(empty, samples[:1], INSTRUCTION, byte_tokenizer)[0].answer == ""


# whole runs and the command


@pytest.fixture
def chatty_model(tmp_path: Path, micro: LanguageModel, chatty: PreTrainedTokenizerBase) -> str:
    """The micro model with the short template above and room for its conversations."""
    micro.module.config.max_position_embeddings = 256
    micro.module.save_pretrained(tmp_path / "chatty")
    chatty.save_pretrained(tmp_path / "chatty")
    return str(tmp_path / "chatty")


def write_chat(path: Path, num_rows: int) -> Path:
    lines = [row(f"q{i}", ("on", "off")[i % 2], client=f"c{i % 4}", n=i) for i in range(num_rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_run_gives_the_metrics_of_calls_by_client(tmp_path: Path, chatty_model: str) -> None:
    config = recipe(
        tmp_path,
        Path(chatty_model),
        model={"max_length": 96},
        data={
            "train": str(write_chat(tmp_path / "chat.jsonl", 24)),
            "test": str(write_chat(tmp_path / "chat-test.jsonl", 8)),
            "task": "chat",
            "partition": {"kind": "column", "column": "client"},
        },
        eval={"generate_samples": 2, "choice_samples": 4, "max_new_tokens": 4},
    )
    metrics = run(config)["metrics"]
    names = set(metrics["average_model"])
    assert names >= {"call_loss", "call_accuracy", "function_name_accuracy", "calls_parsed", "loss"}
    assert all(set(peer) == names for peer in [metrics["before"], *metrics["peers"]])
    nested = metrics["by_client"]
    assert set(nested["average_model"]) == set(nested["before"]) == {"c0", "c1", "c2", "c3"}
    assert len(nested["peers"]) == 4
    assert np.mean([m["call_loss"] for m in nested["average_model"].values()]) == pytest.approx(
        metrics["average_model"]["call_loss"], rel=0.05
    )
    assert nested["average_model"]["c0"]["call_loss"] < nested["before"]["c0"]["call_loss"]
    (tmp_path / "out" / "summary.json").unlink()  # as if killed after the last checkpoint
    assert run(config, resume=True)["metrics"] == metrics
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert any("were described shorter to fit model.max_length = 96" in n for n in events[0]["notes"])
    assert "call loss" in (tmp_path / "out" / "report.html").read_text()


def test_eval_measures_several_files(tmp_path: Path, chatty_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(write_chat(tmp_path / f"{n}.jsonl", n)) for n in (3, 5)]
    options = ["--task", "chat", "--max-length", "96", "--generate", "1", "--max-new-tokens", "2", "--choices", "2"]
    assert main(["eval", chatty_model, "--data", *files, *options]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["data"], line["samples"]) for line in lines] == [(files[0], 3), (files[1], 5)]
    for line in lines:
        assert 0 <= line["calls_parsed"] <= 1 and line["call_loss"] > 0
        assert set(line["by_client"]) <= {"c0", "c1", "c2", "c3"} and len(line["by_client"]) > 2


def test_eval_holds_the_weights_in_the_type_that_is_asked_for(
    tmp_path: Path, chatty_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_chat(tmp_path / "rows.jsonl", 5))
    losses = []
    for dtype in ([], ["--dtype", "float32"], ["--dtype", "bfloat16"]):
        assert main(["eval", chatty_model, "--data", data, "--task", "chat", "--max-length", "96", *dtype]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1] != losses[2] == pytest.approx(losses[0], rel=0.02)


def test_eval_refuses_what_it_cannot_measure(micro_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, part in (
        ([], "got nothing to measure on, expected --data FILE with --task, or --lm-eval TASKS"),
        (["--data", "x.jsonl"], "--task: got none, expected text, classification"),
        (["--data", "x.jsonl", "--task", "text", "--generate", "5"], "--generate: got it with --task text"),
        (["--data", "x.jsonl", "--task", "instruction", "--choices", "5"], "--choices: got it with --task instruction"),
    ):
        assert main(["eval", str(micro_model), *arguments]) == 2
        assert part in capsys.readouterr().err


def test_eval_names_its_own_option_for_the_length(
    tmp_path: Path, micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.txt").write_text("some words")
    assert main(["eval", str(micro_model), "--data", str(tmp_path / "d.txt"), "--task", "text"]) == 2
    assert "got 256, but" in (said := capsys.readouterr().err) and "lower it (`eval`: --max-length)" in said


def test_public_benchmarks_need_their_package(
    micro_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    assert main(["eval", str(micro_model), "--lm-eval", "arc_easy"]) == 2
    error = capsys.readouterr().err
    assert "the package lm-eval cannot be imported" in error and "pip install 'peertune[eval]'" in error


@pytest.fixture
def fake_harness(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Modules of lm-eval's interface; what they were called with."""
    seen: list[Any] = []

    class HFLM:
        def __init__(self, *, pretrained: Any, tokenizer: Any, batch_size: int, max_length: int) -> None:
            seen.append((type(pretrained).__name__, tokenizer.pad_token_id, batch_size, max_length))

    def simple_evaluate(*, model: Any, tasks: list[str], limit: int | None, log_samples: bool) -> dict[str, Any]:
        assert isinstance(model, HFLM) and not log_samples
        seen.append((tasks, limit))
        if "no_such" in tasks:
            raise KeyError("no_such")
        first = {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict-match": 0.25}
        return {"results": {name: first for name in tasks}}

    package, models, huggingface = (ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    huggingface.HFLM = HFLM  # type: ignore[attr-defined]
    for module in (package, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_public_benchmarks_are_run(
    micro_model: Path, fake_harness: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lm-eval", "arc_easy,gsm8k", "--max-samples", "5", "--max-length", "64"]
    assert main(["eval", str(micro_model), *options]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"lm_eval": n, "acc": 0.5, "exact_match/strict-match": 0.25} for n in ("arc_easy", "gsm8k")]
    assert fake_harness == [("LlamaForCausalLM", 0, 8, 64), (["arc_easy", "gsm8k"], 5)]
    with pytest.raises(ConfigError, match=r"got 'no_such', but lm-eval refuses: 'no_such'; `lm-eval ls tasks`"):
        run_harness(SimpleNamespace(), make_byte_tokenizer(), ["no_such"], max_length=9)


def test_eval_refuses_a_tokenizer_larger_than_the_model(
    micro_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a token was added and the embedding not resized."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(micro_model)
    module.resize_token_embeddings(100)
    module.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(micro_model).save_pretrained(tmp_path / "small")
    (tmp_path / "d.txt").write_text("some words")
    options = ["--data", str(tmp_path / "d.txt"), "--task", "text", "--max-length", "40"]
    assert main(["eval", str(tmp_path / "small"), *options]) == 2
    assert "the model embeds only 100" in capsys.readouterr().err
