"""--push_to: an output goes to the hub whole, or not at all, and is never lost here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import checkpoints
import hub_server
import numpy as np
import pytest
from command_line import Run
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session, validate_repo_id

from m3jax.checkpoints.places import hub as hub_names
from m3jax.checkpoints.record import card_head

# What the library itself calls by an old name.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CARD = "---\nlicense: {}\n---\n# A model\n"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, a and b in the working directory, with model cards."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        tensors = {"x.weight": random.normal(size=(40, 50)).astype(np.float32)}
        checkpoints.write(tmp_path / name, tensors, {"model_type": "llama"})
        (tmp_path / name / "README.md").write_text(CARD.format("apache-2.0"))
    return tmp_path


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The network, as far as this machine; no token but that of HF_TOKEN."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", hub_server.MAKER)
    for name in [name for name in os.environ if name.lower().endswith("proxy")]:
        monkeypatch.delenv(name)
    close_session()
    yield monkeypatch
    close_session()


@pytest.fixture
def hub(online: pytest.MonkeyPatch):
    """A hub without the repository org/name."""
    hub = hub_server.Hub(None)
    with hub_server.serving(hub) as address:
        online.setattr(constants, "ENDPOINT", address)
        yield hub


MERGE = ("merge", "--base=base", "--models=a,b", "--output=merged")
PUSH = (*MERGE, "--push_to=org/name")


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_of_an_output_arrives(models: Path, hub: hub_server.Hub, run: Run):
    ran = run(*PUSH)
    assert ran.code == 0, ran.err
    assert f"pushed     {hub.address}/org/name/commit/{hub_server.COMMIT}" in ran.out
    assert hub.files == {".gitattributes": b"", **content_of(models / "merged")}
    assert (hub.private, hub.branch) == (False, "main")
    large = content_of(models / "merged")["model.safetensors"]
    assert list(hub.stored.values()).count(large) == 1
    assert "\r" not in ran.err
    assert run("verify", models / "merged").code == 0  # nothing was added to it


def test_what_is_not_large_goes_without_xet_and_lfs(
    models: Path, hub: hub_server.Hub, run: Run, online: pytest.MonkeyPatch
):
    """The other way through the library: it is the usual one, with its package."""
    online.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.large = 10**9
    assert run(*PUSH).code == 0
    assert hub.files == {".gitattributes": b"", **content_of(models / "merged")}


def test_a_private_repository_and_a_branch(models: Path, hub: hub_server.Hub, run: Run):
    assert run(*MERGE, "--push_to=org/name@v2", "--private").code == 0
    assert (hub.private, hub.branch) == (True, "v2")


def test_an_interrupted_push_goes_on(models: Path, hub: hub_server.Hub, run: Run):
    """What was sent is not sent again, and the merge is not done again."""
    hub.failing = 1
    ran = run(*PUSH, "--config.max_shard_size=1KB")
    assert ran.code != 0
    assert ran.error.startswith("m3jax merge: org/name: ")
    assert ran.error.endswith(
        "merged is complete; the same command with --resume pushes it"
    )
    sent = dict(hub.stored)
    before = content_of(models / "merged")
    hub.failing = None
    hub.asked.clear()
    ran = run(*PUSH, "--config.max_shard_size=1KB", "--resume")
    assert ran.code == 0, ran.err
    assert "merged: is complete already; nothing to do" in ran.err
    assert not any(path.endswith(tuple(sent)) for path in hub.asked)
    assert hub.files == {".gitattributes": b"", **before}
    assert content_of(models / "merged") == before


def test_a_model_is_replaced_if_that_is_said(
    models: Path, hub: hub_server.Hub, run: Run
):
    """And no shard of it stays beside the new one."""
    hub.files = {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    ran = run(*PUSH)
    assert ran.code == 3
    assert "holds 'model-00001-of-00002.safetensors' and more already" in ran.error
    assert not (models / "merged").exists()
    assert run(*PUSH, "--overwrite").code == 0
    assert hub.files == {"notes.txt": b"mine", **content_of(models / "merged")}


def test_what_cannot_be_pushed_is_said_before_the_merge(
    models: Path, hub: hub_server.Hub, run: Run, online: pytest.MonkeyPatch
):
    def refused(*flags: str, code: int = 3) -> str:
        ran = run(*MERGE, *flags)
        assert ran.code == code
        assert not (models / "merged").exists()
        return ran.error

    for name in ("name", "org/a/b", "./merged", "org/na--me", "org/name@", "org/x.git"):
        error = refused(f"--push_to={name}", code=2)
        assert "needs org/name or org/name@branch" in error
    assert "is of --push_to, which is missing" in refused("--private", code=2)
    error = refused("--push_to=other/name")
    assert (
        "the token is that of maker, who may write to maker, org, not to other" in error
    )
    online.setenv("HF_TOKEN", hub_server.READER)
    assert "for reading alone; make one that may write" in refused("--push_to=org/name")
    online.setenv("HF_TOKEN", "hf_old")
    error = refused("--push_to=org/name")
    assert "the hub does not know this token" in error
    assert "run `hf auth login`, or set HF_TOKEN" in error
    online.delenv("HF_TOKEN")
    assert "there is no token on this machine: run `hf a" in refused(
        "--push_to=org/name"
    )
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    online.setenv("HF_TOKEN", hub_server.MAKER)
    close_session()
    assert "HF_HUB_OFFLINE is set: unset it" in refused("--push_to=org/name")


@pytest.mark.parametrize("answers", [True, False], ids=["silent", "closed"])
def test_no_network(models: Path, online: pytest.MonkeyPatch, run: Run, answers: bool):
    online.setattr(hub_names, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        online.setattr(
            constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}"
        )
        if not answers:
            server.close()
        ran = run(*PUSH)
    assert ran.code == 4, ran.err
    assert "org/name: cannot be reached (" in ran.error
    assert ran.error.endswith("); check the network")


def test_as_a_process(models: Path, tmp_path: Path):
    """With the settings that the library reads from the environment alone."""
    hub = hub_server.Hub(None)
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    with hub_server.serving(hub) as address:
        settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "XLA_FLAGS": ""}
        settings |= {"HF_HOME": str(tmp_path), "HF_TOKEN": hub_server.MAKER}
        settings |= {"HF_HUB_DISABLE_XET": "1"}
        ran = subprocess.run(
            [sys.executable, "-m", "m3jax", *PUSH],
            env=environment | settings,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines()[-1] == "m3jax: pushing to org/name"
    assert "\r" not in ran.stderr
    assert hub.files == {".gitattributes": b"", **content_of(models / "merged")}


class TestCard:
    """The head of the model card is what the hub takes, whatever was merged."""

    def card(self, models: Path, run: Run, *flags: str) -> ModelCard:
        assert run(*MERGE, "--overwrite", *flags).code == 0
        text = (models / "merged" / "README.md").read_text()
        assert hub_server.flaw_of(text) is None
        card = ModelCard(text)  # parses and checks
        assert card.data.library_name == "transformers"
        return card

    def test_tags_are_what_was_done(self, models: Path, run: Run):
        card = self.card(models, run, "--config=ties_m3_dare")
        assert card.data.tags == ["merge", "m3jax", "dare", "ties"]

    def test_folders_are_no_base_models(self, models: Path, run: Run):
        card = self.card(models, run)
        assert (card.data.base_model, card.data.get("base_model_relation")) == (
            None,
            None,
        )
        assert "Folders of the machine that merged them: `base`, `a`, `b`" in card.text

    @pytest.mark.parametrize(
        ("stated", "in_head", "in_text"),
        [
            (["mit", "mit", "mit"], "mit", "All of them state the licence mit."),
            (
                ["mit", "apache-2.0", "mit"],
                "other",
                "state different licences, or none",
            ),
            (["mit", None, "mit"], "other", "state different licences, or none"),
            ([None, None, None], None, "No model card of theirs states a licence."),
            (["Apache 2.0", "[a, b]", "!!x 3"], None, "states a licence."),
            (["mit # ours", '"mit"', "mit"], "mit", "All of them state"),
        ],
    )
    def test_licence(self, models: Path, run: Run, stated, in_head, in_text):
        for name, own in zip(("base", "a", "b"), stated, strict=True):
            (models / name / "README.md").write_text(CARD.format(own) if own else "# x")
        card = self.card(models, run)
        assert card.data.license == in_head
        assert in_text in card.text

    def test_a_licence_with_a_name(self, models: Path, run: Run):
        text = (
            "---\nlicense: other\nlicense_name: a-b\nlicense_link: >-\n  LICENSE\n---\n"
        )
        for name in ("base", "a", "b"):
            (models / name / "README.md").write_text(text)
        card = self.card(models, run)
        found = card.data.license, card.data.license_name, card.data.license_link
        assert found == ("other", "a-b", "LICENSE")

    def test_what_an_untrusted_card_cannot_do(self, models: Path, tmp_path: Path):
        odd = models / "odd"
        odd.mkdir()
        private = tmp_path / "private"
        private.write_text(CARD.format("mit"))
        (odd / "README.md").symlink_to(private)
        assert card_head.licence_of(odd) is None  # a link that leads out
        (odd / "README.md").unlink()
        for text in (
            "---\nlicense: !!python/object/apply:os.system [exit]\n---\n",
            "---\n" + "[" * 10_000 + "\n---\n",
            '---\nlicense: other\nlicense_name: "a|b"\n---\n',
            "---\n- license\n---\n",
            "---\nlicense: mit\n",
        ):
            (odd / "README.md").write_text(text)
            found = card_head.licence_of(odd)
            assert found in (None, card_head.Licence("other"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", "org/name"),
        ("org/name@v2", "org/name"),
        ("https://huggingface.co/org/name/tree/main", "org/name"),
        ("./name", None),
        ("../org/name", None),
        ("/tmp/name", None),
        ("name", None),
        ("org/na--me", None),
        ("org/..name", None),
        ("org/name.git", None),
        ("org/name-", None),
        (f"org/{'n' * 93}", None),
        ("gs://org/name", None),
        ("here/is", None),
    ],
)
def test_names_of_repositories(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "is").mkdir(parents=True)
    assert hub_names.repository(name) == expected
    if expected:
        validate_repo_id(expected)


def test_models_of_the_hub_are_base_models():
    parents = dict.fromkeys(["org/base", "org/a@v1", "local", "org/a"])
    lines = card_head.head({"transforms": ["dare"], "method": "ties"}, parents)
    card = ModelCard("\n".join(["---", *lines, "---", ""]))
    assert card.data.base_model == ["org/base", "org/a"]
    assert card.data.base_model_relation == "merge"
    assert json.loads(json.dumps(card.data.to_dict()))["tags"][-1] == "ties"
