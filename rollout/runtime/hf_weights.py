"""Weights by their Hugging Face names: taken into an update's session, and read from it."""

from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor

from samebit.rollout.runtime.weights import EMBEDDING, HEAD
from samebit.weight_sync.buckets import copy_apart
from samebit.weight_sync.mapping import hf_shapes, regions_of
from samebit.weight_sync.objects import gather_objects
from samebit.weight_sync.session import UpdateSession
from samebit.weight_sync.types import ParamMeta
from samebit.weight_sync.update_group import Broadcasts


class HFWeights:
    """The parameters of a session as whole Hugging Face tensors, which no rank need hold whole."""

    def __init__(self, session: UpdateSession) -> None:
        self._session = session
        self._shapes = hf_shapes(session.specs)
        self._dtypes = {n: session.params[s.name].dtype for s in session.specs for n in s.hf_shapes}
        self._tied = HEAD not in self._shapes and EMBEDDING in self._shapes

    def require_fit(self, given_name: str, dtype: str, shape: Sequence[int]) -> None:
        """Break the update if a tensor does not fit, before any comes. dtype may have "torch."."""
        name = self._own_name(given_name)
        if name not in self._shapes:
            self._session.refuse(f"unknown tensor {name}{self._hint(name, self._shapes)}")
        own = f"{self._shapes[name]} {self._dtypes[name]}"
        given = f"{tuple(shape)} torch.{str(dtype).removeprefix('torch.')}"
        if given != own:
            self._session.refuse(f"{given_name} is {own} here and {given} in the update")

    def take(self, given_name: str, source: Tensor | Broadcasts) -> None:
        """Put a tensor that fits into its places, or one that is broadcast next.

        Of a model that ties its head to its embedding both names may come; whichever comes second
        has to equal what came first.
        """
        name = self._own_name(given_name)
        found = regions_of(self._session.specs, name, self._dtypes[name])
        metas = [meta for meta, _ in found]
        is_copy = self._tied and name == EMBEDDING and self._session.holds(metas)
        places = [] if is_copy else self._session.expect(metas)
        whole = self._received(name, places, source) if isinstance(source, Broadcasts) else source
        if is_copy:
            self._require_same(found, whole)
            return
        with torch.no_grad():
            for place, (_, part) in zip(places, found, strict=True):
                copy_apart(whole[part], place)
        self._session.arrived(metas)

    def _own_name(self, name: str) -> str:
        """The name of what holds it: a tied head is the embedding."""
        return EMBEDDING if self._tied and name == HEAD else name

    def _require_same(
        self, found: Sequence[tuple[ParamMeta, tuple[slice, ...]]], whole: Tensor
    ) -> None:
        for meta, part in found:
            held = meta.region_of(self._session.params[meta.name])
            if held is None or not torch.equal(held, whole[part].to(held.device)):
                self._session.refuse(f"{HEAD} is not {EMBEDDING}, and this model ties them")

    def whole(self, name: str) -> Tensor:
        """A copy of a Hugging Face tensor, on the CPU if ranks share it, or of a parameter.

        The ranks have to ask for it alike. Raises KeyError that names the nearest.
        """
        params, group = self._session.params, self._session.group
        if name in params:
            return params[name].detach().clone()
        name = self._own_name(name)
        if name not in self._shapes:
            raise KeyError(f"no weight {name}{self._hint(name, [*params, *self._shapes])}")
        own = []
        for meta, part in regions_of(self._session.specs, name, self._dtypes[name]):
            region = meta.region_of(params[meta.name])
            assert region is not None
            own.append(([(side.start, side.stop) for side in part], region.detach()))
        if group is None:
            parts = own
        else:
            gathered = gather_objects([(place, part.cpu()) for place, part in own], group)
            parts = [part for parts in gathered for part in parts]
        whole = torch.empty(self._shapes[name], dtype=self._dtypes[name], device=parts[0][1].device)
        for place, region in parts:
            whole[tuple(slice(*side) for side in place)] = region
        return whole

    def _received(self, name: str, places: Sequence[Tensor], broadcasts: Broadcasts) -> Tensor:
        """The whole tensor that is broadcast next: in its place, if that is one for the whole."""
        shape = self._shapes[name]
        device = next(iter(self._session.params.values())).device
        if broadcasts.is_of_host:
            device = torch.device("cpu")
        whole = places[0] if len(places) == 1 else None
        if whole is None or whole.shape != shape or not whole.is_contiguous():
            whole = torch.empty(shape, dtype=self._dtypes[name], device=device)
        elif whole.device != device:
            whole = torch.empty_like(whole, device=device)
        broadcasts.receive(whole.detach())
        return whole

    @staticmethod
    def _hint(name: str, known: Sequence[str] | dict[str, tuple[int, ...]]) -> str:
        nearest = get_close_matches(name, known, n=1)
        return f"; the nearest is {nearest[0]}" if nearest else ""
