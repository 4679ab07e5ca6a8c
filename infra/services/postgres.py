"""PostgreSQL from the system's package: a cluster under the root, TCP on 127.0.0.1 alone, one role with a password.

Its programs refuse to run as root. Where the services are started as root they run as the user `postgres`, which
Debian's package makes; its folder is then that user's.
"""

import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from infra.services.configuration import DATABASES, USER
from pipelines.errors import CodecmillError, InputError

SYSTEM_USER = "postgres"
_PACKAGES = Path("/usr/lib/postgresql")
_WAY_OUT = "Install it: apt-get install postgresql (or infra/test-packages)."


@dataclass(frozen=True)
class Cluster:
    """A cluster of databases in a folder; `programs` is where its version's programs are."""

    folder: Path
    programs: Path

    def make(self) -> None:
        """Make it where it is missing, with role and databases; whole or not at all.

        Raises:
            CodecmillError: it cannot be made.
        """
        if self.folder.is_dir():
            return
        building = self.folder.with_name(f".tmp-{self.folder.name}")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(building, SYSTEM_USER, SYSTEM_USER)
        new = Cluster(building, self.programs)
        new._check_the_way()
        new._call("initdb", "--auth=reject", f"--username={SYSTEM_USER}", "--encoding=UTF8", "--locale=C.UTF-8")
        # Nobody comes in but our role, over TCP, by its password. The superuser has none, and cannot log in at all.
        names = ",".join(DATABASES)
        (building / "pg_hba.conf").write_text(f"host {names} {USER} 127.0.0.1/32 scram-sha-256\n")
        new._tell([f"CREATE ROLE {USER} LOGIN;", *(f"CREATE DATABASE {name} OWNER {USER};" for name in DATABASES)])
        building.rename(self.folder)

    def set_password(self, password: str) -> None:
        """Give the role its password, while the server does not run: the file of secrets is right, whatever was before.

        Raises:
            CodecmillError: the cluster cannot be opened, or a server runs on it.
        """
        self._check_the_way()
        self._forget_dead_server()
        quoted = password.replace("'", "''")
        self._tell([f"ALTER ROLE {USER} PASSWORD '{quoted}';"])

    def command(self, port: int) -> list[str]:
        """The server's command line."""
        return [
            *_as_system_user(),
            *(str(self.programs / "postgres"), "-D", str(self.folder)),
            *("-c", "listen_addresses=127.0.0.1", "-c", f"port={port}", "-c", "unix_socket_directories="),
            # Only what goes wrong: a statement that fails may carry values of runs.
            *("-c", "log_min_error_statement=panic", "-c", "log_timezone=UTC"),
        ]

    def is_ready(self, port: int) -> bool:
        whom = ("--host=127.0.0.1", f"--port={port}", f"--username={USER}", f"--dbname={DATABASES[0]}")
        asked = [str(self.programs / "pg_isready"), "--quiet", "--timeout=2", *whom]
        return subprocess.run(asked, check=False, capture_output=True).returncode == 0

    def _forget_dead_server(self) -> None:
        """Remove the note of a server that no longer serves this folder.

        PostgreSQL takes any process of its user with the noted number for its server: one that was killed and that
        nobody has waited for yet, or, after a restart of a machine or container, another that has the number now. A
        server works in its folder, whatever its number.
        """
        note = self.folder / "postmaster.pid"
        if not note.is_file():
            return
        number = note.read_text(encoding="utf-8").partition("\n")[0].strip()
        try:
            is_served = Path(f"/proc/{number}/cwd").samefile(self.folder)
        except OSError:  # gone, dead or another user's
            is_served = False
        if not is_served:
            note.unlink()

    def _tell(self, statements: list[str]) -> None:
        """Carry out statements, one a line, in a cluster that nobody serves; no list of processes shows them."""
        self._call(
            *("postgres", "--single", "-c", "exit_on_error=on", "-c", "log_min_error_statement=panic", "postgres"),
            told="\n".join(statements) + "\n",
        )

    def _call(self, program: str, *arguments: str, told: str = "") -> None:
        first, rest = arguments[:1], arguments[1:]
        command = [*_as_system_user(), str(self.programs / program), *first, "-D", str(self.folder), *rest]
        done = subprocess.run(
            command, input=told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", check=False
        )
        if done.returncode:
            said = " ".join(done.stdout.split())[-600:]
            raise CodecmillError(f"PostgreSQL's {program} failed on {self.folder} ({done.returncode}): {said}")

    def _check_the_way(self) -> None:
        """As root: whether the system user can get to the folder at all, said in a sentence and not in PostgreSQL's."""
        reached = [*_as_system_user(), "test", "-x", str(self.folder)]
        if os.geteuid() == 0 and subprocess.run(reached, cwd="/", check=False).returncode:
            shut = next(each for each in reversed(self.folder.parents) if not each.stat().st_mode & 0o001)
            raise InputError(
                f"PostgreSQL does not run as root, and its user '{SYSTEM_USER}' cannot pass through {shut}. "
                f"Start the services as an ordinary user, choose another --root, or: chmod o+x {shut}"
            )


def cluster(folder: Path) -> Cluster:
    """The cluster in a folder, with the programs that go with it; the newest that are installed if it is new.

    Raises:
        InputError: they are not installed, or the system user is missing.
    """
    installed = {int(each.parent.parent.name): each.parent for each in _PACKAGES.glob("[0-9]*/bin/postgres")}
    if not installed:
        raise InputError(f"PostgreSQL is not installed: there is no {_PACKAGES}/*/bin/postgres. {_WAY_OUT}")
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(SYSTEM_USER)
        except KeyError:
            text = f"PostgreSQL does not run as root, and there is no user '{SYSTEM_USER}'."
            raise InputError(f"{text} Start the services as an ordinary user.") from None
    version = _version_of(folder) or max(installed)
    if version not in installed:
        raise InputError(
            f"{folder} is of PostgreSQL {version}, and only {', '.join(map(str, sorted(installed)))} is installed. "
            f"Install postgresql-{version}, or take the data over with pg_upgrade."
        )
    return Cluster(folder, installed[version])


def _version_of(folder: Path) -> int | None:
    file = folder / "PG_VERSION"
    return int(file.read_text()) if file.is_file() else None


def _as_system_user() -> list[str]:
    """What puts a program under the system user where we are root, and has it die with the thread that started it.

    A change of user forgets that PR_SET_PDEATHSIG was set: it has to be set again after it.
    """
    if os.geteuid() != 0:
        return []
    identity = (f"--reuid={SYSTEM_USER}", f"--regid={SYSTEM_USER}", "--init-groups")
    return ["setpriv", *identity, "--pdeathsig=KILL", "--"]
