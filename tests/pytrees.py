"""The pytrees of other libraries: how each takes a value apart into leaves, and puts it together again."""

import jax
import optree
from torch.utils import _pytree as torch_pytree

PYTREES = {
    "jax": (jax.tree.flatten, lambda leaves, spec: jax.tree.unflatten(spec, leaves)),
    "optree": (optree.tree_flatten, lambda leaves, spec: optree.tree_unflatten(spec, leaves)),
    "torch": (torch_pytree.tree_flatten, torch_pytree.tree_unflatten),
}
