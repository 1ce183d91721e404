"""The harness's own Hugging Face adapter, in whichever Python has torch.

python tests/eval/peer.py --check        exits with 0 where all it needs is there
python tests/eval/peer.py FOLDER         reads FOLDER/weights.npz and FOLDER/asked.json,
                                               writes FOLDER/answers.json

Knows nothing of this project, so that another Python can run it.
"""

import json
import pathlib
import sys


def _model(settings, weights):
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["width"],
        intermediate_size=settings["mlp_width"],
        num_hidden_layers=settings["num_layers"],
        num_attention_heads=settings["num_heads"],
        num_key_value_heads=settings["num_kv_heads"],
        head_dim=settings["head_dim"],
        rms_norm_eps=settings["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_base"]},
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    state = {name: torch.from_numpy(weights[name]) for name in weights.files}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model


def main(folder):
    import numpy as np
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = json.loads((folder / "asked.json").read_text())
    model = _model(asked["model"], np.load(folder / "weights.npz"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
    )
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=asked["context"],
        batch_size=4,
        add_bos_token=False,
        device="cpu",
    )

    def ask(kind, arguments):
        requests = [
            Instance(request_type=kind, doc={}, arguments=tuple(a), idx=i)
            for i, a in enumerate(arguments)
        ]
        return getattr(lm, kind)(requests, disable_tqdm=True)

    answers = {kind: ask(kind, arguments) for kind, arguments in asked["requests"].items()}
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        import lm_eval.models.huggingface  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    else:
        main(pathlib.Path(sys.argv[1]))
