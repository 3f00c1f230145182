"""Generation: completions of prompts, drawn so that each depends on its own seed alone."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from holdfast.language.model import LanguagePolicy


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; names as in TRL and transformers.

    Attributes
    ----------
    max_completion_length : int
        Tokens a completion may have, at least 1. It is what ends a generation that would not end.
    temperature : float
        Positive; 0 takes the most probable token.
    top_p, top_k, min_p
        Truncations of the distribution, as in transformers; ``None``: none.
    stop_strings : tuple of str
        A completion ends where one of them appears, which then is part of it.
    """

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ValueError(
                f"max_completion_length is {self.max_completion_length}: it must be at least 1"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}: it must be 0 or more")


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What was generated.

    Attributes
    ----------
    ids : ndarray, (time,), int32
        The end token or stop string included.
    completed : bool
        It ended by itself, rather than by ``max_completion_length``.
    """

    ids: np.ndarray
    completed: bool


class Generator(Protocol):
    """Draws one completion of every prompt.

    The seed of a completion, and not its place in a batch, decides which one it is.
    """

    def __call__(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]: ...


class TransformersGenerator:
    """Batched generation with the policy itself, by transformers.

    Parameters
    ----------
    policy : LanguagePolicy
        Asked in evaluation mode, as it stands when called.
    batch_size : int
        Prompts in a forward pass.
    teacher, alpha : LanguagePolicy and float, optional
        Every token is drawn from ``alpha`` times the teacher's distribution plus ``1 - alpha``
        times the policy's (MiniLLM, section 2.2). The vocabularies must be the same.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        batch_size: int = 256,
        *,
        teacher: LanguagePolicy | None = None,
        alpha: float = 0.0,
    ) -> None:
        self.policy = policy
        self.batch_size = batch_size
        self.teacher = teacher
        self.alpha = alpha

    def __call__(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts, but {len(seeds)} seeds: one for each")
        training = self.policy.training
        self.policy.eval()
        # By length, so that little is padded.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, Completion] = {}
        try:
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                drawn = self._draw([prompts[i] for i in part], [seeds[i] for i in part], sampling)
                found.update(zip(part, drawn, strict=True))
        finally:
            self.policy.train(training)
        return [found[index] for index in range(len(prompts))]

    @torch.no_grad()
    def _draw(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        policy, tokenizer = self.policy, self.policy.tokenizer
        device = next(policy.parameters()).device
        ids, mask = _left_padded(prompts, policy.pad_id)
        width = ids.shape[1]
        ends = _end_ids(policy)
        ended = _Ended(len(prompts), width, tokenizer, ends, sampling.stop_strings)
        processors = LogitsProcessorList()
        if self.teacher is not None and self.alpha:
            processors.append(_Mixture(self.teacher, self.alpha, mask, sampling.temperature))
        processors.append(_Draw(seeds, width, sampling))
        model: Any = policy.model
        with _own_habits_off(policy):
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                # Greedy search takes the largest score; the processor leaves only what was drawn.
                generation_config=GenerationConfig(
                    max_new_tokens=sampling.max_completion_length,
                    do_sample=False,
                    pad_token_id=policy.pad_id,
                    use_cache=True,
                ),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([ended]),
            )
        tokens = output[:, width:].cpu().numpy().astype(np.int32)
        lengths, completed = ended.result(tokens.shape[1])
        return [
            Completion(row[:length].copy(), bool(done))
            for row, length, done in zip(tokens, lengths, completed, strict=True)
        ]


def _end_ids(policy: LanguagePolicy) -> list[int]:
    """Tokens that end a completion: the tokenizer's, and those that the model came with."""
    named = getattr(policy.base.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    found = [policy.tokenizer.eos_token_id, *listed]
    return sorted({int(end) for end in found if end is not None})


@contextlib.contextmanager
def _own_habits_off(policy: LanguagePolicy) -> Iterator[None]:
    """Without the penalties and truncations that many models come with.

    transformers would take them for whatever is not asked for otherwise, and the completions would
    not be the policy's own.
    """
    holders: list[Any] = [policy.base, policy.model]
    kept = [getattr(holder, "generation_config", None) for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, config in zip(holders, kept, strict=True):
            holder.generation_config = config


class _Draw(LogitsProcessor):
    """Leaves the score of one token, drawn by inverse transform with the row's own number."""

    def __init__(self, seeds: Sequence[int], width: int, sampling: Sampling) -> None:
        self.seeds = np.array(seeds, dtype=np.uint64)
        self.width = width
        self.temperature = sampling.temperature
        self.warpers = LogitsProcessorList()
        if sampling.top_k:
            self.warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None and sampling.top_p < 1.0:
            self.warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self.warpers.append(transformers.MinPLogitsWarper(sampling.min_p))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.temperature == 0:
            return scores
        scores = self.warpers(input_ids, scores.float() / self.temperature)
        cumulative = scores.double().softmax(-1).cumsum(-1)
        numbers = uniform(self.seeds, input_ids.shape[1] - self.width)
        level = torch.from_numpy(numbers).to(scores.device).unsqueeze(1) * cumulative[:, -1:]
        drawn = (cumulative <= level).sum(-1, keepdim=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, drawn, 0.0)


class _Mixture(LogitsProcessor):
    """Scores whose softmax at the sampling temperature is that of policy and teacher, mixed."""

    def __init__(
        self, teacher: LanguagePolicy, alpha: float, mask: Tensor, temperature: float
    ) -> None:
        self.model: Any = teacher.model.eval()
        self.alpha = alpha
        self.mask = mask
        self.temperature = temperature
        self.cache: Any = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        missing = input_ids.shape[1] - self.mask.shape[1]
        mask = torch.nn.functional.pad(self.mask, (0, missing), value=1).to(input_ids.device)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        if self.cache is not None:
            input_ids, places = input_ids[:, -1:], places[:, -1:]
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=places,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        theirs = (output.logits[:, -1].float() / self.temperature).log_softmax(-1)
        own = (scores.float() / self.temperature).log_softmax(-1)
        mixed = torch.logaddexp(theirs + math.log(self.alpha), own + math.log1p(-self.alpha))
        return mixed * self.temperature


def uniform(seeds: np.ndarray, position: int) -> np.ndarray:
    """One number in [0, 1) for every seed, ``(rows,)`` of uint64, at a position.

    A hash of seed and position (Steele et al., "Fast splittable pseudorandom number generators",
    the finaliser of splitmix64), so that nothing has to be stored to go on or to start over.
    """
    step = np.uint64((position + 1) * 0x9E3779B97F4A7C15 & 0xFFFF_FFFF_FFFF_FFFF)
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds) + step)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


class _Ended(StoppingCriteria):
    """Ends rows by end token or stop string, and remembers how long each was."""

    def __init__(
        self,
        rows: int,
        width: int,
        tokenizer: Any,
        ends: Sequence[int],
        stop_strings: Sequence[str],
    ) -> None:
        self.width = width
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.criteria: list[StoppingCriteria] = []
        # Of this name, so that transformers pads the rows that have ended.
        self.eos_token_id = list(ends)
        if ends:
            self.criteria.append(EosTokenCriteria(list(ends)))
        if stop_strings:
            self.criteria.append(StopStringCriteria(tokenizer, list(stop_strings)))

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            done = done | criterion(input_ids, scores)
        new = done.cpu().numpy() & (self.lengths == 0)
        self.lengths[new] = input_ids.shape[1] - self.width
        return done | torch.from_numpy(self.lengths > 0).to(done.device)

    def result(self, longest: int) -> tuple[np.ndarray, np.ndarray]:
        completed = self.lengths > 0
        return np.where(completed, self.lengths, longest), completed


class VllmGenerator:
    """Generation by vLLM in this process, with the policy's weights copied over before each use.

    Needs ``pip install holdfast[vllm]`` and a GPU. Seeds are vLLM's own: the same seed gives the
    same completion there, but not the one of :class:`TransformersGenerator`.

    Parameters
    ----------
    policy : LanguagePolicy
        Its base model must be known to vLLM. An adapter is merged while weights are copied.
    model_name_or_path : str
        Where vLLM finds configuration and tokenizer.
    gpu_memory_utilization : float
        Share of the device's memory for weights and cache, in (0, 1).

    Raises
    ------
    ImportError
        If vLLM is not installed.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        model_name_or_path: str,
        *,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
    ) -> None:
        # The engine in this process: weights are handed over as they are, and are not serialised.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError(
                "vLLM is not installed: pip install holdfast[vllm], or generate with transformers"
            ) from error
        self.policy = policy
        self._params = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=model_name_or_path,
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_len,
            load_format="dummy",  # weights come from the policy
        )

    def _synchronise(self) -> None:
        base: Any = self.policy.base
        model: Any = self.policy.model
        adapted = model is not base
        if adapted:
            model.merge_adapter()
        try:
            weights = [
                (name.replace(".base_layer", ""), tensor.detach())
                for name, tensor in base.state_dict().items()
                if "lora_" not in name
            ]
            self._engine.apply_model(lambda served: served.load_weights(iter(weights)))
        finally:
            if adapted:
                model.unmerge_adapter()
        self._engine.reset_prefix_cache()

    def __call__(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        self._synchronise()
        parameters = [
            self._params(
                max_tokens=sampling.max_completion_length,
                temperature=sampling.temperature,
                top_p=1.0 if sampling.top_p is None else sampling.top_p,
                top_k=sampling.top_k or 0,
                min_p=sampling.min_p or 0.0,
                stop=list(sampling.stop_strings) or None,
                include_stop_str_in_output=True,
                seed=seed % 2**31,
            )
            for seed in seeds
        ]
        inputs = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        outputs = self._engine.generate(inputs, parameters, use_tqdm=False)
        return [
            Completion(
                np.array(output.outputs[0].token_ids, dtype=np.int32),
                output.outputs[0].finish_reason == "stop",
            )
            for output in outputs
        ]


def _left_padded(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts as one batch that ends where the completions begin: ids and attention mask."""
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
