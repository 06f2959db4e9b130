"""scripts/check_docs.sh: every block of commands in the documents is run, or says why not."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import REPO, for_shells
from documented import example
from forks import tools
from torch.distributed.run import get_args_parser

from experiments.documents import DocumentError, blocks, listing

DOCUMENTS = sorted(path.relative_to(REPO) for path in (REPO / "README.md", *(REPO / "docs").glob("*.md")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_all_commands_are_run_or_say_why_not(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    found = list(blocks(document))
    for block in found:
        assert not (block.left_out and (block.marks["first"] or block.marks["sed"])), block.place
        done = subprocess.run(["bash", "-n"], input=block.commands(), capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, f"{block.place}: {done.stderr}"
    assert len(found) == len(re.findall(r"^```(?:bash|python)$", document.read_text("utf-8"), flags=re.M))


@pytest.mark.parametrize(
    "text, line",
    [
        ("Type\n\n    ls\n", "x.md:3: must be fenced (```bash, ```text, ...), not indented"),
        ("```\nls\n```\n", "x.md:1: a fence must name its language (```bash, ```text, ...)"),
        (
            "\n<!-- skip -->\n```bash\nls\n```\n",
            "x.md:3: a mark must be one of not run, run by, first, sed, ",
        ),
        ("<!-- not run: -->\n```bash\nls\n```\n", "sed, and ': ', got not run:"),
        ("<!-- run by: a.py -->\n```bash\nls\n```\n", "run by: must be a file that names x.md, got a.py"),
        ("<!-- sed: s/a/b/ -->\n```bash\nls\n```\n", "x.md:2: sed: s/a/b/ must change the block: nothing is"),
        ("<!-- sed: s/l/ -->\n```bash\nls\n```\n", "x.md:2: sed: s/l/ must change the block: sed: -e expr"),
    ],
)
def test_what_is_refused(text: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.md").write_text(text)
    Path("a.py").write_text('"""Of y.md."""')
    with pytest.raises(DocumentError) as ended:
        listing(Path("x.md"))
    assert line in str(ended.value) and "\n" not in str(ended.value)


GOOD = """Go there:

<!-- first: mkdir there
sed: s/FOLDER/there/ -->
```bash
cd FOLDER   # and stay
```

- <!-- not run: needs a "GPU" -->

<!-- not run: it's too long; $HOME -->
```bash
sleep 1000
```

```text
    no commands
```

```bash
basename $PWD > name
which python > which
cat name
```

```python
import os

open("from-python", "w").write(os.path.basename(os.getcwd()))
```
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With a set-up that makes an environment out of this one."""
    made = tmp_path / "repository"
    shutil.copytree(REPO / "scripts", made / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (made / "scripts/setup.sh").write_text(
        f'mkdir -p "$(dirname "$0")/../.venv/bin" && cd "$(dirname "$0")/../.venv/bin"\n'
        'echo "PATH=$PWD:$PATH" > activate\n'
        f"""echo 'exec {tools()}/python "$@"' > python && chmod +x python\n"""
    )
    (made / "README.md").write_text("Type\n\n    ls\n")
    (made / "docs").mkdir()
    (made / "docs/good.md").write_text(GOOD)
    (made / "docs/wrong.md").write_text("```bash\ntrue\nfalse\ntrue\n```\n\n```bash\nls\n```\n")
    (made / ".gitignore").write_text(".venv\n*.log\n")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        author = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *author, *words], cwd=made, check=True)
    return made


def check(repository: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", repository / "scripts/check_docs.sh", *arguments], capture_output=True, text=True,
        env=os.environ | for_shells() | environment, cwd=repository.parent,
    )  # fmt: skip


def test_the_blocks_of_a_document_run_in_one_shell(repository: Path, tmp_path: Path) -> None:
    done = check(repository, SCRATCH=str(tmp_path / "scratch"))
    assert re.fullmatch(
        r"docs/good.md:5: ran in \d+ s\n"
        r"docs/good.md:12: not run: it's too long; \$HOME\n"
        r"docs/good.md:20: ran in \d+ s\n"
        r"docs/good.md:26: ran in \d+ s\n"
        r"docs/wrong.md:1: FAILED\n"
        r"docs/wrong.md: the end of \S+/scratch/check_docs-wrong.md.log:\n",
        done.stdout,
    ), done.stdout + done.stderr
    assert done.returncode == 1
    assert done.stderr == "documents: README.md:3: must be fenced (```bash, ```text, ...), not indented\n"
    there = tmp_path / "scratch/there"
    assert ((there / "name").read_text(), (there / "from-python").read_text()) == ("there\n", "there")
    assert (there / "which").read_text() == f"{tmp_path}/scratch/.venv/bin/python\n"
    assert (tmp_path / "scratch/check_docs-good.md.log").read_text() == "there\n"
    assert not list(repository.glob("*.log"))


def test_a_list_runs_nothing(repository: Path) -> None:
    done = check(repository, "--list", "docs/good.md")
    assert done.returncode == 0 and not (repository / "there").exists()
    assert done.stdout == (
        "docs/good.md:5:\n    mkdir there\n    cd there   # and stay\n"
        "docs/good.md:12: not run: it's too long; $HOME\n"
        "docs/good.md:20:\n    basename $PWD > name\n    which python > which\n    cat name\n"
        "docs/good.md:26:\n    python - <<'PYTHON'\n    import os\n    \n"
        '    open("from-python", "w").write(os.path.basename(os.getcwd()))\n    PYTHON\n'
    )


def test_the_slurm_script(tmp_path: Path) -> None:
    """docs/scaling.md: one launcher per node; what torchrun would get."""
    script = example("scaling.md", "## Commands", "bash", 2)
    stubs = {
        "scontrol": "echo node7; echo node8",
        "srun": 'printf "%s\\n" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" "$@"',
        "fairseq-train": "exit 1",
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "41"}
    done = subprocess.run(
        ["bash", "-eu"], input=script, capture_output=True, text=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **job},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    share, tool, *words = done.stdout.splitlines()
    assert (share, tool) == ("1", "torchrun")
    args = get_args_parser().parse_args(words)
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("2", "8", 3)
    assert (args.rdzv_id, args.rdzv_backend, args.rdzv_endpoint) == ("41", "c10d", "node7:29500")
    assert [args.training_script, *args.training_script_args] == [f"{tmp_path}/fairseq-train", "DATA", "..."]
    directives = re.findall(r"^#SBATCH (.*)$", script, flags=re.M)
    assert directives == ["--nodes=8 --ntasks-per-node=1 --gpus-per-node=8"], "a launcher per node, of 8 GPUs"
