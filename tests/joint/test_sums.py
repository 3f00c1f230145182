"""Sums over micro-batches."""

import torch
from accelerate import Accelerator

from holdfast.joint.objective import LossTerms
from holdfast.joint.sums import Sums


def test_counts_and_metrics_are_gathered_where_the_loss_is(monkeypatch):
    """What is known of a batch lies on the CPU; its loss may be on an accelerator."""
    sums, seen = Sums(), []
    for _ in range(2):
        own = torch.tensor([1.0, 2.0])
        sums.add(LossTerms(torch.zeros((), device="meta"), torch.tensor(3), {"known": own}))

    def cat(parts):
        seen.append({part.device.type for part in parts})
        return torch.zeros(sum(map(len, parts)), dtype=torch.float64)

    monkeypatch.setattr(torch, "cat", cat)
    sums.mean(Accelerator(cpu=True))
    assert seen == [{"meta"}]


def test_a_mean_is_of_all_micro_batches_and_a_metric_may_have_its_own_count():
    sums = Sums()
    for total, count, own in ((6.0, 2, (5.0, 1.0)), (3.0, 1, (7.0, 3.0))):
        metrics = {"each": torch.tensor(total), "own": torch.tensor(own)}
        sums.add(LossTerms(torch.tensor(total), torch.tensor(count), metrics))
    summary = sums.mean(Accelerator(cpu=True))
    assert (summary.loss, summary.count) == (3.0, 3.0)
    assert summary.metrics == {"each": 3.0, "own": 3.0}
