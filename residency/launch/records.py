"""Records of apps that run as processes, by port.

RUN_DIR/PORT.pid contains the pid. RUN_DIR/PORT.run, for stop, status and restart, contains: pid, start time, log,
folder, number of arguments, arguments, names and values of settings; each terminated by NUL. PORT.run.last is the
previous record, until the new app is ready. The files are private to the owner: they may contain secrets.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .checks import holders_of_port
from .options import REMEMBERED, LaunchSettings
from .terminal import fail, output_of, say, warn


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
    arguments: tuple[str, ...]
    settings: Mapping[str, str]

    @property
    def lives(self) -> bool:
        return bool(self.born) and born(self.pid) == self.born


class RecordFile:
    def __init__(self, run_dir: str, port: int) -> None:
        self.port = port
        self.path, self.pid_path = Path(run_dir, f"{port}.run"), Path(run_dir, f"{port}.pid")
        self.last = Path(run_dir, f"{port}.run.last")

    @property
    def is_ours(self) -> bool:
        return os.path.lexists(self.path) and not self.path.is_symlink() and self.path.stat().st_uid == os.geteuid()

    def read(self) -> Record | None:
        """Reads the record; returns None if it is missing, damaged or another user's."""
        try:
            parts = self.path.read_bytes().split(b"\0") if self.is_ours else []
        except OSError:
            return None
        words = [os.fsdecode(part) for part in parts]
        if len(words) < 6 or words.pop() or not re.fullmatch("[1-9][0-9]*", words[0]):
            return None
        count = int(words[4]) if re.fullmatch("0|[1-9][0-9]{0,5}", words[4]) else len(words)
        arguments, settings = words[5 : 5 + count], words[5 + count :]
        if len(arguments) < count or len(settings) % 2 or not REMEMBERED.issuperset(settings[::2]):
            return None
        pairs = dict(zip(settings[::2], settings[1::2], strict=True))
        return Record(int(words[0]), words[1], words[2], words[3], tuple(arguments), pairs)

    def check_owner(self) -> None:
        """Raises `LaunchError` if the record is another user's: `restart` executes its content."""
        if self.path.exists() and not self.path.is_symlink() and not self.is_ours:
            owner = self.path.owner()
            fail(f"What runs on port {self.port} was started by the user {owner}: be that user (sudo -u)",
                 f"端口 {self.port} 上的应用由用户 {owner} 启动：请以该用户身份执行（sudo -u）")  # fmt: skip

    def report_damage(self) -> None:
        """Prints a warning if the record is damaged."""
        if not self.is_ours or self.read():
            return
        en = zh = ""
        for pid in holders_of_port(self.port)[:1]:
            en, zh = f"; pid {pid} listens there", f"；进程 {pid} 正在监听该端口"
        warn(f"⚠️  {self.path} is damaged, so what it tells of port {self.port} counts for nothing{en}",
             f"⚠️  {self.path} 已损坏，其中关于端口 {self.port} 的记录不再有效{zh}")  # fmt: skip

    def write(self, record: Record, settings: LaunchSettings) -> None:
        """Writes the record; keeps the previous one until `confirm`. Does not follow links."""
        words = [record.pid, record.born, record.log, record.folder, len(record.arguments), *record.arguments]
        words += [word for pair in record.settings.items() for word in pair]
        new = self.path.with_suffix(".run.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file() and not self.path.is_symlink():
                self.path.replace(self.last)
            _remove(self.path, new, self.pid_path)
            for path, text in ((new, "".join(f"{word}\0" for word in words)), (self.pid_path, f"{record.pid}\n")):
                with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(os.fsencode(text))
            new.replace(self.path)
        except OSError as error:
            what = f"{settings.named('RUN_DIR')}"
            say(f"⚠️  {what} cannot be written ({error.strerror}): stop, status and restart will not find this app",
                f"⚠️  无法写入 {what}（{error.strerror}）：stop、status、restart 将找不到本应用")  # fmt: skip

    def confirm(self) -> None:
        """Deletes the previous record, once the app is ready."""
        _remove(self.last)

    def revert(self) -> None:
        """Restores the previous record, if there is one, after a failed start."""
        _remove(self.pid_path)
        if self.last.exists():
            self.last.replace(self.path)

    def forget(self) -> None:
        _remove(self.path, self.last, self.pid_path)


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
