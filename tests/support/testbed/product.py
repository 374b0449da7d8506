"""The product installed on a testbed machine the way a site would: a wheel in a venv."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import testbed

TREE = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
WHEELS = TREE / ".cache" / "testbed-wheels"
PROGRAM = "/opt/sams-ebpf/bin/sams-ebpf"
BIN = "/opt/testbed/bin"
HOOKS = "/usr/libexec/sams-ebpf"

# Units of the host that have no business in a testbed: some change what is not private.
MASKED = (
    "systemd-sysctl.service",
    "systemd-modules-load.service",
    "systemd-networkd-wait-online.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "man-db.timer",
)

SCRIPT = """\
for unit in {masked}; do ln -sf /dev/null /etc/systemd/system/$unit; done
printf '[Unit]\\nRequires=basic.target\\nAfter=basic.target\\nAllowIsolate=yes\\n' \
    > /etc/systemd/system/testbed.target
rm -f /etc/systemd/system/multi-user.target.wants/sl*
echo '{user}:x:{uid}:{uid}::/tmp:/bin/bash' >> /etc/passwd
echo '{user}:x:{uid}:' >> /etc/group
mkdir -p {bin}
gcc -O2 -Wall -Wextra -Werror -shared -fPIC -o /opt/testbed/onlyv2.so {here}/onlyv2.c -ldl
gcc -O2 -Wall -Wextra -Werror -static -o {bin}/work {here}/work.c
for name in short burn eat; do cp {bin}/work {bin}/$name; done
{base} -m venv --without-pip --system-site-packages /opt/sams-ebpf
{python} -m pip --python /opt/sams-ebpf/bin/python install -q --disable-pip-version-check \
    --no-index --find-links {wheels} sams-ebpf
{program} install-units > /dev/null
systemd-sysusers 2> /dev/null
"""


def build_wheels() -> None:
    """Put the tree's wheel and those it needs into WHEELS; what is there is used again."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    for old in WHEELS.glob("sams_ebpf-*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check"]
    pip += ["--no-build-isolation", "--wheel-dir", str(WHEELS), "--find-links", str(WHEELS)]
    offline = [*pip, "--no-index", str(TREE)]
    if subprocess.run(offline, check=False, capture_output=True, timeout=120).returncode:
        subprocess.run([*pip, str(TREE)], check=True, timeout=300)


@contextmanager
def installed() -> Iterator[Path]:
    """Install once; give the overlay layer that every machine is booted on."""
    testbed.sweep()
    build_wheels()
    script = SCRIPT.format(
        masked=" ".join(MASKED),
        user=testbed.USER,
        uid=testbed.UID,
        bin=BIN,
        here=HERE,
        base=Path(sys.executable).resolve(),
        python=sys.executable,
        wheels=WHEELS,
        program=PROGRAM,
    )
    with testbed.layer(script) as layer:
        yield layer
