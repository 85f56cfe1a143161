"""What several tests share: samples, stand-ins for people and processes, scripts that they run."""

from pathlib import Path

SUPPORT = Path(__file__).parent
