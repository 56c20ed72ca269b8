"""What a headless Chromium makes of a page."""

import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)


def document_of(address: str, *words: str) -> str:
    """Return what a browser, with words of its command line, has made of a page.

    Raises FileNotFoundError where none is installed.
    """
    if BROWSER is None:
        raise FileNotFoundError(f"none of {NAMES} is installed")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", *words]
    return subprocess.run([*command, address], capture_output=True, text=True, check=True).stdout
