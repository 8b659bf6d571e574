"""Who a site is: a key made on site that never leaves it, a self-made certificate, and the id that others pin.

The id is the hash of the public key, and the certificate's common name. Certificates carry no trust of their own and
no date that matters: a peer is believed because its key's hash stands in the charter.
"""

from __future__ import annotations

import base64
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from peertune.errors import IdentityError

KEY, CERTIFICATE = "key.pem", "certificate.pem"
ALWAYS = datetime(2000, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
"""A certificate's dates. A charter says until when it holds; a site whose clock is wrong is still itself."""


@dataclass(frozen=True)
class Identity:
    """A site's key and certificate."""

    key_pem: bytes
    certificate_pem: bytes

    @property
    def id(self) -> str:
        return certificate_id(self.certificate_pem)

    def sign(self, data: bytes) -> str:
        """ECDSA with SHA-256 over P-256, base64."""
        key = load_pem_private_key(self.key_pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return base64.b64encode(key.sign(data, ec.ECDSA(hashes.SHA256()))).decode()


def default_folder() -> Path:
    """Where a site's identity lies unless it says otherwise: $PEERTUNE_HOME, else ~/.peertune."""
    return Path(os.environ.get("PEERTUNE_HOME") or Path.home() / ".peertune")


def make_identity(folder: Path) -> Identity:
    """Make a key and a certificate in a folder.

    Raises:
        IdentityError: the folder holds a key already, or cannot be written.
    """
    known = ""
    if (folder / KEY).exists():
        with suppress(IdentityError):  # else it is damaged, or others can read it: join and doctor say so
            known = f", of the id {load_identity(folder).id}"
        raise IdentityError(
            f"{folder / KEY}: a key is there already{known}; keep it, or name another folder with --identity"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _id_of(key.public_key()))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(ALWAYS[0])
        .not_valid_after(ALWAYS[1])
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_id_of(key.public_key()))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    made = Identity(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), certificate.public_bytes(Encoding.PEM)
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CERTIFICATE).write_bytes(made.certificate_pem)
        descriptor = os.open(folder / KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(made.key_pem)
    except OSError as error:
        raise IdentityError(
            f"{folder}: cannot write the key: {error.strerror}; name another with --identity"
        ) from error
    return made


def load_identity(folder: Path) -> Identity:
    """Read what `make_identity` wrote.

    Raises:
        IdentityError: there is none, it is damaged, or others may read the key.
    """
    path = folder / KEY
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise IdentityError(
                f"{path}: got mode {mode:04o}, expected 0600, as others could read it: chmod 600 {path}"
            )
        found = Identity(path.read_bytes(), (folder / CERTIFICATE).read_bytes())
        key = load_pem_private_key(found.key_pem, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or _id_of(key.public_key()) != found.id:
            raise IdentityError(f"{folder}: {KEY} and {CERTIFICATE} do not belong together; bring back the old files")
    except FileNotFoundError as error:
        raise IdentityError(
            f"{folder}: holds no identity; name the folder of this site's key with --identity, or make a key with"
            " `peertune keygen`"
        ) from error
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        if isinstance(error, IdentityError):
            raise
        raise IdentityError(f"{folder}: the identity cannot be read: {error}; bring back the old files") from error
    return found


def certificate_id(certificate_pem: bytes) -> str:
    """The id of a certificate's key: 52 letters and digits. Raises IdentityError where it is none of ours."""
    try:
        key = x509.load_pem_x509_certificate(certificate_pem).public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise IdentityError("a certificate cannot be read; ask its owner to sign the charter again") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IdentityError("a certificate holds a key of another kind; ask its owner to use `peertune keygen`")
    return _id_of(key)


def is_own(certificate_pem: bytes) -> bool:
    """Whether it is a certificate as `make_identity` makes it: alone, of its key's id, and signed by that key.

    What else stood beside it would be trusted too; under another's name it would keep that one from connecting; and
    signed by another key it would be one that its owner does not have.
    """
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, certificate_id(certificate_pem))])
    try:
        certificate.verify_directly_issued_by(certificate)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return certificate.subject == name and certificate.public_bytes(Encoding.PEM) == certificate_pem


def is_signed(certificate_pem: bytes, signature: str, data: bytes) -> bool:
    """Whether the certificate's key made the signature of the data."""
    key = x509.load_pem_x509_certificate(certificate_pem).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    try:
        key.verify(base64.b64decode(signature, validate=True), data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True


def _id_of(key: ec.EllipticCurvePublicKey) -> str:
    raw = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b32encode(hashlib.sha256(raw).digest()).decode().lower().rstrip("=")
