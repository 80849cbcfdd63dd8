"""The environment of the peer: TRL 1.12.0, the last release with a PPOTrainer, and this project's version of the rest.

TRL 1.12 takes any transformers from 4.56.2 on, so both sides run on the same torch, transformers and PEFT, and what
is compared is the trainer.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

TRL = "1.12.0"
ENVIRONMENT = Path(__file__).parent / ".venv"


def peer_python() -> str:
    """Python of a virtual environment with TRL 1.12.0, made on the first call."""
    python = ENVIRONMENT / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(ENVIRONMENT)}))
    if not (packages / f"trl-{TRL}.dist-info").exists():
        venv.create(ENVIRONMENT, clear=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "install", "--no-deps", f"trl=={TRL}"]
        subprocess.run(pip, check=True)
    # Read after the environment's own packages, so only TRL differs; written each time, in case this one moved.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return str(python)
