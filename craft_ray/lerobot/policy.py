"""A LeRobot policy behind the interface of every model: what all types share.

Anchors and task samples go through LeRobot's own preprocessor one at a time, on the host; padding is removed there and
added again only up to the longest sample of a batch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from lerobot.configs import FeatureType, NormalizationMode
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from craft_ray.config import ModelConfig, Precision
from craft_ray.config.modes import stores
from craft_ray.data.frame import Frame
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source
from craft_ray.errors import ConfigError, DataError, ModelError
from craft_ray.lerobot.dataset import action_chunk
from craft_ray.lerobot.folder import PolicyFolder, save_folder
from craft_ray.lerobot.preset import optimizer_preset
from craft_ray.lerobot.taps import Taps
from craft_ray.method.pooling import Layout, Pooling
from craft_ray.models.base import Batch, Features, evaluating
from craft_ray.models.capabilities import OptimizerPreset, PresetModel, token_model
from craft_ray.models.dropout import disable_dropout, drawing, silence
from craft_ray.models.fingerprint import json_fingerprint, tokenizer_identity, weights_fingerprint
from craft_ray.models.sharding import gathered, whole_state

ACTION = "action"
IS_PAD = "action_is_pad"
LANGUAGE, LANGUAGE_MASK = "observation.language.tokens", "observation.language.attention_mask"
LOCATIONS = {"tokenizer_name", "action_tokenizer_name", "paligemma_tokenizer_name", "device", "trust_remote_code"}
"""Settings of a processor step that say where something comes from; what the step does is identified otherwise."""

Output = TypeVar("Output")


class LeRobotPolicy(PresetModel):
    """What all policies share; a subclass defines its sequence of tokens and how it is run."""

    kind: ClassVar[str] = "lerobot"
    default_positions: tuple[str, ...] = ("all",)
    counts_steps: ClassVar[bool] = False
    """Whether its loss is a mean over the actions within the episode; otherwise it is one over samples."""
    one_size: ClassVar[bool] = False
    """Whether pictures must have the size that the policy names; otherwise it resizes them itself."""

    def __init__(self, config: ModelConfig, precision: Precision, device: torch.device, folder: PolicyFolder) -> None:
        self.config = config
        self.precision = precision
        self.device = device
        self.folder = folder
        self.policy: Any = folder.policy
        self.settings: Any = folder.policy.config
        self.module: nn.Module = folder.policy
        self.sharded = isinstance(folder.policy, FSDPModule)
        self.module.to(device)
        self.module.train()
        if config.disable_dropout:
            disable_dropout(self.module)
        self._without_dropout: set[str] = set()
        self.taps = self.make_taps()
        self.num_hidden_states = self.taps.count
        inputs = {
            name: feature for name, feature in self.settings.input_features.items() if ".empty_camera_" not in name
        }
        self.features: dict[str, tuple[int, ...]] = {name: tuple(f.shape) for name, f in inputs.items()}
        """The policy's inputs with their shapes; [3, H, W] for pictures."""
        self.cameras = [name for name, feature in inputs.items() if feature.type is FeatureType.VISUAL]
        self.action_size: int = self.settings.output_features[ACTION].shape[0]
        visual = self.settings.normalization_mapping.get("VISUAL", NormalizationMode.IDENTITY)
        # A picture that is not scaled keeps one byte per value until it is on the device.
        self._bytes = visual is NormalizationMode.IDENTITY
        if (self.settings.n_obs_steps or 1) > 1:
            raise ConfigError(
                f"{self.settings.type} takes {self.settings.n_obs_steps} frames at once (n_obs_steps), but only 1 is "
                f"supported: use another policy"
            )

    @property
    def description(self) -> str:
        return f"a policy of type {self.settings.type}"

    # -- what a subclass defines

    @abstractmethod
    def make_taps(self) -> Taps:
        """Where its hidden states are taken."""

    @abstractmethod
    def layout(self, encoded: Mapping[str, Tensor], suffix: int) -> Layout:
        """What the tokens of one sample are, without padding.

        Args:
            encoded: the preprocessor's output, with a batch dimension of one.
            suffix: number of suffix tokens after the prompt.
        """

    @abstractmethod
    def run_prompt(self, inputs: Mapping[str, Tensor]) -> None:
        """Run a forward pass over the prompt and any suffix tokens, which the taps capture."""

    # -- data

    def check_source(self, source: Source) -> None:
        if source.features is None:
            raise ConfigError(
                f"{source.name} is not a LeRobotDataset, but a policy of type {self.settings.type} learns and "
                f"anchors nothing else: specify one"
            )
        for name, shape in {**self.features, ACTION: (self.action_size,)}.items():
            found = source.features.get(name)
            if found is None:
                known = ", ".join(source.features)
                raise ConfigError(
                    f"{source.name} has no {name}, which the policy {self.config.path} "
                    f"{'returns' if name == ACTION else 'takes'}; it has {known}: specify another data set, or map "
                    f"one of its features with rename"
                )
            if name in self.cameras and not self.one_size:
                continue
            if found != shape:
                raise ConfigError(
                    f"{name} is {list(found)} in {source.name}, but the policy {self.config.path} takes {list(shape)}: "
                    f"specify a data set of the same robot"
                )

    # -- host side: samples to batches

    def encode(self, sample: Sample, actions: bool = False) -> dict[str, Any]:
        """The preprocessor's output for one sample, with a batch dimension of one.

        Raises:
            DataError: the sample is not a frame of an episode, or has no actions.
        """
        if sample.frame is None:
            raise DataError(
                f"{sample.where} is not a frame of a LeRobotDataset: specify one, as the policy takes nothing else"
            )
        item: dict[str, Any] = {**self.observe(sample.frame), "task": [sample.prompt]}
        if actions:
            if sample.frame.actions is None:
                raise DataError(f"{sample.where} has no actions: specify a LeRobotDataset that holds them")
            chunk, is_pad = action_chunk(sample.frame.actions, self.settings.chunk_size)
            item |= {ACTION: torch.from_numpy(chunk)[None], IS_PAD: torch.from_numpy(is_pad)[None]}
        output: dict[str, Any] = self.folder.processors.before(item)
        return output

    def observe(self, frame: Frame) -> dict[str, Tensor]:
        """The policy's inputs, as LeRobot's data sets give them."""
        pictures = {name: torch.tensor(frame.images[name]).permute(2, 0, 1)[None] for name in self.cameras}
        if not self._bytes:
            pictures = {name: picture.float() / 255 for name, picture in pictures.items()}
        rest = [name for name in self.features if name not in pictures]
        return pictures | {name: torch.from_numpy(np.array(frame.state[name]))[None] for name in rest}

    def preprocess(self, sample: Sample) -> Features:
        encoded = self.encode(sample, actions=sample.frame is not None and sample.frame.actions is not None)
        images = {name: encoded[name] for name in (*self.features, ACTION, IS_PAD) if encoded.get(name) is not None}
        return Features(self.language(encoded), images, self.layout(encoded, 0))

    def language(self, encoded: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tokens of the prompt's text, without padding."""
        if LANGUAGE not in encoded:
            return {}
        tokens, mask = encoded[LANGUAGE][0], encoded[LANGUAGE_MASK][0].bool()
        most = len(mask)
        if mask.all() and hasattr(self.settings, "tokenizer_max_length") and most >= self.settings.tokenizer_max_length:
            raise DataError(
                f"the prompt '{encoded['task'][0].strip()}' fills the policy's tokenizer_max_length of {most} and may "
                f"be truncated: shorten the task, or use a teacher with a larger one"
            )
        return {"language": tokens[mask]}

    def preprocess_task(self, sample: Sample) -> Features:
        return self.preprocess(sample)  # with the actions of its frame

    def collate(self, features: Sequence[Features], positions: Sequence[str] | None = None) -> Batch:
        """A batch by LeRobot's names; text is padded on the right, to the longest."""
        inputs: dict[str, Tensor] = {}
        width = 0
        if "language" in features[0].tokens:
            width = max(len(f.tokens["language"]) for f in features)
            inputs[LANGUAGE], inputs[LANGUAGE_MASK] = padded([f.tokens["language"] for f in features], width)
        for name in features[0].images:
            inputs[name] = torch.cat([f.images[name] for f in features])
        pooling = None
        if positions is not None:
            pooling = self._pooling(features, positions, width)
        none = torch.empty(0, dtype=torch.long)
        steps = int((~inputs[IS_PAD]).sum()) if self.counts_steps and IS_PAD in inputs else 0
        return Batch(inputs, none, none.expand(len(features), 0), steps, len(features), pooling)

    def _pooling(self, features: Sequence[Features], positions: Sequence[str], width: int) -> Pooling:
        gaps = [width - len(f.tokens["language"]) if "language" in f.tokens else 0 for f in features]
        layouts = [f.layout for f in features]
        most = max(layout.length + gap for layout, gap in zip(layouts, gaps, strict=True))
        return Pooling.plan(layouts, positions, most, gaps)

    def terms(self, inputs: Mapping[str, Tensor]) -> int:
        """Terms of the mean that LeRobot's own loss of a batch is: samples, or actions within the episode."""
        if self.counts_steps and IS_PAD in inputs:
            return int((~inputs[IS_PAD]).sum())
        return len(inputs[ACTION])

    # -- device side

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """A batch as LeRobot's forward takes it: with pictures in [0, 1]."""
        return {k: v.float() / 255 if v.dtype == torch.uint8 else v for k, v in batch.inputs.items()}

    def task_loss(self, batch: Batch) -> Tensor:
        """LeRobot's own loss."""
        if ACTION not in batch.inputs:
            raise DataError("a batch holds no actions to learn: specify a LeRobotDataset that holds them")
        inputs = self.inputs(batch)
        with self.autocast():
            loss: Tensor = self.without_dropout("loss", lambda: self.policy.forward(inputs)[0])
        return loss.float()

    def hidden_states(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        inputs = self.inputs(batch)

        def states() -> list[Tensor]:
            with self.taps.capture(layers) as seen:
                self.run_prompt(inputs)
            return [seen[k] for k in layers]

        with self.autocast():
            return self.without_dropout("hidden state", states)

    def without_dropout(self, result: str, function: Callable[[], Output]) -> Output:
        """The output of `function`, which may call any part of the policy; before the first one in training mode,
        dropout that no module declares is found by running it, and turned off.

        The policy's own core draws random numbers on purpose (noise, times, a latent), and keeps them.

        Args:
            result: what `function` computes.

        Raises:
            ModelError: a part draws random numbers even in evaluation mode.
        """

        def forward() -> Output:
            return gathered(self.module, function)

        if self.config.disable_dropout and self.module.training and result not in self._without_dropout:
            on_purpose = frozenset({self.module, self.policy.model})
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices), torch.no_grad():
                silence(self.module, forward, self.device, on_purpose)
                with drawing(self.module, self.device) as found:
                    forward()
            loud = [name for name, part in self.module.named_modules() if part in found - on_purpose]
            if loud:
                raise ModelError(
                    f"model.path {self.folder.path}: its {result} is random although dropout is off "
                    f"(model.disable_dropout is true): {loud[0]} draws random numbers in evaluation mode, too: set the "
                    f"randomness in its config.json to zero, or model.disable_dropout=false without anchors"
                )
            self._without_dropout.add(result)
        return forward()

    def check_anchors(self, modes: Sequence[str], positions: Sequence[str]) -> None:
        if stores(modes, "suffix") or "suffix" in positions:
            token_model(self)

    @torch.no_grad()
    def act(self, samples: Sequence[Sample]) -> np.ndarray:
        """The actions to execute next, [B, n_action_steps, D] in the robot's units: LeRobot's own inference.

        Args:
            samples: frames, whose actions are ignored.
        """
        frames = [sample.frame for sample in samples]
        assert all(frame is not None for frame in frames)
        observed = [self.observe(frame) for frame in frames if frame is not None]
        item: dict[str, Any] = {name: torch.cat([one[name] for one in observed]) for name in self.features}
        item["task"] = [sample.prompt for sample in samples]
        encoded = self.folder.processors.before(item)
        moved = {k: v.to(self.device) for k, v in encoded.items() if isinstance(v, Tensor)}
        moved = {k: v.float() / 255 if v.dtype == torch.uint8 else v for k, v in moved.items()}
        with evaluating(self.module), self.autocast():
            actions = gathered(self.module, lambda: self.predict(moved))
        actions = self.folder.processors.after(actions.float())
        return actions[:, : self.settings.n_action_steps].cpu().numpy()

    def predict(self, inputs: dict[str, Tensor]) -> Tensor:
        """A chunk of normalised actions [B, T, D]."""
        self.policy.reset()
        actions: Tensor = self.policy.predict_action_chunk(inputs)
        return actions

    def optimizer_preset(self, steps: int) -> OptimizerPreset:
        return optimizer_preset(self.policy, steps)

    # -- identity and storage

    def weights_fingerprint(self) -> str:
        return weights_fingerprint(self.module)

    def preprocessor_fingerprint(self) -> str:
        return json_fingerprint([self.kind, self.settings.type, self.features, *map(_step_identity, self.steps())])

    def steps(self) -> list[Any]:
        return list(self.folder.processors.before.steps)

    def save(self, folder: Path, final: Path | None = None) -> None:
        weights = None
        if self.trains_shards:
            weights = whole_state(self.module, keep=dist.get_rank() == 0)
            if dist.get_rank() != 0:
                return
        save_folder(self.folder, folder, final, self.adapter, weights)


def _step_identity(step: Any) -> Any:
    """What identifies the behaviour of a processor step."""
    settings = {key: value for key, value in step.get_config().items() if key not in LOCATIONS}
    state = {key: tensor.tolist() for key, tensor in sorted(step.state_dict().items())}
    tokenizers = [
        tokenizer_identity(tokenizer)
        for tokenizer in (vars(step).get("input_tokenizer"), vars(step).get("_paligemma_tokenizer"))
        if tokenizer is not None
    ]
    actions = vars(step).get("action_tokenizer")
    if actions is not None:
        tokenizers.append([tokenizer_identity(actions.bpe_tokenizer), actions.scale, actions.min_token])
    return [type(step).__name__, settings, state, tokenizers]


def check_trained(part: nn.Module, settings: Any) -> None:
    """Refuse retention where training cannot change the hidden states.

    Args:
        part: the part of the policy that the hidden states come from.

    Raises:
        ConfigError: none of its weights is trained, so a retention loss would have no gradient.
    """
    if any(parameter.requires_grad for parameter in part.parameters()):
        return
    if not settings.train_expert_only:
        raise ConfigError(
            f"no adapter is in the part of this {settings.type} that reads the prompt, so its hidden states cannot "
            f"change: choose other adapter.target_modules, or train without retention (craft.enabled=false)"
        )
    raise ConfigError(
        f"only the action expert of this {settings.type} is trained (train_expert_only), so the hidden states of "
        f"the prompt cannot change: set train_expert_only to false in the config.json of its folder, or train "
        f"without retention (craft.enabled=false)"
    )


def padded(rows: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens as a matrix with zeros on the right, and which are real."""
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        mask[index, : len(row)] = True
    return tokens, mask


def image_tokens(resolution: Sequence[int], patch: int) -> int:
    """Tokens of one picture."""
    return math.prod(side // patch for side in resolution)
