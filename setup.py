"""Metadata and dependencies, the start-up line that patches fairseq (see xmoe_fairseq_compat), and the native
kernel, where there is a torch to compile it for: `pip install --no-build-isolation .`"""

import runpy
from importlib.util import find_spec
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

# `import` must come first in a .pth line. The rest keeps Python quiet where the package has been removed.
START_UP_LINE = """import sys; exec("try:\\n import xmoe_fairseq_compat\\nexcept ImportError:\\n pass")\n"""


NATIVE = "xmoe_fairseq/moe/native"


class BuildPyAndMore(build_py):
    """Also writes the .pth file that lies beside the packages in site-packages, and compiles the kernel."""

    def run(self):
        super().run()
        # An editable install drops what lies in build_lib, but keeps what is installed already.
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "xmoe_fairseq_compat.pth").write_text(START_UP_LINE)
        native = runpy.run_path(f"{NATIVE}/build.py")
        try:
            print(native["build"](Path("" if self.editable_mode else self.build_lib, NATIVE).absolute()))
        except native["BuildError"] as error:  # everything works without it
            print(f"{error}; afterwards run: {native['COMMAND']}")


class ForOneTorch(Distribution):
    def has_ext_modules(self):
        """Whether a wheel is for one platform."""
        return find_spec("torch") is not None


# For data-prep/prepare_lm.sh: downloads from the Hugging Face hub, and the files that lie there.
HUB = ["huggingface_hub>=1", "pyarrow"]

setup(
    name="xmoe_fairseq",
    version="0.1.0",
    description="Fine-grained, adaptive Mixture-of-Experts Transformers (XMoE) for fairseq",
    author="The xmoe_fairseq authors",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["xmoe_fairseq", "xmoe_fairseq.*", "xmoe_fairseq_compat"]),
    entry_points={
        "console_scripts": [
            "xmoe-checkpoint = xmoe_fairseq.parallel.checkpoint_command:main",
            "xmoe-convert = xmoe_fairseq.convert.convert_command:main",
            "xmoe-explain = xmoe_fairseq.explain.explain_command:main",
            "xmoe-threshold = xmoe_fairseq.thresholds.threshold_command:main",
        ],
        # How its names begin, for messages where this --user-dir is missing (xmoe_fairseq_compat/plugins.py).
        "xmoe_fairseq_compat.names": [
            f"{name} = xmoe_fairseq" for name in ("moe_", "xmoe_", "expert_shards")
        ],
    },
    package_dir={"": "."},  # said, so that an editable install is one sys.path entry, not an import hook
    package_data={"": ["*.cpp", "*.h", "*.html"]},
    cmdclass={"build_py": BuildPyAndMore},
    distclass=ForOneTorch,
    # Not fairseq: pip refuses its metadata (omegaconf<2.1), so it is installed by itself with --no-deps.
    install_requires=[
        "babel",
        "bitarray<3",
        "fairscale>=0.4.13",
        "hydra-core>=1.3",
        "lxml",
        "matplotlib",
        "numpy",
        "omegaconf>=2.3",
        "packaging",
        "regex",
        "rich",
        "sacrebleu>=2.3",
        "scipy",
        "sentencepiece>=0.2",
        'tomli; python_version < "3.11"',
        "torch>=2.6",
        "tqdm",
    ],
    extras_require={
        "hub": HUB,
        "dev": [
            *HUB,
            "build",
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-randomly",
            "pytest-xdist",
            "ruff",
            "setuptools>=70.1",
            "tensorboardX",
            "types-tqdm",
        ],
    },
)
