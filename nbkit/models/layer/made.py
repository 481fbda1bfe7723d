"""What fused layers are made from beside weights and adapters: modules and settings that somebody may replace after binding."""

from __future__ import annotations

from typing import Any

from torch import nn

from nbkit.families import Family

Place = tuple[dict[str, Any], str, Any]  # (dict, key, the value it held): as it was, as long as the dict holds that very value

_CONFIG = ("sliding_window", "layer_types", "is_causal", "num_hidden_layers", "hidden_act")
_ATTENTION = ("attention_dropout", "is_causal", "scaling")
_MLP = "act_fn"


def layers_of(decoder: nn.Module, family: Family) -> nn.ModuleList:
    """The decoder's list of layers as it is now."""
    found = decoder.get_submodule(family.decoder.layers.removeprefix(f"{family.decoder.base}."))
    assert isinstance(found, nn.ModuleList)
    return found


def made_from(decoder: nn.Module, family: Family, config: Any) -> list[Place]:
    """Where the layers themselves, their blocks, and the settings that the fused steps take over are held."""
    layers = layers_of(decoder, family)
    parent, _, name = family.decoder.layers.removeprefix(f"{family.decoder.base}.").rpartition(".")
    places: list[Place] = [_place(decoder.get_submodule(parent)._modules, name)]
    places += [_place(layers._modules, str(index)) for index in range(len(layers) + 1)]  # none may come behind the last
    places += [_place(vars(config), key) for key in _CONFIG]
    for layer in layers:
        attention, mlp = (layer.get_submodule(path) for path in (family.attention.module, family.mlp.module))
        for path in (family.attention.module, family.mlp.module):
            above, _, name = path.rpartition(".")
            places.append(_place(layer.get_submodule(above)._modules, name))
        places += [_place(vars(attention), key) for key in _ATTENTION]
        places.append(_place(mlp._modules, _MLP))
    return places


def as_made(places: list[Place]) -> bool:
    """Whether all is as it was."""
    return all(held.get(key) is value for held, key, value in places)


def _place(held: dict[str, Any], key: str) -> Place:
    return held, key, held.get(key)
