"""What was measured of the hardware's rates: shares and costs, from the files in docs/results.

A checkout reads the files themselves. An installed package has the constants below, which name the
files that they come from; tests hold them to the files. All are of H200s, relative to the data
sheet (plan_config.CARDS). That another card reaches the same shares is an assumption.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from samebit.recipes.bench.config import Pack, Workload
from samebit.recipes.bench.roofline import roofline_bounds
from samebit.recipes.bench.timing import CardRates
from samebit.recipes.plan_config import CARDS
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.registry import load_model_config

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
SHAPES = ROOT / "recipes" / "bench" / "shapes"
H200 = CARDS["h200"]
ENGINE_FILES = ("h200_engine_qwen3_0.6b.json", "h200_engine_qwen3_8b.json")
GRAPH_FILES = ("h200_engine_qwen3_0.6b.json", "h200_engine_tables_qwen3_8b.json")
TRAINER_FILE = "h200_trainer_qwen3_4b.json"
SUMS_FILE = "h200x2_reduce.json"
TRANSFER_FILE = "h200x2_transfer_tp1_tp1.json"
SYNC_FILE = "h200x2_sync_qwen3_8b.json"


@dataclass(frozen=True)
class Rollout:
    """Holds what an engine takes beside its roofline."""

    prefill: float
    """Share of the operations per second that prompts reach."""
    weights: float
    """Share of the roofline that products of decode reach."""
    keys: float
    """Share of the memory's rate at which decode reads keys and values."""
    rows: float
    """Share of the memory's rate at which what decode computes for each sample passes: row_bytes.
    """
    step_s: float
    """Of every decode step, whatever it computes."""
    graph_bytes_per_logit_byte: float
    """CUDA graphs' memory over that of max_num_seqs fp32 logits."""


@dataclass(frozen=True)
class Training:
    """Holds the shares of the operations per second that optimizer steps reach, and their memory.

    A step's MFU follows from both shares: attention's part grows with the length of samples.
    """

    products: float
    attention: float
    activation_bytes_per_product_byte: float
    """Working memory of a micro-batch over its products' bf16 operands and results."""


@dataclass(frozen=True)
class Links:
    """Holds what of the links' rates is reached."""

    transfer: float
    """Share of NVLink's by NCCL, from one GPU to another; of other links it is assumed."""
    ipc: float
    """Share of the memory's rate by buckets between processes of one GPU."""
    digest: float
    """Share of the memory's rate of an update in place, which reads the weights for their digest.
    """
    sums: float
    """Share of NVLink's by sums over tensor parallel ranks."""
    sum_s: float
    """Of the smallest sum."""


@dataclass(frozen=True)
class Measured:
    """Holds all that a plan takes from results."""

    rollout: Rollout
    training: Training
    links: Links


CONSTANTS = Measured(
    Rollout(  # h200_engine_qwen3_0.6b, _8b; graphs: h200_engine_tables_qwen3_8b
        prefill=0.602,
        weights=0.902,
        keys=0.855,
        rows=0.101,
        step_s=8.18e-4,
        graph_bytes_per_logit_byte=4.18,
    ),
    Training(  # h200_trainer_qwen3_4b
        products=0.538, attention=0.225, activation_bytes_per_product_byte=1.29
    ),
    Links(  # h200x2_transfer_tp1_tp1, h200x2_sync_qwen3_8b, h200x2_reduce
        transfer=0.707, ipc=0.0889, digest=0.547, sums=0.398, sum_s=8.39e-6
    ),
)


@cache
def measured() -> Measured:
    """Return what the committed results say, or the constants where there are none."""
    return from_results(RESULTS) if RESULTS.is_dir() and SHAPES.is_dir() else CONSTANTS


def from_results(folder: Path) -> Measured:
    """Return what the files of docs/results say."""
    return Measured(_rollout(folder), _training(folder), _links(folder))


def product_bytes(model: ModelConfig) -> int:
    """Return bytes of a token's bf16 operands and results of one layer's products."""
    return sum(2 * (product.n + product.k) for product in model.layer_products.values())


def row_bytes(model: ModelConfig) -> int:
    """Return bytes of a token's operands and results of all products, and of its fp32 logits."""
    return model.num_layers * product_bytes(model) + 4 * model.vocab_size


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def _shape(report: Any) -> ModelConfig:
    return load_model_config(SHAPES / report["model"])


def _rollout(folder: Path) -> Rollout:
    """Least squares, in relative errors, over every workload of the default engine."""
    rates, table = CardRates(H200.hbm_bytes_s, H200.flops_s), []
    for report in (_read(folder, name) for name in ENGINE_FILES):
        model = _shape(report)
        for text, found in report["variants"]["default"]["workloads"].items():
            workload = Workload.parse(text)
            seconds = workload.output_tokens / found["output_tokens_s"]["median"]
            bounds = roofline_bounds(model, workload, rates)
            steps = workload.output_len - 1
            rows_s = steps * workload.num_seqs * row_bytes(model) / H200.hbm_bytes_s
            table.append([x / seconds for x in (*bounds, rows_s, steps)])
    fitted = np.linalg.lstsq(np.array(table), np.ones(len(table)))[0]
    prefill, weights, keys, rows, step_s = map(float, fitted)
    graphs = []
    for report in (_read(folder, name) for name in GRAPH_FILES):
        logits = report["engine"]["max_num_seqs"] * _shape(report).vocab_size * 4
        graphs.append(report["variants"]["default"]["graphs"]["memory_bytes"] / logits)
    return Rollout(1 / prefill, 1 / weights, 1 / keys, 1 / rows, step_s, max(graphs))


def _training(folder: Path) -> Training:
    """Two packs of as many tokens, and so the two shares."""
    report = _read(folder, TRAINER_FILE)
    model, rows, seconds = _shape(report), [], []
    for text, found in report["packs"].items():
        pack, tokens = Pack.parse(text), found["tokens_per_step"]
        attention = model.attention_flops(pack.seq_len) * tokens / pack.seq_len
        rows.append([6 * model.num_matmul_weights * tokens, 3 * attention])
        seconds.append(found["step_s"]["median"])
    products, attention = map(float, np.linalg.solve(np.array(rows) / H200.flops_s, seconds))
    pack = Pack.parse(next(iter(report["packs"])))
    parameters = sum(np.prod(spec.shape) for spec in model.param_specs())
    peak = next(iter(report["packs"].values()))["peak_memory_gib"] * 2**30
    working = peak - 18 * parameters  # bf16 weights, fp32 gradients, masters and two moments
    kept = pack.num_seqs * pack.seq_len * model.num_layers * product_bytes(model)
    return Training(1 / products, 1 / attention, float(working / kept))


def _links(folder: Path) -> Links:
    sums = {row["rows"]: row for row in _read(folder, SUMS_FILE)["reduce"]}
    small, large = (sums[rows]["us"]["sum"]["median"] / 1e6 for rows in (1, 1024))
    sent = _read(folder, TRANSFER_FILE)["ranks"][0]
    transfer_s = median(part["transfer"] for part in sent["seconds"][1:])  # the first makes NCCL's
    transports = _read(folder, SYNC_FILE)["transports"]
    alias, ipc = transports["alias"], transports["ipc"]
    return Links(
        transfer=sent["sent_bytes"][1] / transfer_s / H200.nvlink_bytes_s,
        ipc=ipc["bytes"] / ipc["transfer_s"]["median"] / H200.hbm_bytes_s,
        digest=alias["bytes"] / alias["update_s"]["median"] / H200.hbm_bytes_s,
        sums=sums[1024]["bytes"] / (large - small) / H200.nvlink_bytes_s,
        sum_s=small,
    )
