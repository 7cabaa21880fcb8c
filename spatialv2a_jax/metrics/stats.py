"""From numbers per clip to numbers per corpus, with bootstrap intervals over clips.

A clip hands in *parts* of each metric: `[x]` for a mean, `[sum, count]` for a ratio pooled over
windows, six moments for a correlation pooled over windows, all values for a pooled median. One
rule then serves three uses, with other weights per clip: identity rows give the value of each
clip, a row of ones the corpus, multinomial counts the bootstrap.

Axes: n clip, b bootstrap draw.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import special

Parts = Mapping[str, np.ndarray]
DRAWS, SEED = 1000, 20260115
MIN_CLIPS = 5  # Draws of fewer do not reach far enough: an interval of two holds half at most.
MIN_WINDOWS = 3  # Fewer points have no meaningful correlation.
MIN_VARIANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Metric:
  """What a number means.

  Attributes:
    unit: "dB", "us", "share" and so on; "1" is dimensionless.
    better: "higher", "lower", or "none" where the reference decides.
    pool: how clips are put together.
  """

  unit: str
  better: Literal["higher", "lower", "none"] = "none"
  pool: Literal["mean", "ratio", "pearson", "median"] = "mean"


def moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns the parts of a correlation: count and sums of x, y, xx, yy, xy."""
  return np.array([len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])


def pooled(metric: Metric, parts_n: Sequence[np.ndarray], weights_bn: np.ndarray) -> np.ndarray:
  """Returns the metric of weighted corpora, one per row of weights; NaN where undefined."""
  if metric.pool == "median":
    return _weighted_median(parts_n, weights_bn)
  table_nk = np.array(parts_n, np.float64)
  known_n = np.isfinite(table_nk.sum(1))
  sums_bk = weights_bn @ np.where(known_n[:, None], table_nk, 0.0)
  if metric.pool == "pearson":
    return _pearson(sums_bk)
  count_b = weights_bn @ known_n if metric.pool == "mean" else sums_bk[:, 1]
  return np.where(count_b > 0, sums_bk[:, 0] / np.where(count_b > 0, count_b, 1.0), np.nan)


def per_clip(metric: Metric, parts_n: Sequence[np.ndarray]) -> np.ndarray:
  """Returns the value of each clip by itself."""
  return pooled(metric, parts_n, np.eye(len(parts_n)))


def summary(metric: Metric, parts_n: Sequence[np.ndarray], counts_bn: np.ndarray) -> dict:
  """Returns value, median and percentiles over clips, 95 % bootstrap interval and counts.

  The interval is the expanded percentile interval (Hesterberg, The American Statistician 69, 2015,
  section 4.3): percentiles of the draws so far out as makes up for their being too close together
  where clips are few. Fewer than `MIN_CLIPS` have none.

  Args:
    metric: what is summarised.
    parts_n: parts of each clip.
    counts_bn: how often each bootstrap draw holds each clip (see `draws`).
  """
  value_n = per_clip(metric, parts_n)
  known_n = value_n[np.isfinite(value_n)]
  value = pooled(metric, parts_n, np.ones((1, len(parts_n))))[0]
  clips = sum(_counts(metric, parts) for parts in parts_n) if math.isfinite(value) else 0
  boot_b = pooled(metric, parts_n, counts_bn)
  boot_b = boot_b[np.isfinite(boot_b)]
  spread = clips >= MIN_CLIPS and len(boot_b) > 0

  def percentiles(x: np.ndarray, *at: float) -> list[float | None]:
    return [number(v) for v in np.percentile(x, at)] if len(x) else [None] * len(at)

  median, low, high = percentiles(known_n, 50, 5, 95)
  return {
    "value": number(value),
    "median": median,
    "p5": low,
    "p95": high,
    "ci95": percentiles(boot_b, *_expanded(clips)) if spread else [None, None],
    "n": clips,
    "undefined": len(value_n) - clips,
    "unit": metric.unit,
    "better": metric.better,
  }


def _expanded(clips: int) -> tuple[float, float]:
  """Returns the percentiles of the draws that bound 95 % for so many clips."""
  wide = math.sqrt(clips / (clips - 1)) * special.stdtrit(clips - 1, 0.975)
  low = 100 * float(special.ndtr(-wide))
  return low, 100 - low


def _counts(metric: Metric, parts: np.ndarray) -> bool:
  """Returns whether a clip has a part in the corpus, even if it has no value by itself.

  The correlation over sources that stand still, each in a place of its own, is one such.
  """
  if not np.isfinite(parts).all() or not len(parts):
    return False
  place = {"pearson": 0, "ratio": 1}.get(metric.pool)
  return place is None or bool(parts[place] > 0)


def draws(clips: int, count: int = DRAWS, seed: int = SEED) -> np.ndarray:
  """Returns bootstrap counts [b, n]: the same draws for every metric, so that they pair."""
  generator = np.random.default_rng(seed)
  return generator.multinomial(clips, np.full(clips, 1 / clips), size=count).astype(np.float64)


def derangement(clips: int, seed: int = SEED) -> np.ndarray:
  """Returns for each clip another clip, each used once: one random cycle, fixed by the seed."""
  order_n = np.random.default_rng(seed).permutation(clips)
  partner_n = np.empty(clips, np.int64)
  partner_n[order_n] = np.roll(order_n, -1)
  return partner_n


def number(value: float) -> float | None:
  """Returns a JSON number: null where undefined, never 0."""
  return float(value) if math.isfinite(value) else None


def _pearson(sums_bk: np.ndarray) -> np.ndarray:
  count_b, x_b, y_b, xx_b, yy_b, xy_b = sums_bk.T
  safe_b = np.maximum(count_b, 1)
  var_x_b = xx_b / safe_b - (x_b / safe_b) ** 2
  var_y_b = yy_b / safe_b - (y_b / safe_b) ** 2
  cov_b = xy_b / safe_b - x_b * y_b / safe_b**2
  known_b = (count_b >= MIN_WINDOWS) & (np.minimum(var_x_b, var_y_b) > MIN_VARIANCE)
  scale_b = np.sqrt(np.where(known_b, var_x_b * var_y_b, 1.0))
  return np.where(known_b, np.clip(cov_b / scale_b, -1, 1), np.nan)


def _weighted_median(parts_n: Sequence[np.ndarray], weights_bn: np.ndarray) -> np.ndarray:
  """Median of all values of all clips, each as often as its clip; middle pair averaged."""
  owner = np.repeat(np.arange(len(parts_n)), [len(part) for part in parts_n])
  value = np.concatenate([np.asarray(part, np.float64) for part in parts_n])
  order = np.argsort(value, kind="stable")
  value, owner = value[order], owner[order]
  out_b = np.full(len(weights_bn), np.nan)
  for b, weight_n in enumerate(weights_bn):
    reach = np.cumsum(weight_n[owner])
    if len(reach) and reach[-1] > 0:
      low = np.searchsorted(reach, reach[-1] / 2, "left")
      high = min(np.searchsorted(reach, reach[-1] / 2, "right"), len(value) - 1)
      out_b[b] = 0.5 * (value[low] + value[high])
  return out_b
