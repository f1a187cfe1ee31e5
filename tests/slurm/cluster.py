"""A real SLURM on this machine: munge, slurmctld, three slurmd with four fake GPUs each, and, if asked for, accounting.

`python -m tests.slurm.cluster` starts one and keeps it until its standard input ends (Ctrl-D); the tests talk to that
process. So nothing outlives them, even if they are killed: the pipe closes, and the keeper takes the cluster down.

It needs root and Debian's or Ubuntu's packages, which `install` adds. Everything lies in one folder, apart from links
in /etc/slurm: jobs find the configuration nowhere else, since Snakemake's plugin removes SLURM_CONF from their
environment. A machine with a configuration of its own there is left alone.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge"]
ACCOUNTING_PACKAGES = ["slurmdbd", "mariadb-server"]
DAEMONS = ["munged", "slurmctld", "slurmd", "squeue"]
ACCOUNTING_DAEMONS = ["slurmdbd", "mariadbd"]
ETC = Path("/etc/slurm")
LINKED = ("slurm.conf", "gres.conf", "cgroup.conf")
POLICY = Path("/usr/sbin/policy-rc.d")  # exit code 101 there keeps packages from starting their daemons

NAME = "randopt_tests"  # of the cluster, in the environment of its jobs: like no other's, since they are killed by it
NODES, GPUS, CPUS = 3, 4, 16
CONTROLLER_PORT, NODE_PORT, DATABASE_PORT = 16817, 17000, 16819

SLURM_CONF = """\
ClusterName={cluster}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
# a credential that is older is refused; with the default of 120 a requeued job waits so long
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld.pid
SlurmdPidFile={folder}/pid/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
# no cgroups: two real cores pretend to be many
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# fails every task on a node that break_node has broken
TaskProlog={folder}/etc/task_prolog
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=5,batch_sched_delay=0,sched_min_interval=0,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MaxJobCount=20000
MinJobAge=300
# Slurm's own default is 30; shorter, so that a cancelled job leaves soon
KillWait=5
OverTimeLimit=0
SlurmdTimeout=10
SlurmctldTimeout=30
InactiveLimit=0
UnkillableStepTimeout=30
HealthCheckInterval=0
{accounting}
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off DefMemPerCPU=500
PartitionName=scavenge Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=requeue DefMemPerCPU=500
PartitionName=cancelled Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=cancel DefMemPerCPU=500
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=off DefMemPerCPU=500
"""

ACCOUNTING_CONF = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={database_port}
# slurmdbd ignores AuthInfo; the socket must be said here
AccountingStoragePass={folder}/run/munge.socket
AccountingStorageEnforce=associations
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/linux"""

DATABASE_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={database_port}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/pid/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=lab
StorageLoc=slurm_acct_db
"""


def unavailable(accounting: bool = False) -> str | None:
    """Why there can be no cluster here and how to get one, after an attempt to install it; None if there can."""
    if os.getuid() != 0:
        return "a SLURM in the tests needs root (run `make test` as root in a Debian or Ubuntu container or machine)"
    conf = ETC / "slurm.conf"
    if conf.exists() and not _is_ours(conf):
        return f"{conf} is this machine's own configuration; a test cluster is not started beside it"
    if conf.exists() and _alive(conf.resolve().parents[1] / "pid/slurmctld.pid", "slurmctld"):
        return f"another test cluster is up ({conf.resolve().parents[1]}); wait until it is gone"
    daemons = DAEMONS + (ACCOUNTING_DAEMONS if accounting else [])
    if all(map(shutil.which, daemons)):
        return None
    packages = PACKAGES + (ACCOUNTING_PACKAGES if accounting else [])
    if shutil.which("apt-get") is None:
        return f"a SLURM in the tests needs the packages {' '.join(packages)} of Debian or Ubuntu"
    words = install(packages)
    missing = [name for name in daemons if shutil.which(name) is None]
    return f"apt-get install {' '.join(packages)} failed, {missing} missing: {words}" if missing else None


def install(packages: list[str]) -> str:
    """Install Debian packages without starting their daemons; what apt-get said last."""
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    said = ""
    try:
        for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run(
                ["apt-get", *command], env=environment, capture_output=True, text=True, timeout=600, check=False
            )
            said = (done.stderr.strip().splitlines() or [""])[-1]
    except subprocess.TimeoutExpired:
        said = "no answer within ten minutes"
    finally:
        if ours:
            POLICY.unlink()
    return said


class Cluster:
    """A cluster in `folder`. It signals its daemons, known by their pid files, and the processes of its jobs."""

    def __init__(self, folder: Path, accounting: bool = False) -> None:
        self.folder = Path(folder)
        self.accounting = accounting
        self.database: subprocess.Popen | None = None

    # --- up and down

    def start(self) -> None:
        """Bring everything up; on failure take down what came up and say which step it was."""
        for name in ("etc", "pid", "log", "state", "dev", "mysql", "run", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        self._write_configuration()
        try:
            self._start_munge()
            if self.accounting:
                self._start_database()
            self.start_controller()
            for node in self.nodes():
                self.start_node(node)
            wait_for("all nodes idle", lambda: self._states() == {"idle"}, 60)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all jobs and daemons and remove the links; safe to call in any state."""
        with suppress(subprocess.SubprocessError, TimeoutError):  # nobody answers when the controller is gone
            subprocess.run(["scancel", "--user=root"], capture_output=True, timeout=20)
            wait_for("an empty queue", lambda: not run("squeue", "--noheader"), 30)
        pids = {path: "slurmd" for path in self.folder.glob("pid/slurmd.*.pid")}
        for path in pids:
            self._kill_jobs_of(path.name.split(".")[1])
        self._kill_left_behind()
        pids[self.folder / "pid/slurmctld.pid"] = "slurmctld"
        with ThreadPoolExecutor() as pool:  # each takes seconds to say goodbye
            list(pool.map(self._end, pids, pids.values()))
        self._end(self.folder / "pid/slurmdbd.pid", "slurmdbd")
        if self.database is not None:
            self.database.terminate()
            self.database.wait(timeout=60)
        self._end(self.folder / "pid/munged.pid", "munged")
        for name in LINKED:
            link = ETC / name
            if link.is_symlink() and Path(os.readlink(link)).is_relative_to(self.folder):
                link.unlink()

    # --- faults

    @staticmethod
    def nodes() -> list[str]:
        """Names of the nodes."""
        return [f"gpu{number}" for number in range(1, NODES + 1)]

    def start_controller(self) -> None:
        """Start slurmctld, which goes on from its saved state."""
        run("slurmctld")
        wait_for("slurmctld", lambda: "UP" in run("scontrol", "ping"), 30)

    def kill_controller(self) -> None:
        """kill -9 of slurmctld."""
        self._end(self.folder / "pid/slurmctld.pid", "slurmctld", signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        run("slurmd", "-N", name)

    def crash_node(self, name: str) -> None:
        """A node loses power: its slurmd and every process of its jobs are gone at once."""
        self._end(self.folder / f"pid/slurmd.{name}.pid", "slurmd", signal.SIGKILL)
        self._kill_jobs_of(name)

    def break_node(self, name: str) -> None:
        """Every task fails at once on this node, which goes on to say that it is well."""
        (self.folder / f"etc/broken-{name}").touch()

    def mend_node(self, name: str) -> None:
        """The end of `break_node`."""
        (self.folder / f"etc/broken-{name}").unlink(missing_ok=True)

    def _kill_jobs_of(self, node: str) -> None:
        """kill -9 of every slurmstepd of a node with all below it."""
        for step in processes():
            if step.name.startswith("slurmstepd") and self._node_of(step.pid) == node:
                for pid in tree(step.pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    @staticmethod
    def _kill_left_behind() -> None:
        """kill -9 of what a cancelled job has left: without cgroups SLURM loses a process whose parent went first."""
        for process in processes():
            if environment_of(process.pid).get("SLURM_CLUSTER_NAME") == NAME:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    @staticmethod
    def _node_of(pid: int) -> str | None:
        for below in tree(pid):
            for name, value in environment_of(below).items():
                if name == "SLURMD_NODENAME":
                    return value
        return None

    # --- parts of the start

    def _write_configuration(self) -> None:
        host = socket.gethostname().split(".")[0]
        gres, nodes = [], []
        for number, node in enumerate(self.nodes(), 1):
            for gpu in range(GPUS):
                device = self.folder / f"dev/{node}-{gpu}"
                device.touch()
            gres.append(f"NodeName={node} Name=gpu Type=fake File={self.folder}/dev/{node}-[0-{GPUS - 1}]")
            nodes.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={NODE_PORT + number} CPUs={CPUS} "
                f"Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=64000 "
                f"Gres=gpu:fake:{GPUS} State=UNKNOWN"
            )
        values = {
            "cluster": NAME,
            "folder": self.folder,
            "host": host,
            "controller_port": CONTROLLER_PORT,
            "database_port": DATABASE_PORT,
            "nodes": "\n".join(nodes),
        }
        none = "AccountingStorageType=accounting_storage/none"
        values["accounting"] = ACCOUNTING_CONF.format(**values) if self.accounting else none
        etc = self.folder / "etc"
        (etc / "slurm.conf").write_text(SLURM_CONF.format(**values))
        (etc / "gres.conf").write_text("\n".join(gres) + "\n")
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (etc / "task_prolog").write_text(f'#!/bin/sh\n[ ! -e "{etc}/broken-$SLURMD_NODENAME" ]\n')
        (etc / "task_prolog").chmod(0o755)
        (etc / "slurmdbd.conf").write_text(DATABASE_CONF.format(**values))
        (etc / "slurmdbd.conf").chmod(0o600)
        ETC.mkdir(exist_ok=True)
        for name in LINKED:
            if _is_ours(ETC / name):
                (ETC / name).unlink()  # of a keeper that was killed together with the machine
            (ETC / name).symlink_to(etc / name)

    def _start_munge(self) -> None:
        key = self.folder / "etc/munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        run(
            *("munged", f"--key-file={key}", f"--socket={self.folder}/run/munge.socket", "--num-threads=4", "--force"),
            *(f"--pid-file={self.folder}/pid/munged.pid", f"--log-file={self.folder}/log/munged.log"),
            f"--seed-file={self.folder}/run/munge.seed",
        )

    def _start_database(self) -> None:
        shutil.chown(self.folder / "mysql", "mysql")
        (self.folder / "run").chmod(0o777)
        sock = self.folder / "run/mysql.sock"
        data = ["--no-defaults", "--user=mysql", f"--datadir={self.folder}/mysql"]
        run("mariadb-install-db", *data, "--auth-root-authentication-method=normal", "--skip-test-db")
        with open(self.folder / "log/mariadbd.log", "w") as log:
            self.database = subprocess.Popen(
                ["mariadbd", *data, f"--socket={sock}", "--skip-networking", "--skip-log-bin"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        client = ["mariadb", "--no-defaults", "-uroot", "-S", str(sock), "-e"]
        wait_for("mariadbd", lambda: subprocess.run([*client, "select 1"], capture_output=True).returncode == 0, 60)
        run(
            *client,
            "create database slurm_acct_db; create user slurm@localhost identified by 'lab'; "
            "grant all on slurm_acct_db.* to slurm@localhost",
        )
        conf = ETC / "slurmdbd.conf"
        conf.symlink_to(self.folder / "etc/slurmdbd.conf")
        try:
            run("slurmdbd", environment={"MYSQL_UNIX_PORT": str(sock)})
            wait_for("slurmdbd", lambda: _listens(DATABASE_PORT), 60)
        finally:
            conf.unlink()
        run("sacctmgr", "-i", "add", "cluster", NAME)
        run("sacctmgr", "-i", "add", "account", "labacct", "Description=lab", "Organization=lab")
        run("sacctmgr", "-i", "add", "user", "root", "Account=labacct")

    def _states(self) -> set[str]:
        return set(run("sinfo", "--noheader", "--partition=gpu", "--format=%T").split())

    @staticmethod
    def _end(pid_file: Path, name: str, number: int = signal.SIGTERM) -> None:
        """Signal the daemon of a pid file, if it is that daemon, and wait until it is gone."""
        try:
            if not _alive(pid_file, name):
                return
            pid = int(pid_file.read_text())
            os.kill(pid, number)
            with suppress(TimeoutError):
                wait_for(f"the end of {name}", lambda: not Path(f"/proc/{pid}").exists(), 20)
                return
            os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError):
            pass
        finally:
            pid_file.unlink(missing_ok=True)


def _is_ours(conf: Path) -> bool:
    """Whether this is a link into a test cluster's folder."""
    return conf.is_symlink() and "randopt-slurm-" in os.readlink(conf)


def _alive(pid_file: Path, name: str) -> bool:
    """Whether the process of a pid file is there and is that daemon."""
    try:
        return name in Path(f"/proc/{int(pid_file.read_text())}/comm").read_text()
    except (OSError, ValueError):
        return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def run(*command: str, environment: dict[str, str] | None = None) -> str:
    """Run to the end and return what it printed; an error names the command and what it said."""
    done = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise subprocess.SubprocessError(f"{' '.join(command)}: {done.stdout} {done.stderr}")
    return done.stdout


def wait_for(what: str, condition: Callable[[], object], seconds: float) -> None:
    """Until `condition()` holds; errors of SLURM's commands count as not yet."""
    end = time.monotonic() + seconds
    while True:
        with suppress(subprocess.SubprocessError):
            if condition():
                return
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.1)


class Process:
    """A process of this machine."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def processes() -> Iterator[Process]:
    """Every process that is there."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield Process(int(path.name))


def tree(pid: int) -> list[int]:
    """A process and all below it, leaves first."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    return [*found, pid]


def environment_of(pid: int) -> dict[str, str]:
    """A process's environment as it was started with; empty when it is gone."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)


@contextmanager
def kept(accounting: bool = False) -> Iterator[Cluster]:
    """A cluster kept by a process of its own, which takes it down when this one ends, however it ends."""
    command = [sys.executable, "-m", "tests.slurm.cluster", *(["--accounting"] if accounting else [])]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert keeper.stdin is not None and keeper.stdout is not None
    try:
        folder = keeper.stdout.readline().strip()
        if not folder.startswith("/"):
            raise RuntimeError(f"the cluster did not start: {folder}{keeper.stdout.read()}")
        yield Cluster(Path(folder), accounting)
    finally:
        keeper.stdin.close()
        keeper.wait(timeout=180)


def main() -> None:
    """Keep a cluster until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB")
    accounting = parser.parse_args().accounting
    why = unavailable(accounting)
    if why:
        sys.exit(why)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    folder = Path(tempfile.mkdtemp(prefix="randopt-slurm-"))
    cluster = Cluster(folder, accounting)
    try:
        cluster.start()
        print(folder, flush=True)
        if sys.stdin.isatty():
            print("SLURM is up: sinfo, squeue, snakemake --profile slurm. Ctrl-D takes it down.", flush=True)
        sys.stdin.read()
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
