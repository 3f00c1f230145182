"""What every part of a recipe has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from holdfast.errors import nearest


class Spec(BaseModel):
    """A part of a recipe. Unknown entries are refused with the nearest known name."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _known_entries(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_entry",
                        "unknown entry{near} Known here: {known}",
                        {
                            "key": str(key),
                            "near": nearest(str(key), cls.model_fields),
                            "known": ", ".join(cls.model_fields),
                        },
                    )
        return data
