"""Runnable examples. Not part of the installed package."""
