"""What the flow network's task makes of its config."""

import dataclasses
import types
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from data import captions
from launch import flow_task, listen, tasks
from spatialv2a_jax import features, model_folder, schema, sharding
from spatialv2a_jax.errors import UserError
from spatialv2a_jax.models.blocks import JointBlock
from tests.launch.test_train import config_of, one_device

SMALL = {
  "data.batch_size": 2, "model.width": 8, "model.ffn": 8, "features.clip_dim": 4,
  "features.sync_dim": 4, "features.text_dim": 4, "features.text_len": 3,
}  # fmt: skip


def build(**options):
  config = config_of("tiny", "smoke", **SMALL, **options)
  return tasks.build(config, one_device(), sharding.Rules())


def parameters(task):
  """Random ones, of which none is zero; and statistics other than a new run's."""
  rng = np.random.default_rng(0)
  shapes = sharding.unboxed(jax.eval_shape(task.init, jax.random.key(0)))
  params = jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype), shapes)
  params["frozen"]["latent_std"][:] = 1
  return params, jax.tree.map(lambda x: np.asarray(x + 0.5), task.stats)


def test_a_clip_is_evaluated_as_if_it_were_alone():
  """By the running statistics, which stay as they are."""
  task = build(**{"loss.drop_spatial": 0.0})
  params, stats = parameters(task)
  batch, key = next(task.batches(0)), jax.random.key(1)

  @jax.jit
  def evaluate(weight_b):
    return task.evaluate.loss(params, stats, batch | {"weight_b": weight_b}, key)

  losses = []
  for weights in ([1, 1], [1, 0], [0, 1]):
    value, (_, after) = evaluate(np.array(weights, np.float32))
    jax.tree.map(np.testing.assert_array_equal, after, stats)
    losses.append(float(value))
  assert losses[1] != losses[2]
  np.testing.assert_allclose(losses[0], np.mean(losses[1:]), rtol=1e-5)


def test_a_run_can_begin_with_what_another_left(tmp_path):
  task = build(**{"loss.ear_correlation": 0.7, "listen.guidance": 3.5, "seconds": 1.6})
  params, stats = parameters(task)
  task.export(tmp_path, params, stats)
  about = model_folder.load_model(tmp_path).config
  assert (about["ear_correlation"], about["guidance"]) == (0.7, 3.5)
  assert (about["audio"], about["seconds"]) == ("16k", 1.6) and about["features"]["clip_dim"] == 4
  jax.tree.map(
    np.testing.assert_array_equal, build(init_from=str(tmp_path)).values(), (params, stats)
  )


def test_features_of_no_text_are_those_of_the_encoder_of_the_captions(tmp_path):
  """That of the shards where it has weights: it need not be on the machine that trains."""
  encoders = features.Config(text_dim=2, text_len=3)
  random = flow_task.null_text(tasks.SYNTHETIC, encoders)
  np.testing.assert_array_equal(random, features.encode_text("", encoders))
  trained = dataclasses.replace(encoders, encoder="mmaudio")

  def stored(named):
    texts = {caption: np.full((3, 2), len(caption) + 0.5) for caption in named}
    captions.build(named, texts.get, tmp_path, config={"of": named}, storage="bfloat16")
    return flow_task.null_text(f"{tmp_path}:test", trained)

  found = stored(["", "a dog"])
  assert found.dtype == np.float32 and (found == 0.5).all()
  with pytest.raises(UserError, match="it has no caption ''; encode the clips again"):
    stored(["a dog"])


def test_work_is_that_of_what_is_trained(monkeypatch):
  """Frozen parameters need no gradient, which counts for `mfu`."""
  monkeypatch.setattr(flow_task, "flops_per_clip", lambda *given: given)
  options = {"optim.freeze": '(("joint/.*",True),)', "model.ear_depth": 1}
  sizes, _, shapes, optimizer = build(**options).flops()
  assert sizes.ear_depth == 1 and shapes["text"] == (3, 4)
  assert optimizer == tasks.optimizer_of(config_of("tiny", "smoke", **SMALL, **options))
  assert optimizer != tasks.optimizer_of(config_of("tiny", "smoke"))


def test_tokens_are_those_of_the_joint_blocks():
  task, seen = build(), set()

  def count(call, args, kwargs, context):
    if isinstance(context.module, JointBlock) and context.method_name == "__call__":
      seen.add(sum(ears * x for _, ears, x, _ in (x.shape for x in args[0])))
    return call(*args, **kwargs)

  shapes = sharding.unboxed(jax.eval_shape(task.init, jax.random.key(0)))
  with nn.intercept_methods(count):
    jax.eval_shape(task.loss, shapes, task.stats, next(task.batches(0)), jax.random.key(0))
  assert seen == {task.tokens}


def test_sound_is_sampled_as_asked_from_the_noise_of_its_clip(monkeypatch):
  """The same at each call, whatever clips stand beside it, with ears that share what they did."""
  asked = []

  def guided(net, params, stats, cond, *, latent_len, guidance):
    asked.append((stats, sorted(cond), latent_len, guidance))

  def sample(velocity, noise_betc, *, steps):
    asked.append(steps)
    return noise_betc

  monkeypatch.setattr(listen.flow, "guided", guided)
  monkeypatch.setattr(listen.flow, "sample", sample)
  net: Any = types.SimpleNamespace(unnormalize=lambda params, x_betc: params * x_betc)
  settings = {"clips": 2, "steps": 7, "guidance": 3.5}
  heard = []
  codec: Any = types.SimpleNamespace(waveform=lambda vae, z_etc: z_etc)
  hear = listen.Listener(net, codec, {}, schema.AUDIO["16k"], settings, 0.75)
  book: Any = types.SimpleNamespace(audio=lambda step, name, z_etc, _: heard.append(z_etc))
  batch = {name: np.zeros((2, 1, 1), np.float32) for name in listen.COND}
  batch |= {"mean_betc": np.zeros((2, 2, 400, 20), np.float32), "weight_b": np.ones(2)}
  for ids in ([7, 8], [9, 7]):
    hear(2.0, {}, batch | {"id_b": np.array(ids, np.uint32)}, 1, book)
  assert asked == [({}, sorted(listen.COND), 400, 3.5), 7]
  seven, _, eight, _, nine, again = heard  # The second and the fourth are the truth.
  np.testing.assert_array_equal(seven, again)
  assert not np.array_equal(seven, eight) and not np.array_equal(seven, nine)
  assert seven.std() == pytest.approx(2, rel=0.05)
  assert np.corrcoef(seven.reshape(2, -1))[0, 1] == pytest.approx(0.75, abs=0.05)


def test_what_is_heard_is_of_the_noise_of_training(tmp_path):
  vae = {"audio": "16k", "vae": {"width": 8}}
  model_folder.save_model(tmp_path, {"vae": {"x": np.ones(1, "f4")}}, {}, vae)
  options = {"loss.ear_correlation": 0.7, "listen.steps": 3}
  hear = build(vae=str(tmp_path), **options).evaluate.listener
  assert hear.correlation == 0.7 and hear.settings["steps"] == 3


def test_a_few_clips_are_heard_at_each_call_and_their_truth_once():
  codec: Any = types.SimpleNamespace(waveform=lambda vae, z_etc: float(z_etc.mean()))
  net: Any = None
  settings = {"clips": 2, "steps": 1, "guidance": 1.0}
  hear = listen.Listener(net, codec, {}, schema.AUDIO["16k"], settings)
  vars(hear)["_sample"] = lambda params, stats, rows: -rows["mean_betc"]
  batch = {name: np.zeros((3, 1, 1), np.float32) for name in listen.COND}
  batch["mean_betc"] = np.ones((3, 2, 4, 1), np.float32) * np.arange(1, 4)[:, None, None, None]
  batch |= {"id_b": np.array([7, 8, 9], np.uint32), "weight_b": np.ones(3)}
  wrote = []
  book: Any = types.SimpleNamespace(audio=lambda *given: wrote.append(given))
  for step in (10, 20):
    hear({}, {}, batch, step, book)
  truth = "truth through the codec"
  assert wrote == [
    (10, "clip/7/generated", -1, 16_000), (10, f"clip/7/{truth}", 1, 16_000),
    (10, "clip/8/generated", -2, 16_000), (10, f"clip/8/{truth}", 2, 16_000),
    (20, "clip/7/generated", -1, 16_000), (20, "clip/8/generated", -2, 16_000),
  ]  # fmt: skip
  wrote.clear()
  hear({}, {}, batch | {"weight_b": np.array([1, 0, 0])}, 30, book)  # Filled up by others.
  assert wrote == [(30, "clip/7/generated", -1, 16_000)]
  for wrong in ({"clips": -1}, {"steps": 0}):
    with pytest.raises(UserError, match=f"config.listen.{next(iter(wrong))}"):
      listen.Listener(net, codec, {}, schema.AUDIO["16k"], settings | wrong)
