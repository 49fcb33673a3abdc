"""Lets a command run from a clone that was not installed: imported first, it puts the repository on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
