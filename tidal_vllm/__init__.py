"""TidalDecode's position-persistent sparse attention as a vLLM backend."""

__version__ = "0.1.0"
