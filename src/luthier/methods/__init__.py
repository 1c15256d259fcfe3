"""Shelf: ways of tuning."""
