"""Kept adapters: their cards, later the library of many and the way to the right one."""
