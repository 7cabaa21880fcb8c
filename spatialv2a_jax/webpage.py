"""HTML files that need nothing beside them: a template with its parts put in, and media as text."""

import base64
from collections.abc import Mapping


def fill(template: str, parts: Mapping[str, str]) -> str:
  """Returns a template with `{{name}}` replaced by the part of that name, which may hold braces.

  Raises:
    KeyError: the template names a part that is not there.
  """
  before, *rest = template.split("{{")
  pieces = [before]
  for piece in rest:
    name, after = piece.split("}}", 1)
    pieces += [parts[name], after]
  return "".join(pieces)


def data_uri(kind: str, data: bytes) -> str:
  """Returns what stands for a file of a MIME type, such as "image/png", in `src` and `href`."""
  return f"data:{kind};base64,{base64.b64encode(data).decode()}"
