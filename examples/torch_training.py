"""A small PyTorch model whose attention is funcmha's, trained by PyTorch's own optimiser.

The task is a lookup: a sequence contains pairs of a letter and a number, and at the end asks for the number of one
letter. Attention finds the pair. Embedding, norms and linear layers are PyTorch's; the parameters are PyTorch's too, in
the tree that funcmha reads, and so are their gradients. At the end the same model runs on
`torch.nn.functional.scaled_dot_product_attention`, with the same results.

    python examples/torch_training.py
"""

import torch
import torch.nn.functional as F  # noqa: N812 — as everybody writes it
from torch import nn

from funcmha import init, masks, mha, mha_vjp
from funcmha.interop.torch.autograd import as_torch_function

LETTERS, NUMBERS, PAIRS, WIDTH, HEADS = 16, 10, 12, 32, 4

attend = as_torch_function(mha, mha_vjp, mask=masks.causal())  # made once, serves every layer


class Attention(nn.Module):
    """funcmha's tree of parameters, with each leaf a parameter of the module."""

    def __init__(self, seed):
        super().__init__()
        self.groups = nn.ModuleDict(
            {
                name: nn.ParameterDict({leaf: torch.from_numpy(a) for leaf, a in group.items()})
                for name, group in init(seed, WIDTH, HEADS).items()
            }
        )

    def forward(self, x):
        """x (N, L, WIDTH)   →   (N, L, WIDTH)"""
        params = {name: dict(group.items()) for name, group in self.groups.items()}
        return attend(params, x, x, x)


class TorchAttention(Attention):
    """The same parameters, and PyTorch's attention."""

    def forward(self, x):
        """x (N, L, WIDTH)   →   (N, L, WIDTH)"""

        def heads(name):
            """(N, HEADS, L, WIDTH / HEADS)"""
            w, b = self.groups[name]["w"], self.groups[name]["b"]
            return F.linear(x, w.flatten(0, 1), b.flatten()).unflatten(-1, w.shape[:2]).transpose(1, 2)

        o = F.scaled_dot_product_attention(heads("q_proj"), heads("k_proj"), heads("v_proj"), is_causal=True)
        out = self.groups["out_proj"]
        return F.linear(o.transpose(1, 2).flatten(2), out["w"].flatten(1), out["b"])


class Model(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.letter, self.number = nn.Embedding(LETTERS, WIDTH), nn.Embedding(NUMBERS + 1, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attentions = nn.ModuleList(attention(seed) for seed in range(2))
        self.answer = nn.Linear(WIDTH, NUMBERS)

    def forward(self, letters, numbers):
        """letters, numbers (N, L)   →   scores of the numbers (N, NUMBERS)"""
        x = self.letter(letters) + self.number(numbers)
        for norm, attention in zip(self.norms, self.attentions, strict=False):
            x = x + attention(norm(x))
        return self.answer(self.norms[-1](x[:, -1]))


def batch(n):
    """Pairs of letters and numbers, with a letter without number at the end; and the number of that letter."""
    letters = torch.rand(n, LETTERS).argsort(-1)[:, :PAIRS]
    numbers = torch.randint(NUMBERS, (n, PAIRS))
    asked = torch.randint(PAIRS, (n, 1))
    unknown = torch.full((n, 1), NUMBERS)
    return (
        torch.cat([letters, letters.gather(1, asked)], 1),
        torch.cat([numbers, unknown], 1),
        numbers.gather(1, asked)[:, 0],
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # small products: threads would mostly wait for each other
    torch.manual_seed(0)
    model = Model(Attention)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-4)
    print("step     loss   right")
    for step in range(121):
        letters, numbers, target = batch(16)
        logits = model(letters, numbers)
        loss = F.cross_entropy(logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0:
            right = (logits.argmax(-1) == target).float().mean()
            print(f"{step:4} {loss:8.4f} {right:7.1%}")

    letters, numbers, target = batch(64)
    twin = Model(TorchAttention)
    twin.load_state_dict(model.state_dict())
    logits, want = model(letters, numbers), twin(letters, numbers)
    right = (logits.argmax(-1) == target).float().mean()
    ours, theirs = (
        torch.autograd.grad(F.cross_entropy(x, target), list(m.parameters()))
        for x, m in ((logits, model), (want, twin))
    )
    off = max((a - b).abs().max().item() for a, b in zip((logits, *ours), (want, *theirs), strict=True))
    print(f"\nof new ones {right:.0%} right; outputs and gradients {off:.1e} from those with PyTorch's attention")
    assert right > 0.9
    assert off < 1e-4
