"""Timings, printed as tables. Nothing here is a test."""
