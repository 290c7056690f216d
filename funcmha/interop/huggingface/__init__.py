"""The attention layers of Hugging Face's `transformers`: GPT-2, Llama, Mistral, Gemma, Qwen, GPT-OSS and others.

    layer = load_layer("a/checkpoint/", 3)                    # or from_state_dict(model.state_dict(), model.config, 3)
    y, cache = self_attention(layer.params, x, **layer.options(T))     # x is what input_layernorm or ln_1 made of it
    dparams, dx, _ = self_attention_vjp(cache, dy)
    to_state_dict(dparams, layer)                             # {"model.layers.3.self_attn.q_proj.weight": its .grad, …}

By model_type: gpt2 (also over an encoder: `cross=True`), llama, mistral, mixtral, gemma, gemma2, gemma3_text, qwen2,
qwen2_moe, qwen3, qwen3_moe, gpt_oss, phi3 (Phi-4 too), smollm3, granite, olmo, starcoder2, cohere, cohere2, glm4 and
stablelm; and what their configs say of attention, each kind of rope included.

What differs. `sliding_window` counts the query itself: W there is `window(W - 1, 0)` here. Rotary pairs are as they are
there, so nothing is permuted. Gemma 3's norms have the weight 1 + w: `RMSNorm(offset=1)`. GPT-2 stores its matrices
transposed, and q, k and v in one; Phi-3 stores them in one.

Angles, norms and softmax are computed in float32 there, whatever the dtype (GPT-2 alone has none of these); here in
the dtype of x, and angles in float64. So with float64 the outputs of a small Llama differ by 2e-7, and by 1e-3 at
position 100,000, where a float32 angle is off by 2⁻²⁴ of the position. Half precision is computed in float32 here, and
rounded once. A query that may see no key (padding before the text) gives out_proj.bias here; there the mean of all
values, but for GPT-OSS. Dropout is the caller's: `dropout=seeded(seed, config.attention_dropout)`.

Two kinds of rope depend on the length of the text, "dynamic" and "longrope". Here that is the length that `options` is
told, and all keys are turned for it; there, keys in a cache stay turned for the length that they came at, and "dynamic"
remembers the longest text that it saw.

What funcmha has no place for is refused by name: a norm for each head (use_qk_norm of Cohere, qk_layernorm of StableLM)
and clip_qkv of OLMo. So is what transformers reads and does not obey: a soft cap in Gemma 3, bidirectional attention in
Gemma 1 and 2, layer_types of Llama. Why it is made like this: docs/decisions/0024-layers-of-transformers.md.

No foreign library is imported, but `safetensors` by `load_layer` and `save_layer`. Read from transformers 5.24.
"""

from .files import load_layer, save_layer
from .layer import Layer
from .state import from_state_dict, to_state_dict

__all__ = ["Layer", "from_state_dict", "load_layer", "save_layer", "to_state_dict"]
