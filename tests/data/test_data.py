"""The data: verified, fetched once, never half there, and read in one order by everybody."""

import hashlib
import http.server
import multiprocessing
import os
import shutil
import tarfile
import threading
import time

import pytest
import torch
import torchvision
from torchvision.transforms.functional import to_pil_image

from pipetutor.data import fetch, loader, synthetic
from pipetutor.data.fetch import FILES, DataError, prepare, ready

FORKS = multiprocessing.get_context("forkserver")  # its server has loaded torch already; see conftest.py


def test_md5_sums_are_torchvisions():
    cifar = torchvision.datasets.CIFAR10
    listed = dict([*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])])
    assert FILES["cifar10"] == fetch.Files(cifar.base_folder, listed, cifar.filename, cifar.tgz_md5)


def test_the_synthetic_set_is_drawn_once_and_read_by_torchvision(tmp_path):
    prepare("synthetic", tmp_path)
    train, test = (loader.Synthetic(tmp_path, train=train) for train in (True, False))
    assert (len(train), len(test), train.data.shape[1:]) == (synthetic.TRAIN, synthetic.TEST, (32, 32, 3))
    assert tuple(train.classes) == synthetic.CLASSES
    assert all(train.targets.count(label) == synthetic.TRAIN // 10 for label in range(10))
    written = (tmp_path / FILES["synthetic"].folder).stat().st_mtime_ns
    prepare("synthetic", tmp_path)
    assert (tmp_path / FILES["synthetic"].folder).stat().st_mtime_ns == written
    image, _ = loader.load("synthetic", True, -1, str(tmp_path))[0]
    assert image.shape == (3, 224, 224) and image.dtype == torch.float32


def test_a_micro_batch_is_enlarged_to_the_last_bit_as_image_by_image(tmp_path):
    prepare("synthetic", tmp_path)
    one_by_one = loader.load("synthetic", True, -1, str(tmp_path))
    order, device = list(range(0, 64, 2)), torch.device("cpu")
    lean = loader.Loader(loader.Pixels(one_by_one), order, 8, device)
    for (images, labels), (wanted, numbers) in zip(lean, loader.Loader(one_by_one, order, 8, device), strict=True):
        assert images.shape == (8, 3, 224, 224) and images.dtype == torch.float32
        assert torch.equal(images, wanted) and torch.equal(labels, numbers)
    assert (
        next(iter(loader.Loader(loader.Pixels(one_by_one), order, 8, device, torch.bfloat16)))[0].dtype
        == torch.bfloat16
    )
    loaded = next(iter(loader.Loader(loader.Labels(one_by_one), order, 8, device, torch.bfloat16)))
    assert [part.tolist() for part in loaded] == [[one_by_one.targets[i] for i in order[:8]]] * 2


def enlarge_noise() -> None:
    noise = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = torch.stack([loader.TRANSFORM(to_pil_image(image)) for image in noise])
    assert torch.equal(loader.enlarge(noise), wanted)
    once = torch.nn.functional.interpolate(noise.float(), size=256, mode="bilinear")[..., 16:240, 16:240]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loader.MEAN, loader.STD))
    differs = once.add(0.5).floor() - wanted.mul(std).add(mean).mul(255).round()
    assert differs.abs().max() == 1, "rounded in one place instead of two, some pixels should differ, by 1 of 255"


def enlarge_noise_with_the_least_of_kernels() -> None:
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    enlarge_noise()


def test_noise_is_enlarged_as_by_pillow_on_every_processor(monkeypatch):
    enlarge_noise()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # read when torch is loaded
    other = multiprocessing.get_context("spawn").Process(target=enlarge_noise_with_the_least_of_kernels)
    other.start()
    other.join(100)
    other.kill()
    assert other.exitcode == 0


def test_other_bytes_are_refused_after_drawing(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SEED", 1)
    with pytest.raises(DataError, match="md5"):
        prepare("synthetic", tmp_path)
    assert not (tmp_path / FILES["synthetic"].folder).exists()


@pytest.mark.parametrize("harm", ["truncate", "alter", "remove"])
def test_a_damaged_batch_file_is_named_and_kept(tmp_path, harm):
    prepare("synthetic", tmp_path)
    path = tmp_path / FILES["synthetic"].folder / "data_batch_1"
    whole = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if harm == "truncate" else whole[:-1] + b"?")
    with pytest.raises(DataError, match="data_batch_1"):
        prepare("synthetic", tmp_path)
    assert path.exists() == (harm != "remove")


def test_a_damaged_archive_is_named_and_kept(tmp_path):
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"half an archive")
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz is damaged"):
        prepare("cifar10", tmp_path)
    assert archive.read_bytes() == b"half an archive"


def test_without_a_network_the_error_comes_soon_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    begin = time.monotonic()
    with pytest.raises(DataError) as caught:
        prepare("cifar10", tmp_path)
    assert time.monotonic() - begin < 30
    for word in ("127.0.0.1:9", "--dataset synthetic", "cifar-10-python.tar.gz into"):
        assert word in str(caught.value)


def test_a_network_that_never_answers_ends_in_time(tmp_path, monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(fetch, "CONNECT_SECONDS", 1)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cifar-10-python.tar.gz"
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        with pytest.raises(DataError, match="--dataset synthetic"):
            prepare("cifar10", tmp_path)


@pytest.mark.parametrize(
    "proxy",
    ["garbage", "http://127.0.0.1:port", "http://", "://", "socks5://127.0.0.1:9", "http://me:secret@127.0.0.1:9"],
)
def test_a_proxy_that_cannot_be_used_is_named_at_once(tmp_path, monkeypatch, capfd, proxy):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://cifar.invalid/cifar-10-python.tar.gz")
    begin = time.monotonic()
    with pytest.raises(DataError) as caught:
        prepare("cifar10", tmp_path)
    assert time.monotonic() - begin < fetch.CONNECT_SECONDS
    said = str(caught.value)
    assert f"through http_proxy={proxy.removeprefix('http://me:secret@')} failed (" in said and "secret" not in said
    assert "--dataset synthetic" in said and "\n" not in said and "Traceback" not in capfd.readouterr().err


def test_an_archive_that_was_put_there_is_unpacked_without_a_symlink_or_a_network(tmp_path, monkeypatch):
    folder = tmp_path / "packed" / FILES["cifar10"].folder
    folder.mkdir(parents=True)
    synthetic.write(folder)
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / FILES["cifar10"].archive
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    drawn = fetch.Files(folder.name, FILES["synthetic"].md5, archive.name, md5)

    def refuse(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setitem(FILES, "cifar10", drawn)
    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(fetch, "_download", refuse)
    prepare("cifar10", tmp_path / "data")
    assert ready("cifar10", tmp_path / "data") and archive.exists()


def pretend_cifar10(url: str, archive_md5: str) -> None:
    """In this process, CIFAR-10 is a small archive that a local server has."""
    cifar, drawn = torchvision.datasets.CIFAR10, FILES["synthetic"]
    cifar.url, cifar.tgz_md5 = url, archive_md5
    cifar.train_list = [["data_batch_1", drawn.md5["data_batch_1"]]]
    cifar.test_list = [["test_batch", drawn.md5["test_batch"]]]
    cifar.meta = cifar.meta | {"md5": drawn.md5["batches.meta"]}
    FILES["cifar10"] = fetch.Files(cifar.base_folder, drawn.md5, cifar.filename, archive_md5)


def cold_rank(rank: int, port: int, url: str, archive_md5: str, where: str) -> None:
    pretend_cifar10(url, archive_md5)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=4)
    # Two ranks on each of two hosts that share a file system: two of them try to fetch.
    assert len(loader.cifar_trainset(rank % 2, where)) == synthetic.TRAIN
    assert len(loader.load("cifar10", False, rank % 2, where)) == synthetic.TEST
    torch.distributed.destroy_process_group()


def test_four_cold_ranks_cause_exactly_one_fetch(tmp_path):
    from pipetutor.processes.environment import free_port

    folder = tmp_path / "served" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    synthetic.write(folder)
    archive = tmp_path / "served" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    fetched = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(archive.parent))

        def do_GET(self):
            try:
                super().do_GET()
                fetched.append(self.path)
            except ConnectionError:  # torchvision opens the address once more, to follow redirects
                self.close_connection = True

        def log_message(self, *args):
            pass

    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    where = str(tmp_path / "data of all")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, port = f"http://127.0.0.1:{server.server_address[1]}/{archive.name}", free_port()
        ranks = [FORKS.Process(target=cold_rank, args=(rank, port, url, md5, where)) for rank in range(4)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(90)
        server.shutdown()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0, 0]
    assert len(fetched) == 1
    assert sorted(p.name for p in (tmp_path / "data of all").iterdir() if p.name[0] != ".") == [
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
    ]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("size", [24, 25, 31])
def test_passes_are_shuffled_anew_and_never_ragged(size, replicas):
    def read(replicas):
        images = torch.utils.data.TensorDataset(torch.arange(size), torch.arange(size))
        loaders = [loader.micro_batches(images, 2, replicas, r, 7, torch.device("cpu")) for r in range(replicas)]
        return [torch.cat([next(loader)[0] for loader in loaders]) for _ in range(60 // replicas)]

    batches = read(replicas)
    assert all(len(batch) == 2 * replicas for batch in batches)
    a_pass = size // replicas // 2
    passes = [torch.cat(batches[i * a_pass : (i + 1) * a_pass]).tolist() for i in range(3)]
    assert all(len(set(p)) == len(p) for p in passes), "an image twice in a pass"
    assert passes[0] != passes[1] != passes[2]
    alone = torch.cat(read(1))[: 2 * replicas]
    assert sorted(alone.tolist()) == sorted(batches[0].tolist()), "replicas share the images of one"


def test_a_full_or_read_only_disk_is_a_clear_error(tmp_path, monkeypatch):
    place = tmp_path / "file"
    place.write_text("not a directory")
    with pytest.raises(
        DataError, match=r"cannot write the synthetic data to .*: File exists; give another data directory"
    ):
        prepare("synthetic", place)

    def no_space(folder):
        (folder / "data_batch_1").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "write", no_space)
    with pytest.raises(DataError, match="No space left on device; free the disk, or give another data directory"):
        prepare("synthetic", tmp_path)
    assert not ready("synthetic", tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
