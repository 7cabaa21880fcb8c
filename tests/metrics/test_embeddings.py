"""Files of an embedder's features: what is told of them, and files that are none."""

import json

import numpy as np
import pytest

from spatialv2a_jax import io
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.metrics import distribution, embeddings, evaluate


def write(path, rng, shift=0.0, **more):
  ref = rng.standard_normal((40, 6))
  np.savez(path, pred=ref + shift, ref=ref, **more)
  return path


def test_a_shift_of_all_features_is_its_square_and_logits_are_optional(tmp_path):
  rng = np.random.default_rng(0)
  found = embeddings.score(write(tmp_path / "a.npz", rng, shift=0.5))
  assert found["frechet_distance"] == pytest.approx(6 * 0.25)
  assert found["kl_divergence"] is None and found["inception_score"] is None
  assert found["clips"] == {"pred": 40, "ref": 40}
  assert found["sha256"] == io.file_hash(tmp_path / "a.npz")
  pred, ref = rng.standard_normal((2, 12, 5))
  found = embeddings.score(write(tmp_path / "b.npz", rng, pred_logits=pred, ref_logits=ref))
  assert found["kl_divergence"] == distribution.kl_divergence(pred, ref) > 0
  score = (found["inception_score"], found["inception_score_std"])
  assert score == distribution.inception_score(pred)
  few = embeddings.score(write(tmp_path / "c.npz", rng, pred_logits=pred[:4], ref_logits=ref[:4]))
  assert few["kl_divergence"] > 0 and few["inception_score"] is None


def test_scores_hold_what_embedders_say(tmp_path):
  rng, lines = np.random.default_rng(1), []
  io.write_audio(tmp_path / "clips" / "x.wav", 0.1 * rng.standard_normal((2, 8_000)), 16_000)
  npz, out = write(tmp_path / "vgg.npz", rng, shift=1.0), tmp_path / "scores.json"
  clips = tmp_path / "clips"
  evaluate.run(clips, clips, None, out, embedded={"vggish, left ear": npz}, echo=lines.append)
  held = json.loads(out.read_text())["embeddings"]
  assert held["vggish, left ear"]["frechet_distance"] == pytest.approx(6)
  assert lines[-1] == "embedding vggish, left ear: frechet_distance 6 (40, 40 clips)"


def test_files_that_do_not_hold_it_are_one_line(tmp_path):
  rng = np.random.default_rng(2)
  (tmp_path / "text.npz").write_text("no archive")
  np.savez(tmp_path / "lacking.npz", pred=np.zeros((4, 2)))
  np.savez(tmp_path / "narrow.npz", pred=np.zeros((4, 2)), ref=np.zeros((4, 3)))
  np.savez(tmp_path / "objects.npz", pred=np.array([{}], object), ref=np.zeros((4, 3)))
  write(tmp_path / "half.npz", rng, pred_logits=np.zeros((4, 2)))
  whole = (tmp_path / "half.npz").read_bytes()
  (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
  cases = {
    "cut": "no .npz",
    "absent": "cannot read", "text": "no .npz", "lacking": "lacks the array 'ref'",
    "narrow": "width 2 and 3", "objects": "no .npz", "half": "give both or neither",
  }  # fmt: skip
  for name, words in cases.items():
    with pytest.raises(UserError, match=words) as caught:
      embeddings.score(tmp_path / f"{name}.npz")
    assert f"{name}.npz" in str(caught.value) and "\n" not in str(caught.value)
