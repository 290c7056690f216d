"""The defaults of the config classes of transformers, family by family, for the fields that attention reads.

A family is one row here, and entries in the tables of `families` where it differs from Llama.
"""

from typing import Any

SHARED: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "head_dim": None,
    "layer_types": None,
    "num_key_value_heads": None,
    "partial_rotary_factor": None,
    "qk_layernorm": False,
    "query_pre_attn_scalar": None,
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "use_bidirectional_attention": False,
    "use_qk_norm": False,
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
COHERE = {"hidden_size": 8192, "max_position_embeddings": 8192, "num_attention_heads": 64}
LLAMA = {"hidden_size": 4096, "max_position_embeddings": 2048, "num_attention_heads": 32}
MIXTRAL = LLAMA | {"max_position_embeddings": 131072, "num_key_value_heads": 8}
YARN = {  # of GPT-OSS
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
    "llama": LLAMA,
    "mistral": MIXTRAL | {"sliding_window": 4096},
    "mixtral": MIXTRAL | {"rope_theta": 1000000.0},
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
    "qwen2_moe": QWEN_2 | {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "qkv_bias": True},
    "qwen3": QWEN_2 | {"head_dim": 128},
    "qwen3_moe": QWEN_2 | {"hidden_size": 2048, "num_key_value_heads": 4},
    "gpt_oss": {
        "attention_bias": True,
        "head_dim": 64,
        "hidden_size": 2880,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rope_theta": 150000.0,
        "sliding_window": 128,
    },
    "phi3": {
        "hidden_size": 3072,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "original_max_position_embeddings": 4096,
    },
    "smollm3": {
        "hidden_size": 2048,
        "max_position_embeddings": 32768,
        "no_rope_layer_interval": 4,
        "no_rope_layers": None,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "use_sliding_window": False,
    },
    "granite": LLAMA | {"attention_multiplier": 1.0},
    "olmo": LLAMA,
    "starcoder2": {
        "hidden_size": 3072,
        "max_position_embeddings": 4096,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "use_bias": True,
    },
    "cohere": COHERE | {"rope_theta": 500000.0},
    "cohere2": COHERE | {"sliding_window": 4096, "sliding_window_pattern": 4},
    "glm4": {
        "attention_bias": True,
        "head_dim": 128,
        "hidden_size": 4096,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
    },
    "stablelm": {
        "hidden_size": 2560,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
    },
}
