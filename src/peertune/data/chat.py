"""Conversations as tokens, and which of them the assistant said.

Nothing here knows a model's template. Where a turn stands in the text is found by rendering: it starts where the
conversation before it, with the generation prompt, ends, and ends where the conversation up to it ends, as long as
both are beginnings of the whole. Where it stands among the tokens is found by comparing tokens in the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2.exceptions import TemplateError

from peertune.data.tokens import Tokens, bos_tokens, common_length, encode
from peertune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

_PLAIN_TEMPLATE = """\
{%- set titles = {'system': 'Context', 'user': 'Request', 'assistant': 'Reply', 'tool': 'Tool result'} -%}
{%- for m in messages -%}
{{ '### ' + titles.get(m.role, m.role) + ':\\n' + (m.content or '') }}
{%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif -%}
{{ (eos_token or '') if m.role == 'assistant' else '' }}{{ '\\n\\n' }}
{%- endfor -%}
{{ '### Reply:\\n' if add_generation_prompt else '' }}"""

# A template that writes calls as JSON needs their arguments as an object: the JSON text that OpenAI's format has there
# would be quoted a second time. A template that tests for text handles both.
_CALLS_AS_JSON = re.compile(r"\b(arguments|function)(['\"]\])?\s*\|\s*tojson")

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

    def transcribe(self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str) -> Transcript | None:
        """Render one conversation and find its assistant turns.

        Args:
            messages: dicts with role and content, calls in `tool_calls`.
            tools: JSON schemas of functions; written into the system turn where the template leaves them out.
            where: the row's name, for errors.
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
        if tools and text == self._render(kept, None, where):
            length = len(kept)
            kept, text = self._fold_tools(kept, tools, where)
            spoken = [i + len(kept) - length for i in spoken]
            tools = None
        turns: list[Span] = []
        for i in spoken:
            opening = self._render(kept[:i], tools, where, generation_prompt=True) if i else ""
            whole = text if i == len(kept) - 1 else self._render(kept[: i + 1], tools, where)
            if i and whole.startswith(opening) and text.startswith(whole):
                start, end = len(opening), len(whole)
            else:
                start, end = _search(kept[i], text, opening, whole, turns[-1][1] if turns else 0, where)
            # white space after the end token is the template's, no generation reaches it
            said = text[start:end].rstrip()
            turns.append((start, start + len(said) if said.endswith(self._end_tokens) else end))
        return Transcript(where, kept, tools, text[: turns[-1][1]], turns)

    def tokenize(self, transcripts: Sequence[Transcript]) -> list[tuple[Tokens, list[Span]]]:
        """Token ids of each transcript, int32 [length], and the tokens [start, end) of its assistant turns."""
        texts = encode(self.tokenizer, [t.text for t in transcripts])
        borders = [[border for turn in t.turns for border in turn] for t in transcripts]
        prefixes = [t.text[:b] for t, row in zip(transcripts, borders, strict=True) for b in row if b < len(t.text)]
        encoded = iter(encode(self.tokenizer, prefixes))
        found = []
        for transcript, ids, row in zip(transcripts, texts, borders, strict=True):
            places = [common_length(next(encoded), ids) if b < len(transcript.text) else len(ids) for b in row]
            found.append((ids, list(zip(places[::2], places[1::2], strict=True))))
        return found

    def shorten(
        self, transcript: Transcript, ids: Tokens, turns: list[Span], max_length: int
    ) -> tuple[Tokens, list[Span]]:
        """Cut a conversation to max_length tokens, sparing its last assistant turn as long as possible.

        In this order: the oldest exchanges go (a user's message and all up to the next one; system turns stay); the
        longest texts that are not the assistant's lose their ends, until a quarter of max_length is left before the
        last assistant turn; the rest loses its end.

        Args:
            transcript: the conversation.
            ids, turns: what `tokenize` gave for it.
            max_length: tokens that may stay.
        Returns:
            Token ids, int32 [max_length or fewer], and the tokens [start, end) of the assistant turns left.
        """
        while len(ids) > max_length and (recent := _without_oldest(transcript.messages)):
            shorter = self.transcribe(recent, transcript.tools, transcript.where)
            assert shorter is not None  # the last message is the assistant's
            transcript = shorter
            [(ids, turns)] = self.tokenize([transcript])
        text, keep = transcript.text, np.ones(len(ids), dtype=np.bool_)
        others = [m["content"].strip() for m in transcript.messages if m["role"] != "assistant"]
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
        left = [(int(places[a]), min(int(places[b]), max_length)) for a, b in turns]
        return ids[keep][:max_length], [(a, b) for a, b in left if a < b]

    def _prepare(self, message: Message) -> Message:
        prepared = {**message, "content": message.get("content") or ""}
        calls = message.get("tool_calls")
        if self._calls_as_objects and calls:
            prepared["tool_calls"] = [_with_object(call) for call in calls]
        return prepared

    def _render(
        self, messages: list[Message], tools: Sequence[Any] | None, where: str, generation_prompt: bool = False
    ) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools else None,
                chat_template=self._template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{where}: the model's chat template refuses this conversation: {error}") from None
        return text

    def _fold_tools(self, messages: list[Message], tools: Sequence[Any], where: str) -> tuple[list[Message], str]:
        """The messages with the tools in their system turn, or in the first turn where the template knows no system."""
        schemas = (tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools)
        lines = [json.dumps(schema, separators=(",", ":"), ensure_ascii=False) for schema in schemas]
        listing = "Functions that may be called:\n" + "\n".join(lines)
        first = messages[0]
        merged = {**first, "content": "\n\n".join(filter(None, [first["content"], listing]))}
        if first["role"] != "system":
            with_system = [{"role": "system", "content": listing}, *messages]
            try:
                return with_system, self._render(with_system, None, where)
            except DataError:
                merged["content"] = "\n\n".join(filter(None, [listing, first["content"]]))
        return [merged, *messages[1:]], self._render([merged, *messages[1:]], None, where)


def _says_something(message: Message) -> bool:
    content = message.get("content") or ""
    return message["role"] == "assistant" and bool(content.strip() or message.get("tool_calls"))


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


def _search(message: Message, text: str, opening: str, whole: str, cursor: int, where: str) -> Span:
    """Find a turn by its words, where a template renders it otherwise once later turns follow.

    Args:
        message: the assistant's.
        text: the whole conversation.
        opening: the conversation before the turn, with the generation prompt; "" if there is none.
        whole: the conversation up to the turn.
        cursor: where the turn before it ended.
    """
    # reasoning is left out of turns that lie back
    said = message["content"].rpartition("</think>")[2].strip()
    known = bool(opening) and text.startswith(opening)
    at = text.find(said, len(opening) if known else cursor)
    closing = whole[whole.rfind(said) + len(said) :]
    if said and at >= 0 and said in whole and text.startswith(closing, at + len(said)):
        return (len(opening) if known else at), at + len(said) + len(closing)
    raise DataError(
        f"{where}: the model's chat template renders an assistant turn otherwise once later turns follow, so what to "
        "learn cannot be marked; split such conversations so that each ends with its only assistant turn"
    )
