"""A model in the authors' naming, computed from its tensors alone as PyTorch's layers would.

Written from the definition, in numpy and float64: a Linear is x @ weight.T, heads lie one
after the other in its rows, query heads of a group share a key head.
"""

import numpy as np


def theirs(tensors, config, tokens):
    """Returns logits [length, vocab] of one document.

    Args:
      tensors: name -> array.
      config: content of `config.json`.
      tokens: ids of the document.
    """
    t = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
    x = t["model.embeddings.weight"][tokens]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        mine = {name[len(layer) :]: array for name, array in t.items() if name.startswith(layer)}
        normed = _norm(x, mine["attn_norm.weight"], config["norm_eps"])
        x = x + _attention(normed, mine, config)
        normed = _norm(x, mine["mlp_norm.weight"], config["norm_eps"])
        gate = normed @ mine["mlp.gate_proj.weight"].T
        up = normed @ mine["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ mine["mlp.down_proj.weight"].T
    return _norm(x, t["model.norm.weight"], config["norm_eps"]) @ t["lm_head.weight"].T


def _norm(x, weight, epsilon):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * weight


def _attention(x, layer, config):
    length, heads = len(x), config["num_heads"]
    size = config["hidden_size"] // heads

    def project(name):
        return (x @ layer[f"attn.{name}.weight"].T).reshape(length, -1, size)

    q, k, v = project("q_proj"), project("k_proj"), project("v_proj")
    if config["qk_norm"]:
        q = _norm(q, layer["attn.q_norm.weight"], config["norm_eps"])
        k = _norm(k, layer["attn.k_norm.weight"], config["norm_eps"])
    q, k = _rotate(q, config["rope_theta"]), _rotate(k, config["rope_theta"])
    group = heads // config["num_kv_heads"]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    distance = np.arange(length)[:, None] - np.arange(length)
    out = np.zeros((length, heads, size))
    for head in range(heads):
        scores = q[:, head] @ k[:, head].T / size**0.5
        table = layer.get("attn.learnable_bias_diagonals", np.zeros((heads, 1)))[head]
        inside = (distance >= 0) & (distance < len(table))
        scores += np.where(inside, table[np.clip(distance, 0, len(table) - 1)], 0)
        scores[distance < 0] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        tau = layer.get("attn.tau", np.zeros(heads))[head]
        p = np.maximum(p + tau / np.arange(1, length + 1)[:, None], 0)
        p[distance < 0] = 0
        out[:, head] = p @ v[:, head]
    return out.reshape(length, -1) @ layer["attn.o_proj.weight"].T


def _rotate(x, base):
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * base ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
