"""The recipes of the clusters: what can be seen of them without one."""

import contextlib
import json
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sysconfig
import time

import jsonschema
import pytest
import yaml

from launch import local, train
from spatialv2a_jax.training import cluster, preemption

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ["again.sh", "tpu_vm.sh", "slurm.sbatch"]
FATAL = [1, 2, 3]
# Fields whose names are the user's, and values that their fields do not take.
FREE = {"nodeSelector", "envs", "annotations", "file_mounts", "volumes", "limits", "requests"}
WRONG = {"replicas": "1", "restartPolicy": "Always", "num_nodes": 0, "mode": "MOUNTED", "args": [1]}
PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
WAIT = "--join_timeout=3600"  # A machine in place of a lost one takes a while to come.


def bash(*arguments, env=None, **options):
  return subprocess.run(
    ["bash", *map(str, arguments)],
    env=os.environ | (env or {}),
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    **options,
  )


def stand_in(folder, name, body):
  """Puts a command of this name in front of the PATH."""
  path = folder / name
  path.write_text(f"#!/bin/bash\n{body}\n")
  path.chmod(0o755)
  return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound(name):
  shellcheck = pathlib.Path(sysconfig.get_path("scripts")) / "shellcheck"
  checked = subprocess.run([shellcheck, LAUNCH / name], capture_output=True, check=False)
  assert checked.returncode == 0, checked.stdout


def counted(folder, codes):
  """A command that leaves with one code after the other."""
  file = folder / "attempts"
  text = (
    f'n=$(wc -c < {file} 2>/dev/null || echo 0); printf x >> {file}; c=({codes}); exit "${{c[n]}}"'
  )
  return ["bash", "-c", text], file


@pytest.mark.parametrize(
  "codes, restarts, code, attempts",
  [("42 43 137 0", 9, 0, 4), ("1 0", 9, 1, 1), ("2 0", 9, 2, 1), ("42 42 42 0", 2, 42, 3)],
)
def test_again_starts_what_asks_for_it(tmp_path, codes, restarts, code, attempts):
  command, file = counted(tmp_path, codes)
  done = bash(LAUNCH / "again.sh", *command, env={"RESTARTS": str(restarts), "PAUSE": "0"})
  assert done.returncode == code, done.stderr
  assert len(file.read_text()) == attempts


def test_again_hands_a_signal_on_and_lets_the_command_save(tmp_path):
  ready, saved = tmp_path / "ready", tmp_path / "saved"
  text = (
    f"trap 'sleep 0.5; touch {saved}; exit 42' TERM; touch {ready}; while true; do sleep 0.1; done"
  )
  with subprocess.Popen(["bash", LAUNCH / "again.sh", "bash", "-c", text]) as process:
    while not ready.exists():
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 42
  assert saved.exists()


@pytest.mark.parametrize(
  "strikes",
  [
    {"child=$!": "kill -TERM $$"},  # It does not know yet whom it has started.
    {'[ "$early" -eq 0 ]': "kill -TERM $$"},
    # The command ends between the signal and the next wait.
    {'wait "$child"': "{ sleep 0.2; kill -TERM $$; } &", "code=$?": "sleep 0.5"},
  ],
)
def test_again_hands_a_signal_on_once_whenever_it_comes(tmp_path, strikes):
  """What a key does happens before the first command of the script that reads like it."""
  hook, told, ready = (tmp_path / name for name in ("hook", "told", "ready"))
  cases = "\n".join(f"{shlex.quote(when)}) {then} ;;" for when, then in strikes.items())
  hook.write_text(f"""
strike() {{
  case $seen in *"<$1>"*) return ;; esac
  seen="$seen<$1>"
  [ "$1" != 'child=$!' ] || until [ -e {ready} ]; do sleep 0.05; done
  case $1 in
    {cases}
  esac
}}
seen=
trap 'strike "$BASH_COMMAND"' DEBUG
""")
  text = f"trap 'echo told >>{told}; exit 42' TERM; touch {ready}; while :; do sleep 0.05; done"
  done = bash(LAUNCH / "again.sh", "bash", "-c", text, env={"BASH_ENV": str(hook)})
  assert done.returncode == 42, done.stderr
  assert told.read_text() == "told\n"


@pytest.fixture
def slurm(tmp_path):
  """Runs the batch script where `srun` is a shell and `scontrol` keeps notes."""

  def run(codes="", restarts_so_far=0, trainer=None, srun=True, state="RUNNING"):
    command = shlex.join(counted(tmp_path, codes)[0]) if trainer is None else trainer
    env = stand_in(tmp_path, "srun", 'shift; exec "$@"') if srun else {}
    env |= stand_in(tmp_path, "scontrol", f'echo "$@" >> {tmp_path / "asked"}')
    env |= stand_in(tmp_path, "squeue", f"echo {state}")
    env |= stand_in(tmp_path, "trainer", f'echo "$@"\n{command}')
    env |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "RESTARTS": "3"}
    env |= {"PYTHON": "trainer", "SLURM_RESTART_COUNT": str(restarts_so_far)}
    done = bash(LAUNCH / "slurm.sbatch", "--config", "a b", env=env)
    asked = tmp_path / "asked"
    return done, asked.read_text() if asked.exists() else ""

  return run


@pytest.mark.parametrize("code", [42, 43, 134])
def test_slurm_puts_the_job_back_into_the_queue(slurm, code):
  done, asked = slurm(str(code))
  assert asked == "requeue 7\n"
  assert "-u -m launch.train --config a b --distributed" in done.stdout


@pytest.mark.parametrize("code", [0, *FATAL])
def test_slurm_ends_the_job_otherwise(slurm, tmp_path, code):
  done, asked = slurm(str(code))
  assert done.returncode == code and asked == ""
  assert not list(tmp_path.glob(".spatialv2a-*"))


def test_slurm_waits_while_the_trainer_saves(slurm, tmp_path):
  """SLURM signals every process of a step, the shell around the trainer too."""
  ready, saved = tmp_path / "ready", tmp_path / "saved"
  trainer = (
    f"trap 'sleep 0.5; touch {saved}; exit 42' TERM; touch {ready}; while :; do sleep 0.1; done"
  )
  env = stand_in(
    tmp_path,
    "srun",
    'shift; setsid "$@" & child=$!\n'
    f"until [ -e {ready} ]; do /bin/sleep 0.1; done\n"
    'kill -TERM -- "-$child"; wait "$child"',
  )
  assert env["PATH"].startswith(str(tmp_path))
  done, asked = slurm(trainer=trainer, srun=False)
  assert asked == "requeue 7\n" and saved.exists()
  assert "left with 42: back into the queue" in done.stdout


def test_slurm_gives_up_after_its_restarts(slurm):
  done, asked = slurm("42", restarts_so_far=3)
  assert done.returncode == 42 and asked == "" and "after 3 restarts" in done.stdout


def test_slurm_leaves_a_cancelled_job_alone(slurm):
  done, asked = slurm("42", state="COMPLETING")
  assert done.returncode == 42 and asked == ""


def test_the_tpu_script_copies_the_checkout_and_keeps_arguments_whole(tmp_path):
  log = tmp_path / "log"
  env = stand_in(tmp_path, "gcloud", f'for a in "$@"; do printf "%s\\0" "$a"; done >> {log}')
  missing = bash(LAUNCH / "tpu_vm.sh", "name", env=env)
  assert missing.returncode == 1 and "zone of the TPU" in missing.stderr
  done = bash(LAUNCH / "tpu_vm.sh", "name", "--workdir", "/a b", env=env | {"ZONE": "z"})
  assert done.returncode == 0, done.stderr
  words = log.read_text().split("\0")
  assert words.count("--worker=all") == words.count("--zone=z") == 2
  remote = next(word for word in words if word.startswith("--command=")).partition("=")[2]
  assert bash("-n", "-c", remote).returncode == 0


@pytest.mark.parametrize("words", [["--workdir", "runs/x"], ["--workdir=runs/x"]])
def test_the_tpu_script_refuses_a_run_inside_what_it_replaces(tmp_path, words):
  env = stand_in(tmp_path, "gcloud", f"touch {tmp_path}/called")
  done = bash(LAUNCH / "tpu_vm.sh", "name", "--config", "c.py", *words, env=env | {"ZONE": "z"})
  assert done.returncode == 2 and "--workdir runs/x would be lost" in done.stderr
  assert not (tmp_path / "called").exists()


@pytest.fixture
def slice_of_one(tmp_path):
  """Runs the script for a host that is a folder, whose trainer waits until it is let go."""
  home, go = tmp_path / "home", tmp_path / "go"
  home.mkdir()
  trainer = (
    f'printf "%s\\n" "$JAX_COMPILATION_CACHE_DIR" "$@" >{tmp_path}/seen\n'
    f"echo trains\nuntil [ -e {go} ]; do sleep 0.1; done\nexit 3"
  )
  (tmp_path / "venv" / "bin").mkdir(parents=True)
  stand_in(tmp_path / "venv" / "bin", "python", trainer)
  stand_in(tmp_path, "uv", f'[ "$1" = pip ] || cp -r {tmp_path / "venv"} "${{!#}}"')
  gcloud = f"""
if [ "$4" = scp ]; then exec cp "$5" {home}; fi
cd {home}
for word; do case $word in --command=*) exec bash -c "${{word#--command=}}" ;; esac; done
"""
  env = os.environ | stand_in(tmp_path, "gcloud", gcloud) | {"ZONE": "z", "CACHE": "/c d"}
  command = ["bash", str(LAUNCH / "tpu_vm.sh"), "name", "--workdir", "/a b"]

  def start():
    return subprocess.Popen(
      command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )

  yield start, tmp_path
  go.touch()


def test_the_tpu_trainer_outlives_the_connection_and_is_found_again(slice_of_one):
  start, folder = slice_of_one
  first = start()
  with contextlib.closing(first.stdout):
    assert "trains" in iter(first.stdout.readline, "").__next__()
    os.killpg(first.pid, signal.SIGKILL)  # All of this side, and what follows the log.
    first.wait(timeout=20)
  assert re.fullmatch(r"[0-9a-f]{40}\n", (folder / "home" / "spatialv2a" / "COMMIT").read_text())
  words = (folder / "seen").read_text().splitlines()
  assert words[:4] == ["/c d", "-u", "-m", "launch.train"]
  assert words[4:] == ["--workdir", "/a b", "--distributed", WAIT]
  (folder / "seen").unlink()
  again = start()
  assert again.stdout.readline() == "it runs already, and this follows it\n"
  (folder / "go").touch()
  out, _ = again.communicate(timeout=60)
  assert again.returncode == 3 and "trains" in out
  assert not (folder / "seen").exists()


@pytest.mark.parametrize("name", ["jobset", "sky"])
def test_fields_are_those_that_exist(name):
  schema = json.loads((ROOT / "tests" / "golden" / f"{name}.schema.json").read_text())
  validator = jsonschema.Draft202012Validator(schema)
  validator.check_schema(schema)
  recipe = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
  validator.validate(recipe)
  found = list(_mistaken(recipe))
  assert len(found) > 15
  for where, mistaken in found:
    assert not validator.is_valid(mistaken), where


def _mistaken(node, rebuild=lambda node: node, where=""):
  """Yields copies of a document, each with one name or one value of another one mistyped."""
  pairs = list(node.items() if isinstance(node, dict) else enumerate(node))
  for key, value in pairs:

    def put(new, name=None, key=key):
      changed = {(name or k if k == key else k): new if k == key else v for k, v in pairs}
      return rebuild(changed if isinstance(node, dict) else list(changed.values()))

    if isinstance(node, dict) and where.rpartition(".")[2] not in FREE:
      yield f"{where}.{key}", put(value, f"{key}x")
    if key in WRONG:
      yield f"{where}.{key}={WRONG[key]}", put(WRONG[key])
    if isinstance(value, dict | list):
      yield from _mistaken(value, put, f"{where}.{key}")


def test_the_jobset_stops_on_mistakes_and_goes_on_otherwise():
  spec = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]
  rules = {rule["action"]: rule["onJobFailureReasons"] for rule in spec["failurePolicy"]["rules"]}
  assert rules["FailJobSet"] == ["PodFailurePolicy"]
  assert rules["RestartJobSet"] == ["BackoffLimitExceeded"]
  (job,) = spec["replicatedJobs"]
  job = job["template"]["spec"]
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == FATAL
  assert not {preemption.EXIT_CODE, *local.AGAIN} & set(rule["onExitCodes"]["values"])
  pod = job["template"]["spec"]
  # Without these the rule above is refused, or a pod starts again alone.
  assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
  assert pod["shareProcessNamespace"]  # Else no alarm ends the trainer, process 1.
  assert job["parallelism"] == job["completions"]
  (container,) = pod["containers"]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  chips = container["resources"]["limits"]["google.com/tpu"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  assert chips * job["parallelism"] == math.prod(map(int, topology.split("x")))
  assert container["command"] == ["python", "-u", "-m", "launch.train"]
  _parses(container["args"])
  assert WAIT in container["args"]
  (disk,) = (mount["mountPath"] for mount in container["volumeMounts"])
  folders = [variable["value"] for variable in container["env"] if variable["name"] == PROGRAMS]
  folders += [word.partition("=")[2] for word in container["args"] if "workdir" in word]
  assert len(folders) == 2 and all(folder.startswith(f"{disk}/") for folder in folders)


def test_sky_recovers_what_asks_for_it(tmp_path):
  task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
  # SkyPilot has 137 for what it ends itself: it would start a fault of another node again for ever.
  assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == list(local.AGAIN)
  made = tmp_path / "made"
  made.mkdir()
  stand_in(made, "python", 'for a in "$@"; do printf "%s\\n" "$a"; done; eval "$THEN"')
  uv = f'[ "$1" = pip ] || {{ mkdir "${{!#}}" && ln -s {made} "${{!#}}/bin"; }}'
  env = stand_in(tmp_path, "uv", uv) | {"HOME": str(tmp_path), "THEN": ""}
  env |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
  env |= {"SKYPILOT_NODE_RANK": "1", **task["envs"]}
  assert bash("-c", task["setup"], env=env).returncode == 0
  for then, code in {"exit 1": 1, "exit 42": 42, "kill -ALRM $$": 43, "kill -KILL $$": 43}.items():
    assert bash("-c", task["run"], env=env | {"THEN": then}).returncode == code
  words = bash("-c", task["run"], env=env).stdout.splitlines()
  assert words[:3] == ["-u", "-m", "launch.train"] and WAIT in words
  assert words[words.index("--coordinator") + 1] == "10.0.0.1:55527"
  _parses(words[3:])
  (disk,) = task["volumes"]  # Not a bucket: the log of a run is appended to.
  assert all(task["envs"][name].startswith(f"{disk}/") for name in ("WORKDIR", PROGRAMS))
  (mount,) = task["file_mounts"]
  for key in ("data.path", "data.eval", "vae"):
    assert any(word.startswith(f"--config.{key}={mount}/") for word in words)


def _parses(arguments):
  """The trainer understands the command line of a recipe."""
  parsed = train.parse(["launch.train", *arguments])
  assert parsed[0]["kind"] == "flow"


def test_exit_codes_are_those_the_trainer_documents():
  codes = set(
    map(int, re.findall(r"\b(\d+) [a-z]", (train.__doc__ or "").partition("Exit codes:")[2]))
  )
  assert codes == {0, *FATAL, *local.AGAIN}
  assert local.AGAIN == (preemption.EXIT_CODE, cluster.EXIT_CODE)
