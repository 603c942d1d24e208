"""The version, for the package's metadata and for what is written to files."""

__version__ = "0.1.0"
