"""What reaches a repository on the hub: a model that loads from there, and a card that says what the run's files say,
with nothing in it that belongs to the user's machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch.distributed.checkpoint as dcp
from craft_pipelines.push import DRAFT, push
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM

from craft_ray.config import parse_config
from craft_ray.errors import ConfigError, CraftError, ModelError, StorageError
from craft_ray.models import load_model
from craft_ray.report.card import CardFields, public_command
from craft_ray.report.html import write_report
from craft_ray.run.folder import RunFolder
from craft_ray.run.sharded_checkpoint import FILES, SHARDS, named_tensors
from craft_ray.storage.files import checksum
from tests.support.hubs import Hub, running_hub
from tests.support.runs import trained

TOKEN = "hf_" + "s3cret" * 5
APACHE = CardFields(license="apache-2.0")


def text_run(folder: Path, model: Path, data: Path, arm: str, **changes: Any) -> Path:
    """A run of two steps in the layout of a comparison."""

    def rows(name: str, limit: int) -> dict[str, Any]:
        return {
            "path": str(data / f"{name}.parquet"),
            "columns": {"prompt": "prompt", "response": "response"},
            "limit": limit,
        }

    config = parse_config(
        {
            "name": "text", "output_dir": str(folder / "runs"), "model": {"path": str(model), "append_eos": False},
            "task": rows("new_train", 8), "train": {"steps": 2, "batch_size": 2, "warmup_steps": 0},
            "evaluation": {
                skill: {"metric": "perplexity", "data": rows(f"{skill}_test", 4)} for skill in ("old", "new")
            },
            "workers": {"num_workers": 0}, "craft": {"enabled": False},
        },
        "test",
    ).changed(changes)  # fmt: skip
    run = trained(config, folder / "runs" / f"text-{arm}-seed0")
    run.write_environment(["craft-ray", "train", str(folder / "private" / "run.yaml"), f"model.path={model}"])
    return run.path


@pytest.fixture(scope="module")
def plain(text_model: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in a comparison. Shared: do not write into it."""
    folder = tmp_path_factory.mktemp("comparison")
    run = text_run(folder, text_model, text_data, "baseline")
    write_report([RunFolder(run)], folder, title="t", command="craft-ray compare")
    return run


@pytest.fixture(scope="module")
def adapter(text_model: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_run(tmp_path_factory.mktemp("adapter"), text_model, text_data, "baseline-lora", adapter={"r": 2})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with running_hub() as running:
        yield running


def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.address, token=TOKEN)


def load(hub: Hub, name: str, folder: Path) -> Path:
    for path, content in hub.files[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_the_model_loads_from_what_was_sent_and_the_card_says_what_the_run_says(
    plain: Path, hub: Hub, tmp_path: Path
) -> None:
    said: list[str] = []
    push(plain, "me/kept", APACHE, private=True, api=api(hub), say=said.append)
    assert (hub.private, hub.commits) == ({"me/kept": True}, 1)
    assert said[0].endswith(f"in a private repository: {hub.address}/me/kept/commit/{1:040}")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    AutoModelForCausalLM.from_pretrained(load(hub, "me/kept", tmp_path))
    sent = {path.name for path in (plain / "checkpoints" / "last" / "model").iterdir()}
    assert set(hub.files["me/kept"]) == sent | {"README.md"}

    card = ModelCard(hub.files["me/kept"]["README.md"].decode())
    result = json.loads((plain / "result.json").read_text())
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "apache-2.0", "transformers", "text-generation",
    )  # fmt: skip
    assert card.data.base_model is None
    found = {entry.dataset_config: (entry.metric_type, entry.metric_value) for entry in card.data.eval_results}
    assert found == {skill: ("perplexity", result[skill]["after"]) for skill in ("old", "new")}
    assert card.data.eval_results[0].dataset_type == "private"
    for words in (
        'from_pretrained("me/kept")',
        "| Plain fine-tuning |",
        "`new_train.parquet`, not public",
        "craft-ray train run.yaml model.path=model",
        "  batch_size: 2",
    ):
        assert words in card.text


def test_nothing_of_the_machine_is_in_what_is_sent(
    adapter: Path, text_data: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "text-generation-secret")
    run = tmp_path / "run"
    shutil.copytree(adapter, run, symlinks=True)
    environment = json.loads((run / "env.json").read_text())
    environment["command"] += ["tracking.mlflow=http://me:pa55@host/x", "name=text-generation-secret"]
    (run / "env.json").write_text(json.dumps(environment))
    model = run / "checkpoints" / "last" / "model"
    own = str(model.resolve() / "text_tokenizer")  # as a policy of LeRobot names the tokenizers in its folder
    steps = [{"name": own, "other": str(Path.home() / "stats.json"), "kept": ["/", "a/b", 1, None]}]
    (model / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    push(run, "me/lora", CardFields(base_model="org/teacher"), api=api(hub), say=lambda _: None)
    assert json.loads(hub.files["me/lora"]["policy_preprocessor.json"]) == {
        "steps": [{"name": "text_tokenizer", "other": "stats.json", "kept": ["/", "a/b", 1, None]}]
    }
    everything = b"\n".join(hub.files["me/lora"].values())
    for private in (str(tmp_path), str(text_data), str(adapter.parent), str(Path.home()) + "/", "pa55",
                    "text-generation-secret", TOKEN):  # fmt: skip
        assert private.encode() not in everything, private
    card = ModelCard(hub.files["me/lora"]["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == ("org/teacher", "peft")
    assert "lora" in card.data.tags
    assert json.loads(hub.files["me/lora"]["adapter_config.json"])["base_model_name_or_path"] == "org/teacher"


def test_an_adapter_without_a_base_that_others_have_is_refused(adapter: Path, hub: Hub) -> None:
    for dry in (True, False):
        with pytest.raises(ConfigError, match=r"which nobody else has: .* --base-model OWNER/NAME"):
            push(adapter, "me/lora", APACHE, dry_run=dry, api=api(hub))
    assert hub.asked == []


def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(plain: Path, hub: Hub) -> None:
    hub.private["me/kept"] = False
    hub.files["me/kept"] = {"model-00001-of-00002.safetensors": b"old", "model.safetensors": b"old", "LICENSE": b"mine"}
    push(plain, "me/kept", APACHE, api=api(hub), say=lambda _: None)
    assert "model-00001-of-00002.safetensors" not in hub.files["me/kept"]
    assert hub.files["me/kept"]["LICENSE"] == b"mine"
    assert hub.files["me/kept"]["model.safetensors"] != b"old"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_in_parts_is_put_together(plain: Path, hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain, run, symlinks=True)
    checkpoint = (run / "checkpoints" / "last").resolve()
    model = load_model(RunFolder(run).config().model, "fp32", weights=str(checkpoint / "model"))
    writer = dcp.FileSystemWriter(checkpoint / SHARDS, thread_count=1)
    dcp.save(named_tensors(model), storage_writer=writer, no_dist=True)
    parts = {f"{SHARDS}/{part.name}": part for part in (checkpoint / SHARDS).iterdir()}
    (checkpoint / FILES).write_text(json.dumps({k: [p.stat().st_size, checksum(p)] for k, p in parts.items()}))
    shutil.rmtree(checkpoint / "model")
    push(run, "me/parts", APACHE, api=api(hub), say=lambda _: None)
    assert not any(name.startswith(SHARDS) for name in hub.files["me/parts"])
    folder = load(hub, "me/parts", tmp_path / "back")
    again = load_model(RunFolder(run).config().model, "fp32", weights=str(folder))
    assert again.weights_fingerprint() == model.weights_fingerprint()


def test_a_dry_run_writes_the_card_and_asks_nobody_and_an_edited_card_is_sent(
    plain: Path, hub: Hub, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / plain.name
    shutil.copytree(plain, run, symlinks=True)
    push(run, "me/kept", APACHE, dry_run=True, api=api(hub), say=lambda _: None)
    assert hub.asked == []
    text = (run / DRAFT).read_text()
    assert ModelCard(text).data.license == "apache-2.0"
    assert "Beside other ways" not in text  # it was taken out of its comparison
    mine = tmp_path / "mine.md"
    mine.write_text(text + "\nBy hand.\n")
    push(run, "me/kept", APACHE, card=mine, api=api(hub), say=lambda _: None)
    assert hub.files["me/kept"]["README.md"].decode().endswith("\nBy hand.\n")
    push(run, "me/kept", APACHE, report=plain.parents[1], api=api(hub), say=lambda _: None)
    assert "Beside other ways" in hub.files["me/kept"]["README.md"].decode()


def test_what_cannot_be_pushed_is_one_line(plain: Path, hub: Hub, tmp_path: Path) -> None:
    unfinished, without = tmp_path / "unfinished", tmp_path / "without"
    for copy in (unfinished, without):
        shutil.copytree(plain, copy, symlinks=True)
    (unfinished / "result.json").unlink()
    shutil.rmtree(without / "checkpoints")
    (tmp_path / "bad.md").write_text("---\nlicense: [\n---\n")
    (tmp_path / "bare.md").write_text("# No head\n")
    hub.private["me/public"], hub.files["me/public"] = False, {}
    cases: list[tuple[Path, str, CardFields, dict[str, Any], str]] = [
        (tmp_path / "nowhere", "me/x", APACHE, {}, "is not a run"),
        (unfinished, "me/x", APACHE, {}, "is not a finished run"),
        (without, "me/x", APACHE, {}, "neither a run with a checkpoint"),
        (plain, "me/x/y", APACHE, {}, "is not the name of a repository"),
        (plain, "alone", APACHE, {}, "use OWNER/NAME"),
        (plain, "me/--x", APACHE, {}, "is not the name of a repository"),
        (plain, "me/x", CardFields(license="other"), {}, "needs all of --license other, --license-name"),
        (plain, "me/x", CardFields(license="mit", license_name="x"), {}, "belong to --license other, not to mit"),
        (plain, "me/x", APACHE, {"card": tmp_path / "none.md"}, "cannot be used"),
        (plain, "me/x", APACHE, {"card": tmp_path / "bad.md"}, "cannot be used"),
        (plain, "me/x", APACHE, {"card": tmp_path / "bare.md"}, "has no head"),
        (plain, "me/x", APACHE, {"report": unfinished}, "does not contain the run|is not a finished run"),
        (plain, "me/public", APACHE, {"private": True}, "exists and is public"),
    ]
    for run, name, fields, options, said in cases:
        with pytest.raises(ConfigError, match=said) as caught:
            push(run, name, fields, **options, api=api(hub))
        assert "\n" not in caught.value.message
    broken = tmp_path / "broken"
    shutil.copytree(plain, broken, symlinks=True)
    (broken / "checkpoints" / "last" / "model" / "notes.json").write_text("{")
    with pytest.raises(ModelError, match=r"notes\.json is not JSON"):
        push(broken, "me/x", APACHE, api=api(hub))
    assert hub.commits == 0


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (401, ConfigError, "the token is not valid"),
        (403, ConfigError, "the token may not write there"),
        (500, StorageError, "try again later"),
    ],
)
def test_a_hub_that_refuses_is_one_line(
    status: int, kind: type[CraftError], said: str, plain: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuses = (status, "no")
    with pytest.raises(kind, match=said) as caught:
        push(plain, "me/kept", APACHE, api=api(hub))
    assert str(status) in caught.value.message
    assert TOKEN not in caught.value.message


def test_no_token_no_network_and_the_switch_are_one_line_each(
    plain: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="the hub needs a token that may write: set HF_TOKEN"):
        push(plain, "me/kept", APACHE, api=HfApi(endpoint=hub.address))
    assert hub.asked == []
    with pytest.raises(StorageError, match="the hub does not answer"):
        push(plain, "me/kept", APACHE, api=HfApi(endpoint="http://127.0.0.1:1", token=TOKEN))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(ConfigError, match="switched off by HF_HUB_OFFLINE"):
        push(plain, "me/kept", APACHE, api=api(hub))
    huggingface_hub.close_session()


def test_a_command_without_its_folders() -> None:
    command = [
        "craft-ray", "train", "/home/me/with space/run.yaml", "task.path=s3://bucket/secret/new.jsonl", "a=b/c.jsonl",
        "x=[/data/one,/data/two]", "tracking.mlflow=http://me:p@host/path", "--resume=~/runs/x",
    ]  # fmt: skip
    assert public_command(command) == (
        "craft-ray train run.yaml task.path=new.jsonl a=b/c.jsonl 'x=[one,two]' "
        "'tracking.mlflow=http://***@host/path' --resume=x"
    )
