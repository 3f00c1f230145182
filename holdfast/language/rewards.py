"""Rewards: functions that judge completions, with TRL's signature.

A reward function is called as ``f(prompts=…, completions=…, completion_ids=…, **columns)`` and
returns one number a completion, or ``None`` for a completion it does not judge. Prompts and
completions are texts or lists of messages; ``completion_ids`` are the sampled tokens; every other
column of the data arrives as a list, one value a completion.

:func:`load_reward` finds one by name, :class:`Rewards` calls several and checks what they return.
Torch is imported only by the reward that runs a model, so that recipes are checked without it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import DataError, ModelError, RecipeError, TrainingError, nearest
from holdfast.language.columns import Message
from holdfast.language.files import kind_of
from holdfast.language.numbers import final_number, stated_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RewardFunction = Callable[..., Sequence[float | None]]
"""``f(prompts, completions, completion_ids, **columns) -> list[float | None]``."""

Text = str | list[Message]
"""A prompt or a completion, standard or conversational."""

_ARGUMENTS = ("prompts", "completions", "completion_ids")


# Several rewards at once --------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardTable:
    """What the reward functions said about a batch.

    Attributes
    ----------
    by_function : dict of str to ndarray, (completions,), float64
        Unweighted, NaN where a function returned ``None``.
    total : ndarray, (completions,), float64
        Weighted sum over the functions that did judge a completion; NaN where none did.
    """

    by_function: dict[str, NDArray[np.float64]]
    total: NDArray[np.float64]


class Rewards:
    """Named reward functions with weights.

    Parameters
    ----------
    functions : mapping of str to RewardFunction
        At least one.
    weights : mapping of str to float
        One a function, finite. A weight of 0 records a reward without training on it.

    Raises
    ------
    RecipeError
        If there is no function, or the weights are not one finite number each.
    """

    def __init__(
        self, functions: Mapping[str, RewardFunction], weights: Mapping[str, float]
    ) -> None:
        if not functions:
            raise RecipeError("there is no reward: name at least one function")
        for name in weights:
            if name not in functions:
                raise RecipeError(
                    f"a weight is given for {name!r}, which is no reward{nearest(name, functions)} "
                    f"Rewards: {', '.join(functions)}"
                )
        for name in functions:
            if name not in weights:
                raise RecipeError(f"reward {name!r} has no weight: give one per reward")
            weight = weights[name]
            if isinstance(weight, bool) or not isinstance(weight, Real) or not _finite(weight):
                raise RecipeError(
                    f"the weight of reward {name!r} is {weight!r}: it must be a finite number"
                )
        self.functions = dict(functions)
        self.weights = {name: float(weights[name]) for name in functions}

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> RewardTable:
        """Judge a batch.

        Parameters
        ----------
        prompts, completions : sequence of Text, (completions,)
        completion_ids : sequence of sequences of int, (completions, lengths)
        columns : mapping of str to sequence, (completions,)
            The other columns of the data.

        Raises
        ------
        TrainingError
            If a function raises, returns anything but one finite number or ``None`` per completion,
            or no function judges any completion.
        DataError
            If a column has the name of another argument.
        ValueError
            If the arguments differ in length, or there are no completions.
        """
        batch = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        for column in columns:
            if column in batch:
                raise DataError(
                    f"the data has a column {column!r}, which is the name of an argument of every "
                    "reward function: rename the column"
                )
        batch = {**batch, **columns}
        for argument, values in batch.items():
            if len(values) != len(completions):
                raise ValueError(
                    f"{argument} has {len(values)} entries, but there are {len(completions)} "
                    "completions"
                )
        if not completions:
            raise ValueError("completions is empty: there is nothing to reward")
        judged = {name: _judge(name, function, batch) for name, function in self.functions.items()}
        table = np.stack(list(judged.values()))
        unjudged = np.isnan(table)
        if unjudged.all():
            raise TrainingError(
                f"every reward of a batch of {len(completions)} completions is None "
                f"(functions: {', '.join(self.functions)}): there is nothing to learn from. A "
                "function returns None for a completion it does not judge; see that the data has "
                f"the column it reads. Columns: {', '.join(columns) or 'none'}." + _shown(batch, 0)
            )
        weights = np.array(list(self.weights.values()))[:, None]
        total = np.where(unjudged, 0.0, weights * np.where(unjudged, 0.0, table)).sum(axis=0)
        total[unjudged.all(axis=0)] = np.nan
        return RewardTable(judged, total)


def _judge(
    name: str, function: RewardFunction, batch: Mapping[str, Sequence[Any]]
) -> NDArray[np.float64]:
    size = len(batch["completions"])
    try:
        returned = function(**{argument: list(values) for argument, values in batch.items()})
    except Exception as error:
        index = _culprit(function, batch)
        alone = "" if index is not None else " It raises for no completion of the batch alone."
        raise TrainingError(
            f"reward {name!r} raised {type(error).__name__}: {error}{alone}"
            + _shown(batch, index or 0)
        ) from error
    if not isinstance(returned, list | tuple):
        raise TrainingError(
            f"reward {name!r} returned {_found(returned)}, expected a list of {size} numbers (or "
            "None), one per completion" + _shown(batch, 0)
        )
    if len(returned) != size:
        raise TrainingError(
            f"reward {name!r} returned {len(returned)} rewards, expected {size}: one per "
            "completion, in their order" + _shown(batch, 0)
        )
    for index, value in enumerate(returned):
        if value is None:
            continue
        if not isinstance(value, Real | np.bool_):
            raise TrainingError(
                f"reward {name!r} returned {_found(value)} for a completion, expected a number or "
                "None" + _shown(batch, index)
            )
        if not _finite(value):
            raise TrainingError(
                f"reward {name!r} returned a number that is not finite ({value}). Return None for "
                "a completion that cannot be judged." + _shown(batch, index)
            )
    return np.array([math.nan if value is None else float(value) for value in returned])


def _culprit(function: RewardFunction, batch: Mapping[str, Sequence[Any]]) -> int | None:
    """The first completion on which a function that raised also raises alone."""
    for index in range(len(batch["completions"])):
        try:
            function(**{argument: [values[index]] for argument, values in batch.items()})
        except Exception:
            return index
    return None


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float can hold
        return False


def _found(value: Any) -> str:
    found = kind_of(value)
    return f"{found}; call its .tolist()" if hasattr(value, "tolist") else found


def _shown(batch: Mapping[str, Sequence[Any]], index: int) -> str:
    """The prompt and the completion that a message is about."""
    prompt, completion = batch["prompts"][index], batch["completions"][index]
    return f"\n  prompt: {_shorten(prompt)}\n  completion: {_shorten(completion)}"


def _shorten(value: Any, length: int = 200) -> str:
    text = value if isinstance(value, str) else str(value)
    if len(text) > length:
        text = f"{text[: length // 2]} … {text[-(length // 2) :]}"
    return repr(text)


# Finding a reward ---------------------------------------------------------------------------------


def load_reward(path: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """A reward function by name.

    Parameters
    ----------
    path : str
        The name of one in :data:`BUILT_IN`; ``file.py:name``, a function in a file, which is
        executed; or ``package.module.name``, a function in a module that can be imported.
    options : mapping of str to Any, optional
        Of a reward that is built in. A function of one's own takes none.

    Raises
    ------
    RecipeError
        If there is no such function, it cannot be called as a reward, or an option is not valid.
    ModelError
        If a reward model cannot be used.
    """
    if path in BUILT_IN:
        return _build(path, options or {})
    file, colon, name = path.rpartition(":")
    if not colon and "." not in path:
        raise RecipeError(
            f"there is no reward {path!r}{nearest(path, BUILT_IN)} Built in: "
            f"{', '.join(BUILT_IN)}. Name one of your own as file.py:name or package.module.name."
        )
    if options:
        raise RecipeError(
            f"reward {path!r} is a function, which takes no options (found: "
            f"{', '.join(map(str, options))}): name a function that has them set"
        )
    if colon:
        module = _module_from_file(path, Path(file).expanduser())
    else:
        module_name, _, name = path.rpartition(".")
        module = _module_by_name(path, module_name)
    return _member(path, module, name)


def _build(name: str, options: Mapping[str, Any]) -> RewardFunction:
    factory = BUILT_IN[name]
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            raise RecipeError(
                f"reward {name!r} has no option {option!r}{nearest(str(option), known)} Options: "
                f"{', '.join(known)}"
            )
    missing = [
        option
        for option, parameter in known.items()
        if parameter.default is parameter.empty and option not in options
    ]
    if missing:
        raise RecipeError(f"reward {name!r} needs the option {', '.join(missing)}")
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"reward {name!r}: {error}") from error


def _module_from_file(path: str, file: Path) -> ModuleType:
    if not file.is_file():
        names = [entry.name for entry in file.parent.glob("*.py")]
        raise RecipeError(f"reward {path!r}: there is no file {file}{nearest(file.name, names)}")
    digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"{file.stem}_{digest}", file)
    if spec is None or spec.loader is None:
        raise RecipeError(f"reward {path!r}: {file} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module they are defined in
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise _unimportable(path, str(file), error) from error
    return module


def _module_by_name(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _unimportable(path, name, error) from error  # it exists, but imports what is not
        raise RecipeError(
            f"reward {path!r}: there is no module {error.name!r}{nearest(path, BUILT_IN)} Install "
            "it, or name a file: file.py:name"
        ) from error
    except Exception as error:
        raise _unimportable(path, name, error) from error


def _unimportable(path: str, module: str, error: Exception) -> RecipeError:
    return RecipeError(
        f"reward {path!r}: {module} cannot be imported ({type(error).__name__}: {error})"
    )


def _member(path: str, module: ModuleType, name: str) -> RewardFunction:
    where = module.__file__ or module.__name__
    if not hasattr(module, name):
        callables = [key for key, value in vars(module).items() if callable(value)]
        raise RecipeError(f"reward {path!r}: {where} has no {name!r}{nearest(name, callables)}")
    found = getattr(module, name)
    if inspect.isclass(found) or not callable(found):
        what = "a class" if inspect.isclass(found) else kind_of(found)
        raise RecipeError(
            f"reward {path!r}: {name!r} in {where} is {what}, expected a function "
            f"f({', '.join(_ARGUMENTS)}, **columns)"
        )
    try:
        kinds = {parameter.kind for parameter in inspect.signature(found).parameters.values()}
    except ValueError:  # a function written in C may not tell
        kinds = {inspect.Parameter.VAR_KEYWORD}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise RecipeError(
            f"reward {path!r}: every column of the data is passed to {name!r} by name, so its "
            "signature must end with **columns"
        )
    return found


# Rewards that are built in ------------------------------------------------------------------------


def exact_match(column: str = "answer") -> RewardFunction:
    """1 if the completion is the text of a column, else 0; white space around either is ignored.

    Parameters
    ----------
    column : str
        Holds text. A row where it is null is not judged.
    """

    return _against(column, "text", _text, lambda said, answer: said.strip() == answer.strip())


def numeric_answer(column: str = "answer") -> RewardFunction:
    r"""1 if the final number of the completion equals that of a column, else 0.

    Numbers are compared exactly. See :func:`~holdfast.language.numbers.final_number` for which number is the final one.

    Parameters
    ----------
    column : str
        Holds a number, text that is one, or text that marks one with ``####`` or ``\boxed{}``. A
        row where it is null is not judged.
    """

    return _against(column, "a number", _number, lambda said, answer: final_number(said) == answer)


def math_verify(column: str = "answer") -> RewardFunction:
    r"""1 if the completion's final expression equals that of a column, as math-verify sees it.

    In a completion, ``\boxed{}`` goes before other LaTeX, and that before plain numbers. Neither
    reading nor comparing may take longer than math-verify's five seconds; what does, is 0. These
    limits work in the main thread only.

    Parameters
    ----------
    column : str
        Holds an expression, in plain LaTeX or between delimiters, or text that has one after
        ``####``. A row where it is null is not judged.

    Raises
    ------
    RecipeError
        If math-verify is not installed.
    """
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise RecipeError(
            "reward 'math_verify' needs the package math-verify: pip install holdfast[math]"
        ) from error
    boxed_first = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return None
        expression = value.rpartition("####")[2].strip()
        if not re.search(r"\$|\\boxed|\\\(|\\\[", expression):
            # Without delimiters math-verify looks for plain numbers and would read part of it.
            expression = rf"\boxed{{{expression}}}"
        return parse(expression) or None

    return _against(
        column,
        "an expression",
        read,
        lambda said, answer: verify(answer, parse(said, boxed_first)),
    )


def regex(pattern: str, full_match: bool = False) -> RewardFunction:
    """1 if a regular expression matches the completion, else 0.

    Parameters
    ----------
    pattern : str
        In Python's syntax; flags are written inside, such as ``(?s)``.
    full_match : bool
        Whether it must match the whole completion instead of any part.

    Raises
    ------
    ValueError
        If the pattern is not valid.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    match = compiled.fullmatch if full_match else compiled.search

    def reward(
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[float | None]:
        return [float(match(completion_text(completion)) is not None) for completion in completions]

    return reward


def soft_overlong(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """Punish completions that come near the limit on length.

    0 up to ``max_completion_len - soft_punish_cache`` tokens, from there linear to -1 at
    ``max_completion_len``, and -1 beyond (Yu et al., "DAPO", equation 13).

    Parameters
    ----------
    max_completion_len : int
        In tokens, at least 1.
    soft_punish_cache : int
        Width of the linear part in tokens, from 0 (a step) to ``max_completion_len``.

    Raises
    ------
    ValueError
        For a number out of range.
    """
    if max_completion_len < 1:
        raise ValueError(f"max_completion_len is {max_completion_len}: it must be at least 1")
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ValueError(
            f"soft_punish_cache is {soft_punish_cache}: it must lie in [0, max_completion_len], "
            f"here [0, {max_completion_len}]"
        )

    def punishment(length: int) -> float:
        excess = length - (max_completion_len - soft_punish_cache)
        if excess <= 0:
            return 0.0
        return -1.0 if excess >= soft_punish_cache else -excess / soft_punish_cache

    def reward(
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[float | None]:
        return [punishment(len(ids)) for ids in completion_ids]

    return reward


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
        If the model cannot be loaded, has another number of labels, lacks weights, or has no token
        to pad with.
    ValueError
        If ``batch_size`` is out of range.
    """
    import torch

    from holdfast.language.model import load_tokenizer

    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    model = _load_classifier(model_name_or_path, revision)
    tokenizer = load_tokenizer(model_name_or_path, revision)
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
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.random.fork_rng():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name_or_path, revision=revision, output_loading_info=True
            )
    except (
        OSError,
        SafetensorError,
        ValueError,
        TypeError,
        KeyError,
        ImportError,
        RuntimeError,
    ) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ModelError(
            f"cannot load reward model {name_or_path!r}: {reason}. Expected a directory or hub id "
            "of a sequence classifier."
        ) from error
    if found["missing_keys"]:
        raise ModelError(
            f"reward model {name_or_path!r} has no weights {', '.join(found['missing_keys'])}: "
            "they would be random. Expected a model that was trained as a sequence classifier."
        )
    if model.config.num_labels != 1:
        raise ModelError(
            f"reward model {name_or_path!r} has {model.config.num_labels} labels: a reward model "
            "has one"
        )
    return model


BUILT_IN: dict[str, Callable[..., RewardFunction]] = {
    factory.__name__: factory
    for factory in (
        exact_match,
        numeric_answer,
        math_verify,
        regex,
        soft_overlong,
        sequence_classifier,
    )
}
"""Rewards by the name that a recipe uses: each takes its options and returns the function."""


# What a completion says ---------------------------------------------------------------------------


def completion_text(completion: Text) -> str:
    """The text of a completion: of a conversation, what the assistant said last.

    Raises
    ------
    ValueError
        If the assistant said nothing, or something that is not text.
    """
    if isinstance(completion, str):
        return completion
    said = [message["content"] for message in completion if message["role"] == "assistant"]
    if not said or not isinstance(said[-1], str):
        found = kind_of(said[-1]) if said else "no message from the assistant"
        raise ValueError(f"the completion is {found}, expected text")
    return said[-1]


def _against(
    column: str,
    kind: str,
    read: Callable[[Any], Any],
    agrees: Callable[[str, Any], bool],
) -> RewardFunction:
    """1 where ``agrees(completion, read(value of the column))``, 0 elsewhere, None where null."""

    def expected(value: Any) -> Any:
        answer = read(value)
        if answer is None:
            shown = _shorten(value) if isinstance(value, str) else kind_of(value)
            raise DataError(f"column {column!r} holds {shown}, expected {kind}")
        return answer

    def reward(
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[float | None]:
        if column not in columns:
            raise DataError(
                f"the data has no column {column!r}{nearest(column, columns)} Columns: "
                f"{', '.join(columns) or 'none'}"
            )
        return [
            None if value is None else float(agrees(completion_text(completion), expected(value)))
            for completion, value in zip(completions, columns[column], strict=True)
        ]

    return reward


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> Fraction | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and _finite(value):
        return Fraction(str(value))
    return stated_number(value) if isinstance(value, str) else None
