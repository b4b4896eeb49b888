"""What a figure was measured on: this machine in a few words, for reports and manifests."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def machine() -> str:
    """Processor, cores and GPU."""
    import torch  # here, since it takes 3 s that others need not wait

    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    processor = found.group(1).strip() if found else platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{processor}, {os.cpu_count()} cores{gpu}"
