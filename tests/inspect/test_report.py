import json

import pytest

from lazyattn.inspect.report import page
from lazyattn.inspect.sections import SECTIONS
from tests.inspect import browser

FIGURES = {figure.name for section in SECTIONS for figure in section.figures}


@pytest.fixture(scope="module")
def data(report):
    return json.loads((report / "report.json").read_text())


@pytest.fixture(scope="module")
def twins(twin_report):
    return json.loads((twin_report / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_draws_every_figure_and_asks_nothing_of_anyone(report, tmp_path, width):
    seen = browser.open_page((report / "report.html").read_text(), tmp_path, width)
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert sorted(seen["theme"]) == ["dark", "light"]
    assert set(seen["figures"]) == FIGURES
    for name, figure in seen["figures"].items():
        assert figure["marks"] > 0 and figure["pictures"] > 0, name
        assert figure["smallest"] > 20, name
        assert not figure["bad"], name
        assert not figure["overflow"], name


@pytest.mark.slow
def test_one_model_without_offsets_or_bias(data, tmp_path):
    (softmax,) = (m for m in data["models"] if m["variant"] == "softmax")
    seen = browser.open_page(page(data | {"models": [softmax]}), tmp_path)
    assert seen["errors"] == seen["requests"] == []
    assert set(seen["figures"]) == FIGURES - {"offsets", "bias"}


@pytest.mark.slow
def test_what_the_browser_would_refuse_is_noticed(data, tmp_path):
    html = page(data).replace("<main>", '<main><img src="https://example.org/x.png">')
    seen = browser.open_page(html, tmp_path)
    assert any("example.org" in request for request in seen["requests"])


def test_the_page_is_whole_and_its_data_cannot_end_it(twins):
    label = "</script><b>&"
    model = twins["models"][0] | {"label": label, "tokens": ["</script>"]}
    html = page(twins | {"models": [model]})
    assert html.count("</script>") == 3
    assert "&lt;/script&gt;&lt;b&gt;&amp;" in html
    for foreign in ("src=", "@import", "url(http", '<link rel="stylesheet'):
        assert foreign not in html


def check_models(models):
    for model in models:
        assert len(model["maps"]) == 4
        for values in model["matrices"].values():
            assert len(values) == 2 and len(values[0]) == 2
        for parts in model["allocation"]:
            assert sum(parts) == pytest.approx(1, abs=1e-4)


def test_the_data_is_that_of_a_run_and_of_its_copy(twins, twin_report):
    one, other = twins["models"]
    assert (one.pop("label"), other.pop("label")) == ("lazy", "twin")
    assert one == other and one["summary"]["zeros"] > 0
    check_models([one])
    assert "Attention of lazy and twin" in (twin_report / "report.html").read_text()


@pytest.mark.slow
def test_the_data_is_that_of_both_models(data):
    assert [model["label"] for model in data["models"]] == ["lazy", "softmax"]
    lazy, softmax = data["models"]
    assert softmax["summary"]["zeros"] == 0 and softmax["bias"] is None
    assert lazy["summary"]["zeros"] > 0
    check_models(data["models"])
