"""Hypercell's client side. Imports nothing by itself, so that `import hypercell` costs a notebook nothing."""

__version__ = "0.1.0"
