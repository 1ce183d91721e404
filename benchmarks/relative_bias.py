"""Times softmax attention with a learned relative bias: this op, and others that can.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m benchmarks.relative_bias

Everyone gets the same queries, keys and values and a table with a number for each head and each
distance of the row, and gives back the output, or all gradients, that of the table included:

- "lazyattn": `lazy_attention` with this table and no offset; "lazyattn_all": the same, and no tile
  is left out (`skip_mass=0`);
- "tokamax", "cudnn", "xla": tokamax's fused attention and `jax.nn.dot_product_attention`, which
  take the bias as a dense array [heads, length, length] in the queries' dtype, made of the table in
  the same program;
- "flex_attention": PyTorch's FlexAttention, compiled, whose `score_mod` looks the table up.

Printed and written, as JSON and as a table: milliseconds a call; memory beyond arguments and
results; the relative error of the output, or of the worst gradient and of the table's, against the
definition in float32; and whether three calls gave the same bits. What can't run says why.
PyTorch and JAX share the GPU, hence the variable.
"""

import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array, Float

from benchmarks import cases, peers, provenance, timing
from lazyattn import alibi_slopes, lazy_attention, paths
from lazyattn.errors import require

FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_OWN: dict[str, Any] = {"flag_values": FLAGS}
NAMES = ("lazyattn", "lazyattn_all", "tokamax", "cudnn", "xla", "flex_attention")
CASES = ("flat", "alibi")
PASSES = ("forward", "training")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", list(NAMES), "What to time.", **_OWN)
_SHAPES = flags.DEFINE_list(
    "shapes",
    ["4x16x4096x64", "1x16x16384x64"],
    "Batch x heads x length x head size, and x key heads where they are fewer.",
    **_OWN,
)
_CASES = flags.DEFINE_list(
    "cases", list(CASES), "flat: normal, 0.02, nothing can be left out; alibi: its lines.", **_OWN
)
_PASSES = flags.DEFINE_list("passes", list(PASSES), "training: forward and backward.", **_OWN)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Inputs.", **_OWN
)
_CALLS = flags.DEFINE_integer("calls", 20, "Calls in a row.", lower_bound=1, **_OWN)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Times each is timed.", lower_bound=1, **_OWN)
_OUTPUT = paths.define("output", "benchmarks/results/relative_bias", "Without suffix.", **_OWN)

Program = Callable[[], Any]


@dataclasses.dataclass
class Result:
    """One line.

    Attributes:
      shape, case, implementation, which: what was timed.
      milliseconds, least, greatest: median and extremes of a call.
      temporary: bytes beyond arguments and results.
      difference: |found - true| / |true| of the output, or the greatest of the gradients.
      table_difference: the same of the table's gradient.
      same_bits: whether three calls gave the same.
      error: why there are no numbers.
    """

    shape: str
    case: str
    implementation: str
    which: str
    milliseconds: float = 0.0
    least: float = 0.0
    greatest: float = 0.0
    temporary: int = 0
    difference: float | None = None
    table_difference: float | None = None
    same_bits: bool | None = None
    error: str | None = None


def table_of(case: str, shape: cases.Shape) -> Float[Array, "heads length"]:
    """Returns the bias of each distance, float32."""
    if case == "flat":
        return 0.02 * jax.random.normal(jax.random.key(0), (shape.heads, shape.length))
    return -jnp.asarray(alibi_slopes(shape.heads))[:, None] * jnp.arange(shape.length)


def dense(table: Float[Array, "heads length"]) -> Float[Array, "heads length length"]:
    """Returns the bias of each query and key; what no query sees has that of distance 0."""
    places = jnp.arange(table.shape[1])
    return table[:, jnp.maximum(places[:, None] - places, 0)]


def _lazyattn(skip_mass: float, query: Array, key: Array, value: Array, table: Array) -> Array:
    out: Array = lazy_attention(query, key, value, distance_bias=table, skip_mass=skip_mass)
    return out


def _with_dense(name: str, query: Array, key: Array, value: Array, table: Array) -> Array:
    bias = dense(table)[None].astype(query.dtype)
    if name == "tokamax":
        tokamax = peers._import_tokamax()
        out: Array = tokamax.dot_product_attention(
            query, key, value, bias=bias, is_causal=True, implementation="triton"
        )
        return out
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, is_causal=True, implementation=name
    )


ATTENTIONS: dict[str, Callable[..., Array]] = {
    "lazyattn": functools.partial(_lazyattn, 1e-6),
    "lazyattn_all": functools.partial(_lazyattn, 0.0),
    **{name: functools.partial(_with_dense, name) for name in ("tokamax", "cudnn", "xla")},
}


def jax_program(
    attention: Callable[..., Array], which: str, tensors: Any, table: Array
) -> tuple[Program, int]:
    """Returns a call of one attention, and its bytes beyond arguments and results."""

    def training(query: Array, key: Array, value: Array, table: Array, d_out: Array) -> Any:
        return jax.vjp(attention, query, key, value, table)[1](d_out)

    *inputs, d_out = tensors
    arguments = (*inputs, table) if which == "forward" else (*inputs, table, d_out)
    compiled = jax.jit(attention if which == "forward" else training).lower(*arguments).compile()
    temporary = int(compiled.memory_analysis().temp_size_in_bytes)
    return lambda: compiled(*arguments), temporary


class Pending:
    """Results of PyTorch, which `jax.block_until_ready` waits for as it does for an array."""

    def __init__(self, *results: Any):
        self.results = results

    def block_until_ready(self) -> "Pending":
        """Waits for the GPU."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self


def flex_program(which: str, tensors: Any, table: Array) -> tuple[Program, int]:
    """Returns a call of FlexAttention, and its bytes beyond arguments and results."""
    import torch
    from torch.nn.attention import flex_attention as flex

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(tensors[0].dtype))

    def there(x: Array, dtype: Any) -> Any:
        return torch.tensor(np.asarray(x, np.float32), device=device, dtype=dtype)

    # [batch, heads, length, head_dim] there.
    *inputs, d_out = (there(x, dtype).transpose(1, 2).contiguous() for x in tensors)
    bias = there(table, torch.float32)
    learned = (*inputs, bias)
    for x in learned:
        x.requires_grad_(which == "training")
    length = tensors[0].shape[1]
    mask = flex.create_block_mask(
        lambda b, h, i, j: i >= j, None, None, length, length, device=device
    )
    # On a CPU this is for tests only, and PyTorch has no backward pass there.
    attend = flex.flex_attention
    if device == "cuda":
        # jax-triton 0.3 empties it, and PyTorch compiles by Triton, too.
        if not os.environ.get("TRITON_CACHE_DIR"):
            os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
        attend = torch.compile(attend, dynamic=False)
    grouped = inputs[0].shape[1] != inputs[1].shape[1]

    def attention() -> Any:
        def score(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return score + bias[h, (i - j).abs()]

        return attend(*inputs, score_mod=score, block_mask=mask, enable_gqa=grouped)

    def forward() -> Pending:
        with torch.no_grad():
            return Pending(attention())

    def training() -> Pending:
        return Pending(*torch.autograd.grad(attention(), learned, d_out))

    run = forward if which == "forward" else training
    run().block_until_ready()
    if device == "cpu":
        return run, 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run().block_until_ready().results
    held = sum(x.numel() * x.element_size() for x in results)
    return run, torch.cuda.max_memory_allocated() - before - held


def arrays(results: Any) -> list[np.ndarray]:
    """Returns an output, or gradients of query, key, value and table, in float32 and our layout."""
    if not isinstance(results, Pending):
        return [np.asarray(x, np.float32) for x in jax.tree.leaves(results)]
    found = [x.detach().float().cpu().numpy() for x in results.results]
    return [x.swapaxes(1, 2) if x.ndim == 4 else x for x in found]


def truth(which: str, tensors: Any, table: Array) -> list[np.ndarray]:
    """Returns the same by the definition in float32, a head after the other."""
    query, key, value, d_out = (jnp.asarray(x, jnp.float32) for x in tensors)
    group = query.shape[2] // key.shape[2]

    @jax.jit
    def of_a_head(query: Array, key: Array, value: Array, table: Array, d_out: Array) -> Any:
        def attention(*inputs: Array) -> Any:
            query, key, value, table = inputs
            return lazy_attention(query, key, value, distance_bias=table, implementation="xla")

        out, back = jax.vjp(attention, query, key, value, table)
        return (out,) if which == "forward" else back(d_out)

    found: list[list[np.ndarray]] = []
    for row in range(query.shape[0]):
        for h in range(query.shape[2]):
            heads = [x[row : row + 1, :, n : n + 1] for x, n in
                     ((query, h), (key, h // group), (value, h // group), (d_out, h))]  # fmt: skip
            results = of_a_head(*heads[:3], table[h : h + 1], heads[3])
            found.append([np.asarray(x) for x in results])
    batch, heads_, kv_heads = query.shape[0], query.shape[2], key.shape[2]

    def joined(n: int) -> np.ndarray:
        parts = np.stack([one[n] for one in found]).reshape(batch, heads_, *found[0][n].shape)
        if parts.ndim == 4:  # the table's: [batch, heads, 1, length]
            return np.asarray(parts[:, :, 0].sum(axis=0))
        parts = parts[:, :, 0, :, 0].swapaxes(1, 2)  # [batch, length, heads, dim]
        if n in (1, 2) and which == "training":
            parts = parts.reshape(*parts.shape[:2], kv_heads, group, -1).sum(axis=3)
        return parts

    return [joined(n) for n in range(len(found[0]))]


def difference(found: np.ndarray, true: np.ndarray) -> float:
    """Returns |found - true| / |true|."""
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def measure(
    name: str, case: str, which: str, shape: cases.Shape, tensors: Any, true: list[np.ndarray]
) -> tuple[Result, Program | None]:
    """Returns a line without its times, and the call to time."""
    result = Result(str(shape), case, name, which)
    table = table_of(case, shape)
    try:
        if name == "flex_attention":
            run, result.temporary = flex_program(which, tensors, table)
        else:
            run, result.temporary = jax_program(ATTENTIONS[name], which, tensors, table)
        found = [arrays(run()) for _ in range(3)]
    except Exception as error:
        result.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        return result, None
    differences = [difference(x, y) for x, y in zip(found[0], true, strict=True)]
    result.difference = max(differences)
    result.table_difference = differences[-1] if which == "training" else None
    result.same_bits = all(
        np.array_equal(x, y) for more in found[1:] for x, y in zip(found[0], more, strict=True)
    )
    return result, run


def run_shape(shape: cases.Shape, options: Any) -> Iterator[list[Result]]:
    """Yields a line for everything at one shape, pass by pass.

    Args:
      shape: of the calls.
      options: `implementations`, `cases`, `passes`, `dtype`, `calls` and `rounds`.
    """
    tensors = cases.tensors(shape, options.dtype, seed=1)
    for case in options.cases:
        for which in options.passes:
            true = truth(which, tensors, table_of(case, shape))
            lines = [measure(name, case, which, shape, tensors, true)
                     for name in options.implementations]  # fmt: skip
            runs = {line.implementation: run for line, run in lines if run is not None}
            times = timing.rounds_of(runs, calls=options.calls, rounds=options.rounds)
            for line, _ in lines:
                if line.implementation in times:
                    line.milliseconds, line.least, line.greatest = times[line.implementation]
                print(dataclasses.asdict(line), flush=True)
            yield [line for line, _ in lines]


def as_table(results: list[Result]) -> str:
    """Returns the results as Markdown."""
    lines = [
        "| shape | bias | pass | implementation | ms | least to greatest | memory, MB | error |"
        " error of the table's gradient | same bits |",
        "|" + "---|" * 10,
    ]
    for r in results:
        cells = [r.shape, r.case, r.which, r.implementation]
        if r.error:
            cells += [r.error.replace("|", "/")] + [""] * 5
        else:
            table = "" if r.table_difference is None else f"{r.table_difference:.1e}"
            cells += [
                *(f"{r.milliseconds:.3f}", f"{r.least:.3f} to {r.greatest:.3f}"),
                *(f"{r.temporary / 1e6:.0f}", f"{r.difference:.1e}", table),
                "yes" if r.same_bits else "no",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Times everything and writes what came out, shape by shape."""
    del argv
    for flag, known in (("implementations", NAMES), ("cases", CASES), ("passes", PASSES)):
        for name in getattr(FLAGS, flag):
            require(name in known, f"--{flag}", name, "one of " + ", ".join(known))
    versions = {"jax": jax.__version__}
    if "flex_attention" in FLAGS.implementations:
        try:
            import torch

            versions["torch"] = str(torch.__version__)
        except ImportError:
            print("flex_attention: torch is not installed")
    results: list[Result] = []
    output = pathlib.Path(FLAGS.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": jax.devices()[0].device_kind,
        **versions,
        "dtype": FLAGS.dtype,
        **provenance.made_by("benchmarks.relative_bias"),
    }
    for text in FLAGS.shapes:
        for lines in run_shape(cases.Shape.parse(text), FLAGS):
            results += lines
            all_of_it = about | {"results": [dataclasses.asdict(result) for result in results]}
            output.with_suffix(".json").write_text(json.dumps(all_of_it, indent=1) + "\n")
            output.with_suffix(".md").write_text(as_table(results))
    print(as_table(results))


if __name__ == "__main__":
    app.run(main)
