"""The kinds of attention that the study compares, as changes to the settings."""

from collections.abc import Mapping
from typing import Any

from lazyattn.model.config import RECIPES


def _attention(recipe: str | None = None, **changes: Any) -> dict[str, Any]:
    """Returns a recipe of `lazyattn.model.config` with changes, by the settings' dotted names."""
    # A recipe may be missing in an older version: its variant is then refused, not all of them.
    found = {} if recipe is None else RECIPES.get(recipe, {"recipe": recipe})
    settings = {f"model.attention.{name}": value for name, value in {**found, **changes}.items()}
    # The default when the study began; nothing to variants without slopes.
    return settings | {"optimizer.log_slope_factor": 30.0}


def _softmax(**changes: Any) -> dict[str, Any]:
    return _attention(variant="softmax", **changes)


def _alibi(**changes: Any) -> dict[str, Any]:
    return _attention("sharp", variant="biased_softmax", **changes)


def _steady(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"optimizer.log_slope_factor": 1.0}


VARIANTS: Mapping[str, dict[str, Any]] = {
    # Controls.
    "softmax": _softmax(),
    "softmax_qk_norm": _softmax(qk_norm=True),
    "softmax_gate": _softmax(output_gate=True),
    "window512": _softmax(window=512, global_share=0.25),
    "window1024": _softmax(window=1024, global_share=0.25),
    "softmax_alibi": _alibi(),
    "softmax_alibi_qk_norm": _alibi(qk_norm=True),
    "softmax_alibi_global4": _alibi(global_share=0.25),
    # Elastic-Softmax.
    "paper": _attention("paper"),
    "sharp_table": _attention("sharp_table"),
    "sharp": _attention("sharp"),
    "sharp_tau1": _attention("sharp", offset_init=-1.0),
    "sharp_qk_norm": _attention("sharp", qk_norm=True),
    "sharp_tau1_qk_norm": _attention("sharp", offset_init=-1.0, qk_norm=True),
    "sharp_gate": _attention("sharp", output_gate=True),
    # Slopes that train at the common rate, and so stay near where they start.
    "sharp_steady": _steady(_attention("sharp")),
    "sharp_qk_norm_steady": _steady(_attention("sharp", qk_norm=True)),
    "softmax_alibi_steady": _steady(_alibi()),
    "softmax_alibi_qk_norm_steady": _steady(_alibi(qk_norm=True)),
    "sharp_global8": _attention("sharp", global_share=0.125),
    "sharp_global4": _attention("sharp", global_share=0.25),
    "sharp_global4_nope": _attention("sharp", global_share=0.25, global_rope=False),
    "sharp_global8_nope": _attention("sharp", global_share=0.125, global_rope=False),
    "lazy_no_bias": _attention("sharp", variant="lazy_no_bias"),
}
