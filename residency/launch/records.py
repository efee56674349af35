"""Records of apps that run as processes, by port.

RUN_DIR/PORT.pid contains the pid. RUN_DIR/PORT.run is the record for stop, status and restart, as JSON. The files are
private to the owner: they may contain secrets.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from .listening import holders_of_port
from .options import LaunchSettings
from .terminal import fail, output_of, warn


def born(pid: int) -> str:
    """Returns the start time of a process, which detects a reused pid; empty if it has ended."""
    if not os.access("/proc/self/stat", os.R_OK):
        return output_of("ps", "-o", "lstart=", "-p", str(pid)) or ""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    facts = stat.rpartition(") ")[2].split()  # the name before it may contain spaces
    # In a process that ends, the first thread may be a zombie while others still hold its sockets.
    return "" if facts[0] == "Z" and int(facts[17]) <= 1 else facts[19]


@dataclass(frozen=True)
class Record:
    """Started app."""

    pid: int
    born: str
    log: str
    """Log file; empty if the app writes to its terminal."""
    folder: str
    """Working folder at the start."""
    arguments: list[str]
    settings: dict[str, str]
    """Settings and public variables that a restart reuses."""

    @property
    def runs(self) -> bool:
        return bool(self.born) and born(self.pid) == self.born


def _checked(record: Record) -> Record:
    """Raises TypeError for fields of other types than written: the file was edited, or is of another version."""
    if not (isinstance(record.pid, int) and isinstance(record.arguments, list) and isinstance(record.settings, dict)):
        raise TypeError(record)
    texts = [record.born, record.log, record.folder, *record.arguments, *record.settings.values()]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(record)
    return record


class RecordFile:
    def __init__(self, run_dir: str, port: int) -> None:
        self.port = port
        self.path, self.pid_path = Path(run_dir, f"{port}.run"), Path(run_dir, f"{port}.pid")

    @property
    def is_ours(self) -> bool:
        return os.path.lexists(self.path) and not self.path.is_symlink() and self.path.stat().st_uid == os.geteuid()

    def read(self) -> Record | None:
        """Reads the record; returns None if it is missing, damaged or another user's."""
        try:
            return _checked(Record(**json.loads(self.path.read_bytes()))) if self.is_ours else None
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def check_owner(self) -> None:
        """Raises `LaunchError` if the record is another user's: `restart` executes its content."""
        if self.path.exists() and not self.path.is_symlink() and not self.is_ours:
            owner = self.path.owner()
            fail(f"The app on port {self.port} was started by the user {owner}: run this as that user (sudo -u)",
                 f"端口 {self.port} 上的应用由用户 {owner} 启动：请以该用户身份执行（sudo -u）")  # fmt: skip

    def report_damage(self) -> None:
        """Prints a warning if the record is damaged."""
        if not self.is_ours or self.read():
            return
        en = zh = ""
        for pid in holders_of_port(self.port)[:1]:
            en, zh = f"; pid {pid} listens there", f"；进程 {pid} 正在监听该端口"
        warn(f"⚠️  {self.path} is damaged: the record of port {self.port} is ignored{en}",
             f"⚠️  {self.path} 已损坏，其中关于端口 {self.port} 的记录不再有效{zh}")  # fmt: skip

    def write(self, record: Record, settings: LaunchSettings) -> None:
        """Writes the record. Does not follow links."""
        new = self.path.with_suffix(".run.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove(self.path, new, self.pid_path)
            for path, text in ((new, json.dumps(asdict(record))), (self.pid_path, f"{record.pid}\n")):
                with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(text)
            new.replace(self.path)
        except OSError as error:
            what = settings.named("RUN_DIR")
            warn(f"⚠️  {what} cannot be written ({error.strerror}): stop, status and restart will not find this app",
                 f"⚠️  无法写入 {what}（{error.strerror}）：stop、status、restart 将找不到本应用")  # fmt: skip

    def delete(self) -> None:
        _remove(self.path, self.pid_path)


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def locked(run_dir: str) -> Iterator[None]:
    """Serializes concurrent starts until the record is written."""
    try:
        os.makedirs(run_dir, exist_ok=True)
        folder = os.open(run_dir, os.O_RDONLY)
    except OSError:
        yield  # `RecordFile.write` reports it
        return
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
