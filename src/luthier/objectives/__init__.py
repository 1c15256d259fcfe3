"""Shelf: what is asked of the model."""
