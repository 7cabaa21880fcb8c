"""Flow matching with networks small enough to compute by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax import flow

KEY = jax.random.key(7)
SIGNS = np.array([1.0, -1.0], np.float32).reshape(1, 2, 1, 1)


class FakeNet:
  """Velocity = params * (sum of the conditions that are not dropped) + x * t, per ear."""

  def condition(self, params, stats, cond, drop, *, latent_len, train):
    def part(name, dropped):
      keep_b = 1.0 - drop[dropped].astype(jnp.float32)
      return keep_b * cond[name].mean(axis=(1, 2))

    video_b = part("clip_bvf", "video") + part("sync_bsf", "video")
    text_b = part("text_bwf", "text")
    spatial_b = part("spatial_bvk", "spatial")
    prepared = {"both_b": video_b + text_b, "spatial_b": spatial_b}
    return prepared, {"calls": stats["calls"] + 1} if train else stats

  def velocity(self, params, x_betc, t_b, prepared):
    both, spatial = (prepared[n][:, None, None, None] for n in ("both_b", "spatial_b"))
    ear = SIGNS[:, : x_betc.shape[1]]
    return params * (both + spatial * ear) + x_betc * t_b[:, None, None, None]

  def normalize(self, params, x_betc):
    return (x_betc - 0.5) / 2.0

  def unnormalize(self, params, x_betc):
    return x_betc * 2.0 + 0.5


NET = FakeNet()


def batch_of(rows, ears=2, seed=0):
  rng = np.random.default_rng(seed)
  shapes = {
    "mean_betc": (ears, 5, 3), "std_betc": (ears, 5, 3), "clip_bvf": (4, 2), "sync_bsf": (8, 2),
    "text_bwf": (3, 2), "spatial_bvk": (4, 5),
  }  # fmt: skip
  batch = {n: rng.standard_normal((rows, *s)).astype(np.float32) for n, s in shapes.items()}
  batch["std_betc"] = np.abs(batch["std_betc"])
  batch["id_b"] = rng.integers(0, 2**32, rows, dtype=np.uint32)
  batch["weight_b"] = np.ones(rows, np.float32)
  return batch


@functools.partial(jax.jit, static_argnums=3)
def _loss(batch, config, key, mirror_weight):
  # Its other numbers are traced: one program for all.
  config = flow.LossConfig(*config, mirror_weight=mirror_weight)
  return flow.loss(0.3, {"calls": 0}, batch, key, net=NET, config=config)


def loss(batch, config=None, key=KEY):
  *numbers, mirror_weight = dataclasses.astuple(config or flow.LossConfig())
  return _loss(batch, tuple(numbers), key, mirror_weight)


# --- keys and noise -------------------------------------------------------------------------------


def test_draws_of_a_clip_ignore_its_place_in_the_batch():
  id_b = jnp.arange(1, 9, dtype=jnp.uint32) * jnp.uint32(500_000_000)
  draw = jax.vmap(lambda key: jax.random.normal(key, (4,)))
  whole = draw(flow.clip_keys(KEY, id_b))
  assert len(np.unique(whole)) == whole.size
  np.testing.assert_array_equal(draw(flow.clip_keys(KEY, id_b[::-1])), whole[::-1])
  np.testing.assert_array_equal(draw(flow.clip_keys(KEY, id_b[3:4])), whole[3:4])


@pytest.mark.parametrize("start, frames", [(7, 20), (39, 1)])
def test_a_window_draws_what_the_whole_clip_draws_there(start, frames):
  make = functools.partial(flow.ear_noise, KEY, channels=6, ears=2, correlation=0.4)
  whole_etc = make(frames=40)
  np.testing.assert_array_equal(
    make(frames=frames, start=start), whole_etc[:, start : start + frames]
  )


@pytest.mark.parametrize("correlation", [0.0, 0.25, 0.8, 1.0])
def test_noise_has_the_correlation_asked_for_and_unit_variance(correlation):
  x_etc = np.asarray(flow.ear_noise(KEY, 4000, 20, ears=2, correlation=correlation), np.float64)
  np.testing.assert_allclose(x_etc.std(axis=(1, 2)), 1, atol=0.02)
  np.testing.assert_allclose(x_etc.mean(axis=(1, 2)), 0, atol=0.02)
  measured = (x_etc[0] * x_etc[1]).mean()
  np.testing.assert_allclose(measured, correlation, atol=0.015)  # 4 standard errors.
  if correlation == 1:
    np.testing.assert_array_equal(x_etc[0], x_etc[1])
  time = (x_etc[:, 1:] * x_etc[:, :-1]).mean()
  np.testing.assert_allclose(time, 0, atol=0.015)


def test_one_ear_has_noise_of_its_own():
  assert flow.ear_noise(KEY, 5, 3, ears=1, correlation=0.0).shape == (1, 5, 3)


# --- loss -----------------------------------------------------------------------------------------


def kept(key, config):
  """Returns 1 or 0 for video, text and place of the clip that has this key."""
  k_drop = jax.random.split(key, 4)[3]
  shares = np.array([config.drop_video, config.drop_text, config.drop_spatial])
  video, text, spatial = 1.0 - (np.asarray(jax.random.uniform(k_drop, (3,))) < shares)
  return video, text, spatial * max(video, text)


def by_hand(batch, key, config):
  """The loss of every clip, in NumPy from the same draws. Returns square_be, difference_b."""
  squares, differences = [], []
  for i, number in enumerate(batch["id_b"]):
    clip_key = jax.random.fold_in(key, number)
    k_time, k_noise, k_data, _ = jax.random.split(clip_key, 4)
    _, ears, frames, channels = batch["mean_betc"].shape
    noise = {"ears": ears, "correlation": config.ear_correlation}
    t = 1 / (1 + np.exp(-float(jax.random.normal(k_time))))
    x0 = np.asarray(flow.ear_noise(k_noise, frames, channels, **noise))
    eps = np.asarray(flow.ear_noise(k_data, frames, channels, **noise))
    x1 = (batch["mean_betc"][i] + batch["std_betc"][i] * eps - 0.5) / 2
    video, text, spatial = kept(clip_key, config)
    both = video * (batch["clip_bvf"][i].mean() + batch["sync_bsf"][i].mean())
    both += text * batch["text_bwf"][i].mean()
    ear = SIGNS[0, :ears]
    guess = 0.3 * (both + spatial * batch["spatial_bvk"][i].mean() * ear)
    guess = guess + t * ((1 - t) * x0 + t * x1)
    error = guess - (x1 - x0)
    squares.append((error**2).mean(axis=(1, 2)))
    differences.append(((error[0] - error[-1]) ** 2).mean())
  return np.array(squares), np.array(differences)


@pytest.mark.parametrize(
  "config",
  [
    flow.LossConfig(),
    flow.LossConfig(0.5, 0.5, 0.5, ear_correlation=0.7, difference_weight=0.3),
    flow.LossConfig(1.0, 1.0, 1.0),
  ],
)
def test_loss_is_that_computed_by_hand(config):
  batch = batch_of(6)
  total, (metrics, stats) = loss(batch, config)
  square_be, difference_b = by_hand(batch, KEY, config)
  np.testing.assert_allclose(metrics["loss/left"], square_be[:, 0].mean(), rtol=1e-4)
  np.testing.assert_allclose(metrics["loss/right"], square_be[:, 1].mean(), rtol=1e-4)
  np.testing.assert_allclose(metrics["loss/difference"], difference_b.mean(), rtol=1e-4)
  expected = square_be.mean(0).sum() + config.difference_weight * difference_b.mean()
  np.testing.assert_allclose(total, expected, rtol=1e-4)
  assert stats == {"calls": 1}


def test_mono_has_one_ear_and_no_difference():
  batch = batch_of(3, ears=1)
  total, (metrics, _) = loss(batch, flow.LossConfig(difference_weight=9.0))
  square_be, _ = by_hand(batch, KEY, flow.LossConfig())
  assert set(metrics) == {"loss/mono"}
  np.testing.assert_allclose(total, square_be.mean(), rtol=1e-4)


def test_the_mirror_loss_is_what_exchanging_the_ears_changes():
  batch, drops = batch_of(6), dict(drop_video=0.0, drop_text=0.0, drop_spatial=0.0)
  batch |= {"clip_mirror_bvf": batch["clip_bvf"], "sync_mirror_bsf": batch["sync_bsf"]}
  plain, (before, _) = loss(batch, flow.LossConfig(**drops))
  assert "loss/mirror" not in before
  weighted = flow.LossConfig(**drops, mirror_weight=10.0)
  batch["spatial_mirror_bvk"] = -batch["spatial_bvk"]  # To which the network answers rightly.
  total, (metrics, _) = loss(batch, weighted)
  np.testing.assert_allclose(metrics["loss/mirror"], 0, atol=1e-10)
  np.testing.assert_allclose(total, plain, rtol=1e-6)
  batch["spatial_mirror_bvk"] = batch["spatial_bvk"]  # As if the picture had no sides.
  batch["weight_b"][-1] = 0
  total, (metrics, stats) = loss(batch, weighted)
  gap_b = 2 * 0.3 * batch["spatial_bvk"].mean(axis=(1, 2))
  np.testing.assert_allclose(metrics["loss/mirror"], np.square(gap_b[:-1]).mean(), rtol=1e-5)
  without, _ = loss(batch, flow.LossConfig(**drops))
  np.testing.assert_allclose(total - without, 10 * metrics["loss/mirror"], rtol=1e-4)
  assert stats["calls"] == 1  # Statistics are those of the clips as they are.


def test_the_mirror_loss_is_that_computed_by_hand():
  """Every condition has its mirror, and is dropped where the clip's own is."""
  batch, other = batch_of(12), batch_of(12, seed=1)
  for name in ("clip_bvf", "sync_bsf", "spatial_bvk"):
    batch[name.replace("_", "_mirror_")] = other[name]
  config = flow.LossConfig(0.5, 0.5, 0.5, mirror_weight=10.0)
  mean = {name: x.mean(axis=(1, 2)) for name, x in batch.items() if name.endswith(("f", "k"))}
  video_b, _, spatial_b = np.transpose(
    [kept(jax.random.fold_in(KEY, number), config) for number in batch["id_b"]]
  )
  assert 0 < video_b.mean() < 1 and 0 < spatial_b.mean() < 1
  seen_b = mean["clip_bvf"] + mean["sync_bsf"] - mean["clip_mirror_bvf"] - mean["sync_mirror_bsf"]
  place_b = mean["spatial_bvk"] + mean["spatial_mirror_bvk"]  # Exchanged ears, exchanged sign.
  gap_b = 0.3**2 * (np.square(video_b * seen_b) + np.square(spatial_b * place_b))
  total, (metrics, _) = loss(batch, config)
  np.testing.assert_allclose(metrics["loss/mirror"], gap_b.mean(), rtol=1e-4)
  square_be, _ = by_hand(batch, KEY, config)
  np.testing.assert_allclose(total, square_be.mean(0).sum() + 10 * gap_b.mean(), rtol=1e-4)


def test_losses_of_velocities_of_16_bits_have_the_precision_of_32():
  class Rounded(FakeNet):
    def velocity(self, params, x_betc, t_b, prepared):
      return (prepared["both_b"][:, None, None, None] + 0 * x_betc).astype(jnp.bfloat16)

  batch = {name: np.zeros_like(x) for name, x in batch_of(2).items()}
  batch["weight_b"] = np.ones(2, np.float32)
  for name in ("clip_mirror_bvf", "sync_mirror_bsf", "spatial_mirror_bvk"):
    batch[name] = np.zeros_like(batch[name.replace("_mirror", "")])
  batch["clip_mirror_bvf"] += 129 / 128  # Of whose square bfloat16 holds the first half.
  options = {"net": Rounded(), "config": flow.LossConfig(0.0, 0.0, 0.0, mirror_weight=1.0)}
  exact = {"xla_allow_excess_precision": False}  # Else XLA may keep 32 bits of what has 16.
  function = jax.jit(functools.partial(flow.loss, **options), compiler_options=exact)
  _, (metrics, _) = function(0.3, {"calls": 0}, batch, KEY)
  np.testing.assert_allclose(metrics["loss/mirror"], (129 / 128) ** 2, rtol=1e-6)


def test_padding_does_not_count():
  config = flow.LossConfig(difference_weight=1.0)
  batch, other = batch_of(6), batch_of(6, seed=1)
  weight_b = np.array([1, 0, 1, 0, 0, 1], np.float32)
  first, _ = loss(batch | {"weight_b": weight_b}, config)
  for name in other:
    other[name][weight_b > 0] = batch[name][weight_b > 0]
  second, _ = loss(other | {"weight_b": weight_b}, config)
  np.testing.assert_array_equal(first, second)
  square_be, difference_b = by_hand(batch, KEY, config)
  per_clip = square_be.sum(axis=1) + difference_b
  np.testing.assert_allclose(first, per_clip[weight_b > 0].mean(), rtol=1e-4)
  nothing, _ = loss(batch | {"weight_b": np.zeros(6, np.float32)}, config)
  assert nothing == 0


def test_order_of_the_clips_does_not_matter():
  batch = batch_of(6)
  order = np.random.default_rng(3).permutation(6)
  config = flow.LossConfig(0.3, 0.3, 0.3, difference_weight=0.5)
  first, (metrics, _) = loss(batch, config)
  second, (again, _) = loss({name: batch[name][order] for name in batch}, config)
  np.testing.assert_allclose(first, second, rtol=1e-6)
  for name in metrics:
    np.testing.assert_allclose(metrics[name], again[name], rtol=1e-6)


def test_another_step_draws_anew():
  batch = batch_of(6)
  assert loss(batch)[0] != loss(batch, key=jax.random.fold_in(KEY, 1))[0]


def test_evaluation_is_told_to_the_network():
  told = []

  class Told(FakeNet):
    def condition(self, params, stats, cond, drop, *, train, **options):
      told.append((train, cond["weight_b"].shape))  # Padding is no part of its statistics.
      return super().condition(params, stats, cond, drop, train=train, **options)

  batch = batch_of(2)
  for name in ("clip_bvf", "sync_bsf", "spatial_bvk"):
    batch[name.replace("_", "_mirror_")] = batch[name]
  for train in (True, False):
    options = {"net": Told(), "config": flow.LossConfig(mirror_weight=1.0), "train": train}
    jax.eval_shape(lambda b, o=options: flow.loss(0.3, {"calls": 0}, b, KEY, **o), batch)
  assert told == 2 * [(True, (2,))] + 2 * [(False, (2,))]  # Of the clips and of their mirrors.


# --- guidance -------------------------------------------------------------------------------------


# --- solver ---------------------------------------------------------------------------------------
