"""Which contexts a model has a bias for."""

import pytest

from lazyattn.errors import InputError
from lazyattn.generation.cache import check_context
from tests.model.tiny import make_config

NO_TAIL = {"bias_kind": "table", "bias_tail": False, "bias_width": 8}
ROW = 10


@pytest.mark.parametrize(
    "attention",
    [
        NO_TAIL,
        NO_TAIL | {"window": 11},
        NO_TAIL | {"window": 4, "global_share": 0.5},
        NO_TAIL | {"window": 4, "global_share": 1.0},
    ],
    ids=str,
)
def test_a_context_past_a_table_without_a_tail_is_refused(attention):
    config = make_config(attention=attention)
    check_context(10, config, ROW, name="--contexts")
    check_context(90, config, ROW, name="--contexts", beyond_table=True)
    with pytest.raises(InputError, match=r"--contexts is 90, .* 8 distances and no tail"):
        check_context(90, config, ROW, name="--contexts")


@pytest.mark.parametrize(
    "attention", [NO_TAIL | {"window": 10}, NO_TAIL | {"window": 3}, {}], ids=str
)
def test_a_window_within_the_table_or_a_tail_goes_with_any_context(attention):
    check_context(90, make_config(attention=attention), ROW, name="--contexts")
