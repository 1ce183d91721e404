import pytest
from absl import flags

from lazyattn.errors import InputError
from lazyattn.eval import flags as eval_flags
from lazyattn.inspect import flags as inspect_flags
from lazyattn.inspect.flags import InspectionOptions


def _options(*arguments):
    values = flags.FlagValues()
    eval_flags.define(values)
    inspect_flags.define(values)
    values(["train.py", *arguments])
    return inspect_flags.options(values)


def test_options():
    assert _options() == InspectionOptions()
    found = _options("--against=b", "--text=t.txt", "--length=512", "--rows=2", "--heads=0.1,11.15")
    assert found == InspectionOptions("b", "t.txt", 512, 2, ((0, 1), (11, 15)))


@pytest.mark.parametrize("name", ["1", "a.b", "1.2.3", "-1.0"])
def test_heads_of_another_form(name):
    with pytest.raises(InputError, match=r"--heads has .*layer and a head"):
        _options(f"--heads={name}")


def test_two_texts():
    with pytest.raises(InputError, match="looks at one text"):
        _options("--text=a.txt", "--text=b.txt")
