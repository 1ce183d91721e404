"""What the report says: its sections, their figures, and what each caption explains."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure; `name` is what page/report.js calls it."""

    name: str
    title: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page, and whether it has anything to show."""

    id: str
    title: str
    text: str
    figures: tuple[Figure, ...]
    applies: Callable[[Sequence[dict[str, Any]]], bool] = lambda models: True


SECTIONS = (
    Section(
        "zeros",
        "Exact zeros",
        "Elastic-Softmax sets weak weights to exactly zero. A query whose weights all vanish takes"
        " nothing from any token.",
        (
            Figure(
                "zeros",
                "Weights that are exactly 0, by layer and head",
                "Share of the pairs of a query and a key it may see (causal) whose weight is 0 to"
                " the last bit. Softmax has none.",
            ),
            Figure(
                "silent",
                "Queries that attend to nothing",
                "Share of queries all of whose weights are 0: their attention output is 0.",
            ),
        ),
    ),
    Section(
        "allocation",
        "Where the weight goes",
        "Softmax must spend a weight of 1 on every query. What Lazy Attention keeps of it, and how"
        " much of that lies on the first token.",
        (
            Figure(
                "allocation",
                "Kept and removed weight, by layer",
                "Mean over heads and over all queries but first tokens, which see nothing else. The"
                " parts add up to 1; where an offset is positive a query may keep more than 1, and"
                " nothing is removed.",
            ),
        ),
    ),
    Section(
        "sink",
        "Attention sink",
        "Attention that a softmax head has no use for tends to pile up on the first token.",
        (
            Figure(
                "sink",
                "Sink metric of Gu et al., by position",
                "Share of layers and heads whose mean weight on the token at position k, over the"
                " queries from k on, exceeds 0.3; mean over up to 100 sequences of 64 tokens cut"
                " from the text, no beginning-of-document token added (arXiv 2410.10781). Near the"
                " end few queries are left, and a token's own weight on itself counts among them.",
            ),
            Figure(
                "first",
                "Mean weight on the first token, by layer and head",
                "Over the rows of text, whose first token is the beginning-of-document token, and"
                " all later queries.",
            ),
        ),
    ),
    Section(
        "tiles",
        "Tiles and the speed they imply",
        "Kernels work on tiles of queries by keys. Negligible tiles are not visited at all; visited"
        " tiles without a weight above 0 need only their scores.",
        (
            Figure(
                "tiles",
                "Visited and live tiles, and what they cost",
                "Visited: not certain, before any score is computed, to hold less softmax mass than"
                " the setting skip_mass allows. Live: with at least one weight above 0. Both are"
                " shares of the causal tiles. Cost: tile products over those of softmax attention"
                " that visits every tile, by count: (v + 3 r + 3 v + 2 r) / 7 in training,"
                " (v + 2 r) / 2 in inference, v visited and r live; above 1 Lazy Attention is the"
                " dearer one. A count is no measured time, and tiles are coarse in short rows.",
            ),
        ),
    ),
    Section(
        "span",
        "Span of each head",
        "A head pays for the distance it looks over, not for the length of the row.",
        (
            Figure(
                "span",
                "Distance within which 95% of the kept weight lies",
                "In tokens, over all queries of the rows; limited by the length of a row.",
            ),
            Figure(
                "distance",
                "Share of the kept weight within each distance",
                "One line a head. The horizontal axis is the distance i - j plus 1, so that a"
                " token's weight on itself stands at 1.",
            ),
        ),
    ),
    Section(
        "offsets",
        "Learned offsets",
        "The offset tau of each head. Weights below -tau / n become zero, n being the number of"
        " keys in sight; at 0 nothing is removed.",
        (
            Figure(
                "offsets",
                "Offset tau, by layer",
                "One dot a head, the bar their mean.",
            ),
        ),
        lambda models: any("offset" in model["matrices"] for model in models),
    ),
    Section(
        "bias",
        "Learned distance bias",
        "What each head adds to the score of a key at a distance: positional discrimination.",
        (
            Figure(
                "bias",
                "Bias by distance",
                "Nats added to a score, one line a head; values below -20, which leave nothing of a"
                " weight, are cut off. Past the table the line is the learned tail, or 0 where the"
                " model has none.",
            ),
        ),
        lambda models: any(model["bias"] for model in models),
    ),
    Section(
        "maps",
        "Attention maps",
        "Queries run down, keys across. Grey cells hold no weight at all.",
        (
            Figure(
                "maps",
                "Weights of the first row of text",
                "Each cell shows the largest weight among its queries and keys (cells grow with the"
                " row, at most 128 a side); the share of zeros is over all rows. Point at a cell to"
                " read its tokens.",
            ),
        ),
    ),
    Section(
        "entropy",
        "Entropy",
        "How spread out attention is over the keys that it keeps.",
        (
            Figure(
                "entropy",
                "Entropy of the kept weights, by layer and head",
                "Of the weights divided by their sum, mean over queries that attend to anything, in"
                " nats: exp of it is the number of equally weighted keys. Softmax's own entropy,"
                " before the offset, is in report.json.",
            ),
        ),
    ),
    Section(
        "states",
        "Token states",
        "Representations collapse when tokens become alike; massive activations are single numbers"
        " far above the rest, and come with attention sinks.",
        (
            Figure(
                "cosine",
                "Mean cosine of two tokens' states, by layer",
                "Over all pairs of different tokens of the first row, in the residual stream after"
                " each layer; 1 when all point the same way.",
            ),
            Figure(
                "massive",
                "Largest activations, by layer",
                "Magnitudes in the residual stream of the first row: the three dimensions with the"
                " largest, and the median of all. Sun et al. (arXiv 2402.17762) call an activation"
                " massive above 100 and about 1,000 times the median.",
            ),
        ),
    ),
    Section(
        "rollout",
        "Attention rollout",
        "Which input tokens each token's state comes from, if attention alone carried them.",
        (
            Figure(
                "rollout",
                "Rollout after the last layer",
                "Tokens run down, places of the input across. Each layer passes on its weights,"
                " mean over heads, plus the token itself, divided by their sum (Abnar and Zuidema,"
                " arXiv 2005.00928); a query that attends to nothing keeps what it has. First row"
                " of text; the colour is the square root of the share that comes from a cell of the"
                " input, the strongest cell being the end of the ramp.",
            ),
            Figure(
                "rolloutfirst",
                "Share that comes from the first token",
                "Mean over the later tokens of the first row, after each layer.",
            ),
        ),
    ),
    Section(
        "inserted",
        "Inserted token",
        "Does attention flow to a token because it is a fixed one, wherever it stands?",
        (
            Figure(
                "inserted",
                "Mean weight on a fixed token placed at position k",
                "The beginning-of-document token is put at position k of up to 32 sequences of 64"
                " tokens; mean weight on it over later queries, layers and heads. Dashed: on the"
                " token that stood at k before. A sink that follows the token shows as a solid line"
                " far above its dashed one; one that follows the position, as both high at k = 0.",
            ),
        ),
    ),
)
