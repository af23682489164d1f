"""The authority, the server's certificate and the devices' keys."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from fedprune.errors import ConfigError
from fedprune.flower.keys import Keys, write_keys


def test_keys_are_private_and_the_certificate_is_for_the_hosts(tmp_path):
    keys = write_keys(tmp_path / "keys", ["FL.example.org", "192.168.1.10", "fe80::1"], ["a", "b"])
    assert set(keys.hosts) == {"fl.example.org", "192.168.1.10", "fe80::1", "localhost", "127.0.0.1"}
    names = x509.load_pem_x509_certificate(keys.server_certificate.read_bytes()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert ipaddress.ip_address("192.168.1.10") in names.value.get_values_for_type(x509.IPAddress)
    for path in (keys.folder / "ca.key", keys.server_key, keys.private("a"), keys.private("b")):
        assert path.stat().st_mode & 0o777 == 0o600
    assert keys.folder.stat().st_mode & 0o777 == 0o700
    assert keys.private("a").read_text().startswith("-----BEGIN OPENSSH PRIVATE KEY-----")
    assert keys.public("a").read_text().startswith("ecdsa-sha2-nistp384 ")
    assert not [path for path in keys.folder.iterdir() if path.name.startswith(".")]


def shake_hands(server: Keys, client_ca: Path, name: str) -> None:
    """A TLS handshake in memory.

    Raises:
        ssl.SSLError: the client does not take the server's certificate.
    """
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(server.server_certificate, server.server_key)
    asking = ssl.create_default_context(cafile=client_ca)
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        asking.wrap_bio(to_client, to_server, server_hostname=name),
        accepting.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()


def test_the_certificate_holds_for_its_hosts_and_its_authority_only(tmp_path):
    keys = write_keys(tmp_path / "one", ["10.73.0.1", "fl.example.org"], [])
    other = write_keys(tmp_path / "two", [], [])
    for name in ("10.73.0.1", "fl.example.org", "localhost", "127.0.0.1"):
        shake_hands(keys, keys.ca, name)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(keys, keys.ca, "10.73.0.2")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(keys, other.ca, "10.73.0.1")


def test_adding_leaves_what_is_there(tmp_path):
    keys = write_keys(tmp_path, ["one.example.org"], ["a"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_keys(tmp_path, ["one.example.org"], ["a"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_keys(tmp_path, ["two.example.org"], ["b"])
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() - before.keys() == {"b.key", "b.key.pub"}
    assert {name for name in before if before[name] != after[name]} == {"server.crt"}
    assert {"one.example.org", "two.example.org"} < set(keys.hosts)
    shake_hands(keys, keys.ca, "two.example.org")


def test_devices_can_be_added_without_the_authority_but_hosts_cannot(tmp_path):
    keys = write_keys(tmp_path, [], [])
    (tmp_path / "ca.key").unlink()
    assert write_keys(tmp_path, [], ["late"]).private("late").exists()
    with pytest.raises(ConfigError, match=r"ca\.key is not there; bring it back"):
        write_keys(tmp_path, ["new.example.org"], [])
    assert "new.example.org" not in keys.hosts


def test_a_lost_public_key_or_certificate_is_made_again_for_the_same_key(tmp_path):
    keys = write_keys(tmp_path, [], ["a"])
    public, private = keys.public("a").read_text(), keys.server_key.read_bytes()
    keys.public("a").unlink()
    keys.server_certificate.unlink()
    write_keys(tmp_path, [], ["a"])
    assert keys.public("a").read_text() == public
    assert keys.server_key.read_bytes() == private
    shake_hands(keys, keys.ca, "localhost")


def test_a_certificate_about_to_end_or_of_another_authority_is_issued_again(tmp_path, monkeypatch):
    keys = write_keys(tmp_path, [], [], days=1)
    monkeypatch.setattr("fedprune.flower.keys.SKEW", datetime.timedelta(days=30))
    keys.server_certificate.unlink()
    write_keys(tmp_path, [], [], days=1)  # valid for 31 days, of which 1 is left
    old = keys.server_certificate.read_bytes()
    write_keys(tmp_path, [], [])
    assert keys.server_certificate.read_bytes() != old
    keys.ca.unlink()
    (tmp_path / "ca.key").unlink()
    write_keys(tmp_path, [], [])
    shake_hands(keys, keys.ca, "localhost")


@pytest.mark.parametrize(
    "host", ["", "https://a.org", "a.org:80", "*.a.org", "a..b", "-a.org", "10.0.0.256", "0.0.0.0", "224.0.0.1", "a b", "é.org"]
)
def test_what_is_no_host_is_refused(tmp_path, host):
    with pytest.raises(ConfigError, match=r"such as"):
        write_keys(tmp_path / "keys", [host], [])
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("name", ["", "ca", "Server", "../a", "a/b", ".a", "a b", "-a", "é", "x" * 64, "a\n"])
def test_what_is_no_device_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot name a device; use"):
        write_keys(tmp_path / "keys", [], [name])
    assert not (tmp_path / "keys").exists()


def test_other_files_in_the_place_of_keys_are_named(tmp_path):
    (tmp_path / "a.key").write_text("something else")
    with pytest.raises(ConfigError, match=r"a\.key is no unencrypted"):
        write_keys(tmp_path, [], ["a"])
    assert (tmp_path / "a.key").read_text() == "something else"
    with pytest.raises(ConfigError, match="365"):
        write_keys(tmp_path, [], [], days=0)
