"""What is timed, in order of importance, and one line of results."""

import dataclasses
from collections.abc import Sequence

from lazyattn.errors import InputError

# Each case: its attention, what it holds, and whose it is.
CASES = {
    "softmax-full": ("softmax", "full", "lazyattn"),
    "lazy-full": ("lazy", "full", "lazyattn"),
    "lazy-spans": ("lazy", "spans", "lazyattn"),
    "trained-full": ("lazy", "full", "lazyattn"),
    "trained-spans": ("lazy", "spans", "lazyattn"),
    "cudnn": ("softmax", "full", "cudnn"),
    "torch": ("softmax", "full", "torch"),
    "pallas": ("softmax", "full", "pallas"),
    "today": ("lazy", "full", "today"),
}
# Of most points.
USUAL = ("softmax-full", "lazy-spans", "lazy-full", "cudnn", "torch")


@dataclasses.dataclass(frozen=True)
class Point:
    """Keys of a row, and rows.

    Attributes:
      context: keys of a row.
      batch: rows; None: the most whose cache fits in memory.
    """

    context: int
    batch: int | None

    @classmethod
    def parse(cls, text: str) -> "Point":
        """Reads "32768x16" or "32768xmax".

        Raises:
          InputError: for anything else.
        """
        try:
            context, batch = text.split("x", 1)
            return cls(int(context), None if batch == "max" else int(batch))
        except ValueError:
            allowed = "a context and a batch such as 32768x16, or 32768xmax"
            raise InputError(f"--points has {text!r}, but it must be {allowed}.") from None


@dataclasses.dataclass(frozen=True)
class Wave:
    """What is compiled at once, then timed: compiling uses the device too.

    Attributes:
      points: contexts and batches.
      cases: of `CASES`, whose attention is timed.
      tokens: those of which whole tokens are timed too.
    """

    points: tuple[Point, ...]
    cases: tuple[str, ...]
    tokens: tuple[str, ...] = ()


def _wave(points: str, cases: Sequence[str], tokens: Sequence[str] = ()) -> Wave:
    return Wave(tuple(map(Point.parse, points.split())), tuple(cases), tuple(tokens))


_BOTH = ("softmax-full", "lazy-spans")
PLAN = (
    _wave("32768x16 4096x8", USUAL, _BOTH),
    _wave("16384x8 32768x8 16384x64 32768x64", USUAL, ["softmax-full"]),
    _wave("32768x16", ["trained-spans", "trained-full"], ["trained-spans"]),
    _wave("131072x8 131072x1 32768x1 16384x1 4096x1", USUAL),
    _wave("4096x64 131072x64", USUAL),
    _wave("32768xmax", _BOTH, _BOTH),
)


def chosen(points: Sequence[str], cases: Sequence[str]) -> tuple[Wave, ...]:
    """Returns the waves of a run.

    Args:
      points: one wave each, "4096x8+4096x64" one of two; whole tokens of our cases too;
        none: `PLAN`.
      cases: the only ones; none: those of the plan, or the usual ones.

    Raises:
      InputError: for a case or a point that is none.
    """
    for case in cases:
        if case not in CASES:
            raise InputError(f"--cases has {case!r}, but it must be of {', '.join(CASES)}.")
    if points:
        own = tuple(cases or USUAL)
        tokens = tuple(case for case in own if CASES[case][2] == "lazyattn")
        return tuple(_wave(wave.replace("+", " "), own, tokens) for wave in points)
    if not cases:
        return PLAN
    waves = []
    for wave in PLAN:
        kept, tokens = (tuple(c for c in x if c in cases) for x in (wave.cases, wave.tokens))
        if kept:
            waves.append(Wave(wave.points, kept, tokens))
    return tuple(waves)


@dataclasses.dataclass
class Line:
    """One line of results.

    Attributes:
      implementation: "lazyattn" or another's name; "today": what decoding was before.
      attention: "softmax" or "lazy".
      cache: "full" or "spans".
      slopes: "alibi", those of an initialized model; of a trained one its name; "none".
      context, batch: keys of a row, rows.
      ms_token: a whole token, milliseconds; None: not timed.
      ms_attention: attention of all layers.
      bytes: that a whole token must read: weights, keys of pages that can matter, values of
        pages with a weight.
      limit_ms: time of these at the rate of a copy.
      cache_bytes_share: what the cache holds of all keys and values.
      bytes_attention, limit_attention_ms: the same of attention alone.
      read_share: what attention must read of all keys and values.
      score_bound: U of the spans, in nats: no score is above it before the bias.
      largest_batch: rows whose cache fits in memory beside the weights.
      layers_timed: layers that attention was timed over.
      copy_gb_s: rate of the copy, bytes read and written, 1e9 a second.
      device, jax, jax_triton, commit, date: of the run.
      error: why there is no time.
    """

    implementation: str
    attention: str
    cache: str
    slopes: str
    context: int
    batch: int
    ms_token: float | None = None
    ms_attention: float | None = None
    bytes: int | None = None
    limit_ms: float | None = None
    cache_bytes_share: float | None = None
    bytes_attention: int | None = None
    limit_attention_ms: float | None = None
    read_share: float | None = None
    score_bound: float | None = None
    largest_batch: int | None = None
    layers_timed: int = 0
    copy_gb_s: float = 0.0
    device: str = ""
    jax: str = ""
    jax_triton: str = ""
    commit: str = ""
    date: str = ""
    error: str | None = None

    def __str__(self) -> str:
        words = []
        for what, ms, limit in (
            ("attention", self.ms_attention, self.limit_attention_ms),
            ("token", self.ms_token, self.limit_ms),
        ):
            if ms is not None and limit is not None:
                words.append(f"{what} {ms:.3f} ms, limit {limit:.3f}, {ms / limit:.2f} x")
        if self.read_share is not None:
            words.append(f"reads {self.read_share:.1%} of all keys and values")
        if self.cache_bytes_share is not None:
            words.append(f"holds {self.cache_bytes_share:.1%}")
        if self.largest_batch is not None:
            words.append(f"{self.largest_batch} rows fit")
        name = f"{self.implementation} {self.attention} {self.cache} {self.slopes}"
        text = "; ".join([*words, *([self.error] if self.error else [])])
        return f"{name}, context {self.context}, batch {self.batch}: {text}"
