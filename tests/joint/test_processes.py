"""The process group that is never destroyed."""

import subprocess
import sys

SCRIPT = """
import gc, weakref
import torch.distributed as dist
from holdfast.joint.processes import keep_process_group

keep_process_group()  # without a group there is nothing to keep
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if {keep}:
    keep_process_group()
alive = weakref.ref(dist.group.WORLD)
dist.destroy_process_group()
gc.collect()
print(alive() is not None)
"""


def test_a_kept_group_outlives_what_would_destroy_it():
    for keep in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(keep=keep)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(keep)
