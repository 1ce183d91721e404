"""An exported model, read back without the trainer."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lazyattn.data.copies import here
from lazyattn.data.tokenizer import FILE_NAMES, Tokenizer
from lazyattn.errors import InputError, bad_value
from lazyattn.model.config import ModelConfig
from lazyattn.model.parameters import Params
from lazyattn.model.transformer import Transformer, logits, output_embedding
from lazyattn.paths import local_path
from lazyattn.pretrained import hub, names, parameters, sharded, tensor_files
from lazyattn.pretrained.settings import (
    FILE,
    Facts,
    as_facts,
    is_for_transformers,
    is_tied,
    read_settings,
)

PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A model ready for use.

    Attributes:
      config: what it is; `Transformer(config)` applies it.
      params: its parameters, float32.
      tokenizer: its tokenizer; None if none came with it.
      facts: what else is known of it.
      mesh: devices that share the parameters; None: one device has them.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    facts: Facts
    mesh: jax.sharding.Mesh | None = None

    def logits(
        self,
        tokens: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Returns the float32 logits of every next token.

        Args:
          tokens: int ids, each row a document that begins with `tokenizer.bos_id`.
          segment_ids: as in `Transformer.__call__`.
        """
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return _logits(self.config, self.params, jnp.asarray(tokens), segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"] | None,
) -> Float[Array, "batch length vocab"]:
    hidden: Any = Transformer(config).apply({"params": params}, tokens, segment_ids)
    return logits(hidden, output_embedding(params, config))


def load_model(
    path: str | os.PathLike[str], mesh: jax.sharding.Mesh | None = None
) -> ExportedModel:
    """Returns the model of a folder that `--mode=export` wrote, the authors' code, or a hub has.

    Args:
      path: folder with `config.json` and an Orbax checkpoint in `params` or, failing
        that, safetensors in the authors' naming or of a family in `lazyattn.pretrained.hub`.
      mesh: from `lazyattn.sharding.make_mesh`, devices to share the parameters out to;
        None: all on the first device.

    Raises:
      InputError: if something is missing there, can't be read or doesn't go together.
    """
    folder = here("The folder of the model", path).absolute()
    if not folder.is_dir():
        raise bad_value("The folder of the model", str(path), "a folder that exists")
    if not (folder / PARAMS).is_dir():
        return load_safetensors(folder, mesh)
    facts = as_facts(read_settings(folder / FILE))
    params = parameters.restore(folder / PARAMS, facts.model, mesh)
    return ExportedModel(facts.model, params, _tokenizer(folder), facts, mesh)


def load_safetensors(folder: Path, mesh: jax.sharding.Mesh | None = None) -> ExportedModel:
    """Returns the model of a folder's safetensors, also where it has an Orbax checkpoint.

    Args:
      folder: with `config.json`.
      mesh: as in `load_model`.

    Raises:
      InputError: as `load_model`.
    """
    settings = read_settings(folder / FILE)
    if hub.is_hub(settings):
        return _load_hub(folder, settings, names.HUB, mesh)
    if is_for_transformers(settings):
        return _load_hub(folder, settings, names.OURS, mesh)
    facts, params = read_safetensors(folder, settings)
    params = parameters.place(params, facts.model, mesh)
    return ExportedModel(facts.model, params, _tokenizer(folder), facts, mesh)


def _load_hub(
    folder: Path,
    settings: Mapping[str, Any],
    naming: names.Naming,
    mesh: jax.sharding.Mesh | None,
) -> ExportedModel:
    """Returns a model as transformers has it, each device's part of it read for that alone."""
    facts, tokenizer = as_facts(settings), _tokenizer(folder)
    config, where = facts.model, repr(str(folder))
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{where} has a tokenizer of {tokenizer.vocab_size:,} ids, but its model has a"
            f" vocab_size of {config.vocab_size:,}, which must be as many or more."
        )
    with tensor_files.opened(folder) as (shapes, read):
        shapes = {name: x for name, x in shapes.items() if not tensor_files.is_old_table(name)}
        expected = names.tensor_shapes(config, naming)
        tied = naming.whole["embedding",]
        if config.tie_embeddings and names.OUTPUT in shapes:
            # Some write the one table twice.
            expected |= {names.OUTPUT: expected[tied]}
        if not config.tie_embeddings and tied in shapes and names.OUTPUT not in shapes:
            raise InputError(
                f"{where} has no tensor {names.OUTPUT}, but the model needs one unless its"
                " config.json says tie_word_embeddings = true."
            )
        tensor_files.check_shapes(shapes, expected, where)
        if config.tie_embeddings and names.OUTPUT in shapes:
            _check_tied(read, tied, shapes[tied], where)
        params = sharded.read_params(read, config, naming, mesh)
    return ExportedModel(config, params, tokenizer, facts, mesh)


def _check_tied(
    read: tensor_files.Read, name: str, shape: tuple[int, ...], where: str, rows: int = 4096
) -> None:
    """Checks, some rows at a time, that both tables of a tied model are one."""
    for start in range(0, shape[0], rows):
        part = slice(start, min(start + rows, shape[0])), slice(0, shape[1])
        if not np.array_equal(read(name, part), read(names.OUTPUT, part)):
            raise InputError(
                f"{where} has a {names.OUTPUT} that is not its {name}, but its config.json says"
                " tie_word_embeddings = true; set that to false."
            )


def read_safetensors(
    path: str | os.PathLike[str], settings: Mapping[str, Any]
) -> tuple[Facts, Params]:
    """Returns a model in the authors' naming.

    Args:
      path: folder of safetensors, or one file.
      settings: content of its `config.json`, as the authors' code or this one writes it.

    Returns:
      What it is, and its parameters: float32 in the host's memory. The bias is a table,
      of kind "decay" too, which safetensors don't know.

    Raises:
      InputError: if there is none or it can't be read; if a tensor is missing, has
        another shape, or has no place in the model, before any is read.
    """
    with tensor_files.opened(local_path("The folder of safetensors", path)) as (shapes, read):
        facts = as_facts(settings, shapes)
        facts = dataclasses.replace(facts, model=parameters.table_config(facts.model))
        one_table = is_tied(settings) and names.OUTPUT not in shapes and names.INPUT in shapes
        if one_table:
            shapes = shapes | {names.OUTPUT: shapes[names.INPUT]}

        def get(name: str) -> Float[np.ndarray, "..."]:
            return read(names.INPUT if one_table and name == names.OUTPUT else name)

        tensor_files.check_shapes(shapes, names.tensor_shapes(facts.model), repr(str(path)))
        return facts, names.from_torch(get, facts.model, repr(str(path)))


def _tokenizer(folder: Path) -> Tokenizer | None:
    for name in FILE_NAMES:
        if (folder / name).is_file():
            return Tokenizer.load(folder / name)
    return None
