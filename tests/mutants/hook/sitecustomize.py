"""On a child's PYTHONPATH while the reach of tests is recorded."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("lines", Path(__file__).parents[1] / "lines.py")
_lines = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_lines)
_lines.watch_child()
