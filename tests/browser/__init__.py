"""Tests that need a browser: the real JupyterLab, and the pictures in it."""
