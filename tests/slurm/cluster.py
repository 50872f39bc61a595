"""A SLURM cluster of two nodes on this machine: own folder, ports, keys; nothing of ``/etc``.

For Debian's slurm-wlm and its like, whose ``slurmd`` takes ``-N``. All traffic is on the loopback.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
_SYSTEM = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

_CONFIG = """\
ClusterName=forge
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its last credential is void: 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
MessageTimeout=60
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES State=UP MaxTime=60
"""


def missing() -> list[str]:
    """Programs that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_SYSTEM) is None]


def free_ports(count: int) -> list[int]:
    """So many ports of the loopback that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def wait_until(what: str, reached: Callable[[], bool], seconds: float) -> None:
    """Poll until it holds.

    Raises:
        TimeoutError: it did not within so many seconds.
    """
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)


class Cluster:
    """Starts on entry; on exit everything that it and its jobs started is gone.

    Args:
        folder: empty, with a short path: sockets have theirs in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment = dict(kept, PATH=_SYSTEM, SLURM_CONF=str(folder / "slurm.conf"))

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            logs = self.logs()
            self.stop()
            raise RuntimeError(f"the cluster did not start:\n{logs}") from None
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", "spool.n1", "spool.n2"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        config = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        config.write_text(
            _CONFIG.format(folder=folder, host=host, user=getpass.getuser(), ports=free_ports(3))
        )
        names = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed")}
        munge = ["munged", "--foreground", "--force", "--num-threads=2", *names.values()]
        self._daemon("munged", *munge, f"--socket={folder}/munge.socket")
        wait_until("munged's socket", (folder / "munge.socket").exists, 60)
        self._daemon("slurmctld", "slurmctld", "-D", "-c", "-f", str(config))
        for node in ("n1", "n2"):
            self._daemon(f"slurmd.{node}", "slurmd", "-D", "-N", node, "-f", str(config))
        wait_until("two idle nodes", lambda: self._idle() == 2, 120)

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "wb") as log:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
            )

    def _idle(self) -> int:
        for daemon in self._daemons:
            if daemon.poll() is not None:
                raise RuntimeError(f"{daemon.args} ended with {daemon.returncode}")
        done = self.run(
            "sinfo", "--noheader", "--Node", "--states=idle", "--format=%N", check=False
        )
        return len(done.split())

    def run(self, *command: str, check: bool = True, **more: str) -> str:
        """What a command prints, with ``more`` in its environment.

        Raises:
            AssertionError: it failed; the message has what it printed.
        """
        environment = dict(self.environment, **more)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=90, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Such as ``RUNNING``."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return next(word for word in shown.split() if word.startswith("JobState="))[9:]

    def logs(self) -> str:
        """The last of what the daemons said."""
        return "\n".join(
            f"-- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.[lo][ou][gt]"))
        )

    def processes(self) -> list[int]:
        """Those of jobs and daemons, which alone have this cluster in their environment."""
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """End the jobs, then the daemons, then what is left of either."""
        with contextlib.suppress(AssertionError, OSError, subprocess.TimeoutExpired):
            self.run("scancel", f"--user={getpass.getuser()}", check=False)
            with contextlib.suppress(TimeoutError):
                wait_until("no job", lambda: not self.run("squeue", "--noheader", check=False), 30)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for daemon in self._daemons:
            daemon.wait(timeout=10)
