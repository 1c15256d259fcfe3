"""Shelf: ways to turn messages into text."""
