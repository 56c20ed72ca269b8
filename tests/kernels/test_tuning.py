"""Which implementation of a product is taken: a card's own table, others like it, a rule."""

import json

import pytest
import torch

from samebit.kernels.gpu import tuning
from samebit.kernels.gpu.cublaslt import Answer
from samebit.kernels.gpu.skinny import Tile
from samebit.kernels.gpu.tuning import DEFAULT, Choice, Key, by_rule, own_choices, tiles_of_others

KEYS = [
    Key(n, k, rows, gated, fp32)
    for n in (48, 100, 1024, 3072, 6144, 24576, 151936)
    for k in (64, 96, 576, 4096, 12288)
    for rows in (16, 32, 64, 128, 256)
    for gated, fp32 in ((False, False), (True, False), (False, True))
]
CARDS = {"H100": (132, 232448), "A100": (108, 166912), "RTX 4090": (128, 101376)}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """(ours, this machine's), both empty."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "ours")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tuning.TABLES, tuning.user_tables()
    for folder in made:
        folder.mkdir(parents=True)
    return made


def write(path, choices, measured=(), arch="sm_90"):
    rows = [vars(key) | {"best": 1.0} for key in (*choices, *measured)]
    table = {"architecture": arch, "linear": tuning.to_json(choices), "measured_us": rows}
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("card", CARDS)
def test_the_rule_gives_what_fits(card):
    """Tiles divide the product, and their stages lie in shared memory; else cuBLASLt."""
    num_sms, shared = CARDS[card]
    tiled = [(key, choice.tile) for key in KEYS if (choice := by_rule(key, num_sms, shared)).tile]
    assert len(tiled) > 50
    assert all(by_rule(key, num_sms, shared) == DEFAULT for key in KEYS if key.rows > 64)
    for key, tile in tiled:
        assert tile.divides(key.n, key.k), (key, tile)
        width = tile.columns * (2 if key.gated else 1)
        assert 2 * tile.block_k * (width + key.rows) * tile.stages <= shared, (key, tile)
        assert tile.prefetch <= key.k, (key, tile)


def test_the_rule_fills_the_card():
    """What a card of 132 multiprocessors was found to like, for the products of 8B at 16 rows."""
    tiles = {n: by_rule(Key(n, 4096, 16), *CARDS["H100"]).tile for n in (4096, 6144, 24576)}
    assert {n: tile.block_n for n, tile in tiles.items()} == {4096: 32, 6144: 64, 24576: 64}
    assert by_rule(Key(4096, 4096, 128), *CARDS["H100"]) == DEFAULT
    assert by_rule(Key(100, 4096, 16), *CARDS["H100"]) == DEFAULT


def test_a_table_says_what_it_measured(folders):
    """Also that the default was best."""
    ours, _ = folders
    tiled, answered, plain = (Key(64, 64, rows) for rows in (16, 32, 64))
    choices = {tiled: Choice(Tile(32, 64, 4, 3)), answered: Choice(cublaslt=Answer(2))}
    write(ours / "a_card.json", choices, [plain])
    assert own_choices("A card") == {**choices, plain: DEFAULT}
    assert own_choices("another") == {}


def test_a_card_or_model_that_nobody_measured_is_said(folders, monkeypatch):
    """With the command that measures it, and nothing where a table knows some of the products."""
    ours, own = folders
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    device = torch.device("cuda")
    words = tuning.hint(device, [(64, 64), (128, 64)])
    assert "no product of this model was measured on A card" in words
    assert "samebit bench kernels --tune model=FOLDER" in words
    write(ours / "a_card.json", {}, [Key(256, 64, 16)])
    assert tuning.hint(device, [(64, 64), (128, 64)]) == words
    write(own / "a_card.json", {}, [Key(128, 64, 16)])
    assert tuning.hint(device, [(64, 64), (128, 64)]) is None


def test_this_machines_table_counts_before_ours(folders):
    """Of the products that it knows."""
    ours, own = folders
    key, other = Key(64, 64, 16), Key(64, 64, 32)
    tile = Choice(Tile(32, 64, 4, 3))
    write(ours / "a_card.json", {key: tile, other: tile})
    write(own / "a_card.json", {}, [key])
    assert own_choices("A card") == {key: DEFAULT, other: tile}


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"measured_us": [], "linear": [{"tile": {"x": 1}}]}']
)
def test_a_damaged_table_is_not_used(folders, text, caplog):
    """And says so: it may be another version's, and no engine is to fail for it."""
    ours, own = folders
    key = Key(64, 64, 16)
    write(ours / "a_card.json", {key: Choice(Tile(32, 64, 4, 3))})
    (own / "a_card.json").write_text(text)
    assert set(own_choices("A card")) == {key}
    assert "a_card.json is no tuning table of this version" in caplog.text


def test_tiles_come_from_cards_of_the_same_architecture(folders):
    """Not answers of cuBLASLt's, and nothing of another architecture or of the card itself."""
    ours, _ = folders
    tiled, answered, older, own = (Key(64, 64, rows) for rows in (16, 32, 64, 128))
    tile = Choice(Tile(32, 64, 4, 3))
    write(ours / "like_it.json", {tiled: tile, answered: Choice(cublaslt=Answer(2))})
    write(ours / "older.json", {older: tile}, arch="sm_80")
    write(ours / "a_card.json", {own: tile})
    assert tiles_of_others("A card", "sm_90") == {tiled: tile, answered: DEFAULT}


def test_our_tables_name_their_architecture():
    for path in tuning.TABLES.glob("*.json"):
        assert json.loads(path.read_text())["architecture"].startswith("sm_"), path
        assert own_choices(path.stem.replace("_", " "))
