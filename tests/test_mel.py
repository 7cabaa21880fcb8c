"""The mel front ends against MMAudio's, and the way back to linear magnitudes."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from spatialv2a_jax import mel
from spatialv2a_jax.schema import AUDIO

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize(("name", "file", "atol"), [("16k", "mel16", 5e-5), ("44k", "mel44", 2e-4)])
def test_log_mel_is_mmaudio_s(name, file, atol):
  golden = load_file(GOLDEN / f"{file}.safetensors")
  got = mel.log_mel(jnp.asarray(golden["in/audio"]), AUDIO[name])
  np.testing.assert_allclose(got, golden["out/mel"], rtol=0, atol=atol)


@pytest.mark.parametrize(
  ("name", "peak", "total"), [("16k", 0.0266621, 5.118658), ("44k", 0.0321513, 5.941555)]
)
def test_basis_has_librosa_s_values(name, peak, total):
  basis = mel.mel_basis(AUDIO[name])
  np.testing.assert_allclose([basis.max(), basis.sum()], [peak, total], rtol=1e-5)
  assert (basis.sum(1) > 0).all()


def test_mel_scale_inverts():
  hz = np.array([0.0, 440.0, 1000.0, 4000.0, 20000.0])
  np.testing.assert_allclose(mel.mel_to_hz(mel.hz_to_mel(hz)), hz, atol=1e-9)


@pytest.mark.parametrize("name", ["16k", "44k"])
def test_the_logarithm_inverts_and_has_its_decibels(name):
  mels = np.geomspace(1e-4, 10, 6, dtype=np.float32)
  log = mel.to_log(jnp.asarray(mels), AUDIO[name])
  np.testing.assert_allclose(mel.from_log(log, AUDIO[name]), mels, rtol=1e-5)
  assert mel.db_per_unit(AUDIO[name]) * float(log[-1] - log[0]) == pytest.approx(100)


def test_leading_axes_and_silence():
  spec = AUDIO["16k"]
  audio = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 2, 2048)).astype(np.float32)
  audio[1, 1] = 0
  mels = np.asarray(mel.log_mel(jnp.asarray(audio), spec))
  assert mels.shape == (2, 2, 80, 8)
  np.testing.assert_allclose(mels[0, 1], mel.log_mel(jnp.asarray(audio[0, 1]), spec), atol=1e-5)
  np.testing.assert_array_equal(mels[1, 1], -5)


def test_too_short_audio_is_refused():
  with pytest.raises(ValueError, match="384"):
    mel.log_mel(jnp.zeros(384), AUDIO["16k"])


def test_istft_inverts_stft_and_keeps_the_level():
  spec = AUDIO["16k"]
  audio = np.random.default_rng(0).standard_normal((2, 1024 + 9 * 256)).astype(np.float32)
  back = np.asarray(mel.istft(mel.stft(jnp.asarray(audio), spec), spec))
  inner = slice(384, -384)
  np.testing.assert_allclose(back[:, inner], audio[:, inner], atol=2e-5)


def test_linear_magnitudes_project_back_to_the_mel_and_scale_with_it():
  spec = AUDIO["16k"]
  rng = np.random.default_rng(1)
  audio = rng.standard_normal(4096).astype(np.float32) * np.linspace(0.001, 0.3, 4096)
  mels = mel.from_log(mel.log_mel(jnp.asarray(audio, jnp.float32), spec), spec)
  linear = mel.to_linear(mels, spec)
  error_db = 20 * np.log10(np.asarray(mel.project(linear, spec)) / np.asarray(mels))
  assert (np.asarray(linear) >= 0).all()
  assert np.abs(error_db).mean() < 0.1
  np.testing.assert_allclose(mel.to_linear(4 * mels, spec), 4 * linear, rtol=1e-4, atol=1e-7)


def test_band_values_are_kept_at_band_centres():
  spec = AUDIO["44k"]
  centre_m = mel.mel_edges(spec)[1:-1]
  bins = mel.band_to_linear(jnp.asarray(centre_m[:, None], jnp.float32), spec)[0]
  hz_f = np.linspace(0, spec.sample_rate / 2, spec.n_fft // 2 + 1)
  np.testing.assert_allclose(bins, np.clip(hz_f, centre_m[0], centre_m[-1]), rtol=1e-4)
