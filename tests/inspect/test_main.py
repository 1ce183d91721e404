import pytest

from lazyattn.errors import InputError
from lazyattn.inspect import main
from lazyattn.inspect.flags import InspectionOptions
from lazyattn.inspect.main import cut_rows, inspect
from tests.inspect.conftest import make_run


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Fails the test if anything is measured."""

    def too_late(*_, **__):
        pytest.fail("the mistake was not found before the work began")

    for name in ("measure", "sink_metric", "inserted_token"):
        monkeypatch.setattr(main, name, too_late)


def _refused(run, **options):
    with pytest.raises(InputError) as caught:
        inspect(run, options=InspectionOptions(**options))
    return str(caught.value)


@pytest.mark.usefixtures("nothing_compiled")
def test_texts_and_lengths_that_do_not_fit(lazy_run, text, tmp_path):
    assert "--text is 'nowhere.txt'" in _refused(lazy_run, text="nowhere.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert "there is no text in it" in _refused(lazy_run, text=str(empty))
    short = tmp_path / "short.txt"
    short.write_text("attention may look")
    assert "must be at least 64 tokens long" in _refused(lazy_run, text=str(short))
    message = _refused(lazy_run, text=str(text), length=100_000)
    assert "--length is 100000, but it must be at most" in message
    assert "--heads is '5.0', but it must be at most 1.1" in _refused(lazy_run, heads=((5, 0),))
    assert "--length is 1, but" in _refused(lazy_run, length=1)
    assert "--rows is 0, but" in _refused(lazy_run, rows=0)


@pytest.mark.usefixtures("nothing_compiled")
def test_folders_that_are_no_runs(lazy_run, tmp_path):
    assert "--workdir" in _refused(tmp_path / "missing")
    assert "the folder of a run with a checkpoint" in _refused(
        lazy_run, against=str(tmp_path / "missing")
    )


@pytest.mark.usefixtures("nothing_compiled")
def test_a_checkpoint_without_tokenizer(text, tmp_path):
    run = make_run(tmp_path / "run", text, "lazy")
    (run / "tokenizer.json").unlink()
    assert "a tokenizer.json beside its checkpoints" in _refused(run)


@pytest.mark.usefixtures("nothing_compiled")
def test_rows_longer_than_the_model_knows(text, tmp_path):
    tailless = {"model__attention__bias_kind": "table", "model__attention__bias_tail": False}
    run = make_run(tmp_path / "a", text, "lazy", **tailless)
    message = _refused(run, text=str(text), length=90)
    assert "--length is 90, but the model's bias table has 8 distances and no tail" in message
    run = make_run(tmp_path / "b", text, "lazy_length_offset")
    message = _refused(run, text=str(text), length=90)
    assert "--length is 90, but it must be at most 80" in message


def test_rows_are_of_one_document_each():
    documents = [[0, 1, 2, 3, 4, 5, 6], [0, 7], [0, 8, 9, 10]]
    found = cut_rows(documents, 4, 10, 0)
    assert [row.tolist() for row in found] == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 8, 9, 10]]
    assert len(cut_rows(documents, 4, 2, 0)) == 2
