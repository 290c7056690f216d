"""What a config says of one attention layer, each family's defaults where it is silent, and what is refused.

A config is read as the dict of config.json, of any age: `rope_theta` and `rope_scaling` became `rope_parameters`, and
`sliding_window_pattern` became `layer_types`.
"""

from collections.abc import Mapping
from numbers import Integral
from typing import Any, NamedTuple

from funcmha import _check
from funcmha.norms import Rms

# What the config classes of transformers put where config.json has nothing; None is nothing there too.
SHARED = {
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "head_dim": None,
    "layer_types": None,
    "max_window_layers": None,
    "num_key_value_heads": None,
    "query_pre_attn_scalar": None,
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "sliding_window_pattern": None,
    "use_bidirectional_attention": False,
    "use_sliding_window": True,
}
GEMMA_2 = {
    "attn_logit_softcapping": 50.0,
    "head_dim": 256,
    "hidden_size": 2304,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
}
QWEN_2 = {
    "hidden_size": 4096,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 768,
        "n_head": 12,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    },
    "llama": {"hidden_size": 4096, "max_position_embeddings": 2048, "num_attention_heads": 32},
    "gemma": {
        "head_dim": 256,
        "hidden_size": 3072,
        "max_position_embeddings": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "gemma2": GEMMA_2,
    "gemma3_text": GEMMA_2
    | {
        "attn_logit_softcapping": None,
        "max_position_embeddings": 131072,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
        "sliding_window_pattern": 6,
    },
    "qwen2": QWEN_2,
    "qwen3": QWEN_2 | {"head_dim": 128},
    "gpt_oss": {
        "attention_bias": True,
        "head_dim": 64,
        "hidden_size": 2880,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
    },
}
NORM_OFFSET = {"qwen3": 0.0, "gemma3_text": 1.0}  # of the families that have norms of queries and keys


class Sizes(NamedTuple):
    """The sizes that the tensors must have."""

    H: int  # query heads
    K: int  # key/value heads
    D: int  # width of a head
    C: int  # width of input and output


def read(config: Any, n: int) -> dict[str, Any]:
    """The config as a dict in which nothing is missing, of the text part of a model of text and images."""
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
    return c


def sizes(c: dict[str, Any]) -> Sizes:
    """H, K, D, C"""
    fused = c["model_type"] == "gpt2"
    names = ("n_head", "n_embd") if fused else ("num_attention_heads", "hidden_size")
    H, C = (_check.integer(name, c[name], 1) for name in names)
    if fused:
        return Sizes(H, H, C // H, C)
    given = ((name, c[name]) for name in ("num_key_value_heads", "head_dim"))
    K, D = (None if n is None else _check.integer(name, n, 1) for name, n in given)
    return Sizes(H, K or H, D or C // H, C)


def scale(c: dict[str, Any], n: int) -> float:
    """What the scores are multiplied by."""
    width = c["query_pre_attn_scalar"] or sizes(c).D
    if c["model_type"] != "gpt2":
        return float(width**-0.5)
    plain = width**-0.5 if c["scale_attn_weights"] else 1.0
    return float(plain / (n + 1) if c["scale_attn_by_inverse_layer_idx"] else plain)


def norm(c: dict[str, Any]) -> Rms | None:
    """The norm of queries and keys."""
    offset = NORM_OFFSET.get(c["model_type"])
    return None if offset is None else Rms(c["rms_norm_eps"], offset)


def slides(c: dict[str, Any], n: int) -> bool:
    """Whether layer n has a sliding window."""
    if c["layer_types"] is not None:
        kind = c["layer_types"][n]
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(f"layer_types must have sliding_attention or full_attention for layer {n}, got {kind!r}")
        return bool(kind == "sliding_attention")
    if c["sliding_window_pattern"] is not None:
        return bool((n + 1) % c["sliding_window_pattern"])
    if c["max_window_layers"] is None or not c["use_sliding_window"] or c["sliding_window"] is None:
        return False
    return bool(n >= c["max_window_layers"])


def reach(c: dict[str, Any], n: int) -> tuple[int | None, int | None]:
    """left, right of `masks.window`"""
    both = c["use_bidirectional_attention"]
    if not slides(c, n):
        return None, None if both else 0
    W = c["sliding_window"] if c["use_sliding_window"] else None
    if isinstance(W, bool) or not isinstance(W, Integral) or W < 1:
        raise ValueError(f"sliding_window must be 1 or more, as layer {n} is of sliding_attention, got {W!r}")
    W = int(W)
    return (W // 2, W // 2) if both else (W - 1, 0)  # Gemma 3 has its W // 2 + 1 nearest on either side


def rope(c: dict[str, Any], n: int) -> dict[str, Any] | None:
    """The parameters of rotary positions in layer n, in the form of today; None where there are no rotary positions."""
    if c["model_type"] == "gpt2":
        return None
    given, theta = c["rope_scaling"] or c["rope_parameters"], c["rope_theta"]
    if c["model_type"] == "gemma3_text":
        given, theta = _rope_of_gemma3(c, "sliding_attention" if slides(c, n) else "full_attention")
    elif not given and c["model_type"] == "gpt_oss":
        given = YARN
    found = {"rope_theta": theta, "rope_type": (given or {}).get("type", "default")} | dict(given or {})
    context = c.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    found["original_max_position_embeddings"] = context or c["max_position_embeddings"]
    found["max_position_embeddings"] = c["max_position_embeddings"]
    part = found.get("partial_rotary_factor", c.get("partial_rotary_factor"))
    if part not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor must be 1, as {c['model_type']} turns all features, got {part}")
    return found


def _rope_of_gemma3(c: dict[str, Any], kind: str) -> tuple[dict[str, Any] | None, float]:
    """What is given for layers of this kind, and the theta where that has none: scaling is for full attention alone."""
    local = kind == "sliding_attention"
    theta = c["rope_local_base_freq"] if local else c["rope_theta"]
    nested = c["rope_parameters"]
    if nested and not nested.keys() & {"sliding_attention", "full_attention"}:
        raise ValueError(f"rope_parameters must be those of each layer type for gemma3_text, got {', '.join(nested)}")
    own = (nested or {}).get(kind) or {}
    own = own if local else own | (c["rope_scaling"] or {})
    if not own.get("truncate", True):
        raise ValueError("truncate must be left out for gemma3_text, which does not find it where it stands")
    return own, theta


def _check_layer(c: dict[str, Any], n: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise TypeError(f"n must be the number of a layer, got {n!r}")
    layers: Any = c.get("n_layer" if c["model_type"] == "gpt2" else "num_hidden_layers")
    layers = layers if c["layer_types"] is None else len(c["layer_types"])
    layers = None if layers is None else _check.integer("num_hidden_layers", layers, 0)
    if int(n) < 0 or (layers is not None and int(n) >= layers):
        upto = "or more" if layers is None else f"… {layers - 1}, as the config says"
        raise IndexError(f"n must be in 0 {upto}, got {n}")


def _check_flags(c: dict[str, Any]) -> None:
    kind = c["model_type"]
    if c["use_bidirectional_attention"] and kind != "gemma3_text":
        raise ValueError(f"use_bidirectional_attention must be off for {kind}, whose masks are causal all the same")
    if c["attn_logit_softcapping"] is not None and kind != "gemma2":
        got = c["attn_logit_softcapping"]
        raise ValueError(f"attn_logit_softcapping must be None for {kind}, which does not apply it, got {got}")
