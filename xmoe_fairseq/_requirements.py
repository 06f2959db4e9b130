"""Is what the plugin needs there, in a version that will do? If not: one line that says how to fix it."""

from importlib import metadata
from pathlib import Path

import xmoe_fairseq_compat  # patches fairseq, where no start-up line did it and it is not too late
from xmoe_fairseq_compat.errors import UserError

FAIRSEQ = "0.12.2"
MINIMUM = {
    "torch": "2.6",  # the first whose torch.load runs no code by default
    "sentencepiece": "0.2",  # a choice: none older was tried
}


class RequirementError(UserError, ImportError):
    """A package that xmoe_fairseq needs is missing, or there in a version that will not do."""


def check_requirements() -> None:
    """Raise RequirementError where torch, fairseq, sentencepiece or the patches of fairseq will not do."""
    for package in ("torch", "fairseq", "sentencepiece"):
        if problem := version_problem(package, installed_version(package)):
            raise RequirementError(problem)
    if problem := compat_problem(xmoe_fairseq_compat.is_active(), Path(__file__).resolve().parents[1]):
        raise RequirementError(problem)


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def version_problem(package: str, version: str | None) -> str | None:
    if package == "fairseq":
        will_do, needed = version == FAIRSEQ, FAIRSEQ
        what = f"--no-deps fairseq=={FAIRSEQ}"  # pip refuses fairseq's own list of dependencies
    else:
        from packaging.version import Version  # not where torch alone is asked for

        minimum = MINIMUM[package]
        will_do = version is not None and Version(version).release >= Version(minimum).release
        needed, what = f"{minimum} or later", f'"{package}>={minimum}"'
    found = f"xmoe_fairseq needs {package} {needed}, found {version or 'none'}"
    return None if will_do else f"{found}; run: python -m pip install {what}"


def compat_problem(active: bool, folder: Path) -> str | None:
    if active:
        return None
    what = f'-e "{folder}"' if (folder / "setup.py").is_file() else "--force-reinstall xmoe_fairseq"
    return (
        "fairseq was imported before xmoe_fairseq_compat could patch it: xmoe_fairseq must be installed,"
        f" PYTHONPATH alone is not enough; run: python -m pip install --no-deps {what}"
    )
