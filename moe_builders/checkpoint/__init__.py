"""Safetensors folders: read by slice, written file by file, filled into sharded models."""
