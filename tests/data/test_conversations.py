"""Conversations in the forms that data sets have come out as the same turns; what is none is named by file and row."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from craft_ray.data.conversation import Conversation
from craft_ray.data.source import Source, open_source
from craft_ray.errors import ConfigError, DataError
from tests.support.caches import json_lines
from tests.support.configs import data_config

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wo?"},
    {"role": "assistant", "content": "Hier."},
    {"role": "user", "content": "Und wann?"},
    {"role": "assistant", "content": "Jetzt."},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]), "value": turn["content"]}
    for turn in TURNS
]
EXPECTED = Conversation(tuple(TURNS[:-1]), TURNS[-1])
QUESTION = {"role": "user", "content": "Wo?"}
HALF = "a \udfff b"
HALVED = r"holds? .*half of a character"


def opened(path: Path, **columns: Any) -> Source:
    return open_source(data_config(path=str(path), **({"columns": columns} if columns else {})), "task")


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def one(folder: Path, row: dict[str, Any], **columns: Any) -> Conversation:
    found = opened(json_lines(folder / "a.jsonl", [row]), **columns)[0].conversation
    assert found is not None
    return found


def test_every_form_is_the_same_conversation(tmp_path: Path) -> None:
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    pq.write_table(pa.table({"messages": [TURNS], "n": [1]}), tmp_path / "a.parquet")
    assert opened(tmp_path / "a.parquet")[0].conversation == EXPECTED
    assert one(tmp_path, {"messages": TURNS}) == EXPECTED
    assert one(tmp_path, {"chat": TURNS, "prompt": "x"}, messages="chat") == EXPECTED
    assert one(tmp_path, {"conversations": SHAREGPT}) == EXPECTED
    in_parts = one(tmp_path, {"messages": parts})
    assert in_parts.transcript == EXPECTED.transcript
    assert len(in_parts.messages) == 4


def test_a_sample_has_the_last_turn_as_its_response(tmp_path: Path) -> None:
    asked = [*TURNS, {"role": "user", "content": "Warum?"}]
    answered, open_ = opened(json_lines(tmp_path / "a.jsonl", [{"messages": TURNS}, {"messages": asked}]))
    assert (answered.answer(), answered.prompt) == (
        "Jetzt.", "system: Be brief.\nuser: Wo?\nassistant: Hier.\nuser: Und wann?",
    )  # fmt: skip
    assert open_.response is None
    assert open_.conversation == Conversation(tuple(asked))
    with pytest.raises(DataError, match=r"a\.jsonl, row 1: the conversation ends with a turn of the user"):
        open_.answer()
    other = answered.answering("Bald.")
    assert other.answer() == "Bald."
    assert other.conversation is not None
    assert other.conversation.answer == {"role": "assistant", "content": "Bald."}
    assert answered.answering("Jetzt.") is answered


def test_alpaca(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Greet me.", "input": "in French", "output": "Bonjour."},
        {"instruction": "Greet me.", "input": "", "output": "Hello."},
    ]
    first, second = (sample.conversation for sample in opened(json_lines(tmp_path / "a.jsonl", rows)))
    assert first == Conversation(
        ({"role": "user", "content": "Greet me.\nin French"},), {"role": "assistant", "content": "Bonjour."}
    )
    assert second == Conversation(
        ({"role": "user", "content": "Greet me."},), {"role": "assistant", "content": "Hello."}
    )


def test_a_system_column_is_the_first_turn(tmp_path: Path) -> None:
    system = TURNS[0]["content"]
    assert one(tmp_path, {"conversations": SHAREGPT[1:], "system": system}) == EXPECTED
    assert one(tmp_path, {"conversations": SHAREGPT, "system": system}) == EXPECTED  # both say the same
    assert one(tmp_path, {"m": TURNS[1:], "system": system}, messages="m") == EXPECTED
    for nothing in (None, " "):
        assert one(tmp_path, {"conversations": SHAREGPT, "system": nothing}) == EXPECTED
    pq.write_table(pa.table({"conversations": [SHAREGPT[1:]], "system": [system], "n": [1]}), tmp_path / "a.parquet")
    assert opened(tmp_path / "a.parquet")[0].conversation == EXPECTED
    (tmp_path / "a.csv").write_text("instruction,output,system\nWo?,Hier.,Be brief.\n")
    assert opened(tmp_path / "a.csv")[0].conversation == Conversation(tuple(TURNS[:2]), TURNS[2])


def test_calls_in_sharegpt(tmp_path: Path) -> None:
    first, second = {"name": "weather", "arguments": {"city": "Köln"}}, {"name": "clock", "arguments": {}}
    for called, calls in (
        (json.dumps(first), [first]),
        (json.dumps([first, second]), [first, second]),
        (first, [first]),
    ):
        turns = [
            {"from": "human", "value": "Wo?"},
            {"from": "function_call", "value": called},
            {"from": "observation", "value": "12"},
            {"from": "gpt", "value": "Jetzt."},
        ]
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": each} for each in calls],
        }
        assert one(tmp_path, {"conversations": turns}) == Conversation(
            (QUESTION, call, {"role": "tool", "content": "12"}), TURNS[-1]
        )
        assert one(tmp_path, {"conversations": turns[:2]}) == Conversation((QUESTION,), call)


def test_a_prompt_column_and_named_columns_come_first(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"prompt": "p", "messages": TURNS, "answer": "a"}])
    assert opened(path)[0].prompt == "p"
    assert opened(path, prompt="answer")[0].prompt == "a"


def test_tools_and_calls_are_handed_on(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {}}}]}
    turns = [QUESTION, call, {"role": "tool", "name": "clock", "content": "12"}, TURNS[-1]]
    for cell in ([tool], json.dumps([tool])):
        found = one(tmp_path, {"messages": turns, "tools": cell}, messages="messages", tools="tools")
        assert found.tools == (tool,)
    assert found.messages == (QUESTION, call | {"content": ""}, turns[2])


def calling(name: str, arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]


def schema(name: str, properties: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    ]


@pytest.mark.parametrize("flat", [False, True])
def test_arguments_as_json_text_are_the_mapping(flat: bool, tmp_path: Path) -> None:
    """OpenAI's data have text there, which a template with `arguments | tojson` would encode a second time."""
    found = []
    for arguments in ({"city": "Zürich", "days": [1, None]}, '{"city": "Z\\u00fcrich", "days": [1, null]}'):
        call: dict[str, Any] = {"name": "weather", "arguments": arguments}
        call = call if flat else {"id": "7", "type": "function", "function": call}
        found.append(one(tmp_path, {"messages": [QUESTION, {"role": "assistant", "tool_calls": [call]}]}).answer)
    assert found[0] == found[1]
    assert found[0] is not None
    calls = found[0]["tool_calls"]
    assert (calls[0] if flat else calls[0]["function"])["arguments"] == {"city": "Zürich", "days": [1, None]}


def test_calls_and_tools_are_the_same_in_arrows_layout(tmp_path: Path) -> None:
    """Arrow gives each struct the keys of all structs of its column, with null where a row has none."""
    wanted = [
        {
            "messages": calling("weather", {"city": "Paris", "days": [1, None]}),
            "tools": schema("weather", {"city": {"type": "string"}}),
        },
        {
            "messages": calling("add", {"a": 1, "nested": {"b": 2}}),
            "tools": schema("add", {"a": {"type": "integer", "enum": [1]}}),
        },
    ]
    table = pa.Table.from_pylist(wanted)
    assert table.to_pylist() != wanted
    pq.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    json_lines(tmp_path / "a.jsonl", wanted)
    expected = [Conversation((QUESTION,), row["messages"][-1], tools=tuple(row["tools"])) for row in wanted]
    for name in ("a.jsonl", "a.parquet", "saved"):
        source = opened(tmp_path / name, messages="messages", tools="tools")
        assert [sample.conversation for sample in source] == expected


def test_a_null_that_a_json_file_writes_is_kept(tmp_path: Path) -> None:
    tools = schema("weather", {"city": {"default": None}})
    turns = calling("weather", {"city": None})
    found = one(tmp_path, {"messages": turns, "tools": tools}, messages="messages", tools="tools")
    assert found == Conversation((QUESTION,), turns[-1], tools=tuple(tools))


def test_images_stand_where_the_turns_name_them(tmp_path: Path) -> None:
    first, second = png(1), png(2)
    (tmp_path / "1.png").write_bytes(first)
    uri = "data:image/png;base64," + base64.b64encode(second).decode()
    image, text = {"type": "image"}, {"type": "text", "text": "Wo?"}
    expected = Conversation(({"role": "user", "content": [image, text, image]},), None, (first, second))
    marked = {"messages": [{"role": "user", "content": "<image>Wo?<image>"}], "images": ["1.png", uri]}
    named = {"messages": [{"role": "user", "content": [image, text, image]}], "images": ["1.png", uri]}
    inline = [{"type": "image", "image": "1.png"}, text, {"type": "image_url", "image_url": {"url": uri}}]
    assert one(tmp_path, marked, messages="messages", image="images") == expected
    assert one(tmp_path, named, messages="messages", image="images") == expected
    assert one(tmp_path, {"messages": [{"role": "user", "content": inline}]}) == expected
    assert Conversation.from_stored(*expected.stored()) == expected


def test_the_content_of_images_decides_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    inline = [{"type": "text", "text": "Wo?"}, {"type": "image", "image": "1.png"}]
    for name, row, columns in (
        ("a", {"messages": [{"role": "user", "content": inline}]}, {"messages": "messages"}),
        ("b", {"m": [{"role": "user", "content": "<image>?"}], "i": ["1.png"]}, {"messages": "m", "image": "i"}),
    ):
        path = json_lines(tmp_path / f"{name}.jsonl", [row])
        prints = []
        for shade in (1, 2):
            (tmp_path / "1.png").write_bytes(png(shade))
            prints.append(opened(path, **columns).fingerprint)
        assert prints[0] != prints[1]


IMAGED = {"messages": "messages", "image": "images"}


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"messages": "Wo?"}, {}, "holds 'Wo\\?'; a list of turns is expected"),
        ({"messages": []}, {}, "holds \\[\\]; a list of turns is expected"),
        ({"messages": ["Wo?"]}, {}, "turn 1 is 'Wo\\?'; role and content, or from and value, are expected"),
        ({"messages": [{"text": "Wo?"}]}, {}, "turn 1 has the fields text; role and content, or from and value"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}]}, {}, "turn 2 \\(assistant\\) is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]}, {}, "turn 1 \\(user\\) is empty"),
        ({"messages": [{"role": "user"}]}, {}, "turn 1 \\(user\\) is empty"),
        ({"messages": [{"role": "user", "content": 7}]}, {}, "turn 1 \\(user\\) has the content 7; text or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, {}, "turn 1 has the part"),
        (
            {"messages": [QUESTION, {"role": "assistant", "tool_calls": '[{"name": "clock"}]'}]},
            {},
            "turn 2 \\(assistant\\) has the tool calls '.*'; a list is expected",
        ),
        ({"messages": [QUESTION, {"role": "assistant", "tool_calls": ["clock"]}]}, {}, "has the tool calls \\['clock'"),
        *(
            (
                {"messages": calling("weather", arguments)},
                {},
                rf"turn 2 \(assistant\) has the call .*, whose arguments are {expected}",
            )
            for arguments, expected in (
                ('{"city":', "no JSON .*char 8"),
                ("", "no JSON"),
                ("[1]", r"\[1\]; an object, or one as JSON text, is expected"),
                ([1], r"\[1\]; an object"),
                (7, "7; an object"),
            )
        ),
        ({"messages": [TURNS[-1]]}, {}, "a single turn of the assistant"),
        *(
            ({"conversations": [SHAREGPT[1], {"from": "function_call", "value": value}]}, {}, expected)
            for value, expected in (
                ('{"name": "clock",', "turn 2 \\(function_call\\) holds '.*', which is no JSON .*char 17"),
                ("", "turn 2 \\(function_call\\) holds '', which is no JSON"),
                ('{"name": "clock"}', "holds the call .*; an object with name and arguments is expected"),
                ('[{"arguments": {}}]', "holds the call .*; an object with name and arguments is expected"),
                ("7", "holds the call 7; an object with name and arguments is expected"),
                ("[]", "turn 2 \\(assistant\\) is empty"),
            )
        ),
        ({"messages": [QUESTION], "system": 7}, {}, "column 'system' holds 7; text is expected"),
        ({"messages": [QUESTION], "system": HALF}, {}, f"column 'system' {HALVED}"),
        (
            {"messages": TURNS, "system": "Be verbose."},
            {},
            "column 'system' holds 'Be verbose.', but its turns begin with the system turn 'Be brief.': keep one",
        ),
        ({"instruction": "Greet me.", "output": "Hi", "system": ["a"]}, {}, "column 'system' holds .*text is expected"),
        ({"conversations": [{"from": "bard", "value": "Wo?"}]}, {}, "turn 1 is from 'bard'; one of human, user, gpt"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            {},
            "name 1 images, but no column holds any",
        ),
        ({"messages": [QUESTION], "images": ["1.png"]}, IMAGED, "name 0 images, but its row holds 1"),
        (
            {"messages": [{"role": "user", "content": "<image><image>"}], "images": ["1.png"]},
            IMAGED,
            "name 2 images, but its row holds 1",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "https://a.b/c.png"}]}]},
            {},
            "the image 'https://a.b/c.png' is not read",
        ),
        ({"messages": [QUESTION], "t": "[{"}, {"messages": "messages", "tools": "t"}, "its tools are no JSON"),
        ({"instruction": "Greet me.", "output": None}, {}, "column 'output' holds None; text is expected"),
        ({"messages": [QUESTION, {"role": "assistant", "content": HALF}]}, {}, f"turn 2 \\(assistant\\) {HALVED}"),
        ({"messages": [{"role": "system", "content": HALF}, QUESTION]}, {}, f"turn 1 \\(system\\) {HALVED}"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
            {},
            f"turn 1 \\(user\\) {HALVED}",
        ),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [{"a": {HALF: 1}}]}]},
            {},
            f"turn 2 \\(assistant\\) {HALVED}",
        ),
        ({"conversations": [{"from": "human", "value": HALF}]}, {}, f"turn 1 \\(user\\) {HALVED}"),
        ({"messages": [QUESTION], "t": [{"name": HALF}]}, {"messages": "messages", "tools": "t"}, HALVED),
        (
            {"messages": [QUESTION], "t": json.dumps([{"name": HALF}])},
            {"messages": "messages", "tools": "t"},
            HALVED,
        ),
        ({"instruction": HALF, "output": "b"}, {}, f"column 'instruction' {HALVED}"),
        ({"instruction": "a", "input": HALF, "output": "b"}, {}, f"column 'input' {HALVED}"),
        ({"instruction": "a", "output": HALF}, {}, f"column 'output' {HALVED}"),
    ],
)
def test_what_is_no_conversation(row: dict[str, Any], columns: dict[str, str], expected: str, tmp_path: Path) -> None:
    good = {"instruction": "a", "output": "b"} if "output" in row else {"messages": TURNS, "conversations": SHAREGPT}
    name = "conversations" if "conversations" in row else next(iter(row))
    path = json_lines(tmp_path / "bad.jsonl", [{key: good.get(key) for key in row} | {name: good.get(name)}, row])
    source = opened(path, **(columns or {"messages": name}))
    with pytest.raises(DataError, match=rf"bad\.jsonl, row 1(, turn \d)?[:, ].*{expected}") as caught:
        source[1]
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"messages": "m", "prompt": "p"}, "messages 'm' and prompt 'p' are both specified"),
        ({"messages": "m", "response": "r"}, "messages 'm' and response 'r' are both specified"),
        ({"tools": "t"}, "tools 't' belong to a conversation: specify messages, too"),
    ],
)
def test_columns_that_exclude_each_other(columns: dict[str, str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        data_config(path="a.jsonl", columns=columns)


def test_a_column_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task.columns.messages is 'chat', but .* has the columns messages"):
        opened(json_lines(tmp_path / "a.jsonl", [{"messages": TURNS}]), messages="chat")
