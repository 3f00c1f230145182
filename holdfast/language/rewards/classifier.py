"""A reward model: a sequence classifier of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdfast.errors import ModelError
from holdfast.language.rewards.contract import RewardFunction, Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sequence_classifier(
    model_name_or_path: str,
    revision: str | None = None,
    batch_size: int = 8,
    device: str | None = None,
) -> RewardFunction:
    """The score of a reward model: a sequence classifier with one label.

    It reads the prompt and the completion: text as its tokenizer encodes it, messages through its
    tokenizer's chat template.

    Parameters
    ----------
    model_name_or_path : str
        A model directory or hub id, with a tokenizer.
    revision : str, optional
        Of a hub id.
    batch_size : int
        Completions a forward pass takes, at least 1. Scores do not depend on it.
    device : str, optional
        Default: the accelerator if there is one, else the CPU.

    Raises
    ------
    ModelError
        If the model or its tokenizer cannot be loaded, it lacks weights, has another number of
        labels, or no token to pad with.
    ValueError
        If ``batch_size`` is out of range.
    """
    import torch

    from holdfast.language.model import load_tokenizer

    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    model = _load_classifier(model_name_or_path, revision)
    try:
        tokenizer = load_tokenizer(model_name_or_path, revision)
    except ModelError as error:
        raise ModelError(
            f"reward model {model_name_or_path!r} has no tokenizer that can be loaded: save the "
            "one it was trained with beside it (tokenizer.json, tokenizer_config.json)"
        ) from error
    config = model.config.get_text_config()
    # Decoders score the last token that is not this one, so it must be the one padded with.
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.pad_token_id is None:
        raise ModelError(
            f"reward model {model_name_or_path!r} has no token to pad with: set pad_token_id in "
            "its config.json, or a pad_token in its tokenizer"
        )
    pad_id = int(config.pad_token_id)
    limit = getattr(config, "max_position_embeddings", None)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(target).eval().requires_grad_(False)  # type: ignore[arg-type]

    def encoded(prompt: Text, completion: Text) -> list[int]:
        if isinstance(prompt, str) and isinstance(completion, str):
            ids = tokenizer(prompt + completion)["input_ids"]
        else:
            text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            # The template has written the special tokens already.
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if limit is not None and len(ids) > limit:
            raise ValueError(
                f"prompt and completion have {len(ids)} tokens, but reward model "
                f"{model_name_or_path!r} reads {limit}: generate shorter completions"
            )
        return ids

    @torch.inference_mode()
    def reward(
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[float | None]:
        rows = [encoded(*pair) for pair in zip(prompts, completions, strict=True)]
        scores: list[float | None] = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            shape = (len(part), max(map(len, part)))
            input_ids = torch.full(shape, pad_id)
            attention_mask = torch.zeros(shape, dtype=torch.int64)
            for row, ids in enumerate(part):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                attention_mask[row, : len(ids)] = 1
            logits = model(
                input_ids=input_ids.to(target), attention_mask=attention_mask.to(target)
            ).logits
            scores += logits[:, 0].float().tolist()
        return scores

    return reward


def _load_classifier(name_or_path: str, revision: str | None) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.random.fork_rng():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name_or_path, revision=revision, output_loading_info=True
            )
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ModelError(
            f"cannot load reward model {name_or_path!r}: {reason}. Expected a directory or hub id "
            "of a sequence classifier."
        ) from error
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"]))
        raise ModelError(
            f"reward model {name_or_path!r} has no weights {missing}: they would be random. "
            "Expected a model that was trained as a sequence classifier."
        )
    if model.config.num_labels != 1:
        raise ModelError(
            f"reward model {name_or_path!r} has {model.config.num_labels} labels: a reward model "
            "has one"
        )
    return model
