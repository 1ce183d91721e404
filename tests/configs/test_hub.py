"""The config of a run that starts as a model of the hub."""

import dataclasses

import pytest

from configs import uptrain
from configs.hub import get_config
from lazyattn.errors import InputError
from lazyattn.experiment import TeachingConfig, from_config_dict
from lazyattn.pretrained import hub
from tests.pretrained import hub_folder

QWEN3 = hub_folder.LLAMA | {"model_type": "qwen3", "head_dim": 4, "tie_word_embeddings": True}


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("safetensors")
    hub_folder.write(tmp_path / "a+b", QWEN3, tensors={})
    (tmp_path / "a+b" / "tokenizer.json").write_text("{}")
    return tmp_path / "a+b"


def test_the_model_is_the_folder_s(folder):
    found = from_config_dict(get_config(str(folder)))
    assert dataclasses.replace(found.model, remat="none") == hub.model_config(QWEN3)
    assert found.training.init_from == str(folder)
    assert found.data.tokenizer == str(folder / "tokenizer.json")
    assert found.data.sequence_length == 64


def test_a_lazy_one_keeps_all_but_its_attention(folder):
    plain = folder.rename(folder.with_name("plain"))
    found = from_config_dict(get_config(f"{plain}+paper")).model.attention
    own = hub.model_config(QWEN3).attention
    assert (found.bias_kind, found.bias_tail) == ("table", False)
    assert found.variant == "lazy" and found.qk_norm
    assert (found.rope_base, found.num_kv_heads) == (own.rope_base, own.num_kv_heads)
    found = from_config_dict(get_config(f"{plain}+sharp+lazy_no_bias")).model.attention
    assert found.variant == "lazy_no_bias"


def test_a_model_that_is_taught(folder):
    plain = folder.rename(folder.with_name("plain"))
    found = from_config_dict(uptrain.get_config(str(plain)))
    assert found.model.attention.variant == "lazy" and found.model.attention.qk_norm
    assert found.teaching.offset_steps == found.teaching.bias_steps == found.training.steps // 2
    control = from_config_dict(uptrain.get_config(f"{plain}+softmax"))
    assert control.model.attention.variant == "softmax"
    assert control.teaching == TeachingConfig()
    assert control.optimizer == found.optimizer and control.training == found.training
    biased = from_config_dict(uptrain.get_config(f"{plain}+sharp+biased_softmax")).teaching
    assert (biased.offset_steps, biased.bias_steps) == (0, 1000)


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "of --config is '', but it must be that"), ("/no/where+lazy", "is '/no/where', but")],
)
def test_what_is_no_folder(name, message):
    with pytest.raises(InputError, match=message):
        get_config(name)


def test_what_is_no_model_of_the_hub(tmp_path):
    (tmp_path / "config.json").write_text('{"lazyattn": {}}')
    with pytest.raises(InputError, match="is no model of the hub"):
        get_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5", "num_attention_heads": 2}')
    with pytest.raises(InputError, match="model_type is 't5', but it must be one of llama"):
        get_config(str(tmp_path))
