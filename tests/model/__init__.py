"""Tests of `model/`: against Hugging Face, and of the fast paths against the slow ones."""
