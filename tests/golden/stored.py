"""The kept results: one file for each numerics profile, and how a run is held against them."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from samebit.kernels.profile import NumericsProfile, numerics_profile

FOLDER = Path(__file__).parent
# How far floats may lie apart, relatively or absolutely, on another CPU model, whose fp32 sums have
# other orders. Without AVX and MKL's fast paths they lie at most 2e-5 or 1e-5 apart.
RELATIVE, ABSOLUTE = 2e-4, 2e-5
_FLOAT = ("-0x", "0x")


def profile_of(device: str) -> NumericsProfile:
    """The profile that a run on this machine has."""
    return numerics_profile(torch.device(device))


def file_of(profile: NumericsProfile) -> Path:
    """Where the results under a profile are kept, if they are."""
    return FOLDER / f"{profile.digest}.json"


def text_of(profile: NumericsProfile, values: dict) -> str:
    """A file's content: the profile and its values, a line for each list of numbers."""
    text = json.dumps({"profile": asdict(profile), "values": values}, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def read(file: Path) -> dict:
    """The values of a file."""
    return json.loads(file.read_text())["values"]


def same_contract(profile: NumericsProfile) -> list[Path]:
    """Files of the profile's device type and contract version, of any model of it."""
    found = {file: json.loads(file.read_text())["profile"] for file in FOLDER.glob("*.json")}
    wanted = profile.device_type, profile.contract_version
    return [
        file for file, p in sorted(found.items())
        if (p["device_type"], p["contract_version"]) == wanted
    ]  # fmt: skip


def differences(found: Any, kept: Any, exact: bool = True, path: str = "") -> list[str]:
    """Where a run's values are not the kept ones; none means that they are.

    exact: to the bit. Else floats need only be close and digests are left out.
    """
    if isinstance(found, dict) and isinstance(kept, dict):
        if found.keys() != kept.keys():
            return [f"{path}: {sorted(found)}, kept: {sorted(kept)}"]
        pairs = [(f"{path}/{key}", found[key], kept[key]) for key in kept]
    elif isinstance(found, list) and isinstance(kept, list) and len(found) == len(kept):
        pairs = [(f"{path}/{i}", *pair) for i, pair in enumerate(zip(found, kept, strict=True))]
    elif found == kept or (not exact and _close(found, kept)):
        return []
    else:
        return [f"{path}: {_shown(found)}, kept: {_shown(kept)}"]
    return [line for where, *pair in pairs for line in differences(*pair, exact, where)]


def _close(found: Any, kept: Any) -> bool:
    if not (isinstance(found, str) and isinstance(kept, str)):
        return False
    if found.startswith("digest ") and kept.startswith("digest "):
        return True
    if not (found.startswith(_FLOAT) and kept.startswith(_FLOAT)):
        return False
    a, b = float.fromhex(found), float.fromhex(kept)
    return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith(_FLOAT):
        return f"{value} ({float.fromhex(value):.9g})"
    return repr(value)
