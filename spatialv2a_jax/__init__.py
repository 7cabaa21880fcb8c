"""Silent video in, binaural sound out: SpatialV2A (arXiv 2601.15017) in JAX."""

from importlib.metadata import PackageNotFoundError, version

try:
  __version__ = version("spatialv2a_jax")
except PackageNotFoundError:  # A source tree that was never installed.
  __version__ = "0+unknown"
