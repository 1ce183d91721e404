"""`config.json` of an export: what the authors' code reads, and our own settings beside it.

The Hugging Face libraries keep keys that they do not know, so that one file serves both.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lazyattn.errors import InputError, bad_value
from lazyattn.experiment import model_from_dict
from lazyattn.model.config import ModelConfig
from lazyattn.model.heads import global_heads
from lazyattn.pretrained import hub
from lazyattn.pretrained.names import BIAS, SLOPE, TAU

FILE = "config.json"
_OURS = "lazyattn"
_FORMAT = 1

# Settings of their model that ours does not have, and their values that ours does.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "window_size": (None,),
    "hidden_act": (None, "swish", "silu"),
    "attention_normalization": (None, "softmax"),
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What an export says of a model beside its parameters.

    Attributes:
      model: what the model is.
      sequence_length: tokens of the rows it was trained on.
      step: steps it was trained for; None: not known.
      tokens: tokens it was trained on, rows filled or not; None: not known.
      data: what text that was; None: not known.
      validation_loss: nats a token, as the run's log has it; None: not known.
      validation_tokens: tokens that it is over; None: not known.
    """

    model: ModelConfig
    sequence_length: int
    step: int | None = None
    tokens: int | None = None
    data: str | None = None
    validation_loss: float | None = None
    validation_tokens: int | None = None


def as_settings(facts: Facts, dtype: str) -> dict[str, Any]:
    """Returns the content of `config.json`."""
    model, attention = facts.model, facts.model.attention
    lazy = attention.has_bias or attention.has_offset
    theirs = {
        "model_type": "swat" if lazy else "transformer",
        "architectures": ["SWATForCausalLM" if lazy else "TransformerForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.kv_heads,
        "intermediate_size": model.hidden_width,
        "hidden_act": "swish",
        "norm_eps": model.norm_eps,
        "qk_norm": attention.qk_norm,
        "qkv_bias": attention.qkv_bias,
        "rope_theta": attention.rope_base,
        "max_position_embeddings": facts.sequence_length,
        # Input and output differ by a factor there, so that none is the other.
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    if attention.has_bias:
        theirs["max_bias_length"] = attention.bias_width
    return theirs | {_OURS: _ours(facts)}


def as_transformers_settings(facts: Facts, dtype: str, code: str) -> dict[str, Any]:
    """Returns the content of `config.json` for transformers with our own modeling file.

    Args:
      facts: what is known of the model.
      dtype: of its matrices.
      code: name of the modeling file, without `.py`.
    """
    model, attention = facts.model, facts.model.attention
    return {
        "architectures": ["LazyAttnForCausalLM"],
        "model_type": _OURS,
        "auto_map": {
            "AutoConfig": f"{code}.LazyAttnConfig",
            "AutoModel": f"{code}.LazyAttnModel",
            "AutoModelForCausalLM": f"{code}.LazyAttnForCausalLM",
        },
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.hidden_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": facts.sequence_length,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "global_heads": np.flatnonzero(global_heads(attention)).tolist(),
        "torch_dtype": dtype,
        _OURS: _ours(facts),
    }


def is_for_transformers(settings: Mapping[str, Any]) -> bool:
    """Returns whether a `config.json` is one of `as_transformers_settings`."""
    return settings.get("model_type") == _OURS and _OURS in settings


def _ours(facts: Facts) -> dict[str, Any]:
    # Which kernel it ran on is no part of what it is.
    attention = dataclasses.replace(facts.model.attention, implementation=None)
    model = dataclasses.replace(facts.model, attention=attention)
    return {"format": _FORMAT, **dataclasses.asdict(facts), "model": dataclasses.asdict(model)}


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the content of a `config.json`.

    Raises:
      InputError: if there is none, or it is no JSON object.
    """
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        adapter = (path.parent / "adapter_config.json").is_file()
        more = "; this one is an adapter, to be merged into its model first" if adapter else ""
        raise InputError(
            f"{str(path.parent)!r} has no {FILE}, but it must be the folder of an export or of a"
            f" hub's model{more}."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} can't be read as JSON ({error}).") from None
    if not isinstance(settings, dict):
        raise InputError(f"{str(path)!r} must be a JSON object.")
    return settings


def as_facts(
    settings: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]] | None = None
) -> Facts:
    """Returns what a `config.json` says.

    Args:
      settings: its content, of an export of ours, of the authors' code or of a hub's model.
      tensors: shapes of the safetensors beside it, whose names tell the variant where
        the settings are not ours.

    Raises:
      InputError: for settings that are missing or that no model of ours has.
    """
    ours = settings.get(_OURS)
    if hub.is_hub(settings):
        return Facts(hub.model_config(settings), hub.sequence_length(settings))
    if ours is None:
        return _from_theirs(settings, {} if tensors is None else tensors)
    if not isinstance(ours, Mapping) or ours.get("format") != _FORMAT:
        found = ours.get("format") if isinstance(ours, Mapping) else ours
        raise bad_value(f"{FILE}'s {_OURS}.format", found, f"{_FORMAT} for this version")
    known = {field.name for field in dataclasses.fields(Facts)} - {"model"}
    if not isinstance(ours.get("model"), Mapping):
        raise bad_value(f"{FILE}'s {_OURS}.model", ours.get("model"), "a group of settings")
    model = model_from_dict(ours["model"])
    return Facts(model=model, **{name: ours[name] for name in known if name in ours})


def _from_theirs(settings: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Facts:
    for name, allowed in _ONLY.items():
        if settings.get(name) not in allowed:
            raise bad_value(f"{FILE}'s {name}", settings[name], f"{allowed[-1]!r}")
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads")
    for name in required:
        if not isinstance(settings.get(name), int):
            raise bad_value(f"{FILE}'s {name}", settings.get(name), "a whole number")
    width = settings["hidden_size"]
    has_bias, has_offset = (_has(tensors, name) for name in (BIAS, TAU))
    variant = {
        (True, True): "lazy",
        (True, False): "biased_softmax",
        (False, True): "lazy_no_bias",
        (False, False): "softmax",
    }[has_bias, has_offset]
    hidden = settings.get("intermediate_size")
    if hidden is None:
        hidden = -(-int(2 * width * (settings.get("hidden_ratio") or 4) / 3) // 256) * 256
    attention = {
        "variant": variant,
        "num_heads": settings["num_heads"],
        "num_kv_heads": settings.get("num_kv_heads"),
        "rope_base": settings.get("rope_theta") or 10_000.0,
        "qk_norm": bool(settings.get("qk_norm")),
        "qkv_bias": bool(settings.get("qkv_bias")),
        "bias_width": settings.get("max_bias_length", 1024),
        "bias_kind": "table",
        "bias_init": "normal",
        "bias_tail": _has(tensors, SLOPE),
    }
    model = {
        "vocab_size": settings["vocab_size"],
        "width": width,
        "num_layers": settings["num_hidden_layers"],
        "mlp_width": hidden,
        "norm_eps": settings.get("norm_eps", 1e-6),
        # One table for both ways would be scaled in ours and not in theirs.
        "tie_embeddings": False,
        "attention": attention,
    }
    checked = model_from_dict(model)
    return Facts(model=checked, sequence_length=settings.get("max_position_embeddings") or 2048)


def is_tied(settings: Mapping[str, Any]) -> bool:
    """Returns whether a model of theirs has one table for input and output."""
    return _OURS not in settings and bool(settings.get("tie_word_embeddings"))


def _has(tensors: Mapping[str, tuple[int, ...]], name: str) -> bool:
    return any(found.endswith("." + name) for found in tensors)


def differences(facts: Facts) -> list[str]:
    """Returns why the authors' layers, with these tensors, would be another function.

    One sentence each; none if they would be the same.
    """
    model, attention = facts.model, facts.model.attention
    found = []
    if attention.has_tail:
        found.append(
            f"Their bias is 0 from distance {attention.bias_width:,} on; this model's goes on along"
            f" {SLOPE}, which they have no place for (`--bias_length` writes it out)."
        )
    if attention.variant in ("lazy_constant_offset", "lazy_length_offset", "lazy_renormalized"):
        found.append(f"They have no `{attention.variant}`.")
    if attention.has_bias and not attention.has_offset:
        found.append("Their tau must be set to 0: this model has none.")
    if attention.has_offset and not attention.has_bias:
        found.append("Their learnable_bias_diagonals must be set to 0: this model has none.")
    if not attention.rope:
        found.append("They rotate queries and keys; this model does not.")
    elif attention.num_global_heads and not attention.global_rope:
        found.append("They rotate queries and keys of all heads; this model not in global ones.")
    if attention.window is not None:
        found.append(
            f"They have no window; this model's local heads see {attention.window:,} keys."
        )
    if attention.rope and attention.rope_scaling != "none":
        found.append(
            f"They don't scale RoPE's angles; this model's are ({attention.rope_scaling})."
        )
    if attention.output_gate:
        found.append("They have no gate on the output; this model's is attn.g_proj.weight.")
    if attention.qk_norm:
        found.append(
            f"Their norms of queries and keys have an epsilon of their own, this model's is"
            f" {model.norm_eps:g}."
        )
    if model.head_dim * attention.num_heads != model.width:
        found.append(
            f"Their heads have {model.width} / {attention.num_heads} dimensions, this model's"
            f" {model.head_dim}."
        )
    return found
