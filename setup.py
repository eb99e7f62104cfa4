from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1] for line in Path("sdit_kernels/__init__.py").read_text().splitlines() if line.startswith("__version__")
)

setup(
    name="sdit-kernels",
    version=version,
    description="Fused LIF and spiking linear-attention kernels for PyTorch: Triton on GPUs, numba on CPUs",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["sdit_kernels", "sdit_kernels.*", "sdit", "sdit.*"]),
    package_data={"sdit_kernels": ["py.typed"], "sdit": ["*.safetensors"]},
    python_requires=">=3.10",
    entry_points={"console_scripts": ["sdit = sdit.cli:main"]},
    install_requires=["torch>=2.9", "numpy", "numba>=0.61"],
    extras_require={
        "triton": ["triton>=3.6,<3.9"],  # where torch brings none; GPU builds of torch bring their own
        "sdit": ["einops", "diffusers", "safetensors", "pillow>=10.1", "matplotlib", "tqdm", "scikit-learn"],
        "profile": ["nvtx"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "matplotlib", "nvtx"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
