"""weights_digest: one 64-bit value for a set of weights, whatever their layout.

Every element adds (bits + 1) x a(row) x b(column) modulo 2^64. bits are its 16 or 32 bits as an
unsigned number; row and column are its place in its unpadded Hugging Face tensor (a vector has one
column); a(row) = mix(key + (row + 1) x 0x9E3779B97F4A7C15) | 1 and b(column) = mix((column + 1) x
0xD6E8FEB86659FD93) | 1. key is the 8-byte BLAKE2b of "name:dtype", big-endian; mix is the finalizer
of splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"). A sum
commutes, so shards, interleaved rows and any order give the same digest; padding is left out.

It finds accidents, not forgers. The difference d of two sets of weights goes unseen only if
sum d(i, j) a(i) b(j) = 0 modulo 2^64. One changed element is always seen, because a and b are odd
and |d| < 2^64. More of them, changed with no regard to a and b, cancel in about one case of 2^63;
if all d are multiples of 2^k, in one of 2^(63 - k): of 2^32 where only signs of fp32 numbers
changed, of 2^48 for those of bf16. Who knows the formula can make two sets of weights of one
digest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.weight_sync.coefficients import Coefficients, Rectangle
from samebit.weight_sync.mapping import ParamSpec
from samebit.weight_sync.objects import gather_objects

if TYPE_CHECKING:
    from samebit.weight_sync.digest_gpu import TileTable

_CHUNK = 1 << 16  # elements at a time: the temporaries stay in the CPU's cache
_INT_OF_SIZE = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Part:
    """The elements of a flattened parameter from `start` on.

    values: contiguous; what is not of the parameter's dtype counts as rounded to it.
    """

    name: str
    start: int
    values: Tensor


class Digester:
    """Digests the same memory again and again: its tables are made once.

    They are made anew if a tensor has moved or is another one. All are on one device.
    """

    def __init__(
        self,
        specs: Iterable[ParamSpec],
        params: Mapping[str, Tensor],
        parts: Sequence[Part] | None = None,
    ) -> None:
        """parts: what is digested in place of the parameters, such as fp32 copies of them."""
        self._specs = list(specs)
        self._params = params
        self._parts = parts
        self._layout: list[object] = []
        self._rectangles: list[list[Rectangle]] = []
        self._table = torch.zeros(0, dtype=torch.int64)
        self._total = torch.zeros(2, dtype=torch.int64)  # the sum, and where it is not finite
        self.all_finite = True
        """Of the last sum: whether no element, padding and replicas included, is NaN or Inf."""
        self._tiles: TileTable | None = None

    def sum(self) -> int:
        """This rank's summand of the digest; add the ranks' values modulo 2^64."""
        self.start()
        self.add()
        return self.finish()

    def digest(self, group: dist.ProcessGroup | None = None) -> str:
        """The digest as 16 hexadecimal digits.

        group: the ranks over which the weights are split; every rank gets the same.
        """
        return gather_digest(self.sum(), group)

    def start(self) -> None:
        """Begin a sum, to which the caller may add the parts one by one."""
        tensors = self._tensors()
        layout: list[object] = [(x.data_ptr(), x.stride(), x.dtype, x.device) for x in tensors]
        dtypes = [self._params[spec.name].dtype for spec in self._specs]
        if self._layout != [*layout, *dtypes]:
            self._make_tables(tensors)
            self._layout = [*layout, *dtypes]
        self._total.zero_()

    def add(self, part: int | None = None) -> None:
        """Add a part, or all of them, to the sum, in the current stream's order."""
        if self._tiles is not None:
            return self._tiles.add(self._total, part)
        for rectangles in self._rectangles if part is None else [self._rectangles[part]]:
            for rectangle in rectangles:
                _add_on_cpu(self._total, rectangle, self._table)
        return None

    def finish(self) -> int:
        """The sum so far, modulo 2^64."""
        total, not_finite = self._total.tolist()
        self.all_finite = not_finite == 0
        return total % (1 << 64)

    def _tensors(self) -> list[Tensor]:
        if self._parts is None:
            return [self._params[spec.name].detach() for spec in self._specs]
        return [part.values.detach() for part in self._parts]

    def _make_tables(self, tensors: Sequence[Tensor]) -> None:
        devices = {x.device for x in tensors}
        if len(devices) > 1:
            raise ValueError(f"weights on several devices: {', '.join(sorted(map(str, devices)))}")
        coefficients = Coefficients(self._specs, self._params)
        if self._parts is None:
            self._rectangles = [
                coefficients.of_param(spec.name, x)
                for spec, x in zip(self._specs, tensors, strict=True)
            ]
        else:
            self._rectangles = [
                coefficients.of_part(part.name, part.start, x.view(-1))
                for part, x in zip(self._parts, tensors, strict=True)
            ]
        device = devices.pop() if devices else torch.device("cpu")
        self._table, self._total = coefficients.table.to(device), self._total.to(device)
        self._tiles = None
        if device.type == "cuda":
            from samebit.weight_sync.digest_gpu import TileTable

            self._tiles = TileTable(self._rectangles, self._table)


def _add_on_cpu(total: Tensor, rectangle: Rectangle, table: Tensor) -> None:
    rows, columns = rectangle.values.shape
    row_factor = table[rectangle.row : rectangle.row + rows]
    column_factor = table[rectangle.column : rectangle.column + columns]
    bits_mask = (1 << (8 * rectangle.dtype.itemsize)) - 1
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = rectangle.values[start : start + step].to(rectangle.dtype)
        bits = part.view(_INT_OF_SIZE[part.element_size()]).to(torch.int64) & bits_mask
        in_rows = bits @ column_factor + column_factor.sum()
        total[0] += (in_rows * row_factor[start : start + step]).sum()
        total[1] += not part.isfinite().all()


def as_digest(sums: Iterable[int]) -> str:
    """The digest, as 16 hexadecimal digits, of the summands of all ranks."""
    return f"{sum(sums) % (1 << 64):016x}"


def gather_digest(own: int, group: dist.ProcessGroup | None) -> str:
    """as_digest of a group's summands, of which this rank has `own`; None: it is alone."""
    return as_digest([own] if group is None else gather_objects(own, group))


def digest_sum(specs: Iterable[ParamSpec], params: Mapping[str, Tensor]) -> int:
    """This rank's summand of the digest; add the ranks' values modulo 2^64."""
    return Digester(specs, params).sum()


def weights_digest(
    specs: Iterable[ParamSpec], params: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> str:
    """The digest of whole parameters as 16 hexadecimal digits.

    group: the ranks over which they are split; every rank gets the same.
    """
    return Digester(specs, params).digest(group)
