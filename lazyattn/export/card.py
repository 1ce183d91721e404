"""The model card of an export, `README.md`."""

from collections.abc import Sequence

from lazyattn.export.hub import loading
from lazyattn.model.accounting import parameter_counts
from lazyattn.model.config import VARIANTS, AttentionConfig, ModelConfig
from lazyattn.pretrained.hub import family_of
from lazyattn.pretrained.parameters import stored_dtypes
from lazyattn.pretrained.settings import Facts, differences
from lazyattn.quantity import quantity

FILE = "README.md"


def model_card(
    name: str, facts: Facts, *, dtype: str, layout: str, formats: Sequence[str], tokenizer: bool
) -> str:
    """Returns the card, Markdown with the header that model hubs read."""
    model, attention = facts.model, facts.model.attention
    counts = parameter_counts(stored_dtypes(model, dtype))
    rows = [
        ("parameters", f"{counts['total']:,}"),
        ("attention", f"`{attention.variant}`: {VARIANTS[attention.variant]}"),
        ("layers, width, MLP width", f"{model.num_layers}, {model.width}, {model.hidden_width}"),
        (
            "heads",
            f"{attention.num_heads} of size {model.head_dim}, {attention.kv_heads} of keys",
        ),
        ("vocabulary", f"{model.vocab_size:,}" + (", tied" if model.tie_embeddings else "")),
        ("activations", model.compute_dtype),
        (
            "matrices stored in",
            dtype
            + (
                ""
                if dtype == "float32" or ("hub" in formats and family_of(model) is not None)
                else "; norms, biases and offsets in float32"
            ),
        ),
        ("rows in training", quantity(facts.sequence_length, "token")),
    ]
    if attention.has_bias:
        rows.append(("distance bias", _bias(attention)))
    if attention.window is not None and attention.num_global_heads < attention.num_heads:
        rows.append(("window", quantity(attention.window, "key")))
    if attention.num_global_heads:
        number = f"{attention.num_global_heads} of {attention.num_heads}"
        lack = ["no slope"] * attention.has_bias + ["no window"] * (attention.window is not None)
        lack += ["no RoPE"] * (attention.rope and not attention.global_rope)
        rows.append(("global heads", ", ".join([number, *lack])))
    further = {
        "no RoPE": not attention.rope,
        "norms of queries and keys": attention.qk_norm,
        "a gate on the output": attention.output_gate,
    }
    if any(further.values()):
        rows.append(("also", ", ".join(name for name, there in further.items() if there)))
    if facts.step is not None:
        rows.append(("steps of training", f"{facts.step:,}"))
    if facts.tokens is not None:
        rows.append(("tokens in training", f"{facts.tokens:,}"))
    if facts.data is not None:
        rows.append(("text", facts.data))
    if facts.validation_loss is not None:
        over = "how many tokens it is over is not known"
        if facts.validation_tokens is not None:
            over = f"over {facts.validation_tokens:,} tokens held out"
        rows.append(("validation loss", f"{facts.validation_loss:.4f} nats a token, {over}"))
    parts = [
        f"---\nlibrary_name: {'transformers' if 'hub' in formats else 'lazyattn'}\n"
        "pipeline_tag: text-generation\ntags:\n- lazy-attention\n- jax\n---",
        f"# {name}",
        "A language model with Lazy Attention ([arXiv 2601.00919](https://arxiv.org/abs/2601.00919))"
        " or one of its ablations, exported by lazyattn.",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]),
        "## Use",
        _use(tokenizer),
    ]
    if "orbax" in formats:
        parts.append(
            f"`params/` is an Orbax checkpoint of the parameters alone, written {layout};"
            " `config.json` says under `lazyattn` what the model is."
        )
    if "safetensors" in formats:
        parts += ["## In PyTorch", _torch(facts)]
    if "hub" in formats:
        parts += [
            "## In transformers",
            _transformers(model, tokenizer),
        ]
    parts += [
        "## Limits",
        "A language model repeats what its text had in it, true or not. This export has been"
        " measured by nothing beyond what the table says.",
    ]
    return "\n\n".join(parts) + "\n"


def _bias(attention: AttentionConfig) -> str:
    """Returns which kind of bias it is, and how it goes on."""
    distances = quantity(attention.bias_width, "distance")
    if attention.bias_kind == "decay":
        return f"`decay`: -exp(theta) x + delta, delta of {distances}; it falls past them"
    tail = "with a learned tail" if attention.has_tail else "0 past them"
    return f"`table`: {distances}, {tail}"


def _use(tokenizer: bool) -> str:
    ids = "[[model.tokenizer.bos_id, *model.tokenizer.encode(TEXT)]]" if tokenizer else "IDS"
    return (
        "```python\nimport numpy as np\n\nfrom lazyattn.pretrained.load import load_model\n\n"
        f"model = load_model(FOLDER)\ntokens = np.array({ids})\n"
        "logits = model.logits(tokens)  # float32, [batch, length, vocab]\n```"
    )


def _transformers(model: ModelConfig, tokenizer: bool) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer\n"]
    lines.append(f"model = {loading(model)}")
    if tokenizer:
        lines += [
            f"tokenizer = {loading(model, 'AutoTokenizer')}",  # it reads config.json, too
            'ids = tokenizer(TEXT, return_tensors="pt").input_ids',
            "print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0]))",
        ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _torch(facts: Facts) -> str:
    same = (
        "`model.safetensors` (or several, with an index) has the names and shapes of the paper's"
        " authors' layers in flash-linear-attention. "
    )
    found = differences(facts)
    if not found:
        return same + "There it is the same function, for rows that are one document each."
    return same + "There it is not the same function:\n\n" + "\n".join(f"- {one}" for one in found)
