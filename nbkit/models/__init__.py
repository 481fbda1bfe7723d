"""From a checkpoint's name to a model in memory, its LoRA adapter, and nbkit's engine bound to it."""
