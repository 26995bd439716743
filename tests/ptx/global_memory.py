"""Global memory: tensors as regions, checks of each access, and traffic in sectors."""

from collections.abc import Iterator

import numpy as np

from ptx.lanes import Lanes
from ptx.numerics import UNSIGNED, Array, i4, i8, u1, u8
from ptx.report import Report, Touched, Traffic

SHIFT = 40  # an address is (region + 1) << SHIFT | offset
SECTOR = 32
UNKNOWN = 0xCDCDCDCDCDCDCDCD  # the result of a load with a fault


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
        lanes = self.lanes.of(mask)
        unknown = UNKNOWN & ((1 << 8 * size) - 1)
        out = [np.full(self.lanes.count, unknown, UNSIGNED[size]) for _ in range(vector)]
        width = size * vector
        for region, off, who in self._sound(address, width, lanes, "load", at):
            grains = region.grains(off, width)
            blank = region.unwritten[grains].any(1)
            if blank.any():
                what = f"of {region.name}, which is uninitialized"
                self.lanes.fault("uninitialized", at, who[blank], off[blank], width, what)
            me = self.lanes.in_grid[who][:, None]
            writer = region.writer[grains]
            bad = ((writer != -1) & (writer != me)).any(1)
            if bad.any():
                what = f"of {region.name}, which another thread of this launch wrote"
                self.lanes.fault("global race", at, who[bad], off[bad], width, what)
            region.reader[grains] = me
            words = region.data.view(UNSIGNED[size])
            for j in range(vector):
                out[j][who] = words[off // size + j]
        return out

    def store(
        self, address: Array, size: int, values: list[Array], mask: Array | None, at: int
    ) -> None:
        lanes, width = self.lanes.of(mask), size * len(values)
        for region, off, who in self._sound(address, width, lanes, "store", at):
            grains = region.grains(off, width)
            me = self.lanes.in_grid[who][:, None]
            reader, writer = region.reader[grains], region.writer[grains]
            bad = ((reader != -1) & (reader != me)).any(1)
            if bad.any():
                what = f"of {region.name}, which another thread of this launch read"
                self.lanes.fault("global race", at, who[bad], off[bad], width, what)
            words = region.data.view(UNSIGNED[size])
            new = np.stack([v[who] for v in values], 1)
            places = (off // size)[:, None] + np.arange(len(values))
            twice = ((writer != -1) & (writer != me)).any(1) & (words[places] != new).any(1)
            region.writer[grains] = np.broadcast_to(me, grains.shape)
            words[places] = new
            # Threads that write the same grain with this instruction.
            twice |= (region.writer[grains] != me).any(1) & (words[places] != new).any(1)
            if twice.any():
                what = f"of {region.name}, stored by two threads with different values"
                self.lanes.fault("global race", at, who[twice], off[twice], width, what)
            region.unwritten[grains] = False

    def _sound(
        self, address: Array, width: int, lanes: Array, kind: str, at: int
    ) -> Iterator[tuple[Region, Array, Array]]:
        """Check and count a request; yield the offsets and threads of valid accesses by region."""
        address = address[lanes]
        number = (address >> u8(SHIFT)).astype(i8)
        offset = (address & u8((1 << SHIFT) - 1)).astype(i8)
        for region_number in np.unique(number):
            mine = number == region_number
            off, who = offset[mine], lanes[mine]
            if not 0 < region_number <= len(self.regions):
                self.lanes.fault("out of bounds", at, who, address[mine], width, "in no tensor")
                continue
            region = self.regions[region_number - 1]
            good = off + width <= region.nbytes
            if not good.all():
                what = f"past the {region.nbytes} bytes of {region.name}"
                self.lanes.fault("out of bounds", at, who[~good], off[~good], width, what)
            misaligned = off % width != 0
            if misaligned.any():
                what = f"in {region.name}"
                self.lanes.fault("misaligned", at, who[misaligned], off[misaligned], width, what)
            off, who = off[good & ~misaligned], who[good & ~misaligned]
            if not len(off):
                continue
            if region.legal_before is not None:
                outside = region.legal_before[off + width] - region.legal_before[off] != width
                if outside.any():
                    what = f"in the storage of {region.name}, but outside its view"
                    self.lanes.fault("out of bounds", at, who[outside], off[outside], width, what)
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
