"""Somebody else's kernel, proved and raced in a process of its own."""
