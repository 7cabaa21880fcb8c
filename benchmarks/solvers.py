"""Error against evaluations of the solvers, on a velocity known in closed form and a trained one.

Run: python -m benchmarks.solvers [--checkpoint MODEL_FOLDER VIDEO...]
The error is the distance to the exact solution over the size of that solution (root mean square).

Axes: b clip, e ear, t latent frame, c latent channel, i component of the mixture.
"""

import argparse
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from spatialv2a_jax import flow, generator

# Three Gaussians for every number on its own: one narrow, so that paths bend late.
SHARE_I = np.array([0.3, 0.3, 0.4], np.float32)
MEAN_I = np.array([-1.6, 0.3, 1.2], np.float32)
STD_I = np.array([0.3, 0.15, 0.5], np.float32)
BUDGETS = (4, 8, 12, 16, 24, 25, 48)
Solve = Callable[[str, int], np.ndarray]


def mixture_velocity(x_betc: jax.Array, t_b: jax.Array) -> jax.Array:
  """Returns E[x_1 - x_0 | x_t] where x_0 is standard normal and x_1 the mixture."""
  share, mean, std = (part.reshape(1, 1, 1, 1, -1) for part in (SHARE_I, MEAN_I, STD_I))
  x, t = x_betc[..., None], t_b[:, None, None, None, None]
  variance = (1 - t) ** 2 + (t * std) ** 2
  log_weight = jnp.log(share) - 0.5 * (jnp.log(variance) + (x - t * mean) ** 2 / variance)
  slope = (t * std**2 - (1 - t)) / variance
  return (jax.nn.softmax(log_weight, axis=-1) * (mean + slope * (x - t * mean))).sum(axis=-1)


def exact(x0: np.ndarray) -> np.ndarray:
  """Returns where the mixture's flow takes the noise: to the number of the same quantile."""
  low, high = np.full(x0.shape, -20.0), np.full(x0.shape, 20.0)
  for _ in range(60):  # Halves the interval down to rounding.
    middle = 0.5 * (low + high)
    below = (SHARE_I * ndtr((middle[..., None] - MEAN_I) / STD_I)).sum(axis=-1) < ndtr(x0)
    low, high = np.where(below, middle, low), np.where(below, high, middle)
  return 0.5 * (low + high)


def table(solve: Solve, truth: np.ndarray) -> str:
  """Returns a row per number of evaluations and a column per solver."""
  lines = [f"| evaluations | {' | '.join(flow.SOLVERS)} |", "|---" * (1 + len(flow.SOLVERS)) + "|"]
  size = np.sqrt(np.square(truth).mean())
  for budget in BUDGETS:
    cells = []
    for name, solver in flow.SOLVERS.items():
      steps, rest = divmod(budget, len(solver.nodes))
      cells.append("" if rest else f"{_rms(solve(name, steps) - truth) / size:.4f}")
    lines.append(f"| {budget} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _rms(x: np.ndarray) -> float:
  return float(np.sqrt(np.square(x).mean()))


def on_mixture() -> str:
  """Returns the table of the velocity in closed form."""
  x0 = np.random.default_rng(0).standard_normal((4, 2, 125, 20)).astype(np.float32)

  def solve(name, steps):
    run = jax.jit(lambda x: flow.sample(mixture_velocity, x, steps=steps, method=name))
    return np.asarray(run(x0))

  return table(solve, exact(x0))


def on_model(model: generator.Generator, videos: list[str], guidance: float) -> str:
  """Returns the table of a model; the truth is what 64 steps of "rk4" reach."""
  paths = [pathlib.Path(path) for path in videos]
  windows = [model.windows(p, model.seconds, generator.Settings())[0] for p in paths]
  keys = [jax.random.key(i) for i in range(len(windows))]

  def solve(name, steps):
    settings = generator.Settings(method=name, steps=steps, guidance=guidance)
    return model.sample(windows, keys, settings, len(windows))

  return table(solve, solve("rk4", 64))


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description="Error against evaluations of the solvers.")
  parser.add_argument("--checkpoint", metavar="DIR", help="a trained model, such as the demo's")
  parser.add_argument("videos", nargs="*", metavar="VIDEO", help="what it generates sound for")
  parser.add_argument("--guidance", type=float, help="unset: the model's own")
  args = parser.parse_args()
  if bool(args.checkpoint) != bool(args.videos):
    parser.error("give --checkpoint and at least one VIDEO, or neither")
  print(f"Mixture of Gaussians, velocity and solution in closed form\n\n{on_mixture()}")
  if args.checkpoint:
    model = generator.Generator(args.checkpoint)
    guidance = model.guidance if args.guidance is None else args.guidance
    rows = on_model(model, args.videos, guidance)
    print(f"\n{len(args.videos)} clips, guidance {guidance:g}\n\n{rows}")


if __name__ == "__main__":
  main()
