"""A folder that transformers loads: as a family it knows, else with a modeling file of ours."""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from lazyattn.data.tokenizer import CONFIG_NAME, Tokenizer
from lazyattn.model.config import ModelConfig
from lazyattn.pretrained import hub, names, settings
from lazyattn.pretrained.load import ExportedModel

CODE = Path(__file__).parent / "transformers" / "modeling_lazyattn.py"
_SPECIAL = ("bos", "eos", "pad")


def write(folder: Path, model: ExportedModel, dtype: str) -> None:
    """Writes all but the card.

    Args:
      folder: that exists.
      model: any. One that no family has gets the modeling file, which computes all there is.
      dtype: of its matrices, "float32" or "bfloat16"; of a family, of all.
    """
    config, length = model.config, model.facts.sequence_length
    family = hub.family_of(config)
    if family is not None:
        content = hub.as_settings(config, length, dtype)
        names.write(folder, model.params, config, dtype, names.HUB)
    else:
        content = settings.as_transformers_settings(model.facts, dtype, CODE.stem)
        names.write(folder, model.params, config, dtype, names.OURS)
        shutil.copyfile(CODE, folder / CODE.name)
    tokenizer = model.tokenizer
    if tokenizer is not None:
        ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_id") for kind in _SPECIAL}
        content |= ids
        _write_json(folder / "generation_config.json", ids)
        path = tokenizer.save_in(folder)
        if tokenizer.kind == "tokenizer.json":
            # What a family that was not trained here begins with is its own affair.
            if family is None or model.facts.step is not None:
                _let_begin(path, tokenizer)
            _write_json(folder / CONFIG_NAME, _tokenizer_settings(tokenizer, length))
    _write_json(folder / settings.FILE, content)


def loading(config: ModelConfig, kind: str = "AutoModelForCausalLM") -> str:
    """Returns the call with which transformers loads a model's folder, or a `kind` from it."""
    code = ", trust_remote_code=True" if hub.family_of(config) is None else ""
    return f"{kind}.from_pretrained(FOLDER{code})"


def _tokenizer_settings(tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """Returns what makes transformers read the file as it is, for texts that go on at their end."""
    names = {
        f"{kind}_token": tokenizer.name_of(getattr(tokenizer, f"{kind}_id")) for kind in _SPECIAL
    }
    return names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }


def _let_begin(path: Path, tokenizer: Tokenizer) -> None:
    """Has transformers begin each text with the token that ours begin with, unless it does."""
    if tokenizers.Tokenizer.from_file(str(path)).encode("").ids:
        return
    content, name = (
        json.loads(path.read_text(encoding="utf-8-sig")),
        tokenizer.name_of(tokenizer.bos_id),
    )
    template = tokenizers.processors.TemplateProcessing(
        single=[name, "$A"], pair=[name, "$A", "$B:1"], special_tokens=[(name, tokenizer.bos_id)]
    )
    before = [content["post_processor"]] if content.get("post_processor") else []
    after = [*before, json.loads(template.__getstate__())]
    content["post_processor"] = {"type": "Sequence", "processors": after}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
