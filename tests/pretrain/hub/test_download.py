"""``hf://owner/name@revision``: one commit in the local cache, only an encoder's files, and one line for whatever is wrong."""

from __future__ import annotations

import errno
import json
import socket
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from infra.errors import UserError
from pretrain.hub import download
from pretrain.hub.download import fetch_encoder, is_address, parse_address
from pretrain.weights.folder import LISTED, OPTIONAL, WEIGHTS
from tests.pretrain.hub.hub_server import cache_snapshot, commit_of, hub_server

FILES = {"model.safetensors": "w" * 1000, "config.json": "{}", "preprocessing.json": "{}"}


def publish(folder, **changed):
    """A folder with files of the names of an encoder's."""
    files = {**FILES, "checksums.json": json.dumps(dict.fromkeys(FILES, "0")), **changed}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, an empty cache, and no proxies."""
    with hub_server() as server:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        use(monkeypatch, server.url, tmp_path / "cache")
        server.repositories["lab/brains"] = {
            "main": publish(tmp_path / "main"),
            "v1": publish(tmp_path / "v1", more="1"),
        }
        yield server


def use(monkeypatch, url, cache, offline=False):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(download, "_fetched", {})


def fetch(address):
    return fetch_encoder(address, WEIGHTS, OPTIONAL, LISTED)


def refusal(address):
    with pytest.raises(UserError) as caught:
        fetch(address)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("hf://lab/brains", "lab/brains", ""), ("hf://lab/brains@v1", "lab/brains", "v1"),
        ("hf://lab/y-aware_3d.v2@refs/pr/1", "lab/y-aware_3d.v2", "refs/pr/1"), (f"hf://a/b@{'0' * 40}", "a/b", "0" * 40),
    ],
)  # fmt: skip
def test_addresses_are_read_also_as_paths(text, repository, revision):
    assert is_address(text)
    assert is_address(Path(text))
    for path in (text, Path(text)):
        assert parse_address(path) == (repository, revision)
    assert str(parse_address(text)) == text


def test_paths_are_no_addresses():
    assert not any(map(is_address, ["runs/y-aware", "hf", "/hf:/a/b", Path("hf/a/b"), 5, None]))


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://brains", "hf://lab/brains/more", "hf://lab/brains@", "hf://lab/brains@../../x", "hf://lab/../x", "hf:///a/b",
     "hf://lab/brains@v1@v2", "hf://lab/br ains", "hf://lab/brains@a\nb", "hf://-lab/brains"],
)  # fmt: skip
def test_other_texts_are_refused_in_a_line(text):
    assert "is no address of an encoder at the hub; give hf://owner/name" in refusal(text)


def test_the_files_of_an_encoder_come_into_the_cache_and_nothing_else(hub, tmp_path):
    publish(tmp_path / "main", **{"README.md": "card", "huge.bin": "x", "readouts/other.json": "{}"})
    folder = fetch("hf://lab/brains")
    assert names(folder) == ["README.md", "checksums.json", "config.json", "model.safetensors", "preprocessing.json"]
    assert folder == tmp_path / "cache" / "models--lab--brains" / "snapshots" / commit_of(tmp_path / "main")
    assert (folder / "model.safetensors").read_text() == FILES["model.safetensors"]
    assert not hub.requests["huge.bin"]


def test_readouts_come_too(hub, tmp_path):
    publish(tmp_path / "main", **{name: name for name in OPTIONAL})
    assert {*OPTIONAL} < {*names(fetch("hf://lab/brains"))}


def test_a_revision_is_another_folder(hub, tmp_path):
    assert fetch("hf://lab/brains@v1").name == commit_of(tmp_path / "v1")
    assert fetch(f"hf://lab/brains@{commit_of(tmp_path / 'v1')}").name == commit_of(tmp_path / "v1")
    assert fetch(Path("hf://lab/brains")).name == commit_of(tmp_path / "main")


def test_an_address_stands_for_one_commit_in_a_process(hub, tmp_path):
    first = fetch("hf://lab/brains")
    asked = sum(hub.requests.values())
    publish(tmp_path / "main", **{"config.json": '{"new": 1}'})
    assert fetch("hf://lab/brains") == first
    assert sum(hub.requests.values()) == asked
    download._fetched.clear()
    assert fetch("hf://lab/brains") != first


def test_a_branch_that_moves_during_the_download_is_not_mixed(hub, tmp_path, monkeypatch):
    before, original = commit_of(tmp_path / "main"), download._file

    def moving(library, address, revision, name):
        path = original(library, address, revision, name)
        hub.repositories["lab/brains"] |= {"main": tmp_path / "v1", "before": tmp_path / "main"}
        return path

    monkeypatch.setattr(download, "_file", moving)
    folder = fetch("hf://lab/brains")
    assert folder.name == before
    assert {*FILES} <= {*names(folder)}


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
def test_the_cache_is_enough_without_a_connection(hub, tmp_path, monkeypatch, offline):
    folder = fetch("hf://lab/brains")
    asked = sum(hub.requests.values())
    hub.close()
    use(monkeypatch, closed_port(), tmp_path / "cache", offline=offline)
    assert fetch("hf://lab/brains") == folder
    assert sum(hub.requests.values()) == asked


def test_a_cache_that_others_have_filled_is_read(tmp_path, monkeypatch):
    snapshot = cache_snapshot(tmp_path / "cache", "lab/brains", publish(tmp_path / "main"))
    tagged = cache_snapshot(tmp_path / "cache", "lab/brains", publish(tmp_path / "v1", more="1"), "v1")
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache", offline=True)
    assert fetch("hf://lab/brains") == snapshot
    assert fetch("hf://lab/brains@v1") == tagged
    assert fetch(f"hf://lab/brains@{tagged.name}") == tagged


def test_without_a_cache_offline_is_one_line(tmp_path, monkeypatch):
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache", offline=True)
    message = refusal("hf://lab/brains@v1")
    assert message.startswith("hf://lab/brains@v1 cannot be loaded: its checksums.json is not in ")
    assert "and HF_HUB_OFFLINE is set; load it once with a connection, or set HF_HUB_CACHE" in message


def test_a_part_of_the_cache_offline_is_one_line(tmp_path, monkeypatch):
    snapshot = cache_snapshot(tmp_path / "cache", "lab/brains", publish(tmp_path / "main"))
    (snapshot / "config.json").unlink()
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache", offline=True)
    assert "its config.json is not in" in refusal("hf://lab/brains")


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    from huggingface_hub import file_download

    use(monkeypatch, closed_port(), tmp_path / "cache")
    monkeypatch.setattr(file_download, "_DEFAULT_RETRY_ON_EXCEPTIONS", ())  # it would try for half a minute
    message = refusal("hf://lab/brains")
    assert "is not in" in message
    assert f"{constants.ENDPOINT} cannot be reached (" in message


def test_an_error_of_a_proxy_is_one_line(hub, monkeypatch):
    import huggingface_hub

    def refuse(*names, **options):
        raise huggingface_hub.errors.HTTPError("407 the proxy\nwants a password")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert refusal("hf://lab/brains") == (
        f"hf://lab/brains: checksums.json cannot be fetched from {hub.url} (407 the proxy wants a password); try again later"
    )


def test_a_full_disk_keeps_the_system_s_words(hub, monkeypatch):
    import huggingface_hub

    def refuse(*names, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blob")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        fetch("hf://lab/brains")


def test_a_wrong_name_is_one_line(hub):
    assert "hf://lab/brain is no model that you may read at http://127" in refusal("hf://lab/brain")


def test_a_gated_repository_is_one_line(hub):
    hub.gated.add("lab/brains")
    assert refusal("hf://lab/brains").startswith(f"hf://lab/brains is gated: accept its terms at {hub.url}/lab/brains")


def test_a_missing_revision_is_one_line(hub):
    assert refusal("hf://lab/brains@v9") == (
        "hf://lab/brains@v9 has no such revision; give a branch, tag or commit of lab/brains"
    )


def test_a_repository_without_an_encoder_is_one_line_and_costs_one_request(hub, tmp_path):
    hub.repositories["lab/language"] = {"main": tmp_path / "language"}
    (tmp_path / "language").mkdir()
    (tmp_path / "language" / "model.safetensors").write_text("x" * 10_000)
    message = refusal("hf://lab/language")
    assert "hf://lab/language has no checksums.json, so it holds no encoder that `yaware export` wrote" in message
    assert set(hub.requests) == {"checksums.json"}


def test_a_file_that_is_listed_and_missing_is_named(hub, tmp_path):
    (tmp_path / "main" / "preprocessing.json").unlink()
    assert "hf://lab/brains has no preprocessing.json" in refusal("hf://lab/brains")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "not an object"), ("no json", "is not valid JSON"),
        ('{"../../x": "0"}', "names '../../x', which is no file of a published encoder"),
        ('{"/etc/passwd": "0"}', "names '/etc/passwd'"), ('{"": "0"}', "names ''"), ('{"a\\nb": "0"}', "names 'a"),
        ('{"config.json": "0", "mlflow.json": "0"}', "names 'mlflow.json'"),
    ],
)  # fmt: skip
def test_a_list_of_a_stranger_is_checked(hub, tmp_path, content, words):
    publish(tmp_path / "main", **{"checksums.json": content})
    assert words in refusal("hf://lab/brains")
    assert set(hub.requests) == {"checksums.json"}


def test_a_cache_that_cannot_be_written_keeps_the_system_s_words(hub, tmp_path):
    (tmp_path / "cache").write_text("a file is here")
    with pytest.raises((OSError, UserError)) as caught:
        fetch("hf://lab/brains")
    assert "cache" in str(caught.value)


def test_a_cache_of_others_without_a_connection_asks_for_one_optional_file(tmp_path, monkeypatch):
    from huggingface_hub import file_download

    snapshot = cache_snapshot(tmp_path / "cache", "lab/brains", publish(tmp_path / "main"))
    use(monkeypatch, closed_port(), tmp_path / "cache")
    asked, original = [], file_download._get_metadata_or_catch_error
    monkeypatch.setattr(file_download, "_DEFAULT_RETRY_ON_EXCEPTIONS", ())
    monkeypatch.setattr(
        file_download,
        "_get_metadata_or_catch_error",
        lambda **given: asked.append(given["filename"]) or original(**given),
    )
    assert fetch("hf://lab/brains") == snapshot
    assert asked == ["checksums.json", OPTIONAL[0]], "each costs half a minute"


def test_a_transfer_that_breaks_off_is_one_line(hub, monkeypatch):
    """The library that transfers large files raises its own errors, which are RuntimeErrors."""

    def broken(*_, **__):
        raise RuntimeError("Data processing error: connection\nreset")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    message = refusal("hf://lab/brains")
    assert message.endswith("(Data processing error: connection reset); try again later")


def test_without_the_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "hf://lab/brains needs huggingface_hub" in refusal("hf://lab/brains")


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
