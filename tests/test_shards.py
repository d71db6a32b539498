"""Laws of training on shards: each sample once an epoch, exact resume, what is damaged is named."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from data_scripts import load_captions
from data_scripts.load import Shards, load_for_training
from data_scripts.shards import Skipped, find_shards, read_shard
from data_scripts.train_tokenizer import train_tokenizer
from system.errors import UserError
from training import shards as training_shards
from training.shards import CaptionStream, StreamSampler

SIZES = (7, 5, 1, 6, 4)  # samples of each shard: 23, of which some have two captions


@pytest.fixture(scope="module")
def rows(small_scenes):
    return load_captions(small_scenes)["train"]


@pytest.fixture(scope="module")
def images(rows):
    import datasets

    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    return [image["bytes"] for image in undecoded["image"]]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def captions_of(number: int) -> list[str]:
    """One caption, of every third image two; all are unique."""
    return [f"caption {number} {kind}" for kind in (("first", "second") if number % 3 == 0 else ("only",))]


@pytest.fixture(scope="module")
def tars(images, tmp_path_factory) -> list[str]:
    folder, number = tmp_path_factory.mktemp("tars"), 0
    for shard, size in enumerate(SIZES):
        members = []
        for _ in range(size):
            members.append((f"{number:05}.png", images[number % len(images)]))
            members.append(
                (f"{number:05}.json", json.dumps({"captions": captions_of(number), "status": None}).encode())
            )
            number += 1
        write_tar(folder / f"{shard:05}.tar", members)
    return [str(folder / f"{shard:05}.tar") for shard in range(len(SIZES))]


ALL = Counter(caption for number in range(sum(SIZES)) for caption in captions_of(number))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(list(ALL), 80)


@pytest.fixture
def stream(tars, tokenizer, monkeypatch):
    monkeypatch.setattr(training_shards, "BLOCK_CAPTIONS", 6)
    return CaptionStream(Shards(tars, False, list(ALL)), tokenizer)


def samplers(stream: CaptionStream, num_processes: int, step_captions: int = 2, epoch: int = 0) -> list[StreamSampler]:
    made = [
        StreamSampler(stream, step_captions, True, False, 3, process, num_processes) for process in range(num_processes)
    ]
    for sampler in made:
        sampler.set_epoch(epoch)
    return made


def texts(stream: CaptionStream, items) -> list[str]:
    return [stream.tokenizer.decode(item.token_ids, skip_special_tokens=True) for item in items]


@pytest.mark.parametrize("num_processes", [1, 2, 4, 7])
def test_each_caption_comes_once_an_epoch_over_all_processes(stream, num_processes):
    orders = []
    for epoch in (0, 1, 0):
        read = [texts(stream, sampler) for sampler in samplers(stream, num_processes, epoch=epoch)]
        assert Counter(caption for of_one in read for caption in of_one) == ALL
        orders.append(read)
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("now", [1, 2, 4])
def test_a_run_resumed_anywhere_reads_the_very_next_caption_and_each_once(stream, num_processes, now):
    """With as many processes the same order; with others each caption once; and so a second time, from where that one is."""
    whole = [texts(stream, sampler) for sampler in samplers(stream, num_processes)]
    for steps in range(1, 14):
        seen, positions = Counter(), []
        for sampler in samplers(stream, num_processes):
            items = iter(sampler)
            mine = texts(stream, [item for item, _ in zip(items, range(2 * steps), strict=False)])
            next(items, None)  # a loader is ahead of the training
            seen.update(mine)
            positions.append(sampler.position(2 * steps))
        positions = json.loads(json.dumps(positions))
        step_captions = max(2 * num_processes // now, 1)
        again = samplers(stream, now, step_captions)
        second, positions_again = Counter(), []
        for process, sampler in enumerate(again):
            sampler.resume(positions, steps)
            items = iter(sampler)
            mine = texts(stream, [item for item, _ in zip(items, range(step_captions), strict=False)])
            if now == num_processes:
                assert mine == whole[process][2 * steps :][:step_captions]
            second.update(mine)
            positions_again.append(sampler.position(step_captions))
        third = Counter()
        for sampler in samplers(stream, num_processes):
            sampler.resume(json.loads(json.dumps(positions_again)), steps + 1)
            third.update(texts(stream, sampler))
        assert seen + second + third == ALL


def test_shards_of_tars_and_parquet_give_the_same_samples(tars, images, tmp_path):
    bare, wrapped = tmp_path / "bare.parquet", tmp_path / "wrapped.parquet"
    captions = [captions_of(number) for number in range(SIZES[0])]
    pq.write_table(pa.table({"jpg": images[: SIZES[0]], "caption": captions}), bare, row_group_size=3)
    cells = [{"bytes": image, "path": "x.png"} for image in images[: SIZES[0]]]
    pq.write_table(pa.table({"image": cells, "text": captions}), wrapped, row_group_size=2)
    expected = [(number, sample.image, sample.captions) for number, sample in read_shard(tars[0])]
    for path in (bare, wrapped):
        for start in (0, 3, 5):
            read = [(number, sample.image, sample.captions) for number, sample in read_shard(str(path), start)]
            assert read == expected[start:]


def test_what_cannot_be_used_is_counted_or_an_error(tars, tmp_path, images):
    damaged, content = tmp_path / "damaged.tar", Path(tars[0]).read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    odd = tmp_path / "odd.tar"
    write_tar(
        odd,
        [
            ("a.png", images[0]),
            ("a.txt", b"a dog"),
            ("b.png", images[0]),
            ("c.txt", b"no image"),
            ("d.png", images[1]),
            ("d.txt", b"a cat"),
            ("e.cls", b"3"),
        ],
    )
    with tarfile.open(odd, "a") as archive:
        link = tarfile.TarInfo("f.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    skipped = Skipped()
    read = [
        sample.captions
        for path in (damaged, tmp_path / "absent.tar", odd)
        for _, sample in read_shard(str(path), 0, False, skipped)
    ]
    assert read[-2:] == [["a dog"], ["a cat"]] and 0 < len(read) - 2 < SIZES[0]
    assert set(skipped.shards) == {str(damaged), str(tmp_path / "absent.tar")} and skipped.samples.total() == 4
    for path in (damaged, tmp_path / "absent.tar", odd):
        with pytest.raises(UserError, match=path.name):
            list(read_shard(str(path), 0, True))


def test_a_shard_is_read_as_the_table_of_its_tar_is(tmp_path, images):
    """The .json's captions before the .txt's, every kind of image, and what of a sample is not used is counted."""
    from data_scripts.img2dataset import tar_rows

    avif = io.BytesIO()
    Image.open(io.BytesIO(images[0])).save(avif, "AVIF")
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(images[1])).save(jpeg, "JPEG")
    members = [("a.avif", avif.getvalue()), ("a.txt", b"one"), ("b.jfif", jpeg.getvalue()), ("b.txt", b"two\nlines")]
    members += [("c.txt", b"not these"), ("c.json", b'{"caption": ["three", "", "four"]}'), ("c.png", images[2])]
    members += [("d.jpg", jpeg.getvalue()), ("d.png", images[3]), ("d.txt", b"five")]
    write_tar(tmp_path / "0.tar", members)
    skipped = Skipped()
    read = [sample for _, sample in read_shard(str(tmp_path / "0.tar"), 0, False, skipped)]
    rows = list(tar_rows(tmp_path / "0.tar", "0.tar"))
    assert [sample.image for sample in read] == [row.read() for row in rows if row.read]
    captions = [["one"], ["two\nlines"], ["three", "four"], ["five"]]
    assert [sample.captions for sample in read] == captions
    assert [[text for text in row.captions if text] for row in rows if row.read] == captions
    assert [row.place for row in rows if row.note] == ["0.tar, d.png"]
    assert skipped.parts.total() == 2 and not skipped.samples and len((skipped + skipped).lines()) == 2


def test_rows_of_one_image_are_its_references_and_other_splits_are_not_trained_on(tmp_path, images, capsys):
    """As in a table: a row per caption, with and without IDs, in a split that is validated on."""
    ids = {"no id": [None] * 6, "ids": [0, 1, 2] * 2, "ids anew": [0] * 6}
    for name, image_ids in ids.items():
        texts = [f"{name} {number}" for number in range(6)]
        table = pa.table({"image": images[:3] * 2, "caption": texts, "image_id": pa.array(image_ids, pa.int64())})
        for split in ("train", "validation"):
            (tmp_path / name).mkdir(exist_ok=True)
            pq.write_table(table, tmp_path / name / f"{split}-00000.parquet")
        dataset, _ = load_for_training(str(tmp_path / name), streaming=True)
        assert dataset["validation"]["captions"] == [[texts[number], texts[number + 3]] for number in range(3)]
    (tmp_path / "bad").mkdir()
    table = pa.table({"image": [images[0], b"", images[1]], "caption": ["a", "b", ""]})
    for split in ("train", "validation"):
        pq.write_table(table, tmp_path / "bad" / f"{split}-00000.parquet")
    capsys.readouterr()
    assert len(load_for_training(str(tmp_path / "bad"), streaming=True)[0]["validation"]) == 1
    told = capsys.readouterr().out
    assert "no image: 1" in told and "empty caption: 1" in told
    for number, split in enumerate(("train", "val")):
        table = pa.table({"image": images[:2], "caption": ["a", "b"], "Split": ["train", split]})
        (tmp_path / "column").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "column" / f"train-{number}.parquet")
    with pytest.raises(UserError, match="'split' with rows of val"):
        load_for_training(f"{tmp_path}/column/*.parquet")


def test_captions_that_are_truncated_are_counted(tars, tokenizer, caplog):
    lengths = CaptionStream(Shards(tars, False, list(ALL)), tokenizer).lengths
    assert not caplog.messages
    CaptionStream(Shards(tars, False, list(ALL)), tokenizer, max_length=int(lengths.max()) - 1)
    assert f"{(lengths == lengths.max()).sum()} of the first {len(lengths)} captions" in caplog.text


def test_a_connection_that_breaks_is_opened_again_and_no_sample_comes_twice(tars, monkeypatch):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    address = "memory://bucket/shard.tar"
    with fsspec.open(address, "wb") as file:
        file.write(Path(tars[0]).read_bytes())
    expected = [(number, sample.captions) for number, sample in read_shard(tars[0])]
    plain, breaks, waits = MemoryFileSystem.open, [], []

    class Breaking(io.BytesIO):
        def read(self, size=-1):
            if len(breaks) < 3 and self.tell() > 2000:
                breaks.append(self.tell())
                raise OSError("connection reset; Authorization: Bearer abcdef")
            return super().read(min(size, 512) if size > 0 else size)

    monkeypatch.setattr(
        MemoryFileSystem,
        "open",
        lambda self, path, *args, **options: Breaking(plain(self, path, *args, **options).read()),
    )
    monkeypatch.setattr("data_scripts.shards.time.sleep", waits.append)
    skipped = Skipped()
    assert [(number, sample.captions) for number, sample in read_shard(address, 0, False, skipped)] == expected
    assert len(breaks) == len(waits) == 3 and not skipped.shards


def test_sources_are_expanded(tars, monkeypatch):
    folder = str(Path(tars[0]).parent)
    assert find_shards(f"{folder}/*.tar")["train"] == find_shards(f"{folder}/0000{{0..4}}.tar")["train"] == tars
    assert find_shards(folder)["train"] == tars
    with pytest.raises(UserError, match="no shard"):
        find_shards(f"{folder}/*.zip")


def test_the_last_shard_is_held_out_where_there_is_no_validation_split(tars):
    dataset, captions = load_for_training(f"{Path(tars[0]).parent}/*.tar")
    assert dataset["train"].addresses == tars[:-1] and len(dataset["validation"]) == SIZES[-1]
    held_out = {caption for texts in dataset["validation"]["captions"] for caption in texts}
    assert not held_out & set(captions) and held_out | set(captions) == set(ALL)
    with pytest.raises(UserError, match="max_train_samples"):
        load_for_training(tars[0], max_images=3)


def test_an_image_that_does_not_decode_has_no_loss_and_is_named(stream, caplog):
    items = list(samplers(stream, 1)[0])[:3]
    broken = items[1].__class__(**{**vars(items[1]), "image": b"no image"})
    made = stream.__getitems__([items[0], broken, items[2]])
    assert set(made[1]["labels"]) == {-100} and made[0]["labels"] == items[0].token_ids
    assert broken.place in caplog.text
    assert np.array(made[0]["image"]).shape[-1] == 3


# -------------------------------------------------------------------------------------------- features of shards


@pytest.fixture
def encode(tars, starts, tmp_path):
    """Encode the shards by the encoder of a small captioner; what was encoded, by shard, is counted."""
    from training import encode as command

    counted = Counter()
    plain = command.encode_shard

    def run(
        folder: str,
        monkeypatch,
        kill_at: int | None = None,
        process: int = 0,
        num_processes: int = 1,
        kind: str = "lstm",
        words: tuple[str, ...] = (),
    ):
        def encode_shard(address, *arguments):
            counted[address] += 1
            if kill_at is not None and counted.total() == kill_at:
                monkeypatch.setattr("training.features.quantize_features", killed)
            return plain(address, *arguments)

        def killed(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patches:
            monkeypatch = patches
            patches.setattr(command, "encode_shard", encode_shard)
            patches.setattr(PartialState(), "process_index", process)
            patches.setattr(PartialState(), "num_processes", num_processes)
            glob = f"{Path(tars[0]).parent}/*.tar"
            options = ["--model_name_or_path", starts[kind], "--output_dir", str(tmp_path / folder)]
            command.main([glob, *options, *words])
        return tmp_path / folder

    run.counted = counted
    return run


def features_in(folder: Path) -> dict[str, list]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_shards_are_encoded_once_whatever_is_killed_and_by_however_many(encode, monkeypatch, tars):
    alone = features_in(encode("alone", monkeypatch))
    assert list(alone) == [f"{shard:05}.parquet" for shard in range(len(SIZES))]
    assert encode.counted == Counter(tars)
    encode.counted.clear()
    for kill_at in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            encode("shared", monkeypatch, kill_at=kill_at, process=0, num_processes=2)
    for process in (1, 0):
        encode("shared", monkeypatch, process=process, num_processes=2)
    # Of the first process's shards 0, 2, 4 the second was in flight at the first kill, the last one at the second.
    assert [encode.counted[tar] for tar in tars] == [1, 1, 2, 1, 2]
    assert features_in(encode("shared", monkeypatch)) == alone


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_processes_that_do_not_know_of_one_another_do_not_encode_everything_each(encode, monkeypatch, capsys):
    """As two of `accelerate launch --multi_gpu` on a machine without GPUs, where nothing says that CPUs are meant."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    with pytest.raises(SystemExit) as ended:
        encode("twice", monkeypatch)
    assert ended.value.code == 2 and "ACCELERATE_USE_CPU" in capsys.readouterr().err
    assert not encode.counted


def test_threads_keep_the_shards_order_and_count_what_they_cannot_decode(encode, monkeypatch, caplog):
    """The third image that is decoded, whichever that is, cannot be."""
    from data_scripts import images

    plain, decoded = images.decode_image, iter(range(1000))

    def decode_image(data: bytes):
        if next(decoded) == 2:
            raise images.BadImage("is torn")
        return plain(data)

    alone = features_in(encode("alone", monkeypatch, words=("--batch_size", "2", "--num_workers", "1")))
    monkeypatch.setattr(images, "decode_image", decode_image)
    several = features_in(encode("several", monkeypatch, words=("--batch_size", "2", "--num_workers", "4")))
    assert "is torn" in caplog.text
    rows = {name: [row["image_id"] for row in rows] for name, rows in alone.items()}
    left = {name: [row["image_id"] for row in rows] for name, rows in several.items()}
    assert sum(map(len, left.values())) == sum(map(len, rows.values())) - 1
    for name, names in left.items():
        assert names == [one for one in rows[name] if one in names]
        kept = {row["image_id"]: row["image"] for row in alone[name]}
        assert all(kept[row["image_id"]] == row["image"] for row in several[name])


def test_training_reads_features_as_it_reads_images(encode, monkeypatch, starts, tars):
    """Of the same images in the same order; and of another encoder they are refused."""
    from modeling.captioner import Captioner
    from training.batches import CaptionCollator
    from training.pairs import pairs_of_split

    folder = encode("features", monkeypatch)
    captioner = Captioner.load(starts["lstm"])
    captioner.encoder.requires_grad_(False)
    shards = [Shards(addresses, False, list(ALL)) for addresses in (tars, sorted(map(str, folder.iterdir())))]
    streams = [pairs_of_split(rows, captioner, None, [None]) for rows in shards]
    plain, cached = [stream.__getitems__(list(samplers(stream, 1)[0])[:6]) for stream in streams]
    assert [item["labels"] for item in plain] == [item["labels"] for item in cached]
    collator = CaptionCollator(captioner.processor, share_images="index")
    pixels, states = collator(plain)["pixel_values"], collator(cached)["encoder_outputs"].last_hidden_state
    with torch.no_grad():
        expected = captioner.encoder.eval()(pixels).last_hidden_state
    torch.testing.assert_close(states, expected, atol=1e-3, rtol=1e-3)
    other = Captioner.load(starts["vit_gpt2"])
    other.encoder.requires_grad_(False)
    with pytest.raises(UserError, match="another encoder"):
        pairs_of_split(shards[1], other, None, [None])
