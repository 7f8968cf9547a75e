"""Text in, batches of tokens out: sources, tokenizer, encoder, stream (packing, shuffling, batches, position)."""
