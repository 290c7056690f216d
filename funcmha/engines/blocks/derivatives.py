"""Forward mode and second order by blocks: `funcmha.derivatives.attention_jvp` and `attention_vjp_jvp` in linear memory.

With r of `attention.row_gradient`, and the same r˙ of ḋp and ḋlse less what the change of the weights does,

    ṗ = p (ż − l̇se)     dz = p (dp − m + r)     ḋz = dz (ż − l̇se) + p (ḋp − ṁ + ṙ)

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; R rows and N columns of a
block; `...` is batch.
"""
