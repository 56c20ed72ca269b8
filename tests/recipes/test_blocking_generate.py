"""A generate function of a user's that blocks its process."""

import subprocess
import sys

BLOCKS = """
import asyncio, sys, time
from types import SimpleNamespace as Named
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run import generation

async def awaits(engine, request, params):
    await asyncio.sleep(60)

async def blocks(engine, request, params):
    await (awaits if request.sample_id == 16 else forever)(engine, request, params)

async def forever(engine, request, params):
    while True:
        time.sleep(1)

generation._CANCEL_S = 0.1
sys.modules["mine"] = Named(blocks=blocks)
settings = RolloutSection(generate="mine:blocks", generate_timeout_s=2)
asked = [Named(sample_id=i, problem=Named(name="problem 3")) for i in (16, 17)]
generation.GenerateFunction(settings, 12).draw(None, asked, None)
"""


def test_a_function_that_blocks_ends_the_run():
    """With its sample, though nothing else of the process gets a turn."""
    ended = subprocess.run([sys.executable, "-c", BLOCKS], capture_output=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert ended.stderr.decode().strip().splitlines()[-1] == (
        "samebit: rollout.generate 'mine:blocks' on problem 3, sample 0x11, took longer than 2 s "
        "(rollout.generate_timeout_s) and does not let others run: code that blocks belongs in "
        "asyncio.to_thread"
    )
