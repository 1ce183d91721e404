"""Draws the pictures of README.md and docs/ from runs of the quickstart.

for kind in sharp paper softmax; do
    python train.py --config=configs/quickstart.py:$kind --workdir=runs/$kind
done
python docs/pictures.py runs/sharp runs/paper runs/softmax
"""

import json
import pathlib
import sys
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lazyattn.checkpoint.load import load_trained
from lazyattn.model.transformer import attention_weights

FOLDER = pathlib.Path(__file__).parent / "pictures"
TEXT = (
    "The try statement specifies exception handlers and/or cleanup code for a group of statements."
    " When an exception occurs in the try suite, a search for an exception handler is started."
    " It inspects the except clauses in turn until one is found that matches the exception."
)


def records(run: str) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl."""
    lines = pathlib.Path(run, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def draw_losses(runs: dict[str, str]) -> None:
    """Draws training losses (smoothed) and validation losses of several runs."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for number, (label, run) in enumerate(runs.items()):
        steps = records(run)
        loss = np.array([step["loss"] for step in steps])
        smooth = np.convolve(loss, np.ones(15) / 15, mode="valid")
        axes.plot(np.arange(len(smooth)) + 8, smooth, color=f"C{number}", alpha=0.45, lw=1)
        points = [(s["step"], s["validation_loss"]) for s in steps if "validation_loss" in s]
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=label, ms=4)
    axes.set_ylim(4.2, 7)
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.set_title("Quickstart: validation loss (dots) and training loss, mean of 15 steps")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(FOLDER / "losses.png", dpi=110)


def draw_attention(runs: dict[str, str]) -> None:
    """Draws the attention maps of one layer's heads, a row of them a run."""
    figure, axes = plt.subplots(
        len(runs), 4, figsize=(9, 2.7 * len(runs)), squeeze=False, layout="constrained"
    )
    for row, (label, run) in enumerate(runs.items()):
        trained = load_trained(run)
        ids = np.array([[trained.tokenizer.bos_id, *trained.tokenizer.encode(TEXT)]], np.int32)
        with jax.set_mesh(trained.mesh):
            weights = attention_weights(trained.params, trained.experiment.model, ids)
        layer = np.asarray(weights)[-1, 0]
        causal = np.tri(layer.shape[-1], dtype=bool)
        for head, panel in enumerate(axes[row]):
            shown = np.where(layer[head] > 0, layer[head], np.nan)
            panel.set_facecolor("#e8e8e8")
            panel.imshow(np.sqrt(shown), cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
            zeros = 1 - (layer[head] > 0)[causal].mean()
            panel.set_title(f"{label}, head {head}: {zeros:.0%} zeros", fontsize=8)
            panel.set_xticks([])
            panel.set_yticks([])
    figure.suptitle("Attention weights of the last layer (square root); grey: exactly 0", size=10)
    figure.savefig(FOLDER / "attention.png", dpi=110)


def main(arguments: list[str]) -> None:
    """Draws both pictures from the runs given: lazy first, softmax last."""
    labels = ["lazy (sharp)", "lazy (paper)", "softmax"][: len(arguments)]
    runs = dict(zip(labels, arguments, strict=True))
    FOLDER.mkdir(exist_ok=True)
    draw_losses(runs)
    ends = list(runs.items())
    draw_attention(dict([ends[0], ends[-1]]))


if __name__ == "__main__":
    main(sys.argv[1:])
