"""The codec as a whole: ears stay apart, training lowers the loss, waveforms come back."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialv2a_jax import codec, mel, phase
from spatialv2a_jax.models import vae
from spatialv2a_jax.schema import AUDIO

SPEC = AUDIO["16k"]


@pytest.fixture(scope="module")
def tiny():
  net = codec.build({"width": 4}, SPEC)
  rng = np.random.default_rng(0)
  audio = 0.1 * rng.standard_normal((2, 2, 32 * SPEC.hop)).astype(np.float32)
  audio[:, 1] *= 0.3
  shapes = nn.unbox(jax.eval_shape(net.init, jax.random.key(0)))
  params = jax.tree.map(
    lambda x: (rng.standard_normal(x.shape) * (x.ndim == 3)).astype(np.float32), shapes
  )
  mean, std = codec.statistics([audio], SPEC)
  return net, {**params, "frozen": {"data_mean": mean, "data_std": std}}, audio


def batch_of(audio, ids=(3, 4, 5, 6), weights=(1, 1, 1, 1)):
  rows = len(audio)
  return {
    "audio_bep": jnp.asarray(audio),
    "id_b": jnp.asarray(ids[:rows], jnp.uint32),
    "weight_b": jnp.asarray(weights[:rows], jnp.float32),
  }


def test_shapes_and_exchange_of_ears(tiny):
  net, params, audio = tiny
  encode = jax.jit(net.encode)
  mean, std = encode(params, audio)
  assert mean.shape == std.shape == (2, 2, 16, SPEC.latent_channels)
  assert (np.asarray(std) > 0).all()
  np.testing.assert_allclose(encode(params, audio[:, ::-1])[0], mean[:, ::-1], atol=1e-5)
  assert jax.eval_shape(net.decode, params, mean).shape == (2, 2, SPEC.n_mels, 32)


def test_an_odd_last_frame_of_mel_is_left_out():
  shapes = [jax.ShapeDtypeStruct((1, n * SPEC.hop), jnp.float32) for n in (6, 7, 8)]
  found = [jax.eval_shape(lambda x: codec.even_mel(x, SPEC), shape).shape for shape in shapes]
  assert found == [(1, SPEC.n_mels, n) for n in (6, 6, 8)]


@pytest.mark.parametrize(
  "number, message",
  [
    ({"square": -1.0}, "square=-1.0 is not 0 or more"),
    ({"level": float("nan")}, "level=nan is not 0 or more"),
    ({"excerpt": 2}, "neither 0 nor an even number of 4 or more"),
    ({"excerpt": 7}, "neither 0 nor an even number of 4 or more"),
  ],
)
def test_weights_out_of_their_range_are_told(number, message):
  assert codec.LossConfig(excerpt=4).checked() and codec.LossConfig(beta=0.0).checked()
  with pytest.raises(ValueError, match=message):
    codec.LossConfig(**number).checked()


def test_statistics_are_those_of_all_clips(tiny):
  _, params, audio = tiny
  mels = np.asarray(mel.log_mel(jnp.asarray(audio), SPEC))
  mean, std = codec.statistics([audio[:1], audio[1:]], SPEC)
  np.testing.assert_allclose(mean, mels.mean((0, 1, 3)), atol=1e-5)
  np.testing.assert_allclose(std, mels.std((0, 1, 3)), rtol=1e-3)
  np.testing.assert_array_equal(params["frozen"]["data_mean"], mean)


def test_frozen_statistics_get_no_gradient(tiny):
  net, params, audio = tiny
  loss = lambda frozen: net.loss({**params, "frozen": frozen}, batch_of(audio), key)[0]  # noqa: E731
  key = jax.random.key(0)
  grads = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, params["frozen"]))
  jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)


def test_frame_ild_is_the_level_difference(tiny):
  _, _, audio = tiny
  one = jnp.asarray(np.stack([audio[:, 0], audio[:, 0] / 2], 1))
  ild = codec.frame_ild_db(mel.log_mel(one, SPEC), SPEC)
  np.testing.assert_allclose(ild, 20 * np.log10(2), atol=0.05)


def test_the_loss_of_known_errors():
  """Of a network that decodes whatever to the truth and these errors."""
  rng = np.random.default_rng(0)
  audio = 0.1 * rng.standard_normal((2, 2, 8 * SPEC.hop)).astype(np.float32)
  target = np.asarray(mel.log_mel(jnp.asarray(audio), SPEC), np.float64)
  error = 0.2 * rng.standard_normal(target.shape)
  made, size = (target + error).astype(np.float32), rng.uniform(0.5, 2, SPEC.n_mels)
  mean, std = rng.standard_normal((4, 4, 3)), rng.uniform(0.5, 2, (4, 4, 3))
  net = vae.Vae(
    lambda key: {},
    lambda params, mel_bmn: (jnp.asarray(mean, "f4"), jnp.asarray(std, "f4")),
    lambda params, z_btc: jnp.asarray(made.reshape(-1, *made.shape[2:])),
  )
  config = codec.LossConfig(square=2.0, beta=0.1, slope=0.7, interaural=0.9, level=1.1)
  params = {"frozen": {"data_std": jnp.asarray(size, "f4")}}
  batch = batch_of(audio, weights=(1, 3))
  loss = jax.jit(functools.partial(codec.vae_loss, net, SPEC, config))
  value, metrics = loss(params, batch, jax.random.key(0))

  def mean_of(x):
    return np.average(x.reshape(2, -1).mean(axis=1), weights=(1, 3))

  scaled = error / size[:, None]
  left, right = (scaled[:, e] for e in (0, 1))
  slopes = [mean_of(np.abs(np.diff(scaled, axis=axis))) for axis in (2, 3)]
  power = [np.power(10, x / 10 * mel.db_per_unit(SPEC)).sum(axis=2) for x in (made, target)]
  ild_made, ild_true = (10 * np.log10(x[:, 0] / x[:, 1]) for x in power)
  want = {
    "l1": mean_of(np.abs(scaled)),
    "mel_db": mean_of(np.abs(error)) * mel.db_per_unit(SPEC),
    "ild_db": mean_of(np.abs(ild_made - ild_true)),
    "kl": mean_of((mean**2 + std**2 - 1) / 2 - np.log(std)),
    "std": mean_of(std),
    "mean_rms": np.sqrt(mean_of(mean**2)),
  }
  total = want["l1"] + 2 * mean_of(scaled**2) + 0.7 * sum(slopes)
  total += 0.9 * mean_of(np.abs(left - right)) + 1.1 * want["ild_db"] / 10 + 0.1 * want["kl"]
  assert metrics.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_allclose(metrics[name], x, rtol=1e-4, err_msg=name)
  np.testing.assert_allclose(value, total, rtol=1e-4)


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_statistics(tiny):
  net, params, audio = tiny
  batch = batch_of(audio)

  @jax.jit
  def step(params, key):
    (value, metrics), grads = jax.value_and_grad(net.loss, has_aux=True)(params, batch, key)
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda p, g: p - 3.0 * g / norm, params, grads), value, metrics

  first, values = params, []
  for i in range(12):
    params, value, metrics = step(params, jax.random.key(i))
    values.append(float(value))
  assert np.mean(values[-3:]) < 0.9 * values[0]
  assert {"l1", "mel_db", "ild_db", "kl", "std", "mean_rms"} == set(metrics)
  jax.tree.map(np.testing.assert_array_equal, params["frozen"], first["frozen"])


def test_the_waveform_is_that_of_the_decoded_mels(tiny):
  net, params, audio = tiny
  z_etc = np.asarray(jax.jit(net.encode)(params, audio)[0][0])
  ears = net.waveform(params, z_etc)
  assert ears.shape == (2, 32 * SPEC.hop) and ears.dtype == np.float32
  mels = np.asarray(jax.jit(net.decode)(params, z_etc[None]))
  np.testing.assert_allclose(phase.binaural(mels[0], SPEC), ears, atol=1e-4)


def test_an_excerpt_is_shorter_and_moves(tiny):
  _, params, audio = tiny
  short = codec.build({"width": 4}, SPEC, codec.LossConfig(excerpt=8))
  loss = jax.jit(lambda key: short.loss(params, batch_of(audio), key)[0])
  assert float(loss(jax.random.key(0))) != float(loss(jax.random.key(1)))
  shapes = str(jax.make_jaxpr(short.loss)(params, batch_of(audio), jax.random.key(0)))
  assert "f32[4,8,80]" in shapes and "f32[4,32,80]" not in shapes


def test_a_clip_draws_by_its_id_and_counts_by_its_weight(tiny):
  """Wherever it stands in the batch, and whatever pads it."""
  _, params, audio = tiny
  short = codec.build({"width": 4}, SPEC, codec.LossConfig(excerpt=8))
  loss = jax.jit(lambda batch: short.loss(params, batch, jax.random.key(3)))
  four = np.concatenate([audio, audio[::-1] * 0.5])
  whole, metrics = loss(batch_of(four))
  order = np.array([2, 0, 3, 1])
  moved = {name: x[order] for name, x in batch_of(four).items()}
  np.testing.assert_allclose(loss(moved)[0], whole, rtol=1e-5)
  # Parts of a batch draw what the whole one draws.
  parts = [loss({k: x[i : i + 2] for k, x in batch_of(four).items()}) for i in (0, 2)]
  np.testing.assert_allclose(np.mean([value for value, _ in parts]), whole, rtol=1e-5)
  for name in ("l1", "mel_db", "ild_db", "kl", "std"):
    mean = np.mean([part[name] for _, part in parts])
    np.testing.assert_allclose(mean, metrics[name], rtol=1e-5)
  padded = batch_of(four, weights=(1, 1, 1, 0))
  other = {**padded, "audio_bep": padded["audio_bep"].at[3].set(0.3)}
  assert float(loss(padded)[0]) == float(loss(other)[0]) != float(whole)
  same = np.stack([audio[0], audio[0]])
  alike, unlike = (loss(batch_of(same, ids=ids))[1]["l1"] for ids in ((7, 7), (7, 8)))
  assert float(alike) != float(unlike)  # Equal clips, other draws.
