"""The launchers: exact commands of a dry run, scripts that really run in a shell, secrets refused, missing programs named."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from maskae.errors import UserError
from tools.launch import commands, gke, read_secret, slurm, tpu_vm
from tools.launch.accelerators import TPU_TYPES, check_zone, gke_type, tpu_type

TRAIN = ["--", "--config", "configs/mae.py:base", "--workdir", "/mnt/runs/mae"]
TPU = ["--name", "mae", "--zone", "us-east5-b", "--accelerator", "v5litepod-16"]
GKE = ["--cluster", "pods", "--name", "mae", "--zone", "us-east5-b", "--accelerator", "v5p-128"]
SLURM = ["--name", "mae", "--gpu", "h100", "--nodes", "2"]
KEY = "0123456789abcdef0123456789abcdef01234567"


def dry(tool: SimpleNamespace, arguments: list[str], capsys: pytest.CaptureFixture[str], training: list[str] = TRAIN) -> str:
    assert tool.main([*arguments, "--dry_run", *training]) == 0
    return capsys.readouterr().out




def test_tpu_create_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    out = dry(tpu_vm, ["create", *TPU, "--spot", "--project", "p"], capsys, [])
    assert out.splitlines()[-1] == (
        "gcloud compute tpus queued-resources create mae --node-id=mae --zone=us-east5-b --project=p"
        " --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    out = dry(tpu_vm, ["create", *TPU, "--slices", "2", "--reservation", "r"], capsys, [])
    assert "--node-count=2 --node-prefix=mae" in out and "--reservation=r --reserved" in out and "--spot" not in out


def test_tpu_delete_and_wait_are_exact(capsys: pytest.CaptureFixture[str]) -> None:
    queued = "gcloud compute tpus queued-resources"
    assert dry(tpu_vm, ["delete", *TPU], capsys, []).endswith(f"{queued} delete mae --zone=us-east5-b --force --quiet\n")
    assert dry(tpu_vm, ["wait", *TPU], capsys, []).endswith(f"{queued} describe mae --zone=us-east5-b '--format=value(state.state)'\n")


def test_tpu_train_shows_every_step_and_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    out = dry(tpu_vm, ["train", *TPU, "--wandb_secret", "wandb"], capsys)
    order = [" create mae", " describe mae", "archive --format=tar.gz", " scp ", "uv pip install", "-m maskae.main --config", " delete mae"]
    assert [out.index(word) for word in order] == sorted(out.index(word) for word in order)
    assert "--node=all --worker=all" in out and "maskae[tpu,wandb]" in out
    for flag in commands.flags_for("v5e"):
        assert f"{flag.text} " in out and flag.reason in out
    assert 'WANDB_API_KEY="$(~/maskae-env/bin/python -m tools.launch.read_secret wandb)"' in out


def test_tpu_arguments_reach_the_worker_unchanged(tmp_path: Path) -> None:
    """The command's script, run by a real shell with a stand-in for the worker's Python: quoting, environment, pid file."""
    words = ["--config", "configs/mae.py:base", "--workdir", "/mnt/it's mine", "--config.data.source=folder:/data/my $HOME `images`"]
    _, launch = tpu_vm.parse(["run", *TPU, "--env", "NCCL_DEBUG=a b", "--", *words])
    script = launch.run().words[-1].removeprefix("--command=")
    python = tmp_path / "maskae-env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "maskae").mkdir()
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ['LIBTPU_INIT_ARGS'], os.environ['NCCL_DEBUG'], os.getcwd()]))\nsys.exit(7)\n"
    )
    python.chmod(0o755)
    done = subprocess.run(["bash", "-c", script], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    arguments, flags, debug, folder = json.loads(done.stdout)
    assert arguments == ["-m", "maskae.main", *words]
    assert flags == commands.environment_for("v5e")["LIBTPU_INIT_ARGS"] and debug == "a b" and folder == str(tmp_path / "maskae")
    assert (tmp_path / "maskae.pid").read_text().strip().isdigit()


@pytest.mark.parametrize(("child", "expected"), [("sleep 0.05", 0), ("(exit 2)", 2), ("(exit 3)", 143)])
def test_status_of_a_run_that_ends_by_itself(child: str, expected: int) -> None:
    assert subprocess.run(["bash", "-c", "set -e\n" + commands.stoppable(child)], check=False).returncode == expected


@pytest.mark.parametrize(("status", "expected"), [(0, 143), (1, 1)])
def test_a_stopped_run_saves_and_does_not_look_finished(status: int, expected: int, tmp_path: Path) -> None:
    child = f"import signal, sys, time\ndef stop(*_): open('saved', 'w'); sys.exit({status})\nsignal.signal(signal.SIGTERM, stop)\n"
    child += "open('ready', 'w')\ntime.sleep(30)"
    script = "set -e\n" + commands.stoppable(f"{sys.executable} -c {shlex.quote(child)}")
    process = subprocess.Popen(["bash", "-c", script], cwd=tmp_path)
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == expected
    assert (tmp_path / "saved").exists()


def wait_for(path: Path) -> None:
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} never came"
        time.sleep(0.02)


def test_gke_tpu_command_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    training = [*TRAIN, "--config.mesh.slice=2"]
    line = dry(gke, ["run", *GKE, "--slices", "2", "--image", "maskae:1"], capsys, training).splitlines()[-1]
    *words, command = shlex.split(line)
    assert words == [
        "xpk", "workload", "create", "--cluster=pods", "--zone=us-east5-b", "--workload=mae", "--tpu-type=v5p-128", "--num-slices=2",
        "--docker-image=maskae:1", "--max-restarts=100", "--termination-grace-period-seconds=300", "--priority=medium",
        f"--env=LIBTPU_INIT_ARGS={commands.environment_for('v5p', 2)['LIBTPU_INIT_ARGS']}",
    ]  # fmt: skip
    assert command.startswith("--command=exec bash -c $'") and "\n" not in command and "pip install" not in command
    assert "python -m maskae.main --config configs/mae.py:base --workdir /mnt/runs/mae --config.mesh.slice=2 &" in command


def test_gke_gpu_command_builds_the_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--cluster", "pods", "--name", "mae", "--zone", "us-east5-b", "--accelerator", "h200-141gb-8", "--nodes", "4"]
    out = dry(gke, arguments, capsys)
    assert "--device-type=h200-141gb-8 --num-nodes=4 --base-docker-image=python:3.12" in out
    assert "pip install --quiet -e" in out and ".[cuda]" in out and "--xla_gpu_enable_latency_hiding_scheduler=true" in out


def test_gke_script_survives_its_quoting(tmp_path: Path) -> None:
    words = ["--config", "configs/mae.py:base", "--workdir", "/mnt/it's a \\ \"folder\""]
    flags, arguments = gke.parse(["run", *GKE, "--image", "maskae:1", "--", *words])
    (tmp_path / "python").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tmp_path / "python").chmod(0o755)
    script = f"({gke.container_script(flags, gke_type('v5p-128'), arguments)}) & PID=$!\nwait $PID"
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["-m", "maskae.main", *words]


def test_gke_list_and_delete_are_exact(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--cluster", "pods", "--zone", "us-east5-b"]
    assert dry(gke, ["list", *where], capsys, []).endswith("xpk workload list --cluster=pods --zone=us-east5-b\n")
    assert dry(gke, ["delete", *where, "--name", "mae"], capsys, []).endswith(
        "xpk workload delete --cluster=pods --zone=us-east5-b --workload=mae\n"
    )


def slurm_script(*arguments: str) -> str:
    return slurm.batch_script(*slurm.parse([*SLURM, *arguments, *TRAIN]))


def test_slurm_one_process_per_gpu() -> None:
    script = slurm_script("--cpus_per_node", "96", "--partition", "gpu", "--time", "2-12")
    lines = ("--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--partition=gpu", "--time=2-12", "--nodes=2", "--requeue")
    for line in lines:
        assert f"#SBATCH {line}\n" in script
    assert "--coordinator" not in script and "gpus-per-task" not in script
    assert f"export XLA_FLAGS='{commands.environment_for('h100')['XLA_FLAGS']}'\n" in script
    # Slurm stops reading its lines at the first command.
    assert script.rindex("#SBATCH") < script.index("set -euo")


def test_slurm_one_process_per_host_sees_all_gpus() -> None:
    script = slurm_script("--processes", "host", "--gpus_per_node", "4", "--cpus_per_node", "96")
    assert "#SBATCH --ntasks-per-node=1\n" in script and "#SBATCH --cpus-per-task=96\n" in script
    assert 'srun --kill-on-bad-exit=1 --gpu-bind=none bash -c \'exec python -m maskae.main' in script
    assert '--num_processes "$SLURM_NTASKS" --process_id "$SLURM_PROCID"' in script


@pytest.mark.parametrize(("signalled", "expected"), [(True, ["--signal=TERM 7", "requeue 7"]), (False, [])])
def test_slurm_job_queues_itself_again_before_its_time_is_up(signalled: bool, expected: list[str], tmp_path: Path) -> None:
    """The real script in a real shell, with stand-ins for Slurm's programs."""
    programs = {
        "srun": "trap 'exit 0' TERM\necho $$ > srun.pid\nfor i in $(seq 200); do [ -e finish ] && exit 0; sleep 0.05; done\nexit 9",
        "scancel": 'echo "$*" >> calls\nkill -TERM "$(cat srun.pid)"',
        "scontrol": 'echo "$*" >> calls',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job").write_text(slurm_script())
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    process = subprocess.Popen(["bash", str(tmp_path / "job")], env=variables)
    wait_for(tmp_path / "srun.pid")
    if signalled:
        process.send_signal(signal.SIGUSR1)
    else:
        (tmp_path / "finish").touch()
    assert process.wait(20) == 0
    calls = tmp_path / "calls"
    assert (calls.read_text().splitlines() if calls.exists() else []) == expected


def test_slurm_writes_and_submits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text('#!/bin/bash\ncp "$1" submitted\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert slurm.main([*SLURM, *TRAIN]) == 0
    assert (tmp_path / "submitted").read_text() == (tmp_path / "mae.sbatch").read_text() == slurm_script()


def fake_gcloud(folder: Path, monkeypatch: pytest.MonkeyPatch, states: list[str], runs: list[int]) -> Path:
    """A gcloud that goes through `states` at each `describe` and ends its runs with `runs`; it writes down what it was asked."""
    (folder / "states").write_text("\n".join(states) + "\n")
    (folder / "runs").write_text("\n".join(map(str, runs)) + "\n")
    (folder / "gcloud").write_text(
        f"#!/bin/bash\ncd {shlex.quote(str(folder))}\n"
        'take() { head -n 1 "$1"; sed -i 1d "$1"; }\n'
        'case "$*" in\n'
        '  *" describe "*) state="$(take states)"; [ "$state" != GONE ] || { echo "NOT_FOUND: mae" >&2; exit 1; }; echo "$state" ;;\n'
        '  *" ssh "*maskae.main*) echo run >> calls; exit "$(take runs)" ;;\n'
        '  *) echo "$4" >> calls ;;\n'
        "esac\n"
    )
    (folder / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder / "calls"


def test_tpu_training_goes_on_after_a_preemption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = ["GONE", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"]
    calls = fake_gcloud(tmp_path, monkeypatch, states, [143, 0])
    monkeypatch.setattr(tpu_vm.tempfile, "tempdir", str(tmp_path))
    assert tpu_vm.main(["train", *TPU, "--poll_seconds", "0", *TRAIN]) == 0
    assert calls.read_text().split() == ["create", "scp", "ssh", "run", "delete", "create", "scp", "ssh", "run"]


def test_tpu_training_does_not_repeat_a_run_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_gcloud(tmp_path, monkeypatch, ["ACTIVE", "ACTIVE", "ACTIVE"], [1])
    monkeypatch.setattr(tpu_vm.tempfile, "tempdir", str(tmp_path))
    assert tpu_vm.main(["train", *TPU, "--poll_seconds", "0", *TRAIN]) == 1
    assert calls.read_text().split() == ["scp", "ssh", "run"]
    assert "the run ended with status 1" in capsys.readouterr().err


def test_waiting_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_gcloud(tmp_path, monkeypatch, ["WAITING_FOR_RESOURCES"] * 3, [])
    assert tpu_vm.main(["wait", *TPU, "--poll_seconds", "0", "--wait_hours", "0"]) == 1
    assert "still WAITING_FOR_RESOURCES after 0 hours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "arguments", "program"), [(tpu_vm, ["create", *TPU], "gcloud"), (gke, ["run", *GKE], "xpk"), (slurm, SLURM, "sbatch")]
)
def test_a_missing_program_is_one_line(
    tool: SimpleNamespace,
    arguments: list[str],
    program: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert tool.main([*arguments, *TRAIN]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {program} is not on the PATH: ")
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    "words",
    [
        ["--wandb_key=abc"], ["--env", "WANDB_API_KEY=abc"], ["--env=HF_TOKEN=abc"], ["--token", "abc"],
        [*TRAIN, "--config.log.wandb_api_key=abc"],
        [*TRAIN, f"--config.log.wandb_project={KEY}"], ["--env", "DEBUG=hf_" + "a" * 30], ["--wandb_secret", KEY], ["--password", "abc"],
    ],
)  # fmt: skip
def test_secrets_are_refused_and_not_repeated(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for tool, arguments in ((tpu_vm, ["train", *TPU]), (gke, ["run", *GKE]), (slurm, SLURM)):
        assert tool.main([*arguments, "--dry_run", *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and "--wandb_secret" in captured.err and captured.err.count("\n") == 1
        assert "abc" not in captured.err and KEY not in captured.err and "a" * 30 not in captured.err


@pytest.mark.parametrize("word", ["--config.model.mask_token=zeros", "--wandb_secret=wandb", "--secret_file=me/keys", "--config.seed=1234"])
def test_honest_words_are_not_taken_for_secrets(word: str) -> None:
    # It returns only where it does not refuse.
    commands.refuse_secrets([word])
    with pytest.raises(UserError):
        commands.refuse_secrets([word, "--wandb_api_key=abc"])


def test_secret_is_read_by_the_machines_own_account(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def fetch(url: str, headers: dict[str, str]) -> str:
        asked.append((url, headers))
        replies = {"project-id": "p", "token": '{"access_token": "t"}', "latest:access": '{"payload": {"data": "a2V5Cg=="}}'}
        return replies[url.rpartition("/")[2]]

    monkeypatch.setattr(read_secret, "fetch", fetch)
    assert read_secret.main(["wandb"]) == 0
    assert capsys.readouterr().out == "key\n"
    assert asked[-1] == (f"{read_secret.MANAGER}/projects/p/secrets/wandb/versions/latest:access", {"Authorization": "Bearer t"})


def test_a_secret_that_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert read_secret.main(["wandb"]) == 1
    assert capsys.readouterr().err == "error: secret wandb could not be read: <urlopen error no route>\n"


def test_secret_file_is_sourced_on_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my keys").write_text("WANDB_API_KEY=abc\n")
    script = commands.secrets_script(None, "~/my keys", "python") + "\nenv"
    done = subprocess.run(["bash", "-c", script], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert "WANDB_API_KEY=abc" in done.stdout.splitlines()
    (tmp_path / "my keys").chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        slurm.check_secret_file(str(tmp_path / "my keys"))
    (tmp_path / "my keys").chmod(0o600)
    slurm.check_secret_file(str(tmp_path / "my keys"))


@pytest.mark.parametrize(
    ("text", "name"),
    [("v6e-64", "v6e-64"), ("v6e:8x8", "v6e-64"), ("v5e:16x16", "v5litepod-256"), ("v5p:4x4x4", "v5p-128"), ("v4:2x2x1", "v4-8")],
)
def test_tpu_types_by_name_and_by_topology(text: str, name: str) -> None:
    kind = tpu_type(text)
    assert kind.name == name
    assert kind.chips == int(name.rpartition("-")[2]) // (2 if kind.chip in ("v4", "v5p") else 1)
    sides = [int(side) for side in kind.topology.split("x")]
    product = 1
    for side in sides:
        product *= side
    assert product == kind.chips and len(TPU_TYPES) == 36


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", *TPU[:-1], "v6e-100", *TRAIN], "no such Cloud TPU type (did you mean 'v6e-128'?)"),
        (["train", *TPU[:-1], "v5e-16", *TRAIN], "did you mean 'v5litepod-16'"),
        (["train", *TPU[:-1], "v6e:8x7", *TRAIN], "no topology '8x7' (did you mean '8x8'?)"),
        (["train", *TPU[:-1], "v7e:8x8", *TRAIN], "no chip 'v7e'"),
        (["train", *TPU[:3], "us-east5", *TPU[4:], *TRAIN], "did you mean 'us-east5-a'"),
        (["trian", *TPU, *TRAIN], "did you mean 'train'"),
        (["train", *TPU, "--sport", *TRAIN], "did you mean '--spot'"),
        (["train", *TPU, "--slices", "0", *TRAIN], "--slices=0: at least 1"),
        (["train", "--name", "My Run", *TPU[2:], *TRAIN], "did you mean 'my-run'"),
        (["train", *TPU, "--spot", "--reservation", "r", *TRAIN], "exclude each other"),
        (["train", *TPU, "--env", "A", *TRAIN], "expected NAME=value"),
        (["train", *TPU], "maskae's arguments are missing"),
        (["train", *TPU, "--", "--config", "configs/mae.py:bas", "--workdir", "w"], "did you mean 'base'"),
        (["train", *TPU, *TRAIN, "--config.train.bach_size=3"], "did you mean 'train.batch_size'"),
        (["train", *TPU, "--", "--config", "configs/mae.py:base"], "--workdir is missing"),
    ],
)
def test_bad_input_is_one_line_with_the_nearest(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    assert tpu_vm.main([*arguments[:at], "--dry_run", *arguments[at:]]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (gke, ["run", *GKE[:-1], "h100-80gb-4"], "did you mean 'h100-80gb-8'"),
        (gke, ["run", *GKE, "--nodes", "2"], "asked for by --slices"),
        (gke, ["run", *GKE[:2], *GKE[4:]], "run needs --name"),
        (slurm, [*SLURM[:2], "--gpu", "h1000"], "did you mean 'h100'"),
        (slurm, [*SLURM, "--processes", "hosts"], "did you mean 'host'"),
        (slurm, [*SLURM, "--time", "1 day"], "such as 24:00:00"),
        (slurm, [*SLURM, "--partition", "a\n#SBATCH"], "letters, digits"),
    ],
)
def test_bad_input_of_the_others(tool: SimpleNamespace, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([*arguments, "--dry_run", *TRAIN]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_on_the_workers_own_disk_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    local = [*TRAIN[:-1], "runs/mae"]
    assert tpu_vm.main(["run", *TPU, "--dry_run", *local]) == 0
    assert "--workdir=runs/mae lies on each worker's own disk" in capsys.readouterr().err
    assert commands.folder_note(["--workdir=gs://bucket/mae"]) is None


def test_zones_of_tomorrow_are_let_through() -> None:
    assert check_zone("mars-north1-a") == "mars-north1-a"


def test_slices_and_the_mesh_agree(capsys: pytest.CaptureFixture[str]) -> None:
    for tool, arguments in ((tpu_vm, ["train", *TPU]), (gke, ["run", *GKE])):
        assert tool.main([*arguments, "--slices", "2", "--dry_run", *TRAIN]) == 2
        assert "set --config.mesh.slice=2" in capsys.readouterr().err


def test_slurm_processes_of_a_host_join_each_other(tmp_path: Path) -> None:
    programs = {
        "scontrol": "echo node3\necho node4",
        "srun": 'shift 2\nSLURM_PROCID=1 "$@"',
        "python": 'echo "$*" > words',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "8193"}
    variables |= {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[3-4]"}
    subprocess.run(["bash", "-c", slurm_script("--processes", "host")], env=variables, check=True)
    assert (tmp_path / "words").read_text().split()[-6:] == ["--coordinator", "node3:61441", "--num_processes", "2", "--process_id", "1"]
