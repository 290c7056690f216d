"""safetensors files against the safetensors library itself, and torch's reader of them."""

import json
import re
import sys
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors

from funcmha import tree
from funcmha.interop.huggingface import load_layer, save_layer, to_state_dict
from funcmha.interop.huggingface.families import read
from funcmha.interop.huggingface.files import Tensors
from funcmha.interop.huggingface.layer import static

SIZES = {"hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 14, "num_hidden_layers": 2}
CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 30, "n_head": 5, "n_layer": 2},
    "llama": {"model_type": "llama", **SIZES},
    "gpt_oss": {"model_type": "gpt_oss", **SIZES},
    "phi3": {"model_type": "phi3", **SIZES},
}
PREFIX = {kind: "h.0.attn." if kind == "gpt2" else "model.layers.0.self_attn." for kind in CONFIGS}
Q = "model.layers.0.self_attn.q_proj.weight"


def checkpoint(where, kind="llama", dtype=np.float64, shards=1):
    """A checkpoint of layer 0 and of what else a model has; all its tensors."""
    form, rng = static(read(CONFIGS[kind], 0), 0, PREFIX[kind]).form, np.random.default_rng(0)
    state = {PREFIX[kind] + name: rng.standard_normal(form.tensor(name)[1]) for name in form.tensors}
    state = {name: x.astype(dtype) for name, x in state.items()}
    state |= {"lm_head.weight": np.arange(15.0).reshape(5, 3), "norm.weight": np.arange(3, dtype=np.int64)}
    (where / "config.json").write_text(json.dumps(CONFIGS[kind]))
    if shards == 1:
        save_file(state, where / "model.safetensors", metadata={"format": "pt"})
        return state
    files = {name: f"model-0000{i % shards}.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        part = {name: x for name, x in state.items() if files[name] == file}
        save_file(part, where / file, metadata={"format": "pt"})
    (where / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return state


def same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_layer_of_a_file_is_that_of_the_state_dict(tmp_path, kind, dtype, shards):
    state = checkpoint(tmp_path, kind, dtype, shards)
    layer = load_layer(tmp_path, 0)
    back = to_state_dict(layer.params, layer)
    assert back.keys() | {"lm_head.weight", "norm.weight"} == state.keys()
    for key, x in back.items():
        same_bits(x, state[key])


def test_of_a_file_nothing_but_the_layer_is_read(tmp_path):
    checkpoint(tmp_path)
    with patch.object(Tensors, "__getitem__", autospec=True, side_effect=Tensors.__getitem__) as read_one:
        layer = load_layer(tmp_path / "model.safetensors", 0)
    assert {call.args[1] for call in read_one.call_args_list} == to_state_dict(layer.params, layer).keys()


def test_a_file_of_tensors_takes_its_config_from_the_caller(tmp_path):
    checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    assert load_layer(tmp_path / "model.safetensors", 0, config).params["q_proj"]["w"].shape == (6, 14, 30)
    with pytest.raises(FileNotFoundError, match=re.escape("config.json")):
        load_layer(tmp_path / "model.safetensors", 0)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_saving_into_a_checkpoint_changes_the_layer_only(tmp_path, kind, shards):
    state = checkpoint(tmp_path, kind, ml_dtypes.bfloat16, shards)
    layer = load_layer(tmp_path, 0)
    doubled = layer._replace(params=tree.map(lambda a: a + a, layer.params))
    files = sorted(tmp_path.glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    save_layer(tmp_path, doubled)
    assert [file.stat().st_size for file in files] == sizes
    assert sorted(tmp_path.iterdir()) == sorted([*files, *tmp_path.glob("*.json")])
    found = {key: x for file in files for key, x in load_file(file).items()}
    theirs = {key: x for file in files for key, x in load_tensors(file).items()}
    for key, x in state.items():
        ours = key in to_state_dict(layer.params, layer)
        same_bits(found[key], x + x if ours else x)
        assert theirs[key].dtype == (torch.bfloat16 if ours else theirs[key].dtype)
    with safe_open(files[0], framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_a_new_file_holds_the_layer_and_is_written_in_order(tmp_path, kind):
    """What is a transposed view in memory is not one in the file: safetensors alone would write it wrongly."""
    checkpoint(tmp_path, kind, np.float32)
    layer = load_layer(tmp_path, 0)
    scattered = tree.map(lambda a: np.asfortranarray(np.repeat(a, 2, axis=0)[::2]), layer.params)
    path = tmp_path / "layer.safetensors"
    save_layer(path, layer._replace(params=scattered))
    with safe_open(path, framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}  # which transformers asks for
    found = load_file(path)
    want = to_state_dict(layer.params, layer)
    assert found.keys() == want.keys()
    for key, x in want.items():
        same_bits(found[key], x)


def test_saving_refuses_what_is_not_the_checkpoint_s(tmp_path):
    checkpoint(tmp_path)
    layer = load_layer(tmp_path, 0)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=rf"{Q} must be \(84, 30\) of float64 as in the file, got .* of float32"):
        save_layer(tmp_path, layer._replace(params=tree.map(lambda a: a.astype(np.float32), layer.params)))
    with pytest.raises(KeyError, match=r"path must be a checkpoint that has elsewhere\.q_proj"):
        save_layer(tmp_path, layer._replace(form=layer.form._replace(prefix="elsewhere.")))
    with pytest.raises(TypeError, match="layer must be a Layer, as load_layer returns it, got dict"):
        save_layer(tmp_path, layer.params)
    with pytest.raises(TypeError, match="must be a NumPy array to be saved"):
        save_layer(tmp_path, layer._replace(params=tree.map(torch.tensor, layer.params)))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be a directory with model.safetensors or .*index.json"):
        load_layer(tmp_path, 0)
    with pytest.raises(FileNotFoundError, match="path must be"):
        load_layer(tmp_path / "absent.safetensors", 0)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: "../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"must name files in its directory, got '../model.safetensors'"):
        load_layer(tmp_path, 0)
    (tmp_path / "half.safetensors").write_bytes(b"half of a file")
    with pytest.raises(ValueError, match=r"path must be a whole .safetensors file, and .*half.safetensors is not: "):
        load_layer(tmp_path / "half.safetensors", 0)


@pytest.mark.parametrize("missing", ["safetensors", "ml_dtypes"])
def test_a_missing_library_is_named(tmp_path, missing):
    checkpoint(tmp_path, dtype=ml_dtypes.bfloat16)
    with patch.dict(sys.modules, {missing: None}), pytest.raises(ImportError, match=f"{missing}.*: install it"):
        load_layer(tmp_path, 0)
