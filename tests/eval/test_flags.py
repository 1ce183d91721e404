import pytest
from absl import flags

from lazyattn.errors import InputError
from lazyattn.eval import flags as eval_flags
from lazyattn.sample import flags as sample_flags


def _parse(*arguments):
    values = flags.FlagValues()
    eval_flags.define(values)
    sample_flags.define(values)
    values(["train.py", *arguments])
    return values


def test_defaults():
    assert eval_flags.options(_parse()) == eval_flags.EvaluationOptions()
    assert _parse().prompt == [""]


def test_all_flags():
    values = _parse(
        *("--contexts=512,1024", "--stride=256", "--text=a.txt", "--text=validation"),
        *("--lambada=l.jsonl", "--limit=5", "--output=o", "--precision=model"),
        *("--batch_tokens=64", "--beyond_table", "--retrieval", "--retrieval_distances=9,12"),
        *("--retrieval_rows=4", "--retrieval_span=8", "--seed=3"),
    )
    assert eval_flags.options(values) == eval_flags.EvaluationOptions(
        contexts=(512, 1024),
        stride=256,
        texts=("a.txt", "validation"),
        lambada="l.jsonl",
        limit=5,
        output="o",
        precision="model",
        batch_tokens=64,
        beyond_table=True,
        retrieval=True,
        retrieval_distances=(9, 12),
        retrieval_rows=4,
        retrieval_span=8,
        seed=3,
    )
    values = _parse("--tasks=piqa, boolq", "--tasks_dir=d", "--num_fewshot=2", "--contexts=8")
    found = eval_flags.options(values)
    assert (found.tasks, found.tasks_dir, found.num_fewshot) == (("piqa", "boolq"), "d", 2)


def test_all_ways_to_sample():
    values = _parse(
        *("--temperature=0.5", "--top_p=0.9", "--top_k=3", "--min_p=0.1", "--seed=4"),
        *("--repetition_penalty=1.2", "--max_new_tokens=7", "--stop=a", "--stop=b"),
    )
    found = sample_flags.sampling_config(values)
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.5, 0.9, 3, 0.1)
    assert (found.repetition_penalty, found.max_new_tokens) == (1.2, 7)
    assert (values.stop, values.seed) == (["a", "b"], 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts=512,many"], "--contexts is '512,many', but it must be whole numbers with"),
        (["--contexts=0"], "--contexts is 0, but it must be at least 1"),
        (["--stride=0"], "--stride is 0, but it must be at least 1"),
        (["--limit=0"], "--limit is 0, but it must be at least 1"),
        (["--num_fewshot=-1"], "--num_fewshot is -1, but it must be at least 0"),
        (["--batch_tokens=0"], "--batch_tokens is 0, but it must be at least 1"),
        (["--precision=half"], "--precision is 'half', but it must be one of float32, model"),
        (["--tasks=piqa", "--contexts=8,16"], "--contexts has several lengths, but --tasks are"),
        (["--retrieval_distances=far"], "--retrieval_distances is 'far', but it must be whole num"),
        (
            ["--retrieval", "--retrieval_distances=63"],
            "--retrieval_distances is 63, but it must be",
        ),
        (["--retrieval", "--retrieval_span=1"], "--retrieval_span is 1, but it must be at least 2"),
        (["--retrieval", "--retrieval_rows=1"], "--retrieval_rows is 1, but it must be at least 2"),
        (["--retrieval", "--seed=-1"], "--seed is -1, but it must be at least 0"),
        (
            ["--retrieval_rows=4"],
            "--retrieval_distances, --retrieval_span or --retrieval_rows is g",
        ),
        (["--tasks_dir=d"], "--tasks_dir is given, but --tasks doesn't say which"),
    ],
)
def test_bad_flags(arguments, message):
    with pytest.raises(InputError, match=message):
        eval_flags.options(_parse(*arguments))
