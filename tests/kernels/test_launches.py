"""Every launch of a Triton kernel, read and not run: its arguments by name, its fusion flag.

Fusion: a compiler may contract a product and the sum after it into one operation with one rounding,
and whether it does may depend on anything. So every launch says enable_fp_fusion=False and every
contraction that is wanted is written out (tl.fma), but for the kernels of UNFUSED: there the flag
could change nothing that is promised, and each says why.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "kernels" / "gpu").glob("*.py"), ROOT / "weight_sync" / "digest_gpu.py"])
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "launch_pdl"}

NO_SUM = "no product of floats is added to anything: there is nothing to contract"
BACKWARD = (
    "a gradient: the same bits for the same inputs, because it is the same binary, and nothing in "
    "the engine is compared to it"
)
UNFUSED = {
    "kernels/gpu/decode_ends.py::_decode_inputs_kernel": "integers and copies alone",
    "kernels/gpu/decode_ends.py::_decode_outputs_kernel": "integers and copies alone",
    "kernels/gpu/kv_write.py::_kv_write_kernel": "copies alone",
    "kernels/gpu/linear.py::_matmul_kernel": "all its products are the tensor core's (tl.dot), "
    "which adds them up by itself; outside there is one rounding and no arithmetic",
    "kernels/gpu/logprob.py::_logits_grad_kernel": f"{BACKWARD}; without the entropy's "
    f"moreover {NO_SUM}",
    "kernels/gpu/peers.py::_gather_kernel": "copies alone",
    "kernels/gpu/peers.py::_sum_kernel": f"sums alone: {NO_SUM}",
    "kernels/gpu/rms_norm.py::_rms_norm_backward_kernel": BACKWARD,
    "kernels/gpu/swiglu.py::_swiglu_backward_kernel": BACKWARD,
    "weight_sync/digest_gpu.py::_tile_kernel": "integers alone",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def jit_functions(path: Path) -> dict[str, inspect.Signature]:
    """The @triton.jit functions that a file defines."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and any(
            "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            required = len(node.args.args) - len(node.args.defaults)
            found[node.name] = inspect.Signature(
                inspect.Parameter(
                    argument.arg,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    default=inspect.Parameter.empty if i < required else None,
                )
                for i, argument in enumerate(node.args.args)
            )
    return found


def known_functions(path: Path) -> dict[str, inspect.Signature]:
    """Those that a file defines or imports."""
    found = jit_functions(path)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "samebit.kernels.gpu."
        ):
            theirs = jit_functions(ROOT / (node.module.split(".", 1)[1].replace(".", "/") + ".py"))
            found |= {a.name: theirs[a.name] for a in node.names if a.name in theirs}
    return found


def calls(path: Path) -> Iterator[tuple[str, ast.Call, bool]]:
    """(function, call, whether it is a launch) of every call of such a function."""
    known = known_functions(path)
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Subscript(value=ast.Name(id=name))) if name in known:
                yield name, node, True
            case ast.Call(func=ast.Name(id=name)) if name in known:
                yield name, node, False


def launches() -> Iterator[tuple[str, str, dict[str, ast.expr | None]]]:
    """(place, kernel, keywords) of every launch."""
    for path in FILES:
        for name, call, is_launch in calls(path):
            if is_launch:
                keywords = {str(k.arg): k.value for k in call.keywords}
                yield f"{name_of(path)}:{call.lineno}", f"{name_of(path)}::{name}", keywords


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arguments_are_the_functions_parameters(path):
    """Of launches and of calls from kernel to kernel; a launch names all of its arguments."""
    known = known_functions(path)
    for name, call, is_launch in calls(path):
        place = f"{name_of(path)}:{call.lineno} {name}"
        assert not any(isinstance(argument, ast.Starred) for argument in call.args), place
        named = [str(keyword.arg) for keyword in call.keywords]
        if is_launch:
            assert not call.args, f"{place}: arguments without names"
            named = [keyword for keyword in named if keyword not in OPTIONS]
        try:
            bound = known[name].bind(*call.args, **dict.fromkeys(named))
        except TypeError as error:
            raise AssertionError(f"{place}: {error}") from None
        bound.apply_defaults()


def test_every_kernel_that_starts_is_seen():
    """Whatever is called a kernel is launched in its own file."""
    seen = {kernel for _, kernel, _ in launches()}
    kernels = {
        f"{name_of(path)}::{name}"
        for path in FILES
        for name in jit_functions(path)
        if name.endswith("_kernel")
    }
    assert seen == kernels


def test_fusion_is_off_or_cannot_matter():
    for place, kernel, keywords in launches():
        flag = keywords.get("enable_fp_fusion")
        if kernel in UNFUSED:
            assert flag is None, f"{place}: {kernel} needs no exemption"
        else:
            assert isinstance(flag, ast.Constant), f"{place}: {kernel} says nothing about fusion"
            assert flag.value is False, f"{place}: {kernel} allows fusion"
    assert UNFUSED.keys() <= {kernel for _, kernel, _ in launches()}
