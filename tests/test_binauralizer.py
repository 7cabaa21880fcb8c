"""Spectrograms and back, the loss of known predictions, and sliding windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from spatialv2a_jax import binauralizer
from spatialv2a_jax.binauralizer import RATE, WINDOW
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models import mono2binaural
from tests import tiny

KEY = jax.random.key(0)


def noise(count=1, samples=WINDOW, seed=0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal((count, samples)).astype("f4")


def snr_db(got, want) -> float:
  return 10 * np.log10(np.square(want).mean() / np.square(got - want).mean())


def test_the_spectrogram_is_scipys():
  x = noise()[0]
  padded = np.pad(x.astype("f8"), 256, mode="reflect")
  window = np.pad(scipy.signal.get_window("hann", 400), 56)
  want = np.stack([np.fft.rfft(padded[i * 160 :][:512] * window) for i in range(64)], 1)
  got = np.asarray(binauralizer.stft(jnp.asarray(x)))
  assert got.shape == (257, 64, 2)
  np.testing.assert_allclose(got[..., 0] + 1j * got[..., 1], want, atol=2e-4)
  assert np.square(got).mean() == pytest.approx(75, rel=0.05)  # Of white noise of variance one.
  with pytest.raises(ValueError, match="no multiple of 160"):
    binauralizer.stft(jnp.zeros(1000))


def test_the_way_back_loses_the_last_bin_and_nothing_else():
  """Dropping a bin with a shorter transform, as upstream does, gives 16 dB for white noise."""
  white = noise()
  spectrum = binauralizer.stft(jnp.asarray(white))
  assert snr_db(np.asarray(binauralizer.istft(spectrum)), white) > 110
  assert snr_db(np.asarray(binauralizer.istft(spectrum[:, :-1])), white) > 25
  pink = np.fft.irfft(np.fft.rfft(white) / np.sqrt(1 + np.arange(WINDOW // 2 + 1))[None])
  pink = (pink / pink.std()).astype("f4")
  tone = np.sin(2 * np.pi * 7000 / RATE * np.arange(WINDOW))[None].astype("f4")
  for x, least in ((pink, 35), (tone, 60)):
    back = binauralizer.istft(binauralizer.stft(jnp.asarray(x))[:, :-1])
    assert snr_db(np.asarray(back)[:, 400:-400], x[:, 400:-400]) > least


def predictions(audio_bep, error=0.0, ear_error=0.0):
  """A network whose predictions are the truth plus an error, and another of a head's left ear."""
  left, right = (binauralizer.stft(audio_bep[:, e])[:, :-1] for e in (0, 1))

  def apply(params, stats, mix, image, train):
    heads = {"apnet_left": left + ear_error, "apnet_right": right}
    return {"difference": left - right + error, **heads}, stats

  return mono2binaural.Mono2Binaural(lambda key: {}, lambda: {}, apply)


def value(net, audio_bep, power=1, weight=(1.0, 1.0)):
  batch = {
    "audio_bep": audio_bep, "image_byxc": jnp.zeros((2, 32, 64, 3), jnp.uint8),
    "weight_b": jnp.asarray(weight),
  }  # fmt: skip
  config = binauralizer.LossConfig(power)
  return binauralizer.loss({}, {}, batch, KEY, net=net, heads=("apnet",), config=config)


def test_the_loss_of_known_predictions():
  audio_bep = jnp.asarray(0.1 * noise(4).reshape(2, 2, WINDOW))
  found, (metrics, _) = value(predictions(audio_bep), audio_bep)
  assert float(found) == pytest.approx(0, abs=1e-6)
  assert float(metrics["explained_unet"]) == pytest.approx(1) == float(metrics["explained_apnet"])
  for power, want in ((1, 0.25), (2, 0.0625)):
    _, (metrics, _) = value(predictions(audio_bep, 0.25), audio_bep, power)
    assert float(metrics["unet"]) == pytest.approx(want, rel=1e-4)
    assert float(metrics["apnet"]) == pytest.approx(0, abs=1e-6)
  for power, want in ((1, 0.25), (2, 2 * 0.0625)):  # Half of the errors of 0.5 and 0.
    found, (metrics, _) = value(predictions(audio_bep, 0.25, 0.25), audio_bep, power)
    assert float(metrics["apnet"]) == pytest.approx(want, rel=1e-4)
    assert float(found) == pytest.approx(float(metrics["unet"] + metrics["apnet"]))
    assert float(metrics["explained_apnet"]) == pytest.approx(float(metrics["explained_unet"]))
  # Dual mono explains nothing, and rows without weight do not count.
  mean = audio_bep.mean(1, keepdims=True)
  dual = predictions(jnp.concatenate([mean, mean], axis=1))
  _, (metrics, _) = value(dual, audio_bep)
  assert float(metrics["explained_unet"]) == pytest.approx(0, abs=1e-5)
  wrong = audio_bep.at[1].set(7.0)
  _, (metrics, _) = value(predictions(audio_bep), wrong, weight=(1.0, 0.0))
  assert float(metrics["unet"]) == pytest.approx(0, abs=1e-6)
  with pytest.raises(ValueError, match="neither 1 nor 2"):
    binauralizer.LossConfig(power=3)


def test_evaluation_is_told_to_the_network():
  audio_bep, told = jnp.zeros((2, 2, WINDOW)), []

  def apply(*args, train):
    told.append(train)
    return predictions(audio_bep).apply(*args, train=train)

  net = mono2binaural.Mono2Binaural(lambda key: {}, lambda: {}, apply)
  batch = {"audio_bep": audio_bep, "image_byxc": jnp.zeros((2, 1, 1, 3)), "weight_b": jnp.ones(2)}
  options = {"net": net, "heads": (), "config": binauralizer.LossConfig()}
  for train in (True, False):
    jax.eval_shape(lambda b, t=train: binauralizer.loss({}, {}, b, KEY, train=t, **options), batch)
  assert told == [True, False]


class Echo:
  """Stands for a network: left - right is the mix times the brightness of the picture."""

  def windows(self, mix_bp, image_byxc):
    return mix_bp * (image_byxc[:, 0, 0, 0] / np.float32(100))[:, None]


@pytest.mark.parametrize("samples", [1, 700, 1600, 10_080, 40_000])
def test_sliding_windows_cover_every_sample_once(samples):
  mono_p = noise(1, samples)[0]
  whole = binauralizer.Difference(Echo(), mono_p)  # pyright: ignore
  whole.see(np.full((3, 32, 64, 3), 100, np.uint8), 0, last=True)
  np.testing.assert_allclose(whole.result(), 2 * mono_p, rtol=1e-4)


def test_pictures_may_come_in_parts_and_are_taken_at_the_middle():
  mono_p = noise(1, 4 * RATE)[0]
  frames = np.zeros((32, 32, 64, 3), np.uint8)
  frames[16:] = 100
  results = []
  for cuts in ((32,), (7, 16, 32), (1, 2, 31, 32)):
    part = binauralizer.Difference(Echo(), mono_p)  # pyright: ignore
    for start, end in zip((0, *cuts), cuts, strict=False):
      part.see(frames[start:end], start, last=end == 32)
    results.append(part.result())
  np.testing.assert_allclose(results[1], results[0], atol=1e-6)
  np.testing.assert_allclose(results[2], results[0], atol=1e-6)
  ratio = results[0] / (2 * mono_p)
  half = WINDOW // 2
  assert np.abs(ratio[: 2 * RATE - half - 1600]).max() < 1e-5
  assert np.abs(ratio[2 * RATE + half + 1600 :] - 1).max() < 1e-4
  assert ratio[2 * RATE] == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_what_the_left_ear_gains_the_right_ear_loses(rate):
  mono_p = np.sin(2 * np.pi * 500 * np.arange(rate) / rate).astype("f4")
  pieces = [(np.full((8, 32, 64, 3), 50, np.uint8), 0, True)]
  ears = binauralizer.binauralize(Echo(), mono_p, rate, pieces)  # pyright: ignore
  assert ears.shape == (2, rate) and ears.dtype == np.float32
  inner = slice(rate // 50, -rate // 50)
  want = np.outer([1.5, 0.5], mono_p[inner])  # Left - right is half of left + right.
  np.testing.assert_allclose(ears[:, inner], want, atol=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.save_mono2binaural(tmp_path_factory.mktemp("model"))


def test_level_does_not_matter_and_silence_stays_silent(folder):
  net = binauralizer.Binauralizer(folder)
  mix = 0.2 * noise(17)
  image = np.random.default_rng(0).integers(0, 255, (17, 32, 64, 3)).astype(np.uint8)
  found = net.windows(mix, image)
  assert found.shape == mix.shape and np.abs(found).max() > 1e-4
  np.testing.assert_allclose(net.windows(mix[3:5] * 8, image[3:5]), 8 * found[3:5], atol=1e-5)
  assert not net.windows(0 * mix[:1], image[:1]).any()


@pytest.mark.parametrize("heads", [("apnet",), ()], ids=["head", "mask of the difference"])
def test_the_difference_is_that_of_the_head_if_there_is_one(folder, monkeypatch, heads):
  def apply(params, stats, mix, image):
    ears = {"apnet_left": 0.75 * mix, "apnet_right": 0.25 * mix} if heads else {}
    return ears | {"mask": 9 * mix, "difference": (9 if heads else 0.5) * mix}, stats

  net = mono2binaural.Mono2Binaural(lambda key: {}, lambda: {}, apply)
  monkeypatch.setattr(mono2binaural, "build", lambda config: net)
  monkeypatch.setattr(mono2binaural.Config, "heads", heads)
  mix = 3 * noise()
  found = binauralizer.Binauralizer(folder).windows(mix, np.zeros((1, 32, 64, 3), np.uint8))
  np.testing.assert_allclose(found, 0.5 * mix, atol=1e-4)


def test_the_network_hears_the_level_it_was_trained_with_and_sees_the_window_s_picture(folder):
  net, heard = binauralizer.Binauralizer(folder), []

  def difference(mix, image):
    assert len(mix) == len(image) == binauralizer.BATCH  # One shape.
    heard.append(np.asarray(mix))
    return mix * image[:, :1, 0, 0]

  net._difference = difference
  count = binauralizer.BATCH + 3
  mix = noise(count) * np.linspace(0.01, 2, count, dtype="f4")[:, None]
  image = np.broadcast_to(np.arange(count).reshape(-1, 1, 1, 1), (count, 32, 64, 3))
  found = net.windows(mix, image.astype(np.uint8))
  np.testing.assert_allclose(found, mix * np.arange(count)[:, None], rtol=1e-5)
  level_b = np.sqrt(np.square(np.concatenate(heard)[:count]).mean(1))
  np.testing.assert_allclose(level_b, 0.1, rtol=1e-5)


def test_a_folder_of_another_network_is_refused(folder, model_folder):
  with pytest.raises(UserError, match="has no network 'mono2binaural', only"):
    binauralizer.Binauralizer(model_folder)
