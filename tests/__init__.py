"""Tests mirror the package. A package itself, so that shared toy problems can be imported."""

import importlib.metadata

# XLA has no others since jax 0.11, and refuses the flag.
_OLD = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
NO_FUSION_EMITTERS = " --xla_cpu_use_fusion_emitters=false" if _OLD else ""
