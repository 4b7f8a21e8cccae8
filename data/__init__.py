"""Files on disk become packed batches. Read `conversation.py` first, then `dataset.py` and `packing.py`."""
