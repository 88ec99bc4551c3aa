"""The launch recipes: what every host runs, tried with a stand-in for `hope train`, and once with itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

POD = Path(__file__).parents[2] / "experiments" / "pod"

STAND_IN = """#!/bin/sh
# Ends with the next status of the list, each with a checkpoint if it says so; "wait" waits for SIGTERM.
echo "$*" >> "$DIR/calls"
next=$(head -n 1 "$DIR/statuses"); sed -i 1d "$DIR/statuses"
case $next in
*+) n=$(wc -l < "$DIR/calls"); mkdir -p "$RUN/ckpt/$n"; exit "${next%+}" ;;
wait) trap 'exit 42' TERM; touch "$DIR/waiting"; while :; do sleep 0.05; done ;;
*) exit "$next" ;;
esac
"""


@pytest.fixture
def host(tmp_path):
    """Starts host.sh with statuses for the stand-in."""
    stand_in = tmp_path / "hope"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    (tmp_path / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.05\n")  # the pauses between failures
    (tmp_path / "sleep").chmod(0o755)
    environment = os.environ | {"DIR": str(tmp_path), "RUN": str(tmp_path / "run"), "HOPE": str(stand_in)}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"

    def start(*statuses: str, **more: str) -> subprocess.Popen:
        (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        words = ["sh", str(POD / "host.sh"), "smoke", "data=/a b"]
        with (tmp_path / "stderr").open("w") as stderr:
            started.append(subprocess.Popen(words, env=environment | more, stderr=stderr))
        return started[-1]

    started: list[subprocess.Popen] = []
    yield start
    for process in started:
        process.kill()
        process.wait()


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def test_a_host_begins_again_until_it_is_done(host, tmp_path):
    assert host("42+", "1+", "0").wait(30) == 0
    assert calls(tmp_path) == [f"train smoke data=/a b --run {tmp_path / 'run'} --auto-resume"] * 3


def test_three_starts_without_a_checkpoint_are_enough(host, tmp_path):
    process = host("1+", "1", "1", "134", "0")
    assert process.wait(30) == 134
    assert (
        len(calls(tmp_path)) == 4
        and "gained no checkpoint after step 1; last status 134" in (tmp_path / "stderr").read_text()
    )


@pytest.mark.parametrize("status", ["2", "130"])
def test_a_mistake_is_not_repeated(host, tmp_path, status):
    assert host(status, "0").wait(30) == int(status)
    assert len(calls(tmp_path)) == 1


def test_a_preempted_machine_stays_down_if_asked(host, tmp_path):
    assert host("42", "0", PREEMPTED_STAYS_DOWN="1").wait(30) == 42
    assert len(calls(tmp_path)) == 1


def test_a_request_to_stop_reaches_the_training_and_ends_the_host(host, tmp_path):
    process = host("wait", "0")
    while not (tmp_path / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 42
    assert len(calls(tmp_path)) == 1


@pytest.mark.parametrize("script", ["host.sh", "local.sh", "queued_resources.sh", "slurm.sbatch"])
def test_scripts_parse(script):
    shell = "bash" if script.endswith("sbatch") else "sh"
    subprocess.run([shell, "-n", str(POD / script)], check=True)


def test_the_job_set_is_whole():
    job = yaml.safe_load((POD / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert chips == 16 * 16 and job["completions"] == job["parallelism"]
    assert container["command"][0] == "experiments/pod/host.sh" and (POD / "host.sh").stat().st_mode & 0o111


@pytest.mark.slow
def test_four_local_processes_play_the_hosts(tmp_path):
    words = [str(POD / "local.sh"), "4", "smoke", "model=transformer", "mesh.data=4", "batch_size=4"]
    environment = os.environ | {
        "RUN": str(tmp_path / "run"),
        "HOPE": f"{sys.executable} -m hope_jax",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("transformer step 6/6") == 1  # the first process alone prints
    assert (tmp_path / "run" / "ckpt" / "6").is_dir()
