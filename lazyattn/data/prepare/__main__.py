"""Tokenises a corpus into a folder of shards that training reads.

    python -m lazyattn.data.prepare --input='DIR/*.parquet' --output=DIR --tokenizer=train

Killed, interrupted or out of disk, the same command goes on where it was. Exit status:
0 when done, 2 when something given is wrong, 130 when stopped by Ctrl-C.
"""

import sys
from collections.abc import Sequence

from absl import app, flags, logging

from lazyattn import command_line, flag_help, paths
from lazyattn.data.prepare.hub import SCHEME
from lazyattn.data.prepare.run import Preparation, Prepared, prepare_shards
from lazyattn.data.prepare.selection import Selection
from lazyattn.errors import InputError
from lazyattn.quantity import quantity

# A process that only imports this keeps its own flags.
FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_INPUT = paths.define_list(
    "input",
    [],
    "Files, folders or patterns of them, with commas between: .parquet, .jsonl, .jsonl.zst,"
    " .jsonl.gz, .json, .csv, .txt, or the folder of a built TensorFlow dataset. Or datasets of the"
    " Hugging Face hub, hf://datasets/OWNER/NAME, as a stream (pip install datasets).",
    FLAGS,
    buckets=True,
    allowed=SCHEME,
)
_VALIDATION_INPUT = paths.define_list(
    "validation_input",
    [],
    "The same, of held-out documents; then all of --input is trained on.",
    FLAGS,
    buckets=True,
    allowed=SCHEME,
)
flags.DEFINE_string(
    "hub_config",
    None,
    "Configuration of datasets of the hub, such as a language; default: the only one.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "hub_split", None, "Split of them that --input reads; default: train.", flag_values=FLAGS
)
flags.DEFINE_string(
    "hub_validation_split",
    None,
    "Split of them that --validation_input reads; default: validation.",
    flag_values=FLAGS,
)
paths.define("output", "", "Folder of the shards.", FLAGS, buckets=True)
paths.define(
    "tokenizer",
    "",
    "A tokenizer.json, a SentencePiece model, a folder with one, or 'train': learn one here.",
    FLAGS,
    buckets=True,
)
flags.DEFINE_string(
    "eos_token",
    None,
    "Name of the tokenizer's special token that ends a document; default: what its"
    " tokenizer_config.json says, or one of the usual names.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("vocab_size", 32000, "Entries of a tokenizer trained here.", flag_values=FLAGS)
flags.DEFINE_integer("sample_mb", 256, "MB of text to train it on.", flag_values=FLAGS)
flags.DEFINE_integer(
    "min_int_score",
    None,
    "Lowest score of a document that is kept; default: all are.",
    flag_values=FLAGS,
)
_VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction",
    0.005,
    "Share of the documents held out, by the hash of their id.",
    flag_values=FLAGS,
)
flags.DEFINE_string("text_field", "text", "Column or key of the text.", flag_values=FLAGS)
_CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template",
    None,
    "For chats: how a message becomes text, with {role} and {content}; --text_field then names a"
    " list of messages. \\n is a line end.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "id_field",
    "id",
    "Column or key of the id; empty: the hash of the text is the id.",
    flag_values=FLAGS,
)
flags.DEFINE_string("score_field", "int_score", "Column or key of the score.", flag_values=FLAGS)
flags.DEFINE_integer("shard_mb", 512, "MB of text a shard has at most.", flag_values=FLAGS)
flags.DEFINE_integer("num_workers", 0, "Processes; 0: one for each core.", flag_values=FLAGS)
flags.DEFINE_string(
    "on_fault",
    "skip",
    "Damaged files and documents: 'skip' and count them, or 'fail'.",
    flag_values=FLAGS,
)


def _summary(prepared: Prepared) -> str:
    content = prepared.manifest
    lines = []
    for name, split in content.splits.items():
        lines.append(
            f"{name:<12}{quantity(split.documents, 'document')}, {quantity(split.tokens, 'token')},"
            f" {quantity(split.bytes, 'byte')} ({split.bytes / max(1, split.tokens):.3f} a token),"
            f" {quantity(len(split.shards), 'shard')}"
        )
    for reason, count in content.skipped.items():
        lines.append(f"{'skipped':<12}{quantity(count, 'document')}: {reason}")
    for source in content.sources:
        if source.error is not None:
            lines.append(f"{'damaged':<12}{source.file}: {source.error}")
    if not content.splits["validation"].documents:
        lines.append(
            "No document was held out for validation, which training needs: prepare it anew with a"
            " larger --validation_fraction or with --validation_input."
        )
    if prepared.finished_before:
        lines.append("It had been prepared before; nothing was done.")
    elif prepared.bytes:
        lines.append(
            f"{'took':<12}{prepared.seconds:.1f} s: {prepared.bytes / 1e6 / prepared.seconds:.2f}"
            f" MB/s, {prepared.tokens / prepared.seconds:,.0f} tokens/s"
        )
    else:
        lines.append("All pieces were done before; this run finished the folder.")
    lines.append(f"{'read it':<12}--config.data.path={prepared.folder}")
    return "\n".join(lines)


def _prepare() -> int:
    if _VALIDATION_INPUT.value and FLAGS["validation_fraction"].present:
        raise InputError(
            f"--validation_fraction is {_VALIDATION_FRACTION.value}, but --validation_input says"
            " what is held out; give one of them."
        )
    template = _CHAT_TEMPLATE.value and _CHAT_TEMPLATE.value.replace("\\n", "\n")
    preparation = command_line.settings(
        Preparation,
        FLAGS,
        inputs=tuple(_INPUT.value),
        validation_inputs=tuple(_VALIDATION_INPUT.value),
        selection=command_line.settings(Selection, FLAGS, chat_template=template),
    )
    print(_summary(prepare_shards(preparation)))
    return 0


def _parse(argv: Sequence[str]) -> list[str]:
    if flag_help.is_asked(argv):
        print(flag_help.help_text(str(__doc__), {}, FLAGS), end="")
        sys.exit(0)
    try:
        example = "--input=PATTERN (with quotation marks around a pattern)"
        return command_line.parse(argv, FLAGS, example)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str]) -> int:
    """Prepares; returns the exit status."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    paths.print_any_name()
    try:
        return _prepare()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
