"""Tests of `demo/`."""
