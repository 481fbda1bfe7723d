"""One exact decoder layer for all declared families: one autograd node, a hand-written backward, five levels of what is kept."""

from nbkit.models.layer.bind import Binding, bind, binding_of
from nbkit.models.layer.keep import LEVELS, Keep

__all__ = ["LEVELS", "Binding", "Keep", "bind", "binding_of"]
