"""Compares a requirements.txt with the installed packages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from ..sentences import Sentence


@dataclass(frozen=True)
class Unmet:
    """Unmet requirement; ``installed`` is the installed version, None if the package is missing."""

    requirement: str
    installed: str | None

    @property
    def sentence(self) -> Sentence:
        """Returns ``torch==2.1 (2.0)`` or ``torch==2.1 (missing)``."""
        return Sentence(
            f"{self.requirement} ({self.installed or 'missing'})", f"{self.requirement}（{self.installed or '未安装'}）"
        )


def listed(requirements: Iterable[Unmet]) -> Sentence:
    sentences = [each.sentence for each in requirements]
    return Sentence("; ".join(each.en for each in sentences), "；".join(each.zh for each in sentences))


def unmet(file: Path) -> list[Unmet]:
    """Returns unmet requirements in the file's order. Skips options and links; a missing file has no requirements."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            requirement = Requirement(line.split(" #")[0].strip())
        except InvalidRequirement:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = None
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            found.append(Unmet(f"{requirement.name}{requirement.specifier}", installed))
    return found
