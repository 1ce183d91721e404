"""Folders of safetensors: one `model.safetensors`, or several and an index.

    model.safetensors
    model-00001-of-00003.safetensors, ..., model.safetensors.index.json

The second where one file would be too large to hold in memory or to send; both as the
Hugging Face libraries write and read them.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Shaped

from lazyattn.errors import InputError
from lazyattn.paths import umask

_DTYPES = ("F32", "F16", "BF16", "F64")
MAX_BYTES = 4_000_000_000
ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"  # how Git LFS begins what stands for a file


def require_library() -> None:
    """Checks that the package safetensors is there.

    Raises:
      InputError: if it is not.
    """
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise InputError(
            "safetensors files need the package safetensors, which is not installed: pip install"
            " safetensors."
        ) from None


def write(
    folder: Path,
    tensors: Iterable[tuple[str, Shaped[np.ndarray, "..."]]],
    sizes: Mapping[str, int],
    max_bytes: int = MAX_BYTES,
) -> list[str]:
    """Writes tensors, holding those of one file in memory at a time.

    Args:
      folder: that exists.
      tensors: names and contiguous arrays.
      sizes: their bytes, by name in the same order.
      max_bytes: of a file; a tensor that is larger gets a file to itself.

    Returns:
      The names of the files.
    """
    import safetensors.numpy

    numbers = _numbers(sizes, max_bytes)
    total = max(numbers.values())
    files = [ONE] if total == 1 else [_file(n, total) for n in range(1, total + 1)]
    held: dict[str, Any] = {}
    permissions = 0o666 & ~umask()
    left = {n: list(numbers.values()).count(n) for n in range(1, total + 1)}
    for name, array in tensors:
        held[name] = array
        number = numbers[name]
        if len(held) == left[number]:
            # PyTorch's readers look for this.
            path = folder / files[number - 1]
            safetensors.numpy.save_file(held, path, {"format": "pt"})
            path.chmod(permissions)  # the library makes a file that only its owner can read
            held = {}
    if total > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: files[number - 1] for name, number in numbers.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        files.append(INDEX)
    return files


def _file(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def _numbers(sizes: Mapping[str, int], max_bytes: int) -> dict[str, int]:
    """Returns for each tensor the number of its file, from 1."""
    numbers, number, used = {}, 1, 0
    for name, size in sizes.items():
        if used and used + size > max_bytes:
            number, used = number + 1, 0
        numbers[name] = number
        used += size
    return numbers


class Read(Protocol):
    """Reads a tensor, or a part of it."""

    def __call__(
        self, name: str, index: tuple[slice, ...] | None = None
    ) -> Float[np.ndarray, "..."]:
        """Returns a tensor; with `index`, a slice of each axis, that part, and no more is read."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, tuple[int, ...]], Read]]:
    """Opens a folder of safetensors or one such file.

    Yields:
      Shapes by name, and what reads a tensor by its name.

    Raises:
      InputError: if there is none, a file of several is missing or can't be read, or a tensor
        has a dtype that no weights have which are not quantized.
    """
    require_library()
    import safetensors

    holds: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    with contextlib.ExitStack() as stack:
        files = _files(path)
        for file, names in files.items():
            try:
                held = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
                listed = held.keys()
                headers = {name: held.get_slice(name) for name in listed}
                found = {name: tuple(one.get_shape()) for name, one in headers.items()}
            except (safetensors.SafetensorError, OSError) as error:
                with contextlib.suppress(OSError), file.open("rb") as stream:
                    if stream.read(len(_POINTER)) == _POINTER:
                        raise InputError(
                            f"{str(file)!r} is a pointer of Git LFS, but it must be the file"
                            " itself: run git lfs pull in that folder."
                        ) from None
                raise InputError(
                    f"{str(file)!r} can't be read as a safetensors file ({error})."
                ) from None
            if absent := [name for name in names if name not in found and not is_old_table(name)]:
                raise InputError(
                    f"{str(file)!r} has no tensor {absent[0]}, but {INDEX} there says so: it must"
                    " be the file of the same model, so fetch both again."
                )
            for name, one in headers.items():
                if one.get_dtype() not in _DTYPES:
                    raise InputError(
                        f"{str(file)!r} has {name} in {one.get_dtype()}, but it must be in one of"
                        f" {', '.join(_DTYPES)}: weights must not be quantized."
                    )
            holds |= dict.fromkeys(found, held)
            shapes |= found

        def read(name: str, index: tuple[slice, ...] | None = None) -> Float[np.ndarray, "..."]:
            if index is None:
                return holds[name].get_tensor(name)
            return holds[name].get_slice(name)[index]

        yield shapes, read


def is_old_table(name: str) -> bool:
    """Returns whether a tensor is one of old folders that follows from the settings."""
    return name.endswith("rotary_emb.inv_freq")


def _files(path: Path) -> dict[Path, list[str]]:
    """Returns the files, and the tensors that an index says are in each."""
    if path.is_file() and path.suffix == ".safetensors":
        return {path: []}
    if (path / ONE).is_file():
        return {path / ONE: []}
    files: dict[Path, list[str]] = {}
    try:
        for name, file in json.loads((path / INDEX).read_text())["weight_map"].items():
            files.setdefault(path / str(file), []).append(name)
    except FileNotFoundError:
        pickled = any(path.glob("pytorch_model*.bin"))
        more = "; transformers' save_pretrained makes one of pytorch_model.bin" if pickled else ""
        raise InputError(
            f"{str(path)!r} has no safetensors, but it must be a folder with {ONE} or {INDEX}, or"
            f" one such file{more}."
        ) from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{str(path / INDEX)!r} can't be read as the index of safetensors files ({error!r})."
        ) from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{str(path)!r} has no {missing[0]}{more}, but {INDEX} there names {len(files)} files"
            " that must all be there."
        )
    return files


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Checks that tensors are those of a model, before any is read.

    Raises:
      InputError: naming the first that is missing, has another shape, or is too much.
    """
    for name, shape in expected.items():
        if name not in found:
            raise InputError(
                f"{where} has no tensor {name}, but the model needs one of shape {shape}."
            )
        if found[name] != shape:
            raise InputError(
                f"{where} has {name} of shape {found[name]}, but it must be of shape {shape}."
            )
    for name in found:
        if name not in expected:
            raise InputError(f"{where} has a tensor {name}, which the model has no place for.")
