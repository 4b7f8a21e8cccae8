"""LLaVA-1.5 in plain PyTorch. Read `llava.py` first, then `vision.py`, `projector.py`, `llama.py`."""
