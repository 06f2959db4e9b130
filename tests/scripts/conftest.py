import sys
from pathlib import Path

for folder in ("tools", "benchmarks"):  # they import each other by name
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / folder))
