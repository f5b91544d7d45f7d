"""`craft-ray push`: the model of a finished run and its card, to a repository on the hub, in one commit."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, ModelCard, errors
from huggingface_hub.utils import validate_repo_id

from craft_pipelines.export import runs_of
from craft_pipelines.merge import checkpoint_of, merge
from craft_ray.config import Experiment
from craft_ray.errors import ConfigError, ModelError, StorageError
from craft_ray.models.adapter import CONFIG as ADAPTER
from craft_ray.report.card import CardFields, base_model, model_card
from craft_ray.report.runs import FinishedRun, read_runs
from craft_ray.report.table import Table
from craft_ray.report.tables import arms_table
from craft_ray.run.folder import RunFolder
from craft_ray.run.sharded_checkpoint import SHARDS
from craft_ray.storage.files import readable_bytes, write_atomically
from craft_ray.storage.paths import StoragePath, copy_tree
from craft_ray.tracking.content import reason

CARD = "README.md"
DRAFT = "model_card.md"
"""The card in the run's folder, written by a dry run."""
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
"""How files of weights end: those of an earlier push that this one does not replace are removed."""
REMEDIES = {
    401: "the token is not valid: set HF_TOKEN, or run 'hf auth login'",
    403: "the token may not write there: use one that may, or a repository of your own",
}


def push(
    path: StoragePath,
    repository: str,
    fields: CardFields,
    private: bool = False,
    dry_run: bool = False,
    card: Path | None = None,
    report: StoragePath | None = None,
    api: HfApi | None = None,
    say: Any = print,
) -> None:
    """Send the last checkpoint's model of a run, with a card, to `repository`, which is created if need be.

    Args:
        private: create the repository as a private one; one that is public already is refused.
        dry_run: write the card into the run's folder, and send nothing.
        card: a card to send instead of the one that is made from the run's files.
        report: the comparison or report that the run is part of. By default the comparison whose folder it is in.

    Raises:
        ConfigError: the run is not finished or has no model, its adapter's base model is not on the hub, a field of
            the card is missing, or the hub refuses.
        StorageError: the hub does not answer.
    """
    _check_name(repository)
    run = _finished(path)
    text = _read_card(card) if card else str(model_card(run, repository.split("/")[-1], fields, _arms(run, report)))
    text = text.replace('"REPOSITORY"', f'"{repository}"')
    _, checkpoint = checkpoint_of(path)
    _check_base(checkpoint, run.config, fields)
    if dry_run:
        write_atomically(path / DRAFT, text)
        say(f"card: {path / DRAFT}")
        say(f"nothing was sent; without --dry-run the model in {checkpoint} goes to {repository}")
        return
    hub = api or HfApi()
    if not (hub.token or huggingface_hub.get_token()):
        raise ConfigError("the hub needs a token that may write: set HF_TOKEN, or run 'hf auth login'")
    with _model_folder(checkpoint) as folder:
        files = _files(folder, run, checkpoint, fields)
        size = readable_bytes(sum(map(_size, files.values())))
        with _hub_errors(repository):
            url, visibility = _send(hub, repository, files | {CARD: text.encode()}, private)
    say(f"{len(files) + 1} files, {size}, in a {visibility} repository: {url}")


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except errors.HFValidationError as error:
        raise ConfigError(f"{repository} is not the name of a repository ({reason(error)}): use OWNER/NAME") from None
    if repository.count("/") != 1:
        raise ConfigError(f"{repository} is not the name of a repository: use OWNER/NAME")


def _finished(path: StoragePath) -> FinishedRun:
    if not (path / "config.yaml").exists():
        raise ConfigError(f"{path} is not a run: it has no config.yaml; give the folder of a finished run")
    (run,) = read_runs([RunFolder(path)])
    return run


def _arms(run: FinishedRun, report: StoragePath | None) -> Table | None:
    """The table of the comparison that a run is part of; None if it is part of none."""
    home = run.folder.path.parent.parent if report is None else report
    if report is None and not (run.folder.path.parent.name == "runs" and (home / "result.json").exists()):
        return None
    runs = runs_of(home)
    if run.name not in [other.path.name for other in runs]:
        raise ConfigError(f"the report in {home} does not contain the run {run.name}: specify another --report")
    return arms_table(read_runs(runs))


def _read_card(path: Path) -> str:
    """
    Raises:
        ConfigError: the file does not open, or its head is not valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
        card = ModelCard(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the card {path} cannot be used ({reason(error)}): correct it, or leave out --card"
        ) from None
    if not card.data.to_dict():
        raise ConfigError(f"the card {path} has no head between two lines '---': start from what --dry-run writes")
    return text


def _check_base(checkpoint: StoragePath, config: Experiment, fields: CardFields) -> None:
    """An adapter is of use only to those who have its base model."""
    if (checkpoint / "model" / ADAPTER).exists() and base_model(config, fields) is None:
        raise ConfigError(
            f"the run trained an adapter of {config.model.path}, which nobody else has: say under which name the hub "
            f"has that model with --base-model OWNER/NAME, or push a run of all weights"
        )


@contextmanager
def _model_folder(checkpoint: StoragePath) -> Iterator[Path]:
    """The folder of a checkpoint's model on this disk: fetched from a store, put together from its parts."""
    folder = checkpoint / "model"
    if isinstance(folder, Path) and folder.exists():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="craft-ray-push-") as scratch:
        local = Path(scratch) / "model"
        if folder.exists():
            copy_tree(folder, local)
        else:
            assert (checkpoint / SHARDS).exists(), checkpoint
            merge(checkpoint, local, say=lambda _: None)
        yield local


def _files(folder: Path, run: FinishedRun, checkpoint: StoragePath, fields: CardFields) -> dict[str, Path | bytes]:
    """What is sent, by its path in the repository. Settings that name folders of this machine are sent without them."""
    base = base_model(run.config, fields)
    here = [str(folder), str(checkpoint / "model"), str(run.folder.path), run.config.output_dir, run.config.model.path]
    found: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != CARD:
            found[name] = path
            if path.suffix == ".json" and path.name != "tokenizer.json":
                content = _read_json(path)
                cleaned = _without_folders(content, here, base)
                if cleaned != content:
                    found[name] = json.dumps(cleaned, indent=2).encode()
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({reason(error)}): restore it, or remove it from the model") from None


def _without_folders(value: Any, here: list[str], base: str | None) -> Any:
    """Paths inside the model's own folder by their names there, the base model's by its name on the hub, and others
    without their folders."""
    if isinstance(value, dict):
        return {key: _without_folders(inner, here, base) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner, here, base) for inner in value]
    if isinstance(value, str) and value == here[-1] and value.startswith(("/", "s3://")):
        return base or value.rpartition("/")[2]
    places = [place for place in (*here, str(Path.home()), str(Path.cwd())) if len(place) > 1]
    if isinstance(value, str) and value.startswith(tuple(f"{place}/" for place in places if "/" in place)):
        return value.rpartition("/")[2]
    return value


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _send(hub: HfApi, repository: str, files: dict[str, Path | bytes], private: bool) -> tuple[str, str]:
    """Commit all files at once.

    Returns:
        The commit's address, and whether the repository is private or public.
    """
    hub.create_repo(repository, private=private or None, exist_ok=True)  # None: as the owner's settings have it
    info = hub.model_info(repository)
    if private and not info.private:
        raise ConfigError(f"{repository} exists and is public: make it private first, or push without --private")
    stale = [
        file.rfilename
        for file in info.siblings or []
        if file.rfilename.endswith(WEIGHTS) and file.rfilename not in files
    ]
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationDelete(old) for old in stale),
        *(CommitOperationAdd(path, content) for path, content in files.items()),
    ]
    commit = hub.create_commit(repository, operations, commit_message="Model and card of a craft-ray run")
    return str(commit.commit_url), "private" if info.private else "public"


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Errors of the hub as one line. A commit is complete or absent, so nothing half-sent is left."""
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise ConfigError(
            "the hub is switched off by HF_HUB_OFFLINE: unset it to push, or add --dry-run to write the card alone"
        ) from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        remedy = REMEDIES.get(code, "try again later" if code >= 500 else "correct that, and push again")
        kind = StorageError if code >= 500 else ConfigError
        raise kind(f"the hub refuses {repository} with {code} ({reason(error)}): {remedy}") from None
    except ValueError as error:
        raise ConfigError(f"the hub does not take the card or a file for {repository} ({reason(error)})") from None
    except (errors.HTTPError, OSError) as error:
        raise StorageError(
            f"the hub does not answer ({reason(error)}): nothing was sent; check the network and try again"
        ) from None
