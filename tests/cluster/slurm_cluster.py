"""A SLURM cluster of two nodes on one machine, for tests and for trying scripts by hand.

``python tests/cluster/slurm_cluster.py`` starts one, opens a shell in which sbatch, squeue and scontrol speak to it,
and ends it with the shell. It needs Debian's slurm-wlm and munge, and root; it writes nothing outside a temporary
folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SBIN = "/usr/sbin"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)  # before the fork: between it and the program nothing may be loaded

# linuxproc follows children that began sessions of their own, as torchrun's do; no cgroups, which containers lack
CONFIGURATION = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
GresTypes=gpu
ReturnToService=2
KillWait={kill_wait}
SlurmctldTimeout=30
SlurmdTimeout=30
{nodes}
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
NODE = "NodeName=node{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cores} Gres=gpu:1 State=UNKNOWN\n"


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}") is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)} missing); apt install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd without root cannot start jobs"


def _free_ports(count: int) -> list[int]:
    """Ports on which nobody listens, below those that the kernel gives to clients."""
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(ports) < count:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    return ports


class SlurmCluster:
    """A running cluster.

    Args:
        folder: for everything that it writes; a short path, since sockets lie in it.
        kill_wait: seconds between SIGTERM and SIGKILL when a job is requeued, cancelled or over its time (KillWait).
        cores: CPUs that each node claims to have, whatever the machine has.
    """

    def __init__(self, folder: Path, kill_wait: int = 30, cores: int = 16) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen] = []
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(3)
        nodes = "".join(NODE.format(n=n, host=host, port=ports[n], cores=cores) for n in (1, 2))
        configuration = CONFIGURATION.format(
            name=folder.name.replace("_", "-"), host=host, folder=folder, ports=ports, kill_wait=kill_wait, nodes=nodes
        )
        (folder / "slurm.conf").write_text(configuration)
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # a device that is there, so that it is counted
        (folder / "state").mkdir()
        #: what a program needs to speak to this cluster and to no other
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{SBIN}",
        }

    def _daemon(self, *command: str) -> None:
        """Start a program in the foreground, which ends with this process however that ends."""
        self._daemons.append(
            subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=lambda: _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        )

    def start(self) -> None:
        """Start munge, the controller and two nodes, and wait until both are idle."""
        folder = self.folder
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [f"--{name}={folder}/munge.{end}" for name, end in [("socket", "socket"), ("pid-file", "pid")]]
        munge += [f"--{name}={folder}/munge.{end}" for name, end in [("log-file", "log"), ("seed-file", "seed")]]
        self._daemon("munged", "--force", "--foreground", f"--key-file={key}", *munge)
        deadline = time.monotonic() + 60
        while not (folder / "munge.socket").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._daemon("slurmctld", "-D", "-c")
        for node in ("node1", "node2"):
            self._daemon("slurmd", "-D", "-N", node)
        while self.run("sinfo", "--noheader", "--format=%D %t", check=False).split() != ["2", "idle"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the nodes did not become idle: {self.run('sinfo', '--list-reasons')}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End all jobs, then all daemons."""
        if len(self._daemons) > 1:
            self.run("scancel", "--user=root", check=False)
            self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
            deadline = time.monotonic() + 20
            while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """What a program prints.

        Raises:
            RuntimeError: it failed, and ``check`` is set.
        """
        done = subprocess.run(command, env={**self.environment, **environment}, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """The number of a job that sbatch has taken."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"sbatch {' '.join(arguments)}: {done.stderr}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Fields of ``scontrol show job``, such as JobState, ExitCode and Restarts."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def hurry(self) -> None:
        """Let requeued jobs start at once: Slurm has them wait for two minutes."""
        for line in self.run("squeue", "--noheader", "--array", "--format=%A %r").splitlines():
            if line.endswith(" BeginTime"):
                self.run("scontrol", "update", f"JobId={line.split()[0]}", "StartTime=now", check=False)

    def wait(self, number: str, states: tuple[str, ...], seconds: float = 400) -> dict[str, str]:
        """The job, once it is in one of these states."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            self.hurry()
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} is {job['JobState']}, not {' or '.join(states)}: {job}")
            time.sleep(0.2)
        return job


@contextlib.contextmanager
def slurm_cluster(kill_wait: int = 30, cores: int = 16) -> Iterator[SlurmCluster]:
    """A cluster in a temporary folder; it is taken down with what still runs in it."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    cluster = SlurmCluster(folder, kill_wait, cores)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if reason := missing():
        raise SystemExit(reason)
    with slurm_cluster() as running:
        print(f"SLURM_CONF={running.environment['SLURM_CONF']}; exit ends the cluster")
        subprocess.run([os.environ.get("SHELL", "/bin/bash")], env=running.environment)
