"""Text in, batches of tokens out: corpus (documents), tokenizer, stream (packing, shuffling, batches, position)."""
