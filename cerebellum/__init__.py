"""Sensitivity-guided mixed-precision quantization of GGUF language models, with the evidence."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("cerebellum-gguf")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
