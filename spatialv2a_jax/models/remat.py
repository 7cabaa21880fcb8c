"""What the backward pass of a block finds kept, and what it computes anew."""

from typing import Any

import jax


def _fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
  """Keeps what cuDNN's attention returns, its log-sum-exp included, which no name can reach."""
  return primitive.name.startswith("dot_product_attention_fwd")


def _kept(*names: str) -> Any:
  policies = jax.checkpoint_policies
  return policies.save_from_both_policies(_fused_attention, policies.save_only_these_names(*names))


# What `jax.checkpoint` saves of a block; None is nothing.
POLICIES = {
  # A v5e or v6e multiplies by as few channels as the width faster than it keeps the result.
  "convolutions": _kept("convolution", "attention"),
  "products": _kept("convolution", "dense", "attention"),
  "full": None,
}
