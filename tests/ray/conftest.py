"""The scripts of deploy/ as modules, as they see each other."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy"))
