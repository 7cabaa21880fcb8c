"""How things start: the only code that joins `data` and `spatialv2a_jax`."""
