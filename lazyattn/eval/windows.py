"""Cutting a long document into windows in which every token is predicted once."""

from typing import NamedTuple

from lazyattn.errors import require


class Window(NamedTuple):
    """One row to score.

    Attributes:
      start, stop: the row is tokens start ... stop - 1.
      first: the first token predicted here; those before it are context.
    """

    start: int
    stop: int
    first: int


def rolling_windows(tokens: int, context: int, stride: int) -> list[Window]:
    """Returns the windows of a document.

    The first predicts all it can. Every further one predicts the next `stride`
    tokens and reaches back as far as the context allows, so that from then on a
    prediction sees at least context - stride + 1 tokens. With stride = context these
    are the windows of lm-evaluation-harness's rolling log-likelihood.

    Args:
      tokens: tokens of the document, the first of which is never predicted.
      context: tokens a prediction may look at.
      stride: tokens predicted by a window after the first, from 1 to `context`.

    Raises:
      InputError: for a document of fewer than 2 tokens, or a stride out of range.
    """
    require(tokens >= 2, "the tokens of a document", tokens, "at least 2")
    require(
        1 <= stride <= context, "--stride", stride, f"from 1 to the shortest context, {context}"
    )
    windows = [Window(0, min(tokens, context + 1), 1)]
    while (done := windows[-1].stop) < tokens:
        stop = min(tokens, done + stride)
        windows.append(Window(max(0, stop - context - 1), stop, done))
    return windows
