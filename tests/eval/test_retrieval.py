"""Rows hold what they say, and made-up models whose right answer is known get it."""

import math

import numpy as np
import pytest

from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from lazyattn.eval.retrieval import (
    copy_rows,
    default_distances,
    farthest_copy,
    measure_copy,
    measure_passkey,
    passkey_distances,
    passkey_rows,
)
from tests.eval.letters import Letters
from tests.training import tiny

VOCAB = 5000
# Every token once, so that a token says where it is from.
STREAM = np.arange(10, VOCAB, dtype=np.uint16)
BOS = 1
LENGTH, SPAN, ROWS = 256, 16, 12


def copier(distance, miss=3.0):
    """Returns a model that is sure of the token `distance` before the one it predicts."""

    def score(tokens):
        hit = np.zeros((len(tokens), tokens.shape[1] - 1), bool)
        hit[:, distance - 1 :] = tokens[:, distance:] == tokens[:, :-distance]
        return np.where(hit, 0.0, miss).astype(np.float32), hit

    return score


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("distance", [SPAN, 96, 200, None])
def test_copy_rows_repeat_text_of_another_place(distance, bos):
    tokens, mask = copy_rows(STREAM, LENGTH, distance, span=SPAN, rows=ROWS, seed=0, bos=bos)
    assert tokens.shape == (ROWS, LENGTH + 1) and tokens.dtype == np.int32
    assert mask.shape == (ROWS, LENGTH) and mask.dtype == bool
    # Every token of the repetition but its first is scored.
    assert (mask == (np.arange(LENGTH) >= LENGTH - SPAN + 1)).all()
    planted = [np.arange(LENGTH + 1 - SPAN, LENGTH + 1)]
    if distance is not None:
        planted.append(planted[0] - distance)
    for row in tokens:
        passage = row[-SPAN:]
        for places in planted:
            np.testing.assert_array_equal(row[places], passage)
        assert (np.diff(passage) % len(STREAM) == 1).all()
        others = np.delete(row, np.concatenate(planted))
        assert not np.isin(passage, others).any()
        rest = others if bos is None else others[1:]
        assert len(set(rest)) == len(rest)
        assert bos is None or row[0] == bos
    assert len({tuple(row) for row in tokens}) == ROWS


def test_the_farthest_copy_begins_a_row():
    farthest = farthest_copy(LENGTH, SPAN, bos=BOS)
    tokens, _ = copy_rows(STREAM, LENGTH, farthest, span=SPAN, rows=1, seed=0, bos=BOS)
    np.testing.assert_array_equal(tokens[0, 1 : SPAN + 1], tokens[0, -SPAN:])
    assert tokens[0, 0] == BOS


def test_rows_follow_from_the_seed_and_distances_share_their_text():
    near, again, far, other = (
        copy_rows(STREAM, LENGTH, distance, span=SPAN, rows=ROWS, seed=seed).tokens
        for distance, seed in ((96, 0), (96, 0), (200, 0), (96, 1))
    )
    np.testing.assert_array_equal(near, again)
    np.testing.assert_array_equal(near[:, -SPAN:], far[:, -SPAN:])
    assert (near == far).mean() > 0.8
    assert (near != other).mean() > 0.9


def test_a_stream_just_long_enough():
    stream = STREAM[: LENGTH + 1 + SPAN]
    tokens, _ = copy_rows(stream, LENGTH, 96, span=SPAN, rows=50, seed=0)
    assert all(not np.isin(row[-SPAN:], row[: LENGTH + 1 - SPAN - 96]).any() for row in tokens)
    with pytest.raises(InputError, match=r"The text has 272 tokens, but it must have at least 273"):
        copy_rows(stream[:-1], LENGTH, 96, span=SPAN, rows=1, seed=0)


def test_a_model_that_copies_from_one_distance_gets_that_one_alone():
    found = measure_copy(
        copier(96), STREAM, LENGTH, (32, 96, 128, None), span=SPAN, rows=ROWS, seed=0, bos=BOS
    )
    assert [found[distance].mean for distance in (32, 96, 128, None)] == [3, 0, 3, 3]
    assert found[96].stderr == 0 and found[96].rows == ROWS
    assert found[96].count == ROWS * (SPAN - 1)
    assert (found[96].saved.mean, found[96].saved.stderr) == (3, 0)
    assert found[32].saved.mean == 0 and found[None].saved is None


def test_what_copying_saves_is_compared_row_by_row():
    """Rows of text that costs more or less, of which copying saves a tenth of a nat always."""

    def score(tokens):
        hit = np.zeros((len(tokens), tokens.shape[1] - 1), bool)
        hit[:, 95:] = tokens[:, 96:] == tokens[:, :-96]
        return (tokens[:, 1:] / 1000 - 0.1 * hit).astype(np.float32), hit

    found = measure_copy(score, STREAM, LENGTH, (96, None), span=SPAN, rows=ROWS, seed=0)[96]
    assert found.saved.mean == pytest.approx(0.1, rel=1e-4)
    assert found.saved.stderr < 1e-5 < 0.1 < found.stderr
    alone = measure_copy(score, STREAM, LENGTH, (96,), span=SPAN, rows=ROWS, seed=0)[96]
    assert alone.saved is None and alone.mean == found.mean


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([tiny.TEXT + " The pass key is 12. What is it? " * 3], 300)


@pytest.mark.parametrize("distance", [64, 128, 200])
def test_passkey_rows_are_text_with_a_key_and_a_question(tokenizer, distance):
    made = passkey_rows(
        np.asarray(tokenizer.encode(tiny.TEXT * 9)),
        LENGTH,
        distance,
        tokenizer=tokenizer,
        rows=ROWS,
        seed=0,
        bos=tokenizer.bos_id,
    )
    assert made.tokens.shape == (ROWS, LENGTH + 1) and made.mask.shape == (ROWS, LENGTH)
    keys = set()
    for row, scored in zip(made.tokens, made.mask, strict=True):
        answer = np.flatnonzero(scored) + 1
        assert answer[-1] == LENGTH and (np.diff(answer) == 1).all()
        np.testing.assert_array_equal(row[answer], row[answer - distance])
        key = tokenizer.decode(row[answer])
        keys.add(key)
        assert len(key) == 6 and key[1:].isdigit() and key[1] != "0"
        text = tokenizer.decode(row)
        assert text.count(f" The pass key is{key}. Remember it.") == 1
        assert text.endswith(f" What is the pass key? The pass key is{key}")
        assert row[0] == tokenizer.bos_id
    assert len(keys) == ROWS


def test_without_a_tokenizer_a_marker_comes_before_the_key():
    made = passkey_rows(STREAM, LENGTH, 100, digits=3, rows=ROWS, seed=0)
    assert (made.mask == (np.arange(LENGTH) >= LENGTH - 3)).all()
    np.testing.assert_array_equal(made.tokens[:, -7:], made.tokens[:, -107:-100])
    assert len({tuple(row[-3:]) for row in made.tokens}) == ROWS


def test_a_model_that_repeats_keys_from_one_distance(tokenizer):
    stream = np.asarray(tokenizer.encode(tiny.TEXT * 9))
    found = measure_passkey(
        copier(128), stream, LENGTH, (64, 128), tokenizer=tokenizer, rows=ROWS, seed=0
    )
    assert found[128].right.mean == 1 and found[128].nats.mean == 0
    # Elsewhere a key's token may be right by chance, a whole key never.
    assert found[64].right.mean == 0 and found[64].nats.mean > 1
    assert found[64].right.rows == found[64].right.count == ROWS


def test_one_wrong_token_makes_a_key_wrong():
    def all_but_the_last_of_even_rows(tokens):
        hit = np.ones((len(tokens), tokens.shape[1] - 1), bool)
        hit[::2, -1] = False
        return np.zeros(hit.shape, np.float32), hit

    found = measure_passkey(all_but_the_last_of_even_rows, STREAM, 64, [40], rows=12, seed=0)[40]
    assert found.right.mean == 0.5
    assert found.right.stderr == pytest.approx(math.sqrt(0.25 / 11))


def test_the_shortest_and_longest_distance_of_a_key_fit():
    shared = {"tokenizer": Letters(), "rows": 3, "seed": 0, "bos": 0}
    nearest, farthest = passkey_distances(STREAM, LENGTH, **shared)
    near = passkey_rows(STREAM, LENGTH, nearest, **shared).tokens
    far = passkey_rows(STREAM, LENGTH, farthest, **shared).tokens
    before = Letters().encode(" The pass key is")
    np.testing.assert_array_equal(far[0, 1 : 1 + len(before)], before)
    told = Letters().encode(". Remember it. What is the pass key? The pass key is")
    assert (near[:, -6 - len(told) : -6] == told).all()
    for distance in (nearest - 1, farthest + 1):
        message = f"distance is {distance}, but it must be from {nearest} to {farthest} for pass"
        with pytest.raises(InputError, match=message):
            passkey_rows(STREAM, LENGTH, distance, **shared)
    with pytest.raises(InputError, match="length is 64, but it must be at least "):
        passkey_rows(STREAM, 64, 32, **shared)


def test_default_distances_are_cut_to_the_row():
    assert default_distances(4096) == (96, 512, 1024, 2048, 3800)
    assert default_distances(1024, bos=BOS) == (96, 512, 960)
    assert default_distances(256) == (96, 193)
    assert default_distances(128) == (65,)
    assert default_distances(16_384)[-2:] == (3800, 16_321)
    with pytest.raises(InputError, match="span is 64, but it must be at most 63"):
        default_distances(126, bos=BOS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": 15}, "distance is 15, but it must be from 16, the tokens repeated, to 241"),
        ({"distance": 242}, "distance is 242, but it must be from 16"),
        ({"span": 1}, "span is 1, but it must be at least 2"),
        ({"span": 129}, "span is 129, but it must be at most 128, since rows of 256 must have"),
        ({"rows": 0}, "rows is 0, but it must be at least 1"),
    ],
)
def test_bad_copies(change, message):
    arguments = {"distance": 96, "span": SPAN, "rows": 1, "seed": 0} | change
    with pytest.raises(InputError, match=message):
        copy_rows(STREAM, LENGTH, **arguments)
