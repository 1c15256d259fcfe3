"""Shelf: kinds of file that rows come from."""
