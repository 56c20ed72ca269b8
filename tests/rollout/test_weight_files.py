"""Which files of a model folder are read, and what is refused because it is not plain."""

import json
import re
import shutil

import pytest
import torch
from helpers import edit_config, edit_tensors
from safetensors.torch import load_file, save_file

from samebit.recipes.models.tiny_model import write_config, write_weights
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime import weight_files
from samebit.rollout.runtime.weights import WeightLoadError, open_safetensors

NORM, HEAD = "model.norm.weight", "lm_head.weight"
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A very small model in one file. Do not write to it."""
    path = tmp_path_factory.mktemp("weights") / "whole"
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    write_config(path, "llama", **shape, **heads, tie_word_embeddings=False)
    write_weights(path, seed=1)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    """A copy in one file."""
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def sharded(folder):
    """A copy in two shards with an index; lm_head.weight is in the first."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {FIRST: names[:4], SECOND: names[4:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    write_index(folder, {name: file for file, part in parts.items() for name in part})
    return folder


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def opened(folder):
    """A reader of whole tensors."""
    read = open_safetensors(folder, load_model_config(folder).param_specs())
    return lambda name: read(name, (slice(0, None),))


def refuses(folder, *parts, error=WeightLoadError):
    """One line that holds all these parts."""
    with pytest.raises(error) as caught:
        opened(folder)
    for part in parts:
        assert part in str(caught.value)


def older(folder, file, value=7.0):
    """A file of the same tensors with other numbers."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.full_like(t, value) for name, t in tensors.items()}, folder / file)


def test_the_single_file_is_read_whatever_lies_beside_it(folder, caplog):
    """As transformers does; what is not read is said, once."""
    weight_files._say_once.cache_clear()
    expected = load_file(folder / "model.safetensors")[NORM]
    for file in ("a.safetensors", "z.safetensors", FIRST):
        older(folder, file)
    for _ in range(2):
        assert torch.equal(opened(folder)(NORM), expected)
    [said] = [record.getMessage() for record in caplog.records]
    assert said.endswith(f"not read, as in transformers: a.safetensors, {FIRST}, z.safetensors")


def test_shards_with_and_without_their_index(sharded, whole, caplog):
    expected = load_file(whole / "model.safetensors")
    older(whole, sharded / "consolidated.safetensors")
    read = opened(sharded)
    assert all(torch.equal(read(name), tensor) for name, tensor in expected.items())
    assert "not read, as in transformers: consolidated.safetensors" in caplog.text
    for file in (INDEX, "consolidated.safetensors"):
        (sharded / file).unlink()
    read = opened(sharded)
    assert all(torch.equal(read(name), tensor) for name, tensor in expected.items())


def test_a_single_file_of_any_name(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert opened(folder)(NORM).shape == (8,)


def test_an_index_of_the_single_file_is_no_second_set(folder):
    """Some converters always write one."""
    names = load_file(folder / "model.safetensors")
    write_index(folder, dict.fromkeys(names, "model.safetensors"))
    assert opened(folder)(NORM).shape == (8,)


def test_two_sets(sharded, whole):
    """Whichever were taken might be the older one."""
    shutil.copy(whole / "model.safetensors", sharded)
    refuses(sharded, "holds both model.safetensors and model.safetensors.index.json")
    (sharded / SECOND).unlink()
    hint = "if model.safetensors is the model, take the index away"
    refuses(sharded, f"absent: {SECOND}; {hint}", error=FileNotFoundError)


def test_files_that_are_no_one_set(sharded):
    (sharded / INDEX).unlink()
    shutil.copy(sharded / SECOND, sharded / "model-00002-of-00003.safetensors")
    refuses(sharded, "model-00002-of-00003.safetensors are no one set", FIRST)
    (sharded / SECOND).unlink()
    refuses(sharded, "are no one set")
    (sharded / FIRST).unlink()
    refuses(sharded, "lacks model-00001-of-00003.safetensors, model-00003-of-00003.safetensors of")


def test_two_files_of_other_names(folder):
    older(folder, "b.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    refuses(folder, "a.safetensors, b.safetensors are no one set")


def test_a_tensor_in_two_shards(sharded):
    (sharded / INDEX).unlink()
    tensors = load_file(sharded / SECOND)
    save_file({**tensors, HEAD: torch.zeros(8, 8)}, sharded / SECOND)
    refuses(sharded, f"{HEAD} is both in {FIRST} and in {SECOND}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", f"{INDEX} is not JSON"),
        ("[]", f"{INDEX} holds []; it must be a JSON object"),
        ("{}", f"{INDEX} has no weight_map"),
        ('{"weight_map": [1]}', "weight_map is [1]; it must be a map"),
        ('{"weight_map": {"a": 1}}', 'weight_map is {"a": 1}; it must be a map'),
        ('{"weight_map": {"a": "../b.safetensors"}}', "a is in '../b.safetensors'"),
        ('{"weight_map": {"a": "/b.safetensors"}}', "a is in '/b.safetensors'"),
        ('{"weight_map": {"a": "b.bin"}}', "a is in 'b.bin'"),
    ],
)
def test_an_index_that_is_none(sharded, content, message):
    (sharded / INDEX).write_text(content)
    refuses(sharded, message)


def test_an_index_that_does_not_fit_its_shards(sharded):
    right = read_index(sharded)
    write_index(sharded, right | {HEAD: SECOND})
    refuses(sharded, f"{FIRST} holds besides what {INDEX} names: {HEAD}")
    write_index(sharded, right | {"model.extra": SECOND})
    refuses(sharded, f"{SECOND} does not hold what {INDEX} names: model.extra")
    write_index(sharded, {n: f for n, f in right.items() if n != HEAD})
    refuses(sharded, f"{FIRST} holds besides what {INDEX} names: {HEAD}")


@pytest.mark.parametrize("name", ["folder", "sharded"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
        (b"PK\x03\x04 pytorch" * 9, "is damaged, or no safetensors"),
        (None, "is damaged, or no safetensors"),  # cut off
    ],
)
def test_a_file_that_holds_no_tensors(request, name, content, message):
    path = request.getfixturevalue(name)
    file = sorted(path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-8] if content is None else content)
    refuses(path, file.name, message)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "model-q4.gguf", "model.pth"])
def test_only_another_format(folder, other):
    (folder / "model.safetensors").rename(folder / other)
    refuses(folder, "holds no *.safetensors file", other, "convert it", error=FileNotFoundError)


def test_a_link_to_nothing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("blobs/gone")
    refuses(folder, "links to files that are absent: model.safetensors", error=FileNotFoundError)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "uint8", "bool"])
def test_numbers_that_mean_nothing_without_their_scales(folder, dtype):
    file = folder / "model.safetensors"
    cast = {n: t.to(getattr(torch, dtype)) if n == HEAD else t for n, t in load_file(file).items()}
    save_file(cast, file)
    refuses(folder, f"dtype of {HEAD}: ", "in model.safetensors; read are float32, bfloat16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_of_other_widths(folder, dtype):
    file = folder / "model.safetensors"
    save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file)
    engine = Engine(folder)
    assert engine.weights["output_layer.weight"].dtype == torch.float32


def test_adapters(folder):
    """A folder of an adapter alone, and one beside the weights, which transformers would apply."""
    (folder / "adapter_config.json").write_text("{}")
    refuses(folder, "adapter_config.json: adapters are not supported; merge it", error=ValueError)
    (folder / "config.json").unlink()
    refuses(folder, "no config.json: it is an adapter", error=FileNotFoundError)


def test_an_update_from_disk_reads_as_a_start_does(folder, sharded):
    """The same refusals, and a config.json of another model is none of this engine's."""
    engine = Engine(sharded)
    version = engine.weight_version
    engine.update_weights_from_disk(sharded)
    edit_config(sharded, rope_theta=5e5)
    with pytest.raises(ValueError, match=r"of another model: rope_theta is 500000.0, the engine's"):
        engine.update_weights_from_disk(sharded)
    edit_config(sharded, rope_theta=None, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=re.escape("quantization_config (method 'fp8')")):
        engine.update_weights_from_disk(sharded)
    with pytest.raises(ValueError, match="model_path is 5; it must be the path"):
        engine.update_weights_from_disk(5)
    (sharded / "config.json").unlink()
    (sharded / SECOND).write_bytes(b"")
    with pytest.raises(WeightLoadError, match=f"{SECOND} is empty"):
        engine.update_weights_from_disk(sharded)
    assert engine.weight_version.digest == version.digest
    engine.generate([[1, 2]])


def test_nan_is_still_refused(folder):
    edit_tensors(folder, lambda t: t[NORM].fill_(float("nan")))
    with pytest.raises(WeightLoadError, match="holds NaN or Inf in: decoder.final_layernorm"):
        Engine(folder)


@pytest.mark.parametrize("content", ["{", "[1]", '{"step": 1}', '{"a": 1}'])
def test_a_version_file_that_is_none(folder, content):
    (folder / "weight_version.json").write_text(content)
    with pytest.raises(ValueError, match="weight_version.json must hold the weights' step and dig"):
        Engine(folder)
