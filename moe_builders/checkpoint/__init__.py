"""Model folders (safetensors, streamed by slice) and the checkpoints a run goes on from (DCP)."""
