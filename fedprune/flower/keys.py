"""Keys for a deployment: a private certificate authority, the server's certificate, one key pair per device.

folder/
    ca.crt               what every device and every user must have, to know the server
    ca.key               signs server certificates; nobody needs it for running, keep it off the machines
    server.crt, .key     for the SuperLink's machine only
    NAME.key             for that device's machine only: `flower-supernode --auth-supernode-private-key`
    NAME.key.pub         to be registered: `flwr supernode register`

Private files have mode 0600. Files appear whole or not at all, and a key that is there is never written again.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedprune.errors import ConfigError

LOCAL = ("localhost", "127.0.0.1")
CA_DAYS = 3650
TAKEN = ("ca", "server")
DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
SKEW = datetime.timedelta(days=1)  # a phone's clock may be behind the machine that made the certificate


@dataclass(frozen=True)
class Keys:
    """Where the files of one deployment are."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The authority's certificate: `--root-certificates` of SuperNodes, `root-certificates` of a connection."""
        return self.folder / "ca.crt"

    @property
    def server_certificate(self) -> Path:
        """`--ssl-certfile` of the SuperLink."""
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        """`--ssl-keyfile` of the SuperLink."""
        return self.folder / "server.key"

    def private(self, device: str) -> Path:
        """A device's private key."""
        return self.folder / f"{device}.key"

    def public(self, device: str) -> Path:
        """A device's public key, to be registered."""
        return self.folder / f"{device}.key.pub"

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names and addresses that the server's certificate is valid for, sorted."""
        names = _certificate(self.server_certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return tuple(sorted(str(name.value) for name in names))


def write_keys(folder: Path, hosts: Sequence[str], devices: Sequence[str], days: int = 365) -> Keys:
    """Make what is missing in `folder`; what is there stays.

    The server's certificate is for `hosts`, those it already had, localhost and 127.0.0.1. It is issued again, for the same
    key, when a host is new, when less than a tenth of its time is left, or when it is of another authority.

    Args:
        folder: created with mode 0700 if need be.
        hosts: DNS names or IP addresses under which devices and users reach the SuperLink.
        devices: names of devices; each gets an EC P-384 key pair in OpenSSH's format.
        days: how long the server's certificate is valid, 1 to 3650.

    Raises:
        ConfigError: a name that cannot be one, or a certificate to be signed without ca.key.
    """
    if not 1 <= days <= CA_DAYS:
        raise ConfigError(f"days = {days} lies outside 1..{CA_DAYS}; 365 is usual.")
    wanted = {_host(host) for host in (*hosts, *LOCAL)}
    names = [_device(name) for name in devices]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    keys = Keys(folder)
    if not keys.ca.exists():
        _issue_authority(keys)
    if keys.server_certificate.exists():
        wanted |= set(keys.hosts)
    if not keys.server_certificate.exists() or wanted != set(keys.hosts) or not _good(keys):
        _issue_server(keys, wanted, days)
    for name in names:
        private = _private_key(keys.private(name), serialization.PrivateFormat.OpenSSH)
        line = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        if not keys.public(name).exists():
            _replace(keys.public(name), line + f" {name}\n".encode())
    return keys


def _host(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        labels = text.split(".")
        # all digits: a mistyped address such as 10.0.0.256, which the name rules would let pass
        if len(text) <= 253 and all(LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit():
            return text.lower()
        raise ConfigError(
            f'"{text}" is neither a host name nor an IP address; name the server as devices reach it, such as '
            "fl.example.org or 192.168.1.10 (no https://, no port, no wildcard; international names in their xn-- form)."
        ) from None
    if address.is_unspecified or address.is_multicast:
        raise ConfigError(f"{text} is no address that a device can connect to; give the machine's own, such as 192.168.1.10.")
    return str(address)


def _device(name: str) -> str:
    if name.lower() in TAKEN or not DEVICE.fullmatch(name):
        raise ConfigError(
            f'"{name}" cannot name a device; use 1 to 63 letters, digits, ".", "_" and "-", a letter or digit first, '
            f"and not {' or '.join(TAKEN)}, whose files lie in the same folder."
        )
    return name


def _issue_authority(keys: Keys) -> None:
    key = _private_key(keys.folder / "ca.key", serialization.PrivateFormat.PKCS8)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedprune deployment CA")])
    certificate = (
        _validity(x509.CertificateBuilder().subject_name(name).issuer_name(name), CA_DAYS)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _replace(keys.ca, certificate.public_bytes(serialization.Encoding.PEM))


def _issue_server(keys: Keys, hosts: set[str], days: int) -> None:
    authority = _certificate(keys.ca)
    if not (keys.folder / "ca.key").exists():
        raise ConfigError(
            f"the server's certificate has to be signed for {', '.join(sorted(hosts))}, but {keys.folder}/ca.key is not there; "
            "bring it back for this step, or start with an empty folder (every device then needs the new ca.crt)."
        )
    signer = _private_key(keys.folder / "ca.key", serialization.PrivateFormat.PKCS8)
    if signer.public_key() != authority.public_key():
        raise ConfigError(f"{keys.folder}/ca.key does not belong to ca.crt beside it; bring back the right one.")
    key = _private_key(keys.server_key, serialization.PrivateFormat.PKCS8)
    names = [_general_name(host) for host in sorted(hosts)]
    certificate = (
        _validity(x509.CertificateBuilder(), days, authority.not_valid_after_utc)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedprune SuperLink")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    _replace(keys.server_certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _validity(builder: x509.CertificateBuilder, days: int, latest: datetime.datetime | None = None) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(end if latest is None else min(end, latest))
    )


def _usage(certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _good(keys: Keys) -> bool:
    """Whether the server's certificate is this authority's, with a tenth of its time or more left."""
    certificate = _certificate(keys.server_certificate)
    try:
        certificate.verify_directly_issued_by(_certificate(keys.ca))
    except (ValueError, InvalidSignature):
        return False
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left >= (certificate.not_valid_after_utc - certificate.not_valid_before_utc) / 10


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        raise ConfigError(f"{path} is no PEM certificate; bring back the right file, or start with an empty folder.") from None


def _private_key(path: Path, form: serialization.PrivateFormat) -> ec.EllipticCurvePrivateKey:
    """The key in `path`, made first if there is none."""
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        new = _beside(path, data)
        # a link, unlike a rename, fails where the name is taken: two of us at once end with one key
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
        new.unlink()
    load = (
        serialization.load_ssh_private_key
        if form is serialization.PrivateFormat.OpenSSH
        else serialization.load_pem_private_key
    )
    try:
        key = load(path.read_bytes(), password=None)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no unencrypted elliptic-curve key; move it out of the way.")
    return key


def _replace(path: Path, data: bytes) -> None:
    new = _beside(path, data)
    new.chmod(0o644)
    os.replace(new, path)


def _beside(path: Path, data: bytes) -> Path:
    """A complete file in the same folder, readable for its owner only."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    with open(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Path(name)
