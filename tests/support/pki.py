"""Certificates for tests, made with openssl: good, expired, of a stranger, revoked."""

from __future__ import annotations

import subprocess
from pathlib import Path


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


def authority(folder: Path, name: str) -> Path:
    """A certificate authority; its certificate is `<name>.pem`."""
    _openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem",
        "-subj", f"/CN={name}", "-days", "10",
    )  # fmt: skip
    return folder / f"{name}.pem"


def certificate(
    folder: Path, ca: str, name: str, subject: str, *, days: int = 10, alternative: str = ""
) -> tuple[str, str]:
    """A certificate of that authority and its key. days < 0: it has expired already."""
    request, made, key = (folder / f"{name}{suffix}" for suffix in (".csr", ".pem", ".key"))
    _openssl(
        "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-keyout", key, "-out", request, "-subj", subject,
    )  # fmt: skip
    extensions = folder / f"{name}.ext"
    extensions.write_text(f"subjectAltName={alternative}\n" if alternative else "")
    # `openssl ca` is the one that can set both ends of the validity.
    database = folder / f"{ca}.db"
    database.touch()
    config = folder / f"{ca}.cnf"
    config.write_text(
        f"[ca]\ndefault_ca=x\n[x]\ndatabase={database}\nnew_certs_dir={folder}\n"
        f"certificate={folder / ca}.pem\nprivate_key={folder / ca}.key\nrand_serial=yes\n"
        "default_md=sha256\npolicy=p\nunique_subject=no\ndefault_crl_days=5\n"
        "[p]\ncommonName=optional\norganizationName=optional\n"
    )
    start, end = ("20200101000000Z", "20200201000000Z") if days < 0 else ("", "")
    dates = ["-startdate", start, "-enddate", end] if start else ["-days", str(days)]
    _openssl(
        "ca", "-batch", "-notext", "-preserveDN", "-config", config, "-in", request, "-out", made,
        "-extfile", extensions, *dates,
    )  # fmt: skip
    return str(made), str(key)


def revoke(folder: Path, ca: str, certificate_path: str) -> Path:
    """Revoke a certificate; the authority's new list."""
    config = folder / f"{ca}.cnf"
    _openssl("ca", "-batch", "-config", config, "-revoke", certificate_path)
    made = folder / f"{ca}.crl"
    _openssl("ca", "-batch", "-config", config, "-gencrl", "-out", made)
    return made
