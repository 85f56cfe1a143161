"""``python -m aurora_sgl.cli``, the same as ``aurora-sgl``."""

from aurora_sgl.cli import main

main()
