"""The transformer that Lazy Attention lives in."""
