"""Tests, room by room; none needs the network."""
