"""The formats of rows: how they are told apart, and how a row becomes one form of messages.

| format | columns by role | a row |
|---|---|---|
| alpaca | instruction, input (may be missing or empty), output | text in each |
| sharegpt | conversations | a list of {"from": ..., "value": ...} |
| messages | messages | a list of {"role": ..., "content": ...}, with tool calls and thinking as OpenAI writes them |
| prompt_completion | prompt, completion | texts, or lists of turns |
| preference | prompt (may be missing where the answers hold it), chosen, rejected | texts, or lists of turns |
| kto | prompt, completion, label (true, false, 1, 0) | texts, or lists of turns |
| text | text | raw text, for continued pretraining |

All but text may have a column system, and all with turns a column tools. Lists may also be JSON text, as they are in CSV
files. `DataRecipe.columns` names other columns for the roles, `DataRecipe.roles` other names of speakers.
"""

from __future__ import annotations

from nbkit.data.conversion import ROLES, Conversation, to_conversation
from nbkit.data.detection import Detected, detect
from nbkit.data.messages import SPEAKERS, Message

__all__ = ["ROLES", "SPEAKERS", "Conversation", "Detected", "Message", "detect", "to_conversation"]
