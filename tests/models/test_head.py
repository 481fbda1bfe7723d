"""The head: when every row is projected rather than the labelled ones counted."""

from __future__ import annotations

import torch

from nbkit.models import head


def test_every_row_is_projected_only_where_waiting_would_cost_more(monkeypatch):
    class Fake:  # a tensor on a GPU, as far as the rule looks
        is_cuda = True

        def __init__(self, rows, width):
            self.shape = (rows, width)

        def __len__(self):
            return self.shape[0]

        def numel(self):
            return self.shape[0] * self.shape[1]

    def rule(rows, capability=(9, 0), width=4096):
        monkeypatch.setattr(head, "capability_of", lambda _: capability)
        return head.host_sets_pace(Fake(rows, width), Fake(128256, width))

    assert rule(512) and rule(1024, width=2048) and not rule(1024) and not rule(512, (8, 0)) and not rule(512, (7, 5))
    assert not head.host_sets_pace(torch.zeros(4, 8), torch.zeros(16, 8))
