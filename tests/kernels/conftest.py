"""Parity of the kernels themselves is tried where kernels run: on a GPU, or in a process that Triton interprets.

Triton decides at its import, for good, whether it interprets. An ordinary test process has it compiled, so
`test_interpreted.py` starts processes of its own with TRITON_INTERPRET=1, which collect `test_parity.py`.
"""

from __future__ import annotations

import os

import torch

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore = ["test_parity.py"]
