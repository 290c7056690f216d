"""The attention options in a config, and the configs that are refused.

A config is the dict of config.json, of any version: `rope_theta` and `rope_scaling` became `rope_parameters`, and
`sliding_window_pattern` became `layer_types`.
"""

from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal, NamedTuple

from funcmha import _check
from funcmha.norms import RMSNorm

from .defaults import DEFAULTS, SHARED, YARN

# Where a family differs from Llama.
NORM_OFFSET = {"qwen3": 0.0, "qwen3_moe": 0.0, "gemma3_text": 1.0}  # families with norms of queries and keys
SOME_LAYERS = ("gemma2", "gemma3_text", "qwen2", "qwen2_moe", "qwen3", "gpt_oss", "smollm3", "cohere2")  # have windows
ALL_LAYERS = ("mistral", "mixtral", "qwen3_moe", "phi3", "starcoder2")  # have windows, if the config has one
INTERLEAVED = ("cohere", "cohere2", "glm4")  # feature 2i is paired with 2i + 1
PARTIAL = ("phi3", "glm4", "stablelm")  # may rotate a part of the features
INPUTS = ("q_proj.b", "k_proj.b", "v_proj.b")
ALL_FOUR = (*INPUTS, "out_proj.b")
BIASES: dict[str, tuple[str | None, tuple[str, ...]]] = {  # the switch, None for always, and its biases
    "gpt2": (None, ALL_FOUR),
    "mistral": (None, ()),
    "mixtral": (None, ()),
    "phi3": (None, ()),
    "qwen2": (None, INPUTS),
    "qwen2_moe": ("qkv_bias", INPUTS),
    "starcoder2": ("use_bias", ALL_FOUR),
    "glm4": ("attention_bias", INPUTS),
    "stablelm": ("use_qkv_bias", INPUTS),
}
KINDS_OF_PHI3 = {
    "default": "default",
    "longrope": "longrope",
    "su": "longrope",
    "yarn": "longrope",
}  # old name: current name


class Sizes(NamedTuple):
    """The sizes that the tensors must have."""

    H: int  # query heads
    K: int  # key/value heads
    D: int  # width of a head
    C: int  # width of input and output


def read(config: Any, n: int, *, cross: bool = False) -> dict[str, Any]:
    """The config as a dict with all defaults; of a model of text and images, that of its text part."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a config of transformers or a dict, got {type(config).__name__}")
    given = config.get("text_config") or config
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ValueError(f"config must have a model_type of {', '.join(DEFAULTS)}, got {kind!r}")
    c = SHARED | DEFAULTS[kind] | dict(given)
    _check_layer(c, n)
    _check_flags(c)
    _check.flag("cross", cross)
    if cross and not (kind == "gpt2" and c["add_cross_attention"]):
        raise ValueError(f"cross must be False but for gpt2 with add_cross_attention, got {kind} without")
    return c


def sizes(c: dict[str, Any]) -> Sizes:
    """H, K, D, C"""
    fused = c["model_type"] == "gpt2"
    names = ("n_head", "n_embd") if fused else ("num_attention_heads", "hidden_size")
    H, C = (_check.integer(name, c[name], 1) for name in names)
    if fused:
        _check_divides(H, C)
        return Sizes(H, H, C // H, C)
    given = ((name, c[name]) for name in ("num_key_value_heads", "head_dim"))
    K, D = (None if n is None else _check.integer(name, n, 1) for name, n in given)
    return Sizes(H, K or H, D or C // H, C)


def scale(c: dict[str, Any], n: int) -> float:
    """The scale of the scores."""
    if c["model_type"] == "granite":
        return _check.number("attention_multiplier", c["attention_multiplier"])
    width = c["query_pre_attn_scalar"] or sizes(c).D
    if c["model_type"] != "gpt2":
        return float(width**-0.5)
    plain = width**-0.5 if c["scale_attn_weights"] else 1.0
    return float(plain / (n + 1) if c["scale_attn_by_inverse_layer_idx"] else plain)


def norm(c: dict[str, Any]) -> RMSNorm | None:
    """The norm of queries and keys."""
    offset = NORM_OFFSET.get(c["model_type"])
    return None if offset is None else RMSNorm(c["rms_norm_eps"], offset)


def leaves(c: dict[str, Any]) -> tuple[str, ...]:
    """The leaves of a layer of this config."""
    kind = c["model_type"]
    switch, biases = BIASES.get(kind, ("attention_bias", ALL_FOUR))
    biases = biases if switch is None or c[switch] else ()
    norms = ("q_norm.w", "k_norm.w") if kind in NORM_OFFSET else ()
    sink = ("sink.w",) if kind == "gpt_oss" else ()
    return ("q_proj.w", "k_proj.w", "v_proj.w", "out_proj.w", *biases, *sink, *norms)


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────────────────


def slides(c: dict[str, Any], n: int) -> bool:
    """Whether layer n has a sliding window."""
    kind, types = c["model_type"], c["layer_types"]
    if kind not in SOME_LAYERS:
        found = kind in ALL_LAYERS and bool(c["use_sliding_window"]) and c["sliding_window"] is not None
        if types is not None and types[n] != (does := "sliding_attention" if found else "full_attention"):
            raise ValueError(
                f"layer_types must have {does} for layer {n}, as {kind} does not read it, got {types[n]!r}"
            )
        return found
    if types is None:
        return _slides_by_number(c, n)
    if types[n] not in ("sliding_attention", "full_attention"):
        raise ValueError(f"layer_types must have sliding_attention or full_attention for layer {n}, got {types[n]!r}")
    return bool(types[n] == "sliding_attention")


def _slides_by_number(c: dict[str, Any], n: int) -> bool:
    """As the config class decides by the number of the layer, where there are no layer_types."""
    kind, on = c["model_type"], bool(c["use_sliding_window"]) and c["sliding_window"] is not None
    if kind in ("gemma2", "gpt_oss"):
        return n % 2 == 0
    if kind in ("gemma3_text", "cohere2"):
        return bool((n + 1) % c["sliding_window_pattern"])
    if kind == "smollm3":
        return on and not _has_rope(c, n)
    if kind == "qwen2_moe":
        return bool(on and n % 2 == 0 and n < c["max_window_layers"])
    return bool(on and n >= c["max_window_layers"])


def window(c: dict[str, Any], n: int) -> tuple[int | None, int | None]:
    """left, right of `masks.window`"""
    both = c["use_bidirectional_attention"]
    if not slides(c, n):
        return None, None if both else 0
    keys, least = c["sliding_window"] if c["use_sliding_window"] else None, 0 if both else 1
    if isinstance(keys, bool) or not isinstance(keys, Integral) or keys < least:
        raise ValueError(f"sliding_window must be {least} or more, as layer {n} is of sliding_attention, got {keys!r}")
    keys = int(keys)
    return (keys // 2, keys // 2) if both else (keys - 1, 0)  # Gemma 3: the keys // 2 + 1 nearest on either side


# ── rotary positions ─────────────────────────────────────────────────────────────────────────────────────────────


def pairs(c: dict[str, Any]) -> Literal["half", "interleaved"]:
    """Which features are paired."""
    return "interleaved" if c["model_type"] in INTERLEAVED else "half"


def rope(c: dict[str, Any], n: int) -> dict[str, Any] | None:
    """The parameters of rotary positions in layer n, in the current form; None where it has none."""
    kind = c["model_type"]
    if not _has_rope(c, n):
        return None
    given, theta = c["rope_scaling"] or c["rope_parameters"], c["rope_theta"]
    if kind == "gemma3_text":
        given, theta = _rope_of_gemma3(c, "sliding_attention" if slides(c, n) else "full_attention")
    elif not given and kind == "gpt_oss":
        given = YARN
    found = {"rope_theta": theta, "rope_type": (given or {}).get("type", "default")} | dict(given or {})
    context = c.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    found["original_max_position_embeddings"] = context or c["max_position_embeddings"]
    found["max_position_embeddings"] = c["max_position_embeddings"]
    if found.get("partial_rotary_factor") is None:
        found["partial_rotary_factor"] = 1.0 if c["partial_rotary_factor"] is None else c["partial_rotary_factor"]
    if kind == "phi3":
        found["rope_type"] = _kind_of_phi3(found["rope_type"])
    part = found["partial_rotary_factor"]
    if part != 1.0 and kind not in PARTIAL and found["rope_type"] != "proportional":
        raise ValueError(f"partial_rotary_factor must be 1, as {kind} rotates all features, got {part}")
    return found


def _has_rope(c: dict[str, Any], n: int) -> bool:
    """Whether layer n has rotary positions."""
    if c["model_type"] == "smollm3":
        listed = c["no_rope_layers"]
        return bool((n + 1) % c["no_rope_layer_interval"] if listed is None else listed[n])
    return c["model_type"] != "gpt2" and (c["model_type"] != "cohere2" or slides(c, n))


def _kind_of_phi3(kind: Any) -> str:
    if kind not in KINDS_OF_PHI3:
        raise ValueError(f"rope_type must be {', '.join(KINDS_OF_PHI3)} for phi3, got {kind!r}")
    return KINDS_OF_PHI3[kind]


def _rope_of_gemma3(c: dict[str, Any], kind: str) -> tuple[dict[str, Any] | None, float]:
    """The parameters of layers of this kind, and the default theta; scaling is for full attention only."""
    local = kind == "sliding_attention"
    theta = c["rope_local_base_freq"] if local else c["rope_theta"]
    nested = c["rope_parameters"]
    if nested and not nested.keys() & {"sliding_attention", "full_attention"}:
        raise ValueError(f"rope_parameters must be those of each layer type for gemma3_text, got {', '.join(nested)}")
    own = (nested or {}).get(kind) or {}
    own = own if local else own | (c["rope_scaling"] or {})
    if not own.get("truncate", True):
        raise ValueError(f"truncate must be left out for gemma3_text, which ignores it, got {own['truncate']!r}")
    return own, theta


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def _check_divides(H: int, C: int) -> None:
    if C % H:
        raise ValueError(f"n_embd must be a multiple of n_head={H}, got {C}")


def _check_layer(c: dict[str, Any], n: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise TypeError(f"n must be the number of a layer, got {n!r}")
    layers: Any = c.get("n_layer" if c["model_type"] == "gpt2" else "num_hidden_layers")
    layers = layers if c["layer_types"] is None else len(c["layer_types"])
    layers = None if layers is None else _check.integer("num_hidden_layers", layers, 0)
    if int(n) < 0 or (layers is not None and int(n) >= layers):
        upto = "or more" if layers is None else f"… {layers - 1}, as in the config"
        raise IndexError(f"n must be in 0 {upto}, got {n}")


def _check_flags(c: dict[str, Any]) -> None:
    """Options that transformers reads and ignores, and those that funcmha does not support."""
    kind = c["model_type"]
    if c["use_bidirectional_attention"] and kind != "gemma3_text":
        raise ValueError(f"use_bidirectional_attention must be off for {kind}, whose masks are always causal, got on")
    if c["attn_logit_softcapping"] is not None and kind != "gemma2":
        got = c["attn_logit_softcapping"]
        raise ValueError(f"attn_logit_softcapping must be None for {kind}, which does not apply it, got {got}")
    if c["clip_qkv"] is not None and kind == "olmo":
        raise ValueError(f"clip_qkv must be None, as funcmha does not clip projections, got {c['clip_qkv']}")
    for name, only in (("use_qk_norm", "cohere"), ("qk_layernorm", "stablelm")):
        if c[name] and kind == only:
            raise ValueError(f"{name} must be off, as funcmha does not support a norm for each head, got {c[name]!r}")
