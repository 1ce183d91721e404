"""Tiny random models of the hub's families, in whichever Python has torch and transformers.

python tests/pretrained/peer.py FOLDER    for each model in FOLDER/asked.json writes FOLDER/NAME as
                                          `save_pretrained` does, and FOLDER/NAME.npz: logits of
                                          FOLDER/tokens.npy and a greedy continuation of each row

python tests/pretrained/peer.py --again FOLDER
                                          loads each FOLDER/NAME-again, and writes
                                          FOLDER/NAME-again.npy: its logits

Knows nothing of this project, so that another Python can run it.
"""

import json
import pathlib
import sys


def main(folder):
    import numpy as np
    import torch
    import transformers

    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    for name, (kind, settings, shard) in json.loads((folder / "asked.json").read_text()).items():
        torch.manual_seed(0)
        config = getattr(transformers, kind + "Config")(**settings)
        config._attn_implementation = "eager"
        model = getattr(transformers, kind + "ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases, too, must tell
                noise = torch.randn_like(parameter)
                if parameter.ndim == 1:
                    parameter.add_(0.3 * noise)
                else:
                    parameter.copy_(noise * parameter.shape[1] ** -0.5)
        model.save_pretrained(folder / name, max_shard_size=shard)
        with torch.no_grad():
            logits = model(tokens).logits.numpy()
            row = tokens
            for _ in range(8):
                row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
        np.savez(folder / f"{name}.npz", logits=logits, greedy=row[:, tokens.shape[1] :].numpy())


def again(folder):
    import numpy as np
    import torch
    import transformers

    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    for path in sorted(folder.glob("*-again")):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(info[kind] for kind in info), info
        with torch.no_grad():
            np.save(f"{path}.npy", model.eval()(tokens).logits.numpy())


if __name__ == "__main__":
    if sys.argv[1] == "--again":
        again(pathlib.Path(sys.argv[2]))
    else:
        main(pathlib.Path(sys.argv[1]))
