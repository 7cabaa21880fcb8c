"""Placing the sound of files: sides, lengths, own pictures, and faults."""

import json
import types
from typing import Any

import numpy as np
import pytest

from spatialv2a_jax import features, io, localizers, spatialize
from spatialv2a_jax.errors import UserError
from tests import tiny

RATE = 16_000


def noise(seconds=0.5, channels=1, rate=RATE):
  sound = np.random.default_rng(0).uniform(-0.3, 0.3, (channels, round(seconds * rate)))
  return sound.astype(np.float32)


def track(folder, *azimuths):
  path = folder / "track.json"
  path.write_text(json.dumps({"time_s": list(range(len(azimuths))), "azimuth_deg": azimuths}))
  return path


def run(*inputs, out, track=None, hrtf=None, format="wav", **options):
  return spatialize.run(list(inputs), out, track=track, hrtf=hrtf, format=format, **options)


def level_db(ears):
  return 10 * np.log10(np.square(ears[0]).mean() / np.square(ears[1]).mean())


def delay(ears):
  """Samples by which the right ear is late."""
  cross = np.correlate(ears[1], ears[0], "full")
  return cross.argmax() - (ears.shape[1] - 1)


@pytest.mark.parametrize("channels, rate", [(1, RATE), (2, 44_100)])
@pytest.mark.parametrize("side", [1, -1])
def test_a_track_on_one_side_is_louder_and_earlier_there(tmp_path, channels, rate, side):
  io.write_audio(tmp_path / "x.wav", noise(0.5, channels, rate), rate)
  assert run(tmp_path / "x.wav", out=tmp_path / "out", track=track(tmp_path, 60 * side)) == 0
  ears = io.read_audio(tmp_path / "out" / "x.wav")
  assert ears.shape == (2, round(0.5 * rate))
  assert side * level_db(ears) > 3 and 4 <= side * delay(ears) * RATE / rate <= 14
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["x.wav"]


def test_a_moving_track_moves_and_formats_agree(tmp_path):
  io.write_audio(tmp_path / "x.wav", noise(1.0), RATE)
  path = track(tmp_path, 80, -80)
  run(tmp_path / "x.wav", out=tmp_path / "out", track=path)
  run(tmp_path / "x.wav", out=tmp_path / "out", track=path, format="flac")
  ears = io.read_audio(tmp_path / "out" / "x.wav")
  assert level_db(ears[:, :5000]) > 3 and level_db(ears[:, -5000:]) < -3
  assert np.abs(io.read_audio(tmp_path / "out" / "x.flac") - ears).max() <= 2**-23


def test_what_the_channels_say_of_direction_is_replaced(tmp_path):
  sound = noise(0.5)
  for name, gains in (("left", [2, 0]), ("both", [1, 1])):
    io.write_audio(tmp_path / f"{name}.wav", sound * np.array(gains, np.float32)[:, None], RATE)
  path = track(tmp_path, 0)
  run(tmp_path / "left.wav", tmp_path / "both.wav", out=tmp_path / "out", track=path)
  left, both = (io.read_audio(tmp_path / "out" / f"{name}.wav") for name in ("left", "both"))
  np.testing.assert_array_equal(left, both)
  np.testing.assert_array_equal(*left)  # Straight ahead both ears are equal.


@pytest.mark.parametrize("seconds, side", [(1.6, 0.0), (1.6, 1.0), (0.32, 0.0)])
def test_a_video_follows_its_own_picture(tmp_path, seconds, side):
  film = tiny.film(tmp_path / "x.mp4", seconds, side=side, sound=True)
  assert run(film, out=tmp_path / "out", video_sound="flac") == 0
  ears = io.read_audio(tmp_path / "out" / "x.wav")
  assert ears.shape == (2, round(seconds * tiny.RATE))
  sign = 1 if side == 0 else -1
  assert sign * level_db(ears) > 3 and sign * delay(ears) > 3
  carried = io.read_audio(tmp_path / "out" / "x.mp4")
  assert np.abs(carried - ears).max() <= 2**-22
  assert abs(io.probe(tmp_path / "out" / "x.mp4").duration_s - seconds) <= 1 / 25


def test_the_track_of_a_long_picture_is_one_track(tmp_path, monkeypatch):
  film = tiny.film(tmp_path / "x.mp4", 3.5)  # Crosses from left to right.
  monkeypatch.setattr(spatialize, "WINDOW_SECONDS", 1.0)
  found = spatialize.visible_track(film)
  assert (np.diff(found.time_s) > 0).all() and found.time_s[-1] > 3.2
  assert found.azimuth_deg[0] > 35 and found.azimuth_deg[-1] < -35
  assert np.polyfit(found.time_s, found.azimuth_deg, 1)[0] < -20


def test_a_source_in_the_picture_does_not_jump(tmp_path, monkeypatch):
  """The square is on the left, then on the right at once."""
  frames = np.full((75, 48, 80, 3), 80, np.uint8)
  for i, frame in enumerate(frames):
    at = (5 if i < 38 else 65) + i % 2 * 3
    frame[16:26, at : at + 10] = 255
  io.write_video(tmp_path / "x.mp4", frames, 25)
  found = spatialize.visible_track(tmp_path / "x.mp4")
  np.testing.assert_allclose(np.diff(found.time_s), 1 / 8)  # Frames without motion are bridged.
  assert found.time_s[0] == 1 / 16  # The middle of a frame of 125 ms.
  assert found.azimuth_deg[2] > 35 and found.azimuth_deg[-2] < -35
  assert np.abs(np.diff(found.azimuth_deg)).max() < 20


def test_a_source_that_rests_stays_where_it_was(tmp_path):
  frames = np.full((75, 48, 80, 3), 80, np.uint8)
  for i, frame in enumerate(frames):
    at = 5 + (i % 2 * 3 if i < 30 else 0)
    frame[16:26, at : at + 10] = 255
  io.write_video(tmp_path / "x.mp4", frames, 25)
  azimuth_v = spatialize.visible_track(tmp_path / "x.mp4").azimuth_deg
  assert azimuth_v.min() > 35 and np.ptp(azimuth_v) < 5


@pytest.mark.parametrize("format", ["wav", "flac"])
def test_loud_sound_is_turned_down_in_both_ears_alike(tmp_path, capsys, format):
  film = tiny.film(tmp_path / "x.mp4", 1.6, side=0.0)
  for name, gain in (("loud", 3.3), ("quiet", 0.33)):
    io.remux(film, gain * noise(1.6, 2), RATE, tmp_path / name / "x.mp4", codec="flac")
    film_there, out = tmp_path / name / "x.mp4", tmp_path / f"{name}_out"
    assert run(film_there, out=out, format=format, video_sound="flac") == 0
  error = capsys.readouterr().err
  assert error.count("turned down by") == 1 and "clipped" not in error
  loud, quiet = (io.read_audio(tmp_path / f"{n}_out" / f"x.{format}") for n in ("loud", "quiet"))
  assert 0.99 < np.abs(loud).max() <= 32767 / 32768
  assert level_db(loud) == pytest.approx(level_db(quiet), abs=0.2)
  film_ep = io.read_audio(tmp_path / "loud_out" / "x.mp4")
  assert np.abs(film_ep - loud).max() < 2**-22
  assert np.abs(quiet).max() < 0.5


@pytest.mark.parametrize("rate", [100, 8_000, 11_025, 96_000])
def test_unusual_rates_work(tmp_path, rate):
  io.write_audio(tmp_path / "x.wav", noise(0.2, 1, rate), rate)
  run(tmp_path / "x.wav", out=tmp_path / "out", track=track(tmp_path, 45))
  assert io.probe(tmp_path / "out" / "x.wav").audio_rate == max(rate, spatialize.LOWEST_RATE)
  assert rate < 1000 or level_db(io.read_audio(tmp_path / "out" / "x.wav")) > 1


def test_faults_of_files_are_one_line(tmp_path):
  io.write_audio(tmp_path / "x.wav", noise(0.1), RATE)
  io.write_audio(tmp_path / "none.wav", noise(0), RATE)
  tiny.film(tmp_path / "mute.mp4", side=0.1)
  tiny.film(tmp_path / "still.mp4", still=True, sound=True)
  io.write_video(tmp_path / "one.mp4", [np.zeros((32, 32, 3), np.uint8)], 25, noise(0.04), RATE)
  (tmp_path / "broken.sofa").write_text("no HDF5")
  (tmp_path / "empty").mkdir()
  here = track(tmp_path, 0)
  cases = [
    ("x.wav", {}, "no picture to follow; give --track FILE"),
    ("none.wav", {"track": here}, "zero samples"),
    ("mute.mp4", {}, "no sound to place"),
    ("still.mp4", {}, "nothing moves"),
    ("one.mp4", {}, "nothing moves"),
    ("absent.wav", {"track": here}, "no such file"),
    ("empty", {"track": here}, "no media"),
    ("x.wav", {"track": ""}, "no such track file"),
    ("x.wav", {"track": tmp_path / "absent.csv"}, "no such track file"),
    ("x.wav", {"track": here, "hrtf": f"sofa:{tmp_path}/absent.sofa"}, "no such SOFA file"),
    ("x.wav", {"track": here, "hrtf": f"sofa:{tmp_path}/broken.sofa"}, "not a SOFA file"),
    ("x.wav", {"track": here, "hrtf": "kemar"}, "unknown HRTF"),
  ]
  for name, options, message in cases:
    with pytest.raises(UserError, match=message) as caught:
      run(tmp_path / name, out=tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and not list((tmp_path / "out").iterdir())


def test_samples_that_are_no_numbers_are_refused(tmp_path):
  import scipy.io.wavfile

  sound = noise(0.1)[0]
  sound[7] = np.nan
  scipy.io.wavfile.write(tmp_path / "nan.wav", RATE, sound)
  with pytest.raises(UserError, match="not finite"):
    run(tmp_path / "nan.wav", out=tmp_path / "out", track=track(tmp_path, 0))


def test_one_fault_among_several_files_is_told_and_passed_over(tmp_path, capsys):
  media = tmp_path / "media"
  for name in ("a.wav", "b.flac"):
    io.write_audio(media / name, noise(0.1), RATE)
  (media / "c.mp3").write_text("no sound")
  code = run(media, out=tmp_path / "out", track=track(tmp_path, 10))
  captured = capsys.readouterr()
  assert code == 4 and "2 of 3 files" in captured.out
  assert f"failed: {media / 'c.mp3'}: " in captured.err
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.wav", "b.wav"]


def test_outputs_never_replace_inputs_nor_each_other(tmp_path):
  io.write_audio(tmp_path / "x.wav", noise(0.1), RATE)
  before = io.file_hash(tmp_path / "x.wav")
  here = track(tmp_path, 10)
  with pytest.raises(UserError, match="choose another --out"):
    run(tmp_path / "x.wav", out=tmp_path, track=here)
  assert io.file_hash(tmp_path / "x.wav") == before
  tiny.film(tmp_path / "x.mp4", side=0.1, sound=True)
  with pytest.raises(UserError, match="share outputs named x"):
    run(tmp_path / "x.wav", tmp_path / "x.mp4", out=tmp_path / "out", track=here)


@pytest.mark.parametrize("rate, seconds", [(RATE, 1.6), (44_100, 0.4)])
def test_a_network_places_the_sound_of_a_video(tmp_path, rate, seconds):
  folder = tiny.save_mono2binaural(tmp_path / "model")
  film = tiny.film(tmp_path / "x.mp4", seconds)
  sound = noise(seconds, 1, rate)
  io.remux(film, np.repeat(sound, 2, 0), rate, tmp_path / "with" / "x.mp4")
  mono = io.read_audio(tmp_path / "with" / "x.mp4", mono=True)[0]
  options: dict[str, Any] = {"track": None, "hrtf": None, "format": "wav"}
  video = tmp_path / "with" / "x.mp4"
  assert spatialize.run([video], tmp_path / "out", **options, checkpoint=str(folder)) == 0
  ears = io.read_audio(tmp_path / "out" / "x.wav")
  assert io.probe(tmp_path / "out" / "x.wav").audio_rate == rate
  np.testing.assert_allclose(ears.mean(0), mono, atol=1e-6)  # Of which nothing is lost.
  assert np.abs(ears[0] - ears[1]).max() > 1e-3
  for name, value in (("track", str(track(tmp_path, 0))), ("hrtf", "sofa:x")):
    with pytest.raises(UserError, match=f"--{name} and --checkpoint exclude each other"):
      both: dict[str, Any] = options | {name: value}
      spatialize.run([video], tmp_path / "both", **both, checkpoint=str(folder))
  io.write_audio(tmp_path / "blind.wav", sound, rate)
  with pytest.raises(UserError, match="no picture for the network"):
    spatialize.run([tmp_path / "blind.wav"], tmp_path / "no", **options, checkpoint=str(folder))


class Sees:
  """Stands for a network: left - right is the mix times the brightness of the left half."""

  config = types.SimpleNamespace(rows=32, columns=64)

  def windows(self, mix_bp, image_byxc):
    return mix_bp * image_byxc[:, :, :32].mean((1, 2, 3), dtype=np.float32)[:, None] / 255


def test_a_network_sees_a_picture_that_comes_in_parts_as_one(tmp_path, monkeypatch):
  film = tiny.film(tmp_path / "x.mp4", 1.6, sound=True)
  whole, rate = spatialize.binauralize(film, Sees())  # pyright: ignore
  monkeypatch.setattr(spatialize, "WINDOW_SECONDS", 0.25)
  parts, _ = spatialize.binauralize(film, Sees())  # pyright: ignore
  np.testing.assert_allclose(parts, whole, atol=1e-6)
  start, end = level_db(whole[:, : rate // 4]), level_db(whole[:, -rate // 4 :])
  assert start > end + 0.1  # The square crosses from left to right.


def test_the_picture_is_seen_by_the_default_localizer():
  assert features.Config().localizer == "motion" and localizers.track_of("motion") is None
