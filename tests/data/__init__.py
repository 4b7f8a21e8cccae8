"""Files on disk become packed batches: every token, label and pixel of the way is checked."""
