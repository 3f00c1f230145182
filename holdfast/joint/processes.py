"""What several processes need besides what accelerate does for them."""

from __future__ import annotations

import ctypes

import torch.distributed


def keep_process_group() -> None:
    """Keep the default process group, if there is one, until the process ends.

    The destructor of PyTorch's gloo group joins the group's thread while it holds Python's lock,
    and that thread needs the lock to let go of the tensors of its last collective. Whether both
    meet is a matter of timing, so that a run that is finished may never end. A group that is never
    destroyed waits for nobody; the operating system takes it with the process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(torch.distributed.group.WORLD))
