"""How fastkl is built and what it needs; settings of the tools beside it are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version's only home is fastkl/__init__.py; it is read as text because importing it would
    need torch at build time.
    """
    source = ROOT / "fastkl" / "__init__.py"
    found = re.search(
        r'^__version__ = "([^"]+)"$', source.read_text(encoding="utf-8"), re.MULTILINE
    )
    if found is None:
        raise RuntimeError(
            f'{source}: expected one line of the form __version__ = "1.2.3", got none; remedy: '
            f"add it"
        )
    return found.group(1)


def read_description() -> str:
    """Read the README without its links to files of the repository: on the page of an index they
    lead nowhere, and a picture is a blank."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


DEMO = ["tokenizers>=0.20", "safetensors>=0.4", "matplotlib>=3.8", "tqdm>=4.66"]
# `fastkl compare` reads Hugging Face checkpoints.
COMPARE = ["transformers>=5", "tokenizers>=0.20", "pandas>=2", "tqdm>=4.66"]
# Tables and plots of the benchmarks.
BENCH = ["pandas>=2", "matplotlib>=3.8", "networkx>=3", "pytest-benchmark>=5"]
# Beside whom the benchmarks measure.
PEERS = [
    "liger-kernel>=0.8",
    "cut-cross-entropy>=25.1",
    "trl==1.16.*",
    "matplotlib>=3.8",
    "pandas>=2",
]
# The tests run the demo, build the package and read its annotations with mypy; Triton's interpreter
# computes with numpy; `make coverage` measures the tests' processes too.
TEST = [
    "pytest>=8",
    "coverage>=7.10",
    *BENCH,
    *DEMO,
    "hypothesis>=6.100",
    "mypy>=1.11",
    "numpy>=1.26",
    "pyyaml>=6",
    "scipy>=1.13",
    "setuptools>=77",
    "wheel>=0.43",
]
# The site; signatures in it are formatted by ruff.
DOCS = [
    "mkdocs>=1.6",
    "mkdocs-material>=9.6",
    "mkdocstrings>=1",
    "mkdocstrings-python>=2",
    "griffelib>=2",
    "pymdown-extensions>=10.14",
    "ruff>=0.15",
]

setup(
    name="fastkl",
    version=read_version(),
    description="Exact KL divergence for LLM training: Triton kernels and a plain PyTorch "
    "reference",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    author="The fastkl authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # Subpackages are discovered; the kernels cannot be, because kernels/ has no __init__.py: with
    # one, it would be an importable top-level package `kernels` wherever the root is on sys.path,
    # and shadow the published package of that name, which transformers imports. package_dir gives
    # the folder its real name in wheels; the symlink fastkl/kernels does so in a checkout.
    packages=["fastkl", "fastkl.kernels", *(f"fastkl.{name}" for name in find_packages("fastkl"))],
    package_dir={"fastkl.kernels": "kernels"},
    package_data={"fastkl": ["py.typed"], "fastkl.kernels": ["README.md"]},
    install_requires=["torch>=2.10", 'triton>=3.5; platform_system == "Linux"'],
    extras_require={
        "test": TEST,
        "bench": BENCH,
        "demo": DEMO,
        "plots": ["matplotlib"],
        "compare": COMPARE,
        "trl": ["trl==1.16.*"],
        "bench-peers": PEERS,
        "docs": DOCS,
    },
    entry_points={"console_scripts": ["fastkl = fastkl.tools.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
