"""Small made-up corpora in FineWeb-Edu's schema."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq

TEXT = "the lazy model looks at nothing when no word is worth a glance \u4f60\u597d caf\u00e9"
WORDS = TEXT.split()


def make_documents(number, seed=0, words=60):
    """Returns documents as dicts; the same every time."""
    draw = random.Random(seed)
    documents = []
    for index in range(number):
        text = " ".join(draw.choices(WORDS, k=draw.randint(5, words)))
        documents.append(
            {
                "text": f"{text} {seed}.{index}.",
                "id": f"<urn:uuid:{seed}-{index}>",
                "dump": "CC-MAIN-2024-10",
                "url": f"https://example.org/{index}",
                "file_path": "s3://somewhere",
                "language": "en",
                "language_score": 0.97,
                "token_count": len(text.split()),
                "score": draw.uniform(2.5, 5.0),
                "int_score": draw.randint(2, 5),
            }
        )
    return documents


def write_parquet(path, documents, row_group_size=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(documents)
    pq.write_table(table, path, row_group_size=row_group_size, compression="zstd")
    return path


def jsonl(documents):
    """Returns documents as JSON lines, as bytes."""
    lines = (json.dumps(d, ensure_ascii=i % 2 == 0) for i, d in enumerate(documents))
    return "".join(f"{line}\n" for line in lines).encode()


def write_jsonl(path, documents):
    """Writes a .jsonl, .jsonl.zst or .jsonl.gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compression = {".zst": "zstd", ".gz": "gzip"}.get(path.suffix)
    with pa.OSFile(str(path), "wb") as raw:
        if compression is None:
            raw.write(jsonl(documents))
        else:
            with pa.CompressedOutputStream(raw, compression) as file:
                file.write(jsonl(documents))
    return path
