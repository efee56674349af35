"""What a requirements.txt asks for that is not installed here, or in another version."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from ..sentences import Sentence


@dataclass(frozen=True)
class Unmet:
    """One requirement and the version that is installed instead; None if it is not there at all."""

    requirement: str
    installed: str | None

    def __str__(self) -> str:
        return f"{self.requirement} ({self.installed or 'missing / 未安装'})"

    @property
    def sentence(self) -> Sentence:
        """``torch==2.1 (2.0)``, or that it is missing."""
        return Sentence(
            f"{self.requirement} ({self.installed or 'missing'})", f"{self.requirement}（{self.installed or '未安装'}）"
        )


def listed(requirements: Iterable[Unmet]) -> Sentence:
    """Several in one sentence."""
    told = [each.sentence for each in requirements]
    return Sentence("; ".join(each.en for each in told), "；".join(each.zh for each in told))


def unmet(file: Path) -> list[Unmet]:
    """In the file's order. Lines that are no requirement (options, links) are passed over; no file asks for nothing."""
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
