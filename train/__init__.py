"""Training. Read `main.py` first, then `loop.py`; everything distributed is in `parallel.py` and `checkpoint.py`."""
