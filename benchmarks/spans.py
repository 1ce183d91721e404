"""Holds a trained model's spans to its full cache: the same tokens, and how many bytes.

    python -m benchmarks.spans --workdir=RUN --text=FILE --output=benchmarks/results/spans.jsonl

RUN is a run's folder; its model has `qk_norm`, so that heads have spans. FILE is text that the
prompts are cut from, or an .npy of token ids. Rows are prompts of `--context` less `--tokens`
tokens, continued greedily with the cache of spans and with that of every key. Printed are

- the share of bytes that spans take at contexts from 4,096 to 131,072;
- tokens that differ, over all rows, and the first position where a row does, if any, and how much
  likelier the full cache finds its own token there than the next (`margins`, in logits). As a
  measure of what rounding does alone, the same for the full cache where half of the rows are drawn
  at a time: a batch of another size adds up in another order;
- the largest difference of logits after each `--chunk` tokens of a prompt, and at how many of these
  positions the likeliest token is the same. As a measure of what rounding does alone, the same for
  the full cache that has read the prompt in chunks of half the size.

One line of JSON is added to --output. --slopes=FILE keeps the heads' slopes for
`benchmarks.decode`.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks import provenance
from lazyattn import paths
from lazyattn.checkpoint.load import load_trained
from lazyattn.errors import require
from lazyattn.generation import (
    CacheOptions,
    SamplingConfig,
    extend,
    full_plan,
    generate,
    head_spans,
    init_cache,
    plan_cache,
    prepare,
)
from lazyattn.generation.cache import CachePlan
from lazyattn.generation.prepared import PreparedModel
from lazyattn.generation.spans import everything_kept
from lazyattn.model.config import ModelConfig

FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_OWN: dict[str, Any] = {"flag_values": FLAGS}
_WORKDIR = paths.define("workdir", None, "Folder of the run.", **_OWN)
_TEXT = paths.define("text", None, "Text, or an .npy of token ids, of the prompts.", **_OWN)
_CONTEXT = flags.DEFINE_integer("context", 16_384, "Tokens of a row at the end.", **_OWN)
_TOKENS = flags.DEFINE_integer("tokens", 1250, "Tokens to draw.", lower_bound=1, **_OWN)
_ROWS = flags.DEFINE_integer("rows", 8, "Rows.", lower_bound=1, **_OWN)
_CHUNK = flags.DEFINE_integer("chunk", 512, "Tokens read at once.", lower_bound=2, **_OWN)
_DTYPE = flags.DEFINE_enum("compute_dtype", "", ["", "bfloat16", "float32"], "Empty: as trained.",
                           **_OWN)  # fmt: skip
_SLOPES = paths.define("slopes", None, "File for spans and slopes, .npz.", **_OWN)
_OUTPUT = paths.define("output", None, "File for a line of JSON; None: only print.", **_OWN)

_CONTEXTS = (4096, 16_384, 32_768, 131_072)


def compare(
    params: Any, config: ModelConfig, prompts: np.ndarray, new: int, *, chunk: int
) -> dict[str, Any]:
    """Returns what greedy continuations and logits have in common.

    Args:
      params: of a model whose heads have spans.
      config: of the model.
      prompts: [rows, length] token ids.
      new: tokens to draw.
      chunk: tokens of a prompt that are read at once.
    """
    rows, length = prompts.shape
    model, context = prepare(params, config), length + new
    full, spans = full_plan(config, context), plan_cache(params, config, context)

    def draw(plan: CachePlan, prompts: np.ndarray) -> np.ndarray:
        found = generate(
            model,
            config,
            prompts,
            np.full(len(prompts), length),
            sampling=SamplingConfig(max_new_tokens=new, temperature=0.0),
            key=jax.random.key(0),
            plan=plan,
        )
        return np.asarray(found.tokens)

    drawn, seconds = {}, {}
    for name, plan in {"full": full, "spans": spans}.items():
        drawn[name] = draw(plan, prompts)
        start = time.perf_counter()
        draw(plan, prompts)
        seconds[name] = time.perf_counter() - start
    half = rows // 2 or 1
    parts = [draw(full, prompts[start : start + half]) for start in range(0, rows, half)]
    drawn["halves"] = np.concatenate(parts)

    def differences(name: str) -> dict[str, Any]:
        differ = drawn["full"] != drawn[name]
        ends = np.where(differ.any(axis=1), differ.argmax(axis=1), 0)
        margins = margin(model, full, prompts, drawn["full"], ends, chunk)
        parted = differ.any(axis=1)
        return {
            "tokens_differ": int(differ.sum()),
            "rows_differ": int(parted.sum()),
            "first_difference": min(ends[parted].tolist(), default=None),
            "margins": [round(x, 4) for x in margins[parted].tolist()],
        }

    logits = {
        "full": read(model, full, prompts, chunk, chunk),
        "spans": read(model, spans, prompts, chunk, chunk),
        "halves": read(model, full, prompts, chunk // 2, chunk),
    }

    def beside_full(name: str) -> dict[str, float]:
        same = logits[name].argmax(-1) == logits["full"].argmax(-1)
        off = np.abs(logits[name] - logits["full"]).max()
        return {"logits_off": float(off), "likeliest_same": float(same.mean())}

    return {
        "tokens": int(drawn["full"].size),
        "distinct_tokens": len(np.unique(drawn["full"])),
        "seconds": {name: round(time_, 3) for name, time_ in seconds.items()},
        "spans": differences("spans") | beside_full("spans"),
        "rounding": differences("halves") | beside_full("halves"),
    }


def read(
    model: PreparedModel, plan: CachePlan, prompts: np.ndarray, chunk: int, every: int
) -> np.ndarray:
    """Returns the logits of the next token at every so many tokens of the prompts.

    Args:
      model: to read with.
      plan: which keys the cache holds.
      prompts: [rows, length].
      chunk: tokens read at once, a divisor of `every`.
      every: tokens from one position that is returned to the next.

    Returns:
      [rows, positions, vocabulary], float32.
    """
    rows, length = prompts.shape
    cache, found = init_cache(plan, rows), []
    for end in range(chunk, length - length % every + 1, chunk):
        part = jnp.asarray(prompts[:, end - chunk : end])
        logits, cache = extend(model, cache, part, np.full(rows, chunk))
        if end % every == 0:
            found.append(np.asarray(logits, np.float32))
    return np.stack(found, axis=1)


def margin(
    model: PreparedModel,
    plan: CachePlan,
    prompts: np.ndarray,
    drawn: np.ndarray,
    ends: np.ndarray,
    chunk: int,
) -> np.ndarray:
    """Returns by how much the likeliest token leads at one position of each row, in logits.

    Args:
      model, plan, prompts, chunk: as of `read`.
      drawn: [rows, new], what came after the prompts.
      ends: which of these tokens is asked for, of each row.
    """
    rows, length = prompts.shape
    cache = init_cache(plan, rows)
    whole = np.concatenate([prompts, drawn], axis=1)
    whole = np.pad(whole, ((0, 0), (0, -whole.shape[1] % chunk)))
    last = np.zeros((rows, 2), np.float32)
    for start in range(0, int(length + ends.max()), chunk):
        counts = np.clip(length + ends - start, 0, chunk)
        logits, cache = extend(model, cache, whole[:, start : start + chunk], counts)
        best = np.sort(np.asarray(logits, np.float32), axis=-1)[:, -2:]
        last = np.where((counts > 0)[:, None], best, last)
    return last[:, 1] - last[:, 0]


def bytes_by_context(params: Any, config: ModelConfig) -> dict[str, float]:
    """Returns the bytes of the cache of spans over those of the full one, by context."""
    return {
        str(n): plan_cache(params, config, n).row_bytes / full_plan(config, n).row_bytes
        for n in _CONTEXTS
    }


def tokens_of(path: pathlib.Path, tokenizer: Any) -> np.ndarray:
    """Returns the ids of a text, or of an .npy."""
    if path.suffix == ".npy":
        return np.load(path).astype(np.int32)
    return np.asarray(tokenizer.encode(path.read_text(errors="replace")), np.int32)


def main(argv: list[str]) -> None:
    """Loads the run, compares, prints and writes."""
    del argv
    logging.set_verbosity(logging.WARNING)
    require(_WORKDIR.value is not None, "--workdir", _WORKDIR.value, "the folder of a run")
    require(_TEXT.value is not None, "--text", _TEXT.value, "a file of text")
    text, new = pathlib.Path(_TEXT.value), _TOKENS.value
    require(text.is_file(), "--text", _TEXT.value, "a file")
    length = _CONTEXT.value - new
    require(length > 2 * _CHUNK.value, "--context", _CONTEXT.value, "two chunks and --tokens more")
    trained = load_trained(_WORKDIR.value)
    config = trained.experiment.model
    if _DTYPE.value:
        config = dataclasses.replace(config, compute_dtype=_DTYPE.value)
    params = trained.params
    kept = everything_kept(params, config)
    require(kept is None, "--workdir", _WORKDIR.value, f"a model whose heads have spans ({kept})")
    ids = tokens_of(text, trained.tokenizer)
    require(len(ids) > length, "--text", _TEXT.value, f"a file of more than {length} tokens")
    starts = np.linspace(0, len(ids) - length, _ROWS.value).astype(int)
    prompts = np.stack([ids[start : start + length] for start in starts])
    if _SLOPES.value:
        np.savez(_SLOPES.value, spans=head_spans(params, config, 1 << 20), slopes=slopes(params))
    line = {
        "workdir": pathlib.Path(_WORKDIR.value).name,
        "step": trained.step,
        "context": _CONTEXT.value,
        "rows": _ROWS.value,
        "compute_dtype": config.compute_dtype,
        "cache_dtype": CacheOptions().dtype,
        "bytes_share": bytes_by_context(params, config),
        **compare(params, config, prompts, new, chunk=_CHUNK.value),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **provenance.made_by("benchmarks.spans"),
    }
    text_ = json.dumps(line)
    print(text_)
    if _OUTPUT.value:
        with open(_OUTPUT.value, "a") as file:
            file.write(text_ + "\n")


def slopes(params: Any) -> np.ndarray:
    """Returns exp(theta) of each layer's heads, [layers, heads] float32, layers in order."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    found = {
        jax.tree_util.keystr(path): np.exp(np.asarray(x, np.float32))
        for path, x in flat
        if "distance_log_slope" in jax.tree_util.keystr(path)
    }
    layers = sorted(found, key=lambda name: [int(n) for n in "".join(
        c if c.isdigit() else " " for c in name).split()])  # fmt: skip
    return np.concatenate([found[name].reshape(-1, found[name].shape[-1]) for name in layers])


if __name__ == "__main__":
    app.run(main)
