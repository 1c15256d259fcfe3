"""Shelf: metrics."""
