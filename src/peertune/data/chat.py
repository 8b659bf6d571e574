"""Conversations as tokens, and which of them the assistant said.

Nothing here knows a model's template. Where a turn stands in the text is found by rendering: it starts where the
conversation before it, with the generation prompt, ends, and ends where the conversation up to it ends, as long as
both are beginnings of the whole. Where it stands among the tokens is found by comparing tokens in the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2.exceptions import TemplateError

from peertune.data.tokens import Tokens, bos_tokens, common_length, encode
from peertune.data.tools import LOSSES, prune, signature
from peertune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]
Conversation = tuple[Sequence[Message], Sequence[Any] | None, str]
"""Messages, function schemas, and the row's name for errors."""

_PLAIN_TEMPLATE = """\
{%- set titles = {'system': 'Context', 'user': 'Request', 'assistant': 'Reply', 'tool': 'Tool result'} -%}
{%- for m in messages -%}
{{ '### ' + titles.get(m.role, m.role) + ':\\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] -%}
{{ ', {' if loop.index0 else '[{' }}
{%- for key, value in call.items() if key != 'id' -%}
{{ ', ' if loop.index0 }}{{ key | tojson }}: {{ value | tojson }}
{%- endfor -%}
{{ '}]' if loop.last else '}' }}
{%- endfor -%}
{{ (eos_token or '') if m.role == 'assistant' else '' }}{{ '\\n\\n' }}
{%- endfor -%}
{{ '### Reply:\\n' if add_generation_prompt else '' }}"""

# A template that writes calls as JSON needs their arguments as an object: the JSON text that OpenAI's format has there
# would be quoted a second time. A template that tests for text handles both.
_CALLS_AS_JSON = re.compile(r"\b(arguments|function)(['\"]\])?\s*\|\s*tojson")

_TODAY = "{% macro strftime_now(format) %}{{ format"
_TODAY += "".join(f" | replace('%{code}', '{datetime(2024, 7, 26):%{code}}')" for code in "YymdBbAaHMS")
_TODAY += " }}{% endmacro %}\n"
"""Put before a template that names the day, as Llama's and Mistral's do: what a row says must be the same tomorrow, or
no run could be resumed then. The day is that of Llama's templates where they have no clock."""

_MIN_CUT_CHARS = 16
"""Shorter texts are never cut: they make no room, and could be mistaken for the template's own words."""


@dataclass(frozen=True)
class Transcript:
    """A conversation, rendered up to its last assistant turn."""

    where: str
    """The row's name, for errors."""
    messages: list[Message]
    tools: Sequence[Any] | None
    """Function schemas that the template itself writes out."""
    text: str
    turns: list[Span]
    """Characters [start, end) of each assistant turn with its end token: what is to be learned."""
    calls: list[Span]
    """Characters [start, end) of the calls within each turn; empty where it has none."""
    listing: str = ""
    """The functions as they stand in the first turn, where the template itself leaves them out."""


@dataclass(frozen=True)
class Tokenized:
    """A conversation as tokens."""

    ids: Tokens
    """int32 [length]"""
    turns: list[Span]
    """Tokens [start, end) of each assistant turn."""
    calls: list[Span]
    """Tokens [start, end) of the calls within each turn; empty where it has none."""
    cut: bool = False
    """Whether the conversation itself, not only what is said of the functions, lost a part."""
    loss: int = 0
    """What the functions' schemas lost: an index into `LOSSES`."""


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for a tokenizer that has none: a heading for each turn, in Markdown."""
    return ("{{ bos_token }}" if len(bos_tokens(tokenizer)) else "") + _PLAIN_TEMPLATE


class ChatRenderer:
    """Renders conversations with the tokenizer's chat template, or `plain_template` where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        own = str(tokenizer.chat_template or "")
        self._template = None if own else plain_template(tokenizer)
        self._calls_as_objects = bool(_CALLS_AS_JSON.search(own)) and "is string" not in own
        self._end_tokens = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())

    def transcribe(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str, *, only_last: bool = False
    ) -> Transcript | None:
        """Render one conversation and find its assistant turns.

        Args:
            messages: dicts with role and content, calls in `tool_calls`.
            tools: JSON schemas of functions; written into the system turn where the template leaves them out.
            where: the row's name, for errors.
            only_last: look for the last turn alone, which is enough for the text: each other costs two more renderings.
        Returns:
            The transcript, or None where the assistant says nothing.
        Raises:
            DataError: the template refuses the conversation, or an assistant turn cannot be told from what it renders.
        """
        spoken = [i for i, m in enumerate(messages) if _says_something(m)]
        if not spoken:
            return None
        kept = [self._prepare(message) for message in messages[: spoken[-1] + 1]]
        text = self._render(kept, tools, where)
        if self._leaves_out_calls(kept, tools, text, where):
            kept = [{**m, "content": m["content"] + _written_calls(m)} for m in kept]  # as `plain_template` has them
            text = self._render(kept, tools, where)
        listing = ""
        if tools and text == self._render(kept, None, where):
            length = len(kept)
            listing = "Functions that may be called:\n" + "\n".join(map(signature, tools))
            kept, text = self._fold_tools(kept, listing, where)
            spoken = [i + len(kept) - length for i in spoken]
            tools = None
        turns: list[Span] = []
        calls: list[Span] = []
        spoken = spoken[-1:] if only_last else spoken
        for i in spoken:
            opening = self._render(kept[:i], tools, where, generation_prompt=True) if i else ""
            whole = text if i == len(kept) - 1 else self._render(kept[: i + 1], tools, where)
            if i and whole.startswith(opening) and text.startswith(whole):
                start, end = len(opening), len(whole)
            else:  # turns of the past are rendered otherwise, or the generation prompt says more than they do
                since, cursor = (spoken[len(turns) - 1] + 1, turns[-1][1]) if turns else (0, 0)
                known = bool(opening) and text.startswith(opening)
                before = ""
                if i and not known:
                    with suppress(DataError):  # a template may want an answer at the end
                        before = self._render(kept[:i], tools, where)
                begin = len(opening) if known else _end_of(before, kept[since:i], text, cursor)
                start, end = _search(kept[i], text, whole, begin, where)
                start = begin if known else start
            # white space after the end token is the template's, no generation reaches it
            said = text[start:end].rstrip()
            end = start + len(said) if said.endswith(self._end_tokens) else end
            turns.append((start, end))
            calls.append(self._find_calls(kept[: i + 1], tools, whole, text[start:end], start, where))
        return Transcript(where, kept, tools, text[: turns[-1][1]], turns, calls, listing)

    def tokenize(self, transcripts: Sequence[Transcript]) -> list[Tokenized]:
        """The tokens of each transcript, uncut."""
        texts = encode(self.tokenizer, [t.text for t in transcripts])
        # Each once: a turn without calls has its start as both their borders, one that follows another its end.
        borders = [sorted({b for span in (*t.turns, *t.calls) for b in span}) for t in transcripts]
        prefixes = [t.text[:b] for t, row in zip(transcripts, borders, strict=True) for b in row if b < len(t.text)]
        encoded = iter(encode(self.tokenizer, prefixes))
        found = []
        for t, ids, row in zip(transcripts, texts, borders, strict=True):
            places = {b: common_length(next(encoded), ids) if b < len(t.text) else len(ids) for b in row}
            turns, calls = ([(places[start], places[end]) for start, end in spans] for spans in (t.turns, t.calls))
            found.append(Tokenized(ids, turns, calls))
        return found

    def fit(self, conversations: Sequence[Conversation], max_length: int) -> list[Tokenized | None]:
        """Conversations as at most max_length tokens each.

        Where one is longer, its functions lose what `LOSSES` names, no more than is needed; where that is not enough,
        it is cut as `shorten` says.

        Returns:
            For each the tokens, or None where the assistant says nothing.
        Raises:
            DataError: as `transcribe` does.
        """
        transcripts = {
            i: transcript
            for i, conversation in enumerate(conversations)
            if (transcript := self.transcribe(*conversation)) is not None
        }
        fitted = dict(zip(transcripts, self.tokenize(list(transcripts.values())), strict=True))
        for step in range(1, len(LOSSES)):
            left = [i for i, whole in fitted.items() if conversations[i][1] and len(whole.ids) > max_length]
            for i in left:
                messages, tools, where = conversations[i]
                shorter = self.transcribe(messages, [prune(tool, step) for tool in tools or ()], where)
                assert shorter is not None  # what the assistant says stays
                transcripts[i] = shorter
            for i, tokenized in zip(left, self.tokenize([transcripts[i] for i in left]), strict=True):
                fitted[i] = replace(tokenized, loss=step)
        for i, tokenized in fitted.items():
            if len(tokenized.ids) > max_length:
                shortened = self.shorten(transcripts[i], tokenized, max_length)
                fitted[i] = replace(shortened, cut=True, loss=tokenized.loss)
        return [fitted.get(i) for i in range(len(conversations))]

    def shorten(self, transcript: Transcript, tokenized: Tokenized, max_length: int) -> Tokenized:
        """Cut a conversation to max_length tokens, sparing its last assistant turn as long as possible.

        In this order: the oldest exchanges go (a user's message and all up to the next one; system turns stay); the
        longest texts that are not the assistant's lose their ends, until a quarter of max_length is left before the
        last assistant turn; the rest loses its end. The functions listed are not cut where the last turn calls one: it
        may be the one that went.

        Args:
            transcript: the conversation.
            tokenized: what `tokenize` gave for it.
            max_length: tokens that may stay.
        Returns:
            The tokens, max_length or fewer, with the assistant turns that are left.
        """
        ids, turns, calls = tokenized.ids, tokenized.turns, tokenized.calls
        while len(ids) > max_length and (recent := self._recent(transcript, max_length)):
            shorter = self.transcribe(recent, transcript.tools, transcript.where)
            assert shorter is not None  # the last message is the assistant's
            transcript = replace(shorter, listing=transcript.listing)
            [short] = self.tokenize([transcript])
            ids, turns, calls = short.ids, short.turns, short.calls
        text, keep = transcript.text, np.ones(len(ids), dtype=np.bool_)
        contents = [m["content"] for m in transcript.messages if m["role"] != "assistant"]
        if transcript.listing and calls[-1][0] < calls[-1][1]:
            contents = [part for content in contents for part in content.split(transcript.listing)]
        others = [content.strip() for content in contents]
        for content in sorted(others, key=len, reverse=True):
            excess = min(int(keep.sum()) - max_length, int(keep[: turns[-1][0]].sum()) - max_length // 4)
            at = text.find(content)
            if excess <= 0 or len(content) < _MIN_CUT_CHARS:
                break
            if at >= 0:  # a template may change a text, such as escape it
                before, upto = encode(self.tokenizer, [text[:at], text[: at + len(content)]])
                start, end = common_length(before, ids), common_length(upto, ids)
                keep[max(start, end - excess) : end] = False
        places = np.concatenate([[0], np.cumsum(keep)])

        def moved(span: Span) -> Span:
            return min(int(places[span[0]]), max_length), min(int(places[span[1]]), max_length)

        left = [(moved(turn), moved(call)) for turn, call in zip(turns, calls, strict=True)]
        left = [(turn, call) for turn, call in left if turn[0] < turn[1]]
        return Tokenized(ids[keep][:max_length], [turn for turn, _ in left], [call for _, call in left])

    def _recent(self, transcript: Transcript, max_length: int) -> list[Message]:
        """The messages without as many of the oldest exchanges as have to go, one at least; empty where none can."""
        recent: list[Message] = []
        while shorter := _without_oldest(recent or transcript.messages):
            recent = shorter
            rendered = self.transcribe(recent, transcript.tools, transcript.where, only_last=True)
            assert rendered is not None  # the last message is the assistant's
            if len(encode(self.tokenizer, [rendered.text])[0]) <= max_length:
                break
        return recent

    def _find_calls(
        self, messages: list[Message], tools: Sequence[Any] | None, whole: str, said: str, start: int, where: str
    ) -> Span:
        """Characters [start, end) of the last message's calls: what its turn would not have without them.

        Args:
            whole: the conversation up to that turn.
            said: the turn, which begins at character `start` of the conversation.
        """
        if not messages[-1].get("tool_calls"):
            return start, start
        try:
            without = self._render([*messages[:-1], _silent(messages[-1])], tools, where)
        except DataError:  # a template may refuse a turn that says nothing
            return start, start + len(said)
        before = _num_alike(whole, without)
        after = _num_alike(whole[before:][::-1], without[before:][::-1])
        first = max(0, before - whole.rfind(said)) if said in whole else 0
        last = min(len(said), len(whole) - after - whole.rfind(said)) if said in whole else len(said)
        return start + first, start + max(first, last)

    def _leaves_out_calls(self, messages: list[Message], tools: Sequence[Any] | None, text: str, where: str) -> bool:
        """Whether the template, as many that know of no tools, writes no calls: they would never be learned."""
        if any(message.get("tool_calls") for message in messages):
            with suppress(DataError):  # a template may refuse a turn that says nothing
                return text == self._render([_silent(message) for message in messages], tools, where)
        return False

    def _prepare(self, message: Message) -> Message:
        prepared = {**message, "content": message.get("content") or ""}
        calls = message.get("tool_calls")
        if self._calls_as_objects and calls:
            prepared["tool_calls"] = [_with_object(call) for call in calls]
        return prepared

    def _render(
        self, messages: list[Message], tools: Sequence[Any] | None, where: str, generation_prompt: bool = False
    ) -> str:
        offered = list(tools) if tools else None
        try:
            template = self._template or self.tokenizer.get_chat_template(tools=offered)  # of several, one for tools
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=offered,
                chat_template=_TODAY + template if "strftime_now" in template else template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{where}: the model's chat template refuses this conversation: {error}") from None
        return text

    def _fold_tools(self, messages: list[Message], listing: str, where: str) -> tuple[list[Message], str]:
        """The messages with the listing in their system turn, or in the first turn where the template has no system."""
        first = messages[0]
        merged = {**first, "content": "\n\n".join(filter(None, [first["content"], listing]))}
        if first["role"] != "system":
            with_system = [{"role": "system", "content": listing}, *messages]
            try:
                return with_system, self._render(with_system, None, where)
            except DataError:
                merged["content"] = "\n\n".join(filter(None, [listing, first["content"]]))
        return [merged, *messages[1:]], self._render([merged, *messages[1:]], None, where)


def _num_alike(a: str, b: str) -> int:
    """Number of characters that two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _says_something(message: Message) -> bool:
    content = message.get("content") or ""
    is_learned = message["role"] == "assistant" and message.get("weight", 1) != 0
    return is_learned and bool(content.strip() or message.get("tool_calls"))


def _silent(message: Message) -> Message:
    """A prepared message without its calls, be they at the end of its text too."""
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": message["content"].removesuffix(_written_calls(message))}


def _written_calls(message: Message) -> str:
    calls = message.get("tool_calls")
    # An id is drawn at random where a call is made: nothing that a model could learn. As `plain_template` has them.
    kept = [{key: value for key, value in call.items() if key != "id"} for call in calls or []]
    return json.dumps(kept, ensure_ascii=False) if kept else ""


def _with_object(call: Any) -> Any:
    """A call whose arguments are an object, where they were its JSON text."""
    function = call.get("function", call)
    try:
        parsed = {**function, "arguments": json.loads(function["arguments"])}
    except (KeyError, TypeError, json.JSONDecodeError):
        return call
    return {**call, "function": parsed} if "function" in call else parsed


def _without_oldest(messages: Sequence[Message]) -> list[Message]:
    """The messages without the first user's message and what follows up to the next; empty where there is no next."""
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    return [*messages[: users[0]], *messages[users[1] :]] if len(users) > 1 else []


def _end_of(before: str, between: Sequence[Message], text: str, cursor: int) -> int:
    """The character of a conversation where nothing of the messages before a turn comes any more.

    Args:
        before: those messages by themselves, rendered.
        between: the last of them, since the assistant's turn before.
        cursor: where that turn ended.
    """
    if before and text.startswith(before):
        return len(before)
    for message in between:
        content = message["content"].strip()
        at = text.find(content, cursor)
        cursor = at + len(content) if at >= 0 else cursor
    return cursor


def _search(message: Message, text: str, whole: str, begin: int, where: str) -> Span:
    """Find a turn by its words, where a template renders it otherwise once later turns follow.

    Args:
        message: the assistant's.
        text: the whole conversation.
        whole: the conversation up to the turn.
        begin: a character before the turn, and behind all other messages before it.
    """
    # reasoning is left out of turns that lie back
    said = message["content"].rpartition("</think>")[2].strip()
    closing = whole[whole.rfind(said) + len(said) :]
    at = text.find(said, begin)
    if said and said in whole and at >= 0 and text.startswith(closing, at + len(said)):
        return at, at + len(said) + len(closing)
    raise DataError(
        f"{where}: the model's chat template renders an assistant turn otherwise once later turns follow, so what to "
        "learn cannot be marked; split such conversations so that each ends with its only assistant turn"
    )
