"""Policies: what is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from holdfast.schema.base import Spec


class TokenizerSpec(Spec):
    """``bytes``: a token a byte. ``bpe``: trained on ``files``. ``pretrained``: loaded by name."""

    kind: Literal["bytes", "bpe", "pretrained"] = "bytes"
    name_or_path: str | None = Field(None, description="pretrained: directory or hub id")
    vocab_size: int = Field(1024, ge=300, description="bpe: size of the vocabulary")
    files: tuple[str, ...] = Field((), description="bpe: data files whose text it is trained on")

    @model_validator(mode="after")
    def _complete(self) -> TokenizerSpec:
        if self.kind == "bpe" and not self.files:
            raise ValueError("kind bpe needs files to be trained on")
        if self.kind == "pretrained" and not self.name_or_path:
            raise ValueError("kind pretrained needs name_or_path")
        return self


class LoraSpec(Spec):
    """Low-rank adaptation; names as in ``peft.LoraConfig``."""

    r: int = Field(16, ge=1)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | str = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False


class LanguagePolicySpec(Spec):
    """A causal language model."""

    kind: Literal["language"] = "language"
    model_name_or_path: str = Field(description="a preset, a model directory or a hub id")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str | None = None
    config: dict[str, Any] = Field({}, description="entries of a preset's configuration to replace")
    tokenizer: TokenizerSpec | None = Field(
        None, description="default: the model's own; bytes for a preset"
    )
    lora: LoraSpec | None = Field(None, description="null: all weights are trained")
