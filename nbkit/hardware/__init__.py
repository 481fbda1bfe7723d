"""The machine: what it is, what fits on it, what is in use, and whether all is well."""
