"""Programs in a process of their own, where the CPU stands for four devices: a process has as many as it began with."""

import os
import subprocess
import sys
from pathlib import Path


def on_four_devices(program: str, *words: object) -> None:
    """Runs Python source, with modules of this folder within reach; fails with what it said where it fails."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
