"""Writes PyTorch's zip format by hand, opcode by opcode, for files good and bad."""

import struct
import zipfile

import numpy as np

KINDS = {
  "float64": "Double",
  "float32": "Float",
  "float16": "Half",
  "int64": "Long",
  "int32": "Int",
  "int16": "Short",
  "int8": "Char",
  "uint8": "Byte",
  "bool": "Bool",
  "uint16": "BFloat16",
}


def text(value):
  raw = value.encode()
  return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value):
  return b"J" + struct.pack("<i", value)


def sequence(*items):
  return b"(" + b"".join(items) + b"t"


def mapping(pairs):
  return b"}(" + b"".join(text(key) + value for key, value in pairs) + b"u"


def name(module, attribute):
  return f"c{module}\n{attribute}\n".encode()


def ordered(pairs):
  """An OrderedDict with an attribute, as `Module.state_dict` returns it."""
  empty = name("collections", "OrderedDict") + b")R"
  items = b"(" + b"".join(text(key) + value for key, value in pairs) + b"u"
  return empty + items + mapping([("_metadata", empty)]) + b"b"


def tensor(array, key, *, offset=0, shape=None, stride=None, count=None):
  """A tensor over storage `key`, with strides in elements."""
  shape = array.shape if shape is None else shape
  stride = [s // array.itemsize for s in array.strides] if stride is None else stride
  storage = name("torch", f"{KINDS[str(array.dtype)]}Storage")
  size = integer(array.size if count is None else count)
  pid = sequence(text("storage"), storage, text(key), text("cpu"), size) + b"Q"
  arguments = sequence(
    pid,
    integer(offset),
    sequence(*map(integer, shape)),
    sequence(*map(integer, stride)),
    b"\x89",
    name("collections", "OrderedDict") + b")R",
  )
  return name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def parameter(value):
  hooks = name("collections", "OrderedDict") + b")R"
  return name("torch._utils", "_rebuild_parameter") + sequence(value, b"\x88", hooks) + b"R"


def write(path, content, storages, *, compression=zipfile.ZIP_STORED, order="little"):
  """Writes the pickle `content` (opcodes of one object) and the raw storages."""
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("model/data.pkl", b"\x80\x02" + content + b".")
    archive.writestr("model/byteorder", order)
    for key, array in storages.items():
      swapped = array.byteswap() if order == "big" else array
      archive.writestr(f"model/data/{key}", swapped.tobytes())
    archive.writestr("model/version", "3\n")
  return path


def write_state(path, state):
  """Writes a state dict as `torch.save` does."""
  storages = {str(i): np.array(x, order="C") for i, x in enumerate(state.values())}
  pairs = [(k, tensor(x, i)) for k, (i, x) in zip(state, storages.items(), strict=True)]
  return write(path, ordered(pairs), storages)
