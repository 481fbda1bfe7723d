"""The head: when every row is projected rather than the labelled ones counted."""

from __future__ import annotations

import pytest
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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_labelled_rows_are_found(device, share):
    labels = torch.where(torch.rand(1001, generator=torch.Generator().manual_seed(0)) < share, 7, -100).to(device)
    expected = [i for i, label in enumerate(labels.tolist()) if label != -100]
    assert head.Targets(labels).index.tolist() == expected and (share in (0.0, 1.0)) == (len(expected) in (0, 1001))


@pytest.mark.gpu
def test_nothing_waits_for_the_device_between_the_labels_and_the_loss():
    from nbkit.kernels.linear_cross_entropy import linear_cross_entropy

    labels = torch.where(torch.rand(4096) < 0.5, 5, -100).cuda()
    hidden, weight = (torch.randn(n, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (4096, 512))
    expected = linear_cross_entropy(hidden, weight, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        targets = head.Targets(labels)
        loss = linear_cross_entropy(hidden, weight, labels, index=targets.index)
        loss.backward()
        with pytest.raises(RuntimeError):  # what would be found here
            (labels != -100).nonzero()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(loss, expected)
