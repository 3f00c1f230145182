"""Acting: on one thread, which is given back, whatever happens."""

import pytest
import torch
from helpers.worlds import Target

from holdfast.control.acting import one_thread
from holdfast.control.actor_critic import ActorCritic
from holdfast.control.collecting import Collector
from holdfast.control.policies import GaussianPolicy


def test_threads_are_given_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(RuntimeError), one_thread():
            assert torch.get_num_threads() == 1
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_policy_acts_on_one_thread_every_time():
    policy = ActorCritic(GaussianPolicy(1, 1, hidden=(4,)))
    collector, seen = Collector(policy, Target(2), seed=0), []
    act = policy.actor.act
    policy.actor.act = lambda *given: seen.append(torch.get_num_threads()) or act(*given)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for _ in range(2):
            collector.collect(1)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]
