"""Installs the one module that is of use outside this folder: lottery. pyproject.toml says the rest."""

from setuptools import setup

setup()
