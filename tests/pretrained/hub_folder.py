"""Folders as the hub has them, made without its libraries."""

import json

import numpy as np

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def make_tensors(settings, seed=0):
    """Returns random tensors by the hub's names, of heads as wide as they are by default."""
    rng = np.random.default_rng(seed)
    width, hidden = settings["hidden_size"], settings["intermediate_size"]
    size = settings.get("head_dim", width // settings["num_attention_heads"])
    rows = {
        "q_proj": settings["num_attention_heads"] * size,
        "k_proj": settings["num_key_value_heads"] * size,
        "v_proj": settings["num_key_value_heads"] * size,
    }

    def matrix(out, into):
        return (rng.normal(size=(out, into)) * into**-0.5).astype(np.float32)

    def vector(length, mean=1.0):
        return (mean + 0.3 * rng.normal(size=length)).astype(np.float32)

    found = {"model.embed_tokens.weight": matrix(settings["vocab_size"], width)}
    for layer in range(settings["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        found[name + "input_layernorm.weight"] = vector(width)
        found[name + "post_attention_layernorm.weight"] = vector(width)
        for part, out in rows.items():
            found[f"{name}self_attn.{part}.weight"] = matrix(out, width)
            if settings["model_type"] == "qwen2":
                found[f"{name}self_attn.{part}.bias"] = vector(out, 0.0)
        found[name + "self_attn.o_proj.weight"] = matrix(width, rows["q_proj"])
        if settings["model_type"] == "qwen3":
            found[name + "self_attn.q_norm.weight"] = vector(size)
            found[name + "self_attn.k_norm.weight"] = vector(size)
        found[name + "mlp.gate_proj.weight"] = matrix(hidden, width)
        found[name + "mlp.up_proj.weight"] = matrix(hidden, width)
        found[name + "mlp.down_proj.weight"] = matrix(width, hidden)
    found["model.norm.weight"] = vector(width)
    if not settings["tie_word_embeddings"]:
        found["lm_head.weight"] = matrix(settings["vocab_size"], width)
    return found


def write(folder, settings, tensors=None, files=1):
    """Writes a folder; the tensors are dealt out to so many files. Returns the tensors."""
    from safetensors.numpy import save_file

    tensors = make_tensors(settings) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    names = [f"model-{n + 1:05d}-of-{files:05d}.safetensors" for n in range(files)]
    where = {name: names[number % files] for number, name in enumerate(tensors)}
    for file in names:
        save_file({n: x for n, x in tensors.items() if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return tensors
