"""Keep what tests/golden/program.py gives on this machine, for tests/test_golden.py:

    .venv/bin/python tests/golden/make.py [device=cuda]

Run by hand, once for every numerics profile that is to be held to the bit: another CPU or GPU
model, another torch. A file that is there is never overwritten. If values have changed under an
equal profile, bits have: raise CONTRACT_VERSION in kernels/contract.py, which gives the profile
another name, and replace the old version's files. Only where the program itself asks for something
else, and nothing that it asked for before has changed, remove the file and make it again.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from golden import program, stored


def main(device: str) -> int:
    """Run the program and keep its values; 1 if others are kept already."""
    torch.set_num_threads(1)
    profile = stored.profile_of(device)
    file = stored.file_of(profile)
    with tempfile.TemporaryDirectory() as folder:
        values = program.run(Path(folder), device)
    if file.exists():
        changed = stored.differences(values, stored.read(file))
        print("\n".join(changed[:20]) or f"{file} is as it should be")
        if changed:
            print(
                f"{len(changed)} values are not those of {file}, which was left as it is. If bits "
                "have changed, raise CONTRACT_VERSION in kernels/contract.py; see this program's "
                "docstring"
            )
        return int(bool(changed))
    file.write_text(stored.text_of(profile, values))
    print(f"made {file} for {profile.architecture}, contract version {profile.contract_version}")
    return 0


if __name__ == "__main__":
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
    sys.exit(main(**({"device": "cpu"} | arguments)))
