"""Replies of the model in memory: streamed for one conversation, batched for many, with the adapter on or off."""
