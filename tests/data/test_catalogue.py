"""Lists of ids against folders of videos."""

import os
import pathlib

import pytest

from data import catalogue
from spatialv2a_jax.errors import UserError


def touch(folder: pathlib.Path, *names: str) -> pathlib.Path:
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
  return folder


def listed(folder: pathlib.Path, text: str, name: str = "list.csv") -> pathlib.Path:
  path = folder / name
  path.write_text(text)
  return path


def test_any_nesting_and_what_the_list_and_the_folder_lack(tmp_path):
  videos = touch(
    tmp_path / "v", "a.mp4", "x/y/b.MKV", "x/b.mp4", "x/extra.webm", ".hidden/c.mp4", "notes.txt",
    "x/._a.mp4",
  )  # fmt: skip
  labels = listed(tmp_path, "split,id,label\ntrain,a,dog\ntest,b,cat\ntest,c,owl\n")
  known = catalogue.read(videos, labels)
  assert [(clip.id, clip.label, clip.split, clip.listed) for clip in known.clips] == [
    ("a", "dog", "train", True),
    ("b", "cat", "test", True),
    ("extra", "", "train", False),
  ]
  assert known.clips[1].name == "x/b.mp4"  # The first by name, whatever order the disk has.
  assert known.coverage() == {
    "listed": 3, "found": 2, "share": pytest.approx(2 / 3), "missing": ["c"],
    "unlisted": ["x/extra.webm"], "duplicates": ["x/y/b.MKV"], "broken_links": [],
  }  # fmt: skip


def test_links_are_followed_once_and_those_that_lead_nowhere_are_named(tmp_path):
  videos = touch(tmp_path / "v", "deep/a.mp4")
  touch(tmp_path / "disk", "b.mp4", "more/c.mp4")
  (videos / "b").symlink_to(tmp_path / "disk")
  (videos / "again").symlink_to(tmp_path / "disk" / "more")
  (videos / "deep" / "round").symlink_to(videos)
  (videos / "same").symlink_to(videos / "deep")
  (videos / "lost.mp4").symlink_to(tmp_path / "gone.mp4")
  (videos / "d.mp4").symlink_to(tmp_path / "disk" / "b.mp4")
  known = catalogue.read(videos, listed(tmp_path, "id\na\nb\nc\nd\nlost\n"))
  assert {clip.id: clip.name for clip in known.clips} == {
    "a": "deep/a.mp4", "b": "b/b.mp4", "c": "again/c.mp4", "d": "d.mp4",
  }  # fmt: skip
  assert known.missing == ("lost",) and not known.duplicates
  assert known.coverage()["broken_links"] == ["lost.mp4"]


def test_vggsounds_own_list(tmp_path):
  videos = touch(
    tmp_path / "v", "---g-f_I2yQ_000001.mp4", "--0PQM4-hqg_30.mp4", "once.mp4", "twice.mp4",
    "ms_4000_14000.mp4", "span_5_15.mp4", "best.mp4", "best_8.mp4", "best_000008.mp4",
  )  # fmt: skip
  rows = [
    '---g-f_I2yQ,1,people marching,test', '--0PQM4-hqg,30,"waterfall, burbling",train',
    "once,7,dog,train", "twice,1,dog,train", "twice,2,dog,train", "ms,4,cat,train",
    "span,5,cat,train", "best,8,cat,train",
  ]  # fmt: skip
  known = catalogue.read(videos, listed(tmp_path, "\n".join(rows)))
  found = {clip.id: (clip.label, clip.name) for clip in known.clips if clip.listed}
  assert found == {
    "---g-f_I2yQ_000001": ("people marching", "---g-f_I2yQ_000001.mp4"),
    "--0PQM4-hqg_000030": ("waterfall, burbling", "--0PQM4-hqg_30.mp4"),
    "once_000007": ("dog", "once.mp4"),
    "ms_000004": ("cat", "ms_4000_14000.mp4"),
    "span_000005": ("cat", "span_5_15.mp4"),
    "best_000008": ("cat", "best_000008.mp4"),
  }
  assert known.missing == ("twice_000001", "twice_000002")  # Nobody knows which of the two it is.


def test_tab_separated_and_without_a_header(tmp_path):
  videos = touch(tmp_path / "v", "a.mp4", "b.mp4")
  for text in ("id\tlabel\tsplit\na\tdog, barking\ttrain\n", "a\tdog, barking\ttrain\n"):
    (clip, _) = catalogue.read(videos, listed(tmp_path, text, "l.tsv")).clips
    assert (clip.id, clip.label, clip.split) == ("a", "dog, barking", "train")


def test_cells_may_be_padded_and_a_spreadsheet_may_mark_its_encoding(tmp_path):
  videos = touch(tmp_path / "v", "a.mp4", "b.mp4")
  labels = listed(tmp_path, "\ufeffid, label, split\na, dog , test \nb,,\n")
  known = catalogue.read(videos, labels)
  assert [(clip.id, clip.label, clip.split) for clip in known.clips] == [
    ("a", "dog", "test"), ("b", "", "train"),
  ]  # fmt: skip
  assert not known.missing
  table = listed(tmp_path, "\ufeffid,CE\na,1\n", "table.csv")
  assert catalogue.read_table(table, "--tags", {"a"}) == {"a": {"CE": 1}}


def test_what_is_not_listed_goes_to_a_split_that_there_is(tmp_path):
  videos = touch(tmp_path / "v", "a.mp4", "extra.mp4")
  known = catalogue.read(videos, listed(tmp_path, "id,split\na,val\n"))
  assert {clip.split for clip in known.clips} == {"val"} == known.shards().keys()


def test_a_stamp_changes_with_the_file(tmp_path):
  videos, stamps = touch(tmp_path / "v", "a.mp4"), []
  for content, time_ns in ((b"x", 1), (b"x", 1), (b"y", 2), (b"yy", 2)):
    (videos / "a.mp4").write_bytes(content)
    os.utime(videos / "a.mp4", ns=(time_ns, time_ns))
    stamps.append(catalogue.read(videos, None).clips[0].stamp)
  assert stamps[0] == stamps[1] and len(set(stamps)) == 3


def test_without_a_list_every_video_is_taken_with_its_caption(tmp_path):
  videos = touch(tmp_path / "v", "a.mp4", "b.mp4")
  (videos / "a.json").write_text('{"caption": "a bell"}')
  (videos / "b.json").write_text("broken")
  known = catalogue.read(videos, None)
  assert [(c.id, c.label, c.split, c.listed) for c in known.clips] == [
    ("a", "a bell", "train", True), ("b", "", "train", True),
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("text", "why"),
  [
    ("id,label\na,x\na,y\n", "'a' occurs twice"),
    ("id,label\n", "lists no clips"),
    ("", "lists no clips"),
    ("a,b\n", "four columns"),
    ("a,soon,dog,train\n", "four columns"),
    ("id,split\na,of hand\n", "'of hand' of 'a' is no word"),
    ('id,label\na,"dog\nb,cat\n', "quotes in it do not match"),
    ("label,id\ndog\n", "a line has no id"),
    ("id,label,split\na,eating, chewing,test\n", "'a,eating, chewing,test' has 4 columns, the f"),
  ],
)
def test_lists_that_cannot_be_meant(tmp_path, text, why):
  videos = touch(tmp_path / "v", "a.mp4")
  with pytest.raises(UserError, match=why):
    catalogue.read(videos, listed(tmp_path, text))


def test_folders_that_cannot_be_meant(tmp_path):
  with pytest.raises(UserError, match="no such folder"):
    catalogue.read(tmp_path / "no", None)
  with pytest.raises(UserError, match="no videos"):
    catalogue.read(tmp_path, None)


def test_shards_follow_from_the_list_alone():
  sizes = {"train": 183_971, "test": 15_446, "tiny": 7}
  known = catalogue.Catalogue((), (), (), sizes)
  assert known.shards() == {"train": 1024, "test": 128, "tiny": 8}
  assert known.shards(2)["tiny"] == 4


def test_small_lists_are_cut_for_many_processes():
  sizes = [1, 2, 3, 5, 16, 17, 33, 201, 3200, 3201]
  known = catalogue.Catalogue((), (), (), {f"of_{size}": size for size in sizes})
  assert list(known.shards().values()) == [1, 2, 4, 8, 16, 16, 16, 16, 16, 32]
  assert known.shards(200)["of_201"] == 2  # What is asked for is taken as it is.


def test_tables_of_numbers(tmp_path):
  expected = {"a": {"CE": 3.5}, "b": {"CE": 1.0, "PQ": 2.0}}
  for text in ("id,CE,PQ\na,3.5,\nb,1,2\n", "id, CE, PQ\na, 3.5, \nb , 1, 2\n"):
    assert catalogue.read_table(listed(tmp_path, text), "--tags", {"a", "c"}, ["CE"]) == expected
  assert catalogue.read_table(None, "--tags", set()) == {}


@pytest.mark.parametrize(
  ("text", "why"),
  [
    ("CE\n1\n", "--tags .*no column id"),
    ("id,CE\na,1\n a ,2\n", "id 'a' occurs twice"),
    ("id,CE\na,good\n", "every cell beside id is a number"),
    ("id,CE\na,1,2\n", "every cell beside id is a number"),
    ("id,ce\na,1\n", "no column CE, have id, ce"),
    ("id,CE\na.mp4,1\n", "none of its ids is that of a clip, such as a"),
  ],
)
def test_tables_that_would_do_nothing(tmp_path, text, why):
  with pytest.raises(UserError, match=why):
    catalogue.read_table(listed(tmp_path, text), "--tags", {"a", "b"}, ["CE"])
