"""A layer of a Hugging Face checkpoint: read from its file, run, trained for a step and written back.

The checkpoint is made here, with random weights: Llama with grouped heads and the longer context of Llama 3.1. Output
and gradients of its layer 1 in funcmha must equal those in transformers, in float32. After a step of gradient descent
in NumPy the layer is written back into the file, and transformers, which loads it anew, must return the new output.

    python examples/huggingface.py
"""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel
from transformers.utils.logging import disable_progress_bar

from funcmha import self_attention, self_attention_vjp, tree
from funcmha.interop.huggingface import load_layer, save_layer, to_state_dict

N, T, LAYER, RATE = 2, 64, 1, 0.1
CONFIG = LlamaConfig(
    hidden_size=96,
    num_attention_heads=6,
    num_key_value_heads=2,
    num_hidden_layers=2,
    intermediate_size=128,
    vocab_size=64,
    max_position_embeddings=4096,
    initializer_range=0.2,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
)


def watch(model, tokens):
    """Input and output of the attention of the layer, in a forward pass of the whole model."""
    attention, recorded = model.layers[LAYER].self_attn, {}

    def before(module, args, kwargs):
        recorded["x"] = kwargs["hidden_states"].detach().requires_grad_()
        return args, kwargs | {"hidden_states": recorded["x"]}

    hooks = [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        attention.register_forward_hook(lambda module, args, output: recorded.update(y=output[0])),
    ]
    model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return recorded["x"], recorded["y"]


def difference(a, b):
    """The largest difference of a and b, relative to the largest number in b."""
    return np.abs(a - b).max() / np.abs(b).max()


def main():
    """The comparison, and the step."""
    disable_progress_bar()
    torch.manual_seed(0)
    tokens = torch.randint(CONFIG.vocab_size, (N, T))
    with tempfile.TemporaryDirectory() as checkpoint:
        LlamaModel(CONFIG).save_pretrained(checkpoint)
        model = LlamaModel.from_pretrained(checkpoint)
        x, theirs = watch(model, tokens)
        dy = torch.randn(theirs.shape)
        theirs.backward(dy)

        layer = load_layer(checkpoint, LAYER)  # only its tensors; scale, rotary table and mask from the config
        y, cache = self_attention(layer.params, x.detach().numpy(), **layer.options(T))
        dparams, dx, _ = self_attention_vjp(cache, dy.numpy())

        found = dict(model.named_parameters())
        differences = {"output": difference(y, theirs.detach().numpy()), "input": difference(dx, x.grad.numpy())}
        for name, grad in to_state_dict(dparams, layer).items():
            differences[name] = difference(grad, found[name].grad.numpy())
        print("largest difference from transformers, relative:")
        for name, off in differences.items():
            print(f"  {name:<40} {off:.1e}")
        assert max(differences.values()) < 1e-5

        trained = tree.map(lambda w, dw: w - np.float32(RATE / N / T) * dw, layer.params, dparams)
        save_layer(checkpoint, layer._replace(params=trained))
        y, _ = self_attention(trained, x.detach().numpy(), **layer.options(T))
        again, theirs = watch(LlamaModel.from_pretrained(checkpoint), tokens)
        assert torch.equal(again, x)  # the layer before it has not changed
        off = difference(y, theirs.detach().numpy())
        print(f"after a step, saved and loaded by transformers: {off:.1e}")
        assert off < 1e-5


if __name__ == "__main__":
    main()
