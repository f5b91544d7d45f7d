"""A model's chat template: what it writes for a conversation, where the assistant speaks, and how a turn ends.

A template is a program, and nothing says that it writes a conversation from left to right. What is learnt is therefore
found by comparing what it writes for the conversation up to a turn, with the marks that ask for this turn, and for the
whole: the one must be the beginning of the other. A template that marks the assistant's words itself, with
`{% generation %}`, is taken at its word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from craft_ray.data.conversation import IMAGE_MARK, Conversation, Message, marked_parts
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError, first_line

LITERAL = "\ufdd0"
"""Put after the first character of a special token that occurs in somebody's text, so that it is read as text.
Unicode assigns no character to this code."""

MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "Certainly"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the spans of characters that are learnt."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """The template of a processor or a tokenizer.

    Args:
        parts: whether content is a list of parts, as templates of models with images expect it, or text.
        path: the model's, for errors.

    Raises:
        ConfigError: there is no template, or it writes no question with an answer.
    """

    def __init__(self, processor: Any, tokenizer: Any, parts: bool, path: str) -> None:
        self._processor, self._parts, self._path = processor, parts, path
        self._special = re.compile("|".join(map(re.escape, special_tokens(tokenizer))) or r"(?!)")
        self._written: set[str] = set()  # roles whose turns are known to be written wherever they are
        self._tokenizer = tokenizer
        if not getattr(processor, "chat_template", None):
            raise ConfigError(
                f"model.chat_template is true, but {path} has no chat template: set it to false, or specify a model "
                f"that was trained on conversations"
            )
        self.example = self._example()
        """What it writes for a question with an answer."""
        self.end, self.end_id = self._end_of_turn()

    # -- how a turn ends

    def _example(self) -> str:
        asked: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
        try:
            return self._written_by(asked, None, False, "")
        except Exception as without:  # some templates want a system turn; others are broken
            try:
                return self._written_by([{"role": "system", "content": "?"}, *asked], None, False, "")
            except Exception:
                raise ConfigError(
                    f"model.chat_template is true, but the template of {self._path} writes no question with an answer "
                    f"({first_line(without)}): set it to false, or correct the template"
                ) from None

    def _end_of_turn(self) -> tuple[str | None, int | None]:
        """The first token of its own that the template writes after an assistant's turn, as text and as a number."""
        behind = self.example.rpartition(PROBE)[2]
        own = self._tokenizer.added_tokens_decoder
        ids: list[int] = self._tokenizer(behind, add_special_tokens=False)["input_ids"]
        for token in ids:
            if token in own or token in self._tokenizer.all_special_ids:
                return str(self._tokenizer.convert_ids_to_tokens(token)), token
        return None, None

    # -- text

    def prompt(self, sample: Sample) -> str:
        """The conversation up to the marks that ask the assistant for its next turn."""
        conversation = self._conversation(sample)
        return self._checked(conversation.messages, conversation.tools, True, sample.where)

    def answered(self, sample: Sample) -> Rendered:
        """The conversation with its answer, of which only the answer is learnt.

        Raises:
            DataError: the sample has no answer, or the template does not write it after the prompt.
        """
        prompt, (messages, tools) = self.prompt(sample), self._complete(sample)
        text = self._checked(messages, tools, False, sample.where)
        if not text.startswith(prompt):
            raise DataError(
                f"{sample.where}: what the chat template of {self._path} writes for the answer does not begin with "
                f"what it writes to ask for it, so the model would learn from another prompt than it is given: change "
                f"the template, or set model.chat_template=false"
            )
        return Rendered(text, ((len(prompt), len(prompt) + self._spoken(text[len(prompt) :])),))

    def learnt(self, sample: Sample) -> Rendered:
        """The conversation with its answer; every turn of the assistant is learnt.

        Raises:
            DataError: the sample has no answer, or the template writes a turn differently once others follow.
        """
        messages, tools = self._complete(sample)
        text = self._checked(messages, tools, False, sample.where)
        if self._marks_generation(tools):
            return self._marked(messages, tools, sample.where)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], tools, True, sample.where)
            through = self._render(messages[: number + 1], tools, False, sample.where)
            end = len(before) + self._spoken(through[len(before) :])
            if not through.startswith(before) or not text.startswith(through[:end]):
                raise DataError(
                    f"{sample.where}, turn {number + 1}: the chat template of {self._path} writes this turn otherwise "
                    f"when others follow it, so its tokens cannot be learnt: give the model a template that marks what "
                    f"is learnt with {{% generation %}}, or end each row with its first turn of the assistant"
                )
            spans.append((len(before), end))
        return Rendered(text, tuple(spans))

    def _spoken(self, text: str) -> int:
        """Length of a turn up to and including its end; what follows it is not the assistant's."""
        if self.end is None:
            return len(text)
        at = text.rfind(self.end)
        return len(text) if at < 0 else at + len(self.end)

    # -- the template's own marks

    def _source(self, tools: Sequence[Any] | None) -> str:
        """The template's text; a model may have several, one of them for tools."""
        template = self._processor.chat_template
        if isinstance(template, dict):
            return str(template["tool_use" if tools and "tool_use" in template else "default"])
        return str(template)

    def _marks_generation(self, tools: Sequence[Any] | None) -> bool:
        return MARKS_GENERATION.search(self._source(tools)) is not None

    def _marked(self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str) -> Rendered:
        rendered: Any  # the library's own annotation is wrong
        try:
            rendered = render_jinja_template(
                conversations=[self._as_taken(messages, where)],
                tools=None if tools is None else list(tools),
                chat_template=self._source(tools),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # as in _render
            raise self._refusal(error, where) from None
        (text,), (marks,) = rendered
        spans = tuple((start, end) for start, end in marks if start < end)
        if not spans:
            raise DataError(
                f"{where}: the chat template of {self._path} marks nothing of it with {{% generation %}}, so there is "
                f"nothing to learn: correct the template, or remove the row"
            )
        return Rendered(text, spans)

    # -- messages

    def _complete(self, sample: Sample) -> tuple[list[Message], Sequence[Any] | None]:
        response, conversation = sample.answer(), self._conversation(sample)
        answer = conversation.answer or {"role": "assistant", "content": response}
        return [*conversation.messages, answer], conversation.tools

    def _conversation(self, sample: Sample) -> Conversation:
        return sample.conversation or self._two_turns(sample)

    def _checked(self, messages: Sequence[Message], tools: Sequence[Any] | None, ask: bool, where: str) -> str:
        """What the template writes, with every turn, every call and the tools in it. A template silently skips what it
        does not know, so a thing is known to be written if changing it changes the text.

        Raises:
            DataError: the template leaves something out.
        """
        text = self._render(messages, tools, ask, where)

        def written(number: int, other: Message) -> bool:
            return self._differs(text, [*messages[:number], other, *messages[number + 1 :]], tools, ask, where)

        for number, message in enumerate(messages):
            role, calls = message["role"], message.get("tool_calls") or []
            for at, call in enumerate(calls):
                if not written(number, message | {"tool_calls": [*calls[:at], *_other([call]), *calls[at + 1 :]]}):
                    raise DataError(
                        f"{where}, turn {number + 1}: the chat template of {self._path} leaves out tool calls: choose "
                        f"a model whose template writes them, or write the call into the turn's content"
                    )
            if role in self._written or calls:
                continue
            if not written(number, message | {"content": _more(message["content"])}):
                raise DataError(
                    f"{where}, turn {number + 1}: the chat template of {self._path} leaves out this turn of the role "
                    f"'{role}': remove it, or choose a model whose template writes it"
                )
            if role in ("user", "assistant"):  # others may be written in one place only: the system's in front
                self._written.add(role)
        if tools and not self._differs(text, messages, _other(tools), ask, where):
            raise DataError(
                f"{where}: the chat template of {self._path} leaves out tools: choose a model whose template describes "
                f"them, or leave columns.tools out and describe them in a system turn"
            )
        return text

    def _differs(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, ask: bool, where: str
    ) -> bool:
        """Whether the template writes a different text for what was changed."""
        try:
            return self._written_by(messages, tools, ask, where) != text
        except Exception:  # it took the original: what it refuses now is the change, which it has seen
            return True

    def _two_turns(self, sample: Sample) -> Conversation:
        """A question as a conversation; images that its text does not name come before it."""
        if not self._parts:
            return Conversation(({"role": "user", "content": sample.prompt},))
        images, parts = sample.pictures or (), marked_parts(sample.prompt)
        if IMAGE_MARK not in sample.prompt:
            parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": sample.prompt}]
        return Conversation(({"role": "user", "content": parts},), images=images)

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None, ask: bool, where: str) -> str:
        """What the template writes.

        Args:
            ask: whether the marks that ask the assistant for a turn follow.
        """
        try:
            return self._written_by(messages, tools, ask, where)
        except DataError:
            raise
        except Exception as error:  # a template is a program of the model's author and can raise anything
            raise self._refusal(error, where) from None

    def _written_by(self, messages: Sequence[Message], tools: Sequence[Any] | None, ask: bool, where: str) -> str:
        return str(
            self._processor.apply_chat_template(
                self._as_taken(messages, where),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=ask,
            )
        )

    def _refusal(self, error: Exception, where: str) -> DataError:
        return DataError(
            f"{where}: the chat template of {self._path} refuses the conversation ({first_line(error)}): change the "
            f"turns, or choose a model whose template takes them"
        )

    def _as_taken(self, messages: Sequence[Message], where: str) -> list[Message]:
        """Messages with content in the form that the template expects, and with special tokens in it as text."""
        return [message | {"content": self._content(message, where)} for message in messages]

    def _content(self, message: Message, where: str) -> Any:
        content, literal = message["content"], message["role"] != "assistant"
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [
            {**part, "text": self._literal(part["text"])} if literal and "text" in part else part for part in parts
        ]
        if self._parts:
            return parts
        if any(part["type"] == "image" for part in parts):
            raise DataError(
                f"{where} names an image, but the model reads text alone: choose a model of kind vision_language, or "
                f"remove the row"
            )
        return "\n".join(part["text"] for part in parts)

    def _literal(self, text: str) -> str:
        """Text whose special tokens are split by a mark: a turn must not end, or an image begin, because of what
        somebody wrote. The assistant's own words may hold such tokens, those of its thoughts or its calls."""
        return self._special.sub(lambda found: found[0][0] + LITERAL + found[0][1:], text)


def _more(content: Any) -> Any:
    """The content of a turn with another word in it."""
    if isinstance(content, str):
        return f"{content} {PROBE}"
    last = max((at for at, part in enumerate(content) if part["type"] == "text"), default=None)
    if last is None:
        return [*content, {"type": "text", "text": PROBE}]
    return [*content[:last], {"type": "text", "text": _more(content[last]["text"])}, *content[last + 1 :]]


def _other(described: Sequence[Any]) -> list[Any]:
    """Calls or tools with other names; without those that have none."""
    others: list[Any] = []
    for one in described:
        inner = one.get("function", one)
        if isinstance(inner, dict) and isinstance(inner.get("name"), str):
            renamed = inner | {"name": inner["name"] + PROBE}
            others.append(one | {"function": renamed} if "function" in one else renamed)
    return others


def special_tokens(tokenizer: Any) -> list[str]:
    """The special tokens of a tokenizer as text, the longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(filter(None, {*added, *tokenizer.all_special_tokens}), key=len, reverse=True)


def written_image(processor: Any, mark: str) -> str:
    """What a processor's chat template writes for an image between two texts: Qwen2-VL's puts its mark
    into a pair of others. The mark, if there is no template or it moves images elsewhere."""
    parts = [{"type": "text", "text": PROBE}, {"type": "image"}, {"type": "text", "text": PROBE}]
    if not getattr(processor, "chat_template", None):
        return mark
    try:
        text = str(processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False))
    except Exception:  # a template is a program; what it refuses is reported when the model is loaded
        return mark
    pieces = text.split(PROBE)
    return pieces[1] if len(pieces) == 3 and pieces[1].count(mark) == 1 else mark
