"""From files to batches: tokenizer, packing, collating, the order of samples."""
