"""Which modules of a model get an adapter: from the names in a config to modules that exist."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from craft_ray.errors import ConfigError


def adapted_modules(module: nn.Module, wanted: str | Sequence[str]) -> str | list[str]:
    """The modules to adapt, as PEFT takes them.

    Raises:
        ConfigError: there is no such module.
    """
    key = "adapter.target_modules"
    if wanted == "all-linear":
        return list(_linear_layers(module))
    if not isinstance(wanted, str):
        _matching(key, wanted, module, _last_parts(module))
        return list(wanted)
    try:
        pattern = re.compile(wanted)
    except re.error as error:
        raise ConfigError(f"{key}: '{wanted}' is not a regular expression ({error}): write e.g. [q_proj]") from None
    if not any(pattern.fullmatch(name) for name, _ in module.named_modules()):
        raise ConfigError(
            f"{key}: the expression '{wanted}' matches no whole name of a module, such as "
            f"{_nearest(wanted, _names(module), 1)[0]}: correct it, or give a list of the ends of names, such as "
            f"[{', '.join(_nearest(wanted, _last_parts(module), 2))}]"
        )
    return wanted


def whole_modules(module: nn.Module, wanted: Sequence[str]) -> list[str]:
    """The names of the modules to train as a whole.

    Raises:
        ConfigError: there is no such module.
    """
    ends = sorted({name.rpartition(".")[2] for name in _names(module)})
    return _matching("adapter.modules_to_save", wanted, module, ends)


def _linear_layers(module: nn.Module) -> Iterator[str]:
    """The linear layers that full training would change, without output layers.

    The projection inside torch's attention is not called as a module, so an adapter there would never be used.
    """
    skipped = {id(part.out_proj) for part in module.modules() if isinstance(part, nn.MultiheadAttention)}
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            skipped.add(id(part.get_output_embeddings()))
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | Conv1D) and id(part) not in skipped and part.weight.requires_grad:
            yield name


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_modules() if name]


def _last_parts(module: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in _linear_layers(module)})


def _matching(key: str, wanted: Sequence[str], module: nn.Module, candidates: Sequence[str]) -> list[str]:
    """The names of the modules that these names, or ends of names, refer to.

    Args:
        candidates: names to suggest for one that refers to none.

    Raises:
        ConfigError: one refers to none. PEFT accepts it if another one matches.
    """
    names, found = _names(module), []
    for entry in wanted:
        matching = [name for name in names if name == entry or name.endswith(f".{entry}")]
        if not matching:
            near = _nearest(entry, names if "." in entry else candidates, 3)
            raise ConfigError(
                f"{key}: no module of the model is named '{entry}', or ends with it; the nearest are {', '.join(near)}"
            )
        found += matching
    return found


def _nearest(name: str, names: Sequence[str], count: int) -> list[str]:
    return difflib.get_close_matches(name, names, count, cutoff=0.0)


def check_untied(module: nn.Module) -> None:
    """Refuse an adapter on a weight that another module shares: it would change in one place only.

    Args:
        module: with its adapter.

    Raises:
        ConfigError: there is such a weight.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, part in module.named_modules():
        if not isinstance(part, BaseTunerLayer | ModulesToSaveWrapper):
            continue
        own = part.get_base_layer() if isinstance(part, BaseTunerLayer) else part.original_module
        for parameter in own.parameters():
            others = [other for other in owners[id(parameter)] if not other.startswith(f"{name}.")]
            if others:
                raise ConfigError(
                    f"adapter: {name} shares its weights with {others[0].replace('.base_layer', '')}, so an adapter "
                    f"would change only one of the two: leave {name.rpartition('.')[2]} out"
                )
