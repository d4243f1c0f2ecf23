"""A real SLURM of two nodes, n0 and n1, on this machine: munged, slurmctld and two slurmd, stopped at the end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from worlds import free_port

# Debian's packages slurmctld, slurmd, slurm-client and munge.
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
_SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# A requeued job waits for cred_expire: two minutes by default, five seconds at least.
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={control}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=600
SlurmctldTimeout=300
SlurmdTimeout=300
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=2000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=2000
PartitionName=test Nodes=n[0-1] Default=YES MaxTime=UNLIMITED State=UP
"""


def missing() -> str:
    """Why there can be no cluster here, or "" where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_SBIN) is None]
    if absent:
        return f"SLURM is not installed: no {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    return ""


class Cluster:
    """A running SLURM; its clients need `environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"PATH": _SBIN, "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str | Path, cwd: Path | None = None) -> str:
        """What `command` prints; AssertionError, with the daemons' last words, where it fails."""
        done = subprocess.run(
            [str(word) for word in command], env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def submit(self, script: Path, *options: str, cwd: Path) -> str:
        """The id of a job that runs `script` from `cwd`."""
        return self.call("sbatch", "--parsable", *options, script, cwd=cwd).strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as JobState or Restarts."""
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        found = [word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}=")]
        assert found, f"no {name} in {shown}"
        return found[0]

    def wait(self, job: str, *states: str, timeout: float = 300.0) -> str:
        """The state of `job` once it is one of `states`; AssertionError after `timeout` seconds."""

        def reached() -> str:
            state = self.field(job, "JobState")
            return state if state in states else ""

        return wait_for(reached, timeout=timeout, otherwise=lambda: self.call("scontrol", "show", "job", job))

    def logs(self) -> str:
        """The ends of what the daemons have said."""
        return "\n".join(
            f"{path.name}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-20:])
            for path in sorted(self.folder.glob("*.said.log"))
        )


def wait_for(
    ready: Callable[[], str], *, timeout: float, every: float = 0.1, otherwise: Callable[[], str] = str
) -> str:
    """What `ready` gives once that is not empty; AssertionError with what `otherwise` says after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (found := ready()):
        assert time.monotonic() < end, f"waited {timeout:g} s\n{otherwise()}"
        time.sleep(every)
    return found


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster that is up while this is open."""
    # Not below pytest's folders: the path of a socket has at most 107 characters.
    temporary = tempfile.TemporaryDirectory(prefix="fastmoco-slurm-", ignore_cleanup_errors=True)
    with temporary as name, ExitStack() as stack:
        folder = Path(name)
        control, first, second = _free_ports(3)
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(
            _CONF.format(host=socket.gethostname(), folder=folder, control=control, first=first, second=second)
        )
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        made = Cluster(folder)
        munge = [f"--{what}={folder}/munge.{end}" for what, end in _MUNGE.items()]
        _start(stack, made, "munged", "--foreground", *munge, "--force")
        wait_for(lambda: "up" if (folder / "munge.socket").exists() else "", timeout=20, otherwise=made.logs)
        _start(stack, made, "slurmctld", "-D")
        for node in ("n0", "n1"):
            _start(stack, made, "slurmd", "-D", "-N", node)

        def up() -> str:
            done = subprocess.run(
                ["sinfo", "-h", "-N", "-o", "%T"], env=made.environment, capture_output=True, text=True, timeout=60
            )
            return "up" if done.stdout.split() == ["idle", "idle"] else ""

        wait_for(up, timeout=60, otherwise=made.logs)
        stack.callback(_cancel_all, made)
        yield made


def _cancel_all(made: Cluster) -> None:
    """Cancel what runs, and wait until its processes are gone: nobody else would end them."""
    made.call("scancel", "--user=root")
    wait_for(lambda: "" if made.call("squeue", "--noheader") else "none", timeout=120, otherwise=made.logs)


_MUNGE = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        if (port := free_port()) not in found:
            found.append(port)
    return found


def _start(stack: ExitStack, made: Cluster, *command: str) -> None:
    """Run a daemon until `stack` is left."""
    program = shutil.which(command[0], path=_SBIN)
    assert program, missing()
    # In its folder, so that what it may leave, such as a core file, goes with it.
    said = stack.enter_context((made.folder / f"{command[0]}{command[-1]}.said.log").open("w"))
    process = subprocess.Popen(
        [program, *command[1:]], env=made.environment, cwd=made.folder, stdout=said, stderr=said
    )

    def stop() -> None:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(stop)
