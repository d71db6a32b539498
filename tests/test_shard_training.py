"""Whole runs on shards: killed and resumed, in several processes, from a loopback S3."""

import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from kill_points import SCRIPTS, differences, run_script, run_together, start_server, what_is_left, write_shards
from safetensors.torch import load_file

from data_scripts import load_captions
from data_scripts.shards import Skipped, find_shards, read_shard

# Eight shards of fifteen captions; an epoch has five steps or six, by how the shards fall to the processes.
OPTIONS = [
    *("--streaming", "true", "--max_steps", "13", "--eval_steps", "4", "--save_steps", "3", "--learning_rate", "1e-2"),
    *("--dropout", "0.3", "--num_augmentations", "2", "--save_total_limit", "2", "--lr_scheduler_type", "cosine"),
]


@pytest.fixture(scope="module")
def context():
    return start_server()


@pytest.fixture(scope="module")
def shards(small_scenes, tmp_path_factory) -> str:
    """The scenes as a folder of tars: eight for training, one each for validation and test."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(load_captions(small_scenes), folder, images_per_shard=3)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "moment"), [("train_lstm", ("step", 8)), ("train_vit_gpt2", ("sync", 60))])
def test_a_killed_run_on_shards_ends_on_every_bit_of_an_undisturbed_one(context, shards, tmp_path, script, moment):
    arguments = [*SCRIPTS[script], *OPTIONS, "--dataset_name", shards, "--per_device_train_batch_size", "24"]
    whole = [*arguments, "--output_dir", str(tmp_path / "whole")]
    assert run_script(context, script, whole, tmp_path / "cache") == 0
    killed = [*arguments, "--output_dir", str(tmp_path / "killed")]
    assert run_script(context, script, killed, tmp_path / "cache", moment) == -signal.SIGKILL
    assert run_script(context, script, [*killed, "--resume_from_checkpoint", "last"], tmp_path / "cache") == 0
    found = differences(what_is_left(tmp_path / "killed"), what_is_left(tmp_path / "whole"))
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_processes_without_a_shard_do_not_hang_and_another_number_resumes(context, shards, tmp_path):
    """Three processes for eight shards: one reads two, and repeats its last batch without labels until the others are done."""
    script = "train_lstm"
    arguments = [*SCRIPTS[script], *OPTIONS, "--dataset_name", shards, "--output_dir", str(tmp_path / "run")]
    three = [*arguments, "--per_device_train_batch_size", "8"]
    moments = [None, ("step", 8), None]
    codes = run_together(context, script, three, tmp_path / "cache", moments, by=signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM] * 3
    one = [*arguments, "--per_device_train_batch_size", "24", "--resume_from_checkpoint", "last"]
    assert run_script(context, script, one, tmp_path / "cache") == 0
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / "model.safetensors").values())


# ------------------------------------------------------------------------------------------------------------------ S3


class CuttingProxy(threading.Thread):
    """Hands connections on to a port, and cuts the first few that have carried so many bytes of an answer."""

    def __init__(self, port: int, num_cuts: int, after: int):
        super().__init__(daemon=True)
        self.target, self.left, self.after, self.num_cut = port, num_cuts, after, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]

    def run(self) -> None:
        while True:
            try:
                here, _ = self.server.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self.hand_on, args=(here, there, False), daemon=True).start()
            threading.Thread(target=self.hand_on, args=(there, here, True), daemon=True).start()

    def hand_on(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        carried = 0
        try:
            while data := source.recv(4096):
                carried += len(data)
                if answers and self.left and carried > self.after:
                    self.left -= 1
                    self.num_cut += 1
                    break
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            end.close()


@pytest.mark.slow
def test_shards_are_streamed_from_s3_and_a_connection_that_is_cut_is_tried_again(shards, monkeypatch, caplog, capfd):
    pytest.importorskip("s3fs", reason="needs s3fs (pip install 'showtell[remote]')")
    server_module = pytest.importorskip("moto.server", reason="needs moto's server (pip install 'moto[server]')")
    boto3 = pytest.importorskip("boto3", reason="needs boto3 (pip install boto3)")
    import s3fs

    secret = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    proxy = CuttingProxy(port, num_cuts=2, after=4000)
    try:
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket="scenes")
        for path in sorted(Path(shards).glob("train-*.tar")):
            client.upload_file(str(path), "scenes", path.name)
        proxy.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        s3fs.S3FileSystem.clear_instance_cache()
        skipped = Skipped()
        addresses = find_shards("s3://scenes/train-*.tar")["train"]
        ours = [sample for address in addresses for _, sample in read_shard(address, 0, False, skipped)]
        local = find_shards(f"{shards}/train-*.tar")["train"]
        assert ours == [sample for address in local for _, sample in read_shard(address)] and len(ours) == 24
        assert proxy.num_cut == 2 and not skipped.shards
        client.delete_object(Bucket="scenes", Key="train-00000.tar")
        assert not list(read_shard(addresses[0], 0, False, skipped)) and list(skipped.shards) == [addresses[0]]
    finally:
        proxy.server.close()
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
    assert secret not in caplog.text + "".join(capfd.readouterr()) and os.environ["AWS_SECRET_ACCESS_KEY"] == secret
