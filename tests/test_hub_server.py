"""The loopback Hub answers the real client as the Hub does: what is sent is kept, what is wrong is refused."""

import hashlib
import warnings
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

SMALL, LARGE = b'{"a": 1}\n', bytes(range(256)) * 1000  # text goes into the commit, bytes into the storage


@pytest.fixture
def repository(hub, tmp_path) -> str:
    """A repository with a small file, a large one and some in folders."""
    api = HfApi()
    api.create_repo("thing")
    folder = tmp_path / "sent"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "config.json").write_bytes(SMALL)
    (folder / "model.safetensors").write_bytes(LARGE)
    for number in range(9):
        (folder / "deep" / "er" / f"{number}.txt").write_text(str(number))
    api.upload_folder(repo_id="me/thing", folder_path=folder, commit_message="all of it")
    return "me/thing"


def test_what_is_sent_comes_back(hub, repository, tmp_path):
    files = hub.repositories["model", repository].files("main")
    assert (files["config.json"].is_lfs, files["model.safetensors"].is_lfs) == (False, True)
    folder = Path(snapshot_download(repository))
    assert (folder / "config.json").read_bytes() == SMALL
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert (folder / "deep" / "er" / "7.txt").read_text() == "7"
    assert folder.name == HfApi().model_info(repository).sha
    # The storage is another origin: it has seen uploads and downloads, and no token.
    of_storage = [with_token for _, path, with_token in hub.requests if path.startswith("/lfs/")]
    assert len(of_storage) >= 2 and not any(of_storage)


def test_the_client_keys_its_cache_by_our_etags(hub, repository, tmp_path):
    path = hf_hub_download(repository, "model.safetensors")
    blob = hashlib.sha256(LARGE).hexdigest()
    assert (tmp_path / "hub_cache" / "models--me--thing" / "blobs" / blob).read_bytes() == LARGE
    asked = len(hub.requests)
    assert hf_hub_download(repository, "model.safetensors") == path
    assert not [path for method, path, _ in hub.requests[asked:] if method == "GET"]


def test_trees_are_listed_page_by_page(hub, repository):
    api = HfApi()
    assert len(api.list_repo_files(repository)) == 11
    assert sorted(entry.path for entry in api.list_repo_tree(repository)) == [
        "config.json",
        "deep",
        "model.safetensors",
    ]
    assert [entry.path for entry in api.get_paths_info(repository, ["deep/er/0.txt", "nowhere"])] == ["deep/er/0.txt"]
    assert sum("/tree/" in path for _, path, _ in hub.requests) >= 3


def test_revisions_branches_and_tags(hub, repository):
    api = HfApi()
    first = api.model_info(repository).sha
    api.create_tag(repository, tag="v1")
    api.create_branch(repository, branch="trial/one")
    api.create_commit(
        repository,
        operations=[CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("config.json")],
        commit_message="on a branch",
        revision="trial/one",
    )
    assert "new.txt" in api.list_repo_files(repository, revision="trial/one")
    assert "config.json" not in api.list_repo_files(repository, revision="trial/one")
    assert "new.txt" not in api.list_repo_files(repository)
    refs = api.list_repo_refs(repository)
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]
    titles = [commit.title for commit in api.list_repo_commits(repository, revision="trial/one")]
    assert titles == ["on a branch", "all of it", "initial commit"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(repository, tag="v1")


def test_what_has_not_changed_makes_no_commit(hub, repository, tmp_path):
    HfApi().upload_folder(repo_id=repository, folder_path=tmp_path / "sent")
    assert len(hub.repositories["model", repository].commits("main")) == 2


def test_refusals_are_those_the_client_knows(hub, repository, monkeypatch):
    api = HfApi()
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("thing")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("somebody/thing")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/nothing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repository, revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(repository, "nowhere.txt")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repository, parent_commit="0" * 40)
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=b"---\n: [\n---\n", path_in_repo="README.md", repo_id=repository)
    assert api.whoami()["name"] == "me"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token="hf_reader").upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repository)


def test_a_private_repository_is_there_for_its_owner_only(hub):
    HfApi().create_repo("secret", private=True)
    assert HfApi().model_info("me/secret").private
    for token in (False, "hf_reader"):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("me/secret")


@pytest.mark.parametrize("status", [429, 500, 503, None])
def test_a_fault_strikes_as_ordered_and_the_client_goes_on(hub, repository, status):
    hub.fail("POST", "/preupload/", first=2, status=status)
    hub.fail("PUT", "/lfs/", status=status)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("one", "two"):
            HfApi().upload_file(path_or_fileobj=name.encode() + b"\0", path_in_repo=name, repo_id=repository)
    assert hub.repositories["model", repository].files("main")["two"].content == b"two\0"
    assert [fault.seen for fault in hub.faults] == [3, 3]  # one more of each than without


def test_a_download_that_is_cut_comes_whole_in_the_end(hub, repository):
    hub.fail("GET", "/lfs/")
    assert Path(hf_hub_download(repository, "model.safetensors")).read_bytes() == LARGE
    assert [path.startswith("/lfs/") for method, path, _ in hub.requests if method == "GET"].count(True) == 2
    hub.fail("HEAD", "/resolve/", count=99, status=500)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(repository, "config.json")


def test_pieces_of_a_file_are_those_asked_for(hub, repository):
    files = HfFileSystem(endpoint=hub.endpoint, skip_instance_cache=True)
    assert files.cat_file(f"{repository}/model.safetensors", start=300, end=700) == LARGE[300:700]
    assert files.cat_file(f"{repository}/config.json", start=2, end=5) == SMALL[2:5]
    assert sorted(files.glob(f"{repository}/deep/*/*.txt"))[-1] == f"{repository}/deep/er/8.txt"
