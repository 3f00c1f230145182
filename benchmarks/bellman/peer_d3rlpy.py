"""d3rlpy's side of the race. Run by its own interpreter: ``peer_d3rlpy.py SIDE BATCH``."""

import sys
from pathlib import Path

import d3rlpy
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.bellman.race import (
    ACTIONS,
    DISCOUNT,
    FEATURES,
    HIDDEN,
    ROWS,
    UPDATES,
    report_blocks,
    standard_output,
)

CONFIGS = {"DQN": d3rlpy.algos.DQNConfig, "CQL": d3rlpy.algos.DiscreteCQLConfig}


def main() -> None:
    report = standard_output()
    torch.set_num_threads(1)
    side, batch = sys.argv[1], int(sys.argv[2])
    random = np.random.default_rng(0)
    ends = np.zeros(ROWS)
    ends[99::100] = 1
    dataset = d3rlpy.dataset.MDPDataset(
        observations=random.normal(size=(ROWS, FEATURES)).astype(np.float32),
        actions=random.integers(ACTIONS, size=ROWS),
        rewards=random.normal(size=ROWS).astype(np.float32),
        terminals=ends,
        action_size=ACTIONS,
    )
    config = CONFIGS[side](
        batch_size=batch,
        gamma=DISCOUNT,
        learning_rate=1e-4,
        encoder_factory=d3rlpy.models.VectorEncoderFactory(list(HIDDEN)),
    )
    learner = config.create(device="cpu:0")
    learner.build_with_dataset(dataset)
    fixed = dataset.sample_transition_batch(batch)

    def sampled():
        for _ in range(UPDATES):
            learner.update(dataset.sample_transition_batch(batch))

    def alone():
        for _ in range(UPDATES):
            learner.update(fixed)

    report_blocks(report, {"sampled": sampled, "alone": alone})


if __name__ == "__main__":
    main()
