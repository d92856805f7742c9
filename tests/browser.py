"""How the tests start a headless Chromium."""

import shutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Without these it looks for its maker's hosts, and as root it does not start at all.
SWITCHES = [
    f"--{switch}"
    for switch in (
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
]
PATIENCE_MS = 30_000
