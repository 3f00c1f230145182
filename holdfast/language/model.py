"""Language models as policies: loading, presets, LoRA, and the head that losses read."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from holdfast.errors import ModelError
from holdfast.language.head import Head, token_statistics

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-qwen2": (
        "Qwen2Config",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
    "tiny-llama": (
        "LlamaConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
    ),
    "tiny-gemma2": (
        "Gemma2Config",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 2048,
        },
    ),
    "small-qwen2": (
        "Qwen2Config",
        {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
    ),
}
"""Models built from transformers' own configuration classes: everything runs without a hub."""


class LanguagePolicy(nn.Module):
    """A causal language model as a policy.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A causal language model of transformers, with or without a LoRA adapter.
    tokenizer : Tokenizer
        Its tokenizer.

    Raises
    ------
    ModelError
        If the model's output layer does something to the logits that Holdfast cannot follow.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.value_head: nn.Linear | None = None
        self._check_head()

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, below any adapter."""
        if isinstance(self.model, peft.PeftModel):
            return cast(PreTrainedModel, self.model.get_base_model())
        return cast(PreTrainedModel, self.model)

    @property
    def pad_id(self) -> int:
        """The token that fills short rows. Never counted, so which one it is changes nothing."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return int(candidate)
        return 0

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        statistics: bool = False,
        read: Callable[[Tensor, Head, Tensor], Any] | None = None,
    ) -> Any:
        """Log-probabilities of the labels, or whatever else is read from the hidden states.

        Parameters
        ----------
        input_ids : Tensor, (batch, time), int64
            Padded on the right. No attention mask is needed: the model is causal, so padding on the
            right cannot reach a token on its left.
        labels : Tensor, (batch, time), int64
            The token to be scored at each position, -100 where none is; not shifted.
        statistics : bool
            Also return entropy and correctness.
        read : callable, optional
            ``read(hidden, head, labels)`` with hidden states (batch, time - 1, width) and shifted
            labels (batch, time - 1). Called within the forward pass, so that data-parallel
            wrappers see what it uses.

        Returns
        -------
        TokenStatistics
            Fields of shape (batch, time - 1): entry ``t`` scores ``labels[:, t + 1]``. With
            ``read``, what it returned.
        """
        decoder = self.base.get_decoder()
        hidden = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        if read is not None:
            return read(hidden[:, :-1], self.head(), labels[:, 1:])
        return token_statistics(hidden[:, :-1], self.head(), labels[:, 1:], statistics=statistics)

    def add_value_head(self, heads: int = 1) -> None:
        """Give the policy an estimate of the return at every position: PPO's critic.

        A linear layer on the hidden states. Once is enough. A single head is 0 at first; several
        are small and unlike, for equal ones would stay equal.
        """
        if self.value_head is None:
            weight = self.head().weight
            self.value_head = nn.Linear(weight.shape[1], heads, device=weight.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            if heads > 1:
                draw = torch.Generator().manual_seed(0)
                small = torch.randn(heads, weight.shape[1], generator=draw) * 0.02
                with torch.no_grad():
                    self.value_head.weight.copy_(small)

    def head(self) -> Head:
        """The output layer, as the chunked projection reads it."""
        layer = self.base.get_output_embeddings()
        scale, softcap = _logit_scale(self.base), _softcap(self.base)
        return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)

    @contextlib.contextmanager
    def reference(self) -> Iterator[LanguagePolicy]:
        """This policy without its adapter, in evaluation mode.

        Without an adapter the policy itself is its reference, which is true only before the first
        update: reference log-probabilities are taken then, once, and cached.
        """
        training = self.training
        self.eval()
        without = (
            self.model.disable_adapter()
            if isinstance(self.model, peft.PeftModel)
            else contextlib.nullcontext()
        )
        try:
            with without, torch.no_grad():
                yield self
        finally:
            self.train(training)

    def fingerprint(self, *, adapter: bool = True) -> str:
        """Digest of weights and configuration: equal for equal policies, wherever they came from.

        Without the adapter it is that of the reference: one base, many adapters, one cache entry.

        The configuration counts because equal weights may be read differently: as four narrow
        attention heads or two wide ones, with one base of the rotary embedding or another.
        """
        config = {
            key: value
            for key, value in self.base.config.to_dict().items()
            if key not in _CONFIG_ORIGIN
        }
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if not adapter and "lora_" in name:
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory: recompute activations in the backward pass."""
        base = cast(Any, self.base)
        # The same under the name that transformers is moving to, and under the one it leaves.
        enable = getattr(base, "activation_checkpointing_enable", None)
        (enable or base.gradient_checkpointing_enable)({"use_reentrant": False})
        if isinstance(self.model, peft.PeftModel):
            base.enable_input_require_grads()

    def save_pretrained(self, folder: Path) -> None:
        """Write model (or adapter) and tokenizer in transformers' format."""
        cast(Any, self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _check_head(self) -> None:
        # Families scale or cap their logits in ways of their own. Instead of keeping a list of
        # families that would age, compare the head with the model's own logits on a few tokens.
        # Ours are followed by padding, which shows whether the model is causal as well.
        family = f"{type(self.base).__name__} (model type {self.base.config.model_type!r})"
        layer = self.base.get_output_embeddings()
        if isinstance(layer, BaseTunerLayer):
            raise ModelError(
                "policy.lora.target_modules adapts the output layer, which Holdfast evaluates in "
                "tiles from its weights alone: the adapter would not be trained. Leave the output "
                "layer out, as 'all-linear' does."
            )
        training = self.training
        self.eval()
        device = next(self.parameters()).device
        try:
            ids = torch.arange(16, device=device).unsqueeze(0) % layer.weight.shape[0]
            padded = nn.functional.pad(ids, (0, 8), value=self.pad_id)
            with torch.no_grad():
                ours = self(padded, padded).logps[:, :15]
                logits = self.base(input_ids=ids, use_cache=False).logits[:, :-1]
                theirs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ModelError(
                f"{family} cannot be evaluated through the hidden states of its decoder and its "
                f"output layer: {_first_line(error)}. Mend its configuration, or use another "
                "model family."
            ) from error
        self.train(training)
        worst = (ours - theirs).abs().max().item()
        if not worst <= (1e-3 if logits.dtype == torch.float32 else 0.1):
            raise ModelError(
                f"{family} is not causal, or its output layer changes the logits in a way that "
                f"Holdfast does not know (log-probabilities differ by {worst:.3g}). Use another "
                "model family."
            )


def load_policy(
    model_name_or_path: str,
    *,
    tokenizer: Tokenizer | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    config: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> LanguagePolicy:
    """Load or build a policy.

    Parameters
    ----------
    model_name_or_path : str
        The name of a preset, a local directory, or a hub id.
    tokenizer : Tokenizer, optional
        By default the model's own. Required for a preset.
    revision, attn_implementation
        As in ``from_pretrained``.
    dtype : str
        Of the weights: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    config : mapping, optional
        Entries of the preset's configuration to replace, such as ``hidden_size``.
    lora : mapping, optional
        Options of ``peft.LoraConfig``. ``None``: all weights are trained.
    seed : int
        Of the initial weights of a preset and of an adapter.

    Raises
    ------
    ModelError
        If there is no such model, no tokenizer, or a LoRA target matches nothing.
    """
    with _seeded(seed):
        if model_name_or_path in PRESETS:
            if tokenizer is None:
                raise ModelError(f"preset {model_name_or_path!r} needs a tokenizer: bytes or bpe")
            model = _build_preset(
                model_name_or_path, tokenizer, dtype, attn_implementation, config or {}
            )
        else:
            if config:
                raise ModelError(
                    f"policy.config changes the configuration of a preset, but "
                    f"{model_name_or_path!r} is not one of {', '.join(PRESETS)}"
                )
            model = _load_model(model_name_or_path, revision, dtype, attn_implementation)
            if tokenizer is None:
                tokenizer = load_tokenizer(model_name_or_path, revision)
            _check_vocabulary(model, tokenizer, model_name_or_path)
        adapted = model if lora is None else _add_lora(model, lora)
    return LanguagePolicy(adapted, tokenizer)


def load_tokenizer(name_or_path: str, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model directory or hub id.

    Raises
    ------
    ModelError
        If it has none.
    """
    try:
        if _is_generic(Path(name_or_path)):
            return PreTrainedTokenizerFast.from_pretrained(name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
        # For some families transformers makes up an empty one where there are no files.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("it knows nothing but special tokens")
        return tokenizer
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{name_or_path} has no tokenizer that can be loaded ({_first_line(error)}). Save one "
            "beside the model (tokenizer.json, tokenizer_config.json), or name one with "
            "policy.tokenizer."
        ) from error


def _is_generic(folder: Path) -> bool:
    """Whether a tokenizer was saved to be read back as it is.

    Beside the configuration of some families (Qwen2 among them), transformers ignores that and puts
    the family's own rules and tokens in place of the saved ones.
    """
    try:
        saved = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        generic = saved["tokenizer_class"] in ("TokenizersBackend", "PreTrainedTokenizerFast")
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return generic and (folder / "tokenizer.json").is_file()


def _build_preset(
    name: str,
    tokenizer: Tokenizer,
    dtype: str,
    attn_implementation: str | None,
    overrides: Mapping[str, Any],
) -> PreTrainedModel:
    class_name, values = PRESETS[name]
    config_class = getattr(transformers, class_name)
    known = set(config_class().to_dict())
    from_tokenizer = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    for key in overrides:
        if key in from_tokenizer:
            raise ModelError(f"policy.config.{key}: this entry follows from the tokenizer")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ModelError(
                f"policy.config.{key}: {class_name} has no such entry"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    try:
        return AutoModelForCausalLM.from_config(
            config_class(**{**values, **overrides}, **from_tokenizer),
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
        )
    except (StrictDataclassError, *_REFUSALS, ZeroDivisionError) as error:
        chosen = ", ".join(f"{key}: {value!r}" for key, value in overrides.items())
        raise ModelError(
            f"cannot build {class_name} with policy.config {{{chosen}}} and attn_implementation "
            f"{attn_implementation!r}: {_last_line(error)}"
        ) from error


def _load_model(
    name_or_path: str, revision: str | None, dtype: str, attn_implementation: str | None
) -> PreTrainedModel:
    if (Path(name_or_path) / "adapter_config.json").is_file():
        return _merged(name_or_path, revision, dtype, attn_implementation)
    looks_local = Path(name_or_path).is_absolute() or name_or_path.startswith(".")
    if looks_local and not Path(name_or_path).is_dir():
        what = "is a file" if Path(name_or_path).exists() else "does not exist"
        raise ModelError(f"model directory {name_or_path} {what}")
    try:
        AutoConfig.from_pretrained(name_or_path, revision=revision)
        result: Any = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            revision=revision,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except (OSError, SafetensorError, StrictDataclassError, *_REFUSALS) as error:
        near = difflib.get_close_matches(name_or_path, PRESETS, n=1)
        hint = f" Did you mean the preset {near[0]!r}?" if near else ""
        raise ModelError(
            f"cannot load model {name_or_path!r}: {_first_line(error)}.{hint} Expected a preset "
            f"({', '.join(PRESETS)}), a directory with config.json and weights, or a hub id."
        ) from error
    model, found = result
    unusable = [
        *(f"{name} is missing" for name in sorted(found["missing_keys"])),
        *(
            f"{name} has shape {tuple(saved)} instead of {tuple(expected)}"
            for name, saved, expected in sorted(found["mismatched_keys"])
        ),
    ]
    if unusable:
        more = f", and {len(unusable) - 3} more" if len(unusable) > 3 else ""
        raise ModelError(
            f"the weights of {name_or_path!r} are not those of its config.json: "
            f"{', '.join(unusable[:3])}{more}. They would be random."
        )
    return cast(PreTrainedModel, model)


def _merged(
    folder: str, revision: str | None, dtype: str, attn_implementation: str | None
) -> PreTrainedModel:
    """A base model with the adapter of a directory merged into it."""
    try:
        base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    except (ValueError, TypeError, OSError) as error:
        raise ModelError(f"cannot read the adapter in {folder}: {_first_line(error)}") from error
    if not base:
        raise ModelError(
            f"{folder} holds an adapter that does not say which model it belongs to: it was "
            "trained on a preset. Train it on a model directory, or train all weights."
        )
    model = _load_model(base, revision, dtype, attn_implementation)
    adapted: Any = peft.PeftModel.from_pretrained(model, folder)
    return cast(PreTrainedModel, adapted.merge_and_unload())


def _check_vocabulary(model: PreTrainedModel, tokenizer: Tokenizer, name: str) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, but {name} has embeddings for {rows}: "
            "they do not belong together"
        )


def _add_lora(model: PreTrainedModel, options: Mapping[str, Any]) -> nn.Module:
    targets = options.get("target_modules")
    names = [name for name, _ in model.named_modules()]
    output = model.get_output_embeddings()
    linear = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not output
        }
    )
    known = f"in {type(model).__name__}. Its linear layers: {', '.join(linear)}"
    for target in () if isinstance(targets, str | None) else targets:
        # As peft matches. It is content if one of several targets is found.
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = difflib.get_close_matches(target, linear, n=1)
            raise ModelError(
                f"policy.lora.target_modules: {target!r} matches nothing {known}"
                + (f". Did you mean {near[0]!r}?" if near else "")
            )
    try:
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    except (ValueError, re.error) as error:
        raise ModelError(
            f"policy.lora.target_modules {targets!r} matches nothing that can be adapted {known} "
            f"({_first_line(error)})"
        ) from error


def _logit_scale(model: PreTrainedModel) -> float:
    """The factor on the logits, under the names that model families give it."""
    config = model.config.get_text_config()
    kind = config.model_type
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        return float(config.logit_scale)
    if (
        getattr(config, "logits_scaling", None) is not None
    ):  # Granite divides, HyperCLOVA multiplies
        scaling = float(config.logits_scaling)
        return scaling if "hyperclova" in kind else 1.0 / scaling
    if getattr(config, "lm_head_multiplier", None) is not None:  # Falcon-H1
        return float(config.lm_head_multiplier)
    return 1.0


def _softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initialisers draw from torch's global generator: lend it a seed and give it back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


_CONFIG_ORIGIN = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
"""Entries of a configuration that tell where it came from, not what it computes."""

_REFUSALS = (ValueError, TypeError, KeyError, ImportError, RuntimeError)
"""What transformers raises for configurations and weights that it cannot use."""


def _first_line(error: BaseException) -> str:
    return (_said(error) or [type(error).__name__])[0].rstrip(".")


def _last_line(error: BaseException) -> str:
    """Validation errors name the field last."""
    return (_said(error) or [type(error).__name__])[-1]


def _said(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()]
