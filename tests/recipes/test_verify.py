"""samebit verify: pieces of a run, and a digest by which two runs can be compared."""

import json
import math

import pytest

from samebit.recipes import cli
from samebit.recipes.verification.properties import PROPERTIES
from samebit.recipes.verification.subject import Result


def verify(folder, name, *arguments):
    """The report of a run on the tiny models."""
    where = [f"output_dir={folder}", f"run_name={name}", "device=cpu"]
    assert cli.main(["verify", *where, *arguments]) == 0
    return json.loads((folder / name / "verify.json").read_text())


def test_chosen_properties_and_equal_digests(tmp_path, capsys):
    """Asked for in any order, measured in that of a full run; the same run finds the same bits."""
    first = verify(tmp_path, "first", "properties=[trainer,group]")
    names = [[r["name"] for r in group] for group in first["models"].values()]
    assert names == [["group vs single", "trainer vs rollout"]] * 2
    assert f"outcomes_digest {first['outcomes_digest']}" in capsys.readouterr().out
    again = verify(tmp_path, "again", "properties=[trainer,group]")
    assert again["models"] == first["models"]
    assert again["outcomes_digest"] == first["outcomes_digest"]
    other = verify(tmp_path, "other", "properties=[trainer]", "seed=1")
    digests = [
        r["outcomes_digest"] for x in (first, other) for g in x["models"].values() for r in g
    ]
    assert len(set(digests)) == len(digests)


def test_an_unknown_property_names_the_known_ones(capsys):
    assert cli.main(["verify", "properties=[batch_size,speed]"]) == 2
    error = capsys.readouterr().err
    assert "no speed; there are batch_size" in error
    assert all(check.__name__ in error for check in PROPERTIES)


@pytest.mark.parametrize(
    ("values", "others"),
    [
        ([(3, -1.5)], [(4, -1.5)]),
        ([-1.5], [math.nextafter(-1.5, 0)]),
        ([0.0], [-0.0]),
        ([1.0, 2.0], [2.0, 1.0]),
        ([1.0, 2.0], [1.0]),
    ],
    ids=["token", "one ulp", "sign of zero", "order", "length"],
)
def test_the_digest_is_of_the_bits_found(values, others):
    def digest(*calls):
        result = Result("any")
        for found, truth, case in calls:
            result.compare_values(found, truth, case)
        return result.outcomes_digest

    same = digest((values, values, "case"))
    assert digest((values, others, "case")) == same
    assert digest((others, values, "case")) != same
    assert digest((values, values, "another case")) != same
    assert digest((values, values, "case"), ([], [], "case")) != same
