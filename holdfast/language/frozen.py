"""Frozen models beside the policy: references, teachers, and preference-tuned reward models."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from holdfast.errors import ModelError
from holdfast.language.data import Encoded, collate
from holdfast.language.head import Head
from holdfast.language.model import LanguagePolicy


class Frozen:
    """A model that is asked and never trained.

    Parameters
    ----------
    policy : LanguagePolicy
    adapter : bool
        Whether its adapter is used. ``False``: the base below it, whatever the adapter has become.
    """

    def __init__(self, policy: LanguagePolicy, *, adapter: bool = True) -> None:
        self.policy = policy
        self.adapter = adapter

    @classmethod
    def start_of(cls, policy: LanguagePolicy) -> Frozen:
        """The policy as it stands before its first update.

        Its base, where only an adapter is trained, or else a copy: never a model that is loaded
        again from where the policy once came from.
        """
        if policy.model is not policy.base:
            return cls(policy, adapter=False)
        # Marked as copied already, so that both share the tokenizer.
        twin = copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer})
        twin.value_head = None
        return cls(twin.requires_grad_(False))

    @contextlib.contextmanager
    def asked(self) -> Iterator[LanguagePolicy]:
        """The model in evaluation mode, without a graph."""
        if not self.adapter:
            with self.policy.reference() as policy:
                yield policy
            return
        training = self.policy.training
        self.policy.eval()
        try:
            with torch.no_grad():
                yield self.policy
        finally:
            self.policy.train(training)

    def hidden(self, rows: Sequence[Encoded]) -> list[Tensor]:
        """Hidden states from which each counted token is predicted: ``(counted, width)`` a row."""
        with self.asked() as policy:
            return hidden_states(policy, rows)

    def head(self) -> Head:
        """Its output layer."""
        return self.policy.head()

    def share_head(self, policy: LanguagePolicy) -> None:
        """Let it use the policy's vocabulary matrix, where that is frozen and the same.

        The projections of both then collapse into one, and one copy is freed.
        """
        own, theirs = self.head().weight, policy.head().weight
        same = own.shape == theirs.shape and own.dtype == theirs.dtype
        if same and not theirs.requires_grad and torch.equal(own, theirs):
            self.policy.base.get_output_embeddings().weight = theirs

    def check_vocabulary(
        self, policy: LanguagePolicy, name: str, *, truncate: bool = False
    ) -> None:
        """Refuse a model whose tokens are not the policy's.

        Parameters
        ----------
        policy : LanguagePolicy
        name : str
            What the model is called in messages.
        truncate : bool
            Cut a longer vocabulary matrix to the length of the policy's. Only padding can be cut:
            the tokenizers agree, so no token has an id beyond the policy's matrix.

        Raises
        ------
        ModelError
            If the vocabularies differ in size or in what an id means.
        """
        own, theirs = self.policy.tokenizer, policy.tokenizer
        if own is not theirs and own.get_vocab() != theirs.get_vocab():
            differing = sum(
                theirs.get_vocab().get(token) != index for token, index in own.get_vocab().items()
            )
            raise ModelError(
                f"{name} has another tokenizer than the policy: {len(own)} tokens against "
                f"{len(theirs)}, of which {differing} have another id or are unknown. Logits can "
                "only be compared over one vocabulary: use a model of the same family."
            )
        rows, wanted = len(self.head().weight), len(policy.head().weight)
        if truncate and rows > wanted:
            self.policy.base.resize_token_embeddings(wanted)
            return
        if rows != wanted:
            mend = (
                "set truncate_vocabulary: true to cut them off"
                if rows > wanted
                else "cut those of the policy, with resize_token_embeddings and save_pretrained"
            )
            raise ModelError(
                f"{name} has a vocabulary matrix of {rows} rows, the policy one of {wanted}. "
                f"Their tokenizers agree, so the rows beyond {min(rows, wanted)} are padding: "
                f"{mend}."
            )


def hidden_states(
    policy: LanguagePolicy, rows: Sequence[Encoded], tokens_at_once: int = 16384
) -> list[Tensor]:
    """Hidden states ``(counted, width)`` of each row, in the order given; see :class:`Frozen`."""
    device = next(policy.parameters()).device
    found: list[Tensor] = []
    for part in _parts(rows, tokens_at_once):
        input_ids, labels = collate(part, policy.pad_id)
        hidden, mask = policy(
            input_ids.to(device),
            labels.to(device),
            read=lambda hidden, head, labels: (hidden, labels >= 0),
        )
        counts = mask.sum(1).tolist()
        found += hidden[mask].split(counts)
    return found


def _parts(rows: Sequence[Encoded], tokens_at_once: int) -> Iterator[Sequence[Encoded]]:
    start = 0
    while start < len(rows):
        longest, stop = 0, start
        while stop < len(rows):
            longest = max(longest, rows[stop].length)
            if stop > start and longest * (stop + 1 - start) > tokens_at_once:
                break
            stop += 1
        yield rows[start:stop]
        start = stop
