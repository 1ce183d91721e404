"""What transformers makes of our exports, in any Python that has it.

python tests/export/peer.py FOLDER   loads each folder FOLDER/NAME and writes FOLDER/NAME.npz: what
                                     it gives for FOLDER/asked.npz; saves it as FOLDER/NAME-again

Knows nothing of this project, so that another Python can run it.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers


def load(folder, **settings):
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, trust_remote_code=True, **settings)


def answers(folder, asked):
    """Returns arrays by name."""
    tokens = torch.from_numpy(asked["tokens"])
    model, info = load(folder, output_loading_info=True)
    assert not any(info[kind] for kind in info), info
    found = {}
    with torch.no_grad():
        both = model(tokens, labels=tokens, output_hidden_states=True)
        found["logits"], found["loss"] = both.logits, both.loss
        assert len(both.hidden_states) == model.config.num_hidden_layers + 1
        assert model.lm_head(both.hidden_states[-1]).equal(both.logits)
        # As if rows were long.
        code = sys.modules[type(model).__module__]
        code.QUERIES_AT_ONCE = 5
        found["logits in parts"] = model(tokens).logits
        first = model(tokens[:, :11])
        then = model(tokens[:, 11:], **{code.CACHE: first[code.CACHE]})
        found["logits in two calls"] = torch.cat([first.logits, then.logits], dim=1)
        # Two documents in a row, as collators that don't pad have them.
        places = torch.cat([torch.arange(9), torch.arange(tokens.shape[1] - 9)])
        found["packed"] = model(tokens, position_ids=places.expand_as(tokens)).logits
        # Prompts of several lengths, padded on the left.
        lengths = asked["lengths"].tolist()
        padded = torch.zeros((len(tokens), max(lengths)), dtype=tokens.dtype)
        mask = torch.zeros_like(padded)
        for row, length in enumerate(lengths):
            padded[row, -length:], mask[row, -length:] = tokens[row, :length], 1
        found["batch"] = greedy(model, padded, attention_mask=mask)
        found["uncached"] = greedy(model, padded, attention_mask=mask, use_cache=False)
        found["one row"] = greedy(model, padded[:1])
        found["fixed cache"] = greedy(model, padded[:1], cache_implementation="static")
    model.save_pretrained(f"{folder}-again")

    # In bfloat16 what is small stays as it is, and gradients reach all there is.
    half = load(folder, dtype=torch.bfloat16)
    for name, x in half.state_dict().items():
        small = any(part in name for part in ("norm", "offset", "distance"))
        assert x.dtype == (torch.float32 if small else torch.bfloat16), name
    found["bfloat16"] = half(tokens, labels=tokens)
    found["bfloat16"].loss.backward()
    found["bfloat16"] = found["bfloat16"].logits.detach()
    for name, x in half.named_parameters():
        assert x.grad.isfinite().all(), name
    return {name: x.numpy() for name, x in found.items()}


def greedy(model, prompts, **settings):
    made = model.generate(prompts, max_new_tokens=8, do_sample=False, **settings)
    return made[:, prompts.shape[1] :]


def spoken(folder, texts):
    """Returns what a pipeline says, and the ids of the tokenizer."""
    pipe = transformers.pipeline("text-generation", str(folder), trust_remote_code=True)
    settings = {"do_sample": False, "max_new_tokens": 8, "batch_size": 2}
    said = [one[0]["generated_text"] for one in pipe(texts, **settings)]
    return {"said": said, "ids": [pipe.tokenizer(text).input_ids for text in texts]}


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    asked = np.load(folder / "asked.npz")
    for path in sorted(path.parent for path in folder.glob("*/config.json")):
        if (path / "tokenizer.json").is_file():
            found = spoken(path, json.loads((folder / "texts.json").read_text()))
            pathlib.Path(f"{path}.json").write_text(json.dumps(found))
        else:
            np.savez(f"{path}.npz", **answers(path, asked))
