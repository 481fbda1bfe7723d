"""Replies from the model in memory: streamed one by one, or many at once, with the adapter on or off."""
