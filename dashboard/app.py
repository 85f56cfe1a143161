"""The script that Streamlit runs for each viewer; everything is in the package beside it."""

import importlib
from pathlib import Path

# In a wheel this folder is aurora_sgl/_dashboard, in the repository it is dashboard.
INSIDE_WHEEL = Path(__file__).parent.name == "_dashboard"
importlib.import_module(f"{'aurora_sgl._dashboard' if INSIDE_WHEEL else 'dashboard'}.shell").show()
