"""Packages: directories with a UNet's stages, written by `export`, run by `load`, described by `manifest`."""
