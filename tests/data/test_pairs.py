"""Sources and pairs: what is kept of a clip, where pairs put it, and that they repeat."""

import json
import shutil

import numpy as np
import pytest

from data import pairs, shards, sources
from data.media import File
from launch import data as launch_data
from launch import sources as launch_sources
from spatialv2a_jax import io, schema
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.spatial import spatializer
from tests import tiny

SETTINGS = sources.Settings(seconds=1.6, rows=32, columns=64)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
  """Bright squares at known places, one that stands still and one without sound."""
  folder = tmp_path_factory.mktemp("media")
  for i, side in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
    tiny.film(folder / f"clip{i}.mp4", 1.6, seed=i, side=side, sound=True)
  tiny.film(folder / "still.mp4", 1.6, still=True, sound=True)
  io.write_audio(folder / "mute.wav", np.zeros((1, 25_600), "f4"), 16_000)
  tiny.film(folder / "mute.mp4", 1.6, side=0.5)
  tiny.film(folder / "brief.mp4", 1.0, side=0.5, sound=True)
  return folder


@pytest.fixture(scope="module")
def built(media, tmp_path_factory):
  out = tmp_path_factory.mktemp("sources")
  stats = sources.build(media, out, SETTINGS, shards=2)
  return out, stats


def test_clips_without_one_sounding_place_are_left_out_with_the_reason(built):
  _, stats = built
  assert (stats["clips_in"], stats["clips_out"]) == (8, 5)
  assert set(stats["bad"]) == {"still", "mute", "brief"}
  assert "one thing moves" in stats["bad"]["still"] and "one thing moves" in stats["bad"]["mute"]
  assert "16000 samples, fewer than 25600" in stats["bad"]["brief"]


def test_a_record_knows_where_its_source_is(media):
  for i, side in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
    record = sources.Record(SETTINGS)(shards.Item("x", File(media / f"clip{i}.mp4")))
    column = np.asarray(record["column"])
    want = side * 70 / 80 + 5 / 80  # The square of 10 pixels begins at 70 x side of 80 pixels.
    assert (column >= 0).sum() > 8 and np.abs(column[column >= 0] - want).max() < 0.1
    image = sources.unpack(np.asarray(record["jpeg"]), np.asarray(record["ends"]), 5)
    bright = np.flatnonzero(image.max((0, 2)) > 200)
    assert image.shape == (32, 64, 3) and abs(bright.mean() / 64 - want) < 0.05


def test_a_place_is_one_place():
  heat = np.zeros((4, 8, 20), np.float32)
  heat[0, 2, 4:8] = 0.6  # Columns 4 to 7 of 20.
  heat[1, 2, [1, 18]] = 1.0  # Two places.
  heat[2] = 0.4  # Nothing reaches one half.
  heat[3, :, 12:20] = 1.0
  np.testing.assert_allclose(sources.places(heat), [0.3, -1, -1, 0.8])


@pytest.mark.parametrize(("left", "right", "mono"), [(1, 0.5, 0.75), (0.5, -1, -1), (0, 1, 1)])
def test_the_louder_channel_stands_for_channels_that_cancel_or_lack(
  media, tmp_path, left, right, mono
):
  shutil.copy(media / "clip2.mp4", tmp_path)
  x = np.random.default_rng(0).uniform(-0.9, 0.9, 25_600).astype("f4")
  io.write_audio(tmp_path / "clip2.wav", np.stack([left * x, right * x]), 16_000)
  record = sources.Record(SETTINGS)(shards.Item("x", File(tmp_path / "clip2.mp4")))
  np.testing.assert_allclose(np.asarray(record["mono"]), mono * x * 32768, atol=1)


def test_columns_rise_apart_and_reach_both_edges():
  rng = np.random.default_rng(0)
  for count in (1, 2, 3):
    drawn = np.stack([pairs.draw_columns(rng, count) for _ in range(400)])
    assert drawn.min() >= pairs.EDGE and drawn.max() <= 1 - pairs.EDGE
    assert drawn.min() < 0.1 and drawn.max() > 0.9
    if count > 1:
      assert np.diff(drawn, axis=1).min() >= pairs.APART - 1e-9


def painted(column, colour, width=100):
  image = np.zeros((4, width, 3), np.uint8)
  image[:, int(column * width), :] = colour
  mono = np.random.default_rng(int(colour)).standard_normal(schema.PAIR_SAMPLES + 2 * pairs.CONTEXT)
  return pairs.Source(mono.astype("f4"), image, column)


def test_every_source_is_seen_once_and_where_it_was_put():
  found = [painted(0.8, 100), painted(0.1, 200), painted(0.5, 255)]
  columns = np.array([0.2, 0.5, 0.85])
  image = pairs.canvas(found, columns)
  for colour, column in zip((100, 200, 255), columns, strict=True):
    seen = np.flatnonzero(np.abs(image[0, :, 0] - colour) < 1)
    assert len(seen) == 1 and abs(seen[0] - 100 * column) <= 1


def level_db(ears):
  return 10 * np.log10(np.divide(*np.square(ears, dtype=np.float64).sum(-1)))


def test_sound_is_where_the_picture_is_and_normalised():
  place = spatializer.load("sphere", schema.PAIR_RATE)
  for column in (0.1, 0.3, 0.7, 0.9):
    rng = np.random.default_rng(3)
    ears = pairs.mix(rng, [painted(0.5, 9)], np.array([column]), place)
    assert ears.shape == (2, schema.PAIR_SAMPLES) and ears.dtype == np.float32
    assert np.sqrt(np.square(ears.sum(0)).mean()) == pytest.approx(schema.PAIR_LEVEL, rel=1e-4)
    assert np.sign(level_db(ears)) == np.sign(0.5 - column)
    assert (
      np.square(ears[:, :160]).mean() > 0.3 * np.square(ears).mean()
    )  # It rings from the start.


def test_levels_of_sources_differ_by_no_more_than_is_drawn_whatever_theirs_were():
  shape = schema.PAIR_SAMPLES + 2 * pairs.CONTEXT
  noise = np.random.default_rng(0).standard_normal((2, shape)).astype("f4")
  found = [pairs.Source(0.01 * noise[0], None, 0.5), pairs.Source(noise[1], None, 0.5)]

  def apart(mono, azimuth):  # Each source in an ear of its own.
    return np.stack([mono, 0 * mono] if azimuth > 0 else [0 * mono, mono])

  rng = np.random.default_rng(1)
  differences = [level_db(pairs.mix(rng, found, np.array([0.2, 0.8]), apart)) for _ in range(200)]
  assert -12.2 < min(differences) < -9 and 9 < max(differences) < 12.2
  assert abs(np.mean(differences)) < 1.5


@pytest.mark.parametrize(("place", "first"), [(0, -pairs.CONTEXT), (7, 9448), (15, 21_408)])
def test_a_window_lies_about_its_picture_or_at_the_end_of_the_sound(place, first):
  size, samples = schema.PAIR_SAMPLES + 2 * pairs.CONTEXT, 2 * schema.PAIR_RATE
  image = np.zeros((16, 32, 64, 3), np.uint8)
  image[:, :, :16] = 255
  jpeg, ends = sources.pack(image)
  fields = {"mono": np.arange(1, samples + 1, dtype=np.int16), "jpeg": jpeg, "ends": ends}
  fields["column"] = np.where(np.arange(16) == place, 0.125, -1).astype("f4")
  rng, sides = np.random.default_rng(0), set()
  for _ in range(8):
    found = pairs.cut(rng, fields)
    heard = np.rint(found.mono_p * 32768)
    index = first + np.arange(size)
    np.testing.assert_array_equal(heard, np.where((index >= 0) & (index < samples), index + 1, 0))
    bright = np.flatnonzero(found.image_yxc[0, :, 0] > 128)
    assert abs((bright.mean() + 0.5) / 64 - found.column) < 0.02
    sides.add(found.column)
  assert sides == {0.125, 0.875}


def test_light_changes_within_bounds_and_white_stays_white():
  rng, image = np.random.default_rng(0), np.full((1, 3, 3), 100, np.uint8)
  image[0, 1], image[0, 2] = (200, 100, 0), 255
  lit = np.stack([pairs.relit(rng, image) for _ in range(300)]).astype(float)
  grey, colours, white = lit[:, 0, 0], lit[:, 0, 1], lit[:, 0, 2]
  assert np.ptp(grey, axis=1).max() == 0
  assert grey.min() < 75 and grey.max() > 125 and 69 < grey.min() and grey.max() < 131
  assert (np.abs(colours[:, 1] - grey[:, 0]) <= 1).all()  # Of the mean all keep their distance.
  assert white.min() > 170 and (white == 255).mean() > 0.4


def test_sound_is_wanted_a_quarter_of_a_second_about_a_picture():
  mono = np.zeros(2 * sources.RATE)
  mono[sources.RATE] = 1
  middle = (np.arange(16) + 0.5) / sources.FPS
  heard = sources.levels(mono, 16)
  assert ((heard > 0) == (np.abs(middle - 1) < 0.25)).all()
  np.testing.assert_allclose(sources.levels(0 * mono + 0.3, 16), 0.3)


def test_pictures_are_kept_as_well_as_their_room_allows():
  smooth = np.indices((4, 64, 96)).sum(0)[..., None].repeat(3, -1).astype(np.uint8)
  noise = np.random.default_rng(0).integers(0, 256, (4, 320, 480, 3), np.uint8)
  jpeg, ends = sources.pack(smooth)
  assert all(
    np.abs(sources.unpack(jpeg, ends, n).astype(int) - smooth[n]).max() < 4 for n in range(4)
  )
  jpeg, ends = sources.pack(noise)
  assert len(jpeg) == sources.pack(noise // 9)[0].size >= ends[-1] > len(jpeg) / 2


def batches(out, count=2, **options):
  options = {"batch_size": 4, "seed": 1} | options
  stream = pairs.loader(shards.paths(out), "sphere", **options)
  return [next(stream) for _ in range(count)]


def test_pairs_are_a_function_of_seed_epoch_and_clip(built):
  out, _ = built
  whole = batches(out, 4)
  assert whole[0]["audio_bep"].shape == (4, 2, schema.PAIR_SAMPLES)
  assert whole[0]["image_byxc"].shape == (4, 32, 64, 3)
  assert whole[0]["image_byxc"].dtype == np.uint8
  resumed = batches(out, 2, start_step=2)
  parts = [batches(out, 2, rows=rows) for rows in ((0, 1), (1, 4))]
  for name in ("id_b", "audio_bep", "image_byxc"):
    for step in (0, 1):
      np.testing.assert_array_equal(resumed[step][name], whole[2 + step][name])
      joined = np.concatenate([part[step][name] for part in parts])
      np.testing.assert_array_equal(joined, whole[step][name])
  other = batches(out, 1, seed=2)[0]
  assert not np.array_equal(other["audio_bep"], whole[0]["audio_bep"])
  # The same clip is another pair in the next epoch.
  rows = [(b["id_b"][i], b["audio_bep"][i]) for b in whole for i in range(4)]
  twice = [(x, y) for i, (a, x) in enumerate(rows) for b, y in rows[i + 1 :] if a == b]
  assert twice and not any(np.array_equal(x, y) for x, y in twice)


def test_the_louder_ear_is_on_the_side_of_what_is_seen(built):
  """A bright square on a dull background is the only thing in these pictures."""
  out, _ = built
  same = []
  for batch in batches(out, 8, batch_size=8):
    for ears, image in zip(batch["audio_bep"], batch["image_byxc"], strict=True):
      bright = np.flatnonzero(image.astype(int).sum(2).max(0) > 0.93 * image.sum(2).max())
      if np.ptp(bright) < 12 and abs(bright.mean() / 64 - 0.5) > 0.15:  # One source, aside.
        same.append((level_db(ears) > 0) == (bright.mean() < 32))
  assert len(same) > 8 and np.mean(same) > 0.9


def test_the_command_makes_sources_and_counts_what_it_left_out(media, tmp_path, capsys):
  argv = ["sources", f"--media={media}", f"--out={tmp_path}", "--seconds=1.6", "--jobs=1"]
  assert launch_data.main([*argv, "--rows=32", "--columns=64", "--shards=1"]) == 0
  told = capsys.readouterr().out
  assert (
    "5 of 8 clips" in told and "left out 2, such as " in told and ": there is no picture" in told
  )
  assert json.loads((tmp_path / "manifest.json").read_text())["config"]["rows"] == 32
  for wrong in ("--rows=30", "--columns=80"):
    assert launch_data.main([*argv, wrong]) == 2
    assert "give multiples of 32" in capsys.readouterr().err


def test_sources_must_have_the_size_that_training_wants(built, tmp_path):
  launch_sources.check_size(built[0], 32, 64)
  with pytest.raises(UserError, match="pictures of 32 x 64, the config of 64 x 32"):
    launch_sources.check_size(built[0], 64, 32)
  shards.build([shards.Item("a", 0)], lambda _: {"x": np.ones(1)}, tmp_path, shards=1, config={})
  with pytest.raises(UserError, match="holds no sources"):
    launch_sources.check_size(tmp_path, 32, 64)


def test_a_bad_spatializer_is_refused_before_reading(built):
  with pytest.raises(UserError, match="unknown spatializer"):
    pairs.loader(shards.paths(built[0]), "kemar", batch_size=2, seed=0)
