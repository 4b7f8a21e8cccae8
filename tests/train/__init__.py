"""Tests of `train/`."""
