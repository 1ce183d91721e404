"""Text from a model: key/value cache and sampling."""
