"""Where `load_trained` was: it is `lazyattn.checkpoint.load` now."""

from lazyattn.checkpoint.load import TrainedModel, load_trained

__all__ = ["TrainedModel", "load_trained"]
