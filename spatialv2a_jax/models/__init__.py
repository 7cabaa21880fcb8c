"""Networks as pure functions: they import JAX, Flax and each other, and know no mesh."""
