"""Aurora-SGL: SGLang whose drafter keeps learning from the requests that it serves."""

from aurora_sgl import compat

__version__ = "0.1.0"

compat.install()
