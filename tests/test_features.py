"""Encoders without weights and localizers: mirror law, panning, rest, tracks."""

import json

import numpy as np
import pytest

from spatialv2a_jax import features, io, localizers, schema
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models.spatial import MIRROR_SIGNS

Y, X = localizers.FRAME_SIZE
CONFIG = features.Config(clip_dim=16, sync_dim=12, text_dim=8, text_len=4)
S_H, S_AREA, S_LR = (schema.DESCRIPTORS.index(name) for name in ("S_h", "S_area", "S_LR"))


def texture(seed=0, width=X + 40):
  """A smooth random background, so that gradients predict small shifts."""
  rng = np.random.default_rng(seed)
  coarse = rng.uniform(30, 180, (Y // 8 + 1, width // 8 + 1, 3))
  rows, columns = (
    np.linspace(0, n - 1.001, m) for n, m in ((Y // 8 + 1, Y), (width // 8 + 1, width))
  )
  (y, fy), (x, fx) = (np.divmod(v, 1) for v in (rows, columns))
  y, x = y.astype(int), x.astype(int)
  fy, fx = fy[:, None, None], fx[None, :, None]
  top = (1 - fx) * coarse[y][:, x] + fx * coarse[y][:, x + 1]
  bottom = (1 - fx) * coarse[y + 1][:, x] + fx * coarse[y + 1][:, x + 1]
  return ((1 - fy) * top + fy * bottom).astype(np.uint8)


def clip(count=32, object_x=None, pan=0.0, size=6, seed=0):
  """Frames [n, y, x, 3]: `object_x(i)` is the column of a bright square, `pan` pixels a frame."""
  wide = texture(seed).astype(np.float32)
  frames = np.empty((count, Y, X, 3), np.uint8)
  for i in range(count):
    at, part = divmod(pan * i, 1)
    whole = wide[:, int(at) : int(at) + X + 1]
    frames[i] = (1 - part) * whole[:, :X] + part * whole[:, 1 : X + 1]
    if object_x is not None:
      column = int(object_x(i))
      frames[i, 20 : 20 + size, column : column + size] = 250
  return frames


def tremble(column):
  return lambda i: column + 2 * (i % 2)


def encode(frames, **options):
  return features.encode(frames, len(frames) / schema.SYNC_FPS, CONFIG, **options)


def test_shapes_are_those_of_the_schema():
  seconds = 1.28
  encoded = encode(clip(32, tremble(10)))
  shapes = schema.feature_shapes(
    seconds, schema.AUDIO["16k"], clip_dim=16, sync_dim=12, text_len=4, text_dim=8
  )
  assert encoded["clip_vf"].shape == shapes["clip"] and encoded["sync_sf"].shape == shapes["sync"]
  assert encoded["spatial_vk"].shape == shapes["spatial"]
  assert features.encode_text("dog", CONFIG).shape == shapes["text"]
  assert all(encoded[name].dtype == np.float32 for name in encoded)


def test_features_repeat_and_follow_picture_and_seed():
  frames = clip(32, tremble(10))
  first, again = encode(frames), encode(frames)
  for name in first:
    np.testing.assert_array_equal(first[name], again[name])
  other = features.encode(frames, 1.28, features.Config(seed=1, clip_dim=16, sync_dim=12))
  assert np.abs(other["clip_vf"] - first["clip_vf"]).max() > 0.1
  moved = encode(clip(32, tremble(50)))
  assert np.abs(moved["clip_vf"] - first["clip_vf"]).max() > 0.1
  assert np.abs(moved["sync_sf"] - first["sync_sf"]).max() > 0.1


def test_what_trained_models_have_learnt_from_stays_the_same():
  encoded = encode(clip(32, tremble(10)))
  clip_f, sync_f = encoded["clip_vf"][3, :3], encoded["sync_sf"][5, :3]
  np.testing.assert_allclose(clip_f, [-0.33758, 0.21355, 0.01582], atol=1e-4)
  np.testing.assert_allclose(sync_f, [-1.86826, 0.55718, 0.76439], atol=1e-4)
  want = [-0.65, 0.01068, 0.01474, -1, 0.14709]
  np.testing.assert_allclose(encoded["spatial_vk"][4], want, atol=1e-4)


def test_synchronisation_features_show_when_something_moves():
  event = 16
  frames = clip(32, lambda i: 10 if i < event else 30)  # One jump.
  sync_sf = encode(frames)["sync_sf"]
  still = encode(clip(32, lambda i: 10))["sync_sf"]
  change_s = np.abs(sync_sf - still).max(axis=1)
  at = (change_s.argmax() + 0.5) / len(change_s) * 32
  assert abs(at - event) <= 2.5


@pytest.mark.parametrize("pan", [0.0, 0.7])
def test_a_mirrored_picture_gives_mirrored_heat_and_descriptors(pan):
  frames = clip(32, tremble(12), pan=pan)
  here, there = encode(frames), encode(frames[:, :, ::-1])
  np.testing.assert_allclose(there["heat_vyx"], here["heat_vyx"][:, :, ::-1], atol=1e-4)
  np.testing.assert_allclose(
    there["spatial_vk"], here["spatial_vk"] * MIRROR_SIGNS[None], atol=1e-4
  )


@pytest.mark.parametrize("column, sign", [(6, -1), (66, 1)])
def test_what_moves_on_the_left_has_negative_position(column, sign):
  spatial_vk = encode(clip(32, tremble(column)))["spatial_vk"]
  assert (spatial_vk[:, S_AREA] > 0).all()
  assert (sign * spatial_vk[:, S_H] > 0.5).all() and (sign * spatial_vk[:, S_LR] > 0.9).all()


def test_where_nothing_moves_there_is_nothing():
  encoded = encode(clip(32, lambda i: 10))
  assert not encoded["heat_vyx"].any() and not encoded["spatial_vk"].any()
  noise = np.random.default_rng(0).integers(-1, 2, (32, Y, X, 3))
  grainy = np.clip(clip(32).astype(int) + noise, 0, 255).astype(np.uint8)
  assert not encode(grainy)["heat_vyx"].any()  # Grain of a camera is below the floor.


def test_a_thumbnail_shows_the_same_place():
  heat_vyx = np.zeros((2, Y, X), np.float32)
  heat_vyx[1, 12:16, 20:24] = 0.5
  shown = localizers.thumbnail(heat_vyx)
  assert shown.shape == (2, 12, 20) and shown.dtype == np.uint8
  assert shown[1, 3, 5] == 127 == shown.sum()


def test_one_frame_has_no_motion():
  motion_nyx = localizers.residual_motion(np.ones((1, Y, X, 3), np.float32))
  assert motion_nyx.shape == (1, Y, X) and not motion_nyx.any()


def test_a_pan_is_not_motion_but_an_object_on_it_is():
  motion = lambda frames: localizers.residual_motion(frames.astype(np.float32) / 255)  # noqa: E731
  still, panned = motion(clip(32, pan=0.0)), motion(clip(32, pan=0.8))
  raw = np.abs(np.diff(clip(32, pan=0.8).astype(np.float32) / 255, axis=0)).mean()
  assert not still.any() and panned.mean() < 0.2 * raw
  encoded = encode(clip(32, tremble(60), pan=0.8))
  at = encoded["heat_vyx"][8:].reshape(-1, Y * X).argmax(axis=1)
  row, column = np.divmod(at, X)
  assert (np.abs(row - 23) <= 6).all() and (np.abs(column - 63) <= 6).all()


def test_chunks_of_a_long_clip_leave_no_seams():
  frames = clip(50, tremble(20)).astype(np.float32) / 255
  whole = localizers.residual_motion(frames)
  for i in (15, 16, 17, 33):
    np.testing.assert_allclose(whole[i], localizers.residual_motion(frames[i - 1 : i + 1])[1])
  np.testing.assert_array_equal(whole[0], whole[1])


def test_motion_is_remembered_and_fades():
  motion_nyx = np.zeros((100, Y, X), np.float32)
  motion_nyx[10, 20:30, 10:20] = 1.0
  heat_vyx = localizers.motion_heat(motion_nyx, 32)
  assert not heat_vyx[:2].any() and heat_vyx[4, 25, 15] == pytest.approx(1, abs=1e-3)
  motion_nyx[40, 20:30, 60:70] = 1.0  # The newer motion is the stronger one by then.
  heat_vyx = localizers.motion_heat(motion_nyx, 32)
  assert heat_vyx[13, 25, 65] > 0.99 and 0.01 < heat_vyx[13, 25, 15] < 0.5
  assert not heat_vyx[31].any()  # 2.4 s later.


def test_a_pan_is_removed_in_any_direction():
  """What moves against the camera does not depend on which side of the picture is up."""
  frames = clip(4, pan=0.8).astype(np.float32) / 255
  motion_nyx = localizers.residual_motion(frames)
  turned_nxy = localizers.residual_motion(frames.swapaxes(1, 2))
  np.testing.assert_allclose(turned_nxy.swapaxes(1, 2), motion_nyx, atol=1e-6)


def test_what_one_translation_explains_by_less_than_half_is_no_pan():
  """Then the motion stays the plain difference."""
  frames, panned = clip(4), clip(4, pan=0.8)
  frames[:, :, :52] = panned[:, :, :52]  # Of which a translation would leave 0.7.
  frames = frames.astype(np.float32) / 255
  motion_nyx = localizers.residual_motion(frames)
  np.testing.assert_allclose(motion_nyx[1:], abs(np.diff(frames, axis=0)).mean(-1), atol=1e-6)
  assert motion_nyx[:, :, :52].mean() > 0.01


def test_a_heat_map_knows_what_moved_up_to_the_middle_of_its_frame():
  middle_v = (np.arange(8) + 0.5) / schema.CLIP_FPS
  for n in range(1, 24):  # Moves between the times of frames n - 1 and n.
    motion_nyx = np.zeros((25, 6, 6), np.float32)
    motion_nyx[n] = 1
    seen_v = localizers.motion_heat(motion_nyx, 8).any(axis=(1, 2))
    np.testing.assert_array_equal(seen_v, middle_v > (n - 1) / schema.SYNC_FPS)


def test_motion_fades_to_three_quarters_in_an_eighth_of_a_second():
  motion_nyx = np.zeros((32, 8, 16), np.float32)
  motion_nyx[5, :, :8] = motion_nyx[30, :, 8:] = 1  # One second apart; map 9 shows frame 30.
  heat_yx = localizers.motion_heat(motion_nyx, 10)[9]
  np.testing.assert_allclose([heat_yx[4, 2], heat_yx[4, 13]], [0.75**8, 1], rtol=1e-4)


def test_views_are_what_encode_takes(tmp_path):
  io.write_video(tmp_path / "x.mp4", clip(20, tremble(5)), 25)
  frames = io.read_views(tmp_path / "x.mp4", features.views())["frames"]
  assert frames.shape == (20, Y, X, 3)
  assert encode(frames)["spatial_vk"][-1, S_H] < -0.5


# --- text -----------------------------------------------------------------------------------------


def test_text_is_a_fixed_vector_per_word():
  tokens_wf = features.encode_text("A dog, barks", CONFIG)
  np.testing.assert_array_equal(tokens_wf, features.encode_text("a DOG barks!", CONFIG))
  np.testing.assert_array_equal(tokens_wf[1], features.encode_text("dog", CONFIG)[0])
  assert not tokens_wf[3].any() and np.abs(tokens_wf[:3]).min(axis=1).all()
  np.testing.assert_allclose(tokens_wf[1, :2], [1.12252, -0.36321], atol=1e-4)
  np.testing.assert_array_equal(features.encode_text("a dog barks at me", CONFIG).shape, (4, 8))


@pytest.mark.parametrize("text", ["", "   ", "?!"])
def test_no_words_are_zeros(text):
  assert not features.encode_text(text, CONFIG).any()


def test_words_of_other_scripts_count():
  tokens = [features.encode_text(text, CONFIG) for text in ("狗叫", "лай", "Hündin")]
  assert all(t.any() for t in tokens) and not np.array_equal(tokens[0], tokens[1])


# --- tracks ---------------------------------------------------------------------------------------


def write_track(folder, times, azimuths, suffix=".json"):
  path = folder / f"track{suffix}"
  if suffix == ".json":
    path.write_text(json.dumps({"time_s": list(times), "azimuth_deg": list(azimuths)}))
  else:
    rows = "".join(f"{t}, {a}\n" for t, a in zip(times, azimuths, strict=True))
    path.write_text("time_s, azimuth_deg\n" + rows)
  return path


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_a_track_is_read_and_interpolated(tmp_path, suffix):
  track = localizers.read_track(write_track(tmp_path, [0, 1, 3], [-30, 0.5, 60], suffix))
  np.testing.assert_allclose(track.at(np.array([-1, 0, 0.5, 2, 9])), [-30, -30, -14.75, 30.25, 60])


def test_a_csv_of_a_spreadsheet_is_read(tmp_path):
  path = tmp_path / "excel.CSV"
  path.write_bytes("\ufefftime_s,azimuth_deg,remark\r\n0,30,left\r\n2,-30,right\r\n".encode())
  np.testing.assert_allclose(localizers.read_track(path).azimuth_deg, [30, -30])


@pytest.mark.parametrize(
  "azimuth, column", [(0, 0.5), (45, 0.125), (-45, 0.875), (80, 0), (-80, 1)]
)
def test_the_blob_of_a_track_is_where_the_picture_law_says(tmp_path, azimuth, column):
  config = features.Config(localizer=f"track:{write_track(tmp_path, [0], [azimuth])}")
  encoded = features.encode(clip(32), 1.28, config)
  peak = encoded["heat_vyx"].max(axis=1).argmax(axis=1)
  assert (np.abs((peak + 0.5) / X - column) <= 0.5 / X + 1e-6).all()
  assert encoded["heat_vyx"].max() == 1
  want = max(-1, min(1, -azimuth / 60))
  np.testing.assert_allclose(encoded["spatial_vk"][:, S_H], want, atol=0.25)
  assert azimuth == 0 or (np.sign(encoded["spatial_vk"][:, S_H]) == -np.sign(azimuth)).all()


def test_the_blob_of_a_track_is_round_and_as_wide_as_it_says():
  heat_yx = localizers.Track(np.zeros(1), np.zeros(1)).heat(1)[0]
  across_x, down_y = heat_yx[Y // 2, X // 2 :][:16], heat_yx[Y // 2 :, X // 2][:16]
  np.testing.assert_allclose(down_y, across_x, rtol=1e-4)
  away_x = (np.arange(16) + 0.5) * schema.HFOV_DEG / X / localizers.TRACK_WIDTH_DEG
  want_x = np.exp(-0.5 * (away_x**2 - away_x[0] ** 2))  # Its largest pixel is 1.
  np.testing.assert_allclose(across_x, want_x, rtol=1e-4)


def test_a_track_passes_behind_the_head_the_short_way():
  track = localizers.Track(np.array([0.0, 1.0]), np.array([170.0, -170.0]))
  np.testing.assert_allclose(track.at(np.array([0.5])), 180)
  column = track.heat(8).max(axis=1).argmax(axis=1) / X
  assert column[0] < 0.45 and column[-1] > 0.55  # Left of the middle first, then right of it.


def test_the_start_of_a_window_places_its_track(tmp_path):
  path = write_track(tmp_path, [0, 10], [50, -50])
  config = features.Config(localizer=f"track:{path}")
  early, late = (features.encode(clip(32), 1.28, config, start=s)["spatial_vk"] for s in (0, 8.5))
  assert early[0, S_H] < -0.5 and late[-1, S_H] > 0.5


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("x.json", "{", "needs numbers in time_s and azimuth_deg"),
    ("x.json", "[1, 2]", "needs numbers"),
    ("x.json", '{"time_s": [0]}', "azimuth_deg"),
    ("x.json", '{"time_s": [0, 1], "azimuth_deg": [0]}', "needs numbers"),
    ("x.json", '{"time_s": [0], "azimuth_deg": ["left"]}', "could not convert"),
    ("x.json", '{"time_s": [0], "azimuth_deg": [NaN]}', "finite"),
    ("x.json", '{"time_s": [0, 0], "azimuth_deg": [1, 2]}', "must increase"),
    ("x.json", '{"time_s": [], "azimuth_deg": []}', "no rows"),
    ("x.csv", "time,azimuth\n0,1\n", "time_s"),
    ("x.csv", "time_s,azimuth_deg\n0\n", "needs numbers"),
    ("x.csv", "", "no rows"),
    ("x.csv", "\udcff", "needs numbers"),
    ("y.csv", None, "no such track file"),
  ],
)
def test_a_bad_track_is_one_line(tmp_path, name, text, message):
  path = tmp_path / name
  if text is not None:
    path.write_bytes(text.encode(errors="surrogateescape"))
  with pytest.raises(UserError, match=message) as caught:
    localizers.track_of(f"track:{path}")
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["acls", "track:", "", "Motion"])
def test_an_unknown_localizer_or_encoder_is_refused(name):
  with pytest.raises(UserError, match="have: acl, acl:FILE, motion, track:FILE"):
    features.encode(clip(16), 0.64, features.Config(localizer=name))
  with pytest.raises(UserError, match="encoder 'clap' needs trained networks"):
    features.encode(clip(16), 0.64, features.Config(encoder="clap"))
