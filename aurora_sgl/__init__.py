"""Aurora-SGL: SGLang whose drafter keeps learning from the requests that it serves."""

__version__ = "0.1.0"
