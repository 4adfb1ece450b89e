"""The mask bank: every task's mask, packed, in memory at most once, and beyond a limit only in the store.

A mask lies in an array of its own, and what the kernels get is a list of addresses: they go to each mask as fast as
through one large buffer (measured), a new version adds a pointer and copies nothing, and nobody who still reads an
older version can see it change. A version's memory goes when its last reader has gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
from cachetools import LRUCache

from supsupd.learning.kernels import Located

Key = tuple[int, int]
"""A stored mask: task id and version."""
Fetch = Callable[[Sequence[Key]], Sequence[np.ndarray]]
"""Reads stored masks, uint8 (mask_bytes,) each, in the order of the keys."""
READ_MASKS = 64
"""Masks that are read from the store at a time when all of them are looked at."""


class Mask:
    """One version of a task's mask: its bits, or where they can be read.

    `key`: None until it is stored. `nbytes`: of the packed mask.
    """

    __slots__ = ("__weakref__", "bank", "hot", "key", "nbytes")

    def __init__(self, packed: np.ndarray) -> None:
        packed = packed.view()
        packed.flags.writeable = False
        self.hot: np.ndarray | None = packed
        self.bank: MaskBank | None = None
        self.key: Key | None = None
        self.nbytes = packed.nbytes

    @property
    def packed(self) -> np.ndarray:
        """uint8 (mask_bytes,), from memory or from the store."""
        packed = self.hot  # read once: another thread may take it out of memory
        if packed is not None:
            return packed
        assert self.bank is not None
        return self.bank.load([self])[0]


class _Hot(LRUCache[int, Mask]):
    """The newest stored masks by task id, those used last in memory; what falls out forgets its bits."""

    def popitem(self) -> tuple[int, Mask]:
        task_id, mask = super().popitem()
        mask.hot = None
        return task_id, mask


class MaskBank:
    """Keeps the masks that were used last in memory.

    Args:
        limit: bytes of packed masks in memory.
        fetch: reads masks that are not.
    """

    def __init__(self, limit: int, fetch: Fetch) -> None:
        self.limit = limit
        self._fetch = fetch
        self._hot = _Hot(limit, getsizeof=lambda mask: mask.nbytes)
        self._lock = threading.Lock()
        self.full = False
        """Whether some masks are only in the store: from then on it counts which were used last."""

    @property
    def nbytes(self) -> int:
        """Bytes of the stored masks in memory."""
        return int(self._hot.currsize)

    def __len__(self) -> int:
        """How many of them are in memory."""
        return len(self._hot)

    def keep(self, mask: Mask, key: Key) -> Mask:
        """The same mask, which the store has by now: it may leave memory. An older version of the task is let go."""
        mask.key, mask.bank = key, self
        with self._lock:
            self._remember(mask, key[0])
        return mask

    def cold(self, key: Key, nbytes: int) -> Mask:
        """A stored mask whose bits nobody has read yet."""
        mask = Mask(np.empty(0, np.uint8))
        mask.hot, mask.bank, mask.key, mask.nbytes = None, self, key, nbytes
        self.full = True
        return mask

    def warm(self, masks: Sequence[Mask]) -> None:
        """Reads as many of these stored masks, all of one size, as there is room for, the last ones of them.

        What is in memory is not read again: after a failure it goes on where it was.
        """
        room = min(len(masks), self.limit // masks[0].nbytes) if masks else 0
        wanted = [mask for mask in masks[len(masks) - room :] if mask.hot is None]
        for start in range(0, len(wanted), READ_MASKS):
            part = wanted[start : start + READ_MASKS]
            keys = [mask.key for mask in part if mask.key is not None]
            for mask, key, packed in zip(part, keys, self._fetch(keys), strict=True):
                mask.hot = packed
                self.keep(mask, key)
        self.full = room < len(masks)

    def drop(self, task_id: int) -> None:
        """A task that is no longer in use: its mask goes with its last reader."""
        with self._lock:
            self._hot.pop(task_id, None)

    def load(self, masks: Sequence[Mask], retain: bool = True) -> list[np.ndarray]:
        """The packed masks, those that are not in memory read at once; whether they stay there is up to `retain`."""
        found = {place: packed for place, mask in enumerate(masks) if (packed := mask.hot) is not None}
        missing = [(place, mask.key) for place, mask in enumerate(masks) if place not in found and mask.key]
        if missing:
            read = self._fetch([key for _, key in missing])
            found |= {place: packed for (place, _), packed in zip(missing, read, strict=True)}
        if retain and self.full:
            with self._lock:
                for place, mask in enumerate(masks):
                    self._used(mask, found[place])
        return [found[place] for place in range(len(masks))]

    def _used(self, mask: Mask, packed: np.ndarray) -> None:
        """Older versions, which some reader still has, are none of the bank's business."""
        if mask.key is not None and self._hot.get(mask.key[0], mask) is mask:
            mask.hot = packed
            self._remember(mask, mask.key[0])

    def _remember(self, mask: Mask, task_id: int) -> None:
        self._hot.pop(task_id, None)
        if mask.nbytes > self.limit:
            mask.hot = None
        else:
            self.full |= self._hot.currsize + mask.nbytes > self.limit
            self._hot[task_id] = mask
        self.full |= mask.hot is None


class Masks(Sequence[Mask]):
    """The masks of some tasks, in order; immutable."""

    def __init__(self, masks: Sequence[Mask]) -> None:
        self._masks = tuple(masks)
        self._bank = next((mask.bank for mask in self._masks if mask.bank is not None), None)

    @classmethod
    def of(cls, packed: Sequence[np.ndarray]) -> Masks:
        """Of packed masks that only memory has, uint8 (mask_bytes,) each."""
        return cls([Mask(mask) for mask in packed])

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, place: int) -> Mask:  # type: ignore[override]  # for slices there is `take`
        return self._masks[place]

    def take(self, places: np.ndarray) -> Masks:
        """Those at `places` (m,)."""
        return self if len(places) == len(self) else Masks([self._masks[place] for place in places.tolist()])

    def load(self, retain: bool = True) -> Located:
        """All of them at once."""
        if self._bank is None or not self._bank.full:
            return self._resident
        return Located.of(self._bank.load(self._masks, retain))

    @cached_property
    def _resident(self) -> Located:
        return Located.of([mask.packed for mask in self._masks])

    def chunks(self, size: int) -> Iterator[tuple[slice, Located]]:
        """Up to `size` of them at a time; those read from the store for this do not stay in memory."""
        if self._bank is not None and self._bank.full:
            size = min(size, READ_MASKS)
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            if len(self) > size and self._bank is not None and self._bank.full:
                yield part, Masks(self._masks[part]).load(retain=False)
            else:
                yield part, self.load().part(part.start, part.stop)
