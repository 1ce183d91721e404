"""Models of the Hugging Face hub: what their `config.json` says, as settings of ours.

Families: Llama 2 and 3 (SmolLM is one), Mistral, Qwen2 and 2.5, Qwen3. Each is our model of
variant "softmax" whose embeddings come in unscaled. What ours can't be is refused by name.

Source: the meaning and the defaults of the keys are those of the transformers library, in its
versions 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
"""

from collections.abc import Mapping
from typing import Any

from lazyattn.errors import InputError, bad_value, require
from lazyattn.experiment import model_from_dict
from lazyattn.model.config import ModelConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Why others are refused, of those that are asked for most.
_OTHERS = {
    "olmo2": "it norms what attention and MLP give, and whole queries and keys, not heads",
    "olmo3": "it norms what attention and MLP give, and whole queries and keys, not heads",
    "smollm3": "some of its layers have no RoPE",
    "mixtral": "its MLP is a mixture of experts",
    "qwen2_moe": "its MLP is a mixture of experts",
    "qwen3_moe": "its MLP is a mixture of experts",
    "gemma": "its norms and its activation are others",
    "gemma2": "its norms, its activation and its capped logits are others",
    "phi3": "its queries, keys and values are one matrix",
}
# Values that change nothing of the function, of keys that otherwise would. Of all families.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "rope_interleaved": (None, False),
    "is_encoder_decoder": (None, False),
}
# Of scaled angles: theirs -> ours.
_LLAMA3 = {
    "original_max_position_embeddings": "rope_length",
    "low_freq_factor": "rope_low",
    "high_freq_factor": "rope_high",
}
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_MISTRAL_WINDOW = 4096  # where `sliding_window` is not given


def is_hub(settings: Mapping[str, Any]) -> bool:
    """Returns whether a `config.json` is of a hub's model, supported or not.

    Neither ours, nor the authors', who call the number of heads `num_heads`.
    """
    if "lazyattn" in settings or "num_heads" in settings:
        return False
    # Models of text and pictures have theirs in a group.
    groups = {"num_attention_heads", "text_config"}
    return settings.get("model_type") in FAMILIES or not groups.isdisjoint(settings)


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Returns the model that a hub's `config.json` describes.

    Raises:
      InputError: naming the first key that is missing or that no model of ours can be.
    """
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        because = f", since {_OTHERS[str(family)]}" if str(family) in _OTHERS else ""
        raise bad_value(_key("model_type"), family, f"one of {', '.join(FAMILIES)}{because}")
    if settings.get("quantization_config"):
        method = settings["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, Mapping) else method
        raise InputError(
            f"{_key('quantization_config')} says {method!r}, but the weights must not be quantized;"
            " take the folder of the model that it was made from."
        )
    for name, allowed in _ONLY.items():
        if settings.get(name) not in allowed:
            raise bad_value(_key(name), settings[name], f"{allowed[-1]!r}: ours has no other")
    heads = _whole(settings, "num_attention_heads")
    attention = {
        "variant": "softmax",
        "num_heads": heads,
        "num_kv_heads": heads,
        "qk_norm": family == "qwen3",
        "qkv_bias": family == "qwen2",
        "window": _window(settings, family),
        **_rope(settings),
    }
    if family != "llama" or settings.get("num_key_value_heads") is not None:
        attention["num_kv_heads"] = _whole(settings, "num_key_value_heads")
    if settings.get("head_dim") is not None:
        attention["head_dim"] = _whole(settings, "head_dim")
    elif family == "qwen3":
        attention["head_dim"] = 128  # its own default, whatever the width
    dtype = settings.get("dtype", settings.get("torch_dtype"))
    if dtype not in (None, *_DTYPES):
        words = f"one of {', '.join(_DTYPES)}, in which weights are that are not quantized"
        raise bad_value(_key("dtype"), dtype, words)
    return model_from_dict(
        {
            "vocab_size": _whole(settings, "vocab_size"),
            "width": _whole(settings, "hidden_size"),
            "num_layers": _whole(settings, "num_hidden_layers"),
            "mlp_width": _whole(settings, "intermediate_size"),
            "norm_eps": _number(settings, "rms_norm_eps", 1e-6),
            "tie_embeddings": bool(settings.get("tie_word_embeddings", False)),
            "scale_embedding": False,
            "compute_dtype": "float32" if dtype in (None, "float32") else "bfloat16",
            "attention": attention,
        }
    )


def sequence_length(settings: Mapping[str, Any]) -> int:
    """Returns how long rows may be, as a hub's `config.json` says."""
    return _whole(settings, "max_position_embeddings")


def as_settings(config: ModelConfig, length: int, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of a model that is one of a family.

    Args:
      config: the model, for which `family_of` is not None.
      length: tokens that a row may have.
      dtype: of the tensors.
    """
    attention = config.attention
    family = family_of(config)
    assert family is not None
    found: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": attention.rope_base,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }
    if attention.head_dim is not None or family == "qwen3":
        found["head_dim"] = config.head_dim
    if attention.rope_scaling != "none":
        names = {"factor": "rope_factor"}
        names |= _LLAMA3 if attention.rope_scaling == "llama3" else {}
        scaled = {theirs: getattr(attention, ours) for theirs, ours in names.items()}
        found["rope_scaling"] = {"rope_type": attention.rope_scaling, **scaled}
    if family == "mistral":
        found["sliding_window"] = attention.window
    elif family != "llama":
        windowed = attention.window is not None
        found |= {"use_sliding_window": windowed, "sliding_window": attention.window}
        found["max_window_layers"] = 0 if windowed else config.num_layers
    return found


def family_of(config: ModelConfig) -> str | None:
    """Returns the family that a model is one of; None: no family has all that it has."""
    attention = config.attention
    if (
        attention.variant != "softmax"
        or not attention.rope
        or attention.output_gate
        or attention.by_group
        or (attention.qkv_bias and attention.qk_norm)
        or (config.tie_embeddings and config.scale_embedding)
    ):
        return None
    if attention.qkv_bias:
        return "qwen2"
    if attention.qk_norm:
        return "qwen3"
    return "llama" if attention.window is None else "mistral"


def _key(name: str) -> str:
    return f"config.json's {name}"


def _whole(settings: Mapping[str, Any], name: str) -> int:
    value = settings.get(name)
    if type(value) is not int or value < 1:
        raise bad_value(_key(name), value, "a whole number from 1 on")
    return value


def _number(settings: Mapping[str, Any], name: str, default: float) -> float:
    value = settings.get(name, default)
    if type(value) not in (int, float):
        raise bad_value(_key(name), value, "a number")
    return float(value)


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns RoPE's settings: its base, and how its angles are scaled."""
    given = settings.get("rope_parameters") or {}
    scaling = given or settings.get("rope_scaling") or {}
    name = "rope_parameters" if given else "rope_scaling"
    if not isinstance(scaling, Mapping):
        raise bad_value(_key(name), scaling, "a group of settings")
    base = _number(scaling if "rope_theta" in scaling else settings, "rope_theta", 10_000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in (None, "default"):
        return {"rope_base": base}
    if kind not in ("linear", "llama3"):
        raise bad_value(_key(f"{name}.rope_type"), kind, "default, linear or llama3")
    partial = scaling.get("partial_rotary_factor")
    require(partial in (None, 1.0), _key(f"{name}.partial_rotary_factor"), partial, "1.0")
    names = {"factor": "rope_factor"} | (_LLAMA3 if kind == "llama3" else {})
    for key in names:
        if type(scaling.get(key)) not in (int, float):
            raise bad_value(_key(f"{name}.{key}"), scaling.get(key), "a number")
    scaled = {ours: scaling[theirs] for theirs, ours in names.items()}
    return {"rope_base": base, "rope_scaling": kind, **scaled}


def _window(settings: Mapping[str, Any], family: str) -> int | None:
    """Returns how many keys a token sees; None: all. All layers must agree."""
    default = _MISTRAL_WINDOW if family == "mistral" else None
    window = settings.get("sliding_window", default)
    if family == "llama" or (family != "mistral" and not settings.get("use_sliding_window")):
        window = None
    layers = _whole(settings, "num_hidden_layers")
    kinds = settings.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise bad_value(_key("layer_types"), kinds, f"a list of {layers}, as num_hidden_layers")
        found = sorted(set(map(str, kinds)))
        if len(found) > 1 or not set(found) <= {"full_attention", "sliding_attention"}:
            raise InputError(
                f"{_key('layer_types')} has {', '.join(found)}, but all layers of ours see as far:"
                " they must all be full_attention, or all sliding_attention."
            )
        if found == ["full_attention"]:
            window = None
    elif window is not None and family != "mistral":
        # The first of them see all.
        whole = settings.get("max_window_layers", 28)
        if type(whole) is not int:
            raise bad_value(_key("max_window_layers"), whole, "a whole number")
        if whole >= layers:
            window = None
        elif whole > 0:
            raise bad_value(
                _key("max_window_layers"),
                whole,
                f"0, or num_hidden_layers = {layers}, since all layers of ours see as far",
            )
    if window is not None and (type(window) is not int or window < 1):
        raise bad_value(_key("sliding_window"), window, "null or a whole number from 1 on")
    return window
