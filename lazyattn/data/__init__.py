"""Text to packed batches: corpus, tokenizer, packing, pipeline."""
