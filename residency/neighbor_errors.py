"""Errors of other GPU servers that are asked for memory. Users import them from `residency.errors`."""

from __future__ import annotations

from dataclasses import dataclass

from .sentences import ResidencyError, Sentence


@dataclass(eq=False, repr=False)
class NeighborUnreachable(ResidencyError):
    """Another GPU server gave no answer, or none that a server of its kind gives. ``reason`` says what to check."""

    kind: str
    url: str
    reason: str

    def sentences(self) -> tuple[str, str]:
        reason = Sentence.of(self.reason)
        return (
            f"The GPU server {self.kind} at {self.url} did not answer as expected: {reason.en}",
            f"GPU 服务 {self.kind}（{self.url}）没有给出预期的响应：{reason.zh}",
        )


@dataclass(eq=False, repr=False)
class NeighborRefused(ResidencyError):
    """Another GPU server was asked to free or to take memory, and answered with an error.

    ``reason`` says what to check.
    """

    kind: str
    url: str
    reason: str

    def sentences(self) -> tuple[str, str]:
        reason = Sentence.of(self.reason)
        return (
            f"The GPU server {self.kind} at {self.url} refused: {reason.en}",
            f"GPU 服务 {self.kind}（{self.url}）拒绝了请求：{reason.zh}",
        )
