"""Global memory: tensors as regions, checks of each access, and traffic in sectors."""

from collections.abc import Iterator

import numpy as np

from ptx.lanes import Lanes
from ptx.numerics import UNSIGNED, Array, i4, i8, u1, u8
from ptx.report import Report, Touched, Traffic

SHIFT = 40  # an address is (region + 1) << SHIFT | offset
SECTOR = 32


class Region:
    """A storage. `legal` marks the bytes that the launch's tensors reach; `unwritten` marks the
    grains (of `grain` bytes) that are uninitialized."""

    def __init__(
        self,
        name: str,
        data: bytes,
        grain: int,
        legal: Array | None = None,
        unwritten: Array | None = None,
    ) -> None:
        self.name, self.nbytes, self.grain = name, len(data), grain
        self.data = np.concatenate([np.frombuffer(data, u1), np.zeros(-len(data) % 64, u1)])
        self.legal_before = None
        if legal is not None and not legal.all():
            self.legal_before = np.concatenate([[0], np.cumsum(legal, dtype=i8)])
        grains = -(-len(self.data) // grain)
        self.unwritten = np.zeros(grains, bool)
        if unwritten is not None:
            self.unwritten[: len(unwritten)] = unwritten
        # The last thread that wrote each grain in this launch, and the last that read it.
        self.writer, self.reader = np.full(grains, -1, i4), np.full(grains, -1, i4)
        self.sectors = {
            kind: np.zeros(len(self.data) // SECTOR + 1, bool) for kind in ("load", "store")
        }

    @property
    def written(self) -> bool:
        return bool(self.sectors["store"].any())

    def touched(self, kind: str) -> Touched:
        who = self.reader if kind == "load" else self.writer
        return Touched(int((who != -1).sum()) * self.grain, int(self.sectors[kind].sum()))

    def grains(self, offsets: Array, width: int) -> Array:
        first = (offsets // self.grain)[:, None]
        return first + np.arange(max(1, width // self.grain))


class GlobalMemory:
    def __init__(self, report: Report) -> None:
        self.report = report
        self.regions: list[Region] = []
        self.lanes: Lanes  # of the blocks that run

    def add(self, region: Region) -> int:
        """Add a region and return its address."""
        self.regions.append(region)
        return len(self.regions) << SHIFT

    def finish(self) -> None:
        for region in self.regions:
            for kind in ("load", "store"):
                self.report.touched[region.name, kind] = region.touched(kind)

    def load(
        self, address: Array, size: int, vector: int, mask: Array | None, at: int
    ) -> list[Array]:
        lanes, width = self.lanes, size * vector
        out = lanes.unknown(size, vector)
        for region, off, who in self._sound(address, width, lanes.of(mask), "load", at):
            grains, me = region.grains(off, width), lanes.in_grid[who][:, None]
            what = f"of {region.name}, which is uninitialized"
            lanes.check(region.unwritten[grains], "uninitialized", at, who, off, width, what)
            what = f"of {region.name}, which another thread of this launch wrote"
            written = _others(region.writer[grains], me)
            lanes.check(written, "global race", at, who, off, width, what)
            region.reader[grains] = me
            words = region.data.view(UNSIGNED[size])
            for j in range(vector):
                out[j][who] = words[off // size + j]
        return out

    def store(
        self, address: Array, size: int, values: list[Array], mask: Array | None, at: int
    ) -> None:
        lanes, width = self.lanes, size * len(values)
        for region, off, who in self._sound(address, width, lanes.of(mask), "store", at):
            grains, me = region.grains(off, width), lanes.in_grid[who][:, None]
            what = f"of {region.name}, which another thread of this launch read"
            read = _others(region.reader[grains], me)
            lanes.check(read, "global race", at, who, off, width, what)
            words = region.data.view(UNSIGNED[size])
            new = np.stack([v[who] for v in values], 1)
            places = (off // size)[:, None] + np.arange(len(values))
            written = _others(region.writer[grains], me).any(1)
            twice = written & (words[places] != new).any(1)
            region.writer[grains] = np.broadcast_to(me, grains.shape)
            words[places] = new
            # Threads that write the same grain with this instruction.
            twice |= (region.writer[grains] != me).any(1) & (words[places] != new).any(1)
            what = f"of {region.name}, stored by two threads with different values"
            lanes.check(twice, "global race", at, who, off, width, what)
            region.unwritten[grains] = False

    def _sound(
        self, address: Array, width: int, lanes: Array, kind: str, at: int
    ) -> Iterator[tuple[Region, Array, Array]]:
        """Check and count a request; yield the offsets and threads of valid accesses by region."""
        address = address[lanes]
        number = (address >> u8(SHIFT)).astype(i8)
        offset = (address & u8((1 << SHIFT) - 1)).astype(i8)
        nowhere = (number < 1) | (number > len(self.regions))
        self.lanes.check(nowhere, "out of bounds", at, lanes, address, width, "in no tensor")
        for region_number in np.unique(number[~nowhere]):
            region, mine = self.regions[region_number - 1], number == region_number
            off, who = offset[mine], lanes[mine]
            past, misaligned = off + width > region.nbytes, off % width != 0
            what = f"past the {region.nbytes} bytes of {region.name}"
            self.lanes.check(past, "out of bounds", at, who, off, width, what)
            what = f"in {region.name}"
            self.lanes.check(misaligned, "misaligned", at, who, off, width, what)
            good = ~(past | misaligned)
            off, who = off[good], who[good]
            if not len(off):
                continue
            if region.legal_before is not None:
                outside = region.legal_before[off + width] - region.legal_before[off] != width
                what = f"in the storage of {region.name}, but outside its view"
                self.lanes.check(outside, "out of bounds", at, who, off, width, what)
            self._count(region, off, who, width, kind)
            yield region, off, who

    def _count(self, region: Region, off: Array, who: Array, width: int, kind: str) -> None:
        sector = np.full(self.lanes.count, -1, i8)
        sector[who] = off // SECTOR
        by_warp = np.sort(sector.reshape(-1, 32), axis=1)
        requested = by_warp >= 0
        another = np.ones_like(requested)
        another[:, 1:] = by_warp[:, 1:] != by_warp[:, :-1]
        asked = requested.sum(1)
        self.report.traffic[region.name, kind] += Traffic(
            requests=int((asked > 0).sum()),
            bytes=len(who) * width,
            sectors=int((requested & another).sum()),
            fewest=int((-(-asked * width // SECTOR)).sum()),
        )
        region.sectors[kind][off // SECTOR] = True


def _others(thread: Array, me: Array) -> Array:
    """Whether the last thread that reached a grain is another one."""
    return (thread != -1) & (thread != me)
