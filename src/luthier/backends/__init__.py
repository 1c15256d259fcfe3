"""Shelf: things that answer prompts."""
