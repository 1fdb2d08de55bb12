"""One device's memory, shared by the engines on it: who has how much, and a refusal in words when it is spent."""

from __future__ import annotations

import threading

from models.artifact import ArtifactError

LEAST_SLOTS = 16
"""Fewer rows than this at once are not worth a device."""
_SHARE = 0.5
"""Of what is left, rows may take so much: the rest is for batches in work, graphs, and the artifacts that are still to come."""


class DeviceMemory:
    """The budget of one device.

    Args:
        total_bytes: what all engines together may use; None = what the device turns out to have (`discover`).
    """

    def __init__(self, total_bytes: int | None = None):
        self.total_bytes = total_bytes
        self._taken: dict[object, int] = {}
        self._lock = threading.Lock()

    @property
    def left_bytes(self) -> int:
        return (self.total_bytes or 0) - sum(self._taken.values())

    def discover(self, free_bytes: int) -> None:
        """Tells what the device has; the first engine on it does. A budget that was set is kept."""
        with self._lock:
            if self.total_bytes is None:
                self.total_bytes = free_bytes

    def take(self, owner: object, size: int, what: str) -> None:
        """Reserves `size` bytes for `owner`.

        Raises:
            ArtifactError: there are not so many left.
        """
        with self._lock:
            if size > self.left_bytes:
                raise ArtifactError(
                    f"{what} needs {_mb(size)} MB of device memory, {_mb(self.left_bytes)} of {_mb(self.total_bytes or 0)} MB are left: "
                    "raise ELBOW_DEVICE_MEMORY_MB or serve fewer models"
                )
            self._taken[owner] = self._taken.get(owner, 0) + size

    def slots(self, owner: object, wanted: int, slot_bytes: int, what: str) -> int:
        """Reserves room for `wanted` slots, or for as many as the owner's share allows, and returns how many.

        Raises:
            ArtifactError: not even `LEAST_SLOTS` fit.
        """
        fitting = int(self.left_bytes * _SHARE) // slot_bytes
        given = min(wanted, max(fitting, min(wanted, LEAST_SLOTS)))
        self.take(owner, given * slot_bytes, f"{what}: room for {given} rows")
        return given

    def give_back(self, owner: object) -> None:
        with self._lock:
            self._taken.pop(owner, None)


def _mb(size: int) -> str:
    return f"{size / 2**20:.1f}"
