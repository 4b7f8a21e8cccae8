"""Tests of the Chinese data set's steps."""
