"""Recipes: one YAML file that names everything a run is made of.

Reading, overrides, and messages that name the file, the line, the path of the entry and the nearest
valid name. What an entry may be stands in :mod:`holdfast.schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from holdfast.errors import RecipeError, nearest
from holdfast.schema import (
    AnyGuard,
    AnyObjective,
    AnySchedule,
    LanguagePolicySpec,
    OnPolicySpec,
    Recipe,
    ResidualSpec,
    RewardedSpec,
    RewardSpec,
    kinds,
    names_of,
)

SHIPPED = Path(__file__).parent / "recipes"


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Parameters
    ----------
    name_or_path : str
        A YAML file, or the name of a recipe that ships with Holdfast.
    overrides : sequence of str
        ``"a.b=value"``; the value is read as YAML.

    Returns
    -------
    Recipe
        With relative data and model paths made absolute.

    Raises
    ------
    RecipeError
        If it is missing, not YAML, or not valid.
    """
    path = _find(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read recipe {path}: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise RecipeError(f"{path} {found}; a recipe is a mapping of entries")
    lines = {where: line for where, line in _lines(node)} if node else {}
    for override in overrides:
        lines[_override(values, override)] = 0
    return parse_recipe(values, file=path, lines=lines)


def parse_recipe(
    values: Mapping[str, Any], *, file: Path, lines: Mapping[str, int] | None = None
) -> Recipe:
    """Validate a recipe given as plain values.

    Parameters
    ----------
    values : mapping
        As read from YAML.
    file : Path
        Named in messages; relative paths in the recipe start from its folder.
    lines : mapping of str to int, optional
        Line of each entry by its dotted path, 0 for one that came from ``--set``.

    Raises
    ------
    RecipeError
        Naming every entry that is wrong.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        messages = [_message(entry, file, lines or {}) for entry in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(messages))) from None
    return _resolve(recipe, file.resolve().parent)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with Holdfast, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    raise RecipeError(
        f"there is no recipe {name_or_path!r}: neither a file nor a recipe that ships with "
        f"Holdfast{nearest(name_or_path, shipped)} Shipped: {', '.join(shipped)}"
    )


def _override(values: dict[str, Any], override: str) -> str:
    where, equals, text = override.partition("=")
    if not equals or not where.strip():
        raise RecipeError(f"--set {override!r}: expected PATH=VALUE, such as training.seed=1")
    *parents, last = where.strip().split(".")
    target: Any = values
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise RecipeError(f"--set {override!r}: {parent!r} is not a mapping of entries")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise RecipeError(f"--set {override!r}: the value is not valid YAML: {problem}") from error
    return where.strip()


def _resolve(recipe: Recipe, folder: Path) -> Recipe:
    """Local paths made absolute, so that a run can be resumed from anywhere."""

    def local(name: str | None) -> str | None:
        if name is None or not name:
            return name
        beside = folder / Path(name).expanduser()
        looks_local = name.startswith((".", "/", "~")) or Path(name).suffix in _DATA_SUFFIXES
        return str(beside.resolve()) if beside.exists() or looks_local else name

    objectives = {}
    for name, objective in recipe.objectives.items():
        update: dict[str, Any] = {}
        data = getattr(objective, "data", None)
        if data is not None:
            files = {
                entry: local(getattr(data, entry))
                for entry in ("path", "held_out_path")
                if hasattr(data, entry)
            }
            update["data"] = data.model_copy(update=files)
        named = ("reference", "teacher_model_name_or_path", "log_probability_model")
        for entry in (*named, "folder"):
            if hasattr(objective, entry):
                update[entry] = local(getattr(objective, entry))
        if isinstance(objective, RewardedSpec) and objective.preference is not None:
            models = objective.preference.model_dump(include={"reward_model", "reference_model"})
            update["preference"] = objective.preference.model_copy(
                update={key: local(model) for key, model in models.items()}
            )
        if isinstance(objective, OnPolicySpec):
            update["rewards"] = tuple(_reward(reward, local) for reward in objective.rewards)
        objectives[name] = objective.model_copy(update=update)
    policy = _policy(recipe.policy, local)
    return recipe.model_copy(update={"policy": policy, "objectives": objectives})


def _policy(policy: Any, local: Callable[[str | None], str | None]) -> Any:
    update: dict[str, Any] = {}
    if hasattr(policy, "model_name_or_path"):
        update["model_name_or_path"] = local(policy.model_name_or_path)
    if isinstance(policy, ResidualSpec):
        update["base"] = _policy(policy.base, local)
    if isinstance(policy, LanguagePolicySpec) and policy.tokenizer is not None:
        update["tokenizer"] = policy.tokenizer.model_copy(
            update={
                "files": tuple(local(file) for file in policy.tokenizer.files),
                "name_or_path": local(policy.tokenizer.name_or_path),
            }
        )
    return policy.model_copy(update=update)


def _reward(reward: RewardSpec, local: Callable[[str | None], str | None]) -> RewardSpec:
    file, colon, function = reward.name.rpartition(":")
    options = dict(reward.options)
    if "model_name_or_path" in options:
        options["model_name_or_path"] = local(options["model_name_or_path"])
    name = f"{local('./' + file)}:{function}" if colon and not Path(file).is_absolute() else None
    return reward.model_copy(update={"name": name or reward.name, "options": options})


_DATA_SUFFIXES = (".jsonl", ".gz", ".parquet", ".csv", ".json", ".txt", ".npz", ".hdf5", ".h5")


def _lines(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted path and line of every entry of a YAML tree."""
    if isinstance(node, yaml.MappingNode):
        items = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        items = [(str(index), value, value) for index, value in enumerate(node.value)]
    else:
        return
    for name, at, value in items:
        where = f"{prefix}.{name}" if prefix else name
        yield where, at.start_mark.line + 1
        yield from _lines(value, where)


def _message(entry: Any, file: Path, lines: Mapping[str, int]) -> str:
    """One line for one validation error."""
    context = entry.get("ctx", {})
    # Pydantic puts the tag of a union into the location; a recipe's reader never wrote it there.
    parts = [str(part) for part in entry["loc"]]
    where = ""
    for index, part in enumerate(parts):
        longer = f"{where}.{part}" if where else part
        is_tag = part in _TAGS and longer not in lines and index > 0 or part == "[key]"
        where = where if is_tag else longer
    text = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "unknown_entry":
        where = f"{where}.{context['key']}" if where else context["key"]
    elif "where" in context:
        where = context["where"]
    elif entry["type"] == "missing":
        text = "is required, but missing"
    elif entry["type"] in ("union_tag_invalid", "union_tag_not_found"):
        known = [tag.strip(" '") for tag in context.get("expected_tags", "").split(",")]
        found = context.get("tag")
        where = f"{where}.kind"
        if found is None:
            text = "is required, but missing"
        else:
            text = f"{found!r} is not known{nearest(str(found), known)} Known: {', '.join(known)}"
    elif entry["type"] == "literal_error":
        known = [
            option.strip(" '") for option in context["expected"].replace(" or ", ",").split(",")
        ]
        found = entry["input"]
        text = f"{found!r} is not known{nearest(str(found), known)} Known: {', '.join(known)}"
    elif entry["type"] in _SHAPES:
        text = f"expected {_SHAPES[entry['type']]}, but found {entry['input']!r}"
    elif not isinstance(entry["input"], Mapping) and entry["type"] != "value_error":
        text = f"{text[0].lower()}{text[1:]}, but found {entry['input']!r}"
    line = lines.get(where, lines.get(where.rpartition(".")[0]))
    place = f"{file}" if line is None else f"{file}:{line}" if line else "--set"
    return f"{place}: {where}: {text}" if where else f"{place}: {text}"


_TAGS = {
    "str",
    "tuple[str, ...]",
    "language",
    "gaussian",
    "diffusion",
    "residual",
    "saved",
    "soft_q",
} | {
    name
    for union in (AnyObjective, AnySchedule, AnyGuard)
    for spec in kinds(union)
    for name in names_of(spec)
}

_SHAPES = {
    "model_type": "a mapping of entries",
    "model_attributes_type": "a mapping of entries",
    "dict_type": "a mapping of entries",
    "tuple_type": "a list",
}
"""What the shapes of a recipe are called where it is written."""
