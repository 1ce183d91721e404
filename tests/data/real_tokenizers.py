"""Small tokenizers of the kinds that people bring, made by the libraries that make theirs."""

import io
import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lazyattn.data.codecs import SentencePiece, TokenizerJson
from lazyattn.data.tokenizer import Tokenizer

TEXTS = [
    "the cat sat on the mat and the dog sat by the door",
    "Attention that is allowed to look at nothing. Question: is it? Answer: yes",
    "The model looks at the words that matter; the rest of them get no weight at all.",
] * 4
SINGLE_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama_like(vocab_size=400):
    """Returns BPE as Llama's first: a space in front of a text, single bytes to fall back on."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trained.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 259, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    content = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *SINGLE_BYTES, *content["vocab"]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in content["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _made(tokenizer)


def gemma_like():
    """Returns the same without a space in front, as Gemma's."""
    tokenizer = tokenizers.Tokenizer.from_str(llama_like()._codec.content.decode())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _made(tokenizer)


def split_by_pattern():
    """Returns byte-level BPE as Llama 3's: a pattern cuts words, which may be tokens as a whole."""
    tokenizer = tokenizers.Tokenizer.from_str(across_spaces()._codec.content.decode())
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer.model = models.BPE(model["vocab"], merges, ignore_merges=True)
    words = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _made(tokenizer)


def across_spaces(vocab_size=400):
    """Returns byte-level BPE that merges across spaces: nothing splits a text beforehand."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, vocab_size, pre_tokenizers.ByteLevel.alphabet())
    return _made(tokenizer)


def without_alphabet(vocab_size=300):
    """Returns the JSON of byte-level BPE that knows only the bytes of its training text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, vocab_size, [])
    return tokenizer.to_str().encode()


def sentencepiece(**options):
    """Returns what `tokenizer.model` of SentencePiece holds: BPE with bytes, unless changed."""
    library = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    options = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 360} | options
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


def sentencepiece_tokenizer(**options):
    """Returns the same as a `Tokenizer`."""
    return Tokenizer(SentencePiece(sentencepiece(**options)))


def _train(tokenizer, vocab_size, alphabet):
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)


def _made(tokenizer):
    return Tokenizer(TokenizerJson(tokenizer.to_str().encode()))
