"""Tests mirror the package. A package itself, so that shared toy problems can be imported."""
