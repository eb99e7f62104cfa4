import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

REPOSITORY = ""  # where the sources are, such as https://host/owner/name; links of README.md into them become addresses there

version = next(
    line.split('"')[1] for line in Path("sdit_kernels/__init__.py").read_text().splitlines() if line.startswith("__version__")
)


def long_description():
    """README.md for a package index, where links to files lead nowhere: addresses, or without REPOSITORY plain text."""

    def address(match):
        image, text, target = match.groups()
        if target.startswith(("http://", "https://", "#")):
            return match[0]
        if not REPOSITORY:
            return "" if image else text
        return f"{image}[{text}]({REPOSITORY}/{'raw' if image else 'blob'}/v{version}/{target})"

    def picture(match):
        return re.sub('(src|srcset)="', rf'\1="{REPOSITORY}/raw/v{version}/', match[0]) if REPOSITORY else ""

    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub("<picture>.*?</picture>", picture, text, flags=re.S)
    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", address, text)


class Sources(sdist):
    """With what else a checkout has, so that the tests run from the archive."""

    def make_distribution(self):
        for folder in ("tests", "perf", "examples"):
            self.filelist.graft(folder)
        self.filelist.extend(["CHANGELOG.md", "Makefile"])
        self.filelist.global_exclude("*.py[co]")
        self.filelist.global_exclude("*.nb[ic]")
        self.filelist.remove_duplicates()
        super().make_distribution()


setup(
    name="sdit-kernels",
    version=version,
    description="Fused LIF and spiking linear-attention kernels for PyTorch: Triton on GPUs, numba on CPUs",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Source": REPOSITORY, "Changes": f"{REPOSITORY}/blob/v{version}/CHANGELOG.md"} if REPOSITORY else {},
    cmdclass={"sdist": Sources},
    packages=find_packages(include=["sdit_kernels", "sdit_kernels.*", "sdit", "sdit.*"]),
    package_data={"sdit_kernels": ["py.typed"], "sdit": ["py.typed", "*.safetensors"]},
    python_requires=">=3.10",
    entry_points={"console_scripts": ["sdit = sdit.cli:main"]},
    install_requires=["torch>=2.10", "numpy", "numba>=0.61"],
    extras_require={
        "triton": ["triton>=3.6,<3.9"],  # where torch brings none; GPU builds of torch bring their own
        "sdit": ["einops", "diffusers", "safetensors", "pillow>=10.1", "matplotlib", "tqdm", "scikit-learn"],
        "profile": ["nvtx"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=1,<2"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy>=1.18,<3", "setuptools>=77", "matplotlib", "nvtx"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
