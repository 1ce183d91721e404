"""Where `load_model` was, as model cards name it: it is `lazyattn.pretrained.load` now."""

from lazyattn.pretrained.load import ExportedModel, load_model

__all__ = ["ExportedModel", "load_model"]
