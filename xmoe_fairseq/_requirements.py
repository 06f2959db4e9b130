"""Is what the plugin needs there, in a version that will do? If not: one line that says how to fix it."""

from importlib import metadata
from pathlib import Path

import xmoe_fairseq_compat  # patches fairseq, where no start-up line did it and it is not too late
from xmoe_fairseq_compat.errors import UserError

FAIRSEQ_VERSION = "0.12.2"
TORCH_MINIMUM = "2.6"  # the first whose torch.load runs no code by default
SENTENCEPIECE_MINIMUM = "0.2"  # a choice: none older was tried


class RequirementError(UserError, ImportError):
    """A package that xmoe_fairseq needs is missing, or there in a version that will not do."""


def check_requirements() -> None:
    """Raise RequirementError where torch, fairseq, sentencepiece or the patches of fairseq will not do."""
    problem = (
        torch_problem(installed_version("torch"))
        or fairseq_problem(installed_version("fairseq"))
        or sentencepiece_problem(installed_version("sentencepiece"))
        or compat_problem(xmoe_fairseq_compat.is_active(), Path(__file__).resolve().parents[1])
    )
    if problem:
        raise RequirementError(problem)


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch_problem(version: str | None) -> str | None:
    return _too_old("torch", version, TORCH_MINIMUM)


def sentencepiece_problem(version: str | None) -> str | None:
    return _too_old("sentencepiece", version, SENTENCEPIECE_MINIMUM)


def fairseq_problem(version: str | None) -> str | None:
    if version == FAIRSEQ_VERSION:
        return None
    # --no-deps: pip refuses fairseq's own list of dependencies
    command = f"python -m pip install --no-deps fairseq=={FAIRSEQ_VERSION}"
    return f"xmoe_fairseq needs fairseq {FAIRSEQ_VERSION}, found {version or 'none'}; run: {command}"


def compat_problem(active: bool, folder: Path) -> str | None:
    if active:
        return None
    what = f'-e "{folder}"' if (folder / "setup.py").is_file() else "--force-reinstall xmoe_fairseq"
    return (
        "fairseq was imported before xmoe_fairseq_compat could patch it: xmoe_fairseq must be installed,"
        f" PYTHONPATH alone is not enough; run: python -m pip install --no-deps {what}"
    )


def _too_old(package: str, version: str | None, minimum: str) -> str | None:
    from packaging.version import Version  # not where torch alone is asked for

    if version is not None and Version(version).release >= Version(minimum).release:
        return None
    command = f'python -m pip install "{package}>={minimum}"'
    return f"xmoe_fairseq needs {package} {minimum} or later, found {version or 'none'}; run: {command}"
