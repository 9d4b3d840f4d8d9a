"""The browser that these tests drive: this machine's Chromium, by Playwright. Without either they are skipped.

With NANOVLLM_BROWSER=required, as `.ci/run` sets it, they fail instead.
"""

import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

try:
    from playwright import sync_api
except ImportError:
    sync_api = None  # type: ignore[assignment]

if CHROMIUM is None or sync_api is None:
    missing = "there is no Chromium on this machine" if CHROMIUM is None else "Playwright for Python is not installed"
    if os.environ.get("NANOVLLM_BROWSER") == "required":
        raise RuntimeError(f"{missing}, but NANOVLLM_BROWSER=required")
    pytest.skip(missing, allow_module_level=True)
