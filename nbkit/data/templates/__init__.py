"""Chat templates by name, for base models and for rows that a checkpoint's own template does not fit."""

from nbkit.data.templates.catalog import NAMED, Named, Resolved, adopt, find, resolve

__all__ = ["NAMED", "Named", "Resolved", "adopt", "find", "resolve"]
