"""Statistics of features that some embedder made: Frechet distance, KL divergence, inception score.

The arithmetic is that of av-benchmark; which network made the features, and which downmix it heard,
must be said beside every number. Most embedders average the ears and
hear nothing of space.

Axes: n clip, d feature, k class.
"""

import numpy as np
import scipy.special


def frechet_distance(pred_nd: np.ndarray, ref_nd: np.ndarray) -> float:
  """Distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) of two sets of features.

  The root is taken by eigenvalues of symmetric matrices in float64, so rank-deficient covariances
  (fewer clips than features) need no regularisation; the value is then biased upwards all the same.

  Raises:
    ValueError: fewer than two rows, features of different width, or values that are not finite.
  """
  pred_nd, ref_nd = _features(pred_nd), _features(ref_nd)
  if pred_nd.shape[1] != ref_nd.shape[1]:
    raise ValueError(f"features of width {pred_nd.shape[1]} and {ref_nd.shape[1]}")
  pred_dd, ref_dd = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (pred_nd, ref_nd))
  value_d, basis_dd = np.linalg.eigh(pred_dd)
  root_dd = (basis_dd * np.sqrt(np.maximum(value_d, 0))) @ basis_dd.T
  cross_d = np.linalg.eigvalsh(root_dd @ ref_dd @ root_dd)
  shift = np.square(pred_nd.mean(0) - ref_nd.mean(0)).sum()
  trace = np.trace(pred_dd) + np.trace(ref_dd) - 2 * np.sqrt(np.maximum(cross_d, 0)).sum()
  return float(max(shift + trace, 0.0))


def kl_divergence(pred_nk: np.ndarray, ref_nk: np.ndarray) -> float:
  """Mean over clips of KL(reference || prediction) between softmaxed logits, in nats.

  Rows of both are the same clips in the same order.

  Raises:
    ValueError: different shapes, fewer than two rows, or values that are not finite.
  """
  pred_nk, ref_nk = _features(pred_nk), _features(ref_nk)
  if pred_nk.shape != ref_nk.shape:
    raise ValueError(f"logits of shape {pred_nk.shape} and {ref_nk.shape}")
  log_pred_nk = scipy.special.log_softmax(pred_nk, axis=1)
  log_ref_nk = scipy.special.log_softmax(ref_nk, axis=1)
  return float((np.exp(log_ref_nk) * (log_ref_nk - log_pred_nk)).sum(1).mean())


def inception_score(
  logits_nk: np.ndarray, splits: int = 10, seed: int = 2020
) -> tuple[float, float]:
  """Mean and standard deviation over splits of exp(mean KL(p || mean p)).

  Args:
    logits_nk: logits of each clip.
    splits: equal parts of the shuffled clips.
    seed: of the shuffle.

  Raises:
    ValueError: fewer clips than splits, or values that are not finite.
  """
  logits_nk = _features(logits_nk)
  if len(logits_nk) < splits:
    raise ValueError(f"{len(logits_nk)} clips are fewer than {splits} splits")
  order_n = np.random.RandomState(seed).permutation(len(logits_nk))
  scores = []
  for part_nk in np.array_split(logits_nk[order_n], splits):
    log_nk = scipy.special.log_softmax(part_nk, axis=1)
    log_mean_k = scipy.special.logsumexp(log_nk, axis=0) - np.log(len(log_nk))
    scores.append(np.exp((np.exp(log_nk) * (log_nk - log_mean_k[None, :])).sum(1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def _features(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all():
    raise ValueError(f"want finite features [two clips or more, width], got {x.shape}")
  return x
