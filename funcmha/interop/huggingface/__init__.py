"""The attention layers of Hugging Face's `transformers`: GPT-2, Llama, Mistral, Gemma, Qwen, GPT-OSS and others.

    layer = load_layer("a/checkpoint/", 3)                    # or from_state_dict(model.state_dict(), model.config, 3)
    y, cache = self_attention(layer.params, x, **layer.options(T))     # x after input_layernorm or ln_1
    dparams, dx, _ = self_attention_vjp(cache, dy)
    to_state_dict(dparams, layer)                             # {"model.layers.3.self_attn.q_proj.weight": its .grad, …}

By model_type: gpt2 (also over an encoder: `cross=True`), llama, mistral, mixtral, gemma, gemma2, gemma3_text, qwen2,
qwen2_moe, qwen3, qwen3_moe, gpt_oss, phi3 (Phi-4 too), smollm3, granite, olmo, starcoder2, cohere, cohere2, glm4 and
stablelm; with the attention options of their configs, and all kinds of rope.

Differences from funcmha. `sliding_window` counts the query itself: W there is `window(W - 1, 0)` here. Rotary pairs are
the same, so nothing is permuted. Gemma 3's norms have the weight 1 + w: `RMSNorm(offset=1)`. GPT-2 stores its matrices
transposed, and q, k and v in one; Phi-3 stores them in one.

transformers computes angles, norms and softmax in float32, whatever the dtype (except in GPT-2); funcmha computes in
the dtype of x, and angles in float64. So with float64 the outputs of a small Llama differ by 2e-7, and by 1e-3 at
position 100,000, where a float32 angle is off by 2⁻²⁴ of the position. Half precision is computed in float32 here, and
rounded once. A fully masked row (padding before the text) gives out_proj.bias here; there the mean of all values,
except in GPT-OSS. Dropout is an option of the call: `dropout=seeded(seed, config.attention_dropout)`.

Two kinds of rope depend on the length of the text, "dynamic" and "longrope". Here that is the length given to
`options`, and all keys are rotated for it; there, cached keys stay rotated for the length at which they were added, and
"dynamic" keeps the longest length so far.

Not supported, and refused by name: a norm for each head (use_qk_norm of Cohere, qk_layernorm of StableLM) and clip_qkv
of OLMo. Options that transformers reads and ignores are refused too: a soft cap in Gemma 3, bidirectional attention in
Gemma 1 and 2, layer_types of Llama. The reasons are in docs/decisions/0024-layers-of-transformers.md.

No other library is imported, except `safetensors` by `load_layer` and `save_layer`. Read from transformers 5.24.
"""

from .files import load_layer, save_layer
from .layer import Layer
from .state import from_state_dict, to_state_dict

__all__ = ["Layer", "from_state_dict", "load_layer", "save_layer", "to_state_dict"]
