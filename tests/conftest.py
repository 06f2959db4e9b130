import os
import random
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite is of CPUs: ranks are forks, which cannot use a GPU
os.environ.pop("PYTHONUNBUFFERED", None)  # what a test reads of two streams must not depend on it

import hypothesis  # noqa: E402
import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))  # tests share reference.py, toy.py and commands.py
sys.path.insert(1, str(Path(__file__).parents[1] / "scripts"))  # experiments, benchmarks and gpu_check

from commands import THREADS, write_corpus  # noqa: E402

# An example takes as long as it takes on a busy machine.
hypothesis.settings.register_profile(
    "any machine",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
)
hypothesis.settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    """pytest-randomly shuffles the tests and prints its seed; what a test draws is its own in any order."""
    config.option.randomly_reset_seed = False


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    import numpy  # not above: each pytest-xdist controller would import them for nothing
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(1)
    numpy.random.seed(1)
    random.seed(1)


@pytest.fixture(scope="session")
def native_library() -> None:
    """Which setup.sh compiles: where there is no compiler a test of it is skipped, elsewhere it fails."""
    from xmoe_fairseq.moe.native import missing
    from xmoe_fairseq.moe.native.build import COMMAND, BuildError, compiler

    if reason := missing():
        try:
            compiler()
        except BuildError as error:
            pytest.skip(f"no native kernel: {error}")
        pytest.fail(f"no native kernel: {reason}; run: {COMMAND}")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Binarised folders for translation and for language modelling."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
