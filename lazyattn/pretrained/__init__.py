"""Folders of models as hubs hold them: `config.json` and safetensors, ours and theirs."""
