"""Scores. Read `main.py` first; each benchmark is one small file."""
