import concurrent.futures
import errno
import os
import pathlib
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tf_example, tfrecord
from spatialv2a_jax.errors import UserError

PAYLOADS = [b"", b"123456789", b"\x00" * 32]


def crc32c(data: bytes) -> int:
  """Bit by bit, from the polynomial: independent of the library under test."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
  crc = crc32c(data)
  rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
  return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)


@pytest.fixture
def shard(tmp_path: pathlib.Path) -> pathlib.Path:
  path = tmp_path / "x.tfrecord-00000-of-00001"
  tfrecord.write(path, PAYLOADS)
  return path


def test_crc_vectors_of_rfc_3720():
  assert crc32c(b"123456789") == 0xE3069283
  assert crc32c(bytes(32)) == 0x8A9136AA


@pytest.mark.parametrize("payload", [*PAYLOADS, bytes(range(200))])
def test_frame_is_the_documented_layout(payload):
  length = len(payload).to_bytes(8, "little")
  assert tfrecord.frame(payload) == length + masked(length) + payload + masked(payload)


def test_example_is_protobufs_encoding():
  # Written by protobuf, keys in its unordered mode; ours are sorted.
  id_, x = b"\n\r\n\x02id\x12\x07\n\x05\n\x03abc", b"\n\x0d\n\x01x\x12\x08\n\x06\n\x04\x80?\x00@"
  fields = {"x": np.array([1, 2], ml_dtypes.bfloat16), "id": "abc"}
  assert tf_example.encode(fields) == b"\n\x1e" + id_ + x
  for order in (id_ + x, x + id_):
    decoded = tf_example.decode(b"\n\x1e" + order)
    assert {name: bytes(raw) for name, raw in decoded.items()} == {
      "id": b"abc",
      "x": b"\x80?\x00@",
    }


def test_example_agrees_with_the_protobuf_library():
  pb2 = pytest.importorskip("tensorflow_datasets.proto").tf_example_pb2
  fields = {
    "b": np.arange(40_000, dtype=np.float32),
    "a": "é",
    "c" * 200: np.zeros((0, 3), np.int16),
  }
  ours = tf_example.encode(fields)
  theirs = pb2.Example()
  for name, value in fields.items():
    raw = value.encode() if isinstance(value, str) else value.tobytes()
    theirs.features.feature[name].bytes_list.value.append(raw)
  assert ours == theirs.SerializeToString(deterministic=True)


@settings(max_examples=30, deadline=None)
@given(
  st.dictionaries(st.text(max_size=5), st.integers(0, 300), max_size=4),
  st.sampled_from(["float32", "float16", "bfloat16", "int16", ">f4"]),
)
def test_example_round_trip(sizes, dtype):
  fields = {name: np.arange(size).astype(np.dtype(dtype)) for name, size in sizes.items()}
  raw = tf_example.decode(tf_example.encode(fields))
  assert raw.keys() == fields.keys()
  for name, value in fields.items():
    decoded = tf_example.value_of(raw[name], tf_example.tensor_of(value))
    np.testing.assert_array_equal(decoded, value)


@pytest.mark.parametrize("junk", [b"\x08\x01", b"\n\x05ab", b"\n", b"\n\x80", b"hello world"])
def test_what_is_no_example_raises_value_error(junk):
  with pytest.raises(ValueError, match="tf.train.Example"):
    tf_example.decode(junk)


def test_float_list_is_refused():
  feature = b"\x12\x06\x0a\x04\x00\x00\x80?"  # Feature { float_list { value: 1.0 } }
  entry = b"\n\x01x\x12" + bytes([len(feature)]) + feature
  features = b"\n" + bytes([len(entry)]) + entry
  with pytest.raises(ValueError, match="'x' is not a bytes_list"):
    tf_example.decode(b"\n" + bytes([len(features)]) + features)


def test_random_access_across_shards(tmp_path):
  paths = [tmp_path / f"s{i}" for i in range(3)]
  contents = [[b"a", b"bb"], [], [b"ccc"]]
  for path, payloads in zip(paths, contents, strict=True):
    tfrecord.write(path, payloads)
  source = tfrecord.TFRecordSource(paths)
  assert [source[i] for i in (2, 0, 1)] == [b"ccc", b"a", b"bb"]
  assert len(source) == 3 and source.locate(2) == (str(paths[2]), 0)
  copy = pickle.loads(pickle.dumps(source))
  assert copy[1] == b"bb"
  for outside in (3, -1):
    with pytest.raises(IndexError):
      source[outside]


def test_threads_share_a_source_with_few_open_files(tmp_path, monkeypatch):
  monkeypatch.setattr(tfrecord, "MAX_OPEN_FILES", 2)
  paths = [tmp_path / f"s{i}" for i in range(6)]
  for i, path in enumerate(paths):
    tfrecord.write(path, [bytes([i, j]) for j in range(20)])
  source = tfrecord.TFRecordSource(paths)
  order = np.random.default_rng(0).permutation(120).tolist() * 10
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(source.__getitem__, order)) == [bytes([i // 20, i % 20]) for i in order]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_advice_covers_records_to_their_last_byte(tmp_path, monkeypatch):
  monkeypatch.setattr(tfrecord, "ADVICE", 100)
  payloads = [b"a" * 250, b"b" * 30, b"c" * 100]
  tfrecord.write(tmp_path / "s", payloads)
  source = tfrecord.TFRecordSource([tmp_path / "s"])
  heard = set()

  def listen(descriptor: int, start: int, length: int, how: int) -> None:
    assert os.fstat(descriptor).st_ino == (tmp_path / "s").stat().st_ino and length <= 100
    assert how == os.POSIX_FADV_WILLNEED
    heard.update(range(start, start + length))

  monkeypatch.setattr(os, "posix_fadvise", listen)
  source.advise(source.find([2, 0]))
  ends = np.cumsum([len(payload) + 16 for payload in payloads]).tolist()
  assert heard >= {*range(ends[0]), *range(ends[1], ends[2])}
  assert len(heard - {*range(ends[0]), *range(ends[1], ends[2])}) < 200  # Rounded up, no more.


@pytest.mark.parametrize("damage", ["missing", "garbage", "stale"])
def test_index_is_rebuilt(shard, damage):
  sidecar = pathlib.Path(f"{shard}.index")
  good = sidecar.read_bytes()
  if damage == "missing":
    sidecar.unlink()
  elif damage == "garbage":
    sidecar.write_bytes(good[:50])
  else:
    other = shard.with_name("other")
    tfrecord.write(other, [b"something else"])
    pathlib.Path(f"{other}.index").replace(sidecar)
  assert [tfrecord.TFRecordSource([shard])[i] for i in range(3)] == PAYLOADS
  assert sidecar.read_bytes() == good
  assert sorted(p.name for p in shard.parent.iterdir() if "other" not in p.name) == [
    shard.name,
    sidecar.name,
  ]


def test_every_flipped_byte_is_found_in_its_record(shard):
  blob = shard.read_bytes()
  record_of = [i for i, payload in enumerate(PAYLOADS) for _ in range(len(payload) + 16)]
  assert len(record_of) == len(blob)
  for position, record in enumerate(record_of):
    shard.write_bytes(blob[:position] + bytes([blob[position] ^ 0x10]) + blob[position + 1 :])
    source = tfrecord.TFRecordSource([shard])
    with pytest.raises(
      tfrecord.CorruptRecordError, match=f"{shard.name}: record {record}"
    ) as error:
      source[record]
    assert (error.value.path, error.value.record) == (str(shard), record)
    assert [source[i] for i in range(3) if i != record] == [
      payload for i, payload in enumerate(PAYLOADS) if i != record
    ]
  copy = pickle.loads(pickle.dumps(error.value))
  assert str(copy) == str(error.value) and copy.record == 2


def test_a_flipped_bit_is_found_in_a_record_of_any_length(tmp_path):
  path, payload = tmp_path / "s", bytes(200 << 10)
  tfrecord.write(path, [payload])
  blob = path.read_bytes()
  for place in (0, len(payload) // 2, len(payload) - 1):
    broken = bytearray(blob)
    broken[tfrecord.HEADER + place] ^= 1
    path.write_bytes(broken)
    with pytest.raises(tfrecord.CorruptRecordError, match="checksum of the payload"):
      tfrecord.TFRecordSource([path])[0]


@pytest.mark.parametrize("index", [True, False])
def test_every_truncation_names_file_and_intact_records(shard, index):
  blob, ends = shard.read_bytes(), [16, 41, 89]
  for size in range(1, len(blob)):
    shard.write_bytes(blob[:size])
    intact = sum(end <= size for end in ends)
    if not index:
      pathlib.Path(f"{shard}.index").unlink(missing_ok=True)
    if not index and size in ends:
      assert len(tfrecord.TFRecordSource([shard])) == intact  # A shorter shard, for all one knows.
      continue
    with pytest.raises(UserError, match=rf"{shard.name}: .*cut short, {intact}\D") as error:
      tfrecord.TFRecordSource([shard])
    assert "\n" not in str(error.value)


def test_damaged_length_without_index_says_how_far_it_got(shard):
  blob = bytearray(shard.read_bytes())
  blob[17] ^= 1
  shard.write_bytes(blob)
  pathlib.Path(f"{shard}.index").unlink()
  with pytest.raises(UserError, match="1 records before it are intact"):
    tfrecord.TFRecordSource([shard])


def test_index_of_another_shard_of_equal_size(shard):
  other = shard.with_name("other")
  tfrecord.write(other, list(reversed(PAYLOADS)))
  pathlib.Path(f"{other}.index").replace(f"{shard}.index")
  source = tfrecord.TFRecordSource([shard])
  with pytest.raises(UserError):
    source[0]


def test_missing_shard_is_one_line(tmp_path):
  with pytest.raises(UserError, match="nowhere: cannot read"):
    tfrecord.TFRecordSource([tmp_path / "nowhere"])


def test_what_the_disk_cannot_read_is_a_damaged_record_and_what_is_gone_one_line(
  shard, monkeypatch
):
  source = tfrecord.TFRecordSource([shard])

  def fail(number):
    def read(*_):
      raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", read)

  fail(errno.EIO)
  with pytest.raises(tfrecord.CorruptRecordError, match="record 1 is damaged .Input/output error"):
    source[1]
  fail(errno.ESTALE)
  with pytest.raises(UserError, match=f"{shard.name}: cannot read the shard .Stale file handle"):
    source[1]
  gone = tfrecord.TFRecordSource([shard])
  shard.unlink()
  with pytest.raises(UserError, match=f"{shard.name}: cannot read the shard .No such file"):
    gone[1]


def test_failed_write_leaves_nothing(tmp_path):
  def payloads():
    yield b"one"
    raise RuntimeError

  with pytest.raises(RuntimeError):
    tfrecord.write(tmp_path / "x", payloads())
  assert not list(tmp_path.iterdir())


@given(
  lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=2, max_size=8)
)
def test_records_of_one_length_are_told_apart(lengths):
  """Wherever the bytes of a record that was decoded before had been."""
  for a, b in lengths:
    fields = {"a": "x" * a, "b": "y" * b, "c": "z" * (600 - a - b)}
    for names in (("a", "b", "c"), ("c", "a", "b")):
      renamed = dict(zip(names, fields.values(), strict=True))
      decoded = tf_example.decode(tf_example.encode(renamed))
      assert {name: bytes(raw).decode() for name, raw in decoded.items()} == renamed


def test_a_broken_record_is_not_taken_for_one_of_its_length():
  whole = tf_example.encode({"a": "x" * 9, "b": "y" * 200})
  tf_example.decode(whole)
  values = set()
  for raw in tf_example.decode(whole).values():
    start = whole.index(bytes(raw))
    values |= set(range(start, start + len(raw)))
  for place in set(range(len(whole))) - values:
    broken = bytearray(whole)
    broken[place] ^= 0x40
    try:
      found = tf_example.decode(bytes(broken))
    except ValueError:
      continue
    assert found != tf_example.decode(whole)
