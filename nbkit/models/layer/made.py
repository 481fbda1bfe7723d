"""What fused layers are made from beside weights and adapters: modules and settings that somebody may replace after binding."""

from __future__ import annotations

from typing import Any

from torch import nn

from nbkit.families import Family
from nbkit.models.layer.adapters import Unfit, Watch, part_of

_CONFIG = ("sliding_window", "layer_types", "is_causal", "num_hidden_layers", "hidden_act")
_ATTENTION = ("attention_dropout", "is_causal", "scaling")
_MLP = "act_fn"


def layers_of(decoder: nn.Module, family: Family) -> nn.ModuleList:
    """The decoder's list of layers as it is now."""
    found = decoder.get_submodule(family.decoder.layers.removeprefix(f"{family.decoder.base}."))
    assert isinstance(found, nn.ModuleList)
    return found


def made_from(decoder: nn.Module, family: Family, config: Any) -> Watch:
    """Watches the layers themselves, their blocks, and the settings that the fused steps take over."""
    layers, watch = layers_of(decoder, family), Watch()
    parent, _, name = family.decoder.layers.removeprefix(f"{family.decoder.base}.").rpartition(".")
    watch.see(decoder.get_submodule(parent)._modules, name)
    watch.see(layers._modules, *(str(index) for index in range(len(layers) + 1)))  # none may come behind the last
    watch.see(vars(config), *_CONFIG)
    watch.see_hooks_of_all()
    for layer in layers:
        try:
            attention, mlp = (part_of(layer, path) for path in (family.attention.module, family.mlp.module))
        except Unfit:  # another library's layer runs stock, whatever becomes of it
            continue
        for path in (family.attention.module, family.mlp.module):
            above, _, name = path.rpartition(".")
            watch.see(layer.get_submodule(above)._modules, name)
        watch.see(vars(attention), *_ATTENTION)
        watch.see(mlp._modules, _MLP)
    return watch
