"""Text in, batches of tokens out: sources, tokenizer, encoder, and a stream that packs, shuffles and keeps its position."""
