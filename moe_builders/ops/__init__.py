"""Plain tensors in, plain tensors out; every fast path has a readable twin beside it."""
