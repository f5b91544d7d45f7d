"""Conversations in the forms that data sets have, as the messages that a chat template takes.

OpenAI, TRL    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
               content is text, or parts: {"type": "text", "text": ...}, {"type": "image"}
ShareGPT       [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
Alpaca         {"instruction": "Greet me.", "input": "in French", "output": "Bonjour."}
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from craft_ray.data.cells import refuse_halves
from craft_ray.data.images import encoded_image, split_bytes
from craft_ray.errors import DataError, first_line
from craft_ray.storage.paths import StoragePath

Message = dict[str, Any]

IMAGE_MARK = "<image>"
"""Stands for an image in the text of a turn, if a column holds the conversation's images."""
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""The speakers in ShareGPT's data, as the roles that chat templates know."""


@dataclass(frozen=True)
class Conversation:
    """The turns of a conversation, and the images and tools that they refer to."""

    messages: tuple[Message, ...]
    """The turns that come before the answer. `content` is text or a list of parts."""
    answer: Message | None = None
    """The last turn, if it is the assistant's."""
    images: tuple[bytes, ...] = ()
    """Encoded images, in the order of the parts that name them."""
    tools: tuple[Any, ...] | None = None
    """The tools that the template describes to the model, as JSON schemas."""

    @property
    def transcript(self) -> str:
        """The turns before the answer, for a reader."""
        if len(self.messages) == 1:
            return content_text(self.messages[0])
        return "\n".join(f"{message['role']}: {content_text(message)}" for message in self.messages)

    def stored(self) -> tuple[str, bytes]:
        """What an anchor cache holds of it: the turns before the answer as JSON, and the concatenated images."""
        tree = {"messages": self.messages, "tools": self.tools, "image_bytes": [len(image) for image in self.images]}
        return json.dumps(tree, ensure_ascii=False, default=str), b"".join(self.images)

    @classmethod
    def from_stored(cls, text: str, data: bytes) -> Conversation:
        """The conversation that `stored` wrote, without its answer."""
        tree = json.loads(text)
        images = split_bytes(data, tree["image_bytes"])
        tools = None if tree["tools"] is None else tuple(tree["tools"])
        return cls(tuple(tree["messages"]), None, images, tools)


def content_text(message: Message) -> str:
    """The text of a turn; its tool calls, if it has no text."""
    content = message["content"]
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content if part["type"] == "text")
    if not content and message.get("tool_calls"):
        return json.dumps(message["tool_calls"], ensure_ascii=False)
    return content


def read_conversation(
    cell: Any,
    column: str,
    images: Sequence[Any] | None,
    tools: Any,
    folder: StoragePath,
    where: str,
    system: Any = None,
) -> Conversation:
    """The conversation in a cell.

    Args:
        column: the cell's column, for errors.
        images: the cells of the images that its parts name in this order; None if no column holds any.
        tools: a list of JSON schemas, or that list as JSON text.
        folder: base of relative image paths.
        system: the text of a system turn that has a column of its own.

    Raises:
        DataError: it is not a list of turns, a turn is empty, it names more or fewer images than there are, or it has
            another system turn.
    """
    if not isinstance(cell, Sequence) or isinstance(cell, (str, bytes)) or not cell:
        raise DataError(
            f"{where}: column '{column}' holds {_short(cell)}; a list of turns is expected, each with role and "
            f"content or with from and value"
        )
    messages = [_message(turn, number, bool(images), f"{where}, turn {number}") for number, turn in enumerate(cell, 1)]
    found = _images(messages, images, folder, where)
    messages = _with_system(messages, system, where)
    answer = messages.pop() if messages[-1]["role"] == "assistant" else None
    if not messages:
        raise DataError(f"{where}: the conversation is a single turn of the assistant: put a turn of the user first")
    return Conversation(tuple(messages), answer, found, _tools(tools, where))


def marked_parts(text: str) -> list[Message]:
    """Text with marks of images as parts, whose images are elsewhere."""
    parts: list[Message] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        parts += [{"type": "image", "image": None}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def alpaca(instruction: str, more: Any, output: Any, where: str, system: Any = None) -> Conversation:
    """The conversation of a row of Alpaca; its input goes below the instruction."""
    for name, value in (("instruction", instruction), ("output", output)):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: column '{name}' holds {_short(value)}; text is expected, fix or remove the row")
    if more is not None and not isinstance(more, str):
        raise DataError(f"{where}: column 'input' holds {_short(more)}; text is expected, fix or remove the row")
    for name, value in (("instruction", instruction), ("input", more), ("output", output)):
        refuse_halves(value, f"{where}: column '{name}' holds")
    asked = f"{instruction}\n{more}" if more else instruction
    messages = _with_system([{"role": "user", "content": asked}], system, where)
    return Conversation(tuple(messages), {"role": "assistant", "content": output})


def image_paths(cell: Any) -> Iterator[str]:
    """The paths of the images that the parts of a conversation name themselves."""
    for turn in cell if isinstance(cell, list) else ():
        content = turn.get("content") if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list) else ():
            value = _inline(part) if isinstance(part, Mapping) else None
            value = (value.get("path") if not value.get("bytes") else None) if isinstance(value, Mapping) else value
            if isinstance(value, str) and not value.startswith("data:"):
                yield value


def _message(turn: Any, number: int, marked: bool, where: str) -> Message:
    """A turn as a template takes it: keys that hold nothing are left out, as in `apply_chat_template`."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {_short(turn)}; role and content, or from and value, are expected")
    fields = {name: value for name, value in turn.items() if value is not None}
    if "from" in fields and "role" not in fields:
        speaker = fields.pop("from")
        if speaker not in SHAREGPT_ROLES:
            raise DataError(f"{where} is from {_short(speaker)}; one of {', '.join(SHAREGPT_ROLES)} is expected")
        value = fields.pop("value", "")
        fields = {"role": SHAREGPT_ROLES[speaker], "content": value}
        if speaker == "function_call":
            fields |= {"content": "", "tool_calls": _calls(value, where)}
    role = fields.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(
            f"{where} has the fields {', '.join(map(str, turn))}; role and content, or from and value, are expected"
        )
    content = fields.get("content", "")
    if isinstance(content, str):
        content = marked_parts(content) if marked and IMAGE_MARK in content else content
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        content = [_part(part, where) for part in content]
    else:
        raise DataError(f"{where} ({role}) has the content {_short(content)}; text or a list of parts is expected")
    empty = not content.strip() if isinstance(content, str) else not any(map(_says_something, content))
    if empty and not fields.get("tool_calls"):
        raise DataError(f"{where} ({role}) is empty: fix or remove the row")
    calls = fields.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(
            f"{where} ({role}) has the tool calls {_short(calls)}; a list is expected, with the name and the arguments "
            f"of each as its function"
        )
    if calls:
        fields["tool_calls"] = [_with_arguments(call, f"{where} ({role})") for call in calls]
    message = fields | {"content": content}
    refuse_halves(message, f"{where} ({role}) holds")
    return message


def _calls(value: Any, where: str) -> list[Message]:
    """The calls of a turn of ShareGPT's as templates take them: {"name": ..., "arguments": {...}}, or a list of them,
    as JSON text."""
    found = _parsed(value, f"{where} (function_call) holds {_short(value)}, which is")
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise DataError(
                f"{where} (function_call) holds the call {_short(call)}; an object with name and arguments is expected"
            )
    return [{"type": "function", "function": call} for call in calls]


def _with_arguments(call: Message, where: str) -> Message:
    """A call with its arguments as a mapping, which templates write as JSON; in OpenAI's data they are JSON text."""
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_arguments(call["function"], where)}
    if "arguments" not in call:
        return call
    which = f"{where} has the call {_short(call)}, whose arguments are"
    arguments = _parsed(call["arguments"], which)
    if not isinstance(arguments, dict):
        raise DataError(f"{which} {_short(arguments)}; an object, or one as JSON text, is expected")
    return call | {"arguments": arguments}


def _with_system(messages: list[Message], system: Any, where: str) -> list[Message]:
    """The turns, after a system turn from a column of its own."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    if not isinstance(system, str):
        raise DataError(f"{where}: column 'system' holds {_short(system)}; text is expected, fix or remove the row")
    refuse_halves(system, f"{where}: column 'system' holds")
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if content_text(messages[0]) != system:
        raise DataError(
            f"{where}: column 'system' holds {_short(system)}, but its turns begin with the system turn "
            f"{_short(content_text(messages[0]))}: keep one of the two"
        )
    return messages


def _says_something(part: Message) -> bool:
    return part["type"] != "text" or bool(part["text"].strip())


def _part(part: Any, where: str) -> Message:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        return {"type": "image", "image": _inline(part)}
    raise DataError(f"{where} has the part {_short(part)}; text with its text, or an image, is expected")


def _inline(part: Mapping[str, Any]) -> Any:
    """The image that a part itself holds: a path, a data URI, bytes or an array; None if it only names one."""
    for name in ("image", "image_url", "url", "path"):
        value = part.get(name)
        if value is not None:
            return value.get("url") if name == "image_url" and isinstance(value, Mapping) else value
    return None


def _images(
    messages: Sequence[Message], cells: Sequence[Any] | None, folder: StoragePath, where: str
) -> tuple[bytes, ...]:
    """The encoded images in the order of their parts, whose data move here."""
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    inline = [part.pop("image") for part in parts if part["type"] == "image"]
    named, given = sum(value is None for value in inline), len(cells or ())
    if named != given:
        held = "no column holds any (columns.image)" if cells is None else f"its row holds {given}"
        raise DataError(
            f"{where}: the turns name {named} images, but {held}: name each image once, by a part of type image or by "
            f"{IMAGE_MARK} in the text"
        )
    rest = iter(cells or ())
    return tuple(
        encoded_image(_decoded_uri(next(rest) if value is None else value, where), folder, where) for value in inline
    )


def _decoded_uri(value: Any, where: str) -> Any:
    """The bytes of a data URI; anything else as it is."""
    if not isinstance(value, str) or not value.startswith(("data:", "http:", "https:")):
        return value
    head, _, data = value.partition(",")
    if head.startswith("http") or not head.endswith(";base64"):
        raise DataError(f"{where}: the image {_short(value)} is not read: a path or a base64 data URI is expected")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise DataError(f"{where}: the image {_short(value)} does not decode ({error})") from None


def _tools(cell: Any, where: str) -> tuple[Any, ...] | None:
    tools = _parsed(cell, f"{where}: its tools are")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: its tools are {_short(tools)}; a list of JSON schemas is expected")
    refuse_halves(tools, f"{where}: its tools hold")
    return tuple(tools)


def _parsed(cell: Any, which: str) -> Any:
    """The value of JSON text; anything else as it is."""
    try:
        return json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError) as error:  # or an integer of thousands of digits, or brackets as deep
        raise DataError(f"{which} no JSON ({first_line(error)})") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
