"""Packages of the distribution, found: ops/ installs as zoo.ops, layers/ as zoo.layers, and so on."""

from setuptools import find_namespace_packages, setup

FOLDERS = {"zoo": "zoo", "zoo.ops": "ops", "zoo.layers": "layers", "zoo.train": "train", "zoo.configs": "configs"}


def packages() -> list[str]:
    """Every folder below the five that holds files to install."""
    names = []
    for package, folder in FOLDERS.items():
        names += [package, *(f"{package}.{inner}" for inner in find_namespace_packages(folder))]
    return [name for name in names if "__pycache__" not in name]


setup(packages=packages(), package_dir=FOLDERS)
