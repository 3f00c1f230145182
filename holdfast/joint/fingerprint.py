"""Digests: equal for equal policies, wherever they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is slow to import and recipes are checked without it
    from torch import Tensor


def digest_of(description: Any, tensors: Mapping[str, Tensor]) -> str:
    """Digest of a description (JSON values) and of named tensors.

    The description counts because equal weights may be read differently.
    """
    import torch

    digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
