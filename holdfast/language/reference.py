"""Reference log-probabilities: taken once, before the first update, and cached on disk.

The reference is the policy as it was passed in (its base, where it has an adapter), never a model
that was silently loaded again. Since every row is scored before training starts, no second model
stays in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from holdfast.language.data import Preference, fingerprint
from holdfast.language.losses import sequence_logps
from holdfast.language.model import LanguagePolicy
from holdfast.language.objectives import score


def with_reference(
    rows: Sequence[Preference],
    policy: LanguagePolicy,
    cache: Path,
    *,
    tokens_at_once: int = 8192,
) -> list[Preference]:
    """The rows with the log-probabilities of both sides under the reference.

    Parameters
    ----------
    rows : sequence of Preference
        Pairs, in any order.
    policy : LanguagePolicy
        The reference (see :meth:`LanguagePolicy.reference`).
    cache : Path
        Folder of the cache. An entry is found by digest of policy and rows.
    tokens_at_once : int
        Padded tokens in a forward pass.

    Returns
    -------
    list of Preference
        In the order of ``rows``.
    """
    if not rows:
        return []
    known = policy.fingerprint(adapter=False)
    device = next(policy.parameters()).device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else "own"
    key = hashlib.sha256(f"{known} {fingerprint(rows)} {precision}".encode()).hexdigest()
    path = cache / "reference" / f"{key}.safetensors"
    logps = _read(path, len(rows))
    if logps is None:
        logps = _score(rows, policy, tokens_at_once)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        save_file({"logps": logps}, partial)
        partial.replace(path)
    chosen, rejected = logps.tolist()
    return [
        replace(row, reference_chosen_logps=c, reference_rejected_logps=r)
        for row, c, r in zip(rows, chosen, rejected, strict=True)
    ]


def _read(path: Path, count: int) -> torch.Tensor | None:
    try:
        logps = load_file(path)["logps"]
    except (OSError, KeyError, SafetensorError):
        return None  # absent, or damaged: it is computed again
    return logps if tuple(logps.shape) == (2, count) else None


def _score(rows: Sequence[Preference], policy: LanguagePolicy, tokens_at_once: int) -> torch.Tensor:
    logps = torch.empty(2, len(rows), dtype=torch.float32)
    # By length, so that little is padded.
    order = sorted(range(len(rows)), key=lambda index: rows[index].length)
    done = 0
    with policy.reference() as reference:
        while done < len(order):
            size = 1
            while done + size < len(order):
                longest = rows[order[done + size]].length
                if 2 * (size + 1) * longest > tokens_at_once:
                    break
                size += 1
            part = order[done : done + size]
            sides = [rows[i].chosen for i in part] + [rows[i].rejected for i in part]
            scored = sequence_logps(score(reference, sides, policy.pad_id, False)).float().cpu()
            logps[:, part] = scored.view(2, size)
            done += size
    return logps
