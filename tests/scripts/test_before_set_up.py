"""What a script says that is run before scripts/setup.sh: one line that names it."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
ARGUMENTS = {"dense_to_sparse.sh": ["lm", "data", "out"]}
OTHERS = {"setup.sh", "find_environment.sh", "cpu_environment.sh"}  # the set-up itself, and what is sourced
NAMES = sorted(
    str(path.relative_to(SCRIPTS))
    for path in SCRIPTS.rglob("*.sh")
    if path.name not in OTHERS and '/setup.sh"\n' not in path.read_text()
)


@pytest.mark.parametrize("name", NAMES)
def test_one_line_names_the_set_up(name: str, tmp_path: Path) -> None:
    """With the system's own tools only, of which python may be one."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "basename", "dirname", "getconf", "stat"):
        found = next(folder for folder in ("/bin", "/usr/bin") if os.access(f"{folder}/{tool}", os.X_OK))
        (tools / tool).symlink_to(f"{found}/{tool}")
    done = subprocess.run(
        [tools / "bash", SCRIPTS / name, *ARGUMENTS.get(name, [])],
        env={"PATH": str(tools), "VENV": str(tmp_path / "none"), "HOME": str(tmp_path)},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode != 0 and done.stdout == ""
    assert re.fullmatch(r"(\S+: )?python3? not found; run: bash scripts/setup.sh\n", done.stderr), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tools"]
